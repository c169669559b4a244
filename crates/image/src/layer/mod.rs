//! Layers: applying a layer's archive to a directory, and making one from an overlay's upper directory.

mod apply;
mod diff;
mod index;
mod place;
mod stream;

use std::io;
use std::sync::OnceLock;

use crate::digest::{Algorithm, Digest, Hasher};
use crate::tar::TarError;

pub(crate) use apply::apply_named;
pub use apply::{Applied, apply, apply_over, apply_tree};
pub use diff::{Owners, Packed, pack, pack_as, pack_upper, pack_upper_without};
pub(crate) use diff::{pack_changes, xattrs};
pub use index::{ARCHIVE, INDEX, Indexed, index, index_in_place, inspect};
pub(crate) use index::{Kept, Unindexed, index_named, inspect_named, keep, tree_of};
pub(crate) use stream::written;

/// Prefix of the name of an entry that hides what lower layers have.
const WHITEOUT: &[u8] = b".wh.";
/// Prefix of names that are not entries but marks.
const MARK: &[u8] = b".wh..wh.";
/// The mark of a directory that hides all lower layers have in it.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Overlay's name for an opaque directory.
const OPAQUE_XATTR: &str = "trusted.overlay.opaque";
/// Longest name the kernel takes.
const NAME_MAX: usize = 255;
/// Longest path the kernel takes, without the zero byte.
const PATH_MAX: usize = 4095;

/// Where the digest of an uncompressed archive comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DiffId<'a> {
    /// What is read is hashed.
    Hashed(Algorithm),
    /// Somebody else hashes the same bytes, and has told it before the reader sees their end.
    Told(&'a OnceLock<Digest>),
}

impl DiffId<'_> {
    fn hasher(self) -> Option<Hasher> {
        match self {
            Self::Hashed(algorithm) => Some(algorithm.hasher()),
            Self::Told(_) => None,
        }
    }

    fn finish(self, hasher: Option<Hasher>) -> Result<Digest, LayerError> {
        let told = match self {
            Self::Hashed(_) => None,
            Self::Told(told) => told.get().cloned(),
        };
        hasher.map(Hasher::finish).or(told).ok_or_else(|| {
            LayerError::Read(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the archive's digest is not known",
            ))
        })
    }
}

/// Why a layer could not be applied or made.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("reading the archive")]
    Read(#[source] io::Error),
    /// The archive is cut short or not a tar archive.
    #[error("{0}")]
    Malformed(String),
    #[error("entry {entry:?}: {problem}")]
    Entry { entry: String, problem: String },
    #[error("{operation} {entry:?}")]
    Os { operation: &'static str, entry: String, source: io::Error },
    #[error("the uncompressed archive has digest {actual}, not the diff id its image states")]
    DiffId { actual: Digest },
    #[error("writing the archive")]
    Write(#[source] io::Error),
}

impl LayerError {
    /// Whether the archive is at fault rather than this machine.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Entry { .. } | Self::DiffId { .. } | Self::Malformed(_) => true,
            Self::Read(error) => {
                matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
            }
            Self::Os { .. } | Self::Write(_) => false,
        }
    }
}

impl From<TarError> for LayerError {
    fn from(error: TarError) -> Self {
        match error {
            TarError::Read(error) => Self::Read(error),
            error => Self::Malformed(error.to_string()),
        }
    }
}

/// A path or name for people.
fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
