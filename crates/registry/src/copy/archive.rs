//! What `docker save` writes and `docker load` reads.
//!
//! An archive of docker 25 or later is an OCI layout as well, and is read as one. Older ones have no manifests: one is
//! made from what they have, with the layers as they are. Written are configuration and uncompressed layers, which every
//! version loads; the image's id (its configuration's digest) stays.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use brigantine_image::model::{Descriptor, Document};
use brigantine_image::{Algorithm, Digest, Reference, media};
use serde::{Deserialize, Serialize};
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::files::{Checked, Files, Out, decompressed};
use super::{Boxed, Origin, Role, Target, layout, parse};
use crate::blob::blocking;
use crate::upload::Opener;
use crate::{Error, Report};

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Opens an archive by what it contains.
pub(super) async fn open(path: &Path, name: Option<&Reference>) -> Result<Box<dyn Origin>, Error> {
    let files = Files::archive(path).await?;
    let shown = files.shown();
    if files.size("index.json").is_some() && files.size("oci-layout").is_some() {
        return Ok(Box::new(layout::From::open(files, name.map(ToString::to_string).as_deref()).await?));
    }
    if files.size("manifest.json").is_none() {
        return Err(Error::Invalid(format!("{shown} is no docker archive: it has no manifest.json")));
    }
    let raw = files.read("manifest.json").await?;
    let all: Vec<Saved> = serde_json::from_slice(&raw)
        .map_err(|error| Error::protocol(format!("manifest.json in {shown}"), error.to_string()))?;
    let has = |saved: &&Saved| {
        let tags = saved.repo_tags.iter().flatten().filter_map(|tag| Reference::parse(tag).ok());
        name.is_none_or(|name| tags.into_iter().any(|tag| tag == *name))
    };
    let found: Vec<&Saved> = all.iter().filter(has).collect();
    let [saved] = found.as_slice() else {
        let names: Vec<&str> =
            all.iter().flat_map(|saved| saved.repo_tags.iter().flatten()).map(String::as_str).collect();
        return Err(Error::Invalid(format!("{shown}: name one of its images: {}", names.join(", "))));
    };
    Ok(Box::new(From::read(files, saved).await?))
}

struct From {
    files: Files,
    names: HashMap<Digest, String>,
    manifest: (Descriptor, Vec<u8>),
}

impl From {
    async fn read(files: Files, saved: &Saved) -> Result<Self, Error> {
        let config = files.read(&saved.config).await?;
        let digest = Digest::sha256(&config);
        let mut names = HashMap::from([(digest.clone(), saved.config.clone())]);
        let config = Descriptor::new(media::DOCKER_CONFIG, digest, config.len() as u64);
        let mut layers = Vec::new();
        for name in &saved.layers {
            let (files, owned) = (files.clone(), name.clone());
            let layer = blocking(move || {
                describe(&files, &owned).map_err(|source| Error::Io {
                    what: format!("read layer {owned} in {}", files.shown()),
                    source,
                })
            })
            .await??;
            names.insert(layer.digest.clone(), name.clone());
            layers.push(layer);
        }
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": media::DOCKER_MANIFEST,
            "config": config,
            "layers": layers,
        });
        let raw = serde_json::to_vec(&manifest)
            .map_err(|error| Error::Io { what: "write a manifest".to_owned(), source: error.into() })?;
        let descriptor = Descriptor::new(media::DOCKER_MANIFEST, Digest::sha256(&raw), raw.len() as u64);
        Ok(Self { files, names, manifest: (descriptor, raw) })
    }
}

/// A layer's digest, size and type.
fn describe(files: &Files, name: &str) -> io::Result<Descriptor> {
    let mut reader = files.open(name, 0)?;
    let mut hasher = Algorithm::Sha256.hasher();
    let mut buffer = vec![0; 1 << 18];
    let (mut size, mut gzip) = (0, false);
    loop {
        let n = reader.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        gzip |= size == 0 && buffer[..n].starts_with(&[0x1f, 0x8b]);
        hasher.update(&buffer[..n]);
        size += n as u64;
    }
    let kind = if gzip { media::DOCKER_LAYER_GZIP } else { media::DOCKER_LAYER };
    Ok(Descriptor::new(kind, hasher.finish(), size))
}

impl Origin for From {
    fn manifest<'a>(&'a self, which: Option<&'a Descriptor>) -> Boxed<'a, (Descriptor, Vec<u8>)> {
        Box::pin(async move {
            match which {
                None => Ok(self.manifest.clone()),
                Some(which) => {
                    Err(Error::Invalid(format!("{} has no manifest {}", self.files.shown(), which.digest)))
                }
            }
        })
    }

    fn open(&self, blob: &Descriptor) -> Opener {
        self.files.opener(self.names.get(&blob.digest).map_or("", String::as_str), blob.size)
    }
}

