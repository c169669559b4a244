//! Which servers hold a repository.
//!
//! Invariants: a mirror is asked only for what it may serve; the registry itself comes last; what a host's own settings
//! say counts before what holds for all hosts.

use brigantine_image::Reference;
use http::HeaderMap;
use url::Url;

use crate::hosts::{Host, Settings, Trust};
use crate::{Config, Error};

/// Docker Hub's registry.
const HUB: &str = "https://registry-1.docker.io";

/// What a server is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// What a tag names.
    Resolve,
    /// Content by its digest.
    Pull,
    Push,
}

/// One server that may hold a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub base: Url,
    /// May be reached without TLS; the scheme is found out by asking.
    pub plain_too: bool,
    pub trust: Trust,
    /// Sent with every request to this server.
    pub headers: HeaderMap,
    /// The base's path is complete: `/v2` is not added.
    pub whole_path: bool,
    pub mirror: bool,
    /// The registry a mirror is asked about.
    pub namespace: Option<String>,
}

impl Endpoint {
    /// A server by its URL, trusted as the configuration says.
    pub fn at(config: &Config, base: Url) -> Result<Self, Error> {
        let domain = match base.port() {
            Some(port) => format!("{}:{port}", base.host_str().unwrap_or_default()),
            None => base.host_str().unwrap_or_default().to_owned(),
        };
        let settings = Settings::of(config, &domain)?;
        Ok(Self::own(config, &domain, base, &settings))
    }

    fn own(config: &Config, domain: &str, base: Url, settings: &Settings) -> Self {
        let plain = config.is_insecure(domain);
        let mut trust = settings.server.trust.clone();
        // Who names an authority wants it checked, on loopback too.
        let checked = !trust.authorities.is_empty() && !trust.anything;
        trust.anything |= plain && !checked;
        Self {
            base,
            plain_too: plain && !checked,
            trust,
            headers: settings.server.headers.clone(),
            whole_path: settings.server.whole_path,
            mirror: false,
            namespace: None,
        }
    }

    fn of_host(host: &Host, domain: &str) -> Self {
        Self {
            base: host.base.clone(),
            plain_too: false,
            trust: host.trust.clone(),
            headers: host.headers.clone(),
            whole_path: host.whole_path,
            mirror: true,
            namespace: (!host.is_for(domain)).then(|| domain.to_owned()),
        }
    }
}

/// The servers to ask for `reference`, in order.
pub(crate) fn endpoints(
    config: &Config,
    reference: &Reference,
    purpose: Purpose,
) -> Result<Vec<Endpoint>, Error> {
    let domain = reference.domain();
    let settings = Settings::of(config, domain)?;
    let mut found: Vec<Endpoint> = settings
        .hosts
        .iter()
        .filter(|host| host.can(purpose))
        .map(|host| Endpoint::of_host(host, domain))
        .collect();
    let hub = domain == "docker.io";
    if hub && purpose != Purpose::Push {
        for mirror in &config.mirrors {
            found.push(dockers_mirror(config, mirror)?);
        }
    }
    let base = match &settings.base {
        Some(base) => base.clone(),
        None if hub => Url::parse(HUB).map_err(|error| Error::Invalid(error.to_string()))?,
        None => Url::parse(&format!("https://{domain}"))
            .map_err(|error| Error::Invalid(format!("{domain:?} is not a registry's host: {error}")))?,
    };
    if settings.server.can(purpose) {
        found.push(Endpoint::own(config, domain, base, &settings));
    }
    if found.is_empty() {
        return Err(Error::Invalid(format!(
            "the settings of {domain} name no host that may be asked to {}",
            match purpose {
                Purpose::Resolve => "resolve a tag",
                Purpose::Pull => "pull",
                Purpose::Push => "push",
            }
        )));
    }
    Ok(found)
}

