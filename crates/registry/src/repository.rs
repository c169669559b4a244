//! A repository as a place for anything: manifests, and whatever they name. Build caches and cache mounts are kept so.
//!
//! Invariant: what is read is verified against its digest before anybody has it, as with images.

use std::sync::Arc;

use brigantine_image::model::Descriptor;
use brigantine_image::{Digest, Lease, Reference, Store};
use bytes::Bytes;

use crate::blob::{self, Layer};
use crate::client::{MANIFEST_LIMIT, Transport, child, find, small_blob};
use crate::endpoint::{Purpose, endpoints};
use crate::push::name_failure;
use crate::session::{Action, Session};
use crate::upload::{self, Opener, Pieces};
use crate::{Client, Credentials, Error, Report};

/// An open repository.
pub struct Repository {
    client: Client,
    transport: Arc<Transport>,
    session: Session,
    reference: Reference,
}

impl Client {
    /// Opens the repository of a reference (its tag, or `latest`) and gets the manifest that the reference names.
    pub async fn read_from(
        &self,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<(Repository, Descriptor, Vec<u8>), Error> {
        let reference = reference.clone().or_latest();
        let transport = self.transport();
        let (session, descriptor, raw) = find(&transport, &reference, credentials).await?;
        Ok((Repository { client: self.clone(), transport, session, reference }, descriptor, raw))
    }

    /// Opens the repository of a reference to put something there.
    pub async fn write_to(
        &self,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<Repository, Error> {
        let reference = reference.clone().or_latest();
        let transport = self.transport();
        let endpoint = endpoints(&transport.config, &reference, Purpose::Push)?.into_iter().next();
        let endpoint =
            endpoint.ok_or_else(|| Error::Invalid(format!("no registry takes {}", reference.familiar())))?;
        let session = Session::open(&transport, &endpoint, reference.path(), Action::Push, credentials)
            .await
            .map_err(|error| name_failure(&reference, error))?;
        Ok(Repository { client: self.clone(), transport, session, reference })
    }
}

impl Repository {
    /// A manifest that another names.
    pub async fn manifest(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        child(&self.session, &self.reference, descriptor).await
    }

    /// The manifest that the reference names now, if there is one.
    pub async fn current(&self) -> Result<Option<Vec<u8>>, Error> {
        match crate::client::manifest(&self.session, &self.reference).await {
            Ok((_, raw)) => Ok(Some(raw)),
            Err(Error::ManifestUnknown { .. } | Error::NameUnknown { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A blob that is small enough for memory.
    pub async fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        small_blob(&self.session, descriptor).await
    }

    /// Brings a layer into the store: its blob, and what is in it.
    pub async fn fetch_layer(
        &self,
        store: &Store,
        lease: &Lease,
        descriptor: &Descriptor,
        diff_id: &Digest,
        report: &Report,
    ) -> Result<(), Error> {
        let layer = Layer { descriptor: descriptor.clone(), diff_id: diff_id.clone() };
        let _turn = self.client.turns().take(&descriptor.digest).await;
        blob::fetch(&self.session, self.attempts(), store, lease, &layer, report).await
    }

    /// Brings a blob into the store as it is.
    pub async fn fetch_blob(
        &self,
        store: &Store,
        lease: &Lease,
        descriptor: &Descriptor,
        report: &Report,
    ) -> Result<(), Error> {
        let layer = Layer { descriptor: descriptor.clone(), diff_id: descriptor.digest.clone() };
        let _turn = self.client.turns().take(&descriptor.digest).await;
        blob::fetch_as_it_is(&self.session, self.attempts(), store, lease, &layer, report).await
    }

    /// Sees to it that the repository has a blob of the store.
    pub async fn push_blob(
        &self,
        store: &Store,
        descriptor: &Descriptor,
        report: Option<&Report>,
    ) -> Result<(), Error> {
        let opener = Opener::of_store(store, descriptor);
        upload::blob(&self.session, descriptor, None, &opener, report).await.map(drop)
    }

    /// Whether the repository has a blob.
    pub async fn has(&self, digest: &Digest) -> Result<bool, Error> {
        let url = self.session.repository_url(&format!("blobs/{digest}"))?;
        let answer = self.session.send(&crate::session::Ask::new(http::Method::HEAD, url)).await?;
        Ok(answer.status().is_success())
    }

    /// Sees to it that the repository has these bytes as a blob.
    pub async fn push_document(&self, media_type: &str, raw: Vec<u8>) -> Result<Descriptor, Error> {
        let descriptor = Descriptor::new(media_type, Digest::sha256(&raw), raw.len() as u64);
        let raw = Bytes::from(raw);
        let opener = Opener::new(move |offset| {
            let rest = raw.slice(raw.len().min(usize::try_from(offset).unwrap_or(usize::MAX))..);
            async move {
                let pieces: Pieces = Box::pin(futures_util::stream::iter([Ok(rest)]));
                Ok(pieces)
            }
        });
        upload::blob(&self.session, &descriptor, None, &opener, None).await?;
        Ok(descriptor)
    }

    /// Puts a manifest under the reference's tag; what it names is there already.
    pub async fn put(&self, media_type: &str, raw: Vec<u8>) -> Result<Digest, Error> {
        if raw.len() > MANIFEST_LIMIT {
            return Err(Error::Invalid(format!(
                "the manifest of {} is larger than registries take",
                self.reference.familiar()
            )));
        }
        let digest = Digest::sha256(&raw);
        let name = self.reference.tag().map_or_else(|| digest.to_string(), str::to_owned);
        upload::manifest(&self.session, &name, media_type, &digest, raw)
            .await
            .map_err(|error| name_failure(&self.reference, error))?;
        Ok(digest)
    }

    fn attempts(&self) -> usize {
        self.transport.config.attempts.max(1)
    }
}
