//! `/sockets`: projects' sockets, made and removed by those who may do everything. An area of this engine's own.

use std::collections::BTreeSet;
use std::path::PathBuf;

use brigantine_engine::sockets::{Allow, Socket, SocketRequest};
use serde::Deserialize;
use serde_json::{Value, json};

use super::State;
use crate::daemon::socket::Owner;
use crate::http::{Error, Reply, Request, Router};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router.get("/sockets", list).post("/sockets/create", create).delete("/sockets/{name}", remove);
}

/// A request for a socket.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Wanted {
    /// The project's name if not given.
    name: String,
    project: String,
    /// Below the engine's own directory if not given.
    path: String,
    /// `USER[:GROUP]`, root if not given.
    owner: String,
    /// What is usual if not given.
    allow: Option<Vec<String>>,
    /// Names of images, with `*`.
    images: Vec<String>,
}

fn document(socket: &Socket) -> Value {
    json!({
        "Name": socket.name,
        "Project": socket.project,
        "Path": socket.path,
        "Owner": format!("{}:{}", socket.uid, socket.gid),
        "Allow": socket.allow,
        "Images": socket.images.names,
        "PulledImages": socket.images.pulled,
        "Created": socket.created.to_string(),
    })
}

async fn list(state: State, _request: Request) -> Result<Reply, Error> {
    let all: Vec<Value> = state.engine.sockets().all().iter().map(document).collect();
    Reply::json(&all)
}

async fn create(state: State, mut request: Request) -> Result<Reply, Error> {
    let wanted: Wanted = request.json_body().await?;
    let name = if wanted.name.is_empty() { wanted.project.clone() } else { wanted.name };
    let owner = Owner::parse(&wanted.owner).map_err(Error::invalid)?;
    let allow: BTreeSet<Allow> = match wanted.allow {
        None => Allow::USUAL.into_iter().collect(),
        Some(words) => words.iter().map(|word| Allow::parse(word)).collect::<Result<_, _>>()?,
    };
    let path = if wanted.path.is_empty() {
        state.engine.config().exec_root.join("projects").join(format!("{name}.sock"))
    } else {
        PathBuf::from(wanted.path)
    };
    if !path.is_absolute() {
        return Err(Error::invalid(format!("the path of a socket must be absolute: {}", path.display())));
    }
    let (uid, gid) = (owner.uid, owner.gid);
    let request =
        SocketRequest { name, project: wanted.project, path, uid, gid, allow, images: wanted.images };
    let socket = state.engine.sockets().create(request).await?;
    if let Err(error) = state.sockets.open(&state, socket.clone()) {
        state.engine.sockets().remove(&socket.name).await?;
        return Err(Error::invalid(crate::http::error::chain(&error)));
    }
    Reply::created(&document(&socket))
}

async fn remove(state: State, request: Request) -> Result<Reply, Error> {
    let name = request.param("name");
    state.engine.sockets().remove(name).await?;
    state.sockets.close(name);
    Ok(Reply::no_content())
}
