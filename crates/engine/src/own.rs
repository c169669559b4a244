//! A container's own files: what it changes over its image's layers (an overlay's upper directory), or, where the file
//! system takes no overlay, a plain copy of its image's files.
//!
//! Invariant: which of the two a container has is decided at its first start and seen from what is in its directory; a
//! change of the daemon's `--storage` changes nothing about containers that have started.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use brigantine_image::{Lower, Replica};
use brigantine_shim::{OverlayOptions, Rootfs};
use brigantine_sys::mount::{Change, attr};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount, open_tree,
};

use crate::error::Context;
use crate::rootfs::{LayerRoot, Overlay};
use crate::{Error, Result};

/// A container's files, its own and its image's.
#[derive(Debug, Clone)]
pub(crate) struct Own {
    /// The container's directory.
    dir: PathBuf,
    /// The image's layers, top first.
    layers: Vec<Lower>,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Overlay,
    Copy(Replica),
    /// To be a copy when it starts.
    Uncopied,
}

impl Own {
    /// As they are. `copies` says that containers which have nothing of their own yet are to get copies.
    pub(crate) fn find(dir: &Path, layers: &[Lower], copies: bool) -> Self {
        let kind = match Replica::find(dir, layers) {
            Some(replica) => Kind::Copy(replica),
            None if copies && is_empty(&dir.join("upper")) => Kind::Uncopied,
            None => Kind::Overlay,
        };
        Self { dir: dir.to_owned(), layers: layers.to_vec(), kind }
    }

    /// Ready to be written to: copied if they have to be. Blocks.
    pub(crate) fn ready(mut self) -> Result<Self> {
        if let Kind::Uncopied = self.kind {
            self.kind = Kind::Copy(Replica::make(&self.dir, &self.layers)?);
        }
        Ok(self)
    }

    pub(crate) fn replica(&self) -> Option<&Replica> {
        match &self.kind {
            Kind::Copy(replica) => Some(replica),
            Kind::Overlay | Kind::Uncopied => None,
        }
    }

    fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// All files, to be looked into.
    pub(crate) fn look(&self) -> Result<LayerRoot> {
        match &self.kind {
            Kind::Overlay => LayerRoot::open_under(&self.upper(), &self.layers),
            Kind::Copy(replica) => LayerRoot::open(&[Lower::directory(replica.root())]),
            Kind::Uncopied => LayerRoot::open(&self.layers),
        }
    }

    /// All files as a mount that is not attached anywhere. A writable one has them to itself.
    pub(crate) fn mount(&self, writable: bool) -> Result<OwnedFd> {
        let what = || "mount the container's files".to_owned();
        let tree = match &self.kind {
            Kind::Overlay if writable => {
                let overlay = Overlay::of(&self.layers)?;
                let fs = &overlay.fs;
                fsconfig_set_string(fs.as_fd(), "upperdir", self.upper()).doing(what)?;
                fsconfig_set_string(fs.as_fd(), "workdir", self.dir.join("work")).doing(what)?;
                fsconfig_create(fs.as_fd()).doing(what)?;
                return fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
                    .doing(what);
            }
            Kind::Overlay => return crate::rootfs::union_under(&self.upper(), &self.layers),
            Kind::Copy(replica) => replica.root(),
            Kind::Uncopied => match &self.layers[..] {
                [one] if !writable => one.path().to_owned(),
                _ => return Err(Error::internal("the container's files are not copied yet")),
            },
        };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, &tree, flags).doing(what)?;
        if !writable {
            let change = Change { set: attr::RDONLY, ..Change::default() };
            brigantine_sys::mount::set_attributes(tree.as_fd(), false, change, None).doing(what)?;
        }
        Ok(tree)
    }

    /// What the runtime makes the container's root of. Mounts among the layers are handed over beside it.
    pub(crate) fn rootfs(&self) -> Rootfs {
        match &self.kind {
            Kind::Copy(replica) => Rootfs::Mapped(replica.root()),
            Kind::Overlay | Kind::Uncopied => Rootfs::Overlay {
                lower: self.layers.iter().map(|layer| layer.shown().to_owned()).collect(),
                upper: self.upper(),
                work: self.dir.join("work"),
                options: OverlayOptions::default(),
            },
        }
    }

    /// Bytes on disk that are the container's own.
    pub(crate) fn usage(dir: &Path) -> u64 {
        ["upper", "root"].iter().map(|own| crate::disk::usage(&dir.join(own))).sum()
    }
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}
