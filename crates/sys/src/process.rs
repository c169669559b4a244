//! The calling process's own attributes. All usable after a clone.

use rustix::io::Errno;

use crate::check;

/// Whether the calling thread is the process's only one, and shares its memory with no other process.
pub(crate) fn is_single_threaded() -> Result<bool, Errno> {
    // SAFETY: changes nothing: whoever shares no memory keeps it, and all others are refused (unshare(2)).
    match check(unsafe { libc::syscall(libc::SYS_unshare, libc::CLONE_VM) }) {
        Ok(_) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        // Filters of system calls forbid unshare as a whole. A directory of threads has two links and one for each.
        Err(Errno::PERM | Errno::NOSYS) => Ok(rustix::fs::stat("/proc/self/task")?.st_nlink == 3),
        Err(e) => Err(e),
    }
}

/// Sets every signal to its default action and unblocks all: what a parent ignored or blocked must
/// not be inherited by a program.
pub fn reset_signals() {
    for signal in 1..=64 {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // SAFETY: SIG_DFL installs no handler. The result is of no interest: it fails only for
        // numbers that the C library keeps to itself, which are at their defaults after an exec.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let none: u64 = 0;
    // SAFETY: the kernel reads 8 bytes from a live reference; no old set is asked for.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            std::ptr::from_ref(&none),
            std::ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    };
}

/// Lets a signal that ends processes end this one even if it is the first of its PID namespace, which the kernel spares:
/// with 128 and the signal's number. Whatever is executed has the default actions again. Usable after a clone.
pub fn end_by_signals() {
    extern "C" fn end(signal: libc::c_int) {
        // SAFETY: _exit is made for handlers of signals.
        unsafe { libc::_exit(128 + signal) }
    }
    for signal in [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGALRM,
        libc::SIGTERM,
    ] {
        // SAFETY: the handler calls nothing but _exit. Setting one fails for no signal of these.
        unsafe { libc::signal(signal, end as *const () as libc::sighandler_t) };
    }
}

/// Sets the ids by which the calling thread makes files (setfsuid(2), setfsgid(2)). Leaving 0 takes the thread's
/// capabilities over files with it.
pub fn set_file_ids(uid: u32, gid: u32) -> Result<(), Errno> {
    const ASK: libc::c_long = -1;
    for (number, id) in [(libc::SYS_setfsgid, gid), (libc::SYS_setfsuid, uid)] {
        // SAFETY: plain numbers; these calls tell the former id and never fail, so the new one is asked for.
        unsafe { libc::syscall(number, libc::c_long::from(id)) };
        // SAFETY: as above; an id that cannot be is not set, but the current one is told.
        let now = unsafe { libc::syscall(number, ASK) };
        if now != libc::c_long::from(id) {
            return Err(Errno::PERM);
        }
    }
    Ok(())
}

/// A new, anonymous session keyring, so that the caller's keys are out of reach.
pub fn join_new_session_keyring() -> Result<(), Errno> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    let result = unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>())
    };
    check(result).map(drop)
}

/// Sets the execution domain.
pub fn set_personality(domain: u64) -> Result<(), Errno> {
    // SAFETY: personality has no memory operands.
    check(unsafe { libc::syscall(libc::SYS_personality, domain) }).map(drop)
}

/// The current directory's length in `buffer` (without the final zero). A directory that is not
/// below the root comes back as text that does not begin with a slash.
pub fn current_directory(buffer: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most `len` bytes into a live buffer.
    let result = unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) };
    let length = check(result)?;
    Ok((length as usize).saturating_sub(1))
}

/// Waits for a child: its exit status (128 and the signal, if one ended it), and the most memory in KiB that it or
/// any of its own children held at a time (`ru_maxrss`).
pub fn wait_with_peak(pid: u32) -> Result<(i32, u64), Errno> {
    let mut status = 0;
    // SAFETY: rusage is plain integers, for which all-zero is valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both are live and of the sizes that the kernel writes.
    let result = unsafe { libc::wait4(pid as libc::pid_t, &raw mut status, 0, &raw mut usage) };
    check(result.into())?;
    let code = if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) };
    Ok((code, usage.ru_maxrss.cast_unsigned()))
}

/// `setpriority` of the calling process.
pub fn set_nice(nice: i32) -> Result<(), Errno> {
    // SAFETY: setpriority has no memory operands.
    check(unsafe { libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, 0, nice) }).map(drop)
}

/// `ioprio_set` of the calling process; `value` is class << 13 | level.
pub fn set_io_priority(value: i32) -> Result<(), Errno> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: ioprio_set has no memory operands.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) }).map(drop)
}

/// `set_mempolicy`: `mode` with its flags, and one bit for each node.
pub fn set_memory_policy(mode: i32, nodes: &[u64]) -> Result<(), Errno> {
    // The kernel reads one bit less than it is told.
    let count = if nodes.is_empty() { 0 } else { nodes.len() * 64 + 1 };
    let mask = if nodes.is_empty() { std::ptr::null() } else { nodes.as_ptr() };
    // SAFETY: the mask is a live array of at least `count - 1` bits, or null with a count of zero.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, count) }).map(drop)
}

/// `sched_setaffinity` of the calling thread, one bit for each processor.
pub fn set_affinity(processors: &[u64]) -> Result<(), Errno> {
    let size = size_of_val(processors);
    // SAFETY: the kernel reads `size` bytes from a live array.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size, processors.as_ptr()) }).map(drop)
}

/// A scheduling policy with everything it may need (`struct sched_attr`, first version).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Scheduling {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// `sched_setattr` of the calling thread.
pub fn set_scheduling(mut scheduling: Scheduling) -> Result<(), Errno> {
    scheduling.size = size_of::<Scheduling>() as u32;
    // SAFETY: the structure carries its own size and lives on this stack.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_mut(&mut scheduling), 0) };
    check(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_current_directory_fits_or_fails() {
        let mut buffer = [0; 4096];
        let length = current_directory(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], std::env::current_dir().unwrap().as_os_str().as_encoded_bytes());
        assert_eq!(current_directory(&mut [0; 1]).unwrap_err(), Errno::RANGE);
    }
}
