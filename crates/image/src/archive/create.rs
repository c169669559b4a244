//! Making images here: of a root file system's archive (import) and of a container's changes (commit).

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use super::{apply_changes, make_manifest};
use crate::compress::{self, Compression};
use crate::content::Ingest;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer;
use crate::layers::LayerInfo;
use crate::lease::Lease;
use crate::media;
use crate::model::{ContainerConfig, Descriptor, History, ImageConfig, RootFs};
use crate::platform::Platform;
use crate::reference::Reference;
use crate::replica::Replica;
use crate::store::{Image, NewImage, Store, now};

/// A root file system to make an image of.
#[derive(Clone, Debug, Default)]
pub struct Import {
    pub reference: Option<Reference>,
    /// Dockerfile instructions: `CMD ["sh"]`, `ENV a=b` …
    pub changes: Vec<String>,
    pub message: String,
    /// The host's when not given.
    pub platform: Option<Platform>,
}

/// A container to make an image of.
#[derive(Clone, Debug, Default)]
pub struct Commit {
    /// The image the container was made from.
    pub parent: Option<Digest>,
    /// The overlay's upper directory, or none for no new layer.
    pub upper: Option<PathBuf>,
    /// A plain copy instead of an upper directory.
    pub replica: Option<Replica>,
    /// Paths in it that are the engine's and not the container's: mount points it made.
    pub without: Vec<Vec<u8>>,
    /// The new image's configuration, before `changes`.
    pub config: ContainerConfig,
    pub changes: Vec<String>,
    pub reference: Option<Reference>,
    pub author: Option<String>,
    pub message: Option<String>,
    /// What history says made the layer: the container's command.
    pub created_by: String,
}

/// Makes an image of a root file system's archive, compressed or not.
pub fn import(store: &Store, archive: impl Read, import: &Import) -> Result<Image> {
    let name = target(import.reference.as_ref())?;
    let mut config = ContainerConfig::default();
    apply_changes(&mut config, &import.changes)?;
    undone(store, |lease, fresh| {
        let Layered { descriptor: layer, info } = keep_layer(store, lease, fresh, archive, "of the import")?;
        if info.entries == 0 {
            return Err(Error::Archive("no root file system in it: it has no entries".to_owned()));
        }
        let platform = import.platform.clone().unwrap_or_else(Platform::host);
        let created = now();
        let comment = Some(import.message.clone()).filter(|message| !message.is_empty());
        let image = ImageConfig {
            architecture: platform.architecture,
            variant: platform.variant,
            os: platform.os,
            config,
            created: Some(created.clone()),
            history: vec![History { created: Some(created), comment: comment.clone(), ..History::default() }],
            rootfs: RootFs { diff_ids: vec![info.diff_id], ..RootFs::default() },
            comment,
            ..ImageConfig::default()
        };
        add(store, lease, fresh, &image, &[layer], name.into_iter().collect(), None)
    })
}

/// Makes an image of a container: its image's layers and one more.
pub fn commit(store: &Store, commit: &Commit) -> Result<Image> {
    let name = target(commit.reference.as_ref())?;
    let parent = commit.parent.as_ref().map(|id| store.image(id)).transpose()?;
    let mut config = commit.config.clone();
    apply_changes(&mut config, &commit.changes)?;
    undone(store, |lease, fresh| {
        let mut layers = Vec::new();
        let mut image = ImageConfig::default();
        if let Some(parent) = &parent {
            for (layer, diff_id) in parent.layers.iter().zip(&parent.config.rootfs.diff_ids) {
                lease.hold(&layer.digest)?;
                lease.hold(diff_id)?;
            }
            layers.clone_from(&parent.layers);
            image = (*parent.config).clone();
        } else {
            let host = Platform::host();
            (image.os, image.architecture, image.variant) = (host.os, host.architecture, host.variant);
        }
        let mut empty_layer = true;
        if let Some(layer) = changed(store, lease, commit, fresh)? {
            // It is not compressed: its digest is its diff id.
            let diff_id = layer.digest.clone();
            store.layers().make_of_blob(&diff_id, &diff_id, store.content())?;
            image.rootfs.diff_ids.push(diff_id);
            layers.push(layer);
            empty_layer = false;
        }
        let created = now();
        image.history.push(History {
            created: Some(created.clone()),
            author: commit.author.clone().filter(|author| !author.is_empty()),
            created_by: Some(commit.created_by.clone()).filter(|command| !command.is_empty()),
            comment: commit.message.clone().filter(|message| !message.is_empty()),
            empty_layer,
        });
        image.created = Some(created);
        image.author = commit.author.clone().filter(|author| !author.is_empty());
        image.comment = commit.message.clone().filter(|message| !message.is_empty());
        image.docker_version = None;
        image.config = config;
        image.rootfs.kind = RootFs::default().kind;
        add(store, lease, fresh, &image, &layers, name.into_iter().collect(), commit.parent.clone())
    })
}

