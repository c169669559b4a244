//! What each request does.

use std::io;
use std::os::fd::AsFd;

use super::control::{Connection, Subscriber};
use super::execs::no_such_exec;
use super::viewer::Viewer;
use super::{Monitor, Owner};
use crate::config::AttachOptions;
use crate::protocol::{self, Event, Failure, FailureKind, PROTOCOL_VERSION, Reply, Request, State, Status};

impl Monitor {
    /// Answer a request. The connection is returned unless it has become something else.
    pub(super) fn answer(&mut self, mut connection: Connection, request: Request) -> Option<Connection> {
        let result = match request {
            Request::Attach { options } => return self.attach(connection, options),
            Request::Exec { config } => {
                let options = AttachOptions {
                    key: String::new(),
                    stdin: config.stdin,
                    stdout: config.stdout,
                    stderr: config.stderr,
                    patience: None,
                };
                match self.exec(*config) {
                    Ok((key, pid)) => {
                        return self.become_viewer(
                            Owner::Exec(key),
                            connection,
                            options,
                            &Reply::Started { pid },
                        );
                    }
                    Err(failure) => Err(failure),
                }
            }
            Request::Events => return self.subscribe(connection),
            Request::Release => match self.release() {
                Ok(()) => {
                    connection.reply(&Reply::Done);
                    return None;
                }
                Err(failure) => Err(failure),
            },
            Request::State => Ok(Reply::State(Box::new(self.state()))),
            Request::Kill { signal, all } => self.kill(signal, all).map(|()| Reply::Done),
            Request::Resize { size } => {
                self.relay.resize(size).map(|()| Reply::Done).map_err(|e| os("resize", e))
            }
            Request::Pause => self.pause().map(|()| Reply::Done),
            Request::Resume => self.resume().map(|()| Reply::Done),
            Request::Stats => self.cgroup.stats().map(|s| Reply::Stats(Box::new(s))).map_err(Failure::from),
            Request::Update { resources } => {
                self.container.update(&mut self.cgroup, &resources).map(|()| Reply::Done)
            }
            Request::Pids => self.cgroup.procs().map(Reply::Pids).map_err(Failure::from),
            Request::Detach { key } => {
                self.relay.detach(&key);
                Ok(Reply::Done)
            }
            Request::CloseStdin => {
                self.relay.close_input();
                Ok(Reply::Done)
            }
            Request::ExecState { id } => {
                self.execs.state(&id).map(Reply::ExecState).ok_or_else(|| no_such_exec(&id))
            }
            Request::ExecKill { id, signal } => match self.execs.pidfd(&id) {
                Some(pidfd) => brigantine_sys::signals::send(pidfd.as_fd(), signal)
                    .map(|()| Reply::Done)
                    .map_err(|e| os("signal the exec", e)),
                None => Err(no_such_exec(&id)),
            },
            Request::ExecResize { id, size } => match self.execs.relay_of(&id) {
                Some(relay) => relay.resize(size).map(|()| Reply::Done).map_err(|e| os("resize", e)),
                None => Err(no_such_exec(&id)),
            },
            Request::ExecForget { id } => self.forget_exec(&id).map(|()| Reply::Done),
        };
        connection.reply(&result.unwrap_or_else(Reply::Failed));
        Some(connection)
    }

    fn state(&self) -> State {
        let status = if self.ending.is_some() {
            Status::Stopped
        } else if self.paused {
            Status::Paused
        } else {
            Status::Running
        };
        let (log_lost, log_error) = self.log.as_ref().map_or((0, None), crate::log::LogFile::losses);
        State {
            protocol: PROTOCOL_VERSION,
            status,
            shim_pid: rustix::process::getpid().as_raw_nonzero().get(),
            container_pid: self.container.pid(),
            started_at: self.started_at.clone(),
            exit: self.exit_record().cloned(),
            execs: self.execs.states(),
            oom_killed: self.oom_kills > 0,
            log_lost,
            log_error,
        }
    }

    fn running(&self) -> Result<(), Failure> {
        match self.ending {
            None => Ok(()),
            Some(_) => Err(Failure::new(
                FailureKind::NotRunning,
                format!("container {} is not running", self.home.id),
            )),
        }
    }

    fn kill(&mut self, signal: i32, all: bool) -> Result<(), Failure> {
        self.running()?;
        if !(0..=64).contains(&signal) {
            return Err(Failure::new(FailureKind::Invalid, format!("signal {signal}: want 0 to 64")));
        }
        if !all {
            self.container.signal(signal)?;
        } else if signal == libc::SIGKILL {
            self.cgroup.kill_all()?;
        } else {
            self.cgroup.signal_all(signal)?;
        }
        if signal == libc::SIGKILL && self.paused {
            // A process that is frozen on cgroup v1 dies when it is thawed.
            self.resume()?;
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Failure> {
        self.running()?;
        if self.paused {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("container {} is already paused", self.home.id),
            ));
        }
        self.container.pause()?;
        self.paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Failure> {
        self.running()?;
        if !self.paused {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("container {} is not paused", self.home.id),
            ));
        }
        self.container.resume()?;
        self.paused = false;
        Ok(())
    }

    fn attach(&mut self, mut connection: Connection, options: AttachOptions) -> Option<Connection> {
        if self.exit_record().is_some() {
            let message = format!("container {} is not running", self.home.id);
            connection.reply(&Reply::Failed(Failure::new(FailureKind::NotRunning, message)));
            return Some(connection);
        }
        self.become_viewer(Owner::Container, connection, options, &Reply::Done)
    }

    fn become_viewer(
        &mut self,
        owner: Owner,
        connection: Connection,
        options: AttachOptions,
        reply: &Reply,
    ) -> Option<Connection> {
        let id = self.next_id();
        let viewer = protocol::encode(reply)
            .and_then(|first| Viewer::new(id, connection.into_socket(), options, &first));
        let relay = match owner {
            Owner::Container => Some(&mut self.relay),
            Owner::Exec(key) => self.execs.relay(key),
        };
        // Without a viewer the socket is closed, which says enough.
        if let (Ok(viewer), Some(relay)) = (viewer, relay) {
            relay.attach(viewer);
        }
        None
    }

    fn subscribe(&mut self, connection: Connection) -> Option<Connection> {
        let mut first = protocol::encode(&Reply::Done).ok()?;
        if let Some(record) = self.exit_record() {
            first.extend(protocol::encode(&Event::Exited(record.clone())).ok()?);
        }
        let id = self.next_id();
        if let Ok(subscriber) = Subscriber::new(id, connection.into_socket(), &first) {
            self.subscribers.push(subscriber);
        }
        None
    }
}

fn os(what: &str, error: io::Error) -> Failure {
    let kind =
        if error.kind() == io::ErrorKind::InvalidInput { FailureKind::Invalid } else { FailureKind::Os };
    Failure::new(kind, format!("{what}: {error}"))
}
