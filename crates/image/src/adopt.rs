//! Layers made here by a builder: an overlay's upper directory becomes a blob and, where layers are directories,
//! itself the extracted layer.
//!
//! Invariant: the directory is moved, not copied, and only when its archive is in the store; nobody may write to it
//! any more.

use std::io;
use std::path::Path;

use crate::archive::make_manifest;
use crate::digest::Digest;
use crate::error::{Error, IoContext as _, Result, json};
use crate::layer;
use crate::layers::LayerInfo;
use crate::lease::Lease;
use crate::media;
use crate::model::{Descriptor, ImageConfig};
use crate::reference::Reference;
use crate::replica::Replica;
use crate::snapshot::LayerFiles;
use crate::store::{Image, NewImage, Store};

impl Store {
    /// Makes a layer of an upper directory, which is moved into the store. `None`, and nothing moved, when there is
    /// nothing in it.
    pub fn adopt_upper(&self, lease: &Lease, upper: &Path) -> Result<Option<(Descriptor, LayerInfo)>> {
        let Some((descriptor, packed)) = self.pack_layer(lease, upper)? else { return Ok(None) };
        let info = self.layers().adopt(&descriptor.digest, upper, packed, self.content())?;
        Ok(Some((descriptor, info)))
    }

    /// Makes a layer of what has changed in a plain copy. `None` when nothing has.
    pub fn adopt_replica(
        &self,
        lease: &Lease,
        replica: &Replica,
        without: &[Vec<u8>],
    ) -> Result<Option<(Descriptor, LayerInfo)>> {
        let mut ingest = self.content().ingest_unnamed(lease)?;
        let packed = replica.pack(without, io::BufWriter::with_capacity(1 << 18, &mut ingest))?;
        if packed.entries == 0 {
            return Ok(None);
        }
        let size = ingest.offset();
        let digest = ingest.commit()?;
        let info = self.layers().make_of_blob(&digest, &digest, self.content())?;
        Ok(Some((Descriptor::new(media::OCI_LAYER, digest, size), info)))
    }

    /// The blob of a layer that is there as a directory only: made again if it is gone.
    pub fn ensure_blob(&self, lease: &Lease, diff_id: &Digest) -> Result<Descriptor> {
        lease.hold(diff_id)?;
        if self.content().has(diff_id) {
            let size = self.content().size(diff_id)?;
            return Ok(Descriptor::new(media::OCI_LAYER, diff_id.clone(), size));
        }
        match self.layers().files(diff_id)? {
            LayerFiles::Directory(tree) => match self.pack_layer(lease, &tree)? {
                Some((descriptor, _)) if descriptor.digest == *diff_id => Ok(descriptor),
                _ => Err(Error::NoSuchContent(diff_id.clone())),
            },
            LayerFiles::Erofs { archive, .. } => {
                if let Some(size) = self.content().link(lease, diff_id, &archive)? {
                    return Ok(Descriptor::new(media::OCI_LAYER, diff_id.clone(), size));
                }
                let mut file = std::fs::File::open(&archive).at("open", &archive)?;
                let mut ingest = self.content().ingest(lease, diff_id, None)?;
                io::copy(&mut file, &mut ingest).at("read", &archive)?;
                let size = ingest.offset();
                Ok(Descriptor::new(media::OCI_LAYER, ingest.commit()?, size))
            }
        }
    }

    /// Makes an image of a configuration and the blobs of its layers, all in the store already.
    pub fn add_built(
        &self,
        lease: &Lease,
        config: &ImageConfig,
        layers: &[Descriptor],
        names: Vec<Reference>,
    ) -> Result<Image> {
        let raw = serde_json::to_vec(config)
            .map_err(|source| Error::Json { what: "an image's configuration".to_owned(), source })?;
        // What is written must be read again as the same.
        let _: ImageConfig = json(&raw, || "an image's configuration".to_owned())?;
        let digest = self.content().put(lease, &raw)?;
        let (manifest_raw, manifest) = make_manifest(&digest, raw.len() as u64, layers)?;
        self.content().put_as(lease, &manifest.digest, &manifest_raw)?;
        self.add_image(lease, NewImage { manifest, names, parent: None })
    }

    fn pack_layer(&self, lease: &Lease, upper: &Path) -> Result<Option<(Descriptor, layer::Packed)>> {
        let mut ingest = self.content().ingest_unnamed(lease)?;
        let packed = layer::pack_upper(upper, io::BufWriter::with_capacity(1 << 18, &mut ingest))
            .map_err(|source| Error::Layer { layer: "of the build".to_owned(), source })?;
        if packed.entries == 0 {
            return Ok(None);
        }
        let size = ingest.offset();
        let digest = ingest.commit()?;
        Ok(Some((Descriptor::new(media::OCI_LAYER, digest, size), packed)))
    }
}
