//! `brig build`: puts the request together, sends it with its contexts, and shows what the engine tells.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use brigantine_session::Lending;
use futures_util::FutureExt as _;
use futures_util::future::try_join_all;
use http::HeaderName;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::{Ask, Lines, Reply, encode};
use crate::commands::build_cache::Caches;
use crate::commands::build_call::Call;
use crate::commands::build_context::{Main, Named};
use crate::commands::build_lend::Lent;
use crate::commands::build_output::{self, Archives, Built, Outputs};
use crate::commands::build_view::{self, View};
use crate::commands::{build_lend, builder, upload};
use crate::config::Config;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::parse::limits;
use crate::progress::{Progress, Sink};
use crate::value::Value;
use crate::{output, streams};

/// Secrets for `RUN --mount=type=secret`: base64 of a JSON map of ids to base64 values. They are in no URL and no log.
const SECRETS: HeaderName = HeaderName::from_static("x-brigantine-secrets");
/// The user's credentials for all registries, in docker's form: a base stage may be anywhere.
const REGISTRY_CREDENTIALS: HeaderName = HeaderName::from_static("x-registry-config");

pub static COMMAND: Command = Command {
    name: "build",
    usage: "[OPTIONS] PATH|URL|-",
    about: "Make an image from a Dockerfile",
    flags: &[
        Flag::list("annotation", "Annotate the image ([LEVEL[PLATFORM]:]NAME=VALUE)"),
        Flag::list("attest", "Attest to the image (type=provenance|sbom[,KEY=VALUE…])"),
        Flag::list("add-host", "Add a host name and its address (NAME:ADDRESS)"),
        Flag::list("allow", "Let RUN steps ask for more (security.insecure)"),
        Flag::list(
            "build-arg",
            "Set a variable of the Dockerfile (NAME=VALUE, or NAME from the environment)",
        ),
        Flag::list(
            "build-context",
            "Further context (NAME=DIR, docker-image://IMAGE, oci-layout://DIR[:TAG|@DIGEST] or a URL)",
        ),
        Flag::list(
            "cache-from",
            "Look for cached steps there, too (IMAGE, or type=registry|local,KEY=VALUE…)",
        ),
        Flag::list("cache-to", "Write the cache there (type=inline|registry|local,KEY=VALUE…)"),
        Flag::text(
            "call",
            "What to do: build, or tell (check, outline, targets; with ,format=json for programs)",
        ),
        Flag::switch("check", "Say what the build checks find, without building"),
        Flag::text("cgroup-parent", "Parent control group of RUN's processes"),
        Flag::text("cpu-quota", "CPU time per period, in microseconds"),
        Flag::text("cpu-period", "Length of a period, in microseconds"),
        Flag::text("cpu-shares", "Weight of CPU time").short('c'),
        Flag::text("cpuset-cpus", "CPUs to run on (0-3, 0,1)"),
        Flag::text("cpuset-mems", "Memory nodes to use (0-3, 0,1)"),
        Flag::text("file", "The Dockerfile (default: PATH/Dockerfile)").short('f'),
        Flag::text("iidfile", "Write the image's id to this file"),
        Flag::switch("load", "Keep the image in the engine (what happens without --output, too)"),
        Flag::list("label", "Set a label of the image (NAME=VALUE)"),
        Flag::text("metadata-file", "Write what was built to this file, as JSON"),
        Flag::text("memory", "Memory limit of RUN's processes, in bytes").short('m'),
        Flag::text("memory-swap", "Limit of memory and swap together, in bytes (-1: none)"),
        Flag::text("network", "Network of RUN's processes (default, none, host or a network's name)"),
        Flag::switch("no-cache", "Run every step again"),
        Flag::list("no-cache-filter", "Run the steps of this stage again"),
        Flag::list(
            "output",
            "What becomes of it (DIR, -, or type=local|tar|oci|docker|image|registry,KEY=VALUE…)",
        )
        .short('o'),
        Flag::list("platform", "Platforms of the image (os/arch[/variant]); several make an index"),
        Flag::text(
            "progress",
            "How progress is shown: auto, tty, plain, rawjson or quiet (or BUILDKIT_PROGRESS)",
        )
        .default("auto"),
        Flag::text("provenance", "Attest how the image came about (mode=min, mode=max or false)"),
        Flag::switch("pull", "Ask for newer base images"),
        Flag::switch("push", "Upload the image to its registry"),
        Flag::switch("quiet", "Show only the image's id").short('q'),
        Flag::text("sbom", "Attest what the image holds (true or false)"),
        Flag::list("secret", "Secret for RUN --mount=type=secret (id=NAME[,src=FILE|,env=VARIABLE])"),
        Flag::text("shm-size", "Size of /dev/shm, in bytes"),
        Flag::list("ssh", "ssh agent for RUN --mount=type=ssh (ID, or ID=SOCKET)"),
        Flag::list("tag", "Name the image (NAME[:TAG])").short('t'),
        Flag::text("target", "Build this stage"),
        Flag::list("ulimit", "Resource limit of RUN's processes (NAME=SOFT[:HARD])"),
        Flag::switch("verify", "Build twice without the cache, and fail unless both are the same"),
    ],
    operands: Operands::Between(1, 2),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let place = matches.operand(0);
    if place == "explain" {
        // A folder of that name is ./explain.
        return builder::explain(context, matches.operands().get(1).map(String::as_str)).await;
    }
    if let Some(more) = matches.operands().get(1) {
        return Err(Fault::said(format!("brig build takes one context: what is {more:?}?")));
    }
    if let Some(call) = Call::of(&matches)? {
        return told(context, &matches, call).await;
    }
    let outputs = Outputs::of(&matches)?.for_platforms(&matches.list("platform"));
    let epoch = epoch(&matches);
    let (receiving, archives) = outputs.receive()?;
    let work = async {
        if matches.is("verify") {
            return verified(context, &matches, &outputs, epoch, archives).await;
        }
        let wanted = Wanted { tags: outputs.tags(), archives, epoch: epoch.as_deref(), rewrite: false };
        once(context, &matches, &outputs, wanted).await
    };
    // The engine ends a build whose client lets go of it, and cleans up after it.
    let built = tokio::select! {
        built = work => built,
        fault = streams::interrupted() => Err(fault),
    };
    // What was received is put in its place only if the build was well.
    let received = receiving.finish(built.is_ok()).await;
    let built = match (built, received) {
        (Ok(built), received) => received.map(|()| built)?,
        // That a file could not be written is why the engine could not go on.
        (Err(Fault::Coded { text, code }), _) if code > 128 => return Err(Fault::Coded { text, code }),
        (Err(_), Err(fault)) => return Err(fault),
        (Err(fault), Ok(())) => return Err(fault),
    };
    tokio::select! {
        delivered = outputs.deliver(context, &built) => delivered?,
        fault = streams::interrupted() => return Err(fault),
    }
    if let Some(path) = matches.optional("iidfile") {
        std::fs::write(path, &built.id)
            .map_err(|error| Fault::said(format!("write {path}: {}", output::os_text(&error))))?;
    }
    Ok(())
}

