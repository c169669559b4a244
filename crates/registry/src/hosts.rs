//! A host's own settings: `hosts.toml` as containerd reads it, and docker's `certs.d` certificates.
//!
//! Sources: containerd's docs/hosts.md; docker's "Verify repository client with certificates". Invariant: a file that is
//! there and cannot be understood is an error that names it; it is never skipped.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use http::{HeaderMap, HeaderName, HeaderValue};
use toml::{Table, Value};
use url::Url;

use crate::config::host_of;
use crate::endpoint::Purpose;
use crate::{Config, Error};

/// Whom a connection trusts, and as whom it shows itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Trust {
    /// Any certificate will do.
    pub anything: bool,
    /// Authorities beside the system's, in PEM files.
    pub authorities: Vec<PathBuf>,
    /// Certificate and key in PEM; the key may stand in the same file.
    pub clients: Vec<(PathBuf, Option<PathBuf>)>,
}

/// One host of a `hosts.toml`, or the server itself.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub base: Url,
    capabilities: Option<Vec<String>>,
    pub trust: Trust,
    pub headers: HeaderMap,
    pub whole_path: bool,
}

/// What is set for a registry.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Where the registry itself is, if elsewhere than at its name.
    pub base: Option<Url>,
    pub server: Host,
    pub hosts: Vec<Host>,
}

impl Host {
    fn new(base: Url) -> Self {
        Self {
            base,
            capabilities: None,
            trust: Trust::default(),
            headers: HeaderMap::new(),
            whole_path: false,
        }
    }

    pub fn can(&self, purpose: Purpose) -> bool {
        let Some(capabilities) = &self.capabilities else { return true };
        let has = |wanted: &str| capabilities.iter().any(|given| given == wanted);
        match purpose {
            Purpose::Resolve => has("pull") && has("resolve"),
            Purpose::Pull => has("pull"),
            Purpose::Push => has("push"),
        }
    }

    /// Whether this is the registry's own server.
    pub fn is_for(&self, domain: &str) -> bool {
        let host = self.base.host_str().unwrap_or_default();
        match self.base.port() {
            Some(port) => domain == format!("{host}:{port}"),
            None => domain == host,
        }
    }
}

impl Settings {
    /// The settings of `domain` (`host[:port]`), empty ones where there are none.
    pub fn of(config: &Config, domain: &str) -> Result<Self, Error> {
        let base = Url::parse(&format!("https://{domain}"))
            .map_err(|error| Error::Invalid(format!("{domain:?} is not a registry's host: {error}")))?;
        let mut settings = Self { base: None, server: Host::new(base), hosts: Vec::new() };
        for dir in &config.hosts {
            let Some(dir) = names(domain).into_iter().map(|name| dir.join(name)).find(|dir| dir.is_dir())
            else {
                continue;
            };
            let file = dir.join("hosts.toml");
            match fs::read_to_string(&file) {
                Ok(text) => settings.read(&dir, &file, &text)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    settings.server.trust = certificates(&dir)?;
                }
                Err(source) => {
                    return Err(Error::Io { what: format!("read {}", file.display()), source });
                }
            }
            break;
        }
        Ok(settings)
    }

    fn read(&mut self, dir: &Path, file: &Path, text: &str) -> Result<(), Error> {
        let invalid = |what: String| Error::Invalid(format!("{}: {what}", file.display()));
        let table: Table = text.parse().map_err(|error: toml::de::Error| invalid(error.to_string()))?;
        if let Some(server) = table.get("server") {
            let server = server.as_str().ok_or_else(|| invalid("server is not a string".to_owned()))?;
            let base = parse_url(server).map_err(&invalid)?;
            self.server.base = base.clone();
            self.base = Some(base);
        }
        fill(&mut self.server, dir, &table).map_err(&invalid)?;
        let Some(hosts) = table.get("host") else { return Ok(()) };
        let hosts = hosts.as_table().ok_or_else(|| invalid("host is not a table".to_owned()))?;
        for (url, settings) in hosts {
            let settings =
                settings.as_table().ok_or_else(|| invalid(format!("host.{url:?} is not a table")))?;
            let mut host = Host::new(parse_url(url).map_err(&invalid)?);
            fill(&mut host, dir, settings).map_err(|what| invalid(format!("host.{url:?}: {what}")))?;
            self.hosts.push(host);
        }
        Ok(())
    }
}

/// The directories a host's settings may stand in: `host:port`, `host_port_` (for file systems without colons), the
/// host alone, and the one for all.
fn names(domain: &str) -> Vec<String> {
    let mut names = vec![domain.to_owned()];
    let host = host_of(domain);
    if let Some((host, port)) = domain.rsplit_once(':') {
        names.push(format!("{host}_{port}_"));
    }
    if domain == "docker.io" {
        names.push("registry-1.docker.io".to_owned());
    }
    if host != domain {
        names.push(host.to_owned());
    }
    names.push("_default".to_owned());
    names
}

