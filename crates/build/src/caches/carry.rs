//! Cache mounts that go elsewhere and come back: in a registry, or in a folder of the client's.
//!
//! The form is an OCI artifact (image-spec 1.1, "Guidelines for Artifact Usage"): a manifest of type [`ARTIFACT`] with
//! the empty configuration and one layer, the mount's files as an archive. It has no platform, and whatever copies
//! manifests with their blobs can copy it.
//!
//! Invariant: what comes was checked against size and digest before it is unpacked, and is whole before it takes the
//! place of what was there.

use std::collections::BTreeMap;
use std::sync::Arc;

use brigantine_image::model::Document;
use brigantine_image::{Descriptor, Encoder, Encoding, Lease, Manifest, media};
use brigantine_registry::{Client, Credentials, Progress, Report, Repository};
use brigantine_session::Session;

use super::MountName;
use crate::Builder;
use crate::access::Access;
use crate::cache::{self, CacheFrom, CachePlace, Sink};
use crate::error::{Context as _, Error, Result, chain, invalid};
use crate::solver::{Solver, blocking};

/// What a manifest says it is.
const ARTIFACT: &str = "application/vnd.brigantine.cache-mount.v1";
/// The mount's id, and the namespace it was used with, if any.
const ID: &str = "brigantine.cache-mount.id";
const NAMESPACE: &str = "brigantine.cache-mount.namespace";
/// The longest id that is taken over from a manifest, in bytes.
const MOST_ID: usize = 4096;

/// How places elsewhere are reached.
pub struct Way {
    pub registry: Client,
    /// By registry.
    pub credentials: BTreeMap<String, Credentials>,
    /// Lends the folder.
    pub session: Option<Arc<Session>>,
    pub report: Report,
}

/// What was carried.
#[derive(Debug, Clone)]
pub struct Carried {
    pub mount: MountName,
    pub manifest: Descriptor,
    /// The name under which a session lends the folder, if it went to one.
    pub store: Option<String>,
}

impl Way {
    fn access(&self) -> Access {
        Access::new(self.registry.clone(), self.credentials.clone(), self.session.clone())
    }

    fn tell(&self, status: String) {
        (self.report)(Progress { id: None, status, amount: None });
    }

    /// Counts of a blob, under its name.
    fn of_blob(&self, blob: &Descriptor) -> Report {
        let (report, id) = (Arc::clone(&self.report), blob.digest.short().to_owned());
        Arc::new(move |progress| report(Progress { id: Some(id.clone()), ..progress }))
    }
}

impl Builder {
    /// Writes a cache mount to another place: `type=KIND,KEY=VALUE…`, taken apart.
    pub async fn send_cache(
        &self,
        mount: MountName,
        kind: &str,
        attributes: &BTreeMap<String, String>,
        way: &Way,
    ) -> Result<Carried> {
        let (place, encoding) = cache::mount_to(kind, attributes)?;
        let solver = self.solver();
        solver.caches.free(&mount.namespace, &mount.id)?;
        let sink = Sink::open(&place, &way.access()).await?;
        let lease = solver.store.lease().doing(|| format!("export the cache mount {}", mount.id))?;
        way.tell(format!("Packing {}", mount.id));
        let layer = pack(solver, &lease, &mount, encoding).await?;
        way.tell(format!("Writing {} bytes", layer.size));
        sink.blob(&solver.store, &layer, Some(&way.of_blob(&layer))).await?;
        let config = sink.document(media::OCI_EMPTY, b"{}".to_vec()).await?;
        let raw = serde_json::to_vec(&manifest(&mount, config, layer))
            .map_err(|error| Error::Executor(format!("describe the cache mount {}: {error}", mount.id)))?;
        let (shown, store) = match &place {
            CachePlace::Folder(store) => (store.clone(), Some(store.clone())),
            CachePlace::Registry(reference) => (reference.familiar(), None),
            CachePlace::Inline => (String::new(), None),
        };
        let manifest = sink.manifest(media::OCI_MANIFEST, raw, &shown).await?;
        Ok(Carried { mount, manifest, store })
    }

