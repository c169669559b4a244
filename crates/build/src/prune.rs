//! What the cache takes, and giving it back.
//!
//! Invariant: what a build uses now is never taken; caps are of bytes on disk.

use std::io::{Read, Write};
use std::time::Duration;

use serde::Serialize;

use crate::Builder;
use crate::caches::CacheMount;
use crate::error::Result;
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

/// What to take.
#[derive(Debug, Clone, Default)]
pub struct Prune {
    /// Cache mounts and what was used lately too.
    pub all: bool,
    /// Only what was not used for so long.
    pub unused_for: Option<Duration>,
    /// Bytes that may stay, the most recently used first.
    pub keep: Option<u64>,
    /// Only these kinds.
    pub kinds: Vec<String>,
    /// Only these ids.
    pub ids: Vec<String>,
}

/// What was taken.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    pub deleted: Vec<String>,
    /// Bytes given back.
    pub reclaimed: u64,
}

impl Builder {
    /// Everything the cache holds, least recently used first. Blocks.
    pub fn usage(&self) -> Result<Vec<Entry>> {
        let solver = self.solver();
        let mut entries: Vec<Entry> = solver
            .records
            .all()?
            .into_iter()
            .map(|snapshot| Entry {
                in_use: solver.in_use(&snapshot.id),
                kind: "regular".to_owned(),
                description: snapshot.name,
                shared: snapshot.diff_id.is_some(),
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
            description: format!("cache mount {}", cache.id),
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

    /// Gives back what is asked for. Blocks.
    pub fn prune(&self, wanted: &Prune) -> Result<Pruned> {
        let solver = self.solver();
        let entries = self.usage()?;
        let mut total: u64 = entries.iter().map(|entry| entry.size).sum();
        let mut pruned = Pruned::default();
        let before = wanted
            .unused_for
            .map(|age| now().saturating_sub(i64::try_from(age.as_nanos()).unwrap_or(i64::MAX)));
        for entry in entries {
            let chosen = !entry.in_use
                && (wanted.all || entry.kind != "exec.cachemount" || !wanted.kinds.is_empty())
                && before.is_none_or(|before| entry.used < before)
                && (wanted.kinds.is_empty() || wanted.kinds.contains(&entry.kind))
                && (wanted.ids.is_empty() || wanted.ids.iter().any(|id| entry.id.starts_with(id.as_str())))
                && wanted.keep.is_none_or(|keep| total > keep);
            if !chosen {
                continue;
            }
            let reclaimed = match entry.kind.as_str() {
                "regular" => {
                    solver.records.remove(&entry.id)?;
                    remove_tree(&solver.snapshots.join(&entry.id));
                    if entry.shared { 0 } else { entry.size }
                }
                "source.local" => solver.contexts.remove(&entry.id),
                _ => solver.caches.remove(&entry.id),
            };
            total = total.saturating_sub(entry.size);
            pruned.reclaimed += reclaimed;
            pruned.deleted.push(entry.id);
        }
        Ok(pruned)
    }
}
