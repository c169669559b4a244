//! What the builder knows: snapshots, and the keys that lead to them. SQLite, a file of its own beside the engine's.
//!
//! Invariant: a key is believed only while its snapshot is there and whole; one made in another boot of the machine
//! and never synced is not.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rusqlite::{Connection, OptionalExtension as _, params};

use crate::error::{Context, Error, Result};
use crate::history::{self, BuildRecord};

/// Ordered changes of the schema; the number of those applied is the file's `user_version`.
const MIGRATIONS: &[&str] = &[
    "CREATE TABLE snapshots (
        id TEXT PRIMARY KEY,
        identity TEXT NOT NULL,
        name TEXT NOT NULL,
        kind TEXT NOT NULL,
        diff_id TEXT,
        empty INTEGER NOT NULL,
        size INTEGER NOT NULL,
        created INTEGER NOT NULL,
        used INTEGER NOT NULL,
        uses INTEGER NOT NULL,
        unsettled TEXT
     ) STRICT;
     CREATE TABLE keys (
        key TEXT PRIMARY KEY,
        snapshot TEXT NOT NULL REFERENCES snapshots(id) ON DELETE CASCADE
     ) STRICT;
     CREATE INDEX keys_by_snapshot ON keys(snapshot);
     CREATE TABLE parts (
        step TEXT PRIMARY KEY,
        parts TEXT NOT NULL
     ) STRICT;",
    "CREATE TABLE builds (
        id TEXT PRIMARY KEY,
        started INTEGER NOT NULL,
        record TEXT NOT NULL
     ) STRICT;",
];

/// A snapshot on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub id: String,
    /// What stands for it in the keys of what uses it: the same for the same result made again.
    pub identity: String,
    /// The step that made it.
    pub name: String,
    /// `layer` or `cache`.
    pub kind: String,
    /// The layer it has become in the image store.
    pub diff_id: Option<String>,
    /// The step changed no file: there is no directory.
    pub empty: bool,
    /// Bytes on disk.
    pub size: u64,
    /// Nanoseconds since the epoch.
    pub created: i64,
    pub used: i64,
    pub uses: u64,
}

/// The database.
#[derive(Debug)]
pub(crate) struct Records {
    connection: Mutex<Connection>,
}

pub(crate) fn now() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

fn boot_id() -> &'static str {
    static BOOT: OnceLock<String> = OnceLock::new();
    BOOT.get_or_init(|| {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
    })
}

impl Records {
    pub fn open(path: &Path) -> Result<Self> {
        let what = || format!("open the builder's records {}", path.display());
        let mut connection = Connection::open(path).doing(what)?;
        connection.pragma_update(None, "journal_mode", "WAL").doing(what)?;
        connection.pragma_update(None, "synchronous", "NORMAL").doing(what)?;
        connection.pragma_update(None, "foreign_keys", "ON").doing(what)?;
        let version: u32 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).doing(what)?;
        for (number, migration) in (1_u32..).zip(MIGRATIONS).skip(version as usize) {
            let transaction = connection.transaction().doing(what)?;
            transaction.execute_batch(migration).doing(what)?;
            transaction.pragma_update(None, "user_version", number).doing(what)?;
            transaction.commit().doing(what)?;
        }
        // What a power cut may have torn is forgotten; its directory goes with the sweep.
        connection
            .execute("DELETE FROM snapshots WHERE unsettled IS NOT NULL AND unsettled <> ?1", [boot_id()])
            .doing(what)?;
        Ok(Self { connection: Mutex::new(connection) })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The snapshot a key leads to.
    pub fn find(&self, key: &str) -> Result<Option<Snapshot>> {
        let connection = self.lock();
        let mut statement = connection
            .prepare_cached(
                "SELECT s.id, s.identity, s.name, s.kind, s.diff_id, s.empty, s.size, s.created, s.used, s.uses
                 FROM keys k JOIN snapshots s ON s.id = k.snapshot WHERE k.key = ?1",
            )
            .doing(|| "look up a cache key".to_owned())?;
        statement.query_row([key], row).optional().doing(|| "look up a cache key".to_owned())
    }