/// Builds twice, and compares.
async fn verified(
    context: &Context,
    matches: &Matches,
    outputs: &Outputs,
    epoch: Option<String>,
    archives: Archives,
) -> Outcome<Built> {
    if matches.list("platform").iter().flat_map(|all| all.split(',')).count() > 1 {
        return Err(Fault::said("--verify is for one platform at a time"));
    }
    // Times that nobody has given would differ in any case.
    let rewrite = epoch.is_none();
    let now = || jiff::Timestamp::now().as_second().to_string();
    let epoch = epoch.unwrap_or_else(now);
    let image = outputs.with_image();
    let wanted = |tags, archives| Wanted { tags, archives, epoch: Some(&*epoch), rewrite };
    let first = once(context, matches, &image, wanted(outputs.tags(), Archives::new())).await?;
    let second = once(context, matches, &image, wanted(&[], archives)).await;
    let compared = async {
        let second = second?;
        if first.id == second.id {
            return Ok(second);
        }
        let ask = context.client.get(format!("/images/{}/compare", encode(&first.id)));
        let compared = ask.query("with", &second.id).send().await?.value().await?;
        build_output::discard(context, &second.id).await?;
        Err(Fault::said(format!(
            "the build is not reproducible: {} the first time, {} the second: {}",
            first.id,
            second.id,
            compared.at("Difference").text()
        )))
    };
    let compared = compared.await;
    if !outputs.keeps_image() {
        build_output::discard(context, &first.id).await?;
    }
    compared
}

