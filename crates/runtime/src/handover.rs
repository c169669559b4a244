//! What the container's process gets from its creator once the container's cgroups are there: the lists of tasks by
//! which it enters them, and their directories, detached, to be mounted.
//!
//! The groups are made while the process sets itself up, so a plan names these descriptors by their place, and waits for
//! all of them at one step.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use brigantine_sys::mount::{self, Change};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
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
            Self::Tree { dir, changes, at } => {
                let what = || format!("mounting cgroup {} at {}", dir.display(), at.display());
                let tree = mounts::open_tree(dir, false).map_err(|e| Error::os(what(), e))?;
                for (change, recursive) in changes {
                    mount::set_attributes(tree.as_fd(), *recursive, *change, None)
                        .map_err(|e| Error::os(what(), e))?;
                }
                Ok(tree)
            }
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
