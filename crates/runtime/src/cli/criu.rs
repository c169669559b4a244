//! `checkpoint` and `restore`, done by criu: what of a container is not its own is told to it by name, on
//! both sides by the same one.
//!
//! A container is restored by a criu in a mount namespace of its own, which has the root file system as a
//! mount; nothing of that shows on the host. The restored process is a child of this one.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use brigantine_sys::fd as descriptors;
use brigantine_sys::spawn::ns;
use rustix::process::{Pid, PidfdFlags};

use super::attend::{attend, forwarded};
use super::options::Options;
use super::record::{Dir, Record, Status, started, timestamp};
use super::swrk::{self, Message, Task, View, option};
use super::{Global, begun, commands, terminal};
use crate::cgroup::{Cgroup, Making};
use crate::error::{Error, Kind};
use crate::hooks;
use crate::spec::{LinuxNamespaceType, Process, Spec};

/// Which descriptors of the container's first process are not its own.
const DESCRIPTORS: &str = "descriptors.json";

/// Flags that are options of criu's as they are.
const SWITCHES: &[(&str, u32)] = &[
    ("tcp-established", option::TCP_ESTABLISHED),
    ("tcp-skip-in-flight", option::TCP_SKIP_IN_FLIGHT),
    ("ext-unix-sk", option::EXT_UNIX_SK),
    ("shell-job", option::SHELL_JOB),
    ("file-locks", option::FILE_LOCKS),
    ("auto-dedup", option::AUTO_DEDUP),
    ("lazy-pages", option::LAZY_PAGES),
    ("link-remap", option::LINK_REMAP),
];

/// What `--manage-cgroups-mode` takes, with criu's number for it.
const MODES: &[(&str, u64)] =
    &[("ignore", 0), ("none", 1), ("props", 2), ("soft", 3), ("full", 4), ("strict", 5)];

/// Where images and logs are, open as long as criu works: it reaches them through this process.
struct Places {
    images: PathBuf,
    work: PathBuf,
    opened: [OwnedFd; 2],
}

impl Places {
    fn open(options: &Options) -> Result<Self, Error> {
        let make = |path: PathBuf| {
            let failed = |e| Error::os(format!("creating {}", path.display()), e);
            fs::create_dir_all(&path).map_err(failed)?;
            fs::canonicalize(&path).map_err(failed)
        };
        let images = make(options.path("image-path").unwrap_or_else(|| PathBuf::from("checkpoint")))?;
        let work = options.path("work-path").map_or_else(|| Ok(images.clone()), make)?;
        let open = |path: &Path| {
            let file =
                fs::File::open(path).map_err(|e| Error::os(format!("opening {}", path.display()), e))?;
            Ok::<OwnedFd, Error>(file.into())
        };
        let opened = [open(&images)?, open(&work)?];
        Ok(Self { images, work, opened })
    }

    fn log(&self, task: Task) -> PathBuf {
        self.work.join(log_name(task))
    }
}

fn log_name(task: Task) -> &'static str {
    if task == Task::Restore { "restore.log" } else { "dump.log" }
}

/// What every task takes in the same form.
fn common(task: Task, options: &Options, places: &Places) -> Result<Message, Error> {
    let mut message = Message::default();
    let [images, work] = &places.opened;
    message.fd(option::IMAGES_DIR_FD, images).fd(option::WORK_DIR_FD, work);
    message.number(option::LOG_LEVEL, 4).text(option::LOG_FILE, log_name(task));
    // A terminal's master is with whoever is attached, not with the container.
    message.yes(option::NOTIFY_SCRIPTS).yes(option::ORPHAN_PTS_MASTER);
    for (_, field) in SWITCHES.iter().filter(|(given, _)| options.has(given)) {
        message.yes(*field);
    }
    message.yes(option::MANAGE_CGROUPS).number(option::MANAGE_CGROUPS_MODE, mode(options)?);
    let mut empty = 0;
    for namespace in options.all("empty-ns") {
        if namespace != "network" {
            return Err(Error::invalid(format!("--empty-ns: {namespace:?} is not network")));
        }
        empty |= ns::NETWORK;
    }
    if empty != 0 {
        message.number(option::EMPTY_NS, empty);
    }
    Ok(message)
}

