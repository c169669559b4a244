//! A running process that goes on as one that was executed from another file with the same bytes, without an exec:
//! its mappings of the old file are replaced by mappings of the new one, then `/proc/self/exe` is set (prctl(2),
//! `PR_SET_MM_MAP`, which checkpoint/restore tools use for the same). Everything else of the process stays.
//!
//! What has to be known for that is found out beforehand, so that a fresh clone can do it, which must not allocate.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::{check, process};

const PAGE: usize = 4096;

/// How the program is mapped, and the file to map it from. For the process that made it and its clones. Dropping it may
/// take the kernel a tenth of a millisecond.
#[derive(Debug)]
pub struct Replacement {
    file: OwnedFd,
    _mount: OwnedFd,
    segments: Vec<Segment>,
    /// All but the end of the heap, which moves.
    description: Description,
}

/// A [`Replacement`] but for its descriptors.
#[derive(Debug)]
pub(crate) struct Found {
    segments: Vec<Segment>,
    description: Description,
}

impl Found {
    pub fn of(self, file: OwnedFd, mount: OwnedFd) -> Replacement {
        let Self { segments, description } = self;
        Replacement { file, _mount: mount, segments, description }
    }
}

impl Replacement {
    /// The caller says that `file` holds the very bytes that run: the same file, reached by another mount. The
    /// system's page size must be 4096 bytes.
    pub(crate) fn by(file: BorrowedFd<'_>) -> io::Result<Found> {
        let refused = |what: &str| io::Error::new(io::ErrorKind::Unsupported, what.to_owned());
        if rustix::param::page_size() != PAGE {
            return Err(refused("pages are not of 4096 bytes"));
        }
        let description = describe(file)?;
        let segments = segments().ok_or_else(|| refused("the executable does not say how it is mapped"))?;
        Ok(Found { segments, description })
    }

    /// Makes the file the calling process's executable. On an error the process goes on as before, with its old
    /// `/proc/self/exe`. Usable after a clone.
    ///
    /// Needs `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`, a kernel with `CONFIG_CHECKPOINT_RESTORE`, and a process with
    /// one thread (`EBUSY` otherwise).
    pub fn apply(&self) -> Result<(), Errno> {
        if !process::is_single_threaded()? {
            return Err(Errno::BUSY);
        }
        for segment in &self.segments {
            // SAFETY: the segment is one of this program's own, mapped from a file with the bytes of `file`, by the
            // maker's word, and there is no other thread that could see it change.
            unsafe { segment.map_again(self.file.as_fd())? };
        }
        // SAFETY: asks for the current end of the heap and moves nothing.
        let brk = unsafe { libc::sbrk(0) };
        let description = Description { brk: brk.addr() as u64, ..self.description };
        const PR_SET_MM: libc::c_int = 35;
        const PR_SET_MM_MAP: libc::c_ulong = 14;
        let size = size_of::<Description>();
        // SAFETY: the kernel reads `size` bytes from a live structure; it has the values that hold already.
        let result =
            unsafe { libc::prctl(PR_SET_MM, PR_SET_MM_MAP, std::ptr::from_ref(&description), size, 0_usize) };
        check(result.into()).map(drop)
    }
}

/// `struct prctl_mm_map`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Description {
    start_code: u64,
    end_code: u64,
    start_data: u64,
    end_data: u64,
    start_brk: u64,
    brk: u64,
    start_stack: u64,
    arg_start: u64,
    arg_end: u64,
    env_start: u64,
    env_end: u64,
    /// Null with a size of zero: the auxiliary vector stays.
    auxv: u64,
    auxv_size: u32,
    exe_fd: u32,
}

/// What the kernel has of the process (proc_pid_stat(5)), but for the executable.
fn describe(file: BorrowedFd<'_>) -> io::Result<Description> {
    let mut table = [0_u8; 1024];
    let stat = rustix::fs::open("/proc/self/stat", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let length = rustix::io::read(&stat, &mut table)?;
    let text = String::from_utf8_lossy(&table[..length]);
    let fields: Vec<&str> = text.rsplit_once(") ").map_or("", |(_, rest)| rest).split_whitespace().collect();
    // Numbered from 1 in the manual; the first two are before the parenthesis.
    let field = |number: usize| {
        let value = fields.get(number - 3).and_then(|f| f.parse::<u64>().ok()).filter(|v| *v != 0);
        value.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/self/stat is not understood"))
    };
    Ok(Description {
        start_code: field(26)?,
        end_code: field(27)?,
        start_data: field(45)?,
        end_data: field(46)?,
        start_brk: field(47)?,
        brk: 0,
        start_stack: field(28)?,
        arg_start: field(48)?,
        arg_end: field(49)?,
        env_start: field(50)?,
        env_end: field(51)?,
        auxv: 0,
        auxv_size: 0,
        exe_fd: file.as_raw_fd().cast_unsigned(),
    })
}

/// The C library's last error.
fn last() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

/// A loaded part of the program's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    start: usize,
    length: usize,
    offset: u64,
    protection: i32,
    /// What is read-only once relocations are done: from its start, this many bytes.
    sealed: usize,
}

