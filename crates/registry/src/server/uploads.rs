//! Uploads that are not finished: they survive a broken connection and a restart of the registry.
//!
//! Invariants: one request at a time writes an upload; what was acknowledged is on the disk; an upload's offset is what
//! its file holds, whatever became of the request that wrote it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use brigantine_image::{Algorithm, Digest, Hasher};
use bytes::Bytes;
use http::StatusCode;
use http_body_util::BodyExt;
use hyper::body::Body as HttpBody;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedMutexGuard, mpsc};

use super::refusal::Refusal;
use super::reply::blocking;
use super::storage::absent;

/// Pieces of a body between the network and the disk.
const DEPTH: usize = 8;

/// All of them.
pub(super) struct Uploads {
    dir: PathBuf,
    open: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Upload>>>>,
}

/// One upload, held by the request that writes it.
pub(super) struct Upload {
    pub id: String,
    pub repository: String,
    dir: PathBuf,
    file: File,
    offset: u64,
    algorithm: Algorithm,
    /// The running hash; none where this process has not seen all of the bytes.
    hasher: Option<Hasher>,
    ended: bool,
}

/// An upload that its holder alone may use.
pub(super) type Held = OwnedMutexGuard<Upload>;

#[derive(Serialize, Deserialize)]
struct Record {
    repository: String,
    algorithm: String,
}

/// How much of a body is taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Take {
    /// The body has exactly so many bytes.
    pub exactly: Option<u64>,
    /// Bytes the repository may still grow by.
    pub room: Option<u64>,
    /// The longest silence of the client.
    pub patience: Duration,
}

impl Uploads {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, open: Mutex::default() }
    }

    /// How many are known to this process.
    pub fn count(&self) -> usize {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn begin(&self, repository: &str, algorithm: Algorithm) -> io::Result<String> {
        let id = fresh_id()?;
        let dir = self.dir.join(&id);
        fs::create_dir(&dir)?;
        let record = Record { repository: repository.to_owned(), algorithm: algorithm.as_str().to_owned() };
        fs::write(dir.join("session.json"), serde_json::to_vec(&record)?)?;
        let file = File::options().create_new(true).append(true).read(true).open(dir.join("data"))?;
        let upload = Upload {
            id: id.clone(),
            repository: repository.to_owned(),
            dir,
            file,
            offset: 0,
            algorithm,
            hasher: Some(algorithm.hasher()),
            ended: false,
        };
        self.map().insert(id.clone(), Arc::new(tokio::sync::Mutex::new(upload)));
        Ok(id)
    }

    /// Waits until no other request writes the upload, and takes it.
    pub async fn hold(&self, repository: &str, id: &str, patience: Duration) -> Result<Held, Refusal> {
        let unknown = || Refusal::upload_unknown(id);
        let known = self.map().get(id).cloned();
        let upload = if let Some(upload) = known {
            upload
        } else {
            let loaded = self.load(id)?.ok_or_else(unknown)?;
            let mut map = self.map();
            Arc::clone(map.entry(id.to_owned()).or_insert_with(|| Arc::new(tokio::sync::Mutex::new(loaded))))
        };
        let held = tokio::time::timeout(patience, upload.lock_owned()).await.map_err(|_elapsed| {
            Refusal::new(
                StatusCode::CONFLICT,
                "BLOB_UPLOAD_INVALID",
                format!("another request is still writing upload {id}"),
            )
        })?;
        if held.ended || held.repository != repository {
            return Err(unknown());
        }
        Ok(held)
    }

    fn load(&self, id: &str) -> io::Result<Option<Upload>> {
        let dir = self.dir.join(id);
        let Some(raw) = absent(fs::read(dir.join("session.json")))? else { return Ok(None) };
        let record: Record = serde_json::from_slice(&raw)?;
        let file = File::options().append(true).read(true).open(dir.join("data"))?;
        let offset = file.metadata()?.len();
        let algorithm = if record.algorithm == "sha512" { Algorithm::Sha512 } else { Algorithm::Sha256 };
        Ok(Some(Upload {
            id: id.to_owned(),
            repository: record.repository,
            dir,
            file,
            offset,
            algorithm,
            hasher: (offset == 0).then(|| algorithm.hasher()),
            ended: false,
        }))
    }

    /// Forgets an upload and removes what is left of it.
    pub fn end(&self, upload: &mut Upload) -> io::Result<()> {
        upload.ended = true;
        self.map().remove(&upload.id);
        absent(fs::remove_dir_all(&upload.dir)).map(drop)
    }

    /// Removes uploads nobody wrote to for `lifetime`; returns the bytes that were freed.
    pub fn sweep(&self, lifetime: Duration) -> io::Result<u64> {
        let mut freed = 0;
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let data = entry.path().join("data");
            let probe = if data.exists() { data } else { entry.path() };
            let Some(metadata) = absent(fs::metadata(&probe))? else { continue };
            if metadata.modified()?.elapsed().unwrap_or_default() < lifetime {
                continue;
            }
            let id = entry.file_name().to_string_lossy().into_owned();
            let known = self.map().get(&id).cloned();
            match known {
                None => absent(fs::remove_dir_all(entry.path())).map(drop)?,
                Some(upload) => {
                    // One that is being written is not idle, whatever its file's time says.
                    let Ok(mut upload) = upload.try_lock() else { continue };
                    self.end(&mut upload)?;
                }
            }
            freed += metadata.len();
        }
        Ok(freed)
    }

    fn map(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<tokio::sync::Mutex<Upload>>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Upload {
    /// Bytes that are there.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    pub fn data(&self) -> (&File, PathBuf) {
        (&self.file, self.dir.join("data"))
    }

    /// The digest of all bytes, by the algorithm that is asked for.
    pub fn digest(&self, algorithm: Algorithm) -> io::Result<Digest> {
        if self.algorithm == algorithm
            && let Some(hasher) = &self.hasher
        {
            return Ok(hasher.clone().finish());
        }
        let mut file = File::open(self.dir.join("data"))?;
        let mut hasher = algorithm.hasher();
        let mut buffer = vec![0; 1 << 18];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hasher.finish()),
                n => hasher.update(&buffer[..n]),
            }
        }
    }

    /// Goes on with another algorithm's running hash, where nothing was written yet.
    pub fn expect(&mut self, algorithm: Algorithm) {
        if self.offset == 0 {
            self.algorithm = algorithm;
            self.hasher = Some(algorithm.hasher());
        }
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = self.file.write_all(bytes) {
            // Part of it may be there.
            self.hasher = None;
            self.offset = self.file.metadata()?.len();
            return Err(error);
        }
        self.offset += bytes.len() as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
        Ok(())
    }

    fn cut(&mut self, offset: u64) -> io::Result<()> {
        self.file.set_len(offset)?;
        if offset != self.offset {
            self.hasher = (offset == 0).then(|| self.algorithm.hasher());
        }
        self.offset = offset;
        Ok(())
    }
}

