//! What a start mounts on the host for its own moment, until the container's mount namespace has it, and where the
//! sources of all mounts are.
//!
//! Invariant: whatever is mounted here is unmounted when the value is dropped, and by the next daemon if that one was
//! killed meanwhile (the directories are below the container's own).

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use brigantine_image::Lower;
use brigantine_sys::spawn::ns;

use super::Record;
use crate::error::Context;
use crate::images::Images;
use crate::own::Own;
use crate::volumes::{MountKind, MountRecord, Volumes};
use crate::{Error, Result, spec};

/// Mounts on the host for the moment of a start, in which the container takes them over.
#[derive(Default)]
pub(super) struct Borrowed(Vec<PathBuf>);

impl Borrowed {
    /// Mounts the image that `mount` names below `run_dir`; returns where it is.
    pub(super) fn image(&mut self, mount: &MountRecord, images: &Images, run_dir: &Path) -> Result<PathBuf> {
        let what = || format!("mount the image {}", mount.name);
        let mut layers = images.layers(&mount.image, &mount.layers)?.to_vec();
        make_dir(run_dir)?;
        let root = if images.copies() {
            Own::find(run_dir, &layers, true).mount(false)?
        } else {
            let empty = run_dir.join("no-files");
            make_dir(&empty)?;
            // An overlay has two layers at least.
            layers.push(Lower::directory(empty));
            crate::rootfs::union(&layers)?
        };
        let dir = self.attach(&root, run_dir).doing(what)?;
        if mount.subpath.is_empty() { Ok(dir) } else { subpath(&dir, &mount.subpath) }
    }

    /// Mounts `/dev/shm` of the running container whose process is `pid`; returns where it is.
    pub(super) fn shared_memory(&mut self, pid: i32, run_dir: &Path) -> Result<PathBuf> {
        let what = || "take the shared memory of the container whose IPC namespace is joined".to_owned();
        let tree = tree_in(pid, "dev/shm").doing(what)?;
        self.attach(&tree, run_dir).doing(what)
    }

    fn attach(&mut self, tree: &OwnedFd, run_dir: &Path) -> std::io::Result<PathBuf> {
        use rustix::mount::{MoveMountFlags, move_mount};
        let dir = run_dir.join(format!("image-{}", self.0.len()));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        move_mount(tree, "", rustix::fs::CWD, &dir, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        self.0.push(dir.clone());
        Ok(dir)
    }
}

fn make_dir(dir: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .doing(|| format!("create directory {}", dir.display()))
}

/// A copy of the mount at `path` in the mount namespace of a process. Links in the path stay within its root.
fn tree_in(pid: i32, path: &str) -> std::io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
    use rustix::mount::{OpenTreeFlags, open_tree};
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/mnt"))?;
    let root =
        open(format!("/proc/{pid}/root"), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // A thread of its own: its mount namespace is not the daemon's any more.
    let tree = std::thread::scope(|scope| {
        let work = scope.spawn(|| -> std::io::Result<OwnedFd> {
            // A thread that shares its root with others cannot enter one.
            brigantine_sys::umask::clear_for_this_thread()?;
            brigantine_sys::spawn::setns(namespace.as_fd(), ns::MOUNT)?;
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            let found = openat2(
                &root,
                path,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
                resolve,
            )?;
            let flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_EMPTY_PATH;
            Ok(open_tree(&found, "", flags)?)
        });
        work.join()
    });
    tree.unwrap_or_else(|_panic| Err(std::io::Error::other("the thread ended early")))
}

/// Unmounts what a daemon that was killed during a start has left.
pub(super) fn unmount_all(run_dir: &Path) {
    for number in 0.. {
        let dir = run_dir.join(format!("image-{number}"));
        if !dir.exists() {
            return;
        }
        match rustix::mount::unmount(&dir, rustix::mount::UnmountFlags::DETACH) {
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => tracing::warn!(path = %dir.display(), %error, "unmount what a start had mounted"),
        }
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        for dir in &self.0 {
            if let Err(error) = rustix::mount::unmount(dir, rustix::mount::UnmountFlags::DETACH) {
                tracing::warn!(path = %dir.display(), %error, "unmount what a start had mounted");
            }
        }
    }
}

/// Host paths of the mounts; what `-v` names and is not there becomes a directory.
pub(crate) fn mount_sources(
    record: &Record,
    volumes: &Volumes,
    mut image: impl FnMut(&MountRecord) -> Result<PathBuf>,
) -> Result<Vec<PathBuf>> {
    record
        .mounts
        .iter()
        .map(|mount| match mount.kind {
            MountKind::Image => image(mount),
            MountKind::Tmpfs => Ok(PathBuf::new()),
            MountKind::Volume => {
                let source = volumes.source(&mount.name);
                if mount.subpath.is_empty() { Ok(source) } else { subpath(&source, &mount.subpath) }
            }
            MountKind::Bind => {
                let source = PathBuf::from(&mount.source);
                if mount.create_source && std::fs::symlink_metadata(&source).is_err() {
                    std::fs::create_dir_all(&source).map_err(|error| {
                        Error::internal(format!(
                            "error while creating mount source path '{}'",
                            source.display()
                        ))
                        .because(format!(
                            "mkdir {}: {}",
                            source.display(),
                            spec::plain(&error)
                        ))
                    })?;
                }
                if let Err(error) = std::fs::metadata(&source) {
                    return Err(Error::invalid(format!(
                        "invalid mount config for type \"bind\": bind source path does not exist: {}",
                        source.display()
                    ))
                    .because(error));
                }
                Ok(source)
            }
        })
        .collect()
}

/// A path below a volume, resolved so that links in the volume cannot lead out of it.
fn subpath(volume: &Path, subpath: &str) -> Result<PathBuf> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
    let what = || format!("subpath {subpath} of volume directory {}", volume.display());
    let root = rustix::fs::open(volume, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .doing(what)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
    openat2(root, subpath, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
        .map_err(|error| Error::invalid(what()).because(error))?;
    Ok(volume.join(subpath))
}
