//! Solving a graph: every vertex once, independent ones side by side, equal work of several builds once for all.
//!
//! Three kinds of keys lead to a result that is known: the definition (the operation and the keys of its inputs),
//! the content (the operation and what it takes from its inputs), and for sources their own digest. A step whose
//! inputs were made again but came out the same is found by comparing them ([`Solver::same_inputs`]): early cut-off.
//!
//! Invariant: a result is recorded only when its step has succeeded; whatever is missing on disk is a miss.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use brigantine_image::{Digest, Lease, Lower, Replica, Storage, Store};
use futures_util::future::{BoxFuture, FutureExt as _, Shared, WeakShared, try_join_all};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OnceCell, Semaphore, mpsc};

use crate::caches::Caches;
use crate::dockerfile::MountKind;
use crate::error::{Context as _, Error, Result, invalid};
use crate::graph::{Action, Graph, How, Op, Run, Vertex, VertexId};
use crate::hashes::Hashes;
use crate::pattern::Ignore;
use crate::records::{self, Records, Snapshot};
use crate::remote::Downloaded;
use crate::run::{Executor, Ready, Task, resolve_source};
use crate::snapshot::{Fresh, Layer, Mounts, Snap, disk_usage, hold};
use crate::tree::Tree;
use crate::write::{Chmod, CopyOptions, Writer};
use crate::{Event, users};

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
    results: Mutex<HashMap<VertexId, Shared<Work>>>,
}

/// Sets a flag when dropped: blocking work that nobody waits for any more looks at it.
struct Cancel(Arc<AtomicBool>);

