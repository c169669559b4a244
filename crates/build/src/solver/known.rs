//! What is on record: results that a key leads to, and records of new ones.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, Weak};

use brigantine_image::{Digest, Lease};
use sha2::{Digest as _, Sha256};

use super::{Output, Solver};
use crate::error::{Context as _, Result};
use crate::pattern::Ignore;
use crate::records::{self, Snapshot};
use crate::snapshot::{Fresh, Layer, Snap, disk_usage, hold};
use crate::tree::Tree;

impl Solver {
    /// The snapshot of a record, if it is whole.
    fn snap(&self, record: &Snapshot) -> Result<Option<Arc<Snap>>> {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(snap) = live.get(&record.id).and_then(Weak::upgrade) {
            return Ok(Some(snap));
        }
        let own = self.snapshots.join(&record.id).join("diff");
        let adopted: Option<Digest> = record.diff_id.as_deref().and_then(|text| text.parse().ok());
        let snap = if own.is_dir() {
            Snap::own(record.id.clone(), own)
        } else if let Some(diff_id) = adopted
            && self.store.layer(&diff_id).doing(|| "look up a layer".to_owned())?.is_some()
        {
            Snap::layer(record.id.clone(), diff_id)
        } else {
            return Ok(None);
        };
        let snap = Arc::new(snap);
        live.retain(|_, known| known.strong_count() > 0);
        live.insert(record.id.clone(), Arc::downgrade(&snap));
        Ok(Some(snap))
    }

    fn adopt_live(&self, snap: &Arc<Snap>) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.insert(snap.id.clone(), Arc::downgrade(snap));
    }

    /// Whether a build uses the snapshot now.
    pub fn in_use(&self, id: &str) -> bool {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.get(id).is_some_and(|snap| snap.strong_count() > 0)
    }

    /// A result on top of `below`, if the key leads to one.
    pub(super) fn known(&self, key: &str, below: &[Layer]) -> Result<Option<Output>> {
        let Some(record) = self.records.find(key)? else { return Ok(None) };
        let mut output = Output::layers(below.to_vec(), record.identity.clone(), record.created);
        output.cached = true;
        if !record.empty {
            let Some(snap) = self.snap(&record)? else {
                // Lost: made again.
                self.records.remove(&record.id)?;
                return Ok(None);
            };
            output.layers.push(Layer::Snap(Arc::clone(&snap)));
            output.own = Some(snap);
        }
        self.records.used(&[record.id])?;
        Ok(Some(output))
    }

    /// A digest of what the layers hold.
    pub(super) fn content_of(&self, lease: &Lease, layers: &[Layer]) -> Result<String> {
        let mut hasher = Sha256::new();
        for layer in layers {
            let part = match layer {
                Layer::Image(diff_id) => diff_id.to_string(),
                Layer::Snap(_) => {
                    let held = hold(&self.store, &self.mounts, lease, std::slice::from_ref(layer))?;
                    let tree = Tree::held(&held, Arc::clone(&self.hashes))?;
                    let all = tree.select("/")?;
                    tree.digest(&all, &Ignore::default(), false, true)?
                }
            };
            hasher.update(part);
            hasher.update("\n");
        }
        Ok(hex::encode(hasher.finalize()))
    }

    /// Makes a record of a fresh snapshot, and the output on top of what is below.
    pub(super) fn finish(&self, fresh: Fresh, step: Step<'_>) -> Result<Output> {
        let diff = fresh.diff();
        let empty = std::fs::read_dir(&diff).doing(|| format!("read {}", diff.display()))?.next().is_none();
        let size = if empty { 0 } else { disk_usage(&diff) };
        let made = if empty { Made::Layer(None) } else { Made::Directory(fresh.keep(), size) };
        self.record(made, step)
    }

    /// The same of what was made elsewhere, or at another time.
    pub(super) fn record(&self, made: Made, step: Step<'_>) -> Result<Output> {
        let Step { id, identity, name, below, keys, created } = step;
        let now = records::now();
        let (snap, size) = match made {
            Made::Layer(None) => (None, 0),
            Made::Layer(Some((diff_id, size))) => (Some(Snap::layer(id.clone(), diff_id)), size),
            Made::Directory(path, size) => (Some(Snap::own(id.clone(), path)), size),
        };
        let mut output = Output::layers(below.to_vec(), identity.to_owned(), created);
        let record = Snapshot {
            id,
            identity: identity.to_owned(),
            name: name.to_owned(),
            kind: "layer".to_owned(),
            diff_id: snap.as_ref().and_then(Snap::diff_id).map(|diff_id| diff_id.to_string()),
            empty: snap.is_none(),
            size,
            created,
            used: now,
            uses: 1,
        };
        if let Some(snap) = snap {
            let snap = Arc::new(snap);
            self.adopt_live(&snap);
            output.layers.push(Layer::Snap(Arc::clone(&snap)));
            output.own = Some(snap);
        }
        self.records.add(&record, keys)?;
        Ok(output)
    }
}

/// What is known of a step when it is done.
pub(super) struct Step<'s> {
    /// Of the snapshot.
    pub id: String,
    /// What stands for the result in the keys of others.
    pub identity: &'s str,
    /// What people see.
    pub name: &'s str,
    pub below: &'s [Layer],
    /// What it is found by.
    pub keys: &'s [&'s str],
    /// Nanoseconds since the epoch.
    pub created: i64,
}

/// What a step has made.
pub(super) enum Made {
    /// A directory of its own, and the bytes it takes.
    Directory(PathBuf, u64),
    /// A layer of the image store and its bytes; nothing.
    Layer(Option<(Digest, u64)>),
}
