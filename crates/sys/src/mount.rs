//! What rustix lacks of the new mount API.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;

use crate::check;

/// `MOUNT_ATTR_…` bits.
pub mod attr {
    pub const RDONLY: u64 = 0x1;
    pub const NOSUID: u64 = 0x2;
    pub const NODEV: u64 = 0x4;
    pub const NOEXEC: u64 = 0x8;
    /// The field of access-time modes; zero in it is relatime.
    pub const ATIME: u64 = 0x70;
    pub const NOATIME: u64 = 0x10;
    pub const STRICTATIME: u64 = 0x20;
    pub const NODIRATIME: u64 = 0x80;
    pub const IDMAP: u64 = 0x0010_0000;
    pub const NOSYMFOLLOW: u64 = 0x0020_0000;
}

/// `MS_…` propagation bits.
pub mod propagation {
    pub const UNBINDABLE: u64 = libc::MS_UNBINDABLE;
    pub const PRIVATE: u64 = libc::MS_PRIVATE;
    pub const SLAVE: u64 = libc::MS_SLAVE;
    pub const SHARED: u64 = libc::MS_SHARED;
}

/// What to change about a mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    pub set: u64,
    pub clear: u64,
    pub propagation: u64,
}

impl Change {
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Changes attributes and propagation of the mount that `fd` is in (and of all below it, if
/// `recursive`). `userns` goes with [`attr::IDMAP`]. Usable after a clone.
pub fn set_attributes(
    fd: BorrowedFd<'_>,
    recursive: bool,
    change: Change,
    userns: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let mut attr = MountAttr {
        attr_set: change.set,
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: userns.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    const AT_RECURSIVE: libc::c_int = 0x8000;
    let flags = libc::AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, the structure lives on this stack and its size is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_mut(&mut attr),
            size_of::<MountAttr>(),
        )
    };
    check(result).map(drop)
}

/// Mounts an EROFS file system from the file `index` (Linux 6.12), with `data` as its only further device. The mount
/// is detached: it is gone when the descriptor, and all that was made of it, is.
pub fn open_erofs(index: &Path, data: &Path) -> Result<OwnedFd, Errno> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
    let context = rustix::mount::fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "source", index)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "device", data)?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// What the kernel says about the last failure on a file system context, e.g. which option it did
/// not like. Empty if it says nothing.
pub fn context_message(context: BorrowedFd<'_>) -> String {
    let mut words = Vec::new();
    let mut buffer = [0_u8; 512];
    while let Ok(length) = rustix::io::read(context, &mut buffer) {
        if length == 0 || words.len() >= 8 {
            break;
        }
        let line = String::from_utf8_lossy(&buffer[..length]);
        words.push(line.trim().trim_start_matches("e ").to_owned());
    }
    words.join("; ")
}
