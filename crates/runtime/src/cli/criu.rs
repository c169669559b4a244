//! `checkpoint` and `restore`, done by criu: what of a container is not its own is told to it by name, on
//! both sides by the same one.
//!
//! A container is restored by a criu in a mount namespace of its own, which has the root file system as a
//! mount; nothing of that shows on the host. The restored process is a child of this one.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use brigantine_sys::exec::{StringVector, execve};
use brigantine_sys::spawn::{self, ns};
use brigantine_sys::{fd as descriptors, process};
use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, waitid};

use super::attend::{attend, forwarded};
use super::options::Options;
use super::record::{Dir, Record, Status, started, timestamp};
use super::{Global, commands};
use crate::cgroup::Cgroup;
use crate::error::{Error, Kind};
use crate::hooks;
use crate::mounts::c_string;
use crate::spec::{LinuxNamespaceType, Process, Spec};

/// Which descriptors of the container's first process are not its own.
const DESCRIPTORS: &str = "descriptors.json";

/// criu's arguments.
struct Arguments(Vec<String>);

impl Arguments {
    fn new(command: &str) -> Self {
        Self(vec!["criu".to_owned(), command.to_owned()])
    }

    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.to_owned());
        self
    }

    fn pair(&mut self, flag: &str, value: impl Into<String>) -> &mut Self {
        self.0.extend([flag.to_owned(), value.into()]);
        self
    }

    /// What both commands take in the same form.
    fn common(&mut self, options: &Options, images: &Path, work: &Path) -> &mut Self {
        self.pair("-D", images.display().to_string());
        self.pair("-W", work.display().to_string());
        self.flag("-v4");
        for (given, flag) in [
            ("tcp-established", "--tcp-established"),
            ("tcp-skip-in-flight", "--skip-in-flight"),
            ("ext-unix-sk", "--ext-unix-sk"),
            ("shell-job", "--shell-job"),
            ("file-locks", "--file-locks"),
            ("auto-dedup", "--auto-dedup"),
            ("lazy-pages", "--lazy-pages"),
        ] {
            if options.has(given) {
                self.flag(flag);
            }
        }
        let mode = options.text("manage-cgroups-mode").unwrap_or("soft");
        self.flag(&format!("--manage-cgroups={mode}"));
        for namespace in options.all("empty-ns") {
            self.pair("--empty-ns", if namespace == "network" { "net" } else { namespace });
        }
        self
    }
}

fn paths(options: &Options) -> Result<(PathBuf, PathBuf), Error> {
    let make = |path: PathBuf| {
        let failed = |e| Error::os(format!("creating {}", path.display()), e);
        fs::create_dir_all(&path).map_err(failed)?;
        fs::canonicalize(&path).map_err(failed)
    };
    let images = make(options.path("image-path").unwrap_or_else(|| PathBuf::from("checkpoint")))?;
    let work = options.path("work-path").map_or_else(|| Ok(images.clone()), make)?;
    Ok((images, work))
}

fn check_mode(options: &Options) -> Result<(), Error> {
    let known = ["none", "props", "soft", "full", "strict", "ignore"];
    match options.text("manage-cgroups-mode") {
        Some(mode) if !known.contains(&mode) => {
            Err(Error::invalid(format!("--manage-cgroups-mode: {mode:?} is not one of {}", known.join(", "))))
        }
        _ => Ok(()),
    }
}

fn has_terminal(spec: &Spec) -> bool {
    spec.process().as_ref().and_then(Process::terminal).unwrap_or_default()
}

