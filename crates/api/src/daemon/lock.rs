//! One daemon per root: private directories, the lock on the data root, the pid file.
//!
//! Invariant: the lock is held as long as the daemon lives and vanishes with it, however it ends.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Why the daemon may not run here.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("{operation} {}", .path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("another daemon{} uses {}", pid_text(*.pid), .path.display())]
    Held { path: PathBuf, pid: Option<u32> },
    #[error("the pid file {} names process {pid}, which is running: end it, or choose another --pidfile", .path.display())]
    PidFile { path: PathBuf, pid: u32 },
}

fn pid_text(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
}

/// Creates a directory of mode 0700, and takes every right from others when it is there.
pub fn private_dir(path: &Path) -> Result<(), LockError> {
    let io = |operation| move |source| LockError::Io { operation, path: path.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io("create"))?;
    let mode = std::fs::metadata(path).map_err(io("look at"))?.permissions().mode();
    if mode & 0o077 != 0 {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
            .map_err(io("change the mode of"))?;
    }
    Ok(())
}

/// The hold on a data root.
#[derive(Debug)]
pub struct RootLock {
    _file: File,
}

impl RootLock {
    /// Takes the lock, or says who has it.
    pub fn take(root: &Path) -> Result<Self, LockError> {
        let path = root.join("daemon.lock");
        let io = |operation| {
            let path = path.clone();
            move |source| LockError::Io { operation, path, source }
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io("open"))?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let pid = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                return Err(LockError::Held { path: root.to_owned(), pid });
            }
            Err(error) => return Err(io("lock")(error.into())),
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(io("write"))?;
        writeln!(file, "{}", std::process::id()).map_err(io("write"))?;
        Ok(Self { _file: file })
    }
}

/// The pid file; removed when dropped.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
}

impl PidFile {
    pub fn write(path: &Path) -> Result<Self, LockError> {
        let io = |operation| move |source| LockError::Io { operation, path: path.to_owned(), source };
        let ours = std::process::id();
        let named: Option<u32> = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
        if let Some(pid) = named.filter(|pid| *pid != ours && is_daemon(*pid)) {
            return Err(LockError::PidFile { path: path.to_owned(), pid });
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(io("create the directory of"))?;
        }
        std::fs::write(path, format!("{ours}\n")).map_err(io("write"))?;
        Ok(Self { path: path.to_owned() })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "removing the pid file");
        }
    }
}

/// Whether that process runs this same program: a pid that was given to another program since does not count, nor
/// does a daemon that was killed and that nobody has reaped yet (it has no executable any more).
fn is_daemon(pid: u32) -> bool {
    let name = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok();
    let lives = std::fs::read_link(format!("/proc/{pid}/exe")).is_ok();
    lives && name(&pid.to_string()).is_some_and(|theirs| Some(theirs) == name("self"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let held = RootLock::take(dir.path()).unwrap();
        let error = RootLock::take(dir.path()).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("another daemon (process {}) uses ", std::process::id())),
            "{error}"
        );
        drop(held);
        RootLock::take(dir.path()).unwrap();
    }

    #[test]
    fn roots_become_private() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/b");
        std::fs::create_dir_all(&root).unwrap();
        std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o755)).unwrap();
        private_dir(&root).unwrap();
        assert_eq!(std::fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_stale_pid_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        std::fs::write(&path, "4194303\n").unwrap();
        let pidfile = PidFile::write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        drop(pidfile);
        assert!(!path.exists());
    }
}
