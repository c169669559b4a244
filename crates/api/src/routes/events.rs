//! `/events`: what happens, as it happens, and the last few hundred again.

use std::io;

use brigantine_engine::{Filters, parse_moment};
use bytes::Bytes;

use super::State;
use super::containers::{filters, knows_json_lines, line};
use crate::http::{Error, Reply, Request, Router};

const KNOWN: &[&str] = &[
    "config",
    "container",
    "daemon",
    "event",
    "image",
    "label",
    "network",
    "node",
    "plugin",
    "scope",
    "secret",
    "service",
    "type",
    "volume",
];

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router.get("/events", events);
}

async fn events(state: State, request: Request) -> Result<Reply, Error> {
    events_of(&state, &request, None)
}

/// The events of a project's objects, or of all.
pub(super) fn events_of(state: &State, request: &Request, project: Option<String>) -> Result<Reply, Error> {
    let moment = |name: &str| {
        parse_moment(request.query().text(name).unwrap_or_default())
            .map_err(|text| Error::invalid(format!("{name}: {text}")))
    };
    let wanted: Filters = filters(request, KNOWN)?;
    let mut subscription = state.engine.events().subscribe(moment("since")?, moment("until")?, wanted)?;
    if let Some(project) = project {
        subscription = subscription.within(project);
    }
    let accept = request.header("accept").unwrap_or_default();
    let content_type = if !knows_json_lines(request.version()) {
        "application/json"
    } else if accept.contains("application/x-ndjson") {
        "application/x-ndjson"
    } else {
        "application/jsonl"
    };
    let chunks = futures_util::stream::unfold(subscription, |mut subscription| async move {
        let event = subscription.next().await?;
        let chunk: io::Result<Bytes> = line(&event.to_json());
        Some((chunk, subscription))
    });
    Ok(Reply::stream(content_type, chunks))
}
