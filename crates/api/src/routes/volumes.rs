//! `/volumes`: directories that outlive containers.

use bollard_stubs::models::VolumeCreateRequest;

use super::State;
use super::containers::filters;
use crate::http::version::ApiVersion;
use crate::http::{Error, Reply, Request, Router};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router
        .get("/volumes", list)
        .post("/volumes/create", create)
        .post("/volumes/prune", prune)
        .get("/volumes/{name}", inspect)
        .put("/volumes/{name}", update)
        .delete("/volumes/{name}", remove);
}

async fn list(state: State, request: Request) -> Result<Reply, Error> {
    let filters = filters(&request, &["dangling", "driver", "label", "name"])?;
    Reply::json(&state.engine.volumes().list(&filters).await?)
}

async fn create(state: State, mut request: Request) -> Result<Reply, Error> {
    let wanted: VolumeCreateRequest = request.json_body_opt().await?.unwrap_or_default();
    Reply::created(&state.engine.volumes().create(wanted).await?)
}

async fn prune(state: State, request: Request) -> Result<Reply, Error> {
    let filters = filters(&request, &["all", "label", "label!"])?;
    // Before 1.42 the named ones went too.
    let named_too = request.version() < ApiVersion::v1(42);
    Reply::json(&state.engine.volumes().prune(&filters, named_too).await?)
}

pub(super) async fn inspect(state: State, request: Request) -> Result<Reply, Error> {
    Reply::json(&state.engine.volumes().inspect(request.param("name")).await?)
}

async fn update(_state: State, _request: Request) -> Result<Reply, Error> {
    Err(Error::not_implemented("cluster volumes are not supported"))
}

pub(super) async fn remove(state: State, request: Request) -> Result<Reply, Error> {
    state.engine.volumes().remove(request.param("name"), request.query().flag("force")).await?;
    Ok(Reply::no_content())
}
