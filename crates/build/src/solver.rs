//! Solving a graph: every vertex once, independent ones side by side, equal work of several builds once for all.
//!
//! Three kinds of keys lead to a result that is known: the definition (the operation and the keys of its inputs),
//! the content (the operation and what it takes from its inputs), and for sources their own digest. A step whose
//! inputs were made again but came out the same is found by comparing them ([`Solver::same_inputs`]): early cut-off.
//!
//! Invariant: a result is recorded only when its step has succeeded; whatever is missing on disk is a miss.

mod explain;
mod files;
mod lend;
mod run;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{self, Poll};

use brigantine_image::{Digest, Lease, Store};
use brigantine_session::Session;
use futures_util::future::{BoxFuture, FutureExt as _, Shared, WeakShared, try_join_all};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OnceCell, Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::Event;
use crate::attest::Material;
use crate::caches::Caches;
use crate::error::{Context as _, Error, Result, invalid};
use crate::graph::{Graph, Op, Vertex, VertexId};
use crate::hashes::Hashes;
use crate::history::Steps;
use crate::pattern::Ignore;
use crate::received::Contexts;
use crate::records::{self, Records, Snapshot};
use crate::remote::{Downloaded, Downloads};
use crate::run::{Executor, resolve_source};
use crate::snapshot::{Fresh, Layer, Mounts, Snap, disk_usage, hold};
use crate::tree::Tree;

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
type Flying = WeakShared<Work>;

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

/// A step under way, which others may wait for.
struct InFlight {
    work: Flying,
    /// Held by the work.
    listeners: Weak<Listeners>,
}

impl std::fmt::Debug for InFlight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InFlight")
    }
}

/// Who is told what a shared step prints.
#[derive(Debug, Default)]
struct Listeners {
    all: Mutex<Vec<(mpsc::Sender<Event>, VertexId)>>,
}

/// One build's view of the solver.
pub(crate) struct Job {
    pub solver: Arc<Solver>,
    pub id: String,
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
struct Own(JoinHandle<Result<Arc<Output>>>);

impl Drop for Own {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Future for Own {
    type Output = Result<Arc<Output>>;

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

    /// The snapshot of a record, if it is whole.
    fn snap(&self, record: &Snapshot) -> Result<Option<Arc<Snap>>> {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(snap) = live.get(&record.id).and_then(Weak::upgrade) {
            return Ok(Some(snap));
        }
        let own = self.snapshots.join(&record.id).join("diff");
        let adopted: Option<Digest> = record.diff_id.as_deref().and_then(|text| text.parse().ok());
        let snap = if own.is_dir() {
            Snap::own(record.id.clone(), own)
        } else if let Some(diff_id) = adopted
            && self.store.layer(&diff_id).doing(|| "look up a layer".to_owned())?.is_some()
        {
            Snap::layer(record.id.clone(), diff_id)
        } else {
            return Ok(None);
        };
        let snap = Arc::new(snap);
        live.retain(|_, known| known.strong_count() > 0);
        live.insert(record.id.clone(), Arc::downgrade(&snap));
        Ok(Some(snap))
    }

    fn adopt_live(&self, snap: &Arc<Snap>) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.insert(snap.id.clone(), Arc::downgrade(snap));
    }

    /// Whether a build uses the snapshot now.
    pub fn in_use(&self, id: &str) -> bool {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.get(id).is_some_and(|snap| snap.strong_count() > 0)
    }

    /// A result on top of `below`, if the key leads to one.
    fn known(&self, key: &str, below: &[Layer]) -> Result<Option<Output>> {
        let Some(record) = self.records.find(key)? else { return Ok(None) };
        let mut output = Output::layers(below.to_vec(), record.identity.clone(), record.created);
        output.cached = true;
        if !record.empty {
            let Some(snap) = self.snap(&record)? else {
                // Lost: made again.
                self.records.remove(&record.id)?;
                return Ok(None);
            };
            output.layers.push(Layer::Snap(Arc::clone(&snap)));
            output.own = Some(snap);
        }
        self.records.used(&[record.id])?;
        Ok(Some(output))
    }

    /// A digest of what the layers hold.
    fn content_of(&self, lease: &Lease, layers: &[Layer]) -> Result<String> {
        let mut hasher = Sha256::new();
        for layer in layers {
            let part = match layer {
                Layer::Image(diff_id) => diff_id.to_string(),
                Layer::Snap(_) => {
                    let held = hold(&self.store, &self.mounts, lease, std::slice::from_ref(layer))?;
                    let tree = Tree::layers(&held.lowers, Arc::clone(&self.hashes))?;
                    let all = tree.select("/")?;
                    tree.digest(&all, &Ignore::default(), false, true)?
                }
            };
            hasher.update(part);
            hasher.update("\n");
        }
        Ok(hex::encode(hasher.finalize()))
    }

