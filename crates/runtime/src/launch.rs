//! What a caller hands in to get a container or a process in one, and what it gets back.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use brigantine_sys::spawn::{self, ns};
use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use rustix::process::{PidfdFlags, Signal, WaitId, WaitIdOptions, waitid};
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::child;
use crate::compile::{self, Compiled, within};
use crate::describe::{self, Subject};
use crate::error::{Error, Kind};
use crate::plan::{Gate, MESSAGE_LENGTH, Message, Plan, Step, Terminal};
use crate::spec::{Hooks, LinuxNamespaceType, Process, Spec};
use crate::{hooks, identity, seccomp};

/// Where the container's root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rootfs {
    /// An existing directory, used as it is.
    Path(PathBuf),
    /// Layers, mounted inside the container's own mount namespace: nothing shows on the host.
    Overlay {
        /// Topmost layer first.
        lower: Vec<PathBuf>,
        upper: PathBuf,
        work: PathBuf,
        #[serde(default)]
        options: OverlayOptions,
    },
}

/// Overlay mount options beyond the directories.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayOptions {
    /// `volatile`: no sync of the upper layer at all.
    #[serde(default)]
    pub volatile: bool,
    /// Any further `key` or `key=value`, e.g. `metacopy=on`.
    #[serde(default)]
    pub extra: Vec<String>,
}

/// The first three descriptors of the process.
#[derive(Debug)]
pub enum Stdio {
    /// `/dev/null`, three times.
    Null,
    /// The caller's own.
    Inherit,
    Fds {
        stdin: OwnedFd,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    /// A new terminal, opened in the container's own devpts; its master comes back.
    Terminal,
}

/// A container to be created.
#[derive(Debug)]
pub struct Launch {
    pub id: String,
    pub spec: Spec,
    /// For the state that hooks see, and relative paths in the spec.
    pub bundle: Option<PathBuf>,
    pub rootfs: Rootfs,
    pub stdio: Stdio,
    /// Namespaces to join by descriptor, e.g. the network namespace prepared by the engine. They
    /// win over what the spec says about the same type.
    pub joined: Vec<(LinuxNamespaceType, OwnedFd)>,
    pub systemd_cgroup: bool,
    /// Kill the container's init when the calling thread ends.
    pub die_with_parent: bool,
    /// A filter compiled before from the same spec; otherwise it is compiled now.
    pub seccomp: Option<seccomp::Program>,
    /// Descriptors 3 and up that the process inherits (count, as `--preserve-fds`).
    pub preserve_fds: u32,
    /// A listening socket (`SOCK_SEQPACKET`) on which [`start_waiting`] will be heard: for a caller
    /// that does not stay. Without it, [`Created::start`] starts the container.
    pub start_listener: Option<OwnedFd>,
}

impl Launch {
    /// A launch with everything optional left out.
    pub fn new(id: impl Into<String>, spec: Spec, rootfs: Rootfs, stdio: Stdio) -> Self {
        Self {
            id: id.into(),
            spec,
            bundle: None,
            rootfs,
            stdio,
            joined: Vec::new(),
            systemd_cgroup: false,
            die_with_parent: false,
            seccomp: None,
            preserve_fds: 0,
            start_listener: None,
        }
    }
}

/// A container whose process 1 is set up and waits right before its exec. Dropping it without a
/// successful [`Created::start`] (or [`Created::detach`]) kills the process and removes its cgroup.
#[derive(Debug)]
pub struct Created {
    pid: i32,
    pidfd: OwnedFd,
    terminal: Option<OwnedFd>,
    cgroup: Cgroup,
    channel: OwnedFd,
    subject: Subject,
    /// The process is somebody's: it has started, or others will start it.
    released: bool,
}

impl Created {
    /// In the caller's PID namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The terminal's master, once, if [`Stdio::Terminal`] was asked for.
    pub fn take_terminal(&mut self) -> Option<OwnedFd> {
        self.terminal.take()
    }

    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Lets the process exec; returns once that has succeeded, or with its error. A failed start
    /// ends the process.
    pub fn start(&mut self) -> Result<(), Error> {
        start_over(self.channel.as_fd(), &self.subject)?;
        self.released = true;
        Ok(())
    }

