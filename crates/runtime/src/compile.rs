//! Spec to plan: every decision about a container, taken before its process exists.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use brigantine_sys::netns::Coming;
use brigantine_sys::seccomp::{Writer, pending};
use brigantine_sys::spawn::ns;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::process::{Gid, Uid};

use crate::cgroup::Cgroup;
use crate::error::Error;
use crate::handover::{Hand, MOST};
use crate::launch::{Launch, Stdio};
use crate::mounts::{self, Draft, c_string, parse_propagation, target};
use crate::plan::{Filter, Gate, Node, Plan, Step, Terminal};
use crate::seccomp::LateSeccomp;
use crate::spec::{LinuxDevice, LinuxDeviceType, LinuxNamespaceType, Spec};
use crate::{covers, hooks, identity, idmap, netdev, seccomp};

/// A plan with what the parent has to do around it.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub plan: Plan,
    /// Namespaces to be born in (clone flags).
    pub new: u64,
    /// Namespaces that the parent's thread enters around the clone.
    pub around: Vec<(OwnedFd, u64, &'static str)>,
    /// Namespaces that a process in between enters first, for there is no way back from them.
    pub first: Vec<(OwnedFd, u64, &'static str)>,
    pub maps: Option<(String, String)>,
    pub oom_score: Option<i32>,
    pub net_devices: Vec<netdev::Move>,
    /// What the parent hands over once the container's groups are there.
    pub hands: Vec<Hand>,
    /// The network namespace that is being made, for [`Step::EnterNetwork`].
    pub network: Option<Coming>,
    /// Takes the filter that is not compiled yet, or not even read.
    pub filter: Option<(Writer, Option<LateSeccomp>)>,
}

/// Namespaces that need not belong to the user namespace that is joined with them.
const BEFORE_USER: u64 = ns::NETWORK | ns::IPC | ns::UTS | ns::TIME;

pub(crate) fn bit(typ: LinuxNamespaceType) -> (u64, &'static str) {
    use LinuxNamespaceType as T;
    match typ {
        T::Mount => (ns::MOUNT, "mnt"),
        T::Cgroup => (ns::CGROUP, "cgroup"),
        T::Uts => (ns::UTS, "uts"),
        T::Ipc => (ns::IPC, "ipc"),
        T::User => (ns::USER, "user"),
        T::Pid => (ns::PID, "pid"),
        T::Network => (ns::NETWORK, "net"),
        T::Time => (ns::TIME, "time"),
    }
}

pub(crate) fn host_proc() -> Result<OwnedFd, Error> {
    let fd = rustix::fs::open("/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::os("opening /proc", e))?;
    let magic = rustix::fs::fstatfs(&fd).map_err(|e| Error::os("opening /proc", e))?.f_type as u64;
    if magic == 0x9fa0 { Ok(fd) } else { Err(Error::unsupported("/proc is not a proc file system")) }
}

/// Three descriptors for the child's first three; none of them is itself 0, 1 or 2.
pub(crate) fn stdio(stdio: Stdio) -> Result<Option<[OwnedFd; 3]>, Error> {
    let fds = match stdio {
        Stdio::Inherit | Stdio::Terminal => return Ok(None),
        Stdio::Fds { stdin, stdout, stderr } => [stdin, stdout, stderr],
        Stdio::Null => {
            let null = |flags| {
                rustix::fs::open("/dev/null", flags | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|e| Error::os("opening /dev/null", e))
            };
            [null(OFlags::RDONLY)?, null(OFlags::WRONLY)?, null(OFlags::WRONLY)?]
        }
    };
    let mut moved = Vec::with_capacity(3);
    for fd in fds {
        use std::os::fd::AsRawFd;
        moved.push(if fd.as_raw_fd() > 2 {
            fd
        } else {
            rustix::io::fcntl_dupfd_cloexec(&fd, 3).map_err(|e| Error::os("duplicating a descriptor", e))?
        });
    }
    Ok(<[OwnedFd; 3]>::try_from(moved).ok())
}

pub(crate) fn compile(launch: Launch, cgroup: &Cgroup, gate: Gate) -> Result<Compiled, Error> {
    let spec = &launch.spec;
    let linux = spec.linux().as_ref().ok_or_else(|| Error::invalid("the spec has no linux section"))?;
    let process = spec.process().as_ref().ok_or_else(|| Error::invalid("the spec has no process"))?;
    let label = linux.mount_label().as_deref().filter(|l| !l.is_empty());
    if let Some(label) = label
        && !identity::selinux()
    {
        return Err(Error::unsupported(format!(
            "mount label {label:?} is asked for, but this kernel has no SELinux enabled"
        )));
    }
    let late = !privileged();

    let mut new = 0;
    let mut made_network = false;
    let mut joined: Vec<(OwnedFd, u64, &'static str)> = Vec::new();
    for namespace in linux.namespaces().iter().flatten() {
        let (bit, name) = bit(namespace.typ());
        if launch.joined.iter().any(|(typ, _)| *typ == namespace.typ()) {
            continue;
        }
        let unnamed = namespace.path().as_ref().is_none_or(|p| p.as_os_str().is_empty());
        if new & bit != 0 && unnamed {
            // Said twice, but nothing different.
            continue;
        }
        if new & bit != 0 || joined.iter().any(|(_, b, _)| *b == bit) {
            return Err(Error::invalid(format!("the {name} namespace is listed twice")));
        }
        match namespace.path() {
            _ if unnamed && bit == ns::NETWORK && launch.network.is_some() => made_network = true,
            None => new |= bit,
            Some(path) if path.as_os_str().is_empty() => new |= bit,
            Some(path) => {
                let fd =
                    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
                        Error::os(format!("opening the {name} namespace {:?}", path.display()), e)
                    })?;
                joined.push((fd, bit, name));
            }
        }
    }
    for (typ, fd) in launch.joined {
        let (bit, name) = bit(typ);
        new &= !bit;
        joined.push((fd, bit, name));
    }
    let has = |joined: &[(OwnedFd, u64, &'static str)], bit: u64| {
        new & bit != 0 || bit == ns::NETWORK && made_network || joined.iter().any(|(_, b, _)| *b == bit)
    };
    if !has(&joined, ns::MOUNT) {
        return Err(Error::invalid("a container needs a mount namespace of its own, or one to join"));
    }
    let user_namespace = new & ns::USER != 0;
    let joined_user = joined.iter().any(|(_, bit, _)| *bit == ns::USER);
    let maps = maps(spec, user_namespace, joined_user)?;

    let mut draft = Draft::default();
    if late || user_namespace || joined_user {
        // Root of a user namespace may not enter them.
        draft.enter(cgroup);
    }
    let hostname = spec.hostname().as_deref().filter(|h| !h.is_empty());
    let domainname = spec.domainname().as_deref().filter(|d| !d.is_empty());
    if (hostname.is_some() || domainname.is_some()) && !has(&joined, ns::UTS) {
        return Err(Error::invalid("a hostname needs a UTS namespace of the container's own"));
    }
    check_sysctls(spec, has(&joined, ns::IPC), has(&joined, ns::NETWORK), has(&joined, ns::UTS))?;
    let net_devices = netdev::compile(linux.net_devices().as_ref())?;
    if !net_devices.is_empty() && !has(&joined, ns::NETWORK) {
        return Err(Error::invalid("netDevices need a network namespace of the container's own"));
    }
    let time_offsets = time_offsets(spec, new & ns::TIME != 0)?;
    if time_offsets.is_some() {
        // Made by the child itself: its clocks must be set while nobody is in it.
        new &= !ns::TIME;
    }
    // A namespace that belongs to the host's users cannot be entered once in a user namespace of
    // one's own, and a PID namespace holds only for children: the parent enters those.
    let mut around = Vec::new();
    let mut first = Vec::new();
    let mut own_cgroup_namespace = None;
    // Whoever is in it may enter what belongs to it, but nothing that belongs to others: it comes before what a caller
    // without privileges may enter only then, and behind what one with privileges may enter anyway.
    joined.sort_by_key(|(_, bit, _)| match *bit {
        ns::USER => 1,
        bit if !late && BEFORE_USER & bit != 0 => 0,
        _ => 2,
    });
    for (fd, bit, name) in joined {
        if bit == ns::CGROUP {
            own_cgroup_namespace = Some(fd);
        } else if bit == ns::USER || joined_user && (bit == ns::PID || !late && BEFORE_USER & bit != 0) {
            first.push((fd, bit, name));
        } else if user_namespace || bit == ns::PID {
            around.push((fd, bit, name));
        } else {
            draft.steps.push(Step::Enter { namespace: fd, bit, name });
        }
    }
    let steps = &mut draft.steps;
    if user_namespace {
        steps.push(Step::BecomeRoot);
    }
    steps.extend(time_offsets.map(Step::TimeOffsets));
    steps.push(Step::Session);
    steps.extend(hostname.map(|h| Step::Hostname(h.as_bytes().to_vec())));
    steps.extend(domainname.map(|d| Step::Domainname(d.as_bytes().to_vec())));
    steps.push(Step::CutPropagation);
    let propagation = match linux.rootfs_propagation().as_deref().filter(|p| !p.is_empty()) {
        None => None,
        Some(word) => {
            let invalid = || Error::invalid(format!("rootfsPropagation {word:?} is not known"));
            Some(parse_propagation(word).ok_or_else(invalid)?.0)
        }
    };
    let joined_user = first.iter().find(|(_, bit, _)| *bit == ns::USER);
    let user = match (joined_user, linux.uid_mappings(), linux.gid_mappings()) {
        (Some((fd, _, _)), uid, gid) => Some(mounts::UserMaps::Joined(
            fd,
            uid.as_deref().unwrap_or_default(),
            gid.as_deref().unwrap_or_default(),
        )),
        (_, Some(uid), Some(gid)) if user_namespace => Some(mounts::UserMaps::New(uid, gid)),
        _ => None,
    };
    let (tree, at) = mounts::open_root(&launch.rootfs, propagation, late, user)?;
    let root = PathBuf::from(OsStr::from_bytes(at.to_bytes()));
    steps.push(Step::AttachRoot { tree, at });

    let new_cgroup_namespace = new & ns::CGROUP != 0;
    new &= !ns::CGROUP;
    let context = mounts::Context {
        bundle: launch.bundle.as_deref(),
        cgroup: Some(cgroup),
        cgroup_namespace: new_cgroup_namespace,
        late,
        user,
        label,
        // At `/` nothing on the host is below it.
        rootfs: (root != Path::new("/")).then_some(&*root),
    };
    let entries = spec.mounts().as_deref().unwrap_or_default();
    let mut of_groups = Vec::new();
    let mut network = made_network.then_some(Step::EnterNetwork);
    for (place, entry) in entries.iter().enumerate() {
        if !mounts::is_of_no_network(entry) {
            draft.steps.extend(network.take());
        }
        if mounts::is_of_groups(entry) {
            if !entries[place + 1..].iter().any(|later| mounts::depend(entry, later)) {
                // The groups are being made meanwhile.
                of_groups.push(entry);
                continue;
            }
            draft.enter(cgroup);
        }
        mounts::compile(entry, &context, &mut draft)?;
    }
    draft.steps.extend(network);
    let foreign_dev = spec.mounts().iter().flatten().any(|m| {
        m.destination() == Path::new("/dev") && m.typ().as_deref().is_none_or(|t| t == "bind" || t.is_empty())
    });
    devices(spec, foreign_dev, user_namespace || joined_user.is_some(), &context, &mut draft)?;
    let wants_terminal = matches!(launch.stdio, Stdio::Terminal);
    if wants_terminal {
        let console = (!foreign_dev).then(|| target(Path::new("/dev/console"), true)).transpose()?;
        let size = process.console_size().as_ref().map(|b| (b.height() as u16, b.width() as u16));
        let owner = Uid::from_raw(process.user().uid());
        draft.steps.push(Step::Terminal(Terminal { size, console, owner }));
    }
    let mut covers = covers::compile(linux)?;
    if spec.hooks().is_none() && draft.afterwards.is_empty() && covers::are_apart_from_groups(spec) {
        // Something to do until the groups are there.
        draft.steps.append(&mut covers);
    }
    draft.enter(cgroup);
    for entry in of_groups {
        mounts::compile(entry, &context, &mut draft)?;
    }
    draft.steps.append(&mut draft.afterwards);
    let steps = &mut draft.steps;
    for (key, value) in linux.sysctl().iter().flatten() {
        steps.push(Step::Sysctl {
            path: c_string(format!("sys/{}", key.replace('.', "/")), "sysctl")?,
            value: value.as_bytes().to_vec(),
            key: key.clone(),
        });
    }
    let has_hooks = spec.hooks().as_ref().is_some_and(crate::hooks::any_before_pivot);
    if has_hooks {
        steps.push(Step::AwaitHooks);
    }
    let create_hooks = spec.hooks().as_ref().and_then(|h| h.create_container().as_ref());
    let start_hooks = spec.hooks().as_ref().and_then(|h| h.start_container().as_ref());
    let state = |status| hooks::state(&launch.id, status, None, launch.bundle.as_deref(), spec);
    for hook in hooks::compile("createContainer", create_hooks, &state("creating"))? {
        steps.push(Step::Hook(Box::new(hook)));
    }
    let start_hooks = hooks::compile("startContainer", start_hooks, &state("created"))?;
    steps.append(&mut covers);
    let readonly = spec.root().as_ref().and_then(crate::spec::Root::readonly).unwrap_or_default();
    let moved = launch.no_pivot.then(|| mounts::exposed(&root)).transpose()?;
    steps.push(Step::PivotRoot { propagation: propagation.unwrap_or(0), readonly, moved });
    steps.push(Step::AwaitCgroup { new_namespace: new_cgroup_namespace });
    // What the caller's processors were is not the container's business.
    steps.push(Step::Affinity { mask: vec![u64::MAX; 16], tried: true });
    if let Some(namespace) = own_cgroup_namespace {
        steps.push(Step::Enter { namespace, bit: ns::CGROUP, name: "cgroup" });
    }

    if draft.hands.len() > MOST {
        return Err(Error::unsupported(format!(
            "the container needs {} descriptors of cgroups, {MOST} can be handed over",
            draft.hands.len()
        )));
    }
    let mut writer = None;
    let filter = match (launch.seccomp, linux.seccomp()) {
        (Some(program), _) => Some(program.into_filter()),
        // Its listener hears of it before there is time for more.
        (None, Some(filter)) if seccomp::notifies(filter) => {
            seccomp::compile(filter)?.map(seccomp::Program::into_filter)
        }
        (None, filter) if filter.is_some() || launch.late_seccomp.is_some() => {
            let failed = |e| Error::os("making room for the seccomp filter", e);
            let (given, awaited) = pending().map_err(failed)?;
            writer = Some((given, launch.late_seccomp));
            Some((Filter::Coming(awaited), 0))
        }
        (None, _) => None,
    };
    let mut plan = identity::compile(process, filter, true)?;
    if late {
        let own = rustix::process::getegid().as_raw();
        let alone = maps.as_ref().is_some_and(|(_, gid)| idmap::is_only(gid, own));
        plan.without_groups(alone || idmap::groups_denied("self")?)?;
    }
    plan.die_with_parent = launch.die_with_parent;
    plan.preserve_fds = launch.preserve_fds;
    plan.keyring = !launch.no_new_keyring;
    plan.start_hooks = start_hooks;
    plan.memory_policy = identity::memory_policy(linux.memory_policy().as_ref())?;
    if let Some(personality) = linux.personality() {
        plan.personality = Some(identity::personality(personality)?);
    }
    let oom_score = process.oom_score_adj();
    if let Some(score) = oom_score.filter(|s| !(-1000..=1000).contains(s)) {
        return Err(Error::invalid(format!("oomScoreAdj {score} is not between -1000 and 1000")));
    }
    Ok(Compiled {
        plan: Plan {
            steps: draft.steps,
            executable: launch.executable,
            process: plan,
            stdio: stdio(launch.stdio)?,
            proc: host_proc()?,
            gate,
            hide: false,
            // A hook is not to be kept to these.
            processors: launch
                .network
                .as_ref()
                .filter(|_| spec.hooks().is_none())
                .and_then(Coming::processors_beside),
        },
        new,
        around,
        first,
        maps,
        oom_score,
        net_devices,
        hands: draft.hands,
        network: launch.network.filter(|_| made_network),
        filter: writer,
    })
}

/// Whether the caller may make mounts.
pub(crate) fn privileged() -> bool {
    rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN))
}

