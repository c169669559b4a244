//! Layers: applying a layer's archive to a directory, and making one from an overlay's upper directory.

use std::io::{self, Read};
use std::path::Path;

use crate::digest::{Algorithm, Digest};

/// Why a layer could not be applied or made.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("reading the archive")]
    Read(#[source] io::Error),
    #[error("entry {entry:?}: {problem}")]
    Entry { entry: String, problem: String },
    #[error("{operation} {entry:?}")]
    Os { operation: &'static str, entry: String, source: io::Error },
    #[error("the uncompressed archive has digest {actual}, not the diff id its image states")]
    DiffId { actual: Digest },
}

impl LayerError {
    /// Whether the archive is at fault rather than this machine.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Entry { .. } | Self::DiffId { .. } => true,
            Self::Read(error) => {
                matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
            }
            Self::Os { .. } => false,
        }
    }
}

/// What applying a layer found.
#[derive(Clone, Debug)]
pub struct Applied {
    /// Digest of the uncompressed archive.
    pub diff_id: Digest,
    /// Sum of the lengths of regular files.
    pub size: u64,
    /// What the tree takes on disk, in whole blocks.
    pub disk: u64,
    pub entries: u64,
}

/// Extracts the archive `reader` yields (compressed or not) into the empty directory `target`, in overlay's form.
pub fn apply(reader: impl Read, target: &Path, algorithm: Algorithm) -> Result<Applied, LayerError> {
    drop((reader, algorithm));
    Err(LayerError::Os {
        operation: "apply",
        entry: target.display().to_string(),
        source: io::ErrorKind::Unsupported.into(),
    })
}
