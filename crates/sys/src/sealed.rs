//! An executable copied into a sealed memory file: what runs cannot be overwritten through
//! `/proc/self/exe` (CVE-2019-5736) and does not change under a running daemon.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{MemfdFlags, SealFlags};

/// A sealed in-memory copy of an executable.
#[derive(Debug)]
pub struct SealedExe {
    fd: OwnedFd,
}

impl SealedExe {
    /// Copies the executable at `path`.
    pub fn from_path(path: &Path) -> io::Result<Self> {
        let source = File::open(path)?;
        let name = path.file_name().map_or_else(
            || b"exe".to_vec(),
            |n| {
                use std::os::unix::ffi::OsStrExt;
                n.as_bytes().iter().copied().take(200).collect()
            },
        );
        Self::copy(source, &name)
    }

    /// Copies the running executable.
    pub fn from_current() -> io::Result<Self> {
        Self::copy(File::open("/proc/self/exe")?, b"exe")
    }

    /// Takes over a descriptor that must already be a fully sealed memory file.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let have = rustix::fs::fcntl_get_seals(&fd)?;
        if have.contains(ALL_SEALS) {
            Ok(Self { fd })
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "the executable's memory file is not sealed"))
        }
    }

    fn copy(mut source: File, name: &[u8]) -> io::Result<Self> {
        let name = CString::new(name).unwrap_or_default();
        let fd = match memfd(&name, MemfdFlags::EXEC) {
            // Linux before 6.3 knows no such flag: every memory file is executable there.
            Err(rustix::io::Errno::INVAL) => memfd(&name, MemfdFlags::empty())?,
            other => other?,
        };
        let mut file = File::from(fd);
        io::copy(&mut source, &mut file)?;
        rustix::fs::fcntl_add_seals(&file, ALL_SEALS)?;
        Ok(Self { fd: file.into() })
    }

    /// A path by which this process (and a child of it, before its exec) can execute the copy.
    pub fn path(&self) -> std::path::PathBuf {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd()).into()
    }
}

const ALL_SEALS: SealFlags =
    SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);

fn memfd(name: &CStr, extra: MemfdFlags) -> Result<OwnedFd, rustix::io::Errno> {
    rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | extra)
}

impl AsFd for SealedExe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_sealed_copy_cannot_be_written() {
        let exe = SealedExe::from_current().unwrap();
        let mut again = File::from(exe.fd.try_clone().unwrap());
        assert_eq!(again.write(b"x").unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(std::fs::OpenOptions::new().write(true).truncate(true).open(exe.path()).is_err());
    }

    #[test]
    fn a_sealed_copy_runs() {
        let exe = SealedExe::from_path(Path::new("/bin/true")).unwrap();
        assert!(std::process::Command::new(exe.path()).status().unwrap().success());
    }
}
