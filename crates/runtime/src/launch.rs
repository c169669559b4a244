//! What a caller hands in to get a container or a process in one, and what it gets back.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use brigantine_sys::Replacement;
use brigantine_sys::netns::Coming;
use brigantine_sys::spawn::{self, ns};
use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use rustix::process::{PidfdFlags, Signal, WaitId, WaitIdOptions, waitid};
use serde::{Deserialize, Serialize};

use crate::cgroup::{Cgroup, Making};
use crate::child;
use crate::compile::{self, Compiled, within};
use crate::describe::{self, Subject};
use crate::error::{Error, Kind};
use crate::finish::TOLD;
use crate::handover::{hand_over, send_network};
use crate::listener::Listener;
use crate::mounts::Draft;
use crate::plan::{Gate, Last, MESSAGE_LENGTH, Message, Part, Place, Plan, Step, Terminal, Tree, TreeMount};
use crate::spec::{
    LinuxMemoryPolicy, LinuxNamespace, LinuxNamespaceType, LinuxPersonality, LinuxSeccomp, Process, Spec,
};
use crate::{hooks, identity, idmap, mounts, netdev, seccomp};

/// Where the container's root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rootfs {
    /// An existing directory, used as it is.
    Path(PathBuf),
    /// An existing directory whose files belong to the container's own ids, as those of layers do: in a user namespace
    /// it is mounted with mapped ids.
    Mapped(PathBuf),
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
    pub spec: Arc<Spec>,
    /// For the state that hooks see, and relative paths in the spec.
    pub bundle: Option<PathBuf>,
    pub rootfs: Rootfs,
    pub stdio: Stdio,
    /// Namespaces to join by descriptor, e.g. the network namespace prepared by the engine. They
    /// win over what the spec says about the same type.
    pub joined: Vec<(LinuxNamespaceType, OwnedFd)>,
    /// A network namespace that is being made ([`begin_network`]), in place of a new one.
    pub network: Option<Coming>,
    pub systemd_cgroup: bool,
    /// A caller that may not make cgroups does without, unless limits are asked for.
    pub rootless: bool,
    /// Kill the container's init when the calling thread ends.
    pub die_with_parent: bool,
    /// A filter compiled before from the same spec; otherwise it is compiled while the process sets itself up.
    pub seccomp: Option<seccomp::Program>,
    /// What the container's process runs instead of the caller's executable, unless that is out of reach already.
    pub executable: Option<Replacement>,
    /// Descriptors 3 and up that the process inherits (count, as `--preserve-fds`).
    pub preserve_fds: u32,
    /// A listening socket (`SOCK_SEQPACKET`) on which [`start_waiting`] will be heard: for a caller
    /// that does not stay. Without it, [`Created::start`] starts the container.
    pub start_listener: Option<OwnedFd>,
    /// The process need not wait at its gate, for [`Created::start`] follows at once: a wakeup less on either side. Not
    /// together with [`Launch::start_listener`] or hooks.
    pub at_once: bool,
    /// Without pivot_root (`--no-pivot`), for a host whose root is its initial ram disk.
    pub no_pivot: bool,
    pub no_new_keyring: bool,
}

impl Launch {
    /// A launch with everything optional left out.
    pub fn new(id: impl Into<String>, spec: impl Into<Arc<Spec>>, rootfs: Rootfs, stdio: Stdio) -> Self {
        Self {
            id: id.into(),
            spec: spec.into(),
            bundle: None,
            rootfs,
            stdio,
            joined: Vec::new(),
            network: None,
            systemd_cgroup: false,
            rootless: false,
            die_with_parent: false,
            seccomp: None,
            executable: None,
            preserve_fds: 0,
            start_listener: None,
            at_once: false,
            no_pivot: false,
            no_new_keyring: false,
        }
    }
}

