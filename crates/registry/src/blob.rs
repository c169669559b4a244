//! One layer from registry to extracted directory: fetched, verified, stored and unpacked in one go.
//!
//! Invariants: the network never waits for the extraction, which follows behind in the partly written file; a broken
//! transfer goes on where it stopped, in this attempt or in a later pull; nothing is visible before it is verified.

use std::io::{self, Write};
use std::sync::Arc;

use brigantine_image::model::Descriptor;
use brigantine_image::{Digest, Follow, Follower, Ingest, Lease, Storage, Store, media};
use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{CONTENT_RANGE, RANGE};
use http::{Method, StatusCode};
use tokio::sync::mpsc;
use url::Url;

use crate::session::{Ask, Session};
use crate::{Error, Progress, Report};

/// Chunks between the network and the disk.
const DEPTH: usize = 32;
/// Bytes between two reports of a transfer.
const REPORT_STEP: u64 = 512 << 10;

/// A layer to fetch.
#[derive(Clone)]
pub(crate) struct Layer {
    pub descriptor: Descriptor,
    pub diff_id: Digest,
}

impl Layer {
    /// docker's name for it in progress reports.
    pub fn short(&self) -> String {
        self.descriptor.digest.hex().chars().take(12).collect()
    }
}

/// Fetches and extracts one layer. The caller holds its turn.
pub(crate) async fn fetch(
    session: &Session,
    attempts: usize,
    store: &Store,
    lease: &Lease,
    layer: &Layer,
    report: &Report,
) -> Result<(), Error> {
    let id = layer.short();
    let digest = &layer.descriptor.digest;
    if store.content().has(digest) {
        extract(store, lease, layer, report).await?;
    } else {
        let ingest = resume(store, lease, layer).await?;
        let resumed = ingest.offset() > 0;
        match transfer(session, attempts, store, lease, layer, ingest, report).await {
            // What an earlier attempt left was not synced, and a power cut may have torn it: it is gone now.
            Err(error) if resumed && error.is_wrong_content() => {
                tracing::debug!(layer = %digest, error = %error, "what was left of an earlier pull is of no use");
                report(Progress::step(&id, "Retrying"));
                let ingest = resume(store, lease, layer).await?;
                transfer(session, attempts, store, lease, layer, ingest, report).await?;
            }
            done => done?,
        }
    }
    report(Progress::step(&id, "Pull complete"));
    Ok(())
}

/// Fetches a blob and leaves it as it is. The caller holds its turn.
pub(crate) async fn fetch_as_it_is(
    session: &Session,
    attempts: usize,
    store: &Store,
    lease: &Lease,
    layer: &Layer,
    report: &Report,
) -> Result<(), Error> {
    lease.hold(&layer.descriptor.digest).map_err(Error::store("prepare the image store"))?;
    if store.content().has(&layer.descriptor.digest) {
        return Ok(());
    }
    let ingest = resume(store, lease, layer).await?;
    let resumed = ingest.offset() > 0;
    match download(session, attempts, layer, ingest, &Arc::default(), report).await {
        Err(error) if resumed && error.is_wrong_content() => {
            let ingest = resume(store, lease, layer).await?;
            download(session, attempts, layer, ingest, &Arc::default(), report).await
        }
        done => done,
    }
}

async fn resume(store: &Store, lease: &Lease, layer: &Layer) -> Result<Ingest, Error> {
    let (store, lease, descriptor) = (store.clone(), lease.clone(), layer.descriptor.clone());
    blocking(move || store.content().resume(&lease, &descriptor.digest, Some(descriptor.size)))
        .await?
        .map_err(Error::store(format!("store layer {}", layer.descriptor.digest)))
}

