//! What a process does to stand on its own: leave its parent, its inherited descriptors and unused memory.

use std::io;

use rustix::event::{PollFd, Timespec};

use crate::process;

/// Continues in a forked child; the calling process ends at once with status 0. So the caller's parent can reap it
/// immediately, and what continues is nobody's child. Refused in a process with several threads, of which the child
/// would have only one, and locks held by the others for ever.
pub fn continue_as_orphan() -> io::Result<()> {
    if !process::is_single_threaded()? {
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

/// Polls `fds`, and first gives back to the kernel what the process does not need meanwhile: free heap
/// pages, the stack's dead part, and its claim on pages of its own executable (they stay cached, and come back by
/// themselves when touched). What is left mapped of the executable is what surrounds this function: each page that is
/// touched brings its neighbours along, so nothing else runs between giving back and waiting.
pub fn poll_with_little_memory(
    fds: &mut [PollFd<'_>],
    timeout: Option<&Timespec>,
) -> rustix::io::Result<usize> {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: glibc's allocator may be told so at any time.
        unsafe { libc::malloc_trim(0) };
    }
    let spare = spare_ranges();
    for (start, length) in spare {
        if length > 0 {
            // SAFETY: nothing in the range is needed, or it is the same when it is read from its file again.
            let given = unsafe {
                rustix::mm::madvise(
                    std::ptr::with_exposed_provenance_mut(start),
                    length,
                    rustix::mm::Advice::LinuxDontNeed,
                )
            };
            // What is not given back is only kept.
            given.ok();
        }
    }
    rustix::event::poll(fds, timeout)
}

/// Mappings that can be given back, (start, length), as far as there is room to name them.
fn spare_ranges() -> [(usize, usize); 8] {
    let mut found = [(0, 0); 8];
    let mut places = found.iter_mut();
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return found };
    let here = std::ptr::from_ref(&maps) as usize;
    for map in maps.lines().filter_map(Mapping::parse) {
        if map.name == "[stack]" && (map.start..map.end).contains(&here) {
            // Far enough below this frame for those of the calls to come.
            let end = here.saturating_sub(STACK_MARGIN) & !(PAGE - 1);
            if let Some(place) = places.next().filter(|_| end > map.start) {
                // Nothing lives below the stack pointer of the one thread whose stack this is.
                *place = (map.start, end - map.start);
            }
        }
    }
    // Code and constants are never written, so reading the file again gives the same.
    for (place, constant) in places.zip(crate::executable::constants()) {
        *place = constant;
    }
    found
}

const PAGE: usize = 4096;
const STACK_MARGIN: usize = 8 << 10;

/// A line of `/proc/self/maps`.
struct Mapping<'a> {
    start: usize,
    end: usize,
    name: &'a str,
}

impl<'a> Mapping<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let mut fields = rest.splitn(5, ' ');
        Some(Self {
            start: usize::from_str_radix(start, 16).ok()?,
            end: usize::from_str_radix(end, 16).ok()?,
            name: fields.nth(4)?.trim_start(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_understood() {
        let map =
            Mapping::parse("00200000-002f1000 r--p 000f0000 00:01 73                  /memfd:a b (deleted)")
                .unwrap();
        assert_eq!((map.start, map.end), (0x20_0000, 0x2f_1000));
        assert_eq!(map.name, "/memfd:a b (deleted)");
        assert_eq!(Mapping::parse("7ffd-7ffe rw-p 00000000 00:00 0 ").unwrap().name, "");
    }
}
