//! A registry's repository as origin and as target of copies.

use std::io;
use std::sync::Arc;

use brigantine_image::model::{Descriptor, Index};
use brigantine_image::{Digest, Reference};
use futures_util::{StreamExt, stream};
use http::header::RANGE;
use http::{Method, StatusCode};

use super::{Boxed, Origin, Role, Target};
use crate::client::{Transport, find, manifest as fetch_manifest};
use crate::endpoint::{Purpose, endpoints};
use crate::session::{Action, Ask, Session, read};
use crate::upload::{self, Opener, Pieces};
use crate::{Credentials, Error, Report};

/// Bytes of a list of referrers.
const LIST_LIMIT: usize = 8 << 20;

pub(super) struct From {
    session: Arc<Session>,
    reference: Reference,
    found: (Descriptor, Vec<u8>),
}

impl From {
    pub async fn open(
        transport: &Arc<Transport>,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<Self, Error> {
        let reference = reference.clone().or_latest();
        let (session, descriptor, raw) = find(transport, &reference, credentials).await?;
        Ok(Self { session: Arc::new(session), reference, found: (descriptor, raw) })
    }
}

impl Origin for From {
    fn manifest<'a>(&'a self, which: Option<&'a Descriptor>) -> Boxed<'a, (Descriptor, Vec<u8>)> {
        Box::pin(async move {
            match which {
                None => Ok(self.found.clone()),
                Some(which) => {
                    let named = self.reference.with_digest(which.digest.clone());
                    fetch_manifest(&self.session, &named).await
                }
            }
        })
    }

    fn open(&self, blob: &Descriptor) -> Opener {
        let (session, blob) = (Arc::clone(&self.session), blob.clone());
        Opener::new(move |offset| {
            let (session, blob) = (Arc::clone(&session), blob.clone());
            async move { Ok(fetch(session, blob, offset)) }
        })
    }

    fn referrers<'a>(&'a self, subject: &'a Digest) -> Boxed<'a, Vec<Descriptor>> {
        Box::pin(async move {
            let url = self.session.repository_url(&format!("referrers/{subject}"))?;
            let answer = self.session.send(&Ask::new(Method::GET, url.clone())).await?;
            let what = format!("the referrers of {subject}");
            let raw = match answer.status() {
                StatusCode::OK => read(answer, LIST_LIMIT, &what).await?,
                // The tag of the referrers tag schema, where the registry lacks the endpoint.
                StatusCode::NOT_FOUND => {
                    let tag = subject.as_str().replace(':', "-");
                    let named = self.reference.with_tag(&tag);
                    let named = named.map_err(|error| Error::Invalid(error.to_string()))?;
                    match fetch_manifest(&self.session, &named).await {
                        Ok((_, raw)) => raw,
                        Err(Error::ManifestUnknown { .. }) => return Ok(Vec::new()),
                        Err(error) => return Err(error),
                    }
                }
                _ => return Err(self.session.failure("Get", &url, answer).await),
            };
            let index: Index =
                serde_json::from_slice(&raw).map_err(|error| Error::protocol(what, error.to_string()))?;
            Ok(index.manifests)
        })
    }