fn mode(options: &Options) -> Result<u64, Error> {
    let given = options.text("manage-cgroups-mode").unwrap_or("soft");
    MODES.iter().find(|(name, _)| *name == given).map(|(_, number)| *number).ok_or_else(|| {
        let known: Vec<&str> = MODES.iter().map(|(name, _)| *name).collect();
        Error::invalid(format!("--manage-cgroups-mode: {given:?} is not one of {}", known.join(", ")))
    })
}

fn has_terminal(spec: &Spec) -> bool {
    spec.process().as_ref().and_then(Process::terminal).unwrap_or_default()
}

/// Where a mount's destination leads in the container's own files: links are followed as when it was mounted.
fn led(rootfs: &Path, destination: &Path) -> String {
    let given = || destination.display().to_string();
    let follow = || {
        use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = rustix::fs::open(rootfs, flags | OFlags::DIRECTORY, Mode::empty()).ok()?;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let found = openat2(&root, destination, flags, Mode::empty(), resolve).ok()?;
        let path = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).ok()?;
        let inner = path.strip_prefix(rootfs).ok()?;
        Some(Path::new("/").join(inner).display().to_string())
    };
    // What is below another mount cannot be seen from here.
    follow().unwrap_or_else(given)
}

/// Mounts that come from outside: (where, source).
fn outside(spec: &Spec, bundle: &Path, rootfs: &Path, group: &Cgroup) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        let at = led(rootfs, mount.destination());
        let bind = mount.options().iter().flatten().any(|o| o == "bind" || o == "rbind");
        match mount.typ().as_deref() {
            Some("cgroup" | "cgroup2") if group.is_unified() => {
                all.extend(group.directory().map(|dir| (at, dir.display().to_string())));
            }
            Some("cgroup" | "cgroup2") => {
                for (label, _, dir) in group.v1_views() {
                    all.push((format!("{at}/{label}"), dir.display().to_string()));
                }
            }
            typ if bind || typ == Some("bind") => {
                let source = mount.source().clone().unwrap_or_default();
                all.push((at, bundle.join(source).display().to_string()));
            }
            _ => {}
        }
    }
    all
}

/// Makes the mount points that are gone since the container was made, each where it was then: in the root file system, or in
/// the source of the bind mount that it lies in. What lies in another kind of mount comes back with that mount.
fn make_points(spec: &Spec, bundle: &Path, rootfs: &Path) -> Result<(), Error> {
    let mut trees: Vec<(&Path, Option<PathBuf>)> = vec![(Path::new("/"), Some(rootfs.to_owned()))];
    for mount in spec.mounts().iter().flatten() {
        let at = mount.destination().as_path();
        let bind = mount.options().iter().flatten().any(|o| o == "bind" || o == "rbind");
        let source = mount.source().as_ref().filter(|_| bind || mount.typ().as_deref() == Some("bind"));
        let source = source.map(|source| bundle.join(source));
        let around =
            trees.iter().rev().find_map(|(top, tree)| Some((at.strip_prefix(top).ok()?, tree.as_ref()?)));
        if let (Some(source), Some((below, tree))) = (&source, around) {
            make_point(tree, below, source.is_dir())
                .map_err(|e| Error::os(format!("making the mount point {}", at.display()), e))?;
        }
        trees.push((at, source));
    }
    Ok(())
}

fn make_point(tree: &Path, below: &Path, directory: bool) -> Result<(), rustix::io::Errno> {
    use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, mkdirat, mknodat, openat2};
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let root = rustix::fs::open(tree, flags | OFlags::DIRECTORY, Mode::empty())?;
    let mut above = root.try_clone().map_err(|_unused| rustix::io::Errno::MFILE)?;
    let mut path = PathBuf::new();
    for part in below.components() {
        path.push(part);
        above = match openat2(&root, &path, flags, Mode::empty(), resolve) {
            Err(rustix::io::Errno::NOENT) => {
                if directory || path != below {
                    mkdirat(&above, part.as_os_str(), Mode::from_raw_mode(0o755))?;
                } else {
                    mknodat(&above, part.as_os_str(), FileType::RegularFile, Mode::from_raw_mode(0o644), 0)?;
                }
                openat2(&root, &path, flags, Mode::empty(), resolve)?
            }
            other => other?,
        };
    }
    Ok(())
}

