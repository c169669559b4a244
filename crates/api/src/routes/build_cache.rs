//! The build cache: what it takes, giving it back, and what the last builds did.

use std::collections::BTreeMap;

use brigantine_build::{Builder, Chosen, Entry, Prune, Space};
use brigantine_engine::events::Kind;
use serde_json::{Value, json};

use super::State;
use crate::http::{Error, Query, Reply, Request, Router};

/// Binds the area's routes; the second is ours.
pub fn bind(router: &mut Router<State>) {
    router.post("/build/prune", prune).get("/build/history", history);
}

/// Runs what blocks on the builder.
pub(super) async fn blocking<T: Send + 'static>(
    state: &State,
    work: impl FnOnce(&Builder) -> Result<T, brigantine_build::Error> + Send + 'static,
) -> Result<T, Error> {
    let builder = state.engine.builder().clone();
    let done = tokio::task::spawn_blocking(move || work(&builder))
        .await
        .map_err(|error| Error::internal(format!("the builder ended early: {error}")))?;
    Ok(done.map_err(brigantine_engine::Error::from)?)
}

/// The cache as `GET /system/df` shows it.
pub async fn usage(state: &State) -> Result<Value, Error> {
    let entries = blocking(state, Builder::usage).await?;
    let time =
        |nanos: i64| jiff::Timestamp::from_nanosecond(i128::from(nanos)).unwrap_or_default().to_string();
    let entry = |entry: &Entry| {
        json!({
            "ID": entry.id,
            "Parents": null,
            "Type": entry.kind,
            "Description": entry.description,
            "InUse": entry.in_use,
            "Shared": entry.shared,
            "Size": entry.size,
            "CreatedAt": time(entry.created),
            "LastUsedAt": time(entry.used),
            "UsageCount": entry.uses,
        })
    };
    Ok(entries.iter().map(entry).collect())
}

async fn history(state: State, _request: Request) -> Result<Reply, Error> {
    Reply::json(&blocking(&state, Builder::history).await?)
}

/// `10GB`, or a number of bytes.
fn bytes(query: &Query, key: &str) -> Result<Option<u64>, Error> {
    match query.text(key) {
        None => Ok(None),
        Some(text) => brigantine_build::dockerfile::mount::bytes(text)
            .and_then(|bytes| u64::try_from(bytes).ok())
            .map(|bytes| Some(bytes).filter(|bytes| *bytes > 0))
            .ok_or_else(|| Error::invalid(format!("invalid value for {key}: {text:?} is not a size"))),
    }
}

async fn prune(state: State, request: Request) -> Result<Reply, Error> {
    let filters = request.filters(&[
        "until",
        "unused-for",
        "id",
        "parent",
        "type",
        "description",
        "inuse",
        "shared",
        "private",
        "label",
        "label!",
    ])?;
    // What is cached has no labels: `system prune --filter label=…` means none of it.
    if filters.get("label").next().is_some() {
        return Reply::json(&json!({ "CachesDeleted": null, "SpaceReclaimed": 0 }));
    }
    let query = request.query();
    let mut chosen = Chosen::default();
    for (key, values) in filters.iter().filter(|(key, _)| !matches!(*key, "label!" | "parent")) {
        for value in values {
            brigantine_build::filter(&mut chosen, key, value).map_err(brigantine_engine::Error::from)?;
        }
    }
    let size = |key: &str| Ok::<u64, Error>(bytes(query, key)?.unwrap_or_default());
    // The older name, and the one that replaced it: what may stay. Without a cap beside it, it is the cap.
    let kept = size("keep-storage")?.max(size("reserved-space")?);
    let mut space =
        Space { reserved: kept, max_used: size("max-used-space")?, min_free: size("min-free-space")? };
    if space.max_used == 0 && space.min_free == 0 {
        space.max_used = kept;
    }
    let wanted = Prune { all: query.flag("all"), chosen, space };
    let builder = state.engine.builder().clone();
    let pruned = tokio::task::spawn_blocking(move || builder.prune(&wanted))
        .await
        .map_err(|error| Error::internal(format!("the prune ended early: {error}")))?
        .map_err(brigantine_engine::Error::from)?;
    // Layers that only the cache had.
    state.engine.containers().collect_layers().await;
    let attributes = BTreeMap::from([("reclaimed".to_owned(), pruned.reclaimed.to_string())]);
    state.engine.events().publish(Kind::Builder, "prune", "", attributes);
    Reply::json(&json!({
        "CachesDeleted": (!pruned.deleted.is_empty()).then_some(pruned.deleted),
        "SpaceReclaimed": pruned.reclaimed,
    }))
}
