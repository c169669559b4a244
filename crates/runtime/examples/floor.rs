//! The least that makes a container: clone3, the mounts of `runc spec`, pivot_root, exec. What it takes is what the kernel
//! takes; `cargo xtask bench runtime` measures runtimes against it. It checks nothing and confines nobody.
//!
//! - `floor ROOTFS PROGRAM [CGROUP]`: with a cgroup's name, a group is made in every version 1 hierarchy, entered, and
//!   removed in the end.
//! - `floor ROOTFS PROGRAM CGROUP bare`, `… docker FILTER`: what else the two specs of the benchmark demand, with paths
//!   and values known beforehand: the seventh mount, devices and links, masks and read-only paths, rules and limits,
//!   capabilities, the filter.
//! - `floor filter CONFIG FILE` compiles a spec's filter for that, into a file of `struct sock_filter`.

#![no_main]

use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::{Error, ErrorKind, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use brigantine_runtime::{seccomp, spec::Spec};
use brigantine_sys::exec::{StringVector, execve};
use brigantine_sys::mount::{self, Change, attr};
use brigantine_sys::seccomp::Instruction;
use brigantine_sys::spawn::{self, ns};
use rustix::fs::{CWD, FileType, Mode, makedev};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};
use rustix::process::{Resource, Rlimit, WaitId, WaitIdOptions, waitid};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// A hierarchy's name and the group in it.
type Group = (&'static CStr, PathBuf);

/// Type, place, parameters.
type Mount = (&'static CStr, &'static CStr, &'static [(&'static CStr, &'static CStr)]);

const MOUNTS: &[Mount] = &[
    (c"proc", c"proc", &[]),
    (c"tmpfs", c"dev", &[(c"mode", c"755"), (c"size", c"65536k")]),
    (c"devpts", c"dev/pts", &[(c"ptmxmode", c"0666"), (c"mode", c"0620"), (c"gid", c"5")]),
    (c"tmpfs", c"dev/shm", &[(c"mode", c"1777"), (c"size", c"65536k")]),
    (c"mqueue", c"dev/mqueue", &[]),
    (c"sysfs", c"sys", &[]),
];

brigantine_sys::entry!(program);

fn program() -> u8 {
    run().unwrap_or_else(|e| {
        writeln!(std::io::stderr(), "floor: {e}").ok();
        1
    })
}

fn run() -> Result<u8, Error> {
    let mut words = brigantine_sys::entry::args().into_iter().skip(1);
    let usage = "floor ROOTFS PROGRAM [CGROUP [bare | docker FILTER]]";
    let mut word = || words.next().ok_or_else(|| Error::new(ErrorKind::InvalidInput, usage));
    let text = |w: OsString| CString::new(w.into_vec()).map_err(Error::from);
    let (root, program, group) = (word()?, text(word()?)?, word().ok());
    if root == "filter" {
        compile(program.to_bytes(), &group.unwrap_or_default())?;
        return Ok(0);
    }
    let root = text(root)?;
    let demands = match word().ok() {
        None => None,
        Some(spec) if spec == "bare" => Some(Demands { docker: false, filter: Vec::new() }),
        Some(_) => Some(Demands { docker: true, filter: instructions(&fs::read(word()?)?) }),
    };
    let mut groups: Vec<Group> = Vec::new();
    let mut tasks: Vec<OwnedFd> = Vec::new();
    if let Some(group) = group {
        for name in [c"memory", c"cpu", c"cpuacct", c"pids", c"freezer", c"devices", c"blkio"] {
            let hierarchy = name.to_str().unwrap_or_default();
            let mount = PathBuf::from("/sys/fs/cgroup").join(hierarchy);
            if mount.exists() {
                let dir = mount.join(&group);
                fs::create_dir(&dir)?;
                if let Some(demands) = &demands {
                    demands.limit(hierarchy, &dir)?;
                }
                tasks.push(OpenOptions::new().write(true).open(dir.join("tasks"))?.into());
                groups.push((name, dir));
            }
        }
    }
    let argv = StringVector::new(vec![program.clone()]);
    let envp = StringVector::new(vec![c"PATH=/bin".to_owned()]);
    let new = ns::MOUNT | ns::PID | ns::IPC | ns::UTS | ns::NETWORK | ns::CGROUP;
    let child = spawn::clone(new, None, || {
        let failed = match enter(&root, &tasks, demands.as_ref().map(|d| (d, &groups[..]))) {
            Ok(()) => execve(&program, &argv, &envp),
            Err(e) => e,
        };
        failed.raw_os_error()
    })?;
    let status = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED)?;
    for (_, dir) in groups {
        fs::remove_dir(dir)?;
    }
    let code = status.and_then(|s| s.exit_status()).unwrap_or(255);
    Ok(code as u8)
}

fn enter(root: &CStr, tasks: &[OwnedFd], demands: Option<(&Demands, &[Group])>) -> Result<(), Errno> {
    for list in tasks {
        rustix::io::write(list, b"0")?;
    }
    rustix::mount::mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = rustix::mount::open_tree(CWD, root, flags)?;
    move_to(tree.as_fd(), root)?;
    rustix::process::fchdir(&tree)?;
    for (typ, place, parameters) in MOUNTS {
        let context = rustix::mount::fsopen(*typ, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in *parameters {
            rustix::mount::fsconfig_set_string(&context, *key, *value)?;
        }
        rustix::mount::fsconfig_create(&context)?;
        let (flags, attributes) = (FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOSUID);
        let mounted = rustix::mount::fsmount(&context, flags, attributes)?;
        match rustix::fs::mkdir(*place, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e),
        }
        move_to(mounted.as_fd(), place)?;
    }
    if let Some((_, groups)) = demands {
        fill(groups)?;
    }
    rustix::process::pivot_root(c".", c".")?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
    rustix::process::chdir(c"/")?;
    match demands {
        None => Ok(()),
        Some((demands, _)) => {
            mount::set_attributes(tree.as_fd(), false, READ_ONLY, None)?;
            demands.confine()
        }
    }
}

fn move_to(tree: BorrowedFd<'_>, place: &CStr) -> Result<(), Errno> {
    rustix::mount::move_mount(tree, c"", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// What the specs of the benchmark demand beyond the least.
struct Demands {
    /// Docker's, not that of `spec`.
    docker: bool,
    filter: Vec<Instruction>,
}

const DOCKERS: CapabilitySet = CapabilitySet::from_bits_retain(0xa804_25fb);

const READ_ONLY: Change = Change { set: attr::RDONLY, clear: 0, propagation: 0 };

const NODES: &[(&CStr, u32, u32)] = &[
    (c"dev/null", 1, 3),
    (c"dev/zero", 1, 5),
    (c"dev/full", 1, 7),
    (c"dev/random", 1, 8),
    (c"dev/urandom", 1, 9),
    (c"dev/tty", 5, 0),
];

const LINKS: &[(&CStr, &CStr)] = &[
    (c"/proc/self/fd", c"dev/fd"),
    (c"/proc/self/fd/0", c"dev/stdin"),
    (c"/proc/self/fd/1", c"dev/stdout"),
    (c"/proc/self/fd/2", c"dev/stderr"),
    (c"pts/ptmx", c"dev/ptmx"),
];

const READ_ONLY_PATHS: &[&CStr] = &[c"proc/bus", c"proc/fs", c"proc/irq", c"proc/sys", c"proc/sysrq-trigger"];

const MASKED: &[&CStr] = &[
    c"proc/acpi",
    c"proc/asound",
    c"proc/interrupts",
    c"proc/kcore",
    c"proc/keys",
    c"proc/latency_stats",
    c"proc/sched_debug",
    c"proc/scsi",
    c"proc/timer_list",
    c"proc/timer_stats",
    c"sys/devices/virtual/powercap",
    c"sys/firmware",
];

impl Demands {
    /// The rules and limits of a new group.
    fn limit(&self, hierarchy: &str, dir: &Path) -> Result<(), Error> {
        let write = |file: &str, text: &str| fs::write(dir.join(file), text);
        match hierarchy {
            "devices" => {
                write("devices.deny", "a")?;
                let allow = OpenOptions::new().write(true).open(dir.join("devices.allow"))?;
                let default =
                    ["c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm"];
                for rule in default.into_iter().chain(["c 5:0 rwm", "c 5:2 rwm", "c 136:* rwm"]) {
                    rustix::io::write(&allow, rule.as_bytes())?;
                }
                if self.docker {
                    rustix::io::write(&allow, b"c 5:1 rwm").map(drop)?;
                }
                Ok(())
            }
            "memory" if self.docker => {
                write("memory.limit_in_bytes", "536870912")?;
                write("memory.memsw.limit_in_bytes", "536870912")
            }
            "cpu" if self.docker => {
                write("cpu.shares", "512")?;
                write("cpu.cfs_period_us", "100000")?;
                write("cpu.cfs_quota_us", "50000")
            }
            "pids" if self.docker => write("pids.max", "100"),
            _ => Ok(()),
        }
    }

    /// Last of all: nothing above needs less.
    fn confine(&self) -> Result<(), Errno> {
        rustix::system::sethostname(b"brig")?;
        if !self.docker {
            let limit = Rlimit { current: Some(1024), maximum: Some(1024) };
            rustix::process::setrlimit(Resource::Nofile, limit)?;
        }
        let few = CapabilitySet::KILL | CapabilitySet::NET_BIND_SERVICE | CapabilitySet::AUDIT_WRITE;
        let kept = if self.docker { DOCKERS } else { few };
        // The last that Linux has, CAP_CHECKPOINT_RESTORE.
        for number in 0..=40 {
            let one = CapabilitySet::from_bits_retain(1 << number);
            if !kept.contains(one) {
                rustix::thread::remove_capability_from_bounding_set(one)?;
            }
        }
        let loads = if self.docker { kept | CapabilitySet::SYS_ADMIN } else { kept };
        let sets = CapabilitySets { effective: loads, permitted: loads, inheritable: CapabilitySet::empty() };
        rustix::thread::set_capabilities(None, sets)?;
        if !self.docker {
            rustix::thread::set_no_new_privs(true)?;
        }
        brigantine_sys::fd::close_on_exec_from(3)?;
        if !self.filter.is_empty() {
            brigantine_sys::seccomp::load(&self.filter, 0)?;
        }
        Ok(())
    }
}

/// The rest of the container's mounts and files, from the root.
fn fill(groups: &[Group]) -> Result<(), Errno> {
    for (path, major, minor) in NODES {
        let mode = Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(CWD, *path, FileType::CharacterDevice, mode, makedev(*major, *minor))?;
    }
    for (target, path) in LINKS {
        rustix::fs::symlink(*target, *path)?;
    }
    let inner = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let hierarchies = file_system(c"0755", inner)?;
    for (name, dir) in groups {
        let tree = rustix::mount::open_tree(CWD, dir, CLONE)?;
        mount::set_attributes(tree.as_fd(), false, READ_ONLY, None)?;
        rustix::fs::mkdirat(&hierarchies, *name, Mode::from_raw_mode(0o755))?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&tree, c"", &hierarchies, *name, flags)?;
    }
    mount::set_attributes(hierarchies.as_fd(), false, READ_ONLY, None)?;
    move_to(hierarchies.as_fd(), c"sys/fs/cgroup")?;
    for path in READ_ONLY_PATHS {
        let Some(tree) = cloned(path)? else { continue };
        mount::set_attributes(tree.as_fd(), true, READ_ONLY, None)?;
        move_to(tree.as_fd(), path)?;
    }
    let empty = file_system(c"0755", inner | MountAttrFlags::MOUNT_ATTR_RDONLY)?;
    let mut attached = false;
    for path in MASKED {
        let Ok(there) = rustix::fs::stat(*path) else { continue };
        if FileType::from_raw_mode(there.st_mode) != FileType::Directory {
            if let Some(tree) = cloned(c"dev/null")? {
                move_to(tree.as_fd(), path)?;
            }
        } else if std::mem::replace(&mut attached, true) {
            let flags = CLONE | OpenTreeFlags::AT_EMPTY_PATH;
            move_to(rustix::mount::open_tree(&empty, c"", flags)?.as_fd(), path)?;
        } else {
            move_to(empty.as_fd(), path)?;
        }
    }
    Ok(())
}

const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC);

fn cloned(path: &CStr) -> Result<Option<OwnedFd>, Errno> {
    match rustix::mount::open_tree(CWD, path, CLONE) {
        Err(Errno::NOENT) => Ok(None),
        other => other.map(Some),
    }
}

fn file_system(mode: &CStr, attributes: MountAttrFlags) -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, c"mode", mode)?;
    rustix::mount::fsconfig_create(&context)?;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Compiles the filter of a spec into a file.
fn compile(config: &[u8], file: &OsStr) -> Result<(), Error> {
    let spec: Spec = serde_json::from_slice(&fs::read(OsStr::from_bytes(config))?)?;
    let described = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let program = described.map(seccomp::compile).transpose().map_err(Error::other)?.flatten();
    let mut bytes = Vec::new();
    let code = serde_json::to_value(program)?["code"].take();
    for (code, jt, jf, k) in serde_json::from_value::<Vec<(u16, u8, u8, u32)>>(code)? {
        bytes.extend(code.to_le_bytes());
        bytes.extend([jt, jf]);
        bytes.extend(k.to_le_bytes());
    }
    fs::write(file, bytes)
}

fn instructions(bytes: &[u8]) -> Vec<Instruction> {
    let word = |b: &[u8]| b.iter().rev().fold(0_u32, |sum, byte| sum << 8 | u32::from(*byte));
    let instruction =
        |b: &[u8]| Instruction { code: word(&b[..2]) as u16, jt: b[2], jf: b[3], k: word(&b[4..]) };
    bytes.chunks_exact(8).map(instruction).collect()
}
