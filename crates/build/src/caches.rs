//! Cache mounts: directories that outlive builds and are nobody's layer.
//!
//! Invariant: users of a `locked` mount are alone with it, `shared` ones included; turns are given in order of
//! arrival, and several mounts of one step are taken in one order, so that no two steps wait for each other. Whoever
//! uses any instance of a mount holds the whole of it against removal, export and import.

mod carry;

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use brigantine_image::{Algorithm, layer};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

pub use carry::{Carried, Way};

use crate::dockerfile::MountKind;
use crate::error::{Context, Error, Result, invalid};
use crate::graph::{Run, RunMount};

/// All cache mounts of the builder.
#[derive(Debug)]
pub(crate) struct Caches {
    dir: PathBuf,
    turns: Mutex<HashMap<String, Arc<RwLock<()>>>>,
}

/// Mounts of one step, taken.
#[derive(Debug)]
pub(crate) struct Taken {
    /// By the mount's place among the step's mounts.
    pub paths: BTreeMap<usize, PathBuf>,
    turns: Vec<Turn>,
}

#[derive(Debug)]
enum Turn {
    Shared { _guard: OwnedRwLockReadGuard<()> },
    Alone { _guard: OwnedRwLockWriteGuard<()> },
}

/// A cache mount by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountName {
    /// What builds have for `BUILDKIT_CACHE_MOUNT_NS`; empty without it.
    pub namespace: String,
    pub id: String,
}

/// A cache mount as people see it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct CacheMount {
    pub id: String,
    /// See [`MountName`].
    pub namespace: String,
    /// Bytes on disk.
    pub size: u64,
    pub in_use: bool,
    /// Nanoseconds since the epoch.
    #[serde(rename = "LastUsed")]
    pub used: i64,
}

