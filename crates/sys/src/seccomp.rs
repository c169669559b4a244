//! Loading a seccomp filter.

use std::cell::UnsafeCell;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

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

const NONE: u32 = u32::MAX;

/// The most instructions that the kernel takes (`BPF_MAXINSNS`).
pub const MOST: usize = 4096;

/// Memory that a process shares with its clones.
#[repr(C)]
struct Room {
    /// Zero until the code is whole; after that nothing changes any more. [`NONE`] if there is no filter after all.
    length: AtomicU32,
    flags: AtomicU32,
    code: [UnsafeCell<Instruction>; MOST],
}

#[derive(Debug)]
struct Shared(NonNull<Room>);

// SAFETY: what is shared is written once, before its length is, and read only after.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn room(&self) -> &Room {
        // SAFETY: mapped as long as this lives, and a room is shared for reading only, but for its cells.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: nobody in this process has it any more; a clone has a mapping of its own.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<Room>()) };
    }
}

/// A filter that a clone of this process awaits; made before the clone, while its code is not known yet.
pub fn pending() -> Result<(Writer, Reader), Errno> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    let size = size_of::<Room>();
    // SAFETY: asks for fresh memory wherever there is room.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0) };
    // The kernel hands out zeros, which are a valid room without code.
    let room = NonNull::new(at.cast::<Room>()).filter(|_| at != libc::MAP_FAILED).ok_or(Errno::NOMEM)?;
    let shared = Arc::new(Shared(room));
    Ok((Writer(Arc::clone(&shared)), Reader(shared)))
}

/// The end of [`pending`] that gives the code.
#[derive(Debug)]
pub struct Writer(Arc<Shared>);

/// The end of [`pending`] that the clone looks at.
#[derive(Debug)]
pub struct Reader(Arc<Shared>);

impl Writer {
    /// There is no filter.
    pub fn write_none(self) {
        self.0.room().length.store(NONE, Ordering::Release);
    }

    /// Gives the code with its load flags, once; none at all, or more than [`MOST`] instructions, are refused.
    pub fn write(self, code: &[Instruction], flags: u32) -> Result<(), Errno> {
        if code.is_empty() || code.len() > MOST {
            return Err(Errno::TOOBIG);
        }
        let room = self.0.room();
        for (place, instruction) in room.code.iter().zip(code) {
            // SAFETY: this is the only writer, and nobody reads before the length says so.
            unsafe { *place.get() = *instruction };
        }
        room.flags.store(flags, Ordering::Relaxed);
        room.length.store(code.len() as u32, Ordering::Release);
        Ok(())
    }
}

impl Reader {
    /// The code and its load flags, once they are there; no code is no filter. Usable after a clone.
    pub fn get(&self) -> Option<(&[Instruction], u32)> {
        let room = self.0.room();
        let length = match room.length.load(Ordering::Acquire) {
            NONE => return Some((&[], 0)),
            length => length as usize,
        };
        if length == 0 || length > MOST {
            return None;
        }
        // SAFETY: so many instructions were written before the length was, and nobody writes again; a cell is laid out
        // as what is in it.
        let code = unsafe { std::slice::from_raw_parts(room.code.as_ptr().cast::<Instruction>(), length) };
        Some((code, room.flags.load(Ordering::Relaxed)))
    }
}

/// Whether this kernel knows an action (`SECCOMP_RET_…`).
pub fn knows_action(action: u32) -> bool {
    const SECCOMP_GET_ACTION_AVAIL: libc::c_uint = 2;
    // SAFETY: the kernel reads one u32 from a live reference.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, std::ptr::from_ref(&action)) };
    result == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_clone_sees_the_code_that_comes_after_it() {
        let one = Instruction { code: 6, jt: 0, jf: 0, k: 0x7fff_0000 };
        let (writer, reader) = pending().unwrap();
        let (here, there) = rustix::pipe::pipe().unwrap();
        let mut there = Some(there);
        let child = crate::spawn::clone(0, None, || {
            drop(there.take());
            // Returns once the other end is closed.
            let waited = rustix::io::read(&here, &mut [0_u8; 1]).is_ok();
            i32::from(!waited || reader.get() != Some((&[one, one][..], flag::LOG)))
        });
        let child = child.unwrap();
        assert_eq!(reader.get(), None);
        writer.write(&[one, one], flag::LOG).unwrap();
        drop(there);
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        let status = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(0));
        assert_eq!(pending().unwrap().0.write(&[], 0), Err(Errno::TOOBIG));
        let (writer, reader) = pending().unwrap();
        writer.write_none();
        assert_eq!(reader.get(), Some((&[][..], 0)));
    }
}
