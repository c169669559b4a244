//! RUN steps: a program in a container made by our own runtime, straight on the snapshot, under docker's default
//! confinement. One monitor per step holds its output and its end, as for any container.
//!
//! Invariant: whatever happens to the build, the step's processes, mounts, network and files are gone when
//! [`Running`] is; secrets are in files below the runtime directory only, for as long as the step runs.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigantine_image::{Lower, Replica};
use brigantine_runtime::profile::{self, SeccompContext};
use brigantine_runtime::spec::{
    Capabilities, Linux, LinuxCapabilities, LinuxCpu, LinuxDeviceCgroup, LinuxMemory, LinuxNamespaceBuilder,
    LinuxNamespaceType, LinuxResources, Mount, PosixRlimitBuilder, PosixRlimitType, Process, RootBuilder,
    Spec, UserBuilder,
};
use brigantine_shim::{
    AttachOptions, AttachStream, Client, Config, Event, EventReader, ExitRecord, Inherited, LogConfig,
    OverlayOptions, Rootfs, SpawnError, frame,
};
use brigantine_sys::SealedExe;
use tokio::io::AsyncReadExt as _;

use crate::dockerfile::MountKind;
use crate::error::{Context, Error, Result, chain, invalid};
use crate::graph::{Limits, Run, RunMount};
use crate::snapshot::remove_tree;
use crate::tree::{Tree, join};
use crate::users;

/// How steps get at a network: made by whoever has networks.
pub trait Network: Send + Sync + std::fmt::Debug {
    /// Makes what a step needs for `mode` (`default`, `none`, `host`, or a network's name). Blocks.
    fn join(&self, step: &str, mode: &str, hostname: &str, hosts: &[String]) -> Result<Joined, String>;

    /// Gives back what [`Network::join`] made; may be called for a step that never joined. Blocks.
    fn leave(&self, step: &str);
}

/// A step's network.
#[derive(Debug)]
pub struct Joined {
    /// The namespace to enter; `None` with `host` false is a new one with nothing in it.
    pub netns: Option<OwnedFd>,
    pub host: bool,
    /// Text of `/etc/hosts` and `/etc/resolv.conf`.
    pub hosts: String,
    pub resolv_conf: String,
}

/// Where and with what steps run.
#[derive(Debug, Clone)]
pub(crate) struct Executor {
    pub exe: Arc<SealedExe>,
    pub network: Arc<dyn Network>,
    /// Monitors' directories are below it.
    pub run_dir: PathBuf,
    /// Files of steps under way.
    pub tmp: PathBuf,
    pub cgroup_parent: String,
    pub systemd_cgroup: bool,
    pub shm_size: i64,
}

/// A mount that has been made ready.
#[derive(Debug, Clone)]
pub(crate) enum Ready {
    /// Directories of an input's layers, top first, and the path in them.
    Layers {
        lowers: Vec<Lower>,
        path: String,
    },
    /// A host path.
    Path(PathBuf),
    Tmpfs,
    /// Not there, and not required.
    Nothing,
}

/// Everything one step needs.
pub(crate) struct Task<'t> {
    pub id: String,
    pub run: &'t Run,
    /// The file system below, top first.
    pub lower: Vec<Lower>,
    pub upper: PathBuf,
    pub work: PathBuf,
    /// A plain copy of what is below, in place of an overlay.
    pub replica: Option<&'t Replica>,
    pub root: &'t Tree,
    pub mounts: Vec<Ready>,
    pub secrets: &'t BTreeMap<String, Vec<u8>>,
}

/// A step under way.
#[derive(Debug)]
pub(crate) struct Running {
    executor: Executor,
    id: String,
    client: Option<Client>,
    events: Option<UnixStream>,
    output: Option<UnixStream>,
    stubs: Vec<String>,
    upper: PathBuf,
}

impl Executor {
    fn monitor_dir(&self, id: &str) -> PathBuf {
        self.run_dir.join(id)
    }

    pub fn secrets_dir(&self, id: &str) -> PathBuf {
        self.run_dir.join(format!("{id}.files"))
    }

    fn exit_path(&self, id: &str) -> PathBuf {
        self.tmp.join(format!("{id}.exit.json"))
    }

