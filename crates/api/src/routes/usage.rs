//! Disk usage of containers and volumes, for `GET /system/df`.
//!
//! Invariant: sizes are what the files take now, not what was once recorded.

use brigantine_engine::containers::ListOptions;
use serde_json::Value;

use super::State;
use crate::http::Error;

/// Fills in the parts of the document that the engine's other services know.
pub async fn add_containers_and_volumes(
    state: &State,
    document: &mut Value,
    containers: bool,
    volumes: bool,
) -> Result<(), Error> {
    if containers {
        let options = ListOptions { all: true, size: true, ..ListOptions::default() };
        document["Containers"] = state.engine.containers().list(&options).await?.into();
    }
    if volumes {
        document["Volumes"] = state.engine.volumes().usage().await?.into();
    }
    Ok(())
}
