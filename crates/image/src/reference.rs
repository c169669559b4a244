//! Image references: `[domain[:port]/]path[:tag][@digest]` by the distribution grammar, with docker.io's short forms.
//!
//! Invariant: a [`Reference`] is always normalised: the domain is present, `docker.io` single-component paths carry
//! `library/`, the repository part is lower case and at most 255 bytes long.

use std::fmt;
use std::str::FromStr;

use crate::digest::{Digest, DigestError};

const DEFAULT_DOMAIN: &str = "docker.io";
const LEGACY_DOMAIN: &str = "index.docker.io";
const OFFICIAL_PREFIX: &str = "library/";
const DEFAULT_TAG: &str = "latest";
const NAME_MAX: usize = 255;
const TAG_MAX: usize = 128;

/// Why a text is not an image reference. The texts are those Docker clients know.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
pub enum ReferenceError {
    #[error("invalid reference format")]
    Format,
    #[error("invalid reference format: repository name ({0}) must be lowercase")]
    Uppercase(String),
    #[error("repository name must not be more than {NAME_MAX} characters")]
    TooLong,
    #[error("invalid repository name ({0}), cannot specify 64-byte hexadecimal strings")]
    Hexadecimal(String),
    #[error(transparent)]
    Digest(#[from] DigestError),
}

/// A normalised image reference.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Parses what a user typed, filling in `docker.io/` and `library/`. No tag is invented: see [`Self::or_latest`].
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        if is_image_hex(text) {
            return Err(ReferenceError::Hexadecimal(text.to_owned()));
        }
        let (domain, remainder) = split_domain(text);
        let (name, digest) = match remainder.split_once('@') {
            Some((name, digest)) => (name, Some(digest)),
            None => (remainder.as_str(), None),
        };
        let (path, tag) = match name.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (name, None),
        };
        if path.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(ReferenceError::Uppercase(path.to_owned()));
        }
        if !valid_domain(&domain) || !valid_path(path) || !tag.is_none_or(valid_tag) {
            return Err(ReferenceError::Format);
        }
        let digest = match digest {
            None => None,
            Some(digest) if !digest_shaped(digest) => return Err(ReferenceError::Format),
            Some(digest) => Some(digest.parse()?),
        };
        if domain.len() + 1 + path.len() > NAME_MAX {
            return Err(ReferenceError::TooLong);
        }
        Ok(Self { domain, path: path.to_owned(), tag: tag.map(str::to_owned), digest })
    }

    /// The registry's host, with the port if one was given: `docker.io`, `localhost:5000`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository within the registry: `library/debian`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Domain and path: `docker.io/library/debian`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The repository as users write it: `debian`.
    pub fn familiar_name(&self) -> String {
        if self.domain != DEFAULT_DOMAIN {
            return self.repository();
        }
        match self.path.strip_prefix(OFFICIAL_PREFIX) {
            // A name without a slash is never read as a domain.
            Some(rest) if !rest.contains('/') => rest.to_owned(),
            _ => self.path.clone(),
        }
    }

    /// The whole reference as users write it: `debian:bookworm`, `debian@sha256:…`.
    pub fn familiar(&self) -> String {
        self.suffixed(self.familiar_name())
    }

    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    pub fn is_name_only(&self) -> bool {
        self.tag.is_none() && self.digest.is_none()
    }

    pub fn same_repository(&self, other: &Self) -> bool {
        self.domain == other.domain && self.path == other.path
    }

    /// Adds `:latest` when there is neither tag nor digest.
    pub fn or_latest(mut self) -> Self {
        if self.is_name_only() {
            self.tag = Some(DEFAULT_TAG.to_owned());
        }
        self
    }

    /// The same repository with this tag and no digest.
    pub fn with_tag(&self, tag: &str) -> Result<Self, ReferenceError> {
        if !valid_tag(tag) {
            return Err(ReferenceError::Format);
        }
        Ok(Self {
            domain: self.domain.clone(),
            path: self.path.clone(),
            tag: Some(tag.to_owned()),
            digest: None,
        })
    }

    /// The same repository with this digest and no tag.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { domain: self.domain.clone(), path: self.path.clone(), tag: None, digest: Some(digest) }
    }

    /// The repository alone.
    pub fn name_only(&self) -> Self {
        Self { domain: self.domain.clone(), path: self.path.clone(), tag: None, digest: None }
    }

    fn suffixed(&self, mut name: String) -> String {
        if let Some(tag) = &self.tag {
            name.push(':');
            name.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            name.push('@');
            name.push_str(digest.as_str());
        }
        name
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        Self::parse(text)
    }
}

