//! The Engine API through a project's socket: the same handlers, let at the project's objects only.
//!
//! Invariants: an endpoint that is not bound here does not exist on such a socket. A handler that is bound gets full
//! ids of objects that were found among the project's, never what the client wrote; a struct that a handler carries out
//! is the one that [`policy`] decided on. Another project's object is answered as one that is not there.

mod policy;

use std::future::Future;
use std::sync::Arc;

use bollard_stubs::models::{
    ContainerUpdateBody, ExecConfig, NetworkConnectRequest, NetworkCreateRequest, NetworkDisconnectRequest,
    VolumeCreateRequest,
};
use brigantine_engine::Filters;
use brigantine_engine::project::{Confinement, LABEL};
use brigantine_engine::sockets::{Allow, Socket};
use http::StatusCode;
use serde_json::json;

use super::State;
use super::{containers, events, exec, files, images, networks, system, transfer, volumes, websocket};
use crate::http::router::HandlerFuture;
use crate::http::version::ApiVersion;
use crate::http::{Class, Error, Reply, Request, Router};

/// What handlers of a project's socket share.
#[derive(Clone)]
pub struct Scoped {
    state: State,
    socket: Arc<Socket>,
}

impl Scoped {
    pub fn new(state: State, socket: Socket) -> Self {
        Self { state, socket: Arc::new(socket) }
    }

    fn project(&self) -> &str {
        &self.socket.project
    }

    fn confinement(&self) -> Result<Confinement, Error> {
        Ok(self.state.engine.sockets().confinement(&self.socket.name)?)
    }

    /// A permission that the request needs. A socket that was removed has none any more.
    fn need(&self, allow: Allow) -> Result<(), Error> {
        let socket = self.state.engine.sockets().get(&self.socket.name)?;
        if socket.allow.contains(&allow) {
            return Ok(());
        }
        Err(Error::forbidden(format!(
            "the socket {} is not allowed this: it would take the permission {}",
            socket.name,
            allow.as_str()
        )))
    }

    fn container(&self, reference: &str) -> Result<String, Error> {
        Ok(self.state.engine.containers().resolve_within(reference, self.project())?)
    }

    fn network(&self, reference: &str) -> Result<String, Error> {
        Ok(self.state.engine.networks().resolve_within(reference, self.project())?)
    }

    /// The filters of a list or prune of objects that only requests give labels.
    fn filters(&self, request: &Request, known: &[&str]) -> Result<Filters, Error> {
        let mut filters = containers::filters(request, known)?;
        filters.0.entry("label".to_owned()).or_default().push(format!("{LABEL}={}", self.project()));
        Ok(filters)
    }

    /// Puts the project's label among those of a new object.
    fn label(&self, labels: &mut Option<std::collections::HashMap<String, String>>) {
        labels.get_or_insert_default().insert(LABEL.to_owned(), self.project().to_owned());
    }
}

