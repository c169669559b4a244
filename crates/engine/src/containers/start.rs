//! Starting a container: sandbox and specification side by side, then the shim. A failure at any step leaves nothing.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigantine_image::Lower;
use brigantine_network::names::{
    DnsChoice, hostname_file, hosts_file, resolv_conf, resolv_conf_of_names, resolv_conf_on_host,
};
use brigantine_network::{InterfaceSpec, PortRequest, SandboxSpec};
use brigantine_shim::{AttachStream, Client, ConsoleSize, Inherited, SpawnError, Spawned};
use brigantine_sys::SealedExe;

use super::links::Link;
use super::{Container, Containers, Live, Record, Sandbox, Status, endpoint, names};
use crate::config::Config;
use crate::error::Context;
use crate::ids::new_id;
use crate::images::Images;
use crate::networks::Networks;
use crate::own::Own;
use crate::spec::{self, Namespace};
use crate::volumes::{MountKind, MountRecord, Volumes};
use crate::{Class, Error, Result, users};

/// The engine's own note beside the shim's socket.
pub(super) const SANDBOX_FILE: &str = "engine.json";

/// Everything a start needs, taken under the container's lock and used on a thread that may block.
struct Plan {
    record: Record,
    dir: PathBuf,
    run_dir: PathBuf,
    names_dir: PathBuf,
    network: Namespace,
    pid: Namespace,
    ipc: Namespace,
    links: Vec<Link>,
    attaching: Vec<AttachStream>,
    /// Aliases of links on networks with names, and the ids they stand for.
    aliases: BTreeMap<String, String>,
    config: Arc<Config>,
    images: Arc<Images>,
    volumes: Arc<Volumes>,
    networks: Arc<Networks>,
    exe: Arc<SealedExe>,
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
        Ok(Plan {
            aliases: self.aliases(&record),
            network: namespace(Some(record.network_mode()), "network")?,
            pid: namespace(host.pid_mode.as_deref(), "PID")?,
            ipc: namespace(host.ipc_mode.as_deref(), "IPC")?,
            links: self.follow_links(&record)?,
            names_dir,
            dir: self.dir(&record.id),
            run_dir: self.run_dir(&record.id),
            attaching: container.with(|inner| std::mem::take(&mut inner.attaching)),
            record,
            config: Arc::clone(&self.config),
            images: Arc::clone(&self.images),
            volumes: Arc::clone(&self.volumes),
            networks: Arc::clone(&self.networks),
            exe: Arc::clone(&self.exe),
        })
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

/// Images' files, mounted on the host for the moment of a start, in which the container takes them over.
struct ImageMounts(Vec<PathBuf>);

impl ImageMounts {
    /// Mounts what `mount` names below `run_dir`; returns where it is.
    fn mount(&mut self, mount: &MountRecord, images: &Images, run_dir: &Path) -> Result<PathBuf> {
        use rustix::mount::{MoveMountFlags, move_mount};
        let what = || format!("mount the image {}", mount.name);
        let mut layers = images.layers(&mount.image, &mount.layers)?.to_vec();
        let (dir, empty) = (run_dir.join(format!("image-{}", self.0.len())), run_dir.join("no-files"));
        for dir in [&dir, &empty] {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .doing(|| format!("create directory {}", dir.display()))?;
        }
        let root = if images.copies() {
            Own::find(run_dir, &layers, true).mount(false)?
        } else {
            // An overlay has two layers at least.
            layers.push(Lower::directory(empty));
            crate::rootfs::union(&layers)?
        };
        move_mount(&root, "", rustix::fs::CWD, &dir, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).doing(what)?;
        self.0.push(dir.clone());
        if mount.subpath.is_empty() { Ok(dir) } else { subpath(&dir, &mount.subpath) }
    }
}

/// Unmounts what a daemon that was killed during a start has left.
pub(super) fn unmount_images(run_dir: &Path) {
    for number in 0.. {
        let dir = run_dir.join(format!("image-{number}"));
        if !dir.exists() {
            return;
        }
        match rustix::mount::unmount(&dir, rustix::mount::UnmountFlags::DETACH) {
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => tracing::warn!(path = %dir.display(), %error, "unmount an image"),
        }
    }
}

impl Drop for ImageMounts {
    fn drop(&mut self) {
        for dir in &self.0 {
            if let Err(error) = rustix::mount::unmount(dir, rustix::mount::UnmountFlags::DETACH) {
                tracing::warn!(path = %dir.display(), %error, "unmount an image");
            }
        }
    }
}

/// The work of a start that blocks. Whatever was made is unmade when a later step fails.
fn launch(plan: Plan) -> Result<Launched, StartFailure> {
    let record = &plan.record;
    let layers = plan.images.layers(&record.image_id, &record.layers)?;
    let own = Own::find(&plan.dir, &layers, plan.images.copies()).ready()?;
    if own.replica().is_some() && record.remap(&plan.config).is_some() {
        return Err(Error::not_implemented(
            "--userns-remap needs overlay: containers whose files are plain copies (--storage=copy) cannot have it",
        )
        .into());
    }
    plan.volumes.mount_for(&record.id, &record.mounts)?;
    let mut mounted = ImageMounts(Vec::new());
    let mount_sources =
        match mount_sources(record, &plan.volumes, |mount| mounted.mount(mount, &plan.images, &plan.run_dir))
        {
            Ok(sources) => sources,
            Err(error) => {
                plan.volumes.unmount_for(&record.id);
                drop(mounted);
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
    let outcome = connect_and_spawn(&plan, &layers, &own, mount_sources, &wires);
    // The container has its own by now, or will have none.
    drop(mounted);
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

type Outcome = (Spawned, Client, Sandbox, UnixStream);

fn connect_and_spawn(
    plan: &Plan,
    layers: &Arc<[Lower]>,
    own: &Own,
    mount_sources: Vec<PathBuf>,
    wires: &Wires,
) -> Result<Outcome, StartFailure> {
    let record = &plan.record;
    // The kernel's work for the sandbox and ours for the specification go side by side.
    let (sandbox, prepared) = std::thread::scope(|scope| {
        let sandbox = wires.spec.as_ref().map(|spec| {
            let plumbing = plan.networks.plumbing();
            scope.spawn(move || plumbing.connect(spec))
        });
        let prepared = prepare(plan, own, mount_sources, wires);
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
    if let Some(sandbox) = &sandbox {
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
fn prepare(
    plan: &Plan,
    own: &Own,
    mount_sources: Vec<PathBuf>,
    wires: &Wires,
) -> Result<brigantine_shim::Config> {
    let record = &plan.record;
    let host = &record.host_config;
    let root = own.look()?;
    let user = users::resolve(
        record.config.user.as_deref().unwrap_or_default(),
        host.group_add.as_deref().unwrap_or_default(),
        &root,
    )?;
    drop(root);
    let host_name = host_name();
    write_names(plan, wires, &host_name)?;
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
        mount_sources,
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
    })
}

/// Host paths of the mounts; what `-v` names and is not there becomes a directory.
pub(crate) fn mount_sources(
    record: &Record,
    volumes: &Volumes,
    mut image: impl FnMut(&MountRecord) -> Result<PathBuf>,
) -> Result<Vec<PathBuf>> {
    record
        .mounts
        .iter()
        .map(|mount| match mount.kind {
            MountKind::Image => image(mount),
            MountKind::Tmpfs => Ok(PathBuf::new()),
            MountKind::Volume => {
                let source = volumes.source(&mount.name);
                if mount.subpath.is_empty() { Ok(source) } else { subpath(&source, &mount.subpath) }
            }
            MountKind::Bind => {
                let source = PathBuf::from(&mount.source);
                if mount.create_source && std::fs::symlink_metadata(&source).is_err() {
                    std::fs::create_dir_all(&source).map_err(|error| {
                        Error::internal(format!(
                            "error while creating mount source path '{}'",
                            source.display()
                        ))
                        .because(format!(
                            "mkdir {}: {}",
                            source.display(),
                            spec::plain(&error)
                        ))
                    })?;
                }
                if let Err(error) = std::fs::metadata(&source) {
                    return Err(Error::invalid(format!(
                        "invalid mount config for type \"bind\": bind source path does not exist: {}",
                        source.display()
                    ))
                    .because(error));
                }
                Ok(source)
            }
        })
        .collect()
}

/// A path below a volume, resolved so that links in the volume cannot lead out of it.
fn subpath(volume: &Path, subpath: &str) -> Result<PathBuf> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
    let what = || format!("subpath {subpath} of volume directory {}", volume.display());
    let root = rustix::fs::open(volume, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .doing(what)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
    openat2(root, subpath, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
        .map_err(|error| Error::invalid(what()).because(error))?;
    Ok(volume.join(subpath))
}

/// The container's interfaces as wanted, with addresses taken.
struct Wires {
    /// `None` when no sandbox of its own is made.
    spec: Option<SandboxSpec>,
    networks: Vec<String>,
    endpoints: BTreeMap<String, String>,
    /// Taken addresses by network id.
    taken: Vec<(String, IpAddr)>,
    /// Questions for names go to the engine.
    has_names: bool,
}

impl Wires {
    fn lay(plan: &Plan) -> Result<Self> {
        let mut wires = Self {
            spec: None,
            networks: Vec::new(),
            endpoints: BTreeMap::new(),
            taken: Vec::new(),
            has_names: false,
        };
        if plan.network != Namespace::Private {
            return Ok(wires);
        }
        if let Err(error) = wires.connect(plan) {
            wires.give_back(&plan.networks);
            return Err(error);
        }
        Ok(wires)
    }

    fn connect(&mut self, plan: &Plan) -> Result<()> {
        let record = &plan.record;
        let mut spec = SandboxSpec {
            id: record.id.clone(),
            name: record.name.clone(),
            owned: record.remap(&plan.config).is_some(),
            ..SandboxSpec::default()
        };
        // The network of the mode comes first: it has eth0.
        let mode = record.network_mode();
        let mut names: Vec<&String> = record.endpoints.keys().collect();
        names.sort_by_key(|name| name.as_str() != mode);
        let mut connected = Vec::new();
        for name in names {
            let network = plan.networks.find(name)?;
            let settings = &record.endpoints[name];
            let taken = |name: &str| spec.interfaces.iter().any(|one: &InterfaceSpec| one.name == name);
            let interface = endpoint::interface_name(settings, taken);
            let Some(interface) = endpoint::interface(&plan.networks, &network, settings, interface)? else {
                continue;
            };
            self.taken.extend(interface.addresses.iter().map(|net| (network.id.clone(), net.addr())));
            connected.push((network, interface.name.clone(), settings.gw_priority.unwrap_or_default()));
            spec.interfaces.push(interface);
            self.networks.push(name.clone());
            self.endpoints.insert(name.clone(), new_id());
        }
        let routes = endpoint::default_routes(connected.iter().map(|(network, interface, priority)| {
            endpoint::Exit { network, interface, priority: *priority }
        }));
        for interface in &mut spec.interfaces {
            interface.gateway =
                routes.ipv4.as_ref().filter(|route| route.0 == interface.name).map(|route| route.1);
            interface.gateway6 =
                routes.ipv6.as_ref().filter(|route| route.0 == interface.name).map(|route| route.1);
        }
        if !spec.interfaces.is_empty() {
            let exit =
                connected.iter().find(|one| routes.ipv4.as_ref().is_some_and(|route| route.0 == one.1));
            spec.ports = port_requests(record, &plan.config, exit.map(|(network, ..)| network))?;
        }
        self.has_names = names::has_names(&plan.networks, &self.networks);
        self.spec = Some(spec);
        Ok(())
    }

    fn addresses(&self) -> Vec<IpAddr> {
        self.taken.iter().map(|(_, address)| *address).collect()
    }

    fn give_back(&self, networks: &Networks) {
        for (network, address) in &self.taken {
            networks.give_address_back(network, *address);
        }
    }
}

/// Ports to publish: what is bound, and with `-P` everything else that is exposed. `exit` is the network that they are
/// published from.
pub(super) fn port_requests(
    record: &Record,
    config: &Config,
    exit: Option<&crate::networks::Record>,
) -> Result<Vec<PortRequest>> {
    let wrong = |port: &str| {
        let port = port.to_owned();
        move |error: brigantine_network::PortError| {
            Error::invalid(format!("invalid port specification: \"{port}\"")).because(error)
        }
    };
    let host = &record.host_config;
    let mut requests = Vec::new();
    let bindings: BTreeMap<_, _> = host.port_bindings.iter().flatten().collect();
    for (port, bindings) in &bindings {
        let bindings = bindings.as_deref().unwrap_or_default();
        if bindings.is_empty() {
            requests.push(PortRequest::from_binding(port, "", "").map_err(wrong(port))?);
        }
        for binding in bindings {
            let ip = binding.host_ip.as_deref().unwrap_or_default();
            let host_port = binding.host_port.as_deref().unwrap_or_default();
            requests.push(PortRequest::from_binding(port, ip, host_port).map_err(wrong(port))?);
        }
    }
    if host.publish_all_ports == Some(true) {
        let mut exposed: Vec<_> = record.config.exposed_ports.iter().flatten().collect();
        exposed.sort();
        for port in exposed {
            if !bindings.contains_key(port) {
                requests.push(PortRequest::from_binding(port, "", "").map_err(wrong(port))?);
            }
        }
    }
    let default = exit.and_then(crate::networks::Record::host_binding).or(config.default_ip);
    for request in &mut requests {
        request.host_ip = request.host_ip.or(default);
    }
    Ok(requests)
}

/// `name:address` or `name=address`; `host-gateway` stands for `gateway`.
pub(crate) fn extra_host(line: &str, gateway: Option<IpAddr>) -> Result<Option<(String, String)>> {
    let wrong = || Error::invalid(format!("bad format for add-host: \"{line}\""));
    let (name, address) = line.split_once('=').or_else(|| line.split_once(':')).ok_or_else(wrong)?;
    if name.is_empty() || name.contains(|c: char| c.is_whitespace()) {
        return Err(wrong());
    }
    if address == "host-gateway" {
        return Ok(gateway.map(|gateway| (name.to_owned(), gateway.to_string())));
    }
    let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
    bare.parse::<IpAddr>()
        .map_err(|_bad| Error::invalid(format!("invalid IP address in add-host: \"{address}\"")))?;
    Ok(Some((name.to_owned(), bare.to_owned())))
}

/// The reaper is a file of the container's own: one that it may make writable (`CAP_SYS_ADMIN`) must not be
/// the executable that the host runs.
fn copy_reaper(exe: &Path, copy: &Path) -> Result<()> {
    let new = copy.with_extension("new");
    let copied = std::fs::copy(exe, &new).and_then(|_| std::fs::rename(&new, copy));
    copied.doing(|| format!("copy the init process {} to {}", exe.display(), copy.display()))
}

/// `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf` of a container that has its own.
fn write_names(plan: &Plan, wires: &Wires, host_name: &str) -> Result<()> {
    if plan.names_dir != plan.dir {
        return Ok(());
    }
    let record = &plan.record;
    let host = &record.host_config;
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let gateway = plan.config.host_gateway.or_else(|| {
        let bridge = plan.networks.find("bridge").ok()?.bridge?;
        Some(IpAddr::V4(bridge.gateway))
    });
    let mut extra = host
        .extra_hosts
        .iter()
        .flatten()
        .filter_map(|line| extra_host(line, gateway).transpose())
        .collect::<Result<Vec<_>>>()?;
    extra.extend(plan.links.iter().map(|link| (link.names.join(" "), link.address.clone())));
    let hostname = record.config.hostname.as_deref().filter(|name| !name.is_empty()).unwrap_or(host_name);
    let choice = names::choice(record, &plan.config);
    let resolv = read("/etc/resolv.conf");
    let (hosts, resolv) = if plan.network == Namespace::Host {
        let mut hosts = read("/etc/hosts");
        for (name, address) in &extra {
            hosts.extend([address.as_str(), "\t", name.as_str(), "\n"]);
        }
        (hosts, resolv_conf_on_host(&resolv, &choice))
    } else {
        let domain = record.config.domainname.as_deref().unwrap_or_default();
        let resolv = if wires.has_names {
            resolv_conf_of_names(&resolv, &choice)
        } else {
            let has_ipv6 = wires.addresses().iter().any(IpAddr::is_ipv6);
            resolv_conf_of_host(&resolv, &choice, has_ipv6)
        };
        (hosts_file(&extra, &wires.addresses(), hostname, domain), resolv)
    };
    for (name, text) in [("hosts", hosts), ("hostname", hostname_file(hostname)), ("resolv.conf", resolv)] {
        let path = plan.dir.join(name);
        // In place: a running exec or a former mount may hold the file.
        std::fs::write(&path, text).doing(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// `/etc/resolv.conf` of a container that asks the host's servers itself.
pub(super) fn resolv_conf_of_host(host: &str, choice: &DnsChoice, ipv6: bool) -> String {
    let upstream = std::fs::read_to_string(brigantine_network::names::RESOLVED_UPSTREAM).ok();
    resolv_conf(host, upstream.as_deref(), choice, ipv6)
}

/// The host's own name.
pub(super) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_hosts_in_both_spellings() {
        let gateway = Some("172.30.0.1".parse().unwrap());
        assert_eq!(extra_host("db:10.0.0.1", gateway).unwrap().unwrap(), ("db".into(), "10.0.0.1".into()));
        assert_eq!(extra_host("db=[::1]", gateway).unwrap().unwrap(), ("db".into(), "::1".into()));
        assert_eq!(extra_host("h:host-gateway", gateway).unwrap().unwrap().1, "172.30.0.1");
        assert_eq!(extra_host("h:host-gateway", None).unwrap(), None);
        assert!(extra_host("nothing", gateway).is_err());
        assert!(extra_host("db:nowhere", gateway).is_err());
    }
}
