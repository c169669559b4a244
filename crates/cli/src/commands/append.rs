//! `brig image append` and `brig image mutate`: an image made of another without running anything, as ko and crane
//! make them.
//!
//! Invariant: what is sent depends on the files' names, contents and executable bits alone; their owner is root and
//! their time `SOURCE_DATE_EPOCH`, or 1970. An archive is a layer as it is.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use brigantine_image::tar::{Entry, Kind, Time, Writer};
use serde_json::{Value as Json, json};

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::encode;
use crate::commands::append_output;
use crate::commands::build_output::Outputs;
use crate::commands::upload;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::progress::Sink;
use crate::{images, output};

const CONFIGURATION: [Flag; 19] = [
    Flag::text("author", "Who made the image"),
    Flag::text("cmd", "What to run by default (JSON array, or words as a shell splits them)"),
    Flag::text(
        "created",
        "When the image was made (RFC 3339; default: SOURCE_DATE_EPOCH, else the base's time)",
    ),
    Flag::text("entrypoint", "What is always run (JSON array, or words as a shell splits them)"),
    Flag::list("env", "Set a variable (NAME=VALUE)").short('e'),
    Flag::list("expose", "Expose a port or range of ports"),
    Flag::list("label", "Set a label (NAME=VALUE)").short('l'),
    Flag::switch("load", "Keep the image in the engine (what happens without --output, too)"),
    Flag::text("metadata-file", "Write what was made to this file, as JSON"),
    Flag::list(
        "output",
        "What becomes of it (DIR, -, or type=local|tar|oci|docker|image|registry,KEY=VALUE…)",
    )
    .short('o'),
    Flag::text("platform", "Which of the base's variants (os/arch[/variant])"),
    Flag::switch("push", "Upload the image to its registry"),
    Flag::text("set-platform", "What the image says it is for (os/arch[/variant])"),
    Flag::text("stop-signal", "Signal that stops a container"),
    Flag::list("tag", "Name the image (NAME[:TAG])").short('t'),
    Flag::text("user", "Who runs it (USER[:GROUP])").short('u'),
    Flag::list("volume", "Path that holds data of its own"),
    Flag::text("workdir", "Where it runs").short('w'),
    Flag::switch("quiet", "Do not show progress").short('q'),
];

static APPEND_FLAGS: [Flag; 20] = {
    let mut flags = [Flag::text(
        "base",
        "What is below: an image's name, an archive (oci-archive:FILE, docker-archive:FILE) or a layout (oci:DIR); \
         nothing by default",
    )
    .short('b'); 20];
    let mut n = 0;
    while n < CONFIGURATION.len() {
        flags[n + 1] = CONFIGURATION[n];
        n += 1;
    }
    flags
};

static MUTATE_FLAGS: [Flag; 20] = {
    let mut flags = [Flag::list("append", "Add a layer (PATH[:DESTINATION])"); 20];
    let mut n = 0;
    while n < CONFIGURATION.len() {
        flags[n + 1] = CONFIGURATION[n];
        n += 1;
    }
    flags
};

pub static APPEND: Command = Command {
    name: "append",
    usage: "[OPTIONS] PATH[:DESTINATION] [PATH[:DESTINATION]...]",
    about: "Make an image of a base and folders, files or archives on top, without running anything",
    flags: &APPEND_FLAGS,
    operands: Operands::AtLeast(1),
    run: runs!(append),
    ..Command::EMPTY
};

pub static MUTATE: Command = Command {
    name: "mutate",
    usage: "[OPTIONS] IMAGE",
    about: "Make an image that differs from another in its configuration, without running anything",
    flags: &MUTATE_FLAGS,
    operands: Operands::Exactly(1),
    run: runs!(mutate),
    ..Command::EMPTY
};

async fn append(context: &Context, matches: Matches) -> Outcome {
    make(context, &matches, matches.optional("base"), matches.operands()).await
}

