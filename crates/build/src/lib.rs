//! The builder: Dockerfile to graph, solver, cache, exporters.
//!
//! Start at [`Builder::build`]. A Dockerfile is parsed ([`dockerfile`]), converted to a graph of operations with
//! content-addressed definitions ([`graph`], [`convert`]) and solved; the target's layers and configuration become an
//! image of the store. Nothing is committed in between: a step works on the snapshots of those before it.

pub mod convert;
pub mod dockerfile;
pub mod graph;

mod caches;
mod compression;
mod context;
mod error;
mod export;
mod hashes;
mod ids;
mod pattern;
mod prune;
mod records;
mod remote;
mod resolve;
mod run;
mod snapshot;
mod solver;
mod tree;
mod users;
mod write;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigantine_image::{Digest, Image, Reference, Store};
use brigantine_registry::{Client, Credentials, Progress};
use brigantine_sys::SealedExe;
use tokio::sync::mpsc;

pub use caches::CacheMount;
pub use convert::{Options, Plan, Step, named_context};
pub use error::Error;
pub use pattern::Ignore;
pub use prune::{Entry, Prune, Pruned};
pub use records::Snapshot;
pub use run::{Joined, Network};

use crate::caches::Caches;
use crate::error::{Context as _, Result, invalid};
use crate::graph::{NamedContext, VertexId};
use crate::records::Records;
use crate::run::Executor;
use crate::solver::{Job, Solver, blocking};
use crate::tree::Tree;

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
}

impl std::fmt::Debug for ContextSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing => f.write_str("Nothing"),
            Self::Archive(_) => f.write_str("Archive"),
            Self::Folder(path) => write!(f, "Folder({})", path.display()),
            Self::Remote(url) => write!(f, "Remote({url})"),
        }
    }
}

/// A build that is asked for.
pub struct Request {
    pub context: ContextSource,
    /// Named contexts that are folders of this machine.
    pub folders: BTreeMap<String, PathBuf>,
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
}

/// A finished build.
#[derive(Debug, Clone)]
pub struct Built {
    pub image: Image,
    /// Names that another image had before.
    pub replaced: Vec<Digest>,
}

/// The builder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Builder {
    solver: Arc<Solver>,
    data: PathBuf,
}

impl Builder {
    /// Opens a builder: ends what an earlier one left running and removes what it left lying about. Blocks.
    pub fn open(setup: Setup) -> Result<Self> {
        let Setup { data, run_dir, exe, store, network, cgroup_parent, systemd_cgroup, shm_size } = setup;
        for dir in [data.clone(), data.join("snapshots"), data.join("caches"), run_dir.clone()] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .doing(|| format!("create {}", dir.display()))?;
        }
        let tmp = data.join("tmp");
        let executor =
            Executor { exe, network, run_dir, tmp: tmp.clone(), cgroup_parent, systemd_cgroup, shm_size };
        executor.sweep();
        snapshot::remove_tree(&tmp);
        fs::DirBuilder::new().mode(0o700).create(&tmp).doing(|| format!("create {}", tmp.display()))?;
        let records = Records::open(&data.join("build.db"))?;
        let known: std::collections::HashSet<String> =
            records.all()?.into_iter().map(|snapshot| snapshot.id).collect();
        let snapshots = data.join("snapshots");
        let entries = fs::read_dir(&snapshots).doing(|| format!("read {}", snapshots.display()))?;
        for entry in entries.flatten() {
            if !known.contains(&*entry.file_name().to_string_lossy()) {
                snapshot::remove_tree(&entry.path());
            }
        }
        let caches = Caches::new(data.join("caches"));
        let solver = Arc::new(Solver::new(store, records, executor, caches, snapshots, tmp));
        Ok(Self { solver, data })
    }

    /// Builds. Dropping the future cancels the build: what only it was waiting for is ended and cleaned away.
    pub async fn build(&self, request: Request, events: mpsc::Sender<Event>) -> Result<Built> {
        let id = ids::new();
        let scratch =
            Scratch { dir: self.solver.tmp.join(&id), id: id.clone(), tmp: self.solver.tmp.clone() };
        let solver = Arc::clone(&self.solver);
        let Request {
            context,
            folders,
            dockerfile,
            dockerfile_text,
            options,
            pull,
            tags,
            secrets,
            credentials,
            registry,
        } = request;
        let lease = self.solver.store.lease().doing(|| "begin a build".to_owned())?;
        let loaded = load(&solver, context, &scratch.dir, &dockerfile).await?;
        let (main, text, name) = {
            let hashes = Arc::clone(&solver.hashes);
            blocking(move || frontend(loaded, &dockerfile, dockerfile_text, hashes)).await?
        };
        let file = dockerfile::parse(&text).map_err(|fault| Error::fault(fault, &name, &text))?;
        let resolver = resolve::Images::new(
            solver.store.clone(),
            registry,
            credentials,
            pull,
            lease.clone(),
            events.clone(),
        );
        let plan = Arc::new(convert::convert(&file, &name, &text, &options, &resolver).await?);
        send(&events, Event::Planned(Arc::clone(&plan))).await;
        let mut contexts: HashMap<String, Arc<Tree>> = HashMap::new();
        contexts.extend(main.map(|tree| (String::new(), Arc::new(tree))));
        for (name, path) in folders {
            let hashes = Arc::clone(&solver.hashes);
            let tree = blocking(move || named_folder(&path, hashes)).await?;
            contexts.insert(name, Arc::new(tree));
        }
        let epoch = epoch(&options)?;
        let namespace = match options.build_args.get("BUILDKIT_CACHE_MOUNT_NS") {
            Some(Some(namespace)) => namespace.clone(),
            _ => String::new(),
        };
        let graph = Arc::new(plan.graph.clone());
        let job =
            Job::new(solver, id, graph, contexts, secrets, lease.clone(), events.clone(), epoch, namespace);
        // However this ends, no work is kept alive by the job's own memory of it.
        let stop = Stop(Arc::clone(&job));
        let target = job.result(plan.target).await?;
        let mut layers: BTreeMap<VertexId, Arc<solver::Output>> = BTreeMap::new();
        for item in &plan.history {
            if let Some(vertex) = item.vertex {
                layers.insert(vertex, job.result(vertex).await?);
            }
        }
        send(&events, Event::Exporting).await;
        let solver = Arc::clone(&self.solver);
        let bases = resolver.layers();
        let export =
            blocking(move || export::image(&solver, &lease, &plan, &target, &layers, &bases, epoch, tags))
                .await;
        drop(stop);
        drop(scratch);
        export
    }

    /// The diff ids of layers in the image store that the cache leads to: not to be collected.
    pub fn held_layers(&self) -> Vec<Digest> {
        match self.solver.records.all() {
            Ok(all) => all.iter().filter_map(|snapshot| snapshot.diff_id.as_deref()?.parse().ok()).collect(),
            Err(error) => {
                tracing::error!(error = error.report(), "list the build cache");
                Vec::new()
            }
        }
    }

    /// Syncs what the cache holds, so that a power cut does not cost making it again. Blocks.
    pub fn settle(&self) -> Result<()> {
        let until = records::now();
        let what = || format!("sync {}", self.data.display());
        let root = fs::File::open(&self.data).doing(what)?;
        rustix::fs::syncfs(&root).doing(what)?;
        self.solver.records.settled(until)
    }

    /// The builder's own directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    pub(crate) fn solver(&self) -> &Arc<Solver> {
        &self.solver
    }
}

