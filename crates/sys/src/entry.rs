//! A program's start without most of what the standard library prepares: it looks for the end of the stack in
//! `/proc/self/maps` and gives signals a stack of their own, to have a word for an overflow. That takes a tenth of a
//! millisecond, and the kernel ends a process that overflows its stack all the same.
//!
//! Invariant: descriptors 0 to 2 are open, so that nothing else gets these numbers, and writing to who has gone away is
//! an error and not a signal, as with the standard library.

use std::ffi::{CStr, OsStr, OsString, c_char, c_int};
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Makes `$main`, a `fn() -> u8`, the program: what it returns is the exit status. In a crate root with
/// `#![no_main]`.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[expect(unsafe_code, reason = "the C library calls a function of this name")]
        #[unsafe(no_mangle)]
        extern "C" fn main(
            count: ::std::ffi::c_int,
            words: *const *const ::std::ffi::c_char,
        ) -> ::std::ffi::c_int {
            // SAFETY: these are what the C library gives its `main`.
            unsafe { $crate::entry::begin($main, count, words) }
        }
    };
}

static WORDS: OnceLock<Vec<OsString>> = OnceLock::new();

/// The program's name and arguments. Not every C library tells the standard library of them by itself.
pub fn args() -> Vec<OsString> {
    WORDS.get().cloned().unwrap_or_else(|| std::env::args_os().collect())
}

/// What [`entry!`] does.
///
/// # Safety
/// `words` must be an array of `count` C strings, for the life of the process.
pub unsafe fn begin(main: fn() -> u8, count: c_int, words: *const *const c_char) -> c_int {
    let count = usize::try_from(count).unwrap_or_default();
    // SAFETY: the caller's word.
    let words = if words.is_null() { &[][..] } else { unsafe { std::slice::from_raw_parts(words, count) } };
    let word = |word: &*const c_char| {
        // SAFETY: the caller's word.
        let bytes = unsafe { CStr::from_ptr(*word) }.to_bytes();
        OsStr::from_bytes(bytes).to_owned()
    };
    // Nobody has set it before.
    WORDS.set(words.iter().map(word).collect()).ok();
    // SAFETY: ignoring a signal installs no handler; it fails for no signal that may be ignored.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    match open_standard() {
        Ok(()) => main().into(),
        // There is nowhere to say so.
        Err(_) => 1,
    }
}

/// Whichever of the first three descriptors is closed becomes `/dev/null`.
fn open_standard() -> Result<(), Errno> {
    let standard = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    let mut asked = standard.each_ref().map(|fd| PollFd::new(fd, PollFlags::empty()));
    while let Err(e) = poll(&mut asked, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        if e != Errno::INTR {
            return Err(e);
        }
    }
    for fd in &asked {
        if fd.revents().contains(PollFlags::NVAL) {
            // The lowest number that is free, which is this one.
            std::mem::forget(rustix::fs::open(c"/dev/null", OFlags::RDWR, Mode::empty())?);
        }
    }
    Ok(())
}
