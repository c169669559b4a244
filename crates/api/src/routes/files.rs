//! Files of containers: `/containers/{id}/archive`, `/changes`, `/export`, and `/commit`.
//!
//! Invariant: what fails before the first byte of an archive is a status; later the connection breaks off, and no
//! client takes a part for the whole.

use std::io::{self, Write};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bollard_stubs::models::ContainerConfig;
use brigantine_engine::files::{CommitRequest, ExtractOptions, PathStat};
use http::{HeaderName, HeaderValue};
use serde_json::json;

use super::State;
use super::images::reference;
use crate::http::{Error, Reply, Request, Router, bridge};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router
        .get("/containers/{id}/changes", changes)
        .get("/containers/{id}/export", export)
        .get("/containers/{id}/archive", read)
        .head("/containers/{id}/archive", stat)
        .put("/containers/{id}/archive", extract)
        .post("/commit", commit);
}

/// Where docker's clients look for a path's properties.
const STAT_HEADER: HeaderName = HeaderName::from_static("x-docker-container-path-stat");

fn described(reply: Reply, stat: &PathStat) -> Result<Reply, Error> {
    let text =
        serde_json::to_vec(stat).map_err(|error| Error::internal(format!("describe a path: {error}")))?;
    let value = HeaderValue::from_str(&STANDARD.encode(text))
        .map_err(|error| Error::internal(format!("describe a path: {error}")))?;
    Ok(reply.header(STAT_HEADER, value))
}

pub(super) async fn stat(state: State, request: Request) -> Result<Reply, Error> {
    let path = request.query().get("path").unwrap_or_default();
    let found = state.engine.containers().find_path(request.param("id"), path).await?;
    described(Reply::empty(http::StatusCode::OK), &found.stat)
}

pub(super) async fn read(state: State, request: Request) -> Result<Reply, Error> {
    let path = request.query().get("path").unwrap_or_default();
    let found = state.engine.containers().archive_path(request.param("id"), path).await?;
    let stat = found.stat.clone();
    described(archive(move |output| found.write(output)), &stat)
}

/// An archive that `write` makes while it is sent.
fn archive(
    write: impl FnOnce(Box<dyn Write + Send>) -> Result<(), brigantine_engine::Error> + Send + 'static,
) -> Reply {
    let (writer, stream) = bridge::writer();
    tokio::task::spawn_blocking(move || {
        let shared = std::sync::Arc::new(std::sync::Mutex::new(Some(writer)));
        let outcome = write(Box::new(Shared(std::sync::Arc::clone(&shared))));
        let writer = shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let Some(mut writer) = writer else { return };
        match outcome.map_err(|error| io::Error::other(error.report())).and_then(|()| writer.flush()) {
            Ok(()) => {}
            Err(error) => {
                tracing::debug!(%error, "an archive breaks off");
                writer.fail(error);
            }
        }
    });
    Reply::stream("application/x-tar", stream)
}

/// The writer stays ours, to break the stream off when what writes to it fails.
struct Shared(std::sync::Arc<std::sync::Mutex<Option<bridge::BlockingWriter>>>);

impl Shared {
    fn with<T>(&self, act: impl FnOnce(&mut bridge::BlockingWriter) -> io::Result<T>) -> io::Result<T> {
        match self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).as_mut() {
            Some(writer) => act(writer),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

impl Write for Shared {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.with(|writer| writer.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.with(Write::flush)
    }
}

pub(super) async fn extract(state: State, mut request: Request) -> Result<Reply, Error> {
    let path = request.query().get("path").unwrap_or_default().to_owned();
    let options = ExtractOptions {
        no_overwrite_dir_non_dir: request.query().flag("noOverwriteDirNonDir"),
        copy_uid_gid: request.query().flag("copyUIDGID"),
    };
    let id = request.param("id").to_owned();
    let body = bridge::of_chunks(request.chunks());
    state.engine.containers().extract(&id, &path, options, body).await?;
    Ok(Reply::empty(http::StatusCode::OK))
}

pub(super) async fn changes(state: State, request: Request) -> Result<Reply, Error> {
    Reply::json(&state.engine.containers().changes(request.param("id")).await?)
}

pub(super) async fn export(state: State, request: Request) -> Result<Reply, Error> {
    let export = state.engine.containers().export(request.param("id")).await?;
    Ok(archive(export))
}

async fn commit(state: State, mut request: Request) -> Result<Reply, Error> {
    let query = request.query();
    let container = query.text("container").unwrap_or_default().to_owned();
    let repository = query.text("repo").unwrap_or_default();
    let wanted = CommitRequest {
        reference: match repository {
            "" => None,
            repository => Some(reference(repository, query.text("tag"))?),
        },
        author: query.text("author").unwrap_or_default().to_owned(),
        comment: query.text("comment").unwrap_or_default().to_owned(),
        changes: query.all("changes").flat_map(str::lines).map(str::to_owned).collect(),
        pause: query.flag_or("pause", true),
        config: None,
    };
    if container.is_empty() {
        return Err(Error::not_found("No such container: "));
    }
    let config: Option<Option<ContainerConfig>> = request.json_body_opt().await?;
    let wanted = CommitRequest { config: config.flatten(), ..wanted };
    let image = state.engine.containers().commit(&container, wanted).await?;
    Reply::created(&json!({ "Id": image.id.to_string() }))
}
