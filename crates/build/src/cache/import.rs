//! Looking into caches from elsewhere. Only what they list is read when a build begins; a layer comes when a step is
//! found in it.
//!
//! Invariant: what a cache claims is used for nothing but the step whose own key it was found by; a layer that is not
//! there, or not what it should be, is a miss.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use brigantine_image::model::Document;
use brigantine_image::{
    Descriptor, Digest, Index, Lease, Manifest, Platform, Reference, Storage, Store, media,
};
use brigantine_registry::{Report, Repository};
use brigantine_session::Session;
use tokio::sync::mpsc;

use super::CacheFrom;
use super::form::{CONFIG, Config, Record, UNCOMPRESSED, VERSION};
use crate::access::Access;
use crate::error::{Context as _, Error, Result, invalid};
use crate::solver::blocking;
use crate::{Event, Side, records, send};

/// The most manifests of one index that are looked into.
const MOST_IMAGES: usize = 16;

/// The caches of one build.
#[derive(Default)]
pub(crate) struct Imports {
    by_key: Mutex<HashMap<String, Known>>,
    /// Blobs that were brought here, by diff id.
    blobs: Mutex<HashMap<String, Descriptor>>,
}

/// A result that a cache has.
#[derive(Clone)]
pub(crate) struct Known {
    /// The layer and its diff id, where the step made one.
    layer: Option<(Descriptor, Digest)>,
    /// Nanoseconds since the epoch.
    pub created: i64,
    place: Arc<Place>,
}

struct Place {
    /// What people call it.
    name: String,
    source: Source,
}

enum Source {
    /// The image store: what is there is there.
    Here,
    Registry(Box<Repository>),
    Folder(Arc<Session>, String),
}

/// What was found in one place.
struct Found {
    source: Source,
    /// Results by key.
    records: Vec<Record>,
    /// The layers they count by.
    layers: Vec<Option<(Descriptor, Digest)>>,
}

impl Imports {
    /// Looks into all that are named. What cannot be read is noted.
    pub async fn load(
        from: &[CacheFrom],
        access: &Access,
        store: &Store,
        lease: &Lease,
        events: &mpsc::Sender<Event>,
    ) -> Arc<Self> {
        let imports = Self::default();
        for one in from {
            let name = format!("importing cache manifest from {}", one.shown());
            let tell = |news| send(events, Event::Side { name: name.clone(), news });
            tell(Side::Began).await;
            let (found, failures) = look(one, access, store, lease).await;
            for found in found {
                imports.take(&one.shown(), found, events).await;
            }
            for error in failures {
                note(events, format!("the cache {} is not used: {}", one.shown(), error.report())).await;
            }
            tell(Side::Ended(None)).await;
        }
        Arc::new(imports)
    }

    async fn take(&self, name: &str, found: Found, events: &mpsc::Sender<Event>) {
        let Found { source, records, layers } = found;
        let place = Arc::new(Place { name: name.to_owned(), source });
        let all = records.len();
        let mut strange = 0;
        {
            let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
            for record in records {
                match result(&record, &layers) {
                    None => strange += 1,
                    Some((layer, created)) => {
                        for key in record.own.into_iter().flat_map(|own| own.keys) {
                            let place = Arc::clone(&place);
                            // The first that was named comes first.
                            by_key.entry(key).or_insert_with(|| Known {
                                layer: layer.clone(),
                                created,
                                place,
                            });
                        }
                    }
                }
            }
        }
        if strange > 0 {
            note(
                events,
                format!(
                    "{strange} of {all} records of the cache {name} are not this builder's (another builder, processor or version wrote them) and are not used"
                ),
            )
            .await;
        }
    }

    /// A result by one of a step's keys.
    pub fn find(&self, keys: &[String]) -> Option<Known> {
        let by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        keys.iter().find_map(|key| by_key.get(key)).cloned()
    }

    /// What was found by these keys is of no use.
    pub fn forget(&self, keys: &[String]) {
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        by_key.retain(|key, _| !keys.contains(key));
    }

