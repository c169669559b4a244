//! The builder: Dockerfile to graph, solver, cache, exporters.
//!
//! Start at [`Builder::build`]. A Dockerfile is parsed ([`dockerfile`]), converted to a graph of operations with
//! content-addressed definitions ([`graph`], [`convert`]) and solved; the target's layers and configuration become an
//! image of the store. Nothing is committed in between: a step works on the snapshots of those before it.

pub mod convert;
pub mod dockerfile;
pub mod graph;

mod attest;
mod binfmt;
mod caches;
mod chmod;
mod compression;
mod context;
mod deliver;
mod error;
mod export;
mod gc;
mod hashes;
mod history;
mod ids;
mod pattern;
mod prune;
mod received;
mod records;
mod remote;
mod resolve;
mod run;
mod snapshot;
mod solver;
mod source;
mod tree;
mod users;
mod wanted;
mod write;
mod xattrs;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigantine_image::{Digest, Image, Lease, Reference, Store};
use brigantine_registry::{Client, Credentials, Progress};
use brigantine_session::Session;
use brigantine_sys::SealedExe;
use futures_util::future::try_join_all;
use tokio::sync::mpsc;

pub use attest::purl as package_url;
pub use caches::CacheMount;
pub use convert::{Options, Plan, Step, named_context};
pub use error::Error;
pub use gc::{Gc, filter};
pub use history::{BuildRecord, StepRecord};
pub use pattern::Ignore;
pub use prune::{Chosen, Entry, Prune, Pruned, Space};
pub use records::Snapshot;
pub use run::{Joined, Network};
pub use wanted::{Annotation, Export, Level, Provenance};

use crate::caches::Caches;
use crate::dockerfile::{Fault, Rule, Warning};
use crate::error::{Context as _, Result, invalid};
use crate::graph::{NamedContext, VertexId};
use crate::history::{Recording, Steps};
use crate::records::Records;
use crate::run::Executor;
use crate::solver::{Job, Solver, blocking};
use crate::source::Source;
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
            Self::Remote(url) => write!(f, "Remote({url})"),
            Self::Session(session) => write!(f, "Session({})", session.id()),
            Self::Upload(_, url) => write!(f, "Upload({url})"),
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
    /// The client, for as long as the build runs: secrets, credentials and agents that did not come with the request.
    pub session: Option<Arc<Session>>,
    pub product: Product,
}

/// What becomes of a build's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Product {
    /// An image of the store.
    #[default]
    Image,
    /// Its files, sent to the client's session.
    Files,
    /// Its files as an archive, sent to the client's session.
    Archive,
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

/// A build that can begin.
struct Prepared {
    request: Request,
    lease: Lease,
    scratch: Scratch,
    main: Option<Tree>,
    /// The Dockerfile and its name.
    text: String,
    name: String,
    plan: Arc<Plan>,
    resolver: resolve::Images,
    ignore: Ignore,
    /// Where the context is to be asked for.
    sent_for: Option<Arc<Session>>,
    /// A kept context, which nobody else may change meanwhile.
    context: Option<received::Taken>,
}

fn refused(warnings: &[Warning]) -> Error {
    let mut rules: Vec<&str> = warnings.iter().map(|warning| warning.rule.name()).collect();
    rules.sort_unstable();
    rules.dedup();
    invalid(format!(
        "the Dockerfile's build checks ({}) are set to fail the build: see brig build --check",
        rules.join(", ")
    ))
}

/// A finished build.
#[derive(Debug, Clone)]
pub struct Built {
    /// There is one if one was asked for.
    pub image: Option<Image>,
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
        let contexts = data.join("contexts");
        for dir in [data.clone(), data.join("snapshots"), data.join("caches"), contexts, run_dir.clone()] {
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
        let contexts = received::Contexts::new(data.join("contexts"));
        let solver = Arc::new(Solver::new(store, records, executor, caches, contexts, snapshots, tmp));
        Ok(Self { solver, data })
    }

    /// Builds. Dropping the future cancels the build: what only it was waiting for is ended and cleaned away.
    pub async fn build(&self, request: Request, events: mpsc::Sender<Event>) -> Result<Built> {
        let tags = request.tags.iter().map(Reference::familiar).collect();
        let target = request.options.target.clone().unwrap_or_default();
        let mut recording = Recording::new(Arc::clone(&self.solver), &ids::new(), tags, target);
        let result = self.run(request, &events, recording.steps()).await;
        recording.ended(&result);
        result
    }

