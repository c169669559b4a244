//! Solving a graph: every vertex once, independent ones side by side, equal work of several builds once for all.
//!
//! Three kinds of keys lead to a result that is known: the definition (the operation and the keys of its inputs),
//! the content (the operation and what it takes from its inputs), and for sources their own digest. The definition is
//! looked up first: a step's inputs are made only if it really runs ([`lookup`]). A step whose inputs were made again
//! but came out the same is found by comparing them ([`Job::same_inputs`]): early cut-off.
//!
//! Invariant: a result is recorded only when its step has succeeded; whatever is missing on disk is a miss.

mod explain;
mod files;
mod import;
mod known;
mod lend;
mod lookup;
mod run;
mod shared;
mod sources;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{self, Poll};

use brigantine_image::{Lease, Store};
use brigantine_session::Session;
use futures_util::future::{BoxFuture, FutureExt as _, Shared, try_join_all};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OnceCell, Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::Event;
use crate::building::Files;
use crate::cache::Imports;
use crate::caches::Caches;
use crate::error::{Error, Result, invalid};
use crate::graph::{Graph, Op, VertexId};
use crate::hashes::Hashes;
use crate::history::Steps;
use crate::received::Contexts;
use crate::records::Records;
use crate::remote::{Downloaded, Downloads};
use crate::run::Executor;
use crate::snapshot::{Layer, Mounts, Snap, hold};
use crate::tree::Tree;

use self::known::Made;
use self::lookup::{Lookups, is_step};
use self::shared::{InFlight, Keys, Listeners};

/// The result of a vertex.
#[derive(Debug)]
pub(crate) struct Output {
    /// The file system, bottom first; of a context or download nothing.
    pub layers: Vec<Layer>,
    /// Its identity in the keys of what uses it.
    pub key: String,
    /// What the operation itself added; `None` when it changed nothing.
    pub own: Option<Arc<Snap>>,
    /// Nanoseconds since the epoch.
    pub created: i64,
    pub cached: bool,
    /// A context's or checkout's files.
    pub tree: Option<Arc<Tree>>,
    /// A download.
    pub file: Option<Arc<Download>>,
    content: OnceCell<String>,
}

/// A file from the web.
#[derive(Debug)]
pub(crate) struct Download {
    pub path: PathBuf,
    pub name: String,
    pub found: Downloaded,
}

impl Output {
    fn layers(layers: Vec<Layer>, key: String, created: i64) -> Self {
        Self {
            layers,
            key,
            own: None,
            created,
            cached: false,
            tree: None,
            file: None,
            content: OnceCell::new(),
        }
    }
}

pub(crate) type Work = BoxFuture<'static, Result<Arc<Output>>>;

/// What all builds share.
#[derive(Debug)]
pub(crate) struct Solver {
    pub store: Store,
    pub records: Records,
    pub hashes: Arc<Hashes>,
    pub mounts: Mounts,
    pub executor: Executor,
    pub caches: Caches,
    pub downloads: Downloads,
    pub contexts: Arc<Contexts>,
    pub snapshots: PathBuf,
    pub tmp: PathBuf,
    live: Mutex<HashMap<String, Weak<Snap>>>,
    flying: Mutex<HashMap<String, InFlight>>,
    turns: Arc<Semaphore>,
}

/// One build's view of the solver.
pub(crate) struct Job {
    pub solver: Arc<Solver>,
    pub id: String,
    _files: Files,
    pub graph: Arc<Graph>,
    pub contexts: HashMap<String, Arc<Tree>>,
    pub secrets: Arc<BTreeMap<String, Vec<u8>>>,
    pub lease: Lease,
    pub events: mpsc::Sender<Event>,
    /// Time of files that have none of their own.
    pub epoch: Option<i64>,
    /// Separates cache mounts of one origin from those of others.
    pub cache_namespace: String,
    /// What happens, for the record.
    steps: Arc<Steps>,
    /// The client, while it is there.
    pub session: Option<Arc<Session>>,
    /// Caches from elsewhere.
    imports: Arc<Imports>,
    lookups: Lookups,
    results: Mutex<HashMap<VertexId, Shared<Work>>>,
}

/// Sets a flag when dropped: blocking work that nobody waits for any more looks at it.
struct Cancel(Arc<AtomicBool>);

impl Drop for Cancel {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A task that ends with its handle.
struct Own<T>(JoinHandle<Result<T>>);

impl<T> Drop for Own<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<T> Future for Own<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut task::Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|joined| match joined {
            Ok(result) => result,
            Err(error) if error.is_cancelled() => Err(Error::Cancelled),
            Err(error) => Err(Error::Executor(format!("a task of the builder ended early: {error}"))),
        })
    }
}

/// Runs work that blocks off the asynchronous threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Executor(format!("a task of the builder ended early: {error}"))),
    }
}

impl Solver {
    pub fn new(
        store: Store,
        records: Records,
        executor: Executor,
        caches: Caches,
        contexts: Arc<Contexts>,
        snapshots: PathBuf,
        tmp: PathBuf,
    ) -> Self {
        let downloads = Downloads::new(snapshots.with_file_name("downloads"));
        downloads.sweep();
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Self {
            store,
            records,
            hashes: Arc::default(),
            mounts: Mounts::default(),
            executor,
            caches,
            downloads,
            contexts,
            snapshots,
            tmp,
            live: Mutex::default(),
            flying: Mutex::default(),
            // Steps often wait for the network or a disk: some more than there are cores.
            turns: Arc::new(Semaphore::new((cores * 2).max(4))),
        }
    }
}

