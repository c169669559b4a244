//! Network namespaces held by descriptor alone: nothing is mounted anywhere.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::check;
use crate::spawn::{self, ns};

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

/// A new user namespace with these id maps (lines as `/proc/<pid>/uid_map` takes them, see user_namespaces(7)) and
/// a new network namespace that belongs to it. Each lives as long as its descriptor or a process in it.
pub fn create_owned(uid_map: &str, gid_map: &str) -> Result<(OwnedFd, OwnedFd), Errno> {
    let read = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
    // The kernel makes the user namespace first, so the other belongs to it.
    let child = spawn::clone(ns::USER | ns::NETWORK, None, || {
        // Ends with its maker, who reads what it needs and then ends it.
        if rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).is_err() {
            return 1;
        }
        loop {
            // Only signals end this, and none is handled.
            rustix::event::pause();
        }
    })?;
    let made = (|| {
        for (file, map) in [("gid_map", gid_map), ("uid_map", uid_map)] {
            std::fs::write(format!("/proc/{}/{file}", child.pid), map).map_err(read)?;
        }
        let get = |name| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            open(format!("/proc/{}/ns/{name}", child.pid), flags, Mode::empty())
        };
        Ok((get("user")?, get("net")?))
    })();
    // It cannot have gone; and if it had, there would be nothing to end.
    pidfd_send_signal(&child.pidfd, Signal::KILL).ok();
    while let Err(Errno::INTR) = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED) {}
    made
}

/// A new network namespace ([`create`]) that is being made meanwhile, which takes the kernel half a millisecond.
#[derive(Debug)]
pub struct Coming(JoinHandle<Result<OwnedFd, Errno>>);

impl Coming {
    /// Fails where no thread can be had.
    pub fn begin() -> Result<Self, Errno> {
        Self::begin_after(|| true)
    }

    /// The same thread does `first` before; if that says so, no namespace is made ([`Self::get`] then fails with
    /// `ECANCELED`).
    pub fn begin_after(first: impl FnOnce() -> bool + Send + 'static) -> Result<Self, Errno> {
        let made = || {
            if !first() {
                return Err(Errno::CANCELED);
            }
            // SAFETY: CLONE_NEWNET touches no memory or descriptor table shared with other threads; the
            // thread ends right after.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            own()
        };
        let thread = std::thread::Builder::new().stack_size(STACK).spawn(made);
        thread.map(Self).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::AGAIN))
    }

    /// Waits for it; the thread that made it is gone then.
    pub fn get(self) -> Result<OwnedFd, Errno> {
        self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// The user namespace that a namespace belongs to (`NS_GET_USERNS`, ioctl_nsfs(2)).
pub fn owner(namespace: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: this request takes no argument and answers a new descriptor.
    let fd = check(unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) }.into())?;
    // SAFETY: the kernel has just made this descriptor, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
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
    fn an_owned_network_belongs_to_the_user_namespace_made_with_it() {
        let Ok((user, net)) = create_owned("0 100000 65536\n", "0 200000 65536\n") else { return };
        let owner = rustix::fs::fstat(crate::netns::owner(net.as_fd()).unwrap()).unwrap();
        assert_eq!(owner.st_ino, rustix::fs::fstat(&user).unwrap().st_ino);
    }

    #[test]
    fn a_map_that_the_kernel_refuses_is_an_error() {
        let Ok(_possible) = create_owned("0 100000 65536\n", "0 200000 65536\n") else { return };
        assert_eq!(create_owned("0 0 0\n", "0 0 1\n").unwrap_err(), Errno::INVAL);
    }

    #[test]
    fn a_new_namespace_is_another_one_and_can_be_entered() {
        let Ok(made) = create() else { return };
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
        assert_ne!(inode(&made), inode(&own().unwrap()));
        let another = Coming::begin().unwrap().get().unwrap();
        assert!(![inode(&made), inode(&own().unwrap())].contains(&inode(&another)));
        let seen = within(made.as_fd(), || inode(&own().unwrap())).unwrap();
        assert_eq!(seen, inode(&made));
    }
}
