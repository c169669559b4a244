//! Loading docker-archives (current and older than manifest.json) and OCI-archives.
//!
//! All or nothing: the archive is read and checked as a whole, its layers are extracted on the way and checked, and only
//! then its images get their names, in one step. What a failed load brought is removed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::BufRead;

use serde::Deserialize;

use super::foresight::Foresight;
use super::legacy;
use super::spool::{Member, Spool};
use super::unpacking::{Done, Unpacking};
use super::{LoadProgress, Loaded};
use crate::compress::{self, Compression};
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result, json};
use crate::layers::Prepared;
use crate::lease::Lease;
use crate::media;
use crate::model::{Descriptor, Document, ImageConfig, Index, Manifest};
use crate::platform::{self, Platform};
use crate::reference::Reference;
use crate::store::{NewImage, Store};

const CONTAINERD_NAME: &str = "io.containerd.image.name";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// How deep indexes may be nested.
const NESTING_MAX: usize = 4;

/// One item of manifest.json.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// An image found in the archive.
pub(super) struct Found {
    pub names: Vec<Reference>,
    pub config: ImageConfig,
    pub config_raw: Vec<u8>,
    /// Bottom first.
    pub layers: Vec<Descriptor>,
    /// The manifest's own bytes and type, when the archive has it.
    pub manifest: Option<(Vec<u8>, Descriptor)>,
}

