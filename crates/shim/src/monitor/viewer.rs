//! One attached client: frames out with a bounded buffer, raw input in.
//!
//! A client with an unlimited patience holds up the container's output while its buffer is full, for as long as it is
//! connected: it loses nothing. Any other client may do so for its patience only; then it gets what is buffered, is told
//! that output was skipped, and gets no more. A client that vanishes never holds anything up.

use std::io::{self, IoSlice};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown, sendmsg};

use super::queue::Queue;
use super::unless_blocked;
use crate::config::AttachOptions;
use crate::frame::{self, Kind};

/// Buffered bytes at which a client holds up the output.
const LIMIT: usize = 1 << 20;

/// How long a client may take nothing after the end, before it is dropped with what is buffered for it.
const LAST_PATIENCE: Duration = Duration::from_mins(1);

/// An attached client.
#[derive(Debug)]
pub(super) struct Viewer {
    pub(super) id: u32,
    pub(super) key: String,
    pub(super) socket: UnixStream,
    stdout: bool,
    stderr: bool,
    patience: Option<Duration>,
    queue: Queue,
    /// Since when the queue has not moved.
    stuck_since: Option<Instant>,
    /// Nothing is added any more; closed when the queue is empty.
    ending: bool,
    /// The other side has closed: nothing can be delivered.
    pub(super) deaf: bool,
    /// Input may still come.
    pub(super) talking: bool,
}

impl Viewer {
    /// A client on `socket`, which gets `first` before anything else.
    pub(super) fn new(id: u32, socket: UnixStream, options: AttachOptions, first: &[u8]) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let AttachOptions { key, stdin, stdout, stderr, patience } = options;
        let mut viewer = Self {
            id,
            key,
            socket,
            stdout,
            stderr,
            patience,
            queue: Queue::default(),
            stuck_since: None,
            ending: false,
            deaf: false,
            talking: stdin,
        };
        viewer.queue.push(first);
        viewer.flush();
        Ok(viewer)
    }

    /// What to wait for on this client's socket; `None` to leave it alone. `hear`: its input can be passed on now.
    pub(super) fn interest(&self, hear: bool) -> Option<PollFlags> {
        let mut flags = PollFlags::empty();
        if hear && self.talking {
            flags |= PollFlags::IN;
        }
        if self.deaf {
            // A hang-up would be reported again and again.
            return (!flags.is_empty()).then_some(flags);
        }
        if !self.queue.is_empty() {
            flags |= PollFlags::OUT;
        }
        Some(flags)
    }

    /// Whether this client lets output be read.
    pub(super) fn has_room(&self) -> bool {
        self.ending || self.deaf || self.queue.len() < LIMIT
    }

    /// When this client's patience is used up.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let since = self.stuck_since?;
        if self.deaf {
            None
        } else if self.ending {
            Some(since + LAST_PATIENCE)
        } else if self.has_room() {
            None
        } else {
            self.patience.map(|p| since + p)
        }
    }

    /// Apply [`Viewer::deadline`].
    pub(super) fn check_deadline(&mut self, now: Instant) {
        if self.deadline().is_some_and(|d| now >= d) {
            if self.ending {
                self.queue.clear();
                self.deaf = true;
            } else {
                self.end_with(Kind::Lagged, &[]);
                self.stuck_since = Some(now);
            }
        }
    }

    /// Whether nothing is left to do for this client.
    pub(super) fn is_over(&self) -> bool {
        (self.deaf && !self.talking) || (self.ending && self.queue.is_empty())
    }

    /// Pass a chunk of output on, if the client wants that stream.
    pub(super) fn deliver(&mut self, kind: Kind, chunk: &[u8]) {
        let wanted = match kind {
            Kind::Stdout => self.stdout,
            Kind::Stderr => self.stderr,
            _ => true,
        };
        if !wanted || self.ending || self.deaf {
            return;
        }
        for payload in chunk.chunks(frame::MAX_PAYLOAD) {
            self.deliver_frame(kind, payload);
        }
    }

    fn deliver_frame(&mut self, kind: Kind, payload: &[u8]) {
        let header = frame::header(kind, payload.len());
        let mut sent = 0;
        if self.queue.is_empty() {
            let parts = [IoSlice::new(&header), IoSlice::new(payload)];
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match unless_blocked(|| sendmsg(&self.socket, &parts, &mut SendAncillaryBuffer::default(), flags))
            {
                Ok(n) => sent = n.unwrap_or(0),
                Err(_) => return self.lose(),
            }
        }
        self.queue.push(header.get(sent..).unwrap_or_default());
        self.queue.push(payload.get(sent.saturating_sub(header.len())..).unwrap_or_default());
        if !self.queue.is_empty() && self.stuck_since.is_none() {
            self.stuck_since = Some(Instant::now());
        }
    }

    /// Deliver a last frame and end.
    pub(super) fn end_with(&mut self, kind: Kind, payload: &[u8]) {
        self.deliver(kind, payload);
        if payload.is_empty() {
            self.queue.push(&frame::header(kind, 0));
            self.flush();
        }
        self.end();
    }

    /// Deliver what is buffered and end.
    pub(super) fn end(&mut self) {
        self.ending = true;
        self.talking = false;
        if !self.queue.is_empty() && self.stuck_since.is_none() {
            self.stuck_since = Some(Instant::now());
        }
    }

    /// Send what the socket takes.
    pub(super) fn flush(&mut self) {
        match self.queue.send(&self.socket) {
            Ok(_) if self.queue.is_empty() => self.stuck_since = None,
            Ok(0) => {}
            Ok(_) => self.stuck_since = Some(Instant::now()),
            Err(_) => self.lose(),
        }
    }

    /// The other side has closed.
    pub(super) fn lose(&mut self) {
        self.deaf = true;
        self.queue.clear();
        self.stuck_since = None;
    }
}

impl Drop for Viewer {
    /// Close so that the client sees a clean end: closing with unread input would be a reset.
    fn drop(&mut self) {
        if rustix::net::shutdown(&self.socket, Shutdown::Both).is_ok() {
            let mut rest = [0; 4096];
            while matches!(rustix::io::read(&self.socket, &mut rest), Ok(1..)) {}
        }
    }
}
