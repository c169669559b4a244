//! `index.json`: which images the store has and under which names.
//!
//! The file is a valid OCI image index; names and times live in annotations. It is replaced as a whole (temp, fsync,
//! rename, fsync) under the store's exclusive lock, so a reader always sees one complete state. Every image of the
//! store has at least one entry; one without a name is an image nobody tagged.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::digest::Digest;
use crate::error::{Error, IoContext as _, Result, json};
use crate::model::{Descriptor, Index};
use crate::reference::Reference;
use crate::temp::TempFile;
use crate::{lease, media};

const NAME: &str = "io.containerd.image.name";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const IMAGE: &str = "dev.brigantine.image.id";
const TAGGED: &str = "dev.brigantine.image.last-tagged";
const PARENT: &str = "dev.brigantine.image.parent";
const INDEX: &str = "dev.brigantine.image.index";

/// One name of one image, or the image without a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// With a tag or with a digest, never both, never neither.
    pub name: Option<Reference>,
    pub image: Digest,
    pub manifest: Descriptor,
    /// RFC 3339; when the name was last given to this image.
    pub tagged: Option<String>,
    /// The image this one was made from, here.
    pub parent: Option<Digest>,
    /// The index that the name stands for, with other platforms' images and attestations.
    pub index: Option<Descriptor>,
}

/// All names, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Names {
    pub entries: Vec<Entry>,
}

impl Names {
    pub fn find(&self, name: &Reference) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name.as_ref() == Some(name))
    }

    pub fn of_image<'a>(&'a self, image: &'a Digest) -> impl Iterator<Item = &'a Entry> {
        self.entries.iter().filter(move |entry| entry.image == *image)
    }

    /// The ids of all images, each once, in the order they came.
    pub fn images(&self) -> Vec<Digest> {
        let mut seen = std::collections::HashSet::new();
        self.entries.iter().filter(|e| seen.insert(&e.image)).map(|e| e.image.clone()).collect()
    }

    pub fn has_image(&self, image: &Digest) -> bool {
        self.of_image(image).next().is_some()
    }

    /// Gives a name to an image; an image that thereby lost its last name stays, nameless.
    /// Returns the image that had the name before, if it was another one.
    pub fn set(&mut self, entry: Entry) -> Option<Digest> {
        let mut previous = None;
        if let Some(name) = &entry.name {
            if let Some(position) = self.entries.iter().position(|e| e.name.as_ref() == Some(name)) {
                let old = self.entries.remove(position);
                if old.image != entry.image {
                    previous = Some(old.image.clone());
                    self.keep_nameless(old);
                }
            }
            self.entries.retain(|e| e.name.is_some() || e.image != entry.image);
        } else if self.has_image(&entry.image) {
            return None;
        }
        self.entries.push(entry);
        previous
    }

    /// Takes a name away; the image stays, nameless if that was its last.
    pub fn unset(&mut self, name: &Reference) -> Option<Entry> {
        let position = self.entries.iter().position(|e| e.name.as_ref() == Some(name))?;
        let old = self.entries.remove(position);
        self.keep_nameless(old.clone());
        Some(old)
    }

    pub fn remove_image(&mut self, image: &Digest) {
        self.entries.retain(|e| e.image != *image);
    }

    fn keep_nameless(&mut self, mut old: Entry) {
        if !self.has_image(&old.image) {
            old.name = None;
            self.entries.push(old);
        }
    }

    fn read(raw: &[u8]) -> Result<Self> {
        let index: Index = json(raw, || "the store's index.json".to_owned())?;
        let mut entries = Vec::with_capacity(index.manifests.len());
        for mut manifest in index.manifests {
            let annotations = std::mem::take(&mut manifest.annotations);
            let text = |key: &str| annotations.get(key).cloned();
            let Some(image) = text(IMAGE) else { continue };
            entries.push(Entry {
                name: text(NAME).map(|name| Reference::parse(&name)).transpose()?,
                image: image.parse()?,
                manifest,
                tagged: text(TAGGED),
                parent: text(PARENT).map(|parent| parent.parse()).transpose()?,
                index: text(INDEX)
                    .map(|index| json(index.as_bytes(), || "an index of the store's index.json".to_owned()))
                    .transpose()?,
            });
        }
        Ok(Self { entries })
    }

    fn write(&self) -> Result<Vec<u8>> {
        let manifests = self
            .entries
            .iter()
            .map(|entry| {
                let mut descriptor = entry.manifest.clone();
                descriptor.annotations = BTreeMap::from([(IMAGE.to_owned(), entry.image.to_string())]);
                let mut set = |key: &str, value: Option<String>| {
                    if let Some(value) = value {
                        descriptor.annotations.insert(key.to_owned(), value);
                    }
                };
                set(NAME, entry.name.as_ref().map(ToString::to_string));
                // The form other programs that read a layout select images by.
                set(REF_NAME, entry.name.as_ref().map(Reference::familiar));
                set(TAGGED, entry.tagged.clone());
                set(PARENT, entry.parent.as_ref().map(ToString::to_string));
                set(INDEX, entry.index.as_ref().and_then(|index| serde_json::to_string(index).ok()));
                descriptor
            })
            .collect();
        let index = Index {
            schema_version: 2,
            media_type: Some(media::OCI_INDEX.to_owned()),
            artifact_type: None,
            manifests,
            subject: None,
            annotations: BTreeMap::new(),
        };
        serde_json::to_vec(&index).map_err(|source| Error::Json { what: "index.json".to_owned(), source })
    }
}

/// Tells one version of the file from another.
type Version = (u64, i64, i64, u64);

/// The file and what was last read from it.
#[derive(Debug)]
pub(crate) struct NamesFile {
    root: PathBuf,
    cached: Mutex<Option<(Version, Arc<Names>)>>,
}

impl NamesFile {
    /// Opens the file, making an empty one when there is none.
    pub fn open(root: &Path) -> Result<Self> {
        let file = Self { root: root.to_owned(), cached: Mutex::new(None) };
        if !file.path().exists() {
            let _exclusive = lease::lock(root, true)?;
            if !file.path().exists() {
                file.replace(&Names::default())?;
            }
        }
        Ok(file)
    }

    fn path(&self) -> PathBuf {
        self.root.join("index.json")
    }

    pub fn load(&self) -> Result<Arc<Names>> {
        let path = self.path();
        let metadata = fs::metadata(&path).at("stat", &path)?;
        let version = (metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len());
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, names)) = &*cached
            && *known == version
        {
            return Ok(Arc::clone(names));
        }
        let names = Arc::new(Names::read(&fs::read(&path).at("read", &path)?)?);
        *cached = Some((version, Arc::clone(&names)));
        Ok(names)
    }

    /// Changes the names under the store's exclusive lock. Nothing is written when `change` fails or changes nothing.
    pub fn update<T>(&self, change: impl FnOnce(&mut Names) -> Result<T>) -> Result<T> {
        let _exclusive = lease::lock(&self.root, true)?;
        let before = self.load()?;
        let mut names = (*before).clone();
        let result = change(&mut names)?;
        if names != *before {
            self.replace(&names)?;
        }
        Ok(result)
    }

    fn replace(&self, names: &Names) -> Result<()> {
        let raw = names.write()?;
        let mut temp = TempFile::create(&self.root.join("tmp"), "index")?;
        let path = temp.path().to_owned();
        temp.file_mut().write_all(&raw).at("write", path)?;
        temp.publish(&self.path())?;
        *self.cached.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }
}
