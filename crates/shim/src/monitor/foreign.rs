//! A container made by another OCI runtime: its command line is called for each step, as containerd calls runc's.
//!
//! The container's root is mounted in a mount namespace that is there only while the runtime's `create` runs: the
//! container's own is a copy of it, and the host's mount table shows nothing of either. The runtime's first process
//! and those of execs become the monitor's children, because it is the nearest subreaper. A runtime that does not
//! come to an end is killed, and what it was called for has failed.

use std::fs::{self, File};
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use brigantine_runtime::{Cgroup, Execed, Rootfs, Stdio};
use brigantine_sys::spawn::{self, ns};
use oci_spec::runtime::{LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources, RootBuilder, Spec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountPropagationFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::boot::remove_file;
use super::container::{Further, send};
use crate::config::OtherRuntime;
use crate::protocol::{Failure, FailureKind};

/// How long `create` and `exec` may take: both run hooks.
const STARTING: Duration = Duration::from_secs(45);

/// How long anything else may take. The monitor does nothing else meanwhile.
const STEP: Duration = Duration::from_secs(15);

/// Where a runtime looks for programs of its own.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The most of a runtime's log that is looked at, from its end.
const MAX_LOG: u64 = 64 << 10;

/// The monitor's directory and its descriptor, for paths of sockets that may be too long.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) dir: &'a Path,
    pub(super) fd: &'a File,
}

/// What a container is made of.
pub(super) struct Parts<'a> {
    pub(super) id: &'a str,
    pub(super) spec: Spec,
    pub(super) rootfs: &'a Rootfs,
    pub(super) netns: Option<OwnedFd>,
    pub(super) stdio: Stdio,
    pub(super) systemd_cgroup: bool,
}

/// One of another runtime's containers.
pub(super) struct Foreign {
    call: Call,
    pid: i32,
    pidfd: OwnedFd,
    cgroup: Cgroup,
    terminal: Option<OwnedFd>,
    /// It was told to run; until then dropping it undoes it.
    started: bool,
}

