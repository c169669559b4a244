//! Serving: connections, the way of one request through version check, routing and reply, and orderly shutdown.
//!
//! Invariants: one connection never disturbs another; a client that sends half a request header is dropped after
//! [`HEADER_TIME`]; a request that changes something runs to its end even when its client leaves.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;

use super::gate::{self, Answered, Asked, Gate, Peer};
use super::hijack::{Hijack, Hijacked};
use super::reply::ReplyBody;
use super::request::RequestBody;
use super::{ApiVersion, Class, Error, Query, Reply, Request, Router, version};

/// How long a client may take to send a request's header once it began.
pub const HEADER_TIME: Duration = Duration::from_secs(10);

/// The most bytes of request header; docker's registry credentials travel in one.
const HEADER_LIMIT: usize = 256 << 10;

/// How long after the header of a hijacked connection its first bytes may follow where it cannot be told whether the
/// client has read it. Some clients lose what arrives in the same read as the header.
const HEADER_PAUSE: Duration = Duration::from_millis(2);

/// How often, and how long at most, to look whether it has been read.
const HEADER_LOOK: Duration = Duration::from_micros(200);
const HEADER_WAIT: Duration = Duration::from_millis(500);

/// How long open streams may go on after the server was told to stop.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// A server: its routes and what their handlers share.
pub struct Server<S> {
    router: Router<S>,
    state: S,
    common: HeaderMap,
    header_time: Duration,
    gate: Option<Arc<dyn Gate>>,
}

/// Where connections come from.
pub enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
    Tls(TcpListener, TlsAcceptor),
}

