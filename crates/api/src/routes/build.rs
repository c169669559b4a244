//! Building images: `POST /build`, as docker's classic clients speak it and as its BuildKit clients do (`version=2`,
//! with a session).
//!
//! Invariant: what is wrong with a request is a status as long as nothing was written; afterwards it is the stream's
//! last message. A client that leaves ends its build.

use std::collections::BTreeMap;

use brigantine_build::graph::{Limits, NamedContext};
use brigantine_build::{
    Built, CacheFrom, CacheTo, ContextSource, Event, Export, Options, Product, Request as BuildRequest,
    named_context,
};
use brigantine_image::{Digest, Platform, Reference, Storage};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::State;
use super::build_pass::{Passing, send_archive};
use super::build_text::Text;
use super::build_trace::Trace;
use super::images::{announce, reference};
use super::{build_call, build_cancel, build_upload, credentials, session};
use crate::http::{Class, Error, Query, Reply, Request, Router, bridge, json as wire};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router.post("/build", build);
}

/// Events that may wait for a slow client before the build does.
const BACKLOG: usize = 256;

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Ulimit {
    name: String,
    soft: i64,
    hard: i64,
}

/// A JSON parameter; absent, empty and null are the default.
fn document<T: serde::de::DeserializeOwned + Default>(query: &Query, key: &str) -> Result<T, Error> {
    match query.text(key) {
        None => Ok(T::default()),
        Some(text) => wire::from_slice::<Option<T>>(text.as_bytes())
            .map(Option::unwrap_or_default)
            .map_err(|error| Error::invalid(format!("invalid value for {key}: {}", error.message))),
    }
}

fn limits(query: &Query) -> Result<Limits, Error> {
    let positive = |key: &str| -> Result<Option<u64>, Error> {
        Ok(query.int(key)?.filter(|value| *value > 0).map(i64::unsigned_abs))
    };
    let ulimits: Vec<Ulimit> = document(query, "ulimits")?;
    Ok(Limits {
        memory: query.int("memory")?.filter(|bytes| *bytes > 0),
        memory_swap: query.int("memswap")?.filter(|bytes| *bytes != 0),
        cpu_shares: positive("cpushares")?,
        cpu_period: positive("cpuperiod")?,
        cpu_quota: query.int("cpuquota")?.filter(|quota| *quota != 0),
        cpuset_cpus: query.text("cpusetcpus").map(str::to_owned),
        cpuset_mems: query.text("cpusetmems").map(str::to_owned),
        cgroup_parent: query.text("cgroupparent").map(str::to_owned),
        ulimits: ulimits.into_iter().map(|limit| (limit.name, limit.soft, limit.hard)).collect(),
    })
}

fn options(query: &Query) -> Result<Options, Error> {
    let mut platforms: Vec<Platform> = Vec::new();
    for text in query.all("platform").flat_map(|all| all.split(',')).filter(|text| !text.is_empty()) {
        let platform = text.parse::<Platform>().map_err(|error| Error::invalid(error.to_string()))?;
        if !platforms.contains(&platform) {
            platforms.push(platform);
        }
    }
    let mut platforms = platforms.into_iter();
    let contexts: BTreeMap<String, String> = document(query, "contexts")?;
    let filter: Vec<String> = document(query, "nocachefilter")?;
    let network = match query.text("networkmode") {
        None | Some("default" | "bridge") => String::new(),
        Some(mode) => mode.to_owned(),
    };
    Ok(Options {
        target: query.text("target").map(str::to_owned),
        build_args: document(query, "buildargs")?,
        labels: document(query, "labels")?,
        platform: platforms.next(),
        more_platforms: platforms.collect(),
        no_cache: query.flag("nocache"),
        no_cache_filter: filter,
        contexts: contexts.into_iter().map(|(name, value)| (name, named_context(&value))).collect(),
        network,
        hosts: query
            .all("extrahosts")
            .flat_map(|line| line.split(','))
            .filter(|line| !line.is_empty())
            .map(str::to_owned)
            .collect(),
        shm_size: query.int("shmsize")?.filter(|bytes| *bytes > 0),
        limits: limits(query)?,
        allow_insecure: allows_insecure(query)?,
        export: export(query)?,
    })
}

