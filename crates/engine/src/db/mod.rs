//! The engine's records on disk: one SQLite database, one writer thread.
//!
//! A record is a versioned struct stored as JSON beside the few columns that must be unique. Every acknowledged change
//! is one transaction; changes that arrive while another is being written share the next one (group commit). A change
//! is synced to the disk before its call returns when the caller says [`Durability::Synced`]; the others survive the end of
//! this process but may be lost with the machine's power, and are only used for what is worthless afterwards.

mod migrations;

use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rusqlite::{Connection, OptionalExtension, params};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::oneshot;

/// Which table a record lives in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Table {
    Containers,
    Volumes,
    Networks,
    Sockets,
}

impl Table {
    fn name(self) -> &'static str {
        match self {
            Self::Containers => "containers",
            Self::Volumes => "volumes",
            Self::Networks => "networks",
            Self::Sockets => "sockets",
        }
    }
}

/// Whether a change must survive a power cut before its call returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    Synced,
    Written,
}

/// A failure of the record store.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DbError {
    #[error("open the database {path}")]
    Open { path: PathBuf, source: rusqlite::Error },
    #[error("the database {path} has schema version {found}, newer than this engine's {known}")]
    TooNew { path: PathBuf, found: i64, known: i64 },
    #[error("bring the database to schema version {version}")]
    Migrate { version: i64, source: rusqlite::Error },
    #[error("{what} in the database")]
    Access { what: &'static str, source: rusqlite::Error },
    #[error("record {key} of table {table} cannot be read")]
    Corrupt { table: &'static str, key: String, source: serde_json::Error },
    #[error("encode a record of table {table}")]
    Encode { table: &'static str, source: serde_json::Error },
    #[error("start the database thread")]
    Thread(#[source] std::io::Error),
    #[error("the database is closed")]
    Closed,
}

enum Change {
    Put { table: Table, key: String, name: String, record: String },
    Delete { table: Table, key: String },
}

struct Job {
    changes: Vec<Change>,
    durability: Durability,
    done: oneshot::Sender<Result<(), DbError>>,
}

/// Several changes that become visible, and durable, together.
#[derive(Default)]
pub(crate) struct Batch {
    changes: Vec<Change>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Inserts or replaces a record. `name` must be unique in its table.
    pub(crate) fn put<T: Serialize>(
        mut self,
        table: Table,
        key: &str,
        name: &str,
        record: &T,
    ) -> Result<Self, DbError> {
        let record = serde_json::to_string(record)
            .map_err(|source| DbError::Encode { table: table.name(), source })?;
        self.changes.push(Change::Put { table, key: key.to_owned(), name: name.to_owned(), record });
        Ok(self)
    }

    pub(crate) fn delete(mut self, table: Table, key: &str) -> Self {
        self.changes.push(Change::Delete { table, key: key.to_owned() });
        self
    }
}

/// The record store. Cheap to clone; the writer thread ends when the last handle is dropped.
#[derive(Debug, Clone)]
pub(crate) struct Db {
    jobs: mpsc::Sender<Job>,
}

impl Db {
    /// Opens or creates the database at `path` and brings it to the current schema.
    pub(crate) fn open(path: &Path) -> Result<(Self, Snapshot), DbError> {
        let open_error = |source| DbError::Open { path: path.to_owned(), source };
        let mut connection = Connection::open(path).map_err(open_error)?;
        connection
            .execute_batch("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA busy_timeout=5000;")
            .map_err(open_error)?;
        migrations::run(&mut connection, path)?;
        let snapshot = Snapshot::read(&connection)?;
        let (jobs, queue) = mpsc::channel();
        std::thread::Builder::new()
            .name("records".to_owned())
            .spawn(move || write_loop(connection, &queue))
            .map_err(DbError::Thread)?;
        Ok((Self { jobs }, snapshot))
    }

    /// Applies `batch` some time soon, after everything asked for before; a failure is logged.
    pub(crate) fn post(&self, batch: Batch) {
        let (done, _nobody) = oneshot::channel();
        if self.jobs.send(Job { changes: batch.changes, durability: Durability::Written, done }).is_err() {
            tracing::error!("a change was made after the database had been closed");
        }
    }

    /// Applies `batch` in one transaction.
    pub(crate) async fn apply(&self, batch: Batch, durability: Durability) -> Result<(), DbError> {
        let (done, answer) = oneshot::channel();
        self.jobs
            .send(Job { changes: batch.changes, durability, done })
            .map_err(|_closed| DbError::Closed)?;
        answer.await.map_err(|_closed| DbError::Closed)?
    }
}

/// All records as they were when the database was opened.
pub(crate) struct Snapshot {
    rows: Vec<(Table, String, String)>,
}

impl Snapshot {
    fn read(connection: &Connection) -> Result<Self, DbError> {
        let access = |source| DbError::Access { what: "read the records", source };
        let mut rows = Vec::new();
        for table in [Table::Networks, Table::Volumes, Table::Containers, Table::Sockets] {
            let mut statement = connection
                .prepare(&format!("SELECT key, record FROM {} ORDER BY rowid", table.name()))
                .map_err(access)?;
            let found = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).map_err(access)?;
            for row in found {
                let (key, record): (String, String) = row.map_err(access)?;
                rows.push((table, key, record));
            }
        }
        Ok(Self { rows })
    }

    /// Takes the records of one table, oldest first. One that cannot be read is an error of its own: the others stay usable.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, table: Table) -> Vec<Result<T, DbError>> {
        let (taken, kept) = std::mem::take(&mut self.rows).into_iter().partition(|(of, _, _)| *of == table);
        self.rows = kept;
        let taken: Vec<(Table, String, String)> = taken;
        taken
            .into_iter()
            .map(|(table, key, record)| {
                serde_json::from_str(&record).map_err(|source| DbError::Corrupt {
                    table: table.name(),
                    key,
                    source,
                })
            })
            .collect()
    }
}

/// Writes jobs until every handle is gone; whatever waits when a transaction begins goes into it.
fn write_loop(mut connection: Connection, queue: &mpsc::Receiver<Job>) {
    let mut synced = true;
    while let Ok(first) = queue.recv() {
        let mut jobs = vec![first];
        jobs.extend(queue.try_iter());
        let sync = jobs.iter().any(|job| job.durability == Durability::Synced);
        if sync != synced {
            let pragma = if sync { "PRAGMA synchronous=FULL" } else { "PRAGMA synchronous=NORMAL" };
            match connection.execute_batch(pragma) {
                Ok(()) => synced = sync,
                Err(error) => tracing::error!(%error, "change the database's durability"),
            }
        }
        if jobs.len() > 1 && write(&mut connection, jobs.iter()).is_ok() {
            for job in jobs {
                answer(job.done, Ok(()));
            }
            continue;
        }
        // Alone, or the shared transaction failed: each by itself, so that one job's conflict is its own.
        for job in jobs {
            let outcome = write(&mut connection, std::iter::once(&job));
            answer(job.done, outcome);
        }
    }
}

fn answer(done: oneshot::Sender<Result<(), DbError>>, outcome: Result<(), DbError>) {
    if let Err(Err(error)) = done.send(outcome) {
        tracing::error!(%error, "a change failed whose caller had gone");
    }
}

fn write<'a>(connection: &mut Connection, jobs: impl Iterator<Item = &'a Job>) -> Result<(), DbError> {
    let access = |source| DbError::Access { what: "write records", source };
    let transaction = connection.transaction().map_err(access)?;
    for change in jobs.flat_map(|job| &job.changes) {
        match change {
            Change::Put { table, key, name, record } => {
                let sql = match table {
                    Table::Containers => {
                        "INSERT INTO containers (key, name, record) VALUES (?1, ?2, ?3)
                         ON CONFLICT (key) DO UPDATE SET name = excluded.name, record = excluded.record"
                    }
                    Table::Volumes => {
                        "INSERT INTO volumes (key, name, record) VALUES (?1, ?2, ?3)
                         ON CONFLICT (key) DO UPDATE SET name = excluded.name, record = excluded.record"
                    }
                    Table::Networks => {
                        "INSERT INTO networks (key, name, record) VALUES (?1, ?2, ?3)
                         ON CONFLICT (key) DO UPDATE SET name = excluded.name, record = excluded.record"
                    }
                    Table::Sockets => {
                        "INSERT INTO sockets (key, name, record) VALUES (?1, ?2, ?3)
                         ON CONFLICT (key) DO UPDATE SET name = excluded.name, record = excluded.record"
                    }
                };
                let mut statement = transaction.prepare_cached(sql).map_err(access)?;
                statement.execute(params![key, name, record]).map_err(access)?;
            }
            Change::Delete { table, key } => {
                let sql = match table {
                    Table::Containers => "DELETE FROM containers WHERE key = ?1",
                    Table::Volumes => "DELETE FROM volumes WHERE key = ?1",
                    Table::Networks => "DELETE FROM networks WHERE key = ?1",
                    Table::Sockets => "DELETE FROM sockets WHERE key = ?1",
                };
                transaction.prepare_cached(sql).map_err(access)?.execute([key]).map_err(access)?;
            }
        }
    }
    transaction.commit().map_err(access)
}

