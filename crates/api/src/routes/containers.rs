//! `/containers`: the life of containers, their streams, and what is known of them.

use std::io;

use bollard_stubs::models::{ContainerCreateBody, ContainerUpdateBody};
use brigantine_engine::containers::{AttachRequest, Condition, CreateRequest, ListOptions, LogRequest};
use brigantine_engine::{Filters, parse_moment};
use bytes::Bytes;
use serde_json::{Value, json};

use super::State;
use crate::http::hijack::StreamType;
use crate::http::version::ApiVersion;
use crate::http::{Error, Reply, Request, Router};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router
        .get("/containers/json", list)
        .post("/containers/create", create)
        .post("/containers/prune", prune)
        .get("/containers/{id}/json", inspect)
        .get("/containers/{id}/top", top)
        .get("/containers/{id}/logs", logs)
        .get("/containers/{id}/stats", stats)
        .post("/containers/{id}/start", start)
        .post("/containers/{id}/stop", stop)
        .post("/containers/{id}/restart", restart)
        .post("/containers/{id}/kill", kill)
        .post("/containers/{id}/pause", pause)
        .post("/containers/{id}/unpause", unpause)
        .post("/containers/{id}/wait", wait)
        .post("/containers/{id}/attach", attach)
        .post("/containers/{id}/resize", resize)
        .post("/containers/{id}/rename", rename)
        .post("/containers/{id}/update", update)
        .delete("/containers/{id}", remove)
        .delete("/containers/{id}/{link}", remove_link);
}

/// The filters of a request as the engine takes them.
pub(super) fn filters(request: &Request, known: &[&str]) -> Result<Filters, Error> {
    Ok(Filters(request.filters(known)?.into_map()))
}

/// `h` and `w` of a resize.
pub(super) fn size(request: &Request) -> Result<(u16, u16), Error> {
    let one = |name: &str| -> Result<u16, Error> {
        let value =
            request.query().unsigned(name)?.ok_or_else(|| Error::invalid(format!("missing {name}")))?;
        u16::try_from(value).map_err(|_too_large| Error::invalid(format!("invalid {name}: {value}")))
    };
    Ok((one("h")?, one("w")?))
}

async fn list(state: State, request: Request) -> Result<Reply, Error> {
    list_of(state, request, None).await
}

/// The list of a project's containers, or of all.
pub(super) async fn list_of(state: State, request: Request, project: Option<String>) -> Result<Reply, Error> {
    const KNOWN: &[&str] = &[
        "ancestor",
        "before",
        "expose",
        "exited",
        "health",
        "id",
        "isolation",
        "is-task",
        "label",
        "name",
        "network",
        "publish",
        "since",
        "status",
        "volume",
    ];
    let options = ListOptions {
        all: request.query().flag("all"),
        limit: request.query().int("limit")?.unwrap_or_default(),
        size: request.query().flag("size"),
        filters: filters(&request, KNOWN)?,
        project,
    };
    Reply::json(&state.engine.containers().list(&options).await?)
}

/// What clients below API 1.44 say beside today's fields.
#[derive(serde::Deserialize)]
struct OlderFields {
    /// Of the interface on the network of the network mode.
    #[serde(rename = "MacAddress")]
    mac_address: Option<String>,
    #[serde(rename = "Runtime")]
    runtime: Option<String>,
}

async fn create(state: State, mut request: Request) -> Result<Reply, Error> {
    let wanted = creation(&mut request).await?;
    created(&state, wanted).await
}

/// Makes the container and tells of it.
pub(super) async fn created(state: &State, wanted: CreateRequest) -> Result<Reply, Error> {
    let created = Box::pin(state.engine.containers().create(wanted)).await?;
    Reply::created(&json!({ "Id": created.id, "Warnings": created.warnings }))
}

