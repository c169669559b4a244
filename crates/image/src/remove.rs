//! Untagging, removing, pruning and collecting: Docker's rules for what may go, and the bytes given back at once.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::lease;
use crate::model::chain_ids;
use crate::names::Names;
use crate::reference::Reference;
use crate::store::{Image, Store};
use crate::temp::TempDir;

/// So many directories are emptied at once.
const REMOVALS: usize = 8;

/// A container that was made from an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerUse {
    pub container: String,
    pub running: bool,
}

/// What containers use: known to the engine, not to the store.
#[derive(Clone, Debug, Default)]
pub struct InUse {
    /// By image id.
    pub images: HashMap<Digest, Vec<ContainerUse>>,
    /// Diff ids of the layers containers are mounted on, of images that were removed by force too.
    pub layers: HashSet<Digest>,
    /// Chain ids of the files they are mounted on or copied from, where an image's files are one tree.
    pub chains: HashSet<Digest>,
}

/// One step of a removal, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removed {
    /// A name, in the form users write.
    Untagged(String),
    /// An image's id or a layer's chain id.
    Deleted(Digest),
}

/// What pruning or collecting gave back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    pub removed: Vec<Removed>,
    /// Bytes on disk.
    pub reclaimed: u64,
}

/// Bytes an image takes.
#[derive(Clone, Debug)]
pub struct ImageUsage {
    pub image: Image,
    /// Bytes of layers it shares with other images.
    pub shared: u64,
    /// Bytes of layers only it has.
    pub unique: u64,
}

/// Bytes the store takes.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    pub images: Vec<ImageUsage>,
    /// Lengths of the files of all layers, each layer counted once.
    pub layers: u64,
    /// What the extracted layers take on disk.
    pub layers_disk: u64,
    /// What the blobs take, downloads that were broken off included.
    pub blobs: u64,
}

/// Which conflicts forbid a removal.
#[derive(Clone, Copy)]
struct Check {
    children: bool,
    running: bool,
    references: bool,
    stopped: bool,
}

const HARD: Check = Check { children: true, running: true, references: false, stopped: false };
const ALL: Check = Check { children: true, running: true, references: true, stopped: true };

struct Conflict {
    text: String,
    used: bool,
}

impl Store {
    /// Removes an image or one of its names, as `docker rmi` does, and gives its bytes back.
    /// By name only that name goes unless it is the image's last. `prune` also removes parents nothing else needs.
    pub fn remove(&self, name: &str, force: bool, prune: bool, in_use: &InUse) -> Result<Vec<Removed>> {
        let mut records = Vec::new();
        self.names().update(|names| {
            records.clear();
            remove_from(names, name, force, prune, in_use, &mut records)
        })?;
        self.finish_removal(&mut records, in_use)?;
        Ok(records)
    }

    /// Removes images no container uses: those without a tag, or all of them. `wanted` says which of these. What failed
    /// pulls have brought goes, too.
    pub fn prune(&self, all: bool, in_use: &InUse, wanted: impl Fn(&Image) -> bool) -> Result<Pruned> {
        let mut records = Vec::new();
        self.names().update(|names| {
            records.clear();
            for id in names.images() {
                let Ok(image) = self.describe(names, &id) else { continue };
                if in_use.images.contains_key(&id) || (!all && !image.tags.is_empty()) || !wanted(&image) {
                    continue;
                }
                let mut of_image = Vec::new();
                for entry in names.clone().of_image(&id) {
                    if let Some(name) = &entry.name {
                        names.unset(name);
                        of_image.push(Removed::Untagged(name.familiar()));
                    }
                }
                if delete(names, &id, true, true, true, in_use, &mut of_image).is_ok() {
                    records.extend(of_image);
                }
            }
            Ok(())
        })?;
        let mut reclaimed = self.content().drop_partials()?;
        reclaimed +=
            if records.is_empty() { self.gc(in_use)? } else { self.finish_removal(&mut records, in_use)? };
        Ok(Pruned { removed: records, reclaimed })
    }

    /// Removes blobs and layers that no image, container or lease refers to. Returns the bytes given back.
    pub fn gc(&self, in_use: &InUse) -> Result<u64> {
        self.collect(in_use, |_| true)
    }

    /// Removes what a failed addition brought, unless something else refers to it by now.
    pub fn abandon(&self, brought: &HashSet<Digest>) -> Result<u64> {
        if brought.is_empty() {
            return Ok(0);
        }
        self.collect(&InUse::default(), |digest| brought.contains(digest))
    }

