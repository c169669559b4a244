//! RUN steps: a program in a container made by our own runtime, straight on the snapshot, under docker's default
//! confinement. One monitor per step holds its output and its end, as for any container.
//!
//! Invariant: whatever happens to the build, the step's processes, mounts, network and files are gone when
//! [`Running`] is; secrets are in files below the runtime directory only, for as long as the step runs.

mod mounts;
mod spec;
mod stubs;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigantine_image::{Lower, Replica};
use brigantine_shim::{
    AttachOptions, AttachStream, Client, Config, Event, EventReader, ExitRecord, Inherited, LogConfig,
    OverlayOptions, Rootfs, SpawnError, frame,
};
use brigantine_sys::SealedExe;
use tokio::io::AsyncReadExt as _;

use crate::error::{Context, Error, Result, chain};
use crate::graph::Run;
use crate::snapshot::remove_tree;
use crate::tree::Tree;

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
        running.stubs = stubs::missing(task.root, &targets)?;
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
            stubs::tidy(&running.upper, &running.stubs);
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

/// Whether a mount's path in its input is there, with links resolved inside.
pub(crate) fn resolve_source(tree: &Tree, path: &str) -> Result<String> {
    tree.canonical(path)?.ok_or_else(|| Error::NotFound(format!("\"/{path}\": not found")))
}
