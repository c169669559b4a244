//! One operation's conversation with one registry: scheme, authentication, redirects, retries.
//!
//! Invariants: credentials are sent only to the registry's own origin (or, for a token, to the realm it named), a
//! redirect never carries them elsewhere nor leaves http and https, and no answer is read without bound.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{AUTHORIZATION, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::Response;
use serde::Deserialize;
use url::Url;

use crate::auth::{Challenge, Keeper, WantedToken};
use crate::client::Transport;
use crate::endpoint::Endpoint;
use crate::error::shown;
use crate::{Credentials, Error};

/// The most of an error document or token answer that is read.
const SMALL: usize = 1 << 20;
/// Redirects followed before giving up.
const REDIRECTS: usize = 5;
/// The longest a registry may tell us to wait.
const LONGEST_WAIT: Duration = Duration::from_mins(1);

/// What is done with a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Pull,
    Push,
    /// Listing all repositories.
    Catalog,
}

pub(crate) struct Session {
    transport: Arc<Transport>,
    client: reqwest::Client,
    base: Url,
    /// The base's path is complete: `/v2` is not added to it.
    whole_path: bool,
    /// Sent to the registry itself, and nowhere else.
    headers: HeaderMap,
    /// The registry this one is a mirror of, as containerd's mirrors are told.
    namespace: Option<String>,
    repository: String,
    action: Action,
    credentials: Option<Credentials>,
    /// The value of `Authorization` for the registry's origin, once it asked for one.
    authorization: Mutex<Option<HeaderValue>>,
}

/// One request; it can be sent again.
pub(crate) struct Ask {
    pub method: Method,
    pub url: Url,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Ask {
    pub fn new(method: Method, url: Url) -> Self {
        Self { method, url, headers: HeaderMap::new(), body: Bytes::new() }
    }

    pub fn header(mut self, name: http::HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.append(name, value);
        }
        self
    }
}

impl Session {
    /// Finds out how the endpoint speaks and what it asks for.
    pub async fn open(
        transport: &Arc<Transport>,
        endpoint: &Endpoint,
        repository: &str,
        action: Action,
        credentials: Option<Credentials>,
    ) -> Result<Self, Error> {
        let client = transport.client(&endpoint.trust)?;
        let mut session = Self {
            transport: Arc::clone(transport),
            client,
            base: endpoint.base.clone(),
            whole_path: endpoint.whole_path,
            headers: endpoint.headers.clone(),
            namespace: endpoint.namespace.clone(),
            repository: repository.to_owned(),
            action,
            // A mirror is another registry: the user's secrets are not for it.
            credentials: credentials.filter(|_| !endpoint.mirror),
            authorization: Mutex::new(None),
        };
        let plain_too = endpoint.plain_too && endpoint.base.scheme() == "https";
        let answer = match session.ping().await {
            Err(Error::Unreachable { .. }) if plain_too => {
                if session.base.set_scheme("http").is_err() {
                    return Err(Error::protocol(shown(&endpoint.base), "cannot be asked over HTTP"));
                }
                session.ping().await?
            }
            answer => answer?,
        };
        match answer.status() {
            StatusCode::UNAUTHORIZED => session.authenticate(&answer).await?,
            status if status.is_success() => {
                if let Some(Credentials::Registry { token }) = &session.credentials {
                    session.set_authorization(&format!("Bearer {token}"));
                }
            }
            // Some registries forbid or lack the version check; the request itself will tell.
            StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => {}
            _ => return Err(session.failure("Get", &session.url("")?, answer).await),
        }
        Ok(session)
    }

    async fn ping(&self) -> Result<Response, Error> {
        let url = self.url("")?;
        let mut attempt = 0;
        loop {
            let request = self.client.get(url.clone()).headers(self.headers.clone());
            let sent = request.timeout(Duration::from_secs(30)).send().await;
            match sent {
                Ok(answer)
                    if answer.status() == StatusCode::TOO_MANY_REQUESTS
                        && attempt + 1 < self.transport.config.attempts =>
                {
                    attempt += 1;
                    tokio::time::sleep(self.pause(attempt, Some(&answer))).await;
                }
                Ok(answer) => return Ok(answer),
                Err(error) => return Err(Error::unreachable("Get", &url, &error)),
            }
        }
    }