pub(super) struct To {
    out: Out,
    name: Option<Reference>,
    /// What came, by its digest, in files without names.
    spooled: Mutex<HashMap<Digest, Arc<File>>>,
}

impl To {
    #[expect(clippy::unused_async, reason = "as the other targets are made")]
    pub async fn create(path: &Path, name: Option<Reference>) -> Result<Self, Error> {
        if path.exists() {
            return Err(Error::Invalid(format!(
                "{} is there already: an image cannot be added to a docker archive",
                path.display()
            )));
        }
        Ok(Self { out: Out::archive(path)?, name, spooled: Mutex::default() })
    }

    fn spool(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, Arc<File>>> {
        self.spooled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Target for To {
    fn blob<'a>(&'a self, blob: &'a Descriptor, opener: &'a Opener, report: &'a Report) -> Boxed<'a, ()> {
        Box::pin(async move {
            let reader = SyncIoBridge::new(StreamReader::new(opener.open(0).await?));
            let owned = blob.clone();
            let file = blocking(move || {
                let spool = || -> io::Result<File> {
                    let mut file = tempfile::tempfile()?;
                    io::copy(&mut Checked::new(reader, &owned), &mut file)?;
                    Ok(file)
                };
                spool().map_err(|source| Error::Io { what: format!("copy blob {}", owned.digest), source })
            })
            .await??;
            self.spool().insert(blob.digest.clone(), Arc::new(file));
            report(crate::Progress::step(blob.digest.short(), "Copied"));
            Ok(())
        })
    }

    fn manifest<'a>(&'a self, manifest: &'a Descriptor, raw: &'a [u8], role: Role) -> Boxed<'a, ()> {
        Box::pin(async move {
            let Document::Manifest(document) = parse(manifest, raw)? else {
                return Err(Error::Invalid("a docker archive holds one platform's image".to_owned()));
            };
            if role != Role::Root {
                return Err(Error::Invalid("a docker archive holds no referrers".to_owned()));
            }
            if !media::is_image_config(&document.config.media_type) {
                return Err(Error::Invalid(format!(
                    "a docker archive holds images, not artifacts ({})",
                    document.config.media_type
                )));
            }
            let mut layers = Vec::new();
            for layer in &document.layers {
                let file = self.spool().get(&layer.digest).cloned().ok_or_else(|| {
                    Error::Invalid(format!("layer {} is not distributed: it cannot be saved", layer.digest))
                })?;
                let out = self.out.clone();
                let name = blocking(move || {
                    add_layer(&out, &file)
                        .map_err(|source| Error::Io { what: "write a layer".to_owned(), source })
                })
                .await??;
                layers.push(name);
            }
            let config = self.spool().get(&document.config.digest).cloned();
            let config = config.ok_or_else(|| Error::Invalid("the configuration did not come".to_owned()))?;
            let name = format!("{}.json", document.config.digest.hex());
            let (out, size) = (self.out.clone(), document.config.size);
            blocking({
                let name = name.clone();
                move || {
                    let mut config = &*config;
                    config
                        .seek(SeekFrom::Start(0))
                        .and_then(|_| out.write(&name, size, &mut config))
                        .map_err(|source| Error::Io { what: format!("write {name}"), source })
                }
            })
            .await??;
            let tags = self.name.iter().map(Reference::familiar).collect();
            let saved = [Saved { config: name, repo_tags: Some(tags), layers }];
            let text = serde_json::to_vec(&saved).map_err(|error| Error::Io {
                what: "write manifest.json".to_owned(),
                source: error.into(),
            })?;
            self.out.document("manifest.json", &text).await
        })
    }

    fn finish(self: Box<Self>) -> Boxed<'static, ()> {
        Box::pin(self.out.finish())
    }

    fn at_once(&self) -> usize {
        3
    }

    fn is_single(&self) -> bool {
        true
    }
}

/// Adds a layer, uncompressed, under the digest it has so.
fn add_layer(out: &Out, spooled: &File) -> io::Result<String> {
    let mut magic = [0; 4];
    let n = std::os::unix::fs::FileExt::read_at(spooled, &mut magic, 0)?;
    let mut reader = spooled.try_clone()?;
    reader.seek(SeekFrom::Start(0))?;
    let mut plain = match decompressed(&magic[..n], reader) {
        Err(plain) => plain,
        Ok(mut packed) => {
            let mut plain = tempfile::tempfile()?;
            io::copy(&mut packed, &mut plain)?;
            plain
        }
    };
    plain.seek(SeekFrom::Start(0))?;
    let mut hasher = Algorithm::Sha256.hasher();
    let mut buffer = vec![0; 1 << 18];
    let mut size = 0;
    loop {
        let n = plain.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        size += n as u64;
    }
    plain.seek(SeekFrom::Start(0))?;
    let name = format!("{}.tar", hasher.finish().hex());
    out.write(&name, size, &mut plain)?;
    Ok(name)
}
