//! A container's root as an overlay of its image's layers and its own changes, mounted but not yet attached.
//!
//! Invariant: in a user namespace the layers and the changes are mapped by its maps, so that on disk, as without one,
//! every file belongs to whom the container sees.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use brigantine_sys::mount::{self, Change, attr, context_message};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};

use crate::error::Error;
use crate::launch::{OverlayOptions, Rootfs};
use crate::mounts::UserMaps;

/// What the overlay is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Directories<'a> {
    /// Topmost layer first.
    pub lower: &'a [PathBuf],
    pub upper: &'a Path,
    pub work: &'a Path,
}

/// Mounts it, detached.
pub(crate) fn mount(
    dirs: &Directories<'_>,
    options: &OverlayOptions,
    user: Option<(UserMaps<'_>, Root)>,
) -> Result<OwnedFd, Error> {
    if dirs.lower.is_empty() {
        return Err(Error::invalid("an overlay root file system needs at least one lower layer"));
    }
    match user {
        None => mount_plain(dirs, options),
        Some((user, root)) => {
            let mapped = Mapped::of(dirs, user.namespace()?.as_fd())?;
            let dirs = Directories { lower: &mapped.lower, upper: &mapped.upper, work: &mapped.work };
            as_root(root, || mount_plain(&dirs, options))
        }
    }
}

/// Mounts a container's root at an existing directory of the caller's mount namespace: for whoever hands the container
/// to another runtime. What is a directory already is not mounted.
pub fn attach_root(rootfs: &Rootfs, target: &Path) -> Result<(), Error> {
    let Rootfs::Overlay { lower, upper, work, options } = rootfs else { return Ok(()) };
    let tree = mount(&Directories { lower, upper, work }, options, None)?;
    rustix::mount::move_mount(tree.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|e| failed(&format!("attaching it at {:?}", target.display()), e, ""))
}

/// Host ids of the container's root: user, group.
pub(crate) type Root = (u32, u32);

/// Runs `work` as the container's root with the caller's capabilities: an overlay makes its own files as whoever
/// mounted it, and the host's root has no id behind mapped mounts.
fn as_root<T>((uid, gid): Root, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let failed = |e| Error::os("mounting the overlay: acting as the container's root", e);
    let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let capabilities = rustix::thread::capabilities(None).map_err(failed)?;
    let acting = |(uid, gid): Root| {
        brigantine_sys::process::set_file_ids(uid, gid)?;
        rustix::thread::set_capabilities(None, capabilities)
    };
    let done = acting((uid, gid)).map_err(failed).and_then(|()| work());
    acting(own).map_err(failed)?;
    done
}

fn failed(step: &str, e: Errno, said: &str) -> Error {
    let said = if said.is_empty() { String::new() } else { format!(" ({said})") };
    Error::os(format!("mounting the overlay: {step}{said}"), e)
}

fn mount_plain(dirs: &Directories<'_>, options: &OverlayOptions) -> Result<OwnedFd, Error> {
    let Directories { lower, upper, work } = *dirs;
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|e| failed("opening", e, ""))?;
    let said = || context_message(context.as_fd());
    let set = |key: &str, value: &Path| {
        rustix::mount::fsconfig_set_string(&context, key, value)
            .map_err(|e| failed(&format!("{key} {:?}", value.display()), e, &said()))
    };
    // What the container's mount table shows as the device; programs look for this word.
    set("source", Path::new("overlay"))?;
    // Before Linux 6.5 all layers go in one string of at most 255 bytes: short names by descriptor.
    let mut layers = Vec::new();
    if crate::profile::running_kernel() >= (6, 5) {
        for layer in lower {
            set("lowerdir+", layer)?;
        }
    } else {
        for layer in lower {
            let fd = rustix::fs::open(layer, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .map_err(|e| failed(&format!("layer {:?}", layer.display()), e, ""))?;
            layers.push(fd);
        }
        let names: Vec<String> =
            layers.iter().map(|fd| format!("/proc/self/fd/{}", fd.as_raw_fd())).collect();
        let joined = names.join(":");
        if joined.len() > 255 {
            let count = lower.len();
            return Err(Error::unsupported(format!("{count} layers in one root need Linux 6.5 or later")));
        }
        set("lowerdir", Path::new(&joined))?;
    }
    set("upperdir", upper)?;
    set("workdir", work)?;
    let flag =
        |key: &str| rustix::mount::fsconfig_set_flag(&context, key).map_err(|e| failed(key, e, &said()));
    if options.volatile {
        flag("volatile")?;
    }
    for extra in &options.extra {
        match extra.split_once('=') {
            Some((key, value)) => set(key, Path::new(value))?,
            None => flag(extra)?,
        }
    }
    let whole = || format!("upper {:?}, {} lower layers", upper.display(), lower.len());
    rustix::mount::fsconfig_create(&context).map_err(|e| failed(&whole(), e, &said()))?;
    drop(layers);
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        .map_err(|e| failed(&whole(), e, ""))
}

/// The same directories through mounts that map ids; the paths are good as long as this lives.
#[derive(Debug)]
struct Mapped {
    lower: Vec<PathBuf>,
    upper: PathBuf,
    work: PathBuf,
    _mounts: Vec<OwnedFd>,
}

impl Mapped {
    fn of(dirs: &Directories<'_>, maps: BorrowedFd<'_>) -> Result<Self, Error> {
        let mut mounts = Vec::new();
        let mut through = |dir: &Path| -> Result<PathBuf, Error> {
            let mapped = idmapped(dir, maps)?;
            let path = PathBuf::from(format!("/proc/self/fd/{}", mapped.as_raw_fd()));
            mounts.push(mapped);
            Ok(path)
        };
        let lower = dirs.lower.iter().map(|dir| through(dir)).collect::<Result<Vec<_>, _>>()?;
        // The kernel wants both of these on one mount: that of what holds them.
        let (Some(parent), Some(upper), Some(work)) =
            (dirs.upper.parent(), dirs.upper.file_name(), dirs.work.file_name())
        else {
            return Err(Error::invalid("the overlay's upper and work directory have no parent"));
        };
        if dirs.work.parent() != Some(parent) {
            return Err(Error::invalid(format!(
                "in a user namespace the overlay's upper directory {:?} and work directory {:?} must be side by side",
                dirs.upper.display(),
                dirs.work.display()
            )));
        }
        let parent = through(parent)?;
        Ok(Self { lower, upper: parent.join(upper), work: parent.join(work), _mounts: mounts })
    }
}

/// A clone of the mount at `dir` whose ids are mapped (mount_setattr(2), `MOUNT_ATTR_IDMAP`).
fn idmapped(dir: &Path, maps: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, dir, flags)
        .map_err(|e| failed(&format!("opening {:?}", dir.display()), e, ""))?;
    let change = Change { set: attr::IDMAP, ..Change::default() };
    mount::set_attributes(tree.as_fd(), false, change, Some(maps)).map_err(|e| {
        let hint = if e == Errno::INVAL { "this file system has no idmapped mounts" } else { "" };
        failed(&format!("mapping the ids of {:?}", dir.display()), e, hint)
    })?;
    Ok(tree)
}
