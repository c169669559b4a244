//! Content of the client's: blobs by digest that the engine reads from, and writes to, a folder it was lent
//! (containerd's content service, as far as build caches need it).
//!
//! Invariant: what is read is not checked here: whoever keeps it checks size and digest.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::metadata::MetadataMap;

use crate::error::{Error, Result};
use crate::messages::{
    ContentInfoRequest, ContentInfoResponse, ContentReadRequest, ContentReadResponse, ContentWriteRequest,
    ContentWriteResponse, WriteAction,
};
use crate::session::{Session, add};

pub(crate) const INFO: &str = "/containerd.services.content.v1.Content/Info";
pub(crate) const READ: &str = "/containerd.services.content.v1.Content/Read";
pub(crate) const WRITE: &str = "/containerd.services.content.v1.Content/Write";
/// Names the folder that is meant.
pub(crate) const STORE: &str = "buildkit-attachable-store-id";
/// How long the client may take for the next piece.
const STALL: Duration = Duration::from_mins(2);
/// Bytes of one message.
const PIECE: usize = 1 << 20;

/// A blob on its way from the client.
#[derive(Debug)]
pub struct ContentReader {
    session: Arc<Session>,
    stream: Streaming<ContentReadResponse>,
    what: String,
}

impl ContentReader {
    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        let (session, what) = (Arc::clone(&self.session), self.what.clone());
        let what = || what.clone();
        loop {
            let next = async { session.answer(&what, self.stream.message().await).await };
            match session.within(STALL, &what, next).await? {
                None => return Ok(None),
                Some(piece) if piece.data.is_empty() => {}
                Some(piece) => return Ok(Some(piece.data)),
            }
        }
    }
}

fn of(store: &str) -> Result<MetadataMap> {
    let mut metadata = MetadataMap::new();
    if add(&mut metadata, STORE, store) {
        Ok(metadata)
    } else {
        Err(Error::protocol(format!("{store:?} cannot be the name of a folder")))
    }
}

impl Session {
    /// The bytes of a blob in one of the client's folders; `None` when it is not there.
    pub async fn content_size(&self, store: &str, digest: &str) -> Result<Option<u64>> {
        if !self.offers(INFO) {
            return Err(Error::NotOffered("folder for caches"));
        }
        let what = || format!("look for {digest} in {store}");
        let message = ContentInfoRequest { digest: digest.to_owned() };
        let asked: Result<ContentInfoResponse> = self.unary_with(&what, INFO, of(store)?, message).await;
        match asked {
            Ok(found) => Ok(found.info.map(|info| info.size.unsigned_abs())),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a blob from one of the client's folders.
    pub async fn content(self: &Arc<Self>, store: &str, digest: &str) -> Result<ContentReader> {
        if !self.offers(READ) {
            return Err(Error::NotOffered("folder for caches"));
        }
        let what = format!("read {digest} from {store}");
        let message = ContentReadRequest { digest: digest.to_owned(), offset: 0, size: 0 };
        let one = futures_util::stream::iter([message]);
        let (named, metadata) = (|| what.clone(), of(store)?);
        let stream = self.within(STALL, &named, self.stream(&named, READ, metadata, one)).await?;
        Ok(ContentReader { session: Arc::clone(self), stream, what })
    }

    /// Writes a blob into one of the client's folders, unless it is there.
    pub async fn put_content(
        &self,
        store: &str,
        digest: &str,
        size: u64,
        pieces: impl Stream<Item = std::io::Result<Bytes>> + Send,
    ) -> Result<()> {
        if !self.offers(WRITE) {
            return Err(Error::NotOffered("folder for caches"));
        }
        if self.content_size(store, digest).await? == Some(size) {
            return Ok(());
        }
        let what = || format!("write {digest} to {store}");
        let total = i64::try_from(size).unwrap_or(i64::MAX);
        let message = |action, offset: u64, data| ContentWriteRequest {
            action: action as i32,
            reference: digest.to_owned(),
            total,
            expected: digest.to_owned(),
            offset: i64::try_from(offset).unwrap_or(i64::MAX),
            data,
        };
        let (sender, outgoing) = mpsc::channel(1);
        let send = async |message| sender.send(message).await.map_err(|_gone| Error::Ended);
        send(message(WriteAction::Stat, 0, Bytes::new())).await?;
        let opened =
            self.stream::<_, ContentWriteResponse>(&what, WRITE, of(store)?, ReceiverStream::new(outgoing));
        let mut answers = self.within(STALL, &what, opened).await?;
        let mut offset = 0;
        let mut answered = async || {
            let next = async { self.answer(&what, answers.message().await).await };
            let answer = self.within(STALL, &what, next).await?;
            answer.map(drop).ok_or_else(|| Error::protocol("the folder does not take a blob to its end"))
        };
        answered().await?;
        let mut pieces = std::pin::pin!(pieces);
        while let Some(piece) = pieces.next().await {
            let mut piece = piece.map_err(|error| Error::Local(format!("{}: {error}", what())))?;
            while !piece.is_empty() {
                let data = piece.split_to(piece.len().min(PIECE));
                let length = data.len() as u64;
                send(message(WriteAction::Write, offset, data)).await?;
                offset += length;
                answered().await?;
            }
        }
        send(message(WriteAction::Commit, offset, Bytes::new())).await?;
        answered().await
    }
}
