//! Where a log goes beside its file: syslog, journald, fluentd or Graylog, by a thread with a bounded queue.
//!
//! Invariants: the monitor's own thread never waits for a collector; what may wait is bounded; with a full queue the
//! container's output is held back (`blocking`, docker's default) or the new pieces are dropped and counted, while the
//! file has all of them either way.

mod connection;
mod fluentd;
mod gelf;
mod journald;
mod syslog;

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{EventfdFlags, eventfd};

use super::Source;
use crate::config::{Endpoint, Retry, SinkConfig, SinkKind};
use connection::Connection;

/// The first wait after a failure; each further one is twice as long.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(10);
/// How long one write to a collector may take.
const WRITE: Duration = Duration::from_secs(5);
/// How long the monitor, at its end, waits for the collector to take what is left, ...
const FAREWELL: Duration = Duration::from_secs(5);
/// ... and how long for one that takes nothing.
const PATIENCE: Duration = Duration::from_secs(2);

/// One line, or piece of one, on its way.
#[derive(Debug)]
struct Piece {
    source: Source,
    time: SystemTime,
    /// Without the newline.
    text: Vec<u8>,
    /// The line goes on.
    partial: bool,
}

/// Sends to `endpoint`, over `connection` if there is one; it is given up when that fails.
fn send_to(
    connection: &mut Option<Connection>,
    endpoint: &Endpoint,
    limit: Duration,
    message: &[u8],
) -> io::Result<()> {
    let mut open = match connection.take() {
        Some(open) => open,
        None => Connection::open(endpoint, limit)?,
    };
    open.send(message)?;
    *connection = Some(open);
    Ok(())
}

/// Whether a collector is there: connects, shakes hands, and leaves.
pub fn reach(endpoint: &Endpoint, limit: Duration) -> io::Result<()> {
    Connection::open(endpoint, limit).map(drop)
}

/// A way to a collector, connected when it is needed.
trait Collector: Send {
    fn send(&mut self, piece: &Piece) -> io::Result<()>;
}

/// The monitor's end of the thread.
#[derive(Debug)]
pub(crate) struct Sink {
    shared: Arc<Shared>,
    limit: usize,
    blocking: bool,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Readable when a full queue has room again.
    room: OwnedFd,
}

#[derive(Debug, Default)]
struct Queue {
    pieces: VecDeque<Piece>,
    bytes: usize,
    was_full: bool,
    closed: bool,
    /// Pieces the collector has taken, and those that were given up.
    taken: u64,
    /// The thread has delivered all there was to a closed queue.
    done: bool,
    lost: u64,
    error: Option<String>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink {
    /// Starts the thread.
    pub(crate) fn start(config: &SinkConfig) -> io::Result<Self> {
        let room = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new(), room });
        let collector: Box<dyn Collector> = match &config.kind {
            SinkKind::Syslog(config) => Box::new(syslog::Syslog::new(config.clone())),
            SinkKind::Journald(config) => Box::new(journald::Journald::new(config)?),
            SinkKind::Fluentd(config) => Box::new(fluentd::Fluentd::new(config.clone())),
            SinkKind::Gelf(config) => Box::new(gelf::Gelf::new(config.clone())),
        };
        let limit = usize::try_from(config.buffer).unwrap_or(usize::MAX).max(1);
        let patience = config.retry.clone();
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("brig-log".to_owned())
                // Of which only what is used is memory; a handshake of TLS goes deep.
                .stack_size(512 << 10)
                .spawn(move || deliver(&shared, collector, limit, &patience))?
        };
        Ok(Self { shared, limit, blocking: config.blocking, thread: Some(thread) })
    }

    /// Hands a piece on; `text` may end with the line's newline.
    pub(crate) fn push(&self, source: Source, text: &[u8]) {
        let (text, partial) = match text.strip_suffix(b"\n") {
            Some(line) => (line, false),
            None => (text, true),
        };
        if text.is_empty() && !partial {
            // Collectors have no use for an empty line.
            return;
        }
        let mut queue = self.shared.lock();
        if !self.blocking && queue.bytes >= self.limit {
            queue.lost += text.len() as u64;
            return;
        }
        queue.bytes += text.len();
        queue.was_full |= queue.bytes >= self.limit;
        queue.pieces.push_back(Piece { source, time: SystemTime::now(), text: text.to_vec(), partial });
        self.shared.changed.notify_all();
    }

    /// Whether output may be read: a full queue holds it back if it is to block.
    pub(crate) fn has_room(&self) -> bool {
        !self.blocking || self.shared.lock().bytes < self.limit
    }

    /// Readable when there is room again.
    pub(crate) fn room(&self) -> &OwnedFd {
        &self.shared.room
    }

    /// Takes note of the room.
    pub(crate) fn hear(&self) {
        let mut count = [0; 8];
        while rustix::io::read(&self.shared.room, &mut count).is_ok_and(|n| n > 0) {}
    }

    /// Bytes dropped, and the last failure.
    pub(crate) fn losses(&self) -> (u64, Option<String>) {
        let queue = self.shared.lock();
        (queue.lost, queue.error.clone())
    }

    /// Waits a little for the collector to take what is left; the thread of one that does not ends with the process.
    pub(crate) fn close(mut self) {
        let end = Instant::now() + FAREWELL;
        let mut until = Instant::now() + PATIENCE;
        let mut queue = self.shared.lock();
        let mut taken = queue.taken;
        queue.closed = true;
        self.shared.changed.notify_all();
        while !queue.done {
            if queue.taken != taken {
                taken = queue.taken;
                until = Instant::now() + PATIENCE;
            }
            let left = until.min(end).saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = self.shared.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(queue);
        if let Some(thread) = self.thread.take() {
            // A panic in it has told itself already, and there is nothing to do about it.
            drop(thread.join());
        }
    }
}

/// The thread: one piece after the other, in order; a failed one is tried again until it is taken, or given up.
fn deliver(shared: &Shared, mut collector: Box<dyn Collector>, limit: usize, patience: &Retry) {
    let first = patience.wait.unwrap_or(FIRST_RETRY);
    let mut retry = first;
    let mut attempts = 0;
    loop {
        let piece = {
            let mut queue = shared.lock();
            loop {
                if let Some(piece) = queue.pieces.pop_front() {
                    break piece;
                }
                if queue.closed {
                    queue.done = true;
                    shared.changed.notify_all();
                    return;
                }
                queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let size = piece.text.len();
        let sent = collector.send(&piece);
        let mut queue = shared.lock();
        let given_up = sent.is_err() && patience.attempts.is_some_and(|most| attempts >= most);
        if given_up {
            queue.lost += size as u64;
        }
        match sent {
            Err(error) if !given_up => {
                queue.error = Some(error.to_string());
                queue.pieces.push_front(piece);
                // A new piece does not hurry it.
                let until = Instant::now() + retry;
                loop {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    queue =
                        shared.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
                }
                attempts += 1;
                if patience.wait.is_none() {
                    retry = (retry * 2).min(LONGEST_RETRY);
                }
            }
            ended => {
                if let Err(error) = ended {
                    queue.error = Some(error.to_string());
                }
                retry = first;
                attempts = 0;
                queue.taken += 1;
                queue.bytes -= size;
                if queue.was_full && queue.bytes < limit / 2 + 1 {
                    queue.was_full = false;
                    if let Err(_full) = rustix::io::write(&shared.room, &1_u64.to_ne_bytes()) {
                        // A full counter is readable as well.
                    }
                }
                shared.changed.notify_all();
            }
        }
    }
}
