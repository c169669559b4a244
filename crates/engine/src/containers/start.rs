//! Starting a container: sandbox and specification side by side, then the shim. A failure at any step leaves nothing.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigantine_image::Lower;
use brigantine_shim::{AttachStream, Client, ConsoleSize, Inherited, OtherRuntime, SpawnError, Spawned};
use brigantine_sys::SealedExe;

use super::borrowed::{Borrowed, mount_sources};
use super::links::Link;
use super::wires::Wires;
use super::{Container, Containers, Live, Record, Sandbox, Status, name_files, names};
use crate::config::Config;
use crate::error::Context;
use crate::images::Images;
use crate::networks::Networks;
use crate::own::Own;
use crate::spec::{self, Namespace};
use crate::volumes::Volumes;
use crate::{Class, Error, Result, users};

/// The engine's own note beside the shim's socket.
pub(super) const SANDBOX_FILE: &str = "engine.json";

/// Everything a start needs, taken under the container's lock and used on a thread that may block.
pub(super) struct Plan {
    pub record: Record,
    pub dir: PathBuf,
    pub run_dir: PathBuf,
    pub names_dir: PathBuf,
    pub network: Namespace,
    pub pid: Namespace,
    pub ipc: Namespace,
    pub links: Vec<Link>,
    pub attaching: Vec<AttachStream>,
    /// Aliases of links on networks with names, and the ids they stand for.
    pub aliases: BTreeMap<String, String>,
    pub config: Arc<Config>,
    pub images: Arc<Images>,
    pub volumes: Arc<Volumes>,
    pub networks: Arc<Networks>,
    pub exe: Arc<SealedExe>,
    /// The own runtime when there is none.
    pub runtime: Option<OtherRuntime>,
}

/// A start that did not happen.
pub(super) struct StartFailure {
    pub error: Error,
    /// What docker records as the exit status.
    pub exit_code: i32,
}

impl From<Error> for StartFailure {
    fn from(error: Error) -> Self {
        Self { error, exit_code: 128 }
    }
}

struct Launched {
    live: Live,
    events: UnixStream,
}

impl Containers {
    /// Starts a container; 304 if it runs.
    pub async fn start(self: &Arc<Self>, reference: &str) -> Result<()> {
        let container = self.find(reference)?;
        let _lifecycle = container.lifecycle.lock().await;
        self.start_locked(&container).await
    }

    /// The same for a caller that holds the container's lock.
    pub(super) async fn start_locked(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        container.with(|inner| {
            if inner.removed {
                return Err(Error::not_found(format!("No such container: {}", container.id)));
            }
            match inner.record.state.status {
                Status::Paused => {
                    Err(Error::conflict("cannot start a paused container, try unpause instead"))
                }
                Status::Removing | Status::Dead => {
                    Err(Error::conflict("container is marked for removal and cannot be started"))
                }
                Status::Running => {
                    Err(Error::not_modified(format!("container {} is already running", container.id)))
                }
                Status::Created | Status::Exited | Status::Restarting => {
                    drop(inner.restart.cancel.take());
                    Ok(())
                }
            }
        })?;
        let plan = match self.plan(container) {
            Ok(plan) => plan,
            Err(error) => return Err(self.start_failed(container, error.into()).await),
        };
        let launched = match tokio::task::spawn_blocking(move || launch(plan)).await {
            Ok(Ok(launched)) => launched,
            Ok(Err(failure)) => return Err(self.start_failed(container, failure).await),
            Err(error) => {
                let error = Error::internal("the start ended early").because(error);
                return Err(self.start_failed(container, error.into()).await);
            }
        };
        let Launched { live, events } = launched;
        let live = Arc::new(live);
        let was_stopped = container.with(|inner| {
            let state = &mut inner.record.state;
            state.status = Status::Running;
            state.pid = live.pid;
            state.started_at = Some(live.started_at);
            state.exit_code = 0;
            state.error.clear();
            state.oom_killed = false;
            inner.live = Some(Arc::clone(&live));
            inner.stop_requested = false;
            std::mem::take(&mut inner.record.stopped_by_request)
        });
        if was_stopped {
            self.persist(container, crate::db::Durability::Written).await?;
        } else {
            self.note(container);
        }
        for (network, endpoint) in &live.sandbox().endpoints {
            self.network_event(container, "connect", network, endpoint);
        }
        self.volumes.tell_use("mount", &container.id, &container.record().mounts);
        self.publish(container, "start", &[]);
        self.tell_links(container, &live);
        self.tell_aliases(container).await;
        self.watch(Arc::clone(container), Arc::clone(&live), events);
        self.begin_health_checks(container);
        Ok(())
    }

