//! Compiled filters, kept in files: to compile docker's takes a quarter of a millisecond, which is a tenth of a start.
//!
//! A file holds the program and, to the letter, the text that it was compiled from; it is good for that text and for the
//! executable that wrote it, and for nothing else. It is believed as the records beside it are: whoever could write it could
//! write those. Whatever is wrong with it, the filter is compiled again.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::Program;

/// Its name below the runtime's root. No container can be called so.
pub(crate) const DIRECTORY: &str = "@filters";

/// More files than these are not kept: whoever has so many filters makes up a new one for each container.
const MOST_FILES: usize = 32;

const MAGIC: &[u8; 8] = b"brigbpf1";

/// Magic, the executable, load flags, instructions, bytes of text, sum of flags and program.
const HEADER: usize = 8 + EXECUTABLE + 4 + 4 + 8 + 8;

/// Inode, size, modification, change: what is installed in its place is another one.
const EXECUTABLE: usize = 4 * 8;

/// A filter that was compiled before from the very same text.
pub(crate) fn find(dir: &Path, text: &[u8]) -> Option<Program> {
    let executable = executable()?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file: File = rustix::fs::open(place(dir, &executable, text), flags, Mode::empty()).ok()?.into();
    let about = file.metadata().ok()?;
    let own = about.is_file()
        && about.uid() == rustix::process::geteuid().as_raw()
        && about.mode() & (Mode::WGRP | Mode::WOTH).bits() == 0;
    let most = HEADER + text.len() + brigantine_sys::seccomp::MOST * 8;
    if !own || about.len() > most as u64 {
        return None;
    }
    let mut bytes = Vec::with_capacity(about.len() as usize + 1);
    file.take(most as u64 + 1).read_to_end(&mut bytes).ok()?;
    let (head, rest) = bytes.split_at_checked(HEADER)?;
    let (program, from) = rest.split_at_checked(rest.len().checked_sub(text.len())?)?;
    let load_flags = u32::from_ne_bytes(head[8 + EXECUTABLE..][..4].try_into().ok()?);
    let program_read = Program::from_bytes(program, load_flags)?;
    // All that is not the program's own follows from what is known here.
    (head == header(&executable, load_flags, program, text) && from == text).then_some(program_read)
}

/// Keeps what `text` was compiled to.
pub(crate) fn keep(dir: &Path, text: &[u8], program: &Program) -> std::io::Result<()> {
    let Some(executable) = executable() else { return Ok(()) };
    match rustix::fs::mkdir(dir, Mode::RWXU) {
        Err(rustix::io::Errno::EXIST) => make_room(dir)?,
        other => other?,
    }
    let code = program.to_bytes();
    let bytes = [&header(&executable, program.flags(), &code, text)[..], &code, text].concat();
    let place = place(dir, &executable, text);
    let temporary = place.with_extension(std::process::id().to_string());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let written = rustix::fs::open(&temporary, flags, Mode::RUSR | Mode::WUSR)
        .map_err(std::io::Error::from)
        .and_then(|file| File::from(file).write_all(&bytes))
        .and_then(|()| fs::rename(&temporary, &place));
    if written.is_err() {
        // What is half written is nobody's.
        fs::remove_file(&temporary).ok();
    }
    written
}

/// What runs here, as long as it has a name: a copy in memory is another one each time.
fn executable() -> Option<[u8; EXECUTABLE]> {
    let about = fs::metadata("/proc/self/exe").ok().filter(|about| about.nlink() > 0)?;
    let time = |seconds: i64, rest: i64| (seconds.cast_unsigned() << 30) | rest.cast_unsigned();
    let words = [
        about.ino(),
        about.size(),
        time(about.mtime(), about.mtime_nsec()),
        time(about.ctime(), about.ctime_nsec()),
    ];
    let mut bytes = [0; EXECUTABLE];
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_ne_bytes());
    }
    Some(bytes)
}

fn place(dir: &Path, executable: &[u8; EXECUTABLE], text: &[u8]) -> PathBuf {
    // Two texts of one name take turns; neither is ever taken for the other.
    dir.join(format!("{:016x}", sum(&[executable, text])))
}

fn header(executable: &[u8; EXECUTABLE], flags: u32, program: &[u8], text: &[u8]) -> Vec<u8> {
    let mut head = Vec::with_capacity(HEADER);
    head.extend(MAGIC);
    head.extend(executable);
    head.extend(flags.to_ne_bytes());
    head.extend(((program.len() / 8) as u32).to_ne_bytes());
    head.extend((text.len() as u64).to_ne_bytes());
    head.extend(sum(&[&flags.to_ne_bytes(), program]).to_ne_bytes());
    head
}

fn sum(parts: &[&[u8]]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

/// Removes everything, if it is much: what is used comes back.
fn make_room(dir: &Path) -> std::io::Result<()> {
    let files: Vec<_> = fs::read_dir(dir)?.flatten().map(|entry| entry.path()).collect();
    if files.len() >= MOST_FILES {
        for file in files {
            // Another one may do the same.
            fs::remove_file(file).ok();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn program(last: u32) -> Program {
        Program { code: vec![(0x20, 0, 0, 4), (0x06, 0, 0, last)], flags: 4 }
    }

    fn only_file(dir: &Path) -> PathBuf {
        let mut files = fs::read_dir(dir).unwrap();
        let file = files.next().unwrap().unwrap().path();
        assert!(files.next().is_none());
        file
    }

    #[test]
    fn what_is_kept_is_found_for_its_own_text_only() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join(DIRECTORY);
        assert_eq!(find(&dir, b"text"), None);
        keep(&dir, b"text", &program(1)).unwrap();
        assert_eq!(find(&dir, b"text"), Some(program(1)));
        assert_eq!(find(&dir, b"test"), None);
        // Another text whose name would be the same.
        fs::rename(only_file(&dir), place(&dir, &executable().unwrap(), b"test")).unwrap();
        assert_eq!(find(&dir, b"test"), None);
        assert_eq!(find(&dir, b"text"), None);
    }

    #[test]
    fn what_is_damaged_or_not_ones_own_is_not_taken() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join(DIRECTORY);
        keep(&dir, b"text", &program(1)).unwrap();
        let file = only_file(&dir);
        let good = fs::read(&file).unwrap();
        for place in 0..good.len() {
            let mut bad = good.clone();
            bad[place] ^= 1;
            fs::write(&file, &bad).unwrap();
            assert_eq!(find(&dir, b"text"), None, "byte {place}");
        }
        for length in 0..good.len() {
            fs::write(&file, &good[..length]).unwrap();
            assert_eq!(find(&dir, b"text"), None, "{length} bytes");
        }
        fs::write(&file, [&good[..], b"t"].concat()).unwrap();
        assert_eq!(find(&dir, b"text"), None);
        fs::write(&file, &good).unwrap();
        assert_eq!(find(&dir, b"text"), Some(program(1)));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o622)).unwrap();
        assert_eq!(find(&dir, b"text"), None);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let elsewhere = root.path().join("elsewhere");
        fs::rename(&file, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &file).unwrap();
        assert_eq!(find(&dir, b"text"), None);
    }

    #[test]
    fn not_everything_is_kept_for_ever() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join(DIRECTORY);
        for number in 0..MOST_FILES + 2 {
            keep(&dir, format!("text {number}").as_bytes(), &program(1)).unwrap();
        }
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
        assert_eq!(find(&dir, format!("text {}", MOST_FILES + 1).as_bytes()), Some(program(1)));
    }
}
