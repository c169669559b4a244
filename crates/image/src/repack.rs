//! The same image with its layers compressed: what was made here is stored plain until it is pushed.
//!
//! Invariant: the image keeps its id and its layers their diff ids; its names move to the new manifest in one step,
//! when all of it is in the store, and only then the plain blobs may go.

use std::collections::HashSet;
use std::io::{self, Read as _, Write as _};

use crate::content::Ingest;
use crate::digest::Digest;
use crate::encode::{Encoder, Encoding};
use crate::error::{Error, IoContext as _, Result, json};
use crate::lease::Lease;
use crate::media;
use crate::model::Descriptor;
use crate::store::{Image, Store};

/// Bytes between two reports.
const REPORT_STEP: u64 = 4 << 20;

/// A manifest that differs from an image's in how its layers are compressed.
#[derive(Clone, Debug)]
pub struct Repacked {
    pub manifest: Descriptor,
    pub raw: Vec<u8>,
}

impl Store {
    /// The layer compressed, in the store; the layer itself where it is compressed already or never sent.
    /// `progress` is told the bytes read.
    pub fn compress_layer(
        &self,
        lease: &Lease,
        layer: &Descriptor,
        encoding: Encoding,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Descriptor> {
        let Some(media_type) = media::compressed(&layer.media_type, encoding) else {
            return Ok(layer.clone());
        };
        let source = self.content().path(&layer.digest);
        let mut blob = self.content().open(&layer.digest)?;
        let ingest = self.content().ingest_unnamed(lease)?;
        let mut encoder =
            Encoder::new(encoding, io::BufWriter::with_capacity(1 << 18, ingest)).map_err(Error::Output)?;
        let mut buffer = vec![0; 1 << 18];
        let (mut read, mut reported) = (0, 0);
        loop {
            let n = match blob.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).at("read", source),
            };
            encoder.write_all(&buffer[..n]).map_err(Error::Output)?;
            read += n as u64;
            if read >= reported + REPORT_STEP {
                reported = read;
                progress(read);
            }
        }
        let output = encoder.finish().map_err(Error::Output)?;
        let ingest: Ingest = output.into_inner().map_err(|error| Error::Output(error.into_error()))?;
        let size = ingest.offset();
        let digest = ingest.commit()?;
        Ok(Descriptor { media_type: media_type.to_owned(), digest, size, ..layer.clone() })
    }

    /// The image's manifest with other `layers`, as many as it has; `None` if they are the same. It is not in the store
    /// yet.
    pub fn repacked(&self, image: &Image, layers: &[Descriptor]) -> Result<Option<Repacked>> {
        if image.layers == layers {
            return Ok(None);
        }
        let what = || format!("manifest {}", image.manifest.digest);
        let mut document: serde_json::Value = json(&self.content().read(&image.manifest.digest)?, what)?;
        let listed = document.get_mut("layers").and_then(serde_json::Value::as_array_mut);
        let listed = listed.filter(|listed| listed.len() == layers.len()).ok_or_else(|| {
            Error::Invalid(format!("{} does not list the {} layers of its image", what(), layers.len()))
        })?;
        for (entry, layer) in listed.iter_mut().zip(layers) {
            entry["mediaType"] = layer.media_type.clone().into();
            entry["digest"] = layer.digest.to_string().into();
            entry["size"] = layer.size.into();
        }
        let raw = serde_json::to_vec(&document).map_err(|source| Error::Json { what: what(), source })?;
        let manifest = Descriptor {
            digest: Digest::of(image.manifest.digest.algorithm(), &raw),
            size: raw.len() as u64,
            ..image.manifest.clone()
        };
        Ok(Some(Repacked { manifest, raw }))
    }

    /// Gives the image's names to a manifest of [`Self::repacked`], and takes away the blobs that nothing needs any
    /// more. Names by digest stay what they are.
    pub fn adopt_repacked(&self, lease: &Lease, image: &Image, repacked: &Repacked) -> Result<()> {
        self.content().put_as(lease, &repacked.manifest.digest, &repacked.raw)?;
        self.names().update(|names| {
            for entry in &mut names.entries {
                let by_digest = entry.name.as_ref().is_some_and(|name| name.digest().is_some());
                if entry.image == image.id && entry.manifest.digest == image.manifest.digest && !by_digest {
                    entry.manifest = repacked.manifest.clone();
                }
            }
            Ok(())
        })?;
        let mut old: HashSet<Digest> = image.layers.iter().map(|layer| layer.digest.clone()).collect();
        old.insert(image.manifest.digest.clone());
        self.abandon(&old).map(drop)
    }
}
