//! `brig cp`: files between a container and here, by docker's rules of what the target means.
//!
//! A target that is a directory gets the source under its own name; one that is not there gets the source's content as
//! that; `SOURCE/.` means the content alone. Nothing is unpacked outside of the target.

use std::fs::File;
use std::io::{PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use base64::Engine as _;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::io::AsyncWriteExt;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::{container_path, upload};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::value::Value;
use crate::{output, units};

pub static COMMAND: Command = Command {
    name: "cp",
    usage: "[OPTIONS] CONTAINER:SRC_PATH DEST_PATH|-\n\tbrig cp [OPTIONS] SRC_PATH|- CONTAINER:DEST_PATH",
    about: "Copy files between a container and here",
    flags: &[
        Flag::switch("archive", "Keep owner and group").short('a'),
        Flag::switch("follow-link", "Follow a link that the source is").short('L'),
        Flag::switch("quiet", "Do not say what was copied").short('q'),
    ],
    operands: Operands::Exactly(2),
    run: runs!(run),
    ..Command::EMPTY
};

/// Go's bits for a directory, a link, and all kinds of files.
const MODE_DIR: i64 = 1 << 31;
const MODE_LINK: i64 = 1 << 27;
const MODE_KIND: i64 = MODE_DIR | MODE_LINK | 1 << 26 | 1 << 25 | 1 << 24 | 1 << 21;

async fn run(context: &Context, matches: Matches) -> Outcome {
    let (from, to) = (matches.operand(0), matches.operand(1));
    match (split_container(from), split_container(to)) {
        (Some(_), Some(_)) => Err(Fault::said("copying between containers is not supported")),
        (None, None) => Err(Fault::said(
            "must specify at least one container source: CONTAINER:SRC_PATH DEST_PATH, or SRC_PATH CONTAINER:DEST_PATH",
        )),
        (Some((container, path)), None) => download(context, &matches, container, path, to).await,
        (None, Some((container, path))) => upload_to(context, &matches, from, container, path).await,
    }
}

/// `CONTAINER:PATH`; what begins with a dot or a slash is a path here.
fn split_container(operand: &str) -> Option<(&str, &str)> {
    let (container, path) = operand.split_once(':')?;
    (!container.is_empty() && !container.starts_with(['.', '/'])).then_some((container, path))
}

/// What a path at either end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Absent,
    Directory,
    Other,
}

/// Where something goes: into this directory, under this name (empty: as the content of the directory).
#[derive(Debug, PartialEq, Eq)]
struct Placement {
    directory: String,
    name: String,
}

/// Docker's rules. `source` is the source's own name, `.` for its content.
fn place(source: &str, source_is_dir: bool, target: &str, kind: Kind) -> Outcome<Placement> {
    let (parent, base) = parent_and_base(target);
    match kind {
        Kind::Directory => Ok(Placement {
            directory: target.to_owned(),
            name: if source == "." || source == "/" { String::new() } else { source.to_owned() },
        }),
        Kind::Other if source_is_dir => {
            Err(Fault::said(format!("cannot copy directory to {target}: it is a file")))
        }
        Kind::Absent if !source_is_dir && target.ends_with('/') => {
            Err(Fault::said(format!("no such directory: {target}")))
        }
        Kind::Other | Kind::Absent => Ok(Placement { directory: parent, name: base }),
    }
}

fn parent_and_base(path: &str) -> (String, String) {
    let trimmed = path.trim_end_matches('/').trim_end_matches("/.");
    match trimmed.rsplit_once('/') {
        Some(("", base)) => ("/".to_owned(), base.to_owned()),
        Some((parent, base)) => (parent.to_owned(), base.to_owned()),
        None => (".".to_owned(), trimmed.to_owned()),
    }
}

/// The name by which a path's content is known: `.` when only the content is meant.
fn own_name(path: &str) -> String {
    if path == "." || path.ends_with("/.") {
        return ".".to_owned();
    }
    let trimmed = path.trim_end_matches('/');
    if trimmed.is_empty() { "/".to_owned() } else { parent_and_base(trimmed).1 }
}

/// The engine's description of a path in a container.
async fn stat(context: &Context, container: &str, path: &str) -> Outcome<Value> {
    let reply = context
        .client
        .ask(hyper::Method::HEAD, container_path(container, "/archive"))
        .query("path", path)
        .send()
        .await
        .map_err(|fault| match fault {
            // An answer to HEAD has no text.
            Fault::Api { status: 404, message } if !message.contains("container") => Fault::Api {
                status: 404,
                message: format!("Could not find the file {path} in container {container}"),
            },
            other => other,
        })?;
    let stat = description(reply.header("x-docker-container-path-stat"))?;
    reply.drain().await?;
    Ok(stat)
}

