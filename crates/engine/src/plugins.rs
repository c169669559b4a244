//! Plugins of Docker's legacy kind: programs that serve HTTP on a socket and are found by a file of their name
//! (<https://docs.docker.com/engine/extend/plugin_api/>).
//!
//! A plugin is a stranger: its answers are bounded in size and time, and what it says is checked by whoever uses it. An
//! error names the plugin and the call.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use brigantine_shim::tls::{self, Trust};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::sync::lock;
use crate::{Error, Result};

/// Where plugins' sockets are.
const SOCKETS: &str = "/run/docker/plugins";
/// Where files that name an address are, in docker's order.
const SPECS: [&str; 2] = ["/etc/docker/plugins", "/usr/lib/docker/plugins"];
/// The media type of both directions.
const MEDIA_TYPE: &str = "application/vnd.docker.plugins.v1.2+json";
/// The most that an answer may have.
const MAX_ANSWER: usize = 1 << 20;
/// How long a question may take that asks for nothing to be done.
pub const ASKING: Duration = Duration::from_secs(10);
/// How long something may take that has to be done.
pub const DOING: Duration = Duration::from_mins(1);

/// Names of all plugins that a file tells of; whether they answer is another matter.
pub fn names() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for dir in [SOCKETS].into_iter().chain(SPECS) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            if find(name).is_ok_and(|found| found.is_some()) {
                names.insert(name.to_owned());
            }
        }
    }
    names
}

/// What the plugins that were asked implement.
#[derive(Debug, Default)]
pub struct Plugins {
    active: Mutex<HashMap<String, BTreeSet<String>>>,
}

/// Where a plugin listens.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Address {
    Unix(PathBuf),
    Tcp(String),
    /// Inside TLS.
    Tls(String, Trust),
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Activation {
    #[serde(default)]
    implements: Vec<String>,
}

/// What every answer may have.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Refusal {
    #[serde(default)]
    err: String,
}

impl Plugins {
    /// Whether the plugin is there and implements `kind`.
    pub async fn check(&self, name: &str, kind: &str) -> Result<()> {
        let address = find(name)?.ok_or_else(|| not_found(name))?;
        self.activate(name, &address, kind).await
    }

    /// Asks the plugin `name`, which must implement `kind`, to carry out `method`.
    pub async fn call<A: DeserializeOwned>(
        &self,
        name: &str,
        kind: &str,
        method: &str,
        body: &Value,
        limit: Duration,
    ) -> Result<A> {
        let address = find(name)?.ok_or_else(|| not_found(name))?;
        self.activate(name, &address, kind).await?;
        ask(name, &address, method, body, limit).await
    }

    /// Learns what the plugin can do, once.
    async fn activate(&self, name: &str, address: &Address, kind: &str) -> Result<()> {
        let known = lock(&self.active).get(name).cloned();
        let implements = if let Some(known) = known {
            known
        } else {
            let found: Activation = ask(name, address, "Plugin.Activate", &json!({}), ASKING).await?;
            let found: BTreeSet<String> = found.implements.into_iter().collect();
            lock(&self.active).insert(name.to_owned(), found.clone());
            found
        };
        if implements.contains(kind) {
            return Ok(());
        }
        // It may be another one the next time.
        lock(&self.active).remove(name);
        let has: Vec<_> = implements.into_iter().collect();
        Err(Error::not_found(format!(
            "plugin {name} does not implement {kind}; it implements {}",
            if has.is_empty() { "nothing".to_owned() } else { has.join(", ") }
        )))
    }
}

fn not_found(name: &str) -> Error {
    Error::not_found(format!("plugin \"{name}\" not found"))
}

/// Where the plugin of this name listens; `None` if there is no file of it.
fn find(name: &str) -> Result<Option<Address>> {
    if !crate::names::is_valid(name) {
        return Ok(None);
    }
    for socket in [format!("{SOCKETS}/{name}.sock"), format!("{SOCKETS}/{name}/{name}.sock")] {
        if Path::new(&socket).exists() {
            return Ok(Some(Address::Unix(socket.into())));
        }
    }
    for dir in SPECS {
        for path in [format!("{dir}/{name}.spec"), format!("{dir}/{name}/{name}.spec")] {
            if let Ok(text) = std::fs::read_to_string(&path) {
                return address(&path, text.trim(), Trust::default()).map(Some);
            }
        }
        for path in [format!("{dir}/{name}.json"), format!("{dir}/{name}/{name}.json")] {
            if let Ok(text) = std::fs::read_to_string(&path) {
                return described(&path, &text).map(Some);
            }
        }
    }
    Ok(None)
}

fn address(path: &str, text: &str, trust: Trust) -> Result<Address> {
    let host = |host: &str| host.trim_end_matches('/').to_owned();
    match text.split_once("://") {
        Some(("unix", socket)) if socket.starts_with('/') => Ok(Address::Unix(socket.into())),
        // To say what TLS shall be like and then go without it cannot be meant.
        Some(("tcp" | "http", _)) if trust != Trust::default() => Err(Error::internal(format!(
            "{path}: it has a TLSConfig, but the plugin's address {text:?} does not begin with https://"
        ))),
        Some(("tcp" | "http", name)) if !name.is_empty() => Ok(Address::Tcp(host(name))),
        Some(("https", name)) if !name.is_empty() => Ok(Address::Tls(host(name), trust)),
        _ => Err(Error::internal(format!(
            "{path}: {text:?} is no plugin's address: expected unix:///path, tcp://host:port or https://host:port"
        ))),
    }
}

