//! `/exec`: further processes in running containers.

use bollard_stubs::models::{ExecConfig, ExecStartConfig};
use brigantine_engine::containers::ExecStart;
use serde_json::json;

use super::State;
use super::containers::size;
use crate::http::hijack::StreamType;
use crate::http::{Error, Reply, Request, Router};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router
        .post("/containers/{id}/exec", create)
        .post("/exec/{id}/start", start)
        .post("/exec/{id}/resize", resize)
        .get("/exec/{id}/json", inspect);
}

async fn create(state: State, mut request: Request) -> Result<Reply, Error> {
    let config: ExecConfig = request.json_body().await?;
    let id = state.engine.containers().exec_create(request.param("id"), config).await?;
    Reply::created(&json!({ "Id": id }))
}

pub(super) async fn start(state: State, mut request: Request) -> Result<Reply, Error> {
    let config: ExecStartConfig = request.json_body_opt().await?.unwrap_or_default();
    let console_size = match config.console_size.as_deref() {
        None | Some([]) => None,
        Some([height, width]) => {
            let fits = |value: &usize| {
                u16::try_from(*value)
                    .map_err(|_too_large| Error::invalid(format!("invalid console size: {value}")))
            };
            Some((fits(height)?, fits(width)?))
        }
        Some(_) => return Err(Error::invalid("invalid console size: two numbers are expected")),
    };
    let detach = config.detach.unwrap_or_default();
    let wanted = ExecStart { detach, tty: config.tty, console_size };
    let started = state.engine.containers().exec_start(request.param("id"), wanted).await?;
    if detach {
        return Ok(Reply::empty(http::StatusCode::OK));
    }
    let stream_type = StreamType::announced(started.tty(), request.version());
    Ok(Reply::hijack(&request, stream_type, |stream| async move {
        if let Err(error) = started.join(stream).await {
            tracing::debug!(%error, "an exec's client has left");
        }
    }))
}

pub(super) async fn resize(state: State, request: Request) -> Result<Reply, Error> {
    let (height, width) = size(&request)?;
    state.engine.containers().exec_resize(request.param("id"), height, width).await?;
    Ok(Reply::empty(http::StatusCode::OK))
}

pub(super) async fn inspect(state: State, request: Request) -> Result<Reply, Error> {
    Reply::json(&state.engine.containers().exec_inspect(request.param("id"))?)
}