/// Begins to make the new network namespace that a spec's list asks for, while the caller prepares the rest; `None`
/// where the clone has to make it.
pub fn begin_network(list: &[LinuxNamespace]) -> Option<Coming> {
    use LinuxNamespaceType as T;
    let asked = |n: &&LinuxNamespace| n.typ() == T::Network;
    let fresh = list.iter().find(asked)?.path().as_ref().is_none_or(|p| p.as_os_str().is_empty());
    // It belongs to the user namespace of whoever makes it.
    let owned = list.iter().any(|n| n.typ() == T::User);
    if !fresh || owned || !compile::privileged() {
        return None;
    }
    Coming::begin().ok()
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
    /// The process has been told to start, and its program is executed.
    begun: bool,
    /// What the process was made from, many descriptors: let go of while it runs, not while it waits for that.
    spent: Option<Compiled>,
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
        if !self.begun {
            let process = (self.pid, self.pidfd.as_fd());
            tell_start(self.channel.as_fd())?;
            start_over(self.channel.as_fd(), &self.subject, process, None)?;
        }
        self.released = true;
        self.spent = None;
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

/// Starts a container that waits on a [`Launch::start_listener`]; `connection` is connected to it, and
/// `pid` is its process.
pub fn start_waiting(connection: BorrowedFd<'_>, spec: &Spec, pid: i32) -> Result<(), Error> {
    let process = spec.process().as_ref().ok_or_else(|| Error::invalid("the spec has no process"))?;
    let mut plan = identity::compile(process, None, false)?;
    let hooks = spec.hooks().as_ref().and_then(|h| h.start_container().as_ref());
    plan.start_hooks = hooks::compile("startContainer", hooks, &serde_json::json!({}))?;
    let mut subject = Subject::of_process(&plan);
    subject.filtered = spec.linux().as_ref().is_some_and(|l| l.seccomp().is_some());
    let pidfd = open_process(pid)?;
    tell_start(connection)?;
    start_over(connection, &subject, (pid, pidfd.as_fd()), None)
}

fn open_process(pid: i32) -> Result<OwnedFd, Error> {
    let number = rustix::process::Pid::from_raw(pid).filter(|_| pid > 0);
    let number = number.ok_or_else(|| Error::invalid(format!("{pid} is not a process id")))?;
    rustix::process::pidfd_open(number, PidfdFlags::empty()).map_err(|e| match e {
        rustix::io::Errno::SRCH => Error::new(Kind::State, "the container is not running"),
        e => Error::os(format!("opening process {pid}"), e),
    })
}

fn lost(errno: rustix::io::Errno) -> Error {
    Error::os("telling the container to start", errno)
}

fn tell_start(channel: BorrowedFd<'_>) -> Result<(), Error> {
    child::send(channel, Message::Start).map_err(lost)
}

/// Until the program of a process that has been told to start is executed.
fn start_over(
    channel: BorrowedFd<'_>,
    subject: &Subject,
    (pid, pidfd): (i32, BorrowedFd<'_>),
    listener: Option<&Listener>,
) -> Result<(), Error> {
    let mut asked = false;
    loop {
        match (receive(channel)?.0, listener) {
            (None, Some(_)) if !asked => {
                return Err(Error::new(
                    Kind::Os,
                    "the container's process ended before it handed its seccomp listener over",
                ));
            }
            // The exec closed the channel; or the end of a process that its filter did not let speak.
            (None, _) if subject.filtered && executed(pid) == Some(false) => {
                return Err(silenced(subject));
            }
            (None, _) => return Ok(()),
            (Some(Message::Failed(failure)), _) => {
                return Err(failed_with_more(channel, &[], subject, failure));
            }
            (Some(Message::Listener(fd)), Some(listener)) => {
                asked = true;
                if let Err(error) = listener.hand_over(pid, pidfd, fd) {
                    // It waits for an answer that would let it run without its listener.
                    rustix::process::pidfd_send_signal(pidfd, Signal::KILL).ok();
                    return Err(error);
                }
                child::send(channel, Message::HooksDone).map_err(lost)?;
            }
            (Some(_), _) => return Err(lost(rustix::io::Errno::PROTO)),
        }
    }
}

fn silenced(subject: &Subject) -> Error {
    let program = &subject.program;
    Error::new(
        Kind::Os,
        format!(
            "exec {program:?}: the process was ended before its program was executed: its seccomp filter does not \
             allow what is needed for that (execve at least)"
        ),
    )
}

/// A process that could not execute its program says what that lacks, or what a hook said, and ends.
fn failed_with_more(
    channel: BorrowedFd<'_>,
    steps: &[Step],
    subject: &Subject,
    failure: crate::plan::Failure,
) -> Error {
    let mut told = [0_u8; TOLD];
    let tells = matches!(failure.place, Place::Last(Last::Exec | Last::StartHook, _));
    let length = match tells.then(|| rustix::net::recv(channel, &mut told[..], RecvFlags::empty())) {
        Some(Ok((length, _))) => length.min(told.len()),
        _ => 0,
    };
    describe::failure_told(steps, subject, failure, &told[..length])
}

/// Whether the process has executed a program since it was cloned (`PF_FORKNOEXEC` in field 9 of proc_pid_stat(5));
/// nobody knows of one that has been reaped.
fn executed(pid: i32) -> Option<bool> {
    const PF_FORKNOEXEC: u64 = 0x40;
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything.
    let flags: u64 = text.rsplit_once(')')?.1.split_whitespace().nth(6)?.parse().ok()?;
    Some(flags & PF_FORKNOEXEC == 0)
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
    /// Who answers that filter's notifications.
    pub listener: Option<Listener>,
    /// What else of the container's spec holds for every process in it.
    pub common: Common,
    pub die_with_parent: bool,
    pub preserve_fds: u32,
    /// As [`Launch::executable`].
    pub executable: Option<Replacement>,
}

/// What a container's spec says about all of its processes, beside what each is given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Common {
    personality: Option<LinuxPersonality>,
    memory_policy: Option<LinuxMemoryPolicy>,
}

impl Common {
    pub fn of(spec: &Spec) -> Self {
        let linux = spec.linux().as_ref();
        Self {
            personality: linux.and_then(|l| l.personality().clone()),
            memory_policy: linux.and_then(|l| l.memory_policy().clone()),
        }
    }
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
pub fn create(launch: Launch) -> Result<Created, Error> {
    create_beside(launch, |_, _| Ok(()))
}

/// The same, and `beside` is done while the process sets itself up: it gets the process's number and group. Its
/// failure ends the process.
pub(crate) fn create_beside(
    launch: Launch,
    beside: impl FnOnce(i32, &Cgroup) -> Result<(), Error>,
) -> Result<Created, Error> {
    check_id(&launch.id)?;
    if let Some(list) = launch.spec.hooks() {
        hooks::check_all(list)?;
    }
    let group = Making::begin(&launch.id, &launch.spec, launch.systemd_cgroup, launch.rootless)?;
    create_in(launch, group, beside)
}

fn create_in(
    mut launch: Launch,
    mut group: Making,
    beside: impl FnOnce(i32, &Cgroup) -> Result<(), Error>,
) -> Result<Created, Error> {
    let id = launch.id.clone();
    let spec_hooks = launch.spec.hooks().clone();
    let bundle = launch.bundle.clone();
    let state = hooks::state(&id, "creating", None, bundle.as_deref(), &launch.spec);
    let listener = Listener::of(described(&launch.spec), state.clone());
    let at_once =
        launch.at_once && launch.start_listener.is_none() && spec_hooks.is_none() && listener.is_none();
    let gate = launch.start_listener.take().map_or(Gate::Channel, Gate::Listener);
    let spec = Arc::clone(&launch.spec);
    let mut compiled = compile::compile(launch, group.planned(), gate)?;
    compiled.plan.process.listened_early = listener.is_some();
    let subject = Subject::of(&compiled.plan);
    let target = group.planned().clone_target()?;
    let (channel, child) = spawn_plan(&mut compiled, target.as_ref().map(AsFd::as_fd))?;
    let mut setup = Setup {
        channel: channel.as_fd(),
        plan: &compiled.plan,
        subject: &subject,
        process: (child.pid, child.pidfd.as_fd()),
        listener: listener.as_ref(),
        terminal: None,
        at_once,
    };
    let result = (|| {
        if let Some((uid, gid)) = &compiled.maps {
            write_maps(child.pid, uid, gid)?;
            setup.say(Message::Mapped)?;
        }
        let mut network = None;
        if let Some(coming) = compiled.network.take() {
            let made = coming.get().map_err(|e| Error::os("making a network namespace", e))?;
            send_network(channel.as_fd(), made.as_fd())?;
            network = Some(made);
        }
        if !compiled.net_devices.is_empty() {
            let joined = compiled.plan.steps.iter().find_map(|step| match step {
                Step::Enter { namespace, bit: ns::NETWORK, .. } => Some(namespace.as_fd()),
                _ => None,
            });
            let joined = joined.or(network.as_ref().map(AsFd::as_fd));
            let path = format!("/proc/{}/ns/net", child.pid);
            let own = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|e| Error::os(format!("opening {path}"), e))?;
            netdev::apply(&compiled.net_devices, joined.unwrap_or(own.as_fd()))?;
        }
        // While the child sets itself up.
        let cgroup = group.finish()?;
        hand_over(&compiled.hands, channel.as_fd())?;
        cgroup.attach(child.pid)?;
        if let Some(score) = compiled.oom_score {
            write_proc(child.pid, "oom_score_adj", &score.to_string())?;
        }
        // A child that waits for hooks does so first, and hears of its cgroup right after them.
        if !spec_hooks.as_ref().is_some_and(hooks::any_before_pivot) {
            setup.say(Message::InCgroup)?;
        }
        if let (Some(writer), Some(described)) = (compiled.filter.take(), described(&spec)) {
            let code = seccomp::compile(described)?.map(|program| program.instructions());
            let written = writer.write(&code.unwrap_or_default());
            written.map_err(|e| Error::os("handing the container's process its seccomp filter", e))?;
        }
        beside(child.pid, cgroup)?;
        if at_once {
            tell_start(channel.as_fd())?;
        }
        setup.until_ready(|| {
            let Some(spec_hooks) = &spec_hooks else { return Ok(()) };
            let mut state = state.clone();
            if let Some(fields) = state.as_object_mut() {
                fields.insert("pid".to_owned(), child.pid.into());
            }
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
    // Whoever reads what the container writes hears of its end.
    compiled.plan.stdio = None;
    Ok(Created {
        pid: child.pid,
        pidfd: child.pidfd,
        terminal,
        cgroup: group.keep(),
        channel,
        subject,
        released: false,
        begun: at_once,
        spent: Some(compiled),
    })
}

fn described(spec: &Spec) -> Option<&LinuxSeccomp> {
    spec.linux().as_ref().and_then(|l| l.seccomp().as_ref())
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
    let Compiled { plan, new, around, first, .. } = compiled;
    if !first.is_empty() {
        let child = spawn_behind(first, around, *new, target, plan, &theirs, &mut ours)?;
        let ours =
            ours.ok_or_else(|| Error::os("opening a channel to the container", rustix::io::Errno::BADF))?;
        return Ok((ours, child));
    }
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
                rustix::io::Errno::INVAL => " (does this kernel have all kinds of namespaces?)",
                _ => "",
            };
            Error::os(format!("cloning the container's process{hint}"), e)
        })
    })?;
    let ours =
        ours.ok_or_else(|| Error::os("opening a channel to the container", rustix::io::Errno::BADF))?;
    Ok((ours, child))
}

