//! Push: from an image in the store to a repository in a registry.
//!
//! Invariant: the manifest is put last, when everything it names is there, and byte for byte as it is stored.

use std::collections::HashSet;

use brigantine_image::model::{Descriptor, Document};
use brigantine_image::{Digest, Image, Reference, Store, media};
use futures_util::{StreamExt, TryStreamExt, stream};
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use http::{Method, StatusCode};
use url::Url;

use crate::blob::blocking;
use crate::client::{MANIFEST_LIMIT, Transport, parse};
use crate::endpoint::{Purpose, endpoints};
use crate::session::{Action, Ask, Session};
use crate::{Client, Credentials, Error, Progress, Report};

/// A finished push.
#[derive(Debug, Clone)]
pub struct Pushed {
    pub digest: Digest,
    pub size: u64,
}

impl Client {
    /// Pushes the image to `reference`'s repository under its tag.
    pub async fn push(
        &self,
        store: &Store,
        image: &Image,
        reference: &Reference,
        credentials: Option<Credentials>,
        report: Report,
    ) -> Result<Pushed, Error> {
        let reference = reference.clone().or_latest();
        let transport = self.transport();
        let endpoint = endpoints(&transport.config, &reference, Purpose::Push)?
            .into_iter()
            .next()
            .ok_or_else(|| Error::Invalid(format!("no registry takes {}", reference.familiar())))?;
        let named = |error| name_failure(&reference, error);
        report(Progress::message(format!("The push refers to repository [{}]", reference.repository())));
        let session = Session::open(&transport, &endpoint, reference.path(), Action::Push, credentials)
            .await
            .map_err(named)?;
        let push = Push {
            transport: &transport,
            session: &session,
            store,
            image,
            reference: &reference,
            report: &report,
        };
        push.run().await.map_err(named)
    }
}

fn name_failure(reference: &Reference, error: Error) -> Error {
    match error {
        Error::Status { status, detail, .. } if status == StatusCode::FORBIDDEN => {
            Error::PushDenied { repository: reference.familiar_name(), detail }
        }
        other => other,
    }
}

struct Push<'p> {
    transport: &'p Transport,
    session: &'p Session,
    store: &'p Store,
    image: &'p Image,
    reference: &'p Reference,
    report: &'p Report,
}