/// Ours: what is wanted of the result besides the image.
fn export(query: &Query) -> Result<Export, Error> {
    let mut export = Export {
        rewrite_timestamps: query.flag("rewritetimestamp"),
        attestation_prefix: query.text("attestationprefix").unwrap_or_default().to_owned(),
        platform_split: query.text("platformsplit").map(|_| query.flag("platformsplit")),
        ..Export::default()
    };
    if export.attestation_prefix.contains('/') {
        return Err(Error::invalid("attestation-prefix goes before a file's name: it cannot have a /"));
    }
    let annotations: Vec<String> = document(query, "annotations")?;
    for text in &annotations {
        export.annotate(text).map_err(brigantine_engine::Error::from)?;
    }
    let attestations: BTreeMap<String, String> = document(query, "attests")?;
    for (kind, fields) in &attestations {
        export.attest(kind, fields).map_err(brigantine_engine::Error::from)?;
    }
    Ok(export)
}

/// What more than usual RUN steps may ask for, as `docker buildx build --allow` names it.
fn allows_insecure(query: &Query) -> Result<bool, Error> {
    let mut insecure = false;
    for name in query.all("allow").flat_map(|names| names.split(',')).filter(|name| !name.is_empty()) {
        match name {
            "security.insecure" => insecure = true,
            // Steps may have the host's network anyway, as with docker's own builder.
            "network.host" => {}
            other => {
                return Err(Error::invalid(format!(
                    "invalid entitlement: {other}: security.insecure and network.host are known"
                )));
            }
        }
    }
    Ok(insecure)
}

/// `t`: repeated, each a name with an optional tag.
fn tags(query: &Query) -> Result<Vec<Reference>, Error> {
    let mut tags: Vec<Reference> = Vec::new();
    for name in query.all("t").filter(|name| !name.is_empty()) {
        let tag = reference(name, None)?;
        if tag.digest().is_some() {
            return Err(Error::invalid("build tag cannot contain a digest"));
        }
        let tag = tag.or_latest();
        if !tags.contains(&tag) {
            tags.push(tag);
        }
    }
    Ok(tags)
}

