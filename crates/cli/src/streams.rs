//! Carrying bytes between the user and a container: the multiplexed output, standard input with its detach keys,
//! window size, and signals.

use std::future::Future;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, split};
use tokio::signal::unix::{SignalKind, signal};

use crate::client::{Client, Wire, encode};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::{output, terminal};

/// Ctrl-p, ctrl-q.
const DETACH_KEYS: &[u8] = &[16, 17];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Stdout,
    Stderr,
}

/// Takes the engine's eight-byte frames apart, whatever pieces they come in.
#[derive(Debug)]
pub struct Frames {
    header: [u8; 8],
    have: usize,
    left: usize,
    complaint: Vec<u8>,
}

impl Frames {
    pub fn new() -> Self {
        Self { header: [0; 8], have: 0, left: 0, complaint: Vec::new() }
    }

    /// Gives `put` each piece of payload; a frame of kind 3 is the engine's own complaint.
    pub fn feed(&mut self, mut bytes: &[u8], mut put: impl FnMut(Target, &[u8])) -> Outcome {
        while !bytes.is_empty() {
            if self.have < 8 {
                let take = (8 - self.have).min(bytes.len());
                self.header[self.have..self.have + take].copy_from_slice(&bytes[..take]);
                self.have += take;
                bytes = &bytes[take..];
                if self.have < 8 {
                    break;
                }
                let [.., a, b, c, d] = self.header;
                self.left = u32::from_be_bytes([a, b, c, d]) as usize;
            }
            let take = self.left.min(bytes.len());
            let piece = &bytes[..take];
            match self.header[0] {
                0 | 1 => put(Target::Stdout, piece),
                2 => put(Target::Stderr, piece),
                3 => self.complaint.extend_from_slice(piece),
                other => return Err(Fault::said(format!("Unrecognized input header: {other}"))),
            }
            bytes = &bytes[take..];
            self.left -= take;
            if self.left == 0 {
                self.have = 0;
                if self.header[0] == 3 {
                    let text = String::from_utf8_lossy(&self.complaint).trim_end().to_owned();
                    return Err(Fault::said(format!("error from daemon in stream: {text}")));
                }
            }
        }
        Ok(())
    }
}

pub fn put(target: Target, bytes: &[u8]) {
    match target {
        Target::Stdout => output::write_bytes(bytes),
        Target::Stderr => output::error_bytes(bytes),
    }
}

/// Finds the detach keys in typed input; what turns out not to be them goes on.
#[derive(Debug)]
struct Detector {
    keys: Vec<u8>,
    matched: usize,
}

impl Detector {
    /// Appends to `out` what goes to the container; true when the keys are complete.
    fn scan(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        for byte in typed {
            if self.keys.get(self.matched) == Some(byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    return true;
                }
                continue;
            }
            out.extend_from_slice(&self.keys[..self.matched]);
            self.matched = 0;
            if self.keys.first() == Some(byte) {
                self.matched = 1;
            } else {
                out.push(*byte);
            }
        }
        false
    }
}

#[derive(Debug)]
pub struct Session {
    pub wire: Wire,
    /// Bytes that came with the answer's head.
    pub early: Bytes,
    pub terminal: bool,
    pub stdin: bool,
    pub output: bool,
    pub detach_keys: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The container's side closed.
    Closed,
    /// The user typed the detach keys.
    Detached,
}

