//! Connections to the monitor's socket: reading requests, writing replies, telling events.
//!
//! Only root and the monitor's own user are heard. A request is bounded in size, memory grows with what has really
//! arrived, and a request that is not complete in time ends the connection; no client can make the monitor wait.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::{RecvFlags, recv};

use super::queue::Queue;
use super::{Monitor, Token, Wants, unless_blocked};
use crate::protocol::{self, Event, Failure, FailureKind, MAX_REQUEST, Reply, Request};

/// Connections that have not become streams; more wait in the socket's own queue.
pub(super) const MAX_CONNECTIONS: usize = 256;

/// How long a connection may take to complete its request, or to take its reply.
const REQUEST_TIME: Duration = Duration::from_secs(5);

/// Bytes that may wait for a subscriber; one who lags further behind is dropped and has to ask again.
const SUBSCRIBER_LIMIT: usize = 256 << 10;

/// A connection that makes requests.
pub(super) struct Connection {
    id: u32,
    pub(super) socket: UnixStream,
    received: Vec<u8>,
    replies: Queue,
    /// When the request has to be complete and the reply taken.
    deadline: Option<Instant>,
    /// Closed when the replies are out.
    closing: bool,
    broken: bool,
}

/// A connection that is told events.
pub(super) struct Subscriber {
    id: u32,
    socket: UnixStream,
    queue: Queue,
    broken: bool,
}

impl Connection {
    pub(super) fn wants<'fd>(&'fd self, wants: &mut Wants<'fd>) {
        let mut flags = PollFlags::empty();
        if !self.replies.is_empty() {
            flags |= PollFlags::OUT;
        } else if !self.closing {
            flags |= PollFlags::IN;
        }
        wants.watch(Token::Connection(self.id), &self.socket, flags);
        if let Some(deadline) = self.deadline {
            wants.wake_at(deadline);
        }
    }

    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.broken || (self.closing && self.replies.is_empty()) || self.deadline.is_some_and(|d| now >= d)
    }

    /// Receive what there is; a request once it is complete.
    fn receive(&mut self) -> Option<Result<Request, Failure>> {
        let mut chunk = [0; 16 << 10];
        loop {
            match unless_blocked(|| recv(&self.socket, &mut chunk[..], RecvFlags::DONTWAIT)) {
                Ok(Some((n, _))) if n > 0 => self.received.extend_from_slice(&chunk[..n]),
                Ok(None) => return None,
                Ok(Some(_)) | Err(_) => {
                    self.broken = true;
                    return None;
                }
            }
            self.deadline.get_or_insert_with(|| Instant::now() + REQUEST_TIME);
            let Some((header, body)) = self.received.split_first_chunk::<4>() else { continue };
            let length = u32::from_be_bytes(*header) as usize;
            if length > MAX_REQUEST {
                let message = format!("request of {length} bytes (limit {MAX_REQUEST})");
                return Some(Err(Failure::new(FailureKind::Invalid, message)));
            }
            if body.len() > length {
                let message = "bytes after a request before its reply";
                return Some(Err(Failure::new(FailureKind::Invalid, message)));
            }
            if body.len() == length {
                let request = serde_json::from_slice(body)
                    .map_err(|e| Failure::new(FailureKind::Invalid, format!("malformed request: {e}")));
                self.received = Vec::new();
                return Some(request);
            }
        }
    }

    /// Send a reply; the connection takes no further request before it is out.
    pub(super) fn reply(&mut self, reply: &Reply) {
        if let Ok(bytes) = protocol::encode(reply) {
            self.replies.push(&bytes);
        } else {
            self.closing = true;
        }
        self.flush();
    }

    fn flush(&mut self) {
        match self.replies.send(&self.socket) {
            Ok(_) if self.replies.is_empty() => self.deadline = None,
            Ok(_) => self.deadline = Some(self.deadline.unwrap_or_else(|| Instant::now() + REQUEST_TIME)),
            Err(_) => self.broken = true,
        }
    }

    /// The socket, to become a stream.
    pub(super) fn into_socket(self) -> UnixStream {
        self.socket
    }
}

impl Subscriber {
    pub(super) fn new(id: u32, socket: UnixStream, first: &[u8]) -> std::io::Result<Self> {
        socket.set_nonblocking(true)?;
        let mut subscriber = Self { id, socket, queue: Queue::default(), broken: false };
        subscriber.push(first);
        Ok(subscriber)
    }

    pub(super) fn wants<'fd>(&'fd self, wants: &mut Wants<'fd>) {
        let flags = if self.queue.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        wants.watch(Token::Subscriber(self.id), &self.socket, flags);
    }

    fn push(&mut self, bytes: &[u8]) {
        self.queue.push(bytes);
        self.broken |= self.queue.send(&self.socket).is_err() || self.queue.len() > SUBSCRIBER_LIMIT;
    }
}

impl Monitor {
    pub(super) fn accept(&mut self) {
        while self.connections.len() < MAX_CONNECTIONS {
            let Ok((socket, _)) = self.listener.accept() else { return };
            if !is_allowed(&socket) || socket.set_nonblocking(true).is_err() {
                continue;
            }
            let id = self.next_id();
            self.connections.push(Connection {
                id,
                socket,
                received: Vec::new(),
                replies: Queue::default(),
                deadline: Some(Instant::now() + REQUEST_TIME),
                closing: false,
                broken: false,
            });
            // The request is usually there already: save a turn.
            self.on_connection(id, PollFlags::IN);
        }
    }

    pub(super) fn on_connection(&mut self, id: u32, flags: PollFlags) {
        let Some(at) = self.connections.iter().position(|c| c.id == id) else { return };
        if flags.contains(PollFlags::OUT) {
            self.connections[at].flush();
        } else if flags.contains(PollFlags::IN) {
            match self.connections[at].receive() {
                None => {}
                Some(Err(failure)) => {
                    let connection = &mut self.connections[at];
                    connection.closing = true;
                    connection.reply(&Reply::Failed(failure));
                }
                Some(Ok(request)) => {
                    let connection = self.connections.swap_remove(at);
                    if let Some(connection) = self.answer(connection, request) {
                        self.connections.push(connection);
                    }
                }
            }
        } else if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
            self.connections[at].broken = true;
        }
    }

    pub(super) fn on_subscriber(&mut self, id: u32, flags: PollFlags) {
        let Some(subscriber) = self.subscribers.iter_mut().find(|s| s.id == id) else { return };
        if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
            subscriber.broken = true;
        } else {
            subscriber.push(&[]);
        }
        self.subscribers.retain(|s| !s.broken);
    }

    /// Tell every subscriber.
    pub(super) fn publish(&mut self, event: &Event) {
        if let Ok(bytes) = protocol::encode(event) {
            for subscriber in &mut self.subscribers {
                subscriber.push(&bytes);
            }
            self.subscribers.retain(|s| !s.broken);
        }
    }
}

/// Whether the other side is root or this process's own user.
fn is_allowed(socket: impl AsFd) -> bool {
    rustix::net::sockopt::socket_peercred(socket)
        .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}
