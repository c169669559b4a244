//! The store's error: what was being done to which object, so that a caller can choose a status and a person can act.

use std::io;
use std::path::PathBuf;

use crate::digest::{Digest, DigestError};
use crate::layer::LayerError;
use crate::model::DocumentError;
use crate::reference::ReferenceError;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong in the image store. [`Error::class`] groups the variants by what a caller does about them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("No such image: {0}")]
    NoSuchImage(String),
    #[error("image id prefix {prefix:?} is ambiguous: it matches {} images", .matches.len())]
    Ambiguous { prefix: String, matches: Vec<Digest> },
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    #[error(transparent)]
    Digest(#[from] DigestError),
    #[error("{0}")]
    Invalid(String),
    /// An image that is there, but for another platform than the one asked for; in docker's words.
    #[error("{what} was found but does not match the specified platform: wanted {wanted}, actual: {actual}")]
    PlatformMismatch { what: String, wanted: String, actual: String },
    #[error("refusing to create a tag with a digest reference")]
    TagWithDigest,
    /// An image that may not be removed now.
    #[error("conflict: {0}")]
    Conflict(String),
    #[error("content {0} is not in the store")]
    NoSuchContent(Digest),
    #[error("content {expected}: the data has digest {actual}")]
    DigestMismatch { expected: Digest, actual: Digest },
    #[error("content {digest}: expected {expected} bytes, got {actual}")]
    SizeMismatch { digest: Digest, expected: u64, actual: u64 },
    #[error("{what} is not valid JSON of its kind")]
    Json { what: String, source: serde_json::Error },
    #[error("{what}")]
    Document { what: String, source: DocumentError },
    /// An archive handed to load or import.
    #[error("archive: {0}")]
    Archive(String),
    #[error("archive")]
    ArchiveRead(#[source] io::Error),
    #[error("layer {layer}")]
    Layer { layer: String, source: LayerError },
    #[error("{operation} {}", .path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("writing the archive")]
    Output(#[source] io::Error),
}

/// What a caller does about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    NotFound,
    InvalidParameter,
    Conflict,
    Internal,
}

impl Error {
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::NoSuchImage(_) | Self::PlatformMismatch { .. } => ErrorClass::NotFound,
            Self::Ambiguous { .. }
            | Self::Reference(_)
            | Self::Digest(_)
            | Self::Invalid(_)
            | Self::TagWithDigest
            | Self::DigestMismatch { .. }
            | Self::SizeMismatch { .. }
            | Self::Json { .. }
            | Self::Document { .. }
            | Self::Archive(_)
            | Self::ArchiveRead(_) => ErrorClass::InvalidParameter,
            Self::Layer { source, .. } if source.is_input() => ErrorClass::InvalidParameter,
            Self::Conflict(_) => ErrorClass::Conflict,
            Self::NoSuchContent(_) | Self::Layer { .. } | Self::Io { .. } | Self::Output(_) => {
                ErrorClass::Internal
            }
        }
    }

    /// The error and all its causes on one line.
    pub fn chain(&self) -> String {
        use std::error::Error as _;
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}

/// Puts the operation and the path on an I/O error.
pub(crate) trait IoContext<T> {
    fn at(self, operation: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn at(self, operation: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|error| Error::Io { operation, path: path.into(), source: error.into() })
    }
}

/// Puts the document's name on a JSON error.
pub(crate) fn json<'a, T: serde::Deserialize<'a>>(raw: &'a [u8], what: impl FnOnce() -> String) -> Result<T> {
    serde_json::from_slice(raw).map_err(|source| Error::Json { what: what(), source })
}
