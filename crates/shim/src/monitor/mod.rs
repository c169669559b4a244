//! The monitor process: one container, one thread, one `poll` loop.
//!
//! Everything is level-triggered: each turn asks the kernel only for what can be acted on now (output is read only while
//! every attached client has room, input only while the last bytes have been passed on), so there is no state of
//! registrations to get wrong, and nothing is buffered without a bound. While nothing happens the monitor owns next to no
//! memory: buffers are given back after a moment of silence.

mod boot;
mod container;
mod control;
mod end;
mod execs;
mod foreign;
mod queue;
mod relay;
mod requests;
mod viewer;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use brigantine_runtime::Cgroup;
use brigantine_runtime::cgroup::OomWatch;
use brigantine_sys::signals::SignalFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::boot::Home;
use self::container::Container;
use self::control::{Connection, Subscriber};
use self::end::Ending;
use self::execs::Execs;
use self::relay::Relay;
use crate::log::LogFile;
use crate::protocol::Event;
use crate::time::Timestamp;

/// Silence after which buffers are given back.
const IDLE: Duration = Duration::from_millis(500);

/// How long after a notice that memory has run out to look for the kill.
const OOM_RECHECK: Duration = Duration::from_millis(20);

/// What a descriptor that is waited for belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Signals,
    Listener,
    Oom,
    /// The log's collector has room again.
    Collector,
    Connection(u32),
    Subscriber(u32),
    Stream(Owner, Stream),
}

/// Whose streams they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Container,
    Exec(u32),
}

/// Which of a process's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Output(usize),
    Input,
    Viewer(u32),
}

/// What one turn waits for.
#[derive(Default)]
struct Wants<'fd> {
    fds: Vec<PollFd<'fd>>,
    tokens: Vec<Token>,
    deadline: Option<Instant>,
}

impl<'fd> Wants<'fd> {
    fn watch(&mut self, token: Token, fd: &'fd impl AsFd, flags: PollFlags) {
        self.fds.push(PollFd::new(fd, flags));
        self.tokens.push(token);
    }

    fn wake_at(&mut self, deadline: Instant) {
        self.deadline = Some(self.deadline.map_or(deadline, |d| d.min(deadline)));
    }
}

/// One container's monitor.
struct Monitor {
    home: Home,
    signals: SignalFd,
    listener: UnixListener,
    container: Container,
    cgroup: Cgroup,
    oom: Option<OomWatch>,
    oom_kills: u64,
    /// When, and how often still, to look whether the kernel has killed what it warned of.
    oom_recheck: Option<(Instant, u8)>,
    paused: bool,
    started_at: Timestamp,
    log: Option<LogFile>,
    relay: Relay,
    execs: Execs,
    connections: Vec<Connection>,
    subscribers: Vec<Subscriber>,
    next_id: u32,
    ending: Option<Ending>,
    /// Read into; empty while idle.
    scratch: Vec<u8>,
    /// When something last happened, while there are buffers to give back.
    busy_since: Option<Instant>,
    /// Nothing has happened for a while: the next wait is one with little memory.
    calm: bool,
    finished: bool,
}

/// Run the monitor to its exit status; what `brig-runtime shim` does. Its standard input is the socket that [`crate::spawn`] talks to.
pub fn main() -> u8 {
    match boot::boot() {
        Ok(mut monitor) => {
            monitor.run();
            0
        }
        Err(()) => 1,
    }
}

