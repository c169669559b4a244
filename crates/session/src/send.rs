//! Results to the client: files one by one (the sender's half of fsutil's protocol), or the bytes of an archive.
//!
//! Invariant: requests are read while the list is being sent, whatever their number, so that neither side waits for
//! the other; each file is sent once, and only if it was offered.

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;

use crate::entry::{Entry, Kind};
use crate::error::{Error, Result};
use crate::messages::{BytesMessage, Packet, PacketKind};
use crate::session::Session;

pub(crate) const METHOD: &str = "/moby.filesync.v1.FileSend/DiffCopy";
/// Metadata that names an archive where a client takes several.
pub(crate) const NAME: &str = "buildkit-attachable-exporter-id";
/// Bytes of one packet.
const CHUNK: usize = 32 << 10;
/// Packets that wait to be sent.
const BACKLOG: usize = 64;

impl Session {
    /// Whether the client takes results.
    pub fn takes_files(&self) -> bool {
        self.offers(METHOD)
    }

    /// Sends files, in the order of their paths; returns when the client has them. Blocks: `runtime` is where the
    /// connection is served.
    pub fn send_files(
        self: &Arc<Self>,
        runtime: &tokio::runtime::Handle,
        entries: Vec<Entry>,
        mut open: impl FnMut(&[u8]) -> io::Result<File>,
    ) -> Result<()> {
        if !self.takes_files() {
            return Err(Error::NotOffered("place for files"));
        }
        let (packets, outgoing) = mpsc::channel(BACKLOG);
        let (asked, mut requests) = mpsc::unbounded_channel();
        let mut offered: Vec<bool> =
            entries.iter().map(|entry| matches!(entry.kind, Kind::File { .. } | Kind::Other)).collect();
        let session = Arc::clone(self);
        let done = runtime.spawn(async move {
            let what = || "send the result's files".to_owned();
            let mut stream = session
                .stream::<Packet, Packet>(&what, METHOD, MetadataMap::new(), ReceiverStream::new(outgoing))
                .await?;
            loop {
                let next = tokio::select! {
                    next = stream.message() => session.answer(&what, next).await?,
                    () = session.ended() => return Err(Error::Ended),
                };
                let Some(packet) = next else { return Ok(()) };
                match PacketKind::try_from(packet.kind) {
                    Ok(PacketKind::Request) => match offered.get_mut(packet.id as usize) {
                        Some(free) if *free => *free = false,
                        _ => {
                            return Err(Error::protocol(format!(
                                "a request for the file number {}, which is not on offer",
                                packet.id
                            )));
                        }
                    },
                    Ok(PacketKind::Fin) => {}
                    Ok(PacketKind::Error) => {
                        return Err(Error::Refused {
                            what: what(),
                            message: String::from_utf8_lossy(&packet.data).into_owned(),
                        });
                    }
                    _ => return Err(Error::protocol(format!("a packet of kind {}", packet.kind))),
                }
                // The other side may have given up on an error of its own.
                asked.send(packet).unwrap_or_else(|_gone| tracing::trace!("a request came too late"));
            }
        });
        let sent = send_all(&entries, &packets, &mut requests, &mut open);
        drop(packets);
        let done = runtime.block_on(done).unwrap_or(Err(Error::Ended));
        match (sent, done) {
            // What ended the stream says more than that it ended.
            (Err(Error::Ended), Err(error)) => Err(error),
            (sent, done) => sent.and(done),
        }
    }

    /// Somewhere to write an archive to; the client has it when [`ArchiveWriter::finish`] returns. A client that
    /// takes several knows it by `name`, which is empty for others.
    pub fn archive(
        self: &Arc<Self>,
        runtime: &tokio::runtime::Handle,
        name: &'static str,
    ) -> Result<ArchiveWriter> {
        if !self.takes_files() {
            return Err(Error::NotOffered("place for files"));
        }
        let (pieces, outgoing) = mpsc::channel(BACKLOG);
        let (ended, done) = oneshot::channel();
        let session = Arc::clone(self);
        runtime.spawn(async move {
            let send = async {
                let what = || "send the result's archive".to_owned();
                let outgoing = ReceiverStream::new(outgoing);
                let mut metadata = MetadataMap::new();
                if !name.is_empty() {
                    metadata.insert(NAME, tonic::metadata::MetadataValue::from_static(name));
                }
                let mut stream =
                    session.stream::<BytesMessage, BytesMessage>(&what, METHOD, metadata, outgoing).await?;
                while session.answer(&what, stream.message().await).await?.is_some() {}
                Ok(())
            };
            let result = tokio::select! {
                result = send => result,
                () = session.ended() => Err(Error::Ended),
            };
            ended.send(result).unwrap_or_else(|_gone| tracing::trace!("nobody waits for the archive's end"));
        });
        Ok(ArchiveWriter { pieces, done, pending: BytesMut::with_capacity(CHUNK) })
    }
}

fn send_all(
    entries: &[Entry],
    packets: &mpsc::Sender<Packet>,
    requests: &mut mpsc::UnboundedReceiver<Packet>,
    open: &mut impl FnMut(&[u8]) -> io::Result<File>,
) -> Result<()> {
    let send = |packet| packets.blocking_send(packet).map_err(|_gone| Error::Ended);
    for entry in entries {
        let stat = Some(entry.clone().into_stat());
        send(Packet { kind: PacketKind::Stat as i32, stat, id: 0, data: Bytes::new() })?;
    }
    send(Packet::of(PacketKind::Stat, 0, Bytes::new()))?;
    let mut buffer = vec![0; CHUNK];
    while let Some(packet) = requests.blocking_recv() {
        if packet.kind == PacketKind::Fin as i32 {
            return send(Packet::of(PacketKind::Fin, 0, Bytes::new()));
        }
        let Some(entry) = entries.get(packet.id as usize) else { continue };
        if matches!(entry.kind, Kind::File { .. }) {
            let failed = |error: io::Error| {
                Error::Local(format!("read {} of the result: {error}", String::from_utf8_lossy(&entry.path)))
            };
            let mut file = open(&entry.path).map_err(failed)?;
            loop {
                let n = file.read(&mut buffer).map_err(failed)?;
                if n == 0 {
                    break;
                }
                send(Packet::of(PacketKind::Data, packet.id, Bytes::copy_from_slice(&buffer[..n])))?;
            }
        }
        send(Packet::of(PacketKind::Data, packet.id, Bytes::new()))?;
    }
    Err(Error::Ended)
}

/// Bytes on their way to the client. Writing blocks.
#[derive(Debug)]
pub struct ArchiveWriter {
    pieces: mpsc::Sender<BytesMessage>,
    done: oneshot::Receiver<Result<()>>,
    pending: BytesMut,
}

impl ArchiveWriter {
    /// Sends what is left and waits for the client to have taken it all. Blocks.
    pub fn finish(mut self) -> Result<()> {
        // An error here is one of the stream, which is told below.
        self.flush().unwrap_or_else(|error| tracing::debug!(%error, "send the archive's end"));
        drop(self.pieces);
        self.done.blocking_recv().unwrap_or(Err(Error::Ended))
    }
}

impl Write for ArchiveWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = buf.len().min(CHUNK - self.pending.len());
        self.pending.extend_from_slice(&buf[..n]);
        if self.pending.len() >= CHUNK {
            self.flush()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let data = self.pending.split().freeze();
        self.pieces
            .blocking_send(BytesMessage { data })
            .map_err(|_gone| io::Error::new(io::ErrorKind::BrokenPipe, "the client takes no more"))
    }
}