    /// Leaves the waiting process to whoever starts it through [`Launch::start_listener`].
    pub fn detach(mut self) {
        self.released = true;
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if !self.released {
            end(&self.pidfd);
            // A group that cannot be removed now is found and removed with the container's record.
            drop(self.cgroup.delete());
        }
    }
}

/// Starts a container that waits on a [`Launch::start_listener`]; `connection` is connected to it.
pub fn start_waiting(connection: BorrowedFd<'_>, process: &Process) -> Result<(), Error> {
    let plan = identity::compile(process, None, false)?;
    let subject = Subject::of_process(&plan);
    start_over(connection, &subject)
}

fn start_over(channel: BorrowedFd<'_>, subject: &Subject) -> Result<(), Error> {
    let lost = |e| Error::os("telling the container to start", e);
    child::send(channel, Message::Start).map_err(lost)?;
    match receive(channel)?.0 {
        // The exec closed the channel.
        None => Ok(()),
        Some(Message::Failed(failure)) => Err(describe::failure(&[], subject, failure)),
        Some(_) => Err(lost(rustix::io::Errno::PROTO)),
    }
}

/// Another process for a running container.
#[derive(Debug)]
pub struct ExecRequest {
    pub process: Process,
    pub stdio: Stdio,
    /// The container's process 1, in the caller's PID namespace: its namespaces are entered.
    pub pid: i32,
    /// Where the new process is accounted; `None` leaves it in the caller's cgroups.
    pub cgroup: Option<Cgroup>,
    /// The container's own filter, if it has one.
    pub seccomp: Option<seccomp::Program>,
    pub die_with_parent: bool,
    pub preserve_fds: u32,
}

/// A process started by [`exec`].
#[derive(Debug)]
pub struct Execed {
    /// In the caller's PID namespace. The process is the caller's child.
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub terminal: Option<OwnedFd>,
}

/// Everything up to right before the exec. The process is a child of the caller.
pub fn create(mut launch: Launch) -> Result<Created, Error> {
    if launch.systemd_cgroup {
        return Err(Error::unsupported("the systemd cgroup driver is not built yet; use cgroupfs"));
    }
    check_id(&launch.id)?;
    check_hooks(launch.spec.hooks().as_ref())?;
    let linux = launch.spec.linux().as_ref();
    let path = match linux.and_then(|l| l.cgroups_path().as_ref()) {
        Some(path) if path.is_absolute() => path.to_string_lossy().into_owned(),
        Some(path) if !path.as_os_str().is_empty() => format!("/brigantine/{}", path.display()),
        _ => format!("/brigantine/{}", launch.id),
    };
    let resources = linux.and_then(|l| l.resources().as_ref());
    let cgroup = Cgroup::create(&path, resources)?;
    let made = create_in(&mut launch, &cgroup);
    if made.is_err() {
        // The cause is what matters; an empty group that stays is removed with the record.
        drop(cgroup.delete());
    }
    made
}

fn create_in(launch: &mut Launch, cgroup: &Cgroup) -> Result<Created, Error> {
    let id = launch.id.clone();
    let spec_hooks = launch.spec.hooks().clone();
    let annotations = launch.spec.annotations().clone();
    let bundle = launch.bundle.clone();
    let gate = launch.start_listener.take().map_or(Gate::Channel, Gate::Listener);
    let empty = Launch::new("", Spec::default(), Rootfs::Path(PathBuf::new()), Stdio::Null);
    let mut compiled = compile::compile(std::mem::replace(launch, empty), cgroup, gate)?;
    let subject = Subject::of(&compiled.plan);
    let target = cgroup.clone_target()?;
    let (channel, child) = spawn_plan(&mut compiled, target.as_ref().map(AsFd::as_fd))?;
    let mut setup =
        Setup { channel: channel.as_fd(), plan: &compiled.plan, subject: &subject, terminal: None };
    let result = (|| {
        if let Some((uid, gid)) = &compiled.maps {
            write_maps(child.pid, uid, gid)?;
            setup.say(Message::Mapped)?;
        }
        if let Some(score) = compiled.oom_score {
            write_proc(child.pid, "oom_score_adj", &score.to_string())?;
        }
        // A child that waits for hooks does so first, and hears of its cgroup right after them.
        if !spec_hooks.as_ref().is_some_and(hooks::any_before_pivot) {
            setup.say(Message::InCgroup)?;
        }
        setup.until_ready(|| {
            let Some(spec_hooks) = &spec_hooks else { return Ok(()) };
            let state = serde_json::json!({
                "ociVersion": "1.2.0",
                "id": id,
                "status": "creating",
                "pid": child.pid,
                "bundle": bundle.clone().unwrap_or_default(),
                "annotations": annotations.clone().unwrap_or_default(),
            });
            let state = state.to_string().into_bytes();
            let prestart = spec_hooks.prestart().as_ref();
            hooks::run("prestart", prestart, &state, bundle.as_deref())?;
            hooks::run("createRuntime", spec_hooks.create_runtime().as_ref(), &state, bundle.as_deref())
        })
    })();
    let terminal = setup.terminal.take();
    // A child that has already said what is wrong says it better than a broken pipe does.
    let result = result.map_err(|e| setup.better(e));
    if let Err(error) = result {
        end(&child.pidfd);
        return Err(error);
    }
    Ok(Created {
        pid: child.pid,
        pidfd: child.pidfd,
        terminal,
        cgroup: cgroup.clone(),
        channel,
        subject,
        released: false,
    })
}

/// A container's name becomes a file name and a cgroup's: nothing that means more than itself.
pub(crate) fn check_id(id: &str) -> Result<(), Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id.len() > 1024 || id == "." || id == ".." || !id.chars().all(plain) {
        return Err(Error::invalid(format!(
            "container id {id:?}: only letters, digits and \"_+-.\" are allowed"
        )));
    }
    Ok(())
}