fn description(header: Option<&str>) -> Outcome<Value> {
    let wrong = || Fault::said("the engine's answer does not describe the path");
    let text = base64::engine::general_purpose::STANDARD
        .decode(header.ok_or_else(wrong)?)
        .map_err(|_malformed| wrong())?;
    Value::parse(&text).map_err(|_malformed| wrong())
}

async fn download(
    context: &Context,
    matches: &Matches,
    container: &str,
    path: &str,
    target: &str,
) -> Outcome {
    let mut path = if path.is_empty() { "/".to_owned() } else { path.to_owned() };
    let mut name = own_name(&path);
    if matches.is("follow-link") {
        let found = stat(context, container, &path).await?;
        let link = found.at("linkTarget").text();
        if found.at("mode").int() & MODE_LINK != 0 && !link.is_empty() {
            // It keeps the name it was asked for by.
            link.clone_into(&mut path);
        }
    }
    let reply = context.client.get(container_path(container, "/archive")).query("path", &path).send().await?;
    let found = description(reply.header("x-docker-container-path-stat"))?;
    let is_dir = found.at("mode").int() & MODE_DIR != 0;
    let prefix = found.at("name").text().to_owned();
    if target == "-" {
        let mut body = reply.into_stream();
        while let Some(data) = next(&mut body).await? {
            output::write_bytes(&data);
        }
        return Ok(());
    }
    let kind = match std::fs::metadata(target) {
        Ok(metadata) if metadata.is_dir() => Kind::Directory,
        Ok(_) => Kind::Other,
        Err(_) => Kind::Absent,
    };
    if kind == Kind::Absent {
        let (parent, _) = parent_and_base(target);
        if !Path::new(&parent).is_dir() {
            return Err(Fault::said(format!("invalid output path: directory \"{parent}\" does not exist")));
        }
    }
    if name == "/" {
        ".".clone_into(&mut name);
    }
    let place = place(&name, is_dir, target, kind)?;
    let (reader, writer) = std::io::pipe().map_err(Fault::io("making a pipe"))?;
    let keep = matches.is("archive");
    let unpacking = tokio::task::spawn_blocking(move || unpack(reader, &prefix, &place, keep));
    let sent = pour(reply.into_stream(), writer).await;
    let count = unpacking.await.map_err(|error| Fault::said(format!("unpacking broke: {error}")))?;
    let count = match (count, sent) {
        (Ok(count), Ok(())) => count,
        (Err(fault), _) | (Ok(_), Err(fault)) => return Err(fault),
    };
    told(matches, count, target);
    Ok(())
}

async fn next(body: &mut Incoming) -> Outcome<Option<bytes::Bytes>> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Fault::said(format!("the engine's answer broke off: {error}")))?;
        if let Ok(data) = frame.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