/// What is told of the Dockerfile, without building it.
async fn told(context: &Context, matches: &Matches, call: Call) -> Outcome {
    let ask = asked(context, matches, epoch(matches).as_deref())?.query("call", call.name());
    let main = Main::new(matches.operand(0), matches.text("file"))?;
    let mut contexts = named(matches)?;
    if !call.needs_contexts() {
        contexts.iter_mut().for_each(Named::keep);
    }
    let lent = lent(context, &main, &contexts, Lending::default()).await?;
    let ask = ask.maybe("session", lent.as_ref().map(|lent| lent.session.as_str()));
    let reply = sent(context, ask, matches.text("file"), main, contexts).await?;
    call.show(&reply.value().await?)
}

/// The time that is given, or whose it is: as an argument, or in the environment as for every other tool. Only the engine
/// knows the names that there are.
fn epoch(matches: &Matches) -> Option<String> {
    const NAME: &str = "SOURCE_DATE_EPOCH";
    let given =
        matches.list("build-arg").into_iter().find_map(|text| text.strip_prefix(NAME)?.strip_prefix('='));
    given.map(str::to_owned).or_else(|| std::env::var(NAME).ok()).filter(|text| !text.is_empty())
}

/// One build of perhaps two.
struct Wanted<'w> {
    tags: &'w [String],
    archives: Archives,
    epoch: Option<&'w str>,
    /// Times later than that are set back.
    rewrite: bool,
}

/// Builds, and shows it.
async fn once(context: &Context, matches: &Matches, outputs: &Outputs, wanted: Wanted<'_>) -> Outcome<Built> {
    let shown = Shown::of(matches, outputs.sink())?;
    let caches = Caches::of(matches)?;
    let mut ask = asked(context, matches, wanted.epoch)?
        .flag("rewritetimestamp", wanted.rewrite || outputs.rewrite_timestamps())
        .query("cacheimports", &caches.from())
        .query("cacheexports", &caches.to())
        .flag("metadata", true)
        .maybe("progress", shown.asks());
    ask = outputs.asked(ask, &wanted.archives);
    for tag in wanted.tags {
        ask = ask.query("t", tag);
    }
    let secrets = secrets(&matches.list("secret"))?;
    if !secrets.is_empty() {
        let text = serde_json::json!(secrets).to_string();
        ask = ask.header(SECRETS, &URL_SAFE.encode(text));
    }
    let file = matches.text("file");
    let main = Main::new(matches.operand(0), file)?;
    let contexts = named(matches)?;
    let agents = build_lend::agents(&matches.list("ssh"))?;
    let lending =
        Lending { agents, archives: wanted.archives, folders: caches.folders(), ..Lending::default() };
    let lent = lent(context, &main, &contexts, lending).await?;
    let ask = ask.maybe("session", lent.as_ref().map(|lent| lent.session.as_str()));
    let reply = sent(context, ask, file, main, contexts).await?;
    let mut built = Built::default();
    let mut entered = Ok(());
    let heard = |aux: &Value| {
        if aux.get("CacheWritten").is_some() {
            entered = caches.written(aux);
        } else {
            built.told(aux);
        }
    };
    shown.follow(reply.into_lines(), heard).await?;
    entered.map(|()| built)
}

