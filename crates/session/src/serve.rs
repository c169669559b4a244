//! The client's end of one service: ssh agents that the engine may ask.

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

use crate::messages::{BytesMessage, CheckAgentRequest, Empty};

const CHECK: &str = "/moby.sshforward.v1.SSH/CheckAgent";
const FORWARD: &str = "/moby.sshforward.v1.SSH/ForwardAgent";
/// Bytes of one message.
const CHUNK: usize = 32 << 10;

/// Sockets of agents, by id.
type Agents = Arc<BTreeMap<String, PathBuf>>;

/// Answers the engine's questions to these agents (sockets by id) until the connection ends.
pub async fn serve_agents(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    agents: BTreeMap<String, PathBuf>,
) -> Result<(), hyper::Error> {
    let agents = Arc::new(agents);
    let service = service_fn(move |request: http::Request<Incoming>| {
        let agents = Arc::clone(&agents);
        async move { Ok::<_, Infallible>(answer(request, agents).await) }
    });
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(io), service)
        .await
}

/// The methods that [`serve_agents`] answers, for the session's introduction.
pub const AGENT_METHODS: [&str; 2] = [CHECK, FORWARD];

async fn answer(request: http::Request<Incoming>, agents: Agents) -> http::Response<Body> {
    match request.uri().path() {
        CHECK => {
            let codec = ProstCodec::<Empty, CheckAgentRequest>::default();
            Grpc::new(codec).unary(Check(agents), request).await
        }
        FORWARD => {
            let codec = ProstCodec::<BytesMessage, BytesMessage>::default();
            Grpc::new(codec).streaming(Forward(agents), request).await
        }
        path => Status::unimplemented(format!("{path} is not offered")).into_http(),
    }
}

type Answer<T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send>>;

struct Check(Agents);

impl tower_service::Service<Request<CheckAgentRequest>> for Check {
    type Response = Response<Empty>;
    type Error = Status;
    type Future = Answer<Empty>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<CheckAgentRequest>) -> Self::Future {
        let known = self.0.contains_key(name(&request.into_inner().id));
        Box::pin(async move {
            if known { Ok(Response::new(Empty {})) } else { Err(Status::not_found("no such ssh agent")) }
        })
    }
}

struct Forward(Agents);

type Messages = Pin<Box<dyn Stream<Item = Result<BytesMessage, Status>> + Send>>;

impl tower_service::Service<Request<Streaming<BytesMessage>>> for Forward {
    type Response = Response<Messages>;
    type Error = Status;
    type Future = Answer<Messages>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Streaming<BytesMessage>>) -> Self::Future {
        let id =
            request.metadata().get("buildkit.ssh.id").and_then(|id| id.to_str().ok()).unwrap_or_default();
        let path = self.0.get(name(id)).cloned();
        Box::pin(async move {
            let path = path.ok_or_else(|| Status::not_found("no such ssh agent"))?;
            let socket = UnixStream::connect(&path)
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
            let answers: Messages = Box::pin(ReceiverStream::new(answers));
            Ok(Response::new(answers))
        })
    }
}

fn name(id: &str) -> &str {
    if id.is_empty() { "default" } else { id }
}