/// The blob of what the container has changed; `None` when that is nothing.
fn changed(
    store: &Store,
    lease: &Lease,
    commit: &Commit,
    fresh: &mut HashSet<Digest>,
) -> Result<Option<Descriptor>> {
    let failed = |source| Error::Layer { layer: "of the commit".to_owned(), source };
    let without = &commit.without;
    let packed = match (&commit.upper, &commit.replica) {
        (_, Some(replica)) => store.packed(lease, fresh, |output| replica.pack(without, output))?,
        (Some(upper), None) => {
            let pack = |output: &mut (dyn io::Write + Send)| {
                layer::pack_upper_without(upper, without, output).map_err(failed)
            };
            store.packed(lease, fresh, pack)?
        }
        (None, None) => return Ok(None),
    };
    Ok(packed.map(|(layer, _)| layer))
}

/// A layer as its blob and its files.
pub(super) struct Layered {
    pub descriptor: Descriptor,
    pub info: LayerInfo,
}

/// Keeps a layer's archive, compressed or not, and extracts it: both are made of one reading. What has no media type
/// is stored uncompressed.
pub(super) fn keep_layer(
    store: &Store,
    lease: &Lease,
    fresh: &mut HashSet<Digest>,
    archive: impl Read,
    name: &str,
) -> Result<Layered> {
    let mut input = io::BufReader::with_capacity(1 << 17, archive);
    let compression = compress::peek(&mut input).map_err(Error::ArchiveRead)?;
    let media_type = match compression {
        Compression::Gzip => media::OCI_LAYER_GZIP,
        Compression::Zstd => media::OCI_LAYER_ZSTD,
        _ => media::OCI_LAYER,
    };
    let mut ingest = store.content().ingest_unnamed(lease)?;
    let info = {
        let mut source: Box<dyn Read + '_> = match compression {
            Compression::Bzip2 | Compression::Xz => compress::decode(input).map_err(Error::ArchiveRead)?,
            _ => Box::new(input),
        };
        let mut tee = Tee { source: &mut source, copy: &mut ingest };
        let info = store.layers().make_unnamed(name, &mut tee, |diff_id| lease.hold(diff_id))?;
        io::copy(&mut tee, &mut io::sink()).map_err(Error::ArchiveRead)?;
        info
    };
    fresh.insert(info.diff_id.clone());
    let descriptor = commit_blob(ingest, media_type, fresh)?;
    Ok(Layered { descriptor, info })
}

/// The name with its tag; a digest cannot be given.
fn target(name: Option<&Reference>) -> Result<Option<Reference>> {
    match name {
        Some(name) if name.digest().is_some() => Err(Error::TagWithDigest),
        name => Ok(name.cloned().map(Reference::or_latest)),
    }
}

/// Runs an addition; what it brought is removed when it fails.
pub(crate) fn undone<T>(
    store: &Store,
    addition: impl FnOnce(&Lease, &mut HashSet<Digest>) -> Result<T>,
) -> Result<T> {
    let lease = store.lease()?;
    let mut fresh = HashSet::new();
    let result = addition(&lease, &mut fresh);
    drop(lease);
    if result.is_err() {
        // What stays behind goes with the next collection; the addition's own error is what matters.
        store.abandon(&fresh).unwrap_or_default();
    }
    result
}

fn commit_blob(ingest: Ingest, media_type: &str, fresh: &mut HashSet<Digest>) -> Result<Descriptor> {
    let size = ingest.offset();
    let digest = ingest.commit()?;
    fresh.insert(digest.clone());
    Ok(Descriptor::new(media_type, digest, size))
}

pub(super) fn add(
    store: &Store,
    lease: &Lease,
    fresh: &mut HashSet<Digest>,
    image: &ImageConfig,
    layers: &[Descriptor],
    names: Vec<Reference>,
    parent: Option<Digest>,
) -> Result<Image> {
    let raw = serde_json::to_vec(image)
        .map_err(|source| Error::Json { what: "an image's configuration".to_owned(), source })?;
    let config = store.content().put(lease, &raw)?;
    let (manifest_raw, manifest) = make_manifest(&config, raw.len() as u64, layers)?;
    fresh.extend([config, manifest.digest.clone()]);
    store.content().put_as(lease, &manifest.digest, &manifest_raw)?;
    store.add_image(lease, NewImage { manifest, names, parent, index: None })
}

/// Copies what is read.
struct Tee<'a> {
    source: &'a mut dyn Read,
    copy: &'a mut Ingest,
}

impl Read for Tee<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read(buf)?;
        self.copy.write_all(&buf[..n])?;
        Ok(n)
    }
}
