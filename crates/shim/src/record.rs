//! What a monitor leaves on disk: how the container ended (durable, in the data root), who the monitor is and how execs
//! ended (in the monitor's directory). Records become visible whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use brigantine_runtime::Cgroup;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::time::Timestamp;

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The program's exit status, or 128 plus the signal that killed it.
    pub exit_code: i32,
    /// The signal that killed it.
    #[serde(default)]
    pub signal: Option<i32>,
    /// Whether the kernel killed a process of the container for lack of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// The process that ended, as the host counted; tells this run from an earlier one.
    #[serde(default)]
    pub container_pid: i32,
    /// When the program was executed.
    pub started_at: Timestamp,
    /// When its end was seen.
    pub finished_at: Timestamp,
    /// Set when the monitor itself was lost and the end had to be brought about by [`crate::find`].
    #[serde(default)]
    pub monitor_lost: bool,
}

/// How an exec ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRecord {
    /// The exec's id.
    pub id: String,
    /// The program's exit status, or 128 plus the signal that killed it.
    pub exit_code: i32,
    /// The signal that killed it.
    #[serde(default)]
    pub signal: Option<i32>,
    /// Its process, as the host counted.
    pub pid: i32,
    /// When the program was executed.
    pub started_at: Timestamp,
    /// When its end was seen.
    pub finished_at: Timestamp,
}

/// Who watches a container: `shim.json` in the monitor's directory, written before the program is executed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MonitorRecord {
    /// The protocol it speaks.
    pub protocol: u32,
    /// The container's id.
    pub id: String,
    /// The monitor's process.
    pub shim_pid: i32,
    /// The container's first process.
    pub container_pid: i32,
    /// Start time of the container's process in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub container_start_ticks: u64,
    /// When the container's process was made.
    pub created_at: Timestamp,
    /// Its control group, for whoever has to clean up after a lost monitor.
    #[serde(default)]
    pub cgroup: Option<Cgroup>,
}

/// A record could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{action} {}", path.display())]
pub struct RecordError {
    /// What was tried.
    pub action: &'static str,
    /// On which file.
    pub path: PathBuf,
    #[source]
    source: io::Error,
}

impl ExitRecord {
    /// The record at `path`; `None` if there is none.
    pub fn read(path: &Path) -> Result<Option<Self>, RecordError> {
        read(path)
    }
}

impl MonitorRecord {
    /// The record in a monitor's directory; `None` if there is none.
    pub fn read(dir: &Path) -> Result<Option<Self>, RecordError> {
        read(&dir.join(MONITOR))
    }
}

/// Name of the monitor's record in its directory.
pub(crate) const MONITOR: &str = "shim.json";
/// Name of the monitor's socket in its directory.
pub(crate) const SOCKET: &str = "shim.sock";

/// Where the record of an ended exec is.
pub(crate) fn exec_path(dir: &Path, id: &str) -> PathBuf {
    dir.join(format!("exec-{id}.json"))
}

/// The JSON record at `path`; `None` if there is none.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, RecordError> {
    let fail = |source| RecordError { action: "read", path: path.to_owned(), source };
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| fail(e.into())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(fail(e)),
    }
}

/// Whether a record must survive a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// File and directory are synced.
    Synced,
    /// Readable by everyone at once, whole or not at all; lost with the power.
    Visible,
}

/// Put a JSON record at `path`, replacing what is there.
pub(crate) fn write(path: &Path, record: &impl Serialize, durability: Durability) -> Result<(), RecordError> {
    let fail = |source| RecordError { action: "write", path: path.to_owned(), source };
    put(path, record, durability).map_err(fail)
}

fn put(path: &Path, record: &impl Serialize, durability: Durability) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    if durability == Durability::Synced {
        file.sync_all()?;
    }
    fs::rename(&temporary, path)?;
    match (durability, path.parent()) {
        (Durability::Synced, Some(parent)) => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

/// Make a record that is in its place survive a power cut.
pub(crate) fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()?;
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}