/// One of docker's `registry-mirrors`.
fn dockers_mirror(config: &Config, mirror: &str) -> Result<Endpoint, Error> {
    let base = Url::parse(mirror)
        .map_err(|_error| Error::Invalid(format!("invalid mirror: {mirror:?} is not a URL")))?;
    if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
        return Err(Error::Invalid(format!("invalid mirror: {mirror:?} is not an http or https URL")));
    }
    let mut endpoint = Endpoint::at(config, base)?;
    endpoint.mirror = true;
    // Somebody who configures an https:// mirror means it.
    endpoint.plain_too = false;
    Ok(endpoint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bases(config: &Config, text: &str, purpose: Purpose) -> Vec<String> {
        let reference = Reference::parse(text).unwrap();
        endpoints(config, &reference, purpose).unwrap().iter().map(|e| e.base.to_string()).collect()
    }

    #[test]
    fn dockers_mirrors_are_for_reading_docker_io_only() {
        let config = Config { mirrors: vec!["http://127.0.0.1:5000".into()], ..Config::default() };
        assert_eq!(
            bases(&config, "debian", Purpose::Resolve),
            ["http://127.0.0.1:5000/", "https://registry-1.docker.io/"]
        );
        assert_eq!(bases(&config, "debian", Purpose::Push), ["https://registry-1.docker.io/"]);
        assert_eq!(bases(&config, "quay.io/a/b", Purpose::Pull), ["https://quay.io/"]);
        let broken = Config { mirrors: vec!["file:///etc".into()], ..Config::default() };
        assert!(endpoints(&broken, &Reference::parse("debian").unwrap(), Purpose::Pull).is_err());
    }

    #[test]
    fn hosts_serve_what_they_can_in_the_files_order() {
        let dir = tempfile::tempdir().unwrap();
        let host = dir.path().join("quay.io");
        std::fs::create_dir(&host).unwrap();
        std::fs::write(
            host.join("hosts.toml"),
            r#"
server = "https://real.example"
[host."https://z.example/v2/mirror"]
  capabilities = ["pull"]
  override_path = true
  [host."https://z.example/v2/mirror".header]
    x-key = ["one", "two"]
[host."http://a.example:5000"]
  capabilities = ["pull", "resolve", "push"]
  skip_verify = true
"#,
        )
        .unwrap();
        let config = Config { hosts: vec![dir.path().to_owned()], ..Config::default() };
        assert_eq!(
            bases(&config, "quay.io/a", Purpose::Pull),
            ["https://z.example/v2/mirror", "http://a.example:5000/", "https://real.example/"]
        );
        assert_eq!(
            bases(&config, "quay.io/a", Purpose::Resolve),
            ["http://a.example:5000/", "https://real.example/"]
        );
        assert_eq!(
            bases(&config, "quay.io/a", Purpose::Push),
            ["http://a.example:5000/", "https://real.example/"]
        );
        let reference = Reference::parse("quay.io/a").unwrap();
        let found = endpoints(&config, &reference, Purpose::Pull).unwrap();
        assert!(found[0].whole_path && found[0].headers.get_all("x-key").iter().count() == 2);
        assert_eq!(found[0].namespace.as_deref(), Some("quay.io"));
        assert!(found[1].trust.anything && found[1].mirror && !found[2].mirror);
    }

    #[test]
    fn an_authority_for_a_loopback_registry_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let host = dir.path().join("127.0.0.1:5000");
        std::fs::create_dir(&host).unwrap();
        let config = Config { hosts: vec![dir.path().to_owned()], ..Config::default() };
        let reference = Reference::parse("127.0.0.1:5000/a").unwrap();
        let endpoint = || endpoints(&config, &reference, Purpose::Pull).unwrap().remove(0);
        assert!(endpoint().plain_too && endpoint().trust.anything);
        std::fs::write(host.join("ca.crt"), "").unwrap();
        std::fs::write(host.join("client.cert"), "").unwrap();
        let unpaired = endpoints(&config, &reference, Purpose::Pull).unwrap_err().to_string();
        assert!(unpaired.contains("client.key"), "{unpaired}");
        std::fs::write(host.join("client.key"), "").unwrap();
        assert!(!endpoint().plain_too && !endpoint().trust.anything);
        assert_eq!(endpoint().trust.clients.len(), 1);
    }
}
