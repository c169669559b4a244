//! Which servers hold a repository.
//!
//! Invariant: a mirror is asked only for docker.io, and only to read.

use brigantine_image::Reference;
use url::Url;

use crate::{Config, Error};

/// Docker Hub's registry.
const HUB: &str = "https://registry-1.docker.io";

/// One server that may hold a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub base: Url,
    /// May be reached without TLS or with any certificate; the scheme is found out by asking.
    pub insecure: bool,
    pub mirror: bool,
}

/// The servers to ask for `reference`, in order.
pub(crate) fn endpoints(
    config: &Config,
    reference: &Reference,
    reading: bool,
) -> Result<Vec<Endpoint>, Error> {
    let mut found = Vec::new();
    if reference.domain() == "docker.io" {
        for mirror in config.mirrors.iter().filter(|_| reading) {
            let base = Url::parse(mirror)
                .map_err(|_error| Error::Invalid(format!("invalid mirror: {mirror:?} is not a URL")))?;
            if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
                return Err(Error::Invalid(format!(
                    "invalid mirror: {mirror:?} is not an http or https URL"
                )));
            }
            // Somebody who configures an http:// mirror means it.
            let insecure = base.scheme() == "http";
            found.push(Endpoint { base, insecure, mirror: true });
        }
        let base = Url::parse(HUB).map_err(|error| Error::Invalid(error.to_string()))?;
        found.push(Endpoint { base, insecure: false, mirror: false });
        return Ok(found);
    }
    let domain = reference.domain();
    let base = Url::parse(&format!("https://{domain}"))
        .map_err(|error| Error::Invalid(format!("{domain:?} is not a registry's host: {error}")))?;
    found.push(Endpoint { base, insecure: config.is_insecure(domain), mirror: false });
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_for_reading_docker_io_only() {
        let config = Config { mirrors: vec!["http://127.0.0.1:5000".into()], ..Config::default() };
        let bases = |text: &str, reading| -> Vec<String> {
            let reference = Reference::parse(text).unwrap();
            endpoints(&config, &reference, reading).unwrap().iter().map(|e| e.base.to_string()).collect()
        };
        assert_eq!(bases("debian", true), ["http://127.0.0.1:5000/", "https://registry-1.docker.io/"]);
        assert_eq!(bases("debian", false), ["https://registry-1.docker.io/"]);
        assert_eq!(bases("quay.io/a/b", true), ["https://quay.io/"]);
        let broken = Config { mirrors: vec!["file:///etc".into()], ..Config::default() };
        assert!(endpoints(&broken, &Reference::parse("debian").unwrap(), true).is_err());
    }
}
