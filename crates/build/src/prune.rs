//! What the cache takes, and giving it back.
//!
//! Invariant: what a build uses now is never taken; caps are of bytes on disk that the cache alone costs: what an image
//! has as well counts nothing, for removing it would give nothing back.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::time::Duration;

use brigantine_image::Digest;
use serde::Serialize;

use crate::Builder;
use crate::caches::CacheMount;
use crate::error::{Context as _, Result};
use crate::records::now;
use crate::snapshot::remove_tree;

/// One object of the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    pub id: String,
    /// `regular` for a step's result, `exec.cachemount` for a cache mount, `source.local` for a client's context.
    pub kind: String,
    pub description: String,
    pub in_use: bool,
    /// An image uses it as well: removing it from the cache gives back nothing.
    pub shared: bool,
    /// Bytes on disk.
    pub size: u64,
    /// Nanoseconds since the epoch.
    pub created: i64,
    pub used: i64,
    pub uses: u64,
}

/// Which objects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Only what was not used for so long.
    pub unused_for: Option<Duration>,
    /// Only these kinds.
    pub kinds: Vec<String>,
    /// Only these ids.
    pub ids: Vec<String>,
    /// Only what an image uses as well, or only what none does.
    pub shared: Option<bool>,
    /// Only those whose description has this in it.
    pub description: Option<String>,
}

/// How much may stay, in bytes; 0 is no limit, and nothing stays where all are 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Space {
    /// Stays in any case.
    pub reserved: u64,
    pub max_used: u64,
    /// To be free on the disk.
    pub min_free: u64,
}

impl Space {
    /// What may stay of `total` bytes while `free` are free.
    fn keep(self, total: u64, free: u64) -> u64 {
        if self == Self::default() {
            return 0;
        }
        let mut keep = if self.max_used == 0 { u64::MAX } else { self.max_used };
        let lacking = self.min_free.saturating_sub(free);
        if lacking > 0 {
            keep = keep.min(total.saturating_sub(lacking));
        }
        keep.max(self.reserved)
    }
}

/// What to take.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prune {
    /// Cache mounts, too.
    pub all: bool,
    pub chosen: Chosen,
    pub space: Space,
}

/// What was taken.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    pub deleted: Vec<String>,
    /// Bytes given back.
    pub reclaimed: u64,
}

impl Chosen {
    fn takes(&self, entry: &Entry, before: Option<i64>) -> bool {
        before.is_none_or(|before| entry.used < before)
            && (self.kinds.is_empty() || self.kinds.contains(&entry.kind))
            && (self.ids.is_empty() || self.ids.iter().any(|id| entry.id.starts_with(id.as_str())))
            && self.shared.is_none_or(|shared| entry.shared == shared)
            && self.description.as_ref().is_none_or(|part| entry.description.contains(part.as_str()))
    }
}

fn described(cache: &CacheMount) -> String {
    let CacheMount { id, namespace, .. } = cache;
    if namespace.is_empty() {
        format!("cache mount {id}")
    } else {
        format!("cache mount {id} in the namespace {namespace}")
    }
}

impl Builder {
    /// Everything the cache holds, least recently used first. Blocks.
    pub fn usage(&self) -> Result<Vec<Entry>> {
        let solver = self.solver();
        let images = solver.store.list().doing(|| "list the images".to_owned())?;
        let of_images: HashSet<&str> =
            images.iter().flat_map(|image| &image.config.rootfs.diff_ids).map(Digest::as_str).collect();
        let mut entries: Vec<Entry> = solver
            .records
            .all()?
            .into_iter()
            .map(|snapshot| Entry {
                in_use: solver.in_use(&snapshot.id),
                kind: "regular".to_owned(),
                description: snapshot.name,
                shared: snapshot.diff_id.as_deref().is_some_and(|diff_id| of_images.contains(diff_id)),
                size: snapshot.size,
                created: snapshot.created,
                used: snapshot.used,
                uses: snapshot.uses,
                id: snapshot.id,
            })
            .collect();
        entries.extend(solver.caches.list().into_iter().map(|(id, cache)| Entry {
            id,
            kind: "exec.cachemount".to_owned(),
            description: described(&cache),
            in_use: cache.in_use,
            shared: false,
            size: cache.size,
            created: cache.used,
            used: cache.used,
            uses: 0,
        }));
        entries.extend(solver.contexts.list().into_iter().map(|context| Entry {
            description: "local source for context".to_owned(),
            kind: "source.local".to_owned(),
            in_use: context.in_use,
            shared: false,
            size: context.size,
            created: context.used,
            used: context.used,
            uses: 0,
            id: context.id,
        }));
        entries.extend(solver.downloads.list().into_iter().map(|(id, size, used)| Entry {
            description: format!("download {}", id.get(..12).unwrap_or(&id)),
            kind: "source.http".to_owned(),
            in_use: false,
            shared: false,
            size,
            created: used,
            used,
            uses: 0,
            id,
        }));
        entries.sort_by_key(|entry| entry.used);
        Ok(entries)
    }