impl Caches {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, turns: Mutex::default() }
    }

    fn turn(&self, name: &str) -> Arc<RwLock<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(turns.entry(name.to_owned()).or_default())
    }

    /// A mount with all its instances: those who use one share it.
    fn whole(&self, name: &str) -> Arc<RwLock<()>> {
        self.turn(&format!("{name}/"))
    }

    /// Takes the cache mounts of a step; waits for those that others have to themselves. One that begins with the
    /// files of a stage is told apart by those files, too: `bases` has the digest of each. It is left to the caller to
    /// put them where nothing is yet.
    pub async fn take(&self, run: &Run, namespace: &str, bases: &BTreeMap<usize, String>) -> Result<Taken> {
        let mut wanted: Vec<(String, usize, String, &RunMount)> = run
            .mounts
            .iter()
            .enumerate()
            .filter(|(_, mount)| mount.kind == MountKind::Cache)
            .map(|(index, mount)| {
                let id = match bases.get(&index) {
                    Some(digest) => format!("{}@{}", mount.id, digest.get(..12).unwrap_or(digest)),
                    None => mount.id.clone(),
                };
                (name(namespace, &id), index, id, mount)
            })
            .collect();
        wanted.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
        let mut taken = Taken { paths: BTreeMap::new(), turns: Vec::new() };
        let mut here: HashMap<String, PathBuf> = HashMap::new();
        for (name, index, id, mount) in wanted {
            // The same cache twice in one step is the same directory.
            if let Some(path) = here.get(&name) {
                taken.paths.insert(index, path.clone());
                continue;
            }
            taken.turns.push(Turn::Shared { _guard: self.whole(&name).read_owned().await });
            let path = match mount.sharing.as_str() {
                "locked" => {
                    taken.turns.push(Turn::Alone { _guard: self.turn(&name).write_owned().await });
                    self.dir.join(&name).join("data")
                }
                "private" => {
                    let (turn, path) = self.free_one(&name);
                    taken.turns.push(turn);
                    path
                }
                _ => {
                    taken.turns.push(Turn::Shared { _guard: self.turn(&name).read_owned().await });
                    self.dir.join(&name).join("data")
                }
            };
            self.prepare(&name, namespace, &id, &path, mount)?;
            here.insert(name, path.clone());
            taken.paths.insert(index, path);
        }
        Ok(taken)
    }

    /// The first instance nobody uses.
    fn free_one(&self, name: &str) -> (Turn, PathBuf) {
        let mut number = 0;
        loop {
            let (turn, path) = match number {
                0 => (self.turn(name), self.dir.join(name).join("data")),
                n => (self.turn(&format!("{name}.{n}")), self.dir.join(name).join(format!("data.{n}"))),
            };
            if let Ok(guard) = turn.try_write_owned() {
                return (Turn::Alone { _guard: guard }, path);
            }
            number += 1;
        }
    }

    fn prepare(&self, name: &str, namespace: &str, id: &str, path: &PathBuf, mount: &RunMount) -> Result<()> {
        let top = self.dir.join(name);
        let what = || format!("make the cache mount {id}");
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&top).doing(what)?;
        label(&top, namespace, id).doing(what)?;
        if mount.input.is_some() {
            return Ok(());
        }
        match std::fs::create_dir(path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
            other => other.doing(what)?,
        }
        std::os::unix::fs::chown(path, Some(mount.uid), Some(mount.gid)).doing(what)?;
        let mode = std::fs::Permissions::from_mode(mount.mode.unwrap_or(0o755));
        std::fs::set_permissions(path, mode).doing(what)
    }

    /// All cache mounts there are.
    pub fn list(&self) -> Vec<(String, CacheMount)> {
        let mut found = Vec::new();
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return found };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let text = |file: &str| std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            let (id, namespace) = (text("id"), text("namespace"));
            let used = std::fs::metadata(entry.path().join("id"))
                .and_then(|metadata| metadata.modified())
                .ok()
                .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
                .map_or(0, |age| i64::try_from(age.as_nanos()).unwrap_or(i64::MAX));
            let in_use = self.whole(&name).try_write().is_err();
            let size = crate::snapshot::disk_usage(&entry.path());
            found.push((name, CacheMount { id, namespace, size, in_use, used }));
        }
        found
    }

    /// Whether there is such a cache mount and no build uses it now.
    pub fn free(&self, namespace: &str, id: &str) -> Result<()> {
        if !self.dir.join(name(namespace, id)).join("data").is_dir() {
            return Err(Error::NotFound(format!(
                "there is no cache mount {id:?}: see brig builder cache ls"
            )));
        }
        self.idle(namespace, id)
    }

    /// Whether no build uses the cache mount now, if there is one.
    pub fn idle(&self, namespace: &str, id: &str) -> Result<()> {
        self.whole(&name(namespace, id)).try_write().map(drop).map_err(|_taken| in_use(id))
    }

    /// Writes what is in a cache mount as an archive. It is not given to a build meanwhile. Blocks.
    pub fn export(&self, namespace: &str, id: &str, output: impl Write) -> Result<()> {
        self.free(namespace, id)?;
        let name = name(namespace, id);
        let whole = self.whole(&name);
        let _alone = whole.try_write().map_err(|_taken| in_use(id))?;
        layer::pack(&self.dir.join(&name).join("data"), output)
            .map(drop)
            .map_err(|error| Error::Executor(format!("export the cache mount {id}: {error}")))
    }

    /// Puts what an archive holds in place of a cache mount's contents; the mount is made if there is none. What was
    /// there stays until the archive was read to its end. Blocks.
    pub fn import(&self, namespace: &str, id: &str, input: impl Read) -> Result<()> {
        let what = || format!("import the cache mount {id}");
        let name = name(namespace, id);
        let whole = self.whole(&name);
        let _alone = whole.try_write().map_err(|_taken| in_use(id))?;
        let top = self.dir.join(&name);
        let new = top.join("new");
        crate::snapshot::remove_tree(&new);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&top).doing(what)?;
        std::fs::DirBuilder::new().mode(0o755).create(&new).doing(what)?;
        if let Err(error) = layer::apply_tree(input, &new, Algorithm::Sha256) {
            crate::snapshot::remove_tree(&new);
            return Err(invalid(format!("import the cache mount {id}: {error}")));
        }
        label(&top, namespace, id).doing(what)?;
        // At once: there is never a moment without either.
        let data = top.join("data");
        if data.is_dir() {
            let (from, to) = (rustix::fs::CWD, rustix::fs::CWD);
            rustix::fs::renameat_with(from, &new, to, &data, rustix::fs::RenameFlags::EXCHANGE)
                .doing(what)?;
            crate::snapshot::remove_tree(&new);
        } else {
            std::fs::rename(&new, &data).doing(what)?;
        }
        Ok(())
    }

    /// Removes a cache mount that nobody uses; the bytes it gave back.
    pub fn remove(&self, name: &str) -> u64 {
        let whole = self.whole(name);
        let Ok(_alone) = whole.try_write() else { return 0 };
        let path = self.dir.join(name);
        let size = crate::snapshot::disk_usage(&path);
        crate::snapshot::remove_tree(&path);
        size
    }
}

