//! The control protocol: length-prefixed JSON messages on `shim.sock`, and the types in them.
//!
//! A message is a 32-bit big-endian length and that many bytes of JSON. Each request gets one reply. After the reply
//! to `attach`, `exec` and `events` the connection is that stream and nothing else. Unknown fields are ignored and
//! missing ones have defaults: a daemon and a monitor of neighbouring versions understand each other.

use std::io::{self, Read, Write};

use brigantine_runtime::cgroup::Stats;
use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};

use crate::config::{AttachOptions, ConsoleSize, ExecConfig};
use crate::record::{ExecRecord, ExitRecord};
use crate::time::Timestamp;

/// The version of this protocol; told in [`State`] and in the monitor's record.
pub const PROTOCOL_VERSION: u32 = 1;

/// The largest request a monitor accepts (an exec's environment and arguments can be large).
pub(crate) const MAX_REQUEST: usize = 4 << 20;

/// The largest reply a client accepts.
pub(crate) const MAX_REPLY: usize = 16 << 20;

/// What a client asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    State,
    Kill { signal: i32, all: bool },
    Resize { size: ConsoleSize },
    Pause,
    Resume,
    Stats,
    Update { resources: Box<LinuxResources> },
    Pids,
    Attach { options: AttachOptions },
    Detach { key: String },
    CloseStdin,
    Exec { config: Box<ExecConfig> },
    ExecState { id: String },
    ExecKill { id: String, signal: i32 },
    ExecResize { id: String, size: ConsoleSize },
    ExecForget { id: String },
    Events,
    Release,
}

/// What the monitor answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    Done,
    State(Box<State>),
    Pids(Vec<i32>),
    Stats(Box<Stats>),
    Started { pid: i32 },
    ExecState(ExecState),
    Failed(Failure),
}

/// The last message of the monitor on its bootstrap socket.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Birth {
    Started { shim_pid: i32, container_pid: i32, started_at: Timestamp },
    Failed(Failure),
}

/// What a monitor tells its subscribers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The container ended; its log is complete and its record written. Also the first message of a subscription
    /// made after the end.
    Exited(ExitRecord),
    /// An exec ended; its streams have been drained.
    ExecExited(ExecRecord),
    /// The kernel killed a process of the container because the memory limit was reached.
    Oom,
}

/// Where a container's process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The process exists, the program has not been executed yet.
    Created,
    /// The program runs.
    Running,
    /// All processes are frozen.
    Paused,
    /// The process has ended.
    Stopped,
}

/// A container as its monitor sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// [`PROTOCOL_VERSION`] of the monitor.
    pub protocol: u32,
    /// Where the process is.
    pub status: Status,
    /// The monitor's process id.
    pub shim_pid: i32,
    /// The container's first process, as the host counts.
    pub container_pid: i32,
    /// When the program was executed.
    pub started_at: Timestamp,
    /// How it ended, when it has.
    #[serde(default)]
    pub exit: Option<ExitRecord>,
    /// Execs that run, and the last few that ended.
    #[serde(default)]
    pub execs: Vec<ExecState>,
    /// Whether the kernel has killed a process of the container for lack of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// Bytes of output that could not be recorded (a full disk), and why.
    #[serde(default)]
    pub log_lost: u64,
    /// The last failure to write the log.
    #[serde(default)]
    pub log_error: Option<String>,
}

/// An exec as its monitor sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecState {
    /// The exec's id.
    pub id: String,
    /// Its process, as the host counts.
    pub pid: i32,
    /// Its process, as the container counts (0 when unknown).
    #[serde(default)]
    pub pid_in_container: i32,
    /// How it ended, when it has.
    #[serde(default)]
    pub exit: Option<ExecRecord>,
}

/// A refusal or failure told by a monitor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What a caller may want to tell apart.
    pub kind: FailureKind,
    /// One line: the step, the object, the cause.
    pub message: String,
}

impl Failure {
    pub(crate) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The exit status docker gives to a container whose process could not be started: 127 for a missing program,
    /// 126 for one that cannot be executed, 128 otherwise.
    pub fn exit_code(&self) -> i32 {
        match self.kind {
            FailureKind::NotFound => 127,
            FailureKind::PermissionDenied | FailureKind::NotExecutable => 126,
            _ => 128,
        }
    }
}

impl From<brigantine_runtime::Error> for Failure {
    fn from(error: brigantine_runtime::Error) -> Self {
        use brigantine_runtime::Kind;
        let kind = match error.kind() {
            Kind::NotFound => FailureKind::NotFound,
            Kind::PermissionDenied => FailureKind::PermissionDenied,
            Kind::NotExecutable => FailureKind::NotExecutable,
            Kind::Unsupported => FailureKind::Unsupported,
            Kind::Invalid => FailureKind::Invalid,
            Kind::State => FailureKind::Conflict,
            Kind::Os => FailureKind::Os,
        };
        Self::new(kind, error.to_string())
    }
}

/// What kind of failure it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The program to run does not exist.
    NotFound,
    /// The program to run may not be executed.
    PermissionDenied,
    /// The program to run is not one (wrong format or architecture, a directory).
    NotExecutable,
    /// The kernel or this build lacks something that was asked for.
    Unsupported,
    /// The request or specification is wrong.
    Invalid,
    /// The container (or exec) does not run.
    NotRunning,
    /// There is no exec of that id.
    NoSuchExec,
    /// The request contradicts the present state.
    Conflict,
    /// A system call failed.
    #[serde(other)]
    Os,
}

/// Write one message.
pub(crate) fn write_message(mut to: impl Write, message: &impl Serialize) -> io::Result<()> {
    to.write_all(&encode(message)?)
}

/// One message as bytes.
pub(crate) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = u32::try_from(bytes.len() - 4).map_err(io::Error::other)?;
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    Ok(bytes)
}

/// Read the bytes of one message of at most `limit` bytes; `None` at a clean end of stream.
pub(crate) fn read_message(mut from: impl Read, limit: usize) -> io::Result<Option<Vec<u8>>> {
    let mut header = [0; 4];
    let mut have = 0;
    while have < header.len() {
        match from.read(&mut header[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let length = u32::from_be_bytes(header) as usize;
    if length > limit {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("message of {length} bytes (limit {limit})"),
        ));
    }
    let mut body = Vec::with_capacity(length);
    if from.take(length as u64).read_to_end(&mut body)? < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(body))
}

impl Event {
    /// The event in the body of one message (see [`crate::EventReader`] for how messages are delimited).
    pub fn decode(body: &[u8]) -> io::Result<Self> {
        Ok(serde_json::from_slice(body)?)
    }
}
