//! `POST /build/cancel?id=`: a build is ended by the id that its client gave it (`buildid`).
//!
//! Invariant: an id is known for exactly as long as its build runs; of several builds of one id all are ended.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::State;
use crate::http::{Error, Reply, Request, Router};

static RUNNING: LazyLock<Mutex<HashMap<String, Vec<Arc<Notify>>>>> = LazyLock::new(Mutex::default);

fn running() -> MutexGuard<'static, HashMap<String, Vec<Arc<Notify>>>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router.post("/build/cancel", cancel);
}

/// An id that nobody has is no mistake: its build may just have ended.
async fn cancel(_state: State, request: Request) -> Result<Reply, Error> {
    let Some(id) = request.query().text("id") else {
        return Err(Error::invalid("build ID not provided"));
    };
    let found = running().get(id).cloned().unwrap_or_default();
    tracing::debug!(id, builds = found.len(), "a build is to be cancelled");
    for build in found {
        build.notify_one();
    }
    Ok(Reply::no_content())
}

/// A build's entry among those that can be cancelled; one without an id has none.
pub struct Registered {
    id: Option<String>,
    told: Arc<Notify>,
}

impl Registered {
    pub fn new(id: Option<String>) -> Self {
        let told = Arc::new(Notify::new());
        if let Some(id) = &id {
            running().entry(id.clone()).or_default().push(Arc::clone(&told));
        }
        Self { id, told }
    }

    /// Returns when the build is to end.
    pub async fn cancelled(&self) {
        self.told.notified().await;
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let Some(id) = &self.id else { return };
        let mut running = running();
        if let Some(builds) = running.get_mut(id) {
            builds.retain(|build| !Arc::ptr_eq(build, &self.told));
            if builds.is_empty() {
                running.remove(id);
            }
        }
    }
}
