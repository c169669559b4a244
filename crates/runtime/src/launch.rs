//! What a caller hands in to get a container or a process in one, and what it gets back.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::error::Error;
use crate::seccomp;
use crate::spec::{LinuxNamespaceType, Process, Spec};

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
        }
    }
}

/// A container whose process 1 is set up and waits right before its exec. Dropping it without a
/// successful [`Created::start`] kills the process and removes its cgroup.
#[derive(Debug)]
pub struct Created {
    pid: i32,
    pidfd: OwnedFd,
    terminal: Option<OwnedFd>,
    cgroup: Cgroup,
}

impl Created {
    /// In the caller's PID namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.pidfd.as_fd()
    }
    /// The terminal's master, once, if [`Stdio::Terminal`] was asked for.
    pub fn take_terminal(&mut self) -> Option<OwnedFd> {
        self.terminal.take()
    }
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }
    /// Lets the process exec; returns once that has succeeded, or with its error.
    pub fn start(&mut self) -> Result<(), Error> {
        Err(Error::unsupported("starting a container is not built yet"))
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
pub fn create(launch: Launch) -> Result<Created, Error> {
    drop(launch);
    Err(Error::unsupported("creating a container is not built yet"))
}

/// Runs a process in a running container; returns once its exec has succeeded.
pub fn exec(request: ExecRequest) -> Result<Execed, Error> {
    drop(request);
    Err(Error::unsupported("executing in a container is not built yet"))
}
