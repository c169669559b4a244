//! What is bound: trees of the host's, and of the container's own root.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use brigantine_sys::mount;
use rustix::fs::StatVfsMountFlags;

use super::options::{Options, Unnamed, changes};
use super::{Context, c_string, open_tree, target};
use crate::error::Error;
use crate::plan::{InsideTree, PathTree, Tree};

/// A bind mount's tree, changed as its options say.
pub(super) fn tree(
    source: &Path,
    options: &Options,
    unnamed: Unnamed,
    context: &Context<'_>,
    what: &dyn Fn() -> String,
) -> Result<Tree, Error> {
    let changes = changes(options, unnamed);
    let recursive = options.recursive;
    if context.rootfs.is_some_and(|root| source.starts_with(root)) {
        let source = target(&context.in_root(source), false)?;
        return Ok(Tree::Inside(Box::new(InsideTree { source, recursive, changes, ids: None })));
    }
    if context.late {
        use std::os::unix::ffi::OsStrExt;
        let path = c_string(source.as_os_str().as_bytes(), "mount source")?;
        return Ok(Tree::Path(Box::new(PathTree { path, recursive, changes })));
    }
    let failed = |e: rustix::io::Errno| Error::os(what(), e);
    let tree = open_tree(source, recursive).map_err(failed)?;
    let before = match unnamed {
        Unnamed::Locked if options.named => Some(attributes(&tree).map_err(failed)?),
        _ => None,
    };
    for (change, recursive) in changes {
        mount::set_attributes(tree.as_fd(), recursive, change, None).map_err(failed)?;
    }
    if let Some(before) = before {
        refuse_unlocked(before, attributes(&tree).map_err(failed)?, what)?;
    }
    Ok(Tree::Open(tree))
}

/// What holds for a mount, its file system's own part of it included.
fn attributes(tree: &OwnedFd) -> Result<StatVfsMountFlags, rustix::io::Errno> {
    rustix::fs::fstatvfs(tree).map(|stat| stat.f_flag)
}

/// What a mount of the host's forbids stays so in a user namespace, as it does where the kernel is the one who sees to it.
fn refuse_unlocked(
    before: StatVfsMountFlags,
    after: StatVfsMountFlags,
    what: &dyn Fn() -> String,
) -> Result<(), Error> {
    use StatVfsMountFlags as F;
    let gone = (before - after) & (F::RDONLY | F::NOSUID | F::NODEV | F::NOEXEC);
    let others = (before ^ after) & (F::NOATIME | F::NODIRATIME | F::RELATIME);
    if gone.is_empty() && others.is_empty() {
        return Ok(());
    }
    let names = [
        (F::RDONLY, "ro"),
        (F::NOSUID, "nosuid"),
        (F::NODEV, "nodev"),
        (F::NOEXEC, "noexec"),
        (F::NOATIME, "access times"),
        (F::NODIRATIME, "access times"),
        (F::RELATIME, "access times"),
    ];
    let which = names.iter().find(|(flag, _)| (gone | others).contains(*flag)).map_or("", |(_, name)| name);
    Err(Error::os(
        format!("{}: {which} of its source cannot be changed for a user namespace", what()),
        rustix::io::Errno::PERM,
    ))
}
