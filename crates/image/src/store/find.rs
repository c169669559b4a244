//! Which image a text names.

use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};
use crate::names::{Entry, Names};
use crate::reference::Reference;

/// Docker's order: a full id, then a name, then a prefix of an id.
pub(super) fn find<'a>(names: &'a Names, text: &str) -> Result<&'a Entry> {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    if let Ok(id) = Digest::from_hex(Algorithm::Sha256, hex) {
        let found = names.entries.iter().find(|entry| entry.image == id);
        return found.ok_or_else(|| Error::NoSuchImage(text.to_owned()));
    }
    let reference = match Reference::parse(text) {
        Ok(reference) => reference.or_latest(),
        // `sha256:<prefix>` reads as a name with a tag too; anything else malformed is no name.
        Err(error) => return by_prefix(names, hex)?.ok_or(Error::Reference(error)),
    };
    let exact = match reference.digest() {
        // With a tag too, the digest decides.
        Some(digest) => names.find(&reference.with_digest(digest.clone())),
        None => names.find(&reference),
    };
    match exact {
        Some(entry) => Ok(entry),
        None => by_prefix(names, hex)?.ok_or_else(|| Error::NoSuchImage(reference.familiar())),
    }
}

/// The only image whose id starts with these digits.
fn by_prefix<'a>(names: &'a Names, hex: &str) -> Result<Option<&'a Entry>> {
    if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(None);
    }
    let hex = hex.to_ascii_lowercase();
    let matches: Vec<Digest> = names.images().into_iter().filter(|id| id.hex().starts_with(&hex)).collect();
    match &matches[..] {
        [] => Ok(None),
        [one] => Ok(names.entries.iter().find(|entry| entry.image == *one)),
        _ => Err(Error::Ambiguous { prefix: hex, matches }),
    }
}