/// Passes an answer on. That the other end stopped reading is its own affair.
async fn pour(mut body: Incoming, writer: PipeWriter) -> Outcome {
    let mut writer = tokio::fs::File::from_std(File::from(OwnedFd::from(writer)));
    while let Some(data) = next(&mut body).await? {
        if writer.write_all(&data).await.is_err() {
            break;
        }
    }
    match writer.flush().await {
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Unpacks an archive's content into a folder.
pub fn unpack_into(reader: PipeReader, directory: &str) -> Outcome {
    let place = Placement { directory: directory.to_owned(), name: String::new() };
    unpack(reader, ".", &place, false).map(drop)
}

/// Unpacks below the directory; returns the bytes of files.
fn unpack(reader: PipeReader, prefix: &str, place: &Placement, keep_owner: bool) -> Outcome<u64> {
    let mut archive = tar::Archive::new(reader);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_preserve_ownerships(keep_owner);
    archive.set_overwrite(true);
    let broken = Fault::io("unpacking");
    let entries = match archive.entries() {
        Ok(entries) => entries,
        Err(error) => return Err(broken(error)),
    };
    let directory = Path::new(&place.directory);
    let mut count = 0;
    // Directories last, deepest first: their times and modes are those of when they are full.
    let mut directories = Vec::new();
    for entry in entries {
        let mut entry = entry.map_err(Fault::io("unpacking"))?;
        let path = entry.path().map_err(Fault::io("unpacking"))?.into_owned();
        let Some(relative) = renamed(&path, prefix, &place.name) else {
            return Err(Fault::said(format!(
                "unpacking: {} leads out of {}",
                path.display(),
                place.directory
            )));
        };
        let whole = directory.join(&relative);
        let kind = entry.header().entry_type();
        let there = std::fs::symlink_metadata(&whole).ok();
        match there {
            Some(there) if there.is_dir() && !kind.is_dir() => {
                return Err(Fault::said(format!(
                    "cannot overwrite directory \"{}\" with non-directory \"{}\"",
                    whole.display(),
                    place.directory
                )));
            }
            Some(there) if !there.is_dir() && kind.is_dir() => {
                return Err(Fault::said(format!(
                    "cannot overwrite non-directory \"{}\" with directory \"{}\"",
                    whole.display(),
                    place.directory
                )));
            }
            Some(there) if !there.is_dir() => {
                std::fs::remove_file(&whole).map_err(Fault::io(whole.display()))?;
            }
            _ => {}
        }
        if kind.is_hard_link() {
            let link = entry.link_name().map_err(Fault::io("unpacking"))?.unwrap_or_default().into_owned();
            let Some(link) = renamed(&link, prefix, &place.name) else {
                return Err(Fault::said(format!(
                    "unpacking: {} leads out of {}",
                    link.display(),
                    place.directory
                )));
            };
            for name in [&whole, &directory.join(&link)] {
                within(directory, name.parent().unwrap_or(directory))?;
            }
            std::fs::hard_link(directory.join(link), &whole).map_err(Fault::io(whole.display()))?;
            continue;
        }
        if kind.is_dir() {
            if !relative.as_os_str().is_empty() {
                within(directory, whole.parent().unwrap_or(directory))?;
                std::fs::create_dir_all(&whole).map_err(Fault::io(whole.display()))?;
                directories.push((entry.header().clone(), whole));
            }
            continue;
        }
        count += entry.size();
        if let Some(parent) = whole.parent() {
            within(directory, parent)?;
        }
        entry.unpack(&whole).map_err(Fault::io(whole.display()))?;
    }
    for (header, path) in directories.into_iter().rev() {
        settle(&header, &path, keep_owner).map_err(Fault::io(path.display()))?;
    }
    Ok(count)
}

/// A link in the archive may not lead a later entry out of the target.
fn within(directory: &Path, parent: &Path) -> Outcome {
    std::fs::create_dir_all(parent).map_err(Fault::io(parent.display()))?;
    let canonical = |path: &Path| path.canonicalize().map_err(Fault::io(path.display()));
    if canonical(parent)?.starts_with(canonical(directory)?) {
        return Ok(());
    }
    Err(Fault::said(format!("unpacking: {} leads out of {}", parent.display(), directory.display())))
}

fn settle(header: &tar::Header, path: &Path, keep_owner: bool) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    if keep_owner {
        let (uid, gid) = (header.uid()? as u32, header.gid()? as u32);
        std::os::unix::fs::lchown(path, Some(uid), Some(gid))?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(header.mode()?))?;
    let modified = std::time::UNIX_EPOCH + std::time::Duration::from_secs(header.mtime()?);
    File::open(path)?.set_times(std::fs::FileTimes::new().set_modified(modified))
}

/// An entry's place below the target; `None` when it leads out.
fn renamed(path: &Path, prefix: &str, name: &str) -> Option<PathBuf> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => parts.push(part),
            Component::ParentDir => return None,
            _ => {}
        }
    }
    let named = !matches!(prefix, "." | "/");
    let inner = parts.get(usize::from(named)..).unwrap_or_default();
    let mut out = PathBuf::from(name);
    out.extend(inner);
    Some(out)
}

async fn upload_to(
    context: &Context,
    matches: &Matches,
    source: &str,
    container: &str,
    path: &str,
) -> Outcome {
    let mut target = if path.is_empty() { "/".to_owned() } else { path.to_owned() };
    let mut kind = Kind::Absent;
    let mut found = stat(context, container, &target).await;
    if let Ok(value) = &found
        && value.at("mode").int() & MODE_LINK != 0
    {
        value.at("linkTarget").text().clone_into(&mut target);
        found = stat(context, container, &target).await;
    }
    match found {
        Ok(value) => {
            let mode = value.at("mode").int();
            if mode & MODE_DIR != 0 {
                kind = Kind::Directory;
            } else if mode & MODE_KIND == 0 {
                kind = Kind::Other;
            } else {
                return Err(Fault::said(format!(
                    "destination \"{container}:{target}\" must be a directory or a regular file"
                )));
            }
        }
        Err(fault) if fault.is_not_found() => {
            // It is the container that may be missing.
            context.client.get(container_path(container, "/json")).done().await?;
        }
        Err(fault) => return Err(fault),
    }
    let put = |directory: &str| {
        context
            .client
            .ask(hyper::Method::PUT, container_path(container, "/archive"))
            .query("path", directory)
            .query("noOverwriteDirNonDir", "true")
            .flag("copyUIDGID", matches.is("archive"))
    };
    if source == "-" {
        if kind != Kind::Directory {
            return Err(Fault::said(format!("destination \"{container}:{target}\" must be a directory")));
        }
        let body = upload::body_of(upload::open("-")?);
        return put(&target).stream(body, "application/x-tar").done().await;
    }
    let follow = matches.is("follow-link") || source.ends_with('/') || own_name(source) == ".";
    let opened = Source::open(source, follow)?;
    let place = place(&own_name(source), opened.is_dir, &target, kind)?;
    let name = if place.name.is_empty() { ".".to_owned() } else { place.name };
    let (reader, writer) = std::io::pipe().map_err(Fault::io("making a pipe"))?;
    let packing = tokio::task::spawn_blocking(move || {
        let output = std::io::BufWriter::with_capacity(1 << 18, writer);
        brigantine_image::layer::pack_as(opened.parent, &opened.base, name.as_bytes(), output, None)
    });
    let body = upload::body_of(File::from(OwnedFd::from(reader)));
    let sent = put(&place.directory).stream(body, "application/x-tar").done().await;
    let packed = packing.await.map_err(|error| Fault::said(format!("packing broke: {error}")))?;
    match (packed, sent) {
        (Ok(packed), Ok(())) => told(matches, packed.size, &format!("{container}:{path}")),
        (_, Err(fault)) => return Err(fault),
        (Err(error), Ok(())) => return Err(Fault::said(format!("reading {source}: {error}"))),
    }
    Ok(())
}

