//! Results of ADDs on disk, in libcni's form (`cniCacheV1`), one file an attachment.
//!
//! Invariant: a file is whole or not there; it goes when its DEL has succeeded.

use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::NetworkList;
use crate::error::Error;

pub(super) const KIND: &str = "cniCacheV1";

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Cached {
    pub kind: String,
    pub container_id: String,
    /// The configuration's text, in base64.
    pub config: String,
    pub if_name: String,
    pub network_name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub netns: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cni_args: Vec<[String; 2]>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub capability_args: Map<String, Value>,
    pub result: Value,
}

impl Cached {
    /// The network as it was then.
    pub fn list(&self) -> Result<NetworkList, Error> {
        let place = format!("the kept result of container {}", self.container_id);
        let text = STANDARD.decode(&self.config).unwrap_or_default();
        NetworkList::parse(&String::from_utf8_lossy(&text), &place)
    }
}

pub(super) fn encode(list: &NetworkList) -> String {
    STANDARD.encode(Value::from(list.clone()).to_string())
}

fn file(cache: &Path, network: &str, container: &str, interface: &str) -> PathBuf {
    cache.join("results").join(format!("{network}-{container}-{interface}"))
}

fn trouble(what: String) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::CniCache { what, source }
}

pub(super) fn write(cache: &Path, cached: &Cached) -> Result<(), Error> {
    let path = file(cache, &cached.network_name, &cached.container_id, &cached.if_name);
    let fresh = path.with_file_name(format!(".{}.new", path.file_name().unwrap_or_default().display()));
    let store = || -> std::io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(cache.join("results"))?;
        let mut file =
            std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&serde_json::to_vec(cached)?)?;
        file.sync_all()?;
        std::fs::rename(&fresh, &path)
    };
    store().map_err(trouble(format!("keep the result {}", path.display())))
}

pub(super) fn read(
    cache: &Path,
    network: &str,
    container: &str,
    interface: &str,
) -> Result<Option<Cached>, Error> {
    let path = file(cache, network, container, interface);
    match std::fs::read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(trouble(format!("read {}", path.display()))(error)),
        Ok(text) => match serde_json::from_slice(&text) {
            Ok(cached) => Ok(Some(cached)),
            Err(error) => Err(trouble(format!("read {}", path.display()))(error.into())),
        },
    }
}

pub(super) fn remove(cache: &Path, network: &str, container: &str, interface: &str) -> Result<(), Error> {
    let path = file(cache, network, container, interface);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(trouble(format!("remove {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

/// All that are kept; what is unreadable is left alone.
pub(super) fn all(cache: &Path) -> Result<Vec<Cached>, Error> {
    let dir = cache.join("results");
    let entries = match std::fs::read_dir(&dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.map_err(trouble(format!("read {}", dir.display())))?,
    };
    let is_whole = |entry: &std::fs::DirEntry| !entry.file_name().as_encoded_bytes().starts_with(b".");
    let files = entries.filter_map(Result::ok).filter(is_whole);
    let texts = files.filter_map(|entry| std::fs::read(entry.path()).ok());
    Ok(texts
        .filter_map(|text| serde_json::from_slice::<Cached>(&text).ok())
        .filter(|cached| cached.kind == KIND)
        .collect())
}