/// Sends an event to whoever watches, if anybody does.
pub(crate) async fn send(events: &mpsc::Sender<Event>, event: Event) {
    if events.send(event).await.is_err() {
        tracing::trace!("a build's event had no reader");
    }
}

/// A build's own files, gone when it ends.
struct Scratch {
    dir: PathBuf,
    id: String,
    tmp: PathBuf,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        snapshot::remove_tree(&self.dir);
        let Ok(entries) = fs::read_dir(&self.tmp) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(&self.id) {
                let path = entry.path();
                if path.is_dir() {
                    snapshot::remove_tree(&path);
                } else if let Err(error) = fs::remove_file(&path) {
                    tracing::warn!(path = %path.display(), %error, "remove a build's file");
                }
            }
        }
    }
}

struct Stop(Arc<Job>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.stop();
        self.0.solver.mounts.forget();
    }
}

/// A context's folder with what is known of it.
struct Loaded {
    path: PathBuf,
    hashes: HashMap<Vec<u8>, [u8; 32]>,
    /// A remote Dockerfile rather than a context.
    text: Option<String>,
    ignored: bool,
}

async fn load(
    solver: &Arc<Solver>,
    source: ContextSource,
    dir: &Path,
    dockerfile: &str,
) -> Result<Option<Loaded>> {
    let make = |dir: &Path| {
        fs::DirBuilder::new().mode(0o700).create(dir).doing(|| format!("create {}", dir.display()))
    };
    match source {
        ContextSource::Nothing => Ok(None),
        ContextSource::Folder(path) => {
            Ok(Some(Loaded { path, hashes: HashMap::new(), text: None, ignored: true }))
        }
        ContextSource::Archive(source) => {
            make(dir)?;
            let (target, dockerfile) = (dir.to_owned(), dockerfile.to_owned());
            let unpacked = blocking(move || context::unpack(source, &target, &dockerfile)).await?;
            tracing::debug!(bytes = unpacked.bytes, "unpacked a build context");
            Ok(Some(Loaded { path: dir.to_owned(), hashes: unpacked.hashes, text: None, ignored: true }))
        }
        ContextSource::Remote(url) => {
            if let op @ graph::Op::Git { .. } = remote::source(&url) {
                remote::checkout(&op, dir).await?;
                let graph::Op::Git { subdir, .. } = &op else { return Err(invalid("not a git source")) };
                let path = if subdir.is_empty() {
                    dir.to_owned()
                } else {
                    let root =
                        Tree::folder(tree::open_dir(dir)?, Ignore::default(), Arc::clone(&solver.hashes));
                    dir.join(run::resolve_source(&root, subdir)?)
                };
                Ok(Some(Loaded { path, hashes: HashMap::new(), text: None, ignored: false }))
            } else {
                make(dir)?;
                let file = dir.with_extension("download");
                remote::download(&url, None, &file).await?;
                let (target, from) = (dir.to_owned(), file.clone());
                let loaded = blocking(move || {
                    let open = || fs::File::open(&from).doing(|| format!("open {}", from.display()));
                    if compression::is_archive(open()?).doing(|| format!("read {}", from.display()))? {
                        let unpacked = context::unpack(open()?, &target, "")?;
                        return Ok(Loaded {
                            path: target,
                            hashes: unpacked.hashes,
                            text: None,
                            ignored: false,
                        });
                    }
                    let mut text = String::new();
                    open()?.take(dockerfile::MOST as u64 + 1).read_to_string(&mut text).map_err(|_bad| {
                        invalid("the remote context is neither a tar archive nor a Dockerfile")
                    })?;
                    Ok(Loaded { path: target, hashes: HashMap::new(), text: Some(text), ignored: false })
                })
                .await;
                fs::remove_file(&file).doing(|| format!("remove {}", file.display()))?;
                loaded.map(Some)
            }
        }
    }
}

