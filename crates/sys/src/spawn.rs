//! clone3: a child that runs a closure in chosen namespaces and a chosen cgroup.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::check;

/// `CLONE_NEW…` bits, as clone3, unshare and setns take them.
pub mod ns {
    pub const TIME: u64 = libc::CLONE_NEWTIME as u64;
    pub const MOUNT: u64 = libc::CLONE_NEWNS as u64;
    pub const CGROUP: u64 = libc::CLONE_NEWCGROUP as u64;
    pub const UTS: u64 = libc::CLONE_NEWUTS as u64;
    pub const IPC: u64 = libc::CLONE_NEWIPC as u64;
    pub const USER: u64 = libc::CLONE_NEWUSER as u64;
    pub const PID: u64 = libc::CLONE_NEWPID as u64;
    pub const NETWORK: u64 = libc::CLONE_NEWNET as u64;
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A fresh child of the calling process.
#[derive(Debug)]
pub struct Child {
    /// In the caller's PID namespace.
    pub pid: i32,
    pub pidfd: OwnedFd,
}

/// Ends the process if the closure unwinds: nothing of the caller's stack may run twice.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        exit_now(127);
    }
}

/// `_exit`: no destructors, no atexit handlers. Usable after a clone.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: exit_group has no memory operands and does not return.
    unsafe { libc::_exit(status) }
}

/// Clones the calling thread as a process of its own (a copy of memory, nothing shared) and runs
/// `child` in it; its result becomes the exit status.
///
/// `namespaces`: bits of [`ns`]. `cgroup`: a directory of the unified hierarchy to be born in.
///
/// The closure runs in a copy of a possibly multi-threaded process: another thread may have held
/// the allocator's or any other lock at that moment, and nobody is left to release it. So it must
/// not allocate, lock, log or panic; system calls on prepared data are all there is.
pub fn clone(
    namespaces: u64,
    cgroup: Option<BorrowedFd<'_>>,
    child: impl FnOnce() -> i32,
) -> Result<Child, Errno> {
    clone_as(namespaces, cgroup, false, child)
}

/// Like [`clone`], but the new process is its caller's sibling: a child of the caller's parent.
pub fn clone_sibling(
    namespaces: u64,
    cgroup: Option<BorrowedFd<'_>>,
    child: impl FnOnce() -> i32,
) -> Result<Child, Errno> {
    clone_as(namespaces, cgroup, true, child)
}

fn clone_as(
    namespaces: u64,
    cgroup: Option<BorrowedFd<'_>>,
    sibling: bool,
    child: impl FnOnce() -> i32,
) -> Result<Child, Errno> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: clone_args is plain integers, for which all-zero is valid and means "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces | libc::CLONE_PIDFD as u64;
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    if sibling {
        // It inherits its parent's exit signal; none may be given.
        args.flags |= libc::CLONE_PARENT as u64;
    } else {
        args.exit_signal = libc::SIGCHLD as u64;
    }
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the child has a copy of this address space and its own stack; the
    // structure and the pidfd slot live on this stack and outlive the call.
    let result = unsafe {
        libc::syscall(libc::SYS_clone3, std::ptr::from_mut(&mut args), size_of::<libc::clone_args>())
    };
    let pid = match check(result) {
        // Filters of system calls forbid clone3, whose flags they cannot see, and let its elder through.
        Err(Errno::NOSYS | Errno::PERM) if namespaces == 0 && cgroup.is_none() && !sibling => {
            let flags = libc::CLONE_PIDFD | libc::SIGCHLD;
            let none = std::ptr::null_mut::<libc::c_void>();
            // SAFETY: as above; with no stack given the child goes on on its copy of this one.
            let result = unsafe {
                libc::syscall(libc::SYS_clone, flags, none, std::ptr::from_mut(&mut pidfd), none, none)
            };
            check(result)?
        }
        other => other?,
    };
    if pid == 0 {
        let bomb = Bomb;
        let status = child();
        std::mem::forget(bomb);
        exit_now(status);
    }
    // SAFETY: the kernel has stored a fresh descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child { pid: pid as i32, pidfd })
}

/// `unshare` of namespaces for the calling thread ([`ns`] bits only). Usable after a clone.
pub fn unshare(namespaces: u64) -> Result<(), Errno> {
    // SAFETY: unshare of namespaces touches no memory of the process.
    check(unsafe { libc::syscall(libc::SYS_unshare, namespaces) }).map(drop)
}

/// `setns`: enters the namespaces of `fd` (a namespace's own descriptor, or a pidfd with [`ns`] bits).
/// Usable after a clone.
pub fn setns(fd: BorrowedFd<'_>, namespaces: u64) -> Result<(), Errno> {
    // SAFETY: setns touches no memory of the process; the descriptor is open for the call's length.
    check(unsafe { libc::syscall(libc::SYS_setns, fd.as_raw_fd(), namespaces) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    use std::os::fd::AsFd;

    #[test]
    fn the_closures_result_is_the_exit_status() {
        let child = clone(0, None, || 42).unwrap();
        let status = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(42));
    }
}
