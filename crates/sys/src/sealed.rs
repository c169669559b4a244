//! An executable copied into a sealed memory file: what runs cannot be overwritten through
//! `/proc/self/exe` (CVE-2019-5736) and does not change under a running daemon.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, StatVfsMountFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use crate::executable::Replacement;

/// The running executable seen through a read-only overlay of its own, which has no upper layer: nobody can
/// write to the file through it, and the mount is in no mount namespace, so that nobody can change it. Made
/// without copying a byte, unlike [`SealedExe`], whose guarantee about files that change on disk it does not
/// give. Needs `CAP_SYS_ADMIN`.
#[derive(Debug)]
pub struct VeiledExe {
    fd: OwnedFd,
    /// Closed, it is taken apart, which takes the kernel a tenth of a millisecond.
    mount: OwnedFd,
}

impl VeiledExe {
    /// Fails where it cannot be done: without privileges, on a file system that overlays refuse, or if the
    /// file is gone.
    pub fn from_current() -> io::Result<Self> {
        let path = std::fs::read_link("/proc/self/exe")?;
        let refused = || io::Error::new(io::ErrorKind::Unsupported, "no overlay for this executable");
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { return Err(refused()) };
        // A read-only overlay has two layers at least; neither may be part of the other.
        let apart = |d: &&str| !dir.starts_with(d) && !Path::new(d).starts_with(dir);
        let second = ["/dev", "/run"].into_iter().find(apart).ok_or_else(refused)?;
        // One list and not `lowerdir+` for each: kernels before 6.5 know only this.
        let dir = dir.to_str().filter(|d| !d.contains([':', ',', '\\'])).ok_or_else(refused)?;
        let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_string(&context, "lowerdir", format!("{dir}:{second}"))?;
        rustix::mount::fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
        let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&mount, name, flags, Mode::empty())?;
        // It must be the file that runs, not one put in its place.
        let (veiled, own) = (rustix::fs::fstat(&fd)?, rustix::fs::stat("/proc/self/exe")?);
        if veiled.st_ino != own.st_ino || veiled.st_size != own.st_size {
            return Err(refused());
        }
        Ok(Self { fd, mount })
    }

    /// Whether the running executable is one.
    pub fn is_current() -> bool {
        // Below the root of its own mount, in a read-only overlay.
        let at_root = std::fs::read_link("/proc/self/exe").is_ok_and(|p| p.parent() == Some(Path::new("/")));
        let read_only = |s: rustix::fs::StatVfs| s.f_flag.contains(StatVfsMountFlags::RDONLY);
        at_root
            && rustix::fs::statfs("/proc/self/exe").is_ok_and(|s| s.f_type as u64 == OVERLAY_MAGIC)
            && rustix::fs::statvfs("/proc/self/exe").is_ok_and(read_only)
    }

    /// What this process or a clone of it does to go on as one that was executed from it: a tenth of the time that an
    /// exec takes. Where that cannot be, execute [`Self::path`].
    pub fn into_replacement(self) -> Result<Replacement, Self> {
        match Replacement::by(self.fd.as_fd()) {
            Ok(found) => Ok(found.of(self.fd, self.mount)),
            Err(_) => Err(self),
        }
    }

    /// A path by which this process can execute it.
    pub fn path(&self) -> std::path::PathBuf {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd()).into()
    }
}

const OVERLAY_MAGIC: u64 = 0x794c_7630;

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
        seal(&file)?;
        Ok(Self { fd: file.into() })
    }

    /// A path by which this process (and a child of it, before its exec) can execute the copy.
    pub fn path(&self) -> std::path::PathBuf {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd()).into()
    }
}

const ALL_SEALS: SealFlags =
    SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);

/// Seals a memory file. The kernel refuses for as long as somebody else holds one of its pages, which it does itself
/// while it moves them about (`memfd_wait_for_pins` in Linux's mm/memfd.c): then it is tried again, for a second at most.
fn seal(file: &File) -> io::Result<()> {
    const TRIES: u32 = 50;
    for _ in 1..TRIES {
        match rustix::fs::fcntl_add_seals(file, ALL_SEALS) {
            Err(rustix::io::Errno::BUSY) => std::thread::sleep(std::time::Duration::from_millis(20)),
            other => return Ok(other?),
        }
    }
    Ok(rustix::fs::fcntl_add_seals(file, ALL_SEALS)?)
}

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
    fn a_veiled_executable_cannot_be_written() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let exe = VeiledExe::from_current().unwrap();
        let error = std::fs::OpenOptions::new().write(true).open(exe.path()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        assert!(!VeiledExe::is_current());
        let out = std::process::Command::new(exe.path()).arg("--list").output().unwrap();
        assert!(out.status.success());
    }

    #[test]
    fn a_sealed_copy_runs() {
        let exe = SealedExe::from_path(Path::new("/bin/true")).unwrap();
        assert!(std::process::Command::new(exe.path()).status().unwrap().success());
    }
}
