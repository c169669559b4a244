//! The client: one per engine, cheap to share.
//!
//! Invariant: what two operations fetch at the same time is fetched once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use brigantine_image::model::{Descriptor, Document};
use brigantine_image::{Digest, Platform, Reference, media};
use http::Method;
use http::header::ACCEPT;

use crate::endpoint::{Purpose, endpoints};
use crate::error::shown;
use crate::hosts::Trust;
use crate::session::{Action, Ask, Session, detail, read};
use crate::{Config, Credentials, Error};

/// The most a manifest may hold.
pub(crate) const MANIFEST_LIMIT: usize = 8 << 20;

/// A registry client. Clones share its connections.
#[derive(Clone)]
pub struct Client {
    transport: Arc<RwLock<Arc<Transport>>>,
    turns: Arc<Turns>,
}

/// Connections and their configuration.
pub(crate) struct Transport {
    pub config: Config,
    /// One client for each way to trust: connections are shared only between hosts that are trusted alike.
    clients: Mutex<HashMap<Trust, reqwest::Client>>,
}

/// Who is fetching which blob: the next one waits and then finds it there.
#[derive(Default)]
pub(crate) struct Turns {
    blobs: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

/// A manifest as a registry holds it.
#[derive(Debug, Clone)]
pub struct Resolved {
    pub descriptor: Descriptor,
    pub raw: Vec<u8>,
    pub document: Document,
    /// The platforms offered; for a single image, the one its configuration names.
    pub platforms: Vec<Platform>,
}

impl Transport {
    pub fn client(&self, trust: &Trust) -> Result<reqwest::Client, Error> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(trust) {
            return Ok(client.clone());
        }
        let client = self.build(trust)?;
        clients.insert(trust.clone(), client.clone());
        Ok(client)
    }

