//! Archives of images: load, save, import and commit.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::PathBuf;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::model::{ContainerConfig, Healthcheck};
use crate::reference::Reference;
use crate::store::{Image, Store};

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
    /// Bytes of the archive read so far.
    Reading { bytes: u64 },
    /// A layer is being extracted.
    Layer { diff_id: Digest, size: u64 },
}

/// Loads a docker-archive or OCI-archive, compressed or not.
pub fn load(
    store: &Store,
    archive: impl Read,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Vec<Loaded>> {
    drop((store, archive));
    progress(LoadProgress::Reading { bytes: 0 });
    Err(Error::Invalid("load: being built".to_owned()))
}

/// Writes the named images (names, ids, or a repository for all its tags) as one archive.
pub fn save(store: &Store, names: &[String], output: impl Write) -> Result<()> {
    drop((store, names, output));
    Err(Error::Invalid("save: being built".to_owned()))
}

/// A root file system to make an image of.
#[derive(Clone, Debug, Default)]
pub struct Import {
    pub reference: Option<Reference>,
    /// Dockerfile instructions: `CMD ["sh"]`, `ENV a=b` …
    pub changes: Vec<String>,
    pub message: String,
    /// Docker's `os[/arch[/variant]]`; the host's when not given.
    pub platform: Option<crate::Platform>,
}

/// Makes an image of a root file system's archive, compressed or not.
pub fn import(store: &Store, archive: impl Read, import: &Import) -> Result<Image> {
    drop((store, archive, import));
    Err(Error::Invalid("import: being built".to_owned()))
}

/// A container to make an image of.
#[derive(Clone, Debug, Default)]
pub struct Commit {
    /// The image the container was made from.
    pub parent: Option<Digest>,
    /// The overlay's upper directory, or none for no new layer.
    pub upper: Option<PathBuf>,
    /// The new image's configuration, before `changes`.
    pub config: ContainerConfig,
    pub changes: Vec<String>,
    pub reference: Option<Reference>,
    pub author: Option<String>,
    pub message: Option<String>,
    /// What history says made the layer: the container's command.
    pub created_by: String,
}

/// Makes an image of a container: its image's layers and one more.
pub fn commit(store: &Store, commit: &Commit) -> Result<Image> {
    drop((store.clone(), commit.clone()));
    Err(Error::Invalid("commit: being built".to_owned()))
}

/// Applies Dockerfile-style instructions to a configuration.
pub fn apply_changes(config: &mut ContainerConfig, changes: &[String]) -> Result<()> {
    drop((config.clone(), changes, Healthcheck::default(), BTreeMap::<u8, u8>::new()));
    Err(Error::Invalid("changes: being built".to_owned()))
}
