//! The registry's own door: a socket in its storage, by which another process asks for a garbage collection.
//!
//! Invariant: only who may open the storage's directory can ask.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};

use super::Housekeeping;
use super::gc::{Collected, Plan};
use super::service::Shared;
use super::storage::absent;
use crate::Error;

/// The most of a message that is read.
const SMALL: usize = 64 << 10;

pub(super) struct Control {
    listener: UnixListener,
    housekeeping: Arc<Housekeeping>,
    shared: Arc<Shared>,
}

fn socket(root: &Path) -> PathBuf {
    root.join("control.sock")
}

impl Control {
    /// The storage is locked by this process, so a socket that is there is a dead one's. A path that is too long for a
    /// socket leaves the registry without this door.
    pub fn bind(housekeeping: Arc<Housekeeping>, shared: Arc<Shared>) -> Option<Self> {
        let path = socket(housekeeping.writable.storage.root());
        let bound = absent(std::fs::remove_file(&path)).and_then(|_| UnixListener::bind(&path));
        match bound {
            Ok(listener) => Some(Self { listener, housekeeping, shared }),
            Err(error) => {
                tracing::warn!(error = %error, "collections cannot be asked for at {}", path.display());
                None
            }
        }
    }

    pub async fn run(self) {
        loop {
            let Ok((stream, _)) = self.listener.accept().await else {
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            };
            let (housekeeping, shared) = (Arc::clone(&self.housekeeping), Arc::clone(&self.shared));
            let service = service_fn(move |request| {
                let (housekeeping, shared) = (Arc::clone(&housekeeping), Arc::clone(&shared));
                async move { Ok::<_, Infallible>(answer(&housekeeping, &shared, request).await) }
            });
            // One after the other: there is one collection at a time anyway.
            let served = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(error = %error, "a request for a collection ended early");
            }
        }
    }
}

async fn answer(
    housekeeping: &Arc<Housekeeping>,
    shared: &Shared,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let reply = |status: StatusCode, body: Vec<u8>| {
        let mut answer = Response::new(Full::new(Bytes::from(body)));
        *answer.status_mut() = status;
        answer
    };
    if request.method() != Method::POST || request.uri().path() != "/collect" {
        return reply(StatusCode::NOT_FOUND, Vec::new());
    }
    let plan = match Limited::new(request.into_body(), SMALL).collect().await {
        Ok(body) => serde_json::from_slice::<Plan>(&body.to_bytes()).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let mut plan = match plan {
        Ok(plan) => plan,
        Err(error) => return reply(StatusCode::BAD_REQUEST, error.into_bytes()),
    };
    plan.keep = housekeeping.plan.keep;
    match housekeeping.collect_for(shared, plan).await {
        Ok(collected) => reply(StatusCode::OK, serde_json::to_vec(&collected).unwrap_or_default()),
        Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into_bytes()),
    }
}

/// Asks the process that runs the registry at `root`; `None` when none does.
pub(super) async fn ask(root: &Path, plan: &Plan) -> Result<Option<Collected>, Error> {
    let path = socket(root);
    let failed = |source| Error::Io { what: format!("ask the registry at {}", path.display()), source };
    let stream = match UnixStream::connect(&path).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(failed(error)),
    };
    let asked = async {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let connection = tokio::spawn(connection);
        let body = serde_json::to_vec(plan)?;
        let request = Request::post("/collect")
            .header(http::header::HOST, "registry")
            .body(Full::new(Bytes::from(body)))
            .map_err(io::Error::other)?;
        let answer = sender.send_request(request).await.map_err(io::Error::other)?;
        let status = answer.status();
        let body =
            Limited::new(answer.into_body(), SMALL).collect().await.map_err(io::Error::other)?.to_bytes();
        connection.abort();
        if status == StatusCode::OK {
            serde_json::from_slice::<Collected>(&body).map_err(io::Error::from)
        } else {
            Err(io::Error::other(String::from_utf8_lossy(&body).into_owned()))
        }
    };
    asked.await.map(Some).map_err(failed)
}