impl Segment {
    /// # Safety
    /// The segment must be mapped by this process from a file whose bytes `file` has, and nobody else may use it
    /// meanwhile.
    unsafe fn map_again(&self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        let place = std::ptr::with_exposed_provenance_mut::<libc::c_void>(self.start);
        if self.protection & libc::PROT_WRITE == 0 {
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
            let (length, offset) = (self.length, self.offset.cast_signed());
            // SAFETY: replaces, at once, pages that were never written by the same pages of the same bytes.
            let at = unsafe { libc::mmap(place, length, self.protection, flags, file.as_raw_fd(), offset) };
            return if at == libc::MAP_FAILED { Err(last()) } else { Ok(()) };
        }
        // What was written to goes along: copied into memory of no file, which then takes the segment's place.
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: asks for fresh memory wherever there is room.
        let copy = unsafe { libc::mmap(std::ptr::null_mut(), self.length, self.protection, flags, -1, 0) };
        if copy == libc::MAP_FAILED {
            return Err(last());
        }
        // SAFETY: both are mapped for this length and apart; nothing writes to the segment until the next call is
        // over, for there is one thread and it does only this.
        unsafe { std::ptr::copy_nonoverlapping(place.cast::<u8>(), copy.cast::<u8>(), self.length) };
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: replaces the segment, at once, by its copy.
        let moved = unsafe { libc::mremap(copy, self.length, self.length, flags, place) };
        if moved == libc::MAP_FAILED {
            return Err(last());
        }
        if self.sealed > 0 {
            // SAFETY: these pages were read-only before.
            let done = unsafe { libc::mprotect(place, self.sealed, libc::PROT_READ) };
            check(done.into())?;
        }
        Ok(())
    }
}

/// The running program's segments, from its program headers; `None` if they are not laid out as expected.
fn segments() -> Option<Vec<Segment>> {
    // SAFETY: getauxval only looks up a value that the kernel gave the process.
    let [at, count, size] =
        [libc::AT_PHDR, libc::AT_PHNUM, libc::AT_PHENT].map(|key| unsafe { libc::getauxval(key) } as usize);
    if at == 0 || size != size_of::<libc::Elf64_Phdr>() || count > 64 {
        return None;
    }
    let headers = std::ptr::with_exposed_provenance::<libc::Elf64_Phdr>(at);
    // SAFETY: the kernel says that so many headers are mapped there, for the life of the process, and read-only.
    let headers = unsafe { std::slice::from_raw_parts(headers, count) };
    layout(headers, at)
}

/// What the running program's file has mapped and nobody may write to, (start, length): code, and data as it is in the file.
pub(crate) fn constants() -> Vec<(usize, usize)> {
    let all = segments().unwrap_or_default().into_iter();
    all.filter(|s| s.protection & libc::PROT_WRITE == 0).map(|s| (s.start, s.length)).collect()
}

