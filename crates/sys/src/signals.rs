//! Signals as descriptors: blocked signals read from a file, and signals sent to a process by its descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Signals that are blocked in the calling thread and read from a descriptor instead. They stay blocked when this is
/// dropped.
#[derive(Debug)]
pub struct SignalFd {
    fd: OwnedFd,
}

/// Bytes of the kernel's set of signals.
const SET: usize = size_of::<u64>();
/// The two that a C library's threads need for themselves (nptl(7)).
const THREADS: u64 = 0b11 << 31;

/// Changes the calling thread's mask. By the kernel itself: musl knows no set that has its own third signal, 34, in it,
/// which elsewhere is SIGRTMIN.
fn change_mask(how: libc::c_int, set: u64) -> io::Result<()> {
    let none = std::ptr::null_mut::<u64>();
    // SAFETY: the kernel reads a set of eight bytes; no old one is asked for.
    let done = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &raw const set, none, SET) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl SignalFd {
    /// Blocks `signals` in the calling thread, and makes them readable.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        let mut set = 0;
        for &signal in signals {
            match u32::try_from(signal) {
                Ok(number @ 1..=64) => set |= 1_u64 << (number - 1),
                _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
            }
        }
        change_mask(libc::SIG_BLOCK, set)?;
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        // SAFETY: the kernel reads a set of eight bytes.
        let fd = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const set, SET, flags) };
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just opened and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// The next pending signal, without blocking.
    pub fn take(&self) -> io::Result<Option<i32>> {
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.fd, &mut info) {
            Ok(n) if n == info.len() => Ok(Some(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))),
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Blocks all signals in the calling thread, but for those that cannot be.
pub fn block_all() {
    // It fails for no set.
    change_mask(libc::SIG_BLOCK, !THREADS).unwrap_or_default();
}

/// Has the command's process begin with no signal blocked: by itself it inherits the mask of the thread that starts it.
pub fn unblock_in(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt as _;
    let unblock = || change_mask(libc::SIG_SETMASK, 0);
    // SAFETY: the closure calls nothing but the kernel and allocates nothing.
    unsafe { command.pre_exec(unblock) };
}

/// Sends any signal, real-time ones too, to the process behind `pidfd`.
pub fn send(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open for the length of the call and no memory is passed.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_signal_is_read_from_the_descriptor() {
        std::thread::spawn(|| {
            let signals = SignalFd::block(&[libc::SIGUSR2]).unwrap();
            assert_eq!(signals.take().unwrap(), None);
            // SAFETY: sends a signal that is blocked in this thread to this thread.
            assert_eq!(unsafe { libc::raise(libc::SIGUSR2) }, 0);
            assert_eq!(signals.take().unwrap(), Some(libc::SIGUSR2));
            assert_eq!(signals.take().unwrap(), None);
        })
        .join()
        .unwrap();
    }
}
