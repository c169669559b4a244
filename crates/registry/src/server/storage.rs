//! What the registry keeps on disk.
//!
//! ```text
//! blobs/<alg>/<hex>                      content, once for all repositories; the form of an OCI layout's blobs/
//! repositories/<name>/_blobs/<alg>-<hex>       the repository has this blob; empty
//!                     _manifests/<alg>-<hex>   the repository has this manifest; holds its type and size
//!                     _tags/<tag>              holds the digest
//!                     _referrers/<subject>/<alg>-<hex>   holds the referrer's descriptor
//! uploads/<id>/{data,session.json}       uploads that are not finished
//! tmp/                                   what is being written
//! ```
//!
//! Invariants: a file under its final name is complete and durable (temp, fsync, rename, fsync of the directory); content
//! is there before anything names it; the collector removes only under the write side of [`Storage::gate`], and whoever
//! makes something reachable does so under its read side. Reading takes no lock at all.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use brigantine_image::model::Descriptor;
use brigantine_image::{Algorithm, Digest};
use serde::{Deserialize, Serialize};

use super::library::{Library, StoredManifest};
use super::route::{Pointer, valid_repository};
use crate::Error;

/// A link that was read lately is not touched again before this has passed.
const TOUCH_AFTER: Duration = Duration::from_mins(10);

/// The registry's own storage.
pub(super) struct Storage {
    root: PathBuf,
    repositories: RwLock<BTreeSet<String>>,
    usage: Mutex<HashMap<String, u64>>,
    gate: RwLock<()>,
    /// While a collection runs: what became reachable, or was said to be there, since it began.
    generation: Mutex<Option<HashSet<Digest>>>,
    /// Held as long as the registry runs; one process writes.
    _lock: File,
}

/// What a repository knows about one of its manifests.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ManifestRecord {
    pub media_type: String,
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Digest>,
}

/// A manifest to keep.
pub(super) struct NewManifest<'m> {
    pub digest: &'m Digest,
    pub raw: &'m [u8],
    pub record: ManifestRecord,
    /// How it shows among its subject's referrers.
    pub referrer: Option<Descriptor>,
    pub tags: &'m [String],
}

