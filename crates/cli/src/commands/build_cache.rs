//! `brig build --cache-from` and `--cache-to`, in buildx's words
//! (docs.docker.com/build/cache/backends), and where cache mounts go in the same words.
//!
//! A folder is an OCI image layout of the user's: the engine reads and writes its blobs through the session, and
//! `index.json`, which says which of them is the cache, stays with this command.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::args::Matches;
use crate::fault::{Fault, Outcome};
use crate::output;
use crate::value::Value as Answer;

/// The annotation that names an entry of an index.
const NAME: &str = "org.opencontainers.image.ref.name";

/// The caches of one build.
#[derive(Debug, Default)]
pub struct Caches {
    from: Vec<Value>,
    to: Vec<Value>,
    /// Folders to be lent, by the name the engine knows them by.
    folders: BTreeMap<String, PathBuf>,
    /// The tags of folders that are written to.
    tags: BTreeMap<String, String>,
}

/// One place, as the engine is told of it.
pub struct Place(Value);

impl Place {
    pub fn text(&self) -> String {
        self.0.to_string()
    }

    /// The name in a registry, if that is where it is.
    pub fn reference(&self) -> Option<&str> {
        self.0["Attrs"]["ref"].as_str()
    }
}

impl Caches {
    pub fn of(matches: &Matches) -> Outcome<Self> {
        let mut caches = Self::default();
        for text in matches.list("cache-from") {
            caches.add_from(text)?;
        }
        for text in matches.list("cache-to") {
            caches.add_to(text)?;
        }
        Ok(caches)
    }

    /// For the request's `cacheimports`.
    pub fn from(&self) -> String {
        json!(self.from).to_string()
    }

    /// For the request's `cacheexports`.
    pub fn to(&self) -> String {
        json!(self.to).to_string()
    }

    pub fn folders(&self) -> BTreeMap<String, PathBuf> {
        self.folders.clone()
    }

    fn add_from(&mut self, text: &str) -> Outcome {
        match self.source("cache-from", text)? {
            Ok(place) => self.from.push(place.0),
            // As with buildx, a cache that is not there yet is no mistake.
            Err(missing) => {
                output::error_line(&format!("--cache-from {text}: {missing} yet, which is no mistake"));
            }
        }
        Ok(())
    }

    fn add_to(&mut self, text: &str) -> Outcome {
        let place = self.target("cache-to", text)?;
        self.to.push(place.0);
        Ok(())
    }

    /// Where a cache mount goes: what `--to` says.
    pub fn mount_to(&mut self, text: &str) -> Outcome<Place> {
        self.target("to", text)
    }

    /// Where a cache mount comes from: what `--from` says.
    pub fn mount_from(&mut self, text: &str) -> Outcome<Place> {
        self.source("from", text)?.map_err(|missing| Fault::said(format!("--from {text}: {missing}")))
    }

    /// A place to read from, or that it is not there.
    fn source(&mut self, flag: &str, text: &str) -> Outcome<Result<Place, String>> {
        let (kind, mut attributes) = fields(flag, text)?;
        if kind != "local" {
            return Ok(Ok(Place(json!({ "Type": kind, "Attrs": attributes }))));
        }
        let folder = taken(&mut attributes, "src")
            .ok_or_else(|| Fault::said(format!("--{flag} {text}: src=FOLDER is needed")))?;
        let tag = taken(&mut attributes, "tag").unwrap_or_else(|| "latest".to_owned());
        let path = PathBuf::from(&folder);
        let digest = match taken(&mut attributes, "digest") {
            Some(digest) => Some(digest),
            None => named(&path, &tag)?,
        };
        let Some(digest) = digest else {
            return Ok(Err(format!("there is no cache {tag:?} in {folder}")));
        };
        let store = self.lend(path)?;
        attributes.insert("store".to_owned(), store.into());
        attributes.insert("digest".to_owned(), digest.into());
        Ok(Ok(Place(json!({ "Type": kind, "Attrs": attributes }))))
    }

