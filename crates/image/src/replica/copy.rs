//! Copying a tree with all that belongs to its files.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::{
    LayerResult, at, attributes_at, attributes_of, below, entries, failed, failed_io, kind, open_dir,
    open_file,
};

/// Copies a whole tree into the empty directory `target`: owners, modes, times, attributes, links and holes as they are.
/// Data is shared where the file system can do that. Returns which inode each directory has become.
pub(super) fn copy(source: &OwnedFd, target: &Path) -> LayerResult<Vec<(Vec<u8>, u64)>> {
    let target: OwnedFd = File::open(target).map_err(failed_io("open", b"the copy"))?.into();
    // What has several names, by its first one.
    let mut links: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut directories = vec![(Vec::new(), rustix::fs::fstat(source).map_err(failed("stat", b""))?)];
    let mut waiting = vec![Vec::new()];
    while let Some(path) = waiting.pop() {
        let from = open_dir(source, &path).map_err(failed("open", &path))?;
        let to = open_dir(&target, &path).map_err(failed("open", &path))?;
        for (name, stat) in entries(&from, &path)? {
            let path = below(&path, &name);
            if kind(&stat) == FileType::Directory {
                rustix::fs::mkdirat(&to, &name, Mode::RWXU).map_err(failed("mkdir", &path))?;
                waiting.push(path.clone());
                directories.push((path, stat));
                continue;
            }
            if stat.st_nlink > 1 {
                let first = links.entry((stat.st_dev, stat.st_ino)).or_insert_with(|| path.clone());
                if *first != path {
                    rustix::fs::linkat(&target, &first[..], &to, &name, AtFlags::empty())
                        .map_err(failed("link", &path))?;
                    continue;
                }
            }
            copy_one(&from, &to, &name, &path, &stat)?;
        }
    }
    // Making things in a directory changes its time, so these come last and the deepest first.
    let mut inodes = Vec::with_capacity(directories.len());
    for (path, stat) in directories.iter().rev() {
        let from = open_dir(source, path).map_err(failed("open", path))?;
        let to = open_dir(&target, path).map_err(failed("open", path))?;
        rustix::fs::fchown(&to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))
            .map_err(failed("chown", path))?;
        rustix::fs::fchmod(&to, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(failed("chmod", path))?;
        for (name, value) in attributes_of(&from, path)? {
            set_attribute(path, &name, |name| rustix::fs::fsetxattr(&to, name, &value, XattrFlags::empty()))?;
        }
        rustix::fs::futimens(&to, &times(stat)).map_err(failed("set the time of", path))?;
        inodes.push((path.clone(), rustix::fs::fstat(&to).map_err(failed("stat", path))?.st_ino));
    }
    Ok(inodes)
}

fn copy_one(from: &OwnedFd, to: &OwnedFd, name: &CString, path: &[u8], stat: &Stat) -> LayerResult<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    match kind(stat) {
        FileType::RegularFile => {
            let source = open_file(from, name).map_err(failed("open", path))?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let target = rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR)
                .map_err(failed("create", path))?;
            copy_data(&source, &target, stat.st_size as u64).map_err(failed("copy", path))?;
            rustix::fs::fchown(&target, Some(uid), Some(gid)).map_err(failed("chown", path))?;
            rustix::fs::fchmod(&target, mode).map_err(failed("chmod", path))?;
            for (name, value) in attributes_of(&source, path)? {
                set_attribute(path, &name, |name| {
                    rustix::fs::fsetxattr(&target, name, &value, XattrFlags::empty())
                })?;
            }
            return rustix::fs::futimens(&target, &times(stat)).map_err(failed("set the time of", path));
        }
        FileType::Symlink => {
            let link = rustix::fs::readlinkat(from, name, Vec::new()).map_err(failed("read link", path))?;
            rustix::fs::symlinkat(link.as_c_str(), to, name).map_err(failed("symlink", path))?;
        }
        FileType::CharacterDevice | FileType::BlockDevice | FileType::Fifo => {
            rustix::fs::mknodat(to, name, kind(stat), mode, stat.st_rdev).map_err(failed("mknod", path))?;
        }
        // Sockets live only while somebody listens.
        _ => return Ok(()),
    }
    rustix::fs::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(failed("chown", path))?;
    if kind(stat) != FileType::Symlink {
        rustix::fs::chmodat(to, name, mode, AtFlags::empty()).map_err(failed("chmod", path))?;
    }
    for (attribute, value) in attributes_at(from, name, path)? {
        let at = at(to, name);
        set_attribute(path, &attribute, |attribute| {
            rustix::fs::lsetxattr(&at[..], attribute, &value, XattrFlags::empty())
        })?;
    }
    rustix::fs::utimensat(to, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(failed("set the time of", path))
}

/// Copies a file's data, holes as holes.
fn copy_data(source: &File, target: &OwnedFd, length: u64) -> std::result::Result<(), Errno> {
    if length == 0 {
        return Ok(());
    }
    if rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(());
    }
    let mut at = 0;
    while at < length {
        let start = match rustix::fs::seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => at,
            Err(error) => return Err(error),
        };
        let end = match rustix::fs::seek(source, SeekFrom::Hole(start)) {
            Ok(end) => end,
            Err(Errno::INVAL | Errno::NXIO) => length,
            Err(error) => return Err(error),
        };
        at = start;
        while at < end {
            let (mut from, mut to) = (at, at);
            let most = usize::try_from(end - at).unwrap_or(usize::MAX).min(1 << 30);
            match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), most) {
                Ok(0) => break,
                Ok(n) => at += n as u64,
                // Between these file systems the kernel does not copy by itself.
                Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                    at += copy_by_hand(source, target, at, end - at)?;
                }
                Err(error) => return Err(error),
            }
        }
        if at < end {
            break;
        }
    }
    rustix::fs::ftruncate(target, length)
}

fn copy_by_hand(source: &File, target: &OwnedFd, at: u64, length: u64) -> std::result::Result<u64, Errno> {
    let mut buffer = vec![0; usize::try_from(length).unwrap_or(usize::MAX).min(1 << 18)];
    let n = rustix::io::pread(source, &mut buffer, at)?;
    if n == 0 {
        // Shorter than it was a moment ago.
        return Err(Errno::IO);
    }
    let mut done = 0;
    while done < n {
        done += rustix::io::pwrite(target, &buffer[done..n], at + done as u64)?;
    }
    Ok(n as u64)
}

fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    }
}

/// A file system that knows no such attributes does without; capabilities it must not lose.
fn set_attribute(
    path: &[u8],
    name: &[u8],
    set: impl FnOnce(&str) -> std::result::Result<(), Errno>,
) -> LayerResult<()> {
    let Ok(name) = std::str::from_utf8(name) else { return Ok(()) };
    match set(name) {
        Err(Errno::OPNOTSUPP) if name != "security.capability" => Ok(()),
        result => result.map_err(failed("set an extended attribute of", path)),
    }
}
