//! Where an image is, or is to be: `docker://…`, `oci:…`, `oci-archive:…`, `docker-archive:…`, `dir:…`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use brigantine_image::Reference;

use crate::Error;

/// A place that holds images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    Registry(Reference),
    /// An OCI image layout in a directory, and the image's name in it.
    Layout {
        path: PathBuf,
        name: Option<String>,
    },
    /// An OCI image layout in a tar file.
    LayoutArchive {
        path: PathBuf,
        name: Option<String>,
    },
    /// What `docker save` writes.
    DockerArchive {
        path: PathBuf,
        name: Option<Reference>,
    },
    /// One image's files side by side, as skopeo's `dir:` has them.
    Directory(PathBuf),
}

impl FromStr for Location {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |error: brigantine_image::ReferenceError| {
            Error::Invalid(format!("{text:?} names no image: {error}"))
        };
        let Some((kind, rest)) = text.split_once(':') else {
            return Reference::parse(text).map(Self::Registry).map_err(invalid);
        };
        if rest.is_empty() {
            return Err(Error::Invalid(format!(
                "{text:?} names no place: something is missing behind {kind}:"
            )));
        }
        let split = || match rest.split_once(':') {
            Some((path, name)) => {
                (PathBuf::from(path), Some(name.to_owned()).filter(|name| !name.is_empty()))
            }
            None => (PathBuf::from(rest), None),
        };
        Ok(match kind {
            "docker" => {
                let name = rest.strip_prefix("//").ok_or_else(|| {
                    Error::Invalid(format!("{text:?}: an image in a registry is written docker://{rest}"))
                })?;
                Self::Registry(Reference::parse(name).map_err(invalid)?)
            }
            "oci" => {
                let (path, name) = split();
                Self::Layout { path, name }
            }
            "oci-archive" => {
                let (path, name) = split();
                Self::LayoutArchive { path, name }
            }
            "docker-archive" => {
                let (path, name) = split();
                let name = name.map(|name| Reference::parse(&name).map_err(invalid)).transpose()?;
                Self::DockerArchive { path, name: name.map(Reference::or_latest) }
            }
            "dir" => Self::Directory(PathBuf::from(rest)),
            "docker-daemon" | "containers-storage" => {
                return Err(Error::Invalid(format!(
                    "{kind}: is not supported: use brig save and load, or push and pull, for an engine's images"
                )));
            }
            // A name with a port or a tag.
            _ => Self::Registry(Reference::parse(text).map_err(invalid)?),
        })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place =
            |f: &mut fmt::Formatter<'_>, kind: &str, path: &PathBuf, name: Option<&dyn fmt::Display>| {
                write!(f, "{kind}:{}", path.display())?;
                name.map_or(Ok(()), |name| write!(f, ":{name}"))
            };
        match self {
            Self::Registry(reference) => write!(f, "docker://{}", reference.familiar()),
            Self::Layout { path, name } => place(f, "oci", path, name.as_ref().map(|name| name as _)),
            Self::LayoutArchive { path, name } => {
                place(f, "oci-archive", path, name.as_ref().map(|name| name as _))
            }
            Self::DockerArchive { path, name } => {
                let name = name.as_ref().map(Reference::familiar);
                place(f, "docker-archive", path, name.as_ref().map(|name| name as _))
            }
            Self::Directory(path) => place(f, "dir", path, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let parse = |text: &str| text.parse::<Location>().unwrap();
        assert!(matches!(parse("docker://debian:12"), Location::Registry(_)));
        assert!(matches!(parse("127.0.0.1:5000/a:1"), Location::Registry(_)));
        assert_eq!(parse("oci:/a/b:v1"), Location::Layout { path: "/a/b".into(), name: Some("v1".into()) });
        assert_eq!(parse("oci-archive:x.tar"), Location::LayoutArchive { path: "x.tar".into(), name: None });
        assert_eq!(parse("docker-archive:x.tar:a").to_string(), "docker-archive:x.tar:a:latest");
        for wrong in ["", "docker:debian", "oci:", "docker-daemon:x", "UPPER"] {
            assert!(wrong.parse::<Location>().is_err(), "{wrong}");
        }
    }
}