/// `at`: where the headers are in memory, which tells by how much the program was moved.
fn layout(headers: &[libc::Elf64_Phdr], at: usize) -> Option<Vec<Segment>> {
    // Linkers that do not say where the headers are put them behind the file's own, in what is loaded first.
    let own = headers.iter().find(|h| h.p_type == libc::PT_PHDR).map(|h| h.p_vaddr);
    let first = headers.iter().find(|h| h.p_type == libc::PT_LOAD && h.p_offset == 0);
    let own = own.or_else(|| first.map(|h| h.p_vaddr + size_of::<libc::Elf64_Ehdr>() as u64))?;
    let base = at.checked_sub(own as usize)?;
    if base % PAGE != 0 {
        return None;
    }
    let down = |n: usize| n & !(PAGE - 1);
    let relro = headers.iter().find(|h| h.p_type == libc::PT_GNU_RELRO);
    let relro = relro.map_or(0..0, |h| {
        let start = base + h.p_vaddr as usize;
        down(start)..down(start + h.p_memsz as usize)
    });
    let mut all: Vec<Segment> = Vec::new();
    for header in headers.iter().filter(|h| h.p_type == libc::PT_LOAD) {
        let from = base.checked_add(header.p_vaddr as usize)?;
        let start = down(from);
        let end = from.checked_add(header.p_filesz as usize)?.checked_next_multiple_of(PAGE)?;
        let offset = header.p_offset.checked_sub((from - start) as u64)?;
        let flag = |flag, protection| if header.p_flags & flag == 0 { 0 } else { protection };
        let protection = flag(libc::PF_R, libc::PROT_READ)
            | flag(libc::PF_W, libc::PROT_WRITE)
            | flag(libc::PF_X, libc::PROT_EXEC);
        let sealed = if relro.start == start && relro.end <= end { relro.end - relro.start } else { 0 };
        if all.last().is_some_and(|before| before.start + before.length > start) || offset % PAGE as u64 != 0
        {
            return None;
        }
        if end > start {
            all.push(Segment { start, length: end - start, offset, protection, sealed });
        }
    }
    // A read-only part that is nowhere would become writable, or stay a mapping of the old file.
    let found = relro.is_empty() || all.iter().any(|s| s.sealed > 0);
    (found && !all.is_empty()).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u32, flags: u32, place: u64, size: u64) -> libc::Elf64_Phdr {
        libc::Elf64_Phdr {
            p_type: kind,
            p_flags: flags,
            p_offset: place & 0xffff,
            p_vaddr: place,
            p_paddr: place,
            p_filesz: size,
            p_memsz: size + 0x100,
            p_align: 0x1000,
        }
    }

    #[test]
    fn segments_are_whole_pages_of_the_file() {
        let headers = [
            header(libc::PT_PHDR, libc::PF_R, 0x20_0040, 0x150),
            header(libc::PT_LOAD, libc::PF_R | libc::PF_X, 0x20_0000, 0x1234),
            header(libc::PT_LOAD, libc::PF_R | libc::PF_W, 0x20_26a0, 0x2000),
            header(libc::PT_GNU_RELRO, libc::PF_R, 0x20_26a0, 0x1860),
        ];
        let found = layout(&headers, 0x20_0040).unwrap();
        let text = Segment {
            start: 0x20_0000,
            length: 0x2000,
            offset: 0,
            protection: libc::PROT_READ | libc::PROT_EXEC,
            sealed: 0,
        };
        let data = Segment {
            start: 0x20_2000,
            length: 0x3000,
            offset: 0x2000,
            protection: libc::PROT_READ | libc::PROT_WRITE,
            sealed: 0x2000,
        };
        assert_eq!(found, [text, data]);
        // Moved as a whole.
        assert_eq!(layout(&headers, 0x70_0000_0040).unwrap()[1].start, 0x70_0000_2000);
        // Segments that share a page, read-only data that is not found, no word of where the headers are.
        let shared = header(libc::PT_LOAD, libc::PF_R, 0x20_1f00, 0x10);
        assert_eq!(layout(&[headers[0], headers[1], shared], 0x20_0040), None);
        assert_eq!(layout(&[headers[0], headers[1], headers[3]], 0x20_0040), None);
        assert_eq!(layout(&headers[1..], 0x20_0040), layout(&headers, 0x20_0040));
        assert_eq!(layout(&headers[1..], 0x20_0080), None);
        assert_eq!(layout(&headers[2..], 0x20_0040), None);
    }

    #[test]
    fn the_own_program_is_understood() {
        let here = the_own_program_is_understood as fn() as usize;
        let found = segments().unwrap();
        let own = found.iter().find(|s| (s.start..s.start + s.length).contains(&here)).unwrap();
        assert_ne!(own.protection & libc::PROT_EXEC, 0);
        // A literal is one of them, what is written is not.
        static WRITTEN: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(1);
        let literal = "the literal".as_ptr().addr();
        let is_constant = |at: usize| constants().iter().any(|(start, n)| (*start..start + n).contains(&at));
        assert!(is_constant(here) && is_constant(literal));
        assert!(!is_constant(std::ptr::from_ref(&WRITTEN).addr()));
    }
}