impl fmt::Display for Reference {
    /// The canonical form, with the domain: `docker.io/library/debian:bookworm`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.suffixed(self.repository()))
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Reference {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Reference {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// Whether `tag` is a tag by the grammar.
pub fn valid_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = tag.as_bytes();
    !bytes.is_empty()
        && bytes.len() <= TAG_MAX
        && word(bytes[0])
        && bytes.iter().all(|&b| word(b) || b == b'.' || b == b'-')
}

/// A bare 64-digit hex text can only be an image id.
fn is_image_hex(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether the first component of a reference is taken for a registry's host.
fn reads_as_domain(component: &str) -> bool {
    component == "localhost"
        || component.contains(['.', ':'])
        || component.bytes().any(|b| b.is_ascii_uppercase())
}

fn split_domain(text: &str) -> (String, String) {
    let (domain, remainder) = match text.split_once('/') {
        Some((first, rest)) if reads_as_domain(first) => (first, rest),
        _ => (DEFAULT_DOMAIN, text),
    };
    let domain = if domain == LEGACY_DOMAIN { DEFAULT_DOMAIN } else { domain };
    if domain == DEFAULT_DOMAIN && !remainder.contains('/') {
        return (domain.to_owned(), format!("{OFFICIAL_PREFIX}{remainder}"));
    }
    (domain.to_owned(), remainder.to_owned())
}

fn valid_domain(domain: &str) -> bool {
    let (host, port) = match domain.strip_prefix('[') {
        Some(rest) => {
            let Some((address, after)) = rest.split_once(']') else { return false };
            if address.is_empty() || !address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':') {
                return false;
            }
            match after.strip_prefix(':') {
                Some(port) => return valid_port(port),
                None => return after.is_empty(),
            }
        }
        None => match domain.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (domain, None),
        },
    };
    port.is_none_or(valid_port) && host.split('.').all(valid_label)
}

fn valid_port(port: &str) -> bool {
    !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit())
}

fn valid_label(label: &str) -> bool {
    let bytes = label.as_bytes();
    matches!((bytes.first(), bytes.last()), (Some(first), Some(last))
        if first.is_ascii_alphanumeric() && last.is_ascii_alphanumeric())
        && bytes.iter().all(|&b| b.is_ascii_alphanumeric() || b == b'-')
}

fn valid_path(path: &str) -> bool {
    path.split('/').all(valid_component)
}

/// `[a-z0-9]+` runs joined by `.`, `_`, `__` or any number of `-`.
fn valid_component(component: &str) -> bool {
    let alnum = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut rest = component.as_bytes();
    loop {
        let run = rest.iter().take_while(|b| alnum(b)).count();
        if run == 0 {
            return false;
        }
        rest = &rest[run..];
        if rest.is_empty() {
            return true;
        }
        let separator = rest.iter().take_while(|b| !alnum(b)).count();
        let (joint, after) = rest.split_at(separator);
        if !(matches!(joint, b"." | b"_" | b"__") || joint.iter().all(|&b| b == b'-')) {
            return false;
        }
        rest = after;
    }
}

