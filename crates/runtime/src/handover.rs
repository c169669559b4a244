//! What the container's process gets from its creator once the container's cgroups are there: the lists of tasks by
//! which it enters them, and their directories, detached, to be mounted.
//!
//! The groups are made while the process sets itself up, so a plan names these descriptors by their place, and waits for
//! all of them at one step.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use brigantine_sys::mount::{self, Change, attr};
use rustix::fs::{Mode, OFlags, mkdirat, symlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen, move_mount,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::error::Error;
use crate::mounts;
use crate::plan::Message;

/// The most that is handed over: two for every hierarchy of version 1, of which the kernel knows fourteen with a
/// controller; the rest are named ones.
pub(crate) const MOST: usize = 64;

/// One descriptor to be handed over.
#[derive(Debug)]
pub(crate) enum Hand {
    /// The list of a group's tasks, to be written to.
    Tasks(PathBuf),
    /// A group's directory, as a mount that is nowhere yet, with these changes: (what, recursively).
    Tree { dir: PathBuf, changes: Vec<(Change, bool)>, at: PathBuf },
    /// The directories of several groups, mounted in a file system of their own that is nowhere yet.
    Groups(Groups),
}

/// What a container sees of its groups of version 1.
#[derive(Debug)]
pub(crate) struct Groups {
    /// Of the mount that the others are in (`MOUNT_ATTR_…`).
    pub attributes: u64,
    /// Name and group.
    pub views: Vec<(CString, PathBuf)>,
    /// For each of them: (what, recursively).
    pub changes: Vec<(Change, bool)>,
    /// Name and where it leads.
    pub links: Vec<(CString, CString)>,
    pub at: PathBuf,
}

impl Groups {
    /// Whether this kernel mounts what is nowhere yet in something that is nowhere yet, which Linux 6.15 was the first to do.
    pub(crate) fn can_be_assembled() -> bool {
        let release = rustix::system::uname();
        let mut numbers =
            release.release().to_str().unwrap_or_default().split(['.', '-']).map(str::parse::<u32>);
        let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else { return false };
        (major, minor) >= (6, 15)
    }

    /// With [`Self::can_be_assembled`] only.
    fn assemble(&self) -> Result<OwnedFd, Error> {
        let failed = |e| Error::os(format!("mounting cgroups at {}", self.at.display()), e);
        let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
        fsconfig_set_string(&context, c"mode", c"0755").map_err(failed)?;
        fsconfig_create(&context).map_err(failed)?;
        let attributes = MountAttrFlags::from_bits_retain((self.attributes & !attr::RDONLY) as u32);
        let whole = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed)?;
        for (name, dir) in &self.views {
            let tree = group_tree(dir, &self.changes, &self.at)?;
            mkdirat(&whole, name, Mode::from_raw_mode(0o755)).map_err(failed)?;
            move_mount(&tree, c"", &whole, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed)?;
        }
        for (name, leads) in &self.links {
            symlinkat(leads, &whole, name).map_err(failed)?;
        }
        if self.attributes & attr::RDONLY != 0 {
            let change = Change { set: attr::RDONLY, ..Change::default() };
            mount::set_attributes(whole.as_fd(), false, change, None).map_err(failed)?;
        }
        Ok(whole)
    }
}

fn group_tree(dir: &Path, changes: &[(Change, bool)], at: &Path) -> Result<OwnedFd, Error> {
    let what = || format!("mounting cgroup {} at {}", dir.display(), at.display());
    let tree = mounts::open_tree(dir, false).map_err(|e| Error::os(what(), e))?;
    for (change, recursive) in changes {
        mount::set_attributes(tree.as_fd(), *recursive, *change, None).map_err(|e| Error::os(what(), e))?;
    }
    Ok(tree)
}

impl Hand {
    fn open(&self) -> Result<OwnedFd, Error> {
        match self {
            Self::Tasks(dir) => {
                // Unlike `cgroup.procs`, this list takes the calling thread without stopping every fork of
                // the machine for an RCU grace period.
                let file = dir.join("tasks");
                rustix::fs::open(&file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|e| Error::os(format!("opening {}", file.display()), e))
            }
            Self::Tree { dir, changes, at } => group_tree(dir, changes, at),
            Self::Groups(groups) => groups.assemble(),
        }
    }
}

/// Sends the network namespace that was made meanwhile.
pub(crate) fn send_network(channel: BorrowedFd<'_>, network: BorrowedFd<'_>) -> Result<(), Error> {
    crate::child::send_with(channel, &Message::Network.encode(), network)
        .map_err(|e| Error::os("handing the container's process its network namespace", e))
}

/// Opens everything and sends it, in one message; nothing, if there is nothing to hand over.
pub(crate) fn hand_over(hands: &[Hand], channel: BorrowedFd<'_>) -> Result<(), Error> {
    if hands.is_empty() {
        return Ok(());
    }
    let opened = hands.iter().map(Hand::open).collect::<Result<Vec<_>, _>>()?;
    let fds: Vec<BorrowedFd<'_>> = opened.iter().map(AsFd::as_fd).collect();
    let failed = |e| Error::os("handing the container's process its cgroups", e);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(failed(Errno::TOOMANYREFS));
    }
    let bytes = Message::Handed.encode();
    let data = [std::io::IoSlice::new(&bytes)];
    rustix::net::sendmsg(channel, &data, &mut control, SendFlags::NOSIGNAL).map(|_| ()).map_err(failed)
}