    /// Puts a cache mount from another place in place of what there is; without a name it keeps its own.
    pub async fn fetch_cache(
        &self,
        mount: Option<MountName>,
        kind: &str,
        attributes: &BTreeMap<String, String>,
        way: &Way,
    ) -> Result<Carried> {
        let from = CacheFrom::parse(kind, attributes)?;
        let solver = self.solver();
        let (source, descriptor, raw) = open(&from, &way.access()).await?;
        let (layer, own) = read(&raw, &from.shown())?;
        let mount = mount.or(own).ok_or_else(|| {
            invalid(format!("{} does not say which cache mount it is: say where it is to go", from.shown()))
        })?;
        solver.caches.idle(&mount.namespace, &mount.id)?;
        let lease = solver.store.lease().doing(|| format!("import the cache mount {}", mount.id))?;
        way.tell(format!("Reading {} bytes from {}", layer.size, from.shown()));
        match source {
            Source::Registry(repository) => {
                let fetched = repository.fetch_blob(&solver.store, &lease, &layer, &way.report).await;
                fetched.map_err(|error| Error::Registry {
                    what: format!("fetch {} of {}", layer.digest, from.shown()),
                    source: Arc::new(error),
                })?;
            }
            Source::Folder(session, folder) => {
                cache::fetch(session, folder, solver.store.clone(), lease.clone(), layer.clone()).await?;
            }
        }
        way.tell(format!("Unpacking into {}", mount.id));
        let (solver, name, digest) = (Arc::clone(solver), mount.clone(), layer.digest);
        blocking(move || {
            let what = || format!("import the cache mount {}", name.id);
            let file = solver.store.content().open(&digest).doing(what)?;
            let done = solver.caches.import(&name.namespace, &name.id, file);
            drop(lease);
            done
        })
        .await?;
        Ok(Carried { mount, manifest: descriptor, store: None })
    }
}

/// The mount's files as a blob of the store. No build gets the mount meanwhile.
async fn pack(
    solver: &Arc<Solver>,
    lease: &Lease,
    mount: &MountName,
    encoding: Encoding,
) -> Result<Descriptor> {
    let (solver, lease, mount) = (Arc::clone(solver), lease.clone(), mount.clone());
    blocking(move || {
        let what = || format!("export the cache mount {}", mount.id);
        let content = solver.store.content();
        let ingest = content.ingest_unnamed(&lease).doing(what)?;
        let mut encoder = Encoder::new(encoding, ingest).doing(what)?;
        solver.caches.export(&mount.namespace, &mount.id, &mut encoder)?;
        let digest = encoder.finish().doing(what)?.commit().doing(what)?;
        let size = content.size(&digest).doing(what)?;
        let kind = media::compressed(media::OCI_LAYER, encoding).unwrap_or(media::OCI_LAYER);
        Ok(Descriptor::new(kind, digest, size))
    })
    .await
}

fn manifest(mount: &MountName, config: Descriptor, layer: Descriptor) -> Manifest {
    let mut annotations = BTreeMap::from([(ID.to_owned(), mount.id.clone())]);
    if !mount.namespace.is_empty() {
        annotations.insert(NAMESPACE.to_owned(), mount.namespace.clone());
    }
    Manifest {
        schema_version: 2,
        media_type: Some(media::OCI_MANIFEST.to_owned()),
        artifact_type: Some(ARTIFACT.to_owned()),
        config,
        layers: vec![layer],
        subject: None,
        annotations,
    }
}

/// Where a cache mount comes from.
enum Source {
    Registry(Box<Repository>),
    Folder(Arc<Session>, String),
}

/// Gets the manifest.
async fn open(from: &CacheFrom, access: &Access) -> Result<(Source, Descriptor, Vec<u8>)> {
    match from {
        CacheFrom::Image(reference) | CacheFrom::Registry(reference) => {
            let credentials = access.credentials(reference).await?;
            let read = access.registry.read_from(reference, credentials).await;
            let (repository, descriptor, raw) = read.map_err(|error| Error::Registry {
                what: format!("look for {}", reference.familiar()),
                source: Arc::new(error),
            })?;
            Ok((Source::Registry(Box::new(repository)), descriptor, raw))
        }
        CacheFrom::Folder { store, digest } => {
            let session = cache::session(access)?;
            let raw = cache::manifest(&session, store, digest).await?;
            let digest = digest.parse().map_err(|error| invalid(format!("{digest}: {error}")))?;
            let descriptor = Descriptor::new(media::OCI_MANIFEST, digest, raw.len() as u64);
            Ok((Source::Folder(session, store.clone()), descriptor, raw))
        }
    }
}