    /// Ends what an engine that is gone left running.
    pub fn sweep(&self) {
        let Ok(entries) = std::fs::read_dir(&self.run_dir) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.strip_suffix(".files").is_none() {
                match brigantine_shim::find(&entry.path(), &self.exit_path(&name)) {
                    Ok(brigantine_shim::Found::Monitored(client)) => end(&client),
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!(step = name, %error, "end a build step of an earlier engine");
                    }
                }
                self.network.leave(&name);
            }
            remove_tree(&entry.path());
        }
    }

    /// Starts a step. Blocks.
    pub fn start(&self, task: &Task<'_>) -> Result<Running> {
        let mut running = Running {
            executor: self.clone(),
            id: task.id.clone(),
            client: None,
            events: None,
            output: None,
            stubs: Vec::new(),
            upper: task.replica.map_or_else(|| task.upper.clone(), Replica::root),
        };
        let around = &task.run.around;
        let joined = self
            .network
            .join(&task.id, &task.run.network, &around.hostname, &around.hosts)
            .map_err(|error| Error::Executor(format!("make the step's network: {error}")))?;
        let files = self.secrets_dir(&task.id);
        make_private(&files)?;
        let (spec, targets) = self.spec(task, &joined, &files)?;
        running.stubs = missing(task.root, &targets)?;
        let (events, their_events) = UnixStream::pair().doing(|| "make a socket pair".to_owned())?;
        let (output, their_output) = UnixStream::pair().doing(|| "make a socket pair".to_owned())?;
        let config = Config {
            id: task.id.clone(),
            spec,
            rootfs: match task.replica {
                Some(replica) => Rootfs::Path(replica.root()),
                None => Rootfs::Overlay {
                    lower: task.lower.iter().map(|layer| layer.shown().to_owned()).collect(),
                    upper: task.upper.clone(),
                    work: task.work.clone(),
                    options: OverlayOptions { volatile: true, extra: Vec::new() },
                },
            },
            terminal: false,
            console_size: None,
            open_stdin: false,
            stdin_once: false,
            log: LogConfig::None,
            exit_path: self.exit_path(&task.id),
            dir: self.monitor_dir(&task.id),
            systemd_cgroup: self.systemd_cgroup,
            durable_exit: false,
            runtime: None,
        };
        let attach = AttachStream {
            stream: their_output,
            options: AttachOptions { patience: None, ..AttachOptions::default() },
        };
        let layers = task
            .lower
            .iter()
            .enumerate()
            .filter_map(|(position, lower)| Some((position, lower.mount()?)))
            .map(|(position, mount)| Ok((position, mount.try_clone()?)))
            .collect::<io::Result<Vec<_>>>()
            .doing(|| "hand over the stage's layers".to_owned())?;
        let inherited = Inherited {
            netns: joined.netns,
            layers,
            held: Vec::new(),
            attach: vec![attach],
            events: Some(their_events),
        };
        brigantine_shim::spawn(&self.exe, &config, inherited).map_err(|error| match error {
            SpawnError::Launch(failure) => {
                Error::Executor(format!("failed to create task for container: {failure}: unknown"))
            }
            other => Error::Executor(format!("start the step's monitor: {}", chain(&other))),
        })?;
        running.client = Client::connect(&config.dir).ok();
        running.events = Some(events);
        running.output = Some(output);
        Ok(running)
    }

    fn spec(&self, task: &Task<'_>, joined: &Joined, files: &Path) -> Result<(Spec, Vec<String>)> {
        let run = task.run;
        let around = &run.around;
        let user = users::resolve(&run.user, task.root)?;
        let mut env = run.env.clone();
        env.extend(around.proxy.iter().cloned());
        let mut mounts =
            profile::mounts(around.shm_size.filter(|n| *n > 0).unwrap_or(self.shm_size).unsigned_abs());
        if run.insecure {
            for mount in &mut mounts {
                if matches!(mount.typ().as_deref(), Some("sysfs" | "cgroup")) {
                    let writable = mount.options().iter().flatten().filter(|o| *o != "ro").cloned().collect();
                    mount.set_options(Some(writable));
                }
            }
        }
        for (name, text) in [("hosts", &joined.hosts), ("resolv.conf", &joined.resolv_conf)] {
            let path = files.join(name);
            std::fs::write(&path, text).doing(|| format!("write {}", path.display()))?;
            mounts.push(bind(&format!("/etc/{name}"), &path, true));
        }
        for (name, text) in &run.scripts {
            let path = files.join(format!("script-{}", hex::encode(name)));
            std::fs::write(&path, text).doing(|| format!("write {}", path.display()))?;
            set_mode(&path, 0o755)?;
            mounts.push(bind(&format!("/dev/pipes/{name}"), &path, true));
        }
        let mut own = Vec::new();
        for (number, (wanted, ready)) in run.mounts.iter().zip(&task.mounts).enumerate() {
            match wanted.kind {
                MountKind::Secret => {
                    secret(wanted, number, task.secrets, files, &mut own, &mut env)?;
                }
                _ => mount(wanted, ready, number, files, &mut own)?,
            }
        }
        let agent = run
            .mounts
            .iter()
            .zip(&task.mounts)
            .find(|(wanted, ready)| wanted.kind == MountKind::Ssh && matches!(ready, Ready::Path(_)));
        if let Some((agent, _)) = agent
            && !env.iter().any(|line| line.starts_with("SSH_AUTH_SOCK="))
        {
            env.push(format!("SSH_AUTH_SOCK={}", agent.target));
        }
        own.sort_by_key(|mount| mount.destination().components().count());
        mounts.append(&mut own);
        let targets = mounts.iter().map(|mount| mount.destination().to_string_lossy().into_owned()).collect();

        let bounding = if run.insecure { profile::grantable_capabilities() } else { profile::capabilities() };
        let mut process = Process::default();
        process.set_terminal(Some(false));
        process.set_args(Some(run.args.clone()));
        process.set_env(Some(env));
        process.set_cwd(PathBuf::from(&run.cwd));
        process.set_user(
            UserBuilder::default()
                .uid(user.uid)
                .gid(user.gid)
                .additional_gids(user.groups)
                .build()
                .map_err(|error| Error::Executor(format!("describe the step's user: {error}")))?,
        );
        process.set_capabilities(Some(capability_sets(&bounding, user.uid)));
        process.set_rlimits(Some(rlimits(&around.limits)?));
        process.set_no_new_privileges(Some(false));

        let mut linux = Linux::default();
        let mut namespaces = vec![
            LinuxNamespaceType::Mount,
            LinuxNamespaceType::Uts,
            LinuxNamespaceType::Ipc,
            LinuxNamespaceType::Pid,
            LinuxNamespaceType::Cgroup,
        ];
        if !joined.host {
            namespaces.push(LinuxNamespaceType::Network);
        }
        let namespaces = namespaces
            .into_iter()
            .map(|typ| LinuxNamespaceBuilder::default().typ(typ).build())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| Error::Executor(format!("describe the step's namespaces: {error}")))?;
        linux.set_namespaces(Some(namespaces));
        linux.set_resources(Some(resources(&around.limits, run.insecure)));
        linux.set_cgroups_path(Some(self.cgroup(&around.limits, &task.id)));
        if !run.insecure {
            let context = SeccompContext { capabilities: bounding, ..SeccompContext::default() };
            let filter = profile::seccomp(&context)
                .map_err(|error| Error::Executor(format!("load the default seccomp profile: {error}")))?;
            linux.set_seccomp(Some(filter));
        }
        linux.set_masked_paths(Some(if run.insecure { Vec::new() } else { profile::masked_paths() }));
        linux.set_readonly_paths(Some(if run.insecure { Vec::new() } else { profile::readonly_paths() }));
        let mut spec = Spec::default();
        spec.set_linux(Some(linux));
        spec.set_mounts(Some(mounts));
        spec.set_process(Some(process));
        spec.set_hostname(Some(around.hostname.clone()).filter(|name| !name.is_empty()));
        spec.set_root(Some(
            RootBuilder::default()
                .path("rootfs")
                .readonly(false)
                .build()
                .map_err(|error| Error::Executor(format!("describe the step's root: {error}")))?,
        ));
        Ok((spec, targets))
    }

    fn cgroup(&self, limits: &Limits, id: &str) -> PathBuf {
        let parent = limits.cgroup_parent.as_deref().filter(|parent| !parent.is_empty());
        if self.systemd_cgroup {
            return PathBuf::from(format!("{}:brigantine:{id}", parent.unwrap_or("system.slice")));
        }
        Path::new("/").join(parent.unwrap_or(&self.cgroup_parent)).join(id)
    }
}

