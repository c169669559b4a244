//! Containers: their index, their locks, and who waits for what of them.
//!
//! Invariants: an operation that changes a container's life (start, exit, removal, update …) holds that container's
//! `lifecycle` lock and no other; `inner` is locked for moments only, never across an await. There is no lock over all
//! containers but that of the index, which is held for look-ups only.

mod attach;
mod audit;
mod borrowed;
mod create;
mod endpoint;
mod exec;
mod exit;
mod health;
mod inspect;
mod links;
mod list;
pub mod logging;
mod logs;
mod name_files;
mod names;
mod network;
mod plug;
mod project;
mod prune;
mod record;
mod remove;
mod restore;
mod runtime;
mod size;
mod start;
mod stats;
mod stop;
mod top;
mod update;
mod usage;
mod validate;
mod wait;
mod wires;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use brigantine_build::Builder;
use brigantine_image::model::chain_ids;
use brigantine_image::{ContainerUse, Digest, InUse};
use brigantine_network::Attachment;
use brigantine_shim::{AttachStream, Client};
use brigantine_sys::SealedExe;
use jiff::Timestamp;
use tokio::sync::oneshot;

pub use attach::{AttachRequest, Attached};
pub(crate) use borrowed::mount_sources;
pub use create::{CreateRequest, Created};
pub use exec::{ExecStart, StartedExec};
pub use list::ListOptions;
pub use logs::{LogRequest, Logs};
pub(crate) use name_files::extra_host;
pub(crate) use record::Record;
pub use record::Status;
pub use stats::StatsStream;
pub use usage::{InterfaceUse, Usage};
pub use wait::{Condition, Waited, Waiting};

use crate::config::Config;
use crate::db::{Batch, Db, Durability, Table};
use crate::error::Context;
use crate::events::{Events, Kind};
use crate::images::Images;
use crate::networks::Networks;
use crate::quota::Quotas;
use crate::runtimes::Runtimes;
use crate::sync::lock;
use crate::volumes::Volumes;
use crate::{Error, Result};

/// The containers service. All methods take a container by name, id or unambiguous id prefix.
#[derive(Debug)]
pub struct Containers {
    pub(crate) config: Arc<Config>,
    pub(crate) db: Db,
    pub(crate) events: Arc<Events>,
    pub(crate) images: Arc<Images>,
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) networks: Arc<Networks>,
    pub(crate) exe: Arc<SealedExe>,
    pub(crate) runtimes: Runtimes,
    quotas: Quotas,
    /// Its cache holds layers, too.
    builder: Builder,
    index: Mutex<Index>,
    execs: Mutex<HashMap<String, Arc<exec::Exec>>>,
}

#[derive(Debug, Default)]
struct Index {
    by_id: BTreeMap<String, Arc<Container>>,
    /// Names, taken before the container exists and given back after it is gone.
    names: HashMap<String, String>,
}

/// One container in memory.
#[derive(Debug)]
pub(crate) struct Container {
    pub id: String,
    pub project: Option<String>,
    pub lifecycle: tokio::sync::Mutex<()>,
    inner: Mutex<Inner>,
}

/// What of a container changes.
#[derive(Debug)]
pub(crate) struct Inner {
    pub record: Record,
    /// There while a process of it exists.
    pub live: Option<Arc<Live>>,
    /// Clients that attached before the start.
    pub attaching: Vec<AttachStream>,
    pub waiters: Vec<(Condition, oneshot::Sender<Waited>)>,
    /// Somebody asked for the present run to end: no restart.
    pub stop_requested: bool,
    /// Set while a restart goes through a stop: no removal of an auto-removed container.
    pub restarting_by_request: bool,
    pub restart: Restart,
    pub health: Option<health::Health>,
    pub removed: bool,
}

/// The restart policy's memory.
#[derive(Debug, Default)]
pub(crate) struct Restart {
    /// How long the last wait was.
    pub delay: std::time::Duration,
    /// Failed runs in a row.
    pub failures: i64,
    /// Ends the wait for the next restart.
    pub cancel: Option<oneshot::Sender<()>>,
}

/// A running container's process and plumbing.
#[derive(Debug)]
pub(crate) struct Live {
    pub client: Client,
    pub pid: i32,
    pub started_at: Timestamp,
    sandbox: Mutex<Arc<Sandbox>>,
}