    /// The blobs that were brought here, by diff id.
    pub fn blobs(&self) -> HashMap<String, Descriptor> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Brings a result here: its layer, if it has one, with the bytes of its files.
    pub async fn bring(&self, known: &Known, store: &Store, lease: &Lease) -> Result<Option<(Digest, u64)>> {
        let Some((descriptor, diff_id)) = known.layer.clone() else { return Ok(None) };
        let there = {
            let (store, lease, diff_id) = (store.clone(), lease.clone(), diff_id.clone());
            blocking(move || {
                lease.hold(&diff_id).doing(|| "hold a layer".to_owned())?;
                Ok(store.layer(&diff_id).doing(|| "look for a layer".to_owned())?.is_some())
            })
            .await?
        };
        if !there {
            known.place.bring(&descriptor, &diff_id, store, lease).await?;
        }
        let (store, lease) = (store.clone(), lease.clone());
        let (info, blob) = blocking(move || {
            let what = || "take a layer of a cache in".to_owned();
            lease.hold(&descriptor.digest).doing(what)?;
            let blob = store.content().has(&descriptor.digest).then_some(descriptor);
            let info = store.layer(&diff_id).doing(what)?;
            let info = info.ok_or_else(|| Error::NotFound(format!("layer {diff_id} is not there")))?;
            Ok((info, blob))
        })
        .await?;
        if let Some(blob) = blob {
            let mut blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
            blobs.insert(info.diff_id.to_string(), Descriptor { annotations: BTreeMap::new(), ..blob });
        }
        Ok(Some((info.diff_id, info.disk)))
    }
}

impl Known {
    /// What people call the cache it is in.
    pub fn place(&self) -> &str {
        &self.place.name
    }
}

impl Place {
    async fn bring(
        &self,
        descriptor: &Descriptor,
        diff_id: &Digest,
        store: &Store,
        lease: &Lease,
    ) -> Result<()> {
        match &self.source {
            Source::Here => {
                let (store, lease) = (store.clone(), lease.clone());
                let (blob, diff_id) = (descriptor.digest.clone(), diff_id.clone());
                return blocking(move || {
                    let what = || format!("unpack layer {blob}");
                    lease.hold(&blob).doing(what)?;
                    store.unpack_blob(&lease, &diff_id, &blob).map(drop).doing(what)
                })
                .await;
            }
            Source::Registry(repository) => {
                let nowhere: Report = Arc::new(|_progress| {});
                let fetched = if store.storage() == Storage::Copy {
                    repository.fetch_blob(store, lease, descriptor, &nowhere).await
                } else {
                    repository.fetch_layer(store, lease, descriptor, diff_id, &nowhere).await
                };
                fetched.map_err(|error| Error::Registry {
                    what: format!("fetch layer {} of the cache {}", descriptor.digest, self.name),
                    source: Arc::new(error),
                })?;
            }
            Source::Folder(session, folder) => {
                let (session, folder) = (Arc::clone(session), folder.clone());
                let (store, lease, descriptor) = (store.clone(), lease.clone(), descriptor.clone());
                super::folder::fetch(session, folder, store, lease, descriptor).await?;
            }
        }
        let (store, lease) = (store.clone(), lease.clone());
        let (blob, diff_id) = (descriptor.digest.clone(), diff_id.clone());
        blocking(move || unpack(&store, &lease, &blob, &diff_id)).await
    }
}

/// Makes a layer of its blob. Where layers have no files of their own, the uncompressed archive is what is kept.
fn unpack(store: &Store, lease: &Lease, blob: &Digest, diff_id: &Digest) -> Result<()> {
    let what = || format!("unpack layer {blob}");
    if store.storage() != Storage::Copy {
        return store.unpack_blob(lease, diff_id, blob).map(drop).doing(what);
    }
    if !store.content().has(diff_id) {
        let packed = store.content().open(blob).doing(what)?;
        let mut archive = brigantine_image::decode(packed).doing(what)?;
        let mut ingest = store.content().ingest(lease, diff_id, None).doing(what)?;
        std::io::copy(&mut archive, &mut ingest).doing(what)?;
        ingest.commit().doing(what)?;
    }
    store.unpack_blob(lease, diff_id, diff_id).map(drop).doing(what)
}

