//! A pull-through cache: what the storage lacks is fetched from another registry, kept, and given on while it comes.
//!
//! Invariants: a blob is fetched once, however many ask for it; the last byte of one is given on only after its digest
//! was found right; when upstream fails, what is there is served; upstream's secrets stay between it and this registry.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use brigantine_image::model::{Descriptor, Index};
use brigantine_image::{Digest, Reference, media};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, RANGE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use url::Url;

use super::blobs::describe;
use super::library::{Library, StoredManifest};
use super::manifests::Described;
use super::options::Upstream;
use super::refusal::Refusal;
use super::reply::{Body, Outcome, blocking, empty, set_length};
use super::route::Pointer;
use super::service::Shared;
use super::storage::{ManifestRecord, NewManifest, Storage};
use crate::client::{MANIFEST_LIMIT, Transport, manifest as fetch_manifest};
use crate::endpoint::Endpoint;
use crate::session::{Action, Ask, Session, read};
use crate::{Credentials, Error};

/// For how long a conversation with upstream is gone on with; tokens live at least so long.
const SESSION_LIFETIME: Duration = Duration::from_mins(1);
/// Conversations and tags that are remembered.
const MOST_REMEMBERED: usize = 10_000;
/// Bytes of a list that upstream may answer.
const LIST_LIMIT: usize = 16 << 20;
/// Bytes that are read from a growing file at once.
const PIECE: usize = 128 << 10;

pub(super) struct Cache {
    storage: Arc<Storage>,
    transport: Arc<Transport>,
    endpoint: Endpoint,
    host: String,
    credentials: Option<Credentials>,
    fresh: Duration,
    sessions: Mutex<HashMap<String, (Instant, Arc<Session>)>>,
    /// When a tag was last asked for upstream.
    seen: Mutex<HashMap<(String, String), Instant>>,
    /// By repository too: upstream decides who may read what where.
    fetching: Mutex<HashMap<(String, Digest), watch::Receiver<State>>>,
}

/// How far a fetch is.
#[derive(Debug, Clone)]
enum State {
    Asking,
    Coming { file: Arc<tempfile::TempPath>, size: Option<u64>, ready: u64 },
    Done,
    Failed(StatusCode, String),
}

/// Upstream's answer to a question about one thing.
enum Found<T> {
    Yes(T),
    No,
    /// Unreachable, overloaded or broken.
    Failed(Error),
}

impl Cache {
    pub fn new(storage: Arc<Storage>, upstream: Upstream) -> Result<Self, Error> {
        let base = Url::parse(&upstream.url).ok().filter(|url| {
            matches!(url.scheme(), "http" | "https") && url.host_str().is_some_and(|host| !host.is_empty())
        });
        let base = base.ok_or_else(|| {
            Error::Invalid(format!("{:?} is not the http or https URL of a registry", upstream.url))
        })?;
        let host = base.host_str().unwrap_or_default().to_owned();
        let host = base.port().map_or(host.clone(), |port| format!("{host}:{port}"));
        let endpoint = Endpoint::at(&upstream.config, base)?;
        Ok(Self {
            storage,
            endpoint,
            host,
            transport: Arc::new(Transport::new(upstream.config)),
            credentials: upstream.credentials,
            fresh: upstream.fresh,
            sessions: Mutex::default(),
            seen: Mutex::default(),
            fetching: Mutex::default(),
        })
    }

    async fn session(&self, repository: &str) -> Result<Arc<Session>, Error> {
        {
            let mut sessions = lock(&self.sessions);
            if sessions.len() > MOST_REMEMBERED {
                sessions.clear();
            }
            if let Some((since, session)) = sessions.get(repository)
                && since.elapsed() < SESSION_LIFETIME
            {
                return Ok(Arc::clone(session));
            }
        }
        let credentials = self.credentials.clone();
        let session =
            Session::open(&self.transport, &self.endpoint, repository, Action::Pull, credentials).await?;
        let session = Arc::new(session);
        lock(&self.sessions).insert(repository.to_owned(), (Instant::now(), Arc::clone(&session)));
        Ok(session)
    }

