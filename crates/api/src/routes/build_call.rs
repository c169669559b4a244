//! Ours: what can be told of a Dockerfile without building it, by `POST /build?call=…`, in the shape of the frontend's
//! subrequests.
//!
//! Invariant: nothing is run, and nothing of the request stays.

use brigantine_build::{Event, Request as BuildRequest};
use tokio::sync::mpsc;

use super::State;
use crate::http::{Error, Reply};

/// Events that may wait; nobody is told them.
const BACKLOG: usize = 16;

/// Asks, and lets go of what happens meanwhile.
async fn ask<T, E: Into<brigantine_engine::Error>>(
    question: impl AsyncFnOnce(mpsc::Sender<Event>) -> Result<T, E>,
) -> Result<T, Error> {
    let (sender, mut events) = mpsc::channel::<Event>(BACKLOG);
    let drain = async { while events.recv().await.is_some() {} };
    let (told, ()) = tokio::join!(question(sender), drain);
    told.map_err(|error| error.into().into())
}

/// What the build checks say.
pub async fn check(state: &State, build: BuildRequest) -> Result<Reply, Error> {
    let builder = state.engine.builder().clone();
    Reply::json(&ask(async move |events| builder.check(build, events).await).await?)
}

/// What the target takes.
pub async fn outline(state: &State, build: BuildRequest) -> Result<Reply, Error> {
    let builder = state.engine.builder().clone();
    Reply::json(&ask(async move |events| builder.outline(build, events).await).await?)
}

/// Which targets there are.
pub async fn targets(state: &State, build: BuildRequest) -> Result<Reply, Error> {
    let builder = state.engine.builder().clone();
    Reply::json(&ask(async move |events| builder.targets(build, events).await).await?)
}
