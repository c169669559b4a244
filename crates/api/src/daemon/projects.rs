//! Serving projects' sockets: one listener each, beside the engine's own.
//!
//! Invariant: a socket is served exactly as long as its record is there and the daemon runs. When one is removed its
//! path goes at once and requests on connections that are still open end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use brigantine_engine::sockets::Socket as Record;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::socket::{self, ListenError, Owner};
use crate::http::server::Server;
use crate::routes::State;
use crate::routes::scoped::{self, Scoped};

/// The sockets that are served.
#[derive(Default)]
pub struct ProjectSockets {
    served: Mutex<HashMap<String, Served>>,
}

struct Served {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    /// Takes the path away when it is dropped.
    socket: socket::Socket,
}

impl ProjectSockets {
    /// Begins to serve a socket.
    pub fn open(&self, state: &State, record: Record) -> Result<(), ListenError> {
        let exec_root = &state.engine.config().exec_root;
        if record.path.starts_with(exec_root) {
            socket::let_pass(exec_root)?;
        }
        let owner = Owner { uid: record.uid, gid: record.gid };
        let mut socket = socket::bind_for(&record.path, owner)?;
        let Some(listener) = socket.listener.take() else { return Ok(()) };
        let (stop, stopped) = watch::channel(false);
        let name = record.name.clone();
        let mut server = Server::new(scoped::bind(), Scoped::new(state.clone(), record));
        if let Some(gate) = &state.gate {
            server = server.with_gate(Arc::clone(gate));
        }
        let server = Arc::new(server);
        let task = tokio::spawn(server.serve(listener, stopped));
        self.table().insert(name, Served { stop, task, socket });
        Ok(())
    }

    /// Opens all that are on record; one that cannot be is reported and left out.
    pub fn open_all(&self, state: &State) {
        for record in state.engine.sockets().all() {
            let name = record.name.clone();
            if let Err(error) = self.open(state, record) {
                let error = crate::http::error::chain(&error);
                tracing::error!(socket = name, error, "a project's socket is not served");
            }
        }
    }

    /// Stops serving one.
    pub fn close(&self, name: &str) {
        if let Some(served) = self.table().remove(name) {
            served.stop.send_replace(true);
            drop(served.socket);
        }
    }

    /// Stops serving all, and waits until they have ended.
    pub async fn close_all(&self) {
        let all: Vec<Served> = self.table().drain().map(|(_, served)| served).collect();
        for served in &all {
            served.stop.send_replace(true);
        }
        for served in all {
            if let Err(error) = served.task.await {
                tracing::warn!(%error, "a project's socket ended early");
            }
        }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, HashMap<String, Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
