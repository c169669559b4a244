//! `brig build`: packs the context, leaves out what `.dockerignore` says, and shows the engine's text.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use brigantine_build::Ignore;
use http::HeaderName;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::encode;
use crate::commands::build_output::{self, Outputs};
use crate::commands::{build_ssh, builder, upload};
use crate::config::Config;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;
use crate::parse::limits;
use crate::progress::{Progress, Sink};
use crate::value::Value;

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
        Flag::list("build-context", "Further context (NAME=docker-image://IMAGE or a URL)"),
        Flag::list("cache-from", "Reuse cached steps only if this image is here (IMAGE)"),
        Flag::list("cache-to", "Not built: the cache stays in the engine"),
        Flag::text("call", "What to do (build, or check as with --check)"),
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
        Flag::text("progress", "How progress is shown: auto, plain, rawjson or quiet (or BUILDKIT_PROGRESS)")
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
    let outputs = Outputs::of(&matches)?;
    let epoch = epoch(&matches)?;
    if !matches.is("verify") {
        let Some(id) = once(context, &matches, outputs.tags(), &outputs, epoch.as_deref(), false).await?
        else {
            return Ok(());
        };
        return finish(context, &matches, &outputs, &id).await;
    }
    if matches.list("platform").iter().flat_map(|all| all.split(',')).count() > 1 {
        return Err(Fault::said("--verify is for one platform at a time"));
    }
    // Times that nobody has given would differ in any case.
    let rewrite = epoch.is_none();
    let now = || jiff::Timestamp::now().as_second().to_string();
    let epoch = epoch.unwrap_or_else(now);
    let build = |tags| once(context, &matches, tags, &outputs, Some(&epoch), rewrite);
    let (Some(first), Some(second)) = (build(outputs.tags()).await?, build(&[]).await?) else {
        return Ok(());
    };
    if first == second {
        return finish(context, &matches, &outputs, &first).await;
    }
    let compared = context
        .client
        .get(format!("/images/{}/compare", encode(&first)))
        .query("with", &second)
        .send()
        .await?
        .value()
        .await?;
    build_output::discard(context, &second).await?;
    Err(Fault::said(format!(
        "the build is not reproducible: {first} the first time, {second} the second: {}",
        compared.at("Difference").text()
    )))
}

/// Hands out what was built.
async fn finish(context: &Context, matches: &Matches, outputs: &Outputs, id: &str) -> Outcome {
    outputs.deliver(context, id).await?;
    if let Some(path) = matches.optional("iidfile") {
        std::fs::write(path, id)
            .map_err(|error| Fault::said(format!("write {path}: {}", output::os_text(&error))))?;
    }
    Ok(())
}

/// The time that is given: as an argument, or in the environment as for every other tool.
fn epoch(matches: &Matches) -> Outcome<Option<String>> {
    const NAME: &str = "SOURCE_DATE_EPOCH";
    let given =
        matches.list("build-arg").into_iter().find_map(|text| text.strip_prefix(NAME)?.strip_prefix('='));
    let found = given.map(str::to_owned).or_else(|| std::env::var(NAME).ok()).filter(|text| !text.is_empty());
    if let Some(text) = &found
        && text.parse::<i64>().is_err()
    {
        return Err(Fault::said(format!("{NAME}={text}: seconds since 1970 are expected")));
    }
    Ok(found)
}

