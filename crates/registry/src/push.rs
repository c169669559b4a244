//! Push: from an image in the store to a repository in a registry.
//!
//! Invariant: the manifest is put last, when everything it names is there, and byte for byte as it is stored.

use std::collections::HashSet;

use brigantine_image::model::{Descriptor, Document};
use brigantine_image::{Digest, Image, Reference, Store, media};
use futures_util::{StreamExt, TryStreamExt, stream};
use http::StatusCode;

use crate::blob::blocking;
use crate::client::{MANIFEST_LIMIT, Transport, parse};
use crate::endpoint::{Purpose, endpoints};
use crate::session::{Action, Session};
use crate::upload::{self, Opener};
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
        let media_type = manifest
            .media_type
            .clone()
            .filter(|declared| !declared.is_empty())
            .unwrap_or_else(|| self.image.manifest.media_type.clone());
        let size = raw.len() as u64;
        upload::manifest(self.session, &name, &media_type, &digest, raw).await?;
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

    /// Makes sure that the repository has a blob.
    async fn blob(&self, descriptor: &Descriptor, shown: bool) -> Result<(), Error> {
        let names = self.image.digests.iter().chain(&self.image.tags);
        let sister = names
            .into_iter()
            .find(|name| name.domain() == self.reference.domain() && name.path() != self.reference.path())
            .map(Reference::path);
        let opener = Opener::of_store(self.store, descriptor);
        let report = shown.then_some(self.report);
        upload::blob(self.session, descriptor, sister, &opener, report).await.map(drop)
    }
}

fn short(descriptor: &Descriptor) -> String {
    descriptor.digest.hex().chars().take(12).collect()
}
