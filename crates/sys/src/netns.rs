//! Network namespaces held by descriptor alone: nothing is mounted anywhere.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use rustix::thread::{
    CpuSet, LinkNameSpaceType, UnshareFlags, gettid, move_into_link_name_space, sched_getaffinity,
    sched_getcpu, sched_setaffinity,
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
/// thread that goes on with what is queued ([`Self::queue`], [`Self::then`]).
#[derive(Debug)]
pub struct Coming {
    thread: Option<JoinHandle<()>>,
    /// Gone when nothing more is to be queued.
    tasks: Option<Sender<Task>>,
    /// The processors that its maker may use.
    allowed: Option<CpuSet>,
    /// The processor that the thread was first on, or none yet.
    on: Arc<AtomicUsize>,
}

/// What the thread does with what it has made.
type Short<'a> = dyn FnOnce(&Result<OwnedFd, Errno>) + Send + 'a;
type Task = Box<Short<'static>>;

/// What the thread has been asked for.
#[derive(Debug)]
pub struct Asked<T>(Receiver<T>);

impl<T> Asked<T> {
    /// Waits for it; nothing, if the thread has gone instead.
    pub fn get(self) -> Option<T> {
        self.0.recv().ok()
    }
}

impl Coming {
    /// Fails where no thread can be had.
    pub fn begin() -> Result<Self, Errno> {
        Self::begin_after(|| true)
    }

    /// The same thread does `first` before; if that says so, no namespace is made ([`Self::get`] then fails with
    /// `ECANCELED`).
    pub fn begin_after(first: impl FnOnce() -> bool + Send + 'static) -> Result<Self, Errno> {
        let (sender, tasks) = channel::<Task>();
        let on = Arc::new(AtomicUsize::new(usize::MAX));
        let told = Arc::clone(&on);
        let work = move || {
            // They are for the thread that waits for them, and for one that blocks them later.
            crate::signals::block_all();
            told.store(sched_getcpu(), Ordering::Relaxed);
            let made = if first() { made_here() } else { Err(Errno::CANCELED) };
            for task in tasks {
                task(&made);
            }
        };
        let thread = std::thread::Builder::new().stack_size(DEEP_STACK).spawn(work);
        let thread = thread.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::AGAIN))?;
        let allowed = sched_getaffinity(None).ok();
        if let Some(allowed) = &allowed {
            keep_apart(&thread, allowed);
        }
        Ok(Self { thread: Some(thread), tasks: Some(sender), allowed, on })
    }

    /// Waits for it; the thread that made it is gone then.
    pub fn get(self) -> Result<OwnedFd, Errno> {
        self.then(|made| {
            made.as_ref()
                .map_err(|e| *e)?
                .try_clone()
                .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::MFILE))
        })
    }

    /// Has the thread do something in the new namespace, when it has made it and done what it was asked for before.
    pub fn queue<T: Send + 'static>(
        &self,
        task: impl FnOnce(&Result<OwnedFd, Errno>) -> T + Send + 'static,
    ) -> Asked<T> {
        let (result, asked) = sync_channel(1);
        // Whoever does not wait for it any more does not need it.
        let task: Task = Box::new(move |made| drop(result.send(task(made))));
        if let Some(tasks) = &self.tasks {
            // If the thread has gone, there will be no answer.
            tasks.send(task).ok();
        }
        Asked(asked)
    }

    /// The processors that are left beside the thread's, if its maker has others: one that the thread wakes up where it
    /// runs itself would wait there until the thread has done everything.
    pub fn processors_beside(&self) -> Option<CpuSet> {
        let on = self.on.load(Ordering::Relaxed);
        self.allowed.as_ref().filter(|_| on < CpuSet::MAX_CPU).and_then(|allowed| without(allowed, on))
    }

    /// Has the thread do a last thing, and waits for it. It may borrow what its caller has.
    ///
    /// The caller wakes up on another processor than the one it is on, which a clone of it may have meanwhile, and is to
    /// keep: on that of the thread, say, which has nothing left to do.
    pub fn then<T: Send>(mut self, task: impl FnOnce(&Result<OwnedFd, Errno>) -> T + Send) -> T {
        let allowed = self.allowed;
        let aside = allowed.as_ref().and_then(|allowed| without(allowed, sched_getcpu()));
        let caller = gettid();
        let mut result = None;
        let slot = &mut result;
        let task: Box<Short<'_>> = Box::new(move |made| {
            *slot = Some(task(made));
            // It sleeps: this decides where it wakes up. Where that may not be, it wakes up where it was.
            if let Some(aside) = &aside {
                sched_setaffinity(Some(caller), aside).ok();
            }
        });
        // SAFETY: the two types differ in a lifetime alone. What the task borrows is there until this function is left,
        // which is after the thread has ended, and the task with it, or right after nobody took it.
        let task = unsafe { std::mem::transmute::<Box<Short<'_>>, Task>(task) };
        if let Some(tasks) = self.tasks.take() {
            // A thread that has gone says why when it is waited for.
            drop(tasks.send(task));
        }
        self.wait();
        if let Some(allowed) = allowed.filter(|_| aside.is_some()) {
            sched_setaffinity(None, &allowed).ok();
        }
        match result {
            Some(result) => result,
            None => unreachable!("the thread has ended without its task"),
        }
    }

    /// Until the thread has done everything and is gone; with its panic, if it ended so.
    fn wait(&mut self) {
        self.tasks = None;
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for Coming {
    /// What the thread has begun is not left half-made.
    fn drop(&mut self) {
        self.wait();
    }
}

/// Has a fresh thread run beside its maker, if there is another processor: where the scheduler finds all busy, it puts it
/// behind its maker, until that sleeps.
fn keep_apart(thread: &JoinHandle<()>, allowed: &CpuSet) {
    let Some(others) = without(allowed, sched_getcpu()) else { return };
    // SAFETY: a set of processors is plain bits, for which all-zero is the empty one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for number in (0..CpuSet::MAX_CPU).filter(|n| others.is_set(*n)) {
        // SAFETY: the number is below the set's size.
        unsafe { libc::CPU_SET(number, &mut set) };
    }
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: the thread is not joined yet, and the set is live. Where it may not be moved, it stays.
    unsafe { libc::pthread_setaffinity_np(thread.as_pthread_t() as libc::pthread_t, size, &raw const set) };
}

