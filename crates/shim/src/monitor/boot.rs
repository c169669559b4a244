//! A monitor's birth: standing on its own, taking its orders, making the container, giving the verdict.
//!
//! Whatever fails is told to the spawner as a typed failure, and undone.

use std::fs::{self, DirBuilder, File};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use brigantine_runtime::{Common, Launch, Listener, Rootfs, hooks, seccomp};
use brigantine_sys::daemonize;
use brigantine_sys::signals::SignalFd;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Process};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::Monitor;
use super::container::{Container, Lasting, Own};
use super::control::Subscriber;
use super::execs::Execs;
use super::foreign::{Foreign, Parts, Place};
use super::relay::{Plumbing, Relay};
use super::viewer::Viewer;
use crate::config::{AttachStream, Config, Inherited};
use crate::log::LogFile;
use crate::protocol::{self, Birth, Failure, FailureKind, PROTOCOL_VERSION};
use crate::record::{self, Durability, MonitorRecord};
use crate::recover::start_ticks;
use crate::spawn::{Bootstrap, FDS_PER_MESSAGE};
use crate::time::Timestamp;

/// The largest configuration.
const MAX_CONFIG: usize = 64 << 20;

/// The monitor is the last that the kernel should kill for lack of memory; the container is not protected with it.
const OOM_SCORE_ADJ: i32 = -999;

/// Signals that are read rather than obeyed. The rest keep their meaning.
const SIGNALS: [i32; 9] = [
    libc::SIGCHLD,
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGPIPE,
    libc::SIGALRM,
];

/// The monitor's place, and what it needs to remember of its configuration.
pub(super) struct Home {
    pub(super) id: String,
    pub(super) dir: PathBuf,
    pub(super) exit_path: PathBuf,
    pub(super) durable_exit: bool,
    pub(super) oom_score_adj: i32,
    /// Holds the lock that says this monitor lives.
    fd: File,
    made: bool,
    /// Sockets that reserve host ports, held for the container's life.
    #[expect(dead_code, reason = "held for its effect")]
    held: Vec<OwnedFd>,
}

impl Home {
    /// Make the directory and lock it.
    fn settle(config: &Config, held: Vec<OwnedFd>) -> io::Result<Self> {
        let made = match DirBuilder::new().mode(0o700).create(&config.dir) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(e),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = File::from(rustix::fs::open(&config.dir, flags, Mode::empty())?);
        rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
        rustix::fs::fchmod(&fd, Mode::RWXU)?;
        let oom_score_adj = config.spec.process().as_ref().and_then(Process::oom_score_adj).unwrap_or(0);
        Ok(Self {
            id: config.id.clone(),
            dir: config.dir.clone(),
            exit_path: config.exit_path.clone(),
            durable_exit: config.durable_exit,
            oom_score_adj,
            fd,
            made,
            held,
        })
    }

