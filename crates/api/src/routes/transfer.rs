//! Images on the move: pull and import (`/images/create`), push, load and save.
//!
//! Invariant: what fails before the first byte of an answer is a status; afterwards it is the stream's last message.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use brigantine_image::archive::{self, Compose, Import};
use brigantine_image::{Encoder, Encoding, Platform, Reference};
use brigantine_registry::{Progress, PullOptions, PushOptions, Report};
use serde_json::{Value, json};

use super::State;
use super::credentials;
use super::images::{announce, reference};
use crate::http::{Class, Error, ProgressSink, Reply, Request, Router, bridge};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router
        .post("/images/create", create)
        .post("/images/load", load)
        .post("/images/compose", composed)
        .get("/images/get", save_many)
        .get("/images/{name:.*}/get", save_one)
        .post("/images/{name:.*}/push", push);
}

/// Messages that may wait for a slow client before counts are left out.
const COUNTS_WAITING: usize = 32;

/// The name of the image that is shipped inside the program.
const EMBEDDED: &str = "docker.io/library/hello:latest";

/// The platforms a request names; newer clients may name several.
pub(super) fn platforms(request: &Request) -> Result<Vec<Platform>, Error> {
    let given = request.query().all("platform").filter(|text| !text.is_empty());
    given
        .map(|text| {
            // Newer clients send a JSON object, older ones text.
            if text.starts_with('{') {
                let platform: Platform = crate::http::json::from_slice(text.as_bytes())?;
                return Ok(platform.normalised());
            }
            text.parse().map_err(|error: brigantine_image::PlatformError| Error::invalid(error.to_string()))
        })
        .collect()
}

/// The one platform a request names, if any.
fn platform(request: &Request) -> Result<Option<Platform>, Error> {
    let mut platforms = platforms(request)?;
    if platforms.len() > 1 {
        return Err(Error::invalid(
            "an image here has one platform: name one, and repeat the request for others",
        ));
    }
    Ok(platforms.pop())
}

/// How layers or an archive are to be compressed: an option of ours.
fn encoding(request: &Request, default: Encoding) -> Result<Encoding, Error> {
    let given = request.query().text("compression").map(str::parse::<Encoding>).transpose();
    Ok(given.map_err(brigantine_engine::Error::from)?.unwrap_or(default))
}

/// docker's message of one step.
fn message(progress: &Progress) -> Value {
    let mut message = json!({ "status": progress.status });
    if let Some(id) = &progress.id {
        message["id"] = id.clone().into();
        message["progressDetail"] = match progress.amount {
            None => json!({}),
            Some((current, Some(total))) => json!({ "current": current, "total": total }),
            Some((current, None)) => json!({ "current": current }),
        };
    }
    message
}

/// A report that writes docker's messages, and what brings them to the client. Steps wait in line for a slow one,
/// counts are left out for it.
pub(super) fn reporter(sink: &ProgressSink) -> (Report, impl Future<Output = ()> + Send + 'static) {
    let (steps, mut queue) = tokio::sync::mpsc::unbounded_channel::<Progress>();
    let waiting = Arc::new(AtomicUsize::new(0));
    let lines = sink.clone();
    let report: Report = {
        let waiting = Arc::clone(&waiting);
        Arc::new(move |progress: Progress| {
            if progress.is_intermediate() && waiting.load(Ordering::Relaxed) >= COUNTS_WAITING {
                return;
            }
            waiting.fetch_add(1, Ordering::Relaxed);
            if steps.send(progress).is_err() {
                tracing::trace!("a step had no reader");
            }
        })
    };
    let pump = async move {
        while let Some(progress) = queue.recv().await {
            waiting.fetch_sub(1, Ordering::Relaxed);
            lines.send(&message(&progress)).await;
        }
    };
    (report, pump)
}

async fn create(state: State, mut request: Request) -> Result<Reply, Error> {
    if let Some(source) = request.query().text("fromSrc").map(str::to_owned) {
        return import(state, &mut request, &source).await;
    }
    pull(state, request, None).await
}

