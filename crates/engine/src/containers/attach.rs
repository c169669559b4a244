//! Attached streams: a client's connection on one side, a shim's framed socket on the other.
//!
//! Attaching before the start makes a socket pair whose one end waits for the shim: what the container prints in its
//! first instant is in it. Frames of a container without a terminal pass through unchanged; with one they are taken off.

use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use brigantine_shim::{AttachOptions, AttachStream, frame};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use super::logs::{LogRequest, Logs};
use super::{Container, Containers, Status};
use crate::error::Context;
use crate::ids::new_id;
use crate::{Error, Result};

/// What a client wants of a container's streams.
#[derive(Debug, Clone, Default)]
pub struct AttachRequest {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    /// Live streams.
    pub stream: bool,
    /// What has been logged so far, first.
    pub logs: bool,
    /// Docker's notation, `ctrl-p,ctrl-q` when empty.
    pub detach_keys: String,
    /// Bytes without frames, also without a terminal (websockets).
    pub unframed: bool,
}

/// An attachment that is ready to be joined to a client's connection.
#[derive(Debug)]
pub struct Attached {
    containers: Arc<Containers>,
    container: Arc<Container>,
    tty: bool,
    raw: bool,
    stdin: bool,
    key: String,
    detach_keys: Vec<u8>,
    stream: Option<UnixStream>,
    logs: Option<Logs>,
}

impl Containers {
    /// Attaches to a container, running or not.
    pub async fn attach(self: &Arc<Self>, reference: &str, request: AttachRequest) -> Result<Attached> {
        let container = self.find(reference)?;
        let keys = detach_keys(&request.detach_keys)?;
        // No start is under way while this is held: either the shim is asked, or the next start gets the stream.
        let lifecycle = container.lifecycle.lock().await;
        match container.status() {
            Status::Paused => {
                return Err(Error::conflict(format!(
                    "container {reference} is paused, unpause the container before attach"
                )));
            }
            Status::Restarting => {
                return Err(Error::conflict(format!(
                    "container {} is restarting, wait until the container is running",
                    container.id
                )));
            }
            Status::Removing | Status::Dead => {
                return Err(Error::conflict(format!("container {} is being removed", container.id)));
            }
            _ => {}
        }
        let (tty, stdin_open) =
            container.with(|inner| (inner.record.tty(), inner.record.config.open_stdin.unwrap_or_default()));
        let logs = if request.logs {
            let wanted =
                LogRequest { stdout: request.stdout, stderr: request.stderr, ..LogRequest::default() };
            Some(self.logs_of(&container, wanted, request.unframed)?)
        } else {
            None
        };
        let key = new_id();
        let stdin = request.stdin && stdin_open;
        let stream = if request.stream {
            let options = AttachOptions {
                key: key.clone(),
                stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                patience: None,
            };
            let stream = if let Some(live) = container.live() {
                live.ask(move |client| client.attach(&options))
                    .await
                    .doing(|| format!("attach to container {}", container.id))?
            } else {
                let (ours, theirs) = StdUnixStream::pair().doing(|| "make a socket pair".to_owned())?;
                container.with(|inner| inner.attaching.push(AttachStream { stream: theirs, options }));
                ours
            };
            Some(asynchronous(stream)?)
        } else {
            None
        };
        self.publish(&container, "attach", &[]);
        drop(lifecycle);
        Ok(Attached {
            containers: Arc::clone(self),
            container,
            tty,
            raw: tty || request.unframed,
            stdin,
            key,
            detach_keys: keys,
            stream,
            logs,
        })
    }
}

impl Attached {
    /// Whether bytes go unframed.
    pub fn tty(&self) -> bool {
        self.tty
    }

    /// Copies until the container's output or the client ends, or the client detaches by keys.
    pub async fn join<C: AsyncRead + AsyncWrite + Unpin>(mut self, mut client: C) -> std::io::Result<()> {
        if let Some(mut logs) = self.logs.take() {
            while let Some(chunk) = logs.next().await {
                client.write_all(&chunk).await?;
            }
        }
        if let Some(mut stream) = self.stream.take() {
            let keys = if self.tty { &self.detach_keys[..] } else { &[] };
            let joined = join(client, &mut stream, self.raw, self.stdin, keys, |_record| {}).await;
            if let Joined::Detached = joined {
                // Before the stream is closed, which could be taken for the end of the input.
                if let Some(live) = self.container.live() {
                    let key = self.key.clone();
                    if let Err(error) = live.ask(move |client| client.detach(&key)).await
                        && !error.is_gone()
                    {
                        tracing::debug!(container = self.container.id, %error, "detach");
                    }
                }
                self.containers.publish(&self.container, "detach", &[]);
            }
        } else {
            client.shutdown().await?;
        }
        Ok(())
    }
}

