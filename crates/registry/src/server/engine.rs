//! An engine's image store, read as a registry: `debian:12` is tag `12` of `library/debian`, and of
//! `docker.io/library/debian`, so that names of two registries can be told apart.
//!
//! Invariants: nothing is written; a repository gives only what one of its own manifests names. Layers whose
//! compressed form the engine does not keep are not there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use brigantine_image::model::{Descriptor, Index};
use brigantine_image::{Digest, Reference};

use super::library::{Library, StoredManifest};
use super::manifests::Described;
use super::route::{Pointer, valid_repository};
use super::storage::absent;
use crate::Error;

/// The annotation that holds an image's full name.
const NAME: &str = "io.containerd.image.name";

type Version = (SystemTime, u64);

pub(super) struct EngineStore {
    root: PathBuf,
    known: Mutex<Option<(Version, Arc<Names>)>>,
}

#[derive(Default)]
struct Names {
    repositories: BTreeMap<String, Repository>,
}

#[derive(Default)]
struct Repository {
    tags: BTreeMap<String, Digest>,
    manifests: BTreeMap<Digest, String>,
    blobs: BTreeSet<Digest>,
    referrers: Vec<(Digest, Descriptor)>,
}

impl EngineStore {
    pub fn open(root: &Path) -> Result<Self, Error> {
        // The data root itself is meant as well.
        let root =
            [root.to_owned(), root.join("image")].into_iter().find(|dir| dir.join("index.json").exists());
        let root = root.ok_or_else(|| {
            Error::Invalid("no engine's image store is there: index.json is missing".to_owned())
        })?;
        let store = Self { root, known: Mutex::default() };
        store
            .names()
            .map_err(|source| Error::Io { what: format!("read {}", store.root.display()), source })?;
        Ok(store)
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.algorithm().as_str()).join(digest.hex())
    }

    fn names(&self) -> io::Result<Arc<Names>> {
        let path = self.root.join("index.json");
        let metadata = fs::metadata(&path)?;
        let version = (metadata.modified()?, metadata.len());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((seen, names)) = &*known
            && *seen == version
        {
            return Ok(Arc::clone(names));
        }
        let index: Index = serde_json::from_slice(&fs::read(&path)?)?;
        let mut names = Names::default();
        for manifest in &index.manifests {
            let name = manifest.annotations.get(NAME).and_then(|name| Reference::parse(name).ok());
            if let Some(name) = name {
                self.add(&mut names, &name, manifest)?;
            }
        }
        let names = Arc::new(names);
        *known = Some((version, Arc::clone(&names)));
        Ok(names)
    }

    fn add(&self, names: &mut Names, name: &Reference, manifest: &Descriptor) -> io::Result<()> {
        let full = format!("{}/{}", name.domain(), name.path());
        for repository in [name.path().to_owned(), full] {
            if !valid_repository(&repository) {
                continue;
            }
            let repository = names.repositories.entry(repository).or_default();
            if let Some(tag) = name.tag() {
                repository.tags.insert(tag.to_owned(), manifest.digest.clone());
            }
            let mut open = vec![manifest.digest.clone()];
            while let Some(digest) = open.pop() {
                if repository.manifests.contains_key(&digest) {
                    continue;
                }
                let Some(raw) = absent(fs::read(self.blob_path(&digest)))? else { continue };
                let Ok(described) = Described::read(&raw, None) else { continue };
                if let Some(subject) = &described.subject {
                    let referrer = described.as_referrer(&digest, raw.len() as u64);
                    repository.referrers.push((subject.clone(), referrer));
                }
                repository.manifests.insert(digest, described.media_type);
                repository.blobs.extend(described.blobs.into_iter().map(|blob| blob.digest));
                open.extend(described.manifests.into_iter().map(|named| named.digest));
            }
        }
        Ok(())
    }
}

impl Library for EngineStore {
    fn manifest(&self, repository: &str, pointer: &Pointer) -> io::Result<Option<StoredManifest>> {
        let names = self.names()?;
        let Some(repository) = names.repositories.get(repository) else { return Ok(None) };
        let digest = match pointer {
            Pointer::Digest(digest) => digest,
            Pointer::Tag(tag) => match repository.tags.get(tag) {
                Some(digest) => digest,
                None => return Ok(None),
            },
        };
        let Some(media_type) = repository.manifests.get(digest) else { return Ok(None) };
        let Some(raw) = absent(fs::read(self.blob_path(digest)))? else { return Ok(None) };
        Ok(Some(StoredManifest { digest: digest.clone(), media_type: media_type.clone(), raw }))
    }

    fn blob(&self, repository: &str, digest: &Digest) -> io::Result<Option<(File, u64)>> {
        let names = self.names()?;
        if !names.repositories.get(repository).is_some_and(|repository| repository.blobs.contains(digest)) {
            return Ok(None);
        }
        let Some(file) = absent(File::open(self.blob_path(digest)))? else { return Ok(None) };
        let size = file.metadata()?.len();
        Ok(Some((file, size)))
    }

    fn tags(&self, repository: &str) -> io::Result<Option<Vec<String>>> {
        let names = self.names()?;
        Ok(names.repositories.get(repository).map(|repository| repository.tags.keys().cloned().collect()))
    }

    fn repositories(&self) -> io::Result<Vec<String>> {
        Ok(self.names()?.repositories.keys().cloned().collect())
    }

    fn referrers(&self, repository: &str, subject: &Digest) -> io::Result<Vec<Descriptor>> {
        let names = self.names()?;
        let Some(repository) = names.repositories.get(repository) else { return Ok(Vec::new()) };
        let of_subject = repository.referrers.iter().filter(|(of, _)| of == subject);
        Ok(of_subject.map(|(_, referrer)| referrer.clone()).collect())
    }
}