/// What a record of ours leads to; `None` of others.
fn result(
    record: &Record,
    layers: &[Option<(Descriptor, Digest)>],
) -> Option<(Option<(Descriptor, Digest)>, i64)> {
    let own = record.own.as_ref()?;
    if own.version != VERSION || own.architecture != Platform::host().architecture {
        return None;
    }
    let top = record.results.first();
    let created = top
        .and_then(|top| top.created.parse::<jiff::Timestamp>().ok())
        .and_then(|time| i64::try_from(time.as_nanosecond()).ok())
        .unwrap_or_default()
        .clamp(0, records::now());
    if own.empty {
        return Some((None, created));
    }
    let layer = usize::try_from(top?.layer).ok().and_then(|place| layers.get(place))?.clone()?;
    Some((Some(layer), created))
}

/// Says something that whoever builds should know.
pub(crate) async fn note(events: &mpsc::Sender<Event>, text: String) {
    tracing::info!("{text}");
    send(events, Event::Note(text)).await;
}

/// What is in one place, and what went wrong there.
async fn look(from: &CacheFrom, access: &Access, store: &Store, lease: &Lease) -> (Vec<Found>, Vec<Error>) {
    let (mut found, mut failures) = (Vec::new(), Vec::new());
    let mut sort = |result: Result<Option<Found>>| match result {
        Ok(one) => found.extend(one),
        Err(error) => failures.push(error),
    };
    match from {
        CacheFrom::Image(reference) => sort(image(store, lease, reference).await),
        CacheFrom::Registry(reference) => {
            sort(image(store, lease, reference).await);
            match registry(access, reference).await {
                Ok(all) => found.extend(all),
                // An image that is here need not be there as well.
                Err(_) if !found.is_empty() => {}
                Err(error) => failures.push(error),
            }
        }
        CacheFrom::Folder { store: folder, digest } => {
            sort(
                super::folder::look(access, folder, digest)
                    .await
                    .map(|(session, raw, config)| {
                        let (records, layers) = listed(&raw, &config)?;
                        Ok(Found { source: Source::Folder(session, folder.clone()), records, layers })
                    })
                    .and_then(|found| found)
                    .map(Some),
            );
        }
    }
    (found, failures)
}

/// The cache of an image that is here.
async fn image(store: &Store, lease: &Lease, reference: &Reference) -> Result<Option<Found>> {
    let (store, lease, name) = (store.clone(), lease.clone(), reference.to_string());
    blocking(move || {
        let Ok(image) = store.resolve(&name) else { return Ok(None) };
        let Some(text) = &image.config.inline_cache else { return Ok(None) };
        for layer in image.layers.iter().map(|layer| &layer.digest).chain(&image.config.rootfs.diff_ids) {
            lease.hold(layer).doing(|| "hold an image".to_owned())?;
        }
        let layers = image.layers.iter().cloned().zip(image.config.rootfs.diff_ids.iter().cloned());
        let found =
            Found { source: Source::Here, records: inline(text)?, layers: layers.map(Some).collect() };
        Ok(Some(found))
    })
    .await
}

fn inline(text: &str) -> Result<Vec<Record>> {
    let wrong = |error: &dyn std::fmt::Display| invalid(format!("its cache cannot be read: {error}"));
    let raw = STANDARD.decode(text).map_err(|error| wrong(&error))?;
    Config::parse_inline(&raw).map_err(|error| wrong(&error))
}

