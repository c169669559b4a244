//! The Engine API's endpoints, one file per area; each binds paths to engine calls and nothing else.
//!
//! # Recipe for a route
//!
//! 1. Write a handler. It gets the shared [`State`] and the [`Request`](crate::http::Request):
//!
//!    ```ignore
//!    async fn rename(state: State, mut request: Request) -> Result<Reply, Error> {
//!        let name = request.query().text("name").ok_or_else(|| Error::invalid("…"))?;
//!        state.engine.containers().rename(request.param("id"), name).await?;
//!        Ok(Reply::no_content())
//!    }
//!    ```
//!
//!    * path: `request.param("id")`; query: `request.query().text/flag/flag_or/int/unsigned/all("key")` (docker's rules);
//!      `request.filters(&["label", "name"])?` parses both wire forms and refuses other keys in docker's words
//!    * body: `request.json_body::<T>().await?` (required) or `json_body_opt` (kill, start, wait). `T` is any
//!      `Deserialize`: field names match without case, null is the zero value, map keys are kept, Cmd/Entrypoint may
//!      be plain strings. An archive: `request.reader()` (async) or `bridge::of_chunks(request.chunks())` (blocking `Read`)
//!    * `request.version()` is within 1.24..=1.53; `if request.version() < ApiVersion::v1(42) { … }`
//!    * answers: `Reply::json(&doc)`, `Reply::created(&doc)` (201), `Reply::no_content()`, `Reply::empty(status)`,
//!      `Reply::stream(content_type, stream)` and `Reply::reader(content_type, async_read)` (header flushed at once),
//!      `Reply::json_later(future)` (header at once, document when known: `wait`; register the waiter *before* returning),
//!      `Reply::progress(|sink| async move { … }).await` (docker's `{…}\r\n` objects; an error before the first message
//!      is a status code), `bridge::writer()` for a blocking `Write` as the body
//!    * attach and exec: `Ok(Reply::hijack(&request, StreamType::announced(tty, request.version()), |stream| async move { … }))`.
//!      `stream` is `AsyncRead + AsyncWrite` with every early byte; EOF on read is the client's half-close, `shutdown()`
//!      is ours, dropping closes. The header is already on its way alone. Everything that can fail with a status must
//!      happen before `Reply::hijack`.
//!    * errors: `Error::not_found("No such container: x")` and friends; `?` on the engine's own errors works through
//!      `From`. 304 is `Error::not_modified()`.
//!
//!    GET and HEAD handlers are dropped when their client leaves; all others run to their end. Never block: sync engine
//!    calls go through `tokio::task::spawn_blocking`.
//!
//! 2. Bind it in the area's `pub fn bind(router: &mut Router<State>)`: `router.post("/containers/{id}/rename", rename)`.
//!    `{x}` is one path segment, `{x:.*}` any number of them. First match wins. Unknown → 404 `page not found`.
//! 3. Call the area's `bind` from [`bind`] below.

mod build;
mod build_backlog;
mod build_cache;
mod build_call;
mod build_cancel;
mod build_mounts;
mod build_pass;
mod build_text;
mod build_trace;
mod build_upload;
mod containers;
mod credentials;
mod events;
mod exec;
mod files;
mod host;
mod images;
mod networks;
mod sbom;
pub mod scoped;
mod search;
mod session;
mod sockets;
mod system;
mod transfer;
mod unbuilt;
mod usage;
mod volumes;
mod websocket;

use std::sync::Arc;

use brigantine_engine::Engine;
use brigantine_registry::Client;
use brigantine_session::Sessions;

use crate::daemon::Daemon;
use crate::daemon::options::Live;
use crate::daemon::projects::ProjectSockets;
use crate::http::Router;
use crate::http::gate::Gate;

/// What every handler shares. Cheap to clone.
#[derive(Clone)]
pub struct State {
    pub engine: Engine,
    pub registry: Client,
    pub daemon: Arc<Daemon>,
    /// Where projects' sockets are served.
    pub sockets: Arc<ProjectSockets>,
    /// Who is asked about requests, for further sockets.
    pub gate: Option<Arc<dyn Gate>>,
    /// What clients lend their builds.
    pub sessions: Sessions,
}

impl State {
    pub fn new(engine: Engine, daemon: Arc<Daemon>) -> Self {
        let registry = Client::new(registry_config(&daemon.live()));
        let sessions = Sessions::default();
        Self { engine, registry, daemon, sockets: Arc::default(), gate: None, sessions }
    }

    /// The same with somebody who is asked about requests.
    pub fn with_gate(self, gate: Arc<dyn Gate>) -> Self {
        Self { gate: Some(gate), ..self }
    }

    /// Takes over settings that changed while running.
    pub fn reconfigured(&self, live: &Live) {
        self.registry.reconfigure(registry_config(live));
        self.engine.containers().runtimes().replace(live.runtimes.clone());
    }
}

fn registry_config(live: &Live) -> brigantine_registry::Config {
    brigantine_registry::Config {
        mirrors: live.registry_mirrors.clone(),
        insecure: live.insecure_registries.clone(),
        max_downloads: live.max_concurrent_downloads,
        max_uploads: live.max_concurrent_uploads,
        attempts: live.max_download_attempts,
        http_proxy: live.http_proxy.clone(),
        https_proxy: live.https_proxy.clone(),
        no_proxy: live.no_proxy.clone(),
        ..brigantine_registry::Config::for_host()
    }
}

/// All routes of the API.
pub fn bind() -> Router<State> {
    let mut router = Router::new();
    system::bind(&mut router);
    images::bind(&mut router);
    containers::bind(&mut router);
    exec::bind(&mut router);
    files::bind(&mut router);
    events::bind(&mut router);
    networks::bind(&mut router);
    volumes::bind(&mut router);
    sbom::bind(&mut router);
    search::bind(&mut router);
    build::bind(&mut router);
    session::bind(&mut router);
    build_cache::bind(&mut router);
    build_cancel::bind(&mut router);
    build_mounts::bind(&mut router);
    websocket::bind(&mut router);
    sockets::bind(&mut router);
    unbuilt::bind(&mut router);
    router.route(http::Method::OPTIONS, "/{any:.*}", crate::http::server::options);
    router
}