    /// All keys that lead to a snapshot, in order.
    pub fn keys_of(&self, id: &str) -> Result<Vec<String>> {
        let what = || "list the keys of a step's result".to_owned();
        let connection = self.lock();
        let mut statement = connection
            .prepare_cached("SELECT key FROM keys WHERE snapshot = ?1 ORDER BY key LIMIT 32")
            .doing(what)?;
        statement.query_map([id], |row| row.get(0)).doing(what)?.collect::<rusqlite::Result<_>>().doing(what)
    }

    /// Records a finished snapshot under its keys.
    pub fn add(&self, snapshot: &Snapshot, keys: &[&str]) -> Result<()> {
        let what = || "record a step's result".to_owned();
        let mut connection = self.lock();
        let transaction = connection.transaction().doing(what)?;
        transaction
            .execute(
                "INSERT INTO snapshots (id, identity, name, kind, diff_id, empty, size, created, used, uses, unsettled)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
                params![
                    snapshot.id,
                    snapshot.identity,
                    snapshot.name,
                    snapshot.kind,
                    snapshot.diff_id,
                    snapshot.empty,
                    i64::try_from(snapshot.size).unwrap_or(i64::MAX),
                    snapshot.created,
                    snapshot.used,
                    i64::try_from(snapshot.uses).unwrap_or(i64::MAX),
                    boot_id(),
                ],
            )
            .doing(what)?;
        for key in keys {
            transaction
                .execute(
                    "INSERT OR REPLACE INTO keys (key, snapshot) VALUES (?1, ?2)",
                    params![key, snapshot.id],
                )
                .doing(what)?;
        }
        transaction.commit().doing(what)
    }

    /// Bytes of a snapshot; `None` when it is not on record.
    pub fn size(&self, id: &str) -> Option<u64> {
        let found = self
            .lock()
            .query_row("SELECT size FROM snapshots WHERE id = ?1", [id], |row| row.get::<_, i64>(0));
        found.ok().map(i64::unsigned_abs)
    }

    /// One more key of a snapshot.
    pub fn alias(&self, key: &str, id: &str) -> Result<()> {
        self.lock()
            .execute(
                "INSERT OR REPLACE INTO keys (key, snapshot) SELECT ?1, id FROM snapshots WHERE id = ?2",
                [key, id],
            )
            .map(drop)
            .doing(|| "record a cache key".to_owned())
    }

    /// Notes that snapshots were used now.
    pub fn used(&self, ids: &[String]) -> Result<()> {
        let what = || "note the use of the cache".to_owned();
        let mut connection = self.lock();
        let transaction = connection.transaction().doing(what)?;
        for id in ids {
            transaction
                .execute("UPDATE snapshots SET used = ?1, uses = uses + 1 WHERE id = ?2", params![now(), id])
                .doing(what)?;
        }
        transaction.commit().doing(what)
    }

    /// Notes which layer of the image store a snapshot has become.
    pub fn adopted(&self, id: &str, diff_id: &str) -> Result<()> {
        self.lock()
            .execute("UPDATE snapshots SET diff_id = ?1 WHERE id = ?2", [diff_id, id])
            .map(drop)
            .doing(|| "note a step's layer".to_owned())
    }

    pub fn remove(&self, id: &str) -> Result<()> {
        self.lock()
            .execute("DELETE FROM snapshots WHERE id = ?1", [id])
            .map(drop)
            .doing(|| "forget a step's result".to_owned())
    }

    /// All snapshots, least recently used first.
    pub fn all(&self) -> Result<Vec<Snapshot>> {
        let what = || "list the build cache".to_owned();
        let connection = self.lock();
        let mut statement = connection
            .prepare_cached("SELECT id, identity, name, kind, diff_id, empty, size, created, used, uses FROM snapshots ORDER BY used, created")
            .doing(what)?;
        statement.query_map([], row).doing(what)?.collect::<rusqlite::Result<_>>().doing(what)
    }