impl Foreign {
    /// Everything up to right before the exec.
    pub(super) fn create(runtime: OtherRuntime, place: Place<'_>, parts: Parts<'_>) -> Result<Self, Failure> {
        let Parts { id, mut spec, rootfs, netns, stdio, systemd_cgroup } = parts;
        check(&spec)?;
        let call = Call::new(runtime, id, place, systemd_cgroup)?;
        let bundle = place.dir.join("bundle");
        let root = match rootfs {
            Rootfs::Path(path) | Rootfs::Mapped(path) => path.clone(),
            Rootfs::Overlay { .. } => bundle.join("rootfs"),
        };
        make_dir(&bundle)?;
        make_dir(&bundle.join("rootfs"))?;
        let read_only = spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or_default();
        let described = RootBuilder::default().path(root.clone()).readonly(read_only).build();
        spec.set_root(Some(described.map_err(|e| invalid("the root", &e))?));
        if let Some(netns) = &netns {
            let path = format!("/proc/{}/fd/{}", own_pid(), netns.as_raw_fd());
            join_network(&mut spec, path)?;
        }
        let path = bundle.join("config.json");
        let text = serde_json::to_vec(&spec).map_err(|e| invalid("the container's specification", &e))?;
        fs::write(&path, text).map_err(|e| os(&format!("write {}", path.display()), &e))?;

        let console = Console::for_stdio(&stdio, place)?;
        let pid_file = bundle.join("pid");
        let made = aside(|| {
            if matches!(rootfs, Rootfs::Overlay { .. }) {
                brigantine_runtime::attach_root(rootfs, &root)?;
            }
            let mut command = call.command("create");
            command.arg("--bundle").arg(&bundle).arg("--pid-file").arg(&pid_file);
            if let Some(console) = &console {
                command.arg("--console-socket").arg(console.path());
            }
            call.run(command.arg(id), Some(stdio), STARTING)
        });
        let found = made.and_then(|()| call.found(&pid_file, &spec));
        let (pid, pidfd, cgroup) = found.inspect_err(|_| call.force_delete(&spec))?;
        let mut container = Self { call, pid, pidfd, cgroup, terminal: None, started: false };
        if let Some(console) = console {
            container.terminal = Some(console.receive()?);
        }
        Ok(container)
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    pub(super) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    pub(super) fn take_terminal(&mut self) -> Option<OwnedFd> {
        self.terminal.take()
    }

    pub(super) fn start(&mut self) -> Result<(), Failure> {
        self.call.run(self.call.command("start").arg(&self.call.id), None, STARTING)?;
        self.started = true;
        Ok(())
    }

    /// Start a further process.
    pub(super) fn exec(&self, further: Further<'_>) -> Result<Execed, Failure> {
        let Further { id, process, stdio } = further;
        let place = self.call.place()?;
        let console = Console::for_stdio(&stdio, Place { dir: &self.call.dir, fd: &place })?;
        let (description, pid_file) =
            (self.call.dir.join(format!("process-{id}.json")), self.call.dir.join(format!("pid-{id}")));
        let text = serde_json::to_vec(&process).map_err(|e| invalid("the process", &e))?;
        fs::write(&description, text).map_err(|e| os(&format!("write {}", description.display()), &e))?;
        let mut command = self.call.command("exec");
        command.arg("--detach").arg("--process").arg(&description).arg("--pid-file").arg(&pid_file);
        if let Some(console) = &console {
            command.arg("--console-socket").arg(console.path());
        }
        let ran = self.call.run(command.arg(&self.call.id), Some(stdio), STARTING);
        let found = ran.and_then(|()| process_in(&pid_file));
        remove_file(&description);
        remove_file(&pid_file);
        let (pid, pidfd) = found?;
        let terminal = match console.map(Console::receive).transpose() {
            Ok(terminal) => terminal,
            Err(failure) => {
                pidfd_send_signal(&pidfd, Signal::KILL).ok();
                return Err(failure);
            }
        };
        Ok(Execed { pid, pidfd, terminal })
    }

    /// Through the runtime, which may keep the container somewhere else than in this process; if it cannot, directly.
    pub(super) fn signal(&self, signal: i32) -> Result<(), Failure> {
        let told =
            self.call.run(self.call.command("kill").arg(&self.call.id).arg(signal.to_string()), None, STEP);
        if told.is_err() { send(&self.pidfd, signal) } else { Ok(()) }
    }

    pub(super) fn pause(&self) -> Result<(), Failure> {
        self.call.run(self.call.command("pause").arg(&self.call.id), None, STEP)
    }

    pub(super) fn resume(&self) -> Result<(), Failure> {
        self.call.run(self.call.command("resume").arg(&self.call.id), None, STEP)
    }

    pub(super) fn update(&self, resources: &LinuxResources) -> Result<(), Failure> {
        let path = self.call.dir.join("resources.json");
        let text = serde_json::to_vec(resources).map_err(|e| invalid("the limits", &e))?;
        fs::write(&path, text).map_err(|e| os(&format!("write {}", path.display()), &e))?;
        let command = &mut self.call.command("update");
        let done = self.call.run(command.arg("--resources").arg(&path).arg(&self.call.id), None, STEP);
        remove_file(&path);
        done
    }

    pub(super) fn delete(&mut self) {
        if let Err(_failure) =
            self.call.run(self.call.command("delete").arg("--force").arg(&self.call.id), None, STEP)
        {
            // Its control group is removed by the monitor, and its state with the monitor's directory.
        }
        self.call.clear();
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if !self.started {
            pidfd_send_signal(&self.pidfd, Signal::KILL).ok();
            self.delete();
            drop(self.cgroup.kill_all());
            drop(self.cgroup.delete());
        }
    }
}

/// How the runtime is called for one container.
struct Call {
    runtime: OtherRuntime,
    id: String,
    /// The monitor's directory.
    dir: PathBuf,
    systemd_cgroup: bool,
}

impl Call {
    fn new(runtime: OtherRuntime, id: &str, place: Place<'_>, systemd_cgroup: bool) -> Result<Self, Failure> {
        let call = Self { runtime, id: id.to_owned(), dir: place.dir.to_owned(), systemd_cgroup };
        make_dir(&call.state())?;
        Ok(call)
    }

    /// Where the runtime keeps what it knows.
    fn state(&self) -> PathBuf {
        self.dir.join("oci")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("oci.log")
    }

