//! `--build-context NAME=oci-layout://DIR[:TAG|@DIGEST]`: one image of an OCI image layout, as an archive.
//!
//! Invariant: only blobs of the layout that the chosen descriptor leads to are sent, each by its digest.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::fault::{Fault, Outcome};

/// The annotation that names what an index entry stands for.
const NAME: &str = "org.opencontainers.image.ref.name";
/// Indexes in indexes: no more of them than anybody has.
const DEPTH: usize = 4;
/// The most bytes of a manifest.
const MOST: u64 = 16 << 20;

/// What is sent of a layout.
pub struct Chosen {
    dir: PathBuf,
    index: Value,
    blobs: BTreeSet<String>,
}

impl Chosen {
    /// Finds what `DIR[:TAG|@DIGEST]` means.
    pub fn find(text: &str) -> Outcome<Self> {
        let wrong = |why: String| Fault::said(format!("oci-layout://{text}: {why}"));
        let (dir, digest) = match text.split_once('@') {
            Some((dir, digest)) => (dir, Some(digest)),
            None => (text, None),
        };
        // A colon behind the last slash begins a tag.
        let (dir, tag) = match dir.rsplit_once(':') {
            Some((dir, tag)) if !tag.contains('/') => (dir, Some(tag)),
            _ => (dir, None),
        };
        let dir = PathBuf::from(dir);
        if !dir.join("oci-layout").is_file() {
            return Err(wrong(format!(
                "{} is no OCI image layout: it has no file oci-layout",
                dir.display()
            )));
        }
        let index = document(&dir.join("index.json")).map_err(&wrong)?;
        let entries = index["manifests"].as_array().cloned().unwrap_or_default();
        let named = |entry: &&Value, name: &str| entry["annotations"][NAME] == name;
        let found = match (digest, tag) {
            (Some(digest), _) => entries.iter().find(|entry| entry["digest"] == digest),
            (None, Some(tag)) => entries.iter().find(|entry| named(entry, tag)),
            (None, None) => match &entries[..] {
                [only] => Some(only),
                all => all.iter().find(|entry| named(entry, "latest")),
            },
        };
        let Some(found) = found else {
            let names: Vec<&str> =
                entries.iter().filter_map(|entry| entry["annotations"][NAME].as_str()).collect();
            let wanted = digest.or(tag).unwrap_or("latest");
            return Err(wrong(format!("there is no {wanted}: the layout has {}", names.join(", "))));
        };
        let mut blobs = BTreeSet::new();
        collect(&dir, found, DEPTH, &mut blobs).map_err(wrong)?;
        let index = json!({ "schemaVersion": 2, "manifests": [found] });
        Ok(Self { dir, index, blobs })
    }

    /// Writes the archive.
    pub fn write(&self, output: impl Write) -> io::Result<()> {
        let mut archive = tar::Builder::new(io::BufWriter::with_capacity(256 << 10, output));
        for (name, text) in [
            ("oci-layout", json!({ "imageLayoutVersion": "1.0.0" }).to_string()),
            ("index.json", self.index.to_string()),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(text.len() as u64);
            archive.append_data(&mut header, name, text.as_bytes())?;
        }
        for blob in &self.blobs {
            archive.append_path_with_name(self.dir.join(blob), blob)?;
        }
        archive.into_inner()?.flush()
    }
}

fn document(path: &Path) -> Result<Value, String> {
    let failed = |error: io::Error| format!("{}: {}", path.display(), crate::output::os_text(&error));
    if std::fs::metadata(path).map_err(failed)?.len() > MOST {
        return Err(format!("{} is more than a manifest can be", path.display()));
    }
    let raw = std::fs::read(path).map_err(failed)?;
    serde_json::from_slice(&raw).map_err(|error| format!("{}: {error}", path.display()))
}

/// The blobs that a descriptor leads to, as far as they are there: a layout may lack other platforms'.
fn collect(dir: &Path, descriptor: &Value, depth: usize, blobs: &mut BTreeSet<String>) -> Result<(), String> {
    let digest = descriptor["digest"].as_str().unwrap_or_default();
    let plain = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric());
    let Some((algorithm, hex)) = digest.split_once(':').filter(|(a, h)| plain(a) && plain(h)) else {
        return Err(format!("{digest:?} is not a digest"));
    };
    let path = format!("blobs/{algorithm}/{hex}");
    if !dir.join(&path).is_file() {
        return Ok(());
    }
    let kind = descriptor["mediaType"].as_str().unwrap_or_default();
    if depth > 0 && (kind.contains("manifest") || kind.contains("index")) {
        let inner = document(&dir.join(&path))?;
        let lists = [inner["manifests"].as_array(), inner["layers"].as_array()];
        for next in lists.into_iter().flatten().flatten() {
            collect(dir, next, depth - 1, blobs)?;
        }
        if inner["config"].is_object() {
            collect(dir, &inner["config"], depth - 1, blobs)?;
        }
    }
    blobs.insert(path);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_found_by_tag_digest_or_alone() {
        let dir = tempfile::tempdir().unwrap();
        let blob = |hex: &str, text: &str| {
            let blobs = dir.path().join("blobs/sha256");
            std::fs::create_dir_all(&blobs).unwrap();
            std::fs::write(blobs.join(hex), text).unwrap();
        };
        let manifest = json!({ "config": { "digest": "sha256:cc" }, "layers": [{ "digest": "sha256:aa" }, { "digest": "sha256:gone" }] });
        blob("11", &manifest.to_string());
        blob("cc", "{}");
        blob("aa", "layer");
        blob("99", "another's");
        let entry = |digest: &str, name: &str| json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "annotations": { NAME: name } });
        let index = json!({ "manifests": [entry("sha256:99", "other"), entry("sha256:11", "one")] });
        std::fs::write(dir.path().join("oci-layout"), "{}").unwrap();
        std::fs::write(dir.path().join("index.json"), index.to_string()).unwrap();
        let place = dir.path().to_str().unwrap();
        for text in [format!("{place}:one"), format!("{place}@sha256:11")] {
            let chosen = Chosen::find(&text).ok().unwrap();
            let blobs: Vec<&str> = chosen.blobs.iter().map(String::as_str).collect();
            assert_eq!(blobs, ["blobs/sha256/11", "blobs/sha256/aa", "blobs/sha256/cc"], "{text}");
            let mut written = Vec::new();
            chosen.write(&mut written).unwrap();
            let mut archive = tar::Archive::new(&written[..]);
            assert_eq!(archive.entries().unwrap().count(), 5);
        }
        for (text, words) in [
            (place.to_owned(), "there is no latest: the layout has other, one"),
            (format!("{place}:two"), "there is no two"),
            (format!("{place}@sha256:22"), "there is no sha256:22"),
            ("/nonexistent:x".to_owned(), "no OCI image layout"),
        ] {
            let error = Chosen::find(&text).err().unwrap().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
