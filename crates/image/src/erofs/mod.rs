//! EROFS indexes: a layer's archive kept as one file, and beside it a small read-only file system whose files' data
//! are extents of that archive.
//!
//! [`Tree`] is what the archive describes, [`write`] lays it out. The format's facts are from the kernel's
//! `Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h`; blocks have 512 bytes (possible since Linux 6.4),
//! so that a tar archive's data stand at whole blocks and nothing of it is copied. Mounting such an index from a file
//! takes Linux 6.12. The same tree gives the same bytes.

mod layout;
mod tree;

use std::fs::File;
use std::io;

pub(crate) use tree::{Attributes, Content, Data, Inserted, NodeId, Tree};

/// Bytes of a block.
pub(crate) const BLOCK: u64 = 512;

/// Why a tree has no index.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IndexError {
    /// The format cannot express it; extracting the archive is the way.
    #[error("{0}")]
    Unfit(&'static str),
    #[error("writing the index")]
    Io(#[from] io::Error),
}

/// Writes the index of `tree` into the empty file `index`; data are extents of `archive`, which has `length` bytes.
/// Returns the index's length.
pub(crate) fn write(
    tree: &Tree,
    archive: &File,
    length: u64,
    uuid: [u8; 16],
    index: &File,
) -> Result<u64, IndexError> {
    layout::Layout::of(tree, length)?.write(tree, archive, uuid, index)
}