    fn place(&self) -> Result<File, Failure> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&self.dir, flags, Mode::empty());
        Ok(File::from(opened.map_err(|e| os(&format!("open {}", self.dir.display()), &e.into()))?))
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.runtime.path);
        command.env_clear().env("PATH", PATH).current_dir("/");
        // The monitor reads its signals from a descriptor; what it starts must get them.
        brigantine_sys::signals::unblock_in(&mut command);
        command.args(&self.runtime.args);
        command.arg("--root").arg(self.state()).arg("--log").arg(self.log()).args(["--log-format", "json"]);
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.arg(verb);
        command
    }

    /// Run one of the runtime's commands to its end.
    fn run(&self, command: &mut Command, stdio: Option<Stdio>, limit: Duration) -> Result<(), Failure> {
        use std::process::Stdio as Std;
        remove_file(&self.log());
        match stdio {
            Some(Stdio::Fds { stdin, stdout, stderr }) => {
                command.stdin(stdin).stdout(stdout).stderr(stderr);
            }
            _ => {
                command.stdin(Std::null()).stdout(Std::null()).stderr(Std::null());
            }
        }
        let name = self.runtime.path.display();
        let child = command.spawn().map_err(|e| os(&format!("execute the runtime {name}"), &e))?;
        let status = wait(child, limit).map_err(|e| os(&format!("wait for the runtime {name}"), &e))?;
        // The command holds what it was given of the container's streams.
        command.stdin(Std::null()).stdout(Std::null()).stderr(Std::null());
        match status {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(self.failure(status)),
            None => Err(Failure::new(
                FailureKind::Os,
                format!("the runtime {name} did not come to an end in {} s and was killed", limit.as_secs()),
            )),
        }
    }

    /// What the runtime says went wrong.
    fn failure(&self, status: ExitStatus) -> Failure {
        let said = said(&self.log()).unwrap_or_else(|| {
            let how = match status.signal() {
                Some(signal) => format!("was ended by signal {signal}"),
                None => format!("failed with status {}", status.code().unwrap_or_default()),
            };
            format!("the runtime {} {how} and gave no reason", self.runtime.path.display())
        });
        Failure::new(kind(&said), said)
    }

    /// The container's first process and its group.
    fn found(&self, pid_file: &Path, spec: &Spec) -> Result<(i32, OwnedFd, Cgroup), Failure> {
        let (pid, pidfd) = process_in(pid_file)?;
        let cgroup = self.group(pid, spec)?;
        Ok((pid, pidfd, cgroup))
    }

    fn group(&self, pid: i32, spec: &Spec) -> Result<Cgroup, Failure> {
        let asked =
            spec.linux().as_ref().and_then(|l| l.cgroups_path().as_ref()).filter(|_| !self.systemd_cgroup);
        let path = match asked {
            Some(path) => path.to_string_lossy().into_owned(),
            None => cgroup_of(pid)?,
        };
        Ok(Cgroup::open(&path)?)
    }

    /// Undo a `create` that failed half-way.
    fn force_delete(&self, spec: &Spec) {
        drop(self.run(self.command("delete").arg("--force").arg(&self.id), None, STEP));
        let path =
            spec.linux().as_ref().and_then(|l| l.cgroups_path().as_ref()).filter(|_| !self.systemd_cgroup);
        if let Some(cgroup) = path.and_then(|path| Cgroup::open(&path.to_string_lossy()).ok()) {
            drop(cgroup.kill_all());
            drop(cgroup.delete());
        }
        self.clear();
    }

    /// Remove what was written for the runtime.
    fn clear(&self) {
        for dir in [self.state(), self.dir.join("bundle")] {
            drop(fs::remove_dir_all(dir));
        }
        remove_file(&self.log());
    }
}

/// Another runtime mounts what is in the specification itself; these need the monitor's own code.
fn check(spec: &Spec) -> Result<(), Failure> {
    let unsupported = |what: &str| {
        Err(Failure::new(
            FailureKind::Unsupported,
            format!("{what} is available with the engine's own runtime only: leave --runtime out"),
        ))
    };
    let linux = spec.linux().as_ref();
    if linux.and_then(|l| l.rootfs_propagation().as_deref()) == Some("shared") {
        return unsupported("a shared mount (bind-propagation=shared or rshared)");
    }
    let users = linux.and_then(|l| l.namespaces().as_ref()).into_iter().flatten();
    if users.into_iter().any(|n| n.typ() == LinuxNamespaceType::User) {
        return unsupported("a user namespace (--userns-remap)");
    }
    Ok(())
}