impl Running {
    /// Passes the output on as it comes and waits for the end. The step's files are put in order then.
    pub async fn finish(
        mut self,
        mut log: impl FnMut(bool, &[u8]) -> futures_util::future::BoxFuture<'static, ()>,
    ) -> Result<ExitRecord> {
        if let Some(output) = self.output.take() {
            output.set_nonblocking(true).doing(|| "read the step's output".to_owned())?;
            let mut output =
                tokio::net::UnixStream::from_std(output).doing(|| "read the step's output".to_owned())?;
            let mut header = [0_u8; frame::HEADER];
            loop {
                match output.read_exact(&mut header).await {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                    Err(error) => return Err(error).doing(|| "read the step's output".to_owned()),
                }
                let Some((kind, length)) = frame::parse_header(header) else { break };
                let mut payload = vec![0; length];
                output.read_exact(&mut payload).await.doing(|| "read the step's output".to_owned())?;
                log(kind == frame::Kind::Stderr, &payload).await;
            }
        }
        let mut running = self;
        let ended = tokio::task::spawn_blocking(move || {
            let exit = running.wait();
            running.clean();
            tidy(&running.upper, &running.stubs);
            exit
        })
        .await;
        ended.map_err(|error| Error::Executor(format!("wait for the step: {error}")))?
    }

