//! What `brig build` does with what it has built: `--output`, `--push`, `--load`, `--metadata-file`, in buildx's words
//! (docs.docker.com/reference/cli/docker/buildx/build).
//!
//! The engine builds an image in any case. Where nobody asked for one, it is removed again, unless it is somebody's.

use std::path::Path;

use crate::args::Matches;
use crate::client::encode;
use crate::commands::cp;
use crate::commands::push;
use crate::commands::save::into_file_or_stdout;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::images;
use crate::progress::Sink;
use crate::{output, terminal};

/// One result.
#[derive(Debug, PartialEq, Eq)]
enum Output {
    /// In the engine, with these names besides those of `--tag`; perhaps in their registries.
    Image { names: Vec<String>, push: bool, compression: Option<String> },
    /// The files, in this folder.
    Local(String),
    /// The files, as an archive; `None` is standard output.
    Tar(Option<String>),
    /// The image, as an archive.
    Archive(Option<String>),
}

/// All that is asked for.
#[derive(Debug)]
pub struct Outputs {
    all: Vec<Output>,
    tags: Vec<String>,
    metadata: Option<String>,
    /// Where progress is shown, if not where it would be.
    elsewhere: Option<Sink>,
    rewrite_timestamps: bool,
}

impl Outputs {
    pub fn of(matches: &Matches) -> Outcome<Self> {
        let (mut all, mut rewrite_timestamps) = (Vec::new(), false);
        for text in matches.list("output") {
            all.push(parse(text)?);
            let rewrites = |(key, value): &(String, String)| key == "rewrite-timestamp" && value == "true";
            rewrite_timestamps |= fields(text).iter().any(rewrites);
        }
        let image = |push| Output::Image { names: Vec::new(), push, compression: None };
        if matches.is("push") {
            all.push(image(true));
        }
        if matches.is("load") || all.is_empty() {
            all.push(image(false));
        }
        let to_stdout = |o: &&Output| matches!(o, Output::Tar(None) | Output::Archive(None));
        match all.iter().filter(to_stdout).count() {
            0 => {}
            1 if !terminal::stdout_is_terminal() => {}
            1 => {
                return Err(Fault::said(
                    "an archive is not written to a terminal: give it a dest, or redirect",
                ));
            }
            _ => return Err(Fault::said("only one output can go to standard output")),
        }
        let mut tags: Vec<String> = matches.owned_list("tag");
        for one in &all {
            if let Output::Image { names, .. } = one {
                tags.extend(names.iter().cloned());
            }
        }
        let pushed = all.iter().any(|o| matches!(o, Output::Image { push: true, .. }));
        if pushed && tags.is_empty() {
            return Err(Fault::said("a push needs the image's name: give it with --tag"));
        }
        let metadata = matches.optional("metadata-file").map(str::to_owned);
        Ok(Self { all, tags, metadata, elsewhere: None, rewrite_timestamps })
    }

    /// The image's names: none where only files are asked for.
    pub fn tags(&self) -> &[String] {
        if self.is_of_files() { &[] } else { &self.tags }
    }

    /// Where progress is shown.
    pub fn sink(&self) -> Sink {
        let otherwise = if self.take_stdout() { Sink::Stderr } else { Sink::Stdout };
        self.elsewhere.unwrap_or(otherwise)
    }

    /// Shows progress there.
    pub fn with_progress(self, sink: Sink) -> Self {
        Self { elsewhere: Some(sink), ..self }
    }

    /// Whether files' times are not to be later than the time that is given.
    pub fn rewrite_timestamps(&self) -> bool {
        self.rewrite_timestamps
    }

    /// Whether one of them is written to standard output.
    pub fn take_stdout(&self) -> bool {
        self.all.iter().any(|o| matches!(o, Output::Tar(None) | Output::Archive(None)))
    }

    fn is_of_files(&self) -> bool {
        self.all.iter().all(|o| matches!(o, Output::Local(_) | Output::Tar(_)))
    }

    /// Hands out what the image `id` is.
    pub async fn deliver(&self, context: &Context, id: &str) -> Outcome {
        let delivered = self.each(context, id).await;
        if self.all.iter().any(|o| matches!(o, Output::Image { .. })) || !self.tags().is_empty() {
            return delivered;
        }
        let discarded = discard(context, id).await;
        // The first failure is the one to tell.
        delivered.and(discarded)
    }