/// The request for a new container, decoded.
pub(super) async fn creation(request: &mut Request) -> Result<CreateRequest, Error> {
    let document: Value = request.json_body().await?;
    let older: OlderFields = crate::http::json::from_value(document.clone())?;
    let mut body: ContainerCreateBody = crate::http::json::from_value(document)?;
    if let Some(runtime) = older.runtime.filter(|runtime| !runtime.is_empty()) {
        body.host_config.get_or_insert_default().runtime.get_or_insert(runtime);
    }
    Ok(CreateRequest {
        name: request.query().text("name").map(str::to_owned),
        platform: request.query().text("platform").map(str::to_owned),
        mac_address: older.mac_address,
        body,
        within: None,
    })
}

async fn prune(state: State, request: Request) -> Result<Reply, Error> {
    let filters = filters(&request, &["label", "label!", "until"])?;
    Reply::json(&state.engine.containers().prune(&filters, None).await?)
}

pub(super) async fn inspect(state: State, request: Request) -> Result<Reply, Error> {
    let size = request.query().flag("size");
    Reply::json(&state.engine.containers().inspect(request.param("id"), size).await?)
}

pub(super) async fn top(state: State, request: Request) -> Result<Reply, Error> {
    let arguments = request.query().text("ps_args").unwrap_or_default();
    Reply::json(&state.engine.containers().top(request.param("id"), arguments).await?)
}

pub(super) async fn logs(state: State, request: Request) -> Result<Reply, Error> {
    let query = request.query();
    let moment = |name: &str| -> Result<_, Error> {
        parse_moment(query.text(name).unwrap_or_default())
            .map_err(|text| Error::invalid(format!("{name}: {text}")))
    };
    let tail = match query.text("tail") {
        None | Some("all") => None,
        // Like docker: what is no number, or negative, means everything.
        Some(text) => text.parse::<usize>().ok(),
    };
    let wanted = LogRequest {
        follow: query.flag("follow"),
        stdout: query.flag("stdout"),
        stderr: query.flag("stderr"),
        since: moment("since")?,
        until: moment("until")?,
        timestamps: query.flag("timestamps"),
        details: query.flag("details"),
        tail,
    };
    let logs = state.engine.containers().logs(request.param("id"), wanted)?;
    let stream_type = StreamType::announced(logs.tty, request.version());
    let chunks = futures_util::stream::unfold(logs, |mut logs| async move {
        let chunk = logs.next().await?;
        Some((Ok::<Bytes, io::Error>(chunk), logs))
    });
    Ok(Reply::stream(stream_type.content_type(), chunks))
}

pub(super) async fn stats(state: State, request: Request) -> Result<Reply, Error> {
    let containers = state.engine.containers();
    let id = request.param("id");
    if !request.query().flag_or("stream", true) {
        let one_shot = request.query().flag("one-shot");
        return Reply::json(&containers.stats_once(id, one_shot).await?);
    }
    let stream = containers.stats(id)?;
    let chunks = futures_util::stream::unfold(Some(stream), |stream| async move {
        let mut stream = stream?;
        match stream.next().await {
            Ok(sample) => Some((line(&sample), Some(stream))),
            Err(error) => {
                tracing::debug!(error = error.report(), "a stream of statistics ends");
                None
            }
        }
    });
    Ok(Reply::stream("application/json", chunks))
}

/// A document on a line of its own.
pub(super) fn line(document: &Value) -> io::Result<Bytes> {
    let mut text = serde_json::to_vec(document)?;
    text.push(b'\n');
    Ok(text.into())
}

pub(super) async fn start(state: State, mut request: Request) -> Result<Reply, Error> {
    // Very old clients sent a host configuration here.
    if request.has_body() {
        let body = request.bytes(1 << 20).await?;
        if body.len() > 7 {
            return Err(Error::invalid(
                "starting container with non-empty request body was deprecated since API v1.22 and removed in v1.24",
            ));
        }
    }
    state.engine.containers().start(request.param("id")).await?;
    Ok(Reply::no_content())
}

pub(super) async fn stop(state: State, request: Request) -> Result<Reply, Error> {
    let timeout = request.query().int("t")?;
    state.engine.containers().stop(request.param("id"), timeout, request.query().text("signal")).await?;
    Ok(Reply::no_content())
}