/// The request, as far as it is the same whatever is wanted of the Dockerfile.
fn asked<'c>(context: &'c Context, matches: &Matches, epoch: Option<&str>) -> Outcome<Ask<'c>> {
    let mut ask = context.client.post("/build").query("version", "1").query("rm", "1");
    let number = |name: &str| -> Outcome<Option<String>> { Ok(matches.int(name)?.map(|n| n.to_string())) };
    let size = |name: &str| -> Outcome<Option<String>> { Ok(matches.bytes(name)?.map(|n| n.to_string())) };
    for (parameter, value) in [
        ("cpuquota", number("cpu-quota")?),
        ("cpuperiod", number("cpu-period")?),
        ("cpushares", number("cpu-shares")?),
        ("memory", size("memory")?),
        ("memswap", size("memory-swap")?),
        ("shmsize", size("shm-size")?),
    ] {
        ask = ask.maybe(parameter, value.as_deref());
    }
    ask = ask
        .maybe("cpusetcpus", matches.optional("cpuset-cpus"))
        .maybe("cpusetmems", matches.optional("cpuset-mems"))
        .maybe("cgroupparent", matches.optional("cgroup-parent"))
        .maybe("networkmode", matches.optional("network"))
        .maybe("platform", Some(matches.list("platform").join(",")).filter(|all| !all.is_empty()).as_deref())
        .maybe("target", matches.optional("target"))
        .flag("nocache", matches.is("no-cache") || matches.is("verify"))
        .query("annotations", &serde_json::json!(matches.list("annotation")).to_string())
        .query("attests", &attestations(matches)?.to_string())
        .flag("pull", matches.is("pull"))
        .flag("q", matches.is("quiet"));
    for allowed in matches.list("allow") {
        ask = ask.query("allow", allowed);
    }
    for host in matches.list("add-host") {
        ask = ask.query("extrahosts", host);
    }
    let json = |value: &serde_json::Value| value.to_string();
    ask = ask
        .query("buildargs", &json(&arguments(matches, epoch)))
        .query("labels", &json(&pairs(&matches.list("label"), "label")?))
        .query("nocachefilter", &json(&serde_json::json!(matches.list("no-cache-filter"))));
    let ulimits = matches.list("ulimit");
    if !ulimits.is_empty() {
        let all: Vec<_> =
            ulimits.iter().map(|text| limits::ulimit(text)).collect::<Result<_, _>>().map_err(Fault::said)?;
        ask = ask.query("ulimits", &serde_json::json!(all).to_string());
    }
    if let Some(known) = registry_credentials(context) {
        ask = ask.header(REGISTRY_CREDENTIALS, &known);
    }
    Ok(ask)
}

fn named(matches: &Matches) -> Outcome<Vec<Named>> {
    let given = matches.list("build-context").into_iter().enumerate();
    given.map(|(number, text)| Named::parse(text, number)).collect()
}

/// Opens a session with the folders, and with what else is lent.
async fn lent(
    context: &Context,
    main: &Main,
    contexts: &[Named],
    mut lending: Lending,
) -> Outcome<Option<Lent>> {
    let key = main.lend(&mut lending.sources)?;
    for one in contexts {
        one.lend(&mut lending.sources);
    }
    build_lend::lend(context, lending, key.as_deref()).await
}

/// Sends the request with its contexts, each at the same time as the others.
async fn sent<'c>(
    context: &Context,
    ask: Ask<'c>,
    file: &str,
    main: Main,
    contexts: Vec<Named>,
) -> Outcome<Reply<'c>> {
    let values: serde_json::Map<_, _> =
        contexts.iter().map(|one| (one.name.clone(), one.value.clone().into())).collect();
    let ask = ask.query("contexts", &serde_json::Value::Object(values).to_string());
    let uploads = try_join_all(contexts.into_iter().map(|one| one.send(context)));
    let request = async {
        match main {
            Main::Remote(url) if file == "-" => {
                let body = upload::body_of(upload::open("-")?);
                let ask = ask.query("remote", &url).query("dockerfile", "-");
                ask.stream(body, "text/plain").send().await
            }
            Main::Remote(url) => ask.query("remote", &url).query("dockerfile", file).send().await,
            Main::Stdin => {
                let body = upload::body_of(upload::open("-")?);
                ask.query("dockerfile", file).stream(body, "application/x-tar").send().await
            }
            Main::Folder(local) => {
                ask.query("remote", "client-session").query("dockerfile", &local.dockerfile).send().await
            }
        }
    };
    let mut uploads = std::pin::pin!(uploads);
    let mut request = std::pin::pin!(request);
    tokio::select! {
        // The engine begins to answer when it has read all of them.
        reply = &mut request => match (reply, uploads.now_or_never()) {
            // What was sent short is why it is wrong.
            (Err(_), Some(Err(fault))) => Err(fault),
            (reply, _) => reply,
        },
        uploaded = &mut uploads => {
            uploaded?;
            request.await
        }
    }
}

/// How progress is shown; with `-q` the id is what there is to show.
enum Shown {
    Lines(Progress),
    View(View),
}

impl Shown {
    fn of(matches: &Matches, sink: Sink) -> Outcome<Self> {
        let given = matches.given("progress").then(|| matches.text("progress").to_owned());
        let form = given.or_else(|| std::env::var("BUILDKIT_PROGRESS").ok()).unwrap_or_default();
        if matches.is("quiet") {
            return Ok(Self::Lines(Progress::new(sink)));
        }
        match form.as_str() {
            "" | "auto" | "tty" if build_view::fits(sink) => Ok(Self::View(View::new(sink))),
            "" | "auto" | "tty" | "plain" => Ok(Self::Lines(Progress::new(sink).plain())),
            "quiet" | "none" => Ok(Self::Lines(Progress::new(Sink::Nowhere))),
            "rawjson" => Ok(Self::Lines(Progress::new(sink).raw())),
            other => {
                Err(Fault::said(format!("--progress {other}: auto, tty, plain, rawjson and quiet are known")))
            }
        }
    }

