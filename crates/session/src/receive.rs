//! Files from the client: the receiver's half of fsutil's protocol.
//!
//! The client lists everything first; what is wanted of it is asked for by number and comes in pieces. Waiting is
//! blocking here: whoever takes the files writes them to disk.
//!
//! Invariant: an entry is seen after its order and its path were checked; data is seen only of files asked for;
//! nothing is asked for twice.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{MetadataMap, MetadataValue};

use crate::entry::{Entry, Kind, Order};
use crate::error::{Error, Result};
use crate::messages::{BytesMessage, Packet, PacketKind};
use crate::session::{Session, add};

/// How long the client may be silent in between: it may be reading a slow disk.
const STALL: Duration = Duration::from_mins(2);
/// Files asked for and not yet complete.
const WINDOW: usize = 128;
/// Packets that wait to be written.
const BACKLOG: usize = 128;
/// The most entries of one listing.
const MOST_ENTRIES: u32 = 5_000_000;
/// The most bytes of all their paths and links.
const MOST_NAMES: usize = 128 << 20;

pub(crate) const METHOD: &str = "/moby.filesync.v1.FileSync/DiffCopy";
pub(crate) const FOLDER: &str = "dir-name";
/// Ours: patterns of any characters.
pub(crate) const OUR_EXCLUDE: &str = "brigantine-exclude-bin";
pub(crate) const OUR_FOLLOW: &str = "brigantine-follow-bin";

/// What is wanted of a client's folder.
#[derive(Debug, Clone, Default)]
pub struct Wanted<'w> {
    /// The folder's name in the session: `context` or `dockerfile`.
    pub folder: &'w str,
    /// Only these paths and what links lead to from them; all when empty.
    pub follow: Vec<String>,
    /// The same with wildcards, for clients that read them as we do ([`Asked::follow`](crate::Asked)); as `follow`
    /// when empty.
    pub patterns: Vec<String>,
    /// Without what these patterns match.
    pub exclude: Vec<String>,
}

/// What comes next.
#[derive(Debug)]
pub enum News {
    /// A file, with the number it is asked for by.
    Listed(u32, Entry),
    /// There are no more files.
    ListEnd,
    /// A part of a file.
    Data(u32, Bytes),
    /// A file is complete.
    End(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It has no bytes to ask for.
    Nothing,
    Offered,
    Asked,
    Complete,
}

/// One transfer. Dropping it breaks it off.
#[derive(Debug)]
pub struct Receiver {
    packets: mpsc::Receiver<Result<Packet>>,
    requests: mpsc::Sender<Packet>,
    order: Order,
    files: Vec<State>,
    /// Bytes of all paths and links.
    names: usize,
    listed: bool,
    /// Asked for by the caller, not yet by us.
    waiting: VecDeque<u32>,
    under_way: usize,
}

impl Session {
    /// Begins to receive one of the client's folders.
    pub fn files(self: &Arc<Self>, wanted: &Wanted<'_>) -> Result<Receiver> {
        if !self.offers(METHOD) {
            return Err(Error::NotOffered("files"));
        }
        let mut metadata = MetadataMap::new();
        add(&mut metadata, FOLDER, wanted.folder);
        // What is left out here has to be left out by the caller anyway: all or nothing, for later patterns may take
        // back what earlier ones leave out.
        if wanted.exclude.iter().all(|pattern| is_plain(pattern)) {
            for pattern in &wanted.exclude {
                add(&mut metadata, "exclude-patterns", pattern);
            }
        }
        if wanted.follow.iter().all(|path| is_plain(path)) {
            for path in &wanted.follow {
                add(&mut metadata, "followpaths", path);
            }
        }
        // Others do not know these.
        let patterns = if wanted.patterns.is_empty() { &wanted.follow } else { &wanted.patterns };
        for (key, all) in [(OUR_EXCLUDE, &wanted.exclude), (OUR_FOLLOW, patterns)] {
            for text in all {
                metadata.append_bin(key, MetadataValue::from_bytes(text.as_bytes()));
            }
        }
        let (requests, outgoing) = mpsc::channel(WINDOW + 1);
        let (incoming, packets) = mpsc::channel(BACKLOG);
        let (session, what) = (Arc::clone(self), format!("receive the folder {}", wanted.folder));
        tokio::spawn(async move {
            let what = || what.clone();
            let pump = session.pump(&what, METHOD, metadata, outgoing, &incoming);
            let ended = tokio::select! {
                ended = pump => ended,
                () = incoming.closed() => return,
            };
            if let Err(error) = ended
                && incoming.send(Err(error)).await.is_err()
            {
                tracing::trace!("nobody waits for the client's files any more");
            }
        });
        Ok(Receiver {
            packets,
            requests,
            order: Order::default(),
            files: Vec::new(),
            names: 0,
            listed: false,
            waiting: VecDeque::new(),
            under_way: 0,
        })
    }

