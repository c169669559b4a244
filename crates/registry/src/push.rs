//! Push: from an image in the store to a repository in a registry.
//!
//! Invariant: the manifest is put last, when everything it names is there, and byte for byte as it is stored. Layers
//! that are stored plain are compressed first; the image then has the manifest that was pushed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use brigantine_image::model::{Descriptor, Document};
use brigantine_image::{Digest, Encoding, Image, Lease, Reference, Store, media};
use futures_util::{StreamExt, TryStreamExt, stream};
use http::StatusCode;

use crate::blob::blocking;
use crate::client::{MANIFEST_LIMIT, Transport, parse};
use crate::endpoint::{Purpose, endpoints};
use crate::session::{Action, Session};
use crate::upload::{self, Opener};
use crate::{Client, Credentials, Error, Progress, Report};

/// How to push.
#[derive(Debug, Clone)]
pub struct PushOptions {
    pub credentials: Option<Credentials>,
    /// For layers that are stored plain. What is compressed already goes as it is.
    pub encoding: Encoding,
}

impl Default for PushOptions {
    fn default() -> Self {
        Self { credentials: None, encoding: Encoding::GZIP }
    }
}

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
        options: PushOptions,
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
        let session =
            Session::open(&transport, &endpoint, reference.path(), Action::Push, options.credentials)
                .await
                .map_err(named)?;
        let lease = store.lease().map_err(Error::store("prepare the image store"))?;
        let push = Push {
            transport: &transport,
            session: &session,
            store,
            lease,
            image,
            reference: &reference,
            encoding: options.encoding,
            report: &report,
        };
        let pushed = match &image.index {
            Some(index) => push.index(index).await,
            None => push.run().await,
        };
        pushed.map_err(named)
    }
}

/// Puts a push's failure into docker's words.
pub(crate) fn name_failure(reference: &Reference, error: Error) -> Error {
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
    /// Of what is made here: compressed layers.
    lease: Lease,
    image: &'p Image,
    reference: &'p Reference,
    encoding: Encoding,
    report: &'p Report,
}