impl<S: Clone + Send + Sync + 'static> Server<S> {
    pub fn new(router: Router<S>, state: S) -> Self {
        let mut common = HeaderMap::new();
        let text = |value: String| {
            HeaderValue::try_from(value).unwrap_or_else(|_unprintable| HeaderValue::from_static(""))
        };
        common.insert(HeaderName::from_static("api-version"), text(ApiVersion::MAX.to_string()));
        common.insert(HeaderName::from_static("docker-experimental"), HeaderValue::from_static("false"));
        common.insert(HeaderName::from_static("ostype"), HeaderValue::from_static("linux"));
        common.insert(header::SERVER, text(format!("Brigantine/{} (linux)", env!("CARGO_PKG_VERSION"))));
        Self { router, state, common, header_time: HEADER_TIME, gate: None }
    }

    /// Has somebody asked about every request.
    pub fn with_gate(mut self, gate: Arc<dyn Gate>) -> Self {
        self.gate = Some(gate);
        self
    }

    /// Another bound for sending a request's header than [`HEADER_TIME`].
    pub fn with_header_time(mut self, time: Duration) -> Self {
        self.header_time = time;
        self
    }

    /// Accepts connections until `stop` becomes true, then lets requests in flight end for a moment.
    pub async fn serve(self: Arc<Self>, listener: Listener, mut stop: watch::Receiver<bool>) {
        let (alive, mut gone) = mpsc::channel::<Infallible>(1);
        loop {
            let accepted = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                accepted = listener.accept() => accepted,
            };
            let io = match accepted {
                Ok(io) => io,
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let server = Arc::clone(&self);
            let stop = stop.clone();
            let alive = alive.clone();
            tokio::spawn(async move {
                match io {
                    Accepted::Unix(io) => server.connection(io, Arc::default(), stop).await,
                    Accepted::Tcp(io) => server.connection(io, Arc::default(), stop).await,
                    Accepted::Tls(io, acceptor) => {
                        match tokio::time::timeout(HEADER_TIME, acceptor.accept(io)).await {
                            Ok(Ok(io)) => {
                                let peer = Arc::new(peer_of(&io));
                                server.connection(io, peer, stop).await;
                            }
                            Ok(Err(error)) => tracing::info!(%error, "a client was not let in"),
                            Err(_elapsed) => tracing::debug!("a client did not finish its TLS handshake"),
                        }
                    }
                }
                drop(alive);
            });
        }
        drop(listener);
        drop(alive);
        if tokio::time::timeout(DRAIN_TIME, gone.recv()).await.is_err() {
            tracing::debug!("streams were still open at the end");
        }
    }

    /// Serves one connection until it closes, is hijacked and ends, or the server stops.
    pub async fn connection<I>(self: Arc<Self>, io: I, peer: Arc<Peer>, mut stop: watch::Receiver<bool>)
    where
        I: AsyncRead + AsyncWrite + Unread + Send + Unpin + 'static,
    {
        let pace = Arc::new(Pace::new());
        let (takeover, mut taken) = mpsc::channel::<Hijack>(1);
        let service = {
            let server = Arc::clone(&self);
            let pace = Arc::clone(&pace);
            service_fn(move |request: hyper::Request<Incoming>| {
                pace.request_began();
                let server = Arc::clone(&server);
                let takeover = takeover.clone();
                let answering = Answering(Arc::clone(&pace));
                let peer = Arc::clone(&peer);
                Box::pin(async move {
                    let response = server.answer(request, peer, takeover).await?;
                    Ok::<_, Infallible>(response.map(|body| Paced { body, _answering: answering }))
                })
            })
        };
        let mut connection = hyper::server::conn::http1::Builder::new()
            .timer(hyper_util::rt::TokioTimer::new())
            .header_read_timeout(None)
            .title_case_headers(true)
            .max_headers(256)
            .max_buf_size(HEADER_LIMIT)
            .serve_connection(TokioIo::new(Watched { io, pace: Arc::clone(&pace) }), service);
        let mut check = tokio::time::interval(self.header_time / 2);
        check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut stopping = false;
        let hijack = loop {
            tokio::select! {
                ended = poll_fn(|cx| connection.poll_without_shutdown(cx)) => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection ended early");
                    }
                    break None;
                }
                Some(hijack) = taken.recv() => break Some(hijack),
                _ = check.tick() => if pace.header_overdue(self.header_time) {
                    tracing::debug!("a client sent half a request header and stalled");
                    return;
                },
                _ = stop.wait_for(|stop| *stop), if !stopping => {
                    stopping = true;
                    Pin::new(&mut connection).graceful_shutdown();
                }
            }
        };
        let parts = connection.into_parts();
        let Watched { mut io, .. } = parts.io.into_inner();
        match hijack {
            None => {
                if let Err(error) = io.shutdown().await {
                    tracing::trace!(%error, "closing a connection");
                }
            }
            Some(hijack) => self.hand_over(hijack, io, parts.read_buf).await,
        }
    }

    async fn hand_over<I>(&self, hijack: Hijack, mut io: I, early: Bytes)
    where
        I: AsyncRead + AsyncWrite + Unread + Send + Unpin + 'static,
    {
        let head = hijack.head(&self.common);
        let sent = async {
            io.write_all(&head).await?;
            io.flush().await
        };
        if let Err(error) = sent.await {
            tracing::debug!(%error, "a client left before its stream began");
            return;
        }
        let until = Instant::now() + HEADER_WAIT;
        loop {
            match io.unread() {
                Some(0) => break,
                Some(_) if Instant::now() < until => tokio::time::sleep(HEADER_LOOK).await,
                Some(_) | None => {
                    tokio::time::sleep(HEADER_PAUSE).await;
                    break;
                }
            }
        }
        (hijack.run)(Hijacked::new(early, Box::new(io))).await;
    }

    /// From a request to its response. A hijack never answers: the connection's task takes over.
    async fn answer(
        self: Arc<Self>,
        request: hyper::Request<Incoming>,
        peer: Arc<Peer>,
        takeover: mpsc::Sender<Hijack>,
    ) -> Result<hyper::Response<ReplyBody>, Infallible> {
        let began = Instant::now();
        let method = request.method().clone();
        let shown = request.uri().path().to_owned();
        let (result, plain) = self.dispatch(request, peer).await;
        let mut reply = match result {
            Ok(reply) => reply,
            Err(error) => {
                if error.class == Class::Internal {
                    tracing::error!(%method, path = %shown, error = %error.message, "a request failed");
                }
                Reply::error(&error, plain)
            }
        };
        tracing::debug!(%method, path = %shown, status = reply.status.as_u16(), elapsed = ?began.elapsed(), "request");
        if let Some(hijack) = reply.hijack.take() {
            if takeover.send(hijack).await.is_ok() {
                return std::future::pending().await;
            }
            reply = Reply::error(&Error::internal("the connection cannot be taken over"), plain);
        }
        let mut response = hyper::Response::new(reply.body);
        *response.status_mut() = reply.status;
        let headers = response.headers_mut();
        headers.extend(self.common.clone());
        headers.extend(reply.headers);
        Ok(response)
    }

    async fn dispatch(
        &self,
        request: hyper::Request<Incoming>,
        peer: Arc<Peer>,
    ) -> (Result<Reply, Error>, bool) {
        let (head, body) = request.into_parts();
        let Some(path) = percent_decode(head.uri.path()) else {
            return (Err(Error::invalid("the path is not valid UTF-8 when decoded")), false);
        };
        let (asked, path) = version::split_path(&path);
        let version = match asked {
            None => Ok(ApiVersion::MAX),
            Some(text) => ApiVersion::parse(text)
                .ok_or_else(|| Error::invalid(format!("invalid API version {text:?}")))
                .and_then(ApiVersion::check),
        };
        let plain = asked.and_then(ApiVersion::parse).is_some_and(|asked| asked < ApiVersion::MIN);
        let version = match version {
            Ok(version) => version,
            Err(error) => return (Err(error), plain),
        };
        let Some((handler, params)) = self.router.find(&head.method, path) else {
            return (Err(Error::not_found("page not found")), plain);
        };
        let reads_only = matches!(head.method, Method::GET | Method::HEAD);
        let gate = self.gate.as_deref().filter(|gate| gate.is_manned());
        let asked = gate.map(|_| Asked {
            method: head.method.clone(),
            uri: head.uri.to_string(),
            headers: head.headers.clone(),
            body: None,
            peer,
        });
        let mut request = Request {
            path: path.to_owned(),
            method: head.method,
            params,
            query: Query::parse(head.uri.query().unwrap_or("")),
            headers: head.headers,
            version,
            body: Some(RequestBody::Coming(body)),
        };
        let mut gate = gate.zip(asked);
        if let Some((gate, asked)) = &mut gate
            && let Err(error) = ask(*gate, asked, &mut request).await
        {
            return (Err(error), plain);
        }
        let handling = handler(self.state.clone(), request);
        let result = if reads_only {
            handling.await
        } else {
            // In a task of its own, so that a client that leaves does not stop a change half way.
            match tokio::spawn(handling).await {
                Ok(result) => result,
                Err(failure) => {
                    tracing::error!(error = %failure, "a handler broke");
                    Err(Error::internal("the request broke inside the engine; its log says more"))
                }
            }
        };
        match gate {
            Some((gate, asked)) => (ask_again(gate, &asked, result, plain).await, plain),
            None => (result, plain),
        }
    }
}

