//! The per-container monitor and its protocol.
//!
//! One small process per container holds its standard streams, writes its log, reaps it and records how it ended,
//! so that nothing a container needs lives in the daemon. This crate holds both ends: [`spawn`] and [`Client`] for
//! whoever starts and talks to monitors (blocking calls over Unix sockets; wrap the streams as you like), and
//! [`monitor`], the process itself, which `brig-runtime shim` runs.
//!
//! Invariants: a failed [`spawn`] leaves no process, control group, socket or directory behind; an exit is on record
//! before anybody is told of it, and on disk before the monitor goes; a log is complete before the exit is told.

mod client;
mod config;
pub mod frame;
pub mod log;
pub mod monitor;
mod protocol;
mod record;
mod recover;
mod spawn;
mod time;
pub mod tls;

pub use brigantine_runtime::cgroup::Stats;
pub use brigantine_runtime::spec;
pub use brigantine_runtime::{OverlayOptions, Rootfs};
pub use client::{Client, ClientError, EventReader, Execed};
pub use config::{
    AttachOptions, AttachStream, CollectedLog, Config, ConsoleSize, Endpoint, ExecConfig, FluentdConfig,
    GelfCompression, GelfConfig, Inherited, JournaldConfig, JsonFileLog, LogConfig, OtherRuntime, Retry,
    SinkConfig, SinkKind, SyslogConfig, SyslogFormat, TlsEndpoint,
};
pub use protocol::{Event, ExecState, Failure, FailureKind, PROTOCOL_VERSION, State, Status};
pub use record::{ExecRecord, ExitRecord, MonitorRecord, RecordError};
pub use recover::{Found, RecoverError, clear, exec_record, find};
pub use spawn::{SpawnError, Spawned, spawn};
pub use time::Timestamp;
