//! A base image from a root file system's archive, without a store: the archive in, a loadable image archive out.
//!
//! The output depends on the input and the configuration alone, byte for byte.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};

use rustix::fs::{Mode, OFlags};

use crate::digest::{Algorithm, Digest, Hashing};
use crate::error::{Error, IoContext as _, Result};
use crate::model::{ContainerConfig, History, ImageConfig, RootFs};
use crate::reference::Reference;
use crate::tar::{Entry, Reader, TarError};
use crate::{archive, compress};

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
/// The layer is the uncompressed archive as it came; it is kept in a temporary file meanwhile.
pub fn image_from_rootfs_tar(
    rootfs: impl Read,
    config: &BootstrapConfig,
    output: impl Write,
) -> Result<Bootstrapped> {
    if config.reference.digest().is_some() {
        return Err(Error::TagWithDigest);
    }
    let name = config.reference.clone().or_latest();
    let mut layer = tempfile()?;
    let decoded = compress::decode(rootfs).map_err(Error::ArchiveRead)?;
    let copy = Copying { source: decoded, copy: Hashing::new(&mut layer, Algorithm::Sha256) };
    let mut reader = Reader::new(BufReader::with_capacity(1 << 18, copy));
    let mut entry = Entry::default();
    let mut entries = 0u64;
    let broken = |error: TarError| match error {
        TarError::Read(error) => Error::ArchiveRead(error),
        error => Error::Archive(error.to_string()),
    };
    while reader.next(&mut entry).map_err(broken)? {
        entries += 1;
    }
    reader.drain().map_err(broken)?;
    if entries == 0 {
        return Err(Error::Archive("no root file system in it: it has no entries".to_owned()));
    }
    let (_, diff_id, layer_size) = reader.into_inner().into_inner().copy.finish();
    let created = Some(config.created.clone());
    let image = ImageConfig {
        architecture: config.architecture.clone(),
        variant: config.variant.clone(),
        os: "linux".to_owned(),
        config: ContainerConfig {
            cmd: Some(config.cmd.clone()),
            env: Some(config.env.clone()),
            labels: config.labels.iter().cloned().collect(),
            ..ContainerConfig::default()
        },
        created: created.clone(),
        history: vec![History {
            created,
            created_by: Some(config.created_by.clone()),
            comment: config.comment.clone(),
            ..History::default()
        }],
        rootfs: RootFs { diff_ids: vec![diff_id.clone()], ..RootFs::default() },
        ..ImageConfig::default()
    };
    let raw = serde_json::to_vec(&image)
        .map_err(|source| Error::Json { what: "an image's configuration".to_owned(), source })?;
    let image = archive::save_single(&raw, &mut layer, &diff_id, layer_size, &name, output)?;
    Ok(Bootstrapped { image, diff_id, layer_size })
}

/// A file nobody else can see, gone when it is closed. Where the system's directory for temporary files is: it may
/// take as much as the uncompressed layer.
fn tempfile() -> Result<File> {
    let dir = std::env::temp_dir();
    let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
    if let Ok(fd) = rustix::fs::open(&dir, flags | OFlags::TMPFILE, mode) {
        return Ok(fd.into());
    }
    // Not every file system makes files without a name.
    let path = dir.join(format!("brigantine-{}", std::process::id()));
    let fd = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode).at("create", &path)?;
    std::fs::remove_file(&path).at("remove", &path)?;
    Ok(fd.into())
}

/// Copies what is read.
struct Copying<R, W> {
    source: R,
    copy: W,
}

impl<R: Read, W: Write> Read for Copying<R, W> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read(buf)?;
        self.copy.write_all(&buf[..n])?;
        Ok(n)
    }
}