/// What a registry has under a name: a cache, or images that have theirs with them.
async fn registry(access: &Access, reference: &Reference) -> Result<Vec<Found>> {
    let failed = |error| Error::Registry {
        what: format!("look for {}", reference.familiar()),
        source: Arc::new(error),
    };
    let credentials = access.credentials(reference).await?;
    let (repository, _, raw) =
        access.registry.read_from(reference, credentials.clone()).await.map_err(failed)?;
    if let Some(config) = config_of(&raw)? {
        let config = repository.document(&config).await.map_err(failed)?;
        let (records, layers) = listed(&raw, &config)?;
        return Ok(vec![Found { source: Source::Registry(Box::new(repository)), records, layers }]);
    }
    let manifests = match parse(&raw)? {
        Document::Manifest(manifest) => vec![*manifest],
        Document::Index(index) => {
            let mut all = Vec::new();
            let images = |one: &&Descriptor| media::is_manifest(&one.media_type);
            for one in index.manifests.iter().filter(images).take(MOST_IMAGES) {
                if let Document::Manifest(manifest) = parse(&repository.manifest(one).await.map_err(failed)?)?
                {
                    all.push(*manifest);
                }
            }
            all
        }
    };
    let mut found = Vec::new();
    for manifest in manifests {
        if !media::is_image_config(&manifest.config.media_type) {
            continue;
        }
        let raw = repository.document(&manifest.config).await.map_err(failed)?;
        let config: brigantine_image::ImageConfig = serde_json::from_slice(&raw)
            .map_err(|error| invalid(format!("the configuration of {}: {error}", reference.familiar())))?;
        let Some(text) = &config.inline_cache else { continue };
        if config.rootfs.diff_ids.len() != manifest.layers.len() {
            return Err(invalid(format!(
                "{}: the manifest has other layers than the image",
                reference.familiar()
            )));
        }
        let layers = manifest.layers.iter().cloned().zip(config.rootfs.diff_ids.iter().cloned());
        // Each has a connection of its own, so that each can be let go of.
        let (repository, ..) =
            access.registry.read_from(reference, credentials.clone()).await.map_err(failed)?;
        found.push(Found {
            source: Source::Registry(Box::new(repository)),
            records: inline(text)?,
            layers: layers.map(Some).collect(),
        });
    }
    if found.is_empty() {
        return Err(Error::NotFound(format!(
            "{} is an image without a cache: it was not built with --cache-to type=inline",
            reference.familiar()
        )));
    }
    Ok(found)
}

fn parse(raw: &[u8]) -> Result<Document> {
    Document::parse(raw).map_err(|error| invalid(format!("the manifest cannot be read: {error}")))
}

/// The descriptor of the list of what is cached, if a manifest is that of a cache.
pub(crate) fn config_of(raw: &[u8]) -> Result<Option<Descriptor>> {
    Ok(match parse(raw)? {
        Document::Manifest(manifest) => Some(manifest.config).filter(|config| config.media_type == CONFIG),
        Document::Index(index) => index.manifests.into_iter().find(|one| one.media_type == CONFIG),
    })
}

/// The layers a cache's manifest names, by blob.
pub(crate) fn blobs_of(raw: &[u8]) -> Result<HashMap<String, (Descriptor, Digest)>> {
    let all = match parse(raw)? {
        Document::Manifest(manifest) => {
            let Manifest { layers, .. } = *manifest;
            layers
        }
        Document::Index(index) => {
            let Index { manifests, .. } = *index;
            manifests
        }
    };
    let mut found = HashMap::new();
    for descriptor in all.into_iter().filter(|one| media::is_layer(&one.media_type)) {
        let diff_id = descriptor.annotations.get(UNCOMPRESSED).and_then(|text| text.parse::<Digest>().ok());
        if let Some(diff_id) = diff_id {
            found.insert(descriptor.digest.to_string(), (descriptor, diff_id));
        }
    }
    Ok(found)
}

type Listed = (Vec<Record>, Vec<Option<(Descriptor, Digest)>>);

/// The records of a cache, and the layers they count by.
fn listed(manifest: &[u8], config: &[u8]) -> Result<Listed> {
    let blobs = blobs_of(manifest)?;
    let config =
        Config::parse(config).map_err(|error| invalid(format!("the cache cannot be read: {error}")))?;
    let layers = config.layers.iter().map(|layer| blobs.get(&layer.blob).cloned()).collect();
    Ok((config.records, layers))
}
