//! What is done to all processes of a group: stopped, told, ended, counted.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Cgroup, PATIENCE, children, read, write};
use crate::error::{Error, Kind};

impl Cgroup {
    /// Stops every process in the group; returns when all have stopped.
    pub fn freeze(&self) -> Result<(), Error> {
        self.set_frozen(true)
    }

    pub fn thaw(&self) -> Result<(), Error> {
        self.set_frozen(false)
    }

    fn set_frozen(&self, frozen: bool) -> Result<(), Error> {
        let (file, text) = match (self.v1_dir("freezer"), self.v2_dir()) {
            (Some(dir), _) => (dir.join("freezer.state"), if frozen { "FROZEN" } else { "THAWED" }),
            (None, Some(dir)) => (dir.join("cgroup.freeze"), if frozen { "1" } else { "0" }),
            (None, None) => return Err(Error::unsupported("no freezer cgroup is mounted")),
        };
        write(&file, text)?;
        let deadline = Instant::now() + PATIENCE;
        let mut pause = Duration::from_micros(50);
        while self.is_frozen()? != frozen {
            if Instant::now() > deadline {
                if frozen {
                    // Half frozen is worse than running: let go again, then report.
                    drop(self.thaw());
                }
                return Err(Error::new(
                    Kind::Os,
                    format!("cgroup {:?} does not change to {text}", self.path),
                ));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
            if frozen && self.v1_dir("freezer").is_some() {
                // A fork racing with the freezer can leave v1 in FREEZING until asked again.
                write(&file, text)?;
            }
        }
        Ok(())
    }

    pub fn is_frozen(&self) -> Result<bool, Error> {
        if let Some(dir) = self.v1_dir("freezer") {
            return Ok(read(&dir.join("freezer.state"))?.trim() == "FROZEN");
        }
        let Some(dir) = self.v2_dir() else { return Ok(false) };
        Ok(read(&dir.join("cgroup.events"))?.lines().any(|line| line == "frozen 1"))
    }

    /// SIGKILL to every process in the group and below it; returns when none is left.
    pub fn kill_all(&self) -> Result<(), Error> {
        if let Some(dir) = self.v2_dir().filter(|_| self.is_unified()) {
            match fs::write(dir.join("cgroup.kill"), "1") {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::os(format!("killing cgroup {:?}", self.path), e)),
                Ok(()) => return self.wait_empty(),
            }
        }
        // Without cgroup.kill: whoever forks between two readings is met in the next one.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let procs = self.procs()?;
            if procs.is_empty() {
                return Ok(());
            }
            for pid in procs {
                signal(pid, libc::SIGKILL)?;
            }
            // A frozen process dies only once it is let go (v1).
            if self.v1_dir("freezer").is_some() && self.state_is("FROZEN") {
                self.thaw()?;
            }
            if Instant::now() > deadline {
                return Err(Error::new(Kind::Os, format!("processes in cgroup {:?} do not die", self.path)));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    fn state_is(&self, state: &str) -> bool {
        self.v1_dir("freezer")
            .and_then(|dir| fs::read_to_string(dir.join("freezer.state")).ok())
            .is_some_and(|text| text.trim() == state)
    }

    fn wait_empty(&self) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        while !self.procs()?.is_empty() {
            if Instant::now() > deadline {
                return Err(Error::new(Kind::Os, format!("processes in cgroup {:?} do not die", self.path)));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// `signal` to every process in the group and below it.
    pub fn signal_all(&self, number: i32) -> Result<(), Error> {
        for pid in self.procs()? {
            signal(pid, number)?;
        }
        Ok(())
    }

    /// The processes in the group and below it, in the caller's PID namespace.
    pub fn procs(&self) -> Result<Vec<i32>, Error> {
        let dir = self
            .v1_dir("pids")
            .or_else(|| self.v1_dir("freezer"))
            .or_else(|| self.v2_dir())
            .or_else(|| self.directory());
        let mut pids = Vec::new();
        if let Some(dir) = dir {
            collect_procs(dir, &mut pids)?;
        }
        pids.retain(|&pid| pid != 0);
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }
}

fn collect_procs(dir: &Path, into: &mut Vec<i32>) -> Result<(), Error> {
    match fs::read_to_string(dir.join("cgroup.procs")) {
        Ok(text) => into.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV) => {
            return Ok(());
        }
        // A threaded group lists no processes of its own.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(e) => return Err(Error::os(format!("reading {}/cgroup.procs", dir.display()), e)),
    }
    for child in children(dir) {
        collect_procs(&child, into)?;
    }
    Ok(())
}

fn signal(pid: i32, number: i32) -> Result<(), Error> {
    let Some(target) = rustix::process::Pid::from_raw(pid) else { return Ok(()) };
    let failed = |e: io::Error| Error::os(format!("sending signal {number} to process {pid}"), e);
    let pidfd = match rustix::process::pidfd_open(target, rustix::process::PidfdFlags::empty()) {
        // Threads that are not processes, and processes that are gone, are nobody to signal.
        Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(()),
        other => other.map_err(|e| failed(e.into()))?,
    };
    match brigantine_sys::signals::send(pidfd.as_fd(), number) {
        Err(e) if e.raw_os_error() != Some(libc::ESRCH) => Err(failed(e)),
        _ => Ok(()),
    }
}
