//! Saving images: one archive that is an OCI layout and, by manifest.json and repositories, a docker-archive.
//!
//! Blobs go out as they are, so ids and digests are the same wherever the archive is loaded. The output depends on
//! the images and names alone.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read as _, Write};

use serde::Serialize;

use crate::digest::Digest;
use crate::error::{Error, IoContext as _, Result};
use crate::media;
use crate::model::{Descriptor, Index};
use crate::platform::Platform;
use crate::reference::Reference;
use crate::store::{Image, Store};
use crate::tar::{Entry, Time, Writer};

const EPOCH: Time = Time { seconds: 0, nanos: 0 };

/// One item of manifest.json.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Writes the named images as one archive. A name is `repository:tag`, an id, or a repository for all its tags.
pub fn save(store: &Store, names: &[String], output: impl Write) -> Result<()> {
    save_for(store, names, &[], output)
}

/// The same of images that have to be for one of the `platforms`, if there are any.
pub fn save_for(store: &Store, names: &[String], platforms: &[Platform], output: impl Write) -> Result<()> {
    // Holds what is being read; an image removed meanwhile is saved whole all the same.
    let lease = store.lease()?;
    let images = select(store, names, platforms)?;
    let mut blobs = BTreeSet::new();
    for (image, _) in &images {
        let indexed = image.index.as_ref().map(|index| store.index_content(index)).transpose()?;
        for digest in std::iter::once(&image.manifest.digest)
            .chain([&image.id])
            .chain(image.layers.iter().map(|layer| &layer.digest))
            .chain(indexed.iter().flatten())
        {
            lease.hold(digest)?;
            if !store.content().has(digest) {
                return Err(Error::NoSuchContent(digest.clone()));
            }
            blobs.insert(digest.clone());
        }
    }
    let mut writer = Writer::new(io::BufWriter::with_capacity(1 << 18, output));
    writer.append_dir("blobs/", EPOCH).map_err(Error::Output)?;
    let mut algorithm = "";
    for digest in &blobs {
        if digest.algorithm().as_str() != algorithm {
            algorithm = digest.algorithm().as_str();
            writer.append_dir(&format!("blobs/{algorithm}/"), EPOCH).map_err(Error::Output)?;
        }
        let size = store.content().size(digest)?;
        let entry = Entry {
            path: blob_path(digest).into_bytes(),
            mode: 0o644,
            stored: size,
            size,
            ..Entry::default()
        };
        let mut blob = store.content().open(digest)?.take(size);
        writer.append(&entry, &mut blob).map_err(Error::Output)?;
    }
    for (name, document) in documents(&images)? {
        writer.append_bytes(name, &document, EPOCH).map_err(Error::Output)?;
    }
    writer.finish().and_then(|mut output| output.flush()).map_err(Error::Output)
}

/// Each image once, with the names it is saved under.
fn select(store: &Store, names: &[String], platforms: &[Platform]) -> Result<Vec<(Image, Vec<Reference>)>> {
    if names.is_empty() {
        return Err(Error::Invalid("no image to save was named".to_owned()));
    }
    let mut selected: Vec<(Image, Vec<Reference>)> = Vec::new();
    let mut add = |image: Image, name: Option<Reference>| {
        let at = selected.iter().position(|(known, _)| known.id == image.id).unwrap_or_else(|| {
            selected.push((image, Vec::new()));
            selected.len() - 1
        });
        let known = &mut selected[at].1;
        known.extend(name.filter(|name| !known.contains(name)));
    };
    for text in names {
        let parsed = Reference::parse(text).ok();
        if let Some(name) = &parsed
            && name.is_name_only()
        {
            let mut any = false;
            for image in store.list()? {
                for tag in image.tags.clone().into_iter().filter(|tag| tag.same_repository(name)) {
                    image.require_platform(&tag.familiar(), platforms)?;
                    any = true;
                    add(image.clone(), Some(tag));
                }
            }
            if any {
                continue;
            }
        }
        let image = store.resolve(text)?;
        image.require_platform(text, platforms)?;
        let name = parsed.map(Reference::or_latest).filter(|name| image.tags.contains(name));
        add(image, name);
    }
    Ok(selected)
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().as_str(), digest.hex())
}