/// The version the database says it has.
fn user_version(connection: &Connection) -> Result<i64, rusqlite::Error> {
    connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .optional()
        .map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, serde::Deserialize)]
    struct Thing {
        version: u32,
        text: String,
    }

    fn thing(text: &str) -> Thing {
        Thing { version: 1, text: text.to_owned() }
    }

    #[tokio::test]
    async fn what_was_acknowledged_is_there_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("brig.db");
        let (db, _) = Db::open(&path).unwrap();
        let put = |key: &str, text: &str| Batch::new().put(Table::Volumes, key, key, &thing(text)).unwrap();
        db.apply(put("a", "one"), Durability::Synced).await.unwrap();
        db.apply(put("b", "two"), Durability::Written).await.unwrap();
        db.apply(put("a", "three").delete(Table::Volumes, "b"), Durability::Synced).await.unwrap();
        drop(db);
        let (_db, mut snapshot) = Db::open(&path).unwrap();
        let found: Vec<Thing> = snapshot.take(Table::Volumes).into_iter().map(Result::unwrap).collect();
        assert_eq!(found, [thing("three")]);
    }

    #[tokio::test]
    async fn a_conflict_is_only_its_own_callers() {
        let dir = tempfile::tempdir().unwrap();
        let (db, _) = Db::open(&dir.path().join("brig.db")).unwrap();
        let put = |key: &str, name: &str| {
            db.apply(
                Batch::new().put(Table::Containers, key, name, &thing(key)).unwrap(),
                Durability::Written,
            )
        };
        let (first, second, third) = tokio::join!(put("1", "same"), put("2", "same"), put("3", "other"));
        assert!(first.is_ok());
        assert!(second.is_err());
        assert!(third.is_ok());
    }

    #[tokio::test]
    async fn one_unreadable_record_does_not_hide_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("brig.db");
        let (db, _) = Db::open(&path).unwrap();
        let odd = Batch::new().put(Table::Networks, "1", "odd", &serde_json::json!({"other": true})).unwrap();
        db.apply(odd.put(Table::Networks, "2", "good", &thing("x")).unwrap(), Durability::Synced)
            .await
            .unwrap();
        drop(db);
        let (_db, mut snapshot) = Db::open(&path).unwrap();
        let found = snapshot.take::<Thing>(Table::Networks);
        assert!(matches!(&found[0], Err(DbError::Corrupt { key, .. }) if key == "1"));
        assert_eq!(found[1].as_ref().unwrap(), &thing("x"));
    }
}