    /// `<base>/v2/<path>`.
    pub fn url(&self, path: &str) -> Result<Url, Error> {
        let mut base = self.base.clone();
        let prefix = base.path().trim_end_matches('/').to_owned();
        let version = if self.whole_path { "" } else { "/v2" };
        base.set_path(&format!("{prefix}{version}/{path}"));
        base.set_query(None);
        if let Some(namespace) = &self.namespace {
            base.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(base)
    }

    /// `<base>/v2/<repository>/<rest>`.
    pub fn repository_url(&self, rest: &str) -> Result<Url, Error> {
        self.url(&format!("{}/{rest}", self.repository))
    }

    /// The registry's host and port, for messages and comparisons.
    pub fn registry(&self) -> String {
        let host = self.base.host_str().unwrap_or_default();
        self.base.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
    }

    /// Attempts at one thing that make no progress before it fails.
    pub fn attempts(&self) -> usize {
        self.transport.config.attempts.max(1)
    }

    /// Whether TLS is spoken: then nothing is sent or fetched without it.
    pub fn is_secure(&self) -> bool {
        self.base.scheme() == "https"
    }

    /// The pause before attempt number `attempt` (1 is the first repetition).
    pub fn pause(&self, attempt: usize, answer: Option<&Response>) -> Duration {
        let asked = answer
            .and_then(|answer| answer.headers().get(RETRY_AFTER))
            .and_then(|value| value.to_str().ok())
            .and_then(|value| {
                let value = value.trim();
                let seconds = value.parse().ok().map(Duration::from_secs);
                let until = || httpdate::parse_http_date(value).ok()?.duration_since(SystemTime::now()).ok();
                seconds.or_else(until)
            });
        let ours = self.transport.config.back_off.saturating_mul(1 << attempt.saturating_sub(1).min(6));
        asked.unwrap_or(ours).max(ours.min(Duration::from_millis(100))).min(LONGEST_WAIT)
    }

    /// Sends, following redirects and answering challenges; repeats what failed on the way or was put off.
    /// Any other answer, an error status too, is the caller's.
    pub async fn send(&self, ask: &Ask) -> Result<Response, Error> {
        let mut attempt = 0;
        loop {
            let result = self.send_once(ask).await;
            let retry = match &result {
                Ok(answer) => {
                    answer.status() == StatusCode::TOO_MANY_REQUESTS || answer.status().is_server_error()
                }
                Err(error) => error.is_transient(),
            };
            attempt += 1;
            if !retry || attempt >= self.transport.config.attempts {
                return result;
            }
            let pause = self.pause(attempt, result.as_ref().ok());
            tracing::debug!(url = %shown(&ask.url), attempt, ?pause, "asking a registry again");
            tokio::time::sleep(pause).await;
        }
    }

    async fn send_once(&self, ask: &Ask) -> Result<Response, Error> {
        let mut authenticated = false;
        loop {
            let answer = self.follow(ask).await?;
            if answer.status() != StatusCode::UNAUTHORIZED || authenticated || !self.is_ours(answer.url()) {
                return Ok(answer);
            }
            authenticated = true;
            if !answer.headers().contains_key(WWW_AUTHENTICATE) {
                return Ok(answer);
            }
            self.authenticate(&answer).await?;
        }
    }

    async fn follow(&self, ask: &Ask) -> Result<Response, Error> {
        let mut url = ask.url.clone();
        for _ in 0..=REDIRECTS {
            let answer = self.send_to(ask, &url).await?;
            let redirected = matches!(answer.status().as_u16(), 301 | 302 | 303 | 307 | 308);
            if !redirected || !matches!(ask.method, Method::GET | Method::HEAD) {
                return Ok(answer);
            }
            let location = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location
                .and_then(|location| url.join(location).ok())
                .ok_or_else(|| Error::protocol(shown(&url), "redirects without a usable Location"))?;
            let secure = self.base.scheme() == "https";
            if next.scheme() != "https" && (next.scheme() != "http" || secure) {
                return Err(Error::protocol(
                    shown(&url),
                    format!("redirects to {}, which is not allowed from here", shown(&next)),
                ));
            }
            url = next;
        }
        Err(Error::protocol(shown(&ask.url), format!("redirects more than {REDIRECTS} times")))
    }

    async fn send_to(&self, ask: &Ask, url: &Url) -> Result<Response, Error> {
        let mut request = self
            .client
            .request(ask.method.clone(), url.clone())
            .headers(ask.headers.clone())
            .body(ask.body.clone());
        if self.is_ours(url) {
            request = request.headers(self.headers.clone());
            if let Some(authorization) = self.authorization() {
                request = request.header(AUTHORIZATION, authorization);
            }
        }
        request.send().await.map_err(|error| Error::unreachable(verb(&ask.method), url, &error))
    }

    /// Sends a body that is read once. Only the status decides; there is no second attempt here.
    pub async fn send_stream(
        &self,
        method: Method,
        url: &Url,
        length: u64,
        headers: Vec<(http::HeaderName, String)>,
        body: reqwest::Body,
    ) -> Result<Response, Error> {
        let mut request = self
            .client
            .request(method.clone(), url.clone())
            .header(http::header::CONTENT_LENGTH, length)
            .header(http::header::CONTENT_TYPE, "application/octet-stream")
            .body(body);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        if self.is_ours(url) {
            request = request.headers(self.headers.clone());
            if let Some(authorization) = self.authorization() {
                request = request.header(AUTHORIZATION, authorization);
            }
        }
        request.send().await.map_err(|error| Error::unreachable(verb(&method), url, &error))
    }

    fn authorization(&self) -> Option<HeaderValue> {
        self.authorization.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    fn set_authorization(&self, value: &str) {
        if let Ok(mut value) = HeaderValue::from_str(value) {
            value.set_sensitive(true);
            *self.authorization.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(value);
        }
    }

    /// Whether the URL is of the registry itself: secrets may go there.
    fn is_ours(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    /// Answers a 401's challenge.
    async fn authenticate(&self, answer: &Response) -> Result<(), Error> {
        let headers = answer.headers().get_all(WWW_AUTHENTICATE);
        let challenge = Challenge::choose(headers.iter().filter_map(|value| value.to_str().ok()));
        match (challenge, &self.credentials) {
            (_, Some(Credentials::Registry { token })) => self.set_authorization(&format!("Bearer {token}")),
            (Some(Challenge::Basic), Some(Credentials::Password { username, password })) => {
                self.set_authorization(&format!(
                    "Basic {}",
                    STANDARD.encode(format!("{username}:{password}"))
                ));
            }
            (Some(Challenge::Bearer { realm, service, scope }), _) => {
                let token = self.token(&realm, service.as_deref(), scope.as_deref()).await?;
                self.set_authorization(&format!("Bearer {token}"));
            }
            // The request that follows is refused and says so better than we could.
            (Some(Challenge::Basic) | None, _) => {}
        }
        Ok(())
    }

    /// Asks the realm for a token for this repository.
    async fn token(&self, realm: &str, service: Option<&str>, scope: Option<&str>) -> Result<String, Error> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let subject = || format!("the token server of {}", self.registry());
        let mut url = Url::parse(realm).map_err(|_error| {
            Error::protocol(self.registry(), format!("names {realm:?} as its token server"))
        })?;
        let secure = self.base.scheme() == "https";
        if url.scheme() != "https" && (url.scheme() != "http" || secure) {
            return Err(Error::protocol(
                self.registry(),
                format!("names {} as its token server", shown(&url)),
            ));
        }
        let ours = match self.action {
            Action::Pull => format!("repository:{}:pull", self.repository),
            Action::Push => format!("repository:{}:pull,push", self.repository),
            Action::Catalog => "registry:catalog:*".to_owned(),
        };
        let mut scopes = vec![ours.as_str()];
        scopes.extend(scope.filter(|scope| {
            *scope != ours && !self.repository.is_empty() && scope.starts_with("repository:")
        }));
        if self.repository.is_empty() && self.action != Action::Catalog {
            scopes.clear();
        }
        if let Some(Credentials::Kept(Keeper(keeper))) = &self.credentials {
            let wanted = WantedToken {
                realm: realm.to_owned(),
                service: service.unwrap_or_default().to_owned(),
                scopes: scopes.iter().map(|scope| (*scope).to_owned()).collect(),
            };
            let got = keeper.token(&wanted).await;
            if let Some(token) =
                got.map_err(|detail| Error::Unauthorized { registry: self.registry(), detail })?
            {
                return Ok(token);
            }
        }
        let request = if let Some(Credentials::Identity { token, .. }) = &self.credentials {
            let form = {
                let mut form = url::form_urlencoded::Serializer::new(String::new());
                form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", token);
                form.append_pair("client_id", "brigantine").append_pair("scope", &scopes.join(" "));
                if let Some(service) = service {
                    form.append_pair("service", service);
                }
                form.finish()
            };
            let typed = (http::header::CONTENT_TYPE, "application/x-www-form-urlencoded");
            self.client.post(url.clone()).header(typed.0, typed.1).body(form)
        } else {
            {
                let mut query = url.query_pairs_mut();
                if let Some(service) = service {
                    query.append_pair("service", service);
                }
                for scope in scopes {
                    query.append_pair("scope", scope);
                }
            }
            let request = self.client.get(url.clone());
            match &self.credentials {
                Some(Credentials::Password { username, password }) => {
                    request.basic_auth(username, Some(password))
                }
                _ => request,
            }
        };
        let answer = request
            .timeout(Duration::from_secs(30))
            .send()
            .await
            .map_err(|error| Error::unreachable("Get", &url, &error))?;
        let status = answer.status();
        if !status.is_success() {
            let detail =
                detail(&read(answer, SMALL, &subject()).await?).unwrap_or_else(|| status.to_string());
            return Err(match status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    Error::Unauthorized { registry: self.registry(), detail }
                }
                StatusCode::TOO_MANY_REQUESTS => Error::TooManyRequests { url: shown(&url), detail },
                status => Error::Status { method: "Get", url: shown(&url), status, detail },
            });
        }
        let body = read(answer, SMALL, &subject()).await?;
        let parsed: Answer = serde_json::from_slice(&body)
            .map_err(|_error| Error::protocol(subject(), "did not answer with a token"))?;
        parsed
            .token
            .filter(|token| !token.is_empty())
            .or(parsed.access_token)
            .ok_or_else(|| Error::protocol(subject(), "did not answer with a token"))
    }