/// Clones the container's process from one in between, which has entered namespaces from which there is
/// no way back. The container's process is the caller's child all the same.
fn spawn_behind(
    first: &[(OwnedFd, u64, &'static str)],
    around: &[(OwnedFd, u64, &'static str)],
    new: u64,
    target: Option<BorrowedFd<'_>>,
    plan: &mut Plan,
    theirs: &OwnedFd,
    ours: &mut Option<OwnedFd>,
) -> Result<spawn::Child, Error> {
    let what = "cloning the container's process in its user namespace";
    let (here, there) = pair()?;
    let mut here = Some(here);
    // Born in the group as its child is to be: once in the user namespace it could not put it there.
    let between = spawn::clone(0, target, || {
        drop(here.take());
        // Whoever lives in that user namespace must not come by the caller's executable either.
        let executable = std::mem::take(&mut plan.executable);
        let out_of_reach = executable.as_ref().map_or(Ok(()), Replacement::apply);
        std::mem::forget(executable);
        let made = out_of_reach.map_err(|e| (u8::MAX, e)).and_then(|()| enter_first(first, around));
        let made = made.and_then(|()| {
            spawn::clone_sibling(new, None, || {
                drop(ours.take());
                child::run(plan, theirs.as_fd())
            })
            .map_err(|e| (u8::MAX, e))
        });
        match made {
            Ok(child) => child::send_process(there.as_fd(), child.pid, child.pidfd.as_fd()),
            Err((place, errno)) => child::send_refusal(there.as_fd(), place, errno),
        }
    })
    .map_err(|e| Error::os(what, e))?;
    drop(there);
    let here = here.ok_or_else(|| Error::os(what, rustix::io::Errno::BADF))?;
    let mut bytes = [0_u8; MESSAGE_LENGTH];
    let received = receive_raw(here.as_fd(), &mut bytes);
    while let Err(rustix::io::Errno::INTR) =
        waitid(WaitId::PidFd(between.pidfd.as_fd()), WaitIdOptions::EXITED)
    {}
    let number = i32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    match received? {
        (MESSAGE_LENGTH, Some(pidfd)) => Ok(spawn::Child { pid: number, pidfd }),
        (MESSAGE_LENGTH, None) => {
            let place = usize::from(bytes[1]);
            let name = first.iter().chain(around).nth(place).map(|(_, _, name)| *name);
            let step = name.map_or_else(|| what.to_owned(), |name| format!("entering the {name} namespace"));
            Err(Error::os(step, std::io::Error::from_raw_os_error(number)))
        }
        _ => Err(Error::os(what, rustix::io::Errno::SRCH)),
    }
}

/// In the process in between: nothing here allocates.
fn enter_first(
    first: &[(OwnedFd, u64, &'static str)],
    around: &[(OwnedFd, u64, &'static str)],
) -> Result<(), (u8, rustix::io::Errno)> {
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    // Whoever lives in that user namespace must not trace or read this process.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .map_err(|e| (u8::MAX, e))?;
    for (place, (fd, bits, _)) in first.iter().chain(around).enumerate() {
        spawn::setns(fd.as_fd(), *bits).map_err(|e| (place as u8, e))?;
        if bits & ns::USER != 0 {
            let (uid, gid) = (rustix::process::Uid::ROOT, rustix::process::Gid::ROOT);
            // Denied where a user without privileges made the namespace; then there are none to drop.
            set_thread_groups(&[]).ok();
            set_thread_res_gid(gid, gid, gid).map_err(|e| (u8::MAX, e))?;
            set_thread_res_uid(uid, uid, uid).map_err(|e| (u8::MAX, e))?;
        }
    }
    Ok(())
}

/// The parent's side of a child's setting up.
struct Setup<'a> {
    channel: BorrowedFd<'a>,
    plan: &'a Plan,
    subject: &'a Subject,
    process: (i32, BorrowedFd<'a>),
    /// Who gets the filter's descriptor before the gate.
    listener: Option<&'a Listener>,
    terminal: Option<OwnedFd>,
    /// The process was told to start already: it goes on until its program is executed.
    at_once: bool,
}

impl Setup<'_> {
    fn say(&self, message: Message) -> Result<(), Error> {
        child::send(self.channel, message).map_err(|e| Error::os("talking to the container's process", e))
    }

    fn until_ready(&mut self, mut on_mounted: impl FnMut() -> Result<(), Error>) -> Result<(), Error> {
        loop {
            match receive(self.channel)? {
                (Some(Message::Ready), _) if self.at_once => {}
                (Some(Message::Ready), _) => return Ok(()),
                (None, _) if self.at_once && executed(self.process.0) != Some(false) => return Ok(()),
                (None, _) if self.at_once && self.is_silenced() => return Err(silenced(self.subject)),
                (Some(Message::Terminal), Some(fd)) => self.terminal = Some(fd),
                (Some(Message::MapIds(step)), Some(tree)) => {
                    self.map_ids(step, tree.as_fd())?;
                    self.say(Message::Mapped)?;
                }
                (Some(Message::Mounted), _) => {
                    on_mounted()?;
                    self.say(Message::HooksDone)?;
                    self.say(Message::InCgroup)?;
                }
                (Some(Message::Listener(fd)), _) => {
                    let Some(listener) = self.listener else { return Err(lost(rustix::io::Errno::PROTO)) };
                    listener.hand_over(self.process.0, self.process.1, fd)?;
                    self.say(Message::HooksDone)?;
                }
                (Some(Message::Failed(failure)), _) => {
                    let steps = &self.plan.steps;
                    return Err(failed_with_more(self.channel, steps, self.subject, failure));
                }
                (None, _) if self.listener.is_some() => {
                    return Err(Error::new(
                        Kind::Os,
                        "the container's process died before it handed its seccomp listener over (does its filter allow \
                         what is needed for that?)",
                    ));
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

    /// Whether a process that has ended without a word may have been kept from speaking by its filter.
    fn is_silenced(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let ended = waitid(WaitId::PidFd(self.process.1), options).ok().flatten();
        self.subject.filtered && ended.is_none_or(|status| status.terminating_signal() != Some(libc::SIGKILL))
    }

    /// Maps the ids of a tree that the child has detached.
    fn map_ids(&self, step: u16, tree: BorrowedFd<'_>) -> Result<(), Error> {
        let asked = self.plan.steps.get(usize::from(step)).and_then(|step| match step {
            Step::Attach(TreeMount { tree: Tree::Inside(inside), .. }) => Some((step, inside.ids.as_ref()?)),
            _ => None,
        });
        let Some((step, (namespace, recursive))) = asked else {
            return Err(Error::os("talking to the container's process", rustix::io::Errno::PROTO));
        };
        mounts::map_ids(tree, namespace.as_fd(), *recursive, &|| describe::step(step, Part::Whole))
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
    let mut bytes = [0_u8; MESSAGE_LENGTH];
    let (length, fd) = receive_raw(channel, &mut bytes)?;
    if length == 0 {
        return Ok((None, fd));
    }
    let message = bytes.get(..length).and_then(Message::decode);
    let message =
        message.ok_or_else(|| Error::os("hearing from the container's process", rustix::io::Errno::PROTO))?;
    Ok((Some(message), fd))
}

fn receive_raw(
    channel: BorrowedFd<'_>,
    bytes: &mut [u8; MESSAGE_LENGTH],
) -> Result<(usize, Option<OwnedFd>), Error> {
    let failed = |e| Error::os("hearing from the container's process", e);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut reset = false;
    let length = loop {
        let mut data = [std::io::IoSliceMut::new(bytes)];
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
    Ok((length, fd))
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

/// The maps of a new user namespace: by oneself where the kernel allows it, else by the system's set-uid
/// helpers, which know what the user was given.
fn write_maps(pid: i32, uid: &str, gid: &str) -> Result<(), Error> {
    if rustix::process::geteuid().is_root() && compile::privileged() {
        write_proc(pid, "gid_map", gid)?;
        return write_proc(pid, "uid_map", uid);
    }
    if idmap::is_only(gid, rustix::process::getegid().as_raw()) {
        write_proc(pid, "setgroups", "deny")?;
        write_proc(pid, "gid_map", gid)?;
    } else {
        map_by_helper("newgidmap", pid, gid)?;
    }
    if idmap::is_only(uid, rustix::process::geteuid().as_raw()) {
        write_proc(pid, "uid_map", uid)
    } else {
        map_by_helper("newuidmap", pid, uid)
    }
}

fn map_by_helper(program: &str, pid: i32, map: &str) -> Result<(), Error> {
    let what = || format!("{program} {pid} {}", map.trim().replace('\n', " "));
    let mut command = std::process::Command::new(program);
    command.arg(pid.to_string()).args(map.split_whitespace());
    command.stdin(std::process::Stdio::null());
    brigantine_sys::signals::unblock_in(&mut command);
    let done = command.output().map_err(|e| {
        let hint = match e.kind() {
            std::io::ErrorKind::NotFound => " (more ids than one's own need the package uidmap)",
            _ => "",
        };
        Error::os(format!("{}{hint}", what()), e)
    })?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr).trim().replace('\n', "; ");
    Err(Error::new(Kind::Os, format!("{}: {said}", what())))
}

/// Runs a process in a running container; returns once its exec has succeeded.
pub fn exec(request: ExecRequest) -> Result<Execed, Error> {
    let pidfd = || open_process(request.pid);
    let own = |name: &str| {
        Ok::<_, Error>(namespace_of(&request.pid.to_string(), name)? == namespace_of("self", name)?)
    };
    let mut bits = ns::MOUNT | ns::CGROUP | ns::UTS | ns::IPC | ns::NETWORK;
    let mut first = Vec::new();
    let mut around = vec![(pidfd()?, ns::PID, "pid")];
    let user = !own("user")?;
    if !own("time")? {
        bits |= ns::TIME;
    }
    if user && !compile::privileged() {
        // The container's namespaces may be entered only by who is in its user namespace, and those that
        // are not its own not at all.
        for (bit, name) in [
            (ns::MOUNT, "mnt"),
            (ns::CGROUP, "cgroup"),
            (ns::UTS, "uts"),
            (ns::IPC, "ipc"),
            (ns::NETWORK, "net"),
        ] {
            if own(name)? {
                bits &= !bit;
            }
        }
        if own("pid")? {
            around.clear();
        }
        first.push((pidfd()?, ns::USER, "user"));
    } else if user {
        bits |= ns::USER;
    }
    let affinity = request.process.exec_cpu_affinity().as_ref();
    let wish = |list: Option<&String>| {
        let list = list.filter(|l| !l.is_empty());
        list.map(|l| identity::bit_list(l, "execCPUAffinity")).transpose()
    };
    let initial = wish(affinity.and_then(|a| a.initial().as_ref()))?;
    let last = wish(affinity.and_then(|a| a.cpu_affinity_final().as_ref()))?;
    let mut draft = Draft::default();
    draft.steps.extend(initial.map(|mask| Step::Affinity { mask, tried: false }));
    if let Some(group) = &request.cgroup {
        draft.enter(group);
    }
    let Draft { mut steps, hands, .. } = draft;
    steps.push(match last {
        Some(mask) => Step::Affinity { mask, tried: false },
        None => Step::Affinity { mask: vec![u64::MAX; 16], tried: true },
    });
    steps.extend([Step::EnterAll { pidfd: pidfd()?, bits }, Step::Session]);
    if matches!(request.stdio, Stdio::Terminal) {
        let size = request.process.console_size().as_ref().map(|b| (b.height() as u16, b.width() as u16));
        let owner = rustix::process::Uid::from_raw(request.process.user().uid());
        steps.push(Step::FindTerminals);
        steps.push(Step::Terminal(Terminal { size, console: None, owner }));
    }
    steps.push(Step::AwaitCgroup { new_namespace: false });
    let oom_score = request.process.oom_score_adj();
    let filter = request.seccomp.map(seccomp::Program::into_filter);
    let mut process = identity::compile(&request.process, filter, false)?;
    process.die_with_parent = request.die_with_parent;
    process.preserve_fds = request.preserve_fds;
    process.personality = request.common.personality.as_ref().map(identity::personality).transpose()?;
    process.memory_policy = identity::memory_policy(request.common.memory_policy.as_ref())?;
    if user {
        process.without_groups(idmap::groups_denied(&request.pid.to_string())?)?;
    }
    let mut compiled = Compiled {
        plan: Plan {
            steps,
            process,
            stdio: compile::stdio(request.stdio)?,
            executable: request.executable,
            proc: compile::host_proc()?,
            gate: Gate::Channel,
            hide: true,
        },
        new: 0,
        around,
        first,
        maps: None,
        oom_score,
        net_devices: Vec::new(),
        hands,
        network: None,
        filter: None,
    };
    let subject = Subject::of(&compiled.plan);
    let target = request.cgroup.as_ref().map(Cgroup::clone_target).transpose()?.flatten();
    let (channel, child) = spawn_plan(&mut compiled, target.as_ref().map(AsFd::as_fd))?;
    let mut setup = Setup {
        channel: channel.as_fd(),
        plan: &compiled.plan,
        subject: &subject,
        process: (child.pid, child.pidfd.as_fd()),
        listener: None,
        terminal: None,
        at_once: false,
    };
    let result = (|| {
        hand_over(&compiled.hands, channel.as_fd())?;
        if let Some(group) = &request.cgroup {
            group.attach(child.pid)?;
        }
        if let Some(score) = oom_score {
            write_proc(child.pid, "oom_score_adj", &score.to_string())?;
        }
        setup.say(Message::InCgroup)?;
        setup.until_ready(|| Ok(()))?;
        tell_start(channel.as_fd())?;
        start_over(channel.as_fd(), &subject, (child.pid, child.pidfd.as_fd()), request.listener.as_ref())
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
