//! `GET /containers/{id}/attach/ws`: a container's streams as a websocket (RFC 6455), unframed, as docker sends them.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig};

use brigantine_engine::containers::AttachRequest;

use super::State;
use crate::http::version::ApiVersion;
use crate::http::{Error, Reply, Request, Router};

/// The largest message a client may send.
const LARGEST: usize = 1 << 20;

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router.get("/containers/{id}/attach/ws", attach);
}

pub(super) async fn attach(state: State, request: Request) -> Result<Reply, Error> {
    let asked = request.upgrade().is_some_and(|protocol| protocol.eq_ignore_ascii_case("websocket"));
    let key = request.header("sec-websocket-key").filter(|_| asked);
    let Some(key) = key else {
        return Err(Error::invalid(
            "this endpoint speaks the websocket protocol: an upgrade to it is needed",
        ));
    };
    let accept = derive_accept_key(key.as_bytes());
    let protocol = request.header("sec-websocket-protocol").map(str::to_owned);
    // Binary since API 1.28; older clients want text.
    let binary = request.version() >= ApiVersion::v1(28);
    let query = request.query();
    let streams = ["stdin", "stdout", "stderr"].map(|name| query.flag(name));
    let wanted = AttachRequest {
        stdin: streams[0],
        stdout: streams[1],
        stderr: streams[2],
        stream: query.flag("stream"),
        logs: query.flag("logs"),
        detach_keys: query.text("detachKeys").unwrap_or_default().to_owned(),
        unframed: true,
    };
    let attached = state.engine.containers().attach(request.param("id"), wanted).await?;
    Ok(Reply::websocket(&accept, protocol.as_deref(), move |stream| async move {
        let config = WebSocketConfig::default().max_message_size(Some(LARGEST)).max_frame_size(Some(LARGEST));
        let socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
        let bytes = Messages { socket, binary, rest: Bytes::new(), ended: false };
        if let Err(error) = attached.join(bytes).await {
            tracing::debug!(%error, "an attached client has left");
        }
    }))
}

/// Messages as a stream of bytes.
struct Messages<S> {
    socket: WebSocketStream<S>,
    binary: bool,
    rest: Bytes,
    ended: bool,
}

fn broken(error: tokio_tungstenite::tungstenite::Error) -> std::io::Error {
    std::io::Error::other(error)
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Messages<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        while self.rest.is_empty() && !self.ended {
            match ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.rest = bytes,
                Some(Ok(Message::Text(text))) => self.rest = text.into(),
                Some(Ok(Message::Close(_))) | None => self.ended = true,
                // Pings are answered below us.
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
            }
        }
        let count = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest.split_to(count));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Messages<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(broken)?;
        let message = if self.binary {
            Message::binary(Bytes::copy_from_slice(buf))
        } else {
            Message::text(String::from_utf8_lossy(buf).into_owned())
        };
        Pin::new(&mut self.socket).start_send(message).map_err(broken)?;
        // It is on its way at once; what does not fit is flushed with the next.
        if let Poll::Ready(Err(error)) = Pin::new(&mut self.socket).poll_flush(cx) {
            return Poll::Ready(Err(broken(error)));
        }
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(broken)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(cx).map_err(broken)
    }
}