    fn collect(&self, in_use: &InUse, candidate: impl Fn(&Digest) -> bool) -> Result<u64> {
        let mut reclaimed = 0;
        let mut taken: Vec<TempDir> = Vec::new();
        {
            let _exclusive = lease::lock(self.root(), true)?;
            let mut blobs = lease::held(self.root())?;
            let (mut layers, mut chains) = (blobs.clone(), blobs.clone());
            layers.extend(in_use.layers.iter().cloned());
            chains.extend(in_use.chains.iter().cloned());
            let names = self.names().load()?;
            for entry in &names.entries {
                // An image that cannot be read must not cost the bytes it might still refer to.
                let image = self.describe_entry(entry)?;
                blobs.insert(entry.manifest.digest.clone());
                blobs.insert(entry.image.clone());
                blobs.extend(image.layers.iter().map(|layer| layer.digest.clone()));
                if let Some(index) = &entry.index {
                    blobs.extend(self.index_content(index)?);
                }
                layers.extend(image.config.rootfs.diff_ids.iter().cloned());
                chains.extend(chain_ids(&image.config.rootfs.diff_ids).pop());
            }
            for digest in self.content().walk()? {
                if !blobs.contains(&digest) && candidate(&digest) {
                    reclaimed += self.content().remove(&digest)?;
                }
            }
            for (kept, of) in [(&layers, self.layers()), (&chains, self.trees())] {
                for id in of.walk()? {
                    if !kept.contains(&id)
                        && candidate(&id)
                        && let Some((dir, disk)) = of.take(&id)?
                    {
                        reclaimed += disk;
                        taken.push(dir);
                    }
                }
            }
        }
        // Emptying trees takes time; nobody waits for it holding the lock.
        give_back(taken);
        Ok(reclaimed)
    }

    /// What each image and all of them take.
    pub fn usage(&self) -> Result<Usage> {
        let images = self.list()?;
        let mut users: HashMap<&Digest, usize> = HashMap::new();
        for image in &images {
            let own: HashSet<&Digest> = image.config.rootfs.diff_ids.iter().collect();
            for diff_id in own {
                *users.entry(diff_id).or_default() += 1;
            }
        }
        let mut usage = Usage::default();
        for image in &images {
            let (mut shared, mut unique) = (0, 0);
            let mut seen = HashSet::new();
            for (diff_id, layer) in image.config.rootfs.diff_ids.iter().zip(&image.layers) {
                if !seen.insert(diff_id) {
                    continue;
                }
                let size = self.layers().get(diff_id)?.map_or(layer.size, |info| info.size);
                if users.get(diff_id).is_some_and(|&n| n > 1) { shared += size } else { unique += size }
            }
            usage.images.push(ImageUsage { image: image.clone(), shared, unique });
        }
        for diff_id in self.layers().walk()? {
            if let Some(info) = self.layers().get(&diff_id)? {
                usage.layers += info.size;
                usage.layers_disk += self.layers().disk(&info);
            }
        }
        for chain_id in self.trees().walk()? {
            usage.layers_disk += self.trees().get(&chain_id)?.map_or(0, |info| info.disk);
        }
        for blob in self.content().walk()? {
            // In whole blocks, as it stands on disk.
            usage.blobs += self.content().size(&blob)?.next_multiple_of(4096);
        }
        usage.blobs += self.content().partial_bytes()?;
        Ok(usage)
    }

    /// Collects, forgets removed images and names the layers that went, top first, after each image.
    fn finish_removal(&self, records: &mut Vec<Removed>, in_use: &InUse) -> Result<u64> {
        let names = self.names().load()?;
        let mut kept: HashSet<Digest> = HashSet::new();
        let mut with_layers = Vec::with_capacity(records.len());
        let deleted: Vec<&Digest> = records
            .iter()
            .filter_map(|record| match record {
                Removed::Deleted(id) => Some(id),
                Removed::Untagged(_) => None,
            })
            .collect();
        if deleted.is_empty() {
            return Ok(0);
        }
        for id in names.images() {
            if let Ok(image) = self.describe(&names, &id) {
                kept.extend(chain_ids(&image.config.rootfs.diff_ids));
            }
        }
        for record in records.drain(..) {
            let image = match &record {
                Removed::Deleted(id) => self.known_config(id),
                Removed::Untagged(_) => None,
            };
            with_layers.push(record);
            if let Some(config) = image {
                let diff_ids = &config.rootfs.diff_ids;
                for (chain, diff_id) in chain_ids(diff_ids).into_iter().zip(diff_ids).rev() {
                    if !in_use.layers.contains(diff_id) && kept.insert(chain.clone()) {
                        with_layers.push(Removed::Deleted(chain));
                    }
                }
            }
        }
        let reclaimed = self.gc(in_use)?;
        for record in &with_layers {
            if let Removed::Deleted(id) = record {
                self.forget(id);
            }
        }
        *records = with_layers;
        Ok(reclaimed)
    }
}

/// Empties directories side by side: a thread that removes files waits for the disk, mostly (a file system mounted with
/// `discard` asks it for each of them), and layers have nothing in common.
fn give_back(taken: Vec<TempDir>) {
    let threads = taken.len().min(REMOVALS);
    let waiting = Mutex::new(taken);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let thread = std::thread::Builder::new().name("remove".to_owned()).spawn_scoped(scope, || {
                loop {
                    let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop();
                    let Some(dir) = next else { return };
                    drop(dir);
                }
            });
            if thread.is_err() {
                // What no thread takes goes with the list.
                break;
            }
        }
    });
}

