//! Looking into a container's files from outside: a stopped one's layers as a detached mount, a running one's root.
//!
//! The mount is never attached to any namespace: it ends with its descriptor. Everything inside is reached with
//! `openat2(RESOLVE_IN_ROOT)`.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use brigantine_image::Lower;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

use crate::error::Context;
use crate::{Error, Result};

/// No file that the engine reads out of a container is larger.
const MAX_FILE: u64 = 4 << 20;

/// A read-only view of a container's files.
#[derive(Debug)]
pub(crate) struct LayerRoot {
    root: OwnedFd,
}

impl AsFd for LayerRoot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

impl LayerRoot {
    /// The union of `layers`, top first.
    pub(crate) fn open(layers: &[Lower]) -> Result<Self> {
        let root = if let [one] = layers {
            open_dir(one.path()).doing(|| format!("open layer {}", one.path().display()))?
        } else {
            union(layers)?
        };
        Ok(Self { root })
    }

    /// The union of a container's own changes and its image's layers. The kernel does not care that the same `upper`
    /// may be in use as somebody's upper directory: this view only reads.
    pub(crate) fn open_under(upper: &Path, layers: &[Lower]) -> Result<Self> {
        let unchanged =
            std::fs::read_dir(upper).doing(|| format!("read {}", upper.display()))?.next().is_none();
        if unchanged {
            return Self::open(layers);
        }
        let mut all = vec![Lower::directory(upper.to_owned())];
        all.extend_from_slice(layers);
        Self::open(&all)
    }

    /// The root that is open already.
    pub(crate) fn of(root: OwnedFd) -> Self {
        Self { root }
    }

    /// The root of the process `pid` as it sees it; a conflict if it has ended.
    pub(crate) fn of_process(pid: i32) -> Result<Self> {
        let path = PathBuf::from(format!("/proc/{pid}/root"));
        match open_dir(&path) {
            Ok(root) => Ok(Self { root }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::conflict(format!("the container is not running: its process {pid} has ended")))
            }
            Err(error) => Err(error).doing(|| format!("open {}", path.display())),
        }
    }

    /// A regular file's contents; `None` when there is none, or it is not regular, or absurdly large.
    pub(crate) fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let what = || format!("read {path} in the container's files");
        // Without O_NONBLOCK a FIFO in the file's place would hold us up.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let file = match openat2(&self.root, path.trim_start_matches('/'), flags, Mode::empty(), resolve) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(error) => return Err(error).doing(what),
        };
        let metadata = file.metadata().doing(what)?;
        if !metadata.is_file() || metadata.len() > MAX_FILE {
            return Ok(None);
        }
        let mut contents = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut contents).doing(what)?;
        Ok(Some(contents))
    }
}

/// A detached overlay of a container's own changes over its image's layers (top first), read-only.
pub(crate) fn union_under(upper: &Path, layers: &[Lower]) -> Result<OwnedFd> {
    let mut all = vec![Lower::directory(upper.to_owned())];
    all.extend_from_slice(layers);
    union(&all)
}

/// A detached overlay of several layers, top first.
pub(crate) fn union(layers: &[Lower]) -> Result<OwnedFd> {
    let what = || "look into the image's layers".to_owned();
    let Overlay { fs, _dirs } = Overlay::of(layers)?;
    fsconfig_create(fs.as_fd()).doing(what)?;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY).doing(what)
}

/// An overlay that is not made yet.
pub(crate) struct Overlay {
    pub fs: OwnedFd,
    /// Kept until it is made.
    _dirs: Vec<OwnedFd>,
}

impl Overlay {
    /// With these layers, top first.
    pub(crate) fn of(layers: &[Lower]) -> Result<Self> {
        let what = || "look into the image's layers".to_owned();
        let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).doing(what)?;
        let mut appended = Ok(());
        for layer in layers {
            appended = fsconfig_set_string(fs.as_fd(), "lowerdir+", layer.path());
            if appended.is_err() {
                break;
            }
        }
        match appended {
            Ok(()) => Ok(Self { fs, _dirs: Vec::new() }),
            // Kernels before 6.5 take one string of at most 255 bytes, which descriptors' paths keep short.
            Err(Errno::INVAL) => {
                let dirs = layers
                    .iter()
                    .map(|layer| open_dir(layer.path()))
                    .collect::<std::io::Result<Vec<_>>>()
                    .doing(what)?;
                let joined: Vec<String> =
                    dirs.iter().map(|dir| format!("/proc/self/fd/{}", dir.as_raw_fd())).collect();
                let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).doing(what)?;
                fsconfig_set_string(fs.as_fd(), "lowerdir", joined.join(":")).doing(|| {
                    format!(
                        "use {} layers at once on this kernel: from 6.5 on there is no such limit",
                        layers.len()
                    )
                })?;
                Ok(Self { fs, _dirs: dirs })
            }
            Err(error) => Err(error).doing(what),
        }
    }
}

fn open_dir(path: &Path) -> std::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_process_that_has_ended_is_a_conflict() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let error = LayerRoot::of_process(child.id() as i32).unwrap_err();
        assert_eq!(error.class(), crate::Class::Conflict);
    }

    #[test]
    fn links_stay_inside_and_only_regular_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("layer");
        std::fs::create_dir_all(layer.join("etc")).unwrap();
        std::fs::write(layer.join("etc/real"), "inside").unwrap();
        symlink("/etc/real", layer.join("etc/passwd")).unwrap();
        symlink("../../../../etc/real", layer.join("etc/group")).unwrap();
        let root = LayerRoot::open(&[Lower::directory(layer)]).unwrap();
        assert_eq!(root.read("/etc/passwd").unwrap().unwrap(), b"inside");
        assert_eq!(root.read("/etc/group").unwrap().unwrap(), b"inside");
        assert_eq!(root.read("/etc").unwrap(), None);
        assert_eq!(root.read("/none").unwrap(), None);
    }
}
