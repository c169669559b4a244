//! Images: list, inspect, history, tag, remove, prune, and what registries know about a name.
//!
//! Invariant: names are shown in the form users write them, and documents hold the fields that older clients read
//! at every API version.

use std::collections::BTreeMap;

use brigantine_engine::events::Kind;
use brigantine_engine::project::ImageGrant;
use brigantine_image::{
    Digest, Image, ImageConfig, LayerFiles, Reference, Removed, Storage, Store, explore, first_difference,
};
use serde::Serialize;
use serde_json::{Value, json};

use super::State;
use super::credentials;
use crate::http::{ApiVersion, Class, Error, Filters, Reply, Request, Router};

/// Filters of the list.
pub(super) const KNOWN: &[&str] =
    &["reference", "dangling", "label", "label!", "before", "since", "until", "containerd.io/gc.ref"];

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router
        .get("/images/json", list)
        .post("/images/prune", prune)
        .get("/images/{name:.*}/json", inspect)
        .get("/images/{name:.*}/history", history)
        .get("/images/{name:.*}/explore", explored)
        .get("/images/{name:.*}/diff", difference)
        .get("/images/{name:.*}/compare", compared)
        .post("/images/{name:.*}/tag", tag)
        .delete("/images/{name:.*}", remove)
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

fn descriptor(image: &Image) -> Value {
    let descriptor = image.index.as_ref().unwrap_or(&image.manifest);
    json!({
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest.to_string(),
        "size": descriptor.size,
    })
}

/// What an index names, as clients of 1.48 read it; nothing for an image without one.
fn manifests(store: &Store, image: &Image) -> Result<Vec<Value>, brigantine_image::Error> {
    let mut all = Vec::new();
    for one in image.index.iter().map(|index| store.indexed(index)).collect::<Result<Vec<_>, _>>()?.concat() {
        let content =
            one.manifest.config.size + one.manifest.layers.iter().map(|layer| layer.size).sum::<u64>();
        let attested = one.descriptor.annotations.get("vnd.docker.reference.digest");
        let mut shown = json!({
            "ID": one.descriptor.digest.to_string(),
            "Descriptor": one.descriptor,
            "Available": true,
            "Size": { "Content": content, "Total": content },
        });
        if let Some(image) = attested {
            shown["Kind"] = "attestation".into();
            shown["AttestationData"] = json!({ "For": image });
        } else {
            shown["Kind"] = "image".into();
            shown["ImageData"] = json!({
                "Platform": one.descriptor.platform,
                "Identity": null,
                "Containers": null,
                "Size": { "Unpacked": 0 },
            });
        }
        all.push(shown);
    }
    Ok(all)
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

/// Which images a list or prune is about.
pub(super) struct Selection {
    filters: Filters,
    references: Vec<String>,
    dangling: Option<bool>,
    before: Vec<jiff::Timestamp>,
    since: Vec<jiff::Timestamp>,
}

impl Selection {
    fn new(store: &Store, filters: &Filters, name: Option<&str>) -> Result<Self, brigantine_image::Error> {
        let invalid = |error: Error| brigantine_image::Error::Invalid(error.message);
        let created = |name: &str| {
            store
                .resolve(name)
                .map(|image| timestamp(image.created.as_deref()).unwrap_or(jiff::Timestamp::UNIX_EPOCH))
        };
        let mut before = filters.get("before").map(created).collect::<Result<Vec<_>, _>>()?;
        for until in filters.get("until") {
            before.push(moment(until).map_err(invalid)?);
        }
        Ok(Self {
            references: filters.get("reference").chain(name).map(str::to_owned).collect(),
            dangling: filters.flag("dangling").map_err(invalid)?,
            before,
            since: filters.get("since").map(created).collect::<Result<Vec<_>, _>>()?,
            filters: filters.clone(),
        })
    }

    /// Whether the image is wanted; names that no `reference` pattern matches are taken from it.
    fn takes(&self, image: &mut Image) -> bool {
        if self.dangling.is_some_and(|dangling| dangling != image.tags.is_empty()) {
            return false;
        }
        let created = timestamp(image.created.as_deref()).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        if self.before.iter().any(|before| created >= *before)
            || self.since.iter().any(|since| created <= *since)
        {
            return false;
        }
        let labels = &image.config.config.labels;
        if !self.filters.match_labels(|key| labels.get(key).map(String::as_str)) {
            return false;
        }
        if !self.references.is_empty() {
            let matches =
                |name: &Reference| self.references.iter().any(|pattern| reference_matches(pattern, name));
            image.tags.retain(|name| matches(name));
            image.digests.retain(|name| matches(name));
            return !image.tags.is_empty() || !image.digests.is_empty();
        }
        true
    }
}

/// Whether a `reference` filter (a glob over the familiar name, with or without tag) matches.
fn reference_matches(pattern: &str, name: &Reference) -> bool {
    let names = [name.familiar(), name.familiar_name(), name.to_string(), name.repository()];
    // A name with dots is shown with its `library/`, and may be asked for without it.
    let short = names.iter().filter_map(|text| text.strip_prefix("library/"));
    names.iter().map(String::as_str).chain(short).any(|text| glob(pattern.as_bytes(), text.as_bytes()))
}

/// Shell patterns as Go's path.Match: `*` and `?` stop at a slash, `[a-z]` is a class, `\` quotes.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => {
            let reach = text.iter().position(|c| *c == b'/').unwrap_or(text.len());
            (0..=reach).any(|skip| glob(rest, &text[skip..]))
        }
        Some((b'?', rest)) => text.first().is_some_and(|c| *c != b'/') && glob(rest, &text[1..]),
        Some((b'[', class)) => {
            let (Some(end), Some(c)) = (class.iter().skip(1).position(|c| *c == b']'), text.first()) else {
                return false;
            };
            let (class, rest) = (&class[..=end], &class[end + 2..]);
            let (negated, class) = class.strip_prefix(b"^").map_or((false, class), |class| (true, class));
            let mut found = false;
            let mut at = 0;
            while at < class.len() {
                if at + 2 < class.len() && class[at + 1] == b'-' {
                    found |= (class[at]..=class[at + 2]).contains(c);
                    at += 3;
                } else {
                    found |= class[at] == *c;
                    at += 1;
                }
            }
            found != negated && glob(rest, &text[1..])
        }
        Some((b'\\', rest)) if !rest.is_empty() => {
            text.first() == rest.first() && glob(&rest[1..], &text[1..])
        }
        Some((c, rest)) => text.first() == Some(c) && glob(rest, &text[1..]),
    }
}

