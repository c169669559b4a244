//! OCI image layouts in directories and archives, and skopeo's flat `dir:` form.
//!
//! Sources: image-spec, image-layout.md; containers-transports(5).

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use brigantine_image::model::{Descriptor, Document, Index};
use brigantine_image::{Digest, media};

use super::files::{Files, Out};
use super::{Boxed, Origin, Role, Target};
use crate::upload::Opener;
use crate::{Error, Report};

const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Where docker and containerd keep a full name.
const FULL_NAME: &str = "io.containerd.image.name";
const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().as_str(), digest.hex())
}

pub(super) struct From {
    files: Files,
    index: Index,
    root: Descriptor,
}

impl From {
    pub async fn directory(path: &Path, name: Option<&str>) -> Result<Self, Error> {
        Self::open(Files::Directory(path.to_owned()), name).await
    }

    pub async fn archive(path: &Path, name: Option<&str>) -> Result<Self, Error> {
        Self::open(Files::archive(path).await?, name).await
    }

    pub async fn open(files: Files, name: Option<&str>) -> Result<Self, Error> {
        let shown = files.shown();
        if files.size("index.json").is_none() {
            return Err(Error::Invalid(format!("{shown} is no OCI image layout: it has no index.json")));
        }
        let raw = files.read("index.json").await?;
        let index: Index = serde_json::from_slice(&raw)
            .map_err(|error| Error::protocol(format!("index.json in {shown}"), error.to_string()))?;
        let is_named = |descriptor: &&Descriptor| {
            let names = [REF_NAME, FULL_NAME].map(|key| descriptor.annotations.get(key).map(String::as_str));
            name.is_none() || names.contains(&name) || Some(descriptor.digest.as_str()) == name
        };
        let mut found: Vec<&Descriptor> = index.manifests.iter().filter(is_named).collect();
        found.dedup_by(|a, b| a.digest == b.digest);
        let root = match (found.as_slice(), name) {
            ([one], _) => (*one).clone(),
            ([], Some(name)) => return Err(Error::Invalid(format!("{shown} has no image {name:?}"))),
            ([], None) => return Err(Error::Invalid(format!("{shown} has no image"))),
            (_, Some(name)) => {
                return Err(Error::Invalid(format!("{shown} has more than one image {name:?}")));
            }
            (several, None) => {
                let names: Vec<&str> = several
                    .iter()
                    .map(|one| one.annotations.get(REF_NAME).map_or(one.digest.as_str(), String::as_str))
                    .collect();
                return Err(Error::Invalid(format!(
                    "{shown} has several images: name one of {}",
                    names.join(", ")
                )));
            }
        };
        Ok(Self { files, index, root })
    }
}

/// Checks a document against what is said of it.
fn checked(raw: Vec<u8>, descriptor: &Descriptor, shown: &str) -> Result<(Descriptor, Vec<u8>), Error> {
    let actual = Digest::of(descriptor.digest.algorithm(), &raw);
    if actual != descriptor.digest {
        return Err(Error::protocol(
            format!("manifest {} in {shown}", descriptor.digest),
            format!("has digest {actual}"),
        ));
    }
    let mut found = Descriptor::new(&descriptor.media_type, actual, raw.len() as u64);
    if found.media_type.is_empty() {
        found.media_type = match Document::parse(&raw) {
            Ok(Document::Index(index)) => index.media_type.unwrap_or_else(|| media::OCI_INDEX.to_owned()),
            Ok(Document::Manifest(manifest)) => {
                manifest.media_type.unwrap_or_else(|| media::OCI_MANIFEST.to_owned())
            }
            Err(error) => return Err(Error::protocol(shown, error.to_string())),
        };
    }
    Ok((found, raw))
}

impl Origin for From {
    fn manifest<'a>(&'a self, which: Option<&'a Descriptor>) -> Boxed<'a, (Descriptor, Vec<u8>)> {
        Box::pin(async move {
            let which = which.unwrap_or(&self.root);
            let raw = self.files.read(&blob_name(&which.digest)).await?;
            checked(raw, which, &self.files.shown())
        })
    }

    fn open(&self, blob: &Descriptor) -> Opener {
        self.files.opener(&blob_name(&blob.digest), blob.size)
    }

    fn referrers<'a>(&'a self, subject: &'a Digest) -> Boxed<'a, Vec<Descriptor>> {
        Box::pin(async move {
            let mut found = Vec::new();
            for entry in self.index.manifests.iter().filter(|entry| entry.digest != self.root.digest) {
                let raw = self.files.read(&blob_name(&entry.digest)).await?;
                let of = match Document::parse(&raw) {
                    Ok(Document::Manifest(manifest)) => manifest.subject,
                    Ok(Document::Index(index)) => index.subject,
                    Err(_other) => None,
                };
                if of.is_some_and(|of| of.digest == *subject) {
                    found.push(entry.clone());
                }
            }
            Ok(found)
        })
    }
}

pub(super) struct To {
    out: Out,
    name: Option<String>,
    existing: Option<Index>,
    added: Mutex<Vec<Descriptor>>,
    written: Mutex<HashSet<Digest>>,
}

impl To {
    pub async fn directory(path: &Path, name: Option<String>) -> Result<Self, Error> {
        let out = Out::directory(path)?;
        let files = Files::Directory(path.to_owned());
        let mut existing = None;
        if files.size("index.json").is_some() {
            let raw = files.read("index.json").await?;
            existing = Some(serde_json::from_slice(&raw).map_err(|error| {
                Error::protocol(format!("index.json in {}", path.display()), error.to_string())
            })?);
        }
        Ok(Self::new(out, name, existing))
    }

