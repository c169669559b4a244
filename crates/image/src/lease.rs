//! Leases: what an operation under way is about to refer to, kept from garbage collection.
//!
//! A lease is a file in `leases/`, locked by its owner for as long as it lives. Holding a digest takes the store's
//! lock shared, collecting takes it exclusively: what was held before it was looked for stays until the lease ends.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::digest::Digest;
use crate::error::{IoContext as _, Result};
use crate::temp::TempFile;

/// A hold on digests that ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Lease {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    file: Mutex<TempFile>,
}

impl Lease {
    pub(crate) fn new(root: &Path) -> Result<Self> {
        let file = TempFile::create(&root.join("leases"), "lease")?;
        Ok(Self { inner: Arc::new(Inner { root: root.to_owned(), file: Mutex::new(file) }) })
    }

    /// Keeps a blob, or a layer by its diff id. Hold first, then look whether it is there.
    pub fn hold(&self, digest: &Digest) -> Result<()> {
        let _shared = lock(&self.inner.root, false)?;
        let mut file = self.inner.file.lock().unwrap_or_else(PoisonError::into_inner);
        let path = file.path().to_owned();
        file.file_mut().write_all(format!("{digest}\n").as_bytes()).at("write", path)
    }
}

/// Takes the store's lock until the returned file is dropped. Every call opens the file anew, so that threads of one
/// process exclude each other as processes do.
pub(crate) fn lock(root: &Path, exclusive: bool) -> Result<File> {
    let path = root.join("lock");
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .at("open", &path)?;
    if exclusive { file.lock() } else { file.lock_shared() }.at("lock", &path)?;
    Ok(file)
}

/// All that is held now. Call with the store's lock held exclusively; leases of owners that are gone are removed.
pub(crate) fn held(root: &Path) -> Result<HashSet<Digest>> {
    let dir = root.join("leases");
    let mut all = HashSet::new();
    for entry in fs::read_dir(&dir).at("read", &dir)? {
        let path = entry.at("read", &dir)?.path();
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).at("open", path),
        };
        match file.try_lock() {
            Ok(()) => {
                // A lease that has just been made, and not been locked yet, holds nothing; its maker makes another.
                fs::remove_file(&path).at("remove", &path)?;
                continue;
            }
            Err(fs::TryLockError::WouldBlock) => {}
            Err(fs::TryLockError::Error(error)) => return Err(error).at("lock", path),
        }
        let mut text = String::new();
        file.read_to_string(&mut text).at("read", &path)?;
        all.extend(text.lines().filter_map(|line| line.parse::<Digest>().ok()));
    }
    Ok(all)
}
