//! Filling an empty volume with what the image has at the mount point.
//!
//! The image's files are reached from a root descriptor with `openat2(RESOLVE_IN_ROOT)` and walked by descriptor
//! without following links, so that nothing in an image can point the copy elsewhere.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use brigantine_image::Lower;
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chownat,
    fchmod, fgetxattr, flistxattr, fsetxattr, futimens, linkat, mkdirat, mknodat, openat, openat2,
    readlinkat, statat, symlinkat, utimensat,
};

use crate::Result;
use crate::error::Context;
use crate::rootfs::LayerRoot;

/// Copies what `layers` (top first) have at `destination` into `volume`, if the volume is empty and that is a directory.
pub(crate) fn copy_up(layers: &[Lower], destination: &str, volume: &Path) -> Result<()> {
    let what =
        || format!("copy the image's files at {destination} into volume directory {}", volume.display());
    let target = File::open(volume).doing(what)?;
    if Dir::read_from(&target)
        .doing(what)?
        .any(|entry| entry.is_ok_and(|entry| entry.file_name() != c"." && entry.file_name() != c".."))
    {
        return Ok(());
    }
    let root = LayerRoot::open(layers)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let source = match openat2(
        root.as_fd(),
        destination.trim_start_matches('/'),
        flags,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    ) {
        Ok(source) => source,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(()),
        Err(error) => return Err(error).doing(what),
    };
    let mut copy = Copy { links: HashMap::new(), root: target.as_fd().try_clone_to_owned().doing(what)? };
    copy.directory(source.as_fd(), target.as_fd(), Path::new("")).doing(what)
}

struct Copy {
    /// Files with several names, by device and inode: where the first copy is.
    links: HashMap<(u64, u64), PathBuf>,
    root: OwnedFd,
}

impl Copy {
    fn directory(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
        for entry in Dir::read_from(from)? {
            let entry = entry?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                self.entry(from, to, name, &path.join(name.to_string_lossy().as_ref()))?;
            }
        }
        attributes(from, to)
    }

    fn entry(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &CStr,
        path: &Path,
    ) -> io::Result<()> {
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            mkdirat(to, name, Mode::RWXU)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let source = openat(from, name, flags, Mode::empty())?;
            let target = openat(to, name, flags, Mode::empty())?;
            return self.directory(source.as_fd(), target.as_fd(), path);
        }
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                linkat(&self.root, first, to, name, AtFlags::empty())?;
                return Ok(());
            }
            self.links.insert((stat.st_dev, stat.st_ino), path.to_owned());
        }
        match kind {
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut source = File::from(openat(from, name, flags, Mode::empty())?);
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut target = File::from(openat(to, name, flags, Mode::RUSR | Mode::WUSR)?);
                io::copy(&mut source, &mut target)?;
                attributes(source.as_fd(), target.as_fd())?;
            }
            FileType::Symlink => {
                let link = readlinkat(from, name, Vec::new())?;
                symlinkat(&link, to, name)?;
                owner_and_times(to, name, &stat)?;
            }
            FileType::Fifo | FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice => {
                mknodat(to, name, kind, Mode::from_raw_mode(stat.st_mode), stat.st_rdev)?;
                owner_and_times(to, name, &stat)?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// Owner, mode, extended attributes and times of an open file.
fn attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let stat = rustix::fs::fstat(from)?;
    rustix::fs::fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
    let mut names = vec![0_u8; 64 << 10];
    let length = match flistxattr(from, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => 0,
        Err(error) => return Err(error.into()),
    };
    for name in names[..length].split_inclusive(|byte| *byte == 0) {
        let name = CStr::from_bytes_with_nul(name).map_err(io::Error::other)?;
        // The overlay's own bookkeeping is not the file's.
        if name.to_bytes().starts_with(b"trusted.overlay.") {
            continue;
        }
        let mut value = vec![0_u8; 64 << 10];
        let length = fgetxattr(from, name, &mut value[..])?;
        match fsetxattr(to, name, &value[..length], XattrFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    futimens(to, &times(&stat))?;
    Ok(())
}

fn owner_and_times(dir: BorrowedFd<'_>, name: &CStr, stat: &rustix::fs::Stat) -> io::Result<()> {
    chownat(
        dir,
        name,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    utimensat(dir, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

fn times(stat: &rustix::fs::Stat) -> Timestamps {
    let at = |seconds: i64, nanos: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanos).unwrap_or_default(),
    };
    Timestamps {
        last_access: at(stat.st_atime, stat.st_atime_nsec),
        last_modification: at(stat.st_mtime, stat.st_mtime_nsec),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn an_empty_volume_gets_the_images_files_and_a_full_one_keeps_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("layer");
        std::fs::create_dir_all(layer.join("data/sub")).unwrap();
        std::fs::write(layer.join("data/sub/file"), "hello").unwrap();
        std::fs::hard_link(layer.join("data/sub/file"), layer.join("data/other")).unwrap();
        symlink("/etc/passwd", layer.join("data/link")).unwrap();
        std::fs::set_permissions(layer.join("data"), std::fs::Permissions::from_mode(0o1777)).unwrap();
        let volume = dir.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        copy_up(&[Lower::directory(layer.clone())], "/data", &volume).unwrap();
        assert_eq!(std::fs::read_to_string(volume.join("sub/file")).unwrap(), "hello");
        assert_eq!(std::fs::read_link(volume.join("link")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(volume.metadata().unwrap().mode() & 0o7777, 0o1777);
        assert_eq!(volume.join("other").metadata().unwrap().nlink(), 2);

        std::fs::remove_file(volume.join("link")).unwrap();
        copy_up(&[Lower::directory(layer)], "/data", &volume).unwrap();
        assert!(!volume.join("link").exists());
    }

    #[test]
    fn a_mount_point_the_image_lacks_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let (layer, volume) = (dir.path().join("layer"), dir.path().join("volume"));
        std::fs::create_dir(&layer).unwrap();
        std::fs::create_dir(&volume).unwrap();
        copy_up(&[Lower::directory(layer)], "/none", &volume).unwrap();
    }
}
