//! The client's end of the file service: a folder is listed, and what the engine asks for of it is read (the sender's
//! half of fsutil's protocol).
//!
//! Invariant: only what was listed is read, each file once; what cannot be read as a whole ends the transfer with the
//! reason, never with less than it is.

use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::entry::{Entry, Kind};
use crate::messages::{Packet, PacketKind};
use crate::receive::{FOLDER, OUR_EXCLUDE, OUR_FOLLOW};
use crate::serve::Lending;

/// Bytes of one packet.
const PIECE: usize = 128 << 10;
/// Packets that wait to be sent.
const BACKLOG: usize = 64;
/// Requests that wait while a list is being sent; an engine of ours has no more of them under way.
const REQUESTS: usize = 256;

/// What the engine wants to see of a folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// Only these paths, wildcards and all, and what links lead to from them; all when empty.
    pub follow: Vec<String>,
    /// Without what these patterns match: the lines of an ignore file.
    pub exclude: Vec<String>,
}

/// A folder that is lent. Its methods block.
pub trait Folder: Send + std::marker::Sync {
    /// Lists what is asked for, in the order of the paths, directories before what is in them, until `listed` says that
    /// nobody listens.
    fn list(&self, asked: &Asked, listed: &mut dyn FnMut(Entry) -> bool) -> io::Result<()>;

    /// Opens a file that was listed.
    fn open(&self, path: &[u8]) -> io::Result<Box<dyn Read>>;
}

type Packets = Pin<Box<dyn Stream<Item = Result<Packet, Status>> + Send>>;

/// Answers `FileSync/DiffCopy`.
pub(crate) struct Sync(pub Arc<Lending>);

impl tower_service::Service<Request<Streaming<Packet>>> for Sync {
    type Response = Response<Packets>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Packets>, Status>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Streaming<Packet>>) -> Self::Future {
        let name = request.metadata().get(FOLDER).and_then(|name| name.to_str().ok()).unwrap_or_default();
        let folder = self.0.sources.get(name).cloned();
        let asked = asked(request.metadata());
        Box::pin(async move {
            let folder = folder.ok_or_else(|| Status::not_found("no such folder"))?;
            let (packets, outgoing) = mpsc::channel(BACKLOG);
            let (requests, wanted) = mpsc::channel(REQUESTS);
            let mut incoming = request.into_inner();
            tokio::spawn(async move {
                while let Ok(Some(packet)) = incoming.message().await {
                    if requests.send(packet).await.is_err() {
                        break;
                    }
                }
            });
            tokio::task::spawn_blocking(move || {
                let Err(why) = lend(&*folder, &asked, &packets, wanted) else { return };
                let told = Packet::of(PacketKind::Error, 0, Bytes::from(why.to_string()));
                if packets.blocking_send(told).is_err() {
                    tracing::debug!(error = %why, "the engine asks for nothing more");
                }
            });
            let packets: Packets = Box::pin(ReceiverStream::new(outgoing).map(Ok));
            Ok(Response::new(packets))
        })
    }
}

fn asked(metadata: &MetadataMap) -> Asked {
    let ours = |key: &'static str| -> Vec<String> {
        let all = metadata.get_all_bin(key).into_iter().filter_map(|value| value.to_bytes().ok());
        all.map(|text| String::from_utf8_lossy(&text).into_owned()).collect()
    };
    Asked { follow: ours(OUR_FOLLOW), exclude: ours(OUR_EXCLUDE) }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the engine has ended the transfer")
}

/// Lists, then sends what is asked for until the engine has all of it. Blocks.
fn lend(
    folder: &dyn Folder,
    asked: &Asked,
    packets: &mpsc::Sender<Packet>,
    mut wanted: mpsc::Receiver<Packet>,
) -> io::Result<()> {
    let send = |packet| packets.blocking_send(packet).map_err(|_gone| gone());
    // `None` for what cannot be asked for, or was.
    let mut offered: Vec<Option<Vec<u8>>> = Vec::new();
    folder.list(asked, &mut |entry| {
        offered.push(matches!(entry.kind, Kind::File { .. }).then(|| entry.path.clone()));
        let stat = Some(entry.into_stat());
        send(Packet { kind: PacketKind::Stat as i32, stat, id: 0, data: Bytes::new() }).is_ok()
    })?;
    send(Packet::of(PacketKind::Stat, 0, Bytes::new()))?;
    let mut piece = vec![0; PIECE];
    while let Some(packet) = wanted.blocking_recv() {
        match PacketKind::try_from(packet.kind) {
            Ok(PacketKind::Fin) => return send(Packet::of(PacketKind::Fin, 0, Bytes::new())),
            Ok(PacketKind::Request) => {}
            _ => return Err(io::Error::other(format!("a packet of kind {} is no request", packet.kind))),
        }
        let path = offered.get_mut(packet.id as usize).and_then(Option::take);
        let path = path.ok_or_else(|| {
            io::Error::other(format!("a request for the file number {}, which is not on offer", packet.id))
        })?;
        let mut file = folder.open(&path)?;
        loop {
            let n = file.read(&mut piece)?;
            if n == 0 {
                break;
            }
            send(Packet::of(PacketKind::Data, packet.id, Bytes::copy_from_slice(&piece[..n])))?;
        }
        send(Packet::of(PacketKind::Data, packet.id, Bytes::new()))?;
    }
    Err(gone())
}