    /// What the engine is asked to tell.
    fn asks(&self) -> Option<&'static str> {
        matches!(self, Self::View(_)).then_some("trace")
    }

    async fn follow(self, lines: Lines, aux: impl FnMut(&Value)) -> Outcome {
        match self {
            Self::Lines(progress) => progress.follow(lines, aux).await,
            Self::View(view) => view.follow(lines, aux).await,
        }
    }
}

/// `--attest`, and its two shorter forms: what is said of each kind.
fn attestations(matches: &Matches) -> Outcome<serde_json::Value> {
    let mut all = serde_json::Map::new();
    for text in matches.list("attest") {
        let (kinds, others): (Vec<&str>, Vec<&str>) =
            text.split(',').partition(|field| field.starts_with("type="));
        let [kind] = kinds[..] else {
            return Err(Fault::said(format!("--attest {text}: type=provenance or type=sbom is expected")));
        };
        all.insert(kind.trim_start_matches("type=").to_owned(), others.join(",").into());
    }
    for kind in ["provenance", "sbom"] {
        if let Some(text) = matches.optional(kind) {
            all.insert(kind.to_owned(), text.into());
        }
    }
    Ok(all.into())
}

/// The value of that header. A build may do without: what cannot be read is told, and no more.
fn registry_credentials(context: &Context) -> Option<String> {
    match context.config().and_then(Config::all_credentials) {
        Ok(known) if known.is_empty() => None,
        Ok(known) => Some(URL_SAFE.encode(serde_json::json!(known).to_string())),
        Err(fault) => {
            output::error_line(&format!("WARNING: building without credentials for registries: {fault}"));
            None
        }
    }
}

/// A name alone takes its value from the environment; without one there it only says that the engine has none.
fn arguments(matches: &Matches, epoch: Option<&str>) -> serde_json::Value {
    let mut all = serde_json::Map::new();
    if let Some(seconds) = epoch {
        all.insert("SOURCE_DATE_EPOCH".to_owned(), seconds.into());
    }
    for text in matches.list("build-arg") {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text, std::env::var(text).ok()),
        };
        all.insert(name.to_owned(), value.map_or(serde_json::Value::Null, serde_json::Value::String));
    }
    serde_json::Value::Object(all)
}

fn pairs(given: &[&str], flag: &str) -> Outcome<serde_json::Value> {
    let mut all = serde_json::Map::new();
    for text in given {
        let (name, value) = match text.split_once('=') {
            Some(pair) => pair,
            None if flag == "label" => (*text, ""),
            None => return Err(Fault::said(format!("--{flag} {text}: NAME=VALUE is expected"))),
        };
        all.insert(name.to_owned(), value.into());
    }
    Ok(serde_json::Value::Object(all))
}

/// `id=NAME,src=FILE` or `id=NAME,env=VARIABLE`; by default the variable of that name, then the file.
fn secrets(given: &[&str]) -> Outcome<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for text in given {
        let field = |names: &[&str]| {
            text.split(',').find_map(|field| {
                let (name, value) = field.split_once('=')?;
                names.contains(&name.trim()).then(|| value.to_owned())
            })
        };
        let id =
            field(&["id"]).ok_or_else(|| Fault::said(format!("--secret {text}: id=NAME is expected")))?;
        let (file, variable) = (field(&["src", "source"]), field(&["env"]));
        let value = match (file, variable) {
            (Some(file), _) => std::fs::read(&file).map_err(|error| {
                Fault::said(format!("secret {id}: read {file}: {}", output::os_text(&error)))
            })?,
            (None, Some(variable)) => std::env::var(&variable)
                .map_err(|_unset| Fault::said(format!("secret {id}: the variable {variable} is not set")))?
                .into_bytes(),
            (None, None) => match std::env::var(&id) {
                Ok(value) => value.into_bytes(),
                Err(_) => std::fs::read(&id).map_err(|error| {
                    Fault::said(format!("secret {id}: read {id}: {}", output::os_text(&error)))
                })?,
            },
        };
        all.insert(id, URL_SAFE.encode(value));
    }
    Ok(all)
}
