//! Whether two images are the same, and if not, what differs first: for builds that are to be reproducible.

use std::io::{BufReader, Read as _};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::compress;
use crate::error::{Error, Result, json};
use crate::model::Descriptor;
use crate::store::{Image, Store};
use crate::tar::{Entry, Reader};

/// The first difference of two images in words: of their layers, from the lowest, then of their configurations.
/// `None` when they are the same. Blocks.
pub fn first_difference(store: &Store, one: &Image, other: &Image) -> Result<Option<String>> {
    if one.id == other.id {
        return Ok(None);
    }
    let pairs = one.config.rootfs.diff_ids.iter().zip(&other.config.rootfs.diff_ids);
    for (number, (a, b)) in pairs.enumerate().filter(|(_, (a, b))| a != b) {
        let (Some(ours), Some(theirs)) = (one.layers.get(number), other.layers.get(number)) else { continue };
        let step = one
            .config
            .history
            .iter()
            .filter(|line| !line.empty_layer)
            .nth(number)
            .and_then(|line| line.created_by.clone())
            .unwrap_or_default();
        let what = in_layers(store, ours, theirs)?.unwrap_or_else(|| "how it is packed".to_owned());
        return Ok(Some(format!("layer {} ({a} and {b}) of {step:?}: {what}", number + 1)));
    }
    let (count, others) = (one.config.rootfs.diff_ids.len(), other.config.rootfs.diff_ids.len());
    if count != others {
        return Ok(Some(format!("one has {count} layers, the other {others}")));
    }
    let document = |image: &Image| -> Result<Value> {
        json(&store.config_raw(&image.id)?, || format!("the configuration {}", image.id))
    };
    Ok(Some(
        in_documents("", &document(one)?, &document(other)?)
            .unwrap_or_else(|| "how their configurations are written".to_owned()),
    ))
}

fn in_documents(path: &str, one: &Value, other: &Value) -> Option<String> {
    match (one, other) {
        (Value::Object(a), Value::Object(b)) => a.keys().chain(b.keys()).find_map(|key| {
            let value = |of: &serde_json::Map<String, Value>| of.get(key).cloned().unwrap_or_default();
            in_documents(&format!("{path}.{key}"), &value(a), &value(b))
        }),
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            let mut pairs = a.iter().zip(b).enumerate();
            pairs.find_map(|(at, (a, b))| in_documents(&format!("{path}[{at}]"), a, b))
        }
        (one, other) if one == other => None,
        (one, other) => Some(format!("configuration{path}: {one} and {other}")),
    }
}

/// One file as two archives are compared by it.
#[derive(PartialEq, Eq)]
struct File {
    entry: Entry,
    content: [u8; 32],
}

fn in_layers(store: &Store, one: &Descriptor, other: &Descriptor) -> Result<Option<String>> {
    let open = |layer: &Descriptor| -> Result<_> {
        let blob = store.content().open(&layer.digest)?;
        let decoded = compress::decode(blob).map_err(Error::ArchiveRead)?;
        Ok(Reader::new(BufReader::with_capacity(1 << 17, decoded)))
    };
    let (mut ours, mut theirs) = (open(one)?, open(other)?);
    loop {
        let (a, b) = (next(&mut ours)?, next(&mut theirs)?);
        let shown = |entry: &Entry| format!("/{}", String::from_utf8_lossy(&entry.path));
        let (a, b) = match (a, b) {
            (None, None) => return Ok(None),
            (Some(only), None) | (None, Some(only)) => {
                return Ok(Some(format!("{} is in one of them only", shown(&only.entry))));
            }
            (Some(a), Some(b)) => (a, b),
        };
        if a == b {
            continue;
        }
        let path = shown(&a.entry);
        if a.entry.path != b.entry.path {
            // Both are in order: the lesser is what the other lacks.
            let only = if a.entry.path < b.entry.path { path } else { shown(&b.entry) };
            return Ok(Some(format!("{only} is in one of them only")));
        }
        let (a, b) = ((a.content, a.entry), (b.content, b.entry));
        return Ok(Some(if a.0 != b.0 || a.1.link != b.1.link {
            format!("{path} differs in content")
        } else if a.1.kind != b.1.kind || a.1.mode != b.1.mode {
            format!("{path} differs in its mode: {:o} and {:o}", a.1.mode, b.1.mode)
        } else if (a.1.uid, a.1.gid) != (b.1.uid, b.1.gid) {
            format!("{path} differs in its owner: {}:{} and {}:{}", a.1.uid, a.1.gid, b.1.uid, b.1.gid)
        } else if a.1.mtime != b.1.mtime {
            format!(
                "{path} differs in its time: {}.{:09} and {}.{:09}",
                a.1.mtime.seconds, a.1.mtime.nanos, b.1.mtime.seconds, b.1.mtime.nanos
            )
        } else {
            format!("{path} differs in its extended attributes or device number")
        }));
    }
}

fn next(reader: &mut Reader<impl std::io::BufRead>) -> Result<Option<File>> {
    let mut entry = Entry::default();
    if !reader.next(&mut entry).map_err(|error| Error::Archive(error.to_string()))? {
        return Ok(None);
    }
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = reader.read(&mut buffer).map_err(Error::ArchiveRead)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
    }
    Ok(Some(File { entry, content: hasher.finalize().into() }))
}