    async fn pump(
        &self,
        what: &(dyn Fn() -> String + Sync),
        method: &'static str,
        metadata: MetadataMap,
        outgoing: mpsc::Receiver<Packet>,
        incoming: &mpsc::Sender<Result<Packet>>,
    ) -> Result<()> {
        let opened = self.stream(what, method, metadata, ReceiverStream::new(outgoing));
        let mut stream = self.within(STALL, what, opened).await?;
        loop {
            let next = async { self.answer(what, stream.message().await).await };
            let Some(packet) = self.within(STALL, what, next).await? else { return Ok(()) };
            if incoming.send(Ok(packet)).await.is_err() {
                return Ok(());
            }
        }
    }

    /// The bytes of an upload that the client keeps ready under a path of its own.
    pub fn upload(self: &Arc<Self>, host: &str, path: &str) -> Result<mpsc::Receiver<Result<Bytes>>> {
        const METHOD: &str = "/moby.upload.v1.Upload/Pull";
        if !self.offers(METHOD) {
            return Err(Error::NotOffered("upload"));
        }
        let mut metadata = MetadataMap::new();
        if !add(&mut metadata, "urlpath", path) || !add(&mut metadata, "urlhost", host) {
            return Err(Error::protocol(format!("{path:?} cannot be the name of an upload")));
        }
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let (session, what) = (Arc::clone(self), format!("receive the upload {path}"));
        tokio::spawn(async move {
            let what = || what.clone();
            let pump = async {
                let nothing = tokio_stream::pending::<BytesMessage>();
                let opened = session.stream(&what, METHOD, metadata, nothing);
                let mut stream = session.within(STALL, &what, opened).await?;
                loop {
                    let next = async { session.answer(&what, stream.message().await).await };
                    let next: Option<BytesMessage> = session.within(STALL, &what, next).await?;
                    let Some(message) = next else { return Ok(()) };
                    if sender.send(Ok(message.data)).await.is_err() {
                        return Ok(());
                    }
                }
            };
            let ended: Result<()> = pump.await;
            if let Err(error) = ended
                && sender.send(Err(error)).await.is_err()
            {
                tracing::trace!("nobody waits for the client's upload any more");
            }
        });
        Ok(receiver)
    }
}

/// Whether a pattern means the same to every client: they read headers as ASCII.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|b| (b' '..=b'~').contains(&b)) && text.trim() == text && !text.is_empty()
}

impl Receiver {
    /// What comes next; `None` when everything is listed and all that was asked for is here. Blocks.
    pub fn news(&mut self) -> Result<Option<News>> {
        loop {
            if self.listed && self.under_way == 0 && self.waiting.is_empty() {
                return Ok(None);
            }
            let packet = self.packets.blocking_recv().ok_or_else(|| {
                Error::protocol("the transfer of files ended before all of them were complete")
            })??;
            if let Some(news) = self.take(packet)? {
                return Ok(Some(news));
            }
        }
    }

    fn take(&mut self, packet: Packet) -> Result<Option<News>> {
        let kind = PacketKind::try_from(packet.kind)
            .map_err(|_unknown| Error::protocol(format!("a packet of kind {}", packet.kind)))?;
        match kind {
            PacketKind::Stat if self.listed => {
                Err(Error::protocol("a file was listed after the end of the list"))
            }
            PacketKind::Stat => {
                let Some(stat) = packet.stat else {
                    self.listed = true;
                    return Ok(Some(News::ListEnd));
                };
                self.names += stat.path.len() + stat.linkname.len();
                let entry = Entry::of(stat)?;
                self.order.check(&entry)?;
                if self.names > MOST_NAMES {
                    return Err(Error::protocol(format!(
                        "the names in the folder have more than {MOST_NAMES} bytes"
                    )));
                }
                let number = u32::try_from(self.files.len()).unwrap_or(u32::MAX);
                if number >= MOST_ENTRIES {
                    return Err(Error::protocol(format!("the folder has more than {MOST_ENTRIES} entries")));
                }
                let has_bytes = matches!(entry.kind, Kind::File { .. });
                self.files.push(if has_bytes { State::Offered } else { State::Nothing });
                Ok(Some(News::Listed(number, entry)))
            }
            PacketKind::Data => {
                if self.files.get(packet.id as usize) != Some(&State::Asked) {
                    return Err(Error::protocol(format!(
                        "data of the file number {}, which was not asked for",
                        packet.id
                    )));
                }
                if !packet.data.is_empty() {
                    return Ok(Some(News::Data(packet.id, packet.data)));
                }
                self.files[packet.id as usize] = State::Complete;
                self.under_way -= 1;
                self.advance()?;
                Ok(Some(News::End(packet.id)))
            }
            PacketKind::Error => Err(Error::Refused {
                what: "receive files".to_owned(),
                message: String::from_utf8_lossy(&packet.data).into_owned(),
            }),
            PacketKind::Request => Err(Error::protocol("a request for a file from the one who has them")),
            PacketKind::Fin => Err(Error::protocol("the transfer was finished before it was complete")),
        }
    }