/// The routes of a project's socket.
pub fn bind() -> Router<Scoped> {
    use Allow::{Containers, Exec, Files, Networks, Volumes};
    let mut router = Router::new();
    router
        .get("/_ping", plain(system::ping))
        .head("/_ping", plain(system::ping))
        .get("/version", plain(system::version))
        .get("/info", info)
        .get("/events", events)
        .get("/containers/json", list_containers)
        .post("/containers/create", create_container)
        .post("/containers/prune", prune_containers)
        .get("/containers/{id}/json", of_container(None, containers::inspect))
        .get("/containers/{id}/top", of_container(None, containers::top))
        .get("/containers/{id}/logs", of_container(None, containers::logs))
        .get("/containers/{id}/stats", of_container(None, containers::stats))
        .post("/containers/{id}/wait", of_container(None, containers::wait))
        .post("/containers/{id}/start", of_container(Some(Containers), containers::start))
        .post("/containers/{id}/stop", of_container(Some(Containers), containers::stop))
        .post("/containers/{id}/restart", of_container(Some(Containers), containers::restart))
        .post("/containers/{id}/kill", of_container(Some(Containers), containers::kill))
        .post("/containers/{id}/pause", of_container(Some(Containers), containers::pause))
        .post("/containers/{id}/unpause", of_container(Some(Containers), containers::unpause))
        .post("/containers/{id}/attach", of_container(Some(Containers), containers::attach))
        .get("/containers/{id}/attach/ws", of_container(Some(Containers), websocket::attach))
        .post("/containers/{id}/resize", of_container(Some(Containers), containers::resize))
        .post("/containers/{id}/rename", of_container(Some(Containers), containers::rename))
        .post("/containers/{id}/update", update_container)
        .delete("/containers/{id}", of_container(Some(Containers), containers::remove))
        .post("/containers/{id}/exec", create_exec)
        .post("/exec/{id}/start", of_exec(Some(Exec), exec::start))
        .post("/exec/{id}/resize", of_exec(Some(Exec), exec::resize))
        .get("/exec/{id}/json", of_exec(None, exec::inspect))
        .get("/containers/{id}/changes", of_container(Some(Files), files::changes))
        .get("/containers/{id}/export", of_container(Some(Files), files::export))
        .get("/containers/{id}/archive", of_container(Some(Files), files::read))
        .head("/containers/{id}/archive", of_container(Some(Files), files::stat))
        .put("/containers/{id}/archive", of_container(Some(Files), files::extract))
        .get("/images/json", list_images)
        .get("/images/{name:.*}/json", of_image(images::inspect))
        .get("/images/{name:.*}/history", of_image(images::history))
        .post("/images/create", pull)
        .get("/volumes", list_volumes)
        .post("/volumes/create", create_volume)
        .post("/volumes/prune", prune_volumes)
        .get("/volumes/{name}", of_volume(None, volumes::inspect))
        .delete("/volumes/{name}", of_volume(Some(Volumes), volumes::remove))
        .get("/networks", list_networks)
        .post("/networks/create", create_network)
        .post("/networks/prune", prune_networks)
        .post("/networks/{id}/connect", connect_network)
        .post("/networks/{id}/disconnect", disconnect_network)
        .get("/networks/{id}", of_network(None, networks::inspect))
        .delete("/networks/{id}", of_network(Some(Networks), networks::remove));
    for method in [
        http::Method::GET,
        http::Method::HEAD,
        http::Method::POST,
        http::Method::PUT,
        http::Method::DELETE,
        http::Method::PATCH,
    ] {
        router.route(method, "/{any:.*}", refuse);
    }
    router.route(http::Method::OPTIONS, "/{any:.*}", plain(crate::http::server::options));
    router
}

async fn refuse(_scoped: Scoped, request: Request) -> Result<Reply, Error> {
    Err(Error::forbidden(format!(
        "{} {} is not available through a project's socket",
        request.method(),
        request.path()
    )))
}

/// A handler that has nothing to do with any object.
fn plain<H, F>(handler: H) -> impl Fn(Scoped, Request) -> HandlerFuture + Send + Sync + 'static
where
    H: Fn(State, Request) -> F + Send + Sync + 'static,
    F: Future<Output = Result<Reply, Error>> + Send + 'static,
{
    move |scoped, request| Box::pin(handler(scoped.state, request))
}

