//! A base image from a root file system's archive, without a store: the archive in, a loadable image archive out.
//!
//! The output depends on the input and the configuration alone, byte for byte.

use std::io::{Read, Write};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::Reference;

/// What the image's configuration says. Nothing is taken from the clock or the machine.
#[derive(Clone, Debug)]
pub struct BootstrapConfig {
    pub reference: Reference,
    /// As images name it: `amd64`, `arm64`.
    pub architecture: String,
    pub variant: Option<String>,
    /// RFC 3339.
    pub created: String,
    /// What the history says made the layer.
    pub created_by: String,
    pub comment: Option<String>,
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    pub labels: Vec<(String, String)>,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bootstrapped {
    /// The image's id: digest of its configuration.
    pub image: Digest,
    pub diff_id: Digest,
    /// Length of the uncompressed layer.
    pub layer_size: u64,
}

/// Reads a root file system's archive (compressed or not) and writes an image archive that `docker load` takes too.
pub fn image_from_rootfs_tar(
    rootfs: impl Read,
    config: &BootstrapConfig,
    output: impl Write,
) -> Result<Bootstrapped> {
    drop((rootfs, config, output));
    Err(Error::Invalid("bootstrap: being built".to_owned()))
}
