//! Spec to plan: every decision about a container, taken before its process exists.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use brigantine_sys::spawn::ns;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::process::{Gid, Uid};

use crate::cgroup::Cgroup;
use crate::error::Error;
use crate::launch::{Launch, Stdio};
use crate::mounts::{self, c_string, parse_propagation, target};
use crate::plan::{Gate, Node, Plan, Step, Target, Terminal};
use crate::spec::{LinuxDevice, LinuxDeviceType, LinuxIdMapping, LinuxNamespaceType, Spec};
use crate::{identity, seccomp};

/// A plan with what the parent has to do around it.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub plan: Plan,
    /// Namespaces to be born in (clone flags).
    pub new: u64,
    /// Namespaces that the parent's thread enters around the clone.
    pub around: Vec<(OwnedFd, u64, &'static str)>,
    pub maps: Option<(String, String)>,
    pub oom_score: Option<i32>,
}

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
    if linux.intel_rdt().is_some() {
        return Err(Error::unsupported("linux.intelRdt is not built yet"));
    }
    if linux.time_offsets().as_ref().is_some_and(|t| !t.is_empty()) {
        return Err(Error::unsupported("linux.timeOffsets are not built yet"));
    }
    if linux.net_devices().as_ref().is_some_and(|d| !d.is_empty()) {
        return Err(Error::unsupported("linux.netDevices are not built yet"));
    }
    if linux.memory_policy().is_some() {
        return Err(Error::unsupported("linux.memoryPolicy is not built yet"));
    }
    if linux.mount_label().as_deref().is_some_and(|l| !l.is_empty()) {
        return Err(Error::unsupported(
            "linux.mountLabel is asked for, but SELinux mount labels are not built yet",
        ));
    }

    let mut new = 0;
    let mut joined: Vec<(OwnedFd, u64, &'static str)> = Vec::new();
    for namespace in linux.namespaces().iter().flatten() {
        let (bit, name) = bit(namespace.typ());
        if launch.joined.iter().any(|(typ, _)| *typ == namespace.typ()) {
            continue;
        }
        if new & bit != 0 || joined.iter().any(|(_, b, _)| *b == bit) {
            return Err(Error::invalid(format!("the {name} namespace is listed twice")));
        }
        match namespace.path() {
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
    for (_, bit, name) in &joined {
        if [ns::USER, ns::MOUNT, ns::TIME].contains(bit) {
            return Err(Error::unsupported(format!("joining a {name} namespace is not built yet")));
        }
    }
    if new & ns::MOUNT == 0 {
        return Err(Error::invalid("a container needs its own mount namespace"));
    }
    let user_namespace = new & ns::USER != 0;
    let has = |bit: u64| new & bit != 0 || joined.iter().any(|(_, b, _)| *b == bit);
    let maps = maps(spec, user_namespace)?;

    let mut steps = cgroup.entrances()?;
    let hostname = spec.hostname().as_deref().filter(|h| !h.is_empty());
    let domainname = spec.domainname().as_deref().filter(|d| !d.is_empty());
    if (hostname.is_some() || domainname.is_some()) && !has(ns::UTS) {
        return Err(Error::invalid("a hostname needs a UTS namespace of the container's own"));
    }
    check_sysctls(spec, has(ns::IPC), has(ns::NETWORK), has(ns::UTS))?;
    // A namespace that belongs to the host's users cannot be entered once in a user namespace of
    // one's own, and a PID namespace holds only for children: the parent enters those.
    let mut around = Vec::new();
    let mut own_cgroup_namespace = None;
    for (fd, bit, name) in joined {
        if bit == ns::CGROUP {
            own_cgroup_namespace = Some(fd);
        } else if user_namespace || bit == ns::PID {
            around.push((fd, bit, name));
        } else {
            steps.push(Step::Enter { namespace: fd, bit, name });
        }
    }
    if user_namespace {
        steps.push(Step::BecomeRoot);
    }
    steps.push(Step::Session);
    steps.extend(hostname.map(|h| Step::Hostname(h.as_bytes().to_vec())));
    steps.extend(domainname.map(|d| Step::Domainname(d.as_bytes().to_vec())));
    steps.push(Step::CutPropagation);
    steps.push(Step::AttachRoot { tree: mounts::open_root(&launch.rootfs)? });

    let new_cgroup_namespace = new & ns::CGROUP != 0;
    new &= !ns::CGROUP;
    let context = mounts::Context {
        bundle: launch.bundle.as_deref(),
        cgroup: Some(cgroup),
        cgroup_namespace: new_cgroup_namespace,
    };
    let mut late = Vec::new();
    for entry in spec.mounts().iter().flatten() {
        mounts::compile(entry, &context, &mut steps, &mut late)?;
    }
    let foreign_dev = spec.mounts().iter().flatten().any(|m| {
        m.destination() == Path::new("/dev") && m.typ().as_deref().is_none_or(|t| t == "bind" || t.is_empty())
    });
    devices(spec, foreign_dev, user_namespace, &mut steps)?;
    let wants_terminal = matches!(launch.stdio, Stdio::Terminal);
    if wants_terminal {
        let console = (!foreign_dev).then(|| target(Path::new("/dev/console"), true)).transpose()?;
        let size = process.console_size().as_ref().map(|b| (b.height() as u16, b.width() as u16));
        let owner = Uid::from_raw(process.user().uid());
        steps.push(Step::Terminal(Terminal { size, console, owner }));
    }
    steps.append(&mut late);
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
    for path in linux.readonly_paths().iter().flatten() {
        steps.push(Step::Readonly(absolute(path, "read-only")?));
    }
    for path in linux.masked_paths().iter().flatten() {
        steps.push(Step::Mask(absolute(path, "masked")?));
    }
    let propagation = match linux.rootfs_propagation().as_deref().filter(|p| !p.is_empty()) {
        None => 0,
        Some(word) => {
            let invalid = || Error::invalid(format!("rootfsPropagation {word:?} is not known"));
            parse_propagation(word).ok_or_else(invalid)?.0
        }
    };
    let readonly = spec.root().as_ref().and_then(crate::spec::Root::readonly).unwrap_or_default();
    steps.push(Step::PivotRoot { propagation, readonly });
    steps.push(Step::AwaitCgroup { new_namespace: new_cgroup_namespace });
    if let Some(namespace) = own_cgroup_namespace {
        steps.push(Step::Enter { namespace, bit: ns::CGROUP, name: "cgroup" });
    }

    let filter = match (launch.seccomp, linux.seccomp()) {
        (Some(program), _) => Some(program),
        (None, Some(filter)) => seccomp::compile(filter)?,
        (None, None) => None,
    };
    let mut plan = identity::compile(process, filter, true)?;
    plan.die_with_parent = launch.die_with_parent;
    plan.preserve_fds = launch.preserve_fds;
    if let Some(personality) = linux.personality() {
        use crate::spec::LinuxPersonalityDomain as D;
        if personality.flags().as_ref().is_some_and(|f| !f.is_empty()) {
            return Err(Error::unsupported("personality flags are not supported"));
        }
        plan.personality = Some(match personality.domain() {
            D::PerLinux => 0,
            D::PerLinux32 => 8,
        });
    }
    let oom_score = process.oom_score_adj();
    if let Some(score) = oom_score.filter(|s| !(-1000..=1000).contains(s)) {
        return Err(Error::invalid(format!("oomScoreAdj {score} is not between -1000 and 1000")));
    }
    Ok(Compiled {
        plan: Plan {
            steps,
            process: plan,
            stdio: stdio(launch.stdio)?,
            proc: host_proc()?,
            gate,
            hide: false,
        },
        new,
        around,
        maps,
        oom_score,
    })
}

fn absolute(path: &str, what: &str) -> Result<Target, Error> {
    if path.starts_with('/') {
        target(Path::new(path), false)
    } else {
        Err(Error::invalid(format!("{what} path {path:?} is not absolute")))
    }
}

fn maps(spec: &Spec, user_namespace: bool) -> Result<Option<(String, String)>, Error> {
    let linux = spec.linux().as_ref();
    let uid = linux.and_then(|l| l.uid_mappings().as_ref()).filter(|m| !m.is_empty());
    let gid = linux.and_then(|l| l.gid_mappings().as_ref()).filter(|m| !m.is_empty());
    let text = |m: &Vec<LinuxIdMapping>| {
        let line = |m: &LinuxIdMapping| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size());
        m.iter().map(line).collect::<String>()
    };
    match (user_namespace, uid, gid) {
        (true, Some(uid), Some(gid)) => Ok(Some((text(uid), text(gid)))),
        (true, _, _) => Err(Error::invalid("a new user namespace needs uidMappings and gidMappings")),
        (false, None, None) => Ok(None),
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

fn devices(spec: &Spec, foreign_dev: bool, bound: bool, steps: &mut Vec<Step>) -> Result<(), Error> {
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
            bind_device(&path, &path, steps)?;
            continue;
        }
        steps.push(Step::Node(Node {
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
            bind_device(path, path, steps)?;
            continue;
        }
        steps.push(Step::Node(node(device)?));
    }
    for (name, to) in LINKS {
        let (target, name) = (c_string(*to, "link")?, c_string(*name, "link")?);
        steps.push(Step::Symlink { target, dir: dev()?, name, replace: false });
    }
    let (target, name) = (c"pts/ptmx".to_owned(), c"ptmx".to_owned());
    steps.push(Step::Symlink { target, dir: dev()?, name, replace: true });
    Ok(())
}

fn bind_device(source: &Path, destination: &Path, steps: &mut Vec<Step>) -> Result<(), Error> {
    let mut entry = crate::spec::Mount::default();
    entry.set_destination(destination.to_owned());
    entry.set_source(Some(source.to_owned()));
    entry.set_typ(Some("bind".to_owned()));
    entry.set_options(Some(vec!["bind".to_owned()]));
    let context = mounts::Context { bundle: None, cgroup: None, cgroup_namespace: false };
    mounts::compile(&entry, &context, steps, &mut Vec::new())
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
