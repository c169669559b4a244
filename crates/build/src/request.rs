//! What is asked of a builder, what happens meanwhile, and what comes of it.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use brigantine_image::{Descriptor, Digest, Image, Reference, Store};
use brigantine_registry::{Client, Credentials, Progress, redacted};
use brigantine_session::Session;
use brigantine_sys::SealedExe;

use crate::cache::{CacheFrom, CacheTo};
use crate::convert::{Options, Plan};
use crate::dockerfile::Rule;
use crate::graph::VertexId;
use crate::received;
use crate::run::Network;

/// What a builder works with; fixed while it is open.
#[derive(Debug)]
pub struct Setup {
    /// The builder's own directory: snapshots, cache mounts, records.
    pub data: PathBuf,
    /// Monitors of steps; below the engine's runtime directory.
    pub run_dir: PathBuf,
    pub exe: Arc<SealedExe>,
    pub store: Store,
    pub network: Arc<dyn Network>,
    pub cgroup_parent: String,
    pub systemd_cgroup: bool,
    /// Bytes of `/dev/shm` when a build says nothing.
    pub shm_size: i64,
}

/// Where a build's files come from.
pub enum ContextSource {
    /// There are none.
    Nothing,
    /// A tar archive, compressed or not, or a bare Dockerfile.
    Archive(Box<dyn Read + Send>),
    /// A folder of this machine, read in place.
    Folder(PathBuf),
    /// A git repository, an archive's URL or a Dockerfile's URL.
    Remote(String),
    /// The folders `dockerfile` and `context` of a client's session.
    Session(Arc<Session>),
    /// An archive that a client's session keeps ready at this address.
    Upload(Arc<Session>, String),
}

impl std::fmt::Debug for ContextSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing => f.write_str("Nothing"),
            Self::Archive(_) => f.write_str("Archive"),
            Self::Folder(path) => write!(f, "Folder({})", path.display()),
            Self::Remote(url) => write!(f, "Remote({})", redacted(url)),
            Self::Session(session) => write!(f, "Session({})", session.id()),
            Self::Upload(_, url) => write!(f, "Upload({url})"),
        }
    }
}

/// A build that is asked for.
pub struct Request {
    pub context: ContextSource,
    /// The Dockerfile's path within the context; `Dockerfile` when empty.
    pub dockerfile: String,
    /// Its text, when it does not come with the context.
    pub dockerfile_text: Option<String>,
    pub options: Options,
    /// Ask registries for newer base images.
    pub pull: bool,
    pub tags: Vec<Reference>,
    pub secrets: BTreeMap<String, Vec<u8>>,
    /// Credentials by registry.
    pub credentials: BTreeMap<String, Credentials>,
    pub registry: Client,
    /// The client, for as long as the build runs: secrets, credentials and agents that did not come with the request.
    pub session: Option<Arc<Session>>,
    pub product: Product,
    /// Caches from elsewhere to look into.
    pub cache_from: Vec<CacheFrom>,
    /// Caches elsewhere to be written.
    pub cache_to: Vec<CacheTo>,
}

/// What becomes of a build's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Product {
    /// An image of the store.
    #[default]
    Image,
    /// Its files, sent to the client's session.
    Files,
    /// Its files as an archive, sent to the client's session, which knows it by this name; besides an image of the
    /// store, perhaps.
    Archive { name: &'static str, image: bool },
    /// Nothing but the cache.
    Nothing,
}

impl ContextSource {
    /// What a client's session means by a remote context: one of its own, or one from elsewhere.
    pub fn remote(url: &str, session: Option<&Arc<Session>>) -> Self {
        match session {
            Some(session) if url == "client-session" => Self::Session(Arc::clone(session)),
            Some(session) if url.starts_with(received::UPLOADS) => {
                Self::Upload(Arc::clone(session), url.to_owned())
            }
            _ => Self::Remote(url.to_owned()),
        }
    }
}

/// What happens in a build, as it happens.
#[derive(Debug, Clone)]
pub enum Event {
    /// A base image is being pulled.
    Pull(Progress),
    /// What will be done.
    Planned(Arc<Plan>),
    Started {
        vertex: VertexId,
    },
    /// A step is not in the cache, and why.
    Missed {
        vertex: VertexId,
        why: String,
    },
    /// Output of a step.
    Log {
        vertex: VertexId,
        stderr: bool,
        data: Vec<u8>,
    },
    Finished {
        vertex: VertexId,
        cached: bool,
        key: String,
        error: Option<String>,
    },
    /// The image is being made of the target's layers.
    Exporting,
    /// Something that whoever builds should know.
    Note(String),
    /// A cache is in a folder of the client's: this is its manifest.
    CacheWritten {
        store: String,
        manifest: Box<Descriptor>,
    },
    /// Work beside the graph: reading the Dockerfile, finding an image, receiving files, making the result. A name
    /// stands for one piece of work of a build.
    Side {
        name: String,
        news: Side,
    },
}

/// What is new about work beside the graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Side {
    Began,
    /// How far a part of it is, in bytes where there are any.
    Count {
        what: String,
        current: u64,
        total: Option<u64>,
        done: bool,
    },
    /// It ended, with this error if it failed.
    Ended(Option<String>),
}

/// What the build checks found.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Checked {
    pub warnings: Vec<Remark>,
    /// The Dockerfile asks not to be built with them.
    pub refused: bool,
}

/// A warning with the place it is about.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Remark {
    pub rule: Rule,
    pub message: String,
    /// From 1.
    pub line: usize,
    /// The lines around it.
    pub excerpt: String,
}

/// A finished build.
#[derive(Debug, Clone)]
pub struct Built {
    /// There is one if one was asked for.
    pub image: Option<Image>,
    /// Names that another image had before.
    pub replaced: Vec<Digest>,
    /// The build's own id.
    pub id: String,
    /// How it came about: an SLSA predicate.
    pub provenance: serde_json::Value,
}
