//! The container as its monitor handles it, whoever made it: this program's own runtime code, or another OCI runtime.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use brigantine_runtime::{Cgroup, Common, Created, ExecRequest, Execed, Listener, Stdio, seccomp};
use oci_spec::runtime::{LinuxResources, Process};

use super::foreign::Foreign;
use crate::protocol::{Failure, FailureKind};

/// A container whose first process is there.
pub(super) enum Container {
    Own(Box<Own>),
    Other(Box<Foreign>),
}

/// One of the own runtime's.
pub(super) struct Own {
    pub(super) created: Created,
    pub(super) lasting: Lasting,
}

/// What holds for every process of the container.
pub(super) struct Lasting {
    pub(super) filter: Option<seccomp::Program>,
    pub(super) notified: Option<Listener>,
    pub(super) common: Common,
}

/// A further process to be started.
pub(super) struct Further<'a> {
    pub(super) id: &'a str,
    pub(super) process: Process,
    pub(super) stdio: Stdio,
}

impl Container {
    pub(super) fn pid(&self) -> i32 {
        match self {
            Self::Own(own) => own.created.pid(),
            Self::Other(other) => other.pid(),
        }
    }

    pub(super) fn cgroup(&self) -> &Cgroup {
        match self {
            Self::Own(own) => own.created.cgroup(),
            Self::Other(other) => other.cgroup(),
        }
    }

    /// The terminal's master, once.
    pub(super) fn take_terminal(&mut self) -> Option<OwnedFd> {
        match self {
            Self::Own(own) => own.created.take_terminal(),
            Self::Other(other) => other.take_terminal(),
        }
    }

    /// Have the program executed.
    pub(super) fn start(&mut self) -> Result<(), Failure> {
        match self {
            Self::Own(own) => Ok(own.created.start()?),
            Self::Other(other) => other.start(),
        }
    }

    /// Start a further process; it becomes the monitor's child.
    pub(super) fn exec(&self, further: Further<'_>) -> Result<Execed, Failure> {
        match self {
            Self::Own(own) => Ok(brigantine_runtime::exec(ExecRequest {
                process: further.process,
                stdio: further.stdio,
                pid: own.created.pid(),
                cgroup: Some(own.created.cgroup().clone()),
                // The monitor's executable is out of reach itself.
                executable: None,
                seccomp: own.lasting.filter.clone(),
                listener: own.lasting.notified.clone(),
                common: own.lasting.common.clone(),
                die_with_parent: true,
                preserve_fds: 0,
            })?),
            Self::Other(other) => other.exec(further),
        }
    }

    /// Send the first process a signal.
    pub(super) fn signal(&self, signal: i32) -> Result<(), Failure> {
        match self {
            Self::Own(own) => send(own.created.pidfd(), signal),
            Self::Other(other) => other.signal(signal),
        }
    }

    pub(super) fn pause(&self) -> Result<(), Failure> {
        match self {
            Self::Own(own) => Ok(own.created.cgroup().freeze()?),
            Self::Other(other) => other.pause(),
        }
    }

    pub(super) fn resume(&self) -> Result<(), Failure> {
        match self {
            Self::Own(own) => Ok(own.created.cgroup().thaw()?),
            Self::Other(other) => other.resume(),
        }
    }

    /// Change the limits; `cgroup` is the monitor's own handle on the group.
    pub(super) fn update(&self, cgroup: &mut Cgroup, resources: &LinuxResources) -> Result<(), Failure> {
        match self {
            Self::Own(_) => {
                cgroup.extend(resources)?;
                Ok(cgroup.update(resources)?)
            }
            Self::Other(other) => other.update(resources),
        }
    }

    /// The first process has ended: forget the container. What cannot be forgotten goes with the monitor's directory.
    pub(super) fn delete(&mut self) {
        if let Self::Other(other) = self {
            other.delete();
        }
    }
}

/// Send a process a signal.
pub(super) fn send(pidfd: impl AsFd, signal: i32) -> Result<(), Failure> {
    let pidfd: BorrowedFd<'_> = pidfd.as_fd();
    brigantine_sys::signals::send(pidfd, signal).map_err(|e| {
        let kind =
            if e.kind() == std::io::ErrorKind::InvalidInput { FailureKind::Invalid } else { FailureKind::Os };
        Failure::new(kind, format!("signal the container: {e}"))
    })
}
