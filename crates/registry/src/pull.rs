//! Pull: from a reference to an image in the store.
//!
//! Invariant: an image gets its name only when its manifest, configuration and every layer are there and verified;
//! until then a lease keeps what came, and afterwards a failed pull's partial blobs wait for the next attempt.

use brigantine_image::model::{Descriptor, Document, Manifest};
use brigantine_image::{Digest, Image, ImageConfig, Lease, NewImage, Platform, Reference, Store, media};
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::blob::{self, Layer, blocking};
use crate::client::{Transport, child, find, name_failure, parse, small_blob};
use crate::session::Session;
use crate::{Client, Credentials, Error, Progress, Report};

/// The most layers an image may have: no file system takes more at once.
const MOST_LAYERS: usize = 500;
/// How deep indexes may stand within indexes.
const DEEPEST: usize = 3;
/// How many of them are asked for one image.
const MOST_INDEXES: usize = 32;

/// What to pull and how.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// The platform asked for; this machine's when none is.
    pub platform: Option<Platform>,
    pub credentials: Option<Credentials>,
}

/// A finished pull.
#[derive(Debug, Clone)]
pub struct Pulled {
    pub image: Image,
    /// The digest the registry knows the reference by (of the index, where there is one).
    pub digest: Digest,
    /// Whether anything changed here.
    pub newer: bool,
}

impl Client {
    /// Pulls `reference` (its tag, or `latest`) into the store.
    pub async fn pull(
        &self,
        store: &Store,
        reference: &Reference,
        options: PullOptions,
        report: Report,
    ) -> Result<Pulled, Error> {
        let reference = reference.clone().or_latest();
        let transport = self.transport();
        let (session, found, raw) = find(&transport, &reference, options.credentials.clone()).await?;
        let pull = Pull {
            client: self,
            transport: &transport,
            session: &session,
            store,
            reference: &reference,
            report: &report,
        };
        pull.run(found, raw, &options).await.map_err(|error| name_failure(&reference, error))
    }
}

struct Pull<'p> {
    client: &'p Client,
    transport: &'p Transport,
    session: &'p Session,
    store: &'p Store,
    reference: &'p Reference,
    report: &'p Report,
}