    async fn each(&self, context: &Context, id: &str) -> Outcome {
        for one in &self.all {
            match one {
                Output::Image { push: false, .. } => {}
                Output::Image { names, compression, .. } => {
                    for name in if names.is_empty() { &self.tags } else { names } {
                        let reference = images::parse(name)?.or_latest();
                        push::push(context, &reference, None, compression.as_deref(), self.sink()).await?;
                    }
                }
                Output::Local(dir) => {
                    std::fs::create_dir_all(dir).map_err(Fault::io(dir))?;
                    let files = Files::of(context, id).await?;
                    let unpacked = async { cp::unpack_into(files.archive(context).await?, dir).await }.await;
                    let removed = files.remove(context).await;
                    unpacked.and(removed)?;
                }
                Output::Tar(dest) => {
                    let files = Files::of(context, id).await?;
                    let written =
                        async { into_file_or_stdout(files.archive(context).await?, dest.as_deref()).await }
                            .await;
                    let removed = files.remove(context).await;
                    written.and(removed)?;
                }
                Output::Archive(dest) => {
                    let mut ask = context.client.get("/images/get");
                    // By its names, so that they are in the archive.
                    if self.tags.is_empty() {
                        ask = ask.query("names", id);
                    }
                    for tag in &self.tags {
                        ask = ask.query("names", tag);
                    }
                    into_file_or_stdout(ask.send().await?.into_stream(), dest.as_deref()).await?;
                }
            }
        }
        let Some(path) = &self.metadata else { return Ok(()) };
        let found = context.client.get(format!("/images/{}/json", encode(id))).send().await?.value().await?;
        let digest = match found.at("Descriptor").at("digest").text() {
            "" => id,
            digest => digest,
        };
        let mut metadata = serde_json::json!({
            "containerimage.config.digest": id,
            "containerimage.digest": digest,
        });
        if !self.tags().is_empty() {
            let names: Outcome<Vec<String>> =
                self.tags().iter().map(|tag| Ok(images::parse(tag)?.or_latest().to_string())).collect();
            metadata["image.name"] = names?.join(",").into();
        }
        std::fs::write(path, format!("{metadata:#}\n"))
            .map_err(|error| Fault::said(format!("write {path}: {}", output::os_text(&error))))
    }
}

/// An image's files, by a container that is never started.
struct Files(String);

impl Files {
    async fn of(context: &Context, id: &str) -> Outcome<Self> {
        // The image need not say what to run.
        let wanted = serde_json::json!({ "Image": id, "Cmd": ["none"], "NetworkDisabled": true });
        let made = context.client.post("/containers/create").json(&wanted)?.send().await?.value().await?;
        Ok(Self(made.at("Id").text().to_owned()))
    }

    async fn archive(&self, context: &Context) -> Outcome<hyper::body::Incoming> {
        Ok(context.client.get(format!("/containers/{}/export", self.0)).send().await?.into_stream())
    }

    async fn remove(&self, context: &Context) -> Outcome {
        context
            .client
            .delete(format!("/containers/{}", self.0))
            .query("force", "1")
            .query("v", "1")
            .done()
            .await
    }
}

/// Removes an image that nobody asked for; one with a name was there before.
pub async fn discard(context: &Context, id: &str) -> Outcome {
    let found = context.client.get(format!("/images/{}/json", encode(id))).send().await?.value().await?;
    if !found.at("RepoTags").list().is_empty() {
        return Ok(());
    }
    match context.client.delete(format!("/images/{}", encode(id))).done().await {
        // A container of an earlier build's runs from it.
        Err(Fault::Api { status: 404 | 409, .. }) => Ok(()),
        other => other,
    }
}

