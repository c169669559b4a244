//! The daemon's side: finding the helper that a former daemon left, or starting one, and telling it what to do.
//!
//! Invariant: there is one connection, used by one caller at a time; after a failure it is closed, and whoever watches
//! it ([`Client::wait_until_lost`]) starts over.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::protocol::{self, Answer, MOST_FDS, Relayed, Request, Resident, Sockets, VERSION};
use super::share::SharedNetwork;

/// Failure of a request to the network helper.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    #[error("start the network helper")]
    Start(#[source] io::Error),
    #[error("talk to the network helper")]
    Talk(#[source] io::Error),
    #[error("the network helper: {0}")]
    Refused(String),
    #[error("the network helper is not running")]
    Gone,
}

/// Handle on the helper of one engine.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    command: Vec<OsString>,
    connection: Mutex<Option<OwnedFd>>,
}

impl Client {
    /// For the helper whose control socket is at `path`; `command` is what starts one.
    pub fn new(path: PathBuf, command: Vec<OsString>) -> Self {
        Self { path, command, connection: Mutex::default() }
    }

    /// Connects to the helper that runs, or starts one. The ids of the containers that it serves already.
    pub fn connect(&self) -> Result<Vec<String>, HelperError> {
        let mut slot = self.lock();
        *slot = None;
        let connection = match self.adopt() {
            Some(connection) => connection,
            None => self.start()?,
        };
        let served = match call(&connection, &Request::List, &[])? {
            Answer::Served(ids) => ids,
            other => return Err(unexpected(&other)),
        };
        *slot = Some(connection);
        Ok(served)
    }

    /// Enters a container, or changes what is known of it; with sockets if it has none there yet.
    pub fn put(&self, resident: Resident, sockets: Option<Sockets>) -> Result<(), HelperError> {
        let fds: Vec<BorrowedFd<'_>> = sockets
            .as_ref()
            .map(|sockets| vec![sockets.udp.as_fd(), sockets.tcp.as_fd(), sockets.netns.as_fd()])
            .unwrap_or_default();
        self.done(&Request::Put(resident), &fds)
    }

    /// From now on the names of these networks are shared with their other hosts.
    pub fn share(&self, networks: Vec<SharedNetwork>) -> Result<(), HelperError> {
        self.done(&Request::Share(networks), &[])
    }

    /// Relays what comes to bound sockets.
    pub fn relay(&self, id: &str, sockets: &[(OwnedFd, Relayed)]) -> Result<(), HelperError> {
        for some in sockets.chunks(MOST_FDS) {
            let request =
                Request::Relay { id: id.to_owned(), relayed: some.iter().map(|(_, to)| *to).collect() };
            let fds: Vec<BorrowedFd<'_>> = some.iter().map(|(fd, _)| fd.as_fd()).collect();
            self.done(&request, &fds)?;
        }
        Ok(())
    }

    /// Keeps sockets open as long as the container is known.
    pub fn hold(&self, id: &str, held: &[OwnedFd]) -> Result<(), HelperError> {
        for some in held.chunks(MOST_FDS) {
            let fds: Vec<BorrowedFd<'_>> = some.iter().map(AsFd::as_fd).collect();
            self.done(&Request::Hold { id: id.to_owned() }, &fds)?;
        }
        Ok(())
    }

    /// Lets go of everything of a container. Unknown ids are fine.
    pub fn forget(&self, id: &str) -> Result<(), HelperError> {
        self.done(&Request::Forget { id: id.to_owned() }, &[])
    }

    /// Blocks until the helper has gone; at once if there is none.
    pub fn wait_until_lost(&self) {
        let Some(watched) = self.lock().as_ref().and_then(|one| rustix::io::fcntl_dupfd_cloexec(one, 3).ok())
        else {
            return;
        };
        loop {
            // Only the end of the connection counts; answers are read by who asked.
            let mut fds = [PollFd::new(&watched, PollFlags::RDHUP)];
            match rustix::event::poll(&mut fds, None) {
                Ok(_) if fds[0].revents().intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR) => {
                    return;
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::debug!(%error, "watch the network helper");
                    return;
                }
            }
        }
    }

    fn done(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), HelperError> {
        let mut slot = self.lock();
        let Some(connection) = slot.as_ref() else { return Err(HelperError::Gone) };
        match call(connection, request, fds) {
            Ok(Answer::Done) => Ok(()),
            Ok(Answer::Failed(reason)) => Err(HelperError::Refused(reason)),
            Ok(other) => Err(unexpected(&other)),
            Err(error) => {
                *slot = None;
                Err(error)
            }
        }
    }

    /// The helper of a former daemon, if it speaks our language; else it is asked to leave.
    fn adopt(&self) -> Option<OwnedFd> {
        let connection = connect(&self.path).ok()?;
        match call(&connection, &Request::Hello, &[]) {
            Ok(Answer::Version(VERSION)) => Some(connection),
            other => {
                tracing::info!(?other, "the network helper is of another version and is exchanged");
                if let Err(error) = call(&connection, &Request::Quit, &[]) {
                    tracing::debug!(%error, "the former helper leaves");
                }
                None
            }
        }
    }

    fn start(&self) -> Result<OwnedFd, HelperError> {
        let Some((program, arguments)) = self.command.split_first() else { return Err(HelperError::Gone) };
        let listener = listen(&self.path).map_err(HelperError::Start)?;
        let mut command = Command::new(program);
        command.args(arguments).env_clear().current_dir("/");
        command.stdin(listener).stdout(Stdio::null()).stderr(Stdio::inherit());
        let mut child = command.spawn().map_err(HelperError::Start)?;
        // It is ours to reap for as long as we live.
        let reaper = std::thread::Builder::new().name("reap helper".to_owned()).spawn(move || {
            if let Err(error) = child.wait() {
                tracing::debug!(%error, "reap the network helper");
            }
        });
        reaper.map_err(HelperError::Start)?;
        connect(&self.path).map_err(HelperError::Start)
    }

    fn lock(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn call(connection: &OwnedFd, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Answer, HelperError> {
    protocol::send(connection.as_fd(), request, fds).map_err(HelperError::Talk)?;
    match protocol::receive::<Answer>(connection.as_fd()).map_err(HelperError::Talk)? {
        Some((answer, _)) => Ok(answer),
        None => Err(HelperError::Talk(io::ErrorKind::UnexpectedEof.into())),
    }
}

fn unexpected(answer: &Answer) -> HelperError {
    HelperError::Refused(format!("an answer that fits no question: {answer:?}"))
}

fn socket() -> io::Result<OwnedFd> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    protocol::enlarge(&socket);
    Ok(socket)
}

fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn listen(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = socket()?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    rustix::net::listen(&socket, 8)?;
    Ok(socket)
}