    fn build(&self, trust: &Trust) -> Result<reqwest::Client, Error> {
        let failed = |error| Error::Invalid(format!("setting up connections to registries: {error}"));
        // Fails when the process has chosen one already, which is as good.
        rustls::crypto::ring::default_provider().install_default().ok();
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("brigantine/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(std::time::Duration::from_secs(15))
            .read_timeout(self.config.stall);
        if trust.anything {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        builder = builder.tls_certs_merge(trust.authorities()?);
        if let Some(identity) = trust.identity()? {
            builder = builder.identity(identity);
        }
        let except = || self.config.no_proxy.as_deref().and_then(reqwest::NoProxy::from_string);
        if let Some(proxy) = &self.config.http_proxy {
            builder = builder.proxy(reqwest::Proxy::http(proxy).map_err(failed)?.no_proxy(except()));
        }
        if let Some(proxy) = &self.config.https_proxy {
            builder = builder.proxy(reqwest::Proxy::https(proxy).map_err(failed)?.no_proxy(except()));
        }
        builder.build().map_err(failed)
    }
}

impl Client {
    pub fn new(config: Config) -> Self {
        Self { transport: Arc::new(RwLock::new(Arc::new(Transport::new(config)))), turns: Arc::default() }
    }

    /// Takes another configuration; operations that are under way keep theirs.
    pub fn reconfigure(&self, config: Config) {
        *self.transport.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Transport::new(config));
    }

    pub(crate) fn transport(&self) -> Arc<Transport> {
        Arc::clone(&self.transport.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn turns(&self) -> &Turns {
        &self.turns
    }

    /// What a reference names in its registry.
    pub async fn resolve(
        &self,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<Resolved, Error> {
        let reference = reference.clone().or_latest();
        let transport = self.transport();
        let (session, descriptor, raw) = find(&transport, &reference, credentials).await?;
        let document = parse(&reference, &raw)?;
        let platforms = match &document {
            Document::Index(index) => {
                index.manifests.iter().filter_map(|manifest| manifest.platform.clone()).collect()
            }
            Document::Manifest(manifest) if media::is_image_config(&manifest.config.media_type) => {
                let raw = small_blob(&session, &manifest.config).await?;
                let config: brigantine_image::ImageConfig =
                    serde_json::from_slice(&raw).map_err(|error| {
                        Error::protocol(
                            format!("the configuration of {}", reference.familiar()),
                            error.to_string(),
                        )
                    })?;
                vec![config.platform()]
            }
            Document::Manifest(_) => Vec::new(),
        };
        Ok(Resolved { descriptor, raw, document, platforms })
    }

    /// Whether a registry takes these credentials. `registry` is `host[:port]` or `docker.io`.
    pub async fn login(&self, registry: &str, credentials: Credentials) -> Result<(), Error> {
        let named = Reference::parse(&format!("{registry}/login"))
            .map_err(|error| Error::Invalid(error.to_string()))?;
        let transport = self.transport();
        let endpoint = endpoints(&transport.config, &named, Purpose::Push)?
            .into_iter()
            .find(|endpoint| !endpoint.mirror)
            .ok_or_else(|| Error::Invalid(format!("{registry:?} is not a registry")))?;
        let session = Session::open(&transport, &endpoint, "", Action::Pull, Some(credentials)).await?;
        let url = session.url("")?;
        let answer = session.send(&Ask::new(Method::GET, url.clone())).await?;
        if answer.status().is_success() { Ok(()) } else { Err(session.failure("Get", &url, answer).await) }
    }
}

impl Transport {
    pub fn new(config: Config) -> Self {
        Self { config, clients: Mutex::default() }
    }
}

impl Turns {
    /// Waits until nobody else fetches the blob.
    pub async fn take(&self, digest: &Digest) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = {
            let mut blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
            blobs.retain(|_, turn| turn.strong_count() > 0);
            blobs.get(digest).and_then(Weak::upgrade).unwrap_or_else(|| {
                let turn = Arc::new(tokio::sync::Mutex::new(()));
                blobs.insert(digest.clone(), Arc::downgrade(&turn));
                turn
            })
        };
        turn.lock_owned().await
    }
}

/// Opens the first endpoint that has the reference, and gets its manifest.
pub(crate) async fn find(
    transport: &Arc<Transport>,
    reference: &Reference,
    credentials: Option<Credentials>,
) -> Result<(Session, Descriptor, Vec<u8>), Error> {
    let mut first_failure = None;
    let purpose = if reference.digest().is_some() { Purpose::Pull } else { Purpose::Resolve };
    let all = endpoints(&transport.config, reference, purpose)?;
    for endpoint in &all {
        let attempt = async {
            let session =
                Session::open(transport, endpoint, reference.path(), Action::Pull, credentials.clone())
                    .await?;
            let (descriptor, raw) = manifest(&session, reference).await?;
            Ok((session, descriptor, raw))
        };
        match attempt.await {
            Ok(found) => return Ok(found),
            Err(error) => {
                let error = name_failure(reference, error);
                if endpoint.mirror {
                    tracing::warn!(mirror = %shown(&endpoint.base), error = %error.report(), "a mirror cannot serve {}", reference.familiar());
                    continue;
                }
                first_failure = Some(error);
            }
        }
    }
    Err(first_failure
        .unwrap_or_else(|| Error::Invalid(format!("no registry holds {}", reference.familiar()))))
}

/// Puts a pull's failure into docker's words.
pub(crate) fn name_failure(reference: &Reference, error: Error) -> Error {
    let repository = reference.familiar_name();
    match error {
        Error::Unauthorized { detail, .. } => Error::PullDenied { repository, detail },
        Error::Status { status, detail, .. } if status == http::StatusCode::FORBIDDEN => {
            Error::PullDenied { repository, detail }
        }
        other => other,
    }
}

/// The manifest a reference's tag or digest names.
pub(crate) async fn manifest(
    session: &Session,
    reference: &Reference,
) -> Result<(Descriptor, Vec<u8>), Error> {
    let name = match (reference.digest(), reference.tag()) {
        (Some(digest), _) => digest.to_string(),
        (None, tag) => tag.unwrap_or("latest").to_owned(),
    };
    let url = session.repository_url(&format!("manifests/{name}"))?;
    let mut ask = Ask::new(Method::GET, url.clone());
    for accepted in [media::OCI_INDEX, media::OCI_MANIFEST, media::DOCKER_INDEX, media::DOCKER_MANIFEST] {
        ask = ask.header(ACCEPT, accepted);
    }
    let answer = session.send(&ask).await?;
    if answer.status() == http::StatusCode::NOT_FOUND {
        let body = read(answer, MANIFEST_LIMIT, "an error").await.unwrap_or_default();
        let said = detail(&body).unwrap_or_else(|| "manifest unknown".to_owned());
        if said.starts_with("name unknown") {
            return Err(Error::NameUnknown { repository: reference.familiar_name(), detail: said });
        }
        let said = said.strip_prefix("manifest unknown: ").unwrap_or(&said).to_owned();
        return Err(Error::ManifestUnknown { reference: reference.familiar(), detail: said });
    }
    if !answer.status().is_success() {
        return Err(session.failure("Get", &url, answer).await);
    }
    let subject = format!("the manifest of {} at {}", reference.familiar(), session.registry());
    let header =
        |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let content_type = header("content-type").unwrap_or_default();
    let content_type = content_type.split(';').next().unwrap_or_default().trim().to_owned();
    let claimed = header("docker-content-digest");
    if content_type.starts_with("text/html") {
        return Err(Error::protocol(subject, "is an HTML page: this is no registry"));
    }
    let raw = read(answer, MANIFEST_LIMIT, &subject).await?;
    let expected = match reference.digest() {
        Some(digest) => Some(digest.clone()),
        None => claimed.and_then(|digest| digest.parse::<Digest>().ok()),
    };
    let digest = match expected {
        None => Digest::sha256(&raw),
        Some(expected) => {
            let actual = Digest::of(expected.algorithm(), &raw);
            if actual != expected {
                return Err(Error::protocol(
                    subject,
                    format!("has digest {actual}, not {expected} as promised"),
                ));
            }
            expected
        }
    };
    let media_type = if media::is_manifest(&content_type) || media::is_index(&content_type) {
        content_type
    } else {
        declared_type(&raw).unwrap_or_else(|| media::OCI_MANIFEST.to_owned())
    };
    let size = raw.len() as u64;
    Ok((Descriptor::new(&media_type, digest, size), raw))
}

fn declared_type(raw: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(raw).ok()?;
    value.get("mediaType")?.as_str().map(str::to_owned)
}

pub(crate) fn parse(reference: &Reference, raw: &[u8]) -> Result<Document, Error> {
    Document::parse(raw).map_err(|error| {
        let cause = std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
        Error::protocol(format!("the manifest of {}", reference.familiar()), format!("{error}{cause}"))
    })
}

/// A manifest named by another manifest.
pub(crate) async fn child(
    session: &Session,
    reference: &Reference,
    descriptor: &Descriptor,
) -> Result<Vec<u8>, Error> {
    let by_digest = reference.with_digest(descriptor.digest.clone());
    let (found, raw) = manifest(session, &by_digest).await?;
    if found.size != descriptor.size {
        return Err(Error::protocol(
            format!("manifest {} of {}", descriptor.digest, reference.familiar()),
            format!("has {} bytes, not {} as its index says", found.size, descriptor.size),
        ));
    }
    Ok(raw)
}

/// A blob small enough for memory (a configuration), verified.
pub(crate) async fn small_blob(session: &Session, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
    let subject = format!("blob {} at {}", descriptor.digest, session.registry());
    let limit = brigantine_image::DOCUMENT_MAX;
    if descriptor.size > limit {
        return Err(Error::protocol(
            subject,
            format!("has {} bytes: a configuration may have {limit}", descriptor.size),
        ));
    }
    let url = session.repository_url(&format!("blobs/{}", descriptor.digest))?;
    let mut attempt = 0;
    loop {
        let answer = session.send(&Ask::new(Method::GET, url.clone())).await?;
        if !answer.status().is_success() {
            return Err(session.failure("Get", &url, answer).await);
        }
        match read(answer, descriptor.size as usize, &subject).await {
            Ok(raw) => {
                let actual = Digest::of(descriptor.digest.algorithm(), &raw);
                if actual == descriptor.digest {
                    return Ok(raw);
                }
                return Err(Error::protocol(subject, format!("has digest {actual}")));
            }
            Err(error) if error.is_transient() && attempt < 4 => {
                attempt += 1;
                tokio::time::sleep(session.pause(attempt, None)).await;
            }
            Err(error) => return Err(error),
        }
    }
}
