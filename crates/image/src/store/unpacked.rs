//! The files of an image's layers: made where they are missing, found where they are there.

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Image, Store};
use crate::compress;
use crate::digest::{Algorithm, Digest, Hashing};
use crate::error::{Error, IoContext as _, Result};
use crate::layer;
use crate::layers::LayerInfo;
use crate::lease::Lease;
use crate::model::{Descriptor, chain_ids};
use crate::snapshot::{LayerFiles, Storage};

impl Store {
    /// Extracts a layer, unless it is there, from its archive (compressed or not), checked against `diff_id`.
    pub fn unpack(&self, lease: &Lease, diff_id: &Digest, archive: impl Read) -> Result<LayerInfo> {
        lease.hold(diff_id)?;
        self.inner.layers.make(diff_id, || Ok(archive))
    }

    /// The same of an archive that is still arriving. Tells whether it was read: where the layer was there, it was not.
    pub fn unpack_arriving(&self, lease: &Lease, diff_id: &Digest, archive: impl Read) -> Result<bool> {
        lease.hold(diff_id)?;
        let mut read = false;
        self.inner.layers.make(diff_id, || {
            read = true;
            Ok(archive)
        })?;
        Ok(read)
    }

    /// The same of a blob of the store: where that is the uncompressed archive itself, its bytes are not kept twice.
    /// A layer that is there says nothing about a blob that claims to be its archive: that is checked.
    pub fn unpack_blob(&self, lease: &Lease, diff_id: &Digest, blob: &Digest) -> Result<LayerInfo> {
        lease.hold(diff_id)?;
        let (info, read) = self.inner.layers.make_of_blob(diff_id, blob, &self.inner.content)?;
        if read {
            self.saw_layer_as(diff_id, blob);
        } else {
            self.check_layer_as(diff_id, blob)?;
        }
        Ok(info)
    }

    /// Notes that the layer was made of the blob.
    pub fn saw_layer_as(&self, diff_id: &Digest, blob: &Digest) {
        self.seen().insert((diff_id.clone(), blob.clone()));
    }

    fn seen(&self) -> MutexGuard<'_, HashSet<(Digest, Digest)>> {
        self.inner.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails unless the blob is the layer's archive, compressed or not. It is read only if that was never seen.
    pub fn check_layer_as(&self, diff_id: &Digest, blob: &Digest) -> Result<()> {
        if blob == diff_id || self.has_layer_as(diff_id, blob)? {
            return Ok(());
        }
        let actual = self.diff_id_of(blob, diff_id.algorithm())?;
        if actual != *diff_id {
            let source = layer::LayerError::DiffId { actual };
            return Err(Error::Layer { layer: diff_id.to_string(), source });
        }
        self.saw_layer_as(diff_id, blob);
        Ok(())
    }

    /// The digest of a layer's uncompressed archive.
    pub(crate) fn diff_id_of(&self, blob: &Digest, algorithm: Algorithm) -> Result<Digest> {
        let mut decoded = compress::decode(self.inner.content.open(blob)?).map_err(Error::ArchiveRead)?;
        let mut hashing = Hashing::new(std::io::sink(), algorithm);
        std::io::copy(&mut decoded, &mut hashing).map_err(Error::ArchiveRead)?;
        Ok(hashing.finish().1)
    }

    /// Extracts whatever layers of the image are missing, several at a time.
    pub fn ensure_unpacked(&self, image: &Image) -> Result<()> {
        let lease = self.lease()?;
        self.unpack_layers(&lease, &image.config.rootfs.diff_ids, &image.layers)?;
        if self.storage() == Storage::Copy {
            self.ensure_tree(&lease, &image.config.rootfs.diff_ids)?;
        }
        Ok(())
    }

    /// The files of these layers over each other, as one tree: made of their blobs unless it is there.
    pub fn ensure_tree(&self, lease: &Lease, diff_ids: &[Digest]) -> Result<PathBuf> {
        let chain = chain_ids(diff_ids);
        let Some(chain_id) = chain.last() else { return self.inner.layers.empty_tree() };
        lease.hold(chain_id)?;
        let layer_error = |layer: &Digest, source| Error::Layer { layer: layer.to_string(), source };
        self.inner.trees.make_tree(chain_id, |tree| {
            for diff_id in diff_ids {
                let blob = self.blob_of(diff_id)?;
                let applied = layer::apply_over(self.inner.content.open(&blob)?, tree, diff_id.algorithm())
                    .map_err(|source| layer_error(diff_id, source))?;
                if applied.diff_id != *diff_id {
                    return Err(layer_error(diff_id, layer::LayerError::DiffId { actual: applied.diff_id }));
                }
            }
            Ok(())
        })?;
        Ok(self.inner.trees.tree(chain_id))
    }

