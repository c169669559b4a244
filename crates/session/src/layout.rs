//! The client's end of the content service: folders of its own, as OCI image layouts.
//!
//! Invariant: a folder holds nothing under a digest that has another, and nothing outside `blobs/` is touched: what the
//! engine names is a digest, never a path.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::Stream;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::content::STORE;
use crate::messages::{
    ContentInfo, ContentInfoRequest, ContentInfoResponse, ContentReadRequest, ContentReadResponse,
    ContentWriteRequest, ContentWriteResponse, WriteAction,
};

/// Bytes of one message.
const PIECE: usize = 256 << 10;

/// Folders, by the name the engine knows them by.
pub(crate) type Folders = Arc<BTreeMap<String, PathBuf>>;
pub(crate) type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The folder a call means.
fn folder(folders: &Folders, metadata: &MetadataMap) -> Result<PathBuf, Status> {
    let name = metadata.get(STORE).and_then(|name| name.to_str().ok()).unwrap_or_default();
    folders.get(name).cloned().ok_or_else(|| Status::not_found("no such folder"))
}

/// Where a blob is, or would be.
fn blob(folder: &Path, digest: &str) -> Result<PathBuf, Status> {
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return Err(Status::invalid_argument(format!("{digest:?} is no sha256 digest")));
    }
    Ok(folder.join("blobs/sha256").join(hex))
}

fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Status {
    let what = format!("{what} {}", path.display());
    move |error| match error.kind() {
        ErrorKind::NotFound => Status::not_found(format!("{what}: {error}")),
        _ => Status::internal(format!("{what}: {error}")),
    }
}

pub(crate) async fn info(
    folders: Folders,
    request: Request<ContentInfoRequest>,
) -> Result<Response<ContentInfoResponse>, Status> {
    let folder = folder(&folders, request.metadata())?;
    let digest = request.into_inner().digest;
    let path = blob(&folder, &digest)?;
    let size = tokio::fs::metadata(&path).await.map_err(failed("stat", &path))?.len();
    let info = ContentInfo { digest, size: i64::try_from(size).unwrap_or(i64::MAX) };
    Ok(Response::new(ContentInfoResponse { info: Some(info) }))
}

pub(crate) async fn read(
    folders: Folders,
    request: Request<ContentReadRequest>,
) -> Result<Response<Messages<ContentReadResponse>>, Status> {
    let folder = folder(&folders, request.metadata())?;
    let asked = request.into_inner();
    let path = blob(&folder, &asked.digest)?;
    let mut file = tokio::fs::File::open(&path).await.map_err(failed("open", &path))?;
    let mut offset = asked.offset.max(0).unsigned_abs();
    file.seek(io::SeekFrom::Start(offset)).await.map_err(failed("seek in", &path))?;
    let mut left = if asked.size > 0 { asked.size.unsigned_abs() } else { u64::MAX };
    let (sender, pieces) = mpsc::channel(4);
    tokio::spawn(async move {
        let mut buffer = vec![0; PIECE];
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            let piece = match file.read(&mut buffer[..most]).await {
                Ok(0) => break,
                Ok(n) => {
                    let piece = ContentReadResponse {
                        offset: i64::try_from(offset).unwrap_or(i64::MAX),
                        data: Bytes::copy_from_slice(&buffer[..n]),
                    };
                    offset += n as u64;
                    left -= n as u64;
                    Ok(piece)
                }
                Err(error) => Err(failed("read", &path)(error)),
            };
            let over = piece.is_err();
            if sender.send(piece).await.is_err() || over {
                break;
            }
        }
    });
    Ok(Response::new(Box::pin(ReceiverStream::new(pieces))))
}

#[expect(clippy::unused_async, reason = "a method of gRPC")]
pub(crate) async fn write(
    folders: Folders,
    request: Request<Streaming<ContentWriteRequest>>,
) -> Result<Response<Messages<ContentWriteResponse>>, Status> {
    let folder = folder(&folders, request.metadata())?;
    let mut asked = request.into_inner();
    let (sender, answers) = mpsc::channel(1);
    tokio::spawn(async move {
        if let Err(status) = take(&folder, &mut asked, &sender).await
            && sender.send(Err(status)).await.is_err()
        {
            tracing::trace!("nobody waits for what became of a blob");
        }
    });
    Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
}

/// A blob that is being written, gone when dropped unless it was published.
struct Coming {
    temporary: PathBuf,
    file: tokio::fs::File,
    hasher: Sha256,
    offset: u64,
}

impl Drop for Coming {
    fn drop(&mut self) {
        match std::fs::remove_file(&self.temporary) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(path = %self.temporary.display(), %error, "remove what is left of a blob");
            }
            _ => {}
        }
    }
}

impl Coming {
    async fn begin(path: &Path) -> Result<Self, Status> {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}-{number}.part", std::process::id()));
        let temporary = PathBuf::from(temporary);
        if let Some(parent) = temporary.parent() {
            tokio::fs::create_dir_all(parent).await.map_err(failed("create", parent))?;
        }
        let mut options = tokio::fs::OpenOptions::new();
        let file = options.write(true).create_new(true).open(&temporary).await;
        let file = file.map_err(failed("create", &temporary))?;
        Ok(Self { temporary, file, hasher: Sha256::new(), offset: 0 })
    }

    async fn publish(mut self, path: &Path, digest: &str) -> Result<(), Status> {
        self.file.flush().await.map_err(failed("write", &self.temporary))?;
        self.file.sync_all().await.map_err(failed("sync", &self.temporary))?;
        let actual = std::mem::take(&mut self.hasher).finalize();
        let mut came = "sha256:".to_owned();
        for byte in actual {
            for half in [byte >> 4, byte & 15] {
                came.extend(char::from_digit(u32::from(half), 16));
            }
        }
        if digest != came {
            return Err(Status::failed_precondition(format!("{digest} came as {came}")));
        }
        tokio::fs::rename(&self.temporary, path).await.map_err(failed("rename", path))
    }
}

/// Takes one blob in.
async fn take(
    folder: &Path,
    asked: &mut Streaming<ContentWriteRequest>,
    answers: &mpsc::Sender<Result<ContentWriteResponse, Status>>,
) -> Result<(), Status> {
    let mut coming: Option<(Coming, PathBuf, String)> = None;
    while let Some(message) = asked.message().await? {
        let (now, path, digest) = if let Some(coming) = &mut coming {
            coming
        } else {
            let path = blob(folder, &message.expected)?;
            coming.insert((Coming::begin(&path).await?, path, message.expected.clone()))
        };
        if !message.data.is_empty() {
            if message.offset != i64::try_from(now.offset).unwrap_or(i64::MAX) {
                return Err(Status::out_of_range(format!("{} bytes are here", now.offset)));
            }
            now.file.write_all(&message.data).await.map_err(failed("write", &now.temporary))?;
            now.hasher.update(&message.data);
            now.offset += message.data.len() as u64;
        }
        let answer = ContentWriteResponse {
            action: message.action,
            offset: i64::try_from(now.offset).unwrap_or(i64::MAX),
            total: message.total,
            digest: digest.clone(),
        };
        let over = message.action == WriteAction::Commit as i32;
        if over {
            let (path, digest) = (path.clone(), digest.clone());
            if let Some((now, ..)) = coming.take() {
                now.publish(&path, &digest).await?;
            }
        }
        if answers.send(Ok(answer)).await.is_err() || over {
            return Ok(());
        }
    }
    Ok(())
}