async fn mutate(context: &Context, matches: Matches) -> Outcome {
    make(context, &matches, Some(matches.operand(0)), &matches.owned_list("append")).await
}

async fn make(context: &Context, matches: &Matches, base: Option<&str>, sources: &[String]) -> Outcome {
    let sink = if matches.is("quiet") { Sink::Nowhere } else { Sink::Stderr };
    let outputs = Outputs::of(matches)?.with_progress(sink);
    let epoch = epoch()?;
    let edit = edit(matches, epoch)?;
    let layers = Layers::pack(sources, epoch.unwrap_or_default())?;
    let platform = matches.optional("platform");
    let base = match base {
        None | Some("scratch") => None,
        Some(base) => Some(resolve(context, base, platform, sink).await?),
    };
    let mut ask = context.client.post("/images/compose").maybe("base", base.as_deref());
    ask = ask.query("edit", &edit.to_string());
    for tag in outputs.tags() {
        ask = ask.query("t", tag);
    }
    let made = ask.stream(upload::body_of(layers), "application/x-tar").send().await?.value().await?;
    let id = made.at("Id").text();
    append_output::deliver(context, &outputs, id).await?;
    if !outputs.take_stdout() {
        output::line(id);
    }
    Ok(())
}

/// The base's id or name in the engine: loaded from an archive or layout, or pulled, where it is not there.
async fn resolve(context: &Context, base: &str, platform: Option<&str>, sink: Sink) -> Outcome<String> {
    let archive = ["oci-archive:", "docker-archive:"].iter().find_map(|kind| base.strip_prefix(kind));
    if let Some(path) = archive {
        return load(context, File::open(path).map_err(Fault::io(path))?, base, platform).await;
    }
    if let Some(path) = base.strip_prefix("oci:") {
        let whole = layout(path).map_err(Fault::io(path))?;
        return load(context, whole, base, platform).await;
    }
    match context.client.get(format!("/images/{}/json", encode(base))).send().await {
        Ok(reply) => {
            let found = reply.value().await?;
            if platform.is_none_or(|wanted| is_for(&found, wanted)) {
                return Ok(found.at("Id").text().to_owned());
            }
        }
        Err(fault) if fault.is_not_found() => {}
        Err(fault) => return Err(fault),
    }
    let reference = images::parse(base)?.or_latest();
    images::pull(context, &reference, platform, sink).await?;
    Ok(reference.to_string())
}

fn is_for(found: &crate::value::Value, wanted: &str) -> bool {
    let mut actual = format!("{}/{}", found.at("Os").text(), found.at("Architecture").text());
    let variant = found.at("Variant").text();
    if !variant.is_empty() {
        actual.extend(["/", variant]);
    }
    let parse = |text: &str| text.parse::<brigantine_image::Platform>();
    match (parse(wanted), parse(&actual)) {
        (Ok(wanted), Ok(actual)) => wanted.accepts(&actual),
        // The engine says what is wrong with it.
        _ => false,
    }
}

/// Loads an archive of one image, whose names are left alone.
async fn load(context: &Context, file: File, base: &str, platform: Option<&str>) -> Outcome<String> {
    let mut lines = context
        .client
        .post("/images/load")
        .query("quiet", "1")
        .query("nameless", "1")
        .maybe("platform", platform)
        .stream(upload::body_of(file), "application/x-tar")
        .send()
        .await?
        .into_lines();
    let mut ids: Vec<String> = Vec::new();
    while let Some(message) = lines.next().await? {
        if let Some(error) = message.get("error") {
            return Err(Fault::said(format!("{base}: {}", error.text())));
        }
        let told = message.at("stream").text().trim();
        ids.extend(told.strip_prefix("Loaded image ID: ").map(str::to_owned));
    }
    ids.dedup();
    match <[String; 1]>::try_from(ids) {
        Ok([id]) => Ok(id),
        Err(ids) => {
            Err(Fault::said(format!("{base}: there are {} images in it, one is expected", ids.len())))
        }
    }
}