/// Pulls; what was pulled may be used through the project's socket of that name.
pub(super) async fn pull(state: State, request: Request, socket: Option<String>) -> Result<Reply, Error> {
    let Some(name) = request.query().text("fromImage") else {
        return Err(Error::invalid("fromImage or fromSrc is needed: nothing to create an image from"));
    };
    let reference = reference(name, request.query().text("tag"))?;
    let platform = platform(&request)?;
    let credentials = credentials::from_header(&request);
    // Without a tag all of them are meant.
    let wanted = if reference.is_name_only() && reference.clone().or_latest().to_string() != EMBEDDED {
        let tags = state.registry.tags(&reference, credentials.clone()).await?;
        let named: Result<Vec<_>, _> = tags.iter().map(|tag| reference.with_tag(tag)).collect();
        named.map_err(|error| Error::invalid(error.to_string()))?
    } else {
        vec![reference.or_latest()]
    };
    Reply::progress(move |sink| async move {
        for reference in wanted {
            if reference.to_string() == EMBEDDED {
                return embedded(&state, &reference, &sink, socket.as_deref()).await;
            }
            let (report, pump) = reporter(&sink);
            let pull = async {
                let options = PullOptions { platform: platform.clone(), credentials: credentials.clone() };
                let pulled =
                    state.registry.pull(state.engine.images().store(), &reference, options, report).await?;
                state.engine.images().forget();
                state.engine.images().settle_soon();
                if let Some(socket) = &socket {
                    state.engine.sockets().grant(socket, pulled.image.id.as_str()).await?;
                }
                announce(&state, "pull", &reference.familiar(), &reference.familiar_name());
                tracing::info!(image = %reference, id = %pulled.image.id, newer = pulled.newer, "pulled");
                Ok::<(), Error>(())
            };
            let (pulled, ()) = tokio::join!(pull, pump);
            pulled?;
        }
        Ok(())
    })
    .await
}

/// The image inside the program: no registry is asked.
async fn embedded(
    state: &State,
    reference: &Reference,
    sink: &ProgressSink,
    socket: Option<&str>,
) -> Result<(), Error> {
    let (image, newer) = state
        .engine
        .images()
        .with(|store| {
            let before = store.resolve_id(EMBEDDED).ok();
            let image = store.add_embedded_hello()?;
            let newer = before.as_ref() != Some(&image.id);
            Ok((image, newer))
        })
        .await?;
    if let Some(socket) = socket {
        state.engine.sockets().grant(socket, image.id.as_str()).await?;
    }
    let tag = reference.tag().unwrap_or("latest");
    sink.send(&json!({ "status": format!("Pulling from {}", reference.path()), "id": tag })).await;
    sink.send(&json!({ "status": format!("Digest: {}", image.manifest.digest) })).await;
    let shown = reference.familiar();
    let status = if newer {
        format!("Status: Downloaded newer image for {shown}")
    } else {
        format!("Status: Image is up to date for {shown}")
    };
    sink.send(&json!({ "status": status })).await;
    announce(state, "pull", &shown, &reference.familiar_name());
    Ok(())
}

async fn import(state: State, request: &mut Request, source: &str) -> Result<Reply, Error> {
    let query = request.query();
    let target = match query.text("repo") {
        None => None,
        Some(repository) => {
            let target = reference(repository, query.text("tag"))?;
            if target.digest().is_some() {
                return Err(Error::invalid("cannot import digest reference"));
            }
            Some(target.or_latest())
        }
    };
    let details = Import {
        reference: target.clone(),
        changes: query.all("changes").map(str::to_owned).collect(),
        message: query.text("message").unwrap_or_default().to_owned(),
        platform: platform(request)?,
    };
    if source != "-" {
        return import_from(state, source.to_owned(), target, details).await;
    }
    let body = bridge::of_chunks(request.chunks());
    Reply::progress(move |sink| async move {
        let image = state.engine.images().with(move |store| archive::import(store, body, &details)).await?;
        let shown = target.map_or_else(|| image.id.to_string(), |target| target.familiar());
        announce(&state, "import", image.id.as_str(), &shown);
        sink.send(&json!({ "status": image.id.to_string() })).await;
        Ok(())
    })
    .await
}

