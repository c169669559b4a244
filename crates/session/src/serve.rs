//! The client's end of a session: ssh agents that the engine may ask, folders with a build's files, a place for archives
//! that it makes, and folders that it may keep caches in.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::Stream;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::server::Grpc;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::content::{INFO, READ, WRITE};
use crate::layout::{self, Folders};
use crate::lend::{self, Folder};
use crate::messages::{
    BytesMessage, CheckAgentRequest, ContentInfoRequest, ContentInfoResponse, ContentReadRequest,
    ContentReadResponse, ContentWriteRequest, ContentWriteResponse, Empty, Packet,
};
use crate::session::MOST_MESSAGE;

const CHECK: &str = "/moby.sshforward.v1.SSH/CheckAgent";
const FORWARD: &str = "/moby.sshforward.v1.SSH/ForwardAgent";
const SEND: &str = crate::send::METHOD;
const SYNC: &str = crate::receive::METHOD;
/// The most bytes of a call's metadata: a Dockerfile may name many files.
const MOST_HEADERS: u32 = 16 << 20;
/// Bytes of one message.
const CHUNK: usize = 32 << 10;

/// What a client lends.
#[derive(Default)]
pub struct Lending {
    /// Sockets of ssh agents, by id.
    pub agents: BTreeMap<String, PathBuf>,
    /// A build's files, by the folder's name: `context`, `dockerfile` and others.
    pub sources: BTreeMap<String, Arc<dyn Folder>>,
    /// Where archives go, by their names.
    pub archives: BTreeMap<String, mpsc::Sender<Bytes>>,
    /// Folders (OCI image layouts), by the name the engine knows them by.
    pub folders: BTreeMap<String, PathBuf>,
}

impl Lending {
    pub fn is_empty(&self) -> bool {
        self.methods().is_empty()
    }

    /// The methods that are answered, for the session's introduction.
    pub fn methods(&self) -> Vec<&'static str> {
        let agents = [CHECK, FORWARD].into_iter().filter(|_| !self.agents.is_empty());
        let archives = [SEND].into_iter().filter(|_| !self.archives.is_empty());
        let folders = [INFO, READ, WRITE].into_iter().filter(|_| !self.folders.is_empty());
        let sources = [SYNC].into_iter().filter(|_| !self.sources.is_empty());
        agents.chain(archives).chain(folders).chain(sources).collect()
    }
}

type Lent = Arc<Lending>;

/// Answers the engine's questions until the connection ends.
pub async fn serve(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    lending: Lending,
) -> Result<(), hyper::Error> {
    let lent = Arc::new(lending);
    let service = service_fn(move |request: http::Request<Incoming>| {
        let lent = Arc::clone(&lent);
        async move { Ok::<_, Infallible>(answer(request, lent).await) }
    });
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .max_header_list_size(MOST_HEADERS)
        .serve_connection(TokioIo::new(io), service)
        .await
}

async fn answer(request: http::Request<Incoming>, lent: Lent) -> http::Response<Body> {
    let folders: Folders = Arc::new(lent.folders.clone());
    match request.uri().path() {
        CHECK => {
            let codec = ProstCodec::<Empty, CheckAgentRequest>::default();
            Grpc::new(codec).unary(Method(|request| check(Arc::clone(&lent), request)), request).await
        }
        FORWARD => {
            let codec = ProstCodec::<BytesMessage, BytesMessage>::default();
            Grpc::new(codec).streaming(Method(|request| forward(Arc::clone(&lent), request)), request).await
        }
        SEND => {
            let codec = ProstCodec::<BytesMessage, BytesMessage>::default();
            Grpc::new(codec).streaming(Method(|request| take(Arc::clone(&lent), request)), request).await
        }
        SYNC => {
            let codec = ProstCodec::<Packet, Packet>::default();
            Grpc::new(codec).streaming(lend::Sync(lent), request).await
        }
        INFO => {
            let codec = ProstCodec::<ContentInfoResponse, ContentInfoRequest>::default();
            Grpc::new(codec)
                .unary(Method(|request| layout::info(Arc::clone(&folders), request)), request)
                .await
        }
        READ => {
            let codec = ProstCodec::<ContentReadResponse, ContentReadRequest>::default();
            Grpc::new(codec)
                .server_streaming(Method(|request| layout::read(Arc::clone(&folders), request)), request)
                .await
        }
        WRITE => {
            let codec = ProstCodec::<ContentWriteResponse, ContentWriteRequest>::default();
            Grpc::new(codec)
                .apply_max_message_size_config(Some(MOST_MESSAGE), None)
                .streaming(Method(|request| layout::write(Arc::clone(&folders), request)), request)
                .await
        }
        path => Status::unimplemented(format!("{path} is not offered")).into_http(),
    }
}