/// Downloads the rest of a layer and extracts it meanwhile.
async fn transfer(
    session: &Session,
    attempts: usize,
    store: &Store,
    lease: &Lease,
    layer: &Layer,
    ingest: Ingest,
    report: &Report,
) -> Result<(), Error> {
    let id = layer.short();
    let digest = &layer.descriptor.digest;
    if layer.diff_id == *digest && store.storage() == Storage::Erofs {
        // The blob is the layer's archive: there is nothing to extract, and it is indexed where it is.
        download(session, attempts, layer, ingest, &Arc::default(), report).await?;
        report(Progress::step(&id, "Download complete"));
        return extract(store, lease, layer, report).await;
    }
    let mut extraction = Extraction::start(store, lease, layer, &ingest)?;
    let extracting = Arc::clone(&extraction.follow);
    let fetched = download(session, attempts, layer, ingest, &extracting, report).await;
    match fetched {
        Ok(()) => extracting.finish(),
        // The extraction ends with what it has; its own complaint about that is of no interest.
        Err(_) => extracting.fail(),
    }
    if fetched.is_ok() {
        report(Progress::step(&id, "Download complete"));
        report(Progress::step(&id, "Extracting"));
    }
    let extracted = (&mut extraction.task).await;
    fetched?;
    match extracted {
        Ok(Ok(true)) => {
            store.saw_layer_as(&layer.diff_id, digest);
            Ok(())
        }
        // The layer was there meanwhile.
        Ok(Ok(false)) => extract(store, lease, layer, report).await,
        Ok(Err(error)) => Err(Error::store(format!("extract layer {digest}"))(error)),
        Err(error) => Err(Error::protocol(format!("layer {digest}"), error.to_string())),
    }
}

/// Makes the layer of its blob.
async fn extract(store: &Store, lease: &Lease, layer: &Layer, report: &Report) -> Result<(), Error> {
    let digest = &layer.descriptor.digest;
    report(Progress::step(&layer.short(), "Extracting"));
    let (store, lease, layer) = (store.clone(), lease.clone(), layer.clone());
    blocking(move || store.unpack_blob(&lease, &layer.diff_id, &layer.descriptor.digest).map(drop))
        .await?
        .map_err(Error::store(format!("extract layer {digest}")))
}

/// Runs on a blocking thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::Io {
        what: "a thread of the image store broke".to_owned(),
        source: io::Error::other(error),
    })
}

/// Bytes on their way to the disk.
enum Piece {
    Data(Bytes),
    End,
}

async fn download(
    session: &Session,
    attempts: usize,
    layer: &Layer,
    ingest: Ingest,
    follow: &Arc<Follow>,
    report: &Report,
) -> Result<(), Error> {
    let id = layer.short();
    let size = layer.descriptor.size;
    let mut offset = ingest.offset();
    follow.advance(offset);
    let (pieces, queue) = mpsc::channel(DEPTH);
    let mut writer = tokio::task::spawn_blocking({
        let follow = Arc::clone(follow);
        move || write(ingest, queue, &follow)
    });
    let mut failures = 0;
    let mut reported = offset;
    if offset > 0 {
        report(Progress::amount(&id, "Downloading", offset, Some(size)));
    }
    let transfer = async {
        while offset < size {
            let before = offset;
            let failure = match stream(session, layer, &mut offset, &pieces, |done| {
                if done >= reported + REPORT_STEP || done == size {
                    reported = done;
                    report(Progress::amount(&id, "Downloading", done, Some(size)));
                }
            })
            .await
            {
                Ok(()) if offset >= size => break,
                Ok(()) => Error::protocol(
                    format!("layer {} at {}", layer.descriptor.digest, session.registry()),
                    format!("ended after {offset} of {size} bytes"),
                ),
                // The writer is gone: it says why.
                Err(None) => return Ok(()),
                Err(Some(error)) if !error.is_transient() => return Err(error),
                Err(Some(error)) => error,
            };
            failures = if offset > before { 1 } else { failures + 1 };
            if failures >= attempts {
                return Err(failure);
            }
            tracing::debug!(layer = %layer.descriptor.digest, offset, error = %failure, "a download broke off");
            report(Progress::step(&id, "Retrying"));
            tokio::time::sleep(session.pause(failures, None)).await;
        }
        report(Progress::step(&id, "Verifying Checksum"));
        if pieces.send(Piece::End).await.is_err() {
            tracing::trace!("the writer ended before the data");
        }
        Ok(())
    };
    let transferred = transfer.await;
    drop(pieces);
    let written = (&mut writer).await;
    transferred?;
    match written {
        Ok(result) => result.map_err(Error::store(format!("layer {}", layer.descriptor.digest))),
        Err(error) => Err(Error::Io {
            what: "a thread of the image store broke".to_owned(),
            source: io::Error::other(error),
        }),
    }
}