/// A local path, opened.
struct Source {
    parent: OwnedFd,
    /// Empty: the directory itself.
    base: Vec<u8>,
    is_dir: bool,
}

impl Source {
    fn open(path: &str, follow: bool) -> Outcome<Self> {
        let failed =
            |error: std::io::Error| Fault::said(format!("lstat {path}: {}", output::os_text(&error)));
        let plain = path.trim_end_matches('/');
        let plain = Path::new(if plain.is_empty() { "/" } else { plain });
        let resolved = if follow { plain.canonicalize().map_err(failed)? } else { plain.to_owned() };
        let metadata = std::fs::symlink_metadata(&resolved).map_err(failed)?;
        if metadata.is_dir() {
            let parent = File::open(&resolved).map_err(failed)?;
            return Ok(Self { parent: parent.into(), base: Vec::new(), is_dir: true });
        }
        if path.ends_with('/') {
            return Err(Fault::said(format!("lstat {path}: not a directory")));
        }
        let parent = resolved.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = File::open(parent.unwrap_or_else(|| Path::new("."))).map_err(failed)?;
        let base = resolved.file_name().unwrap_or_default().as_encoded_bytes().to_vec();
        Ok(Self { parent: parent.into(), base, is_dir: false })
    }
}

fn told(matches: &Matches, bytes: u64, target: &str) {
    if !matches.is("quiet") {
        output::error_line(&format!(
            "Successfully copied {} to {target}",
            units::human_size(bytes as f64, 3)
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_names_a_container() {
        assert_eq!(split_container("web:/etc"), Some(("web", "/etc")));
        assert_eq!(split_container("web:"), Some(("web", "")));
        assert_eq!(split_container("./a:b"), None);
        assert_eq!(split_container("/a:b"), None);
        assert_eq!(split_container("file"), None);
    }

    #[test]
    fn where_things_go() {
        let at = |directory: &str, name: &str| Placement { directory: directory.into(), name: name.into() };
        assert_eq!(place("a", true, "/t", Kind::Directory).unwrap(), at("/t", "a"));
        assert_eq!(place(".", true, "/t/", Kind::Directory).unwrap(), at("/t/", ""));
        assert_eq!(place("a", true, "/x/new", Kind::Absent).unwrap(), at("/x", "new"));
        assert_eq!(place("a", false, "/new", Kind::Other).unwrap(), at("/", "new"));
        assert_eq!(place("a", false, "new", Kind::Absent).unwrap(), at(".", "new"));
        place("a", false, "/new/", Kind::Absent).unwrap_err();
        place("a", true, "/file", Kind::Other).unwrap_err();
        assert_eq!(own_name("/a/b/"), "b");
        assert_eq!(own_name("/a/."), ".");
        assert_eq!(own_name("/"), "/");
        assert_eq!(own_name("x"), "x");
    }

    #[test]
    fn entries_are_renamed_and_stay_inside() {
        let to = |path: &str, prefix: &str, name: &str| renamed(Path::new(path), prefix, name);
        assert_eq!(to("d/sub/f", "d", "new"), Some("new/sub/f".into()));
        assert_eq!(to("./sub/f", ".", ""), Some("sub/f".into()));
        assert_eq!(to("f", "f", "g"), Some("g".into()));
        assert_eq!(to("d/../../f", "d", "new"), None);
    }
}
