//! Images: list, inspect, history, tag, and what registries know about a name; how they go stands in [`removal`].
//!
//! Invariant: names are shown in the form users write them, and documents hold the fields that older clients read
//! at every API version.

mod choice;
mod document;
mod removal;

use std::collections::BTreeMap;

use brigantine_engine::events::Kind;
use brigantine_engine::project::ImageGrant;
use brigantine_image::{Digest, Image, Reference, Storage, Store, explore, first_difference};
use serde::Serialize;
use serde_json::{Value, json};

use choice::Selection;
use document::{descriptor, document, manifests};

use super::State;
use super::credentials;
use crate::http::{ApiVersion, Class, Error, Reply, Request, Router};

/// Filters of the list.
pub(super) const KNOWN: &[&str] =
    &["reference", "dangling", "label", "label!", "before", "since", "until", "containerd.io/gc.ref"];

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router
        .get("/images/json", list)
        .post("/images/prune", removal::prune)
        .get("/images/{name:.*}/json", inspect)
        .get("/images/{name:.*}/history", history)
        .get("/images/{name:.*}/explore", explored)
        .get("/images/{name:.*}/diff", difference)
        .get("/images/{name:.*}/compare", compared)
        .post("/images/{name:.*}/tag", tag)
        .delete("/images/{name:.*}", removal::remove)
        .get("/distribution/{name:.*}/json", distribution);
    super::transfer::bind(router);
}

impl From<brigantine_registry::Error> for Error {
    fn from(error: brigantine_registry::Error) -> Self {
        use brigantine_registry::Class as Registry;
        let class = match error.class() {
            Registry::NotFound => Class::NotFound,
            Registry::Unauthorized => Class::Unauthorized,
            Registry::InvalidParameter => Class::InvalidParameter,
            Registry::Internal => Class::Internal,
        };
        Self::new(class, error.report())
    }
}

/// Publishes an image event as docker names them: the id or name, and the name users know.
pub(super) fn announce(state: &State, action: &str, id: &str, name: &str) {
    let attributes = BTreeMap::from([("name".to_owned(), name.to_owned())]);
    state.engine.events().publish(Kind::Image, action, id, attributes);
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Summary {
    containers: i64,
    created: i64,
    id: String,
    labels: Option<BTreeMap<String, String>>,
    parent_id: String,
    repo_digests: Vec<String>,
    repo_tags: Vec<String>,
    shared_size: i64,
    size: u64,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    descriptor: Option<Value>,
}

impl Summary {
    pub fn of(image: &Image, version: ApiVersion) -> Self {
        let mut repo_tags: Vec<String> = image.tags.iter().map(Reference::familiar).collect();
        let mut repo_digests: Vec<String> = image.digests.iter().map(Reference::familiar).collect();
        if version < ApiVersion::v1(43) && repo_tags.is_empty() && repo_digests.is_empty() {
            repo_tags.push("<none>:<none>".to_owned());
            repo_digests.push("<none>@<none>".to_owned());
        }
        let labels = &image.config.config.labels;
        Self {
            containers: -1,
            created: unix(image.created.as_deref()),
            id: image.id.to_string(),
            labels: (!labels.is_empty()).then(|| labels.clone()),
            parent_id: image.parent.as_ref().map(Digest::to_string).unwrap_or_default(),
            repo_digests,
            repo_tags,
            shared_size: -1,
            size: image.size,
            virtual_size: image.size,
            descriptor: (version >= ApiVersion::v1(48)).then(|| descriptor(image)),
        }
    }

    pub fn with_usage(mut self, shared: u64, containers: usize) -> Self {
        self.shared_size = i64::try_from(shared).unwrap_or(i64::MAX);
        self.containers = i64::try_from(containers).unwrap_or(i64::MAX);
        self
    }
}

/// Ours: how an image differs from another, in words; null where it does not.
async fn compared(state: State, request: Request) -> Result<Reply, Error> {
    let name = request.param("name").to_owned();
    let with =
        request.query().text("with").ok_or_else(|| Error::invalid("with which image? with= is missing"))?;
    let with = with.to_owned();
    let difference = state
        .engine
        .images()
        .with(move |store| first_difference(store, &store.resolve(&name)?, &store.resolve(&with)?))
        .await?;
    Reply::json(&json!({ "Difference": difference }))
}

/// Seconds since the epoch; 0 for what has no date.
fn unix(created: Option<&str>) -> i64 {
    timestamp(created).map_or(0, jiff::Timestamp::as_second)
}

fn timestamp(created: Option<&str>) -> Option<jiff::Timestamp> {
    created.and_then(|created| created.parse().ok())
}

async fn list(state: State, request: Request) -> Result<Reply, Error> {
    list_of(state, request, None).await
}

/// The list of the images that a project may use, or of all.
pub(super) async fn list_of(
    state: State,
    request: Request,
    grant: Option<ImageGrant>,
) -> Result<Reply, Error> {
    let filters = request.filters(KNOWN)?;
    let version = request.version();
    let all = request.query().flag("all");
    let shared_size = request.query().flag("shared-size");
    // Before 1.25 a name was given apart from the filters.
    let name = request.query().text("filter").map(str::to_owned);
    let uses = state.engine.containers().image_uses();
    let summaries = state
        .engine
        .images()
        .with(move |store| {
            let chosen = Selection::new(store, &filters, name.as_deref())?;
            let images = store.list()?;
            let parents: std::collections::HashSet<Digest> =
                images.iter().filter_map(|image| image.parent.clone()).collect();
            let usage = if shared_size { Some(store.usage()?) } else { None };
            let mut summaries = Vec::new();
            for mut image in images {
                if grant.as_ref().is_some_and(|grant| !grant.admit(&image)) {
                    continue;
                }
                let intermediate = image.tags.is_empty() && parents.contains(&image.id);
                if (intermediate && !all) || !chosen.takes(&mut image) {
                    continue;
                }
                let mut summary = Summary::of(&image, version);
                if let Some(usage) = &usage {
                    let shared = usage.images.iter().find(|u| u.image.id == image.id).map_or(0, |u| u.shared);
                    let id = image.id.to_string();
                    let containers = uses.iter().filter(|used| used.image == id).count();
                    summary = summary.with_usage(shared, containers);
                }
                summaries.push(summary);
            }
            Ok(summaries)
        })
        .await?;
    Reply::json(&summaries)
}

pub(super) async fn inspect(state: State, request: Request) -> Result<Reply, Error> {
    let name = request.param("name").to_owned();
    let platforms = super::transfer::platforms(&request)?;
    let with_manifests = request.query().flag("manifests");
    let document = state
        .engine
        .images()
        .with(move |store| {
            let image = store.resolve(&name)?;
            image.require_platform(&name, &platforms)?;
            let files = store.layer_files(&image).unwrap_or_default();
            let mut document = document(&image, &files, driver(store));
            if with_manifests {
                document["Manifests"] = manifests(store, &image)?.into();
            }
            Ok(document)
        })
        .await?;
    Reply::json(&document)
}

/// Docker's name of the driver that does what the store does.
pub(super) fn driver(store: &Store) -> &'static str {
    if store.storage() == Storage::Copy { "vfs" } else { "overlay2" }
}

