//! The helper's side of the control socket: requests of daemons are read on a thread of their own and carried out on the
//! one thread that everything else runs on.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, LocalSet};

use super::forward::{HostServers, Silent};
use super::protocol::{self, Answer, Request, VERSION};
use super::relay;
use super::resolver::Server;
use super::share::Sharing;
use super::table::Table;

/// How long it waits for the first daemon.
const FIRST_CALL: Duration = Duration::from_secs(20);

/// What all name servers share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub table: RefCell<Table>,
    pub host_servers: RefCell<HostServers>,
    pub silent: RefCell<Silent>,
    /// Counts what has changed of the containers, for those who tell other hosts.
    pub changed: watch::Sender<u64>,
    turns: Cell<usize>,
}

impl Shared {
    /// Each answer begins with another one of several addresses.
    pub fn turn<T>(&self, list: &mut [T]) {
        if !list.is_empty() {
            let turn = self.turns.get();
            self.turns.set(turn.wrapping_add(1));
            list.rotate_left(turn % list.len());
        }
    }
}

/// What is kept of one container; all of it ends with this.
#[derive(Debug, Default)]
struct Kept {
    tasks: Vec<JoinHandle<()>>,
    has_names: bool,
    held: Vec<OwnedFd>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

type Call = (Request, Vec<OwnedFd>, oneshot::Sender<Answer>);

enum Event {
    Call(Call),
    Connected,
    Disconnected,
}

/// Serves daemons until there is neither one nor a container.
pub(super) async fn serve(listener: OwnedFd) {
    let (events, mut next) = mpsc::unbounded_channel();
    let accepting =
        std::thread::Builder::new().name("control".to_owned()).spawn(move || accept(&listener, &events));
    if let Err(error) = accepting {
        tracing::error!(%error, "start the network helper");
        return;
    }
    let local = LocalSet::new();
    local
        .run_until(async move {
            let mut helper = Helper {
                shared: Rc::new(Shared::default()),
                kept: HashMap::new(),
                sharing: Sharing::default(),
            };
            let mut connections = 0_usize;
            let mut was_called = false;
            loop {
                let event = if was_called {
                    next.recv().await
                } else {
                    tokio::time::timeout(FIRST_CALL, next.recv()).await.unwrap_or(None)
                };
                match event {
                    None => return,
                    Some(Event::Connected) => {
                        (connections, was_called) = (connections + 1, true);
                    }
                    Some(Event::Disconnected) => connections = connections.saturating_sub(1),
                    Some(Event::Call((Request::Quit, _, answer))) => {
                        drop(answer.send(Answer::Done));
                        return;
                    }
                    Some(Event::Call((request, fds, answer))) => {
                        // Nobody to tell any more: it is done all the same.
                        drop(answer.send(helper.carry_out(request, fds)));
                    }
                }
                if connections == 0 && helper.kept.is_empty() {
                    return;
                }
            }
        })
        .await;
}

struct Helper {
    shared: Rc<Shared>,
    kept: HashMap<String, Kept>,
    sharing: Sharing,
}

impl Helper {
    fn carry_out(&mut self, request: Request, fds: Vec<OwnedFd>) -> Answer {
        match request {
            Request::Share(networks) => {
                self.sharing.set(networks, &self.shared);
                Answer::Done
            }
            Request::Hello => Answer::Version(VERSION),
            Request::List => Answer::Served(
                self.kept.iter().filter(|(_, kept)| kept.has_names).map(|(id, _)| id.clone()).collect(),
            ),
            Request::Put(resident) => {
                let id = resident.id.clone();
                self.shared.table.borrow_mut().put(resident);
                self.shared.changed.send_modify(|count| *count += 1);
                let kept = self.kept.entry(id.clone()).or_default();
                let Ok([udp, tcp, netns]) = <[OwnedFd; 3]>::try_from(fds) else { return Answer::Done };
                let (udp, tcp) = match asynchronous(udp, tcp) {
                    Ok(sockets) => sockets,
                    Err(error) => return Answer::Failed(error.to_string()),
                };
                let server = Server::new(id, Rc::clone(&self.shared), netns);
                kept.tasks.push(tokio::task::spawn_local(Rc::clone(&server).serve_udp(udp)));
                kept.tasks.push(tokio::task::spawn_local(server.serve_tcp(tcp)));
                kept.has_names = true;
                Answer::Done
            }
            Request::Relay { id, relayed } => {
                if relayed.len() != fds.len() {
                    return Answer::Failed(format!("{} sockets for {} ports", fds.len(), relayed.len()));
                }
                let kept = self.kept.entry(id).or_default();
                for (socket, relayed) in fds.into_iter().zip(relayed) {
                    kept.tasks.push(tokio::task::spawn_local(relay::serve(socket, relayed)));
                }
                Answer::Done
            }
            Request::Hold { id } => {
                self.kept.entry(id).or_default().held.extend(fds);
                Answer::Done
            }
            Request::Forget { id } => {
                self.shared.table.borrow_mut().remove(&id);
                self.shared.changed.send_modify(|count| *count += 1);
                self.kept.remove(&id);
                Answer::Done
            }
            Request::Quit => Answer::Done,
        }
    }
}

fn asynchronous(udp: OwnedFd, tcp: OwnedFd) -> std::io::Result<(UdpSocket, TcpListener)> {
    let (udp, tcp) = (std::net::UdpSocket::from(udp), std::net::TcpListener::from(tcp));
    udp.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    Ok((UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?))
}

fn accept(listener: &OwnedFd, events: &mpsc::UnboundedSender<Event>) {
    loop {
        let connection = match rustix::io::retry_on_intr(|| {
            rustix::net::accept_with(listener, rustix::net::SocketFlags::CLOEXEC)
        }) {
            Ok(connection) => connection,
            Err(error) => {
                tracing::error!(%error, "the network helper's control socket");
                return;
            }
        };
        if events.send(Event::Connected).is_err() {
            return;
        }
        let events = events.clone();
        let spawned = std::thread::Builder::new().name("control".to_owned()).spawn(move || {
            converse(&connection, &events);
            drop(events.send(Event::Disconnected));
        });
        if let Err(error) = spawned {
            tracing::error!(%error, "serve a daemon");
            return;
        }
    }
}

fn converse(connection: &OwnedFd, events: &mpsc::UnboundedSender<Event>) {
    protocol::enlarge(connection);
    loop {
        let (request, fds) = match protocol::receive::<Request>(connection.as_fd()) {
            Ok(Some(received)) => received,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "read a request of the daemon");
                return;
            }
        };
        let (answer, answered) = oneshot::channel();
        if events.send(Event::Call((request, fds, answer))).is_err() {
            return;
        }
        let Ok(answer) = answered.blocking_recv() else { return };
        if let Err(error) = protocol::send(connection.as_fd(), &answer, &[]) {
            tracing::debug!(%error, "answer the daemon");
            return;
        }
    }
}