    fn wait(&mut self) -> Result<ExitRecord> {
        if let Some(events) = self.events.take() {
            let mut events = EventReader::new(events);
            while let Ok(Some(event)) = events.read() {
                if let Event::Exited(exit) = event {
                    return Ok(exit);
                }
            }
        }
        match brigantine_shim::find(&self.executor.monitor_dir(&self.id), &self.executor.exit_path(&self.id))
        {
            Ok(brigantine_shim::Found::Exited(exit)) => Ok(exit),
            _ => Err(Error::Executor("the step's monitor was lost".to_owned())),
        }
    }

    /// Takes back everything but the snapshot.
    fn clean(&mut self) {
        if let Some(client) = self.client.take() {
            // It may have left already: then there is nobody to release.
            client.release().unwrap_or_else(
                |error| tracing::debug!(step = self.id, %error, "the step's monitor has left"),
            );
        }
        self.executor.network.leave(&self.id);
        remove_tree(&self.executor.monitor_dir(&self.id));
        remove_tree(&self.executor.secrets_dir(&self.id));
        let exit = self.executor.exit_path(&self.id);
        match std::fs::remove_file(&exit) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %exit.display(), %error, "remove a step's record");
            }
            _ => {}
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.client.is_none() && self.events.is_none() {
            // Finished, or never started: a failed start leaves no process, but files and a network.
            if self.output.is_none() {
                self.clean();
            }
            return;
        }
        let mut gone = Self {
            executor: self.executor.clone(),
            id: std::mem::take(&mut self.id),
            client: self.client.take(),
            events: self.events.take(),
            output: None,
            stubs: Vec::new(),
            upper: PathBuf::new(),
        };
        // Killing takes the kernel a moment: whoever cancelled need not wait for it.
        std::thread::spawn(move || {
            if let Some(client) = &gone.client {
                end(client);
            }
            if let Err(error) = gone.wait() {
                tracing::debug!(step = gone.id, error = error.report(), "wait for a cancelled step");
            }
            gone.events = None;
            gone.clean();
        });
    }
}

/// Makes a directory that only we can look into, unless it is there.
pub(crate) fn make_private(dir: &Path) -> Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(dir).doing(|| format!("create {}", dir.display()))
}

/// Kills a step and waits for its end.
fn end(client: &Client) {
    match client.kill(9, true) {
        Ok(()) => {}
        Err(error) => tracing::debug!(%error, "kill a build step"),
    }
    if let Ok(events) = client.events() {
        let mut reader = EventReader::new(events);
        while let Ok(Some(event)) = reader.read() {
            if matches!(event, Event::Exited(_)) {
                break;
            }
        }
    }
    client.release().unwrap_or_else(|error| tracing::debug!(%error, "release a build step's monitor"));
}

fn entry(target: &str, typ: &str, source: &str, options: Vec<String>) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(PathBuf::from(target))
        .set_typ(Some(typ.to_owned()))
        .set_source(Some(PathBuf::from(source)))
        .set_options(Some(options));
    mount
}

fn bind(target: &str, source: &Path, read_only: bool) -> Mount {
    let access = if read_only { "ro" } else { "rw" };
    entry(
        target,
        "bind",
        &source.to_string_lossy(),
        ["rbind", access, "rprivate"].map(str::to_owned).to_vec(),
    )
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .doing(|| format!("set the mode of {}", path.display()))
}