/// Notes beside a mount's data which one it is, for people: its directory's name is a digest of both.
fn label(top: &Path, namespace: &str, id: &str) -> std::io::Result<()> {
    if !namespace.is_empty() {
        std::fs::write(top.join("namespace"), namespace)?;
    }
    std::fs::write(top.join("id"), id)
}

fn in_use(id: &str) -> Error {
    Error::Busy(format!("the cache mount {id} is in use by a build: try again when it has ended"))
}

fn name(namespace: &str, id: &str) -> String {
    let mut hasher = Sha256::new();
    hasher.update(format!("{}:{namespace}{id}", namespace.len()));
    hex::encode(&hasher.finalize()[..16])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_move_by_archive_and_a_bad_archive_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let caches = Caches::new(dir.path().join("caches"));
        std::fs::create_dir(dir.path().join("caches")).unwrap();
        let missing = caches.export("", "/c", std::io::sink()).unwrap_err();
        assert!(matches!(missing, Error::NotFound(_)), "{missing}");
        let data = caches.dir.join(name("", "/c")).join("data");
        std::fs::create_dir_all(&data).unwrap();
        std::fs::write(data.join("a"), "kept").unwrap();
        let mut archive = Vec::new();
        caches.export("", "/c", &mut archive).unwrap();
        caches.import("other", "/d", &archive[..]).unwrap();
        let copy = caches.dir.join(name("other", "/d")).join("data/a");
        assert_eq!(std::fs::read_to_string(&copy).unwrap(), "kept");
        assert!(caches.import("other", "/d", &archive[..700]).is_err());
        assert!(caches.import("other", "/d", &b"no archive at all"[..]).is_err());
        assert_eq!(std::fs::read_to_string(&copy).unwrap(), "kept");
        let names: Vec<_> = std::fs::read_dir(copy.parent().unwrap().parent().unwrap()).unwrap().collect();
        assert_eq!(names.len(), 3, "only the data and its names are left: {names:?}");
        std::fs::write(&copy, "changed").unwrap();
        caches.import("other", "/d", &archive[..]).unwrap();
        assert_eq!(std::fs::read_to_string(&copy).unwrap(), "kept");
        let names = std::fs::read_dir(copy.parent().unwrap().parent().unwrap()).unwrap();
        assert_eq!(names.count(), 3, "what was replaced is gone");
        let listed: Vec<_> =
            caches.list().into_iter().map(|(_, mount)| (mount.namespace, mount.id)).collect();
        assert!(listed.contains(&("other".to_owned(), "/d".to_owned())), "{listed:?}");
        let whole = caches.whole(&name("", "/c"));
        let _held = whole.try_read().unwrap();
        assert!(matches!(caches.export("", "/c", std::io::sink()), Err(Error::Busy(_))));
        assert!(matches!(caches.import("", "/c", &archive[..]), Err(Error::Busy(_))));
    }
}