/// Loads a docker-archive or OCI-archive, compressed or not: of each image the variant that fits this machine best.
/// Says as much as it knows through `progress`.
pub fn load(
    store: &Store,
    archive: impl BufRead,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Vec<Loaded>> {
    load_for(store, archive, None, progress)
}

/// The same, of each image the variant for `platform`.
pub fn load_for(
    store: &Store,
    archive: impl BufRead,
    platform: Option<&Platform>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Vec<Loaded>> {
    load_as(store, archive, platform, true, progress)
}

/// The same without the names that the archive has for its images.
pub fn load_nameless(
    store: &Store,
    archive: impl BufRead,
    platform: Option<&Platform>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Vec<Loaded>> {
    load_as(store, archive, platform, false, progress)
}

fn load_as(
    store: &Store,
    archive: impl BufRead,
    platform: Option<&Platform>,
    named: bool,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Vec<Loaded>> {
    let lease = store.lease()?;
    let input = compress::decode_buffered(archive).map_err(Error::ArchiveRead)?;
    let unpacking = Unpacking::new(store.layers());
    std::thread::scope(|scope| {
        let _running = unpacking.start(scope);
        let mut seen = |bytes| progress(LoadProgress::Reading { bytes });
        let foresight = Foresight::new(platform);
        let spool = Spool::read(store, &lease, &unpacking, foresight, input, &mut seen)?;
        let mut load = Load {
            store,
            lease,
            spool,
            unpacking: &unpacking,
            platform,
            named,
            fresh: HashSet::new(),
            others: Vec::new(),
        };
        match load.run(progress) {
            Ok(loaded) => Ok(loaded),
            Err(error) => {
                let Load { lease, spool, fresh, .. } = load;
                drop((lease, spool));
                // What stays behind goes with the next collection; the load's own error is what matters.
                store.abandon(&fresh).unwrap_or_default();
                Err(error)
            }
        }
    })
}

struct Load<'a> {
    store: &'a Store,
    lease: Lease,
    spool: Spool<'a>,
    unpacking: &'a Unpacking<'a>,
    platform: Option<&'a Platform>,
    named: bool,
    /// Blobs and layers the store did not have before.
    fresh: HashSet<Digest>,
    /// Platforms of images that are left out for theirs.
    others: Vec<Platform>,
}

impl Load<'_> {
    fn run(&mut self, progress: &mut dyn FnMut(LoadProgress)) -> Result<Vec<Loaded>> {
        let mut found = self.find()?;
        if found.is_empty() {
            return Err(match self.platform {
                Some(wanted) if !self.others.is_empty() => Error::PlatformMismatch {
                    what: "the archive's image".to_owned(),
                    wanted: wanted.to_string(),
                    actual: platform::listed(&self.others),
                },
                _ => Error::Archive("no image in it".to_owned()),
            });
        }
        if !self.named {
            for image in &mut found {
                image.names.clear();
            }
        }
        let wanted = found.iter().flat_map(|image| image.layers.iter().map(|layer| layer.digest.clone()));
        let Done { mut prepared, diff_ids } = self.unpacking.finish(&wanted.collect());
        self.check_diff_ids(&found, &prepared, &diff_ids)?;
        let mut new = Vec::new();
        for image in &found {
            for (diff_id, layer) in image.config.rootfs.diff_ids.iter().zip(&image.layers) {
                if self.store.layer(diff_id)?.is_none() {
                    self.fresh.insert(diff_id.clone());
                    progress(LoadProgress::Layer { diff_id: diff_id.clone(), size: layer.size });
                    if let Some(prepared) = prepared.remove(diff_id) {
                        self.lease.hold(diff_id)?;
                        self.store.layers().place(prepared)?;
                    }
                }
            }
            self.store.unpack_layers(&self.lease, &image.config.rootfs.diff_ids, &image.layers)?;
            let config = Digest::sha256(&image.config_raw);
            self.put(&config, &image.config_raw)?;
            let manifest = self.manifest(image, &config)?;
            new.push(NewImage { manifest, names: image.names.clone(), parent: None, index: None });
        }
        let (images, replaced) = self.store.insert(&self.lease, new)?;
        let mut loaded = Vec::new();
        for (id, image) in images.into_iter().zip(found) {
            if image.names.is_empty() {
                loaded.push(Loaded { image: id, reference: None, replaced: None });
                continue;
            }
            for name in image.names {
                let replaced = replaced.get(&name).cloned();
                loaded.push(Loaded { image: id.clone(), reference: Some(name), replaced });
            }
        }
        Ok(loaded)
    }

    /// Fails unless each layer's blob is known to be, uncompressed, what its diff id says, or will be extracted, which
    /// tells. A layer that is there already says nothing about another blob that claims to be the same.
    fn check_diff_ids(
        &self,
        found: &[Found],
        prepared: &HashMap<Digest, Prepared>,
        diff_ids: &HashMap<Digest, Digest>,
    ) -> Result<()> {
        let mut extracted = HashMap::new();
        for image in found {
            for (diff_id, layer) in image.config.rootfs.diff_ids.iter().zip(&image.layers) {
                let blob = &layer.digest;
                if blob == diff_id || diff_ids.get(blob) == Some(diff_id) {
                    continue;
                }
                let is_missing = !prepared.contains_key(diff_id) && self.store.layer(diff_id)?.is_none();
                if !(is_missing && *extracted.entry(diff_id).or_insert(blob) == blob) {
                    self.store.check_layer_as(diff_id, blob)?;
                }
            }
        }
        Ok(())
    }

    /// Whether images for this platform are wanted. Of others nothing is kept.
    fn is_wanted(&mut self, platform: &Platform) -> bool {
        let Some(wanted) = self.platform else { return true };
        let actual = platform.clone().normalised();
        let fits = wanted.accepts(&actual);
        if !fits && !self.others.contains(&actual) {
            self.others.push(actual);
        }
        fits
    }

    fn find(&mut self) -> Result<Vec<Found>> {
        if let Some(member) = self.spool.get("manifest.json")? {
            let raw = self.spool.document("manifest.json", member)?;
            let items: Vec<Item> = json(&raw, || "archive: manifest.json".to_owned())?;
            // An archive may be both; the manifests of the layout then keep their digests.
            let manifests = self.layout_manifests()?;
            let images = items.into_iter().map(|item| self.docker_image(item, &manifests).transpose());
            return images.flatten().collect();
        }
        if let Some(index) = self.layout_index()? {
            return self.layout_images(index);
        }
        if self.spool.get("repositories")?.is_some() {
            let images = legacy::read(&self.spool)?;
            return images
                .into_iter()
                .filter(|image| self.is_wanted(&image.platform()))
                .collect::<Vec<_>>()
                .into_iter()
                .map(|image| {
                    let layers = image.layers.iter().map(|path| self.layer(path)).collect::<Result<_>>()?;
                    legacy::found(image, layers, |layer| {
                        self.store.diff_id_of(&layer.digest, Algorithm::Sha256)
                    })
                })
                .collect();
        }
        Err(Error::Archive(
            "not an image archive: it has neither manifest.json nor index.json (for a root file system use import)"
                .to_owned(),
        ))
    }

    /// Notes content as fresh if it is, and keeps it from collection.
    fn note(&mut self, digest: &Digest) -> Result<()> {
        self.lease.hold(digest)?;
        if !self.store.content().has(digest) {
            self.fresh.insert(digest.clone());
        }
        Ok(())
    }

    fn put(&mut self, digest: &Digest, raw: &[u8]) -> Result<()> {
        self.note(digest)?;
        self.store.content().put_as(&self.lease, digest, raw)
    }

    /// Publishes a layer's member; one whose compression has no media type is stored uncompressed.
    fn layer(&mut self, path: &str) -> Result<Descriptor> {
        let member = self.spool.require(path)?;
        let (media_type, digest, size) = match member.compression {
            Compression::None => (media::OCI_LAYER, member.digest.clone(), member.size),
            Compression::Gzip => (media::OCI_LAYER_GZIP, member.digest.clone(), member.size),
            Compression::Zstd => (media::OCI_LAYER_ZSTD, member.digest.clone(), member.size),
            Compression::Bzip2 | Compression::Xz => {
                let mut ingest = self.store.content().ingest_unnamed(&self.lease)?;
                let source = self.spool.open(member)?;
                let mut decoded = compress::decode(source).map_err(Error::ArchiveRead)?;
                std::io::copy(&mut decoded, &mut ingest)
                    .map_err(|error| Error::Archive(format!("member {path}: {error}")))?;
                let size = ingest.offset();
                let digest = ingest.commit()?;
                self.fresh.insert(digest.clone());
                return Ok(Descriptor::new(media::OCI_LAYER, digest, size));
            }
        };
        self.publish(path)?;
        Ok(Descriptor::new(media_type, digest, size))
    }

    fn publish(&mut self, path: &str) -> Result<()> {
        let digest = self.spool.require(path)?.digest.clone();
        self.note(&digest)?;
        self.spool.publish(&self.lease, self.spool.require(path)?)
    }

    fn docker_image(
        &mut self,
        item: Item,
        manifests: &HashMap<Digest, (Vec<u8>, Descriptor)>,
    ) -> Result<Option<Found>> {
        let member = self.spool.require(&item.config)?;
        let config_raw = self.spool.document(&item.config, member)?;
        let config: ImageConfig =
            json(&config_raw, || format!("archive: image configuration {}", item.config))?;
        let id = Digest::sha256(&config_raw);
        let stated = item.config.strip_suffix(".json").unwrap_or_default();
        if stated.len() == 64 && stated.bytes().all(|b| b.is_ascii_hexdigit()) && stated != id.hex() {
            return Err(Error::Archive(format!(
                "member {} is corrupt: its data has digest {id}",
                item.config
            )));
        }
        if !self.is_wanted(&config.platform()) {
            return Ok(None);
        }
        let paths = item.layers.unwrap_or_default();
        if paths.len() != config.rootfs.diff_ids.len() {
            return Err(Error::Archive(format!(
                "manifest.json lists {} layers for {}, whose configuration has {} diff ids",
                paths.len(),
                item.config,
                config.rootfs.diff_ids.len()
            )));
        }
        let mut names = Vec::new();
        for tag in item.repo_tags.unwrap_or_default() {
            let name = Reference::parse(&tag)
                .map_err(|error| Error::Archive(format!("repository tag {tag:?}: {error}")))?;
            if name.tag().is_none() || name.digest().is_some() {
                return Err(Error::Archive(format!("invalid tag {tag:?}")));
            }
            names.push(name);
        }
        if let Some((raw, descriptor)) = manifests.get(&id)
            && let Ok(Document::Manifest(manifest)) = Document::parse(raw)
            && let Ok(layers) = self.layout_layers(&manifest)
        {
            let manifest = Some((raw.clone(), descriptor.clone()));
            return Ok(Some(Found { names, config, config_raw, layers, manifest }));
        }
        let layers = paths.iter().map(|path| self.layer(path)).collect::<Result<_>>()?;
        Ok(Some(Found { names, config, config_raw, layers, manifest: None }))
    }

    fn layout_index(&self) -> Result<Option<Index>> {
        let Some(member) = self.spool.get("index.json")? else { return Ok(None) };
        let raw = self.spool.document("index.json", member)?;
        json(&raw, || "archive: index.json".to_owned()).map(Some)
    }

    /// The single-image manifests of a layout, by the digest of their configurations.
    fn layout_manifests(&self) -> Result<HashMap<Digest, (Vec<u8>, Descriptor)>> {
        let mut found = HashMap::new();
        let Some(index) = self.layout_index()? else { return Ok(found) };
        for descriptor in index.manifests {
            if let Some((_, raw)) = self.layout_document(&descriptor)?
                && let Ok(Document::Manifest(manifest)) = Document::parse(&raw)
            {
                found.insert(manifest.config.digest.clone(), (raw, bare(descriptor)));
            }
        }
        Ok(found)
    }

    fn layout_images(&mut self, index: Index) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        // The same manifest may stand there once for each of its names.
        let mut positions: HashMap<Digest, usize> = HashMap::new();
        for descriptor in index.manifests {
            let name = layout_name(&descriptor)?;
            let Some((raw, descriptor)) = self.choose(descriptor, 0)? else { continue };
            if let Some(&at) = positions.get(&descriptor.digest) {
                let known: &mut Found = &mut found[at];
                known.names.extend(name.filter(|name| !known.names.contains(name)));
                continue;
            }
            let what = format!("archive: manifest {}", descriptor.digest);
            let manifest: Manifest = json(&raw, || what.clone())?;
            if !manifest.config.media_type.is_empty() && !media::is_image_config(&manifest.config.media_type)
            {
                continue;
            }
            let Some((_, config_raw)) = self.layout_document(&manifest.config)? else {
                return Err(missing(&manifest.config));
            };
            let config: ImageConfig =
                json(&config_raw, || format!("archive: image configuration {}", manifest.config.digest))?;
            if config.rootfs.diff_ids.len() != manifest.layers.len() {
                return Err(Error::Archive(format!(
                    "{what} has {} layers, its configuration {} diff ids",
                    manifest.layers.len(),
                    config.rootfs.diff_ids.len()
                )));
            }
            if !self.is_wanted(&config.platform()) {
                continue;
            }
            let layers = self.layout_layers(&manifest)?;
            positions.insert(descriptor.digest.clone(), found.len());
            let names = name.into_iter().collect();
            found.push(Found { names, config, config_raw, layers, manifest: Some((raw, descriptor)) });
        }
        Ok(found)
    }

    /// Follows indexes down to the manifest that fits best what is wanted, or the first the archive has.
    fn choose(&self, descriptor: Descriptor, depth: usize) -> Result<Option<(Vec<u8>, Descriptor)>> {
        let Some((_, raw)) = self.layout_document(&descriptor)? else { return Err(missing(&descriptor)) };
        let what = || format!("archive: {}", descriptor.digest);
        let index = match Document::parse(&raw).map_err(|source| Error::Document { what: what(), source })? {
            Document::Manifest(_) => return Ok(Some((raw, bare(descriptor)))),
            Document::Index(index) => index,
        };
        if depth == NESTING_MAX {
            return Err(Error::Archive(format!("indexes are nested more than {NESTING_MAX} deep")));
        }
        let unknown = |p: &Platform| p.os == "unknown" || p.architecture == "unknown";
        let mut offered = Vec::new();
        for candidate in index.manifests {
            // Attestations, and platforms that were not saved.
            if !candidate.platform.as_ref().is_some_and(unknown)
                && self.layout_document(&candidate)?.is_some()
            {
                offered.push(candidate);
            }
        }
        let platforms: Vec<Platform> =
            offered.iter().map(|d| d.platform.clone().unwrap_or_else(Platform::host)).collect();
        let wanted = self.platform.cloned().unwrap_or_else(Platform::host);
        let at = wanted.choose(&platforms).unwrap_or(0);
        match offered.into_iter().nth(at) {
            Some(chosen) => self.choose(chosen, depth + 1),
            None => Ok(None),
        }
    }

    fn blob_path(descriptor: &Descriptor) -> String {
        format!("blobs/{}/{}", descriptor.digest.algorithm().as_str(), descriptor.digest.hex())
    }

    /// A document of the layout, or of the store when the archive leaves it out.
    fn layout_document(&self, descriptor: &Descriptor) -> Result<Option<(String, Vec<u8>)>> {
        let path = Self::blob_path(descriptor);
        match self.spool.get(&path)? {
            Some(member) => {
                let raw = self.spool.document(&path, member)?;
                Ok(Some((path, raw)))
            }
            None if self.store.content().has(&descriptor.digest) => {
                Ok(Some((path, self.store.content().read(&descriptor.digest)?)))
            }
            None => Ok(None),
        }
    }

    fn layout_layers(&mut self, manifest: &Manifest) -> Result<Vec<Descriptor>> {
        for layer in &manifest.layers {
            let path = Self::blob_path(layer);
            match self.spool.get(&path)? {
                Some(Member { size, .. }) if *size != layer.size => {
                    return Err(Error::Archive(format!(
                        "member {path} has {size} bytes, its manifest states {}",
                        layer.size
                    )));
                }
                Some(_) => self.publish(&path)?,
                None => {
                    self.lease.hold(&layer.digest)?;
                    if !self.store.content().has(&layer.digest) {
                        return Err(missing(layer));
                    }
                }
            }
        }
        Ok(manifest.layers.clone())
    }

    /// The archive's own manifest, or one made of what it says.
    fn manifest(&mut self, image: &Found, config: &Digest) -> Result<Descriptor> {
        if let Some((raw, descriptor)) = &image.manifest {
            self.put(&descriptor.digest, raw)?;
            return Ok(descriptor.clone());
        }
        let (raw, descriptor) = make_manifest(config, image.config_raw.len() as u64, &image.layers)?;
        self.put(&descriptor.digest, &raw)?;
        Ok(descriptor)
    }
}

/// An OCI manifest of a configuration and layers, the same for the same image.
pub(crate) fn make_manifest(
    config: &Digest,
    config_size: u64,
    layers: &[Descriptor],
) -> Result<(Vec<u8>, Descriptor)> {
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media::OCI_MANIFEST.to_owned()),
        artifact_type: None,
        config: Descriptor::new(media::OCI_CONFIG, config.clone(), config_size),
        layers: layers.to_vec(),
        subject: None,
        annotations: BTreeMap::new(),
    };
    let raw = serde_json::to_vec(&manifest)
        .map_err(|source| Error::Json { what: "an image's manifest".to_owned(), source })?;
    let descriptor = Descriptor::new(media::OCI_MANIFEST, Digest::sha256(&raw), raw.len() as u64);
    Ok((raw, descriptor))
}

/// The name a layout gives an image: in full by containerd's annotation, or by OCI's when that is more than a tag.
fn layout_name(descriptor: &Descriptor) -> Result<Option<Reference>> {
    let text = match (descriptor.annotations.get(CONTAINERD_NAME), descriptor.annotations.get(REF_NAME)) {
        (Some(name), _) => name,
        (None, Some(name)) if name.contains(['/', ':']) => name,
        _ => return Ok(None),
    };
    let name = Reference::parse(text)
        .map_err(|error| Error::Archive(format!("image name {text:?} in index.json: {error}")))?;
    Ok(name.digest().is_none().then(|| name.or_latest()))
}

fn bare(descriptor: Descriptor) -> Descriptor {
    Descriptor { annotations: BTreeMap::new(), ..descriptor }
}

fn missing(descriptor: &Descriptor) -> Error {
    Error::Archive(format!("{} ({}) is missing", descriptor.digest, descriptor.media_type))
}