fn secret(
    wanted: &RunMount,
    number: usize,
    secrets: &BTreeMap<String, Vec<u8>>,
    files: &Path,
    mounts: &mut Vec<Mount>,
    env: &mut Vec<String>,
) -> Result<()> {
    let Some(value) = secrets.get(&wanted.id) else {
        if wanted.required {
            return Err(Error::NotFound(format!("secret {}: not found", wanted.id)));
        }
        return Ok(());
    };
    if let Some(name) = &wanted.env {
        let text = String::from_utf8(value.clone()).map_err(|_bad| {
            invalid(format!("secret {} is not valid UTF-8: it cannot be a variable", wanted.id))
        })?;
        env.push(format!("{name}={text}"));
    }
    if wanted.target.is_empty() {
        return Ok(());
    }
    let path = files.join(format!("secret-{number}"));
    std::fs::write(&path, value).doing(|| format!("write the secret {}", wanted.id))?;
    set_mode(&path, wanted.mode.unwrap_or(0o400))?;
    std::os::unix::fs::chown(&path, Some(wanted.uid), Some(wanted.gid))
        .doing(|| format!("give the secret {} away", wanted.id))?;
    mounts.push(bind(&wanted.target, &path, true));
    Ok(())
}

fn mount(
    wanted: &RunMount,
    ready: &Ready,
    number: usize,
    files: &Path,
    mounts: &mut Vec<Mount>,
) -> Result<()> {
    match ready {
        Ready::Nothing => {}
        Ready::Path(path) => mounts.push(bind(&wanted.target, path, wanted.read_only)),
        Ready::Tmpfs => {
            let mut options = ["nosuid", "noexec", "nodev"].map(str::to_owned).to_vec();
            options.extend(wanted.size.map(|size| format!("size={size}")));
            mounts.push(entry(&wanted.target, "tmpfs", "tmpfs", options));
        }
        Ready::Layers { lowers, path } => mounts.push(layers(wanted, lowers, path, number, files)?),
    }
    Ok(())
}

/// A part of an input's file system: an overlay of that part of each layer, or the file itself.
fn layers(wanted: &RunMount, lowers: &[Lower], path: &str, number: usize, files: &Path) -> Result<Mount> {
    let mut parts = Vec::new();
    for lower in lowers {
        match part(lower.path(), path)? {
            Part::Missing => {}
            Part::File(file) => {
                if parts.is_empty() {
                    // A change to it would change the input: it is read only whatever was asked for.
                    return Ok(bind(&wanted.target, &file, true));
                }
                break;
            }
            Part::Directory { path, last } => {
                parts.push(path);
                if last {
                    break;
                }
            }
            Part::Hidden => break,
        }
    }
    match &parts[..] {
        [] => Err(Error::NotFound(format!("\"/{path}\": not found"))),
        [one] if wanted.read_only => Ok(bind(&wanted.target, one, true)),
        parts => {
            let mut options: Vec<String> =
                parts.iter().map(|part| format!("lowerdir+={}", part.display())).collect();
            if wanted.read_only {
                options.push("ro".to_owned());
            } else {
                // What is written there is nobody's.
                for (option, sub) in [("upperdir", "upper"), ("workdir", "work")] {
                    let path = files.join(format!("mount-{number}-{sub}"));
                    std::fs::create_dir(&path).doing(|| format!("create {}", path.display()))?;
                    options.push(format!("{option}={}", path.display()));
                }
            }
            if wanted.read_only && parts.len() == 1 {
                options.retain(|option| option != "ro");
            }
            Ok(entry(&wanted.target, "overlay", "overlay", options))
        }
    }
}

enum Part {
    Missing,
    /// Lower layers show nothing here.
    Hidden,
    File(PathBuf),
    Directory {
        path: PathBuf,
        last: bool,
    },
}

/// What one layer has at a path (no links in it).
fn part(layer: &Path, path: &str) -> Result<Part> {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let mut here = layer.to_owned();
    let mut opaque = is_opaque(&here);
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    for (index, name) in parts.iter().enumerate() {
        here.push(name);
        let metadata = match std::fs::symlink_metadata(&here) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(if opaque { Part::Hidden } else { Part::Missing });
            }
            Err(error) => return Err(error).doing(|| format!("look at {}", here.display())),
        };
        if metadata.file_type().is_char_device() && metadata.rdev() == 0 {
            return Ok(Part::Hidden);
        }
        if !metadata.is_dir() {
            return Ok(if index + 1 == parts.len() { Part::File(here) } else { Part::Hidden });
        }
        opaque |= is_opaque(&here);
    }
    Ok(Part::Directory { path: here, last: opaque })
}