    fn repository(&self) -> Option<(&str, &str)> {
        Some((self.reference.domain(), self.reference.path()))
    }
}

struct Fetching {
    session: Arc<Session>,
    blob: Descriptor,
    offset: u64,
    failures: usize,
    body: Option<Pieces>,
}

/// A blob's content from `offset` on; what breaks off goes on where it stopped.
fn fetch(session: Arc<Session>, blob: Descriptor, offset: u64) -> Pieces {
    let fetching = Fetching { session, blob, offset, failures: 0, body: None };
    Box::pin(stream::try_unfold(fetching, |mut fetching| async move {
        loop {
            if fetching.offset >= fetching.blob.size {
                return Ok(None);
            }
            let piece = match &mut fetching.body {
                None => match ask(&fetching.session, &fetching.blob, fetching.offset).await {
                    Ok(body) => {
                        fetching.body = Some(body);
                        continue;
                    }
                    Err(error) => return Err(io::Error::other(error.report())),
                },
                Some(body) => body.next().await,
            };
            match piece {
                Some(Ok(piece)) => {
                    fetching.offset += piece.len() as u64;
                    fetching.failures = 0;
                    if fetching.offset > fetching.blob.size {
                        return Err(io::Error::other(format!(
                            "blob {} is longer than the {} bytes its manifest says",
                            fetching.blob.digest, fetching.blob.size
                        )));
                    }
                    return Ok(Some((piece, fetching)));
                }
                broken => {
                    fetching.failures += 1;
                    if fetching.failures >= fetching.session.attempts() {
                        return Err(match broken {
                            Some(Err(error)) => error,
                            _ => io::Error::other(format!(
                                "blob {} ended after {} of {} bytes",
                                fetching.blob.digest, fetching.offset, fetching.blob.size
                            )),
                        });
                    }
                    fetching.body = None;
                    tokio::time::sleep(fetching.session.pause(fetching.failures, None)).await;
                }
            }
        }
    }))
}

async fn ask(session: &Session, blob: &Descriptor, offset: u64) -> Result<Pieces, Error> {
    let digest = &blob.digest;
    let url = session.repository_url(&format!("blobs/{digest}"))?;
    let mut ask = Ask::new(Method::GET, url.clone());
    if offset > 0 {
        ask = ask.header(RANGE, &format!("bytes={offset}-"));
    }
    let answer = session.send(&ask).await?;
    let mut skip = match answer.status() {
        StatusCode::OK => offset,
        StatusCode::PARTIAL_CONTENT if offset > 0 => {
            let range = answer.headers().get(http::header::CONTENT_RANGE);
            let range = range.and_then(|range| range.to_str().ok()).unwrap_or_default();
            if !range.starts_with(&format!("bytes {offset}-")) {
                return Err(Error::protocol(
                    format!("blob {digest} at {}", session.registry()),
                    format!("answers a request from byte {offset} with {range:?}"),
                ));
            }
            0
        }
        _ => return Err(session.failure("Get", &url, answer).await),
    };
    let pieces = answer.bytes_stream().filter_map(move |piece| {
        let piece = match piece {
            Ok(piece) => {
                let cut = skip.min(piece.len() as u64);
                skip -= cut;
                Ok(piece.slice(cut as usize..))
            }
            Err(error) => Err(io::Error::other(Error::unreachable("Get", &url, &error).to_string())),
        };
        std::future::ready(Some(piece).filter(|piece| piece.as_ref().map_or(true, |piece| !piece.is_empty())))
    });
    Ok(Box::pin(pieces))
}

pub(super) struct To {
    session: Session,
    reference: Reference,
    at_once: usize,
    /// A repository of the same registry that has the blobs.
    sister: Option<String>,
}

impl To {
    pub async fn open(
        transport: &Arc<Transport>,
        reference: &Reference,
        credentials: Option<Credentials>,
        origin: Option<(String, String)>,
    ) -> Result<Self, Error> {
        let named =
            if reference.digest().is_some() { reference.clone() } else { reference.clone().or_latest() };
        let endpoint = endpoints(&transport.config, &named, Purpose::Push)?.into_iter().next();
        let endpoint =
            endpoint.ok_or_else(|| Error::Invalid(format!("no registry takes {}", named.familiar())))?;
        let session = Session::open(transport, &endpoint, named.path(), Action::Push, credentials).await?;
        let sister = origin
            .filter(|(domain, path)| domain == named.domain() && path != named.path())
            .map(|(_, path)| path);
        Ok(Self { session, reference: named, at_once: transport.config.max_uploads, sister })
    }

    fn named(&self, error: Error) -> Error {
        match error {
            Error::Status { status, detail, .. } if status == StatusCode::FORBIDDEN => {
                Error::PushDenied { repository: self.reference.familiar_name(), detail }
            }
            other => other,
        }
    }
}

impl Target for To {
    fn blob<'a>(&'a self, blob: &'a Descriptor, opener: &'a Opener, report: &'a Report) -> Boxed<'a, ()> {
        Box::pin(async move {
            upload::blob(&self.session, blob, self.sister.as_deref(), opener, Some(report))
                .await
                .map(drop)
                .map_err(|error| self.named(error))
        })
    }

    fn manifest<'a>(&'a self, manifest: &'a Descriptor, raw: &'a [u8], role: Role) -> Boxed<'a, ()> {
        Box::pin(async move {
            let name = match (role, self.reference.tag()) {
                (Role::Root, Some(tag)) if self.reference.digest().is_none() => tag.to_owned(),
                _ => manifest.digest.to_string(),
            };
            if role == Role::Root
                && let Some(wanted) = self.reference.digest()
                && *wanted != manifest.digest
            {
                return Err(Error::Invalid(format!(
                    "{} is to be written, but the image's digest is {}",
                    self.reference.familiar(),
                    manifest.digest
                )));
            }
            upload::manifest(&self.session, &name, &manifest.media_type, &manifest.digest, raw.to_vec())
                .await
                .map_err(|error| self.named(error))
        })
    }

    fn finish(self: Box<Self>) -> Boxed<'static, ()> {
        Box::pin(async { Ok(()) })
    }

    fn at_once(&self) -> usize {
        self.at_once
    }
}