/// A method of gRPC as a function.
pub(crate) struct Method<F>(pub F);

impl<F, M, R, A> tower_service::Service<Request<M>> for Method<F>
where
    F: FnMut(Request<M>) -> A,
    A: Future<Output = Result<Response<R>, Status>> + Send + 'static,
{
    type Response = Response<R>;
    type Error = Status;
    type Future = A;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<M>) -> A {
        (self.0)(request)
    }
}

#[expect(clippy::unused_async, reason = "a method of gRPC")]
async fn check(lent: Lent, request: Request<CheckAgentRequest>) -> Result<Response<Empty>, Status> {
    let known = lent.agents.contains_key(name(&request.into_inner().id));
    known.then(|| Response::new(Empty {})).ok_or_else(|| Status::not_found("no such ssh agent"))
}

type Messages = Pin<Box<dyn Stream<Item = Result<BytesMessage, Status>> + Send>>;

async fn forward(
    lent: Lent,
    request: Request<Streaming<BytesMessage>>,
) -> Result<Response<Messages>, Status> {
    let id = request.metadata().get("buildkit.ssh.id").and_then(|id| id.to_str().ok()).unwrap_or_default();
    let path = lent.agents.get(name(id)).ok_or_else(|| Status::not_found("no such ssh agent"))?;
    let socket = UnixStream::connect(path)
        .await
        .map_err(|error| Status::unavailable(format!("connect to {}: {error}", path.display())))?;
    let (mut read, mut write) = socket.into_split();
    let mut questions = request.into_inner();
    tokio::spawn(async move {
        while let Ok(Some(message)) = questions.message().await {
            if write.write_all(&message.data).await.is_err() {
                break;
            }
        }
    });
    let (sender, answers) = mpsc::channel(4);
    tokio::spawn(async move {
        let mut buffer = vec![0; CHUNK];
        loop {
            let n = read.read(&mut buffer).await.unwrap_or(0);
            let data = Bytes::copy_from_slice(&buffer[..n]);
            if n == 0 || sender.send(Ok(BytesMessage { data })).await.is_err() {
                break;
            }
        }
    });
    Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
}

/// Takes an archive in. What is read is passed on at once, so that nothing piles up here.
async fn take(lent: Lent, request: Request<Streaming<BytesMessage>>) -> Result<Response<Messages>, Status> {
    let id = request.metadata().get(crate::send::NAME).and_then(|id| id.to_str().ok());
    let place = lent.archives.get(id.unwrap_or_default());
    let place = place.ok_or_else(|| Status::not_found("no place for this archive"))?.clone();
    let failed = |_gone| Status::aborted("the archive could not be written");
    let mut pieces = request.into_inner();
    while let Some(piece) = pieces.message().await? {
        place.send(piece.data).await.map_err(failed)?;
    }
    // An empty piece is its end: one that breaks off has none.
    place.send(Bytes::new()).await.map_err(failed)?;
    Ok(Response::new(Box::pin(futures_util::stream::empty())))
}

fn name(id: &str) -> &str {
    if id.is_empty() { "default" } else { id }
}
