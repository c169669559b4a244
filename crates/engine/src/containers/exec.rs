//! Execs: further processes in a running container. Their state is kept until the container ends.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bollard_stubs::models::ExecConfig as ExecRequest;
use brigantine_runtime::spec::Process;
use brigantine_shim::{ClientError, ConsoleSize, ExecRecord, FailureKind};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use super::attach::{Joined, asynchronous, detach_keys, join};
use super::{Container, Containers, Live, ShimError, Status};
use crate::error::Context;
use crate::ids::new_id;
use crate::rootfs::LayerRoot;
use crate::spec::{self, SecurityOptions, capabilities};
use crate::sync::lock;
use crate::{Class, Error, Result, users};

/// An exec and how far it is.
#[derive(Debug)]
pub(super) struct Exec {
    id: String,
    container: Arc<Container>,
    request: ExecRequest,
    detach_keys: Vec<u8>,
    state: Mutex<ExecState>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    #[default]
    Created,
    Starting,
    Running,
    Ended,
}

#[derive(Debug, Default)]
struct ExecState {
    phase: Phase,
    pid: i32,
    exit_code: Option<i32>,
}

/// How an exec is started.
#[derive(Debug, Clone, Default)]
pub struct ExecStart {
    pub detach: bool,
    pub tty: Option<bool>,
    /// Rows and columns.
    pub console_size: Option<(u16, u16)>,
}

/// A started exec that is ready to be joined to a client's connection.
#[derive(Debug)]
pub struct StartedExec {
    containers: Arc<Containers>,
    exec: Arc<Exec>,
    start: ExecStart,
}

impl Exec {
    fn tty(&self) -> bool {
        self.request.tty.unwrap_or_default()
    }

    fn wants(&self, stream: fn(&ExecRequest) -> Option<bool>) -> bool {
        stream(&self.request).unwrap_or_default()
    }

    fn command(&self) -> String {
        self.request.cmd.as_deref().unwrap_or_default().join(" ")
    }
}

fn no_such_exec(id: &str) -> Error {
    Error::not_found(format!("No such exec instance: {id}"))
}