/// Have the container join the network that was made for it.
fn join_network(spec: &mut Spec, path: String) -> Result<(), Failure> {
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    namespaces.retain(|n| n.typ() != LinuxNamespaceType::Network);
    let network = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network).path(path).build();
    namespaces.push(network.map_err(|e| invalid("the network namespace", &e))?);
    linux.set_namespaces(Some(namespaces));
    Ok(())
}

/// Do something in a mount namespace of one's own, from which nothing comes back into the host's.
fn aside<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let step = |what: &'static str| move |e: rustix::io::Errno| os(what, &e.into());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let host = rustix::fs::open("/proc/self/ns/mnt", flags, Mode::empty())
        .map_err(step("open the host's mount namespace"))?;
    spawn::unshare(ns::MOUNT).map_err(step("make a mount namespace"))?;
    let apart = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    let done = rustix::mount::mount_change("/", apart)
        .map_err(step("keep mounts from the host"))
        .and_then(|()| work());
    let back = rustix::thread::move_into_link_name_space(
        host.as_fd(),
        Some(rustix::thread::LinkNameSpaceType::Mount),
    );
    back.map_err(step("return to the host's mount namespace"))?;
    done
}

/// Wait for a process; `None` if it had to be killed.
fn wait(mut child: Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    if !ready(&pidfd, limit)? {
        child.kill()?;
        child.wait()?;
        return Ok(None);
    }
    child.wait().map(Some)
}

/// Wait until something can be read; whether it can.
fn ready(fd: &impl AsFd, limit: Duration) -> io::Result<bool> {
    let mut polled = [PollFd::new(fd, PollFlags::IN)];
    let limit = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: limit.subsec_nanos().into() };
    Ok(rustix::io::retry_on_intr(|| poll(&mut polled, Some(&limit)))? > 0)
}

/// A process whose number a runtime has written; it is the monitor's child, so its number is not used again.
fn process_in(pid_file: &Path) -> Result<(i32, OwnedFd), Failure> {
    let read = || -> io::Result<(i32, OwnedFd)> {
        let text = fs::read_to_string(pid_file)?;
        let pid: i32 = text.trim().parse().map_err(io::Error::other)?;
        let number = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?;
        Ok((pid, pidfd_open(number, PidfdFlags::empty())?))
    };
    read().map_err(|e| os(&format!("find the process named in {}", pid_file.display()), &e))
}

/// The path of a process's control group: that of a hierarchy with controllers, if there is one.
fn cgroup_of(pid: i32) -> Result<String, Failure> {
    let path = format!("/proc/{pid}/cgroup");
    let text = fs::read_to_string(&path).map_err(|e| os(&format!("read {path}"), &e))?;
    let line = |controller: &str| {
        text.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (names, path) = rest.split_once(':')?;
            (names.split(',').any(|name| name == controller)).then_some(path)
        })
    };
    let found = ["memory", "pids", "name=systemd", ""].into_iter().find_map(line);
    found
        .map(str::to_owned)
        .ok_or_else(|| Failure::new(FailureKind::Os, format!("{path} names no control group")))
}

/// A socket at which the runtime hands over a terminal's master.
struct Console<'a> {
    listener: UnixListener,
    dir: BorrowedFd<'a>,
    path: PathBuf,
}

/// Its name in the monitor's directory.
const CONSOLE: &str = "console.sock";

impl<'a> Console<'a> {
    fn for_stdio(stdio: &Stdio, place: Place<'a>) -> Result<Option<Self>, Failure> {
        if !matches!(stdio, Stdio::Terminal) {
            return Ok(None);
        }
        let path = place.dir.join(CONSOLE);
        remove_file(&path);
        let dir = place.fd.as_fd();
        let listener = UnixListener::bind(format!("/proc/self/fd/{}/{CONSOLE}", dir.as_raw_fd()))
            .map_err(|e| os(&format!("listen at {}", path.display()), &e))?;
        Ok(Some(Self { listener, dir, path }))
    }

