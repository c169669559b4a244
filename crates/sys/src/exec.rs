//! execve on prepared vectors.

use std::ffi::{CStr, CString, c_char};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use crate::check;

/// A null-terminated vector of strings in the form `execve` takes, built before a clone.
#[derive(Debug)]
pub struct StringVector {
    strings: Vec<CString>,
    /// A last string that may be filled in later, without allocation.
    scratch: Option<Box<[u8]>>,
    pointers: Vec<*const c_char>,
}

// SAFETY: the pointers point into heap blocks that this value owns; nothing is shared.
unsafe impl Send for StringVector {}
// SAFETY: shared access only reads.
unsafe impl Sync for StringVector {}

impl StringVector {
    pub fn new(strings: Vec<CString>) -> Self {
        Self::build(strings, None)
    }

    /// Reserves room for one more string of up to `capacity - 1` bytes, see [`Self::fill`].
    pub fn with_room(strings: Vec<CString>, capacity: usize) -> Self {
        Self::build(strings, Some(vec![0; capacity].into_boxed_slice()))
    }

    fn build(strings: Vec<CString>, scratch: Option<Box<[u8]>>) -> Self {
        let mut pointers: Vec<*const c_char> = strings.iter().map(|s| s.as_ptr()).collect();
        pointers.push(std::ptr::null());
        pointers.push(std::ptr::null());
        Self { strings, scratch, pointers }
    }

    /// Appends the concatenation of `parts` in the reserved room; false if it does not fit, holds
    /// a zero byte, or no room was reserved. Usable after a clone.
    pub fn fill(&mut self, parts: &[&[u8]]) -> bool {
        let Some(scratch) = self.scratch.as_mut() else { return false };
        let mut at = 0;
        for part in parts {
            let Some(room) = scratch.get_mut(at..at + part.len()) else { return false };
            if part.contains(&0) {
                return false;
            }
            room.copy_from_slice(part);
            at += part.len();
        }
        let Some(end) = scratch.get_mut(at) else { return false };
        *end = 0;
        let Some(slot) = self.pointers.get_mut(self.strings.len()) else { return false };
        *slot = scratch.as_ptr().cast();
        true
    }

    pub fn strings(&self) -> &[CString] {
        &self.strings
    }
}

/// Replaces the program; returns only on failure. Usable after a clone.
pub fn execve(path: &CStr, argv: &StringVector, envp: &StringVector) -> Errno {
    // SAFETY: path is a C string; both vectors are null-terminated arrays of pointers to C strings
    // owned by values that outlive the call.
    let result = unsafe {
        libc::syscall(libc::SYS_execve, path.as_ptr(), argv.pointers.as_ptr(), envp.pointers.as_ptr())
    };
    check(result).err().unwrap_or(Errno::INVAL)
}

/// Like [`execve`], with the program given by descriptor. Usable after a clone.
pub fn fexecve(fd: BorrowedFd<'_>, argv: &StringVector, envp: &StringVector) -> Errno {
    // SAFETY: as for execve; the empty path makes the descriptor itself the program.
    let result = unsafe {
        libc::syscall(
            libc::SYS_execveat,
            fd.as_raw_fd(),
            c"".as_ptr(),
            argv.pointers.as_ptr(),
            envp.pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    check(result).err().unwrap_or(Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_takes_one_string_that_fits() {
        let mut v = StringVector::with_room(vec![c"A=1".to_owned()], 8);
        assert!(!v.fill(&[b"HOME=", b"/too/long"]));
        assert!(!v.fill(&[b"H\0"]));
        assert!(v.fill(&[b"HOME=", b"/r"]));
        assert!(!StringVector::new(Vec::new()).fill(&[b"x"]));
    }
}