    /// The manifest, from upstream or from here. `None` is that upstream does not have it.
    pub async fn manifest(
        &self,
        shared: &Shared,
        name: &str,
        pointer: &Pointer,
    ) -> Result<Option<StoredManifest>, Refusal> {
        let local = blocking({
            let (storage, name, pointer) = (Arc::clone(&self.storage), name.to_owned(), pointer.clone());
            move || Ok(storage.manifest(&name, &pointer)?)
        })
        .await?;
        let tag = match pointer {
            Pointer::Digest(_) => None,
            Pointer::Tag(tag) => Some((name.to_owned(), tag.clone())),
        };
        let is_fresh = match &tag {
            None => true,
            Some(tag) => lock(&self.seen).get(tag).is_some_and(|asked| asked.elapsed() < self.fresh),
        };
        if let Some(local) = &local
            && is_fresh
        {
            shared.metrics.cache_hits.inc();
            return Ok(Some(local.clone()));
        }
        shared.metrics.cache_misses.inc();
        match self.ask_manifest(name, pointer, local.as_ref()).await {
            Found::Yes(manifest) => {
                if let Some(tag) = tag {
                    let mut seen = lock(&self.seen);
                    if seen.len() > MOST_REMEMBERED {
                        seen.clear();
                    }
                    seen.insert(tag, Instant::now());
                }
                let tags = match pointer {
                    Pointer::Tag(tag) => vec![tag.clone()],
                    Pointer::Digest(_) => Vec::new(),
                };
                let (storage, name, kept) = (Arc::clone(&self.storage), name.to_owned(), manifest.clone());
                let stored = blocking(move || keep(&storage, &name, &kept, &tags)).await;
                if let Err(refusal) = stored {
                    tracing::warn!(message = %refusal.message, "a manifest is given on, but not kept");
                }
                Ok(Some(manifest))
            }
            Found::No => {
                if let (Pointer::Tag(tag), Some(_)) = (pointer, &local) {
                    let (storage, name, tag) = (Arc::clone(&self.storage), name.to_owned(), tag.clone());
                    blocking(move || Ok(storage.remove_tag(&name, &tag)?)).await?;
                }
                Ok(None)
            }
            Found::Failed(error) => match local {
                Some(local) => {
                    tracing::warn!(repository = name, error = %error.report(), "upstream failed: serving what is here");
                    shared.metrics.cache_stale.inc();
                    Ok(Some(local))
                }
                None => Err(self.upstream_failed(&error)),
            },
        }
    }

    async fn ask_manifest(
        &self,
        name: &str,
        pointer: &Pointer,
        local: Option<&StoredManifest>,
    ) -> Found<StoredManifest> {
        let separator = if matches!(pointer, Pointer::Tag(_)) { ':' } else { '@' };
        let reference = match Reference::parse(&format!("{}/{name}{separator}{pointer}", self.host)) {
            Ok(reference) => reference,
            Err(error) => return Found::Failed(Error::Invalid(error.to_string())),
        };
        let session = match self.session(name).await {
            Ok(session) => session,
            Err(error) => return sort(error),
        };
        if let Some(local) = local
            && self.is_current(&session, pointer, local).await
        {
            return Found::Yes(local.clone());
        }
        match fetch_manifest(&session, &reference).await {
            Ok((descriptor, raw)) => Found::Yes(StoredManifest {
                digest: descriptor.digest,
                media_type: descriptor.media_type,
                raw,
            }),
            Err(error) => sort(error),
        }
    }

    /// Whether a tag still names what is here, as far as upstream says so without sending it.
    async fn is_current(&self, session: &Session, pointer: &Pointer, local: &StoredManifest) -> bool {
        let Ok(url) = session.repository_url(&format!("manifests/{pointer}")) else { return false };
        let mut ask = Ask::new(Method::HEAD, url);
        for accepted in [media::OCI_INDEX, media::OCI_MANIFEST, media::DOCKER_INDEX, media::DOCKER_MANIFEST] {
            ask = ask.header(ACCEPT, accepted);
        }
        let Ok(answer) = session.send(&ask).await else { return false };
        let digest = answer.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        answer.status().is_success() && digest == Some(local.digest.as_str())
    }

    fn upstream_failed(&self, error: &Error) -> Refusal {
        tracing::warn!(upstream = self.host, error = %error.report(), "upstream failed");
        let status = match error {
            Error::TooManyRequests { .. } => StatusCode::TOO_MANY_REQUESTS,
            _ => StatusCode::BAD_GATEWAY,
        };
        let code = if status == StatusCode::TOO_MANY_REQUESTS { "TOOMANYREQUESTS" } else { "UNKNOWN" };
        Refusal::new(status, code, format!("the registry {} this one is a cache of failed", self.host))
    }

