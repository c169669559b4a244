//! Processor time of a set of processes, by a cgroup of their own: others on the machine do not count.
//!
//! Invariant: a metered process is in the group from its first instruction on, and so is all that it starts. The group
//! is removed with its sandbox.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use brigantine_testkit::Sandbox;

/// A group that counts, in either version of cgroups.
pub struct Meter {
    dir: PathBuf,
}

impl Meter {
    pub fn new(sandbox: &Sandbox) -> Result<Self> {
        let v1 = Path::new("/sys/fs/cgroup/cpuacct");
        let root = if v1.exists() { v1 } else { Path::new("/sys/fs/cgroup") };
        // The sandbox removes what begins with its name.
        let dir = root.join(format!("{}-meter", sandbox.cgroup()));
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// The same command, in the group. Where its output goes is to be said afterwards.
    pub fn metered(&self, command: Command) -> Command {
        let mut metered = Command::new("sh");
        metered.args(["-c", r#"echo $$ >"$0" && exec "$@""#]).arg(self.dir.join("cgroup.procs"));
        super::follow(&mut metered, &command);
        metered
    }

    /// What was used so far.
    pub fn cpu(&self) -> Result<Duration> {
        let v1 = self.dir.join("cpuacct.usage");
        if v1.exists() {
            return Ok(Duration::from_nanos(fs::read_to_string(v1)?.trim().parse()?));
        }
        let stat = fs::read_to_string(self.dir.join("cpu.stat"))?;
        let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec "));
        Ok(Duration::from_micros(used.context("cpu.stat has no usage_usec")?.parse()?))
    }
}
