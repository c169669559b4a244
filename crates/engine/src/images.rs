//! Images as the engine uses them: the image crate's store, off the asynchronous threads.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use brigantine_image::{Digest, ErrorClass, Image, LayerFiles, Lower, Reference, Storage, Store};

use crate::error::Context;
use crate::project::ImageGrant;
use crate::sync::lock;
use crate::{Class, Error, Result};

/// Images whose layers are remembered.
const REMEMBERED: usize = 256;

/// Nobody waits for layers to be synced: by then the kernel has written much of them by itself.
const SETTLE_AFTER: Duration = Duration::from_secs(10);

/// The images service.
#[derive(Debug)]
pub struct Images {
    store: Store,
    /// Layers in use by image id, top first: what an id means never changes.
    layers: Mutex<HashMap<String, Arc<[Lower]>>>,
    /// Those of them that are mounts, by the file mounted: images share them, and so files of a layer that several
    /// containers read are in memory once.
    mounts: Mutex<HashMap<std::path::PathBuf, Lower>>,
    /// Whether layers are about to be synced.
    settling: AtomicBool,
}

impl Images {
    pub(crate) fn open(root: &Path, storage: Option<Storage>) -> Result<Self> {
        let store =
            Store::open_with(root, storage).doing(|| format!("open the image store {}", root.display()))?;
        Ok(Self {
            store,
            layers: Mutex::default(),
            mounts: Mutex::default(),
            settling: AtomicBool::new(false),
        })
    }

    /// The store itself, for blocking use.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Has the layers that were made a moment ago synced after a while, so that a power cut later on does not cost making
    /// them again.
    pub fn settle_soon(self: &Arc<Self>) {
        if self.settling.swap(true, Ordering::Relaxed) {
            return;
        }
        let images = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(SETTLE_AFTER).await;
            images.settling.store(false, Ordering::Relaxed);
            if let Err(error) = images.with(Store::settle).await {
                tracing::warn!(error = error.report(), "sync layers");
            }
        });
    }

    /// Does something with the store on a thread that may block.
    pub async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> brigantine_image::Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = self.store.clone();
        crate::blocking(move || work(&store).map_err(Error::from)).await
    }

    /// The image of this name or id; docker's 404 names an image without a tag as `x:latest`.
    pub async fn resolve(&self, name: &str) -> Result<Image> {
        let name = name.to_owned();
        self.with(move |store| store.resolve(&name)).await
    }

    /// The same among images that a project may use; of the others nothing is told.
    pub async fn resolve_within(&self, name: &str, grant: &ImageGrant) -> Result<Image> {
        let unknown = || {
            let shown = name.parse::<Reference>().map(|name| name.or_latest().familiar());
            Error::not_found(format!("No such image: {}", shown.as_deref().unwrap_or(name)))
        };
        match self.resolve(name).await {
            Ok(image) if grant.admit(&image) => Ok(image),
            Err(error) if error.class() == Class::Internal => Err(error),
            Ok(_) | Err(_) => Err(unknown()),
        }
    }

    /// An image's layers, top first, unpacked if they were not; of an image removed by force those with these diff
    /// ids. Blocks.
    pub(crate) fn layers(&self, id: &str, diff_ids: &[String]) -> Result<Arc<[Lower]>> {
        if let Some(known) = lock(&self.layers).get(id) {
            return Ok(Arc::clone(known));
        }
        let digest: Digest = id.parse().doing(|| format!("read the image id {id}"))?;
        let files = match self.store.image(&digest) {
            Ok(image) => {
                self.store.ensure_unpacked(&image)?;
                self.store.layer_files(&image)?
            }
            Err(error) => {
                let known: Option<Vec<Digest>> = diff_ids.iter().map(|layer| layer.parse().ok()).collect();
                match known.map(|layers| self.store.known_layer_files(&layers)).transpose()?.flatten() {
                    Some(files) if !diff_ids.is_empty() => files,
                    _ => return Err(error.into()),
                }
            }
        };
        let opened: Arc<[Lower]> = files.iter().map(|files| self.mounted(files)).collect::<Result<_>>()?;
        if lock(&self.layers).len() >= REMEMBERED {
            self.forget();
        }
        lock(&self.layers).insert(id.to_owned(), Arc::clone(&opened));
        Ok(opened)
    }

    /// Whether containers get copies of their images' files.
    pub(crate) fn copies(&self) -> bool {
        self.store.storage() == Storage::Copy
    }

    fn mounted(&self, files: &LayerFiles) -> Result<Lower> {
        if let LayerFiles::Directory(_) = files {
            return Ok(files.open()?);
        }
        let mut mounts = lock(&self.mounts);
        if let Some(known) = mounts.get(files.shown()) {
            return Ok(known.clone());
        }
        let opened = files.open()?;
        mounts.insert(files.shown().to_owned(), opened.clone());
        Ok(opened)
    }

    /// The same if they are remembered.
    pub(crate) fn known_layers(&self, id: &str) -> Option<Arc<[Lower]>> {
        lock(&self.layers).get(id).cloned()
    }

    /// Forgets what was remembered of images, after some have been removed.
    pub fn forget(&self) {
        lock(&self.layers).clear();
        // A layer's bytes are given back when nobody has it mounted any more.
        lock(&self.mounts).retain(|_, lower| lower.is_shared());
    }
}

impl From<brigantine_image::Error> for Error {
    fn from(error: brigantine_image::Error) -> Self {
        let class = match error.class() {
            ErrorClass::NotFound => Class::NotFound,
            ErrorClass::InvalidParameter => Class::InvalidParameter,
            ErrorClass::Conflict => Class::Conflict,
            ErrorClass::Internal => Class::Internal,
        };
        let message = error.to_string();
        match std::error::Error::source(&error) {
            None => Self::of(class, message),
            Some(_) => Self::of(class, error.chain()),
        }
    }
}
