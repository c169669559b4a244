//! The Engine API over its socket: one connection, reused; others only for streams.
//!
//! The API version is settled by the first answer: requests go out with the newest version this client speaks, and an
//! older engine's refusal names the version to use instead. No round trip is spent on asking beforehand.

mod endpoint;
mod reply;
mod spawn;
mod stand_in;
mod wire;

use std::sync::Mutex;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, UPGRADE, USER_AGENT};
use hyper::{Method, Request, Version};
use hyper_util::rt::TokioIo;

pub use endpoint::{Endpoint, Unreachable};
pub use reply::{Lines, Reply};
pub use spawn::DETACH_MARK;
pub use stand_in::FileBody;
pub use wire::Wire;

use crate::fault::{Fault, Outcome};

/// The newest API version this client speaks.
pub const NEWEST: &str = "1.53";

pub type Body = BoxBody<Bytes, std::io::Error>;

pub struct Client {
    endpoint: Endpoint,
    version: Mutex<Option<String>>,
    idle: Mutex<Option<SendRequest<Body>>>,
}

/// A request being put together.
pub struct Ask<'a> {
    client: &'a Client,
    method: Method,
    path: String,
    headers: Vec<(HeaderName, HeaderValue)>,
    body: Payload,
}

enum Payload {
    None,
    Bytes(Bytes),
    Stream(Body),
}

impl Client {
    pub fn new(endpoint: Endpoint) -> Self {
        let pinned = ["BRIG_API_VERSION", "DOCKER_API_VERSION"]
            .iter()
            .find_map(|name| std::env::var(name).ok())
            .map(|version| version.trim_start_matches('v').to_owned())
            .filter(|version| !version.is_empty());
        Self { endpoint, version: Mutex::new(pinned), idle: Mutex::new(None) }
    }