fn is_opaque(dir: &Path) -> bool {
    let mut value = [0_u8; 1];
    matches!(rustix::fs::lgetxattr(dir, "trusted.overlay.opaque", &mut value), Ok(1) if value == *b"y")
}

/// Paths that mounting will make and that are not the step's: each with those above it that are missing.
fn missing(root: &Tree, targets: &[String]) -> Result<Vec<String>> {
    let mut stubs = Vec::new();
    for target in targets {
        let mut here = String::new();
        for part in target.split('/').filter(|part| !part.is_empty()) {
            here = join(&here, part);
            if root.canonical(&here)?.is_none() && !stubs.contains(&here) {
                stubs.push(here.clone());
            }
        }
    }
    Ok(stubs)
}

/// Removes from the upper directory what only mounting has made: the stubs, and copies of directories made for them.
fn tidy(upper: &Path, stubs: &[String]) {
    let mut parents: Vec<PathBuf> = Vec::new();
    for stub in stubs.iter().rev() {
        let path = upper.join(stub);
        // What is not there, or was filled by the step, stays as it is.
        let removed = match std::fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => std::fs::remove_dir(&path).is_ok(),
            Ok(metadata) if metadata.is_file() && metadata.len() == 0 => std::fs::remove_file(&path).is_ok(),
            _ => false,
        };
        if removed && let Some(parent) = path.parent() {
            parents.push(parent.to_owned());
        }
    }
    for parent in parents {
        if parent != upper && !is_opaque(&parent) {
            // Only an empty one goes: a copy of a directory below that shows nothing new.
            std::fs::remove_dir(&parent).unwrap_or_default();
        }
    }
}

fn capability_sets(bounding: &[brigantine_runtime::spec::Capability], uid: u32) -> LinuxCapabilities {
    let all = || bounding.iter().copied().collect::<Capabilities>();
    let active = || if uid == 0 { all() } else { Capabilities::default() };
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(all()));
    sets.set_effective(Some(active()));
    sets.set_permitted(Some(active()));
    sets.set_inheritable(Some(Capabilities::default()));
    sets.set_ambient(Some(Capabilities::default()));
    sets
}

fn resources(limits: &Limits, insecure: bool) -> LinuxResources {
    let mut resources = LinuxResources::default();
    let mut devices = profile::device_rules();
    if insecure {
        let mut all = LinuxDeviceCgroup::default();
        all.set_allow(true).set_access(Some("rwm".to_owned()));
        devices = vec![all];
    }
    resources.set_devices(Some(devices));
    if let Some(limit) = limits.memory.filter(|n| *n > 0) {
        let mut memory = LinuxMemory::default();
        memory.set_limit(Some(limit));
        memory.set_swap(Some(limits.memory_swap.filter(|n| *n != 0).unwrap_or(limit.saturating_mul(2))));
        resources.set_memory(Some(memory));
    }
    let text = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
    let (cpus, mems) = (text(&limits.cpuset_cpus), text(&limits.cpuset_mems));
    let (shares, period) = (limits.cpu_shares.filter(|n| *n > 0), limits.cpu_period.filter(|n| *n > 0));
    let quota = limits.cpu_quota.filter(|n| *n != 0);
    if shares.is_some() || period.is_some() || quota.is_some() || cpus.is_some() || mems.is_some() {
        let mut cpu = LinuxCpu::default();
        cpu.set_shares(shares);
        cpu.set_period(period);
        cpu.set_quota(quota);
        cpu.set_cpus(cpus);
        cpu.set_mems(mems);
        resources.set_cpu(Some(cpu));
    }
    resources
}

fn rlimits(limits: &Limits) -> Result<Vec<brigantine_runtime::spec::PosixRlimit>> {
    limits
        .ulimits
        .iter()
        .map(|(name, soft, hard)| {
            let unknown = || invalid(format!("invalid ulimit type: {name}"));
            let full = format!("RLIMIT_{}", name.to_ascii_uppercase());
            let typ: PosixRlimitType = serde_json::from_value(full.into()).map_err(|_unknown| unknown())?;
            PosixRlimitBuilder::default()
                .typ(typ)
                .soft(soft.unsigned_abs())
                .hard(hard.unsigned_abs())
                .build()
                .map_err(|_bad| unknown())
        })
        .collect()
}

/// Whether a mount's path in its input is there, with links resolved inside.
pub(crate) fn resolve_source(tree: &Tree, path: &str) -> Result<String> {
    tree.canonical(path)?.ok_or_else(|| Error::NotFound(format!("\"/{path}\": not found")))
}