/// A handler of one object, which `find` looks up: it gets what was found in place of the path's word.
fn of<H, F, L>(
    param: &'static str,
    need: Option<Allow>,
    find: L,
    handler: H,
) -> impl Fn(Scoped, Request) -> HandlerFuture + Send + Sync + 'static
where
    H: Fn(State, Request) -> F + Send + Sync + 'static,
    F: Future<Output = Result<Reply, Error>> + Send + 'static,
    L: Fn(&Scoped, &str) -> Result<String, Error> + Send + Sync + 'static,
{
    move |scoped, mut request| {
        let found = need
            .map_or(Ok(()), |allow| scoped.need(allow))
            .and_then(|()| find(&scoped, request.param(param)));
        match found {
            Ok(id) => {
                request.set_param(param, id);
                Box::pin(handler(scoped.state, request))
            }
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}

fn of_container<H, F>(
    need: Option<Allow>,
    handler: H,
) -> impl Fn(Scoped, Request) -> HandlerFuture + Send + Sync + 'static
where
    H: Fn(State, Request) -> F + Send + Sync + 'static,
    F: Future<Output = Result<Reply, Error>> + Send + 'static,
{
    of("id", need, Scoped::container, handler)
}

fn of_network<H, F>(
    need: Option<Allow>,
    handler: H,
) -> impl Fn(Scoped, Request) -> HandlerFuture + Send + Sync + 'static
where
    H: Fn(State, Request) -> F + Send + Sync + 'static,
    F: Future<Output = Result<Reply, Error>> + Send + 'static,
{
    of("id", need, Scoped::network, handler)
}

fn of_exec<H, F>(
    need: Option<Allow>,
    handler: H,
) -> impl Fn(Scoped, Request) -> HandlerFuture + Send + Sync + 'static
where
    H: Fn(State, Request) -> F + Send + Sync + 'static,
    F: Future<Output = Result<Reply, Error>> + Send + 'static,
{
    let find = |scoped: &Scoped, id: &str| {
        scoped.state.engine.containers().exec_within(id, scoped.project())?;
        Ok(id.to_owned())
    };
    of("id", need, find, handler)
}

fn of_volume<H, F>(
    need: Option<Allow>,
    handler: H,
) -> impl Fn(Scoped, Request) -> HandlerFuture + Send + Sync + 'static
where
    H: Fn(State, Request) -> F + Send + Sync + 'static,
    F: Future<Output = Result<Reply, Error>> + Send + 'static,
{
    let find = |scoped: &Scoped, name: &str| {
        scoped.state.engine.volumes().within(name, scoped.project())?;
        Ok(name.to_owned())
    };
    of("name", need, find, handler)
}

/// A handler of an image that the project may use.
fn of_image<H, F>(handler: H) -> impl Fn(Scoped, Request) -> HandlerFuture + Send + Sync + 'static
where
    H: Fn(State, Request) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Reply, Error>> + Send + 'static,
{
    move |scoped, mut request| {
        let handler = handler.clone();
        Box::pin(async move {
            let grant = scoped.confinement()?.images;
            let image = scoped.state.engine.images().resolve_within(request.param("name"), &grant).await?;
            request.set_param("name", image.id.to_string());
            handler(scoped.state, request).await
        })
    }
}

async fn info(scoped: Scoped, _request: Request) -> Result<Reply, Error> {
    let grant = scoped.confinement()?.images;
    let images = scoped
        .state
        .engine
        .images()
        .with(move |store| Ok(store.list()?.iter().filter(|image| grant.admit(image)).count()))
        .await?;
    let counts = scoped.state.engine.containers().counts_within(scoped.project());
    Reply::json(&system::about(&scoped.state, counts, images))
}

async fn events(scoped: Scoped, request: Request) -> Result<Reply, Error> {
    let project = scoped.project().to_owned();
    events::events_of(&scoped.state, &request, Some(project))
}

async fn list_containers(scoped: Scoped, request: Request) -> Result<Reply, Error> {
    let project = scoped.project().to_owned();
    containers::list_of(scoped.state, request, Some(project)).await
}

async fn create_container(scoped: Scoped, mut request: Request) -> Result<Reply, Error> {
    scoped.need(Allow::Containers)?;
    let mut wanted = containers::creation(&mut request).await?;
    let low_ports = scoped.need(Allow::LowPorts).is_ok();
    for named in policy::container(&mut wanted.body, low_ports)?.containers {
        *named = rewritten(named, |reference| scoped.container(reference))?;
    }
    wanted.within = Some(scoped.confinement()?);
    containers::created(&scoped.state, wanted).await.map_err(without_owner)
}

/// `container:NAME` or `NAME[:MODE]` with the id of the project's container of that name.
fn rewritten(text: &str, find: impl Fn(&str) -> Result<String, Error>) -> Result<String, Error> {
    if let Some(reference) = text.strip_prefix("container:") {
        return Ok(format!("container:{}", find(reference)?));
    }
    let (reference, mode) = text.split_once(':').map_or((text, None), |(name, mode)| (name, Some(mode)));
    let id = find(reference)?;
    Ok(mode.map_or_else(|| id.clone(), |mode| format!("{id}:{mode}")))
}

/// A conflict over a name, without the id of whoever has it.
fn without_owner(error: Error) -> Error {
    match error.message.split_once(" is already in use by container") {
        Some((name, _)) if error.class == Class::Conflict => {
            Error::conflict(format!("{name} is already in use"))
        }
        _ => error,
    }
}

async fn prune_containers(scoped: Scoped, request: Request) -> Result<Reply, Error> {
    scoped.need(Allow::Containers)?;
    let filters = containers::filters(&request, &["label", "label!", "until"])?;
    Reply::json(&scoped.state.engine.containers().prune(&filters, Some(scoped.project())).await?)
}

async fn update_container(scoped: Scoped, mut request: Request) -> Result<Reply, Error> {
    scoped.need(Allow::Containers)?;
    let id = scoped.container(request.param("id"))?;
    let body: ContainerUpdateBody = request.json_body().await?;
    policy::update(&body)?;
    let warnings = scoped.state.engine.containers().update(&id, body).await?;
    Reply::json(&json!({ "Warnings": warnings }))
}

async fn create_exec(scoped: Scoped, mut request: Request) -> Result<Reply, Error> {
    scoped.need(Allow::Exec)?;
    let id = scoped.container(request.param("id"))?;
    let config: ExecConfig = request.json_body().await?;
    policy::exec(&config)?;
    let id = scoped.state.engine.containers().exec_create(&id, config).await?;
    Reply::created(&json!({ "Id": id }))
}

async fn list_images(scoped: Scoped, request: Request) -> Result<Reply, Error> {
    let grant = scoped.confinement()?.images;
    let filters = Filters(request.filters(images::KNOWN)?.into_map());
    for name in ["before", "since"].iter().flat_map(|key| filters.values(key)) {
        scoped.state.engine.images().resolve_within(name, &grant).await?;
    }
    images::list_of(scoped.state, request, Some(grant)).await
}

async fn pull(scoped: Scoped, request: Request) -> Result<Reply, Error> {
    scoped.need(Allow::Pull)?;
    if request.query().text("fromSrc").is_some() {
        return Err(Error::forbidden("importing an image is not available through a project's socket"));
    }
    let socket = scoped.socket.name.clone();
    transfer::pull(scoped.state, request, Some(socket)).await
}

async fn list_volumes(scoped: Scoped, request: Request) -> Result<Reply, Error> {
    let filters = scoped.filters(&request, &["dangling", "driver", "label", "name"])?;
    Reply::json(&scoped.state.engine.volumes().list(&filters).await?)
}

async fn create_volume(scoped: Scoped, mut request: Request) -> Result<Reply, Error> {
    scoped.need(Allow::Volumes)?;
    let mut wanted: VolumeCreateRequest = request.json_body_opt().await?.unwrap_or_default();
    policy::volume(&wanted)?;
    scoped.label(&mut wanted.labels);
    let made = scoped.state.engine.volumes().create(wanted).await?;
    // One of that name may have been there, of another project's.
    let name = made["Name"].as_str().unwrap_or_default();
    scoped
        .state
        .engine
        .volumes()
        .within(name, scoped.project())
        .map_err(|_foreign| Error::conflict(format!("the volume name {name} is already in use")))?;
    Reply::created(&made)
}

async fn prune_volumes(scoped: Scoped, request: Request) -> Result<Reply, Error> {
    scoped.need(Allow::Volumes)?;
    let filters = scoped.filters(&request, &["all", "label", "label!"])?;
    let named_too = request.version() < ApiVersion::v1(42);
    Reply::json(&scoped.state.engine.volumes().prune(&filters, named_too).await?)
}

async fn list_networks(scoped: Scoped, request: Request) -> Result<Reply, Error> {
    let filters = scoped.filters(&request, networks::KNOWN)?;
    Reply::json(&scoped.state.engine.containers().list_networks(&filters)?)
}

async fn create_network(scoped: Scoped, mut request: Request) -> Result<Reply, Error> {
    scoped.need(Allow::Networks)?;
    let mut wanted: NetworkCreateRequest = request.json_body().await?;
    policy::network(&wanted)?;
    scoped.label(&mut wanted.labels);
    Reply::created(&scoped.state.engine.networks().create(wanted).await?)
}

async fn prune_networks(scoped: Scoped, request: Request) -> Result<Reply, Error> {
    scoped.need(Allow::Networks)?;
    let filters = scoped.filters(&request, &["label", "label!", "until"])?;
    Reply::json(&scoped.state.engine.containers().prune_networks(&filters).await?)
}

async fn connect_network(scoped: Scoped, mut request: Request) -> Result<Reply, Error> {
    scoped.need(Allow::Networks)?;
    let network = scoped.network(request.param("id"))?;
    let wanted: NetworkConnectRequest = request.json_body().await?;
    let container = scoped.container(&wanted.container)?;
    if let Some(settings) = &wanted.endpoint_config {
        policy::endpoint(settings)?;
    }
    let containers = scoped.state.engine.containers();
    containers.connect_network(&network, &container, wanted.endpoint_config).await?;
    Ok(Reply::empty(StatusCode::OK))
}

async fn disconnect_network(scoped: Scoped, mut request: Request) -> Result<Reply, Error> {
    scoped.need(Allow::Networks)?;
    let network = scoped.network(request.param("id"))?;
    let wanted: NetworkDisconnectRequest = request.json_body().await?;
    let container = scoped.container(&wanted.container)?;
    let force = wanted.force.unwrap_or_default();
    scoped.state.engine.containers().disconnect_network(&network, &container, force).await?;
    Ok(Reply::empty(StatusCode::OK))
}