impl Drop for Attached {
    /// A client that left before the start leaves nothing waiting for it.
    fn drop(&mut self) {
        if self.container.live().is_none() {
            self.container.with(|inner| inner.attaching.retain(|attach| attach.options.key != self.key));
        }
    }
}

/// How a joined pair of streams ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Joined {
    /// The container's side is done.
    Ended,
    /// The client went away.
    ClientGone,
    /// The client typed the detach keys, or has no more to type on a terminal.
    Detached,
}

/// Joins a client to a shim's framed stream, which stays open when this is done. `detach_keys` are those of a terminal.
/// `exited` gets the record of an exec's end.
pub(super) async fn join<C: AsyncRead + AsyncWrite + Unpin>(
    client: C,
    stream: &mut UnixStream,
    raw: bool,
    stdin: bool,
    detach_keys: &[u8],
    exited: impl FnMut(brigantine_shim::ExecRecord),
) -> Joined {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_shim, mut to_shim) = stream.split();
    let input = async {
        let outcome = copy_in(&mut from_client, &mut to_shim, stdin, detach_keys).await;
        match outcome {
            // A terminal has no end of file of its own, and the docker command that detaches by its keys just hangs up:
            // nothing is to be typed for it.
            Joined::Ended if stdin && !detach_keys.is_empty() => Joined::Detached,
            Joined::Ended => {
                // Half-close: the container may read its end of file, its output goes on.
                if stdin && let Err(error) = to_shim.shutdown().await {
                    tracing::trace!(%error, "pass a half-close on");
                }
                // Never resolves: the output decides.
                std::future::pending::<Joined>().await
            }
            other => other,
        }
    };
    let output = copy_out(&mut from_shim, &mut to_client, raw, exited);
    let outcome = tokio::select! {
        outcome = output => outcome,
        outcome = input => outcome,
    };
    if let Err(error) = to_client.shutdown().await {
        tracing::trace!(%error, "close a client's stream");
    }
    outcome
}

async fn copy_in(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    stdin: bool,
    keys: &[u8],
) -> Joined {
    let mut buffer = vec![0_u8; 32 << 10];
    let mut matched = 0;
    let mut gone = false;
    loop {
        let count = match from.read(&mut buffer).await {
            Ok(0) => return Joined::Ended,
            Ok(count) => count,
            Err(_reset) => return Joined::ClientGone,
        };
        if !stdin || gone {
            continue;
        }
        let mut out = Vec::new();
        let chunk: &[u8] = if keys.is_empty() {
            &buffer[..count]
        } else {
            for byte in &buffer[..count] {
                if *byte == keys[matched] {
                    matched += 1;
                    if matched == keys.len() {
                        // What was typed before them still counts; whether it arrives no longer matters.
                        drop(to.write_all(&out).await);
                        return Joined::Detached;
                    }
                    continue;
                }
                // What looked like the keys was not.
                out.extend_from_slice(&keys[..matched]);
                matched = usize::from(*byte == keys[0]);
                if matched == 0 {
                    out.push(*byte);
                }
            }
            &out
        };
        // The container has closed its input: what else comes is dropped, the output goes on.
        gone = to.write_all(chunk).await.is_err();
    }
}

async fn copy_out(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    raw: bool,
    mut exited: impl FnMut(brigantine_shim::ExecRecord),
) -> Joined {
    let mut buffer = vec![0_u8; frame::HEADER + frame::MAX_PAYLOAD];
    let mut filled = 0;
    let mut out = Vec::with_capacity(frame::MAX_PAYLOAD);
    loop {
        match from.read(&mut buffer[filled..]).await {
            Ok(0) | Err(_) => return Joined::Ended,
            Ok(count) => filled += count,
        }
        out.clear();
        let mut at = 0;
        while filled - at >= frame::HEADER {
            let mut header = [0_u8; frame::HEADER];
            header.copy_from_slice(&buffer[at..at + frame::HEADER]);
            let Some((kind, length)) = frame::parse_header(header) else {
                tracing::warn!(?header, "a monitor sent a frame that is none");
                return Joined::Ended;
            };
            let end = at + frame::HEADER + length;
            if end > filled {
                break;
            }
            let payload = &buffer[at + frame::HEADER..end];
            match kind {
                frame::Kind::Stdout | frame::Kind::Stderr if raw => out.extend_from_slice(payload),
                frame::Kind::Stdout | frame::Kind::Stderr => out.extend_from_slice(&buffer[at..end]),
                frame::Kind::ExecExited => {
                    if let Some(record) = frame::exec_record(payload) {
                        exited(record);
                    }
                }
                frame::Kind::Lagged => tracing::debug!("a client was too slow and was cut off"),
            }
            at = end;
        }
        buffer.copy_within(at..filled, 0);
        filled -= at;
        if !out.is_empty() && (to.write_all(&out).await.is_err() || to.flush().await.is_err()) {
            return Joined::ClientGone;
        }
    }
}