fn remove_from(
    names: &mut Names,
    text: &str,
    force: bool,
    prune: bool,
    in_use: &InUse,
    records: &mut Vec<Removed>,
) -> Result<()> {
    let id = Store::find_in(names, text)?;
    let references = references(names, &id);
    let mut by_name = false;
    if names_by_id(&id, text) {
        if is_single(&references) {
            let check = if force { HARD } else { Check { references: false, ..ALL } };
            if let Some(conflict) = conflict(names, &id, check, !force, in_use) {
                return Err(Error::Conflict(conflict.text));
            }
            for name in references {
                names.unset(&name);
                records.push(Removed::Untagged(name.familiar()));
            }
        }
    } else {
        if !force
            && is_single(&references)
            && let Some(user) = in_use.images.get(&id).and_then(|users| users.first())
        {
            return Err(Error::Conflict(format!(
                "unable to remove repository reference \"{text}\" (must force) - container {} is using its \
                 referenced image {}",
                short(&user.container),
                id.short()
            )));
        }
        let name = Reference::parse(text)?.or_latest();
        let name = match name.digest() {
            Some(digest) => name.with_digest(digest.clone()),
            None => name,
        };
        names.unset(&name);
        records.push(Removed::Untagged(name.familiar()));
        let mut left = self::references(names, &id);
        // The digest names of a repository go with its last tag.
        if name.tag().is_some() && !left.iter().any(|n| n.tag().is_some() && n.same_repository(&name)) {
            left.retain(|other| {
                let goes = other.same_repository(&name);
                if goes {
                    names.unset(other);
                    records.push(Removed::Untagged(other.familiar()));
                }
                !goes
            });
        }
        if !left.is_empty() {
            return Ok(());
        }
        by_name = true;
    }
    delete(names, &id, force, prune, by_name, in_use, records)
}

/// Removes the image itself with all its names, then its parents if they were only kept for it.
fn delete(
    names: &mut Names,
    id: &Digest,
    force: bool,
    prune: bool,
    quiet: bool,
    in_use: &InUse,
    records: &mut Vec<Removed>,
) -> Result<()> {
    let check = if force { HARD } else { ALL };
    if let Some(conflict) = conflict(names, id, check, !force, in_use) {
        let wanted = !references(names, id).is_empty() || has_children(names, id) || conflict.used;
        if quiet && wanted {
            return Ok(());
        }
        return Err(Error::Conflict(conflict.text));
    }
    let parent = names.of_image(id).find_map(|entry| entry.parent.clone());
    for name in references(names, id) {
        names.unset(&name);
        records.push(Removed::Untagged(name.familiar()));
    }
    names.remove_image(id);
    records.push(Removed::Deleted(id.clone()));
    if let Some(parent) = parent
        && prune
        && names.has_image(&parent)
    {
        // A parent that is still wanted stays, without a word.
        return delete(names, &parent, false, true, true, in_use, records);
    }
    Ok(())
}

fn conflict(names: &Names, id: &Digest, check: Check, soft: bool, in_use: &InUse) -> Option<Conflict> {
    let conflict = |hard: bool, used: bool, reason: String| {
        let force = if hard || !soft { "cannot be forced" } else { "must be forced" };
        Some(Conflict { text: format!("unable to delete {} ({force}) - {reason}", id.short()), used })
    };
    if check.children && has_children(names, id) {
        return conflict(true, false, "image has dependent child images".to_owned());
    }
    let users = in_use.images.get(id).map(Vec::as_slice).unwrap_or_default();
    if check.running
        && let Some(user) = users.iter().find(|user| user.running)
    {
        let text = format!("image is being used by running container {}", short(&user.container));
        return conflict(true, true, text);
    }
    if check.references && !references(names, id).is_empty() {
        return conflict(false, false, "image is referenced in multiple repositories".to_owned());
    }
    if check.stopped
        && let Some(user) = users.iter().find(|user| !user.running)
    {
        let text = format!("image is being used by stopped container {}", short(&user.container));
        return conflict(false, true, text);
    }
    None
}

fn has_children(names: &Names, id: &Digest) -> bool {
    names.entries.iter().any(|entry| entry.parent.as_ref() == Some(id))
}

fn references(names: &Names, id: &Digest) -> Vec<Reference> {
    names.of_image(id).filter_map(|entry| entry.name.clone()).collect()
}

/// At most one tag, and every digest name of the same repository.
fn is_single(references: &[Reference]) -> bool {
    let Some(first) = references.iter().find(|name| name.tag().is_some()).or(references.first()) else {
        return true;
    };
    references.iter().all(|name| name == first || (name.digest().is_some() && name.same_repository(first)))
}

/// Whether the text names the image by its id or a prefix of it, rather than by a reference.
fn names_by_id(id: &Digest, text: &str) -> bool {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    id.hex().starts_with(&hex.to_ascii_lowercase())
}

fn short(container: &str) -> &str {
    container.get(..12).unwrap_or(container)
}