    /// All tags as upstream lists them; `None` where it does not tell.
    pub async fn tags(&self, name: &str) -> Option<Vec<String>> {
        #[derive(Deserialize)]
        struct Tags {
            tags: Option<Vec<String>>,
        }
        let session = self.session(name).await.ok()?;
        let raw = self.list(&session, "tags/list").await?;
        let mut tags = serde_json::from_slice::<Tags>(&raw).ok()?.tags.unwrap_or_default();
        tags.sort_unstable();
        Some(tags)
    }

    /// The referrers as upstream lists them; `None` where it does not tell.
    pub async fn referrers(&self, name: &str, subject: &Digest) -> Option<Vec<Descriptor>> {
        let session = self.session(name).await.ok()?;
        let raw = self.list(&session, &format!("referrers/{subject}")).await?;
        Some(serde_json::from_slice::<Index>(&raw).ok()?.manifests)
    }

    async fn list(&self, session: &Session, path: &str) -> Option<Vec<u8>> {
        let answer = session.send(&Ask::new(Method::GET, session.repository_url(path).ok()?)).await.ok()?;
        if !answer.status().is_success() {
            return None;
        }
        read(answer, LIST_LIMIT, "a list").await.ok()
    }

    /// A blob that is not here yet.
    pub async fn blob<B>(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        name: &str,
        digest: &Digest,
        request: &Request<B>,
    ) -> Outcome {
        shared.metrics.cache_misses.inc();
        if request.method() == Method::HEAD {
            return self.head(name, digest).await;
        }
        if self.is_elsewhere(name, digest).await? {
            return self.kept(name, digest, request).await;
        }
        let mut fetch = self.join(name, digest);
        let state = match fetch.wait_for(|state| !matches!(state, State::Asking)).await {
            Ok(state) => state.clone(),
            Err(_gone) => State::Failed(StatusCode::BAD_GATEWAY, "the fetch was given up".to_owned()),
        };
        match state {
            State::Asking | State::Done => self.kept(name, digest, request).await,
            State::Failed(StatusCode::NOT_FOUND, _) => Err(Refusal::blob_unknown(digest, name)),
            State::Failed(status, message) => Err(Refusal::new(status, "UNKNOWN", message)),
            State::Coming { file, size, .. } => {
                let opened = match File::open(&*file) {
                    Ok(opened) => opened,
                    // On its way into the storage, and the repository's own only when the fetch has ended.
                    Err(_moved) => {
                        let has_ended = |state: &State| matches!(state, State::Done | State::Failed(..));
                        let ended = fetch.wait_for(has_ended).await.map(|state| state.clone());
                        if let Ok(State::Failed(status, message)) = ended {
                            return Err(Refusal::new(status, "UNKNOWN", message));
                        }
                        return self.kept(name, digest, request).await;
                    }
                };
                // Part of a blob is asked for to go on with it: what lies before is passed over.
                let start = match request.headers().get(RANGE).and_then(|value| value.to_str().ok()) {
                    None => Some(0),
                    Some(range) => range
                        .strip_prefix("bytes=")
                        .and_then(|range| range.strip_suffix('-'))
                        .and_then(|start| start.parse().ok())
                        .filter(|start| size.is_some_and(|size| *start < size)),
                };
                Ok(follow(fetch, opened, start.unwrap_or(0), size, digest))
            }
        }
    }

    /// Whether another repository's content could be given to this one: upstream has it there as well.
    async fn is_elsewhere(&self, name: &str, digest: &Digest) -> Result<bool, Refusal> {
        let (storage, wanted) = (Arc::clone(&self.storage), digest.clone());
        if blocking(move || Ok(storage.stat_content(&wanted)?)).await?.is_none() {
            return Ok(false);
        }
        if self.head(name, digest).await.is_err() {
            return Ok(false);
        }
        let (storage, name, digest) = (Arc::clone(&self.storage), name.to_owned(), digest.clone());
        blocking(move || Ok(storage.link_blob(&name, &digest)?)).await
    }

    /// What was fetched completely by now.
    async fn kept<B>(&self, name: &str, digest: &Digest, request: &Request<B>) -> Outcome {
        let (storage, owned, wanted) = (Arc::clone(&self.storage), name.to_owned(), digest.clone());
        match blocking(move || Ok(storage.blob(&owned, &wanted)?)).await? {
            Some((content, size)) => super::blobs::answer(content, size, digest, request, false).await,
            None => Err(Refusal::blob_unknown(digest, name)),
        }
    }