pub(super) async fn history(state: State, request: Request) -> Result<Reply, Error> {
    let name = request.param("name").to_owned();
    let platforms = super::transfer::platforms(&request)?;
    let lines = state
        .engine
        .images()
        .with(move |store| {
            let image = store.resolve(&name)?;
            image.require_platform(&name, &platforms)?;
            store.history(&image)
        })
        .await?;
    let lines: Vec<Value> = lines
        .into_iter()
        .map(|line| {
            let tags: Vec<String> = line.tags.iter().map(Reference::familiar).collect();
            json!({
                "Id": line.id.map_or_else(|| "<missing>".to_owned(), |id| id.to_string()),
                "Created": unix(line.created.as_deref()),
                "CreatedBy": line.created_by,
                "Tags": (!tags.is_empty()).then_some(tags),
                "Size": line.size,
                "Comment": line.comment,
            })
        })
        .collect();
    Reply::json(&lines)
}

/// Ours: what each layer adds, changes and hides, and what that wastes.
async fn explored(state: State, request: Request) -> Result<Reply, Error> {
    let name = request.param("name").to_owned();
    let explored =
        state.engine.images().with(move |store| explore::explore(store, &store.resolve(&name)?)).await?;
    Reply::json(&explored)
}

/// Ours: how what containers of another image would see differs.
async fn difference(state: State, request: Request) -> Result<Reply, Error> {
    let name = request.param("name").to_owned();
    let Some(other) = request.query().text("with").map(str::to_owned) else {
        return Err(Error::invalid("with is needed: the image to compare with"));
    };
    let found = state
        .engine
        .images()
        .with(move |store| explore::differences(store, &store.resolve(&name)?, &store.resolve(&other)?))
        .await?;
    Reply::json(&found)
}

/// A reference from a name and a tag (or digest) given apart; the tag may also be in the name.
pub(super) fn reference(name: &str, tag: Option<&str>) -> Result<Reference, Error> {
    let invalid = |error: brigantine_image::ReferenceError| Error::invalid(error.to_string());
    let reference = Reference::parse(name).map_err(invalid)?;
    match tag.filter(|tag| !tag.is_empty()) {
        None => Ok(reference),
        Some(tag) => match tag.parse::<Digest>() {
            Ok(digest) => Ok(reference.with_digest(digest)),
            Err(_) => reference.with_tag(tag).map_err(invalid),
        },
    }
}

async fn tag(state: State, request: Request) -> Result<Reply, Error> {
    let name = request.param("name").to_owned();
    let repository = request.query().get("repo").unwrap_or_default();
    let target = reference(repository, request.query().text("tag"))?.or_latest();
    let shown = target.familiar();
    let (id, _) = state.engine.images().with(move |store| store.tag(&name, &target)).await?;
    announce(&state, "tag", id.as_str(), &shown);
    Ok(Reply::empty(http::StatusCode::CREATED))
}

async fn distribution(state: State, request: Request) -> Result<Reply, Error> {
    let reference = reference(request.param("name"), None)?;
    let resolved = state.registry.resolve(&reference, credentials::from_header(&request)).await?;
    Reply::json(&json!({
        "Descriptor": {
            "mediaType": resolved.descriptor.media_type,
            "digest": resolved.descriptor.digest.to_string(),
            "size": resolved.descriptor.size,
        },
        "Platforms": resolved.platforms,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_may_come_in_either_place() {
        let shown = |name, tag| reference(name, tag).unwrap().familiar();
        assert_eq!(shown("docker.io/library/debian", Some("bookworm")), "debian:bookworm");
        assert_eq!(shown("debian:bookworm", Some("")), "debian:bookworm");
        let digest = format!("sha256:{}", "0".repeat(64));
        assert_eq!(shown("debian", Some(&digest)), format!("debian@{digest}"));
        assert!(reference("Debian", None).is_err());
        assert!(reference("debian", Some("a/b")).is_err());
        assert!(reference("", None).is_err());
    }
}