/// What the engine writes beside the shim's socket: which networks a running container is on.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Sandbox {
    /// `None` for the host's network, another container's, or none at all.
    #[serde(default)]
    pub attachment: Option<Attachment>,
    /// The attachment's interfaces by network name.
    #[serde(default)]
    pub networks: Vec<String>,
    /// Endpoint ids by network name.
    #[serde(default)]
    pub endpoints: BTreeMap<String, String>,
    /// Its questions for names come to the engine.
    #[serde(default)]
    pub named: bool,
    /// The network helper keeps sockets for it.
    #[serde(default)]
    pub held: bool,
}

impl Container {
    fn new(record: Record) -> Arc<Self> {
        Arc::new(Self {
            id: record.id.clone(),
            project: record.project.clone(),
            lifecycle: tokio::sync::Mutex::new(()),
            inner: Mutex::new(Inner {
                record,
                live: None,
                attaching: Vec::new(),
                waiters: Vec::new(),
                stop_requested: false,
                restarting_by_request: false,
                restart: Restart::default(),
                health: None,
                removed: false,
            }),
        })
    }

    /// Looks at or changes the container for a moment.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut Inner) -> T) -> T {
        look(&mut lock(&self.inner))
    }

    pub(crate) fn record(&self) -> Record {
        self.with(|inner| inner.record.clone())
    }

    pub(crate) fn name(&self) -> String {
        self.with(|inner| inner.record.name.clone())
    }

    pub(crate) fn status(&self) -> Status {
        self.with(|inner| inner.record.state.status)
    }

    pub(crate) fn live(&self) -> Option<Arc<Live>> {
        self.with(|inner| inner.live.clone())
    }

    /// The running process, or docker's 409.
    pub(crate) fn running(&self) -> Result<Arc<Live>> {
        self.live().ok_or_else(|| Error::conflict(format!("container {} is not running", self.id)))
    }
}

impl Live {
    fn new(client: Client, pid: i32, started_at: Timestamp, sandbox: Sandbox) -> Self {
        Self { client, pid, started_at, sandbox: Mutex::new(Arc::new(sandbox)) }
    }

    /// Where it is connected, as of now.
    pub(crate) fn sandbox(&self) -> Arc<Sandbox> {
        Arc::clone(&lock(&self.sandbox))
    }

    /// After a connection was made or ended.
    fn connected(&self, sandbox: Sandbox) {
        *lock(&self.sandbox) = Arc::new(sandbox);
    }

    /// Asks the container's shim something, off the asynchronous threads.
    pub(crate) async fn ask<T: Send + 'static>(
        self: &Arc<Self>,
        question: impl FnOnce(&Client) -> Result<T, brigantine_shim::ClientError> + Send + 'static,
    ) -> Result<T, ShimError> {
        let live = Arc::clone(self);
        match tokio::task::spawn_blocking(move || question(&live.client)).await {
            Ok(answer) => answer.map_err(ShimError::Client),
            Err(error) => Err(ShimError::Task(error)),
        }
    }
}

/// A question to a shim failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShimError {
    #[error(transparent)]
    Client(brigantine_shim::ClientError),
    #[error("a task of the engine ended early")]
    Task(#[source] tokio::task::JoinError),
}

impl ShimError {
    /// The container or exec has ended.
    pub(crate) fn is_gone(&self) -> bool {
        use brigantine_shim::{ClientError, FailureKind};
        match self {
            Self::Client(ClientError::Unreachable { .. }) => true,
            // It ended while it was being asked; one that is only slow answers in the end, or the time is up.
            Self::Client(ClientError::Broken { source, .. }) => {
                use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
                matches!(source.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
            }
            Self::Client(ClientError::Refused(failure)) => {
                matches!(failure.kind, FailureKind::NotRunning | FailureKind::NoSuchExec)
            }
            Self::Client(ClientError::Unexpected { .. }) | Self::Task(_) => false,
        }
    }
}

/// What a container needs of an image.
#[derive(Debug, Clone)]
pub struct ImageUse {
    pub container: String,
    /// The image's id.
    pub image: String,
    /// Diff ids, also of an image that is gone.
    pub layers: Vec<String>,
    pub running: bool,
}

impl Containers {
    #[expect(clippy::too_many_arguments, reason = "each is one of the services that containers need")]
    pub(crate) fn new(
        config: Arc<Config>,
        db: Db,
        events: Arc<Events>,
        images: Arc<Images>,
        volumes: Arc<Volumes>,
        networks: Arc<Networks>,
        exe: Arc<SealedExe>,
        builder: Builder,
    ) -> Arc<Self> {
        Arc::new(Self {
            runtimes: Runtimes::new(config.runtimes.clone()),
            quotas: Quotas::new(config.data_root.clone()),
            config,
            db,
            events,
            images,
            volumes,
            networks,
            exe,
            builder,
            index: Mutex::new(Index::default()),
            execs: Mutex::new(HashMap::new()),
        })
    }

