//! Hijacked connections: attach and exec streams on the raw socket.
//!
//! Invariant: the response header is flushed on its own before the stream's first byte (clients that read ahead lose
//! bytes that arrive together with the header), and bytes the client sent right behind its request reach the stream.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::ApiVersion;

/// What an attach or exec stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamType {
    /// Plain bytes (with a terminal), or frames announced as plain bytes to clients before 1.42.
    Raw,
    /// docker's 8-byte frames, announced as such.
    Multiplexed,
}

impl StreamType {
    /// What to announce: frames are named from 1.42 on when there is no terminal.
    pub fn announced(tty: bool, version: ApiVersion) -> Self {
        if tty || version < ApiVersion::v1(42) { Self::Raw } else { Self::Multiplexed }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Self::Raw => "application/vnd.docker.raw-stream",
            Self::Multiplexed => "application/vnd.docker.multiplexed-stream",
        }
    }
}

/// Any connection the server can serve.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

pub(crate) type Run = Box<dyn FnOnce(Hijacked) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// A reply that takes over the connection.
pub(crate) struct Hijack {
    pub upgrade: Option<String>,
    pub content_type: &'static str,
    /// The answer to a websocket's key, and the sub-protocol that is spoken.
    pub websocket: Option<(String, Option<String>)>,
    pub run: Run,
}

impl Hijack {
    /// The response header, as dockerd writes it.
    pub(crate) fn head(&self, common: &http::HeaderMap) -> Vec<u8> {
        let mut head = String::with_capacity(256);
        if let Some((accept, protocol)) = &self.websocket {
            head.push_str("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ");
            head.push_str(accept);
            if let Some(protocol) = protocol {
                head.push_str("\r\nSec-WebSocket-Protocol: ");
                head.push_str(protocol);
            }
        } else if let Some(protocol) = &self.upgrade {
            head.push_str("HTTP/1.1 101 UPGRADED\r\nContent-Type: ");
            head.push_str(self.content_type);
            head.push_str("\r\nConnection: Upgrade\r\nUpgrade: ");
            head.push_str(protocol);
        } else {
            // The older form never learned the other name.
            head.push_str("HTTP/1.1 200 OK\r\nContent-Type: ");
            head.push_str(StreamType::Raw.content_type());
        }
        head.push_str("\r\n");
        for (name, value) in common {
            if let Ok(value) = value.to_str() {
                head.push_str(&title_case(name.as_str()));
                head.push_str(": ");
                head.push_str(value);
                head.push_str("\r\n");
            }
        }
        head.push_str("\r\n");
        head.into_bytes()
    }
}

fn title_case(name: &str) -> String {
    let mut start = true;
    name.chars()
        .map(|c| {
            let c = if start { c.to_ascii_uppercase() } else { c };
            start = c == '-';
            c
        })
        .collect()
}

/// The client's side of a hijacked connection. Reading ends when the client half-closes; `shutdown` half-closes
/// ours; dropping it closes both.
pub struct Hijacked {
    early: Bytes,
    io: Box<dyn Io>,
}

impl Hijacked {
    pub(crate) fn new(early: Bytes, io: Box<dyn Io>) -> Self {
        Self { early, io }
    }
}

impl AsyncRead for Hijacked {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.early.has_remaining() {
            let count = self.early.len().min(buf.remaining());
            buf.put_slice(&self.early.split_to(count));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Hijacked {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
