//! What a monitor is told at birth: the [`Config`] (data, sent through the bootstrap socket) and the
//! [`Inherited`] file descriptors beside it. Every field a newer daemon may not know, or an older one may not send,
//! has a default, so that monitors and daemons of neighbouring versions understand each other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use brigantine_runtime::Rootfs;
use oci_spec::runtime::{Process, Spec};
use serde::{Deserialize, Serialize};

use crate::tls::Trust;

/// How one container is to be run and watched.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Config {
    /// The container's full id; also the last part of its directory and of its control group.
    pub id: String,
    /// The OCI runtime specification of the container. `process.terminal` is set from [`Config::terminal`].
    pub spec: Spec,
    /// The root file system, mounted inside the container's own mount namespace.
    pub rootfs: Rootfs,
    /// Whether the process gets a pseudo-terminal as its standard streams.
    #[serde(default)]
    pub terminal: bool,
    /// The terminal's first size.
    #[serde(default)]
    pub console_size: Option<ConsoleSize>,
    /// Whether standard input is a pipe kept open (docker's `OpenStdin`); else it is `/dev/null`.
    #[serde(default)]
    pub open_stdin: bool,
    /// Whether standard input is closed for good when the first attached client that feeds it half-closes or
    /// vanishes (docker's `StdinOnce`).
    #[serde(default)]
    pub stdin_once: bool,
    /// Where the container's output is recorded.
    #[serde(default)]
    pub log: LogConfig,
    /// Where the durable [`crate::ExitRecord`] goes (its directory must exist).
    pub exit_path: PathBuf,
    /// The monitor's own directory, mode 0700: its socket, its [`crate::MonitorRecord`], records of ended execs.
    /// Made by the monitor if missing; its parent must exist.
    pub dir: PathBuf,
    /// Whether control groups are made through systemd.
    #[serde(default)]
    pub systemd_cgroup: bool,
    /// Whether the exit record must survive a power cut (file and directory are synced before the monitor goes).
    /// False for containers that are removed when they end: their record is written, but not synced.
    #[serde(default = "yes")]
    pub durable_exit: bool,
    /// The OCI runtime that makes the container and its execs; this program's own when not given.
    #[serde(default)]
    pub runtime: Option<OtherRuntime>,
}

/// Another OCI runtime: a program with runc's command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherRuntime {
    /// The program.
    pub path: PathBuf,
    /// Arguments that come before all others.
    #[serde(default)]
    pub args: Vec<String>,
}

fn yes() -> bool {
    true
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleSize {
    /// Rows.
    pub height: u16,
    /// Columns.
    pub width: u16,
}

impl ConsoleSize {
    /// The same in the OCI spec's words (`process.consoleSize`). Always there: nothing of it can be missing.
    pub(crate) fn to_spec(self) -> Option<oci_spec::runtime::Box> {
        oci_spec::runtime::BoxBuilder::default().height(self.height).width(self.width).build().ok()
    }
}

/// Where output is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogConfig {
    /// Nowhere.
    #[default]
    None,
    /// In a file of docker's `json-file` format, rotated by size.
    JsonFile(JsonFileLog),
    /// At a collector, and in a file from which it can be read.
    Collected(Box<CollectedLog>),
}

/// A log that goes to a collector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectedLog {
    /// The file; without one the log cannot be read here.
    #[serde(default)]
    pub file: Option<JsonFileLog>,
    /// The collector.
    pub sink: SinkConfig,
}

/// Where a log goes beside its file, and what happens when that is slow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SinkConfig {
    /// Which collector.
    pub kind: SinkKind,
    /// Bytes that may wait for it.
    pub buffer: u64,
    /// Whether a full buffer holds back the container's output; else new lines are dropped.
    pub blocking: bool,
    /// What happens when the collector cannot be reached.
    #[serde(default)]
    pub retry: Retry,
}

/// How often a message is tried again, and when.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    /// The time between two attempts; without one it begins short and doubles up to ten seconds.
    pub wait: Option<Duration>,
    /// Attempts after the first one, before the message is given up and counted as lost; without a number it never is.
    pub attempts: Option<u32>,
}

/// A kind of collector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SinkKind {
    /// A syslog server.
    Syslog(SyslogConfig),
    /// systemd's journal.
    Journald(JournaldConfig),
    /// Fluentd, or what speaks its protocol.
    Fluentd(FluentdConfig),
    /// Graylog, or what speaks its format.
    Gelf(GelfConfig),
}

/// How to reach a collector. Names have been resolved: the monitor is static and has no resolver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    /// UDP.
    Udp(SocketAddr),
    /// TCP.
    Tcp(SocketAddr),
    /// TLS over TCP.
    Tls(TlsEndpoint),
    /// A unix datagram socket; if it is a stream socket, that.
    Datagram(PathBuf),
    /// A unix stream socket.
    Stream(PathBuf),
}

/// A server inside TLS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsEndpoint {
    /// Where it is.
    pub address: SocketAddr,
    /// The name or address that its certificate must be for.
    pub name: String,
    /// Whom to believe, and who to be.
    pub trust: Trust,
}

/// Messages for a syslog server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyslogConfig {
    /// The server.
    pub endpoint: Endpoint,
    /// The facility's number, 0 to 23.
    pub facility: u8,
    /// The form of a message.
    pub format: SyslogFormat,
    /// The tag, or application's name.
    pub tag: String,
    /// The host's name.
    pub hostname: String,
}

/// The form of a syslog message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SyslogFormat {
    /// As the C library's `syslog` writes it: without the host's name.
    Local,
    /// RFC 3164.
    Rfc3164,
    /// RFC 5424.
    Rfc5424,
    /// RFC 5424 with microseconds.
    Rfc5424Micro,
}

