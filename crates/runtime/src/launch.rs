//! What a caller hands in to get a container or a process in one, and what it gets back.

mod enter;
mod meanwhile;
mod setup;
mod spawning;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use brigantine_sys::Replacement;
use brigantine_sys::netns::Coming;
use rustix::process::{PidfdFlags, Signal, WaitId, WaitIdOptions, waitid};
use serde::{Deserialize, Serialize};

use crate::cgroup::{Cgroup, Making};
use crate::child;
use crate::compile::{self, Compiled};
use crate::describe::Subject;
use crate::error::{Error, Kind};
use crate::listener::Listener;
use crate::plan::{Gate, Message};
use crate::seccomp::{self, LateSeccomp};
use crate::spec::{
    LinuxMemoryPolicy, LinuxNamespace, LinuxNamespaceType, LinuxPersonality, LinuxSeccomp, Spec,
};
use crate::{hooks, identity};
pub use enter::{ExecRequest, Execed, exec};
use meanwhile::{Meanwhile, hand_groups_over, make_groups};
use setup::{Setup, executed, failed_with_more, receive, silenced, table};
use spawning::{pair, spawn_plan, write_maps};

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
    /// A network namespace that is being made, in place of a new one.
    pub network: Option<Coming>,
    pub systemd_cgroup: bool,
    /// A caller that may not make cgroups does without, unless limits are asked for.
    pub rootless: bool,
    /// Kill the container's init when the calling thread ends.
    pub die_with_parent: bool,
    /// A filter compiled before from the same spec; otherwise it is compiled while the process sets itself up.
    pub seccomp: Option<seccomp::Program>,
    /// The seccomp section that the spec lacks.
    pub late_seccomp: Option<LateSeccomp>,
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
            late_seccomp: None,
            executable: None,
            preserve_fds: 0,
            start_listener: None,
            at_once: false,
            no_pivot: false,
            no_new_keyring: false,
        }
    }
}

/// Whether a spec's list asks for a new network namespace that can be made before anything else ([`Launch::network`]).
pub(crate) fn is_network_apart(list: &[LinuxNamespace]) -> bool {
    use LinuxNamespaceType as T;
    let asked = |n: &&LinuxNamespace| n.typ() == T::Network;
    let fresh = |n: &LinuxNamespace| n.path().as_ref().is_none_or(|p| p.as_os_str().is_empty());
    // It belongs to the user namespace of whoever makes it.
    list.iter().find(asked).is_some_and(fresh) && !list.iter().any(|n| n.typ() == T::User)
}

/// A container whose process 1 is set up and waits right before its exec. Dropping it without a
/// successful [`Created::start`] (or [`Created::detach`]) kills the process and removes its cgroup.
#[derive(Debug)]
pub struct Created {
    pid: i32,
    pidfd: OwnedFd,
    terminal: Option<OwnedFd>,
    cgroup: Cgroup,
    channel: Arc<OwnedFd>,
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
    // Opened beforehand: somebody else may reap the process as soon as it has ended.
    let table = subject.filtered.then(|| table(pid)).flatten();
    loop {
        match (receive(channel)?.0, listener) {
            (None, Some(_)) if !asked => {
                return Err(Error::new(
                    Kind::Os,
                    "the container's process ended before it handed its seccomp listener over",
                ));
            }
            // The exec closed the channel; or the end of a process that its filter did not let speak.
            (None, _) if table.as_ref().and_then(executed) == Some(false) => {
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

/// Everything up to right before the exec. The process is a child of the caller.
pub fn create(launch: Launch) -> Result<Created, Error> {
    create_beside(launch, |_, _| Ok(()))
}

/// The same, and `beside` is done while the process sets itself up: it gets the process's number and its group. Its failure
/// ends the process.
pub(crate) fn create_beside(
    launch: Launch,
    beside: impl FnOnce(i32, &Cgroup) -> Result<(), Error> + Send,
) -> Result<Created, Error> {
    check_id(&launch.id)?;
    if let Some(list) = launch.spec.hooks() {
        hooks::check_all(list)?;
    }
    let making = Making::begin(&launch.id, &launch.spec, launch.systemd_cgroup, launch.rootless)?;
    create_in(launch, making, beside)
}

fn create_in(
    mut launch: Launch,
    making: Making,
    beside: impl FnOnce(i32, &Cgroup) -> Result<(), Error> + Send,
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
    let (channel, theirs) = pair()?;
    let channel = Arc::new(channel);
    let planned = making.planned().clone();
    let groups = make_groups(making, launch.network.as_ref(), &channel);
    let mut compiled = compile::compile(launch, &planned, gate)?;
    compiled.plan.process.listened_early = listener.is_some();
    let subject = Subject::of(&compiled.plan);
    let target = planned.clone_target()?;
    let hands = std::mem::take(&mut compiled.hands);
    // Until they are the group below, and removed as that is, if it comes to that: after the process has been ended.
    let mut groups = Some(hand_groups_over(groups, hands, compiled.network.as_ref(), &channel));
    let child = spawn_plan(&mut compiled, target.as_ref().map(AsFd::as_fd), ((*channel).as_fd(), theirs))?;
    let mut group = None;
    let mut setup = Setup {
        channel: (*channel).as_fd(),
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
        let meanwhile = Meanwhile {
            setup: &setup,
            groups: &mut groups,
            group: &mut group,
            spec,
            net_devices: &compiled.net_devices,
            oom_score: compiled.oom_score,
            filter: compiled.filter.take(),
            hooks_first: spec_hooks.as_ref().is_some_and(hooks::any_before_pivot),
            beside,
        };
        let failed = |e| Error::os("making a network namespace", e);
        match compiled.network.take() {
            // Devices are moved from the host's namespace, which that thread has left.
            Some(coming) if !compiled.net_devices.is_empty() => {
                let made = coming.get();
                meanwhile.run(made.as_ref().map(Some).map_err(|e| failed(*e)))
            }
            // That thread is awake on a processor of its own, and the process, a clone of this one, stays on this one's.
            Some(coming) => {
                coming.then(|made| meanwhile.run(made.as_ref().map(Some).map_err(|e| failed(*e))))
            }
            None => meanwhile.run(Ok(None)),
        }?;
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
    let Some(group) = group else {
        end(&child.pidfd);
        return Err(Error::invalid("the container has no group"));
    };
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

/// Kills and reaps a child of ours.
fn end(pidfd: &OwnedFd) {
    // Either it is gone already, or it dies now; both are what is wanted.
    rustix::process::pidfd_send_signal(pidfd, Signal::KILL).ok();
    while let Err(rustix::io::Errno::INTR) = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {}
}