    async fn head(&self, name: &str, digest: &Digest) -> Outcome {
        let asked = async {
            let session = self.session(name).await?;
            let url = session.repository_url(&format!("blobs/{digest}"))?;
            let answer = session.send(&Ask::new(Method::HEAD, url.clone())).await?;
            if answer.status().is_success() {
                Ok(answer)
            } else {
                Err(session.failure("Head", &url, answer).await)
            }
        };
        match asked.await {
            Ok(upstream) => {
                let mut answer = empty(StatusCode::OK);
                describe(&mut answer, digest);
                if let Some(length) = upstream.headers().get(CONTENT_LENGTH) {
                    answer.headers_mut().insert(CONTENT_LENGTH, length.clone());
                }
                Ok(answer)
            }
            Err(error) => match sort::<()>(error) {
                Found::Failed(error) => Err(self.upstream_failed(&error)),
                _ => Err(Refusal::blob_unknown(digest, name)),
            },
        }
    }

    /// The fetch of a blob: the one that is going on, or a new one.
    fn join(self: &Arc<Self>, name: &str, digest: &Digest) -> watch::Receiver<State> {
        let mut fetching = lock(&self.fetching);
        let key = (name.to_owned(), digest.clone());
        if let Some(fetch) = fetching.get(&key) {
            return fetch.clone();
        }
        let (state, fetch) = watch::channel(State::Asking);
        fetching.insert(key.clone(), fetch.clone());
        let cache = Arc::clone(self);
        // Of its own: it goes on when who asked first goes away.
        tokio::spawn(async move {
            let (name, digest) = &key;
            let end = match cache.fetch(name, digest, &state).await {
                Ok(()) => State::Done,
                Err(error) => {
                    let status = match &error {
                        Error::Status { status, .. } if *status == StatusCode::NOT_FOUND => *status,
                        Error::PullDenied { .. } | Error::Unauthorized { .. } => StatusCode::NOT_FOUND,
                        Error::TooManyRequests { .. } => StatusCode::TOO_MANY_REQUESTS,
                        _ => StatusCode::BAD_GATEWAY,
                    };
                    tracing::warn!(%digest, error = %error.report(), "a blob cannot be fetched from upstream");
                    State::Failed(
                        status,
                        format!("the registry {} this one is a cache of failed", cache.host),
                    )
                }
            };
            lock(&cache.fetching).remove(&key);
            state.send_replace(end);
        });
        fetch
    }