pub(super) fn asynchronous(stream: StdUnixStream) -> Result<UnixStream> {
    let what = || "use a monitor's stream".to_owned();
    stream.set_nonblocking(true).doing(what)?;
    UnixStream::from_std(stream).doing(what)
}

/// `ctrl-p,ctrl-q` as bytes; docker's default for nothing.
pub(super) fn detach_keys(text: &str) -> Result<Vec<u8>> {
    let text = if text.is_empty() { "ctrl-p,ctrl-q" } else { text };
    text.split(',')
        .map(|key| {
            let wrong =
                || Error::invalid(format!("invalid detach keys ({text}): unknown character: '{key}'"));
            match key.strip_prefix("ctrl-").map(str::as_bytes) {
                None => match key.as_bytes() {
                    [byte] => Ok(*byte),
                    _ => Err(wrong()),
                },
                Some([byte @ b'a'..=b'z']) => Ok(byte - b'a' + 1),
                Some([b'@']) => Ok(0),
                Some([b'[']) => Ok(27),
                Some([b'\\']) => Ok(28),
                Some([b']']) => Ok(29),
                Some([b'^']) => Ok(30),
                Some([b'_']) => Ok(31),
                Some(_) => Err(wrong()),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(list: &[(frame::Kind, &[u8])]) -> Vec<u8> {
        list.iter()
            .flat_map(|(kind, payload)| [&frame::header(*kind, payload.len())[..], payload].concat())
            .collect()
    }

    #[test]
    fn keys_are_read_in_dockers_notation() {
        assert_eq!(detach_keys("").unwrap(), [16, 17]);
        assert_eq!(detach_keys("ctrl-a,x,ctrl-]").unwrap(), [1, b'x', 29]);
        assert!(detach_keys("ctrl-").is_err());
        assert!(detach_keys("long").is_err());
    }

    #[tokio::test]
    async fn output_goes_on_after_a_half_close() {
        let (client, mut far) = tokio::io::duplex(1024);
        let (mut shim, mut container) = UnixStream::pair().unwrap();
        let joined = tokio::spawn(async move { join(client, &mut shim, true, true, &[], |_| {}).await });
        far.write_all(b"question").await.unwrap();
        far.shutdown().await.unwrap();
        let mut question = String::new();
        container.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        container
            .write_all(&frames(&[(frame::Kind::Stdout, b"ans"), (frame::Kind::Stdout, b"wer")]))
            .await
            .unwrap();
        drop(container);
        let mut answer = String::new();
        far.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer");
        assert_eq!(joined.await.unwrap(), Joined::Ended);
    }

    #[tokio::test]
    async fn frames_pass_through_unless_raw_and_control_frames_stop_here() {
        let sent =
            frames(&[(frame::Kind::Stdout, b"a"), (frame::Kind::Lagged, b""), (frame::Kind::Stderr, b"b")]);
        let mut out = Vec::new();
        copy_out(&mut &sent[..], &mut out, false, |_| {}).await;
        assert_eq!(out, frames(&[(frame::Kind::Stdout, b"a"), (frame::Kind::Stderr, b"b")]));
        out.clear();
        copy_out(&mut &sent[..], &mut out, true, |_| {}).await;
        assert_eq!(out, b"ab");
    }

    #[tokio::test]
    async fn detach_keys_end_the_input_and_are_not_passed_on() {
        let mut out = Vec::new();
        let outcome = copy_in(&mut &b"ab\x10c\x10\x11d"[..], &mut out, true, &[16, 17]).await;
        assert_eq!((outcome, &out[..]), (Joined::Detached, &b"ab\x10c"[..]));
    }
}