/// Streams from `offset` on. `Err(None)` means that nobody takes the bytes any more.
async fn stream(
    session: &Session,
    layer: &Layer,
    offset: &mut u64,
    pieces: &mpsc::Sender<Piece>,
    mut progress: impl FnMut(u64),
) -> Result<(), Option<Error>> {
    let digest = &layer.descriptor.digest;
    let size = layer.descriptor.size;
    let url = place(session, layer).map_err(Some)?;
    let mut ask = Ask::new(Method::GET, url.clone());
    if *offset > 0 {
        ask = ask.header(RANGE, &format!("bytes={offset}-"));
    }
    let answer = session.send(&ask).await.map_err(Some)?;
    let subject = || format!("layer {digest} at {}", session.registry());
    // What to leave out of a whole answer because it is there already.
    let mut skip = match answer.status() {
        StatusCode::OK => *offset,
        StatusCode::PARTIAL_CONTENT => {
            let range =
                answer.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or_default();
            let start = range
                .strip_prefix("bytes ")
                .and_then(|range| range.split('-').next())
                .and_then(|n| n.parse().ok());
            if start != Some(*offset) {
                return Err(Some(Error::protocol(
                    subject(),
                    format!("answers a request from byte {offset} with {range:?}"),
                )));
            }
            0
        }
        _ => return Err(Some(session.failure("Get", &url, answer).await)),
    };
    let mut chunks = answer.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        let mut chunk = chunk.map_err(|error| Some(Error::unreachable("Get", &url, &error)))?;
        if skip > 0 {
            let cut = skip.min(chunk.len() as u64);
            skip -= cut;
            chunk = chunk.slice(cut as usize..);
            if chunk.is_empty() {
                continue;
            }
        }
        if *offset + chunk.len() as u64 > size {
            return Err(Some(Error::protocol(
                subject(),
                format!("is longer than the {size} bytes its manifest says"),
            )));
        }
        *offset += chunk.len() as u64;
        if pieces.send(Piece::Data(chunk)).await.is_err() {
            return Err(None);
        }
        progress(*offset);
    }
    Ok(())
}

/// Where a layer is fetched from: the repository, or for one that registries do not distribute the first usable of its
/// own URLs. Nothing of what the registry is told goes there.
fn place(session: &Session, layer: &Layer) -> Result<Url, Error> {
    if media::is_foreign(&layer.descriptor.media_type) && !layer.descriptor.urls.is_empty() {
        let usable = layer
            .descriptor
            .urls
            .iter()
            .filter_map(|url| Url::parse(url).ok())
            .find(|url| url.scheme() == "https" || (url.scheme() == "http" && !session.is_secure()));
        return usable.ok_or_else(|| {
            Error::protocol(
                format!("layer {}", layer.descriptor.digest),
                "is not distributed by registries, and none of its own URLs can be used",
            )
        });
    }
    session.repository_url(&format!("blobs/{}", layer.descriptor.digest))
}

/// Takes pieces to the disk; commits only what was said to be complete.
fn write(
    mut ingest: Ingest,
    mut queue: mpsc::Receiver<Piece>,
    follow: &Follow,
) -> brigantine_image::Result<()> {
    while let Some(piece) = queue.blocking_recv() {
        match piece {
            Piece::Data(data) => {
                ingest.write_all(&data).map_err(brigantine_image::Error::Output)?;
                follow.advance(ingest.offset());
            }
            Piece::End => return ingest.commit().map(drop),
        }
    }
    // Broken off: what is there stays for the next attempt.
    Ok(())
}

/// A layer being extracted behind its download.
struct Extraction {
    follow: Arc<Follow>,
    /// Whether it read what it was given.
    task: tokio::task::JoinHandle<brigantine_image::Result<bool>>,
}

impl Extraction {
    fn start(store: &Store, lease: &Lease, layer: &Layer, ingest: &Ingest) -> Result<Self, Error> {
        let follow = Arc::new(Follow::default());
        let file =
            ingest.reopen().map_err(Error::store(format!("store layer {}", layer.descriptor.digest)))?;
        let source = Follower::new(file, Arc::clone(&follow));
        let (store, lease, diff_id) = (store.clone(), lease.clone(), layer.diff_id.clone());
        let task = tokio::task::spawn_blocking(move || store.unpack_arriving(&lease, &diff_id, source));
        Ok(Self { follow, task })
    }
}

impl Drop for Extraction {
    fn drop(&mut self) {
        // A pull that is dropped half way must not leave a thread waiting for bytes that never come.
        self.follow.fail();
    }
}