/// Builds; the image's id, or none where there is none.
async fn once(
    context: &Context,
    matches: &Matches,
    tags: &[String],
    outputs: &Outputs,
    epoch: Option<&str>,
    rewrite: bool,
) -> Outcome<Option<String>> {
    let place = matches.operand(0);
    let remote = is_remote(place);
    let progress = progress(matches, outputs.sink())?;
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
        .flag("rewritetimestamp", rewrite || outputs.rewrite_timestamps())
        .query("annotations", &serde_json::json!(matches.list("annotation")).to_string())
        .query("attests", &attestations(matches)?.to_string())
        .maybe("call", checks(matches)?.then_some("check"))
        .query("cachefrom", &serde_json::json!(cache_images(matches)?).to_string())
        .flag("pull", matches.is("pull"))
        .flag("q", matches.is("quiet"));
    for tag in tags {
        ask = ask.query("t", tag);
    }
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
        .query("contexts", &json(&pairs(&matches.list("build-context"), "build-context")?))
        .query("nocachefilter", &json(&serde_json::json!(matches.list("no-cache-filter"))));
    let ulimits = matches.list("ulimit");
    if !ulimits.is_empty() {
        let all: Vec<_> =
            ulimits.iter().map(|text| limits::ulimit(text)).collect::<Result<_, _>>().map_err(Fault::said)?;
        ask = ask.query("ulimits", &serde_json::json!(all).to_string());
    }
    let secrets = secrets(&matches.list("secret"))?;
    if !secrets.is_empty() {
        let text = serde_json::json!(secrets).to_string();
        ask = ask.header(SECRETS, &URL_SAFE.encode(text));
    }
    if let Some(known) = registry_credentials(context) {
        ask = ask.header(REGISTRY_CREDENTIALS, &known);
    }
    let lent = build_ssh::lend(context, &matches.list("ssh")).await?;
    let file = matches.text("file");
    let ask = ask.maybe("session", lent.as_ref().map(|lent| lent.session.as_str()));
    let reply = if remote {
        ask.query("remote", place).query("dockerfile", file).send().await?
    } else if place == "-" {
        let body = upload::body(upload::open("-").await?);
        ask.query("dockerfile", file).stream(body, "application/x-tar").send().await?
    } else {
        let packing = Packing::new(place, file)?;
        let ask = ask.query("dockerfile", &packing.dockerfile);
        let (ours, theirs) =
            UnixStream::pair().map_err(|error| Fault::said(format!("make a socket pair: {error}")))?;
        theirs.set_nonblocking(true).map_err(|error| Fault::said(format!("read the context: {error}")))?;
        let stream = tokio::net::UnixStream::from_std(theirs)
            .map_err(|error| Fault::said(format!("read the context: {error}")))?;
        let packed = tokio::task::spawn_blocking(move || packing.write(ours));
        let reply = ask.stream(upload::body(stream), "application/x-tar").send().await;
        match packed.await {
            Ok(Ok(())) => {}
            // The engine may answer, and close, before it has read everything.
            Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Ok(Err(error)) => return Err(Fault::said(format!("read the context {place}: {error}"))),
            Err(error) => return Err(Fault::said(format!("read the context {place}: {error}"))),
        }
        reply?
    };
    if checks(matches)? {
        return told(&reply.value().await?).map(|()| None);
    }
    let mut id = String::new();
    let lines = reply.into_lines();
    let shown = progress.follow(lines, |aux| aux.at("ID").text().clone_into(&mut id)).await;
    shown.map(|()| Some(id))
}

/// Whether the checks are all that is wanted.
fn checks(matches: &Matches) -> Outcome<bool> {
    match matches.text("call") {
        "" | "build" => Ok(matches.is("check")),
        "check" | "lint" => Ok(true),
        other => Err(Fault::said(format!("--call {other} is not built: build and check are known"))),
    }
}

/// The images of `--cache-from`. Where a cache is kept elsewhere the flags are refused.
fn cache_images(matches: &Matches) -> Outcome<Vec<&str>> {
    let images = matches.list("cache-from");
    if let Some(place) = images.iter().find(|text| text.contains('=')) {
        return Err(Fault::said(format!(
            "--cache-from {place} is not built: the cache is the engine's own, and an image's name is taken"
        )));
    }
    if let Some(place) = matches.list("cache-to").first() {
        return Err(Fault::said(format!(
            "--cache-to {place} is not built: the cache stays in the engine (brig builder cache export moves cache mounts)"
        )));
    }
    Ok(images)
}