    /// Listen on the socket, reached through the directory's descriptor because its path may be too long.
    fn listen(&self) -> io::Result<UnixListener> {
        remove_file(&self.dir.join(record::SOCKET));
        let listener =
            UnixListener::bind(format!("/proc/self/fd/{}/{}", self.fd.as_raw_fd(), record::SOCKET))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    /// Remove the directory with all records.
    pub(super) fn remove(&self) {
        drop(fs::remove_dir_all(&self.dir));
    }

    /// End without a daemon: leave what one that starts may want to read, and nothing else.
    pub(super) fn leave(&self) {
        remove_file(&self.dir.join(record::MONITOR));
        remove_file(&self.dir.join(record::SOCKET));
        // Fails while records of execs are left, as it should.
        drop(fs::remove_dir(&self.dir));
    }

    /// Undo what was made.
    fn undo(&self) {
        if self.made {
            self.remove();
        } else {
            self.leave();
        }
    }
}

/// Remove a file that may be gone already; what cannot be removed is overwritten, or removed with the directory.
pub(super) fn remove_file(path: &Path) {
    drop(fs::remove_file(path));
}

/// Come up and start the container; the spawner has been told when this returns.
pub(super) fn boot() -> Result<Monitor, ()> {
    let Ok(socket) = detach() else { return Err(()) };
    let result = receive(&socket)
        .map_err(|e| failed("read the configuration", &e))
        .and_then(|(config, inherited)| launch(config, inherited));
    let verdict = match &result {
        Ok(monitor) => Birth::Started {
            shim_pid: rustix::process::getpid().as_raw_nonzero().get(),
            container_pid: monitor.container.pid(),
            started_at: monitor.started_at.clone(),
        },
        Err(failure) => Birth::Failed(failure.clone()),
    };
    if let Err(_gone) = protocol::write_message(&socket, &verdict) {
        // The daemon has gone. A container that runs is found by the next one.
    }
    result.map_err(drop)
}

/// Leave the parent and everything of its that came along; the socket is the only thing kept.
fn detach() -> io::Result<UnixStream> {
    daemonize::close_inherited(3)?;
    daemonize::continue_as_orphan()?;
    let socket = UnixStream::from(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?);
    rustix::stdio::dup2_stdin(rustix::stdio::stdout())?;
    rustix::process::setsid()?;
    rustix::process::chdir("/")?;
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    rustix::thread::set_name(c"brig-shim")?;
    // Orphans of containers in the host's process id namespace come here, and execs' half-way processes.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    Ok(socket)
}

/// Read the configuration and the descriptors.
fn receive(socket: &UnixStream) -> io::Result<(Config, Inherited)> {
    let body = protocol::read_message(socket, MAX_CONFIG)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let Bootstrap { mut config, events, netns, attach, layers, held } = serde_json::from_slice(&body)?;
    drop(body);
    let count = usize::from(events) + usize::from(netns) + attach.len() + layers.len() + held;
    let mut fds = Vec::with_capacity(count);
    while fds.len() < count {
        receive_fds(socket, &mut fds)?;
    }
    let mut fds = fds.into_iter();
    let missing = || io::Error::from(io::ErrorKind::InvalidData);
    let events = if events { Some(fds.next().ok_or_else(missing)?.into()) } else { None };
    let netns = if netns { Some(fds.next().ok_or_else(missing)?) } else { None };
    let mut streams = Vec::with_capacity(attach.len());
    for options in attach {
        streams.push(AttachStream { stream: fds.next().ok_or_else(missing)?.into(), options });
    }
    let layers = layers
        .into_iter()
        .map(|position| Ok((position, fds.next().ok_or_else(missing)?)))
        .collect::<io::Result<Vec<_>>>()?;
    put_layers(&mut config.rootfs, &layers)?;
    Ok((config, Inherited { netns, layers, held: fds.collect(), attach: streams, events }))
}

/// Names the mounts that were handed over where the root's list has their places.
fn put_layers(rootfs: &mut Rootfs, layers: &[(usize, OwnedFd)]) -> io::Result<()> {
    for (position, mount) in layers {
        let place = match rootfs {
            Rootfs::Overlay { lower, .. } => lower.get_mut(*position),
            Rootfs::Path(_) | Rootfs::Mapped(_) => None,
        };
        *place.ok_or(io::ErrorKind::InvalidData)? = format!("/proc/self/fd/{}", mount.as_raw_fd()).into();
    }
    Ok(())
}

fn receive_fds(socket: &UnixStream, fds: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_MESSAGE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let got = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    if got.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let before = fds.len();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if fds.len() == before {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "descriptors are missing (is the limit of open files reached?)",
        ));
    }
    Ok(())
}

/// Make the container and run its program.
fn launch(config: Config, inherited: Inherited) -> Result<Monitor, Failure> {
    let signals = SignalFd::block(&SIGNALS).map_err(|e| failed("block signals", &e))?;
    // The mounts of layers are in use until the root is mounted.
    let Inherited { netns, layers: _layers, held, attach, events } = inherited;
    let home = Home::settle(&config, held).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => {
            Failure::new(FailureKind::Conflict, format!("container {} has a monitor already", config.id))
        }
        _ => failed(&format!("use the directory {}", config.dir.display()), &e),
    })?;
    match start(config, netns, attach, events, &home) {
        Ok(Started { listener, container, started_at, log, relay, subscribers, next_id }) => {
            let cgroup = container.cgroup().clone();
            Ok(Monitor {
                home,
                signals,
                listener,
                oom: cgroup.oom_events().unwrap_or_default(),
                container,
                cgroup,
                oom_kills: 0,
                oom_recheck: None,
                paused: false,
                started_at,
                log,
                relay,
                execs: Execs::default(),
                connections: Vec::new(),
                subscribers,
                next_id,
                ending: None,
                scratch: Vec::new(),
                busy_since: Some(Instant::now()),
                calm: false,
                finished: false,
            })
        }
        Err(failure) => {
            home.undo();
            Err(failure)
        }
    }
}

/// A container whose program runs, and what has been set up for it.
struct Started {
    listener: UnixListener,
    container: Container,
    started_at: Timestamp,
    log: Option<LogFile>,
    relay: Relay,
    subscribers: Vec<Subscriber>,
    next_id: u32,
}