/// A layout as an archive of it.
fn layout(dir: &str) -> io::Result<File> {
    let mut archive = tar::Builder::new(BufWriter::new(tempfile::tempfile()?));
    archive.follow_symlinks(false);
    archive.append_dir_all(".", dir)?;
    let mut file = archive.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.rewind()?;
    Ok(file)
}

/// `SOURCE_DATE_EPOCH` (reproducible-builds.org/specs/source-date-epoch).
fn epoch() -> Outcome<Option<i64>> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) if !text.is_empty() => text.parse().map(Some).map_err(|_bad| {
            Fault::said(format!("SOURCE_DATE_EPOCH={text}: seconds since 1970 are expected"))
        }),
        _ => Ok(None),
    }
}

/// What is to be different, in the engine's form.
fn edit(matches: &Matches, epoch: Option<i64>) -> Outcome<Json> {
    let mut edit = serde_json::Map::new();
    for (flag, field) in [
        ("author", "Author"),
        ("user", "User"),
        ("workdir", "WorkingDir"),
        ("stop-signal", "StopSignal"),
        ("set-platform", "Platform"),
        ("created", "Created"),
    ] {
        if let Some(value) = matches.optional(flag) {
            edit.insert(field.to_owned(), value.into());
        }
    }
    if let (Some(seconds), false) = (epoch, matches.given("created")) {
        let time = jiff::Timestamp::from_second(seconds)
            .map_err(|error| Fault::said(format!("SOURCE_DATE_EPOCH={seconds}: {error}")))?;
        edit.insert("Created".to_owned(), time.to_string().into());
    }
    for (flag, field) in [("entrypoint", "Entrypoint"), ("cmd", "Cmd")] {
        if let Some(value) = matches.optional(flag) {
            edit.insert(field.to_owned(), words(flag, value)?.into());
        }
    }
    for (flag, field) in [("env", "Env"), ("expose", "ExposedPorts"), ("volume", "Volumes")] {
        edit.insert(field.to_owned(), json!(matches.list(flag)));
    }
    let pair = |text: &&str| match text.split_once('=') {
        Some((name, value)) => (name.to_owned(), Json::from(value)),
        None => ((*text).to_owned(), Json::from("")),
    };
    let labels: serde_json::Map<String, Json> = matches.list("label").iter().map(pair).collect();
    edit.insert("Labels".to_owned(), labels.into());
    Ok(edit.into())
}

fn words(flag: &str, value: &str) -> Outcome<Vec<String>> {
    if value.trim_start().starts_with('[') {
        return serde_json::from_str(value)
            .map_err(|error| Fault::said(format!("--{flag} {value}: not a JSON array of strings: {error}")));
    }
    shlex::split(value).ok_or_else(|| Fault::said(format!("--{flag} {value}: a quote is not closed")))
}

/// The layers on their way to the engine: an archive of archives.
struct Layers {
    outer: Writer<BufWriter<File>>,
    time: Time,
}

impl Layers {
    fn pack(sources: &[String], epoch: i64) -> Outcome<File> {
        let temp = || tempfile::tempfile().map_err(Fault::io("make a temporary file"));
        let time = Time { seconds: epoch, nanos: 0 };
        let mut layers = Self { outer: Writer::new(BufWriter::new(temp()?)), time };
        for source in sources {
            let (path, destination) = match source.rsplit_once(':') {
                Some((path, destination)) if destination.starts_with('/') => (path, Some(destination)),
                _ => (source.as_str(), None),
            };
            let name = Path::new(path)
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            let metadata = std::fs::metadata(path).map_err(Fault::io(path))?;
            if metadata.is_file() && destination.is_none() && is_archive(path).map_err(Fault::io(path))? {
                let file = File::open(path).map_err(Fault::io(path))?;
                layers.add(&name, file, metadata.len()).map_err(Fault::io(path))?;
                continue;
            }
            let mut inner = Writer::new(BufWriter::new(temp()?));
            let mut root = destination.unwrap_or("/").trim_matches('/').to_owned();
            if metadata.is_dir() {
                layers.folder(&mut inner, Path::new(path), &root)?;
            } else {
                if root.is_empty() || destination.is_some_and(|path| path.ends_with('/')) {
                    let below = if root.is_empty() { String::new() } else { format!("{root}/") };
                    root = format!("{below}{name}");
                }
                layers.file(&mut inner, Path::new(path), &root).map_err(Fault::io(path))?;
            }
            let finish = || -> io::Result<(File, u64)> {
                let mut file = inner.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
                let length = file.stream_position()?;
                file.rewind()?;
                Ok((file, length))
            };
            let (file, length) = finish().map_err(Fault::io(path))?;
            layers.add(&format!("/{root}"), file, length).map_err(Fault::io(path))?;
        }
        let finish = || -> io::Result<File> {
            let mut file = layers.outer.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.rewind()?;
            Ok(file)
        };
        finish().map_err(Fault::io("write the layers"))
    }

