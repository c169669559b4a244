//! Getting one blob or manifest into a repository.
//!
//! Invariants: a blob that is there already, or that a sister repository has, is not sent; an upload that broke off goes
//! on where the registry says it stopped; a manifest counts as sent only if the registry names the same digest for it.

use std::future::Future;
use std::io::{self, SeekFrom};
use std::pin::Pin;
use std::sync::Arc;

use brigantine_image::model::Descriptor;
use brigantine_image::{Algorithm, Digest, Store};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use http::{Method, StatusCode};
use url::Url;

use crate::blob::blocking;
use crate::session::{Ask, Session};
use crate::{Error, Progress, Report};

/// Bytes of a file that are read at once.
const PIECE: usize = 256 << 10;
/// Bytes between two reports.
const REPORT_STEP: u64 = 512 << 10;

/// Content, piece by piece.
pub(crate) type Pieces = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;
type Opening = Pin<Box<dyn Future<Output = Result<Pieces, Error>> + Send>>;

/// Opens content at any byte, again and again.
#[derive(Clone)]
pub(crate) struct Opener(Arc<dyn Fn(u64) -> Opening + Send + Sync>);

impl Opener {
    pub fn new<F>(open: impl Fn(u64) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Pieces, Error>> + Send + 'static,
    {
        Self(Arc::new(move |offset| Box::pin(open(offset))))
    }

    pub fn of_store(store: &Store, descriptor: &Descriptor) -> Self {
        let (store, digest) = (store.clone(), descriptor.digest.clone());
        Self::new(move |offset| {
            let (store, digest) = (store.clone(), digest.clone());
            async move {
                let file = blocking({
                    let digest = digest.clone();
                    move || {
                        let mut file = store.content().open(&digest)?;
                        io::Seek::seek(&mut file, SeekFrom::Start(offset))
                            .map_err(brigantine_image::Error::Output)?;
                        Ok(file)
                    }
                })
                .await?
                .map_err(Error::store(format!("read blob {digest}")))?;
                Ok(pieces(tokio::fs::File::from_std(file)))
            }
        })
    }

    pub async fn open(&self, offset: u64) -> Result<Pieces, Error> {
        (self.0)(offset).await
    }
}

/// A reader as pieces.
pub(crate) fn pieces(reader: impl tokio::io::AsyncRead + Send + 'static) -> Pieces {
    Box::pin(tokio_util::io::ReaderStream::with_capacity(reader, PIECE))
}

/// How a blob came into the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Placed {
    WasThere,
    Mounted,
    Sent,
}

enum Begun {
    Mounted(String),
    Upload(Url),
}

/// Makes sure that the session's repository has a blob: it is there, is mounted from `sister`, or is sent.
pub(crate) async fn blob(
    session: &Session,
    descriptor: &Descriptor,
    sister: Option<&str>,
    opener: &Opener,
    report: Option<&Report>,
) -> Result<Placed, Error> {
    let id: String = descriptor.digest.hex().chars().take(12).collect();
    let say = |progress: Progress| {
        if let Some(report) = report {
            report(progress);
        }
    };
    let head = Ask::new(Method::HEAD, session.repository_url(&format!("blobs/{}", descriptor.digest))?);
    if session.send(&head).await?.status().is_success() {
        say(Progress::step(&id, "Layer already exists"));
        return Ok(Placed::WasThere);
    }
    let mut failures = 0;
    let mut begun = None;
    loop {
        let (location, offset) = match begun.take() {
            Some(begun) => begun,
            None => match begin(session, descriptor, sister).await? {
                Begun::Mounted(from) => {
                    say(Progress::step(&id, &format!("Mounted from {from}")));
                    return Ok(Placed::Mounted);
                }
                Begun::Upload(location) => (location, 0),
            },
        };
        let error = match send(session, descriptor, location.clone(), offset, opener, report).await {
            Ok(()) => break,
            Err(error) => error,
        };
        failures += 1;
        if !error.is_transient() || failures >= session.attempts() {
            return Err(error);
        }
        tracing::debug!(blob = %descriptor.digest, error = %error, "an upload broke off");
        say(Progress::step(&id, "Retrying"));
        tokio::time::sleep(session.pause(failures, None)).await;
        let there = reached(session, &location).await;
        if there.as_ref().is_some_and(|(_, reached)| *reached > offset) {
            failures = 1;
        }
        begun = there;
    }
    say(Progress::step(&id, "Pushed"));
    Ok(Placed::Sent)
}