impl Push<'_> {
    async fn run(&self) -> Result<Pushed, Error> {
        let stored = format!("image {}", self.image.id);
        let raw = blocking({
            let (store, digest) = (self.store.clone(), self.image.manifest.digest.clone());
            move || store.content().read(&digest)
        })
        .await?
        .map_err(Error::store(format!("read the manifest of {stored}")))?;
        if raw.len() > MANIFEST_LIMIT {
            return Err(Error::Invalid(format!("the manifest of {stored} is larger than registries take")));
        }
        let Document::Manifest(manifest) = parse(self.reference, &raw)? else {
            return Err(Error::Invalid(format!("{stored} has an index for a manifest")));
        };
        let mut seen = HashSet::new();
        let layers: Vec<Descriptor> = manifest
            .layers
            .iter()
            .filter(|layer| !media::is_foreign(&layer.media_type) && seen.insert(&layer.digest))
            .cloned()
            .collect();
        for layer in &layers {
            (self.report)(Progress::step(&short(layer), "Preparing"));
        }
        let at_once = self.transport.config.max_uploads.max(1);
        for layer in layers.iter().skip(at_once) {
            (self.report)(Progress::step(&short(layer), "Waiting"));
        }
        stream::iter(layers)
            .map(|layer| async move { self.blob(&layer, true).await })
            .buffer_unordered(at_once)
            .try_collect::<()>()
            .await?;
        self.blob(&manifest.config, false).await?;

        let digest = self.image.manifest.digest.clone();
        let name = self.reference.tag().map_or_else(|| digest.to_string(), str::to_owned);
        let url = self.session.repository_url(&format!("manifests/{name}"))?;
        let media_type = manifest
            .media_type
            .clone()
            .filter(|declared| !declared.is_empty())
            .unwrap_or_else(|| self.image.manifest.media_type.clone());
        let size = raw.len() as u64;
        let mut ask = Ask::new(Method::PUT, url.clone()).header(CONTENT_TYPE, &media_type);
        ask.body = raw.into();
        let answer = self.session.send(&ask).await?;
        if !answer.status().is_success() {
            return Err(self.session.failure("Put", &url, answer).await);
        }
        let claimed = answer.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        if claimed.is_some_and(|claimed| claimed != digest.as_str()) {
            return Err(Error::protocol(
                format!("{} at {}", self.reference.familiar(), self.session.registry()),
                format!("was stored with another digest than {digest}"),
            ));
        }
        blocking({
            let (store, id, named) =
                (self.store.clone(), self.image.id.clone(), self.reference.with_digest(digest.clone()));
            move || store.add_digest_name(&id, &named)
        })
        .await?
        .map_err(Error::store(format!("note the digest of {stored}")))?;
        (self.report)(Progress::message(format!("{name}: digest: {digest} size: {size}")));
        Ok(Pushed { digest, size })
    }

    /// Makes sure that the repository has a blob: it is there, is mounted from a sister repository, or is uploaded.
    async fn blob(&self, descriptor: &Descriptor, shown: bool) -> Result<(), Error> {
        let id = short(descriptor);
        let say = |progress: Progress| {
            if shown {
                (self.report)(progress);
            }
        };
        let head =
            Ask::new(Method::HEAD, self.session.repository_url(&format!("blobs/{}", descriptor.digest))?);
        if self.session.send(&head).await?.status().is_success() {
            say(Progress::step(&id, "Layer already exists"));
            return Ok(());
        }
        let mut failures = 0;
        let mut begun = None;
        loop {
            let (location, offset) = match begun.take() {
                Some(begun) => begun,
                None => match self.begin(descriptor).await? {
                    Begun::Mounted(from) => {
                        say(Progress::step(&id, &format!("Mounted from {from}")));
                        return Ok(());
                    }
                    Begun::Upload(location) => (location, 0),
                },
            };
            let error = match self.upload(descriptor, location.clone(), offset, shown).await {
                Ok(()) => break,
                Err(error) => error,
            };
            failures += 1;
            if !error.is_transient() || failures >= self.transport.config.attempts {
                return Err(error);
            }
            tracing::debug!(blob = %descriptor.digest, error = %error, "an upload broke off");
            say(Progress::step(&id, "Retrying"));
            tokio::time::sleep(self.session.pause(failures, None)).await;
            let there = self.reached(&location).await;
            if there.as_ref().is_some_and(|(_, reached)| *reached > offset) {
                failures = 1;
            }
            begun = there;
        }
        say(Progress::step(&id, "Pushed"));
        Ok(())
    }

    /// How far an upload came, and where it goes on; `None` where it has to begin anew.
    async fn reached(&self, location: &Url) -> Option<(Url, u64)> {
        let answer = self.session.send(&Ask::new(Method::GET, location.clone())).await.ok()?;
        if answer.status() != StatusCode::NO_CONTENT {
            return None;
        }
        let header = |name| answer.headers().get(name).and_then(|value| value.to_str().ok());
        let last: u64 = header(RANGE)?.rsplit('-').next()?.trim().parse().ok()?;
        let next =
            header(LOCATION).and_then(|next| location.join(next).ok()).unwrap_or_else(|| location.clone());
        // `0-0` is what some say for nothing and others for one byte: the first is always right to begin with.
        Some((next, if last == 0 { 0 } else { last + 1 }))
    }

    /// Starts an upload, offering a sister repository to mount from.
    async fn begin(&self, descriptor: &Descriptor) -> Result<Begun, Error> {
        let mut url = self.session.repository_url("blobs/uploads/")?;
        let names = self.image.digests.iter().chain(&self.image.tags);
        let sister = names
            .into_iter()
            .find(|name| name.domain() == self.reference.domain() && name.path() != self.reference.path())
            .map(|name| name.path().to_owned());
        if let Some(from) = &sister {
            url.query_pairs_mut().append_pair("mount", descriptor.digest.as_str()).append_pair("from", from);
        }
        let answer = self.session.send(&Ask::new(Method::POST, url.clone())).await?;
        match answer.status() {
            StatusCode::CREATED => Ok(Begun::Mounted(sister.unwrap_or_default())),
            StatusCode::ACCEPTED => {
                let location = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
                let location = location.and_then(|location| url.join(location).ok());
                location.map(Begun::Upload).ok_or_else(|| {
                    Error::protocol(self.session.registry(), "accepts an upload without saying where to")
                })
            }
            _ => Err(self.session.failure("Post", &url, answer).await),
        }
    }

    /// Sends a blob from `offset` on, and closes the upload.
    async fn upload(
        &self,
        descriptor: &Descriptor,
        location: Url,
        offset: u64,
        shown: bool,
    ) -> Result<(), Error> {
        let elsewhere = |location: &Url| {
            let wrong = !matches!(location.scheme(), "http" | "https");
            wrong.then(|| {
                Error::protocol(self.session.registry(), "wants an upload somewhere other than http or https")
            })
        };
        if let Some(error) = elsewhere(&location) {
            return Err(error);
        }
        let file = blocking({
            let (store, digest) = (self.store.clone(), descriptor.digest.clone());
            move || {
                let mut file = store.content().open(&digest)?;
                std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(offset))
                    .map_err(brigantine_image::Error::Output)?;
                Ok(file)
            }
        })
        .await?
        .map_err(Error::store(format!("read blob {}", descriptor.digest)))?;
        let (id, size, report) = (short(descriptor), descriptor.size, self.report.clone());
        let (mut sent, mut reported) = (offset, offset);
        let chunks = tokio_util::io::ReaderStream::with_capacity(tokio::fs::File::from_std(file), 256 << 10)
            .map(move |chunk| {
                if let Ok(chunk) = &chunk {
                    sent += chunk.len() as u64;
                    if shown && (sent >= reported + (512 << 10) || sent == size) {
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
        let answer = self.session.send_stream(Method::PATCH, &location, length, headers, body).await?;
        if answer.status() != StatusCode::ACCEPTED {
            return Err(self.session.failure("Patch", &location, answer).await);
        }
        let next = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let mut close = next.and_then(|next| location.join(next).ok()).unwrap_or(location);
        if let Some(error) = elsewhere(&close) {
            return Err(error);
        }
        close.query_pairs_mut().append_pair("digest", descriptor.digest.as_str());
        let ask = Ask::new(Method::PUT, close.clone()).header(CONTENT_TYPE, "application/octet-stream");
        let answer = self.session.send(&ask.header(CONTENT_LENGTH, "0")).await?;
        if answer.status().is_success() {
            Ok(())
        } else {
            Err(self.session.failure("Put", &close, answer).await)
        }
    }
}

enum Begun {
    Mounted(String),
    Upload(Url),
}

fn short(descriptor: &Descriptor) -> String {
    descriptor.digest.hex().chars().take(12).collect()
}
