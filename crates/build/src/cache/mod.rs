//! Caches kept elsewhere: in an image's configuration, in a registry, in a folder of the client's.
//!
//! Invariant: a cache from elsewhere is believed by the build that names it, for the keys of its own steps, and adds
//! nothing else to what the engine knows. What is wrong with it costs time, never the build.

mod export;
mod folder;
mod form;
mod import;
mod sink;

use std::collections::BTreeMap;

use brigantine_image::{Encoding, Reference};

pub(crate) use export::{Exporter, inline, of_image};
pub(crate) use folder::{fetch, manifest, session};
pub(crate) use form::CONFIG;
pub(crate) use import::{Imports, note};
pub(crate) use sink::Sink;

use crate::error::{Error, Result, invalid};

/// A cache to look into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheFrom {
    /// An image of the store that has its cache with it.
    Image(Reference),
    /// A registry's, or an image that has it with it, here or there.
    Registry(Reference),
    /// A folder of the client's: an OCI image layout.
    Folder {
        /// The name of the session's content store.
        store: String,
        /// The manifest.
        digest: String,
    },
}

/// A cache to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheTo {
    pub place: CachePlace,
    /// All steps, not only those of the result.
    pub all: bool,
    pub encoding: Encoding,
    /// OCI's media types rather than Docker's.
    pub oci: bool,
    /// A manifest rather than an index.
    pub manifest: bool,
    /// That it cannot be written is only noted.
    pub ignore_error: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CachePlace {
    /// With the image.
    Inline,
    Registry(Reference),
    /// A folder of the client's, by the name of the session's content store.
    Folder(String),
}

type Attributes = BTreeMap<String, String>;

fn reference(kind: &str, attributes: &Attributes) -> Result<Reference> {
    let name = attributes.get("ref").filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| invalid(format!("a cache of type {kind} needs ref=NAME")))?;
    let parsed = Reference::parse(name).map_err(|error| invalid(format!("cache ref {name}: {error}")))?;
    Ok(if parsed.digest().is_some() { parsed } else { parsed.or_latest() })
}

fn known(kind: &str, attributes: &Attributes, names: &[&str]) -> Result<()> {
    match attributes.keys().find(|key| !names.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => {
            Err(invalid(format!("a cache of type {kind} has no {key}: {} are known", names.join(", "))))
        }
    }
}

fn unbuilt(kind: &str) -> Error {
    match kind {
        "gha" | "s3" | "azblob" => Error::NotImplemented(format!(
            "a cache of type {kind} is not built: inline, registry and local are known"
        )),
        other => invalid(format!("cache type {other:?} is not known: there are inline, registry and local")),
    }
}

fn flag(attributes: &Attributes, name: &str) -> Result<Option<bool>> {
    match attributes.get(name).map(String::as_str) {
        None => Ok(None),
        Some("" | "true" | "1") => Ok(Some(true)),
        Some("false" | "0") => Ok(Some(false)),
        Some(other) => Err(invalid(format!("cache: {name}={other}: true or false is expected"))),
    }
}

impl CacheFrom {
    /// `type=KIND,KEY=VALUE…`, taken apart.
    pub fn parse(kind: &str, attributes: &Attributes) -> Result<Self> {
        match kind {
            "registry" => {
                known(kind, attributes, &["ref"])?;
                Ok(Self::Registry(reference(kind, attributes)?))
            }
            "local" => {
                known(kind, attributes, &["store", "digest"])?;
                let field = |name: &str| attributes.get(name).cloned().unwrap_or_default();
                Ok(Self::Folder { store: field("store"), digest: field("digest") })
            }
            "inline" => Err(invalid("an inline cache is read with type=registry, or just the image's name")),
            other => Err(unbuilt(other)),
        }
    }

    /// What people call it.
    pub fn shown(&self) -> String {
        match self {
            Self::Image(reference) | Self::Registry(reference) => reference.familiar(),
            Self::Folder { store, .. } => store.strip_prefix("local:").unwrap_or(store).to_owned(),
        }
    }
}

impl CacheTo {
    /// The image has its cache with it.
    pub fn inline() -> Self {
        Self {
            place: CachePlace::Inline,
            all: false,
            encoding: Encoding::GZIP,
            oci: true,
            manifest: true,
            ignore_error: false,
        }
    }