/// Lines for `timens_offsets`.
fn time_offsets(spec: &Spec, new: bool) -> Result<Option<Vec<u8>>, Error> {
    let offsets = spec.linux().as_ref().and_then(|l| l.time_offsets().as_ref()).filter(|o| !o.is_empty());
    let Some(offsets) = offsets else { return Ok(None) };
    if !new {
        return Err(Error::invalid("timeOffsets need a new time namespace"));
    }
    let mut lines = String::new();
    for (clock, offset) in offsets {
        if clock != "monotonic" && clock != "boottime" {
            return Err(Error::invalid(format!("timeOffsets: clock {clock:?} is not monotonic or boottime")));
        }
        let nanoseconds = offset.nanosecs().unwrap_or_default();
        let line = format!("{clock} {} {nanoseconds}\n", offset.secs().unwrap_or_default());
        lines.push_str(&line);
    }
    Ok(Some(lines.into_bytes()))
}

fn maps(spec: &Spec, user_namespace: bool, joined: bool) -> Result<Option<(String, String)>, Error> {
    let linux = spec.linux().as_ref();
    let uid = linux.and_then(|l| l.uid_mappings().as_ref()).filter(|m| !m.is_empty());
    let gid = linux.and_then(|l| l.gid_mappings().as_ref()).filter(|m| !m.is_empty());
    match (user_namespace, uid, gid) {
        (true, Some(uid), Some(gid)) => Ok(Some((idmap::lines(uid), idmap::lines(gid)))),
        (true, _, _) => Err(Error::invalid("a new user namespace needs uidMappings and gidMappings")),
        (false, None, None) => Ok(None),
        // It has its maps; callers repeat them.
        (false, _, _) if joined => Ok(None),
        (false, _, _) => Err(Error::invalid("id mappings are given, but no user namespace")),
    }
}

