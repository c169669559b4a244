//! Why a program could not be executed: read from its first bytes in the container, by its process, and
//! told in words by the parent. The child's side allocates nothing.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::SendFlags;

/// The longest path of an interpreter that is told.
pub(crate) const LONGEST: usize = 256;

const ELF: &[u8] = b"\x7fELF";
/// Offsets in the header of an ELF file of 64 bits.
const MACHINE: usize = 18;
const PROGRAM_HEADERS: usize = 32;
const HEADER_SIZE: usize = 54;
const HEADER_COUNT: usize = 56;
const INTERPRETER: u32 = 3;

/// Child: sends what is found, which may be nothing. It is the last thing its process does.
pub(crate) fn tell(path: &CStr, channel: BorrowedFd<'_>) {
    let mut told = [0_u8; LONGEST + 1];
    let length = look(path, &mut told).unwrap_or(0);
    // Whoever does not listen any more does not want to know.
    rustix::net::send(channel, &told[..length], SendFlags::NOSIGNAL).ok();
}

/// A letter and what it is about: `M` and the machine's number, `I` and an interpreter, `S` and that of a
/// script, `E` for an empty file, `T` for anything else.
fn look(path: &CStr, told: &mut [u8; LONGEST + 1]) -> Option<usize> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&file).ok()?.st_mode);
    let mut head = [0_u8; 1024];
    let length = rustix::io::pread(&file, &mut head, 0).ok().filter(|_| kind == FileType::RegularFile)?;
    let head = head.get(..length)?;
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|b| *b == b'\n').next()?;
        let start = line.iter().position(|b| !b" \t".contains(b))?;
        let word = line.get(start..)?.split(|b| b" \t\r".contains(b)).next()?;
        return put(b'S', word, told);
    }
    if !head.starts_with(ELF) {
        return put(if head.is_empty() { b'E' } else { b'T' }, b"", told);
    }
    let short = |at: usize| Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_le_bytes(head.get(at..at + 8)?.try_into().ok()?) as usize);
    let machine = short(MACHINE)?;
    if machine != native() || head.get(4) != Some(&2) {
        return put(b'M', &machine.to_le_bytes(), told);
    }
    let (table, size, count) = (long(PROGRAM_HEADERS)?, short(HEADER_SIZE)?, short(HEADER_COUNT)?);
    for index in 0..usize::from(count) {
        let at = table.checked_add(index * usize::from(size))?;
        let kind = u32::from_le_bytes(head.get(at..at.checked_add(4)?)?.try_into().ok()?);
        if kind == INTERPRETER {
            let mut name = [0_u8; LONGEST];
            let (offset, length) = (long(at + 8)?, long(at + 32)?.min(LONGEST));
            let length = rustix::io::pread(&file, &mut name[..length], offset as u64).ok()?;
            return put(b'I', name[..length].split(|b| *b == 0).next()?, told);
        }
    }
    put(b'T', b"", told)
}

fn put(letter: u8, text: &[u8], told: &mut [u8; LONGEST + 1]) -> Option<usize> {
    told[0] = letter;
    told.get_mut(1..1 + text.len())?.copy_from_slice(text);
    Some(1 + text.len())
}

const fn native() -> u16 {
    if cfg!(target_arch = "aarch64") { 183 } else { 62 }
}

/// Parent: the words for what was told, if it explains the error number.
pub(crate) fn words(told: &[u8], errno: i32) -> Option<String> {
    let (letter, rest) = told.split_first()?;
    let text = || String::from_utf8_lossy(rest).into_owned();
    let missing = errno == libc::ENOENT;
    Some(match (letter, rest) {
        (b'I', _) if missing => format!("the interpreter {} is missing", text()),
        (b'S', _) if missing => format!("the script's interpreter {} is missing", text()),
        (b'S', _) if errno == libc::ENOEXEC => {
            format!("the script's interpreter {} cannot be executed", text())
        }
        (b'M', [a, b]) if errno == libc::ENOEXEC => format!(
            "a program for {}, this machine is {}",
            machine(u16::from_le_bytes([*a, *b])),
            machine(native())
        ),
        (b'E', _) if errno == libc::ENOEXEC => "the file is empty".to_owned(),
        (b'T', _) if errno == libc::ENOEXEC => {
            "neither a program of this machine nor a script with #!".to_owned()
        }
        _ => return None,
    })
}

/// A number of ELF's in docker's words.
fn machine(number: u16) -> String {
    let name = match number {
        3 => "386 (i386)",
        8 => "mips",
        21 => "ppc64 (ppc64le)",
        22 => "s390x",
        40 => "arm",
        62 => "amd64 (x86_64)",
        183 => "arm64 (aarch64)",
        243 => "riscv64",
        258 => "loong64",
        other => return format!("machine {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::ffi::CString;

    fn found(content: &[u8]) -> Option<Vec<u8>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let path = CString::new(file.path().to_str().unwrap()).unwrap();
        let mut told = [0; LONGEST + 1];
        look(&path, &mut told).map(|length| told[..length].to_vec())
    }

    #[test]
    fn first_bytes_tell_what_is_needed() {
        assert_eq!(found(b"#! /bin/none -x\n").unwrap(), b"S/bin/none");
        assert_eq!(found(b"").unwrap(), b"E");
        assert_eq!(found(b"hello").unwrap(), b"T");
        let own = std::fs::read("/bin/ls").unwrap();
        assert!(found(&own).unwrap().starts_with(b"I/lib"), "{:?}", found(&own));
        let mut foreign = own[..64].to_vec();
        foreign[MACHINE] = 243;
        assert_eq!(
            words(&found(&foreign).unwrap(), libc::ENOEXEC).unwrap().split(',').next(),
            Some("a program for riscv64")
        );
        assert_eq!(words(b"I/lib/x", libc::ENOENT).unwrap(), "the interpreter /lib/x is missing");
        assert_eq!(words(b"I/lib/x", libc::EACCES), None);
    }

    proptest! {
        #[test]
        fn any_file_can_be_looked_at(rest in proptest::collection::vec(any::<u8>(), 0..200)) {
            drop(found(&[ELF, &[2, 1, 1], &rest].concat()));
        }
    }
}
