//! Removing images, by name or all that nobody uses.
//!
//! Invariant: what a container was made of stays, and each step is told in the answer and in the events.

use std::collections::BTreeMap;

use brigantine_engine::events::Kind;
use brigantine_image::Removed;
use serde_json::{Value, json};

use super::choice::moment;
use super::{announce, timestamp};
use crate::http::{Error, Reply, Request};
use crate::routes::State;

/// docker's document of one step of a removal.
fn removed(step: &Removed) -> Value {
    match step {
        Removed::Untagged(name) => json!({ "Untagged": name }),
        Removed::Deleted(digest) => json!({ "Deleted": digest.to_string() }),
    }
}

fn announce_removed(state: &State, id: &str, steps: &[Removed]) {
    for step in steps {
        match step {
            Removed::Untagged(name) => announce(state, "untag", id, name),
            // Layers are told of in the answer, images in the events.
            Removed::Deleted(digest) if digest.as_str() == id => announce(state, "delete", id, id),
            Removed::Deleted(_) => {}
        }
    }
}

pub(super) async fn remove(state: State, request: Request) -> Result<Reply, Error> {
    let name = request.param("name").to_owned();
    if name.trim().is_empty() {
        return Err(Error::invalid("image name cannot be blank"));
    }
    let force = request.query().flag("force");
    let prune = !request.query().flag("noprune");
    let of = state.clone();
    let (id, steps) = state
        .engine
        .images()
        .with(move |store| {
            let id = store.resolve_id(&name)?;
            Ok((id, store.remove(&name, force, prune, &of.engine.containers().images_in_use())?))
        })
        .await?;
    state.engine.images().forget();
    state.engine.check_build_cache();
    announce_removed(&state, id.as_str(), &steps);
    Reply::json(&steps.iter().map(removed).collect::<Vec<_>>())
}

pub(super) async fn prune(state: State, request: Request) -> Result<Reply, Error> {
    let filters = request.filters(&["dangling", "label", "label!", "until"])?;
    // Without the filter only images without a name go; `dangling=false` is every unused one.
    let all = filters.flag("dangling")? == Some(false);
    let until = filters.get("until").map(moment).collect::<Result<Vec<_>, _>>()?;
    let of = state.clone();
    let pruned = state
        .engine
        .images()
        .with(move |store| {
            store.prune(all, &of.engine.containers().images_in_use(), |image| {
                let created = timestamp(image.created.as_deref()).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
                let labels = &image.config.config.labels;
                until.iter().all(|until| created < *until)
                    && filters.match_labels(|key| labels.get(key).map(String::as_str))
            })
        })
        .await?;
    state.engine.images().forget();
    state.engine.check_build_cache();
    for step in &pruned.removed {
        match step {
            Removed::Untagged(name) => announce(&state, "untag", name, name),
            Removed::Deleted(digest) => announce(&state, "delete", digest.as_str(), digest.as_str()),
        }
    }
    let attributes = BTreeMap::from([("reclaimed".to_owned(), pruned.reclaimed.to_string())]);
    state.engine.events().publish(Kind::Image, "prune", "", attributes);
    let steps: Vec<Value> = pruned.removed.iter().map(removed).collect();
    Reply::json(&json!({
        "ImagesDeleted": (!steps.is_empty()).then_some(steps),
        "SpaceReclaimed": pruned.reclaimed,
    }))
}