/// A point in time as filters give it: RFC 3339, a date, Unix seconds, or a duration before now (`10m`, `1h30m`).
pub(super) fn moment(text: &str) -> Result<jiff::Timestamp, Error> {
    let wrong = || Error::invalid(format!("invalid value for until: {text:?} is not a time or a duration"));
    if let Ok(seconds) = text.parse::<f64>() {
        return jiff::Timestamp::from_nanosecond((seconds * 1e9) as i128).map_err(|_error| wrong());
    }
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(time);
    }
    if let Some(ago) = brigantine_engine::go_duration(text) {
        let ago = jiff::SignedDuration::try_from(ago).map_err(|_error| wrong())?;
        return jiff::Timestamp::now().checked_sub(ago).map_err(|_error| wrong());
    }
    if let Ok(time) = text.parse::<jiff::civil::DateTime>() {
        return time
            .to_zoned(jiff::tz::TimeZone::system())
            .map(|zoned| zoned.timestamp())
            .map_err(|_error| wrong());
    }
    let date: jiff::civil::Date = text.parse().map_err(|_error| wrong())?;
    date.to_zoned(jiff::tz::TimeZone::system()).map(|zoned| zoned.timestamp()).map_err(|_error| wrong())
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

fn document(image: &Image, layers: &[LayerFiles], driver: &str) -> Value {
    let config: &ImageConfig = &image.config;
    let names = |names: &[Reference]| names.iter().map(Reference::familiar).collect::<Vec<_>>();
    let mut document = json!({
        "Id": image.id.to_string(),
        "RepoTags": names(&image.tags),
        "RepoDigests": names(&image.digests),
        "Parent": image.parent.as_ref().map(Digest::to_string).unwrap_or_default(),
        "Comment": config.comment.clone().unwrap_or_default(),
        "Created": config.created.clone().unwrap_or_else(|| brigantine_engine::ZERO_TIME.to_owned()),
        "Container": "",
        "ContainerConfig": container_config(None),
        "DockerVersion": config.docker_version.clone().unwrap_or_default(),
        "Author": config.author.clone().unwrap_or_default(),
        "Config": container_config(Some(config)),
        "Architecture": config.architecture,
        "Os": if config.os.is_empty() { "linux" } else { &config.os },
        "Size": image.size,
        "VirtualSize": image.size,
        "GraphDriver": graph_driver(layers, driver),
        "RootFS": {
            "Type": "layers",
            "Layers": config.rootfs.diff_ids.iter().map(Digest::to_string).collect::<Vec<_>>(),
        },
        "Metadata": {
            "LastTagTime": image.last_tagged.clone().unwrap_or_else(|| brigantine_engine::ZERO_TIME.to_owned()),
        },
        "Descriptor": descriptor(image),
    });
    if let Some(variant) = &config.variant {
        document["Variant"] = variant.clone().into();
    }
    if let Some(version) = &config.os_version {
        document["OsVersion"] = version.clone().into();
    }
    document
}

