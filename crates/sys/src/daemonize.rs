//! What a process does to stand on its own: leave its parent, its inherited descriptors and unused memory.

use std::io;

/// Continues in a forked child; the calling process ends at once with status 0. So the caller's parent can reap it
/// immediately, and what continues is nobody's child. Refused in a process with several threads, of which the child
/// would have only one, and locks held by the others for ever.
pub fn continue_as_orphan() -> io::Result<()> {
    // A directory of threads has two links and one for each thread.
    if rustix::fs::stat("/proc/self/task")?.st_nlink != 3 {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "cannot fork: the process has several threads",
        ));
    }
    // SAFETY: there is one thread only, so the child is a complete copy of the process.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(()),
        _ => {
            // SAFETY: ends the process without running anything that the child will run too.
            unsafe { libc::_exit(0) }
        }
    }
}

/// Closes every descriptor from `first` up. For the beginning of a program only, to get rid of what it inherited by
/// accident: descriptors that have an owner in this process already would be pulled from under it.
pub fn close_inherited(first: u32) -> io::Result<()> {
    // SAFETY: takes no pointer; at the beginning of a program nobody owns these descriptors.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives free heap pages back to the kernel.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: glibc's allocator may be told so at any time.
        unsafe { libc::malloc_trim(0) };
    }
}