    /// The OCI runtimes that are configured.
    pub fn runtimes(&self) -> &Runtimes {
        &self.runtimes
    }

    /// Files of a container that survive a reboot.
    pub(crate) fn dir(&self, id: &str) -> PathBuf {
        self.config.data_root.join("containers").join(id)
    }

    /// The shim's directory of a running container.
    pub(crate) fn run_dir(&self, id: &str) -> PathBuf {
        self.config.exec_root.join("c").join(id)
    }

    pub(crate) fn exit_path(&self, id: &str) -> PathBuf {
        self.dir(id).join("exit.json")
    }

    /// Finds a container: full id, then exact name, then unambiguous id prefix.
    pub(crate) fn find(&self, reference: &str) -> Result<Arc<Container>> {
        self.find_among(reference, |_all| true)
    }

    /// The same among those that are `wanted`; the others might as well not be there.
    fn find_among(&self, reference: &str, wanted: impl Fn(&Container) -> bool) -> Result<Arc<Container>> {
        let index = lock(&self.index);
        if let Some(container) = index.by_id.get(reference).filter(|container| wanted(container)) {
            return Ok(Arc::clone(container));
        }
        let name = reference.strip_prefix('/').unwrap_or(reference);
        let named = index.names.get(name).and_then(|id| index.by_id.get(id));
        if let Some(container) = named.filter(|container| wanted(container)) {
            return Ok(Arc::clone(container));
        }
        let unknown = || Error::not_found(format!("No such container: {reference}"));
        if reference.is_empty() || !reference.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(unknown());
        }
        let mut matching = index
            .by_id
            .range(reference.to_owned()..)
            .take_while(|(id, _)| id.starts_with(reference))
            .map(|(_, c)| c)
            .filter(|container| wanted(container));
        match (matching.next(), matching.next()) {
            (Some(only), None) => Ok(Arc::clone(only)),
            (Some(_), Some(_)) => {
                Err(Error::invalid(format!("multiple IDs found with provided prefix: {reference}")))
            }
            (None, _) => Err(unknown()),
        }
    }

    pub(crate) fn all(&self) -> Vec<Arc<Container>> {
        lock(&self.index).by_id.values().cloned().collect()
    }

    /// The id behind a name, id or prefix.
    pub fn resolve(&self, reference: &str) -> Result<String> {
        Ok(self.find(reference)?.id.clone())
    }

    /// How many containers are running, paused and stopped.
    pub fn counts(&self) -> (usize, usize, usize) {
        self.count(|_all| true)
    }

    fn count(&self, wanted: impl Fn(&Container) -> bool) -> (usize, usize, usize) {
        let all = self.all();
        let wanted = all.iter().filter(|container| wanted(container));
        wanted.fold((0, 0, 0), |(running, paused, stopped), container| match container.status() {
            Status::Running | Status::Restarting => (running + 1, paused, stopped),
            Status::Paused => (running, paused + 1, stopped),
            _ => (running, paused, stopped + 1),
        })
    }

    /// Which containers were made from which image: `(container id, image id, is up)`.
    pub fn image_uses(&self) -> Vec<ImageUse> {
        let mut uses = Vec::new();
        for container in self.all() {
            container.with(|inner| {
                let mut note = |image: &str, layers: &[String]| {
                    uses.push(ImageUse {
                        container: inner.record.id.clone(),
                        image: image.to_owned(),
                        layers: layers.to_vec(),
                        running: inner.record.state.status.is_up(),
                    });
                };
                note(&inner.record.image_id, &inner.record.layers);
                for mount in inner.record.mounts.iter().filter(|mount| !mount.image.is_empty()) {
                    note(&mount.image, &mount.layers);
                }
            });
        }
        uses
    }