    fn plan(&self, container: &Container) -> Result<Plan> {
        let record = container.record();
        self.check_confined(&record)?;
        let of = |mode: Option<&str>, what: &str| -> Result<Option<(Arc<Container>, i32)>> {
            let Some(reference) = mode.and_then(|mode| mode.strip_prefix("container:")) else {
                return Ok(None);
            };
            let other = self.find(reference)?;
            let live = other.live().ok_or_else(|| {
                Error::conflict(format!("cannot join {what} of a non running container: {}", other.id))
            })?;
            Ok(Some((other, live.pid)))
        };
        let namespace = |mode: Option<&str>, what: &str| -> Result<Namespace> {
            Ok(match (mode, of(mode, what)?) {
                (_, Some((_, pid))) => Namespace::Of(pid),
                (Some("host"), None) => Namespace::Host,
                _ => Namespace::Private,
            })
        };
        let shared = of(Some(record.network_mode()), "network")?;
        let names_dir =
            shared.as_ref().map_or_else(|| self.dir(&record.id), |(other, _)| self.dir(&other.id));
        let host = &record.host_config;
        self.check_ipc_donor(host.ipc_mode.as_deref())?;
        Ok(Plan {
            aliases: self.aliases(&record),
            network: namespace(Some(record.network_mode()), "network")?,
            pid: namespace(host.pid_mode.as_deref(), "PID")?,
            ipc: namespace(host.ipc_mode.as_deref(), "IPC")?,
            links: self.follow_links(&record)?,
            names_dir,
            dir: self.dir(&record.id),
            run_dir: self.run_dir(&record.id),
            runtime: self.runtimes.choose(host.runtime.as_deref())?,
            attaching: container.with(|inner| std::mem::take(&mut inner.attaching)),
            record,
            config: Arc::clone(&self.config),
            images: Arc::clone(&self.images),
            volumes: Arc::clone(&self.volumes),
            networks: Arc::clone(&self.networks),
            exe: Arc::clone(&self.exe),
        })
    }

    /// A container keeps its shared memory to itself unless it was made with `--ipc shareable`.
    fn check_ipc_donor(&self, mode: Option<&str>) -> Result<()> {
        let Some(reference) = mode.and_then(|mode| mode.strip_prefix("container:")) else { return Ok(()) };
        let donor = self.find(reference)?;
        let shares = donor.with(|inner| inner.record.host_config.ipc_mode.as_deref() == Some("shareable"));
        if shares {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "cannot join IPC of a container: {}: non-shareable IPC (hint: use IpcMode:shareable for the donor container)",
            donor.id
        )))
    }

    /// Containers that link to this one on the default bridge learn its address.
    fn tell_links(&self, container: &Container, live: &Live) {
        let sandbox = live.sandbox();
        let at = sandbox.networks.iter().position(|name| name == "bridge");
        let interface = at.and_then(|at| sandbox.attachment.as_ref()?.interfaces.get(at));
        if let Some(address) = interface.and_then(brigantine_network::Interface::ipv4) {
            self.refresh_links(&container.record(), address.into());
        }
    }

    /// Records a failed start; an auto-removed container goes.
    async fn start_failed(self: &Arc<Self>, container: &Arc<Container>, failure: StartFailure) -> Error {
        let auto_remove = container.with(|inner| {
            let state = &mut inner.record.state;
            if state.status == Status::Restarting {
                state.status = Status::Exited;
            }
            state.exit_code = failure.exit_code;
            state.error = failure.error.report();
            inner.attaching.clear();
            inner.record.auto_remove()
        });
        self.note(container);
        if auto_remove && let Err(error) = self.remove_locked(container, true).await {
            tracing::warn!(
                container = container.id,
                error = error.report(),
                "remove a container that did not start"
            );
        }
        failure.error
    }
}

/// The work of a start that blocks. Whatever was made is unmade when a later step fails.
fn launch(plan: Plan) -> Result<Launched, StartFailure> {
    let record = &plan.record;
    let layers = plan.images.layers(&record.image_id, &record.layers)?;
    let own = Own::find(&plan.dir, &layers, plan.images.copies()).ready()?;
    plan.volumes.mount_for(&record.id, &record.mounts)?;
    let mut borrowed = Borrowed::default();
    let sources = match sources(&plan, &mut borrowed) {
        Ok(sources) => sources,
        Err(error) => {
            plan.volumes.unmount_for(&record.id);
            drop(borrowed);
            if let Err(error) = crate::volumes::remove_tree(&plan.run_dir) {
                tracing::warn!(
                    container = record.id,
                    error = error.report(),
                    "clean up after a failed start"
                );
            }
            return Err(error.into());
        }
    };
    let wires = Wires::lay(&plan)?;
    let outcome = connect_and_spawn(&plan, &layers, &own, sources, &wires);
    // The container has its own by now, or will have none.
    drop(borrowed);
    match outcome {
        Ok((spawned, client, sandbox, events)) => {
            let started_at =
                spawned.started_at.as_str().parse().unwrap_or_else(|_unreadable| jiff::Timestamp::now());
            Ok(Launched { live: Live::new(client, spawned.container_pid, started_at, sandbox), events })
        }
        Err(failure) => {
            plan.networks.plumbing().forget(&record.id);
            if let Err(error) = plan.networks.plumbing().disconnect(&record.id) {
                tracing::warn!(
                    container = record.id,
                    error = error.report(),
                    "disconnect after a failed start"
                );
            }
            wires.give_back(&plan.networks);
            plan.volumes.unmount_for(&record.id);
            if let Err(error) = crate::volumes::remove_tree(&plan.run_dir) {
                tracing::warn!(
                    container = record.id,
                    error = error.report(),
                    "clean up after a failed start"
                );
            }
            Err(failure)
        }
    }
}