impl Containers {
    /// Prepares an exec in a running container; returns its id.
    pub async fn exec_create(&self, reference: &str, request: ExecRequest) -> Result<String> {
        let exec = self.exec_prepare(reference, request).await?;
        let kept = serde_json::to_vec(&exec.request).doing(|| "describe the exec".to_owned())?;
        let path = self.exec_file(&exec.container.id, &exec.id);
        let written = crate::blocking(move || {
            let dir = path.parent().unwrap_or(&path);
            match std::fs::create_dir(dir) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
                _ => std::fs::write(&path, kept),
            }
            .doing(|| format!("write {}", path.display()))
        })
        .await;
        if let Err(error) = written {
            lock(&self.execs).remove(&exec.id);
            exec.container.running()?;
            return Err(error);
        }
        Ok(exec.id.clone())
    }

    /// Where the next daemon finds an exec's request; it goes with the monitor's directory.
    fn exec_file(&self, container: &str, exec: &str) -> std::path::PathBuf {
        self.run_dir(container).join("requests").join(format!("{exec}.json"))
    }

    /// Takes up the execs of a container that a former daemon has made.
    pub(super) fn restore_execs(&self, container: &Arc<Container>, states: &[brigantine_shim::ExecState]) {
        let Ok(entries) = std::fs::read_dir(self.run_dir(&container.id).join("requests")) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".json")) else { continue };
            let Some(request) = std::fs::read(entry.path())
                .ok()
                .and_then(|text| serde_json::from_slice::<ExecRequest>(&text).ok())
            else {
                tracing::warn!(container = container.id, exec = id, "an exec's request is damaged");
                continue;
            };
            let keys = detach_keys(request.detach_keys.as_deref().unwrap_or_default()).unwrap_or_default();
            let mut state = ExecState::default();
            if let Some(known) = states.iter().find(|known| known.id == id) {
                state.pid = known.pid;
                state.exit_code = known.exit.as_ref().map(|exit| exit.exit_code);
                state.phase = if known.exit.is_some() { Phase::Ended } else { Phase::Running };
            }
            let exec = Exec {
                id: id.to_owned(),
                container: Arc::clone(container),
                request,
                detach_keys: keys,
                state: Mutex::new(state),
            };
            lock(&self.execs).insert(id.to_owned(), Arc::new(exec));
        }
    }

    async fn exec_prepare(&self, reference: &str, request: ExecRequest) -> Result<Arc<Exec>> {
        let container = self.find(reference)?;
        let live = container.running()?;
        match container.status() {
            Status::Paused => {
                return Err(Error::conflict(format!(
                    "container {reference} is paused, unpause the container before exec"
                )));
            }
            Status::Restarting => {
                return Err(Error::conflict(format!(
                    "container {} is restarting, wait until the container is running",
                    container.id
                )));
            }
            _ => {}
        }
        if request.cmd.as_ref().is_none_or(Vec::is_empty) {
            return Err(Error::invalid("No exec command specified"));
        }
        if let Some(bad) = request.env.iter().flatten().find(|v| v.is_empty() || v.starts_with('=')) {
            return Err(Error::invalid(format!("invalid environment variable: {bad}")));
        }
        if let Some(dir) =
            request.working_dir.as_deref().filter(|dir| !dir.is_empty() && !dir.starts_with('/'))
        {
            return Err(Error::invalid(format!(
                "the working directory '{dir}' is invalid, it needs to be an absolute path"
            )));
        }
        // An unknown user is an error now, not inside the stream.
        let user = Self::exec_user(&container, &request);
        let pid = live.pid;
        crate::blocking(move || users::resolve(&user, &[], &LayerRoot::of_process(pid)?)).await?;
        let keys = detach_keys(request.detach_keys.as_deref().unwrap_or_default())?;
        let exec = Arc::new(Exec {
            id: new_id(),
            container: Arc::clone(&container),
            request,
            detach_keys: keys,
            state: Mutex::default(),
        });
        let id = exec.id.clone();
        self.publish(&container, format!("exec_create: {}", exec.command()), &[("execID", id.clone())]);
        lock(&self.execs).insert(id, Arc::clone(&exec));
        Ok(exec)
    }

    fn exec_user(container: &Container, request: &ExecRequest) -> String {
        match request.user.as_deref() {
            Some(user) if !user.is_empty() => user.to_owned(),
            _ => container.with(|inner| inner.record.config.user.clone()).unwrap_or_default(),
        }
    }

    /// Refuses an exec in a container that is not of the project as if it were not there.
    pub fn exec_within(&self, id: &str, project: &str) -> Result<()> {
        match self.exec(id) {
            Ok(exec) if exec.container.project.as_deref() == Some(project) => Ok(()),
            Ok(_) => Err(no_such_exec(id)),
            Err(error) => Err(error),
        }
    }

    fn exec(&self, id: &str) -> Result<Arc<Exec>> {
        lock(&self.execs).get(id).cloned().ok_or_else(|| no_such_exec(id))
    }

    /// Claims an exec for its one start. Detached ones run when this returns; the others when they are joined.
    pub async fn exec_start(self: &Arc<Self>, id: &str, start: ExecStart) -> Result<StartedExec> {
        let exec = self.exec(id)?;
        exec.container.running()?;
        if exec.container.status() == Status::Paused {
            return Err(Error::conflict(format!(
                "container {} is paused, unpause the container before exec",
                exec.container.id
            )));
        }
        {
            let mut state = lock(&exec.state);
            match state.phase {
                Phase::Created => state.phase = Phase::Starting,
                Phase::Starting | Phase::Running => {
                    return Err(Error::conflict(format!("exec command {id} is already running")));
                }
                Phase::Ended => return Err(Error::conflict(format!("exec command {id} has already run"))),
            }
        }
        let started = StartedExec { containers: Arc::clone(self), exec, start };
        if started.start.detach {
            drop(started.run(false).await?);
        }
        Ok(started)
    }

    pub fn exec_inspect(&self, id: &str) -> Result<Value> {
        let exec = self.exec(id)?;
        let state = lock(&exec.state);
        let request = &exec.request;
        let command = request.cmd.as_deref().unwrap_or_default();
        Ok(json!({
            "ID": exec.id,
            "Running": matches!(state.phase, Phase::Starting | Phase::Running),
            "ExitCode": state.exit_code,
            "ProcessConfig": {
                "tty": exec.tty(),
                "entrypoint": command.first().cloned().unwrap_or_default(),
                "arguments": command.get(1..).unwrap_or_default(),
                "privileged": request.privileged.unwrap_or_default(),
                "user": request.user.clone().unwrap_or_default(),
            },
            "OpenStdin": exec.wants(|r| r.attach_stdin),
            "OpenStderr": exec.wants(|r| r.attach_stderr),
            "OpenStdout": exec.wants(|r| r.attach_stdout),
            "CanRemove": state.phase == Phase::Ended,
            "ContainerID": exec.container.id,
            "DetachKeys": request.detach_keys.clone().unwrap_or_default(),
            "Pid": state.pid,
        }))
    }

    /// Sets the terminal's size; right behind the start it waits until the process is there.
    pub async fn exec_resize(&self, id: &str, height: u16, width: u16) -> Result<()> {
        let exec = self.exec(id)?;
        let live = exec.container.running()?;
        let id = exec.id.clone();
        match live.ask(move |client| client.exec_resize(&id, ConsoleSize { height, width })).await {
            Ok(()) => Ok(()),
            Err(error) if error.is_gone() => Err(Error::conflict(format!("exec {} is not running", exec.id))),
            Err(error) => Err(Error::internal(format!("resize exec {}", exec.id)).because(error)),
        }
    }

    /// Ids of a container's execs, for inspect; `None` when there are none.
    pub(super) fn exec_ids(&self, container: &str) -> Option<Vec<String>> {
        let ids: Vec<String> = lock(&self.execs)
            .values()
            .filter(|exec| exec.container.id == container)
            .map(|e| e.id.clone())
            .collect();
        Some(ids).filter(|ids| !ids.is_empty())
    }

    /// A shim's word that an exec has ended.
    pub(super) fn exec_ended(&self, container: &Container, record: &ExecRecord) {
        let Ok(exec) = self.exec(&record.id) else {
            tracing::debug!(
                container = container.id,
                exec = record.id,
                "an exec of a former engine has ended"
            );
            return;
        };
        self.set_ended(&exec, record.exit_code);
    }

    /// Records an exec's end once, and tells of it.
    fn set_ended(&self, exec: &Exec, exit_code: i32) {
        {
            let mut state = lock(&exec.state);
            if state.phase == Phase::Ended {
                return;
            }
            state.phase = Phase::Ended;
            state.exit_code = Some(exit_code);
        }
        let more = [("execID", exec.id.clone()), ("exitCode", exit_code.to_string())];
        self.publish(&exec.container, "exec_die", &more);
    }

    /// After its container's end, an exec has ended too; the last ones stay readable.
    pub(super) fn forget_execs(&self, container: &str) {
        const KEPT: usize = 64;
        let mut execs = lock(&self.execs);
        let of: Vec<Arc<Exec>> =
            execs.values().filter(|exec| exec.container.id == container).cloned().collect();
        let removed = of.first().is_some_and(|exec| exec.container.with(|inner| inner.removed));
        for exec in &of {
            let mut state = lock(&exec.state);
            if state.phase == Phase::Running {
                state.phase = Phase::Ended;
                state.exit_code = Some(137);
            }
        }
        if removed || of.len() > KEPT {
            for exec in of {
                execs.remove(&exec.id);
            }
        }
    }

    /// The process an exec runs: the container's own confinement with another program.
    fn exec_process(&self, container: &Container, live: &Live, exec: &Exec) -> Result<Process> {
        let record = container.record();
        let host = &record.host_config;
        let request = &exec.request;
        let privileged = record.privileged() || request.privileged.unwrap_or_default();
        let user = users::resolve(
            &Self::exec_user(container, request),
            if request.user.as_deref().unwrap_or_default().is_empty() {
                host.group_add.as_deref().unwrap_or_default()
            } else {
                &[]
            },
            &LayerRoot::of_process(live.pid)?,
        )?;
        let bounding = capabilities::bounding(
            privileged,
            host.cap_add.as_deref().unwrap_or_default(),
            host.cap_drop.as_deref().unwrap_or_default(),
        )?;
        let security =
            SecurityOptions::parse(host.security_opt.as_deref().unwrap_or_default(), &self.config)?;
        let mut env = Vec::new();
        let hostname = record.config.hostname.clone().unwrap_or_default();
        for variable in spec::default_environment(&hostname, exec.tty()) {
            spec::set_variable(&mut env, &variable);
        }
        for variable in record.config.env.iter().flatten().chain(request.env.iter().flatten()) {
            spec::set_variable(&mut env, variable);
        }
        if !env.iter().any(|variable| variable.starts_with("HOME=")) {
            env.push(format!("HOME={}", user.home));
        }
        let dir = [request.working_dir.as_deref(), record.config.working_dir.as_deref()]
            .into_iter()
            .flatten()
            .find(|dir| !dir.is_empty())
            .unwrap_or("/");
        let mut process = Process::default();
        process.set_terminal(Some(exec.tty()));
        process.set_args(request.cmd.clone());
        process.set_env(Some(env));
        process.set_cwd(dir.into());
        process.set_user(spec::user(&user)?);
        process.set_capabilities(Some(capabilities::sets(&bounding, user.uid)));
        process.set_rlimits(Some(spec::resources::rlimits(host, &self.config)?));
        process.set_no_new_privileges(Some(security.no_new_privileges));
        process.set_apparmor_profile(if privileged { None } else { security.apparmor });
        process.set_oom_score_adj(host.oom_score_adj.and_then(|adj| i32::try_from(adj).ok()));
        Ok(process)
    }

    /// Runs a command as an exec without a client and returns its exit status and output; for health checks. One that
    /// takes longer than `patience` is killed: `None`.
    pub(super) async fn run_probe(
        self: &Arc<Self>,
        container: &Arc<Container>,
        command: Vec<String>,
        most: usize,
        patience: Duration,
    ) -> Result<Option<(i32, String)>> {
        let request = ExecRequest {
            cmd: Some(command),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            ..ExecRequest::default()
        };
        let id = self.exec_prepare(&container.id, request).await?.id.clone();
        let started = self.exec_start(&id, ExecStart::default()).await?;
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let mut output = Vec::new();
        let reading = async {
            use tokio::io::AsyncReadExt;
            let (mut from, to) = tokio::io::split(ours);
            let mut buffer = [0_u8; 4096];
            while let Ok(count) = from.read(&mut buffer).await {
                if count == 0 {
                    break;
                }
                let room = most.saturating_sub(output.len());
                output.extend_from_slice(&buffer[..count.min(room)]);
            }
            drop(to);
        };
        let both = async { tokio::join!(started.join_as(theirs, true), reading).0 };
        let outcome = tokio::time::timeout(patience, both).await;
        let exec = lock(&self.execs).remove(&id);
        match outcome {
            Ok(joined) => {
                joined.doing(|| "run a health check".to_owned())?;
                let exit_code = exec.and_then(|exec| lock(&exec.state).exit_code).unwrap_or(-1);
                Ok(Some((exit_code, String::from_utf8_lossy(&output).into_owned())))
            }
            Err(_elapsed) => {
                if let Some(live) = container.live()
                    && let Err(error) = live.ask(move |client| client.exec_kill(&id, 9)).await
                    && !error.is_gone()
                {
                    tracing::debug!(container = container.id, %error, "end a health check");
                }
                Ok(None)
            }
        }
    }
}

