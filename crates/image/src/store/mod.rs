//! The image store: images by name and id over the content store and the extracted layers.
//!
//! The directory is a valid OCI image layout (`oci-layout`, `index.json`, `blobs/`) with `layers/`, `leases/` and
//! `tmp/` beside. All changes of names go through the store's lock; several threads and processes may share a store.

mod find;
mod unpacked;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use find::find;

use crate::content::Content;
use crate::digest::Digest;
use crate::error::{Error, IoContext as _, Result, json};
use crate::layers::Layers;
use crate::lease::{self, Lease};
use crate::media;
use crate::model::{Descriptor, Document, ImageConfig, Manifest};
use crate::names::{Entry, Names, NamesFile};
use crate::platform::{self, Platform};
use crate::reference::Reference;
use crate::snapshot::Storage;
use crate::temp::{self, TempFile};
use crate::tree;

const LAYOUT: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;

/// An image store. Clones share it.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    content: Content,
    layers: Layers,
    /// The files of whole images, by chain id, where layers have none of their own.
    trees: Layers,
    names: NamesFile,
    records: Mutex<HashMap<Digest, Arc<Record>>>,
    /// Layers and the blobs that were seen to be their archives since the store was opened.
    seen: Mutex<HashSet<(Digest, Digest)>>,
}

/// An image's parsed documents.
#[derive(Debug)]
struct Record {
    manifest: Manifest,
    config: Arc<ImageConfig>,
}

/// What one manifest refers to.
pub(crate) struct Documents {
    pub layers: Vec<Descriptor>,
    pub config: Arc<ImageConfig>,
}

/// An image of the store, as it was when it was looked up.
#[derive(Clone, Debug)]
pub struct Image {
    /// Digest of the configuration.
    pub id: Digest,
    /// The manifest, as stored.
    pub manifest: Descriptor,
    /// The blobs of its layers, bottom first; as many as `config.rootfs.diff_ids`.
    pub layers: Vec<Descriptor>,
    pub config: Arc<ImageConfig>,
    /// `repository:tag` names, in the order they were given.
    pub tags: Vec<Reference>,
    /// `repository@digest` names: what it was pulled or pushed as.
    pub digests: Vec<Reference>,
    /// Sum of the lengths of the files of all layers.
    pub size: u64,
    /// RFC 3339, as the configuration states it.
    pub created: Option<String>,
    /// RFC 3339; when a name was last given to it here.
    pub last_tagged: Option<String>,
    /// The image it was made from here (commit, build).
    pub parent: Option<Digest>,
    /// The index that the name it was looked up by stands for: other platforms' images and attestations.
    pub index: Option<Descriptor>,
}

impl Image {
    /// Fails unless the image, known to the caller as `name`, is for one of the `wanted` platforms. None wanted is all.
    pub fn require_platform(&self, name: &str, wanted: &[Platform]) -> Result<()> {
        let actual = self.config.platform();
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted.accepts(&actual)) {
            return Ok(());
        }
        Err(Error::PlatformMismatch {
            what: format!("image with reference {name}"),
            wanted: platform::listed(wanted),
            actual: actual.normalised().to_string(),
        })
    }
}

/// What to add to the store. Every blob must be there already, held by the lease it was written under.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// A single image's manifest (never an index).
    pub manifest: Descriptor,
    /// Names with a tag or with a digest; none makes a nameless image.
    pub names: Vec<Reference>,
    pub parent: Option<Digest>,
    /// An index that names the manifest among others; everything it names must be there, too.
    pub index: Option<Descriptor>,
}

/// One line of an image's history, newest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistoryLine {
    /// The image at this step where it is known here: always for the newest.
    pub id: Option<Digest>,
    /// RFC 3339.
    pub created: Option<String>,
    pub created_by: String,
    pub tags: Vec<Reference>,
    pub size: u64,
    pub comment: String,
}

impl Store {
    /// Opens the store at `root`, making it when it is not there, and removes what a crash left behind. New layers
    /// take the best form that works there.
    pub fn open(root: &Path) -> Result<Self> {
        Self::open_with(root, None)
    }