    /// Everything so far is on disk: call after a sync of the file system.
    pub fn settled(&self, until: i64) -> Result<()> {
        self.lock()
            .execute("UPDATE snapshots SET unsettled = NULL WHERE created <= ?1", [until])
            .map(drop)
            .doing(|| "note that the cache is on disk".to_owned())
    }

    /// Notes a build that has ended; the oldest ones are forgotten.
    pub fn add_build(&self, build: &BuildRecord) -> Result<()> {
        let what = || "note a build".to_owned();
        let text = serde_json::to_string(build)
            .map_err(|error| Error::Executor(format!("note a build: {error}")))?;
        let connection = self.lock();
        connection
            .execute(
                "INSERT OR REPLACE INTO builds (id, started, record) VALUES (?1, ?2, ?3)",
                params![build.id, build.started, text],
            )
            .doing(what)?;
        connection
            .execute(
                "DELETE FROM builds WHERE id NOT IN (SELECT id FROM builds ORDER BY started DESC LIMIT ?1)",
                [i64::try_from(history::MOST).unwrap_or(i64::MAX)],
            )
            .map(drop)
            .doing(what)
    }

    /// The builds on record, the latest first.
    pub fn builds(&self) -> Result<Vec<BuildRecord>> {
        let what = || "list the builds".to_owned();
        let connection = self.lock();
        let mut statement =
            connection.prepare_cached("SELECT record FROM builds ORDER BY started DESC").doing(what)?;
        let texts: Vec<String> = statement
            .query_map([], |row| row.get(0))
            .doing(what)?
            .collect::<rusqlite::Result<_>>()
            .doing(what)?;
        // A record of another version that cannot be read is nobody's loss.
        Ok(texts.iter().filter_map(|text| serde_json::from_str(text).ok()).collect())
    }

    /// What a step's key was made of the last time it ran, by the step's name.
    pub fn parts(&self, step: &str) -> Result<Option<String>> {
        self.lock()
            .query_row("SELECT parts FROM parts WHERE step = ?1", [step], |row| row.get(0))
            .optional()
            .doing(|| "look up a step".to_owned())
    }

    pub fn set_parts(&self, step: &str, parts: &str) -> Result<()> {
        self.lock()
            .execute("INSERT OR REPLACE INTO parts (step, parts) VALUES (?1, ?2)", [step, parts])
            .map(drop)
            .doing(|| "note a step".to_owned())
    }
}

fn row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Snapshot> {
    Ok(Snapshot {
        id: row.get(0)?,
        identity: row.get(1)?,
        name: row.get(2)?,
        kind: row.get(3)?,
        diff_id: row.get(4)?,
        empty: row.get(5)?,
        size: row.get::<_, i64>(6)?.unsigned_abs(),
        created: row.get(7)?,
        used: row.get(8)?,
        uses: row.get::<_, i64>(9)?.unsigned_abs(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(id: &str) -> Snapshot {
        Snapshot {
            id: id.into(),
            identity: id.into(),
            name: "step".into(),
            kind: "layer".into(),
            diff_id: None,
            empty: false,
            size: 5,
            created: now(),
            used: now(),
            uses: 1,
        }
    }

    #[test]
    fn keys_go_with_their_snapshot_and_unsynced_ones_with_the_boot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("build.db");
        let records = Records::open(&path).unwrap();
        records.add(&snapshot("a"), &["k1", "k2"]).unwrap();
        records.add(&snapshot("b"), &["k2"]).unwrap();
        records.alias("k3", "b").unwrap();
        assert_eq!(records.find("k1").unwrap().unwrap().id, "a");
        assert_eq!(records.find("k2").unwrap().unwrap().id, "b");
        records.remove("b").unwrap();
        assert!(records.find("k2").unwrap().is_none() && records.find("k3").unwrap().is_none());
        records.add(&snapshot("c"), &["k4"]).unwrap();
        records.lock().execute("UPDATE snapshots SET unsettled = 'another boot' WHERE id = 'c'", []).unwrap();
        drop(records);
        let records = Records::open(&path).unwrap();
        assert!(records.find("k4").unwrap().is_none());
        assert_eq!(records.all().unwrap().len(), 1);
    }
}