/// The same of a file on a web server: the engine fetches it.
async fn import_from(
    state: State,
    url: String,
    target: Option<Reference>,
    details: Import,
) -> Result<Reply, Error> {
    let download = state.registry.download(&url).await?;
    Reply::progress(move |sink| async move {
        sink.send(&json!({ "status": format!("Downloading from {}", download.from) })).await;
        let (total, mut fetched) = (download.length, 0_u64);
        let counts = sink.clone();
        let stream = futures_util::TryStreamExt::inspect_ok(download.into_stream(), move |chunk| {
            fetched += chunk.len() as u64;
            let detail = json!({ "current": fetched, "total": total });
            counts.try_send(&json!({ "status": "Importing", "progressDetail": detail }));
        });
        let body = bridge::of_chunks(stream);
        let image = state.engine.images().with(move |store| archive::import(store, body, &details)).await?;
        let shown = target.map_or_else(|| image.id.to_string(), |target| target.familiar());
        announce(&state, "import", image.id.as_str(), &shown);
        sink.send(&json!({ "status": image.id.to_string() })).await;
        Ok(())
    })
    .await
}

async fn load(state: State, mut request: Request) -> Result<Reply, Error> {
    let platform = platform(&request)?;
    // Ours: names in the archive are left alone.
    let nameless = request.query().flag("nameless");
    let body = bridge::of_chunks(request.chunks());
    Reply::progress(move |sink| async move {
        let loaded = state.engine.images().with(move |store| {
            let load = if nameless { archive::load_nameless } else { archive::load_for };
            load(store, body, platform.as_ref(), &mut |_progress| {})
        });
        let loaded = match loaded.await {
            Ok(loaded) => loaded,
            // Clients look for it in the stream and nowhere else.
            Err(error) if error.class() == Class::InvalidParameter => {
                let message = error.report();
                sink.send(&json!({ "errorDetail": { "message": message }, "error": message })).await;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        state.engine.images().forget();
        state.engine.images().settle_soon();
        for one in &loaded {
            let shown = one.reference.as_ref().map_or_else(|| one.image.to_string(), Reference::familiar);
            announce(&state, "load", one.image.as_str(), &shown);
            sink.send(&json!({ "stream": format!("{}\n", one.message()) })).await;
        }
        Ok(())
    })
    .await
}

/// Ours: an image made of another (`base`), further layers (the body: an archive whose members are layers' archives)
/// and other values in the configuration (`edit`, JSON); nothing is run.
async fn composed(state: State, mut request: Request) -> Result<Reply, Error> {
    let query = request.query();
    let base = match query.text("base") {
        None => None,
        Some(name) => Some(state.engine.images().resolve(name).await?.id),
    };
    let edit = match query.text("edit") {
        None => archive::Edit::default(),
        Some(text) => crate::http::json::from_slice(text.as_bytes())?,
    };
    let mut names = Vec::new();
    for name in query.all("t").filter(|name| !name.is_empty()) {
        names.push(reference(name, None)?.or_latest());
    }
    let wanted = Compose { base, edit, names };
    let body: Box<dyn std::io::Read + Send> = if request.has_body() {
        Box::new(bridge::of_chunks(request.chunks()))
    } else {
        Box::new(std::io::empty())
    };
    let tags = wanted.names.clone();
    let made = state.engine.images().with(move |store| {
        archive::compose(store, std::io::BufReader::with_capacity(1 << 17, body), &wanted)
    });
    let image = made.await?;
    state.engine.images().forget();
    state.engine.images().settle_soon();
    for tag in &tags {
        announce(&state, "tag", image.id.as_str(), &tag.familiar());
    }
    Reply::created(&json!({ "Id": image.id.to_string() }))
}

async fn save_one(state: State, request: Request) -> Result<Reply, Error> {
    let name = request.param("name").to_owned();
    save(state, &request, vec![name]).await
}

async fn save_many(state: State, request: Request) -> Result<Reply, Error> {
    let names: Vec<String> =
        request.query().all("names").filter(|name| !name.is_empty()).map(str::to_owned).collect();
    if names.is_empty() {
        return Err(Error::invalid("no image to save: names is empty"));
    }
    save(state, &request, names).await
}

async fn save(state: State, request: &Request, names: Vec<String>) -> Result<Reply, Error> {
    let platforms = platforms(request)?;
    let encoding = encoding(request, Encoding::Plain)?;
    let (mut writer, stream) = bridge::writer();
    let store = state.engine.images().store().clone();
    let saving = names.clone();
    let mut task = tokio::task::spawn_blocking(move || {
        let saved = Encoder::new(encoding, &mut writer).map_err(brigantine_image::Error::Output).and_then(
            |mut encoder| {
                archive::save_for(&store, &saving, &platforms, &mut encoder)?;
                encoder.finish().map(drop).map_err(brigantine_image::Error::Output)
            },
        );
        match saved {
            Ok(()) => Ok(()),
            Err(error) => {
                let text = error.chain();
                writer.fail(std::io::Error::other(text));
                Err(error)
            }
        }
    });
    // An unknown name is a status: wait for the first bytes or for the failure, whichever comes first.
    let mut stream = Box::pin(futures_util::StreamExt::peekable(stream));
    let first_failed = futures_util::stream::Peekable::peek(stream.as_mut()).await.is_none_or(Result::is_err);
    if first_failed {
        match (&mut task).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(brigantine_engine::Error::from(error).into()),
            Err(error) => return Err(Error::internal(format!("saving broke: {error}"))),
        }
    }
    for name in &names {
        if let Ok(image) = state.engine.images().resolve(name).await {
            announce(&state, "save", image.id.as_str(), image.id.as_str());
        }
    }
    let kind = match encoding {
        Encoding::Plain => "application/x-tar",
        Encoding::Gzip(_) => "application/gzip",
        Encoding::Zstd(_) => "application/zstd",
    };
    Ok(Reply::stream(kind, stream))
}

async fn push(state: State, request: Request) -> Result<Reply, Error> {
    let given = reference(request.param("name"), request.query().text("tag"))?;
    if given.digest().is_some() {
        return Err(Error::invalid("cannot push a digest reference"));
    }
    let platform = platform(&request)?;
    let options = PushOptions {
        credentials: credentials::from_header(&request),
        encoding: encoding(&request, Encoding::GZIP)?,
    };
    let names = {
        let given = given.clone();
        state
            .engine
            .images()
            .with(move |store| {
                if given.tag().is_some() {
                    return Ok(vec![given]);
                }
                // Without a tag every tag of the repository goes.
                let all = store.list()?.into_iter().flat_map(|image| image.tags);
                Ok(all.filter(|tag| tag.same_repository(&given)).collect::<Vec<_>>())
            })
            .await?
    };
    let mut pushes = Vec::new();
    for name in names {
        let missing = || {
            Error::not_found(format!(
                "An image does not exist locally with the tag: {}",
                name.familiar_name()
            ))
        };
        let image = state.engine.images().resolve(&name.to_string()).await.map_err(|_error| missing())?;
        image
            .require_platform(&name.familiar(), platform.as_slice())
            .map_err(brigantine_engine::Error::from)?;
        pushes.push((name, image));
    }
    if pushes.is_empty() {
        return Err(Error::not_found(format!(
            "An image does not exist locally with the tag: {}",
            given.familiar_name()
        )));
    }
    Reply::progress(move |sink| async move {
        for (name, image) in pushes {
            let (report, pump) = reporter(&sink);
            let push =
                state.registry.push(state.engine.images().store(), &image, &name, options.clone(), report);
            let (pushed, ()) = tokio::join!(push, pump);
            let pushed = pushed?;
            sink.send(&json!({
                "progressDetail": {},
                "aux": { "Tag": name.tag(), "Digest": pushed.digest.to_string(), "Size": pushed.size },
            }))
            .await;
            announce(&state, "push", &name.familiar(), &name.familiar_name());
        }
        Ok(())
    })
    .await
}
