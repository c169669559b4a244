//! Paths of the distribution specification, and the names in them.
//!
//! Invariant: a route in hand names only valid repositories, so that a name is safe as a path below the storage's root.

use brigantine_image::{Digest, Reference, valid_tag};
use percent_encoding::percent_decode_str;

use super::refusal::Refusal;

/// What a path names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Route {
    Base,
    Catalog,
    Metrics,
    Tags(String),
    Manifest(String, Pointer),
    Blob(String, Digest),
    Uploads(String),
    Upload(String, String),
    Referrers(String, Digest),
}

/// What a manifest is asked for by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Pointer {
    Tag(String),
    Digest(Digest),
}

impl std::fmt::Display for Pointer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

impl Route {
    /// Reads a path. `None` is a path the specification does not know.
    pub fn parse(path: &str) -> Result<Option<Self>, Refusal> {
        let Ok(path) = percent_decode_str(path).decode_utf8() else { return Ok(None) };
        if path == "/metrics" {
            return Ok(Some(Self::Metrics));
        }
        let Some(rest) = path.strip_prefix("/v2") else { return Ok(None) };
        let rest = match rest.strip_prefix('/') {
            None if rest.is_empty() => "",
            Some(rest) => rest,
            None => return Ok(None),
        };
        let segments: Vec<&str> = rest.split('/').collect();
        Ok(Some(match segments.as_slice() {
            [""] => Self::Base,
            ["_catalog"] => Self::Catalog,
            [name @ .., "tags", "list"] => Self::Tags(repository(name)?),
            [name @ .., "manifests", pointer] if !name.is_empty() => {
                Self::Manifest(repository(name)?, Pointer::parse(pointer)?)
            }
            [name @ .., "blobs", "uploads" | "uploads/"] | [name @ .., "blobs", "uploads", ""] => {
                Self::Uploads(repository(name)?)
            }
            [name @ .., "blobs", "uploads", id] => {
                let name = repository(name)?;
                if !valid_id(id) {
                    return Err(Refusal::upload_unknown(id));
                }
                Self::Upload(name, (*id).to_owned())
            }
            [name @ .., "blobs", digest] if !name.is_empty() => {
                Self::Blob(repository(name)?, parse_digest(digest)?)
            }
            [name @ .., "referrers", digest] if !name.is_empty() => {
                Self::Referrers(repository(name)?, parse_digest(digest)?)
            }
            _ => return Ok(None),
        }))
    }

    /// Its name in logs and metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Catalog => "catalog",
            Self::Metrics => "metrics",
            Self::Tags(_) => "tags",
            Self::Manifest(..) => "manifest",
            Self::Blob(..) => "blob",
            Self::Uploads(_) | Self::Upload(..) => "upload",
            Self::Referrers(..) => "referrers",
        }
    }
}

impl Pointer {
    fn parse(text: &str) -> Result<Self, Refusal> {
        if text.contains(':') {
            return parse_digest(text).map(Self::Digest);
        }
        if !valid_tag(text) {
            return Err(Refusal::new(
                http::StatusCode::BAD_REQUEST,
                "MANIFEST_INVALID",
                format!("{text:?} is neither a tag nor a digest"),
            ));
        }
        Ok(Self::Tag(text.to_owned()))
    }
}

pub(super) fn parse_digest(text: &str) -> Result<Digest, Refusal> {
    text.parse().map_err(|error| Refusal::digest_invalid(format!("{error}: sha256 and sha512 are supported")))
}

/// A repository's name by the specification's grammar.
pub(super) fn valid_repository(name: &str) -> bool {
    // The grammar of a path below some host is the same; only the host is not part of a repository's name here.
    Reference::parse(&format!("localhost/{name}"))
        .is_ok_and(|parsed| parsed.path() == name && parsed.tag().is_none() && parsed.digest().is_none())
}

fn repository(segments: &[&str]) -> Result<String, Refusal> {
    let name = segments.join("/");
    if valid_repository(&name) { Ok(name) } else { Err(Refusal::name_invalid(&name)) }
}

fn valid_id(id: &str) -> bool {
    id.len() == 36 && id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_apart() {
        let hex = "a".repeat(64);
        let digest: Digest = format!("sha256:{hex}").parse().unwrap();
        let parse = |path: &str| Route::parse(path).unwrap();
        assert_eq!(parse("/v2/"), Some(Route::Base));
        assert_eq!(parse("/v2"), Some(Route::Base));
        assert_eq!(parse("/v2x"), None);
        assert_eq!(parse("/"), None);
        assert_eq!(parse("/v2/_catalog"), Some(Route::Catalog));
        assert_eq!(parse("/v2/a/tags/list"), Some(Route::Tags("a".into())));
        assert_eq!(
            parse("/v2/manifests/manifests/manifests/1.0"),
            Some(Route::Manifest("manifests/manifests".into(), Pointer::Tag("1.0".into())))
        );
        assert_eq!(
            parse(&format!("/v2/a/b/blobs/sha256%3A{hex}")),
            Some(Route::Blob("a/b".into(), digest.clone()))
        );
        assert_eq!(parse("/v2/a/b/blobs/uploads/"), Some(Route::Uploads("a/b".into())));
        assert_eq!(parse("/v2/a/b/blobs/uploads"), Some(Route::Uploads("a/b".into())));
        assert_eq!(
            parse(&format!("/v2/a/referrers/sha256:{hex}")),
            Some(Route::Referrers("a".into(), digest))
        );
    }

    #[test]
    fn names_that_climb_or_are_not_names_are_refused() {
        for path in [
            "/v2/../../etc/tags/list",
            "/v2/a/%2e%2e/b/tags/list",
            "/v2/A/tags/list",
            "/v2/a//b/manifests/x",
            "/v2/_manifests/blobs/uploads/",
            "/v2/a/manifests/..",
            "/v2/a/manifests/sha256:12",
            "/v2/a/blobs/md5:12",
            "/v2/a/blobs/uploads/../../x",
            "/v2/a/blobs/uploads/12",
        ] {
            assert!(!matches!(Route::parse(path), Ok(Some(_))), "{path}");
        }
    }
}