/// Namespaces that the container only joined: (criu's name, our name for it, path).
fn joined(spec: &Spec) -> Vec<(&'static str, &'static str, PathBuf)> {
    let mut all = Vec::new();
    for namespace in spec.linux().iter().filter_map(|l| l.namespaces().as_ref()).flatten() {
        let Some(path) = namespace.path().clone().filter(|p| !p.as_os_str().is_empty()) else { continue };
        match namespace.typ() {
            LinuxNamespaceType::Network => all.push(("net", "extRootNetNS", path)),
            LinuxNamespaceType::Pid => all.push(("pid", "extRootPidNS", path)),
            _ => {}
        }
    }
    all
}

/// What the first process's standard descriptors are called on both sides; empty for what is its own.
fn standard(pid: i32) -> Result<Vec<String>, Error> {
    use std::os::unix::fs::MetadataExt;
    let own = fs::read_to_string(format!("/proc/{pid}/mountinfo"))
        .map_err(|e| Error::os("reading the container's mounts", e))?;
    let mut names = Vec::new();
    for number in 0..3 {
        let link = format!("/proc/{pid}/fd/{number}");
        let Ok(target) = fs::read_link(&link) else {
            names.push(String::new());
            continue;
        };
        let target = target.display().to_string();
        if target.starts_with("pipe:") || target.starts_with("socket:") {
            names.push(target);
            continue;
        }
        let failed = |e| Error::os(format!("reading {link}"), e);
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).map_err(failed)?;
        let mount = info.lines().find_map(|l| l.strip_prefix("mnt_id:")).map(str::trim).unwrap_or_default();
        if own.lines().any(|line| line.split(' ').next() == Some(mount)) {
            names.push(String::new());
            continue;
        }
        let mount: u64 = mount.parse().unwrap_or_default();
        let inode = fs::metadata(&link).map_err(failed)?.ino();
        names.push(format!("file[{mount:x}:{inode:x}]"));
    }
    Ok(names)
}

pub(super) fn checkpoint(global: &Global, options: &Options) -> Result<(), Error> {
    let (dir, record) = commands::open(global, options.id()?)?;
    let lock = dir.lock()?;
    commands::need(&record, &dir, &[Status::Running, Status::Paused], "checkpointed")?;
    let before = options.has("pre-dump");
    let task = if before { Task::PreDump } else { Task::Dump };
    mode(options)?;
    let places = Places::open(options)?;
    let images = &places.images;
    let mut asked = common(task, options, &places)?;
    asked.number(option::PID, u64::from(record.pid.unsigned_abs()));
    if options.has("leave-running") && !before {
        asked.yes(option::LEAVE_RUNNING);
    }
    if let Some(parent) = options.text("parent-path") {
        if parent.starts_with('/') || !images.join(parent).is_dir() {
            return Err(Error::invalid(format!(
                "--parent-path {parent:?} is not a directory relative to the images"
            )));
        }
        asked.text(option::PARENT_IMG, parent);
    }
    if before || options.has("parent-path") {
        asked.yes(option::TRACK_MEM);
    }
    if let Some(server) = options.text("page-server") {
        let (address, port) = server
            .rsplit_once(':')
            .ok_or_else(|| Error::invalid(format!("--page-server {server:?} is not ADDRESS:PORT")))?;
        let port: u16 =
            port.parse().map_err(|_unused| Error::invalid(format!("--page-server: {port:?} is no port")))?;
        let mut at = Message::default();
        asked.message(option::PAGE_SERVER, at.text(1, address).number(2, port.into()));
    }
    let ready = options.number::<i32>("status-fd")?.map(|number| {
        let failed = |e| Error::os(format!("--status-fd {number}"), e);
        descriptors::adopt(number).map_err(failed)
    });
    let ready = ready.transpose()?;
    if let Some(freezer) = record.cgroup.v1_dir("freezer").or_else(|| record.cgroup.v2_dir()) {
        asked.text(option::FREEZE_CGROUP, &freezer.display().to_string());
    }
    for (at, _) in outside(&record.spec, &record.bundle, &record.rootfs, &record.cgroup) {
        asked.text(option::EXTERNAL, &format!("mnt[{at}]:{at}"));
    }
    for (name, key, path) in joined(&record.spec) {
        use std::os::unix::fs::MetadataExt;
        let inode =
            fs::metadata(&path).map_err(|e| Error::os(format!("reading {}", path.display()), e))?.ino();
        asked.text(option::EXTERNAL, &format!("{name}[{inode}]:{key}"));
    }
    let standard = standard(record.pid)?;
    for name in standard.iter().filter(|name| name.starts_with("file[")) {
        asked.text(option::EXTERNAL, name);
    }
    let text = serde_json::to_vec(&standard).unwrap_or_default();
    let file = images.join(DESCRIPTORS);
    fs::write(&file, text).map_err(|e| Error::os(format!("writing {}", file.display()), e))?;
    swrk::ask(&program(global)?, task, &asked, &[], ready, None).map_err(|e| told(task, &e, &places))?;
    if before || options.has("leave-running") {
        return Ok(());
    }
    drop(lock);
    commands::destroy(&dir, &record)
}

