//! Manifests by themselves: read one, put one.

use brigantine_image::model::{Descriptor, Document};
use brigantine_image::{Digest, Reference};

use crate::client::{MANIFEST_LIMIT, find, parse};
use crate::endpoint::{Purpose, endpoints};
use crate::session::{Action, Session};
use crate::{Client, Credentials, Error, upload};

impl Client {
    /// The manifest a reference names, byte for byte.
    pub async fn manifest(
        &self,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<(Descriptor, Vec<u8>, Document), Error> {
        let reference = reference.clone().or_latest();
        let (_session, descriptor, raw) = find(&self.transport(), &reference, credentials).await?;
        let document = parse(&reference, &raw)?;
        Ok((descriptor, raw, document))
    }

    /// Puts a manifest whose content is in the repository already under the reference's tag.
    pub async fn put_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        raw: Vec<u8>,
        credentials: Option<Credentials>,
    ) -> Result<Digest, Error> {
        let reference = reference.clone().or_latest();
        if raw.len() > MANIFEST_LIMIT {
            return Err(Error::Invalid(format!("the manifest is larger than {MANIFEST_LIMIT} bytes")));
        }
        parse(&reference, &raw)?;
        let transport = self.transport();
        let endpoint = endpoints(&transport.config, &reference, Purpose::Push)?.into_iter().next();
        let endpoint =
            endpoint.ok_or_else(|| Error::Invalid(format!("no registry takes {}", reference.familiar())))?;
        let session =
            Session::open(&transport, &endpoint, reference.path(), Action::Push, credentials).await?;
        let digest = Digest::sha256(&raw);
        let name = reference.tag().map_or_else(|| digest.to_string(), str::to_owned);
        upload::manifest(&session, &name, media_type, &digest, raw).await?;
        Ok(digest)
    }
}
