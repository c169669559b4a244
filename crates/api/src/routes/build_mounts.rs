//! Cache mounts as objects: listed, as archives, in registries and in folders of the client's. All of it is ours.
//!
//! Invariant: what fails before anything was carried is a status.

use std::collections::BTreeMap;
use std::io::Write as _;

use brigantine_build::{Carried, MountName, Way};
use brigantine_image::Reference;
use brigantine_registry::Credentials;
use serde::Deserialize;
use serde_json::json;

use super::State;
use super::build_cache::blocking;
use super::transfer::reporter;
use super::{credentials, session};
use crate::http::{Error, Reply, Request, Router, bridge, json as wire};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router
        .get("/build/caches", list)
        .get("/build/caches/archive", archive)
        .put("/build/caches/archive", unpack)
        .post("/build/caches/export", export)
        .post("/build/caches/import", import);
}

async fn list(state: State, _request: Request) -> Result<Reply, Error> {
    Reply::json(&blocking(&state, |builder| Ok(builder.cache_mounts())).await?)
}

/// The cache mount a request names, if it names one.
fn named(request: &Request) -> Option<MountName> {
    let query = request.query();
    let namespace = query.text("namespace").unwrap_or_default().to_owned();
    query.text("id").map(|id| MountName { namespace, id: id.to_owned() })
}

fn mount(request: &Request) -> Result<MountName, Error> {
    named(request).ok_or_else(|| Error::invalid("which cache mount? id= is missing"))
}

async fn archive(state: State, request: Request) -> Result<Reply, Error> {
    let MountName { namespace, id } = mount(&request)?;
    // What is wrong is said before the stream begins, as far as it can be known.
    let (of, asked) = (namespace.clone(), id.clone());
    blocking(&state, move |builder| builder.cache_is_free(&of, &asked)).await?;
    let builder = state.engine.builder().clone();
    let (mut writer, stream) = bridge::writer();
    tokio::task::spawn_blocking(move || {
        let written = builder
            .export_cache(&namespace, &id, &mut writer)
            .map_err(|error| std::io::Error::other(error.report()))
            .and_then(|()| writer.flush());
        if let Err(error) = written {
            tracing::debug!(%error, id, "the export of a cache mount breaks off");
            writer.fail(error);
        }
    });
    Ok(Reply::stream("application/x-tar", stream))
}

async fn unpack(state: State, mut request: Request) -> Result<Reply, Error> {
    let MountName { namespace, id } = mount(&request)?;
    let body = bridge::of_chunks(request.chunks());
    blocking(&state, move |builder| builder.import_cache(&namespace, &id, body)).await?;
    Ok(Reply::no_content())
}

/// A place elsewhere, in the form of a build's `cacheexports`.
#[derive(Deserialize)]
#[serde(default, rename_all = "PascalCase")]
#[derive(Default)]
struct Place {
    r#type: String,
    attrs: BTreeMap<String, String>,
}

impl Place {
    fn of(request: &Request, key: &str) -> Result<Self, Error> {
        let text = request.query().text(key);
        let text = text.ok_or_else(|| Error::invalid(format!("where? {key}= is missing")))?;
        wire::from_slice(text.as_bytes())
            .map_err(|error| Error::invalid(format!("invalid value for {key}: {}", error.message)))
    }

    /// What came with the request for the registry that is meant.
    fn credentials(&self, request: &Request) -> BTreeMap<String, Credentials> {
        let reference = self.attrs.get("ref").and_then(|name| Reference::parse(name).ok());
        let given = credentials::from_header(request);
        reference
            .zip(given)
            .map(|(reference, given)| (reference.domain().to_owned(), given))
            .into_iter()
            .collect()
    }
}

/// Which way a cache mount goes.
enum Direction {
    Export(MountName),
    Import(Option<MountName>),
}

async fn export(state: State, request: Request) -> Result<Reply, Error> {
    let (mount, place) = (mount(&request)?, Place::of(&request, "to")?);
    carry(state, request, place, Direction::Export(mount)).await
}

async fn import(state: State, request: Request) -> Result<Reply, Error> {
    let (mount, place) = (named(&request), Place::of(&request, "from")?);
    carry(state, request, place, Direction::Import(mount)).await
}

/// Carries a cache mount, telling how far it is.
async fn carry(state: State, request: Request, place: Place, direction: Direction) -> Result<Reply, Error> {
    let session = session::named(&state.sessions, request.query().text("session")).await?;
    let credentials = place.credentials(&request);
    Reply::progress(move |sink| async move {
        let _spooled = Spooled(state.clone());
        let (report, pump) = reporter(&sink);
        let carrying = async {
            let way = Way { registry: state.registry.clone(), credentials, session, report };
            let (builder, Place { r#type, attrs }) = (state.engine.builder(), &place);
            let carried = match direction {
                Direction::Export(mount) => builder.send_cache(mount, r#type, attrs, &way).await,
                Direction::Import(mount) => builder.fetch_cache(mount, r#type, attrs, &way).await,
            };
            carried.map_err(brigantine_engine::Error::from)
        };
        let (carried, ()) = tokio::join!(carrying, pump);
        let Carried { mount, manifest, store } = carried?;
        if let Some(store) = store {
            sink.send(&json!({ "aux": { "CacheWritten": { "store": store, "manifest": manifest } } })).await;
        }
        let (digest, size) = (manifest.digest.to_string(), manifest.size);
        let result = json!({ "ID": mount.id, "Namespace": mount.namespace, "Digest": digest, "Size": size });
        sink.send(&json!({ "aux": result })).await;
        Ok(())
    })
    .await
}

/// What lay in the image store on its way is given back, however it ended.
struct Spooled(State);

impl Drop for Spooled {
    fn drop(&mut self) {
        let state = self.0.clone();
        tokio::spawn(async move { state.engine.containers().collect_layers().await });
    }
}