    fn add(&mut self, name: &str, mut layer: File, length: u64) -> io::Result<()> {
        let entry = Entry {
            path: name.as_bytes().to_vec(),
            mode: 0o644,
            stored: length,
            size: length,
            ..Entry::default()
        };
        self.outer.append(&entry, &mut layer)
    }

    /// What is in a folder, by name. Directories above `root` are not written: the base's stay as they are.
    fn folder(&self, archive: &mut Writer<impl Write>, dir: &Path, root: &str) -> Outcome {
        let list = || -> io::Result<Vec<_>> {
            let mut names = std::fs::read_dir(dir)?
                .map(|entry| Ok(entry?.file_name()))
                .collect::<io::Result<Vec<_>>>()?;
            names.sort();
            Ok(names)
        };
        for name in list().map_err(Fault::io(dir.display()))? {
            let path = dir.join(&name);
            let shown = name.to_string_lossy();
            let inside = if root.is_empty() { shown.into_owned() } else { format!("{root}/{shown}") };
            let metadata = std::fs::symlink_metadata(&path).map_err(Fault::io(path.display()))?;
            if metadata.is_dir() {
                archive.append_dir(&format!("{inside}/"), self.time).map_err(Fault::io(path.display()))?;
                self.folder(archive, &path, &inside)?;
            } else {
                self.file(archive, &path, &inside).map_err(Fault::io(path.display()))?;
            }
        }
        Ok(())
    }

    fn file(&self, archive: &mut Writer<impl Write>, path: &Path, inside: &str) -> io::Result<()> {
        use std::os::unix::ffi::OsStrExt as _;
        let metadata = std::fs::symlink_metadata(path)?;
        let mut entry = Entry { path: inside.as_bytes().to_vec(), mtime: self.time, ..Entry::default() };
        if metadata.is_symlink() {
            entry.kind = Kind::Symlink;
            entry.mode = 0o777;
            entry.link = std::fs::read_link(path)?.as_os_str().as_bytes().to_vec();
            return archive.append(&entry, &mut io::empty());
        }
        if !metadata.is_file() {
            return Err(io::Error::other("neither a file, a folder nor a link: it cannot be added"));
        }
        // As git keeps them: whether it can be executed, and no more.
        entry.mode = if metadata.permissions().mode() & 0o111 == 0 { 0o644 } else { 0o755 };
        (entry.stored, entry.size) = (metadata.len(), metadata.len());
        archive.append(&entry, &mut File::open(path)?)
    }
}

/// Whether a file is a tar archive, compressed or not.
fn is_archive(path: &str) -> io::Result<bool> {
    let mut head = [0_u8; 512];
    let decoded = brigantine_image::decode(File::open(path)?);
    let mut read = 0;
    if let Ok(mut decoded) = decoded {
        while let Ok(n @ 1..) = decoded.read(&mut head[read..]) {
            read += n;
        }
    }
    Ok(read == head.len() && head[257..262] == *b"ustar")
}
