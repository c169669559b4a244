//! Checking the store: every blob against its digest, every kept archive against its diff id, every name against what
//! it refers to; and putting right what can be put right.
//!
//! Invariant: a repair removes only what is wrong, is derived from something else, or is referred to by nothing; what it
//! takes from an image is named, and a pull brings it back.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use serde::Serialize;

use crate::digest::Digest;
use crate::error::{IoContext as _, Result};
use crate::lease;
use crate::model::chain_ids;
use crate::remove::InUse;
use crate::snapshot::LayerFiles;
use crate::store::Store;
use crate::temp::TempDir;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Checked {
    /// Blobs and kept archives read, and their bytes.
    pub objects: u64,
    pub bytes: u64,
    pub problems: Vec<Problem>,
    /// Bytes of what nothing refers to.
    pub orphaned: u64,
    /// Whether the problems have been put right.
    pub repaired: bool,
    /// Bytes given back by that.
    pub reclaimed: u64,
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "Kind", rename_all = "kebab-case")]
pub enum Problem {
    /// A blob's bytes have another digest than its name. Repair removes it: images that have it need a pull.
    #[serde(rename_all = "PascalCase")]
    CorruptBlob { blob: Digest, images: Vec<Digest> },
    /// A layer is not what its archive was. Repair removes it: it is made again from its blob.
    #[serde(rename_all = "PascalCase")]
    CorruptLayer { layer: Digest },
    /// An image whose documents cannot be read. Repair removes its names.
    #[serde(rename_all = "PascalCase")]
    BrokenImage { image: Digest, names: Vec<String>, reason: String },
    /// An image lacks a layer's blob. It runs as long as the layer itself is there; a pull brings the blob back.
    #[serde(rename_all = "PascalCase")]
    MissingBlob { image: Digest, blob: Digest },
    /// A blob nothing refers to. Repair removes it.
    #[serde(rename_all = "PascalCase")]
    OrphanBlob { blob: Digest, bytes: u64 },
    /// A layer nothing refers to. Repair removes it.
    #[serde(rename_all = "PascalCase")]
    OrphanLayer { layer: Digest, bytes: u64 },
}