/// Asks about a request, with its body if it is one that is shown.
async fn ask(gate: &dyn Gate, asked: &mut Asked, request: &mut Request) -> Result<(), Error> {
    if request.has_body() && gate::shows(&asked.headers, &request.path) {
        let body = request.bytes(gate::BODY_LIMIT).await?;
        request.body = Some(RequestBody::Whole(body.clone().into()));
        asked.body = Some(body);
    }
    gate.before(asked).await
}

/// Asks about what will be answered, be it an error.
async fn ask_again(
    gate: &dyn Gate,
    asked: &Asked,
    result: Result<Reply, Error>,
    plain: bool,
) -> Result<Reply, Error> {
    let answered = |reply: &Reply| Answered {
        status: reply.status,
        headers: reply.headers.clone(),
        body: reply.whole.clone().filter(|_| gate::shows(&reply.headers, "")),
    };
    let answered = match &result {
        Ok(reply) => answered(reply),
        Err(error) => answered(&Reply::error(error, plain)),
    };
    gate.after(asked, &answered).await?;
    result
}

/// Whose certificate was shown.
fn peer_of(io: &tokio_rustls::server::TlsStream<tokio::net::TcpStream>) -> Peer {
    let (_, connection) = io.get_ref();
    let shown = connection.peer_certificates().unwrap_or_default();
    let name = shown.first().and_then(|first| common_name(first)).unwrap_or_default();
    Peer { name, certificates: shown.iter().map(|one| one.to_vec()).collect() }
}