impl Push<'_> {
    async fn run(&self) -> Result<Pushed, Error> {
        let stored = format!("image {}", self.image.id);
        // What is read here stays, should another push of the same image put something in its place.
        let (held, raw) = blocking({
            let (store, image) = (self.store.clone(), self.image.clone());
            move || {
                let held = store.lease()?;
                for blob in image.layers.iter().chain([&image.manifest]) {
                    held.hold(&blob.digest)?;
                }
                let raw = store.content().read(&image.manifest.digest)?;
                Ok((held, raw))
            }
        })
        .await?
        .map_err(Error::store(format!("read the manifest of {stored}")))?;
        let Document::Manifest(manifest) = parse(self.reference, &raw)? else {
            return Err(Error::Invalid(format!("{stored} has an index for a manifest")));
        };
        let layers = self.layers(&manifest.layers).await?;
        let repacked = blocking({
            let (store, image) = (self.store.clone(), self.image.clone());
            move || store.repacked(&image, &layers)
        })
        .await?
        .map_err(Error::store(format!("make the manifest of {stored}")))?;
        let (descriptor, raw) = match &repacked {
            Some(repacked) => (&repacked.manifest, repacked.raw.clone()),
            None => (&self.image.manifest, raw),
        };
        if raw.len() > MANIFEST_LIMIT {
            return Err(Error::Invalid(format!("the manifest of {stored} is larger than registries take")));
        }
        self.blob(&manifest.config, None).await?;

        let digest = descriptor.digest.clone();
        let name = self.reference.tag().map_or_else(|| digest.to_string(), str::to_owned);
        let media_type = manifest
            .media_type
            .clone()
            .filter(|declared| !declared.is_empty())
            .unwrap_or_else(|| descriptor.media_type.clone());
        let size = raw.len() as u64;
        upload::manifest(self.session, &name, &media_type, &digest, raw).await?;
        blocking({
            let (store, lease, image) = (self.store.clone(), self.lease.clone(), self.image.clone());
            let named = self.reference.with_digest(digest.clone());
            move || {
                // Nothing is read any more, and what was read may go.
                drop(held);
                if let Some(repacked) = &repacked {
                    store.adopt_repacked(&lease, &image, repacked)?;
                }
                store.add_digest_name(&image.id, &named)
            }
        })
        .await?
        .map_err(Error::store(format!("note the digest of {stored}")))?;
        (self.report)(Progress::message(format!("{name}: digest: {digest} size: {size}")));
        Ok(Pushed { digest, size })
    }

    /// Pushes an index with everything it leads to; what it names is as it will be.
    async fn index(&self, index: &Descriptor) -> Result<Pushed, Error> {
        let stored = format!("index {}", index.digest);
        let (held, raw, manifests) = blocking({
            let (store, index) = (self.store.clone(), index.clone());
            move || {
                let held = store.lease()?;
                held.hold(&index.digest)?;
                let manifests = store.indexed(&index)?;
                for one in &manifests {
                    let content = one.manifest.layers.iter().chain([&one.descriptor, &one.manifest.config]);
                    content.into_iter().try_for_each(|content| held.hold(&content.digest))?;
                }
                Ok((held, store.content().read(&index.digest)?, manifests))
            }
        })
        .await?
        .map_err(Error::store(format!("read the {stored}")))?;
        for one in manifests {
            let at_once = self.transport.config.max_uploads.max(1);
            let mut seen = HashSet::new();
            let layers: Vec<Descriptor> = one
                .manifest
                .layers
                .iter()
                .filter(|layer| !media::is_foreign(&layer.media_type) && seen.insert(layer.digest.clone()))
                .cloned()
                .collect();
            stream::iter(layers)
                .map(|layer| async move { self.blob(&layer, Some(short(&layer))).await })
                .buffer_unordered(at_once)
                .try_collect::<()>()
                .await?;
            self.blob(&one.manifest.config, None).await?;
            let digest = &one.descriptor.digest;
            upload::manifest(self.session, digest.as_str(), &one.descriptor.media_type, digest, one.raw)
                .await?;
        }
        let (digest, size) = (index.digest.clone(), raw.len() as u64);
        let name = self.reference.tag().map_or_else(|| digest.to_string(), str::to_owned);
        upload::manifest(self.session, &name, &index.media_type, &digest, raw).await?;
        blocking({
            let (store, image) = (self.store.clone(), self.image.clone());
            let named = self.reference.with_digest(digest.clone());
            move || {
                drop(held);
                store.add_digest_name(&image.id, &named)
            }
        })
        .await?
        .map_err(Error::store(format!("note the digest of the {stored}")))?;
        (self.report)(Progress::message(format!("{name}: digest: {digest} size: {size}")));
        Ok(Pushed { digest, size })
    }

    /// Brings all layers into the repository, several at a time; tells what they are there.
    async fn layers(&self, layers: &[Descriptor]) -> Result<Vec<Descriptor>, Error> {
        let mut seen = HashSet::new();
        let own: Vec<Descriptor> = layers
            .iter()
            .filter(|layer| !media::is_foreign(&layer.media_type) && seen.insert(&layer.digest))
            .cloned()
            .collect();
        for layer in &own {
            (self.report)(Progress::step(&short(layer), "Preparing"));
        }
        let at_once = self.transport.config.max_uploads.max(1);
        for layer in own.iter().skip(at_once) {
            (self.report)(Progress::step(&short(layer), "Waiting"));
        }
        let sent: HashMap<Digest, Descriptor> = stream::iter(own)
            .map(|layer| async move {
                let packed = self.compressed(&layer).await?;
                self.blob(&packed, Some(short(&layer))).await?;
                Ok::<_, Error>((layer.digest, packed))
            })
            .buffer_unordered(at_once)
            .try_collect()
            .await?;
        Ok(layers.iter().map(|layer| sent.get(&layer.digest).unwrap_or(layer).clone()).collect())
    }

    /// A layer as it is sent.
    async fn compressed(&self, layer: &Descriptor) -> Result<Descriptor, Error> {
        let (store, lease, encoding) = (self.store.clone(), self.lease.clone(), self.encoding);
        let (layer, report) = (layer.clone(), self.report.clone());
        let what = format!("compress layer {}", layer.digest);
        blocking(move || {
            let id = short(&layer);
            store.compress_layer(&lease, &layer, encoding, &mut |read| {
                report(Progress::amount(&id, "Compressing", read, Some(layer.size)));
            })
        })
        .await?
        .map_err(Error::store(what))
    }

    /// Makes sure that the repository has a blob. It is spoken of as `shown`, if at all.
    async fn blob(&self, descriptor: &Descriptor, shown: Option<String>) -> Result<(), Error> {
        let names = self.image.digests.iter().chain(&self.image.tags);
        let sister = names
            .into_iter()
            .find(|name| name.domain() == self.reference.domain() && name.path() != self.reference.path())
            .map(Reference::path);
        let opener = Opener::of_store(self.store, descriptor);
        let report = shown.map(|shown| -> Report {
            let report = self.report.clone();
            Arc::new(move |progress| report(Progress { id: Some(shown.clone()), ..progress }))
        });
        upload::blob(self.session, descriptor, sister, &opener, report.as_ref()).await.map(drop)
    }
}

fn short(descriptor: &Descriptor) -> String {
    descriptor.digest.hex().chars().take(12).collect()
}