    /// Asks for a file that was listed.
    pub fn ask(&mut self, number: u32) -> Result<()> {
        match self.files.get_mut(number as usize) {
            Some(state @ State::Offered) => *state = State::Asked,
            _ => return Err(Error::protocol(format!("the file number {number} cannot be asked for"))),
        }
        self.waiting.push_back(number);
        self.advance()
    }

    fn advance(&mut self) -> Result<()> {
        while self.under_way < WINDOW
            && let Some(number) = self.waiting.pop_front()
        {
            self.send(Packet::of(PacketKind::Request, number, Bytes::new()))?;
            self.under_way += 1;
        }
        Ok(())
    }

    fn send(&self, packet: Packet) -> Result<()> {
        self.requests.blocking_send(packet).map_err(|_gone| Error::Ended)
    }

    /// Says that everything is here, and waits for the client to have heard it. Blocks.
    pub fn finish(mut self) -> Result<()> {
        self.send(Packet::of(PacketKind::Fin, 0, Bytes::new()))?;
        match self.packets.blocking_recv() {
            // Some clients just close.
            None => Ok(()),
            Some(Ok(packet)) if packet.kind == PacketKind::Fin as i32 => Ok(()),
            Some(Ok(_)) => Err(Error::protocol("something came after the end of a transfer")),
            Some(Err(error)) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::Stat;

    fn receiver() -> (Receiver, mpsc::Receiver<Packet>) {
        let (requests, asked) = mpsc::channel(WINDOW + 1);
        let (_, packets) = mpsc::channel(1);
        let receiver = Receiver {
            packets,
            requests,
            order: Order::default(),
            files: Vec::new(),
            names: 0,
            listed: false,
            waiting: VecDeque::new(),
            under_way: 0,
        };
        (receiver, asked)
    }

    fn stat(path: &str) -> Packet {
        let stat = Stat { path: path.into(), mode: 0o644, ..Stat::default() };
        Packet { kind: PacketKind::Stat as i32, stat: Some(stat), ..Packet::default() }
    }

    fn data(id: u32, text: &'static str) -> Packet {
        Packet::of(PacketKind::Data, id, Bytes::from(text))
    }

    #[test]
    fn only_what_was_asked_for_is_taken() {
        let (mut receiver, mut asked) = receiver();
        assert!(matches!(receiver.take(stat("a")), Ok(Some(News::Listed(0, _)))));
        assert!(receiver.take(data(0, "x")).is_err());
        assert!(receiver.ask(1).is_err());
        receiver.ask(0).unwrap();
        assert!(receiver.ask(0).is_err());
        assert_eq!(asked.try_recv().unwrap().id, 0);
        assert!(matches!(receiver.take(data(0, "x")), Ok(Some(News::Data(0, _)))));
        assert!(matches!(receiver.take(data(0, "")), Ok(Some(News::End(0)))));
        assert!(receiver.take(data(0, "more")).is_err());
        assert!(receiver.take(stat("../b")).is_err());
        assert!(matches!(receiver.take(Packet::default()), Ok(Some(News::ListEnd))));
        assert!(receiver.take(stat("b")).is_err());
        for kind in [PacketKind::Request as i32, PacketKind::Fin as i32, PacketKind::Error as i32, 77] {
            assert!(receiver.take(Packet { kind, ..Packet::default() }).is_err(), "{kind}");
        }
        assert!(matches!(receiver.news(), Ok(None)));
    }

    #[test]
    fn only_so_many_files_are_asked_for_at_once() {
        let (mut receiver, mut asked) = receiver();
        for number in 0..WINDOW + 10 {
            receiver.take(stat(&format!("{number:04}"))).unwrap();
            receiver.ask(number as u32).unwrap();
        }
        let mut first = Vec::new();
        while let Ok(packet) = asked.try_recv() {
            first.push(packet.id);
        }
        assert_eq!(first.len(), WINDOW);
        receiver.take(data(3, "")).unwrap();
        assert_eq!(asked.try_recv().unwrap().id, WINDOW as u32);
    }

    #[test]
    fn patterns_that_not_every_client_reads_alike_are_kept_back() {
        for plain in ["a/b", "**/*.o", "!x y"] {
            assert!(is_plain(plain), "{plain}");
        }
        for other in ["ä", "a\tb", " a", ""] {
            assert!(!is_plain(other), "{other}");
        }
    }
}
