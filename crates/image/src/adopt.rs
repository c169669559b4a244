//! Layers made here by a builder: an overlay's upper directory becomes a blob and, where layers are directories,
//! itself the extracted layer.
//!
//! Invariant: the directory is moved, not copied, and only when its archive is in the store; nobody may write to it
//! any more. What was made of one that could not become a layer is gone when the caller hears of it.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, Write};
use std::path::Path;

use crate::archive::undone;
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, IoContext as _, Result, json};
use crate::layer;
use crate::layers::{LayerInfo, Unindexed};
use crate::lease::Lease;
use crate::media;
use crate::model::{Descriptor, ImageConfig, Manifest};
use crate::replica::Replica;
use crate::snapshot::{LayerFiles, Storage};
use crate::store::Store;
use crate::tar::{Entry, Reader, Time, Writer};
use crate::temp::TempDir;

impl Store {
    /// Makes a layer of an upper directory, which is moved into the store. `None`, and nothing moved, when there is
    /// nothing in it.
    pub fn adopt_upper(&self, lease: &Lease, upper: &Path) -> Result<Option<(Descriptor, LayerInfo)>> {
        undone(self, |own, fresh| {
            let Some((descriptor, packed)) = self.pack_layer(own, fresh, upper)? else { return Ok(None) };
            let info = self.layers().adopt(&descriptor.digest, upper, packed, self.content())?;
            lease.hold(&descriptor.digest)?;
            Ok(Some((descriptor, info)))
        })
    }

    /// Makes a layer of what has changed in a plain copy. `None` when nothing has.
    pub fn adopt_replica(
        &self,
        lease: &Lease,
        replica: &Replica,
        without: &[Vec<u8>],
    ) -> Result<Option<(Descriptor, LayerInfo)>> {
        undone(self, |own, fresh| {
            let packed = self.packed(own, fresh, |output| replica.pack(without, output))?;
            let Some((descriptor, _)) = packed else { return Ok(None) };
            let digest = &descriptor.digest;
            let (info, _) = self.layers().make_of_blob(digest, digest, self.content())?;
            lease.hold(digest)?;
            Ok(Some((descriptor, info)))
        })
    }