    async fn run(&self, request: Request, events: &mpsc::Sender<Event>, steps: Arc<Steps>) -> Result<Built> {
        let started = records::now();
        let remote = match &request.context {
            ContextSource::Remote(url) => Some(url.clone()),
            _ => None,
        };
        let prepared = self.prepare(request, events).await?;
        if prepared.plan.refused {
            return Err(refused(&prepared.plan.warnings));
        }
        send(events, Event::Planned(Arc::clone(&prepared.plan))).await;
        let Prepared { request, lease, scratch, main, plan, resolver, context, text, name, .. } =
            self.receive(prepared, events).await?;
        let solver = Arc::clone(&self.solver);
        let mut contexts: HashMap<String, Arc<Tree>> = HashMap::new();
        contexts.extend(main.map(|tree| (String::new(), Arc::new(tree))));
        for (name, path) in request.folders {
            let hashes = Arc::clone(&solver.hashes);
            let tree = blocking(move || source::named_folder(&path, hashes)).await?;
            contexts.insert(name, Arc::new(tree));
        }
        let epoch = epoch(&request.options)?;
        let namespace = match request.options.build_args.get("BUILDKIT_CACHE_MOUNT_NS") {
            Some(Some(namespace)) => namespace.clone(),
            _ => String::new(),
        };
        let job = Job::new(
            solver,
            scratch.id.clone(),
            Arc::new(plan.graph.clone()),
            contexts,
            request.secrets,
            lease.clone(),
            events.clone(),
            epoch,
            namespace,
            steps,
            request.session.clone(),
        );
        // However this ends, no work is kept alive by the job's own memory of it.
        let stop = Stop(Arc::clone(&job));
        let targets: Vec<VertexId> =
            std::iter::once(plan.target).chain(plan.others.iter().map(|other| other.target)).collect();
        try_join_all(targets.iter().map(|target| job.result(*target))).await?;
        let mut results: BTreeMap<VertexId, Arc<solver::Output>> = BTreeMap::new();
        let histories = plan.others.iter().flat_map(|other| &other.history).chain(&plan.history);
        for vertex in histories.filter_map(|item| item.vertex).chain(targets) {
            results.insert(vertex, job.result(vertex).await?);
        }
        let mut materials = resolver.materials();
        if request.options.export.provenance.is_some() {
            materials.extend(job.materials().await?);
        }
        send(events, Event::Exporting).await;
        let (solver, tags, options) = (Arc::clone(&self.solver), request.tags, request.options);
        let (bases, id) = (resolver.layers(), scratch.id.clone());
        let result = match request.product {
            Product::Image => {
                let names: Vec<String> = tags.iter().map(Reference::familiar).collect();
                beside(events, EXPORTING, async {
                    let made = blocking(move || {
                        let known = attest::Known {
                            id: &id,
                            options: &options,
                            graph: &plan.graph,
                            dockerfile: (&name, &text),
                            materials: &materials,
                            started,
                            ended: records::now(),
                            remote: remote.as_deref(),
                        };
                        let exporting = export::Exporting {
                            solver: &solver,
                            lease: &lease,
                            plan: &plan,
                            results: &results,
                            bases: &bases,
                            epoch,
                            tags,
                            wanted: &options.export,
                            known,
                        };
                        exporting.run()
                    })
                    .await?;
                    let id = made.image.as_ref().map(|image| format!("writing image {}", image.id));
                    let said = id.into_iter().chain(names.iter().map(|name| format!("naming to {name}")));
                    for what in said {
                        let news = Side::Count { what, current: 0, total: None, done: true };
                        send(events, Event::Side { name: EXPORTING.to_owned(), news }).await;
                    }
                    Ok(made)
                })
                .await
            }
            Product::Nothing => Ok(Built { image: None, replaced: Vec::new() }),
            Product::Files | Product::Archive => {
                let target =
                    results.get(&plan.target).cloned().ok_or_else(|| invalid("the target was not made"))?;
                let session =
                    request.session.ok_or_else(|| invalid("files can be sent to a client's session only"));
                let archive = request.product == Product::Archive;
                let side = if archive { "sending tarball" } else { "exporting to client" };
                beside(events, side, async {
                    let (session, runtime) = (session?, tokio::runtime::Handle::current());
                    blocking(move || deliver::files(&solver, &lease, &target, &session, &runtime, archive))
                        .await?;
                    Ok(Built { image: None, replaced: Vec::new() })
                })
                .await
            }
        };
        drop(stop);
        drop(context);
        drop(scratch);
        result
    }

