//! The database's schema, as ordered steps; a step is never changed once released, only followed by another.

use std::path::Path;

use rusqlite::Connection;

use super::{DbError, user_version};

/// One step from version `index` to `index + 1`.
const STEPS: &[&str] = &[
    // 1: records as JSON, with the columns that have to be unique.
    "CREATE TABLE containers (key TEXT PRIMARY KEY NOT NULL, name TEXT NOT NULL UNIQUE, record TEXT NOT NULL);
     CREATE TABLE volumes (key TEXT PRIMARY KEY NOT NULL, name TEXT NOT NULL UNIQUE, record TEXT NOT NULL);
     CREATE TABLE networks (key TEXT PRIMARY KEY NOT NULL, name TEXT NOT NULL, record TEXT NOT NULL);
     CREATE INDEX networks_by_name ON networks (name);",
    // 2: projects' sockets.
    "CREATE TABLE sockets (key TEXT PRIMARY KEY NOT NULL, name TEXT NOT NULL UNIQUE, record TEXT NOT NULL);",
];

/// The schema version this engine reads and writes.
pub const CURRENT: i64 = STEPS.len() as i64;

pub(super) fn run(connection: &mut Connection, path: &Path) -> Result<(), DbError> {
    let found = user_version(connection).map_err(|source| DbError::Open { path: path.to_owned(), source })?;
    if found > CURRENT {
        return Err(DbError::TooNew { path: path.to_owned(), found, known: CURRENT });
    }
    let done = usize::try_from(found).unwrap_or_default();
    for (index, step) in STEPS.iter().enumerate().skip(done) {
        let version = index as i64 + 1;
        let migrate = |source| DbError::Migrate { version, source };
        let transaction = connection.transaction().map_err(migrate)?;
        transaction.execute_batch(step).map_err(migrate)?;
        transaction.pragma_update(None, "user_version", version).map_err(migrate)?;
        transaction.commit().map_err(migrate)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_database_gets_all_tables() {
        let mut connection = Connection::open_in_memory().unwrap();
        run(&mut connection, Path::new("memory")).unwrap();
        assert_eq!(user_version(&connection).unwrap(), CURRENT);
        for table in ["containers", "volumes", "networks", "sockets"] {
            let rows: i64 =
                connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap();
            assert_eq!(rows, 0);
        }
        run(&mut connection, Path::new("memory")).unwrap();
    }

    #[test]
    fn version_1_keeps_its_records() {
        let mut connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(STEPS[0]).unwrap();
        connection.pragma_update(None, "user_version", 1).unwrap();
        connection.execute("INSERT INTO volumes VALUES ('a', 'a', '{}')", []).unwrap();
        run(&mut connection, Path::new("memory")).unwrap();
        let count = |table: &str| -> i64 {
            connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
        };
        assert_eq!((count("volumes"), count("sockets")), (1, 0));
    }

    #[test]
    fn a_newer_database_is_refused() {
        let mut connection = Connection::open_in_memory().unwrap();
        connection.pragma_update(None, "user_version", CURRENT + 1).unwrap();
        assert!(matches!(run(&mut connection, Path::new("memory")), Err(DbError::TooNew { .. })));
    }
}