impl Drop for Cancel {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
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
        snapshots: PathBuf,
        tmp: PathBuf,
    ) -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Self {
            store,
            records,
            hashes: Arc::default(),
            mounts: Mounts::default(),
            executor,
            caches,
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
            results: Mutex::default(),
        })
    }

    /// Lets go of all work, done and under way: what only this build was waiting for is cancelled.
    pub fn stop(&self) {
        let results = std::mem::take(&mut *self.results.lock().unwrap_or_else(PoisonError::into_inner));
        drop(results);
    }

    /// The result of a vertex; the work is done once.
    pub fn result(self: &Arc<Self>, id: VertexId) -> Shared<Work> {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = results.get(&id) {
            return known.clone();
        }
        // Weak: the futures are kept by the job, which must not be kept by them.
        let job = Arc::downgrade(self);
        let work: Work = async move {
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
        }
        .boxed();
        let shared = work.shared();
        results.insert(id, shared.clone());
        shared
    }

    async fn send(&self, event: Event) {
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

    async fn download(&self, url: &str, checksum: Option<&str>, name: &str) -> Result<Arc<Output>> {
        let path = self.solver.tmp.join(format!("{}-{}", self.id, digest_of(&[url])));
        let found = crate::remote::download(url, checksum, &path).await?;
        let mut output =
            Output::layers(Vec::new(), format!("http:{}:{}:{:?}", found.sha256, name, found.modified), 0);
        output.file = Some(Arc::new(Download { path, name: name.to_owned(), found }));
        Ok(Arc::new(output))
    }

    async fn checkout(&self, op: &Op) -> Result<Arc<Output>> {
        let dir = self.solver.tmp.join(format!("{}-git-{}", self.id, digest_of(&[&definition(op)?])));
        let commit = crate::remote::checkout(op, &dir).await?;
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
        self.explain(id, vertex, &keys).await?;
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

    /// Says why a step runs again, by what its keys were made of the last time, and remembers what they are made of now.
    async fn explain(&self, id: VertexId, vertex: &Vertex, keys: &Keys) -> Result<()> {
        let step = digest_of(&[&self.cache_namespace, &vertex.name]);
        let before: Option<BTreeMap<String, String>> =
            self.solver.records.parts(&step)?.and_then(|text| serde_json::from_str(&text).ok());
        let why = match before {
            _ if vertex.no_cache => "the cache was not to be used".to_owned(),
            None => "this step was not run here before".to_owned(),
            Some(before) => {
                let names = keys.parts.keys().chain(before.keys());
                let mut changed: Vec<&str> = names
                    .filter(|name| keys.parts.get(*name) != before.get(*name))
                    .map(|name| match name.as_str() {
                        "operation" => "the instruction or its variables",
                        "below" => "the step below it",
                        "content" => "the copied files",
                        mount => mount,
                    })
                    .collect();
                changed.dedup();
                if changed.is_empty() {
                    "its result is not in the cache any more".to_owned()
                } else {
                    format!("changed: {}", changed.join(", "))
                }
            }
        };
        self.send(Event::Missed { vertex: id, why }).await;
        let text = serde_json::to_string(&keys.parts).unwrap_or_default();
        self.solver.records.set_parts(&step, &text)
    }

    async fn files(
        self: &Arc<Self>,
        id: VertexId,
        vertex: &Vertex,
        actions: &[Action],
        inputs: &[Arc<Output>],
    ) -> Result<Arc<Output>> {
        let linked =
            !actions.is_empty() && actions.iter().all(|action| how(action).is_some_and(|how| how.link));
        let text = definition(&vertex.op)?;
        let epoch = format!("{:?}", self.epoch);
        let dest = if linked { "scratch" } else { inputs[0].key.as_str() };
        let job = Arc::clone(self);
        let (own_inputs, own_actions) = (inputs.to_vec(), actions.to_vec());
        // What is taken from each source, by content.
        let contents = blocking(move || {
            own_actions
                .iter()
                .map(|action| job.action_content(action, &own_inputs))
                .collect::<Result<Vec<_>>>()
        });
        let sources: Vec<&str> = inputs.iter().skip(1).map(|input| input.key.as_str()).collect();
        let mut keys = Keys::default();
        keys.parts.insert("operation".to_owned(), text.clone());
        keys.parts.insert("below".to_owned(), dest.to_owned());
        let local = inputs.iter().skip(1).any(|input| input.tree.is_some());
        if !local {
            keys.all.push(digest_of(&["files", &text, dest, &epoch, &sources.join(",")]));
            if sources.is_empty() {
                keys.identity.clone_from(&keys.all[0]);
            } else if !vertex.no_cache
                && let Some(output) = self.quick(&keys.all[0], &inputs[0]).await?
            {
                return Ok(output);
            }
        }
        if keys.identity.is_empty() {
            let contents = contents.await?.join(",");
            let key = digest_of(&["files", &text, dest, &epoch, &contents]);
            keys.parts.insert("content".to_owned(), contents);
            keys.identity.clone_from(&key);
            keys.all.push(key);
        }
        let below = if linked { Vec::new() } else { inputs[0].layers.clone() };
        let job = Arc::clone(self);
        let (all_inputs, actions, name) = (inputs.to_vec(), actions.to_vec(), vertex.name.clone());
        let identity = keys.identity.clone();
        let base = inputs[0].layers.clone();
        self.cached_or(id, vertex, keys, inputs, move |keys, listeners| {
            async move {
                // Nothing is said, but whoever joins must find it.
                let _listeners = listeners;
                let _turn =
                    job.solver.turns.clone().acquire_owned().await.map_err(|_closed| Error::Cancelled)?;
                let cancel = Cancel(Arc::default());
                let flag = Arc::clone(&cancel.0);
                blocking(move || {
                    let snapshot = crate::ids::new();
                    let fresh = Fresh::make(&job.solver.snapshots, &snapshot)?;
                    job.write(&fresh, &below, &actions, &all_inputs, flag)?;
                    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
                    let output = job.solver.finish(fresh, snapshot, &identity, &name, &base, &keys)?;
                    Ok(Arc::new(output))
                })
                .await
            }
            .boxed()
        })
        .await
    }

    /// A result by one key alone.
    async fn quick(&self, key: &str, below: &Output) -> Result<Option<Arc<Output>>> {
        let (solver, own, layers) = (Arc::clone(&self.solver), key.to_owned(), below.layers.clone());
        let found = blocking(move || solver.known(&own, &layers)).await?;
        Ok(found.map(Arc::new))
    }

    /// What an action takes from its source. Blocks.
    fn action_content(&self, action: &Action, inputs: &[Arc<Output>]) -> Result<String> {
        match action {
            Action::Copy { input, sources, how, .. } => {
                let tree = self.tree(&inputs[*input])?;
                let mut all = Vec::new();
                for source in sources {
                    all.extend(tree.select(pivot(source, how).1.as_str())?);
                }
                let exclude = Ignore::new(how.exclude.iter().map(String::as_str)).map_err(invalid)?;
                tree.digest(
                    &all,
                    &exclude,
                    matches!(how.chmod.as_deref(), Some(mode) if mode.bytes().all(|b| b.is_ascii_digit())),
                    how.parents,
                )
            }
            Action::Download { input, .. } => Ok(inputs[*input].key.clone()),
            Action::Text { .. } | Action::Directory { .. } => Ok(String::new()),
        }
    }

    /// Carries the actions out in a fresh snapshot. Blocks.
    fn write(
        &self,
        fresh: &Fresh,
        below: &[Layer],
        actions: &[Action],
        inputs: &[Arc<Output>],
        cancelled: Arc<AtomicBool>,
    ) -> Result<()> {
        let held = hold(&self.solver.store, &self.solver.mounts, &self.lease, below)?;
        let lower = Tree::layers(&held.lowers, Arc::clone(&self.solver.hashes))?;
        // Names are those of the stage, even where nothing else of it matters (`--link`).
        let names = if below.is_empty() {
            self.tree(&inputs[0])?
        } else {
            Arc::new(Tree::layers(&held.lowers, Arc::clone(&self.solver.hashes))?)
        };
        let upper = crate::tree::open_dir(&fresh.diff())?;
        let mut writer =
            Writer::new(if below.is_empty() { None } else { Some(&lower) }, upper, self.epoch, cancelled);
        for action in actions {
            match action {
                Action::Directory { path, owner } => {
                    let owner = if owner.is_empty() { (0, 0) } else { users::owner(owner, &names)? };
                    writer.workdir(path, owner)?;
                }
                Action::Text { name, data, destination, how } => {
                    let options = options(how, &names)?;
                    writer.file_of(destination, name, data.as_bytes(), &options)?;
                }
                Action::Download { input, destination, how } => {
                    let options = options(how, &names)?;
                    let file =
                        inputs[*input].file.as_ref().ok_or_else(|| invalid("a download is not there"))?;
                    let data =
                        std::fs::File::open(&file.path).doing(|| format!("open {}", file.path.display()))?;
                    writer.file_from(destination, &file.name, data, file.found.modified, &options)?;
                }
                Action::Copy { input, sources, destination, many, how } => {
                    let options = options(how, &names)?;
                    let tree = self.tree(&inputs[*input])?;
                    let mut all = Vec::new();
                    for source in sources {
                        let (strip, source) = pivot(source, how);
                        let mut found = tree.select(&source)?;
                        for one in &mut found {
                            if let Some(rest) = one.name.strip_prefix(&strip) {
                                one.name = rest.trim_start_matches('/').to_owned();
                            }
                        }
                        all.extend(found);
                    }
                    let many = *many || all.len() > 1;
                    if many && all.len() > 1 && !destination.ends_with('/') && !how.parents {
                        return Err(invalid(
                            "When using COPY with more than one source file, the destination must be a directory and end with a /",
                        ));
                    }
                    writer.copy(&tree, &all, destination, many, &options)?;
                }
            }
        }
        Ok(())
    }

    async fn run(
        self: &Arc<Self>,
        id: VertexId,
        vertex: &Vertex,
        run: &Run,
        inputs: &[Arc<Output>],
    ) -> Result<Arc<Output>> {
        let text = definition(&vertex.op)?;
        let mut keys = Keys::default();
        keys.parts.insert("operation".to_owned(), text.clone());
        keys.parts.insert("below".to_owned(), inputs[0].key.clone());
        let mut mounted = Vec::new();
        for mount in run.mounts.iter().filter(|mount| mount.kind != MountKind::Cache) {
            let Some(input) = mount.input else { continue };
            if inputs[input].tree.is_none() {
                mounted.push(inputs[input].key.clone());
                continue;
            }
            let (job, all, source) = (Arc::clone(self), inputs.to_vec(), mount.source.clone());
            let content = blocking(move || {
                let tree = job.tree(&all[input])?;
                let selected = tree.select(&source)?;
                tree.digest(&selected, &Ignore::default(), false, true)
            })
            .await?;
            keys.parts.insert(format!("mount {}", mount.target), content.clone());
            mounted.push(content);
        }
        let key = digest_of(&["run", &text, &inputs[0].key, &mounted.join(",")]);
        keys.identity.clone_from(&key);
        keys.all.push(key);
        let same = if vertex.no_cache {
            None
        } else {
            self.same_inputs(&text, &mounted, inputs, &keys.all[0]).await?
        };
        if let Some(output) = same {
            return Ok(output);
        }
        let job = Arc::clone(self);
        let (run, inputs_for, name) = (run.clone(), inputs.to_vec(), vertex.name.clone());
        let family = digest_of(&["run family", &text, &mounted.join(",")]);
        self.cached_or(id, vertex, keys, inputs, move |keys, listeners| {
            async move { job.execute(run, inputs_for, &name, keys, &family, listeners).await }.boxed()
        })
        .await
    }

    /// The same program on a file system that was made again but holds the same: what it did then holds.
    async fn same_inputs(
        &self,
        text: &str,
        mounted: &[String],
        inputs: &[Arc<Output>],
        key: &str,
    ) -> Result<Option<Arc<Output>>> {
        if self.solver.records.find(key)?.is_some() {
            return Ok(None);
        }
        let family = digest_of(&["run family", text, &mounted.join(",")]);
        if self.solver.records.find(&format!("family:{family}"))?.is_none() {
            return Ok(None);
        }
        let content = self.content(&inputs[0]).await?;
        let by_content = digest_of(&["run content", &family, &content]);
        let (solver, below, own) = (Arc::clone(&self.solver), inputs[0].layers.clone(), by_content);
        let found = blocking(move || solver.known(&own, &below)).await?;
        let Some(output) = found else { return Ok(None) };
        if let Some(snap) = &output.own {
            self.solver.records.alias(key, &snap.id)?;
        }
        Ok(Some(Arc::new(output)))
    }

    async fn content(&self, output: &Arc<Output>) -> Result<String> {
        let made = output.content.get_or_try_init(|| async {
            let (solver, lease, layers) =
                (Arc::clone(&self.solver), self.lease.clone(), output.layers.clone());
            blocking(move || solver.content_of(&lease, &layers)).await
        });
        made.await.cloned()
    }

    async fn execute(
        self: Arc<Self>,
        run: Run,
        inputs: Vec<Arc<Output>>,
        name: &str,
        keys: Vec<String>,
        family: &str,
        listeners: Arc<Listeners>,
    ) -> Result<Arc<Output>> {
        let _turn = self.solver.turns.clone().acquire_owned().await.map_err(|_closed| Error::Cancelled)?;
        let held_caches = self.solver.caches.take(&run, &self.cache_namespace).await?;
        let id = crate::ids::new();
        let job = Arc::clone(&self);
        let (own_run, own_inputs, own_id) = (run.clone(), inputs.clone(), id.clone());
        let paths = held_caches.paths.clone();
        let (fresh, replica, running) = blocking(move || {
            let fresh = Fresh::make(&job.solver.snapshots, &own_id)?;
            let held = hold(&job.solver.store, &job.solver.mounts, &job.lease, &own_inputs[0].layers)?;
            let root = Tree::layers(&held.lowers, Arc::clone(&job.solver.hashes))?;
            let replica = match job.solver.store.storage() {
                Storage::Copy => Some(
                    Replica::make(fresh.dir(), &held.lowers)
                        .doing(|| "copy the file system below a step".to_owned())?,
                ),
                _ => None,
            };
            let mut mounts = Vec::new();
            let mut also_held = Vec::new();
            for (index, mount) in own_run.mounts.iter().enumerate() {
                mounts.push(match (mount.kind, mount.input) {
                    (MountKind::Tmpfs, _) => Ready::Tmpfs,
                    (MountKind::Secret, _) => Ready::Nothing,
                    (MountKind::Ssh, _) if mount.required => {
                        return Err(Error::NotImplemented(
                            "RUN --mount=type=ssh is not built: agents cannot be forwarded to a step"
                                .to_owned(),
                        ));
                    }
                    (MountKind::Ssh, _) => Ready::Nothing,
                    (MountKind::Cache, _) => match paths.get(&index) {
                        Some(path) => Ready::Path(path.clone()),
                        None => Ready::Nothing,
                    },
                    (MountKind::Bind, Some(input)) => {
                        let output = &own_inputs[input];
                        if output.tree.is_some() {
                            let copy = job.materialise(output, &format!("{own_id}-{index}"))?;
                            let tree = Tree::layers(
                                &[Lower::directory(copy.clone())],
                                Arc::clone(&job.solver.hashes),
                            )?;
                            let path = resolve_source(&tree, &mount.source)?;
                            Ready::Layers { lowers: vec![Lower::directory(copy)], path }
                        } else {
                            let held =
                                hold(&job.solver.store, &job.solver.mounts, &job.lease, &output.layers)?;
                            let tree = Tree::layers(&held.lowers, Arc::clone(&job.solver.hashes))?;
                            let path = resolve_source(&tree, &mount.source)?;
                            let lowers = held.lowers.clone();
                            also_held.push(held);
                            if lowers.iter().all(|lower| lower.mount().is_none()) {
                                Ready::Layers { lowers, path }
                            } else {
                                // A layer that is a mount of this process has no path that others could use.
                                let copy = job.copy_of(&tree, &path, &format!("{own_id}-{index}"))?;
                                Ready::Layers {
                                    lowers: vec![Lower::directory(copy)],
                                    path: crate::tree::last(&path).to_owned(),
                                }
                            }
                        }
                    }
                    (MountKind::Bind, None) => Ready::Nothing,
                });
            }
            let task = Task {
                id: own_id.clone(),
                run: &own_run,
                lower: held.lowers.clone(),
                upper: fresh.diff(),
                work: fresh.work(),
                replica: replica.as_ref(),
                root: &root,
                mounts,
                secrets: &job.secrets,
            };
            let running = job.solver.executor.start(&task)?;
            Ok((fresh, replica, running))
        })
        .await?;
        let for_log = Arc::clone(&listeners);
        let exit = running
            .finish(move |stderr, data| {
                let listeners = Arc::clone(&for_log);
                let data = data.to_vec();
                async move { listeners.tell(stderr, data).await }.boxed()
            })
            .await?;
        drop(held_caches);
        if exit.exit_code != 0 {
            return Err(Error::Exit {
                command: run.around.shown.clone(),
                code: exit.exit_code,
                oom: exit.oom_killed,
            });
        }
        let by_content = if self.worth_hashing(&inputs[0]) {
            let content = self.content(&inputs[0]).await?;
            Some(digest_of(&["run content", family, &content]))
        } else {
            None
        };
        let (job, name, family) = (Arc::clone(&self), name.to_owned(), format!("family:{family}"));
        blocking(move || {
            for (index, _) in run.mounts.iter().enumerate() {
                crate::snapshot::remove_tree(&job.solver.tmp.join(format!("{id}-{index}")));
            }
            let identity = keys.first().cloned().unwrap_or_default();
            let mut all: Vec<&str> = keys.iter().map(String::as_str).collect();
            all.push(&family);
            all.extend(by_content.as_deref());
            let below = &inputs[0].layers;
            let output = match &replica {
                None => job.solver.finish(fresh, id, &identity, &name, below, &all)?,
                Some(replica) => {
                    let layer = job
                        .solver
                        .store
                        .adopt_replica(&job.lease, replica, &[])
                        .doing(|| "make a layer of a step's result".to_owned())?;
                    drop(fresh);
                    let layer = layer.map(|(descriptor, _)| (descriptor.digest, descriptor.size));
                    job.solver.record(Made::Layer(layer), id, &identity, &name, below, &all)?
                }
            };
            Ok(Arc::new(output))
        })
        .await
    }

    /// Whether an input's content is known for nothing, or cheap to find out: only layers of images, or small ones.
    fn worth_hashing(&self, output: &Output) -> bool {
        const CHEAP: u64 = 64 << 20;
        let mut total = 0;
        for layer in &output.layers {
            if let Layer::Snap(snap) = layer {
                total += self.solver.records.size(&snap.id).unwrap_or(u64::MAX / 1024);
            }
        }
        total <= CHEAP
    }

    /// A copy of a part of a tree under its last name, for a mount. Blocks.
    fn copy_of(&self, tree: &Tree, path: &str, name: &str) -> Result<PathBuf> {
        let target = self.solver.tmp.join(name);
        std::fs::create_dir(&target).doing(|| format!("create {}", target.display()))?;
        let all = tree.select(path)?;
        let mut writer = Writer::new(None, crate::tree::open_dir(&target)?, self.epoch, Arc::default());
        writer.copy(tree, &all, &format!("/{}", crate::tree::last(path)), false, &CopyOptions::default())?;
        Ok(target)
    }

    /// A copy of a context's visible files, for a mount. Blocks.
    fn materialise(&self, output: &Output, name: &str) -> Result<PathBuf> {
        let path = self.solver.tmp.join(name);
        std::fs::create_dir(&path).doing(|| format!("create {}", path.display()))?;
        let tree = self.tree(output)?;
        let all = tree.select("/")?;
        let mut writer = Writer::new(None, crate::tree::open_dir(&path)?, self.epoch, Arc::default());
        writer.copy(&tree, &all, "/", false, &CopyOptions::default())?;
        Ok(path)
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

fn how(action: &Action) -> Option<&How> {
    match action {
        Action::Copy { how, .. } | Action::Text { how, .. } | Action::Download { how, .. } => Some(how),
        Action::Directory { .. } => None,
    }
}

fn options(how: &How, names: &Tree) -> Result<CopyOptions> {
    Ok(CopyOptions {
        owner: how
            .owner
            .as_deref()
            .filter(|text| !text.is_empty())
            .map(|text| users::owner(text, names))
            .transpose()?,
        chmod: how.chmod.as_deref().filter(|text| !text.is_empty()).map(Chmod::parse).transpose()?,
        parents: how.parents,
        exclude: Ignore::new(how.exclude.iter().map(String::as_str)).map_err(invalid)?,
        unpack: how.unpack,
    })
}

/// With `--parents`, what stands before `/./` is not part of the copy's path.
fn pivot(source: &str, how: &How) -> (String, String) {
    match source.split_once("/./") {
        Some((before, after)) if how.parents => {
            let before = crate::pattern::clean(before);
            (before.clone(), crate::pattern::clean(&format!("{before}/{after}")))
        }
        _ => (String::new(), source.to_owned()),
    }
}