    /// The cache mounts. Blocks.
    pub fn cache_mounts(&self) -> Vec<CacheMount> {
        self.solver().caches.list().into_iter().map(|(_, mount)| mount).collect()
    }

    /// Whether there is such a cache mount and no build uses it now. Blocks.
    pub fn cache_is_free(&self, namespace: &str, id: &str) -> Result<()> {
        self.solver().caches.free(namespace, id)
    }

    /// Writes what is in a cache mount as an archive. Blocks.
    pub fn export_cache(&self, namespace: &str, id: &str, output: impl Write) -> Result<()> {
        self.solver().caches.export(namespace, id, output)
    }

    /// Puts what an archive holds in place of a cache mount's contents. Blocks.
    pub fn import_cache(&self, namespace: &str, id: &str, input: impl Read) -> Result<()> {
        self.solver().caches.import(namespace, id, input)
    }

    /// Gives back what is asked for, what was used longest ago first. Blocks.
    pub fn prune(&self, wanted: &Prune) -> Result<Pruned> {
        let solver = self.solver();
        let entries = self.usage()?;
        let mut total: u64 = entries.iter().filter(|entry| !entry.shared).map(|entry| entry.size).sum();
        let keep = wanted.space.keep(total, self.free()?);
        let mut pruned = Pruned::default();
        let before = wanted
            .chosen
            .unused_for
            .map(|age| now().saturating_sub(i64::try_from(age.as_nanos()).unwrap_or(i64::MAX)));
        for entry in entries {
            let all = wanted.all || !wanted.chosen.kinds.is_empty();
            let capped = wanted.space != Space::default();
            if entry.in_use
                || !(all || entry.kind != "exec.cachemount")
                || !wanted.chosen.takes(&entry, before)
                || (capped && (total <= keep || entry.shared))
            {
                continue;
            }
            let reclaimed = match entry.kind.as_str() {
                "regular" => {
                    solver.records.remove(&entry.id)?;
                    remove_tree(&solver.snapshots.join(&entry.id));
                    if entry.shared { 0 } else { entry.size }
                }
                "source.local" => solver.contexts.remove(&entry.id),
                "source.http" => solver.downloads.remove(&entry.id),
                _ => solver.caches.remove(&entry.id),
            };
            if !entry.shared {
                total = total.saturating_sub(entry.size);
            }
            pruned.reclaimed += reclaimed;
            pruned.deleted.push(entry.id);
        }
        Ok(pruned)
    }

    /// Bytes of the disk that the cache is on.
    pub(crate) fn disk(&self) -> Result<u64> {
        let stat = rustix::fs::statvfs(self.data()).doing(|| format!("stat {}", self.data().display()))?;
        Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
    }

    /// Bytes that are free where the cache is.
    fn free(&self) -> Result<u64> {
        let stat = rustix::fs::statvfs(self.data()).doing(|| format!("stat {}", self.data().display()))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caps_are_buildkits() {
        let space = |reserved, max_used, min_free| Space { reserved, max_used, min_free };
        for (limits, total, free, kept) in [
            (space(0, 0, 0), 100, 0, 0),
            (space(0, 60, 0), 100, 0, 60),
            (space(80, 60, 0), 100, 0, 80),
            (space(10, 0, 0), 100, 0, u64::MAX),
            (space(0, 0, 50), 100, 60, u64::MAX),
            (space(0, 0, 50), 100, 20, 70),
            (space(90, 0, 50), 100, 20, 90),
            (space(0, 60, 50), 100, 40, 60),
            (space(0, 0, 500), 100, 0, 0),
        ] {
            assert_eq!(limits.keep(total, free), kept, "{limits:?}");
        }
    }
}