    pub async fn archive(path: &Path, name: Option<String>) -> Result<Self, Error> {
        let to = Self::new(Out::archive(path)?, name, None);
        to.out.document("oci-layout", LAYOUT).await?;
        Ok(to)
    }

    fn new(out: Out, name: Option<String>, existing: Option<Index>) -> Self {
        Self { out, name, existing, added: Mutex::default(), written: Mutex::default() }
    }
}

impl Target for To {
    fn blob<'a>(&'a self, blob: &'a Descriptor, opener: &'a Opener, report: &'a Report) -> Boxed<'a, ()> {
        Box::pin(async move {
            if !self.written.lock().unwrap_or_else(PoisonError::into_inner).insert(blob.digest.clone()) {
                return Ok(());
            }
            report(crate::Progress::step(blob.digest.short(), "Copying"));
            self.out.content(&blob_name(&blob.digest), blob, opener).await?;
            report(crate::Progress::step(blob.digest.short(), "Copied"));
            Ok(())
        })
    }

    fn manifest<'a>(&'a self, manifest: &'a Descriptor, raw: &'a [u8], role: Role) -> Boxed<'a, ()> {
        Box::pin(async move {
            let new =
                self.written.lock().unwrap_or_else(PoisonError::into_inner).insert(manifest.digest.clone());
            if new {
                self.out.document(&blob_name(&manifest.digest), raw).await?;
            }
            if role != Role::Child {
                let mut entry = manifest.clone();
                entry.annotations = BTreeMap::new();
                if let (Role::Root, Some(name)) = (role, &self.name) {
                    entry.annotations.insert(REF_NAME.to_owned(), name.clone());
                }
                self.added.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
            }
            Ok(())
        })
    }

    fn finish(self: Box<Self>) -> Boxed<'static, ()> {
        Box::pin(async move {
            let To { out, name, existing, added, .. } = *self;
            let is_new = existing.is_none();
            let mut index = existing.unwrap_or_else(|| Index {
                schema_version: 2,
                media_type: Some(media::OCI_INDEX.to_owned()),
                artifact_type: None,
                manifests: Vec::new(),
                subject: None,
                annotations: BTreeMap::new(),
            });
            let added = added.into_inner().unwrap_or_else(PoisonError::into_inner);
            index.manifests.retain(|entry| {
                let named = entry.annotations.get(REF_NAME);
                let replaced = name.is_some() && named == name.as_ref();
                let again = named.is_none() && added.iter().any(|new| new.digest == entry.digest);
                !(replaced || again)
            });
            index.manifests.extend(added);
            let text = serde_json::to_vec(&index)
                .map_err(|error| Error::Io { what: "write index.json".to_owned(), source: error.into() })?;
            if is_new && matches!(out, Out::Directory(_)) {
                out.document("oci-layout", LAYOUT).await?;
            }
            out.document("index.json", &text).await?;
            out.finish().await
        })
    }

    fn at_once(&self) -> usize {
        self.out.at_once()
    }
}

const VERSION: &[u8] = b"Directory Transport Version: 1.1\n";

/// The flat form: `manifest.json`, `<hex>` for each blob, `<hex>.manifest.json` for what an index names.
pub(super) struct FlatFrom {
    files: Files,
}

impl FlatFrom {
    pub fn open(path: &Path) -> Self {
        Self { files: Files::Directory(path.to_owned()) }
    }
}

impl Origin for FlatFrom {
    fn manifest<'a>(&'a self, which: Option<&'a Descriptor>) -> Boxed<'a, (Descriptor, Vec<u8>)> {
        Box::pin(async move {
            let shown = self.files.shown();
            match which {
                None => {
                    let raw = self.files.read("manifest.json").await?;
                    let digest = Digest::sha256(&raw);
                    checked(raw, &Descriptor::new("", digest, 0), &shown)
                }
                Some(which) => {
                    let name = format!("{}.manifest.json", which.digest.hex());
                    checked(self.files.read(&name).await?, which, &shown)
                }
            }
        })
    }

    fn open(&self, blob: &Descriptor) -> Opener {
        self.files.opener(blob.digest.hex(), blob.size)
    }
}

pub(super) struct FlatTo {
    out: Out,
}

impl FlatTo {
    pub async fn create(path: &Path) -> Result<Self, Error> {
        let out = Out::directory(path)?;
        out.document("version", VERSION).await?;
        Ok(Self { out })
    }
}

impl Target for FlatTo {
    fn blob<'a>(&'a self, blob: &'a Descriptor, opener: &'a Opener, report: &'a Report) -> Boxed<'a, ()> {
        Box::pin(async move {
            self.out.content(blob.digest.hex(), blob, opener).await?;
            report(crate::Progress::step(blob.digest.short(), "Copied"));
            Ok(())
        })
    }

    fn manifest<'a>(&'a self, manifest: &'a Descriptor, raw: &'a [u8], role: Role) -> Boxed<'a, ()> {
        Box::pin(async move {
            match role {
                Role::Root => self.out.document("manifest.json", raw).await,
                Role::Child => {
                    self.out.document(&format!("{}.manifest.json", manifest.digest.hex()), raw).await
                }
                Role::Referrer => Err(Error::Invalid(
                    "dir: holds one image: referrers need oci: or oci-archive:".to_owned(),
                )),
            }
        })
    }

    fn finish(self: Box<Self>) -> Boxed<'static, ()> {
        Box::pin(self.out.finish())
    }

    fn at_once(&self) -> usize {
        self.out.at_once()
    }
}
