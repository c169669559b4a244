//! Control groups: one handle over v1, v2 and the hybrid of both.

mod stats;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::spec::LinuxResources;

pub use stats::{
    BlkioEntry, BlkioStats, CpuStats, HugetlbStats, MemoryStats, PidsStats, PressureStats, Stats,
};

/// A container's control group: one directory per v1 hierarchy, or one for all on v2.
/// Serialisable: whoever reads it back has the same handle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Absolute within the hierarchies, e.g. `/brigantine/<id>`.
    path: String,
    /// v1 controller name → the group's directory.
    v1: Vec<(String, PathBuf)>,
    /// The group's directory in the unified hierarchy.
    v2: Option<PathBuf>,
}

impl Cgroup {
    /// The group's path within its hierarchies.
    pub fn path(&self) -> &str {
        &self.path
    }
    /// Opens the existing group at `path` (absolute in each hierarchy).
    pub fn open(path: &str) -> Result<Self, Error> {
        Err(Error::unsupported(format!("opening cgroup {path:?} is not built yet")))
    }
    /// Creates the group at `path` and writes the limits.
    pub fn create(path: &str, resources: Option<&LinuxResources>) -> Result<Self, Error> {
        let _ = resources;
        Err(Error::unsupported(format!("creating cgroup {path:?} is not built yet")))
    }
    /// Moves a process into the group.
    pub fn add(&self, pid: i32) -> Result<(), Error> {
        Err(Error::unsupported(format!("adding {pid} is not built yet")))
    }
    pub fn stats(&self) -> Result<Stats, Error> {
        Err(Error::unsupported("statistics are not built yet"))
    }
    /// Changes limits; what is `None` stays.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        let _ = resources;
        Err(Error::unsupported("updating is not built yet"))
    }
    /// Stops every process in the group; returns when all have stopped.
    pub fn freeze(&self) -> Result<(), Error> {
        Err(Error::unsupported("freezing is not built yet"))
    }
    pub fn thaw(&self) -> Result<(), Error> {
        Err(Error::unsupported("thawing is not built yet"))
    }
    pub fn is_frozen(&self) -> Result<bool, Error> {
        Err(Error::unsupported("freezing is not built yet"))
    }
    /// SIGKILL to every process in the group and below it.
    pub fn kill_all(&self) -> Result<(), Error> {
        Err(Error::unsupported("killing is not built yet"))
    }
    /// `signal` to every process in the group and below it.
    pub fn signal_all(&self, signal: i32) -> Result<(), Error> {
        Err(Error::unsupported(format!("signal {signal} is not built yet")))
    }
    /// The processes in the group and below it.
    pub fn procs(&self) -> Result<Vec<i32>, Error> {
        Err(Error::unsupported("listing is not built yet"))
    }
    /// A watch on out-of-memory kills in the group; `None` where no memory controller is.
    pub fn oom_events(&self) -> Result<Option<OomWatch>, Error> {
        Ok(None)
    }
    /// How many processes of the group the kernel has killed for lack of memory.
    pub fn oom_kills(&self) -> Result<u64, Error> {
        Ok(0)
    }
    /// Removes the group and everything below it; a group that is gone is no error.
    pub fn delete(&self) -> Result<(), Error> {
        Ok(())
    }
    /// One directory that stands for the group (for display and for tests).
    pub fn directory(&self) -> Option<&Path> {
        self.v2.as_deref().or_else(|| self.v1.first().map(|(_, dir)| dir.as_path()))
    }
}

/// Becomes readable (poll: `POLLIN`, on v2 `POLLPRI`) when the kernel may have killed a process of the group.
#[derive(Debug)]
pub struct OomWatch {
    fd: OwnedFd,
}

impl std::os::fd::AsFd for OomWatch {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