/// What is left of a set of processors, if anything.
fn without(allowed: &CpuSet, one: usize) -> Option<CpuSet> {
    let mut others = *allowed;
    if others.is_set(one) {
        others.unset(one);
    }
    (others.count() > 0).then_some(others)
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
            (made.as_ref().err().copied(), 42)
        });
        assert_eq!(answer, (Some(Errno::CANCELED), 42));
        assert!(seen.is_some_and(|thread| thread != own));
        let failed = std::panic::catch_unwind(|| {
            Coming::begin_after(|| panic!("on purpose")).unwrap().then(Result::is_ok)
        });
        assert_eq!(failed.unwrap_err().downcast_ref(), Some(&"on purpose"));
        let failed = std::panic::catch_unwind(|| {
            Coming::begin_after(|| false).unwrap().then(|_made| -> u8 { panic!("in the task") })
        });
        assert_eq!(failed.unwrap_err().downcast_ref(), Some(&"in the task"));
    }

    #[test]
    fn what_is_queued_is_done_in_its_order_whether_anybody_waits_or_not() {
        let (done, seen) = channel();
        let coming = Coming::begin_after(|| false).unwrap();
        let (first, second) = (done.clone(), done.clone());
        let one = coming.queue(move |_made| {
            first.send(1).unwrap();
            "one"
        });
        drop(coming.queue(move |_made| second.send(2).unwrap()));
        assert_eq!(one.get(), Some("one"));
        drop(coming.queue(move |_made| done.send(3).unwrap()));
        drop(coming);
        assert_eq!(seen.iter().collect::<Vec<_>>(), [1, 2, 3]);
        let gone = Coming::begin_after(|| panic!("on purpose")).unwrap();
        let asked = gone.queue(|_made| 1);
        assert_eq!(asked.get(), None);
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(gone)));
        assert_eq!(failed.unwrap_err().downcast_ref(), Some(&"on purpose"));
    }

    #[test]
    fn whoever_waits_is_where_it_may_be_again() {
        let allowed = sched_getaffinity(None).unwrap();
        let coming = Coming::begin_after(|| false).unwrap();
        coming.queue(|_made| ()).get();
        let beside = coming.processors_beside();
        assert_eq!(beside.is_some(), allowed.count() > 1);
        assert!(beside.is_none_or(|beside| beside.count() + 1 == allowed.count()));
        coming.then(|_made| ());
        assert_eq!(sched_getaffinity(None).unwrap(), allowed);
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
