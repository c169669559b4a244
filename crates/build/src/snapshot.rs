//! The builder's own layers: a directory per step, until an image takes it over.
//!
//! Invariant: a snapshot's directory never changes once its step has ended; it moves only while nobody is about to
//! use its path.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use brigantine_image::{Digest, LayerFiles, Lease, Lower, Storage, Store};
use sha2::{Digest as _, Sha256};

use crate::error::{Context, Error, Result};
use crate::hashes::Stack;

/// A step's result on disk.
#[derive(Debug)]
pub(crate) struct Snap {
    pub id: String,
    place: RwLock<Place>,
}

#[derive(Debug, Clone)]
enum Place {
    /// Here, in the builder's own directory.
    Own(PathBuf),
    /// In the image store.
    Layer(Digest),
}

/// One layer of a file system.
#[derive(Debug, Clone)]
pub(crate) enum Layer {
    Image(Digest),
    Snap(Arc<Snap>),
}

impl Snap {
    pub fn own(id: String, path: PathBuf) -> Self {
        Self { id, place: RwLock::new(Place::Own(path)) }
    }

    pub fn layer(id: String, diff_id: Digest) -> Self {
        Self { id, place: RwLock::new(Place::Layer(diff_id)) }
    }

    /// Its diff id, if it is a layer of the image store.
    pub fn diff_id(&self) -> Option<Digest> {
        match &*self.place.read().unwrap_or_else(PoisonError::into_inner) {
            Place::Layer(diff_id) => Some(diff_id.clone()),
            Place::Own(_) => None,
        }
    }

    /// Makes it a layer of the image store, unless it is one: its diff id.
    pub fn adopt(&self, store: &Store, lease: &Lease) -> Result<Digest> {
        let what = || "make a layer of a step's result".to_owned();
        let mut place = self.place.write().unwrap_or_else(PoisonError::into_inner);
        match &*place {
            Place::Layer(diff_id) => {
                let diff_id = diff_id.clone();
                store.ensure_blob(lease, &diff_id).doing(what)?;
                Ok(diff_id)
            }
            Place::Own(path) => {
                let Some((descriptor, _)) = store.adopt_upper(lease, path).doing(what)? else {
                    return Err(Error::Invalid("a step's result is empty".to_owned()));
                };
                // Its digest is its diff id: it is not compressed.
                if path.exists() {
                    // The same layer was there already.
                    fs::remove_dir_all(path).doing(|| format!("remove {}", path.display()))?;
                }
                *place = Place::Layer(descriptor.digest.clone());
                Ok(descriptor.digest)
            }
        }
    }
}

/// The directories of layers, none of which can move while this lives.
#[derive(Debug)]
pub(crate) struct Held<'l> {
    /// Top first, at least one.
    pub lowers: Vec<Lower>,
    /// What layers these are.
    pub stack: Stack,
    _guards: Vec<RwLockReadGuard<'l, Place>>,
}

/// Finds and holds the directories of `layers` (bottom first).
pub(crate) fn hold<'l>(
    store: &Store,
    mounts: &Mounts,
    lease: &Lease,
    layers: &'l [Layer],
) -> Result<Held<'l>> {
    let what = || "find a stage's layers".to_owned();
    if store.storage() == Storage::Copy {
        // Layers have no files of their own there: the whole is one tree, made of their blobs.
        let mut diff_ids = Vec::new();
        for layer in layers {
            diff_ids.push(match layer {
                Layer::Image(diff_id) => diff_id.clone(),
                Layer::Snap(snap) => snap.adopt(store, lease)?,
            });
        }
        let tree = store.ensure_tree(lease, &diff_ids).doing(what)?;
        return Ok(Held { lowers: vec![Lower::directory(tree)], stack: stack(layers), _guards: Vec::new() });
    }
    let mut guards = Vec::new();
    let mut lowers: Vec<Lower> = Vec::new();
    for layer in layers.iter().rev() {
        let dir = match layer {
            Layer::Image(diff_id) => image_layer(store, mounts, lease, diff_id).doing(what)?,
            Layer::Snap(snap) => {
                let guard = snap.place.read().unwrap_or_else(PoisonError::into_inner);
                let dir = match &*guard {
                    Place::Own(path) => Lower::directory(path.clone()),
                    Place::Layer(diff_id) => image_layer(store, mounts, lease, diff_id).doing(what)?,
                };
                guards.push(guard);
                dir
            }
        };
        // The same layer further down shows nothing new.
        if !lowers.iter().any(|known| known.shown() == dir.shown()) {
            lowers.push(dir);
        }
    }
    if lowers.is_empty() {
        for files in store.known_layer_files(&[]).doing(what)?.unwrap_or_default() {
            lowers.push(files.open().doing(what)?);
        }
    }
    Ok(Held { lowers, stack: stack(layers), _guards: guards })
}

