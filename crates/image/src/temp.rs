//! What is being made: files and directories under the store's `tmp/` that become visible only by a rename.
//!
//! Invariant: each is locked (flock) by its maker for as long as it is being made, so that a sweep can tell what a
//! crash left behind from what is alive, across threads and processes.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::error::{IoContext as _, Result};
use crate::tree;

/// Prefix of partial downloads, which survive a restart.
pub(crate) const PARTIAL: &str = "partial-";
/// A partial download nobody came back for.
const PARTIAL_LIFETIME: Duration = Duration::from_hours(7 * 24);

static COUNTER: AtomicU64 = AtomicU64::new(0);

fn fresh_name(kind: &str) -> String {
    let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("{kind}-{:x}-{count:x}-{nanos:x}", std::process::id())
}

/// A new file in `tmp/`, removed on drop unless it was kept.
#[derive(Debug)]
pub(crate) struct TempFile {
    file: File,
    path: PathBuf,
    keep: bool,
}

impl TempFile {
    pub(crate) fn create(tmp: &Path, kind: &str) -> Result<Self> {
        loop {
            let path = tmp.join(fresh_name(kind));
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .at("create", &path)?;
            if locked_in_place(&file, &path).at("lock", &path)? {
                return Ok(Self { file, path, keep: false });
            }
        }
    }

    /// Opens or makes the file of this name, or nothing when somebody else is writing it.
    pub(crate) fn claim(tmp: &Path, name: &str) -> Result<Option<Self>> {
        let path = tmp.join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .at("open", &path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(None),
            Err(fs::TryLockError::Error(error)) => return Err(error).at("lock", &path),
        }
        if !in_place(&file, &path).at("stat", &path)? {
            return Ok(None);
        }
        Ok(Some(Self { file, path, keep: false }))
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn file_mut(&mut self) -> &mut File {
        &mut self.file
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the file where it is when this is dropped.
    pub(crate) fn keep(&mut self, keep: bool) {
        self.keep = keep;
    }

    /// Makes the content durable, then visible as `target`.
    pub(crate) fn publish(mut self, target: &Path) -> Result<()> {
        self.file.sync_all().at("sync", &self.path)?;
        fs::rename(&self.path, target).at("rename", target)?;
        self.keep = true;
        sync_parent(target)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if !self.keep {
            // Nothing to do about a failure here: the next sweep takes what is left.
            fs::remove_file(&self.path).unwrap_or_default();
        }
    }
}

/// A new directory in `tmp/`, removed with its content on drop unless it was published.
#[derive(Debug)]
pub(crate) struct TempDir {
    lock: File,
    path: PathBuf,
    published: bool,
}

impl TempDir {
    pub(crate) fn create(tmp: &Path, kind: &str) -> Result<Self> {
        loop {
            let path = tmp.join(fresh_name(kind));
            fs::DirBuilder::new().mode(0o700).create(&path).at("create", &path)?;
            let lock = match File::open(&path) {
                Ok(lock) => lock,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).at("open", &path),
            };
            if locked_in_place(&lock, &path).at("lock", &path)? {
                return Ok(Self { lock, path, published: false });
            }
        }
    }

    /// Moves an existing directory into `tmp/`, to be removed when this is dropped.
    pub(crate) fn adopt(tmp: &Path, existing: &Path) -> Result<Self> {
        let lock = File::open(existing).at("open", existing)?;
        lock.lock().at("lock", existing)?;
        let path = tmp.join(fresh_name("removed"));
        fs::rename(existing, &path).at("rename", existing)?;
        Ok(Self { lock, path, published: false })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory visible as `target`; false when `target` is already there.
    pub(crate) fn publish(mut self, target: &Path) -> Result<bool> {
        match fs::rename(&self.path, target) {
            Ok(()) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
                ) =>
            {
                return Ok(false);
            }
            Err(error) => return Err(error).at("rename", target),
        }
        self.published = true;
        sync_parent(target)?;
        Ok(true)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        if !self.published {
            // Nothing to do about a failure here: the next sweep takes what is left.
            tree::remove(&self.path).unwrap_or_default();
        }
        self.lock.unlock().unwrap_or_default();
    }
}

/// So much is written before the disk is told to begin with it.
const WRITEBACK_STEP: u64 = 8 << 20;

/// Has the disk begin with what is written while more comes, so that a sync at the end finds little left to do.
#[derive(Debug, Default)]
pub(crate) struct Writeback {
    begun: u64,
}

impl Writeback {
    /// The file has been written up to here.
    pub(crate) fn reached(&mut self, file: &File, length: u64) {
        if length - self.begun >= WRITEBACK_STEP {
            // No more than speed depends on it: what cannot be written is told by the sync.
            brigantine_sys::fd::begin_writeback(file.as_fd(), self.begun, length - self.begun)
                .unwrap_or_default();
            self.begun = length;
        }
    }
}

pub(crate) fn sync_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent).and_then(|dir| dir.sync_all()).at("sync", parent)
}

fn in_place(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok(there.ino() == ours.ino() && there.dev() == ours.dev()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Locks what was just made; false when a sweep took it before the lock was held.
fn locked_in_place(file: &File, path: &Path) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => in_place(file, path),
        Err(fs::TryLockError::WouldBlock) => Ok(false),
        Err(fs::TryLockError::Error(error)) => Err(error),
    }
}

/// Removes what makers that are gone left behind. What is alive is locked and stays.
pub(crate) fn sweep(tmp: &Path) -> Result<()> {
    for entry in fs::read_dir(tmp).at("read", tmp)? {
        let entry = entry.at("read", tmp)?;
        let path = entry.path();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).at("open", &path),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => continue,
            Err(fs::TryLockError::Error(error)) => return Err(error).at("lock", &path),
        }
        let metadata = file.metadata().at("stat", &path)?;
        if metadata.is_dir() {
            tree::remove(&path).at("remove", &path)?;
            continue;
        }
        let partial = entry.file_name().to_string_lossy().starts_with(PARTIAL);
        let age = metadata.modified().ok().and_then(|at| at.elapsed().ok()).unwrap_or_default();
        if !partial || age > PARTIAL_LIFETIME {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).at("remove", &path);
                }
                _ => {}
            }
        }
    }
    Ok(())
}