    /// The blob of a layer, compressed or not, of whatever image has it.
    fn blob_of(&self, diff_id: &Digest) -> Result<Digest> {
        if self.inner.content.has(diff_id) {
            return Ok(diff_id.clone());
        }
        for entry in &self.inner.names.load()?.entries {
            let Ok(documents) = self.describe_entry(entry) else { continue };
            let position = documents.config.rootfs.diff_ids.iter().position(|known| known == diff_id);
            if let Some(blob) = position.and_then(|position| documents.layers.get(position))
                && self.inner.content.has(&blob.digest)
            {
                return Ok(blob.digest.clone());
            }
        }
        Err(Error::NoSuchContent(diff_id.clone()))
    }

    /// Whether the blob was seen to be this layer: here, or when an image came that has it.
    fn has_layer_as(&self, diff_id: &Digest, blob: &Digest) -> Result<bool> {
        if self.seen().contains(&(diff_id.clone(), blob.clone())) {
            return Ok(true);
        }
        for entry in &self.inner.names.load()?.entries {
            let Ok(documents) = self.describe_entry(entry) else { continue };
            let mut pairs = documents.config.rootfs.diff_ids.iter().zip(&documents.layers);
            if pairs.any(|(known, layer)| known == diff_id && layer.digest == *blob) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(crate) fn unpack_layers(
        &self,
        lease: &Lease,
        diff_ids: &[Digest],
        layers: &[Descriptor],
    ) -> Result<()> {
        let mut missing = Vec::new();
        for (diff_id, layer) in diff_ids.iter().zip(layers) {
            lease.hold(diff_id)?;
            if self.inner.layers.get(diff_id)?.is_none() && !missing.contains(&(diff_id, layer)) {
                missing.push((diff_id, layer));
            }
        }
        let threads = std::thread::available_parallelism().map_or(2, usize::from).min(missing.len());
        let queue = Mutex::new(missing.into_iter());
        let work = || -> Result<()> {
            loop {
                let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((diff_id, layer)) = next else { return Ok(()) };
                self.inner.layers.make_of_blob(diff_id, &layer.digest, &self.inner.content)?;
            }
        };
        if threads <= 1 {
            return work();
        }
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let mut result = Ok(());
            for worker in workers {
                match worker.join() {
                    Ok(done) => result = result.and(done),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            result
        })
    }

    /// The files of the image's layers, top first, fit for an overlay: none twice, at least one.
    /// Call [`Self::ensure_unpacked`] before.
    pub fn layer_files(&self, image: &Image) -> Result<Vec<LayerFiles>> {
        self.files(&image.config.rootfs.diff_ids)
    }

    /// The same for layers of an image that is gone; `None` unless each of them is there.
    pub fn known_layer_files(&self, diff_ids: &[Digest]) -> Result<Option<Vec<LayerFiles>>> {
        if self.storage() == Storage::Copy {
            let there = match chain_ids(diff_ids).last() {
                Some(chain_id) => self.inner.trees.get(chain_id)?.is_some(),
                None => true,
            };
            return if there { self.files(diff_ids).map(Some) } else { Ok(None) };
        }
        for diff_id in diff_ids {
            if self.inner.layers.get(diff_id)?.is_none() {
                return Ok(None);
            }
        }
        self.files(diff_ids).map(Some)
    }

    fn files(&self, diff_ids: &[Digest]) -> Result<Vec<LayerFiles>> {
        if self.storage() == Storage::Copy
            && let Some(chain_id) = chain_ids(diff_ids).last()
        {
            return Ok(vec![LayerFiles::Directory(self.inner.trees.tree(chain_id))]);
        }
        let mut seen = HashSet::new();
        // A layer that comes again further down shows nothing that its upper copy does not.
        let mut files = diff_ids
            .iter()
            .rev()
            .filter(|diff_id| seen.insert(*diff_id))
            .map(|diff_id| self.inner.layers.files(diff_id))
            .collect::<Result<Vec<_>>>()?;
        if files.is_empty() {
            files.push(LayerFiles::Directory(self.inner.layers.empty_tree()?));
        }
        Ok(files)
    }

    /// The form that new layers take.
    pub fn storage(&self) -> Storage {
        self.inner.layers.storage()
    }

    /// A layer's uncompressed archive, where the layer is kept as one.
    pub(crate) fn layer_archive(&self, diff_id: &Digest) -> Result<Option<fs::File>> {
        match self.inner.layers.files(diff_id)? {
            LayerFiles::Erofs { archive, .. } => Ok(Some(fs::File::open(&archive).at("open", archive)?)),
            LayerFiles::Directory(_) => Ok(None),
        }
    }

    /// What is known of an extracted layer.
    pub fn layer(&self, diff_id: &Digest) -> Result<Option<LayerInfo>> {
        self.inner.layers.get(diff_id)
    }

    /// Syncs extracted layers to disk, so that a power cut does not cost extracting them again.
    pub fn settle(&self) -> Result<()> {
        self.inner.layers.settle()?;
        self.inner.trees.settle()
    }
}
