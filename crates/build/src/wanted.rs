//! What is wanted of a result besides the image: annotations, attestations, times, in buildx's words
//! (docs.docker.com/build/building/{annotations,attestations}).

use std::collections::BTreeMap;

use brigantine_image::Platform;

use crate::error::{Result, invalid};

/// What is wanted of the result.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Export {
    /// No file of the build's own layers is younger than `SOURCE_DATE_EPOCH`.
    pub rewrite_timestamps: bool,
    pub annotations: Vec<Annotation>,
    pub provenance: Option<Provenance>,
    pub sbom: bool,
    /// Goes before the names of attestations that are files.
    pub attestation_prefix: String,
    /// Files of each platform in a folder of its own; where nothing is said, if there are several.
    pub platform_split: Option<bool>,
    /// The image tells what its layers are results of, for other builds to use them.
    pub inline_cache: bool,
}

/// How much provenance tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provenance {
    /// No build arguments and no steps.
    Min,
    Max,
}

/// One annotation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Annotation {
    pub level: Level,
    /// Of this platform only.
    pub platform: Option<Platform>,
    pub key: String,
    pub value: String,
}

/// Where an annotation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Manifest,
    Index,
    ManifestDescriptor,
    IndexDescriptor,
}

impl Export {
    /// Whether the result is an index even for one platform.
    pub fn needs_index(&self) -> bool {
        self.provenance.is_some() || self.sbom
    }

    /// `[LEVEL[PLATFORM],…:]KEY=VALUE`.
    pub fn annotate(&mut self, text: &str) -> Result<()> {
        let wrong = |why: &str| invalid(format!("annotation {text:?}: {why}"));
        let (head, value) = text.split_once('=').ok_or_else(|| wrong("KEY=VALUE is expected"))?;
        let (levels, key) = head.split_once(':').unwrap_or(("manifest", head));
        if key.is_empty() {
            return Err(wrong("KEY=VALUE is expected"));
        }
        for level in levels.split(',') {
            let (level, platform) = match level.split_once('[') {
                None => (level, None),
                Some((level, platform)) => {
                    let platform = platform.strip_suffix(']').ok_or_else(|| wrong("a ] is missing"))?;
                    (level, Some(platform.parse().map_err(|error| wrong(&format!("{error}")))?))
                }
            };
            let level = match level {
                "manifest" => Level::Manifest,
                "index" => Level::Index,
                "manifest-descriptor" => Level::ManifestDescriptor,
                "index-descriptor" => Level::IndexDescriptor,
                other => {
                    return Err(wrong(&format!(
                        "{other:?} is none of manifest, index, manifest-descriptor and index-descriptor"
                    )));
                }
            };
            self.annotations.push(Annotation {
                level,
                platform,
                key: key.to_owned(),
                value: value.to_owned(),
            });
        }
        Ok(())
    }

    /// `--attest type=KIND,…`: the kind and the rest.
    pub fn attest(&mut self, kind: &str, fields: &str) -> Result<()> {
        let mut mode = Provenance::Min;
        let mut wanted = true;
        for field in fields.split(',').filter(|field| !field.is_empty()) {
            match (kind, field.split_once('=').unwrap_or((field, ""))) {
                (_, ("disabled", value)) => wanted = value == "false",
                (_, ("true", "")) => {}
                (_, ("false", "")) => wanted = false,
                ("provenance", ("mode", "min") | ("min", "")) => mode = Provenance::Min,
                ("provenance", ("mode", "max") | ("max", "")) => mode = Provenance::Max,
                ("provenance", ("version", "v1") | ("reproducible" | "inline-only", _)) => {}
                ("sbom", ("generator", generator)) => {
                    return Err(crate::Error::NotImplemented(format!(
                        "the generator {generator} is not run: the scanner is a part of the engine"
                    )));
                }
                (kind, (key, value)) => {
                    return Err(invalid(format!("attestation {kind}: {key}={value} is not known")));
                }
            }
        }
        match kind {
            "provenance" => self.provenance = wanted.then_some(mode),
            "sbom" => self.sbom = wanted,
            other => {
                return Err(invalid(format!("attestation {other:?}: provenance and sbom are known")));
            }
        }
        Ok(())
    }

    /// The annotations of a level that are for a platform.
    pub(crate) fn annotations(&self, level: Level, platform: Option<&Platform>) -> BTreeMap<String, String> {
        let fits = |annotation: &&Annotation| {
            annotation.level == level
                && match (&annotation.platform, platform) {
                    (Some(wanted), Some(platform)) => wanted.accepts(platform),
                    (Some(_), None) => false,
                    (None, _) => true,
                }
        };
        self.annotations.iter().filter(fits).map(|a| (a.key.clone(), a.value.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_have_levels_and_platforms() {
        let mut export = Export::default();
        export.annotate("a=b=c").unwrap();
        export.annotate("index,manifest-descriptor[linux/amd64]:org.x/y:z=1").unwrap();
        let host = Platform::new("linux", "amd64");
        let other = Platform::new("linux", "arm64");
        let one = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        assert_eq!(export.annotations(Level::Manifest, Some(&other)), one("a", "b=c"));
        assert_eq!(export.annotations(Level::Index, None), one("org.x/y:z", "1"));
        assert_eq!(export.annotations(Level::ManifestDescriptor, Some(&host)), one("org.x/y:z", "1"));
        assert!(export.annotations(Level::ManifestDescriptor, Some(&other)).is_empty());
        for text in ["a", "=b", "layer:a=b", "index[linux:a=b", "index[a/b/c/d]:a=b"] {
            assert!(export.annotate(text).is_err(), "{text}");
        }
        export.attest("provenance", "mode=max").unwrap();
        export.attest("sbom", "true").unwrap();
        assert_eq!((export.provenance, export.sbom), (Some(Provenance::Max), true));
        export.attest("sbom", "disabled=true").unwrap();
        export.attest("provenance", "false").unwrap();
        assert!(!export.needs_index());
        assert!(export.attest("sbom", "generator=x").is_err());
        assert!(export.attest("color", "red").is_err());
    }
}