/// Where on the host the container's mounts come from.
struct Sources {
    mounts: Vec<PathBuf>,
    /// `/dev/shm` of the container whose IPC namespace is joined.
    shared_memory: Option<PathBuf>,
}

fn sources(plan: &Plan, borrowed: &mut Borrowed) -> Result<Sources> {
    let shared_memory = match plan.ipc {
        Namespace::Of(pid) => Some(borrowed.shared_memory(pid, &plan.run_dir)?),
        Namespace::Host | Namespace::Private => None,
    };
    let mounts = mount_sources(&plan.record, &plan.volumes, |mount| {
        borrowed.image(mount, &plan.images, &plan.run_dir)
    })?;
    Ok(Sources { mounts, shared_memory })
}

type Outcome = (Spawned, Client, Sandbox, UnixStream);

fn connect_and_spawn(
    plan: &Plan,
    layers: &Arc<[Lower]>,
    own: &Own,
    sources: Sources,
    wires: &Wires,
) -> Result<Outcome, StartFailure> {
    let record = &plan.record;
    // The kernel's work for the sandbox and ours for the specification go side by side.
    let (sandbox, prepared) = std::thread::scope(|scope| {
        let sandbox = wires.spec.as_ref().map(|spec| {
            let plumbing = plan.networks.plumbing();
            scope.spawn(move || plumbing.connect(spec))
        });
        let prepared = prepare(plan, own, sources, wires);
        let sandbox = sandbox.map(|thread| {
            thread.join().unwrap_or_else(|_panic| Err(Error::internal("connecting the network ended early")))
        });
        (sandbox, prepared)
    });
    let mut sandbox = sandbox.transpose()?;
    let config = prepared?;
    let note = Sandbox {
        attachment: sandbox.as_ref().map(|sandbox| sandbox.attachment.clone()),
        networks: wires.networks.clone(),
        endpoints: wires.endpoints.clone(),
        named: wires.has_names,
        held: false,
    };
    if let Some(sandbox) = &mut sandbox {
        name_files::add_own(plan, &sandbox.attachment)?;
        let resident = wires
            .has_names
            .then(|| names::resident(&plan.networks, &plan.config, record, plan.aliases.clone(), &note));
        names::enter(&plan.networks.plumbing(), resident, sandbox)?;
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&plan.run_dir)
        .doing(|| format!("create directory {}", plan.run_dir.display()))?;
    write_note(&plan.run_dir, &note)?;

    let (events, theirs) = UnixStream::pair().doing(|| "make a socket pair".to_owned())?;
    let attach = plan
        .attaching
        .iter()
        .map(|attach| {
            Ok(AttachStream { stream: attach.stream.try_clone()?, options: attach.options.clone() })
        })
        .collect::<std::io::Result<Vec<_>>>()
        .doing(|| "hand over the attached streams".to_owned())?;
    let (netns, held) = match sandbox.take() {
        Some(sandbox) => (Some(sandbox.netns), sandbox.held),
        None => (None, Vec::new()),
    };
    // A copy has none of them in it.
    let layers = if own.replica().is_some() { &[] } else { &layers[..] };
    let layers = layers
        .iter()
        .enumerate()
        .filter_map(|(position, layer)| Some((position, layer.mount()?)))
        .map(|(position, mount)| Ok((position, mount.try_clone()?)))
        .collect::<std::io::Result<Vec<_>>>()
        .doing(|| "hand over the image's layers".to_owned())?;
    let inherited = Inherited { netns, layers, held, attach, events: Some(theirs) };
    let spawned = brigantine_shim::spawn(&plan.exe, &config, inherited).map_err(spawn_failure)?;
    let client = match Client::connect(&plan.run_dir) {
        Ok(client) => client,
        // So short-lived that it has ended, or lost: the events, or `find`, will tell.
        Err(error) => {
            return Err(Error::internal(format!("reach the monitor of container {}", record.id))
                .because(error)
                .into());
        }
    };
    Ok((spawned, client, note, events))
}

