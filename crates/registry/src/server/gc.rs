//! Garbage collection while the registry serves.
//!
//! A blob is a repository's garbage when none of its manifests names it; content is garbage when no repository has it.
//! Invariants: what became reachable, or was said to be there, since the collection began is left (the storage remembers
//! it); what was used within the grace period is left too, for a push that has not put its manifest yet; readers are
//! never held up, and writers only while a few files are being removed. A manifest that cannot be read stops the
//! collection of its repository: nothing is removed on a guess.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use brigantine_image::{Algorithm, Digest};
use serde::{Deserialize, Serialize};

use super::library::Library;
use super::manifests::Described;
use super::route::Pointer;
use super::storage::{Storage, absent};
use super::uploads::Uploads;

/// Removals between two moments in which writers may go on.
const BATCH: usize = 32;

/// What to collect.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Plan {
    pub grace: Duration,
    pub untagged: bool,
    pub uploads: Duration,
    /// Manifests nobody asked for so long are garbage (a cache's).
    pub keep: Option<Duration>,
}

/// What a collection removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    pub manifests: u64,
    /// Blobs that a repository had and none of its manifests named.
    pub unnamed: u64,
    /// Blobs whose content is gone now.
    pub blobs: u64,
    pub repositories: u64,
    /// Bytes given back.
    pub bytes: u64,
}

/// One collection at a time.
#[derive(Default)]
pub(super) struct Collector {
    turn: Mutex<()>,
}

impl Collector {
    pub fn collect(&self, storage: &Storage, uploads: &Uploads, plan: &Plan) -> io::Result<Collected> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        storage.begin_generation();
        let collected = run(storage, uploads, plan);
        storage.end_generation();
        collected
    }
}

fn run(storage: &Storage, uploads: &Uploads, plan: &Plan) -> io::Result<Collected> {
    let mut collected = Collected { bytes: uploads.sweep(plan.uploads)?, ..Collected::default() };
    for repository in storage.repositories()? {
        if let Err(error) = repository_garbage(storage, &repository, plan, &mut collected) {
            tracing::error!(repository, error = %error, "a repository's garbage stays");
        }
    }
    content_garbage(storage, plan, &mut collected)?;
    Ok(collected)
}

fn is_older(time: SystemTime, age: Duration) -> bool {
    time.elapsed().unwrap_or_default() >= age
}

fn repository_garbage(
    storage: &Storage,
    repository: &str,
    plan: &Plan,
    collected: &mut Collected,
) -> io::Result<()> {
    let mut manifests = storage.manifests(repository)?;
    if let Some(keep) = plan.keep {
        let stale: Vec<Digest> = manifests
            .iter()
            .filter(|(_, time)| is_older(*time, keep))
            .map(|(digest, _)| digest.clone())
            .collect();
        collected.manifests += remove_manifests(storage, repository, &stale)?;
        manifests = storage.manifests(repository)?;
    }
    if plan.untagged {
        let reached = reachable(storage, repository, &manifests)?;
        let garbage: Vec<Digest> = manifests
            .iter()
            .filter(|(digest, time)| !reached.contains(digest) && is_older(*time, plan.grace))
            .map(|(digest, _)| digest.clone())
            .collect();
        collected.manifests += remove_manifests(storage, repository, &garbage)?;
        manifests = storage.manifests(repository)?;
    }
    let mut named = HashSet::new();
    for (digest, _) in &manifests {
        named.extend(read(storage, repository, digest)?.blobs.into_iter().map(|blob| blob.digest));
    }
    let garbage: Vec<Digest> = storage
        .blobs(repository)?
        .into_iter()
        .filter(|(digest, time)| !named.contains(digest) && is_older(*time, plan.grace))
        .map(|(digest, _)| digest)
        .collect();
    for batch in garbage.chunks(BATCH) {
        let _removing = storage.removing();
        for digest in batch {
            if !storage.is_of_this_generation(digest) && storage.unlink_blob(repository, digest)? {
                collected.unnamed += 1;
            }
        }
    }
    let dir = storage.repository_dir(repository);
    let changed =
        absent(fs::metadata(dir.join("_blobs")))?.map(|metadata| metadata.modified()).transpose()?;
    if changed.is_some_and(|changed| is_older(changed, plan.grace)) {
        let _removing = storage.removing();
        if storage.remove_if_empty(repository)? {
            collected.repositories += 1;
        }
    }
    Ok(())
}

fn remove_manifests(storage: &Storage, repository: &str, garbage: &[Digest]) -> io::Result<u64> {
    let mut removed = 0;
    for batch in garbage.chunks(BATCH) {
        let _removing = storage.removing();
        for digest in batch {
            if !storage.is_of_this_generation(digest) && storage.remove_manifest(repository, digest)? {
                removed += 1;
            }
        }
    }
    Ok(removed)
}

/// Manifests with a tag, those they name, and the referrers of all of them.
fn reachable(
    storage: &Storage,
    repository: &str,
    manifests: &[(Digest, SystemTime)],
) -> io::Result<HashSet<Digest>> {
    let mut reached = HashSet::new();
    let mut open = Vec::new();
    for tag in storage.tags(repository)?.unwrap_or_default() {
        open.extend(storage.tag(repository, &tag)?);
    }
    loop {
        while let Some(digest) = open.pop() {
            if storage.has_manifest(repository, &digest) && reached.insert(digest.clone()) {
                let described = read(storage, repository, &digest)?;
                open.extend(described.manifests.into_iter().map(|named| named.digest));
            }
        }
        for (digest, _) in manifests {
            if !reached.contains(digest)
                && let Some(record) = storage.record(repository, digest)?
                && record.subject.is_some_and(|subject| reached.contains(&subject))
            {
                open.push(digest.clone());
            }
        }
        if open.is_empty() {
            return Ok(reached);
        }
    }
}

fn read(storage: &Storage, repository: &str, digest: &Digest) -> io::Result<Described> {
    let invalid =
        |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("manifest {digest}: {what}"));
    let manifest = storage
        .manifest(repository, &Pointer::Digest(digest.clone()))?
        .ok_or_else(|| invalid("its content is not there"))?;
    if Digest::of(digest.algorithm(), &manifest.raw) != *digest {
        return Err(invalid("its content is damaged"));
    }
    Described::read(&manifest.raw, Some(&manifest.media_type)).map_err(|refusal| invalid(&refusal.message))
}

fn content_garbage(storage: &Storage, plan: &Plan, collected: &mut Collected) -> io::Result<()> {
    let mut linked = HashSet::new();
    for repository in storage.repositories()? {
        linked.extend(storage.blobs(&repository)?.into_iter().map(|(digest, _)| digest));
        linked.extend(storage.manifests(&repository)?.into_iter().map(|(digest, _)| digest));
    }
    for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
        let dir = storage.root().join("blobs").join(algorithm.as_str());
        let mut garbage = Vec::new();
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let Some(hex) = entry.file_name().to_str().map(str::to_owned) else { continue };
            let Ok(digest) = Digest::from_hex(algorithm, &hex) else { continue };
            let Some(metadata) = absent(entry.metadata())? else { continue };
            if !linked.contains(&digest) && is_older(metadata.modified()?, plan.grace) {
                garbage.push((digest, metadata.len()));
            }
        }
        for batch in garbage.chunks(BATCH) {
            let _removing = storage.removing();
            for (digest, size) in batch {
                if storage.is_of_this_generation(digest) {
                    continue;
                }
                if absent(fs::remove_file(storage.blob_path(digest)))?.is_some() {
                    collected.blobs += 1;
                    collected.bytes += size;
                }
            }
        }
    }
    Ok(())
}