/// The JSON form: a name, an address, and files for TLS.
fn described(path: &str, text: &str) -> Result<Address> {
    #[derive(Deserialize)]
    struct Described {
        #[serde(rename = "Addr")]
        address: String,
        #[serde(rename = "TLSConfig", default)]
        tls: Option<Files>,
    }
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "PascalCase", default)]
    struct Files {
        insecure_skip_verify: bool,
        #[serde(rename = "CAFile")]
        authority: PathBuf,
        cert_file: PathBuf,
        key_file: PathBuf,
    }
    let found: Described = serde_json::from_str(text)
        .map_err(|error| Error::internal(format!("{path} does not describe a plugin")).because(error))?;
    let files = found.tls.unwrap_or_default();
    let given = |file: PathBuf| (!file.as_os_str().is_empty()).then_some(file);
    let identity = match (given(files.cert_file), given(files.key_file)) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        (Some(_), None) | (None, Some(_)) => {
            return Err(Error::internal(format!("{path}: CertFile and KeyFile belong together: give both")));
        }
    };
    let trust = Trust {
        authorities: given(files.authority).into_iter().collect(),
        identity,
        skip_verify: files.insecure_skip_verify,
    };
    address(path, &found.address, trust)
}

/// One call.
async fn ask<A: DeserializeOwned>(
    name: &str,
    address: &Address,
    method: &str,
    body: &Value,
    limit: Duration,
) -> Result<A> {
    let failed = |why: String| Error::internal(format!("plugin {name}: {method}: {why}"));
    let exchanged = tokio::time::timeout(limit, exchange(address, method, body)).await;
    let (status, bytes) = match exchanged {
        Err(_elapsed) => return Err(failed(format!("no answer within {} s", limit.as_secs()))),
        Ok(Err(error)) => {
            return Err(failed("cannot be reached, or does not speak the protocol".to_owned()).because(error));
        }
        Ok(Ok(answer)) => answer,
    };
    let refusal = serde_json::from_slice::<Refusal>(&bytes).map(|refusal| refusal.err).unwrap_or_default();
    if !refusal.is_empty() {
        return Err(failed(refusal));
    }
    if status != StatusCode::OK {
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).trim().to_owned();
        return Err(failed(format!("answered {status}: {text}")));
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| failed("the answer is not what the protocol says".to_owned()).because(error))
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn exchange(
    address: &Address,
    method: &str,
    body: &Value,
) -> std::result::Result<(StatusCode, Bytes), Failure> {
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("/{method}"))
        .header(header::HOST, "plugin")
        .header(header::ACCEPT, MEDIA_TYPE)
        .header(header::CONTENT_TYPE, MEDIA_TYPE)
        .body(Full::new(Bytes::from(body.to_string())))?;
    match address {
        Address::Unix(path) => converse(UnixStream::connect(path).await?, request).await,
        Address::Tcp(host) => converse(TcpStream::connect(host.as_str()).await?, request).await,
        Address::Tls(host, trust) => {
            let authority: http::uri::Authority = host.parse()?;
            let name = authority.host().trim_matches(['[', ']']);
            let port = authority.port_u16().unwrap_or(443);
            let trust = trust.clone();
            let config = tokio::task::spawn_blocking(move || tls::client_config(&trust)).await??;
            let stream = TcpStream::connect((name, port)).await?;
            let stream = TlsConnector::from(config).connect(tls::server_name(name)?, stream).await?;
            converse(stream, request).await
        }
    }
}

async fn converse<S>(
    stream: S,
    request: Request<Full<Bytes>>,
) -> std::result::Result<(StatusCode, Bytes), Failure>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let answering = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let bytes = Limited::new(response.into_body(), MAX_ANSWER).collect().await?.to_bytes();
        Ok::<_, Failure>((status, bytes))
    };
    // The connection ends with this call, whatever becomes of it.
    tokio::pin!(connection);
    tokio::pin!(answering);
    tokio::select! {
        answer = &mut answering => answer,
        ended = &mut connection => {
            ended?;
            answering.await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_sockets_or_hosts() {
        let address = |text: &str| address("f", text, Trust::default());
        assert_eq!(address("unix:///run/p.sock").unwrap(), Address::Unix("/run/p.sock".into()));
        assert_eq!(address("tcp://h:1/").unwrap(), Address::Tcp("h:1".to_owned()));
        assert_eq!(address("https://h").unwrap(), Address::Tls("h".to_owned(), Trust::default()));
        assert!(address("p.sock").unwrap_err().to_string().contains("is no plugin's address"));
        let found = described("f", r#"{"Name":"p","Addr":"tcp://h:1"}"#).unwrap();
        assert_eq!(found, Address::Tcp("h:1".to_owned()));
        let tls = r#""TLSConfig":{"CAFile":"/ca","CertFile":"/cert","KeyFile":"/key"}"#;
        let found = described("f", &format!(r#"{{"Name":"p","Addr":"https://h:1",{tls}}}"#)).unwrap();
        let trust = Trust {
            authorities: vec!["/ca".into()],
            identity: Some(("/cert".into(), "/key".into())),
            skip_verify: false,
        };
        assert_eq!(found, Address::Tls("h:1".to_owned(), trust));
        let error = described("f", &format!(r#"{{"Name":"p","Addr":"tcp://h:1",{tls}}}"#)).unwrap_err();
        assert!(error.to_string().contains("does not begin with https://"), "{error}");
        let error = described("f", r#"{"Addr":"https://h","TLSConfig":{"KeyFile":"/k"}}"#).unwrap_err();
        assert!(error.to_string().contains("belong together"), "{error}");
        assert_eq!(find("../../x").unwrap(), None);
    }
}
