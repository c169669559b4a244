//! System calls the ecosystem's crates lack, made safe. The only crate with `unsafe`.
//!
//! Nothing here decides anything: a function is one system call (or one indivisible sequence) with
//! owned and borrowed descriptors instead of numbers. What is documented as usable after a clone
//! neither allocates nor locks.

pub mod arena;
pub mod bpf;
pub mod daemonize;
pub mod entry;
pub mod exec;
mod executable;
pub mod fd;
pub mod inherit;
pub mod mount;
pub mod netns;
pub mod process;
pub mod quota;
pub mod sealed;
pub mod seccomp;
pub mod signals;
pub mod spawn;
pub mod umask;
pub mod xtables;

pub use executable::Replacement;
pub use rustix::io::Errno;
pub use sealed::{SealedExe, VeiledExe};

/// The result of a raw system call that went through the C library's `syscall`.
fn check(result: libc::c_long) -> Result<libc::c_long, Errno> {
    if result == -1 {
        // The C library has just set errno; its values are always within what `Errno` takes.
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL))
    } else {
        Ok(result)
    }
}