pub(super) async fn restart(state: State, request: Request) -> Result<Reply, Error> {
    let timeout = request.query().int("t")?;
    state.engine.containers().restart(request.param("id"), timeout, request.query().text("signal")).await?;
    Ok(Reply::no_content())
}

pub(super) async fn kill(state: State, request: Request) -> Result<Reply, Error> {
    state.engine.containers().kill(request.param("id"), request.query().text("signal")).await?;
    Ok(Reply::no_content())
}

pub(super) async fn pause(state: State, request: Request) -> Result<Reply, Error> {
    state.engine.containers().pause(request.param("id")).await?;
    Ok(Reply::no_content())
}

pub(super) async fn unpause(state: State, request: Request) -> Result<Reply, Error> {
    state.engine.containers().unpause(request.param("id")).await?;
    Ok(Reply::no_content())
}

pub(super) async fn wait(state: State, request: Request) -> Result<Reply, Error> {
    let condition = Condition::parse(request.query().text("condition").unwrap_or_default())?;
    let waiting = state.engine.containers().wait(request.param("id"), condition)?;
    Ok(Reply::json_later(async move {
        let waited = waiting.done().await?;
        let error = waited.error.map(|message| json!({ "Message": message }));
        let mut document = json!({ "StatusCode": waited.exit_code });
        if let Some(error) = error {
            document["Error"] = error;
        }
        Ok::<Value, Error>(document)
    }))
}

pub(super) async fn attach(state: State, request: Request) -> Result<Reply, Error> {
    let query = request.query();
    let wanted = AttachRequest {
        stdin: query.flag("stdin"),
        stdout: query.flag("stdout"),
        stderr: query.flag("stderr"),
        stream: query.flag("stream"),
        logs: query.flag("logs"),
        detach_keys: query.text("detachKeys").unwrap_or_default().to_owned(),
        unframed: false,
    };
    let attached = state.engine.containers().attach(request.param("id"), wanted).await?;
    let stream_type = StreamType::announced(attached.tty(), request.version());
    Ok(Reply::hijack(&request, stream_type, |stream| async move {
        if let Err(error) = attached.join(stream).await {
            tracing::debug!(%error, "an attached client has left");
        }
    }))
}

pub(super) async fn resize(state: State, request: Request) -> Result<Reply, Error> {
    let (height, width) = size(&request)?;
    state.engine.containers().resize(request.param("id"), height, width).await?;
    Ok(Reply::empty(http::StatusCode::OK))
}

pub(super) async fn rename(state: State, request: Request) -> Result<Reply, Error> {
    let name = request.query().text("name").unwrap_or_default();
    state.engine.containers().rename(request.param("id"), name).await?;
    Ok(Reply::no_content())
}

async fn update(state: State, mut request: Request) -> Result<Reply, Error> {
    let body: ContainerUpdateBody = request.json_body().await?;
    let warnings = state.engine.containers().update(request.param("id"), body).await?;
    Reply::json(&json!({ "Warnings": warnings }))
}

pub(super) async fn remove(state: State, request: Request) -> Result<Reply, Error> {
    let query = request.query();
    if query.flag("link") {
        return Err(Error::invalid(format!(
            "cannot remove the link {}: expected CONTAINER/ALIAS",
            request.param("id")
        )));
    }
    state.engine.containers().remove(request.param("id"), query.flag("force"), query.flag("v")).await?;
    Ok(Reply::no_content())
}

async fn remove_link(state: State, request: Request) -> Result<Reply, Error> {
    if !request.query().flag("link") {
        return Err(Error::not_found("page not found"));
    }
    state.engine.containers().remove_link(request.param("id"), request.param("link")).await?;
    Ok(Reply::no_content())
}

/// Whether a client of this version knows JSON lines.
pub(super) fn knows_json_lines(version: ApiVersion) -> bool {
    version >= ApiVersion::v1(52)
}
