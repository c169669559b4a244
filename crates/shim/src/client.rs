//! A daemon's view of one monitor: blocking requests over its socket, one connection each.
//!
//! The monitor's directory is held as a descriptor and the socket is reached through it, so that a long path is no
//! limit and a directory that was replaced is not talked to.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use brigantine_runtime::cgroup::Stats;
use oci_spec::runtime::LinuxResources;
use rustix::fs::{Mode, OFlags};

use crate::config::{AttachOptions, ConsoleSize, ExecConfig};
use crate::protocol::{self, Event, ExecState, Failure, MAX_REPLY, Reply, Request, State};
use crate::record::SOCKET;

/// How long a monitor may take to answer. Its slowest requests wait for the kernel to freeze or start a process.
const PATIENCE: Duration = Duration::from_mins(1);

/// A connection to a container's monitor. Cheap; every request makes its own connection, so that any number may be
/// made at once.
#[derive(Debug)]
pub struct Client {
    dir: OwnedFd,
    path: PathBuf,
}

/// A request to a monitor failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: the monitor has gone.
    #[error("cannot reach the monitor in {}", dir.display())]
    Unreachable {
        /// The monitor's directory.
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The connection broke or the monitor did not answer in time.
    #[error("{action} the monitor in {}", dir.display())]
    Broken {
        /// What was being done.
        action: &'static str,
        /// The monitor's directory.
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The monitor's answer does not fit the request.
    #[error("the monitor in {} gave an answer that does not fit", dir.display())]
    Unexpected {
        /// The monitor's directory.
        dir: PathBuf,
    },
    /// The monitor refused or failed.
    #[error(transparent)]
    Refused(#[from] Failure),
}

/// An exec that has been started.
#[derive(Debug)]
pub struct Execed {
    /// Its process, as the host counts.
    pub pid: i32,
    /// Frames out, raw standard input in; ends with a [`crate::frame::Kind::ExecExited`] frame. May be dropped at once:
    /// the process goes on.
    pub stream: UnixStream,
}

impl Client {
    /// Reach the monitor whose directory is `dir`; [`ClientError::Unreachable`] if nobody listens there.
    pub fn connect(dir: &Path) -> Result<Self, ClientError> {
        let unreachable = |source: io::Error| ClientError::Unreachable { dir: dir.to_owned(), source };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(dir, flags, Mode::empty()).map_err(|e| unreachable(e.into()))?;
        let client = Self { dir: fd, path: dir.to_owned() };
        client.open()?;
        Ok(client)
    }

    fn open(&self) -> Result<UnixStream, ClientError> {
        UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", self.dir.as_raw_fd()))
            .map_err(|source| ClientError::Unreachable { dir: self.path.clone(), source })
    }

    /// Make a request; the connection is returned with the answer, for requests that turn it into a stream.
    fn ask(&self, request: &Request) -> Result<(Reply, UnixStream), ClientError> {
        let broken = |action| move |source| ClientError::Broken { action, dir: self.path.clone(), source };
        let stream = self.open()?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(broken("ask"))?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(broken("ask"))?;
        protocol::write_message(&stream, request).map_err(broken("ask"))?;
        let body = protocol::read_message(&stream, MAX_REPLY)
            .and_then(|body| body.ok_or_else(|| io::ErrorKind::UnexpectedEof.into()))
            .map_err(broken("hear from"))?;
        stream.set_write_timeout(None).map_err(broken("ask"))?;
        stream.set_read_timeout(None).map_err(broken("ask"))?;
        match serde_json::from_slice(&body) {
            Ok(Reply::Failed(failure)) => Err(failure.into()),
            Ok(reply) => Ok((reply, stream)),
            Err(e) => Err(broken("understand")(e.into())),
        }
    }

    fn unexpected(&self) -> ClientError {
        ClientError::Unexpected { dir: self.path.clone() }
    }

    fn done(&self, request: &Request) -> Result<(), ClientError> {
        match self.ask(request)?.0 {
            Reply::Done => Ok(()),
            _ => Err(self.unexpected()),
        }
    }

    /// How the container is.
    pub fn state(&self) -> Result<State, ClientError> {
        match self.ask(&Request::State)?.0 {
            Reply::State(state) => Ok(*state),
            _ => Err(self.unexpected()),
        }
    }

    /// Send a signal to the container's first process, or to `all` of its processes. SIGKILL also thaws.
    pub fn kill(&self, signal: i32, all: bool) -> Result<(), ClientError> {
        self.done(&Request::Kill { signal, all })
    }

    /// Set the size of the container's terminal.
    pub fn resize(&self, size: ConsoleSize) -> Result<(), ClientError> {
        self.done(&Request::Resize { size })
    }

    /// Freeze all processes.
    pub fn pause(&self) -> Result<(), ClientError> {
        self.done(&Request::Pause)
    }

    /// Thaw all processes.
    pub fn resume(&self) -> Result<(), ClientError> {
        self.done(&Request::Resume)
    }

    /// What the container's control group has used.
    pub fn stats(&self) -> Result<Stats, ClientError> {
        match self.ask(&Request::Stats)?.0 {
            Reply::Stats(stats) => Ok(*stats),
            _ => Err(self.unexpected()),
        }
    }

    /// Change resource limits; what is `None` stays.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), ClientError> {
        self.done(&Request::Update { resources: Box::new(resources.clone()) })
    }

    /// All processes of the container, as the host counts.
    pub fn pids(&self) -> Result<Vec<i32>, ClientError> {
        match self.ask(&Request::Pids)?.0 {
            Reply::Pids(pids) => Ok(pids),
            _ => Err(self.unexpected()),
        }
    }

    /// Attach to the container's standard streams, from now on.
    ///
    /// Out of the stream come frames ([`crate::frame`]), ending when the container has ended and everything has been
    /// delivered. Into it go raw bytes for standard input, if asked for. Shutting down the writing half, or vanishing,
    /// ends this client's input: with `stdin_once` the container's standard input is closed then (on a terminal, where
    /// there is nothing to close, an end-of-file character is written for a half-close); else it stays open for others.
    /// [`Client::detach`] leaves without any such effect.
    pub fn attach(&self, options: &AttachOptions) -> Result<UnixStream, ClientError> {
        match self.ask(&Request::Attach { options: options.clone() })? {
            (Reply::Done, stream) => Ok(stream),
            _ => Err(self.unexpected()),
        }
    }

    /// Drop the attached clients with this key, leaving standard input open.
    pub fn detach(&self, key: &str) -> Result<(), ClientError> {
        self.done(&Request::Detach { key: key.to_owned() })
    }

    /// Close the container's standard input, after what attached clients have sent already.
    pub fn close_stdin(&self) -> Result<(), ClientError> {
        self.done(&Request::CloseStdin)
    }

    /// Run another process in the container. Returns when the program has been executed, or with the reason why it
    /// could not ([`Failure::exit_code`]).
    pub fn exec(&self, config: &ExecConfig) -> Result<Execed, ClientError> {
        match self.ask(&Request::Exec { config: Box::new(config.clone()) })? {
            (Reply::Started { pid }, stream) => Ok(Execed { pid, stream }),
            _ => Err(self.unexpected()),
        }
    }

    /// How an exec is: running, or how it ended (kept until [`Client::exec_forget`]; the last 128 ended ones).
    pub fn exec_state(&self, id: &str) -> Result<ExecState, ClientError> {
        match self.ask(&Request::ExecState { id: id.to_owned() })?.0 {
            Reply::ExecState(state) => Ok(state),
            _ => Err(self.unexpected()),
        }
    }

    /// Send a signal to an exec's process.
    pub fn exec_kill(&self, id: &str, signal: i32) -> Result<(), ClientError> {
        self.done(&Request::ExecKill { id: id.to_owned(), signal })
    }

    /// Set the size of an exec's terminal.
    pub fn exec_resize(&self, id: &str, size: ConsoleSize) -> Result<(), ClientError> {
        self.done(&Request::ExecResize { id: id.to_owned(), size })
    }

    /// Drop the record of an ended exec.
    pub fn exec_forget(&self, id: &str) -> Result<(), ClientError> {
        self.done(&Request::ExecForget { id: id.to_owned() })
    }

    /// Subscribe to events. A subscriber also keeps the monitor of an ended container waiting for
    /// [`Client::release`]; read it with [`EventReader`].
    pub fn events(&self) -> Result<UnixStream, ClientError> {
        match self.ask(&Request::Events)? {
            (Reply::Done, stream) => Ok(stream),
            _ => Err(self.unexpected()),
        }
    }

    /// Let the monitor of an ended container go. When this returns, its control group and its directory are gone.
    pub fn release(&self) -> Result<(), ClientError> {
        self.done(&Request::Release)
    }
}

/// Reads [`Event`]s from a subscription, blocking. (For other kinds of I/O: each message is a 32-bit big-endian length
/// and that many bytes for [`Event::decode`].)
#[derive(Debug)]
pub struct EventReader {
    stream: UnixStream,
}

impl EventReader {
    /// Read events from a subscription.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// The next event; `None` when the monitor has gone.
    pub fn read(&mut self) -> io::Result<Option<Event>> {
        match protocol::read_message(&self.stream, MAX_REPLY)? {
            Some(body) => Event::decode(&body).map(Some),
            None => Ok(None),
        }
    }
}