/// The layer of a cache mount's manifest, and the name the mount had.
fn read(raw: &[u8], shown: &str) -> Result<(Descriptor, Option<MountName>)> {
    let other = |what: &str| {
        invalid(format!("{shown} is {what}, no cache mount: those are written by brig builder cache export"))
    };
    let document = Document::parse(raw)
        .map_err(|error| invalid(format!("the manifest of {shown} cannot be read: {}", chain(&error))))?;
    let Document::Manifest(manifest) = document else { return Err(other("an index of images")) };
    if manifest.artifact_type.as_deref() != Some(ARTIFACT) {
        return Err(match (&manifest.artifact_type, manifest.config.media_type.as_str()) {
            (Some(kind), _) => other(&format!("an artifact of type {kind:?}")),
            (None, cache::CONFIG) => other("a build's cache"),
            (None, kind) if media::is_image_config(kind) => other("an image"),
            (None, kind) => other(&format!("an artifact of type {kind:?}")),
        });
    }
    let [layer] = &manifest.layers[..] else {
        return Err(invalid(format!("{shown} has {} layers: a cache mount has one", manifest.layers.len())));
    };
    if !media::is_layer(&layer.media_type) || media::is_foreign(&layer.media_type) {
        return Err(invalid(format!(
            "{shown} has a layer of type {:?}, which is no archive",
            layer.media_type
        )));
    }
    let text = |key: &str| manifest.annotations.get(key).cloned().unwrap_or_default();
    let mount = MountName { namespace: text(NAMESPACE), id: text(ID) };
    // It is shown to people from then on.
    let fits = |text: &str| text.len() <= MOST_ID && !text.chars().any(char::is_control);
    if !fits(&mount.id) || !fits(&mount.namespace) {
        return Err(invalid(format!("{shown} has an id that is too long or has control characters in it")));
    }
    Ok((layer.clone(), Some(mount).filter(|mount| !mount.id.is_empty())))
}

#[cfg(test)]
mod tests {
    use brigantine_image::Digest;

    use super::*;

    fn written(change: impl FnOnce(&mut Manifest)) -> Vec<u8> {
        let descriptor = |kind: &str| Descriptor::new(kind, Digest::sha256(b"x"), 1);
        let mount = MountName { namespace: "ns".to_owned(), id: "/c".to_owned() };
        let mut made = manifest(&mount, descriptor(media::OCI_EMPTY), descriptor(media::OCI_LAYER_ZSTD));
        change(&mut made);
        serde_json::to_vec(&made).unwrap()
    }

    #[test]
    fn a_mount_is_known_by_its_manifest_and_nothing_else_is() {
        let (layer, mount) = read(&written(|_| {}), "it").unwrap();
        assert_eq!(layer.media_type, media::OCI_LAYER_ZSTD);
        assert_eq!(mount, Some(MountName { namespace: "ns".to_owned(), id: "/c".to_owned() }));
        assert_eq!(read(&written(|made| made.annotations.clear()), "it").unwrap().1, None);
        let refused = |change: fn(&mut Manifest)| read(&written(change), "it").unwrap_err().to_string();
        type Case = (fn(&mut Manifest), &'static str);
        let cases: [Case; 8] = [
            (|made| made.artifact_type = None, "an artifact of type"),
            (|made| made.artifact_type = Some("text/x".to_owned()), "an artifact of type \"text/x\""),
            (|made| made.layers.clear(), "has 0 layers"),
            (|made| made.layers.push(made.layers[0].clone()), "has 2 layers"),
            (|made| made.layers[0].media_type = "text/plain".to_owned(), "no archive"),
            (|made| made.layers[0].media_type = media::DOCKER_FOREIGN_LAYER.to_owned(), "no archive"),
            (
                |made| made.annotations = [(ID.to_owned(), "\u{1b}[2J".to_owned())].into(),
                "control characters",
            ),
            (|made| made.annotations = [(ID.to_owned(), "x".repeat(5000))].into(), "too long"),
        ];
        for (change, words) in cases {
            assert!(refused(change).contains(words), "{words}: {}", refused(change));
        }
        let image = |made: &mut Manifest| {
            made.artifact_type = None;
            made.config.media_type = media::OCI_CONFIG.to_owned();
        };
        assert!(read(&written(image), "it").unwrap_err().to_string().contains("is an image, no cache mount"));
        let index = format!(r#"{{"schemaVersion":2,"mediaType":"{}","manifests":[]}}"#, media::OCI_INDEX);
        assert!(read(index.as_bytes(), "it").unwrap_err().to_string().contains("an index"));
        assert!(read(b"nothing", "it").unwrap_err().to_string().contains("cannot be read"));
    }
}