/// Replaces the engine's note about a running container.
pub(super) fn write_note(run_dir: &Path, note: &Sandbox) -> Result<()> {
    let text = serde_json::to_vec(note).doing(|| "describe the sandbox".to_owned())?;
    let (path, fresh) = (run_dir.join(SANDBOX_FILE), run_dir.join("engine.json.new"));
    std::fs::write(&fresh, text).doing(|| format!("write {}", fresh.display()))?;
    std::fs::rename(&fresh, &path).doing(|| format!("replace {}", path.display()))
}

/// Docker's text and exit status for the runtime's verdict.
fn spawn_failure(error: SpawnError) -> StartFailure {
    match error {
        SpawnError::Launch(failure) => {
            let exit_code = failure.exit_code();
            let class =
                if matches!(exit_code, 126 | 127) { Class::InvalidParameter } else { Class::Internal };
            let text = format!("failed to create task for container: {}: unknown", failure.message);
            StartFailure { error: Error::of(class, text), exit_code }
        }
        other => StartFailure {
            error: Error::internal("failed to create task for container").because(other),
            exit_code: 128,
        },
    }
}

/// Everything the shim is told.
fn prepare(plan: &Plan, own: &Own, sources: Sources, wires: &Wires) -> Result<brigantine_shim::Config> {
    let record = &plan.record;
    let host = &record.host_config;
    let root = own.look()?;
    let user = users::resolve(
        record.config.user.as_deref().unwrap_or_default(),
        host.group_add.as_deref().unwrap_or_default(),
        &root,
    )?;
    drop(root);
    let host_name = name_files::host_name();
    name_files::write(plan, wires, &host_name)?;
    let reaper = plan.dir.join("init");
    if host.init.unwrap_or(plan.config.init) {
        copy_reaper(&plan.config.runtime_exe, &reaper)?;
    }
    let uts = if host.uts_mode.as_deref() == Some("host") { Namespace::Host } else { Namespace::Private };
    let cgroup = match host.cgroupns_mode {
        Some(bollard_stubs::models::HostConfigCgroupnsModeEnum::HOST) => Namespace::Host,
        _ => Namespace::Private,
    };
    let mut spec = spec::build(&spec::Inputs {
        record,
        config: &plan.config,
        names_dir: &plan.names_dir,
        reaper: &reaper,
        user,
        network: plan.network.clone(),
        pid: plan.pid.clone(),
        ipc: plan.ipc.clone(),
        uts,
        cgroup,
        remap: record.remap(&plan.config),
        mount_sources: sources.mounts,
        shared_memory: sources.shared_memory,
        host_name: &host_name,
        link_variables: plan.links.iter().flat_map(|link| link.variables.iter().cloned()).collect(),
    })?;
    if let Some(requests) = host.device_requests.as_deref().filter(|all| !all.is_empty()) {
        crate::cdi::find(requests, &plan.config.cdi_dirs)?.apply(&mut spec)?;
    }
    match std::fs::remove_file(plan.dir.join("exit.json")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(
                Error::internal(format!("forget how container {} ended before", record.id)).because(error)
            );
        }
        _ => {}
    }
    let console = host.console_size.as_deref().and_then(|size| match *size {
        [height, width] if height > 0 && width > 0 => Some(ConsoleSize {
            height: u16::try_from(height).unwrap_or(u16::MAX),
            width: u16::try_from(width).unwrap_or(u16::MAX),
        }),
        _ => None,
    });
    Ok(brigantine_shim::Config {
        id: record.id.clone(),
        spec,
        rootfs: own.rootfs(),
        terminal: record.tty(),
        console_size: console,
        open_stdin: record.config.open_stdin.unwrap_or_default(),
        stdin_once: record.config.stdin_once.unwrap_or_default(),
        log: super::logging::monitor_config(record, &plan.dir, &host_name)?,
        exit_path: plan.dir.join("exit.json"),
        dir: plan.run_dir.clone(),
        systemd_cgroup: plan.config.systemd_cgroup,
        durable_exit: !record.auto_remove(),
        runtime: plan.runtime.clone(),
    })
}

/// The reaper is a file of the container's own: one that it may make writable (`CAP_SYS_ADMIN`) must not be
/// the executable that the host runs.
fn copy_reaper(exe: &Path, copy: &Path) -> Result<()> {
    let new = copy.with_extension("new");
    let copied = std::fs::copy(exe, &new).and_then(|_| std::fs::rename(&new, copy));
    copied.doing(|| format!("copy the init process {} to {}", exe.display(), copy.display()))
}