    /// The error for an answer that is none of the expected.
    pub async fn failure(&self, method: &'static str, url: &Url, answer: Response) -> Error {
        let status = answer.status();
        let body = read(answer, SMALL, "an error").await.unwrap_or_default();
        let detail =
            detail(&body).unwrap_or_else(|| status.canonical_reason().unwrap_or("no reason").to_owned());
        match status {
            StatusCode::UNAUTHORIZED => {
                let detail = detail.strip_prefix("unauthorized: ").unwrap_or(&detail).to_owned();
                Error::Unauthorized { registry: self.registry(), detail }
            }
            StatusCode::TOO_MANY_REQUESTS => Error::TooManyRequests { url: shown(url), detail },
            status => Error::Status { method, url: shown(url), status, detail },
        }
    }
}

/// Reads an answer of at most `limit` bytes.
pub(crate) async fn read(answer: Response, limit: usize, subject: &str) -> Result<Vec<u8>, Error> {
    let url = answer.url().clone();
    if answer.content_length().is_some_and(|length| length > limit as u64) {
        return Err(Error::protocol(subject, format!("is larger than {limit} bytes")));
    }
    let mut body = Vec::new();
    let mut chunks = answer.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| Error::unreachable("Get", &url, &error))?;
        if body.len() + chunk.len() > limit {
            return Err(Error::protocol(subject, format!("is larger than {limit} bytes")));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The error code and message of a registry's error document, `code: message`.
pub(crate) fn detail(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Document {
        #[serde(default)]
        errors: Vec<Item>,
        details: Option<String>,
    }
    #[derive(Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let document: Document = serde_json::from_slice(body).ok()?;
    match document.errors.first() {
        Some(item) => {
            let code = item.code.to_ascii_lowercase().replace('_', " ");
            Some(if item.message.is_empty() { code } else { format!("{code}: {}", item.message) })
        }
        None => document.details,
    }
}

pub(crate) fn verb(method: &Method) -> &'static str {
    match *method {
        Method::GET => "Get",
        Method::HEAD => "Head",
        Method::POST => "Post",
        Method::PUT => "Put",
        Method::PATCH => "Patch",
        Method::DELETE => "Delete",
        _ => "Request",
    }
}