pub(super) fn restore(global: &Global, options: &Options) -> Result<u8, Error> {
    let id = options.id()?;
    mode(options)?;
    let bundle = options.path("bundle").unwrap_or_else(|| PathBuf::from("."));
    let bundle = fs::canonicalize(&bundle)
        .map_err(|e| Error::os(format!("opening bundle {}", bundle.display()), e))?;
    let spec = begun::load_spec(&bundle, global)?;
    commands::check_terminal(has_terminal(&spec), options.has("detach"), options)?;
    let root = spec.root().as_ref().ok_or_else(|| Error::invalid("the spec has no root"))?;
    let rootfs = fs::canonicalize(bundle.join(root.path()))
        .map_err(|e| Error::os(format!("opening the root file system {:?}", root.path().display()), e))?;
    let images = options.path("image-path").unwrap_or_else(|| PathBuf::from("checkpoint"));
    let file = images.join(DESCRIPTORS);
    let bytes = fs::read(&file).map_err(|e| Error::os(format!("reading {}", file.display()), e))?;
    let standard: Vec<String> = serde_json::from_slice(&bytes)
        .map_err(|e| Error::invalid(format!("reading {}: {e}", file.display())))?;
    let mut places = Places::open(options)?;
    make_points(&spec, &bundle, &rootfs)?;
    let signals = (!options.has("detach")).then(forwarded).transpose()?;
    let root = global.root();
    let dir = Dir::new(&root, id);
    dir.claim(&root, id)?;
    let restored = (|| {
        // What keeps a scope is let go of when the container's processes are in it.
        let mut group = Making::begin(id, &spec, global.systemd_cgroup, global.is_rootless())?;
        let cgroup = group.finish()?.clone();
        let restored = (|| {
            let at = dir.path.join("criu-root");
            fs::create_dir(&at).map_err(|e| Error::os(format!("creating {}", at.display()), e))?;
            let mut kept = Vec::new();
            let mut asked = common(Task::Restore, options, &places)?;
            asked.yes(option::RST_SIBLING).text(option::ROOT, &at.display().to_string());
            for (flag, field) in
                [("lsm-profile", option::LSM_PROFILE), ("lsm-mount-context", option::LSM_MOUNT_CONTEXT)]
            {
                if let Some(value) = options.text(flag) {
                    asked.text(field, value);
                }
            }
            for (name, _) in cgroup.paths().iter().filter(|(name, _)| !name.is_empty()) {
                let mut root = Message::default();
                asked.message(option::CG_ROOT, root.text(1, name).text(2, cgroup.path()));
            }
            for (key, source) in outside(&spec, &bundle, &rootfs, &cgroup) {
                asked.text(option::EXTERNAL, &format!("mnt[{key}]:{source}"));
            }
            let failed = |e| Error::os("handing descriptors to criu", e);
            for (_, key, path) in joined(&spec) {
                let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
                let fd = rustix::fs::open(&path, flags, rustix::fs::Mode::empty())
                    .map_err(|e| Error::os(format!("opening {}", path.display()), e))?;
                kept.push((rustix::io::fcntl_dupfd_cloexec(&fd, 20).map_err(failed)?, key.to_owned()));
            }
            let own = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
            for (name, fd) in standard.iter().zip(own).filter(|(name, _)| !name.is_empty()) {
                kept.push((rustix::io::fcntl_dupfd_cloexec(fd, 20).map_err(failed)?, name.clone()));
            }
            for (fd, key) in &kept {
                let mut inherited = Message::default();
                asked.message(option::INHERIT_FD, inherited.text(1, key).fd(2, fd));
            }
            let kept: Vec<BorrowedFd<'_>> = kept.iter().map(|(fd, _)| fd.as_fd()).collect();
            let [images, work] = &mut places.opened;
            let dirs = [(&*places.images, images), (&*places.work, work)];
            let view = View { from: &rootfs, at: &at, group: &cgroup, dirs };
            swrk::ask(&program(global)?, Task::Restore, &asked, &kept, None, Some(view))
                .map_err(|e| told(Task::Restore, &e, &places))
        })();
        let (pid, mut master) = match restored {
            Ok(answer) => (answer.pid.unwrap_or_default(), answer.terminal),
            Err(error) => {
                // The first failure is the one to tell.
                drop(cgroup.kill_all());
                return Err(error);
            }
        };
        let cgroup = group.keep();
        let record = Record {
            version: 1,
            id: id.to_owned(),
            pid,
            pid_started: started(pid).map(|(time, _)| time).unwrap_or_default(),
            bundle,
            rootfs,
            created: timestamp(SystemTime::now()),
            cgroup,
            spec: spec.into(),
        };
        dir.save(&record)?;
        if let Some(socket) = options.path("console-socket")
            && let Some(fd) = master.take()
        {
            terminal::hand_over(&socket, fd.as_fd(), b"/dev/ptmx")?;
        }
        if let Some(file) = options.path("pid-file") {
            commands::write_pid(&file, pid)?;
        }
        Ok((record, master))
    })();
    let (record, master) = match restored {
        Ok(restored) => restored,
        Err(error) => {
            drop(dir.remove());
            return Err(error);
        }
    };
    let poststart = record.spec.hooks().as_ref().and_then(|h| h.poststart().as_ref());
    hooks::run("poststart", poststart, &record.state(&dir).json()?, Some(&record.bundle))?;
    let Some(signals) = signals else { return Ok(0) };
    let failed = |e: rustix::io::Errno| Error::os("opening the restored process", e);
    let pid = Pid::from_raw(record.pid).ok_or_else(|| failed(rustix::io::Errno::SRCH))?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(failed)?;
    let status = attend(pidfd.as_fd(), master, &signals, None)?;
    commands::destroy(&dir, &record)?;
    Ok(status)
}