/// Messages for systemd's journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournaldConfig {
    /// The journal's socket.
    pub socket: PathBuf,
    /// Fields of every message; names as the journal wants them.
    pub fields: BTreeMap<String, String>,
}

/// Messages for fluentd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FluentdConfig {
    /// The server.
    pub endpoint: Endpoint,
    /// The tag.
    pub tag: String,
    /// Fields of every record.
    pub fields: BTreeMap<String, String>,
    /// Whether times have nanoseconds.
    #[serde(default)]
    pub sub_second: bool,
    /// Whether the server is to acknowledge each record; one that it does not is sent again.
    #[serde(default)]
    pub request_ack: bool,
    /// How long connecting, and one write, may take, if not as long as with the others.
    #[serde(default)]
    pub write_timeout: Option<Duration>,
    /// Whether the connection is made anew after some time.
    #[serde(default)]
    pub reconnect: Option<Duration>,
}

/// Messages for Graylog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GelfConfig {
    /// The server, by UDP or TCP.
    pub endpoint: Endpoint,
    /// The host's name.
    pub host: String,
    /// Further fields of every message, without the underscore that they have there.
    pub fields: BTreeMap<String, String>,
    /// Of datagrams; what goes by TCP is not compressed.
    pub compression: GelfCompression,
    /// 0 to 9; -1 is the library's choice.
    pub level: i32,
}

/// How datagrams are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GelfCompression {
    None,
    Gzip,
    Zlib,
}

/// A rotated log in docker's `json-file` format. Rotated files are `path.1` (newest) to `path.<max_files - 1>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JsonFileLog {
    /// The current file.
    pub path: PathBuf,
    /// Size in bytes at which the file is rotated; 0 is no limit.
    #[serde(default = "default_max_size")]
    pub max_size: u64,
    /// How many files are kept, the current one included; at least 1.
    #[serde(default = "default_max_files")]
    pub max_files: u32,
    /// Written with every line (docker's `labels`, `env` and `tag` log options).
    #[serde(default)]
    pub attrs: BTreeMap<String, String>,
    /// Whether rotated files are compressed (`path.N.gz`).
    #[serde(default)]
    pub compress: bool,
}

impl JsonFileLog {
    /// A log at `path` with the default bounds: five files of 20 MiB.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            max_size: default_max_size(),
            max_files: default_max_files(),
            attrs: BTreeMap::new(),
            compress: false,
        }
    }
}

fn default_max_size() -> u64 {
    20 << 20
}

fn default_max_files() -> u32 {
    5
}

/// File descriptors handed to the monitor beside its [`Config`].
#[derive(Debug)]
pub struct Inherited {
    /// The network namespace to join; without it the spec decides.
    pub netns: Option<OwnedFd>,
    /// Lower directories of the root that are mounts, each with its position in the list: they take the place of the
    /// paths there.
    pub layers: Vec<(usize, OwnedFd)>,
    /// Kept open for the container's life and never used (reserved host ports).
    pub held: Vec<OwnedFd>,
    /// Clients attached before the process starts, so that no byte is lost.
    pub attach: Vec<AttachStream>,
    /// The monitor's end of the daemon's first event connection (the other end reads with
    /// [`crate::EventReader`]).
    pub events: Option<UnixStream>,
}

/// One client attached before the start: the monitor's end of a socket pair.
#[derive(Debug)]
pub struct AttachStream {
    /// The monitor's end; what the client does on its own end is described at [`crate::Client::attach`].
    pub stream: UnixStream,
    /// What the client wants.
    pub options: AttachOptions,
}

/// What an attached client wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachOptions {
    /// A name chosen by the caller, for [`crate::Client::detach`]; unique per container, empty when not needed.
    #[serde(default)]
    pub key: String,
    /// Whether bytes the client sends go to the process.
    #[serde(default)]
    pub stdin: bool,
    /// Whether the client gets standard output (with a terminal: everything).
    #[serde(default)]
    pub stdout: bool,
    /// Whether the client gets standard error.
    #[serde(default)]
    pub stderr: bool,
    /// How long a client that is connected but takes nothing may hold up the container's output once its buffer
    /// (1 MiB) is full; then it is told ([`crate::frame::Kind::Lagged`]) and dropped. `None`: as long as it is connected, as docker
    /// does; right for the foreground of a `run`.
    #[serde(default)]
    pub patience: Option<Duration>,
}

impl Default for AttachOptions {
    /// Output only, with the patience of an onlooker (30 s).
    fn default() -> Self {
        Self {
            key: String::new(),
            stdin: false,
            stdout: true,
            stderr: true,
            patience: Some(Duration::from_secs(30)),
        }
    }
}

/// A further process in a running container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecConfig {
    /// The exec's id, unique within the container; used in a file name, so `[a-zA-Z0-9_.-]`, at most 128 bytes.
    pub id: String,
    /// The process: arguments, environment, user, directory, capabilities, limits.
    pub process: Process,
    /// Whether it gets a pseudo-terminal.
    #[serde(default)]
    pub terminal: bool,
    /// The terminal's first size.
    #[serde(default)]
    pub console_size: Option<ConsoleSize>,
    /// Whether the client's bytes become its standard input; else that is `/dev/null`.
    #[serde(default)]
    pub stdin: bool,
    /// Whether the client gets standard output (with a terminal: everything).
    #[serde(default)]
    pub stdout: bool,
    /// Whether the client gets standard error.
    #[serde(default)]
    pub stderr: bool,
}
