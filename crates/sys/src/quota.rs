//! Project quotas: how much a directory tree may take of its file system (quotactl_fd(2), Linux 5.14;
//! `FS_IOC_FSSETXATTR`, ioctl_xfs_fsgetxattr(2)). XFS and ext4 have them, mounted with `prjquota`.
//!
//! Sizes are bytes; the kernel counts in units of 512.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::{Errno, check};

/// The kernel's unit (`BBSIZE`).
const UNIT: u64 = 512;

const PRJQUOTA: u32 = 2;
/// `XQM_CMD` numbers of linux/dqblk_xfs.h: they work for every file system with quotas.
const GET_QUOTA: u32 = 0x5803;
const SET_LIMITS: u32 = 0x5804;
const GET_STATE: u32 = 0x5808;
/// `FS_QUOTA_PDQ_ENFD`: limits of projects are enforced.
const ENFORCED: u16 = 1 << 5;
/// `FS_DQ_BSOFT | FS_DQ_BHARD`
const BLOCK_LIMITS: u16 = 1 << 2 | 1 << 3;
/// `FS_PROJ_QUOTA`
const OF_PROJECT: i8 = 2;
/// `FS_XFLAG_PROJINHERIT`: what is made in the directory belongs to its project.
const INHERIT: u32 = 0x200;
const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801c_581f_u32 as libc::Ioctl;
const FS_IOC_FSSETXATTR: libc::Ioctl = 0x401c_5820;

/// `struct fs_disk_quota`
#[repr(C)]
#[derive(Default)]
struct DiskQuota {
    version: i8,
    flags: i8,
    fields: u16,
    id: u32,
    block_hard: u64,
    block_soft: u64,
    inode_hard: u64,
    inode_soft: u64,
    blocks: u64,
    inodes: u64,
    timers: [i32; 2],
    warnings: [u16; 2],
    timers_high: [i8; 3],
    _pad2: i8,
    realtime_hard: u64,
    realtime_soft: u64,
    realtime_blocks: u64,
    realtime_timer: i32,
    realtime_warnings: u16,
    _pad3: i16,
    _pad4: [u8; 8],
}

/// `struct fs_qfilestatv`
#[repr(C)]
#[derive(Default)]
struct FileState {
    inode: u64,
    blocks: u64,
    extents: u32,
    _pad: u32,
}

/// `struct fs_quota_statv`
#[repr(C)]
#[derive(Default)]
struct State {
    version: i8,
    _pad1: u8,
    flags: u16,
    incore: u32,
    files: [FileState; 3],
    limits: [i32; 3],
    warnings: [u16; 3],
    _pad3: u16,
    _pad4: u32,
    _pad2: [u64; 7],
}

/// `struct fsxattr`
#[repr(C)]
#[derive(Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    _pad: [u8; 8],
}

const _: () =
    assert!(size_of::<DiskQuota>() == 112 && size_of::<State>() == 160 && size_of::<Attributes>() == 28);

/// What a project takes and may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Project {
    pub used: u64,
    /// 0 is no limit.
    pub limit: u64,
}

/// Whether the file system that `fd` is on enforces limits of projects. One without quotas is no error.
pub fn enforced(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut state = State { version: 1, ..State::default() };
    match call(fd, GET_STATE, 0, &mut state) {
        Ok(()) => Ok(state.flags & ENFORCED != 0),
        Err(Errno::NOSYS | Errno::OPNOTSUPP | Errno::SRCH | Errno::INVAL | Errno::NODEV | Errno::NOTTY) => {
            Ok(false)
        }
        Err(e) => Err(e),
    }
}

/// A project's numbers on the file system of `fd`; one that nothing is known of takes nothing.
pub fn project(fd: BorrowedFd<'_>, id: u32) -> Result<Project, Errno> {
    let mut quota = DiskQuota::default();
    match call(fd, GET_QUOTA, id, &mut quota) {
        Ok(()) => Ok(Project { used: quota.blocks * UNIT, limit: quota.block_hard * UNIT }),
        Err(Errno::NOENT) => Ok(Project { used: 0, limit: 0 }),
        Err(e) => Err(e),
    }
}

/// Limits a project; 0 takes the limit back.
pub fn limit(fd: BorrowedFd<'_>, id: u32, bytes: u64) -> Result<(), Errno> {
    let blocks = bytes.div_ceil(UNIT);
    let mut quota = DiskQuota {
        version: 1,
        flags: OF_PROJECT,
        fields: BLOCK_LIMITS,
        id,
        block_hard: blocks,
        block_soft: blocks,
        ..DiskQuota::default()
    };
    call(fd, SET_LIMITS, id, &mut quota)
}

/// Which project a directory belongs to; 0 is none in particular.
pub fn project_of(dir: impl AsFd) -> Result<u32, Errno> {
    Ok(attributes(dir.as_fd())?.project)
}

/// Makes an empty directory, and all that will be in it, the project's.
pub fn assign(dir: impl AsFd, id: u32) -> Result<(), Errno> {
    let dir = dir.as_fd();
    let mut attributes = attributes(dir)?;
    attributes.project = id;
    attributes.flags |= INHERIT;
    // SAFETY: the structure is as long as the request's number says and is only read.
    check(unsafe { libc::ioctl(dir.as_raw_fd(), FS_IOC_FSSETXATTR, std::ptr::from_ref(&attributes)) }.into())
        .map(drop)
}

fn attributes(dir: BorrowedFd<'_>) -> Result<Attributes, Errno> {
    let mut attributes = Attributes::default();
    // SAFETY: the structure is as long as the request's number says and lives on this stack.
    let result =
        unsafe { libc::ioctl(dir.as_raw_fd(), FS_IOC_FSGETXATTR, std::ptr::from_mut(&mut attributes)) };
    check(result.into())?;
    Ok(attributes)
}

fn call<T>(fd: BorrowedFd<'_>, command: u32, id: u32, argument: &mut T) -> Result<(), Errno> {
    let command = command << 8 | PRJQUOTA;
    // SAFETY: each command is called with the structure that it reads or fills, which lives on the caller's stack.
    let result = unsafe {
        libc::syscall(libc::SYS_quotactl_fd, fd.as_raw_fd(), command, id, std::ptr::from_mut(argument))
    };
    check(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_without_quotas_says_so() {
        let proc = std::fs::File::open("/proc").unwrap();
        assert_eq!(enforced(proc.as_fd()), Ok(false));
    }
}