/// The grammar's digest form: what does not look like one at all is a malformed reference, not a malformed digest.
fn digest_shaped(text: &str) -> bool {
    let Some((algorithm, hex)) = text.split_once(':') else { return false };
    let part = |p: &str| {
        p.as_bytes().first().is_some_and(u8::is_ascii_alphabetic)
            && p.bytes().all(|b| b.is_ascii_alphanumeric())
    };
    algorithm.split(['-', '_', '+', '.']).all(part)
        && hex.len() >= 32
        && hex.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn check(text: &str, canonical: &str, familiar: &str) {
        let reference = Reference::parse(text).unwrap();
        assert_eq!(reference.to_string(), canonical);
        assert_eq!(reference.familiar(), familiar);
        assert_eq!(Reference::parse(canonical).unwrap(), reference);
        assert_eq!(Reference::parse(familiar).unwrap(), reference);
    }

    #[test]
    fn normalises_as_docker_does() {
        let hex = "a".repeat(64);
        check("debian", "docker.io/library/debian", "debian");
        check("debian:bookworm", "docker.io/library/debian:bookworm", "debian:bookworm");
        check("a.name.with_dots:t", "docker.io/library/a.name.with_dots:t", "a.name.with_dots:t");
        check("docker.io/debian", "docker.io/library/debian", "debian");
        check("index.docker.io/library/debian", "docker.io/library/debian", "debian");
        check("user/app:v1", "docker.io/user/app:v1", "user/app:v1");
        check("localhost/app", "localhost/app", "localhost/app");
        check("localhost:5000/app", "localhost:5000/app", "localhost:5000/app");
        check("127.0.0.1:5000/a/b/c:t", "127.0.0.1:5000/a/b/c:t", "127.0.0.1:5000/a/b/c:t");
        check("[::1]:5000/app", "[::1]:5000/app", "[::1]:5000/app");
        check("EXAMPLE/app", "EXAMPLE/app", "EXAMPLE/app");
        check("ghcr.io/a__b/c--d.e_f", "ghcr.io/a__b/c--d.e_f", "ghcr.io/a__b/c--d.e_f");
        check(
            &format!("debian@sha256:{hex}"),
            &format!("docker.io/library/debian@sha256:{hex}"),
            &format!("debian@sha256:{hex}"),
        );
        check(
            &format!("debian:x@sha256:{hex}"),
            &format!("docker.io/library/debian:x@sha256:{hex}"),
            &format!("debian:x@sha256:{hex}"),
        );
        assert_eq!(Reference::parse("debian").unwrap().or_latest().familiar(), "debian:latest");
    }

    #[test]
    fn refuses_what_the_grammar_does_not_allow() {
        let format = Err(ReferenceError::Format);
        for bad in [
            "",
            ":",
            "/",
            "a/",
            "/a",
            "a//b",
            "a:",
            "a:b:c",
            "a@",
            "a@sha256:12",
            "a..b",
            "a___b",
            "a.-b",
            "-a",
            "a-",
            "a b",
            "ä",
            "a:-x",
            "a/b:c/d",
            "x.y:z/app",
            "[::1/app",
            "http://x/y",
            "a:b@c",
        ] {
            assert_eq!(Reference::parse(bad), format, "{bad:?}");
        }
        assert_eq!(
            Reference::parse("Debian").unwrap_err().to_string(),
            "invalid reference format: repository name (library/Debian) must be lowercase"
        );
        assert!(matches!(Reference::parse(&"a".repeat(64)), Err(ReferenceError::Hexadecimal(_))));
        assert_eq!(Reference::parse(&format!("a{}", "/b".repeat(200))), Err(ReferenceError::TooLong));
        assert!(Reference::parse(&format!("a:{}", "t".repeat(128))).is_ok());
        assert_eq!(Reference::parse(&format!("a:{}", "t".repeat(129))), format);
        assert!(matches!(
            Reference::parse(&format!("a@md5:{}", "a".repeat(32))),
            Err(ReferenceError::Digest(DigestError::Algorithm(_)))
        ));
    }

    proptest! {
        #[test]
        fn never_panics_and_round_trips(text in "[a-zA-Z0-9:/@._\\[\\]-]{0,80}") {
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert_eq!(&Reference::parse(&reference.to_string()).unwrap(), &reference);
                prop_assert_eq!(&Reference::parse(&reference.familiar()).unwrap(), &reference);
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,40}") {
            drop(Reference::parse(&text));
        }
    }
}