    /// A place to write to.
    fn target(&mut self, flag: &str, text: &str) -> Outcome<Place> {
        let (kind, mut attributes) = fields(flag, text)?;
        if kind == "local" {
            let folder = taken(&mut attributes, "dest")
                .ok_or_else(|| Fault::said(format!("--{flag} {text}: dest=FOLDER is needed")))?;
            let tag = taken(&mut attributes, "tag").unwrap_or_else(|| "latest".to_owned());
            std::fs::create_dir_all(&folder).map_err(Fault::io(&folder))?;
            let store = self.lend(PathBuf::from(&folder))?;
            self.tags.insert(store.clone(), tag);
            attributes.insert("store".to_owned(), store.into());
        }
        Ok(Place(json!({ "Type": kind, "Attrs": attributes })))
    }

    fn lend(&mut self, folder: PathBuf) -> Outcome<String> {
        let whole = std::fs::canonicalize(&folder).map_err(Fault::io(&folder.display().to_string()))?;
        // The name travels as a header.
        let store = format!("local:{}", whole.display());
        let store = if store.is_ascii() { store } else { format!("local:{}", self.folders.len()) };
        self.folders.insert(store.clone(), whole);
        Ok(store)
    }

    /// Names a cache that the engine has written, in its folder's index.
    pub fn written(&self, aux: &Answer) -> Outcome {
        let written = aux.at("CacheWritten");
        let store = written.at("store").text();
        let (Some(folder), Some(tag)) = (self.folders.get(store), self.tags.get(store)) else {
            return Ok(());
        };
        let manifest = written.at("manifest");
        let entry = json!({
            "mediaType": manifest.at("mediaType").text(),
            "digest": manifest.at("digest").text(),
            "size": manifest.at("size").int(),
            "annotations": { NAME: tag },
        });
        enter(folder, tag, entry).map_err(Fault::io(&folder.display().to_string()))
    }
}

/// `type=KIND,KEY=VALUE…`, or the name of an image.
fn fields(flag: &str, text: &str) -> Outcome<(String, serde_json::Map<String, Value>)> {
    let mut attributes = serde_json::Map::new();
    if !text.contains('=') {
        attributes.insert("ref".to_owned(), text.into());
        return Ok(("registry".to_owned(), attributes));
    }
    for field in text.split(',') {
        let (key, value) = field
            .split_once('=')
            .ok_or_else(|| Fault::said(format!("--{flag} {text}: {field:?} is not KEY=VALUE")))?;
        attributes.insert(key.trim().to_lowercase(), value.into());
    }
    let kind = taken(&mut attributes, "type")
        .ok_or_else(|| Fault::said(format!("--{flag} {text}: type=inline, registry or local is needed")))?;
    Ok((kind, attributes))
}

fn taken(attributes: &mut serde_json::Map<String, Value>, name: &str) -> Option<String> {
    attributes.remove(name)?.as_str().map(str::to_owned)
}

fn index(folder: &Path) -> io::Result<Option<Value>> {
    match std::fs::read(folder.join("index.json")) {
        Ok(raw) => serde_json::from_slice(&raw).map(Some).map_err(io::Error::other),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The digest of what a folder's index calls `tag`.
fn named(folder: &Path, tag: &str) -> Outcome<Option<String>> {
    let index = index(folder).map_err(Fault::io(&folder.display().to_string()))?.unwrap_or_default();
    let all = index["manifests"].as_array().cloned().unwrap_or_default();
    let found = all.iter().find(|entry| entry["annotations"][NAME] == tag);
    Ok(found.and_then(|entry| entry["digest"].as_str()).map(str::to_owned))
}

/// Writes an entry into a folder's index, in place of the one that had its tag.
fn enter(folder: &Path, tag: &str, entry: Value) -> io::Result<()> {
    let place = |name: &str, raw: Vec<u8>| {
        let fresh = folder.join(format!("{name}.{}.new", std::process::id()));
        std::fs::write(&fresh, raw)?;
        std::fs::rename(&fresh, folder.join(name))
    };
    let mut index = index(folder)?.unwrap_or_else(|| json!({ "schemaVersion": 2, "manifests": [] }));
    let mut all = index["manifests"].as_array().cloned().unwrap_or_default();
    all.retain(|known| known["annotations"][NAME] != tag);
    all.push(entry);
    index["manifests"] = all.into();
    place("oci-layout", json!({ "imageLayoutVersion": "1.0.0" }).to_string().into_bytes())?;
    place("index.json", index.to_string().into_bytes())
}