    /// The same with the form that new layers take; fails where that does not work.
    pub fn open_with(root: &Path, storage: Option<Storage>) -> Result<Self> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for dir in ["", "blobs/sha256", "layers", "trees", "leases", "tmp"] {
            let path = root.join(dir);
            builder.create(&path).at("create", path)?;
        }
        tree::spread(&root.join("tmp")).at("open", root.join("tmp"))?;
        let layout = root.join("oci-layout");
        if !layout.exists() {
            let mut temp = TempFile::create(&root.join("tmp"), "layout")?;
            let path = temp.path().to_owned();
            temp.file_mut().write_all(LAYOUT.as_bytes()).at("write", path)?;
            temp.publish(&layout)?;
        }
        temp::sweep(&root.join("tmp"))?;
        {
            // Leases of who is gone.
            let _exclusive = lease::lock(root, true)?;
            lease::held(root)?;
        }
        if let Some(storage) = storage {
            storage.check(&root.join("tmp"))?;
        }
        let inner = Inner {
            root: root.to_owned(),
            content: Content::new(root),
            layers: Layers::new(root, "layers", storage),
            trees: Layers::new(root, "trees", storage),
            names: NamesFile::open(root)?,
            records: Mutex::default(),
            seen: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    pub fn content(&self) -> &Content {
        &self.inner.content
    }

    pub(crate) fn layers(&self) -> &Layers {
        &self.inner.layers
    }

    pub(crate) fn trees(&self) -> &Layers {
        &self.inner.trees
    }

    pub(crate) fn names(&self) -> &NamesFile {
        &self.inner.names
    }

    /// A hold on what an operation is about to add; drop it when the image is added.
    pub fn lease(&self) -> Result<Lease> {
        Lease::new(&self.inner.root)
    }

    /// The image of this name, `repository@digest`, id or unambiguous id prefix.
    pub fn resolve(&self, name: &str) -> Result<Image> {
        let names = self.inner.names.load()?;
        let found = find(&names, name)?;
        self.describe_as(&names, &found.image, Some(found))
    }

    /// Just the id of what [`Self::resolve`] would find.
    pub fn resolve_id(&self, name: &str) -> Result<Digest> {
        let names = self.inner.names.load()?;
        Ok(find(&names, name)?.image.clone())
    }

    /// The image with exactly this id.
    pub fn image(&self, id: &Digest) -> Result<Image> {
        let names = self.inner.names.load()?;
        if !names.has_image(id) {
            return Err(Error::NoSuchImage(id.to_string()));
        }
        self.describe(&names, id)
    }

    /// All images, newest first.
    pub fn list(&self) -> Result<Vec<Image>> {
        let names = self.inner.names.load()?;
        let mut images = Vec::new();
        for id in names.images() {
            match self.describe(&names, &id) {
                Ok(image) => images.push(image),
                // One damaged image must not hide all others; `check` tells of it.
                Err(Error::DigestMismatch { .. } | Error::NoSuchContent(_) | Error::Json { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let time = |image: &Image| image.created.as_deref().and_then(|t| t.parse::<jiff::Timestamp>().ok());
        images.sort_by_cached_key(|image| std::cmp::Reverse(time(image)));
        Ok(images)
    }

    /// The raw bytes of the image's configuration.
    pub fn config_raw(&self, id: &Digest) -> Result<Vec<u8>> {
        self.inner.content.read(id)
    }

    /// Gives `image` the name `target` (`:latest` when it has no tag). Returns the image and the one that lost the name.
    pub fn tag(&self, image: &str, target: &Reference) -> Result<(Digest, Option<Digest>)> {
        if target.digest().is_some() {
            return Err(Error::TagWithDigest);
        }
        let target = target.clone().or_latest();
        self.inner.names.update(|names| {
            let entry = find(names, image)?.clone();
            let id = entry.image.clone();
            if names.find(&target).is_some_and(|there| there.image == id) {
                return Ok((id, None));
            }
            let previous = names.set(Entry { name: Some(target), tagged: Some(now()), ..entry });
            Ok((id, previous))
        })
    }

    /// Records a digest name for an image, as a push does.
    pub fn add_digest_name(&self, id: &Digest, name: &Reference) -> Result<()> {
        self.inner.names.update(|names| {
            let Some(entry) = names.of_image(id).next().cloned() else {
                return Err(Error::NoSuchImage(id.to_string()));
            };
            names.set(Entry { name: Some(name.clone()), ..entry });
            Ok(())
        })
    }

    /// Makes an image visible: checks that its manifest, configuration and blobs are all there and agree, then adds
    /// it under its names in one step.
    pub fn add_image(&self, lease: &Lease, new: NewImage) -> Result<Image> {
        self.add_images(lease, vec![new]).map(|mut images| images.remove(0))
    }

    /// Adds several images in one step: all or none.
    pub fn add_images(&self, lease: &Lease, new: Vec<NewImage>) -> Result<Vec<Image>> {
        let (ids, _) = self.insert(lease, new)?;
        ids.iter().map(|id| self.image(id)).collect()
    }

    /// Adds images; tells their ids and which image lost which name.
    pub(crate) fn insert(
        &self,
        lease: &Lease,
        new: Vec<NewImage>,
    ) -> Result<(Vec<Digest>, HashMap<Reference, Digest>)> {
        let mut entries = Vec::new();
        let mut ids = Vec::new();
        for image in new {
            lease.hold(&image.manifest.digest)?;
            let record = self.read_record(&image.manifest)?;
            lease.hold(&record.manifest.config.digest)?;
            let id = record.manifest.config.digest.clone();
            for layer in &record.manifest.layers {
                lease.hold(&layer.digest)?;
                if !self.inner.content.has(&layer.digest) {
                    return Err(Error::NoSuchContent(layer.digest.clone()));
                }
            }
            self.records().insert(image.manifest.digest.clone(), Arc::new(record));
            ids.push(id.clone());
            let mut names: Vec<Option<Reference>> = image.names.into_iter().map(Some).collect();
            if names.is_empty() {
                names.push(None);
            }
            if let Some(index) = &image.index {
                for digest in self.index_content(index)? {
                    lease.hold(&digest)?;
                    if !self.inner.content.has(&digest) {
                        return Err(Error::NoSuchContent(digest));
                    }
                }
            }
            let manifest = Descriptor { annotations: std::collections::BTreeMap::new(), ..image.manifest };
            for name in names {
                entries.push(Entry {
                    tagged: name.is_some().then(now),
                    name,
                    image: id.clone(),
                    manifest: manifest.clone(),
                    parent: image.parent.clone(),
                    index: image.index.clone(),
                });
            }
        }
        let replaced = self.inner.names.update(|names| {
            let mut replaced = HashMap::new();
            for mut entry in entries {
                let known = names.of_image(&entry.image).find_map(|known| known.parent.clone());
                entry.parent = entry.parent.or(known);
                let name = entry.name.clone();
                if let (Some(name), Some(previous)) = (name, names.set(entry)) {
                    replaced.insert(name, previous);
                }
            }
            Ok(replaced)
        })?;
        Ok((ids, replaced))
    }

    /// The image's history, newest first.
    pub fn history(&self, image: &Image) -> Result<Vec<HistoryLine>> {
        let config = &image.config;
        let mut sizes = Vec::new();
        for (diff_id, layer) in config.rootfs.diff_ids.iter().zip(&image.layers) {
            sizes.push(self.inner.layers.get(diff_id)?.map_or(layer.size, |info| info.size));
        }
        let mut sizes = sizes.into_iter();
        let mut lines: Vec<HistoryLine> = config
            .history
            .iter()
            .map(|step| HistoryLine {
                id: None,
                created: step.created.clone(),
                created_by: step.created_by.clone().unwrap_or_default(),
                tags: Vec::new(),
                size: if step.empty_layer { 0 } else { sizes.next().unwrap_or_default() },
                comment: step.comment.clone().unwrap_or_default(),
            })
            .collect();
        // Layers the history does not tell of.
        lines.extend(sizes.map(|size| HistoryLine {
            id: None,
            created: config.created.clone(),
            created_by: String::new(),
            tags: Vec::new(),
            size,
            comment: String::new(),
        }));
        lines.reverse();
        if let Some(first) = lines.first_mut() {
            first.id = Some(image.id.clone());
            first.tags.clone_from(&image.tags);
        }
        Ok(lines)
    }

    fn records(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, Arc<Record>>> {
        self.inner.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn find_in(names: &Names, text: &str) -> Result<Digest> {
        find(names, text).map(|entry| entry.image.clone())
    }

    /// The configuration of an image that may have been removed a moment ago.
    pub(crate) fn known_config(&self, id: &Digest) -> Option<Arc<ImageConfig>> {
        let records = self.records();
        records
            .values()
            .find(|record| record.manifest.config.digest == *id)
            .map(|record| Arc::clone(&record.config))
    }

    /// The documents behind one entry of the index.
    pub(crate) fn describe_entry(&self, entry: &Entry) -> Result<Documents> {
        let record = self.record(&entry.manifest)?;
        Ok(Documents { layers: record.manifest.layers.clone(), config: Arc::clone(&record.config) })
    }

    pub(crate) fn forget(&self, id: &Digest) {
        self.records().retain(|_, record| record.manifest.config.digest != *id);
    }

    fn record(&self, manifest: &Descriptor) -> Result<Arc<Record>> {
        if let Some(record) = self.records().get(&manifest.digest) {
            return Ok(Arc::clone(record));
        }
        let record = Arc::new(self.read_record(manifest)?);
        self.records().insert(manifest.digest.clone(), Arc::clone(&record));
        Ok(record)
    }

    fn read_record(&self, descriptor: &Descriptor) -> Result<Record> {
        let what = || format!("manifest {}", descriptor.digest);
        let raw = self.inner.content.read(&descriptor.digest)?;
        let manifest =
            match Document::parse(&raw).map_err(|source| Error::Document { what: what(), source })? {
                Document::Manifest(manifest) => *manifest,
                Document::Index(_) => {
                    return Err(Error::Invalid(format!("{} is an index, not an image's manifest", what())));
                }
            };
        let config_media = manifest.config.media_type.as_str();
        if !config_media.is_empty() && !media::is_image_config(config_media) {
            return Err(Error::Invalid(format!(
                "{} is of an artifact with configuration type {config_media}, not of an image",
                what()
            )));
        }
        let raw = self.inner.content.read(&manifest.config.digest)?;
        let config: ImageConfig = json(&raw, || format!("image configuration {}", manifest.config.digest))?;
        if config.rootfs.diff_ids.len() != manifest.layers.len() {
            return Err(Error::Invalid(format!(
                "{} has {} layers, but its configuration {} has {} diff ids",
                what(),
                manifest.layers.len(),
                manifest.config.digest,
                config.rootfs.diff_ids.len()
            )));
        }
        Ok(Record { manifest, config: Arc::new(config) })
    }

    pub(crate) fn describe(&self, names: &Names, id: &Digest) -> Result<Image> {
        self.describe_as(names, id, None)
    }

    /// One image may be there by several manifests (its layers compressed differently); each name has its own.
    fn describe_as(&self, names: &Names, id: &Digest, by: Option<&Entry>) -> Result<Image> {
        let mut entries = names.of_image(id);
        let Some(first) = entries.next() else { return Err(Error::NoSuchImage(id.to_string())) };
        let by = by.unwrap_or(first);
        let manifest = &by.manifest;
        let record = self.record(manifest)?;
        let mut image = Image {
            id: id.clone(),
            manifest: manifest.clone(),
            layers: record.manifest.layers.clone(),
            config: Arc::clone(&record.config),
            tags: Vec::new(),
            digests: Vec::new(),
            size: 0,
            created: record.config.created.clone(),
            last_tagged: None,
            parent: None,
            index: by.index.clone(),
        };
        for entry in std::iter::once(first).chain(entries) {
            if let Some(name) = &entry.name {
                if name.digest().is_some() { &mut image.digests } else { &mut image.tags }.push(name.clone());
            }
            image.parent = image.parent.or_else(|| entry.parent.clone());
            image.last_tagged = image.last_tagged.max(entry.tagged.clone());
        }
        for (diff_id, layer) in record.config.rootfs.diff_ids.iter().zip(&record.manifest.layers) {
            image.size += self.inner.layers.get(diff_id)?.map_or(layer.size, |info| info.size);
        }
        Ok(image)
    }
}

/// RFC 3339 with nanoseconds.
pub(crate) fn now() -> String {
    format!("{:.9}", jiff::Timestamp::now())
}
