//! Where a cache goes: a repository of a registry, or a folder of the client's.
//!
//! Invariant: a manifest is written when everything it names is there.

use std::sync::Arc;

use brigantine_image::{Descriptor, Digest, Store};
use brigantine_registry::{Report, Repository};
use brigantine_session::Session;

use super::CachePlace;
use crate::access::Access;
use crate::error::{Context as _, Error, Result, invalid};
use crate::solver::blocking;

/// An open place.
pub(crate) enum Sink {
    Registry(Box<Repository>),
    Folder(Arc<Session>, String),
}

impl Sink {
    pub async fn open(place: &CachePlace, access: &Access) -> Result<Self> {
        match place {
            CachePlace::Registry(reference) => {
                let credentials = access.credentials(reference).await?;
                let opened = access.registry.write_to(reference, credentials).await;
                opened.map(Box::new).map(Self::Registry).map_err(|error| Error::Registry {
                    what: format!("write to {}", reference.familiar()),
                    source: Arc::new(error),
                })
            }
            CachePlace::Folder(store) => Ok(Self::Folder(super::folder::session(access)?, store.clone())),
            CachePlace::Inline => Err(invalid("an inline cache is written with its image")),
        }
    }

    /// Sees to it that a blob of the store is there.
    pub async fn blob(&self, store: &Store, descriptor: &Descriptor, report: Option<&Report>) -> Result<()> {
        match self {
            Self::Registry(repository) => {
                repository.push_blob(store, descriptor, report).await.map_err(|error| Error::Registry {
                    what: format!("write layer {} of the cache", descriptor.digest),
                    source: Arc::new(error),
                })
            }
            Self::Folder(session, folder) => {
                let file = {
                    let (store, digest) = (store.clone(), descriptor.digest.clone());
                    blocking(move || store.content().open(&digest).doing(|| format!("open layer {digest}")))
                        .await?
                };
                let pieces = pieces(file);
                let digest = descriptor.digest.as_str();
                Ok(session.put_content(folder, digest, descriptor.size, pieces).await?)
            }
        }
    }

    /// Sees to it that these bytes are there as a blob.
    pub async fn document(&self, media_type: &str, raw: Vec<u8>) -> Result<Descriptor> {
        let descriptor = Descriptor::new(media_type, Digest::sha256(&raw), raw.len() as u64);
        match self {
            Self::Registry(repository) => {
                repository.push_document(media_type, raw).await.map_err(|error| Error::Registry {
                    what: "write the list of what is cached".to_owned(),
                    source: Arc::new(error),
                })?;
            }
            Self::Folder(session, folder) => {
                let piece = futures_util::stream::iter([Ok(raw.into())]);
                session.put_content(folder, descriptor.digest.as_str(), descriptor.size, piece).await?;
            }
        }
        Ok(descriptor)
    }

    /// Writes a manifest: in a registry under the reference's tag; in a folder it is left to the client to name it.
    pub async fn manifest(&self, media_type: &str, raw: Vec<u8>, shown: &str) -> Result<Descriptor> {
        let Self::Registry(repository) = self else { return self.document(media_type, raw).await };
        let descriptor = Descriptor::new(media_type, Digest::sha256(&raw), raw.len() as u64);
        repository.put(media_type, raw).await.map_err(|error| Error::Registry {
            what: format!("write the cache {shown}"),
            source: Arc::new(error),
        })?;
        Ok(descriptor)
    }
}

/// A file's bytes, a piece at a time.
fn pieces(file: std::fs::File) -> impl futures_util::Stream<Item = std::io::Result<bytes::Bytes>> + Send {
    use tokio::io::AsyncReadExt as _;
    const PIECE: usize = 1 << 20;
    futures_util::stream::try_unfold(tokio::fs::File::from_std(file), |mut file| async move {
        let mut piece = bytes::BytesMut::with_capacity(PIECE);
        let n = file.read_buf(&mut piece).await?;
        Ok((n > 0).then(|| (piece.freeze(), file)))
    })
}