impl Storage {
    /// Opens the storage at `root`, making it where there is none.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let failed = |what: &str, path: &Path| {
            let what = format!("{what} {}", path.display());
            move |source| Error::Io { what, source }
        };
        for dir in ["blobs/sha256", "blobs/sha512", "repositories", "uploads", "tmp"] {
            let path = root.join(dir);
            fs::create_dir_all(&path).map_err(failed("create", &path))?;
        }
        let path = root.join("lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(failed("open", &path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(Error::Invalid(format!(
                    "{} is in use by another registry process",
                    root.display()
                )));
            }
            Err(fs::TryLockError::Error(error)) => return Err(failed("lock", &path)(error)),
        }
        let tmp = root.join("tmp");
        for entry in fs::read_dir(&tmp).map_err(failed("read", &tmp))? {
            let path = entry.map_err(failed("read", &tmp))?.path();
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
        let storage = Self {
            root: root.to_owned(),
            repositories: RwLock::default(),
            usage: Mutex::default(),
            gate: RwLock::default(),
            generation: Mutex::default(),
            _lock: lock,
        };
        let mut names = BTreeSet::new();
        let top = root.join("repositories");
        find_repositories(&top, "", &mut names).map_err(failed("read", &top))?;
        *storage.repositories.write().unwrap_or_else(PoisonError::into_inner) = names;
        Ok(storage)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn uploads(&self) -> PathBuf {
        self.root.join("uploads")
    }

    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.algorithm().as_str()).join(digest.hex())
    }

    pub fn repository_dir(&self, repository: &str) -> PathBuf {
        self.root.join("repositories").join(repository)
    }

    fn blob_link(&self, repository: &str, digest: &Digest) -> PathBuf {
        self.repository_dir(repository).join("_blobs").join(file_name(digest))
    }

    fn manifest_link(&self, repository: &str, digest: &Digest) -> PathBuf {
        self.repository_dir(repository).join("_manifests").join(file_name(digest))
    }

    fn tag_path(&self, repository: &str, tag: &str) -> PathBuf {
        self.repository_dir(repository).join("_tags").join(tag)
    }

    fn referrer_path(&self, repository: &str, subject: &Digest, digest: &Digest) -> PathBuf {
        self.repository_dir(repository).join("_referrers").join(file_name(subject)).join(file_name(digest))
    }

    /// Held while something is made reachable.
    pub fn entering(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while something is removed. For moments only: writers wait for it.
    pub fn removing(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on, what becomes reachable is remembered, until [`Self::end_generation`].
    pub fn begin_generation(&self) {
        *self.generation.lock().unwrap_or_else(PoisonError::into_inner) = Some(HashSet::new());
    }

    pub fn end_generation(&self) {
        *self.generation.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether the content became reachable since the collection began.
    pub fn is_of_this_generation(&self, digest: &Digest) -> bool {
        let generation = self.generation.lock().unwrap_or_else(PoisonError::into_inner);
        generation.as_ref().is_some_and(|generation| generation.contains(digest))
    }

    fn note(&self, digest: &Digest) {
        if let Some(generation) = &mut *self.generation.lock().unwrap_or_else(PoisonError::into_inner) {
            generation.insert(digest.clone());
        }
    }

    /// The blob's size where the repository has it. Whoever is told so has the grace period to use it.
    pub fn stat_blob(&self, repository: &str, digest: &Digest) -> io::Result<Option<u64>> {
        let link = self.blob_link(repository, digest);
        let Some(metadata) = absent(fs::metadata(&link))? else { return Ok(None) };
        let Some(content) = absent(fs::metadata(self.blob_path(digest)))? else { return Ok(None) };
        self.note(digest);
        let age = metadata.modified()?.elapsed().unwrap_or_default();
        if age > TOUCH_AFTER
            && let Some(file) = absent(File::options().write(true).open(&link))?
        {
            file.set_modified(SystemTime::now())?;
        }
        Ok(Some(content.len()))
    }

    /// Whether any repository's content has the blob at all, and its size.
    pub fn stat_content(&self, digest: &Digest) -> io::Result<Option<u64>> {
        Ok(absent(fs::metadata(self.blob_path(digest)))?.map(|metadata| metadata.len()))
    }

    /// Gives a repository a blob whose content is there; false when it is not.
    pub fn link_blob(&self, repository: &str, digest: &Digest) -> io::Result<bool> {
        let _entering = self.entering();
        let Some(size) = self.stat_content(digest)? else { return Ok(false) };
        self.note(digest);
        self.make_repository(repository)?;
        self.link(repository, digest, size)?;
        Ok(true)
    }

    fn link(&self, repository: &str, digest: &Digest, size: u64) -> io::Result<()> {
        let link = self.blob_link(repository, digest);
        match File::options().write(true).create_new(true).open(&link) {
            Ok(_new) => {
                // An empty file is wholly there when its directory's entry is.
                sync_parent(&link)?;
                self.charge(repository, i64::try_from(size).unwrap_or(i64::MAX))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                File::options().write(true).open(&link)?.set_modified(SystemTime::now())
            }
            Err(error) => Err(error),
        }
    }

    /// Makes a finished upload content, and the repository's. The digest was checked by the caller.
    pub fn commit(&self, repository: &str, digest: &Digest, data: &File, path: &Path) -> io::Result<()> {
        let _entering = self.entering();
        self.note(digest);
        let target = self.blob_path(digest);
        let size = data.metadata()?.len();
        if self.stat_content(digest)? == Some(size) {
            fs::remove_file(path)?;
            // Its age is counted from its last use.
            File::options().write(true).open(&target)?.set_modified(SystemTime::now())?;
        } else {
            data.sync_all()?;
            fs::rename(path, &target)?;
            sync_parent(&target)?;
        }
        self.make_repository(repository)?;
        self.link(repository, digest, size)
    }

    pub fn unlink_blob(&self, repository: &str, digest: &Digest) -> io::Result<bool> {
        let link = self.blob_link(repository, digest);
        let size = self.stat_content(digest)?.unwrap_or(0);
        let Some(()) = absent(fs::remove_file(&link))? else { return Ok(false) };
        sync_parent(&link)?;
        self.charge(repository, -i64::try_from(size).unwrap_or(i64::MAX))?;
        Ok(true)
    }

    pub fn has_manifest(&self, repository: &str, digest: &Digest) -> bool {
        self.manifest_link(repository, digest).exists()
    }

    /// Keeps a manifest under its digest and its tags. The caller holds [`Self::entering`] since before it looked whether
    /// what the manifest names is there.
    pub fn put_manifest(&self, repository: &str, manifest: &NewManifest<'_>) -> io::Result<()> {
        let digest = manifest.digest;
        self.note(digest);
        self.make_repository(repository)?;
        let content = self.blob_path(digest);
        if self.stat_content(digest)? != Some(manifest.raw.len() as u64) {
            self.write(&content, manifest.raw)?;
        }
        if let (Some(subject), Some(referrer)) = (&manifest.record.subject, &manifest.referrer) {
            let text = serde_json::to_vec(referrer).map_err(io::Error::other)?;
            self.write(&self.referrer_path(repository, subject, digest), &text)?;
        }
        let link = self.manifest_link(repository, digest);
        let new = !link.exists();
        self.write(&link, &serde_json::to_vec(&manifest.record).map_err(io::Error::other)?)?;
        if new {
            self.charge(repository, i64::try_from(manifest.record.size).unwrap_or(i64::MAX))?;
        }
        for tag in manifest.tags {
            self.write(&self.tag_path(repository, tag), digest.as_str().as_bytes())?;
        }
        Ok(())
    }

    /// Notes that the content is about to be named, so that a collection leaves it.
    pub fn expect(&self, digest: &Digest) {
        self.note(digest);
    }

    /// Takes a tag away; the manifest stays.
    pub fn remove_tag(&self, repository: &str, tag: &str) -> io::Result<bool> {
        let path = self.tag_path(repository, tag);
        let removed = absent(fs::remove_file(&path))?.is_some();
        if removed {
            sync_parent(&path)?;
        }
        Ok(removed)
    }

    /// Takes a manifest away, with every tag that points to it.
    pub fn remove_manifest(&self, repository: &str, digest: &Digest) -> io::Result<bool> {
        let link = self.manifest_link(repository, digest);
        let Some(record) = self.record(repository, digest)? else { return Ok(false) };
        for tag in self.tags(repository)?.unwrap_or_default() {
            if self.tag(repository, &tag)?.as_ref() == Some(digest) {
                self.remove_tag(repository, &tag)?;
            }
        }
        let Some(()) = absent(fs::remove_file(&link))? else { return Ok(false) };
        sync_parent(&link)?;
        if let Some(subject) = &record.subject {
            absent(fs::remove_file(self.referrer_path(repository, subject, digest)))?;
        }
        self.charge(repository, -i64::try_from(record.size).unwrap_or(i64::MAX))?;
        Ok(true)
    }

    pub fn tag(&self, repository: &str, tag: &str) -> io::Result<Option<Digest>> {
        let Some(text) = absent(fs::read_to_string(self.tag_path(repository, tag)))? else { return Ok(None) };
        text.trim().parse().map(Some).map_err(|error| {
            io::Error::new(io::ErrorKind::InvalidData, format!("tag {tag} of {repository}: {error}"))
        })
    }

    pub fn record(&self, repository: &str, digest: &Digest) -> io::Result<Option<ManifestRecord>> {
        let Some(raw) = absent(fs::read(self.manifest_link(repository, digest)))? else { return Ok(None) };
        serde_json::from_slice(&raw).map(Some).map_err(io::Error::from)
    }

    /// Every blob a repository has, with the time of its last use.
    pub fn blobs(&self, repository: &str) -> io::Result<Vec<(Digest, SystemTime)>> {
        list(&self.repository_dir(repository).join("_blobs"))
    }

    /// Every manifest a repository has, with the time it came.
    pub fn manifests(&self, repository: &str) -> io::Result<Vec<(Digest, SystemTime)>> {
        list(&self.repository_dir(repository).join("_manifests"))
    }

    /// Bytes a repository holds, each blob once.
    pub fn usage(&self, repository: &str) -> io::Result<u64> {
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = usage.get(repository) {
            return Ok(*known);
        }
        let mut sum = 0;
        for (digest, _) in self.blobs(repository)? {
            sum += self.stat_content(&digest)?.unwrap_or(0);
        }
        for (digest, _) in self.manifests(repository)? {
            sum += self.record(repository, &digest)?.map_or(0, |record| record.size);
        }
        usage.insert(repository.to_owned(), sum);
        Ok(sum)
    }

    fn charge(&self, repository: &str, bytes: i64) -> io::Result<()> {
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        // Where it is not counted yet, the first count will see the change itself.
        if let Some(known) = usage.get_mut(repository) {
            *known = known.saturating_add_signed(bytes);
        }
        Ok(())
    }

    fn make_repository(&self, repository: &str) -> io::Result<()> {
        let known = self.repositories.read().unwrap_or_else(PoisonError::into_inner).contains(repository);
        if known {
            return Ok(());
        }
        let dir = self.repository_dir(repository);
        for part in ["_blobs", "_manifests", "_tags", "_referrers"] {
            fs::create_dir_all(dir.join(part))?;
        }
        File::open(&dir)?.sync_all()?;
        let mut up = dir.as_path();
        while let Some(parent) =
            up.parent().filter(|parent| parent.starts_with(self.root.join("repositories")))
        {
            File::open(parent)?.sync_all()?;
            up = parent;
        }
        self.repositories.write().unwrap_or_else(PoisonError::into_inner).insert(repository.to_owned());
        Ok(())
    }

    /// Forgets a repository that holds nothing. The caller holds [`Self::removing`].
    pub fn remove_if_empty(&self, repository: &str) -> io::Result<bool> {
        let dir = self.repository_dir(repository);
        if !self.blobs(repository)?.is_empty() || !self.manifests(repository)?.is_empty() {
            return Ok(false);
        }
        for part in ["_blobs", "_manifests", "_tags", "_referrers"] {
            absent(fs::remove_dir_all(dir.join(part)))?;
        }
        self.repositories.write().unwrap_or_else(PoisonError::into_inner).remove(repository);
        self.usage.lock().unwrap_or_else(PoisonError::into_inner).remove(repository);
        let top = self.root.join("repositories");
        let mut up = dir.as_path();
        while up != top && fs::remove_dir(up).is_ok() {
            up = up.parent().unwrap_or(&top);
        }
        Ok(true)
    }

    /// Writes a small file so that it is either as it was or complete, also after a power cut.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut temp = tempfile::NamedTempFile::new_in(self.root.join("tmp"))?;
        temp.write_all(bytes)?;
        temp.as_file().sync_all()?;
        let mut result = temp.persist(path);
        if let Err(failed) = result {
            if failed.error.kind() != io::ErrorKind::NotFound {
                return Err(failed.error);
            }
            let parent = path.parent().unwrap_or(&self.root);
            fs::create_dir_all(parent)?;
            sync_parent(parent)?;
            result = failed.file.persist(path);
        }
        result.map_err(|failed| failed.error)?;
        sync_parent(path)
    }
}

impl Library for Storage {
    fn manifest(&self, repository: &str, pointer: &Pointer) -> io::Result<Option<StoredManifest>> {
        let digest = match pointer {
            Pointer::Digest(digest) => digest.clone(),
            Pointer::Tag(tag) => match self.tag(repository, tag)? {
                Some(digest) => digest,
                None => return Ok(None),
            },
        };
        let Some(record) = self.record(repository, &digest)? else { return Ok(None) };
        let Some(raw) = absent(fs::read(self.blob_path(&digest)))? else { return Ok(None) };
        Ok(Some(StoredManifest { digest, media_type: record.media_type, raw }))
    }

    fn blob(&self, repository: &str, digest: &Digest) -> io::Result<Option<(File, u64)>> {
        if self.stat_blob(repository, digest)?.is_none() {
            return Ok(None);
        }
        let Some(file) = absent(File::open(self.blob_path(digest)))? else { return Ok(None) };
        let size = file.metadata()?.len();
        Ok(Some((file, size)))
    }

    fn tags(&self, repository: &str) -> io::Result<Option<Vec<String>>> {
        if !self.repositories.read().unwrap_or_else(PoisonError::into_inner).contains(repository) {
            return Ok(None);
        }
        let dir = self.repository_dir(repository).join("_tags");
        let Some(entries) = absent(fs::read_dir(&dir))? else { return Ok(Some(Vec::new())) };
        let mut tags = Vec::new();
        for entry in entries {
            tags.extend(entry?.file_name().into_string());
        }
        tags.sort_unstable();
        Ok(Some(tags))
    }

    fn repositories(&self) -> io::Result<Vec<String>> {
        Ok(self.repositories.read().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect())
    }

    fn referrers(&self, repository: &str, subject: &Digest) -> io::Result<Vec<Descriptor>> {
        let dir = self.repository_dir(repository).join("_referrers").join(file_name(subject));
        let mut found = Vec::new();
        for (digest, _) in list(&dir)? {
            let Some(raw) = absent(fs::read(dir.join(file_name(&digest))))? else { continue };
            // Left behind by a removal that was cut short: the manifest decides.
            if self.has_manifest(repository, &digest) {
                found.push(serde_json::from_slice::<Descriptor>(&raw)?);
            }
        }
        found.sort_by(|a, b| a.digest.cmp(&b.digest));
        Ok(found)
    }
}

fn file_name(digest: &Digest) -> String {
    format!("{}-{}", digest.algorithm().as_str(), digest.hex())
}

fn parse_file_name(name: &str) -> Option<Digest> {
    let (algorithm, hex) = name.split_once('-')?;
    let algorithm = match algorithm {
        "sha256" => Algorithm::Sha256,
        "sha512" => Algorithm::Sha512,
        _ => return None,
    };
    Digest::from_hex(algorithm, hex).ok()
}

fn list(dir: &Path) -> io::Result<Vec<(Digest, SystemTime)>> {
    let Some(entries) = absent(fs::read_dir(dir))? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let Some(digest) = entry.file_name().to_str().and_then(parse_file_name) else { continue };
        let Some(metadata) = absent(entry.metadata())? else { continue };
        found.push((digest, metadata.modified()?));
    }
    Ok(found)
}

/// What is not there is no error.
pub(super) fn absent<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

fn find_repositories(dir: &Path, name: &str, found: &mut BTreeSet<String>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let file_name = entry.file_name();
        let Some(part) = file_name.to_str() else { continue };
        if part == "_manifests" {
            if valid_repository(name) {
                found.insert(name.to_owned());
            }
        } else if !part.starts_with('_') && entry.file_type()?.is_dir() {
            let name = if name.is_empty() { part.to_owned() } else { format!("{name}/{part}") };
            find_repositories(&entry.path(), &name, found)?;
        }
    }
    Ok(())
}
