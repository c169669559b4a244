//! Loading a seccomp filter.

use std::os::fd::{FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::check;

/// `SECCOMP_FILTER_FLAG_…` bits.
pub mod flag {
    pub const LOG: u32 = 2;
    pub const SPEC_ALLOW: u32 = 4;
    pub const NEW_LISTENER: u32 = 8;
    pub const WAIT_KILLABLE_RECV: u32 = 32;
}

/// One BPF instruction (`struct sock_filter`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    pub code: u16,
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

#[repr(C)]
struct Program {
    length: libc::c_ushort,
    code: *const Instruction,
}

/// Installs the filter for the calling thread; with [`flag::NEW_LISTENER`] its notification
/// descriptor comes back. Usable after a clone.
pub fn load(code: &[Instruction], flags: u32) -> Result<Option<OwnedFd>, Errno> {
    let Ok(length) = libc::c_ushort::try_from(code.len()) else { return Err(Errno::TOOBIG) };
    let program = Program { length, code: code.as_ptr() };
    const SECCOMP_SET_MODE_FILTER: libc::c_uint = 1;
    // SAFETY: the program points at `length` instructions that outlive the call; the kernel copies them.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, std::ptr::from_ref(&program))
    };
    let fd = check(result)?;
    if flags & flag::NEW_LISTENER == 0 {
        return Ok(None);
    }
    // SAFETY: with NEW_LISTENER a success is a fresh descriptor that nobody else owns.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}

/// Whether this kernel knows an action (`SECCOMP_RET_…`).
pub fn knows_action(action: u32) -> bool {
    const SECCOMP_GET_ACTION_AVAIL: libc::c_uint = 2;
    // SAFETY: the kernel reads one u32 from a live reference.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, std::ptr::from_ref(&action)) };
    result == 0
}