impl Monitor {
    fn run(&mut self) {
        while !self.finished {
            let calm = std::mem::take(&mut self.calm);
            let ready = match self.wait(calm) {
                Ok(ready) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                // Only a lack of kernel memory is left; try again rather than lose the container.
                Err(_) => {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
            };
            if !ready.is_empty() {
                self.busy_since = Some(Instant::now());
            }
            for (token, flags) in ready {
                self.dispatch(token, flags);
            }
            self.housekeeping();
        }
        if let Some(log) = self.log.take() {
            log.close();
        }
    }

    /// Wait until something can be done, or a deadline has come.
    fn wait(&self, calm: bool) -> rustix::io::Result<Vec<(Token, PollFlags)>> {
        let mut wants = Wants::default();
        wants.watch(Token::Signals, &self.signals, PollFlags::IN);
        if self.connections.len() < control::MAX_CONNECTIONS {
            wants.watch(Token::Listener, &self.listener, PollFlags::IN);
        }
        if let Some(oom) = &self.oom {
            wants.watch(Token::Oom, oom, PollFlags::IN);
        }
        for connection in &self.connections {
            connection.wants(&mut wants);
        }
        for subscriber in &self.subscribers {
            subscriber.wants(&mut wants);
        }
        // A collector that cannot keep up holds back the container's output if it is to.
        let sink = self.log.as_ref().and_then(LogFile::sink);
        let held = sink.is_some_and(|sink| !sink.has_room());
        if let Some(sink) = sink.filter(|_| held) {
            wants.watch(Token::Collector, sink.room(), PollFlags::IN);
        }
        self.relay.wants(Owner::Container, held, &mut wants);
        self.execs.wants(&mut wants);
        if let Some(ending) = &self.ending {
            ending.wants(&mut wants);
        }
        if let Some((at, _)) = self.oom_recheck {
            wants.wake_at(at);
        }
        if let Some(since) = self.busy_since {
            wants.wake_at(since + IDLE);
        }
        let timeout = wants.deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
        });
        if calm {
            brigantine_sys::daemonize::poll_with_little_memory(&mut wants.fds, timeout.as_ref())?;
        } else {
            poll(&mut wants.fds, timeout.as_ref())?;
        }
        let Wants { fds, tokens, .. } = wants;
        let ready = fds.iter().zip(tokens).map(|(fd, token)| (token, fd.revents()));
        Ok(ready.filter(|(_, flags)| !flags.is_empty()).collect())
    }

    fn dispatch(&mut self, token: Token, flags: PollFlags) {
        match token {
            Token::Signals => self.on_signals(),
            Token::Listener => self.accept(),
            Token::Oom => self.on_oom(),
            Token::Collector => {
                if let Some(sink) = self.log.as_ref().and_then(LogFile::sink) {
                    sink.hear();
                }
            }
            Token::Connection(id) => self.on_connection(id, flags),
            Token::Subscriber(id) => self.on_subscriber(id, flags),
            Token::Stream(owner, stream) => self.on_stream(owner, stream, flags),
        }
    }

    fn on_stream(&mut self, owner: Owner, stream: Stream, flags: PollFlags) {
        let (relay, log) = match owner {
            Owner::Container => (&mut self.relay, self.log.as_mut()),
            Owner::Exec(key) => match self.execs.relay(key) {
                Some(relay) => (relay, None),
                None => return,
            },
        };
        match stream {
            Stream::Output(which) => {
                self.scratch.resize(relay::READ, 0);
                relay.on_output(which, &mut self.scratch, log);
            }
            Stream::Input => relay.on_input(flags),
            Stream::Viewer(id) => relay.on_viewer(id, flags),
        }
    }

    /// What follows from a turn's changes rather than from one descriptor.
    fn housekeeping(&mut self) {
        let now = Instant::now();
        self.relay.housekeeping(now);
        self.recheck_oom(now);
        self.settle_execs(now);
        self.connections.retain(|c| !c.is_over(now));
        self.settle_end(now);
        if self.busy_since.is_some_and(|since| now >= since + IDLE) {
            self.busy_since = None;
            self.scratch = Vec::new();
            self.relay.shrink();
            if let Some(log) = &mut self.log {
                log.shrink();
            }
            self.calm = true;
        }
    }

    fn on_oom(&mut self) {
        if let Some(oom) = &self.oom {
            oom.clear();
        }
        // On cgroup v1 the notice comes before the kill.
        self.oom_recheck = Some((Instant::now() + OOM_RECHECK, 10));
        self.count_oom_kills();
    }

    fn count_oom_kills(&mut self) {
        let kills = self.cgroup.oom_kills().unwrap_or(self.oom_kills);
        if kills > self.oom_kills {
            self.oom_kills = kills;
            self.oom_recheck = None;
            self.publish(&Event::Oom);
        }
    }

    fn recheck_oom(&mut self, now: Instant) {
        if let Some((at, left)) = self.oom_recheck
            && now >= at
        {
            self.oom_recheck = (left > 1).then_some((now + OOM_RECHECK, left - 1));
            self.count_oom_kills();
        }
    }

    fn next_id(&mut self) -> u32 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }
}

/// Do something without blocking: `None` if it would block, the error otherwise; interruptions are retried.
fn unless_blocked<T>(mut operation: impl FnMut() -> rustix::io::Result<T>) -> io::Result<Option<T>> {
    loop {
        match operation() {
            Ok(value) => return Ok(Some(value)),
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