/// Starts an upload, offering a sister repository to mount from.
async fn begin(session: &Session, descriptor: &Descriptor, sister: Option<&str>) -> Result<Begun, Error> {
    let mut url = session.repository_url("blobs/uploads/")?;
    if let Some(from) = sister {
        url.query_pairs_mut().append_pair("mount", descriptor.digest.as_str()).append_pair("from", from);
    } else if descriptor.digest.algorithm() != brigantine_image::Algorithm::Sha256 {
        url.query_pairs_mut().append_pair("digest-algorithm", descriptor.digest.algorithm().as_str());
    }
    let answer = session.send(&Ask::new(Method::POST, url.clone())).await?;
    match answer.status() {
        StatusCode::CREATED => Ok(Begun::Mounted(sister.unwrap_or_default().to_owned())),
        StatusCode::ACCEPTED => {
            let location = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let location = location.and_then(|location| url.join(location).ok());
            location.map(Begun::Upload).ok_or_else(|| {
                Error::protocol(session.registry(), "accepts an upload without saying where to")
            })
        }
        _ => Err(session.failure("Post", &url, answer).await),
    }
}

/// How far an upload came, and where it goes on; `None` where it has to begin anew.
async fn reached(session: &Session, location: &Url) -> Option<(Url, u64)> {
    let answer = session.send(&Ask::new(Method::GET, location.clone())).await.ok()?;
    if answer.status() != StatusCode::NO_CONTENT {
        return None;
    }
    let header = |name| answer.headers().get(name).and_then(|value| value.to_str().ok());
    let last: u64 = header(RANGE)?.rsplit('-').next()?.trim().parse().ok()?;
    let next = header(LOCATION).and_then(|next| location.join(next).ok()).unwrap_or_else(|| location.clone());
    // `0-0` is what some say for nothing and others for one byte: such an upload is begun anew.
    (last > 0).then_some((next, last + 1))
}

fn check_scheme(session: &Session, location: &Url) -> Result<(), Error> {
    let secure = session.is_secure();
    if location.scheme() != "https" && (location.scheme() != "http" || secure) {
        return Err(Error::protocol(
            session.registry(),
            format!("wants an upload sent by {}, which is not allowed from here", location.scheme()),
        ));
    }
    Ok(())
}

/// Sends a blob from `offset` on, and closes the upload.
async fn send(
    session: &Session,
    descriptor: &Descriptor,
    location: Url,
    offset: u64,
    opener: &Opener,
    report: Option<&Report>,
) -> Result<(), Error> {
    check_scheme(session, &location)?;
    let (id, size) = (descriptor.digest.hex().chars().take(12).collect::<String>(), descriptor.size);
    let report = report.cloned();
    let (mut sent, mut reported) = (offset, offset);
    let chunks = opener.open(offset).await?.map(move |chunk| {
        if let (Ok(chunk), Some(report)) = (&chunk, &report) {
            sent += chunk.len() as u64;
            if sent >= reported + REPORT_STEP || sent == size {
                reported = sent;
                report(Progress::amount(&id, "Pushing", sent, Some(size)));
            }
        }
        chunk
    });
    let body = reqwest::Body::wrap_stream(chunks);
    let mut headers = Vec::new();
    if offset > 0 {
        headers.push((CONTENT_RANGE, format!("{offset}-{}", size.saturating_sub(1))));
    }
    let length = size.saturating_sub(offset);
    let answer = session.send_stream(Method::PATCH, &location, length, headers, body).await?;
    if answer.status() != StatusCode::ACCEPTED {
        return Err(session.failure("Patch", &location, answer).await);
    }
    let next = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let mut close = next.and_then(|next| location.join(next).ok()).unwrap_or(location);
    check_scheme(session, &close)?;
    close.query_pairs_mut().append_pair("digest", descriptor.digest.as_str());
    let ask = Ask::new(Method::PUT, close.clone()).header(CONTENT_TYPE, "application/octet-stream");
    let answer = session.send(&ask.header(CONTENT_LENGTH, "0")).await?;
    if answer.status().is_success() { Ok(()) } else { Err(session.failure("Put", &close, answer).await) }
}

/// Puts a manifest under a tag or its digest. Registries find what is put under a tag by sha256: a manifest that is known
/// by another digest is put under that one too.
pub(crate) async fn manifest(
    session: &Session,
    name: &str,
    media_type: &str,
    digest: &Digest,
    raw: Vec<u8>,
) -> Result<(), Error> {
    if digest.algorithm() != Algorithm::Sha256 && name != digest.as_str() {
        put(session, digest.as_str(), media_type, raw.clone()).await?;
    }
    put(session, name, media_type, raw).await
}

async fn put(session: &Session, name: &str, media_type: &str, raw: Vec<u8>) -> Result<(), Error> {
    let url = session.repository_url(&format!("manifests/{name}"))?;
    let raw = Bytes::from(raw);
    let mut ask = Ask::new(Method::PUT, url.clone()).header(CONTENT_TYPE, media_type);
    ask.body = raw.clone();
    let answer = session.send(&ask).await?;
    if !answer.status().is_success() {
        return Err(session.failure("Put", &url, answer).await);
    }
    let claimed = answer.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
    if let Some(claimed) = claimed
        && !claimed.parse::<Digest>().is_ok_and(|claimed| Digest::of(claimed.algorithm(), &raw) == claimed)
    {
        return Err(Error::protocol(
            format!("manifest {name} at {}", session.registry()),
            format!("was stored as {claimed}, which is not its digest"),
        ));
    }
    Ok(())
}