/// criu itself: what `--criu` names, or in PATH.
fn program(global: &Global) -> Result<PathBuf, Error> {
    if let Some(path) = &global.criu
        && path.components().count() > 1
    {
        return Ok(path.clone());
    }
    let name = global.criu.clone().unwrap_or_else(|| PathBuf::from("criu"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(&name)).find(|file| file.is_file()).ok_or_else(|| {
        Error::new(
            Kind::NotFound,
            format!("{:?} is not in $PATH: checkpoint and restore need it", name.display()),
        )
    })
}

/// criu's failure, with the last error of its log.
fn told(task: Task, how: &Error, places: &Places) -> Error {
    use std::io::{Read, Seek, SeekFrom};
    let mut text = Vec::new();
    let log = places.log(task);
    if let Ok(mut file) = fs::File::open(&log) {
        let length = file.metadata().map_or(0, |m| m.len());
        // What it said is an extra; the end of the log is enough.
        if file.seek(SeekFrom::Start(length.saturating_sub(64 << 10))).is_ok() {
            file.take(64 << 10).read_to_end(&mut text).ok();
        }
    }
    let text = String::from_utf8_lossy(&text);
    let mut errors = text.lines().filter(|l| l.contains("Error (") && !l.contains("FAILED"));
    let said = errors.next_back().map_or("it says nothing", |l| l.split("): ").last().unwrap_or(l));
    Error::new(Kind::Os, format!("criu {}: {how}: {said} (log: {})", task.name(), log.display()))
}