fn check_hooks(hooks: Option<&Hooks>) -> Result<(), Error> {
    let Some(hooks) = hooks else { return Ok(()) };
    for (name, list) in
        [("createContainer", hooks.create_container()), ("startContainer", hooks.start_container())]
    {
        if list.as_ref().is_some_and(|l| !l.is_empty()) {
            return Err(Error::unsupported(format!("{name} hooks are not built yet")));
        }
    }
    Ok(())
}

fn pair() -> Result<(OwnedFd, OwnedFd), Error> {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|e| Error::os("opening a channel to the container", e))
}

fn spawn_plan(
    compiled: &mut Compiled,
    target: Option<BorrowedFd<'_>>,
) -> Result<(OwnedFd, spawn::Child), Error> {
    let (ours, theirs) = pair()?;
    let mut ours = Some(ours);
    let Compiled { plan, new, around, .. } = compiled;
    let child = within(around, || {
        spawn::clone(*new, target, || {
            // The parent's end must not stay open in the child, or its death would go unnoticed.
            drop(ours.take());
            child::run(plan, theirs.as_fd())
        })
        .map_err(|e| {
            let hint = match e {
                rustix::io::Errno::PERM => " (new namespaces need privileges)",
                rustix::io::Errno::NOSPC => " (too many namespaces)",
                _ => "",
            };
            Error::os(format!("cloning the container's process{hint}"), e)
        })
    })?;
    let ours =
        ours.ok_or_else(|| Error::os("opening a channel to the container", rustix::io::Errno::BADF))?;
    Ok((ours, child))
}

/// The parent's side of a child's setting up.
struct Setup<'a> {
    channel: BorrowedFd<'a>,
    plan: &'a Plan,
    subject: &'a Subject,
    terminal: Option<OwnedFd>,
}

impl Setup<'_> {
    fn say(&self, message: Message) -> Result<(), Error> {
        child::send(self.channel, message).map_err(|e| Error::os("talking to the container's process", e))
    }

    fn until_ready(&mut self, mut on_mounted: impl FnMut() -> Result<(), Error>) -> Result<(), Error> {
        loop {
            match receive(self.channel)? {
                (Some(Message::Ready), _) => return Ok(()),
                (Some(Message::Terminal), Some(fd)) => self.terminal = Some(fd),
                (Some(Message::Mounted), _) => {
                    on_mounted()?;
                    self.say(Message::HooksDone)?;
                    self.say(Message::InCgroup)?;
                }
                (Some(Message::Failed(failure)), _) => {
                    return Err(describe::failure(&self.plan.steps, self.subject, failure));
                }
                (None, _) => {
                    return Err(Error::new(
                        Kind::Os,
                        "the container's process died while being set up (killed; is its memory limit too low?)",
                    ));
                }
                (Some(_), _) => {
                    return Err(Error::os("talking to the container's process", rustix::io::Errno::PROTO));
                }
            }
        }
    }

    /// If the child has already reported a failure of its own, that is the cause.
    fn better(&self, error: Error) -> Error {
        if !matches!(error.errno(), Some(libc::EPIPE | libc::ESRCH | libc::ECONNRESET)) {
            return error;
        }
        while let Ok((Some(message), _)) = receive(self.channel) {
            if let Message::Failed(failure) = message {
                return describe::failure(&self.plan.steps, self.subject, failure);
            }
        }
        error
    }
}

/// One message and perhaps a descriptor; no message is the end of the channel.
fn receive(channel: BorrowedFd<'_>) -> Result<(Option<Message>, Option<OwnedFd>), Error> {
    let failed = |e| Error::os("hearing from the container's process", e);
    let mut bytes = [0_u8; MESSAGE_LENGTH];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut reset = false;
    let length = loop {
        let mut data = [std::io::IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(channel, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received.bytes,
            Err(rustix::io::Errno::INTR) => {}
            // The process ended without having read everything. The kernel says so once, before
            // what the process had still to say.
            Err(rustix::io::Errno::CONNRESET) if !reset => reset = true,
            Err(rustix::io::Errno::CONNRESET) => break 0,
            Err(e) => return Err(failed(e)),
        }
    };
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.last();
        }
    }
    if length == 0 {
        return Ok((None, fd));
    }
    let message = bytes.get(..length).and_then(Message::decode);
    Ok((Some(message.ok_or_else(|| failed(rustix::io::Errno::PROTO))?), fd))
}

