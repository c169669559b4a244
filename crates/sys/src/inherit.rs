//! Descriptors handed over by a service manager (socket activation, `sd_listen_fds(3)`).
//!
//! Invariant: each descriptor is taken at most once in the life of the process, and is close-on-exec afterwards.

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// First descriptor of the protocol.
const FIRST: i32 = 3;
/// More than any unit passes; guards against a nonsensical environment.
const MOST: i32 = 256;

static TAKEN: AtomicBool = AtomicBool::new(false);

/// The sockets that came with `LISTEN_PID` and `LISTEN_FDS`, in order; empty when there are none, or on a second call.
pub fn listen_fds() -> Vec<OwnedFd> {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<i32>().ok());
    let ours = number("LISTEN_PID") == i32::try_from(std::process::id()).ok();
    let count = number("LISTEN_FDS").filter(|count| (1..=MOST).contains(count));
    let Some(count) = count.filter(|_| ours) else { return Vec::new() };
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Vec::new();
    }
    (FIRST..FIRST + count)
        .filter(|fd| std::path::Path::new(&format!("/proc/self/fd/{fd}")).exists())
        .filter_map(|fd| {
            // SAFETY: the descriptor is open (just checked), the environment says it was passed to this process for
            // its own use, and `TAKEN` rules out a second owner.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).ok().map(|()| fd)
        })
        .collect()
}