fn parse_url(text: &str) -> Result<Url, String> {
    let text = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let url = Url::parse(&text).map_err(|error| format!("{text:?} is not a URL: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(format!("{text:?} is not an http or https URL"));
    }
    Ok(url)
}

fn fill(host: &mut Host, dir: &Path, table: &Table) -> Result<(), String> {
    let path = |text: &str| dir.join(text);
    for (key, value) in table {
        match key.as_str() {
            "capabilities" => {
                let capabilities = strings(value).ok_or("capabilities is not a list of strings")?;
                let known = ["pull", "resolve", "push", "referrers"];
                if let Some(unknown) = capabilities.iter().find(|given| !known.contains(&given.as_str())) {
                    return Err(format!("unknown capability {unknown:?}"));
                }
                host.capabilities = Some(capabilities);
            }
            "ca" => {
                let files = strings(value).ok_or("ca is neither a string nor a list of strings")?;
                host.trust.authorities = files.iter().map(|file| path(file)).collect();
            }
            "client" => host.trust.clients = clients(value, &path)?,
            "skip_verify" => {
                host.trust.anything = value.as_bool().ok_or("skip_verify is not true or false")?;
            }
            "override_path" => {
                host.whole_path = value.as_bool().ok_or("override_path is not true or false")?;
            }
            "header" => {
                let headers = value.as_table().ok_or("header is not a table")?;
                for (name, value) in headers {
                    let parsed: HeaderName =
                        name.parse().map_err(|_error| format!("{name:?} is not a header's name"))?;
                    let values = strings(value).ok_or_else(|| format!("header.{name} is not a string"))?;
                    for value in values {
                        let mut value = HeaderValue::from_str(&value)
                            .map_err(|_error| format!("header.{name} is not a header's value"))?;
                        value.set_sensitive(true);
                        host.headers.append(parsed.clone(), value);
                    }
                }
            }
            // Kept for the table they stand in, or without a meaning here.
            "server" | "host" | "dial_timeout" => {}
            unknown => return Err(format!("unknown setting {unknown:?}")),
        }
    }
    Ok(())
}

/// A string or a list of strings.
fn strings(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(values) => values.iter().map(|value| value.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

/// `"file"`, `["file", …]` or `[["certificate", "key"], …]`.
fn clients(
    value: &Value,
    path: &impl Fn(&str) -> PathBuf,
) -> Result<Vec<(PathBuf, Option<PathBuf>)>, String> {
    let wrong = || "client is neither a file, nor a list of files or of certificate and key".to_owned();
    if let Some(files) = strings(value) {
        return Ok(files.iter().map(|file| (path(file), None)).collect());
    }
    let pairs = value.as_array().ok_or_else(wrong)?;
    pairs
        .iter()
        .map(|pair| match strings(pair).ok_or_else(wrong)?.as_slice() {
            [certificate] => Ok((path(certificate), None)),
            [certificate, key] if key.is_empty() => Ok((path(certificate), None)),
            [certificate, key] => Ok((path(certificate), Some(path(key)))),
            _ => Err(wrong()),
        })
        .collect()
}

/// docker's directory of a host: every `.crt` is an authority, every `.cert` a client's with its `.key`.
fn certificates(dir: &Path) -> Result<Trust, Error> {
    let failed = |source| Error::Io { what: format!("read {}", dir.display()), source };
    let mut trust = Trust::default();
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    files.sort();
    for file in &files {
        let missing = |other: &Path, what: &str| {
            Error::Invalid(format!(
                "{} has no {what} beside it: {} is missing",
                file.display(),
                other.display()
            ))
        };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => trust.authorities.push(file.clone()),
            Some("cert") => {
                let key = file.with_extension("key");
                if !files.contains(&key) {
                    return Err(missing(&key, "key"));
                }
                trust.clients.push((file.clone(), Some(key)));
            }
            Some("key") => {
                let certificate = file.with_extension("cert");
                if !files.contains(&certificate) {
                    return Err(missing(&certificate, "certificate"));
                }
            }
            _ => {}
        }
    }
    Ok(trust)
}

impl Trust {
    pub fn authorities(&self) -> Result<Vec<reqwest::Certificate>, Error> {
        let mut found = Vec::new();
        for file in &self.authorities {
            let certificates = reqwest::Certificate::from_pem_bundle(&read(file)?)
                .map_err(|error| Error::Invalid(format!("{}: {error}", file.display())))?;
            if certificates.is_empty() {
                return Err(Error::Invalid(format!("{}: holds no certificate in PEM", file.display())));
            }
            found.extend(certificates);
        }
        Ok(found)
    }

    /// The first client certificate: one is shown to every server.
    pub fn identity(&self) -> Result<Option<reqwest::Identity>, Error> {
        let Some((certificate, key)) = self.clients.first() else { return Ok(None) };
        let mut pem = read(certificate)?;
        if let Some(key) = key {
            pem.push(b'\n');
            pem.extend(read(key)?);
        }
        let identity = reqwest::Identity::from_pem(&pem)
            .map_err(|error| Error::Invalid(format!("{}: {error}", certificate.display())))?;
        Ok(Some(identity))
    }
}

fn read(file: &Path) -> Result<Vec<u8>, Error> {
    fs::read(file).map_err(|source| Error::Io { what: format!("read {}", file.display()), source })
}
