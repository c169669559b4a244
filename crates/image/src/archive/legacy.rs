//! Archives of Docker engines before 1.10: a directory for each layer, `repositories` for the names, no manifest.json.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::load::Found;
use super::spool::Spool;
use crate::digest::Digest;
use crate::error::{Error, Result, json};
use crate::model::{Descriptor, ImageConfig};
use crate::platform::Platform;
use crate::reference::Reference;

/// Most layers one image may have.
const LAYERS_MAX: usize = 1000;
/// What a layer's document says that is no part of an image's configuration.
const LAYER_KEYS: [&str; 6] = ["id", "parent", "parent_id", "layer_id", "Size", "throwaway"];

/// An image by its chain of layers, bottom first.
pub(super) struct Legacy {
    names: Vec<Reference>,
    documents: Vec<Map<String, Value>>,
    /// Members of the layers' archives.
    pub layers: Vec<String>,
}

impl Legacy {
    /// As its topmost layer says.
    pub fn platform(&self) -> Platform {
        let text = |key: &str| {
            let value = self.documents.last().and_then(|document| document.get(key)).and_then(Value::as_str);
            value.unwrap_or_default().to_owned()
        };
        let os = Some(text("os")).filter(|os| !os.is_empty()).unwrap_or_else(|| "linux".to_owned());
        Platform { os, architecture: text("architecture"), ..Platform::default() }
    }
}

/// Finds the images `repositories` names.
pub(super) fn read(spool: &Spool<'_>) -> Result<Vec<Legacy>> {
    let raw = spool.document("repositories", spool.require("repositories")?)?;
    let repositories: BTreeMap<String, BTreeMap<String, String>> =
        json(&raw, || "archive: repositories".to_owned())?;
    let mut by_layer: BTreeMap<String, Vec<Reference>> = BTreeMap::new();
    for (repository, tags) in repositories {
        for (tag, layer) in tags {
            let name =
                Reference::parse(&repository).and_then(|name| name.with_tag(&tag)).map_err(|error| {
                    Error::Archive(format!("repository {repository:?}, tag {tag:?}: {error}"))
                })?;
            by_layer.entry(layer).or_default().push(name);
        }
    }
    by_layer.into_iter().map(|(top, names)| chain(spool, &top, names)).collect()
}

fn chain(spool: &Spool<'_>, top: &str, names: Vec<Reference>) -> Result<Legacy> {
    let (mut documents, mut layers) = (Vec::new(), Vec::new());
    let mut next = Some(top.to_owned());
    while let Some(id) = next {
        if documents.len() == LAYERS_MAX {
            return Err(Error::Archive(format!("image {top} has more than {LAYERS_MAX} layers")));
        }
        let path = format!("{id}/json");
        let raw = spool.document(&path, spool.require(&path)?)?;
        let document: Map<String, Value> = json(&raw, || format!("archive: {path}"))?;
        next = document.get("parent").and_then(Value::as_str).filter(|id| !id.is_empty()).map(str::to_owned);
        layers.push(format!("{id}/layer.tar"));
        documents.push(document);
    }
    documents.reverse();
    layers.reverse();
    Ok(Legacy { names, documents, layers })
}

/// Makes a configuration of the layers' documents.
pub(super) fn found(
    legacy: Legacy,
    layers: Vec<Descriptor>,
    diff_id: impl Fn(&Descriptor) -> Result<Digest>,
) -> Result<Found> {
    let text = |document: &Map<String, Value>, key: &str| document.get(key).cloned().filter(Value::is_string);
    let mut history = Vec::new();
    for document in &legacy.documents {
        let mut step = Map::new();
        for (key, from) in [("created", "created"), ("author", "author"), ("comment", "comment")] {
            if let Some(value) = text(document, from) {
                step.insert(key.to_owned(), value);
            }
        }
        let command =
            document.get("container_config").and_then(|config| config.get("Cmd")).and_then(Value::as_array);
        if let Some(command) = command {
            let words: Vec<&str> = command.iter().filter_map(Value::as_str).collect();
            step.insert("created_by".to_owned(), Value::String(words.join(" ")));
        }
        history.push(Value::Object(step));
    }
    let diff_ids = layers
        .iter()
        .map(|layer| diff_id(layer).map(|id| Value::String(id.to_string())))
        .collect::<Result<Vec<_>>>()?;
    let mut document = legacy.documents.into_iter().next_back().unwrap_or_default();
    for key in LAYER_KEYS {
        document.remove(key);
    }
    document.insert("rootfs".to_owned(), serde_json::json!({ "type": "layers", "diff_ids": diff_ids }));
    document.insert("history".to_owned(), Value::Array(history));
    let encode = |source| Error::Json { what: "an image's configuration".to_owned(), source };
    let config_raw = serde_json::to_vec(&document).map_err(encode)?;
    let config: ImageConfig = json(&config_raw, || "archive: a layer's document".to_owned())?;
    Ok(Found { names: legacy.names, config, config_raw, layers, manifest: None })
}
