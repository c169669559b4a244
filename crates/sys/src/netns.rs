//! Network namespaces held by descriptor alone: nothing is mounted anywhere.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use rustix::thread::{
    CpuSet, LinkNameSpaceType, UnshareFlags, move_into_link_name_space, sched_getaffinity, sched_getcpu,
    sched_setaffinity,
};

use crate::check;
use crate::spawn::{self, ns};

/// Enough for system calls and a few messages; nothing deep runs on these threads.
const STACK: usize = 256 * 1024;

/// Of a thread that goes on with a task of its owner's. What is not touched costs nothing.
const DEEP_STACK: usize = 2 << 20;

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

/// A new network namespace ([`create`]) that is being made meanwhile, which takes the kernel half a millisecond, on a
/// thread that can go on with something else ([`Self::then`]).
#[derive(Debug)]
pub struct Coming {
    thread: JoinHandle<()>,
    task: SyncSender<Task>,
}

/// What the thread does with what it has made.
type Short<'a> = dyn FnOnce(Result<OwnedFd, Errno>) + Send + 'a;
type Task = Box<Short<'static>>;

impl Coming {
    /// Fails where no thread can be had.
    pub fn begin() -> Result<Self, Errno> {
        Self::begin_after(|| true)
    }

    /// The same thread does `first` before; if that says so, no namespace is made ([`Self::get`] then fails with
    /// `ECANCELED`).
    pub fn begin_after(first: impl FnOnce() -> bool + Send + 'static) -> Result<Self, Errno> {
        let (task, tasks) = sync_channel::<Task>(1);
        let allowed = sched_getaffinity(None).ok();
        let work = move || {
            // They are for the thread that waits for them, and for one that blocks them later.
            crate::signals::block_all();
            let made = if first() { made_here() } else { Err(Errno::CANCELED) };
            // Whoever is not there any more has nothing to be done.
            if let Ok(task) = tasks.recv() {
                if let Some(allowed) = allowed {
                    // It was allowed before.
                    sched_setaffinity(None, &allowed).ok();
                }
                task(made);
            }
        };
        let thread = std::thread::Builder::new().stack_size(DEEP_STACK).spawn(work);
        let thread = thread.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::AGAIN))?;
        if let Some(allowed) = &allowed {
            keep_apart(&thread, allowed);
        }
        Ok(Self { thread, task })
    }

    /// Waits for it; the thread that made it is gone then.
    pub fn get(self) -> Result<OwnedFd, Errno> {
        self.then(|made| made)
    }

    /// Has the thread that makes it go on with `task`, which runs in the new namespace and on a processor that is awake,
    /// and waits for that.
    pub fn then<T: Send>(self, task: impl FnOnce(Result<OwnedFd, Errno>) -> T + Send) -> T {
        let mut result = None;
        let slot = &mut result;
        let task: Box<Short<'_>> = Box::new(move |made| *slot = Some(task(made)));
        // SAFETY: the two types differ in a lifetime alone. What the task borrows is there until this function is left,
        // which is after the thread has ended, and the task with it, or right after nobody took it.
        let task = unsafe { std::mem::transmute::<Box<Short<'_>>, Task>(task) };
        // A thread that has gone says why when it is waited for.
        drop(self.task.send(task));
        match (self.thread.join(), result) {
            (Ok(()), Some(result)) => result,
            (Ok(()), None) => unreachable!("the thread has ended without its task"),
            (Err(panic), _) => std::panic::resume_unwind(panic),
        }
    }
}

/// Has a fresh thread run beside its maker, if there is another processor: where the scheduler finds all busy, it puts it
/// behind its maker, until that sleeps.
fn keep_apart(thread: &JoinHandle<()>, allowed: &CpuSet) {
    let here = sched_getcpu();
    // SAFETY: a set of processors is plain bits, for which all-zero is the empty one.
    let mut others: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let mut count = 0;
    for number in (0..CpuSet::MAX_CPU).filter(|n| *n != here && allowed.is_set(*n)) {
        // SAFETY: the number is below the set's size.
        unsafe { libc::CPU_SET(number, &mut others) };
        count += 1;
    }
    if count > 0 {
        let size = size_of::<libc::cpu_set_t>();
        // SAFETY: the thread is not joined yet, and the set is live. Where it may not be moved, it stays.
        unsafe {
            libc::pthread_setaffinity_np(thread.as_pthread_t() as libc::pthread_t, size, &raw const others)
        };
    }
}

/// Of the calling thread, which is to end soon.
fn made_here() -> Result<OwnedFd, Errno> {
    // SAFETY: CLONE_NEWNET touches no memory or descriptor table shared with other threads; the thread opens nothing
    // by the network afterwards.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
    own()
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
    fn the_thread_that_makes_one_goes_on_with_a_task() {
        let (own, mut seen) = (std::thread::current().id(), None);
        let coming = Coming::begin_after(|| false).unwrap();
        let answer = coming.then(|made| {
            seen = Some(std::thread::current().id());
            (made.unwrap_err(), 42)
        });
        assert_eq!(answer, (Errno::CANCELED, 42));
        assert!(seen.is_some_and(|thread| thread != own));
        let failed = std::panic::catch_unwind(|| {
            Coming::begin_after(|| panic!("on purpose")).unwrap().then(|made| made.is_ok())
        });
        assert_eq!(failed.unwrap_err().downcast_ref(), Some(&"on purpose"));
        let failed = std::panic::catch_unwind(|| {
            Coming::begin_after(|| false).unwrap().then(|_made| -> u8 { panic!("in the task") })
        });
        assert_eq!(failed.unwrap_err().downcast_ref(), Some(&"in the task"));
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