/// `-`, a folder, or `type=…,key=value…`.
fn parse(text: &str) -> Outcome<Output> {
    let wrong = |why: String| Fault::said(format!("--output {text}: {why}"));
    if text == "-" {
        return Ok(Output::Tar(None));
    }
    if !text.contains('=') {
        return Ok(Output::Local(text.to_owned()));
    }
    let (mut kind, mut dest, mut names, mut push, mut compression) = ("", None, Vec::new(), false, None);
    for (key, value) in fields(text) {
        match key.as_str() {
            "type" => {
                kind = ["local", "tar", "oci", "docker", "image", "registry"]
                    .into_iter()
                    .find(|known| *known == value)
                    .ok_or_else(|| {
                        wrong(format!(
                            "type {value:?} is none of local, tar, oci, docker, image and registry"
                        ))
                    })?;
            }
            "dest" => dest = Some(value),
            "name" => names.extend(value.split(',').map(str::to_owned)),
            "push" => {
                push = value
                    .parse()
                    .map_err(|_neither| wrong(format!("push={value:?} is not true or false")))?;
            }
            "compression" => compression = Some(value),
            // An archive is what there is; times are the build's affair.
            "tar" if value == "true" => {}
            "rewrite-timestamp" if matches!(value.as_str(), "true" | "false") => {}
            other => return Err(wrong(format!("{other} is not built yet"))),
        }
    }
    let is_image = matches!(kind, "image" | "registry");
    if !is_image && (push || !names.is_empty() || compression.is_some()) {
        return Err(wrong("name, push and compression are for the types image and registry".to_owned()));
    }
    if is_image && dest.is_some() {
        return Err(wrong(format!("an output of type {kind} has no dest")));
    }
    // Where buildx writes to standard output by itself, so does this.
    let file = dest.clone().filter(|dest| dest != "-");
    Ok(match (kind, dest) {
        ("", _) => return Err(wrong("type is required".to_owned())),
        ("local", Some(dest)) => Output::Local(dest),
        ("local", None) => return Err(wrong("dest is required for local output".to_owned())),
        ("tar", _) => Output::Tar(file),
        // For a dest that is missing the engine is meant.
        ("docker", None) => Output::Image { names, push: false, compression: None },
        ("docker" | "oci", Some(dest)) if Path::new(&dest).is_dir() => {
            return Err(wrong(format!("dest file should be a file and not a directory: {dest}")));
        }
        ("docker" | "oci", _) => Output::Archive(file),
        _ => Output::Image { names, push: push || kind == "registry", compression },
    })
}

/// `key=value`, separated by commas; what is quoted as a whole may have commas inside.
fn fields(text: &str) -> Vec<(String, String)> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    for letter in text.chars() {
        match letter {
            '"' => quoted = !quoted,
            ',' if !quoted => parts.push(String::new()),
            other => parts.iter_mut().next_back().into_iter().for_each(|part| part.push(other)),
        }
    }
    let pair = |part: String| match part.split_once('=') {
        Some((key, value)) => (key.trim().to_owned(), value.to_owned()),
        None => (part, String::new()),
    };
    parts.into_iter().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_buildxs() {
        let image = |names: &[&str], push| Output::Image {
            names: names.iter().map(|n| (*n).to_owned()).collect(),
            push,
            compression: None,
        };
        for (text, wanted) in [
            ("-", Output::Tar(None)),
            ("out", Output::Local("out".to_owned())),
            ("type=local,dest=a b", Output::Local("a b".to_owned())),
            ("type=tar,dest=-", Output::Tar(None)),
            ("type=tar,dest=x.tar", Output::Tar(Some("x.tar".to_owned()))),
            ("type=oci,dest=x.tar,tar=true", Output::Archive(Some("x.tar".to_owned()))),
            ("type=oci", Output::Archive(None)),
            ("type=docker", image(&[], false)),
            ("type=docker,dest=x.tar", Output::Archive(Some("x.tar".to_owned()))),
            ("type=registry", image(&[], true)),
            ("type=image,\"name=a:1,b:2\",push=true", image(&["a:1", "b:2"], true)),
        ] {
            assert_eq!(parse(text).unwrap(), wanted, "{text}");
        }
        for (text, words) in [
            ("type=local", "dest is required"),
            ("dest=x", "type is required"),
            ("type=zip,dest=x", "is none of"),
            ("type=local,dest=x,push=true", "are for the types image and registry"),
            ("type=image,push=maybe", "is not true or false"),
            ("type=oci,dest=x,tar=false", "tar is not built yet"),
            ("type=docker,dest=/", "not a directory"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