fn start(
    mut config: Config,
    netns: Option<OwnedFd>,
    attach: Vec<AttachStream>,
    events: Option<UnixStream>,
    home: &Home,
) -> Result<Started, Failure> {
    // A record of an earlier run must not be taken for this one's.
    remove_file(&home.exit_path);
    let listener = home.listen().map_err(|e| failed("listen in the monitor's directory", &e))?;
    let log = LogFile::of(&config.log).map_err(|e| failed("open the log", &e))?;
    let (terminal, open_stdin, stdin_once) = (config.terminal, config.open_stdin, config.stdin_once);
    let console_size = config.console_size;
    let plumbing = Plumbing::new(terminal, open_stdin, stdin_once).map_err(|e| failed("make pipes", &e))?;
    let (stdio, mut relay) = plumbing.split();
    let mut container = create(&mut config, stdio, netns, home)?;
    drop(config);
    if let Some(master) = container.take_terminal() {
        relay
            .connect_terminal(master, console_size, open_stdin, stdin_once)
            .map_err(|e| failed("set up the terminal", &e))?;
    }
    let mut next_id = 0;
    for AttachStream { stream, options } in attach {
        next_id += 1;
        relay.attach(Viewer::new(next_id, stream, options, &[]).map_err(|e| failed("attach", &e))?);
    }
    let mut subscribers = Vec::new();
    if let Some(stream) = events {
        next_id += 1;
        subscribers.push(Subscriber::new(next_id, stream, &[]).map_err(|e| failed("subscribe", &e))?);
    }
    let started_at = Timestamp::now();
    let monitor = MonitorRecord {
        protocol: PROTOCOL_VERSION,
        id: home.id.clone(),
        shim_pid: rustix::process::getpid().as_raw_nonzero().get(),
        container_pid: container.pid(),
        container_start_ticks: start_ticks(container.pid()).unwrap_or(0),
        created_at: started_at.clone(),
        cgroup: Some(container.cgroup().clone()),
    };
    record::write(&home.dir.join(record::MONITOR), &monitor, Durability::Visible)
        .map_err(|e| Failure::new(FailureKind::Os, e.to_string()))?;
    container.start()?;
    protect_from_oom();
    Ok(Started { listener, container, started_at, log, relay, subscribers, next_id })
}

fn create(
    config: &mut Config,
    stdio: brigantine_runtime::Stdio,
    netns: Option<OwnedFd>,
    home: &Home,
) -> Result<Container, Failure> {
    let mut spec = std::mem::take(&mut config.spec);
    if let Some(process) = spec.process_mut() {
        process.set_terminal(Some(config.terminal));
        if process.oom_score_adj().is_none() {
            process.set_oom_score_adj(Some(0));
        }
    }
    if let Some(runtime) = config.runtime.take() {
        let place = Place { dir: &home.dir, fd: &home.fd };
        let (id, rootfs) = (&config.id, &config.rootfs);
        let parts = Parts { id, spec, rootfs, netns, stdio, systemd_cgroup: config.systemd_cgroup };
        return Ok(Container::Other(Box::new(Foreign::create(runtime, place, parts)?)));
    }
    let described = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let filter = match described {
        Some(described) => seccomp::compile(described)?,
        None => None,
    };
    let state = hooks::state(&config.id, "running", None, None, &spec);
    let notified = Listener::of(described, state);
    let common = Common::of(&spec);
    let is_own = |n: &LinuxNamespace| n.typ() == LinuxNamespaceType::User && n.path().is_none();
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    let own_users = namespaces.is_some_and(|all| all.iter().any(is_own));
    let mut launch = Launch::new(config.id.clone(), spec, config.rootfs.clone(), stdio);
    if let Some(netns) = netns {
        if own_users {
            // The network came with its owner.
            let owner = brigantine_sys::netns::owner(netns.as_fd())
                .map_err(|e| failed("find the owner of the network namespace", &e.into()))?;
            launch.joined.push((LinuxNamespaceType::User, owner));
        }
        launch.joined.push((LinuxNamespaceType::Network, netns));
    }
    launch.systemd_cgroup = config.systemd_cgroup;
    launch.die_with_parent = true;
    launch.seccomp.clone_from(&filter);
    let created = brigantine_runtime::create(launch)?;
    Ok(Container::Own(Box::new(Own { created, lasting: Lasting { filter, notified, common } })))
}

/// Not permitted to everyone, and nothing depends on it.
fn protect_from_oom() {
    drop(fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ.to_string()));
}

fn failed(what: &str, error: &io::Error) -> Failure {
    Failure::new(FailureKind::Os, format!("monitor: {what}: {error}"))
}