    /// Makes a record of a fresh snapshot and the output on top of `below`.
    fn finish(
        &self,
        fresh: Fresh,
        id: String,
        identity: &str,
        name: &str,
        below: &[Layer],
        keys: &[&str],
    ) -> Result<Output> {
        let diff = fresh.diff();
        let empty = std::fs::read_dir(&diff).doing(|| format!("read {}", diff.display()))?.next().is_none();
        let size = if empty { 0 } else { disk_usage(&diff) };
        let made = if empty { Made::Layer(None) } else { Made::Directory(fresh.keep(), size) };
        self.record(made, id, identity, name, below, keys)
    }

    fn record(
        &self,
        made: Made,
        id: String,
        identity: &str,
        name: &str,
        below: &[Layer],
        keys: &[&str],
    ) -> Result<Output> {
        let created = records::now();
        let (snap, size) = match made {
            Made::Layer(None) => (None, 0),
            Made::Layer(Some((diff_id, size))) => (Some(Snap::layer(id.clone(), diff_id)), size),
            Made::Directory(path, size) => (Some(Snap::own(id.clone(), path)), size),
        };
        let mut output = Output::layers(below.to_vec(), identity.to_owned(), created);
        let record = Snapshot {
            id,
            identity: identity.to_owned(),
            name: name.to_owned(),
            kind: "layer".to_owned(),
            diff_id: snap.as_ref().and_then(Snap::diff_id).map(|diff_id| diff_id.to_string()),
            empty: snap.is_none(),
            size,
            created,
            used: created,
            uses: 1,
        };
        if let Some(snap) = snap {
            let snap = Arc::new(snap);
            self.adopt_live(&snap);
            output.layers.push(Layer::Snap(Arc::clone(&snap)));
            output.own = Some(snap);
        }
        self.records.add(&record, keys)?;
        Ok(output)
    }
}

/// What a step has made.
enum Made {
    /// A directory of its own, and the bytes it takes.
    Directory(PathBuf, u64),
    /// A layer of the image store and its bytes; nothing.
    Layer(Option<(Digest, u64)>),
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
        id: String,
        graph: Arc<Graph>,
        contexts: HashMap<String, Arc<Tree>>,
        secrets: BTreeMap<String, Vec<u8>>,
        lease: Lease,
        events: mpsc::Sender<Event>,
        epoch: Option<i64>,
        cache_namespace: String,
        steps: Arc<Steps>,
        session: Option<Arc<Session>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            solver,
            id,
            graph,
            contexts,
            secrets: Arc::new(secrets),
            lease,
            events,
            epoch,
            cache_namespace,
            steps,
            session,
            results: Mutex::default(),
        })
    }

    /// Lets go of all work, done and under way: what only this build was waiting for is cancelled.
    pub fn stop(&self) {
        let results = std::mem::take(&mut *self.results.lock().unwrap_or_else(PoisonError::into_inner));
        drop(results);
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

    /// The files and repositories from the web that went into the build.
    pub async fn materials(self: &Arc<Self>) -> Result<Vec<Material>> {
        let mut all = Vec::new();
        for (number, vertex) in self.graph.vertices.iter().enumerate() {
            let (uri, algorithm) = match &vertex.op {
                Op::Http { url, .. } => (url.clone(), "sha256"),
                Op::Git { url, reference, .. } if reference.is_empty() => (url.clone(), "sha1"),
                Op::Git { url, reference, .. } => (format!("{url}#{reference}"), "sha1"),
                _ => continue,
            };
            let output = self.result(VertexId(number)).await?;
            let digest = match &output.file {
                Some(file) => file.found.sha256.clone(),
                None => output.key.trim_start_matches("git:").to_owned(),
            };
            all.push(Material { uri, algorithm, digest });
        }
        Ok(all)
    }

    async fn download(&self, url: &str, checksum: Option<&str>, name: &str) -> Result<Arc<Output>> {
        let path = self.solver.tmp.join(format!("{}-{}", self.id, digest_of(&[url])));
        let found = self.solver.downloads.fetch(url, checksum, &self.secrets, &path).await?;
        let mut output =
            Output::layers(Vec::new(), format!("http:{}:{}:{:?}", found.sha256, name, found.modified), 0);
        output.file = Some(Arc::new(Download { path, name: name.to_owned(), found }));
        Ok(Arc::new(output))
    }

    async fn checkout(&self, op: &Op) -> Result<Arc<Output>> {
        let dir = self.solver.tmp.join(format!("{}-git-{}", self.id, digest_of(&[&definition(op)?])));
        let commit = crate::remote::checkout(op, &self.secrets, &dir).await?;
        let Op::Git { subdir, .. } = op else { return Err(invalid("not a git source")) };
        let (hashes, subdir) = (Arc::clone(&self.solver.hashes), subdir.clone());
        let tree = blocking(move || {
            let root = crate::tree::open_dir(&dir)?;
            let whole = Tree::folder(root, Ignore::default(), Arc::clone(&hashes));
            if subdir.is_empty() {
                return Ok(whole);
            }
            let real = resolve_source(&whole, &subdir)?;
            let root = whole
                .open(real.as_bytes(), rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY)
                .doing(|| format!("open {subdir} of the repository"))?;
            Ok(Tree::folder(root, Ignore::default(), hashes))
        })
        .await?;
        let mut output = Output::layers(Vec::new(), format!("git:{commit}"), 0);
        output.tree = Some(Arc::new(tree));
        Ok(Arc::new(output))
    }

    /// The file tree of an input: a context's, or the union of its layers. Blocks.
    fn tree(&self, output: &Output) -> Result<Arc<Tree>> {
        if let Some(tree) = &output.tree {
            return Ok(Arc::clone(tree));
        }
        let held = hold(&self.solver.store, &self.solver.mounts, &self.lease, &output.layers)?;
        Ok(Arc::new(Tree::layers(&held.lowers, Arc::clone(&self.solver.hashes))?))
    }

    /// Looks a step up by its definition, its content, or inputs that came out the same; else makes it.
    async fn cached_or(
        self: &Arc<Self>,
        id: VertexId,
        vertex: &Vertex,
        keys: Keys,
        inputs: &[Arc<Output>],
        make: impl FnOnce(Vec<String>, Arc<Listeners>) -> Work + Send + 'static,
    ) -> Result<Arc<Output>> {
        let below = inputs.first().map(|input| input.layers.clone()).unwrap_or_default();
        if !vertex.no_cache {
            for (index, key) in keys.all.iter().enumerate() {
                let solver = Arc::clone(&self.solver);
                let (key, below) = (key.clone(), below.clone());
                let found = blocking(move || solver.known(&key, &below)).await?;
                if let Some(output) = found {
                    for other in &keys.all[..index] {
                        if let Some(snap) = &output.own {
                            self.solver.records.alias(other, &snap.id)?;
                        }
                    }
                    return Ok(Arc::new(output));
                }
            }
        }
        let (job, step, no_cache) = (Arc::clone(self), vertex.name.clone(), vertex.no_cache);
        let (keys, why) = blocking(move || {
            let why = job.why(&step, no_cache, &keys)?;
            Ok((keys, why))
        })
        .await?;
        self.send(Event::Missed { vertex: id, why }).await;
        let last = keys.all.last().cloned().unwrap_or_default();
        // A build that wants everything made anew shares with nobody.
        let flight = if vertex.no_cache { format!("{last}/{}/{}", self.id, id.0) } else { last };
        let (work, listeners) = {
            let mut flying = self.solver.flying.lock().unwrap_or_else(PoisonError::into_inner);
            flying.retain(|_, flight| flight.work.upgrade().is_some());
            if let Some(found) = flying
                .get(&flight)
                .and_then(|flight| Some((flight.work.upgrade()?, flight.listeners.upgrade()?)))
            {
                found
            } else {
                let listeners = Arc::new(Listeners::default());
                let work = make(keys.all.clone(), Arc::clone(&listeners)).shared();
                if let Some(weak) = work.downgrade() {
                    flying.insert(flight, InFlight { work: weak, listeners: Arc::downgrade(&listeners) });
                }
                (work, listeners)
            }
        };
        listeners.all.lock().unwrap_or_else(PoisonError::into_inner).push((self.events.clone(), id));
        let output = work.await?;
        Ok(output)
    }

    /// A result by one key alone.
    async fn quick(&self, key: &str, below: &Output) -> Result<Option<Arc<Output>>> {
        let (solver, own, layers) = (Arc::clone(&self.solver), key.to_owned(), below.layers.clone());
        let found = blocking(move || solver.known(&own, &layers)).await?;
        Ok(found.map(Arc::new))
    }

    async fn content(&self, output: &Arc<Output>) -> Result<String> {
        let made = output.content.get_or_try_init(|| async {
            let (solver, lease, layers) =
                (Arc::clone(&self.solver), self.lease.clone(), output.layers.clone());
            blocking(move || solver.content_of(&lease, &layers)).await
        });
        made.await.cloned()
    }
}

/// The keys of a step, in the order they are tried.
#[derive(Debug, Default)]
struct Keys {
    all: Vec<String>,
    /// What stands for the result in the keys of others.
    identity: String,
    parts: BTreeMap<String, String>,
}

impl Listeners {
    async fn tell(&self, stderr: bool, data: Vec<u8>) {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (events, vertex) in all {
            if events.send(Event::Log { vertex, stderr, data: data.clone() }).await.is_err() {
                tracing::trace!("a step's output had no reader");
            }
        }
    }
}
