//! Base images by name: from the store, or pulled into it.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use brigantine_image::{Descriptor, Image, Lease, Platform, Reference, Store};
use brigantine_registry::{PullOptions, Report};
use tokio::sync::mpsc;

use crate::Event;
use crate::access::Access;
use crate::attest::{Material, purl};
use crate::convert::{Base, Resolver};
use crate::error::{Context, Error, Result, invalid};
use crate::solver::blocking;

/// The images of one build.
pub(crate) struct Images {
    store: Store,
    access: Access,
    pull: bool,
    lease: Lease,
    events: mpsc::Sender<Event>,
    layers: Mutex<HashMap<String, Descriptor>>,
    materials: Mutex<Vec<Material>>,
}

impl Images {
    pub fn new(store: Store, access: Access, pull: bool, lease: Lease, events: mpsc::Sender<Event>) -> Self {
        Self { store, access, pull, lease, events, layers: Mutex::default(), materials: Mutex::default() }
    }

    /// The blobs of all layers seen, by diff id.
    pub fn layers(&self) -> HashMap<String, Descriptor> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The images used.
    pub fn materials(&self) -> Vec<Material> {
        self.materials.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes that an image is used: by its digest in its registry, where it is from one.
    fn note(&self, name: &str, image: &Image) {
        let Ok(reference) = Reference::parse(name) else { return };
        let reference = if reference.digest().is_some() { reference } else { reference.or_latest() };
        let known = image.digests.iter().find(|known| known.same_repository(&reference));
        let digest = known.and_then(Reference::digest).unwrap_or(&image.manifest.digest);
        let material = Material {
            uri: purl(&reference, &image.config.platform()),
            algorithm: digest.algorithm().as_str(),
            digest: digest.hex().to_owned(),
        };
        let mut materials = self.materials.lock().unwrap_or_else(PoisonError::into_inner);
        if !materials.contains(&material) {
            materials.push(material);
        }
    }

    async fn find(&self, name: &str, platform: &Platform) -> Result<Image> {
        if !self.pull {
            let (store, text) = (self.store.clone(), name.to_owned());
            let here = blocking(move || match store.resolve(&text) {
                Ok(image) => Ok(Some(image)),
                Err(error) if error.class() == brigantine_image::ErrorClass::NotFound => Ok(None),
                Err(error) => Err(error).doing(|| format!("find the image {text}")),
            })
            .await?;
            if let Some(image) = here {
                let fits = image.config.architecture.is_empty() || platform.accepts(&image.config.platform());
                if fits || *platform == Platform::host() {
                    return Ok(image);
                }
            }
        }
        let reference = Reference::parse(name)
            .map_err(|error| invalid(format!("invalid reference format: {name}: {error}")))?;
        let credentials = self.access.credentials(&reference).await?;
        let options = PullOptions { platform: Some(platform.clone()), credentials };
        let events = self.events.clone();
        let report: Report = Arc::new(move |progress| {
            // Counts that nobody has room for are made obsolete by the next.
            if events.try_send(Event::Pull(progress)).is_err() {
                tracing::trace!("a pull's progress was skipped");
            }
        });
        let pulled = self.access.registry.pull(&self.store, &reference, options, report).await;
        pulled.map(|pulled| pulled.image).map_err(|error| Error::Registry {
            what: format!("pull the base image {}", reference.familiar()),
            source: Arc::new(error),
        })
    }
}

impl Resolver for Images {
    fn resolve<'a>(
        &'a self,
        name: &'a str,
        platform: &'a Platform,
    ) -> Pin<Box<dyn Future<Output = Result<Base>> + Send + 'a>> {
        Box::pin(async move {
            let side = match Reference::parse(name) {
                Ok(reference) => format!("[internal] load metadata for {}", reference.or_latest()),
                Err(_) => format!("[internal] load metadata for {name}"),
            };
            let image = crate::beside(&self.events, &side, Box::pin(self.find(name, platform))).await?;
            self.note(name, &image);
            let (store, lease, held) = (self.store.clone(), self.lease.clone(), image.clone());
            blocking(move || {
                let what = || "hold the base image".to_owned();
                for (layer, diff_id) in held.layers.iter().zip(&held.config.rootfs.diff_ids) {
                    lease.hold(&layer.digest).doing(what)?;
                    lease.hold(diff_id).doing(what)?;
                }
                store.ensure_unpacked(&held).doing(|| "unpack the base image".to_owned())
            })
            .await?;
            let diff_ids: Vec<String> =
                image.config.rootfs.diff_ids.iter().map(ToString::to_string).collect();
            let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
            layers.extend(diff_ids.iter().cloned().zip(image.layers.iter().cloned()));
            drop(layers);
            Ok(Base { config: (*image.config).clone(), diff_ids })
        })
    }
}