    pub fn get(&self, path: impl Into<String>) -> Ask<'_> {
        self.ask(Method::GET, path)
    }

    pub fn post(&self, path: impl Into<String>) -> Ask<'_> {
        self.ask(Method::POST, path)
    }

    pub fn delete(&self, path: impl Into<String>) -> Ask<'_> {
        self.ask(Method::DELETE, path)
    }

    pub fn ask(&self, method: Method, path: impl Into<String>) -> Ask<'_> {
        Ask { client: self, method, path: path.into(), headers: Vec::new(), body: Payload::None }
    }

    /// The version in use; the newest one until an engine said otherwise.
    pub fn version(&self) -> String {
        lock(&self.version).clone().unwrap_or_else(|| NEWEST.to_owned())
    }

    /// Asks the engine which version it speaks, for requests whose body can be sent only once.
    pub async fn negotiate(&self) -> Outcome {
        if lock(&self.version).is_some() {
            return Ok(());
        }
        let reply = self.ask(Method::HEAD, "/_ping").send_as("").await?;
        let offered = reply.header("api-version").unwrap_or(NEWEST).to_owned();
        reply.drain().await?;
        *lock(&self.version) = Some(older(NEWEST, &offered).to_owned());
        Ok(())
    }

    async fn connection(&self) -> Outcome<SendRequest<Body>> {
        let kept = lock(&self.idle).take();
        if let Some(mut sender) = kept
            && sender.ready().await.is_ok()
        {
            return Ok(sender);
        }
        let wire = spawn::connect(&self.endpoint).await?;
        let (sender, connection) = handshake(TokioIo::new(wire))
            .await
            .map_err(|error| Fault::said(format!("talking to {}: {error}", self.endpoint)))?;
        // The connection's errors come back through the sender; its task has nobody to tell.
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }

    /// Takes a connection back whose answer was read to its end.
    fn keep(&self, sender: SendRequest<Body>) {
        if !sender.is_closed() {
            *lock(&self.idle) = Some(sender);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn number(version: &str) -> (u32, u32) {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

fn older<'a>(a: &'a str, b: &'a str) -> &'a str {
    if number(b) < number(a) { b } else { a }
}

/// `client version 1.53 is too new. Maximum supported API version is 1.41`: the 1.41.
fn offered_instead(message: &str) -> Option<String> {
    if !message.contains("is too new") {
        return None;
    }
    let version = message.rsplit(' ').next()?.trim_end_matches('.');
    (number(version) > (0, 0)).then(|| version.to_owned())
}

impl<'a> Ask<'a> {
    /// Adds `name=value` to the query.
    pub fn query(mut self, name: &str, value: &str) -> Self {
        let mark = if self.path.contains('?') { '&' } else { '?' };
        self.path.push(mark);
        self.path.push_str(name);
        self.path.push('=');
        self.path.push_str(&encode(value));
        self
    }

    pub fn maybe(self, name: &str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.query(name, value),
            None => self,
        }
    }

    pub fn flag(self, name: &str, on: bool) -> Self {
        if on { self.query(name, "1") } else { self }
    }

    pub fn json<T: serde::Serialize>(mut self, body: &T) -> Outcome<Self> {
        let bytes = serde_json::to_vec(body).map_err(|error| Fault::said(format!("request: {error}")))?;
        self.body = Payload::Bytes(bytes.into());
        Ok(self.header(CONTENT_TYPE, "application/json"))
    }

    pub fn stream(mut self, body: Body, content_type: &'static str) -> Self {
        self.body = Payload::Stream(body);
        self.header(CONTENT_TYPE, content_type)
    }

    pub fn header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.push((name, value));
        }
        self
    }

    /// Sends the request; an error status becomes a fault.
    pub async fn send(self) -> Outcome<Reply<'a>> {
        let client = self.client;
        if matches!(self.body, Payload::Stream(_)) {
            client.negotiate().await?;
            let version = client.version();
            return self.send_as(&version).await?.accepted().await;
        }
        let (method, path) = (self.method.clone(), self.path.clone());
        let (headers, body) = (
            self.headers.clone(),
            match &self.body {
                Payload::Bytes(bytes) => Payload::Bytes(bytes.clone()),
                _ => Payload::None,
            },
        );
        let settled = lock(&client.version).is_some();
        match self.send_as(&client.version()).await?.accepted().await {
            Err(Fault::Api { status: 400, message }) if !settled => match offered_instead(&message) {
                Some(version) => {
                    *lock(&client.version) = Some(version.clone());
                    Ask { client, method, path, headers, body }.send_as(&version).await?.accepted().await
                }
                None => Err(Fault::Api { status: 400, message }),
            },
            other => {
                if !settled && other.is_ok() {
                    *lock(&client.version) = Some(NEWEST.to_owned());
                }
                other
            }
        }
    }

    /// Sends the request and takes over its connection as a two-way stream.
    pub async fn hijack(self) -> Outcome<(Wire, Bytes)> {
        self.hijack_to("tcp").await
    }

    /// The same, with the protocol that is spoken then.
    pub async fn hijack_to(self, protocol: &str) -> Outcome<(Wire, Bytes)> {
        self.header(CONNECTION, "Upgrade").header(UPGRADE, protocol).send().await?.into_wire().await
    }

    /// For commands that answer with nothing worth reading.
    pub async fn done(self) -> Outcome {
        self.send().await?.drain().await
    }

    async fn send_as(self, version: &str) -> Outcome<Reply<'a>> {
        let client = self.client;
        let mut sender = client.connection().await?;
        let target = if version.is_empty() { self.path.clone() } else { format!("/v{version}{}", self.path) };
        let body: Body = match self.body {
            Payload::None => Empty::new().map_err(|never| match never {}).boxed(),
            Payload::Bytes(bytes) => Full::new(bytes).map_err(|never| match never {}).boxed(),
            Payload::Stream(body) => body,
        };
        let mut request = Request::builder()
            .method(self.method)
            .uri(target)
            .version(Version::HTTP_11)
            .header(HOST, client.endpoint.host_header())
            .header(USER_AGENT, concat!("brig/", env!("CARGO_PKG_VERSION"), " (linux)"))
            .body(body)
            .map_err(|error| Fault::said(format!("request: {error}")))?;
        request.headers_mut().extend(self.headers);
        let response = sender.send_request(request).await.map_err(|error| {
            Fault::said(format!("the engine at {} ended the connection: {error}", client.endpoint))
        })?;
        Ok(Reply::new(client, sender, response))
    }
}

/// Percent-encodes what may not stand in a path segment or query value.
pub fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").unwrap_or_default();
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_engine_says_which_version_to_use() {
        let text = "client version 1.53 is too new. Maximum supported API version is 1.41";
        assert_eq!(offered_instead(text).as_deref(), Some("1.41"));
        assert_eq!(offered_instead("no such image"), None);
        assert_eq!(older("1.53", "1.9"), "1.9");
    }

    #[test]
    fn query_values_are_encoded() {
        assert_eq!(encode(r#"{"a":["b c"]}"#), "%7B%22a%22%3A%5B%22b%20c%22%5D%7D");
    }
}