fn refuse_unbuilt(query: &Query) -> Result<(), Error> {
    match query.text("version") {
        None | Some("1" | "2") => {}
        Some(other) => {
            return Err(Error::invalid(format!("there is no builder of version {other}: 1 and 2 are known")));
        }
    }
    if query.flag("squash") {
        return Err(Error::invalid("squash is only supported with experimental mode"));
    }
    if query.all("securityopt").any(|option| !option.is_empty()) {
        return Err(Error::invalid(
            "The daemon on this platform does not support setting security options on build",
        ));
    }
    if let Some(isolation) = query.text("isolation").filter(|isolation| *isolation != "default") {
        return Err(Error::invalid(format!("Unsupported isolation: {isolation:?}")));
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Output {
    r#type: String,
    attrs: BTreeMap<String, String>,
}

/// `outputs`: at most one, made by the client's session but for an image.
fn product(query: &Query, tags: &mut Vec<Reference>) -> Result<Product, Error> {
    let outputs: Vec<Output> = document(query, "outputs")?;
    let [output] = &outputs[..] else {
        return match outputs.len() {
            0 => Ok(Product::Image),
            _ => Err(Error::invalid("multiple outputs not supported")),
        };
    };
    match output.r#type.as_str() {
        "" | "moby" | "image" | "docker" if !output.attrs.contains_key("dest") => {
            for name in output.attrs.get("name").into_iter().flat_map(|names| names.split(',')) {
                let tag = reference(name, None)?.or_latest();
                if !tags.contains(&tag) {
                    tags.push(tag);
                }
            }
            Ok(Product::Image)
        }
        "local" => Ok(Product::Files),
        "tar" => Ok(Product::Archive { name: "", image: false }),
        "cacheonly" => Ok(Product::Nothing),
        other => Err(Error::not_implemented(format!(
            "output type {other} is not built for this client: image, local, tar and cacheonly are known (brig build has more)"
        ))),
    }
}

/// Ours: `deliver`, what is wanted of a build: `image`, and for the client's session `files` and `archive` (the
/// image's). Without it, an image.
#[derive(Clone, Copy, Default)]
struct Deliver {
    files: bool,
    archive: bool,
    /// The image stays.
    keep: bool,
}

impl Deliver {
    fn of(query: &Query, tags: &[Reference]) -> Result<Option<Self>, Error> {
        let mut deliver = Self { keep: !tags.is_empty(), ..Self::default() };
        let mut said = false;
        for word in query.all("deliver").flat_map(|words| words.split(',')).filter(|word| !word.is_empty()) {
            said = true;
            match word {
                "image" => deliver.keep = true,
                "files" => deliver.files = true,
                "archive" => deliver.archive = true,
                "nothing" => {}
                other => {
                    return Err(Error::invalid(format!(
                        "deliver={other}: image, files, archive and nothing are known"
                    )));
                }
            }
        }
        Ok(said.then_some(deliver))
    }

    fn product(self) -> Product {
        let image = self.keep || self.archive;
        match (self.files, image) {
            (true, image) => Product::Archive { name: "files", image },
            (false, true) => Product::Image,
            (false, false) => Product::Nothing,
        }
    }
}

/// What stands for a named context that is an OCI layout, which is uploaded: see [`build_upload`].
const LAYOUT: &str = "oci-layout:upload-request:";

/// Named contexts that come with requests of their own.
type Uploads = BTreeMap<String, Box<dyn std::io::Read + Send>>;

async fn uploads(query: &Query) -> Result<Uploads, Error> {
    let contexts: BTreeMap<String, String> = document(query, "contexts")?;
    let mut all = Uploads::new();
    for (name, value) in contexts {
        if let Some(id) = value.strip_prefix(LAYOUT) {
            all.insert(name, Box::new(bridge::reader(build_upload::take(id).await?)));
        }
    }
    Ok(all)
}

#[derive(Deserialize)]
#[serde(default, rename_all = "PascalCase")]
#[derive(Default)]
struct Cache {
    r#type: String,
    attrs: BTreeMap<String, String>,
}

/// Caches to look into: images that `cachefrom` names, and ours, `cacheimports`, in BuildKit's form.
fn cache_from(query: &Query, ask_registries: bool) -> Result<Vec<CacheFrom>, Error> {
    let named: Vec<String> = document(query, "cachefrom")?;
    let mut all = Vec::new();
    for name in &named {
        let reference = reference(name, None)?;
        let reference = if reference.digest().is_some() { reference } else { reference.or_latest() };
        all.push(if ask_registries { CacheFrom::Registry(reference) } else { CacheFrom::Image(reference) });
    }
    let imports: Vec<Cache> = document(query, "cacheimports")?;
    for one in &imports {
        all.push(CacheFrom::parse(&one.r#type, &one.attrs).map_err(brigantine_engine::Error::from)?);
    }
    Ok(all)
}

/// Ours: caches to be written.
fn cache_to(query: &Query) -> Result<Vec<CacheTo>, Error> {
    let exports: Vec<Cache> = document(query, "cacheexports")?;
    let parse = |one: &Cache| CacheTo::parse(&one.r#type, &one.attrs).map_err(brigantine_engine::Error::from);
    exports.iter().map(|one| parse(one).map_err(Error::from)).collect()
}

/// Secrets of `brig build`: base64 of a JSON map of ids to base64 values.
fn secrets(request: &Request) -> Result<BTreeMap<String, Vec<u8>>, Error> {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE;
    let Some(header) = request.header("x-brigantine-secrets") else { return Ok(BTreeMap::new()) };
    // What is wrong with it is not repeated: it is secret.
    let wrong = || Error::invalid("the secrets of the build could not be read");
    let raw = URL_SAFE.decode(header).map_err(|_bad| wrong())?;
    let all: BTreeMap<String, String> = wire::from_slice(&raw).map_err(|_bad| wrong())?;
    all.into_iter().map(|(id, value)| Ok((id, URL_SAFE.decode(value).map_err(|_bad| wrong())?))).collect()
}

/// Whether one of the images that `cachefrom` names is here. As with Docker's builder, naming some means that nothing
/// else is reused; what is reused of those is the cache's affair.
async fn has_cache_source(state: &State, query: &Query) -> Result<bool, Error> {
    let named: Vec<String> = document(query, "cachefrom")?;
    for name in &named {
        match state.engine.images().resolve(name).await {
            Ok(_) => return Ok(true),
            Err(error) if error.class() == Class::Internal => return Err(error.into()),
            Err(_) => {}
        }
    }
    Ok(named.is_empty())
}

async fn build(state: State, mut request: Request) -> Result<Reply, Error> {
    let query = request.query().clone();
    let session = session::named(&state.sessions, query.text("session")).await?;
    refuse_unbuilt(&query)?;
    let with_session = query.text("version") == Some("2");
    if let Some(id) = query.text("buildid").and_then(build_upload::offered) {
        let reader = request.reader();
        build_upload::offer(id, reader).await?;
        return Ok(Reply::empty(http::StatusCode::OK));
    }
    let mut tags = tags(&query)?;
    let mut product = product(&query, &mut tags)?;
    let deliver = Deliver::of(&query, &tags)?;
    if let Some(deliver) = deliver {
        product = deliver.product();
    }
    let mut options = options(&query)?;
    if !with_session {
        options.no_cache |= !has_cache_source(&state, &query).await?;
    }
    let lends = matches!(product, Product::Files | Product::Archive { .. })
        || deliver.is_some_and(|deliver| deliver.archive);
    if lends && session.is_none() {
        return Err(Error::invalid("outputs can only be requested through a BuildKit session"));
    }
    let context = match query.text("remote") {
        Some("client-session") if session.is_none() => {
            return Err(Error::invalid("remote=client-session needs a session, and none was named"));
        }
        Some("upload-request") => {
            let id = query.text("buildid").unwrap_or_default();
            ContextSource::Archive(Box::new(bridge::reader(build_upload::take(id).await?)))
        }
        Some(url) => ContextSource::remote(url, session.as_ref()),
        None if request.has_body() => ContextSource::Archive(Box::new(bridge::of_chunks(request.chunks()))),
        None => ContextSource::Nothing,
    };
    let mut dockerfile = query.text("dockerfile").unwrap_or_default().to_owned();
    let mut dockerfile_text = None;
    if dockerfile == "-" && matches!(context, ContextSource::Remote(_)) {
        dockerfile_text = Some(build_upload::dockerfile(&mut request).await?);
        dockerfile.clear();
    }
    let call = query.text("call").filter(|call| *call != "build");
    let tells = matches!(call, Some("outline" | "targets"));
    let layouts = if tells { Uploads::new() } else { uploads(&query).await? };
    let mut passing = Passing::new(&state, !layouts.is_empty() || deliver.is_some_and(|d| !d.keep)).await?;
    for (name, id) in passing.layouts(layouts, options.platform.as_ref()).await? {
        options.contexts.insert(name, NamedContext::Image(id.to_string()));
    }
    let build = BuildRequest {
        context,
        dockerfile,
        dockerfile_text,
        options,
        pull: query.flag("pull"),
        tags: tags.clone(),
        secrets: secrets(&request)?,
        credentials: credentials::all(&request),
        registry: state.registry.clone(),
        session: session.clone(),
        product,
        // A classic client's images are here or nowhere.
        cache_from: cache_from(&query, with_session)?,
        cache_to: cache_to(&query)?,
    };
    match call {
        None => {}
        Some("check" | "lint") => return Box::pin(build_call::check(&state, build)).await,
        Some("outline") => return build_call::outline(&state, build).await,
        Some("targets") => return build_call::targets(&state, build).await,
        Some(other) => {
            return Err(Error::not_implemented(format!(
                "call={other} is not built: build, check, outline and targets are known"
            )));
        }
    }
    let quiet = query.flag("q");
    // Ours: the trace that BuildKit's clients get, for a view of the graph.
    let traced = query.text("progress") == Some("trace");
    let told_more = query.flag("metadata");
    let id = query.text("buildid").map(str::to_owned);
    Reply::progress(move |sink| async move {
        let (sender, mut events) = mpsc::channel::<Event>(BACKLOG);
        let registered = build_cancel::Registered::new(id);
        let spool = state.engine.builder().spool();
        let mut text = if with_session {
            Told::Trace(Box::new(Trace::new(sink, quiet)))
        } else if traced {
            Told::Trace(Box::new(Trace::new(sink, quiet).for_brig()))
        } else {
            Told::Text(Box::new(Text::new(sink, quiet, spool)))
        };
        let left = async {
            match &session {
                Some(session) => session.ended().await,
                None => std::future::pending().await,
            }
        };
        let mut left = std::pin::pin!(left);
        let builder = state.engine.builder().clone();
        let mut building = std::pin::pin!(builder.build(build, sender));
        let mut cancelled = std::pin::pin!(registered.cancelled());
        let built = loop {
            tokio::select! {
                biased;
                Some(event) = events.recv() => {
                    text.event(event).await;
                    if events.is_empty() {
                        text.flush().await;
                    }
                }
                built = &mut building => break built,
                () = &mut cancelled => break Err(brigantine_build::Error::Cancelled),
                () = &mut left => break Err(brigantine_build::Error::Cancelled),
            }
        };
        while let Ok(event) = events.try_recv() {
            text.event(event).await;
        }
        text.flush().await;
        if state.engine.images().store().storage() == Storage::Copy {
            // The trees that steps ran on.
            state.engine.containers().collect_layers().await;
        }
        state.engine.check_build_cache();
        let built = match built {
            Ok(built) => built,
            Err(error) => return text.failed(error).await,
        };
        state.engine.images().forget();
        let mut passing = passing;
        if let (Some(image), Some(deliver)) = (&built.image, deliver) {
            if !deliver.keep {
                passing.add(&image.id);
            }
            if let (true, Some(session)) = (deliver.archive, &session) {
                let names = tags.iter().map(Reference::to_string).collect();
                send_archive(&state, session, image, names).await?;
            }
        }
        let more = told_more.then(|| more(&built));
        let id = built.image.map(|image| image.id);
        if let Some(id) = &id {
            for tag in &tags {
                announce(&state, "tag", id.as_str(), &tag.familiar());
            }
        }
        text.succeeded(id.as_ref(), &tags, more).await;
        tracing::info!(image = id.as_ref().map(Digest::as_str), "built");
        Ok(())
    })
    .await
}

/// How a build is told to its client.
enum Told {
    Text(Box<Text>),
    Trace(Box<Trace>),
}

impl Told {
    async fn event(&mut self, event: Event) {
        match self {
            Self::Text(text) => text.event(event).await,
            Self::Trace(trace) => trace.event(event).await,
        }
    }

    async fn flush(&mut self) {
        if let Self::Trace(trace) = self {
            trace.flush().await;
        }
    }

    async fn failed(&mut self, error: brigantine_build::Error) -> Result<(), Error> {
        match self {
            Self::Text(text) => text.failed(error).await,
            Self::Trace(trace) => trace.failed(error).await,
        }
    }

    async fn succeeded(&mut self, image: Option<&Digest>, tags: &[Reference], more: Option<Value>) {
        match self {
            Self::Text(text) => text.succeeded(image, tags, more).await,
            Self::Trace(trace) => trace.succeeded(image, more).await,
        }
    }
}

/// Ours: what `--metadata-file` tells of a build besides its image's id.
fn more(built: &Built) -> Value {
    let descriptor = built.image.as_ref().map(|image| image.index.as_ref().unwrap_or(&image.manifest));
    json!({ "Ref": built.id, "Provenance": built.provenance, "Descriptor": descriptor })
}