/// The documents beside the blobs, in the order they are written.
fn documents(images: &[(Image, Vec<Reference>)]) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let mut items = Vec::new();
    let mut manifests = Vec::new();
    let mut repositories: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for (image, names) in images {
        let layers: Vec<String> = image.layers.iter().map(|layer| blob_path(&layer.digest)).collect();
        items.push(Item {
            config: blob_path(&image.id),
            repo_tags: (!names.is_empty()).then(|| names.iter().map(Reference::familiar).collect()),
            layers,
        });
        let descriptor = match &image.index {
            Some(index) => index.clone(),
            None => Descriptor {
                annotations: BTreeMap::new(),
                platform: Some(image.config.platform()),
                ..image.manifest.clone()
            },
        };
        if names.is_empty() {
            manifests.push(descriptor.clone());
        }
        for name in names {
            let tag = name.tag().unwrap_or_default();
            let mut named = descriptor.clone();
            named.annotations = BTreeMap::from([
                ("io.containerd.image.name".to_owned(), name.to_string()),
                ("org.opencontainers.image.ref.name".to_owned(), tag.to_owned()),
            ]);
            manifests.push(named);
            if let Some(top) = image.layers.last() {
                repositories
                    .entry(name.familiar_name())
                    .or_default()
                    .insert(tag.to_owned(), top.digest.hex().to_owned());
            }
        }
    }
    let index = Index {
        schema_version: 2,
        media_type: Some(media::OCI_INDEX.to_owned()),
        artifact_type: None,
        manifests,
        subject: None,
        annotations: BTreeMap::new(),
    };
    let mut documents = vec![
        ("index.json", encode(&index)?),
        ("manifest.json", encode(&items)?),
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
    ];
    if !repositories.is_empty() {
        documents.push(("repositories", encode(&repositories)?));
    }
    Ok(documents)
}

fn encode(document: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(document)
        .map_err(|source| Error::Json { what: "an archive's document".to_owned(), source })
}

/// Writes an archive of one image that is not in a store: its configuration, one uncompressed layer, its name.
pub(crate) fn save_single(
    config: &[u8],
    layer: &mut std::fs::File,
    layer_digest: &Digest,
    layer_size: u64,
    name: &Reference,
    output: impl Write,
) -> Result<Digest> {
    let id = Digest::sha256(config);
    let layers = [Descriptor::new(media::OCI_LAYER, layer_digest.clone(), layer_size)];
    let (manifest_raw, manifest) = super::make_manifest(&id, config.len() as u64, &layers)?;
    let image = Image {
        id: id.clone(),
        manifest: manifest.clone(),
        layers: layers.to_vec(),
        config: std::sync::Arc::new(crate::error::json(config, || "the image's configuration".to_owned())?),
        tags: vec![name.clone()],
        digests: Vec::new(),
        size: 0,
        created: None,
        last_tagged: None,
        parent: None,
        index: None,
    };
    let mut writer = Writer::new(io::BufWriter::with_capacity(1 << 18, output));
    writer.append_dir("blobs/", EPOCH).map_err(Error::Output)?;
    writer.append_dir("blobs/sha256/", EPOCH).map_err(Error::Output)?;
    writer.append_bytes(&blob_path(&id), config, EPOCH).map_err(Error::Output)?;
    writer.append_bytes(&blob_path(&manifest.digest), &manifest_raw, EPOCH).map_err(Error::Output)?;
    io::Seek::rewind(layer).at("rewind", "the layer")?;
    let entry = Entry {
        path: blob_path(layer_digest).into_bytes(),
        mode: 0o644,
        stored: layer_size,
        size: layer_size,
        ..Entry::default()
    };
    writer.append(&entry, layer).map_err(Error::Output)?;
    for (path, document) in documents(&[(image, vec![name.clone()])])? {
        writer.append_bytes(path, &document, EPOCH).map_err(Error::Output)?;
    }
    writer.finish().and_then(|mut output| output.flush()).map_err(Error::Output)?;
    Ok(id)
}
