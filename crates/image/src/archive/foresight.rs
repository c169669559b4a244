//! What the documents of an archive that have come so far say about members to come: which are layers of other platforms'
//! images and of no other.
//!
//! Invariant: it saves work and decides nothing. Whoever wants a layer after all unpacks it when the archive is there.

use std::collections::HashMap;

use crate::digest::Digest;
use crate::model::{Document, ImageConfig};
use crate::platform::Platform;

/// Layers and configurations that are kept in mind.
const KNOWN_MAX: usize = 10_000;

pub(super) struct Foresight {
    wanted: Platform,
    /// The configurations that a layer goes with.
    configs: HashMap<Digest, Vec<Digest>>,
    /// Whether images with these configurations are wanted.
    fits: HashMap<Digest, bool>,
}

impl Foresight {
    pub fn new(wanted: Option<&Platform>) -> Self {
        let wanted = wanted.cloned().unwrap_or_else(Platform::host);
        Self { wanted, configs: HashMap::new(), fits: HashMap::new() }
    }

    /// Takes notice of a small member, whatever it is.
    pub fn note(&mut self, digest: &Digest, raw: &[u8]) {
        if raw.first() != Some(&b'{') || self.configs.len() + self.fits.len() > KNOWN_MAX {
            return;
        }
        match Document::parse(raw) {
            Ok(Document::Manifest(manifest)) => {
                for layer in manifest.layers.into_iter().take(KNOWN_MAX) {
                    let known = self.configs.entry(layer.digest).or_default();
                    if !known.contains(&manifest.config.digest) {
                        known.push(manifest.config.digest.clone());
                    }
                }
            }
            Ok(Document::Index(_)) => {}
            Err(_) => {
                if let Ok(config) = serde_json::from_slice::<ImageConfig>(raw)
                    && !config.rootfs.diff_ids.is_empty()
                {
                    self.fits.insert(digest.clone(), self.wanted.accepts(&config.platform()));
                }
            }
        }
    }

    /// Whether this is a layer that, as far as is known, only images for other platforms have.
    pub fn is_foreign(&self, member: &Digest) -> bool {
        self.configs
            .get(member)
            .is_some_and(|configs| configs.iter().all(|config| self.fits.get(config) == Some(&false)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_foreign_when_all_that_is_known_to_have_it_is() {
        let config = |architecture: &str| {
            let of = serde_json::json!({
                "architecture": architecture, "os": "linux",
                "rootfs": { "type": "layers", "diff_ids": [Digest::sha256(b"uncompressed")] },
            });
            serde_json::to_vec(&of).unwrap()
        };
        let manifest = |config: &[u8], layer: &Digest| {
            let of = serde_json::json!({
                "schemaVersion": 2, "config": { "digest": Digest::sha256(config), "size": config.len() },
                "layers": [{ "digest": layer, "size": 1 }],
            });
            serde_json::to_vec(&of).unwrap()
        };
        let (ours, theirs) = (config("amd64"), config("s390x"));
        let (shared, other) = (Digest::sha256(b"shared"), Digest::sha256(b"other"));
        let wanted: Platform = "linux/amd64".parse().unwrap();
        let mut foresight = Foresight::new(Some(&wanted));
        let mut note = |raw: &[u8]| {
            foresight.note(&Digest::sha256(raw), raw);
            [foresight.is_foreign(&shared), foresight.is_foreign(&other)]
        };
        assert_eq!(note(&manifest(&theirs, &shared)), [false, false], "nothing is known of the image yet");
        assert_eq!(note(b"{ no JSON"), [false, false]);
        assert_eq!(note(&theirs), [true, false]);
        assert_eq!(note(&manifest(&theirs, &other)), [true, true]);
        assert_eq!(note(&manifest(&ours, &shared)), [false, true]);
        assert_eq!(note(&ours), [false, true]);
    }
}
