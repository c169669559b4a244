//! Network namespaces held by descriptor alone: nothing is mounted anywhere.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// Enough for system calls and a few messages; nothing deep runs on these threads.
const STACK: usize = 256 * 1024;

/// The network namespace of the calling thread.
pub fn own() -> Result<OwnedFd, Errno> {
    open("/proc/thread-self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// The network namespace of process `pid`.
pub fn of_process(pid: i32) -> Result<OwnedFd, Errno> {
    open(format!("/proc/{pid}/ns/net"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// A new network namespace (only an unconfigured `lo` in it). It lives as long as the descriptor,
/// a process or an interface's peer holds it.
pub fn create() -> Result<OwnedFd, Errno> {
    create_with(|| ()).map(|(fd, ())| fd)
}

/// As [`create`], and runs `inside` in the new namespace before returning: for opening sockets in it.
pub fn create_with<T: Send>(inside: impl FnOnce() -> T + Send) -> Result<(OwnedFd, T), Errno> {
    on_own_thread(|| {
        // SAFETY: CLONE_NEWNET touches no memory or descriptor table shared with other threads; the
        // thread ends right after.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
        let fd = own()?;
        Ok((fd, inside()))
    })
}

/// Runs `inside` on a thread of its own that has entered the namespace `netns`.
pub fn within<T: Send>(netns: BorrowedFd<'_>, inside: impl FnOnce() -> T + Send) -> Result<T, Errno> {
    on_own_thread(|| {
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(inside())
    })
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> Result<T, Errno> + Send) -> Result<T, Errno> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        let Ok(thread) = thread else { return Err(Errno::AGAIN) };
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_namespace_is_another_one_and_can_be_entered() {
        let Ok(made) = create() else { return };
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
        assert_ne!(inode(&made), inode(&own().unwrap()));
        let seen = within(made.as_fd(), || inode(&own().unwrap())).unwrap();
        assert_eq!(seen, inode(&made));
    }
}