impl StartedExec {
    /// Whether bytes go unframed: as the start says, whatever the exec has.
    pub fn tty(&self) -> bool {
        self.start.tty.unwrap_or_default()
    }

    /// Starts the process; with `attached` its streams come back.
    async fn run(&self, attached: bool) -> Result<UnixStream> {
        let outcome = self.try_run(attached).await;
        if let Err(error) = &outcome {
            let exit_code = if error.class() == Class::InvalidParameter {
                if error.to_string().contains("permission denied")
                    || error.to_string().contains("is a directory")
                {
                    126
                } else {
                    127
                }
            } else {
                126
            };
            self.containers.set_ended(&self.exec, exit_code);
        }
        outcome
    }

    async fn try_run(&self, attached: bool) -> Result<UnixStream> {
        let exec = Arc::clone(&self.exec);
        let live = exec.container.running()?;
        let containers = Arc::clone(&self.containers);
        let process = {
            let (exec, live) = (Arc::clone(&exec), Arc::clone(&live));
            crate::blocking(move || containers.exec_process(&exec.container, &live, &exec)).await?
        };
        let asked = exec.request.console_size.as_deref().and_then(|size| match *size {
            [height, width] => Some((height as u16, width as u16)),
            _ => None,
        });
        let size = self.start.console_size.or(asked).filter(|(height, width)| *height > 0 && *width > 0);
        let config = brigantine_shim::ExecConfig {
            id: exec.id.clone(),
            process,
            terminal: exec.tty(),
            console_size: size.map(|(height, width)| ConsoleSize { height, width }),
            stdin: attached && exec.wants(|r| r.attach_stdin),
            stdout: attached && exec.wants(|r| r.attach_stdout),
            stderr: attached && exec.wants(|r| r.attach_stderr),
        };
        let execed = match live.ask(move |client| client.exec(&config)).await {
            Ok(execed) => execed,
            Err(ShimError::Client(ClientError::Refused(failure))) => {
                return Err(match failure.kind {
                    FailureKind::NotFound | FailureKind::PermissionDenied | FailureKind::NotExecutable => {
                        Error::invalid(format!(
                            "OCI runtime exec failed: exec failed: unable to start container process: {}: unknown",
                            failure.message
                        ))
                    }
                    FailureKind::NotRunning => {
                        Error::conflict(format!("container {} is not running", exec.container.id))
                    }
                    _ => Error::internal(format!("OCI runtime exec failed: {}", failure.message)),
                });
            }
            Err(error) => {
                return Err(
                    Error::internal(format!("exec in container {}", exec.container.id)).because(error)
                );
            }
        };
        {
            let mut state = lock(&exec.state);
            state.pid = execed.pid;
            // The end may have been told already.
            if state.phase == Phase::Starting {
                state.phase = Phase::Running;
            }
        }
        self.containers.publish(
            &exec.container,
            format!("exec_start: {}", exec.command()),
            &[("execID", exec.id.clone())],
        );
        asynchronous(execed.stream)
    }

