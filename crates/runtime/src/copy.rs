//! Copies a directory's content, for `tmpcopyup`. Same invariant as `child`: nothing here allocates,
//! locks, logs or panics. No link is followed.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

/// Deeper trees are refused: each level takes some of the stack.
const DEEPEST: u32 = 64;

/// Copies what is in `from` (opened for reading) into `to`, with owners and modes.
pub(crate) fn directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: u32) -> Result<(), Errno> {
    if depth > DEEPEST {
        return Err(Errno::LOOP);
    }
    let mut buffer = [MaybeUninit::uninit(); 2048];
    let mut entries = RawDir::new(from, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        one(from, to, name, depth)?;
    }
    Ok(())
}

fn one(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, depth: u32) -> Result<(), Errno> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, mode)?;
            let below = rustix::fs::openat(from, name, read | OFlags::DIRECTORY, Mode::empty())?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let into = rustix::fs::openat(to, name, flags, Mode::empty())?;
            directory(std::os::fd::AsFd::as_fd(&below), std::os::fd::AsFd::as_fd(&into), depth + 1)?;
        }
        FileType::RegularFile => {
            let source = rustix::fs::openat(from, name, read, Mode::empty())?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let target = rustix::fs::openat(to, name, flags, mode)?;
            while rustix::fs::sendfile(&target, &source, None, 1 << 30)? > 0 {}
        }
        FileType::Symlink => {
            let mut buffer = [0_u8; 4096];
            let length = rustix::fs::readlinkat_raw(from, name, &mut buffer[..4095])?;
            buffer[length] = 0;
            let Ok(link) = CStr::from_bytes_with_nul(&buffer[..=length]) else { return Err(Errno::INVAL) };
            rustix::fs::symlinkat(link, to, name)?;
        }
        kind @ (FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice | FileType::Socket) => {
            rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?;
        }
        FileType::Unknown => return Err(Errno::INVAL),
    }
    give(to, name, &stat)
}

/// Owner first: a change of owner clears set-id bits.
fn give(to: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        rustix::fs::chmodat(to, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())?;
    }
    Ok(())
}
