//! User namespaces and the ids of mounts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use brigantine_sys::mount::{self, Change, attr};

use super::{Context, Options};
use crate::error::Error;
use crate::plan::Tree;
use crate::spec::{LinuxIdMapping, Mount};
use crate::{idmap, overlay};

/// Where the container's user namespace comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum UserMaps<'a> {
    /// With the maps that the spec repeats, if it does.
    Joined(&'a OwnedFd, &'a [LinuxIdMapping], &'a [LinuxIdMapping]),
    New(&'a [LinuxIdMapping], &'a [LinuxIdMapping]),
}

/// A user namespace that idmapped mounts take their maps from.
pub(crate) enum Maps<'a> {
    Joined(&'a OwnedFd),
    Made(OwnedFd),
}

impl AsFd for Maps<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Joined(fd) => fd.as_fd(),
            Self::Made(fd) => fd.as_fd(),
        }
    }
}

impl<'a> UserMaps<'a> {
    /// What ids 0 stand for on the host.
    pub(super) fn root(self) -> Result<overlay::Root, Error> {
        let (Self::Joined(_, uids, gids) | Self::New(uids, gids)) = self;
        let zero = |maps: &[LinuxIdMapping]| {
            maps.iter().find(|m| m.container_id() == 0).map(LinuxIdMapping::host_id)
        };
        zero(uids).zip(zero(gids)).ok_or_else(|| {
            Error::invalid(
                "an overlay root in a user namespace needs uidMappings and gidMappings with the container's id 0, \
                 also if the namespace is joined",
            )
        })
    }

    pub(crate) fn namespace(self) -> Result<Maps<'a>, Error> {
        match self {
            Self::Joined(namespace, _, _) => Ok(Maps::Joined(namespace)),
            Self::New(uid, gid) => {
                idmap::user_namespace(&idmap::lines(uid), &idmap::lines(gid)).map(Maps::Made)
            }
        }
    }
}

/// Maps the ids of a tree: by the entry's own maps, else as the container's user namespace does.
pub(super) fn idmap(
    entry: &Mount,
    options: &Options,
    context: &Context<'_>,
    tree: &mut Tree,
    what: &dyn Fn() -> String,
) -> Result<(), Error> {
    if context.late {
        return Err(Error::unsupported(format!("{}: idmapped mounts need CAP_SYS_ADMIN", what())));
    }
    let list = |m: &Option<Vec<LinuxIdMapping>>| m.clone().unwrap_or_default();
    let (uid, gid) = (list(entry.uid_mappings()), list(entry.gid_mappings()));
    let namespace = match (uid.is_empty(), gid.is_empty(), context.user) {
        (false, false, _) => UserMaps::New(&uid, &gid).namespace()?,
        (true, true, Some(user)) => user.namespace()?,
        (true, true, None) => {
            return Err(Error::invalid(format!(
                "{}: an idmapped mount needs uidMappings and gidMappings, or a user namespace of the container's",
                what()
            )));
        }
        _ => {
            return Err(Error::invalid(format!("{}: uidMappings and gidMappings go together", what())));
        }
    };
    let recursive = options.idmap == Some(true);
    match tree {
        Tree::Inside(inside) => {
            let kept = namespace.as_fd().try_clone_to_owned().map_err(|e| Error::os(what(), e))?;
            inside.ids = Some((kept, recursive));
            Ok(())
        }
        Tree::Open(tree) => map_ids(tree.as_fd(), namespace.as_fd(), recursive, what),
        Tree::Path(_) | Tree::Handed(_) => {
            Err(Error::unsupported(format!("{}: idmapped mounts need CAP_SYS_ADMIN", what())))
        }
    }
}

/// Gives a tree that is nowhere yet the maps of a user namespace.
pub(crate) fn map_ids(
    tree: BorrowedFd<'_>,
    namespace: BorrowedFd<'_>,
    recursive: bool,
    what: &dyn Fn() -> String,
) -> Result<(), Error> {
    let change = Change { set: attr::IDMAP, ..Change::default() };
    mount::set_attributes(tree, recursive, change, Some(namespace)).map_err(|e| {
        let hint =
            if e == rustix::io::Errno::INVAL { " (this file system has no idmapped mounts)" } else { "" };
        Error::os(format!("{}: mapping its ids{hint}", what()), e)
    })
}