/// Mounts that come from outside: (where, source).
fn outside(spec: &Spec, bundle: &Path, group: &Cgroup) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        let at = mount.destination().display().to_string();
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
    if has_terminal(&record.spec) {
        return Err(Error::unsupported("a container with a terminal cannot be checkpointed"));
    }
    check_mode(options)?;
    let (images, work) = paths(options)?;
    let before = options.has("pre-dump");
    let mut args = Arguments::new(if before { "pre-dump" } else { "dump" });
    args.common(options, &images, &work).pair("-t", record.pid.to_string()).pair("-o", "dump.log");
    if options.has("leave-running") && !before {
        args.flag("--leave-running");
    }
    if let Some(parent) = options.text("parent-path") {
        if parent.starts_with('/') || !images.join(parent).is_dir() {
            return Err(Error::invalid(format!(
                "--parent-path {parent:?} is not a directory relative to the images"
            )));
        }
        args.pair("--prev-images-dir", parent);
    }
    if before || options.has("parent-path") {
        args.flag("--track-mem");
    }
    if let Some(server) = options.text("page-server") {
        let (address, port) = server
            .rsplit_once(':')
            .ok_or_else(|| Error::invalid(format!("--page-server {server:?} is not ADDRESS:PORT")))?;
        args.flag("--page-server").pair("--address", address).pair("--port", port);
    }
    if let Some(fd) = options.number::<u32>("status-fd")? {
        args.pair("--status-fd", fd.to_string());
    }
    if let Some(freezer) = record.cgroup.v1_dir("freezer").or_else(|| record.cgroup.v2_dir()) {
        args.pair("--freeze-cgroup", freezer.display().to_string());
    }
    for (at, _) in outside(&record.spec, &record.bundle, &record.cgroup) {
        args.pair("--external", format!("mnt[{at}]:{at}"));
    }
    for (name, key, path) in joined(&record.spec) {
        use std::os::unix::fs::MetadataExt;
        let inode =
            fs::metadata(&path).map_err(|e| Error::os(format!("reading {}", path.display()), e))?.ino();
        args.pair("--external", format!("{name}[{inode}]:{key}"));
    }
    let standard = standard(record.pid)?;
    for name in standard.iter().filter(|name| name.starts_with("file[")) {
        args.pair("--external", name.as_str());
    }
    let text = serde_json::to_vec(&standard).unwrap_or_default();
    let file = images.join(DESCRIPTORS);
    fs::write(&file, text).map_err(|e| Error::os(format!("writing {}", file.display()), e))?;
    let what = args.0[1].clone();
    let mut command = Command::new(program(global)?);
    command.args(&args.0[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let status = command.status().map_err(|e| Error::os("executing criu", e))?;
    if !status.success() {
        return Err(told(&what, &status.to_string(), &work.join("dump.log")));
    }
    if before || options.has("leave-running") {
        return Ok(());
    }
    drop(lock);
    commands::destroy(&dir, &record)
}

pub(super) fn restore(global: &Global, options: &Options) -> Result<u8, Error> {
    let id = options.id()?;
    check_mode(options)?;
    let bundle = options.path("bundle").unwrap_or_else(|| PathBuf::from("."));
    let bundle = fs::canonicalize(&bundle)
        .map_err(|e| Error::os(format!("opening bundle {}", bundle.display()), e))?;
    let spec = commands::load_spec(&bundle, global)?;
    if has_terminal(&spec) || options.has("console-socket") {
        return Err(Error::unsupported("a container with a terminal cannot be restored"));
    }
    let root = spec.root().as_ref().ok_or_else(|| Error::invalid("the spec has no root"))?;
    let rootfs = fs::canonicalize(bundle.join(root.path()))
        .map_err(|e| Error::os(format!("opening the root file system {:?}", root.path().display()), e))?;
    let images = options.path("image-path").unwrap_or_else(|| PathBuf::from("checkpoint"));
    let file = images.join(DESCRIPTORS);
    let bytes = fs::read(&file).map_err(|e| Error::os(format!("reading {}", file.display()), e))?;
    let standard: Vec<String> = serde_json::from_slice(&bytes)
        .map_err(|e| Error::invalid(format!("reading {}: {e}", file.display())))?;
    let (images, work) = paths(options)?;
    let signals = (!options.has("detach")).then(forwarded).transpose()?;
    let root = global.root();
    let dir = Dir::new(&root, id);
    dir.claim(&root, id)?;
    let restored = (|| {
        // What keeps a scope is let go of when the container's processes are in it.
        let (cgroup, _placeholder) =
            crate::launch::make_cgroup(id, &spec, global.systemd_cgroup, global.is_rootless())?;
        let pid = (|| {
            let at = dir.path.join("criu-root");
            fs::create_dir(&at).map_err(|e| Error::os(format!("creating {}", at.display()), e))?;
            let mut kept = Vec::new();
            let mut args = Arguments::new("restore");
            args.common(options, &images, &work).pair("-o", "restore.log");
            args.flag("--restore-detached").flag("--restore-sibling");
            args.pair("--root", at.display().to_string());
            args.pair("--pidfile", dir.path.join("criu.pid").display().to_string());
            for flag in ["lsm-profile", "lsm-mount-context"] {
                if let Some(value) = options.text(flag) {
                    args.pair(&format!("--{flag}"), value);
                }
            }
            for (name, _) in cgroup.paths().iter().filter(|(name, _)| !name.is_empty()) {
                args.pair("--cgroup-root", format!("{name}:{}", cgroup.path()));
            }
            for (key, source) in outside(&spec, &bundle, &cgroup) {
                args.pair("--external", format!("mnt[{key}]:{source}"));
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
                args.pair("--inherit-fd", format!("fd[{}]:{key}", fd.as_raw_fd()));
            }
            execute(global, &args, &kept, &rootfs, &at, &work)?;
            let file = dir.path.join("criu.pid");
            let text =
                fs::read_to_string(&file).map_err(|e| Error::os(format!("reading {}", file.display()), e))?;
            text.trim()
                .parse::<i32>()
                .map_err(|_unused| Error::invalid(format!("criu's process id {text:?}")))
        })();
        let pid = match pid {
            Ok(pid) => pid,
            Err(error) => {
                // The first failure is the one to tell.
                drop(cgroup.kill_all());
                drop(cgroup.delete());
                return Err(error);
            }
        };
        let record = Record {
            version: 1,
            id: id.to_owned(),
            pid,
            pid_started: started(pid).map(|(time, _)| time).unwrap_or_default(),
            bundle,
            rootfs,
            created: timestamp(SystemTime::now()),
            cgroup,
            spec,
        };
        dir.save(&record)?;
        if let Some(file) = options.path("pid-file") {
            commands::write_pid(&file, pid)?;
        }
        Ok(record)
    })();
    let record = match restored {
        Ok(record) => record,
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
    let status = attend(pidfd.as_fd(), None, &signals, None)?;
    commands::destroy(&dir, &record)?;
    Ok(status)
}

/// Runs criu in a mount namespace in which `rootfs` is mounted at `at`.
fn execute(
    global: &Global,
    args: &Arguments,
    kept: &[(OwnedFd, String)],
    rootfs: &Path,
    at: &Path,
    work: &Path,
) -> Result<(), Error> {
    use std::os::unix::ffi::OsStrExt;
    let path = |path: &Path| c_string(path.as_os_str().as_bytes(), "path");
    let (program, rootfs, at) = (path(&program(global)?)?, path(rootfs)?, path(at)?);
    let argv = args.0.iter().map(|a| c_string(a.as_str(), "argument")).collect::<Result<Vec<_>, _>>()?;
    let argv = StringVector::new(argv);
    let mut env: Vec<CString> = Vec::new();
    for (name, value) in std::env::vars_os() {
        env.push(c_string([name.as_bytes(), b"=", value.as_bytes()].concat(), "environment variable")?);
    }
    let envp = StringVector::new(env);
    let child = spawn::clone(ns::MOUNT, None, || {
        process::reset_signals();
        let prepared = (|| {
            use rustix::mount::MountPropagationFlags as Flags;
            rustix::mount::mount_change(c"/", Flags::DOWNSTREAM | Flags::REC)?;
            let flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE;
            let tree = rustix::mount::open_tree(rustix::fs::CWD, &rootfs, flags)?;
            let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            rustix::mount::move_mount(&tree, c"", rustix::fs::CWD, &at, empty)?;
            for (fd, _) in kept {
                descriptors::keep_on_exec(fd.as_raw_fd())?;
            }
            Ok::<(), rustix::io::Errno>(())
        })();
        match prepared {
            Ok(()) => {
                execve(&program, &argv, &envp);
                127
            }
            Err(_) => 126,
        }
    })
    .map_err(|e| Error::os("starting criu", e))?;
    let status = loop {
        match waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other.map_err(|e| Error::os("waiting for criu", e))?,
        }
    };
    match status.map(|s| (s.exit_status(), s.terminating_signal())) {
        Some((Some(0), _)) => Ok(()),
        Some((Some(code), _)) => {
            Err(told("restore", &format!("exit status: {code}"), &work.join("restore.log")))
        }
        Some((_, Some(signal))) => {
            Err(told("restore", &format!("signal: {signal}"), &work.join("restore.log")))
        }
        _ => Err(told("restore", "it ended", &work.join("restore.log"))),
    }
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
fn told(command: &str, how: &str, log: &Path) -> Error {
    use std::io::{Read, Seek, SeekFrom};
    let mut text = Vec::new();
    if let Ok(mut file) = fs::File::open(log) {
        let length = file.metadata().map_or(0, |m| m.len());
        // What it said is an extra; the end of the log is enough.
        if file.seek(SeekFrom::Start(length.saturating_sub(64 << 10))).is_ok() {
            file.take(64 << 10).read_to_end(&mut text).ok();
        }
    }
    let text = String::from_utf8_lossy(&text);
    let mut errors = text.lines().filter(|l| l.contains("Error (") && !l.contains("FAILED"));
    let said = errors.next_back().map_or("it says nothing", |l| l.split("): ").last().unwrap_or(l));
    Error::new(Kind::Os, format!("criu {command}: {how}: {said} (log: {})", log.display()))
}
