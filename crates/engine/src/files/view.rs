//! A container's files as its own processes see them: a running one's root, or a stopped one's, mounted with its volumes
//! in a mount namespace that nobody else is in.
//!
//! Invariants: nothing of the container is executed, no path inside is opened but through the root's descriptor, and
//! who works with the files has only the capabilities that this needs.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use brigantine_sys::mount::{Change, attr};
use brigantine_sys::spawn::ns;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount_change, move_mount, open_tree,
};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::path;
use crate::error::Context;
use crate::own::Own;
use crate::userns::Remap;
use crate::{Error, Result};

/// What copying needs: to read and write whatever anybody owns, and to make it be as it was.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// A container's root.
#[derive(Debug)]
pub(super) struct View {
    root: OwnedFd,
    /// How the ids of its files are those of the host: a running container's in a user namespace.
    pub(super) ids: Option<Remap>,
    /// Keeps what is mounted below the root.
    _namespace: Option<OwnedFd>,
}

/// A mount of a stopped container.
#[derive(Debug, Clone)]
pub(super) struct Bound {
    pub source: PathBuf,
    pub destination: String,
    pub writable: bool,
    pub recursive: bool,
}

/// What a stopped container's root is made of.
#[derive(Debug, Clone)]
pub(super) struct Stopped {
    /// The container's directory, with `upper` and `work` in it.
    pub dir: PathBuf,
    pub own: Own,
    /// Parents before what lies in them.
    pub mounts: Vec<Bound>,
}

impl AsFd for View {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

impl View {
    /// The root of the process `pid`; the caller makes sure that it is still the one meant.
    pub(super) fn of_process(pid: i32, ids: Option<Remap>) -> Result<Self> {
        let path = format!("/proc/{pid}/root");
        let root = open_dir(Path::new(&path)).doing(|| "look into the container".to_owned())?;
        Ok(Self { root, ids, _namespace: None })
    }

    /// A stopped container's. A `writable` one has its overlay to itself: the caller keeps it from being started.
    /// Of one that is not writable, `None` when a mount point is missing: then it has to be made writable first.
    pub(super) fn of_stopped(stopped: &Stopped, writable: bool) -> Result<Option<Self>> {
        let stopped = stopped.clone();
        // A thread of its own: its mount namespace is not the daemon's.
        on_thread(move || {
            brigantine_sys::spawn::unshare(ns::MOUNT)
                .doing(|| "make a mount namespace for the container's files".to_owned())?;
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
                .doing(|| "make the mount namespace private".to_owned())?;
            // Before the root hides the directory that some of them are in.
            let trees = stopped.mounts.iter().map(tree).collect::<Result<Vec<_>>>()?;
            let root = stopped.own.mount(writable)?;
            move_mount(&root, "", rustix::fs::CWD, &stopped.dir, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
                .doing(|| format!("mount the container's files at {}", stopped.dir.display()))?;
            for (mount, tree) in stopped.mounts.iter().zip(&trees) {
                if !bind(root.as_fd(), mount, tree, writable)? {
                    return Ok(None);
                }
            }
            let namespace = File::open("/proc/thread-self/ns/mnt")
                .doing(|| "keep the mount namespace of the container's files".to_owned())?;
            Ok(Some(Self { root, ids: None, _namespace: Some(namespace.into()) }))
        })
    }
}

/// Does work with a container's files: on a thread of its own, with the few capabilities that are needed for it and no
/// umask.
pub(super) fn with_few_rights<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    with_few_rights_as(None, work)
}

/// The same as the container's root, where that is somebody else than the host's: a container's file system in a user
/// namespace knows no owner of the host's.
pub(super) fn with_few_rights_as<T: Send + 'static>(
    ids: Option<Remap>,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    on_thread(move || {
        brigantine_sys::umask::clear_for_this_thread().doing(|| "clear the umask".to_owned())?;
        let had = rustix::thread::capabilities(None).doing(|| "read own capabilities".to_owned())?;
        if let Some((uid, gid)) = ids.and_then(|ids| ids.outside(0, 0)) {
            brigantine_sys::process::set_file_ids(uid, gid)
                .doing(|| "act as the container's root".to_owned())?;
        }
        let keep = had.permitted & CAPABILITIES;
        let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
        rustix::thread::set_capabilities(None, sets).doing(|| "drop capabilities".to_owned())?;
        work()
    })
}

fn on_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let thread = std::thread::Builder::new()
        .name("brig-files".to_owned())
        .spawn(work)
        .doing(|| "start a thread for the container's files".to_owned())?;
    thread.join().unwrap_or_else(|_panic| Err(Error::internal("work on the container's files ended early")))
}

/// A copy of what is to be mounted, not mounted yet.
fn tree(mount: &Bound) -> Result<OwnedFd> {
    let what = || format!("mount {} at {}", mount.source.display(), mount.destination);
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if mount.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(rustix::fs::CWD, &mount.source, flags).doing(what)?;
    if !mount.writable {
        let change = Change { set: attr::RDONLY, ..Change::default() };
        brigantine_sys::mount::set_attributes(tree.as_fd(), false, change, None).doing(what)?;
    }
    Ok(tree)
}

/// Mounts one tree; false when its mount point is missing and cannot be made.
fn bind(root: BorrowedFd<'_>, mount: &Bound, tree: &OwnedFd, writable: bool) -> Result<bool> {
    let what = || format!("mount {} at {}", mount.source.display(), mount.destination);
    let point = match path::open(root, &mount.destination, OFlags::PATH) {
        Ok(point) => point,
        Err(Errno::NOENT) if writable => {
            let stat = rustix::fs::fstat(tree).doing(what)?;
            let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            make_mount_point(root, &mount.destination, is_dir).doing(what)?;
            path::open(root, &mount.destination, OFlags::PATH).doing(what)?
        }
        Err(Errno::NOENT) => return Ok(false),
        Err(error) => return Err(error).doing(what),
    };
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", &point, "", flags).doing(what)?;
    Ok(true)
}

/// Makes what is missing of a mount point, as a start would.
fn make_mount_point(root: BorrowedFd<'_>, destination: &str, is_dir: bool) -> io::Result<()> {
    let parts: Vec<&str> = destination.split('/').filter(|part| !part.is_empty()).collect();
    let mut parent = String::new();
    for (index, part) in parts.iter().enumerate() {
        let dir = path::open(root, &parent, OFlags::PATH | OFlags::DIRECTORY)?;
        let last = index + 1 == parts.len();
        let made = if last && !is_dir {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&dir, *part, flags, Mode::from_raw_mode(0o755)).map(drop)
        } else {
            rustix::fs::mkdirat(&dir, *part, Mode::from_raw_mode(0o755))
        };
        match made {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        parent.push('/');
        parent.push_str(part);
    }
    Ok(())
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}