/// A digest of several texts, each with its length.
fn digest_of(parts: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(format!("{}:", part.len()));
        hasher.update(part);
    }
    hex::encode(hasher.finalize())
}

/// The definition of an operation.
fn definition(op: &Op) -> Result<String> {
    serde_json::to_string(op).map_err(|error| Error::Executor(format!("describe an operation: {error}")))
}

impl Job {
    #[expect(clippy::too_many_arguments, reason = "what a build has of its own")]
    pub fn new(
        solver: Arc<Solver>,
        files: Files,
        graph: Arc<Graph>,
        contexts: HashMap<String, Arc<Tree>>,
        secrets: BTreeMap<String, Vec<u8>>,
        lease: Lease,
        events: mpsc::Sender<Event>,
        epoch: Option<i64>,
        cache_namespace: String,
        steps: Arc<Steps>,
        session: Option<Arc<Session>>,
        imports: Arc<Imports>,
        targets: Vec<VertexId>,
    ) -> Arc<Self> {
        let lookups = Lookups::new(&graph, targets);
        Arc::new(Self {
            solver,
            id: files.scratch.id.clone(),
            _files: files,
            graph,
            contexts,
            secrets: Arc::new(secrets),
            lease,
            events,
            epoch,
            cache_namespace,
            steps,
            session,
            imports,
            lookups,
            results: Mutex::default(),
        })
    }

    /// Lets go of all work, done and under way: what only this build was waiting for is cancelled.
    pub fn stop(&self) {
        let results = std::mem::take(&mut *self.results.lock().unwrap_or_else(PoisonError::into_inner));
        drop(results);
        self.lookups.stop();
    }

    /// The result of a vertex; the work is done once, by a task of its own: a chain of steps may be longer than a stack
    /// is deep.
    pub fn result(self: &Arc<Self>, id: VertexId) -> Shared<Work> {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = results.get(&id) {
            return known.clone();
        }
        // Weak: the futures are kept by the job, which must not be kept by them.
        let job = Arc::downgrade(self);
        let work = async move {
            let Some(job) = job.upgrade() else { return Err(Error::Cancelled) };
            job.send(Event::Started { vertex: id }).await;
            let result = job.solve(id).await;
            job.send(Event::Finished {
                vertex: id,
                cached: result.as_ref().is_ok_and(|output| output.cached),
                key: result.as_ref().map_or_else(|_| String::new(), |output| output.key.clone()),
                error: result.as_ref().err().map(Error::report),
            })
            .await;
            result
        };
        let shared = Own(tokio::spawn(work.boxed())).boxed().shared();
        results.insert(id, shared.clone());
        shared
    }

    async fn send(&self, event: Event) {
        self.steps.note(&self.graph, &event);
        if self.events.send(event).await.is_err() {
            tracing::trace!("a build's event had no reader");
        }
    }

    async fn solve(self: &Arc<Self>, id: VertexId) -> Result<Arc<Output>> {
        let graph = Arc::clone(&self.graph);
        let vertex = graph.get(id);
        if is_step(vertex)
            && let Some(output) = self.found(id).await?
        {
            return Ok(output);
        }
        let inputs = try_join_all(vertex.inputs.iter().map(|input| self.result(*input))).await?;
        match &vertex.op {
            Op::Scratch => Ok(Arc::new(Output::layers(Vec::new(), "scratch".to_owned(), 0))),
            Op::Image { diff_ids } => {
                let layers = diff_ids
                    .iter()
                    .map(|text| {
                        text.parse()
                            .map(Layer::Image)
                            .map_err(|error| invalid(format!("layer {text}: {error}")))
                    })
                    .collect::<Result<Vec<_>>>()?;
                let key = digest_of(&diff_ids.iter().map(String::as_str).collect::<Vec<_>>());
                Ok(Arc::new(Output::layers(layers, format!("image:{key}"), 0)))
            }
            Op::Context { name } => {
                let tree = self.contexts.get(name).cloned().ok_or_else(|| {
                    Error::NotFound(if name.is_empty() {
                        "the Dockerfile uses the build context, but none was sent".to_owned()
                    } else {
                        format!("the named context {name} was not sent")
                    })
                })?;
                let mut output = Output::layers(Vec::new(), format!("context:{}:{name}", self.id), 0);
                output.tree = Some(tree);
                Ok(Arc::new(output))
            }
            Op::Http { url, checksum, file_name } => self.download(url, checksum.as_deref(), file_name).await,
            Op::Git { .. } => self.checkout(&vertex.op).await,
            Op::Run(run) => self.run(id, vertex, run, &inputs).await,
            Op::Files(actions) => self.files(id, vertex, actions, &inputs).await,
        }
    }

    /// The file tree of an input: a context's, or the union of its layers. Blocks.
    fn tree(&self, output: &Output) -> Result<Arc<Tree>> {
        if let Some(tree) = &output.tree {
            return Ok(Arc::clone(tree));
        }
        let held = hold(&self.solver.store, &self.solver.mounts, &self.lease, &output.layers)?;
        Ok(Arc::new(Tree::held(&held, Arc::clone(&self.solver.hashes))?))
    }
}