fn graph_driver(layers: &[LayerFiles], driver: &str) -> Value {
    let mut paths = layers.iter().map(|files| files.shown().display().to_string());
    let mut data = serde_json::Map::new();
    if let Some(top) = paths.next() {
        data.insert("UpperDir".to_owned(), top.into());
        let lower = paths.collect::<Vec<_>>().join(":");
        if !lower.is_empty() {
            data.insert("LowerDir".to_owned(), lower.into());
        }
    }
    json!({ "Name": driver, "Data": data })
}

/// docker's container configuration of an image, with the fields that only containers set at their zero values:
/// older clients read them without looking.
fn container_config(config: Option<&ImageConfig>) -> Value {
    let empty = brigantine_image::ContainerConfig::default();
    let config = config.map_or(&empty, |config| &config.config);
    let set = |keys: Vec<&String>| {
        (!keys.is_empty())
            .then(|| keys.into_iter().map(|key| (key.clone(), json!({}))).collect::<serde_json::Map<_, _>>())
    };
    let mut document = json!({
        "Hostname": "", "Domainname": "", "User": config.user,
        "AttachStdin": false, "AttachStdout": false, "AttachStderr": false,
        "Tty": false, "OpenStdin": false, "StdinOnce": false,
        "Env": config.env, "Cmd": config.cmd, "Image": "",
        "Volumes": set(config.volumes.iter().collect()),
        "WorkingDir": config.working_dir, "Entrypoint": config.entrypoint, "OnBuild": config.on_build,
        "Labels": (!config.labels.is_empty()).then_some(&config.labels),
    });
    if let Some(ports) = set(config.exposed_ports.iter().collect()) {
        document["ExposedPorts"] = ports.into();
    }
    if config.args_escaped {
        document["ArgsEscaped"] = true.into();
    }
    for (key, value) in [
        ("Healthcheck", serde_json::to_value(&config.healthcheck)),
        ("StopSignal", serde_json::to_value(&config.stop_signal)),
        ("Shell", serde_json::to_value(&config.shell)),
    ] {
        if let Ok(value) = value
            && !value.is_null()
        {
            document[key] = value;
        }
    }
    document
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

async fn remove(state: State, request: Request) -> Result<Reply, Error> {
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

async fn prune(state: State, request: Request) -> Result<Reply, Error> {
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
    fn patterns_match_names_with_and_without_tag() {
        let name = Reference::parse("debian:bookworm").unwrap();
        for pattern in
            ["debian", "deb*", "debian:*", "debian:book*", "d?bian", "[a-e]ebian", "[^x]ebian:bookworm"]
        {
            assert!(reference_matches(pattern, &name), "{pattern}");
        }
        for pattern in ["ubuntu", "deb", "debian:bull*", "[x-z]ebian", "*:sid", "[", "debian\\"] {
            assert!(!reference_matches(pattern, &name), "{pattern}");
        }
        let deep = Reference::parse("localhost:5000/a/b:t").unwrap();
        assert!(reference_matches("localhost:5000/*/b", &deep));
        assert!(!reference_matches("localhost:5000/*", &deep));
    }

    #[test]
    fn moments_take_every_form() {
        assert_eq!(moment("1700000000").unwrap().as_second(), 1_700_000_000);
        assert_eq!(moment("2024-01-01T00:00:00Z").unwrap().as_second(), 1_704_067_200);
        let ago = moment("1h30m").unwrap();
        let age = jiff::Timestamp::now().as_second() - ago.as_second();
        assert!((5399..=5401).contains(&age), "{age}");
        moment("2024-01-01").unwrap();
        moment("2024-01-01T10:00:00").unwrap();
        for bad in ["", "yesterday", "1x", "h"] {
            assert!(moment(bad).is_err(), "{bad}");
        }
    }

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
