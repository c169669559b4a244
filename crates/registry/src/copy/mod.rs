//! Copies of images between registries, layouts and archives, without an engine.
//!
//! Invariants: manifests are carried byte for byte, so that digests stay as they are (but where the target's form has no
//! manifests: a docker archive); what names something is written after it; an archive or a directory that was not
//! finished is not there. Every blob is verified on its way into a file.

mod archive;
mod files;
mod layout;
mod location;
mod registry;

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Mutex;

use brigantine_image::model::{Descriptor, Document};
use brigantine_image::{Digest, Platform, media};
use futures_util::{StreamExt, TryStreamExt, stream};

pub use location::Location;

use crate::client::MANIFEST_LIMIT;
use crate::upload::Opener;
use crate::{Client, Credentials, Error, Progress, Report};

/// How deep indexes may stand within indexes.
const DEEPEST: usize = 4;
/// The most manifests one copy may touch.
const MOST_MANIFESTS: usize = 10_000;

type Boxed<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>;

/// What to copy and as whom.
#[derive(Debug, Clone, Default)]
pub struct CopyOptions {
    /// Only the image of this platform; all of them otherwise.
    pub platform: Option<Platform>,
    /// Manifests that refer to what is copied (signatures, bills of materials) as well.
    pub referrers: bool,
    pub from: Option<Credentials>,
    pub to: Option<Credentials>,
}

/// A finished copy.
#[derive(Debug, Clone)]
pub struct Copied {
    pub digest: Digest,
    pub manifests: usize,
    pub blobs: usize,
}

/// Where images come from.
trait Origin: Send + Sync {
    /// The manifest that was asked for, or one that it names.
    fn manifest<'a>(&'a self, which: Option<&'a Descriptor>) -> Boxed<'a, (Descriptor, Vec<u8>)>;

    fn open(&self, blob: &Descriptor) -> Opener;

    /// Descriptors of manifests that refer to this one.
    fn referrers<'a>(&'a self, _subject: &'a Digest) -> Boxed<'a, Vec<Descriptor>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    /// The registry and the repository, where it is one.
    fn repository(&self) -> Option<(&str, &str)> {
        None
    }
}

/// What a manifest is to the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// What was asked for: it gets the target's name.
    Root,
    /// Named by another one.
    Child,
    /// Refers to another one.
    Referrer,
}

/// Where images go.
trait Target: Send + Sync {
    fn blob<'a>(&'a self, blob: &'a Descriptor, opener: &'a Opener, report: &'a Report) -> Boxed<'a, ()>;

    /// Called after everything it names is there.
    fn manifest<'a>(&'a self, manifest: &'a Descriptor, raw: &'a [u8], role: Role) -> Boxed<'a, ()>;

    /// Makes everything visible.
    fn finish(self: Box<Self>) -> Boxed<'static, ()>;

    /// How many blobs it takes at once.
    fn at_once(&self) -> usize;

    /// It holds one image, not an index of several.
    fn is_single(&self) -> bool {
        false
    }
}

impl Client {
    /// Copies an image, or an index with all its images.
    pub async fn copy(
        &self,
        from: &Location,
        to: &Location,
        options: CopyOptions,
        report: Report,
    ) -> Result<Copied, Error> {
        let transport = self.transport();
        let origin: Box<dyn Origin> = match from {
            Location::Registry(reference) => {
                Box::new(registry::From::open(&transport, reference, options.from.clone()).await?)
            }
            Location::Layout { path, name } => {
                Box::new(layout::From::directory(path, name.as_deref()).await?)
            }
            Location::LayoutArchive { path, name } => {
                Box::new(layout::From::archive(path, name.as_deref()).await?)
            }
            Location::DockerArchive { path, name } => archive::open(path, name.as_ref()).await?,
            Location::Directory(path) => Box::new(layout::FlatFrom::open(path)),
        };
        let sister = origin.repository().map(|(domain, path)| (domain.to_owned(), path.to_owned()));
        let target: Box<dyn Target> = match to {
            Location::Registry(reference) => {
                Box::new(registry::To::open(&transport, reference, options.to.clone(), sister).await?)
            }
            Location::Layout { path, name } => Box::new(layout::To::directory(path, name.clone()).await?),
            Location::LayoutArchive { path, name } => {
                Box::new(layout::To::archive(path, name.clone()).await?)
            }
            Location::DockerArchive { path, name } => {
                Box::new(archive::To::create(path, name.clone()).await?)
            }
            Location::Directory(path) => Box::new(layout::FlatTo::create(path).await?),
        };
        let mut platform = options.platform.clone();
        if target.is_single() && platform.is_none() {
            platform = Some(Platform::host());
        }
        let copy = Copy {
            origin: origin.as_ref(),
            target: target.as_ref(),
            report: &report,
            seen: Mutex::default(),
            blobs: Mutex::default(),
        };
        let (root, raw) = copy.root(platform.as_ref()).await?;
        let digest = root.digest.clone();
        copy.manifest(root.clone(), raw, Role::Root, 0).await?;
        if options.referrers {
            copy.referrers().await?;
        }
        let (manifests, blobs) = (copy.seen_manifests().len(), copy.seen_blobs().len());
        target.finish().await?;
        report(Progress::message(format!("Copied {from} to {to}")));
        report(Progress::message(format!("Digest: {digest}")));
        Ok(Copied { digest, manifests, blobs })
    }
}