    async fn fetch(&self, name: &str, digest: &Digest, state: &watch::Sender<State>) -> Result<(), Error> {
        let failed = |source| Error::Io { what: format!("keep blob {digest}"), source };
        let session = self.session(name).await?;
        let url = session.repository_url(&format!("blobs/{digest}"))?;
        let temp = tempfile::NamedTempFile::new_in(self.storage.root().join("tmp")).map_err(failed)?;
        let (file, path) = temp.into_parts();
        let path = Arc::new(path);
        let mut file = tokio::fs::File::from_std(file);
        let mut hasher = digest.algorithm().hasher();
        let (mut done, mut failures, mut size) = (0_u64, 0, None);
        loop {
            let mut ask = Ask::new(Method::GET, url.clone());
            if done > 0 {
                ask = ask.header(RANGE, &format!("bytes={done}-"));
            }
            let answer = session.send(&ask).await?;
            let mut skip = match answer.status() {
                StatusCode::OK => done,
                StatusCode::PARTIAL_CONTENT if done > 0 => 0,
                _ => return Err(session.failure("Get", &url, answer).await),
            };
            let html = answer.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
            if html.is_some_and(|kind| kind.starts_with("text/html")) {
                return Err(Error::protocol(format!("blob {digest}"), "is an HTML page"));
            }
            if done == 0 {
                size = answer.content_length();
                let file = Arc::clone(&path);
                state.send_replace(State::Coming { file, size, ready: 0 });
            }
            let before = done;
            let mut pieces = answer.bytes_stream();
            let broken = loop {
                match pieces.next().await {
                    None => break None,
                    Some(Err(error)) => break Some(Error::unreachable("Get", &url, &error)),
                    Some(Ok(mut piece)) => {
                        let cut = skip.min(piece.len() as u64);
                        skip -= cut;
                        piece = piece.slice(cut as usize..);
                        if piece.is_empty() {
                            continue;
                        }
                        file.write_all(&piece).await.map_err(failed)?;
                        file.flush().await.map_err(failed)?;
                        hasher.update(&piece);
                        done += piece.len() as u64;
                        let file = Arc::clone(&path);
                        // The last byte waits for the digest.
                        state.send_replace(State::Coming { file, size, ready: done - 1 });
                    }
                }
            };
            let complete = size.is_none_or(|size| done >= size);
            match broken {
                None if complete => break,
                broken => {
                    let error = broken.unwrap_or_else(|| {
                        Error::protocol(format!("blob {digest}"), format!("ended after {done} bytes"))
                    });
                    failures = if done > before { 1 } else { failures + 1 };
                    if failures >= self.transport.config.attempts {
                        return Err(error);
                    }
                    tokio::time::sleep(session.pause(failures, None)).await;
                }
            }
        }
        let actual = hasher.finish();
        if actual != *digest {
            return Err(Error::protocol(
                format!("blob {digest} at {}", self.host),
                format!("has digest {actual}"),
            ));
        }
        let file = file.into_std().await;
        let (storage, name, digest) = (Arc::clone(&self.storage), name.to_owned(), digest.clone());
        // The path is gone after the commit; that it removes itself then is no matter.
        tokio::task::spawn_blocking(move || storage.commit(&name, &digest, &file, &path))
            .await
            .map_err(|error| failed(io::Error::other(error)))?
            .map_err(failed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether an error means that the thing is not there, or that upstream failed.
fn sort<T>(error: Error) -> Found<T> {
    match &error {
        Error::ManifestUnknown { .. }
        | Error::NameUnknown { .. }
        | Error::PullDenied { .. }
        | Error::Unauthorized { .. } => Found::No,
        Error::Status { status, .. } if matches!(status.as_u16(), 401 | 403 | 404) => Found::No,
        _ => Found::Failed(error),
    }
}

fn keep(storage: &Storage, name: &str, manifest: &StoredManifest, tags: &[String]) -> Result<(), Refusal> {
    if manifest.raw.len() > MANIFEST_LIMIT {
        return Ok(());
    }
    let described = Described::read(&manifest.raw, Some(&manifest.media_type))?;
    let _entering = storage.entering();
    let size = manifest.raw.len() as u64;
    let referrer = described.subject.is_some().then(|| described.as_referrer(&manifest.digest, size));
    let record = ManifestRecord { media_type: manifest.media_type.clone(), size, subject: described.subject };
    let (digest, raw) = (&manifest.digest, manifest.raw.as_slice());
    storage.put_manifest(name, &NewManifest { digest, raw, record, referrer, tags })?;
    Ok(())
}

/// What is there of a blob, and the rest as it comes.
fn follow(
    fetch: watch::Receiver<State>,
    file: File,
    start: u64,
    size: Option<u64>,
    digest: &Digest,
) -> Response<Body> {
    let status = if start > 0 { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let mut answer = empty(status);
    describe(&mut answer, digest);
    if let Some(size) = size {
        set_length(&mut answer, size - start);
        if start > 0 {
            let range = format!("bytes {start}-{}/{size}", size - 1);
            super::reply::set(&mut answer, http::header::CONTENT_RANGE, &range);
        }
    }
    let reader = Follower { file: tokio::fs::File::from_std(file), position: start, fetch };
    let frames = stream::try_unfold(reader, |mut reader| async move {
        let piece = reader.next().await?;
        Ok::<_, io::Error>(piece.map(|piece| (Frame::data(piece), reader)))
    });
    *answer.body_mut() = StreamBody::new(frames).boxed_unsync();
    answer
}

/// Reads a file behind the fetch that writes it.
struct Follower {
    file: tokio::fs::File,
    position: u64,
    fetch: watch::Receiver<State>,
}

impl Follower {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let position = self.position;
        let limit = {
            let state = self.fetch.wait_for(|state| match state {
                State::Asking => false,
                State::Coming { ready, .. } => *ready > position,
                State::Done | State::Failed(..) => true,
            });
            match state.await.as_deref() {
                Ok(State::Coming { ready, .. }) => Some(*ready),
                Ok(State::Done) => None,
                Ok(State::Failed(_, message)) => return Err(io::Error::other(message.clone())),
                Ok(State::Asking) | Err(_) => return Err(io::Error::other("the fetch was given up")),
            }
        };
        let most = limit.map_or(PIECE as u64, |limit| (limit - position).min(PIECE as u64));
        let mut piece = vec![0; most as usize];
        tokio::io::AsyncSeekExt::seek(&mut self.file, io::SeekFrom::Start(position)).await?;
        let n = self.file.read(&mut piece).await?;
        if n == 0 {
            return Ok(None);
        }
        piece.truncate(n);
        self.position += n as u64;
        Ok(Some(piece.into()))
    }
}