    /// What containers and the builder's cache use of the image store, for it to spare. Blocks.
    pub fn images_in_use(&self) -> InUse {
        let mut in_use = InUse::default();
        in_use.layers.extend(self.builder.held_layers());
        for used in self.image_uses() {
            let Ok(id) = used.image.parse::<Digest>() else { continue };
            let mut layers: Vec<Digest> = used.layers.iter().filter_map(|layer| layer.parse().ok()).collect();
            // Records of an earlier version name no layers.
            if layers.is_empty()
                && let Ok(image) = self.images.store().image(&id)
            {
                layers.clone_from(&image.config.rootfs.diff_ids);
            }
            in_use.chains.extend(chain_ids(&layers).pop());
            in_use.layers.extend(layers);
            let ImageUse { container, running, .. } = used;
            in_use.images.entry(id).or_default().push(ContainerUse { container, running });
        }
        in_use
    }

    /// Gives back the layers of an image that was removed by force while containers used it, once none does.
    pub(super) async fn collect_layers_of(self: &Arc<Self>, images: Vec<String>) {
        let containers = Arc::clone(self);
        let any_gone = crate::blocking(move || {
            let store = containers.images.store();
            let is_gone = |image: &String| {
                matches!(store.resolve_id(image), Err(brigantine_image::Error::NoSuchImage(_)))
            };
            Ok(images.iter().any(is_gone))
        });
        if any_gone.await.unwrap_or_default() {
            self.collect_layers().await;
        }
    }

    /// Gives back what nothing in the image store is needed for any more.
    pub async fn collect_layers(self: &Arc<Self>) {
        let containers = Arc::clone(self);
        let collected = crate::blocking(move || {
            containers.images.forget();
            Ok(containers.images.store().gc(&containers.images_in_use())?)
        });
        match collected.await {
            Ok(bytes) => tracing::debug!(bytes, "collected layers that nothing uses"),
            // They go with the next collection; what they were used for is gone all the same.
            Err(error) => tracing::warn!(error = error.report(), "collect layers that nothing uses"),
        }
    }

    /// Takes a name for `id`, or says who has it.
    fn take_name(&self, name: &str, id: &str) -> Result<()> {
        let mut index = lock(&self.index);
        if let Some(owner) = index.names.get(name) {
            return Err(Error::conflict(format!(
                "Conflict. The container name \"/{name}\" is already in use by container \"{owner}\". You have to remove (or rename) that container to be able to reuse that name."
            )));
        }
        index.names.insert(name.to_owned(), id.to_owned());
        Ok(())
    }

    fn give_name_back(&self, name: &str, id: &str) {
        let mut index = lock(&self.index);
        if index.names.get(name).is_some_and(|owner| owner == id) {
            index.names.remove(name);
        }
    }

    fn insert(&self, container: Arc<Container>) {
        lock(&self.index).by_id.insert(container.id.clone(), container);
    }

    /// Publishes an event with the container's own attributes and `more`.
    pub(crate) fn publish(&self, container: &Container, action: impl Into<String>, more: &[(&str, String)]) {
        let mut attributes = container.with(|inner| inner.record.event_attributes());
        for (name, value) in more {
            attributes.insert((*name).to_owned(), value.clone());
        }
        let project = container.project.clone();
        self.events.publish_of(project, Kind::Container, action, container.id.clone(), attributes);
    }

    /// Stores the container's record as it is now.
    pub(crate) async fn persist(&self, container: &Container, durability: Durability) -> Result<()> {
        let what = || format!("store container {}", container.id);
        let batch = container.with(|inner| {
            if inner.removed {
                return Ok(None);
            }
            Batch::new().put(Table::Containers, &inner.record.id, &inner.record.name, &inner.record).map(Some)
        });
        match batch.doing(what)? {
            Some(batch) => self.db.apply(batch, durability).await.doing(what),
            None => Ok(()),
        }
    }

    /// The same without waiting: for what the next start of the engine can find out by itself.
    pub(crate) fn note(&self, container: &Container) {
        let batch = container.with(|inner| {
            if inner.removed {
                return Ok(None);
            }
            Batch::new().put(Table::Containers, &inner.record.id, &inner.record.name, &inner.record).map(Some)
        });
        match batch {
            Ok(Some(batch)) => self.db.post(batch),
            Ok(None) => {}
            Err(error) => tracing::error!(container = container.id, %error, "store the container's state"),
        }
    }
}