struct Copy<'c> {
    origin: &'c dyn Origin,
    target: &'c dyn Target,
    report: &'c Report,
    seen: Mutex<Vec<Digest>>,
    blobs: Mutex<HashSet<Digest>>,
}

impl Copy<'_> {
    fn seen_manifests(&self) -> std::sync::MutexGuard<'_, Vec<Digest>> {
        self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn seen_blobs(&self) -> std::sync::MutexGuard<'_, HashSet<Digest>> {
        self.blobs.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What was asked for, narrowed to one platform if one is wanted.
    async fn root(&self, platform: Option<&Platform>) -> Result<(Descriptor, Vec<u8>), Error> {
        let (mut descriptor, mut raw) = self.origin.manifest(None).await?;
        let Some(platform) = platform else { return Ok((descriptor, raw)) };
        for _ in 0..=DEEPEST {
            let Document::Index(index) = parse(&descriptor, &raw)? else { return Ok((descriptor, raw)) };
            let unknown = Platform::default();
            let offered = index.manifests.iter().map(|child| child.platform.as_ref().unwrap_or(&unknown));
            let chosen = platform.choose(offered).ok_or_else(|| Error::NoPlatform {
                reference: descriptor.digest.to_string(),
                platform: platform.to_string(),
            })?;
            (descriptor, raw) = self.child(&index.manifests[chosen]).await?;
        }
        Err(too_deep(&descriptor))
    }

    async fn child(&self, child: &Descriptor) -> Result<(Descriptor, Vec<u8>), Error> {
        if child.size > MANIFEST_LIMIT as u64 {
            return Err(Error::protocol(
                format!("manifest {}", child.digest),
                format!("has {} bytes: {MANIFEST_LIMIT} are the most", child.size),
            ));
        }
        let (mut found, raw) = self.origin.manifest(Some(child)).await?;
        if raw.len() as u64 != child.size {
            return Err(Error::protocol(
                format!("manifest {}", child.digest),
                format!("has {} bytes, not {} as is said of it", raw.len(), child.size),
            ));
        }
        if !child.media_type.is_empty() {
            found.media_type.clone_from(&child.media_type);
        }
        Ok((found, raw))
    }

    fn manifest(&self, descriptor: Descriptor, raw: Vec<u8>, role: Role, depth: usize) -> Boxed<'_, ()> {
        Box::pin(async move {
            if depth > DEEPEST {
                return Err(too_deep(&descriptor));
            }
            {
                let mut seen = self.seen_manifests();
                if seen.contains(&descriptor.digest) && role != Role::Root {
                    return Ok(());
                }
                if seen.len() >= MOST_MANIFESTS {
                    return Err(Error::protocol(
                        descriptor.digest.to_string(),
                        format!("leads to more than {MOST_MANIFESTS} manifests"),
                    ));
                }
                seen.push(descriptor.digest.clone());
            }
            match parse(&descriptor, &raw)? {
                Document::Index(index) => {
                    for child in &index.manifests {
                        if is_blob(child) {
                            self.blobs(vec![child.clone()]).await?;
                        } else {
                            let (child, raw) = self.child(child).await?;
                            self.manifest(child, raw, Role::Child, depth + 1).await?;
                        }
                    }
                }
                Document::Manifest(manifest) => {
                    let mut wanted = manifest.layers;
                    wanted.retain(|layer| !media::is_foreign(&layer.media_type));
                    wanted.push(manifest.config);
                    self.blobs(wanted).await?;
                }
            }
            self.target.manifest(&descriptor, &raw, role).await
        })
    }

    async fn blobs(&self, mut wanted: Vec<Descriptor>) -> Result<(), Error> {
        wanted.retain(|blob| self.seen_blobs().insert(blob.digest.clone()));
        stream::iter(wanted)
            .map(|blob| async move {
                let opener = self.origin.open(&blob);
                self.target.blob(&blob, &opener, self.report).await
            })
            .buffer_unordered(self.target.at_once().max(1))
            .try_collect::<()>()
            .await
    }

    /// Follows what refers to what was copied, and what refers to that.
    async fn referrers(&self) -> Result<(), Error> {
        let mut next = 0;
        loop {
            let subject = self.seen_manifests().get(next).cloned();
            let Some(subject) = subject else { return Ok(()) };
            next += 1;
            for referrer in self.origin.referrers(&subject).await? {
                let (referrer, raw) = self.child(&referrer).await?;
                self.manifest(referrer, raw, Role::Referrer, 0).await?;
            }
        }
    }
}

/// Whether an index's entry is a blob rather than a manifest.
fn is_blob(child: &Descriptor) -> bool {
    !child.media_type.is_empty()
        && !media::is_manifest(&child.media_type)
        && !media::is_index(&child.media_type)
}

fn parse(descriptor: &Descriptor, raw: &[u8]) -> Result<Document, Error> {
    Document::parse(raw).map_err(|error| {
        let cause = std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
        Error::protocol(format!("manifest {}", descriptor.digest), format!("{error}{cause}"))
    })
}

fn too_deep(descriptor: &Descriptor) -> Error {
    Error::protocol(
        descriptor.digest.to_string(),
        format!("indexes stand more than {DEEPEST} deep within each other"),
    )
}