impl Session {
    /// Carries bytes both ways until the container's side closes or the user detaches.
    pub async fn run(self) -> Outcome<End> {
        let (mut from, mut to) = split(self.wire);
        let terminal = self.terminal;
        let early = self.early;
        let output = async move {
            let mut frames = Frames::new();
            let mut show = |bytes: &[u8]| {
                if terminal {
                    output::write_bytes(bytes);
                    Ok(())
                } else {
                    frames.feed(bytes, put)
                }
            };
            show(&early)?;
            let mut buffer = vec![0; 32 * 1024];
            loop {
                match from.read(&mut buffer).await {
                    Ok(0) => return Ok(()),
                    Ok(count) => show(&buffer[..count])?,
                    // The engine went away in the middle: as an end, with the wait telling more.
                    Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(()),
                    Err(error) => return Err(Fault::io("reading the container's output")(error)),
                }
            }
        };
        let keys = if terminal { self.detach_keys } else { Vec::new() };
        let wants_input = self.stdin;
        let input = async move {
            if !wants_input {
                return std::future::pending().await;
            }
            let mut stdin = tokio::io::stdin();
            let mut detector = Detector { keys, matched: 0 };
            let mut buffer = vec![0; 32 * 1024];
            let mut out = Vec::new();
            loop {
                let count = stdin.read(&mut buffer).await.unwrap_or(0);
                if count == 0 {
                    break;
                }
                out.clear();
                let detach = detector.scan(&buffer[..count], &mut out);
                if to.write_all(&out).await.is_err() {
                    // The container closed its input: what it writes still counts.
                    return End::Closed;
                }
                if detach {
                    return End::Detached;
                }
            }
            // Half-close: the container sees the end of its input and may go on writing.
            if to.shutdown().await.is_err() {
                return End::Closed;
            }
            // Keeps the writing half: dropping it is not what closes the stream.
            drop(to);
            End::Closed
        };
        tokio::pin!(output);
        tokio::pin!(input);
        let mut input_ended = false;
        loop {
            tokio::select! {
                result = &mut output, if self.output => return result.map(|()| End::Closed),
                end = &mut input, if !input_ended => match end {
                    End::Detached => return Ok(End::Detached),
                    End::Closed if !self.output => return Ok(End::Closed),
                    End::Closed => input_ended = true,
                },
            }
        }
    }
}

/// The detach keys: from the flag, else the configuration, else docker's.
pub fn detach_keys(context: &Context, flag: Option<&str>) -> Outcome<Vec<u8>> {
    let text = match flag {
        Some(text) => Some(text),
        None => context.config()?.text("detachKeys"),
    };
    match text {
        Some(text) => terminal::parse_detach_keys(text).map_err(Fault::Said),
        None => Ok(DETACH_KEYS.to_vec()),
    }
}

/// What has a terminal to be resized.
#[derive(Debug, Clone)]
pub enum Resized {
    Container(String),
    Exec(String),
}

impl Resized {
    pub async fn to(&self, client: &Client, height: u16, width: u16) -> Outcome {
        let path = match self {
            Self::Container(id) => format!("/containers/{}/resize", encode(id)),
            Self::Exec(id) => format!("/exec/{}/resize", encode(id)),
        };
        client.post(path).query("h", &height.to_string()).query("w", &width.to_string()).done().await
    }

    /// Follows the terminal's size until dropped. `now` also sets it first, again and again until the process is there.
    pub async fn follow(self, client: &Client, now: bool) {
        let Ok(mut changes) = signal(SignalKind::window_change()) else {
            return std::future::pending().await;
        };
        if now {
            for attempt in 1..=10u64 {
                let Some((height, width)) = terminal::size() else { break };
                if self.to(client, height, width).await.is_ok() {
                    break;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10 * attempt)).await;
            }
        }
        while changes.recv().await.is_some() {
            if let Some((height, width)) = terminal::size() {
                // A process that just ended cannot be resized, and need not be.
                drop(self.to(client, height, width).await);
            }
        }
    }
}

/// The signals a client passes on to its container.
const PROXIED: &[(i32, &str)] = &[
    (libc::SIGHUP, "HUP"),
    (libc::SIGINT, "INT"),
    (libc::SIGQUIT, "QUIT"),
    (libc::SIGABRT, "ABRT"),
    (libc::SIGUSR1, "USR1"),
    (libc::SIGUSR2, "USR2"),
    (libc::SIGALRM, "ALRM"),
    (libc::SIGTERM, "TERM"),
    (libc::SIGCONT, "CONT"),
    (libc::SIGTSTP, "TSTP"),
    (libc::SIGTTIN, "TTIN"),
    (libc::SIGTTOU, "TTOU"),
    (libc::SIGVTALRM, "VTALRM"),
    (libc::SIGPROF, "PROF"),
    (libc::SIGIO, "IO"),
    (libc::SIGPWR, "PWR"),
];