    /// As another process reaches it, however long the directory's path is.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}/{CONSOLE}", own_pid(), self.dir.as_raw_fd())
    }

    /// The master: the runtime has sent it by now.
    fn receive(self) -> Result<OwnedFd, Failure> {
        let take = || -> io::Result<OwnedFd> {
            if !ready(&self.listener, STEP)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let (socket, _) = self.listener.accept()?;
            if !ready(&socket, STEP)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
            descriptor(&socket)
        };
        take().map_err(|e| os("take over the terminal from the runtime", &e))
    }
}

impl Drop for Console<'_> {
    fn drop(&mut self) {
        remove_file(&self.path);
    }
}

fn descriptor(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 4096];
    rustix::io::retry_on_intr(|| {
        let mut name = [io::IoSliceMut::new(&mut name)];
        rustix::net::recvmsg(socket, &mut name, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let received = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    received.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The last error in a runtime's log (lines of JSON with `level` and `msg`), without what callers put before it anyway.
fn said(log: &Path) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    io::Seek::seek(&mut file, io::SeekFrom::Start(length.saturating_sub(MAX_LOG))).ok()?;
    let mut bytes = Vec::new();
    file.take(MAX_LOG).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let message = |line: &str| -> Option<String> {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        let level = line.get("level")?.as_str()?;
        let message = line.get("msg")?.as_str()?.trim();
        (matches!(level, "error" | "fatal" | "panic") && !message.is_empty()).then(|| message.to_owned())
    };
    let message = text.lines().rev().find_map(message)?;
    let mut plain = message.as_str();
    for prefix in [
        "runc create failed: ",
        "runc start failed: ",
        "exec failed: ",
        "unable to start container process: ",
    ] {
        plain = plain.strip_prefix(prefix).unwrap_or(plain);
    }
    // As runc, docker and whoever matches on their words write them.
    let plain = plain
        .replace("No such file or directory", "no such file or directory")
        .replace("Permission denied", "permission denied");
    Some(plain.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
}

/// What docker makes of a runtime's words: whether the program was missing or could not be executed.
fn kind(said: &str) -> FailureKind {
    let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
    let of_program = said.starts_with("exec");
    if of_program && has(&["executable file not found", "no such file or directory"]) {
        FailureKind::NotFound
    } else if of_program && has(&["permission denied", "is a directory"]) {
        FailureKind::PermissionDenied
    } else if has(&["exec format error", "Exec format error"]) {
        FailureKind::NotExecutable
    } else {
        FailureKind::Os
    }
}

fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

fn make_dir(path: &Path) -> Result<(), Failure> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(os(&format!("create {}", path.display()), &e))
        }
        _ => Ok(()),
    }
}

fn os(what: &str, error: &io::Error) -> Failure {
    Failure::new(FailureKind::Os, format!("{what}: {error}"))
}

fn invalid(what: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(FailureKind::Invalid, format!("describe {what} to the runtime: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtimes_last_error_is_told_and_sorted() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        fs::write(
            &log,
            concat!(
                r#"{"level":"error","msg":"first","time":"t"}"#,
                "\n",
                r#"{"level":"error","msg":"runc create failed: unable to start container process: exec: \"nope\": executable file not found in $PATH","time":"t"}"#,
                "\nnot json\n",
                r#"{"level":"info","msg":"later"}"#,
            ),
        )
        .unwrap();
        let said = said(&log).unwrap();
        assert_eq!(said, "exec: \"nope\": executable file not found in $PATH");
        assert_eq!(kind(&said), FailureKind::NotFound);
        assert_eq!(
            kind("executable file `nope` not found in $PATH: no such file or directory"),
            FailureKind::NotFound
        );
        assert_eq!(kind("exec: \"/etc\": permission denied"), FailureKind::PermissionDenied);
        assert_eq!(kind("open `/x`: no such file or directory"), FailureKind::Os);
        assert_eq!(kind("mount: permission denied"), FailureKind::Os);
    }

    #[test]
    fn a_runtime_that_hangs_is_killed() {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(wait(child, Duration::from_millis(50)).unwrap(), None);
        let child = Command::new("true").spawn().unwrap();
        assert!(wait(child, Duration::from_secs(20)).unwrap().is_some_and(|s| s.success()));
    }
}
