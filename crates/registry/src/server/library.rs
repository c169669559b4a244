//! What a registry can be read from: its own storage, or an engine's image store.

use std::fs::File;
use std::io;

use brigantine_image::Digest;
use brigantine_image::model::Descriptor;

use super::route::Pointer;

/// A manifest as it was pushed, byte for byte.
#[derive(Debug, Clone)]
pub(super) struct StoredManifest {
    pub digest: Digest,
    pub media_type: String,
    pub raw: Vec<u8>,
}

/// Reads repositories. None of it waits for a writer.
pub(super) trait Library: Send + Sync {
    fn manifest(&self, repository: &str, pointer: &Pointer) -> io::Result<Option<StoredManifest>>;

    /// The blob and its size in bytes.
    fn blob(&self, repository: &str, digest: &Digest) -> io::Result<Option<(File, u64)>>;

    /// All tags in order of their bytes; `None` where there is no such repository.
    fn tags(&self, repository: &str) -> io::Result<Option<Vec<String>>>;

    /// All repositories in order of their bytes.
    fn repositories(&self) -> io::Result<Vec<String>>;

    /// Descriptors of the manifests that name `subject`.
    fn referrers(&self, repository: &str, subject: &Digest) -> io::Result<Vec<Descriptor>>;
}