impl Store {
    /// Reads everything there is. With `repair`, problems are put right; what operations under way hold is left alone.
    pub fn check(&self, repair: bool, in_use: &InUse) -> Result<Checked> {
        let mut found = Checked::default();
        let mut buffer = vec![0; 1 << 20];
        let mut corrupt = HashSet::new();
        let names = self.names().load()?;
        for blob in self.content().walk()? {
            let path = self.content().path(&blob);
            // Removed meanwhile: nothing to say about it.
            let Some((actual, bytes)) = digest_of(&path, &blob, &mut buffer)? else { continue };
            found.objects += 1;
            found.bytes += bytes;
            if actual != blob {
                corrupt.insert(blob);
            }
        }
        let mut broken = Vec::new();
        let mut referred: HashSet<Digest> = HashSet::new();
        let mut referred_layers: HashSet<Digest> = in_use.layers.clone();
        let mut users: Vec<(Digest, Digest)> = Vec::new();
        for id in names.images() {
            for entry in names.of_image(&id) {
                referred.extend([entry.manifest.digest.clone(), entry.image.clone()]);
                if let Some(index) = &entry.index {
                    referred.insert(index.digest.clone());
                    // Where it cannot be read, what it leads to is not known.
                    referred.extend(self.index_content(index).into_iter().flatten());
                }
                users.extend([(entry.manifest.digest.clone(), id.clone()), (id.clone(), id.clone())]);
                let documents = match self.describe_entry(entry) {
                    Ok(documents)
                        if !corrupt.contains(&entry.manifest.digest) && !corrupt.contains(&entry.image) =>
                    {
                        documents
                    }
                    result => {
                        let reason = match result {
                            Ok(_) => "its manifest or configuration is corrupt".to_owned(),
                            Err(error) => error.chain(),
                        };
                        let names = names.of_image(&id).filter_map(|entry| entry.name.as_ref());
                        let names = names.map(crate::Reference::familiar).collect();
                        broken.push(id.clone());
                        found.problems.push(Problem::BrokenImage { image: id.clone(), names, reason });
                        break;
                    }
                };
                for layer in &documents.layers {
                    referred.insert(layer.digest.clone());
                    users.push((layer.digest.clone(), id.clone()));
                    if !self.content().has(&layer.digest) {
                        let problem = Problem::MissingBlob { image: id.clone(), blob: layer.digest.clone() };
                        if !found.problems.contains(&problem) {
                            found.problems.push(problem);
                        }
                    }
                }
                referred_layers.extend(documents.config.rootfs.diff_ids.iter().cloned());
            }
        }
        for blob in &corrupt {
            let mut images: Vec<Digest> =
                users.iter().filter(|(of, _)| of == blob).map(|(_, image)| image.clone()).collect();
            images.dedup();
            found.problems.push(Problem::CorruptBlob { blob: blob.clone(), images });
        }
        let held = self.held()?;
        for blob in self.content().walk()? {
            if !referred.contains(&blob) && !held.contains(&blob) {
                let bytes = self.content().size(&blob).unwrap_or_default();
                found.orphaned += bytes;
                found.problems.push(Problem::OrphanBlob { blob, bytes });
            }
        }
        let mut chains = held.clone();
        chains.extend(in_use.chains.iter().cloned());
        for entry in &names.entries {
            if let Ok(documents) = self.describe_entry(entry) {
                chains.extend(chain_ids(&documents.config.rootfs.diff_ids).pop());
            }
        }
        for tree in self.trees().walk()? {
            let bytes = self.trees().get(&tree)?.map_or(0, |info| info.disk);
            if !chains.contains(&tree) {
                found.orphaned += bytes;
                found.problems.push(Problem::OrphanLayer { layer: tree, bytes });
            }
        }
        let mut bad_layers = Vec::new();
        for layer in self.layers().walk()? {
            let info = self.layers().get(&layer)?;
            if !referred_layers.contains(&layer) && !held.contains(&layer) {
                let bytes = info.map_or(0, |info| info.disk);
                found.orphaned += bytes;
                found.problems.push(Problem::OrphanLayer { layer, bytes });
                continue;
            }
            let whole = match self.layers().files(&layer)? {
                // The tree is compared with nothing: that it was complete is what its presence says.
                LayerFiles::Directory(tree) => info.is_some_and(|info| info.is_bare() || tree.is_dir()),
                LayerFiles::Erofs { index, archive } => match digest_of(&archive, &layer, &mut buffer)? {
                    Some((actual, bytes)) => {
                        found.objects += 1;
                        found.bytes += bytes;
                        actual == layer && self.layers().index_is_whole(&layer, &index)?
                    }
                    None => false,
                },
            };
            // A power cut's remains are made again by themselves.
            if !whole {
                found.problems.push(Problem::CorruptLayer { layer: layer.clone() });
                bad_layers.push(layer);
            }
        }
        if repair {
            found.reclaimed = self.repair(&corrupt, &broken, &bad_layers, in_use)?;
            found.repaired = true;
        }
        Ok(found)
    }

    fn held(&self) -> Result<HashSet<Digest>> {
        let _exclusive = lease::lock(self.root(), true)?;
        lease::held(self.root())
    }

    fn repair(
        &self,
        corrupt: &HashSet<Digest>,
        broken: &[Digest],
        layers: &[Digest],
        in_use: &InUse,
    ) -> Result<u64> {
        let mut reclaimed = 0;
        if !broken.is_empty() {
            self.names().update(|names| {
                for id in broken {
                    names.remove_image(id);
                }
                Ok(())
            })?;
            for id in broken {
                self.forget(id);
            }
        }
        for blob in corrupt {
            if self.content().has(blob) {
                reclaimed += self.content().remove(blob)?;
            }
        }
        let mut taken: Vec<TempDir> = Vec::new();
        for layer in layers {
            if let Some((dir, disk)) = self.layers().take(layer)? {
                reclaimed += disk;
                taken.push(dir);
            }
        }
        drop(taken);
        Ok(reclaimed + self.gc(in_use)?)
    }
}

/// A file's digest, by the algorithm of the one it should have, and its length; `None` if there is no such file.
fn digest_of(path: &Path, expected: &Digest, buffer: &mut [u8]) -> Result<Option<(Digest, u64)>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).at("open", path),
    };
    let mut hasher = expected.algorithm().hasher();
    let mut bytes = 0;
    loop {
        let n = file.read(buffer).at("read", path)?;
        if n == 0 {
            return Ok(Some((hasher.finish(), bytes)));
        }
        hasher.update(&buffer[..n]);
        bytes += n as u64;
    }
}