fn stack(layers: &[Layer]) -> Stack {
    let mut hasher = Sha256::new();
    for layer in layers {
        hasher.update(match layer {
            Layer::Image(diff_id) => format!("image {diff_id}\n"),
            Layer::Snap(snap) => format!("step {}\n", snap.id),
        });
    }
    hasher.finalize().into()
}

/// Layers that are mounts, by the file mounted: steps share them.
#[derive(Debug, Default)]
pub(crate) struct Mounts {
    known: Mutex<HashMap<PathBuf, Lower>>,
}

impl Mounts {
    /// Gives up what no step uses, so that a removed layer's bytes are given back.
    pub fn forget(&self) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, lower| lower.is_shared());
    }
}

fn image_layer(
    store: &Store,
    mounts: &Mounts,
    lease: &Lease,
    diff_id: &Digest,
) -> brigantine_image::Result<Lower> {
    lease.hold(diff_id)?;
    let files = store.known_layer_files(std::slice::from_ref(diff_id))?;
    let files = files
        .and_then(|files| files.into_iter().next())
        .ok_or_else(|| brigantine_image::Error::NoSuchContent(diff_id.clone()))?;
    if let LayerFiles::Directory(_) = files {
        return files.open();
    }
    let mut known = mounts.known.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(lower) = known.get(files.shown()) {
        return Ok(lower.clone());
    }
    let lower = files.open()?;
    known.insert(files.shown().to_owned(), lower.clone());
    Ok(lower)
}

/// A new directory for a step: `diff` and `work`. Removed when dropped, unless kept.
#[derive(Debug)]
pub(crate) struct Fresh {
    dir: PathBuf,
    kept: bool,
}

impl Fresh {
    pub fn make(parent: &Path, id: &str) -> Result<Self> {
        let dir = parent.join(id);
        let fresh = Self { dir: dir.clone(), kept: false };
        for (sub, mode) in [("", 0o700), ("diff", 0o755), ("work", 0o700)] {
            let path = dir.join(sub);
            fs::DirBuilder::new().mode(mode).create(&path).doing(|| format!("create {}", path.display()))?;
        }
        Ok(fresh)
    }

    pub fn diff(&self) -> PathBuf {
        self.dir.join("diff")
    }

    /// The directory of both.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn work(&self) -> PathBuf {
        self.dir.join("work")
    }

    /// Keeps it; the work directory is not needed any more.
    pub fn keep(mut self) -> PathBuf {
        self.kept = true;
        remove_tree(&self.dir.join("work"));
        self.dir.join("diff")
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if !self.kept {
            remove_tree(&self.dir);
        }
    }
}

/// Removes what a step left; what cannot be removed goes with the next sweep.
pub(crate) fn remove_tree(path: &Path) {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "remove a build's files");
        }
        _ => {}
    }
}

/// Bytes on disk at and below a path.
pub(crate) fn disk_usage(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let mut total = 0;
    let mut stack = vec![path.to_owned()];
    while let Some(dir) = stack.pop() {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            total += metadata.blocks() * 512;
            if metadata.is_dir() {
                stack.push(entry.path());
            }
        }
    }
    total
}