    /// Runs the process with the client's connection as its streams. A program that cannot be run says so in the
    /// stream, as docker does.
    pub async fn join<C: AsyncRead + AsyncWrite + Unpin>(self, client: C) -> std::io::Result<()> {
        let raw = self.tty();
        self.join_as(client, raw).await
    }

    async fn join_as<C: AsyncRead + AsyncWrite + Unpin>(
        self,
        mut client: C,
        raw: bool,
    ) -> std::io::Result<()> {
        let mut stream = match self.run(true).await {
            Ok(stream) => stream,
            Err(error) => {
                let text = format!("{}\r\n", error.report());
                if !raw {
                    client
                        .write_all(&brigantine_shim::frame::header(
                            brigantine_shim::frame::Kind::Stdout,
                            text.len(),
                        ))
                        .await?;
                }
                client.write_all(text.as_bytes()).await?;
                return client.shutdown().await;
            }
        };
        let exec = &self.exec;
        let keys = if exec.tty() { &exec.detach_keys[..] } else { &[] };
        let stdin = exec.wants(|r| r.attach_stdin);
        let containers = Arc::clone(&self.containers);
        let joined = join(client, &mut stream, raw, stdin, keys, |record| {
            containers.set_ended(exec, record.exit_code);
        })
        .await;
        if joined == Joined::Detached {
            self.containers.publish(&exec.container, "exec_detach", &[("execID", exec.id.clone())]);
        }
        Ok(())
    }
}
