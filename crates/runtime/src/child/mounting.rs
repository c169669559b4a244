//! Steps that mount, and the change of the root. Same invariant as `child`.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use brigantine_sys::mount::{self, Change};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::{Outcome, Stage, at, send_with};
use crate::copy;
use crate::plan::{FsMount, InsideTree, Message, Part, PathTree, Role, Target, Tree, TreeMount};

const PROC_MAGIC: u64 = 0x9fa0;

impl<'a> Stage<'a> {
    pub(super) fn attach_root(&mut self, tree: &Tree, place: &CStr) -> Outcome {
        let target =
            rustix::fs::open(place, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(at(Part::Open))?;
        self.root = Some(match tree {
            Tree::Open(fd) => rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(at(Part::Open))?,
            Tree::Path(tree) => detach(tree)?,
            Tree::Inside(_) | Tree::Handed(_) => return Err((Part::Outside, Errno::BADF)),
        });
        attach(self.root()?, target.as_fd())
    }

    pub(super) fn mount(&mut self, m: &'a FsMount) -> Outcome {
        let context = rustix::mount::fsopen(&m.fstype, FsOpenFlags::FSOPEN_CLOEXEC)
            .map_err(|e| (if e == Errno::NODEV { Part::NoFilesystem } else { Part::Prepare }, e))?;
        for (key, value) in &m.parameters {
            match value {
                Some(value) => rustix::mount::fsconfig_set_string(&context, key, value),
                None => rustix::mount::fsconfig_set_flag(&context, key),
            }
            .map_err(at(Part::Parameter))?;
        }
        if m.keep_mode
            && let Ok(covered) = self.open_at(&m.target.path, OFlags::PATH, m.target.strict)
        {
            // As an option, so that it is there to be read, and for a mount that begins read-only.
            let mode = rustix::fs::fstat(&covered).map_err(at(Part::Open))?.st_mode & 0o7777;
            let mut digits = [0_u8; 5];
            rustix::mount::fsconfig_set_string(&context, c"mode", octal(mode, &mut digits))
                .map_err(at(Part::Parameter))?;
        }
        rustix::mount::fsconfig_create(&context).map_err(at(Part::Prepare))?;
        // What is read-only cannot be filled or changed first.
        let later = if m.copy_up { m.attributes & mount::attr::RDONLY as u32 } else { 0 };
        let mounted = rustix::mount::fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::from_bits_retain(m.attributes & !later),
        )
        .map_err(at(Part::Prepare))?;
        if !m.copy_up
            && later == 0
            && let Some((dir, name)) = self.fresh(&m.target.path)?
        {
            attach_in(mounted.as_fd(), dir, name)?;
            return self.mounted(m, mounted);
        }
        let target = self.ensure(&m.target, true)?;
        if !m.over_proc {
            refuse_proc(target.as_fd())?;
        }
        if m.copy_up {
            let from = self
                .open_at(&m.target.path, OFlags::RDONLY | OFlags::DIRECTORY, m.target.strict)
                .map_err(at(Part::CopyUp))?;
            copy::directory(from.as_fd(), mounted.as_fd(), 0).map_err(at(Part::CopyUp))?;
        }
        if later != 0 {
            let change = Change { set: later.into(), ..Change::default() };
            mount::set_attributes(mounted.as_fd(), false, change, None).map_err(at(Part::Attributes))?;
        }
        attach(mounted.as_fd(), target.as_fd())?;
        self.mounted(m, mounted)
    }

    /// The rest of a file system's mount, once it is attached.
    pub(super) fn mounted(&mut self, m: &'a FsMount, mounted: OwnedFd) -> Outcome {
        for &propagation in &m.propagation {
            let change = Change { propagation, ..Change::default() };
            mount::set_attributes(mounted.as_fd(), false, change, None).map_err(at(Part::Attributes))?;
        }
        self.cover(&m.target.path);
        match m.role {
            Role::None => {}
            Role::Dev => self.dev = Some(mounted),
            Role::Groups => self.groups = Some((&m.target.path, mounted)),
            Role::Terminals => self.terminals = Some(mounted),
            Role::Proc => self.proc = Some(mounted),
            Role::Sys => self.sys = Some(mounted),
        }
        Ok(())
    }

