//! System calls the ecosystem's crates lack, made safe. The only crate with `unsafe`.
//!
//! Nothing here decides anything: a function is one system call (or one indivisible sequence) with
//! owned and borrowed descriptors instead of numbers. What is documented as usable after a clone
//! neither allocates nor locks.

pub mod daemonize;
pub mod inherit;
pub mod netns;
pub mod sealed;
pub mod signals;
pub mod umask;

pub use rustix::io::Errno;
pub use sealed::SealedExe;