    /// `type=KIND,KEY=VALUE…`, taken apart.
    pub fn parse(kind: &str, attributes: &Attributes) -> Result<Self> {
        const COMMON: [&str; 7] = [
            "mode",
            "compression",
            "compression-level",
            "force-compression",
            "oci-mediatypes",
            "image-manifest",
            "ignore-error",
        ];
        let own = match kind {
            "inline" => "mode",
            "registry" => "ref",
            "local" => "store",
            other => return Err(unbuilt(other)),
        };
        let names: Vec<&str> = match kind {
            "inline" => vec!["mode", "ignore-error"],
            _ => COMMON.iter().copied().chain([own]).collect(),
        };
        known(kind, attributes, &names)?;
        let all = match attributes.get("mode").map(String::as_str) {
            None | Some("" | "min") => false,
            Some("max") if kind == "inline" => {
                return Err(invalid(
                    "an inline cache is of the result's own steps (mode=min): mode=max is for registry and local",
                ));
            }
            Some("max") => true,
            Some(other) => return Err(invalid(format!("cache: mode={other}: min or max is expected"))),
        };
        let oci = flag(attributes, "oci-mediatypes")?.unwrap_or(true);
        let manifest = flag(attributes, "image-manifest")?.unwrap_or(oci);
        if manifest && !oci {
            return Err(invalid("cache: image-manifest=true needs oci-mediatypes=true"));
        }
        let place = match kind {
            "inline" => CachePlace::Inline,
            "registry" => CachePlace::Registry(reference(kind, attributes)?),
            _ => CachePlace::Folder(attributes.get("store").cloned().unwrap_or_default()),
        };
        Ok(Self {
            place,
            all,
            encoding: encoding(attributes, "gzip")?,
            oci,
            manifest,
            ignore_error: flag(attributes, "ignore-error")?.unwrap_or(false),
        })
    }

    /// What people call it.
    pub fn shown(&self) -> String {
        match &self.place {
            CachePlace::Inline => "inline".to_owned(),
            CachePlace::Registry(reference) => reference.familiar(),
            CachePlace::Folder(store) => store.strip_prefix("local:").unwrap_or(store).to_owned(),
        }
    }
}

/// Where a cache mount is to be written, and how: `type=KIND,KEY=VALUE…`, taken apart.
pub(crate) fn mount_to(kind: &str, attributes: &Attributes) -> Result<(CachePlace, Encoding)> {
    let (place, own) = match kind {
        "registry" => (CachePlace::Registry(reference(kind, attributes)?), "ref"),
        "local" => (CachePlace::Folder(attributes.get("store").cloned().unwrap_or_default()), "store"),
        "inline" => {
            return Err(invalid("a cache mount is no part of an image: registry and local are known"));
        }
        other => return Err(unbuilt(other)),
    };
    known(kind, attributes, &[own, "compression", "compression-level"])?;
    if let CachePlace::Registry(reference) = &place
        && reference.digest().is_some()
    {
        return Err(invalid(format!(
            "{}: what is written is named by a tag, not by a digest",
            reference.familiar()
        )));
    }
    Ok((place, encoding(attributes, "zstd")?))
}

fn encoding(attributes: &Attributes, default: &str) -> Result<Encoding> {
    let wanted = attributes.get("compression").map_or(default, String::as_str);
    if wanted == "estargz" {
        return Err(Error::NotImplemented(
            "compression=estargz is not built: gzip, zstd and uncompressed are known".to_owned(),
        ));
    }
    let text = match attributes.get("compression-level") {
        Some(level) if wanted != "uncompressed" => format!("{wanted}:{level}"),
        _ => wanted.to_owned(),
    };
    text.parse().map_err(|error| invalid(format!("cache: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(pairs: &[(&str, &str)]) -> Attributes {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn flags_are_taken_in_buildx_words() {
        let to = |kind: &str, pairs: &[(&str, &str)]| CacheTo::parse(kind, &attributes(pairs));
        let made =
            to("registry", &[("ref", "localhost:1/a"), ("mode", "max"), ("compression", "zstd")]).unwrap();
        assert!(made.all && made.oci && made.manifest && !made.ignore_error);
        assert_eq!((made.encoding, made.shown()), (Encoding::ZSTD, "localhost:1/a:latest".to_owned()));
        let old = to("local", &[("store", "local:x"), ("oci-mediatypes", "false"), ("ignore-error", "true")])
            .unwrap();
        assert!(!old.manifest && !old.oci && old.ignore_error && !old.all);
        assert_eq!(to("inline", &[("mode", "min")]).unwrap(), CacheTo::inline());
        for (kind, pairs, words) in [
            ("registry", &[][..], "needs ref=NAME"),
            ("registry", &[("ref", "UPPER")], "cache ref UPPER"),
            ("registry", &[("ref", "a"), ("colour", "red")], "has no colour"),
            ("registry", &[("ref", "a"), ("mode", "most")], "min or max"),
            ("registry", &[("ref", "a"), ("compression", "lzma")], "lzma"),
            (
                "registry",
                &[("ref", "a"), ("image-manifest", "true"), ("oci-mediatypes", "false")],
                "needs oci",
            ),
            ("inline", &[("mode", "max")], "mode=max is for registry and local"),
            ("gha", &[], "not built"),
            ("magic", &[], "not known"),
        ] {
            let error = to(kind, pairs).unwrap_err().to_string();
            assert!(error.contains(words), "{kind} {pairs:?}: {error}");
        }
        assert!(CacheFrom::parse("inline", &Attributes::new()).is_err());
        assert!(CacheFrom::parse("registry", &attributes(&[("ref", "a:b")])).is_ok());
        assert!(CacheFrom::parse("s3", &Attributes::new()).is_err());
    }
}