/// The common name of a certificate's subject.
fn common_name(certificate: &[u8]) -> Option<String> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let name = certificate.subject().iter_common_name().next()?;
    name.as_str().ok().map(str::to_owned)
}

/// A connection that may know what of our bytes its other end has taken.
pub trait Unread {
    /// Bytes that are still on their way; `None` where nobody can tell.
    fn unread(&self) -> Option<usize> {
        None
    }
}

impl Unread for tokio::net::UnixStream {
    fn unread(&self) -> Option<usize> {
        brigantine_sys::fd::unread_by_peer(self.as_fd()).ok()
    }
}

impl Unread for tokio::net::TcpStream {}
impl Unread for tokio::io::DuplexStream {}
impl<S> Unread for tokio_rustls::server::TlsStream<S> {}

enum Accepted {
    Unix(tokio::net::UnixStream),
    Tcp(tokio::net::TcpStream),
    Tls(tokio::net::TcpStream, TlsAcceptor),
}

impl Listener {
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Unix(listener) => listener.accept().await.map(|(io, _)| Accepted::Unix(io)),
            Self::Tcp(listener) => {
                let (io, _) = listener.accept().await?;
                io.set_nodelay(true)?;
                Ok(Accepted::Tcp(io))
            }
            Self::Tls(listener, acceptor) => {
                let (io, _) = listener.accept().await?;
                io.set_nodelay(true)?;
                Ok(Accepted::Tls(io, acceptor.clone()))
            }
        }
    }
}

/// Decodes `%2F` and the like; `None` when the result is not UTF-8 or holds a NUL.
fn percent_decode(path: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let decoded = (byte == b'%' && tail.len() >= 2)
            .then(|| std::str::from_utf8(&tail[..2]).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok()))
            .flatten();
        match decoded {
            Some(decoded) => {
                bytes.push(decoded);
                rest = &tail[2..];
            }
            None => bytes.push(byte),
        }
    }
    if bytes.contains(&0) {
        return None;
    }
    String::from_utf8(bytes).ok()
}

/// How a connection's client keeps pace: when it began the header it is sending, in milliseconds after `epoch`
/// plus one; 0 while none is being sent, [`Pace::ANSWERING`] while a request is being answered.
struct Pace {
    epoch: Instant,
    header_began: AtomicU64,
}

impl Pace {
    const ANSWERING: u64 = u64::MAX;

    fn new() -> Self {
        Self { epoch: Instant::now(), header_began: AtomicU64::new(0) }
    }

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64 + 1
    }

    fn received(&self) {
        if self.header_began.load(Ordering::Relaxed) == 0 {
            self.header_began.store(self.now(), Ordering::Relaxed);
        }
    }

    fn request_began(&self) {
        self.header_began.store(Self::ANSWERING, Ordering::Relaxed);
    }

    fn request_ended(&self) {
        self.header_began.store(0, Ordering::Relaxed);
    }

    fn header_overdue(&self, limit: Duration) -> bool {
        let began = self.header_began.load(Ordering::Relaxed);
        began != 0 && began != Self::ANSWERING && self.now().saturating_sub(began) > limit.as_millis() as u64
    }
}

/// Marks the request as answered when its response's last byte was taken.
struct Answering(Arc<Pace>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.request_ended();
    }
}

/// A response body that keeps its request marked as being answered.
struct Paced {
    body: ReplyBody,
    _answering: Answering,
}

impl hyper::body::Body for Paced {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, io::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

/// A connection that tells [`Pace`] when bytes arrive.
struct Watched<I> {
    io: I,
    pace: Arc<Pace>,
}

impl<I: AsyncRead + Unpin> AsyncRead for Watched<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.pace.received();
        }
        polled
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Watched<I> {
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

/// Docker answers OPTIONS on any path with an empty 200.
pub async fn options<S>(_state: S, _request: Request) -> Result<Reply, Error> {
    Ok(Reply::empty(StatusCode::OK))
}
