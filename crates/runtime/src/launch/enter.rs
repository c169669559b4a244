//! Another process in a running container.

use std::os::fd::{AsFd, OwnedFd};

use brigantine_sys::Replacement;
use brigantine_sys::spawn::ns;
use rustix::fs::{Mode, OFlags};

use super::setup::Setup;
use super::spawning::{pair, spawn_plan, write_proc};
use super::{Common, Stdio, end, open_process, start_over, tell_start};
use crate::cgroup::Cgroup;
use crate::compile::{self, Compiled};
use crate::describe::Subject;
use crate::error::Error;
use crate::handover::hand_over;
use crate::listener::Listener;
use crate::mounts::Draft;
use crate::plan::{Gate, Message, Plan, Step, Terminal};
use crate::spec::Process;
use crate::{identity, idmap, seccomp};

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

/// A process started by [`exec`].
#[derive(Debug)]
pub struct Execed {
    /// In the caller's PID namespace. The process is the caller's child.
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub terminal: Option<OwnedFd>,
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
            processors: None,
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
    let (channel, theirs) = pair()?;
    let child = spawn_plan(&mut compiled, target.as_ref().map(AsFd::as_fd), (channel.as_fd(), theirs))?;
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