/// Signals caught from now on, to be passed on when the container runs.
#[derive(Debug)]
pub struct Caught(tokio::sync::mpsc::UnboundedReceiver<&'static str>);

impl Caught {
    pub fn all() -> Self {
        let (send, receive) = tokio::sync::mpsc::unbounded_channel();
        for (number, name) in PROXIED {
            let Ok(mut stream) = signal(SignalKind::from_raw(*number)) else { continue };
            let send = send.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    if send.send(*name).is_err() {
                        break;
                    }
                }
            });
        }
        Self(receive)
    }

    pub async fn pass_on(mut self, client: &Client, id: &str) {
        while let Some(name) = self.0.recv().await {
            // The container may have ended meanwhile; its end is reported otherwise.
            drop(client.post(format!("/containers/{}/kill", encode(id))).query("signal", name).done().await);
        }
        std::future::pending::<()>().await;
    }
}

/// Returns when a signal asks the command to end; a second one ends the process at once.
pub async fn interrupted() -> Fault {
    let number = ending_signal().await;
    tokio::spawn(async {
        let number = ending_signal().await;
        terminal::restore();
        std::process::exit(128 + number);
    });
    Fault::Coded { text: "the build was cancelled".to_owned(), code: 128 + number }
}

/// Ends the process in order, the terminal restored, when a signal asks to.
pub async fn end_on_signal() {
    let number = ending_signal().await;
    terminal::restore();
    std::process::exit(128 + number);
}

/// Waits for a signal that asks for the end.
async fn ending_signal() -> i32 {
    let mut ends: Vec<_> =
        [(SignalKind::hangup(), 1), (SignalKind::terminate(), 15), (SignalKind::interrupt(), 2)]
            .into_iter()
            .filter_map(|(kind, number)| signal(kind).ok().map(|stream| (stream, number)))
            .collect();
    let waits = ends.iter_mut().map(|(stream, number)| {
        Box::pin(async move {
            stream.recv().await;
            *number
        })
    });
    futures_util::future::select_all(waits).await.0
}

/// Runs `main` while the endless `aside` runs beside it.
pub async fn beside<T>(main: impl Future<Output = T>, aside: impl Future<Output = ()>) -> T {
    tokio::pin!(main);
    tokio::pin!(aside);
    tokio::select! {
        biased;
        result = &mut main => result,
        () = &mut aside => main.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_any_cut() {
        let mut stream = Vec::new();
        for (kind, text) in [(1u8, "out"), (2, "err"), (1, ""), (1, "more")] {
            stream.extend([kind, 0, 0, 0]);
            stream.extend((text.len() as u32).to_be_bytes());
            stream.extend(text.as_bytes());
        }
        for size in 1..stream.len() {
            let mut frames = Frames::new();
            let (mut out, mut err) = (Vec::new(), Vec::new());
            for piece in stream.chunks(size) {
                frames
                    .feed(piece, |target, bytes| match target {
                        Target::Stdout => out.extend_from_slice(bytes),
                        Target::Stderr => err.extend_from_slice(bytes),
                    })
                    .unwrap();
            }
            assert_eq!((out.as_slice(), err.as_slice()), (&b"outmore"[..], &b"err"[..]), "pieces of {size}");
        }
    }

    #[test]
    fn the_engines_complaint_ends_the_stream() {
        let mut frames = Frames::new();
        let fault = frames.feed(b"\x03\0\0\0\0\0\0\x03bad", |_, _| {}).unwrap_err();
        assert_eq!(fault.to_string(), "error from daemon in stream: bad");
    }

    #[test]
    fn half_typed_detach_keys_reach_the_container() {
        let mut detector = Detector { keys: vec![16, 17], matched: 0 };
        let mut out = Vec::new();
        assert!(!detector.scan(b"a\x10", &mut out));
        assert_eq!(out, b"a");
        assert!(!detector.scan(b"\x10b", &mut out));
        assert_eq!(out, b"a\x10\x10b");
        assert!(detector.scan(b"c\x10\x11d", &mut out));
        assert_eq!(out, b"a\x10\x10bc");
    }
}
