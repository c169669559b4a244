//! Indexes that were made here: one name for the images of several platforms, and for what attests to them.
//!
//! Invariant: an index in the store is whole: every manifest it names is there, with everything these name.

use std::collections::BTreeSet;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::lease::Lease;
use crate::media;
use crate::model::{Descriptor, Document, Index, Manifest};
use crate::store::Store;

/// A manifest that an index names.
#[derive(Clone, Debug)]
pub struct Indexed {
    /// As the index has it: with platform and annotations.
    pub descriptor: Descriptor,
    pub raw: Vec<u8>,
    pub manifest: Manifest,
}

impl Store {
    /// Writes an index of manifests that are in the store.
    pub fn put_index(&self, lease: &Lease, index: &Index) -> Result<Descriptor> {
        let raw = serde_json::to_vec(index)
            .map_err(|source| Error::Json { what: "an index".to_owned(), source })?;
        let digest = self.content().put(lease, &raw)?;
        let media_type = index.media_type.as_deref().unwrap_or(media::OCI_INDEX);
        Ok(Descriptor::new(media_type, digest, raw.len() as u64))
    }

    /// The index itself.
    pub fn index(&self, descriptor: &Descriptor) -> Result<Index> {
        let what = || format!("index {}", descriptor.digest);
        let raw = self.content().read(&descriptor.digest)?;
        match Document::parse(&raw).map_err(|source| Error::Document { what: what(), source })? {
            Document::Index(index) => Ok(*index),
            Document::Manifest(_) => Err(Error::Invalid(format!("{} is a manifest", what()))),
        }
    }

    /// The manifests that an index names, in its order.
    pub fn indexed(&self, descriptor: &Descriptor) -> Result<Vec<Indexed>> {
        let mut all = Vec::new();
        for descriptor in self.index(descriptor)?.manifests {
            let what = || format!("manifest {}", descriptor.digest);
            let raw = self.content().read(&descriptor.digest)?;
            let document =
                Document::parse(&raw).map_err(|source| Error::Document { what: what(), source })?;
            let Document::Manifest(manifest) = document else {
                return Err(Error::Invalid(format!("{} is an index within an index", what())));
            };
            all.push(Indexed { descriptor, raw, manifest: *manifest });
        }
        Ok(all)
    }

    /// Everything that an index leads to, itself included.
    pub(crate) fn index_content(&self, descriptor: &Descriptor) -> Result<BTreeSet<Digest>> {
        let mut all = BTreeSet::from([descriptor.digest.clone()]);
        for indexed in self.indexed(descriptor)? {
            all.insert(indexed.descriptor.digest);
            all.insert(indexed.manifest.config.digest);
            all.extend(indexed.manifest.layers.into_iter().map(|layer| layer.digest));
        }
        Ok(all)
    }
}