/// Only what belongs to a namespace of the container's own may be set.
fn check_sysctls(spec: &Spec, ipc: bool, net: bool, uts: bool) -> Result<(), Error> {
    const IPC: &[&str] = &[
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let Some(sysctls) = spec.linux().as_ref().and_then(|l| l.sysctl().as_ref()) else { return Ok(()) };
    for key in sysctls.keys() {
        // Slashes and dots may both separate.
        let name = key.replace('/', ".");
        let allowed = if IPC.contains(&name.as_str()) || name.starts_with("fs.mqueue.") {
            ipc
        } else if name.starts_with("net.") {
            net
        } else if name == "kernel.domainname" || name == "kernel.hostname" {
            uts
        } else {
            false
        };
        if !allowed || name.contains("..") || key.contains('\0') {
            return Err(Error::invalid(format!(
                "sysctl {key:?} is not in a separate kernel namespace of the container"
            )));
        }
    }
    Ok(())
}

/// Devices that are in every container's /dev: name, major, minor.
const DEVICES: &[(&str, u32, u32)] =
    &[("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

fn devices(
    spec: &Spec,
    foreign_dev: bool,
    bound: bool,
    context: &mounts::Context<'_>,
    draft: &mut Draft,
) -> Result<(), Error> {
    let dev = || target(Path::new("/dev"), true);
    let extra = spec.linux().as_ref().and_then(|l| l.devices().as_ref());
    if foreign_dev {
        return Ok(());
    }
    for (name, major, minor) in DEVICES {
        let path = Path::new("/dev").join(name);
        if extra.is_some_and(|e| e.iter().any(|d| d.path() == &path)) {
            continue;
        }
        if bound {
            bind_device(&path, &path, context, draft)?;
            continue;
        }
        draft.steps.push(Step::Node(Node {
            dir: dev()?,
            name: c_string(*name, "device")?,
            mode: FileType::CharacterDevice.as_raw_mode() | 0o666,
            device: rustix::fs::makedev(*major, *minor),
            owner: None,
        }));
    }
    for device in extra.into_iter().flatten() {
        let path = device.path();
        if bound {
            bind_device(path, path, context, draft)?;
            continue;
        }
        draft.steps.push(Step::Node(node(device)?));
    }
    for (name, to) in LINKS {
        let (target, name) = (c_string(*to, "link")?, c_string(*name, "link")?);
        draft.steps.push(Step::Symlink { target, dir: dev()?, name, replace: false });
    }
    let (target, name) = (c"pts/ptmx".to_owned(), c"ptmx".to_owned());
    draft.steps.push(Step::Symlink { target, dir: dev()?, name, replace: true });
    Ok(())
}

fn bind_device(
    source: &Path,
    destination: &Path,
    context: &mounts::Context<'_>,
    draft: &mut Draft,
) -> Result<(), Error> {
    let mut entry = crate::spec::Mount::default();
    entry.set_destination(destination.to_owned());
    entry.set_source(Some(source.to_owned()));
    entry.set_typ(Some("bind".to_owned()));
    entry.set_options(Some(vec!["bind".to_owned()]));
    mounts::compile(&entry, context, draft)
}

fn node(device: &LinuxDevice) -> Result<Node, Error> {
    let path = device.path();
    let shown = path.display();
    let (Some(dir), Some(name), true) = (path.parent(), path.file_name(), path.is_absolute()) else {
        return Err(Error::invalid(format!("device path {shown} is not the absolute path of a file")));
    };
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => return Err(Error::invalid(format!("device {shown} has no type"))),
    };
    let number = |n: i64| {
        u32::try_from(n)
            .map_err(|_unused| Error::invalid(format!("device {shown}: number {n} is out of range")))
    };
    let number = if kind == FileType::Fifo {
        0
    } else {
        rustix::fs::makedev(number(device.major())?, number(device.minor())?)
    };
    let name: CString = c_string(name.as_encoded_bytes(), "device")?;
    let owner = match (device.uid(), device.gid()) {
        (None | Some(0), None | Some(0)) => None,
        (uid, gid) => Some((Uid::from_raw(uid.unwrap_or(0)), Gid::from_raw(gid.unwrap_or(0)))),
    };
    let mode = kind.as_raw_mode() | device.file_mode().unwrap_or(0o666) & 0o7777;
    Ok(Node { dir: target(dir, false)?, name, mode, device: number, owner })
}

/// Enters `namespaces` with the calling thread, runs `work`, and comes back whatever it did.
pub(crate) fn within<T>(
    namespaces: &[(OwnedFd, u64, &'static str)],
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    if namespaces.is_empty() {
        return work();
    }
    let mut own = Vec::new();
    for (_, bit, name) in namespaces {
        let path = format!("/proc/thread-self/ns/{name}");
        let fd = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| Error::os(format!("opening {path}"), e))?;
        own.push((fd, *bit, *name));
    }
    let enter = |(fd, bit, name): &(OwnedFd, u64, &'static str)| {
        brigantine_sys::spawn::setns(fd.as_fd(), *bit)
            .map_err(|e| Error::os(format!("entering the {name} namespace"), e))
    };
    let mut result = Ok(());
    let mut entered = 0;
    for namespace in namespaces {
        result = enter(namespace);
        if result.is_err() {
            break;
        }
        entered += 1;
    }
    let result = result.and_then(|()| work());
    for back in &own[..entered] {
        if enter(back).is_err() {
            // A thread stuck in a container's namespace must not go on.
            std::process::abort();
        }
    }
    result
}