/// Appends a request's body to the upload. What came before a failure stays, and the upload can go on from there.
pub(super) async fn receive<B>(upload: Held, mut body: B, take: Take) -> Result<Held, Refusal>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    let start = upload.offset;
    let (pieces, queue) = mpsc::channel(DEPTH);
    // The writer owns the upload: a request that is dropped here leaves it consistent, and locked until it is.
    let writer = tokio::task::spawn_blocking(move || write(upload, queue));
    let mut taken = 0;
    let received = loop {
        let frame = match tokio::time::timeout(take.patience, body.frame()).await {
            Ok(None) => break Ok(()),
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(error))) => {
                break Err(Refusal::new(
                    StatusCode::BAD_REQUEST,
                    "BLOB_UPLOAD_INVALID",
                    format!("the body broke off: {error}"),
                ));
            }
            Err(_elapsed) => {
                break Err(Refusal::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "BLOB_UPLOAD_INVALID",
                    format!("nothing came for {} seconds", take.patience.as_secs()),
                ));
            }
        };
        let Ok(data) = frame.into_data() else { continue };
        taken += data.len() as u64;
        if take.exactly.is_some_and(|exactly| taken > exactly) {
            break Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                "SIZE_INVALID",
                "the body is longer than its Content-Range",
            ));
        }
        if take.room.is_some_and(|room| taken > room) {
            break Err(over_quota());
        }
        if pieces.send(data).await.is_err() {
            // The writer says why.
            break Ok(());
        }
    };
    drop(pieces);
    let (mut upload, written) = writer.await.map_err(io::Error::other)?;
    written?;
    if let Err(refusal) = received {
        let undo = matches!(refusal.code, "SIZE_INVALID" | "DENIED");
        return blocking(move || {
            if undo {
                upload.cut(start)?;
            }
            Err(refusal)
        })
        .await;
    }
    if take.exactly.is_some_and(|exactly| taken != exactly) {
        return Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            "SIZE_INVALID",
            "the body is shorter than its Content-Range",
        ));
    }
    Ok(upload)
}

pub(super) fn over_quota() -> Refusal {
    Refusal::denied("the repository's quota is used up: delete images, or ask for a larger quota")
}

fn write(mut upload: Held, mut queue: mpsc::Receiver<Bytes>) -> (Held, io::Result<()>) {
    while let Some(data) = queue.blocking_recv() {
        if let Err(error) = upload.append(&data) {
            return (upload, Err(error));
        }
    }
    (upload, Ok(()))
}

/// Makes what was written durable before it is acknowledged.
pub(super) async fn settle(upload: Held) -> Result<Held, Refusal> {
    blocking(move || {
        upload.file.sync_data()?;
        Ok(upload)
    })
    .await
}

/// A random UUID (RFC 9562, version 4).
fn fresh_id() -> io::Result<String> {
    let mut bytes = [0; 16];
    rustls::crypto::ring::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_error| io::Error::other("no random numbers"))?;
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let mut hex = String::with_capacity(32);
    for byte in bytes {
        for digit in [byte >> 4, byte & 0xf] {
            hex.extend(char::from_digit(u32::from(digit), 16));
        }
    }
    Ok(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
}
