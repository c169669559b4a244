//! The standard streams of one process: its output to the log and the attached clients, their input to it.
//!
//! The two directions never wait for each other: output is held up only by clients that do not read, input only by the
//! process not reading.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use brigantine_runtime::Stdio;
use rustix::event::PollFlags;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{LocalModes, SpecialCodeIndex, Winsize, tcgetattr, tcsetwinsize};

use super::viewer::Viewer;
use super::{Owner, Stream, Token, Wants, unless_blocked};
use crate::config::ConsoleSize;
use crate::frame::Kind;
use crate::log::{LogFile, Source};

/// Bytes read at once: what a pipe holds.
pub(super) const READ: usize = 64 << 10;

/// How long a terminal that nobody in the container has open is left alone before it is looked at again.
const RECHECK_TERMINAL: Duration = Duration::from_millis(200);

/// One process's streams.
#[derive(Debug)]
pub(super) struct Relay {
    terminal: bool,
    input: Option<Input>,
    outputs: [Option<OwnedFd>; 2],
    viewers: Vec<Viewer>,
    /// The terminal has no other side until this moment, at least.
    parked_until: Option<Instant>,
    /// The process has ended: what is left in the pipes is read whatever the clients do.
    draining: bool,
}

#[derive(Debug)]
struct Input {
    fd: OwnedFd,
    pending: Vec<u8>,
    passed: usize,
    /// Close after what is pending.
    closing: bool,
    /// The first client to stop talking closes it.
    once: bool,
}

/// The process's side of its streams, and what the relay will hold of it.
pub(super) struct Plumbing {
    pub(super) stdio: Stdio,
    relay: Relay,
}

impl Plumbing {
    /// Pipes; or a terminal, which [`Plumbing::connect`] gets from the runtime.
    pub(super) fn new(terminal: bool, open_stdin: bool, once: bool) -> io::Result<Self> {
        let mut relay = Relay {
            terminal,
            input: None,
            outputs: [None, None],
            viewers: Vec::new(),
            parked_until: None,
            draining: false,
        };
        if terminal {
            return Ok(Self { stdio: Stdio::Terminal, relay });
        }
        let stdin = if open_stdin {
            let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
            relay.input = Some(Input::new(ours, once)?);
            theirs
        } else {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::open("/dev/null", flags, rustix::fs::Mode::empty())?
        };
        let (out, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
        let (err, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&out, true)?;
        rustix::io::ioctl_fionbio(&err, true)?;
        relay.outputs = [Some(out), Some(err)];
        Ok(Self { stdio: Stdio::Fds { stdin, stdout, stderr }, relay })
    }

    /// Split into what the process gets and what is left.
    pub(super) fn split(self) -> (Stdio, Relay) {
        (self.stdio, self.relay)
    }
}

impl Input {
    fn new(fd: OwnedFd, once: bool) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd, pending: Vec::new(), passed: 0, closing: false, once })
    }
}

