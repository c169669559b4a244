//! A cache in a folder of the client's, reached through its session.
//!
//! Invariant: what comes is bounded, and checked against size and digest before it is used.

use std::io::Write as _;
use std::sync::Arc;

use brigantine_image::{DOCUMENT_MAX, Descriptor, Digest, Lease, Store};
use brigantine_session::Session;
use bytes::Bytes;
use tokio::sync::mpsc;

use super::import::config_of;
use crate::access::Access;
use crate::error::{Context as _, Error, Result, invalid};
use crate::solver::blocking;

/// The manifest and the list of what is cached.
pub(super) async fn look(
    access: &Access,
    folder: &str,
    digest: &str,
) -> Result<(Arc<Session>, Vec<u8>, Vec<u8>)> {
    let session = session(access)?;
    let manifest = manifest(&session, folder, digest).await?;
    let config = config_of(&manifest)?;
    let config = config.ok_or_else(|| invalid("what is in the folder is no cache, but an image"))?;
    let config = document(&session, folder, &config).await?;
    Ok((session, manifest, config))
}

/// The manifest of that digest.
pub(crate) async fn manifest(session: &Arc<Session>, folder: &str, digest: &str) -> Result<Vec<u8>> {
    let digest: Digest =
        digest.parse().map_err(|error| invalid(format!("the digest of the cache in {folder}: {error}")))?;
    let size = session.content_size(folder, digest.as_str()).await?;
    let size = size
        .ok_or_else(|| Error::NotFound(format!("{digest} is not in the folder: it is no cache any more")))?;
    document(session, folder, &Descriptor::new("", digest, size)).await
}

/// The client's session.
pub(crate) fn session(access: &Access) -> Result<Arc<Session>> {
    access.session.clone().ok_or_else(|| invalid("a cache in a folder needs a session with the client"))
}

/// A blob that is small enough for memory.
async fn document(session: &Arc<Session>, folder: &str, descriptor: &Descriptor) -> Result<Vec<u8>> {
    if descriptor.size > DOCUMENT_MAX {
        return Err(invalid(format!(
            "{} has {} bytes: a document may have {DOCUMENT_MAX}",
            descriptor.digest, descriptor.size
        )));
    }
    let mut reader = session.content(folder, descriptor.digest.as_str()).await?;
    let mut raw = Vec::new();
    while let Some(piece) = reader.next().await? {
        raw.extend_from_slice(&piece);
        if raw.len() as u64 > descriptor.size {
            break;
        }
    }
    if raw.len() as u64 != descriptor.size
        || Digest::of(descriptor.digest.algorithm(), &raw) != descriptor.digest
    {
        return Err(invalid(format!("{} in the folder is not what its name says", descriptor.digest)));
    }
    Ok(raw)
}

/// Brings a blob into the store.
pub(crate) async fn fetch(
    session: Arc<Session>,
    folder: String,
    store: Store,
    lease: Lease,
    descriptor: Descriptor,
) -> Result<()> {
    let what = format!("take {} out of the cache in {folder}", descriptor.digest);
    let mut reader = session.content(&folder, descriptor.digest.as_str()).await?;
    let (sender, mut pieces) = mpsc::channel::<Bytes>(8);
    let doing = what.clone();
    let writing = blocking(move || {
        let what = || doing.clone();
        if store.content().has(&descriptor.digest) {
            lease.hold(&descriptor.digest).doing(what)?;
            return Ok(());
        }
        let mut ingest =
            store.content().ingest(&lease, &descriptor.digest, Some(descriptor.size)).doing(what)?;
        while let Some(piece) = pieces.blocking_recv() {
            ingest.write_all(&piece).doing(what)?;
        }
        // Short or wrong content is refused here.
        ingest.commit().map(drop).doing(what)
    });
    let reading = async move {
        while let Some(piece) = reader.next().await? {
            if sender.send(piece).await.is_err() {
                break;
            }
        }
        Ok(())
    };
    let (written, read) = tokio::join!(writing, reading);
    // Why there was no more says more than that there was too little.
    let read: Result<()> = read;
    read.and(written)
}