    /// Takes in what the plan uses of the client's context, when that is to be sent for.
    async fn receive(&self, mut prepared: Prepared, events: &mpsc::Sender<Event>) -> Result<Prepared> {
        if let Some(session) = prepared.sent_for.take() {
            let (contexts, hashes) = (&self.solver.contexts, &self.solver.hashes);
            let (plan, ignore) = (&prepared.plan, &prepared.ignore);
            let received = received::context(&session, contexts, plan, ignore, hashes, events).await?;
            if let Some((tree, taken)) = received {
                prepared.main = Some(tree);
                prepared.context = Some(taken);
            }
        }
        Ok(prepared)
    }

    /// What the build checks have to say of a Dockerfile; nothing is run. Base images are pulled if they must be, for
    /// some checks need their configuration.
    pub async fn check(&self, request: Request, events: mpsc::Sender<Event>) -> Result<Checked> {
        let prepared = self.prepare(request, &events).await?;
        let remark = |warning: &Warning| Remark {
            rule: warning.rule,
            message: warning.message.clone(),
            line: warning.span.first,
            excerpt: Fault::new(warning.span, &*warning.message).excerpt(&prepared.name, &prepared.text),
        };
        Ok(Checked {
            warnings: prepared.plan.warnings.iter().map(remark).collect(),
            refused: prepared.plan.refused,
        })
    }

    /// Everything up to the plan.
    async fn prepare(&self, mut request: Request, events: &mpsc::Sender<Event>) -> Result<Prepared> {
        let id = ids::new();
        let scratch =
            Scratch { dir: self.solver.tmp.join(&id), id: id.clone(), tmp: self.solver.tmp.clone() };
        let lease = self.solver.store.lease().doing(|| "begin a build".to_owned())?;
        let context = std::mem::replace(&mut request.context, ContextSource::Nothing);
        let dockerfile = std::mem::take(&mut request.dockerfile);
        let given = request.dockerfile_text.take();
        let mut sent_for = None;
        let Source { tree: main, ignore, text, name } = match context {
            ContextSource::Session(session) => {
                fs::DirBuilder::new()
                    .mode(0o700)
                    .create(&scratch.dir)
                    .doing(|| format!("create {}", scratch.dir.display()))?;
                let (dir, hashes) = (&scratch.dir, &self.solver.hashes);
                let texts = received::texts(&session, dir, &dockerfile, hashes, events).await?;
                sent_for = Some(session);
                texts
            }
            context => {
                let (solver, dir, secrets) = (&self.solver, &scratch.dir, &request.secrets);
                source::source(solver, context, dir, dockerfile, given, secrets).await?
            }
        };
        let file = dockerfile::parse(&text).map_err(|fault| Error::fault(fault, &name, &text))?;
        let resolver = resolve::Images::new(
            self.solver.store.clone(),
            request.registry.clone(),
            std::mem::take(&mut request.credentials),
            request.pull,
            lease.clone(),
            events.clone(),
            request.session.clone(),
        );
        let plan = convert::convert_all(&file, &name, &text, &request.options, &ignore, &resolver).await?;
        let plan = Arc::new(plan);
        Ok(Prepared {
            request,
            lease,
            scratch,
            main,
            text,
            name,
            plan,
            resolver,
            ignore,
            sent_for,
            context: None,
        })
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

    /// Where files may be kept for as long as a build runs.
    pub fn spool(&self) -> PathBuf {
        self.solver.tmp.clone()
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

/// What making the image is called.
const EXPORTING: &str = "exporting to image";

/// Does work beside the graph, telling when it begins and how it ends.
pub(crate) async fn beside<T>(
    events: &mpsc::Sender<Event>,
    name: &str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let tell = |news| send(events, Event::Side { name: name.to_owned(), news });
    tell(Side::Began).await;
    let result = work.await;
    tell(Side::Ended(result.as_ref().err().map(Error::report))).await;
    result
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