    pub(super) fn attach(&mut self, m: &TreeMount) -> Outcome {
        if let Tree::Handed(place) = m.tree
            && let Some((dir, name)) = self.fresh(&m.target.path)?
        {
            return attach_in(self.handed(place)?, dir, name);
        }
        let (directory, detached) = match &m.tree {
            Tree::Open(_) | Tree::Handed(_) => (m.directory, None),
            Tree::Path(tree) => (m.directory, Some(detach(tree)?)),
            Tree::Inside(tree) => {
                let detached = self.detach_inside(tree)?;
                let stat = rustix::fs::fstat(&detached).map_err(at(Part::Source))?;
                (FileType::from_raw_mode(stat.st_mode).is_dir(), Some(detached))
            }
        };
        let target = self.ensure(&m.target, directory)?;
        if !m.over_proc {
            refuse_proc(target.as_fd())?;
        }
        match (&m.tree, &detached) {
            (Tree::Open(tree), _) | (_, Some(tree)) => attach(tree.as_fd(), target.as_fd())?,
            (Tree::Handed(place), None) => attach(self.handed(*place)?, target.as_fd())?,
            (_, None) => return Err((Part::Source, Errno::BADF)),
        }
        self.cover(&m.target.path);
        Ok(())
    }

    /// A part of the container's own root, as it is now.
    pub(super) fn detach_inside(&mut self, tree: &InsideTree) -> Result<OwnedFd, (Part, Errno)> {
        let source =
            self.open_at(&tree.source.path, OFlags::PATH, tree.source.strict).map_err(at(Part::Source))?;
        let detached = clone_tree(source.as_fd(), tree.recursive).map_err(at(Part::Source))?;
        for (change, recursive) in &tree.changes {
            mount::set_attributes(detached.as_fd(), *recursive, *change, None)
                .map_err(at(Part::Attributes))?;
        }
        if tree.ids.is_some() {
            send_with(self.channel, &Message::MapIds(self.at).encode(), detached.as_fd())
                .map_err(at(Part::Source))?;
            self.hear(Message::Mapped).map_err(at(Part::Source))?;
        }
        Ok(detached)
    }

    pub(super) fn readonly(&self, target: &Target) -> Outcome {
        let fd = match self.open(target, OFlags::PATH) {
            Err((_, Errno::NOENT)) => return Ok(()),
            other => other?,
        };
        let tree = clone_tree(fd.as_fd(), true).map_err(at(Part::Prepare))?;
        let change = Change { set: mount::attr::RDONLY, ..Change::default() };
        mount::set_attributes(tree.as_fd(), true, change, None).map_err(at(Part::Attributes))?;
        attach(tree.as_fd(), fd.as_fd())
    }

    pub(super) fn mask(&mut self, target: &Target) -> Outcome {
        let fd = match self.open(target, OFlags::PATH) {
            Err((_, Errno::NOENT | Errno::NOTDIR)) => return Ok(()),
            other => other?,
        };
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd).map_err(at(Part::Open))?.st_mode);
        if kind == FileType::Directory {
            if let Some(empty) = &self.empty {
                let tree = clone_tree(empty.as_fd(), false).map_err(at(Part::Prepare))?;
                return attach(tree.as_fd(), fd.as_fd());
            }
            let context =
                rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(at(Part::Prepare))?;
            rustix::mount::fsconfig_set_string(&context, c"mode", c"0755").map_err(at(Part::Parameter))?;
            rustix::mount::fsconfig_set_string(&context, c"size", c"4k").map_err(at(Part::Parameter))?;
            rustix::mount::fsconfig_create(&context).map_err(at(Part::Prepare))?;
            let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
                | MountAttrFlags::MOUNT_ATTR_NOSUID
                | MountAttrFlags::MOUNT_ATTR_NODEV
                | MountAttrFlags::MOUNT_ATTR_NOEXEC;
            let mounted = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
                .map_err(at(Part::Prepare))?;
            attach(mounted.as_fd(), fd.as_fd())?;
            self.empty = Some(mounted);
            return Ok(());
        }
        let null = self.null()?;
        let tree = clone_tree(null, false).map_err(at(Part::Prepare))?;
        attach(tree.as_fd(), fd.as_fd())
    }

    /// The container's /dev/null, proven to be it.
    pub(super) fn null(&mut self) -> Result<BorrowedFd<'_>, (Part, Errno)> {
        if self.null.is_none() {
            let fd = self.open_at(c"dev/null", OFlags::PATH, true).map_err(at(Part::Open))?;
            let stat = rustix::fs::fstat(&fd).map_err(at(Part::Open))?;
            let is_null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
                && stat.st_rdev == rustix::fs::makedev(1, 3);
            if !is_null {
                return Err((Part::NotADevice, Errno::NODEV));
            }
            self.null = Some(fd);
        }
        self.null.as_ref().map(AsFd::as_fd).ok_or((Part::Open, Errno::BADF))
    }

    pub(super) fn pivot(&mut self, propagation: u64, readonly: bool, moved: Option<&[CString]>) -> Outcome {
        if let Some(exposed) = moved {
            for mounted in exposed {
                hide(mounted)?;
            }
            let slash =
                rustix::fs::open(c"/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(at(Part::Open))?;
            let root = self.root()?;
            rustix::process::fchdir(root).map_err(at(Part::Open))?;
            attach(root, slash.as_fd())?;
            rustix::process::chroot(c".").map_err(at(Part::Whole))?;
            rustix::process::chdir(c"/").map_err(at(Part::Prepare))?;
            return self.finish_root(propagation, readonly);
        }
        let old = rustix::fs::open(c"/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(at(Part::Open))?;
        let root = self.root()?;
        rustix::process::fchdir(root).map_err(at(Part::Open))?;
        rustix::process::pivot_root(c".", c".").map_err(at(Part::Whole))?;
        // The old root now lies over the new one; step onto it and let it go with all below.
        rustix::process::fchdir(&old).map_err(at(Part::Prepare))?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH).map_err(at(Part::Prepare))?;
        rustix::process::chdir(c"/").map_err(at(Part::Prepare))?;
        self.finish_root(propagation, readonly)
    }

    pub(super) fn finish_root(&self, propagation: u64, readonly: bool) -> Outcome {
        if propagation != 0 {
            let change = Change { propagation, ..Change::default() };
            mount::set_attributes(self.root()?, true, change, None).map_err(at(Part::Attributes))?;
        }
        if readonly {
            let change = Change { set: mount::attr::RDONLY, ..Change::default() };
            mount::set_attributes(self.root()?, false, change, None).map_err(at(Part::Attributes))?;
        }
        Ok(())
    }
}