    /// The blob of a layer that is there as a directory only: made again if it is gone.
    pub fn ensure_blob(&self, lease: &Lease, diff_id: &Digest) -> Result<Descriptor> {
        lease.hold(diff_id)?;
        if self.content().has(diff_id) {
            let size = self.content().size(diff_id)?;
            return Ok(Descriptor::new(media::OCI_LAYER, diff_id.clone(), size));
        }
        match self.layers().files(diff_id)? {
            LayerFiles::Directory(tree) => {
                undone(self, |own, fresh| match self.pack_layer(own, fresh, &tree)? {
                    Some((descriptor, _)) if descriptor.digest == *diff_id => Ok(descriptor),
                    _ => Err(Error::NoSuchContent(diff_id.clone())),
                })
            }
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

    /// A layer in which no file is younger than `seconds` after 1970; the layer itself when none is.
    /// It must be stored plain.
    pub fn clamp_layer(&self, lease: &Lease, layer: &Descriptor, seconds: i64) -> Result<Descriptor> {
        let failed = |source| Error::Layer { layer: layer.digest.to_string(), source };
        let latest = Time { seconds, nanos: 0 };
        let input = io::BufReader::with_capacity(1 << 18, self.content().open(&layer.digest)?);
        let mut reader = Reader::new(input);
        let mut ingest = self.content().ingest_unnamed(lease)?;
        let mut writer = Writer::new(io::BufWriter::with_capacity(1 << 18, &mut ingest));
        let mut entry = Entry::default();
        while reader.next(&mut entry).map_err(|error| failed(error.into()))? {
            entry.mtime = entry.mtime.min(latest);
            writer.append(&entry, &mut reader).map_err(Error::Output)?;
        }
        writer.finish().map_err(Error::Output)?;
        let size = ingest.offset();
        let digest = ingest.commit()?;
        lease.hold(&digest)?;
        self.layers().make_of_blob(&digest, &digest, self.content())?;
        Ok(Descriptor::new(media::OCI_LAYER, digest, size))
    }

    /// Writes an image's configuration and manifest; its layers are in the store already.
    pub fn put_manifest(
        &self,
        lease: &Lease,
        config: &ImageConfig,
        layers: &[Descriptor],
        annotations: &BTreeMap<String, String>,
    ) -> Result<Descriptor> {
        let raw = serde_json::to_vec(config)
            .map_err(|source| Error::Json { what: "an image's configuration".to_owned(), source })?;
        // What is written must be read again as the same.
        let _: ImageConfig = json(&raw, || "an image's configuration".to_owned())?;
        let id = self.content().put(lease, &raw)?;
        self.put_any_manifest(
            lease,
            &Manifest {
                schema_version: 2,
                media_type: Some(media::OCI_MANIFEST.to_owned()),
                artifact_type: None,
                config: Descriptor::new(media::OCI_CONFIG, id, raw.len() as u64),
                layers: layers.to_vec(),
                subject: None,
                annotations: annotations.clone(),
            },
        )
    }

    /// Writes a manifest of whatever.
    pub fn put_any_manifest(&self, lease: &Lease, manifest: &Manifest) -> Result<Descriptor> {
        let raw = serde_json::to_vec(manifest)
            .map_err(|source| Error::Json { what: "a manifest".to_owned(), source })?;
        let digest = self.content().put(lease, &raw)?;
        Ok(Descriptor::new(media::OCI_MANIFEST, digest, raw.len() as u64))
    }

    /// The blob of an upper directory.
    fn pack_layer(
        &self,
        lease: &Lease,
        fresh: &mut HashSet<Digest>,
        upper: &Path,
    ) -> Result<Option<(Descriptor, layer::Packed)>> {
        let failed = |source| Error::Layer { layer: "of the build".to_owned(), source };
        self.packed(lease, fresh, |output| layer::pack_upper(upper, output).map_err(failed))
    }

    /// The blob of the archive that `pack` writes; `None` when nothing is in it. Where layers are kept as their archives,
    /// it is the layer as well: written, hashed and indexed in one go. It is in `fresh` before it has its name, unless it
    /// is a layer already.
    pub(crate) fn packed(
        &self,
        lease: &Lease,
        fresh: &mut HashSet<Digest>,
        pack: impl FnOnce(&mut (dyn Write + Send)) -> Result<layer::Packed> + Send,
    ) -> Result<Option<(Descriptor, layer::Packed)>> {
        if self.storage() != Storage::Erofs {
            let mut ingest = self.content().ingest_unnamed(lease)?;
            let packed = pack(&mut io::BufWriter::with_capacity(1 << 18, &mut ingest))?;
            if packed.entries == 0 {
                return Ok(None);
            }
            let size = ingest.offset();
            let digest = ingest.commit()?;
            self.note_fresh(&digest, fresh)?;
            return Ok(Some((Descriptor::new(media::OCI_LAYER, digest, size), packed)));
        }
        let dir = TempDir::create(self.content().tmp(), "packed")?;
        let path = dir.path().join("archive");
        let (mut writer, reader) = layer::written();
        let (packed, kept) = std::thread::scope(|scope| {
            let packer = scope.spawn(move || {
                let packed = pack(&mut writer)?;
                writer.flush().map_err(Error::Output)?;
                Ok(packed)
            });
            let kept = self.layers().keep(reader, Algorithm::Sha256, &path);
            match packer.join() {
                Ok(packed) => (packed, kept),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        });
        // A disk that is full ends both: what could not be written is told by who wrote.
        let (packed, kept) = match (packed, kept) {
            (_, Err(error)) | (Err(error), Ok(_)) => return Err(error),
            (Ok(packed), Ok(kept)) => (packed, kept),
        };
        if packed.entries == 0 {
            return Ok(None);
        }
        let digest = kept.digest;
        self.note_fresh(&digest, fresh)?;
        let size = self.content().take(lease, &digest, &path)?;
        if let Some(prepared) = kept.unindexed.map(Unindexed::index).transpose()?.flatten() {
            self.layers().place(prepared)?;
        }
        Ok(Some((Descriptor::new(media::OCI_LAYER, digest, size), packed)))
    }

    /// Whoever has the same layer already is not known here: that one stays.
    fn note_fresh(&self, digest: &Digest, fresh: &mut HashSet<Digest>) -> Result<()> {
        if self.layers().get(digest)?.is_none() {
            fresh.insert(digest.clone());
        }
        Ok(())
    }
}