impl Relay {
    /// Take over the terminal that the runtime has opened, with input if `open_stdin`.
    pub(super) fn connect_terminal(
        &mut self,
        master: OwnedFd,
        size: Option<ConsoleSize>,
        open_stdin: bool,
        once: bool,
    ) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&master, true)?;
        if open_stdin {
            self.input = Some(Input::new(master.try_clone()?, once)?);
        }
        self.outputs[0] = Some(master);
        match size {
            Some(size) => self.resize(size),
            None => Ok(()),
        }
    }

    /// Add a client.
    pub(super) fn attach(&mut self, viewer: Viewer) {
        self.viewers.push(viewer);
    }

    /// Drop the clients with this key without any effect on the input; whether there were any.
    pub(super) fn detach(&mut self, key: &str) -> bool {
        let before = self.viewers.len();
        self.viewers.retain(|v| v.key != key);
        self.viewers.len() < before
    }

    /// Set the terminal's size.
    pub(super) fn resize(&self, size: ConsoleSize) -> io::Result<()> {
        let Some(master) = self.outputs[0].as_ref().filter(|_| self.terminal) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the process has no terminal"));
        };
        let size = Winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(master, size)?)
    }

    /// Close the input after what is pending.
    pub(super) fn close_input(&mut self) {
        if let Some(input) = &mut self.input {
            input.closing = true;
        }
        self.pass_input();
    }

    /// The process has ended.
    pub(super) fn drain(&mut self) {
        self.draining = true;
        self.parked_until = None;
        self.input = None;
    }

    /// Give up what somebody else still holds open.
    pub(super) fn abandon(&mut self, log: Option<&mut LogFile>) {
        let open = [self.outputs[0].take().is_some(), self.outputs[1].take().is_some()];
        if let Some(log) = log {
            for (source, _) in
                [Source::Stdout, Source::Stderr].into_iter().zip(open).filter(|(_, open)| *open)
            {
                log.finish(source);
            }
        }
    }

    /// Whether all output has been read.
    pub(super) fn is_drained(&self) -> bool {
        self.outputs.iter().all(Option::is_none)
    }

    /// Whether clients are still to be served.
    pub(super) fn is_viewed(&self) -> bool {
        !self.viewers.is_empty()
    }

    /// All clients get a last frame, if there is one, and the end.
    pub(super) fn end(&mut self, last: Option<(Kind, &[u8])>) {
        for viewer in &mut self.viewers {
            match last {
                Some((kind, payload)) => viewer.end_with(kind, payload),
                None => viewer.end(),
            }
        }
        self.viewers.retain(|v| !v.is_over());
    }

    pub(super) fn wants<'fd>(&'fd self, owner: Owner, held: bool, wants: &mut Wants<'fd>) {
        let room = self.draining || !held && self.viewers.iter().all(Viewer::has_room);
        if let Some(until) = self.parked_until {
            wants.wake_at(until);
        } else if room {
            for (which, output) in self.outputs.iter().enumerate() {
                if let Some(fd) = output {
                    wants.watch(Token::Stream(owner, Stream::Output(which)), fd, PollFlags::IN);
                }
            }
        }
        if let Some(input) = &self.input {
            if !input.pending.is_empty() {
                wants.watch(Token::Stream(owner, Stream::Input), &input.fd, PollFlags::OUT);
            } else if !self.terminal {
                // Without events to wait for, the closing of the other end is still told.
                wants.watch(Token::Stream(owner, Stream::Input), &input.fd, PollFlags::empty());
            }
        }
        // Input is taken while there is room for it, or nowhere for it to go.
        let hear = self.input.as_ref().is_none_or(|i| i.pending.is_empty());
        for viewer in &self.viewers {
            if let Some(flags) = viewer.interest(hear) {
                wants.watch(Token::Stream(owner, Stream::Viewer(viewer.id)), &viewer.socket, flags);
            }
            if let Some(deadline) = viewer.deadline() {
                wants.wake_at(deadline);
            }
        }
    }

    /// Output can be read.
    pub(super) fn on_output(&mut self, which: usize, scratch: &mut [u8], log: Option<&mut LogFile>) {
        let Some(fd) = &self.outputs[which] else { return };
        let (kind, source) =
            if which == 0 { (Kind::Stdout, Source::Stdout) } else { (Kind::Stderr, Source::Stderr) };
        match rustix::io::read(fd, &mut *scratch) {
            Ok(n) if n > 0 => {
                let chunk = &scratch[..n];
                if let Some(log) = log {
                    log.append(source, chunk);
                }
                for viewer in &mut self.viewers {
                    viewer.deliver(kind, chunk);
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            // Nobody has the terminal open now. While the process lives somebody may open it again.
            Err(Errno::IO) if self.terminal && !self.draining => {
                self.parked_until = Some(Instant::now() + RECHECK_TERMINAL);
            }
            Ok(_) | Err(_) => {
                self.outputs[which] = None;
                if let Some(log) = log {
                    log.finish(source);
                }
            }
        }
    }

    /// The process takes input again, or has closed its end.
    pub(super) fn on_input(&mut self, flags: PollFlags) {
        if flags.intersects(PollFlags::ERR | PollFlags::NVAL) && !self.terminal {
            self.input = None;
        } else {
            self.pass_input();
        }
    }

    fn pass_input(&mut self) {
        let Some(input) = &mut self.input else { return };
        while input.passed < input.pending.len() {
            match unless_blocked(|| rustix::io::write(&input.fd, &input.pending[input.passed..])) {
                Ok(Some(n)) => input.passed += n,
                Ok(None) => return,
                Err(_) => {
                    self.input = None;
                    return;
                }
            }
        }
        input.pending.clear();
        input.passed = 0;
        if input.closing {
            self.input = None;
        }
    }

    /// A client takes output, has said something, or has closed.
    pub(super) fn on_viewer(&mut self, id: u32, flags: PollFlags) {
        let Some(at) = self.viewers.iter().position(|v| v.id == id) else { return };
        let viewer = &mut self.viewers[at];
        if flags.contains(PollFlags::OUT) {
            viewer.flush();
        }
        if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
            viewer.lose();
        }
        if flags.contains(PollFlags::IN) {
            self.hear(at);
        }
        if self.viewers[at].is_over() {
            self.viewers.remove(at);
        }
    }

    /// Take input from a client. Without an input it goes nowhere.
    fn hear(&mut self, at: usize) {
        let viewer = &mut self.viewers[at];
        if !viewer.talking {
            return;
        }
        let mut nowhere = Vec::new();
        let pending = match &mut self.input {
            Some(input) if !input.pending.is_empty() => return,
            Some(input) => &mut input.pending,
            None => &mut nowhere,
        };
        pending.resize(READ, 0);
        match unless_blocked(|| rustix::io::read(&viewer.socket, &mut pending[..])) {
            Ok(Some(n)) if n > 0 => {
                pending.truncate(n);
                self.pass_input();
            }
            Ok(None) => pending.clear(),
            Ok(Some(_)) | Err(_) => {
                pending.clear();
                viewer.talking = false;
                let vanished = viewer.deaf;
                self.on_silence(vanished);
            }
        }
    }

    /// A client has stopped talking for good.
    fn on_silence(&mut self, vanished: bool) {
        let Some(input) = &mut self.input else { return };
        if !input.once {
            return;
        }
        if !self.terminal {
            input.closing = true;
        } else if !vanished
            && let Ok(modes) = tcgetattr(&input.fd)
            && modes.local_modes.contains(LocalModes::ICANON)
        {
            input.pending.push(modes.special_codes[SpecialCodeIndex::VEOF]);
        }
        self.pass_input();
    }

    pub(super) fn housekeeping(&mut self, now: Instant) {
        for viewer in &mut self.viewers {
            viewer.check_deadline(now);
        }
        self.viewers.retain(|v| !v.is_over());
        if self.parked_until.is_some_and(|until| now >= until) {
            self.parked_until = None;
        }
    }

    /// Give back memory that is not needed now.
    pub(super) fn shrink(&mut self) {
        if let Some(input) = &mut self.input
            && input.pending.is_empty()
        {
            input.pending = Vec::new();
        }
    }
}