/// How progress is shown; with `-q` the id is what there is to show.
fn progress(matches: &Matches, sink: Sink) -> Outcome<Progress> {
    let given = matches.given("progress").then(|| matches.text("progress").to_owned());
    let form = given.or_else(|| std::env::var("BUILDKIT_PROGRESS").ok()).unwrap_or_default();
    if matches.is("quiet") {
        return Ok(Progress::new(sink));
    }
    match form.as_str() {
        "" | "auto" => Ok(Progress::new(sink)),
        "plain" => Ok(Progress::new(sink).plain()),
        "quiet" | "none" => Ok(Progress::new(Sink::Nowhere)),
        "rawjson" => Ok(Progress::new(sink).raw()),
        "tty" => Err(Fault::said("--progress tty: a live view of the graph is not built: use auto or plain")),
        other => Err(Fault::said(format!("--progress {other}: auto, plain, rawjson and quiet are known"))),
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

/// Shows what the build checks found; anything at all is a failure.
fn told(checked: &Value) -> Outcome {
    let warnings = checked.at("Warnings").list();
    for warning in warnings {
        output::line(&format!("WARNING: {}", warning.at("Rule").text()));
        output::line(warning.at("Excerpt").text());
    }
    match warnings.len() {
        0 => {
            output::line("Check complete, no warnings found.");
            Ok(())
        }
        1 => Err(Fault::said("1 warning was found")),
        count => Err(Fault::said(format!("{count} warnings were found"))),
    }
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

fn is_remote(place: &str) -> bool {
    ["http://", "https://", "git://", "git@", "ssh://"].iter().any(|scheme| place.starts_with(scheme))
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

/// A context folder to be sent.
struct Packing {
    root: PathBuf,
    /// The Dockerfile's name within what is sent.
    dockerfile: String,
    /// A Dockerfile that is not in the context.
    outside: Option<Vec<u8>>,
    ignore: Ignore,
}

impl Packing {
    fn new(place: &str, file: &str) -> Outcome<Self> {
        let fault =
            |what: &str, error: &io::Error| Fault::said(format!("{what}: {}", output::os_text(error)));
        let root = std::fs::canonicalize(place)
            .map_err(|error| fault(&format!("unable to prepare context: path \"{place}\""), &error))?;
        if !root.is_dir() {
            return Err(Fault::said(format!("unable to prepare context: \"{place}\" is not a directory")));
        }
        let (dockerfile, outside) = match file {
            "" => ("Dockerfile".to_owned(), None),
            "-" => {
                let mut text = Vec::new();
                io::Read::read_to_end(&mut io::stdin(), &mut text)
                    .map_err(|error| fault("read the Dockerfile", &error))?;
                (".dockerfile.stdin".to_owned(), Some(text))
            }
            file => {
                let path =
                    std::fs::canonicalize(file).map_err(|error| fault(&format!("read {file}"), &error))?;
                if let Ok(inside) = path.strip_prefix(&root) {
                    (inside.to_string_lossy().into_owned(), None)
                } else {
                    let text =
                        std::fs::read(&path).map_err(|error| fault(&format!("read {file}"), &error))?;
                    (".dockerfile.outside".to_owned(), Some(text))
                }
            }
        };
        let own = root.join(format!("{dockerfile}.dockerignore"));
        let rules =
            std::fs::read_to_string(own).or_else(|_| std::fs::read_to_string(root.join(".dockerignore")));
        let ignore = match rules {
            Ok(rules) => {
                Ignore::parse(&rules).map_err(|error| Fault::said(format!(".dockerignore: {error}")))?
            }
            Err(_) => Ignore::default(),
        };
        Ok(Self { root, dockerfile, outside, ignore })
    }

    /// The engine needs these, whatever the rules say.
    fn needed(&self, path: &str) -> bool {
        path == self.dockerfile
            || path == ".dockerignore"
            || path.strip_suffix(".dockerignore").is_some_and(|base| base == self.dockerfile)
            || (self.dockerfile == "Dockerfile" && path == "dockerfile")
    }

    fn write(&self, output: impl Write) -> io::Result<()> {
        let mut archive = tar::Builder::new(io::BufWriter::with_capacity(256 << 10, output));
        archive.follow_symlinks(false);
        archive.sparse(false);
        if let Some(text) = &self.outside {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(text.len() as u64);
            archive.append_data(&mut header, &self.dockerfile, &text[..])?;
        }
        self.folder(&mut archive, Path::new(""))?;
        archive.into_inner()?.flush()
    }

    fn folder(&self, archive: &mut tar::Builder<impl Write>, dir: &Path) -> io::Result<()> {
        let mut names: Vec<_> = std::fs::read_dir(self.root.join(dir))?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<io::Result<_>>()?;
        names.sort();
        for name in names {
            let path = dir.join(name);
            let text = path.to_string_lossy().into_owned();
            let full = self.root.join(&path);
            // Files of a folder that is worked in come and go.
            let Ok(metadata) = std::fs::symlink_metadata(&full) else { continue };
            let out = self.ignore.excludes(&text) && !self.needed(&text);
            if metadata.is_dir() {
                if !out {
                    archive.append_dir(&path, &full)?;
                }
                if !out
                    || self.ignore.may_take_again_below(&text)
                    || self.dockerfile.starts_with(&format!("{text}/"))
                {
                    self.folder(archive, &path)?;
                }
            } else if !out && (metadata.is_file() || metadata.is_symlink()) {
                archive.append_path_with_name(&full, &path)?;
            }
        }
        Ok(())
    }
}
