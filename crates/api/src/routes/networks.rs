//! `/networks`: the networks of containers.

use bollard_stubs::models::{NetworkConnectRequest, NetworkCreateRequest, NetworkDisconnectRequest};

use super::State;
use super::containers::filters;
use crate::http::{Error, Reply, Request, Router};

/// Filters of the list.
pub(super) const KNOWN: &[&str] = &["dangling", "driver", "id", "label", "name", "scope", "type"];

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router
        .get("/networks", list)
        .get("/ports", audit)
        .post("/networks/create", create)
        .post("/networks/prune", prune)
        .get("/networks/{id}", inspect)
        .post("/networks/{id}/connect", connect)
        .post("/networks/{id}/disconnect", disconnect)
        .delete("/networks/{id}", remove);
}

async fn list(state: State, request: Request) -> Result<Reply, Error> {
    let filters = filters(&request, KNOWN)?;
    Reply::json(&state.engine.containers().list_networks(&filters)?)
}

/// Ours: each published port, who reaches it, and whose rules decide.
async fn audit(state: State, _request: Request) -> Result<Reply, Error> {
    Reply::json(&state.engine.containers().audit_ports().await?)
}

async fn create(state: State, mut request: Request) -> Result<Reply, Error> {
    let wanted: NetworkCreateRequest = request.json_body().await?;
    Reply::created(&state.engine.networks().create(wanted).await?)
}

async fn prune(state: State, request: Request) -> Result<Reply, Error> {
    let filters = filters(&request, &["label", "label!", "until"])?;
    Reply::json(&state.engine.containers().prune_networks(&filters).await?)
}

pub(super) async fn inspect(state: State, request: Request) -> Result<Reply, Error> {
    Reply::json(&state.engine.containers().inspect_network(request.param("id"))?)
}

async fn connect(state: State, mut request: Request) -> Result<Reply, Error> {
    let wanted: NetworkConnectRequest = request.json_body().await?;
    let containers = state.engine.containers();
    containers.connect_network(request.param("id"), &wanted.container, wanted.endpoint_config).await?;
    Ok(Reply::empty(http::StatusCode::OK))
}

async fn disconnect(state: State, mut request: Request) -> Result<Reply, Error> {
    let wanted: NetworkDisconnectRequest = request.json_body().await?;
    let force = wanted.force.unwrap_or_default();
    state.engine.containers().disconnect_network(request.param("id"), &wanted.container, force).await?;
    Ok(Reply::empty(http::StatusCode::OK))
}

pub(super) async fn remove(state: State, request: Request) -> Result<Reply, Error> {
    state.engine.containers().remove_network(request.param("id")).await?;
    Ok(Reply::no_content())
}