/// A file system must not hide or be hidden in /proc but where the plan says so: whoever swaps a
/// directory for a link into it would disarm what is written there.
fn refuse_proc(target: BorrowedFd<'_>) -> Outcome {
    let magic = rustix::fs::fstatfs(target).map_err(at(Part::Open))?.f_type as u64;
    if magic == PROC_MAGIC { Err((Part::OnProc, Errno::PERM)) } else { Ok(()) }
}

/// Takes a mount of the host's away, or covers it where it is locked: while any proc or sys file system is seen whole, the
/// kernel lets others be mounted that no mask covers.
fn hide(mounted: &CStr) -> Outcome {
    match rustix::mount::unmount(mounted, UnmountFlags::DETACH) {
        // Gone with one above it.
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::INVAL | Errno::PERM) => {
            let none = rustix::mount::MountFlags::empty();
            rustix::mount::mount(c"tmpfs", mounted, c"tmpfs", none, None::<&CStr>).map_err(at(Part::Prepare))
        }
        Err(e) => Err((Part::Prepare, e)),
    }
}

/// A mode's digits.
fn octal(mode: u32, buffer: &mut [u8; 5]) -> &CStr {
    for (place, digit) in buffer.iter_mut().take(4).enumerate() {
        *digit = b'0' + (mode >> (9 - 3 * place) & 7) as u8;
    }
    buffer[4] = 0;
    CStr::from_bytes_with_nul(buffer).unwrap_or(c"0755")
}

/// A tree that the parent could not detach.
fn detach(tree: &PathTree) -> Result<OwnedFd, (Part, Errno)> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if tree.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let fd = rustix::mount::open_tree(rustix::fs::CWD, &tree.path, flags).map_err(at(Part::Prepare))?;
    for (change, recursive) in &tree.changes {
        mount::set_attributes(fd.as_fd(), *recursive, *change, None).map_err(at(Part::Attributes))?;
    }
    Ok(fd)
}

pub(super) fn clone_tree(source: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(source, c"", flags)
}

/// The same at a name of a directory that only this process knows.
fn attach_in(tree: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &CStr) -> Outcome {
    rustix::mount::move_mount(tree, c"", dir, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(at(Part::Attach))
}

pub(super) fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Outcome {
    rustix::mount::move_mount(
        tree,
        c"",
        target,
        c"",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
    .map_err(|errno| {
        // The kernel calls a directory on a file, or the reverse, an invalid argument.
        let directory = |fd| rustix::fs::fstat(fd).map(|s| FileType::from_raw_mode(s.st_mode).is_dir());
        let differ = directory(tree).ok() != directory(target).ok();
        (Part::Attach, if errno == Errno::INVAL && differ { Errno::NOTDIR } else { errno })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        for (mode, text) in [(0o7777, c"7777"), (0o710, c"0710"), (0, c"0000")] {
            assert_eq!(octal(mode, &mut [0; 5]), text);
        }
    }
}
