//! Archives of images: load, save, import, commit and compose.

mod changes;
mod compose;
mod create;
mod foresight;
mod legacy;
mod load;
mod save;
mod spool;
mod unpacking;

use crate::digest::Digest;
use crate::reference::Reference;

pub use changes::apply_changes;
pub use compose::{Compose, Edit, compose};
pub(crate) use create::undone;
pub use create::{Commit, Import, commit, import};
pub(crate) use load::make_manifest;
pub use load::{load, load_for, load_nameless};
pub(crate) use save::save_single;
pub use save::{save, save_for};

/// One image (or one more name of it) that [`load`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    pub image: Digest,
    /// The name it was given; none for an image without a name.
    pub reference: Option<Reference>,
    /// The image that lost the name to this one.
    pub replaced: Option<Digest>,
}

impl Loaded {
    /// What Docker prints about it.
    pub fn message(&self) -> String {
        match &self.reference {
            Some(reference) => format!("Loaded image: {}", reference.familiar()),
            None => format!("Loaded image ID: {}", self.image),
        }
    }
}

/// How far a load is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadProgress {
    /// Bytes of the archive (uncompressed) read so far.
    Reading { bytes: u64 },
    /// A layer is about to be extracted; its size as stored.
    Layer { diff_id: Digest, size: u64 },
}