/// The context's tree, the Dockerfile's text and its name. Blocks.
fn frontend(
    loaded: Option<Loaded>,
    dockerfile: &str,
    given: Option<String>,
    hashes: Arc<hashes::Hashes>,
) -> Result<(Option<Tree>, String, String)> {
    let name = if dockerfile.is_empty() { "Dockerfile" } else { dockerfile };
    let Some(loaded) = loaded else {
        let text = given.ok_or_else(|| invalid("neither a build context nor a Dockerfile was sent"))?;
        return Ok((None, text, name.to_owned()));
    };
    let open = || tree::open_dir(&loaded.path);
    let whole = Tree::folder(open()?, Ignore::default(), Arc::clone(&hashes));
    let (text, name) = match given.or(loaded.text) {
        Some(text) => (text, name.to_owned()),
        None => read_dockerfile(&whole, name)?,
    };
    if !loaded.ignored {
        return Ok((Some(whole.with_known(loaded.hashes)), text, name));
    }
    let own = format!("{}.dockerignore", pattern::clean(&name));
    let (rules, from) = match whole.read(&own)? {
        Some(rules) => (Some(rules), own),
        None => (whole.read(".dockerignore")?, ".dockerignore".to_owned()),
    };
    let ignore = match rules {
        None => Ignore::default(),
        Some(rules) => Ignore::parse(&String::from_utf8_lossy(&rules))
            .map_err(|error| invalid(format!("{from}: {error}")))?,
    };
    Ok((Some(Tree::folder(open()?, ignore, hashes).with_known(loaded.hashes)), text, name))
}

fn read_dockerfile(tree: &Tree, name: &str) -> Result<(String, String)> {
    if name.split('/').any(|part| part == "..") && pattern::clean(name).is_empty() || name.starts_with("../")
    {
        return Err(invalid(format!("forbidden path outside the build context: {name}")));
    }
    let path = pattern::clean(name);
    let lower = (path == "Dockerfile").then_some("dockerfile");
    for candidate in std::iter::once(path.as_str()).chain(lower) {
        if let Some(raw) = tree.read(candidate)? {
            let text =
                String::from_utf8(raw).map_err(|_bad| invalid(format!("{candidate} is not valid UTF-8")))?;
            return Ok((text, candidate.to_owned()));
        }
    }
    Err(invalid(format!("Cannot locate specified Dockerfile: {name}")))
}

fn named_folder(path: &Path, hashes: Arc<hashes::Hashes>) -> Result<Tree> {
    let whole = Tree::folder(tree::open_dir(path)?, Ignore::default(), Arc::clone(&hashes));
    let ignore = match whole.read(".dockerignore")? {
        None => return Ok(whole),
        Some(rules) => Ignore::parse(&String::from_utf8_lossy(&rules)).map_err(invalid)?,
    };
    Ok(Tree::folder(tree::open_dir(path)?, ignore, hashes))
}

/// SOURCE_DATE_EPOCH, in seconds.
fn epoch(options: &Options) -> Result<Option<i64>> {
    match options.build_args.get("SOURCE_DATE_EPOCH") {
        Some(Some(text)) if !text.is_empty() => text
            .parse()
            .map(Some)
            .map_err(|_bad| invalid(format!("SOURCE_DATE_EPOCH={text}: seconds since 1970 are expected"))),
        _ => Ok(None),
    }
}

/// Kinds of named contexts, for callers that make [`Options`].
pub fn local_contexts(options: &Options) -> Vec<String> {
    options
        .contexts
        .iter()
        .filter(|(_, kind)| **kind == NamedContext::Local)
        .map(|(name, _)| name.clone())
        .collect()
}