/// Kills and reaps a child of ours.
fn end(pidfd: &OwnedFd) {
    // Either it is gone already, or it dies now; both are what is wanted.
    rustix::process::pidfd_send_signal(pidfd, Signal::KILL).ok();
    while let Err(rustix::io::Errno::INTR) = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {}
}

fn write_proc(pid: i32, file: &str, text: &str) -> Result<(), Error> {
    std::fs::write(format!("/proc/{pid}/{file}"), text)
        .map_err(|e| Error::os(format!("writing {:?} to {file} of the container's process", text.trim()), e))
}

fn write_maps(pid: i32, uid: &str, gid: &str) -> Result<(), Error> {
    if !rustix::process::geteuid().is_root() {
        write_proc(pid, "setgroups", "deny")?;
    }
    write_proc(pid, "gid_map", gid)?;
    write_proc(pid, "uid_map", uid)
}

/// Runs a process in a running container; returns once its exec has succeeded.
pub fn exec(request: ExecRequest) -> Result<Execed, Error> {
    let what = || format!("entering the container of process {}", request.pid);
    let pid = rustix::process::Pid::from_raw(request.pid).filter(|_| request.pid > 0);
    let pid = pid.ok_or_else(|| Error::invalid(format!("{} is not a process id", request.pid)))?;
    let open = || {
        rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|e| match e {
            rustix::io::Errno::SRCH => Error::new(Kind::State, "the container is not running"),
            e => Error::os(what(), e),
        })
    };
    let mut bits = ns::MOUNT | ns::CGROUP | ns::UTS | ns::IPC | ns::NETWORK;
    for (bit, name) in [(ns::USER, "user"), (ns::TIME, "time")] {
        if namespace_of(&request.pid.to_string(), name)? != namespace_of("self", name)? {
            bits |= bit;
        }
    }
    let mut steps = request.cgroup.as_ref().map(Cgroup::entrances).transpose()?.unwrap_or_default();
    steps.extend([Step::EnterAll { pidfd: open()?, bits }, Step::Session]);
    if matches!(request.stdio, Stdio::Terminal) {
        let size = request.process.console_size().as_ref().map(|b| (b.height() as u16, b.width() as u16));
        let owner = rustix::process::Uid::from_raw(request.process.user().uid());
        steps.push(Step::FindTerminals);
        steps.push(Step::Terminal(Terminal { size, console: None, owner }));
    }
    steps.push(Step::AwaitCgroup { new_namespace: false });
    let oom_score = request.process.oom_score_adj();
    let mut process = identity::compile(&request.process, request.seccomp, false)?;
    process.die_with_parent = request.die_with_parent;
    process.preserve_fds = request.preserve_fds;
    let mut compiled = Compiled {
        plan: Plan {
            steps,
            process,
            stdio: compile::stdio(request.stdio)?,
            proc: compile::host_proc()?,
            gate: Gate::Channel,
            hide: true,
        },
        new: 0,
        around: vec![(open()?, ns::PID, "pid")],
        maps: None,
        oom_score,
    };
    let subject = Subject::of(&compiled.plan);
    let target = request.cgroup.as_ref().map(Cgroup::clone_target).transpose()?.flatten();
    let (channel, child) = spawn_plan(&mut compiled, target.as_ref().map(AsFd::as_fd))?;
    let mut setup =
        Setup { channel: channel.as_fd(), plan: &compiled.plan, subject: &subject, terminal: None };
    let result = (|| {
        if let Some(score) = oom_score {
            write_proc(child.pid, "oom_score_adj", &score.to_string())?;
        }
        setup.say(Message::InCgroup)?;
        setup.until_ready(|| Ok(()))?;
        start_over(channel.as_fd(), &subject)
    })();
    let terminal = setup.terminal.take();
    if let Err(error) = result.map_err(|e| setup.better(e)) {
        end(&child.pidfd);
        return Err(error);
    }
    Ok(Execed { pid: child.pid, pidfd: child.pidfd, terminal })
}

fn namespace_of(pid: &str, name: &str) -> Result<(u64, u64), Error> {
    let path = format!("/proc/{pid}/ns/{name}");
    let fd = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::os(format!("reading {path}"), e))?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| Error::os(format!("reading {path}"), e))?;
    Ok((stat.st_dev, stat.st_ino))
}