impl Pull<'_> {
    async fn run(&self, found: Descriptor, raw: Vec<u8>, options: &PullOptions) -> Result<Pulled, Error> {
        let reference = self.reference;
        let known_as = found.digest.clone();
        let shown = reference.tag().map_or_else(|| known_as.to_string(), str::to_owned);
        let (descriptor, raw, manifest) = self.choose(found, raw, options.platform.as_ref()).await?;
        self.check_manifest(&manifest)?;
        let config_raw = small_blob(self.session, &manifest.config).await?;
        let config = self.check_config(&manifest, &config_raw, options.platform.as_ref())?;
        // Only now: what fails before is a status to the client, not a line in a stream.
        (self.report)(Progress::step(&shown, &format!("Pulling from {}", reference.path())));

        let before = blocking({
            let (store, name) = (self.store.clone(), reference.to_string());
            move || store.resolve(&name).ok()
        })
        .await?;
        let lease = self.store.lease().map_err(Error::store("prepare the image store"))?;
        // The documents are small but are synced too: that goes on while the layers come.
        let documents = async {
            let (store, lease) = (self.store.clone(), lease.clone());
            let (manifest, config) = (descriptor.digest.clone(), manifest.config.digest.clone());
            blocking(move || {
                store.content().put_as(&lease, &config, &config_raw)?;
                store.content().put_as(&lease, &manifest, &raw)
            })
            .await?
            .map_err(Error::store(format!("store the documents of {}", reference.familiar())))
        };
        tokio::try_join!(documents, self.layers(&lease, &manifest, &config))?;

        let image = blocking({
            let (store, manifest) = (self.store.clone(), descriptor.clone());
            let mut names = Vec::new();
            if reference.digest().is_none()
                && let Some(tag) = reference.tag()
            {
                names.push(reference.with_tag(tag).map_err(|error| Error::Invalid(error.to_string()))?);
            }
            names.push(reference.with_digest(known_as.clone()));
            move || store.add_image(&lease, NewImage { manifest, names, parent: None, index: None })
        })
        .await?
        .map_err(Error::store(format!("add {} to the image store", reference.familiar())))?;

        let newer =
            before.is_none_or(|before| before.id != image.id || before.manifest.digest != descriptor.digest);
        (self.report)(Progress::message(format!("Digest: {known_as}")));
        (self.report)(Progress::message(if newer {
            format!("Status: Downloaded newer image for {}", reference.familiar())
        } else {
            format!("Status: Image is up to date for {}", reference.familiar())
        }));
        Ok(Pulled { image, digest: known_as, newer })
    }

    /// Walks indexes down to the manifest of the platform. An index within an index that does not say for which platform
    /// it is may have it, where no other entry does.
    async fn choose(
        &self,
        descriptor: Descriptor,
        raw: Vec<u8>,
        platform: Option<&Platform>,
    ) -> Result<(Descriptor, Vec<u8>, Manifest), Error> {
        let wanted = platform.cloned().unwrap_or_else(Platform::host);
        let too_deep = || {
            Error::protocol(
                self.reference.familiar(),
                format!("indexes stand more than {DEEPEST} deep within each other"),
            )
        };
        let mut waiting = vec![(descriptor, Some(raw), 0)];
        let mut indexes = 0;
        while let Some((descriptor, raw, depth)) = waiting.pop() {
            let raw = match raw {
                Some(raw) => raw,
                None => child(self.session, self.reference, &descriptor).await?,
            };
            let index = match parse(self.reference, &raw)? {
                Document::Manifest(manifest) => {
                    let descriptor =
                        Descriptor { annotations: std::collections::BTreeMap::new(), ..descriptor };
                    return Ok((descriptor, raw, *manifest));
                }
                Document::Index(index) => index,
            };
            indexes += 1;
            if depth == DEEPEST {
                return Err(too_deep());
            }
            if indexes > MOST_INDEXES {
                return Err(Error::protocol(
                    self.reference.familiar(),
                    format!("more than {MOST_INDEXES} indexes have nothing for {wanted}"),
                ));
            }
            let candidates: Vec<&Descriptor> =
                index.manifests.iter().filter(|manifest| is_runnable(manifest)).collect();
            let unknown = Platform::default();
            let offered = candidates.iter().map(|manifest| manifest.platform.as_ref().unwrap_or(&unknown));
            let found: Vec<&Descriptor> = match wanted.choose(offered) {
                Some(position) => vec![candidates[position]],
                // A list of one without a platform leaves nothing to choose.
                None if candidates.len() == 1 && candidates[0].platform.is_none() => candidates,
                None => candidates
                    .into_iter()
                    .filter(|entry| entry.platform.is_none() && media::is_index(&entry.media_type))
                    .collect(),
            };
            waiting.extend(found.into_iter().rev().map(|entry| (entry.clone(), None, depth + 1)));
        }
        Err(Error::NoPlatform { reference: self.reference.familiar(), platform: wanted.to_string() })
    }

    fn check_manifest(&self, manifest: &Manifest) -> Result<(), Error> {
        let subject = || format!("the manifest of {}", self.reference.familiar());
        let config = manifest.config.media_type.as_str();
        if !config.is_empty() && !media::is_image_config(config) {
            return Err(Error::protocol(
                subject(),
                format!("is of an artifact ({config}), not of an image that can run"),
            ));
        }
        if manifest.layers.len() > MOST_LAYERS {
            return Err(Error::protocol(
                subject(),
                format!("has {} layers: {MOST_LAYERS} are the most", manifest.layers.len()),
            ));
        }
        if let Some(layer) = manifest.layers.iter().find(|layer| !media::is_layer(&layer.media_type)) {
            return Err(Error::protocol(
                subject(),
                format!("has a layer {} of unknown type {:?}", layer.digest, layer.media_type),
            ));
        }
        Ok(())
    }

    fn check_config(
        &self,
        manifest: &Manifest,
        raw: &[u8],
        wanted: Option<&Platform>,
    ) -> Result<ImageConfig, Error> {
        let subject = || format!("the configuration of {}", self.reference.familiar());
        let config: ImageConfig =
            serde_json::from_slice(raw).map_err(|error| Error::protocol(subject(), error.to_string()))?;
        if config.rootfs.diff_ids.len() != manifest.layers.len() {
            return Err(Error::protocol(
                subject(),
                format!(
                    "has {} layers, but its manifest {}",
                    config.rootfs.diff_ids.len(),
                    manifest.layers.len()
                ),
            ));
        }
        let actual = config.platform();
        if let Some(wanted) = wanted
            && !actual.architecture.is_empty()
            && !wanted.accepts(&actual)
        {
            return Err(Error::PlatformMismatch {
                reference: self.reference.familiar(),
                wanted: wanted.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(config)
    }

    async fn layers(&self, lease: &Lease, manifest: &Manifest, config: &ImageConfig) -> Result<(), Error> {
        let mut layers: Vec<Layer> = Vec::new();
        for (descriptor, diff_id) in manifest.layers.iter().zip(&config.rootfs.diff_ids) {
            if layers
                .iter()
                .any(|known| known.descriptor.digest == descriptor.digest && known.diff_id == *diff_id)
            {
                continue;
            }
            layers.push(Layer { descriptor: descriptor.clone(), diff_id: diff_id.clone() });
        }
        // Held before it is looked for: what is there now stays until the image has its name.
        let present = blocking({
            let (store, lease, layers) = (self.store.clone(), lease.clone(), layers.clone());
            move || -> brigantine_image::Result<Vec<bool>> {
                layers
                    .iter()
                    .map(|layer| {
                        lease.hold(&layer.descriptor.digest)?;
                        lease.hold(&layer.diff_id)?;
                        let blob = &layer.descriptor.digest;
                        if !store.content().has(blob) || store.layer(&layer.diff_id)?.is_none() {
                            return Ok(false);
                        }
                        store.check_layer_as(&layer.diff_id, blob).map(|()| true)
                    })
                    .collect()
            }
        })
        .await?
        .map_err(Error::store("look for layers"))?;
        let mut missing = Vec::new();
        for (layer, present) in layers.into_iter().zip(present) {
            if present {
                (self.report)(Progress::step(&layer.short(), "Already exists"));
            } else {
                (self.report)(Progress::step(&layer.short(), "Pulling fs layer"));
                missing.push(layer);
            }
        }
        let at_once = self.transport.config.max_downloads.max(1);
        for layer in missing.iter().skip(at_once) {
            (self.report)(Progress::step(&layer.short(), "Waiting"));
        }
        stream::iter(missing)
            .map(|layer| self.layer(lease, layer))
            .buffer_unordered(at_once)
            .try_collect::<()>()
            .await
    }

    async fn layer(&self, lease: &Lease, layer: Layer) -> Result<(), Error> {
        let _turn = self.client.turns().take(&layer.descriptor.digest).await;
        let attempts = self.transport.config.attempts.max(1);
        blob::fetch(self.session, attempts, self.store, lease, &layer, self.report).await
    }
}

/// Entries of an index that describe an image, not an attestation about one.
fn is_runnable(manifest: &Descriptor) -> bool {
    let attests = manifest.annotations.contains_key("vnd.docker.reference.type");
    let unknown =
        manifest.platform.as_ref().is_some_and(|p| p.os == "unknown" || p.architecture == "unknown");
    let typed = manifest.media_type.is_empty()
        || media::is_manifest(&manifest.media_type)
        || media::is_index(&manifest.media_type);
    typed && !attests && !unknown
}
