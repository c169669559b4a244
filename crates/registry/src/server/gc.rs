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

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: Plan =
        Plan { grace: Duration::ZERO, untagged: false, uploads: Duration::ZERO, keep: None };

    fn with_blob(root: &std::path::Path) -> (Storage, Digest) {
        let storage = Storage::open(root).unwrap();
        let digest = Digest::sha256(b"content");
        let path = root.join("tmp/upload");
        fs::write(&path, "content").unwrap();
        let file = fs::File::open(&path).unwrap();
        storage.commit("a", &digest, &file, &path).unwrap();
        (storage, digest)
    }

    /// A collection that began before a client was told that a blob is there must not take it.
    #[test]
    fn what_a_client_was_told_is_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (storage, digest) = with_blob(dir.path());
        let mut collected = Collected::default();
        storage.begin_generation();
        assert_eq!(storage.stat_blob("a", &digest).unwrap(), Some(7));
        repository_garbage(&storage, "a", &AT_ONCE, &mut collected).unwrap();
        content_garbage(&storage, &AT_ONCE, &mut collected).unwrap();
        storage.end_generation();
        assert_eq!(collected, Collected::default());
        assert_eq!(storage.usage("a").unwrap(), 7);

        storage.begin_generation();
        repository_garbage(&storage, "a", &AT_ONCE, &mut collected).unwrap();
        // The content gets a new name after its last one was removed, before it is removed itself.
        assert!(storage.link_blob("b", &digest).unwrap());
        content_garbage(&storage, &AT_ONCE, &mut collected).unwrap();
        storage.end_generation();
        assert_eq!((collected.unnamed, collected.blobs), (1, 0));
        assert_eq!(storage.stat_blob("b", &digest).unwrap(), Some(7));

        let uploads = Uploads::new(storage.uploads());
        let collected = Collector::default().collect(&storage, &uploads, &AT_ONCE).unwrap();
        assert_eq!((collected.unnamed, collected.blobs, collected.bytes), (1, 1, 7));
        assert!(!storage.link_blob("b", &digest).unwrap());
    }

    #[test]
    fn a_damaged_manifest_stops_its_repositorys_collection() {
        let dir = tempfile::tempdir().unwrap();
        let (storage, digest) = with_blob(dir.path());
        let raw = br#"{"schemaVersion":2,"manifests":[]}"#;
        let manifest = Digest::sha256(raw);
        let record = super::super::storage::ManifestRecord {
            media_type: brigantine_image::media::OCI_INDEX.to_owned(),
            size: raw.len() as u64,
            subject: None,
        };
        let new = super::super::storage::NewManifest {
            digest: &manifest,
            raw,
            record,
            referrer: None,
            tags: &["t".to_owned()],
        };
        storage.put_manifest("a", &new).unwrap();
        fs::write(storage.blob_path(&manifest), "damaged").unwrap();
        let uploads = Uploads::new(storage.uploads());
        let collected = Collector::default().collect(&storage, &uploads, &AT_ONCE).unwrap();
        assert_eq!(collected, Collected::default());
        assert_eq!(storage.stat_blob("a", &digest).unwrap(), Some(7));
    }
}
