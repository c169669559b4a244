//! What `brig build` does with what it has built: `--output`, `--push`, `--load`, `--metadata-file`, in buildx's words
//! (docs.docker.com/reference/cli/docker/buildx/build).
//!
//! Invariant: where no image is asked for, the engine has none for it at any time: files and archives are sent here
//! while the build is under way. A file appears under its name when the build was well, and not before.

use std::path::Path;

use crate::args::Matches;
use crate::client::{Ask, encode};
use crate::commands::build_receive::{Place, Receiving};
use crate::commands::push;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::images;
use crate::progress::Sink;
use crate::value::Value;
use crate::{output, terminal};

pub use crate::commands::build_receive::Archives;

/// One result.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Output {
    /// In the engine, with these names besides those of `--tag`; perhaps in their registries.
    Image { names: Vec<String>, push: bool, compression: Option<String> },
    /// The files, in this folder.
    Local(String),
    /// The files, as an archive; `None` is standard output.
    Tar(Option<String>),
    /// The image, as an archive.
    Archive(Option<String>),
    /// Nothing but the cache.
    CacheOnly,
}

/// All that is asked for.
#[derive(Debug, Clone)]
pub struct Outputs {
    all: Vec<Output>,
    tags: Vec<String>,
    metadata: Option<String>,
    platforms: Vec<String>,
    /// Where progress is shown, if not where it would be.
    elsewhere: Option<Sink>,
    options: Options,
}

/// What outputs say of how the result is made.
#[derive(Debug, Clone, Default)]
struct Options {
    rewrite_timestamps: bool,
    attestation_prefix: Option<String>,
    platform_split: Option<bool>,
}

/// What the engine tells of a build that is done.
#[derive(Debug, Default)]
pub struct Built {
    /// The image's id; empty where there is none.
    pub id: String,
    reference: String,
    provenance: serde_json::Value,
    descriptor: serde_json::Value,
}

impl Built {
    /// An image that was not built, by its description.
    pub fn of_image(id: &str, found: &Value) -> Self {
        let descriptor = serde_json::from_str(&found.at("Descriptor").to_json()).unwrap_or_default();
        Self { id: id.to_owned(), descriptor, ..Self::default() }
    }

    pub fn told(&mut self, aux: &Value) {
        let copy = |key: &str| serde_json::from_str(&aux.at(key).to_json()).unwrap_or_default();
        aux.at("ID").text().clone_into(&mut self.id);
        aux.at("Ref").text().clone_into(&mut self.reference);
        (self.provenance, self.descriptor) = (copy("Provenance"), copy("Descriptor"));
    }
}

impl Outputs {
    pub fn of(matches: &Matches) -> Outcome<Self> {
        let (mut all, mut options) = (Vec::new(), Options::default());
        for text in matches.list("output") {
            all.push(parse(text, &mut options)?);
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
        Ok(Self { all, tags, metadata, platforms: Vec::new(), elsewhere: None, options })
    }

    /// The image's names: none where only files are asked for.
    pub fn tags(&self) -> &[String] {
        let named = |o: &Output| matches!(o, Output::Image { .. } | Output::Archive(_));
        if self.all.iter().any(named) { &self.tags } else { &[] }
    }

    /// Where progress is shown.
    pub fn sink(&self) -> Sink {
        let otherwise = if self.take_stdout() { Sink::Stderr } else { Sink::Stdout };
        self.elsewhere.unwrap_or(otherwise)
    }

    /// Of a build for these platforms.
    pub fn for_platforms(self, platforms: &[&str]) -> Self {
        let platforms = platforms.iter().flat_map(|all| all.split(',')).map(str::to_owned).collect();
        Self { platforms, ..self }
    }

    /// Shows progress there.
    pub fn with_progress(self, sink: Sink) -> Self {
        Self { elsewhere: Some(sink), ..self }
    }

    /// With an image of the engine's besides.
    pub fn with_image(&self) -> Self {
        let mut outputs = self.clone();
        outputs.all.push(Output::Image { names: Vec::new(), push: false, compression: None });
        outputs
    }

    /// Whether the engine keeps an image.
    pub fn keeps_image(&self) -> bool {
        self.all.iter().any(|o| matches!(o, Output::Image { .. })) || !self.tags().is_empty()
    }

    /// Whether files' times are not to be later than the time that is given.
    pub fn rewrite_timestamps(&self) -> bool {
        self.options.rewrite_timestamps
    }

    /// Whether one of them is written to standard output.
    pub fn take_stdout(&self) -> bool {
        self.all.iter().any(|o| matches!(o, Output::Tar(None) | Output::Archive(None)))
    }

    /// Places for what the engine sends while it builds.
    pub fn receive(&self) -> Outcome<(Receiving, Archives)> {
        let (mut files, mut images) = (Vec::new(), Vec::new());
        for one in &self.all {
            match one {
                Output::Local(dir) => files.push(Place::folder(dir)?),
                Output::Tar(dest) => files.push(Place::file(dest.as_deref())?),
                Output::Archive(dest) => images.push(Place::file(dest.as_deref())?),
                Output::Image { .. } | Output::CacheOnly => {}
            }
        }
        Ok(Receiving::begin([("files", files), ("image", images)]))
    }

    /// Asks for them.
    pub fn asked<'c>(&self, mut ask: Ask<'c>, archives: &Archives) -> Ask<'c> {
        let mut words = vec![];
        words.extend(archives.contains_key("files").then_some("files"));
        words.extend(archives.contains_key("image").then_some("archive"));
        words.extend(self.keeps_image().then_some("image"));
        if words.is_empty() {
            words.push("nothing");
        }
        ask = ask.query("deliver", &words.join(","));
        self.with_options(ask)
    }

    /// Asks for the files alone.
    pub fn asked_for_files<'c>(&self, ask: Ask<'c>) -> Ask<'c> {
        self.with_options(ask.query("deliver", "files"))
    }

    fn with_options<'c>(&self, ask: Ask<'c>) -> Ask<'c> {
        let options = &self.options;
        let ask = ask.maybe("attestationprefix", options.attestation_prefix.as_deref());
        ask.maybe("platformsplit", options.platform_split.map(|split| if split { "1" } else { "0" }))
    }

    /// Hands out what was built, as far as it is not here already.
    pub async fn deliver(&self, context: &Context, built: &Built) -> Outcome {
        for one in &self.all {
            let Output::Image { names, push: true, compression } = one else { continue };
            for name in if names.is_empty() { &self.tags } else { names } {
                let reference = images::parse(name)?.or_latest();
                push::push(context, &reference, None, compression.as_deref(), self.sink()).await?;
            }
        }
        let Some(path) = &self.metadata else { return Ok(()) };
        let mut descriptor = built.descriptor.clone();
        if self.keeps_image() && !built.id.is_empty() {
            // A push may have given it another manifest.
            let ask = context.client.get(format!("/images/{}/json", encode(&built.id)));
            let found = ask.send().await?.value().await?;
            let now = serde_json::from_str(&found.at("Descriptor").to_json()).unwrap_or_default();
            if let serde_json::Value::Object(_) = now {
                descriptor = now;
            }
        }
        let text = format!("{:#}\n", self.metadata(built, &descriptor)?);
        std::fs::write(path, text)
            .map_err(|error| Fault::said(format!("write {path}: {}", output::os_text(&error))))
    }

    fn metadata(&self, built: &Built, descriptor: &serde_json::Value) -> Outcome<serde_json::Value> {
        let mut metadata = serde_json::json!({});
        if !built.reference.is_empty() {
            metadata["buildx.build.ref"] = format!("brigantine/brigantine/{}", built.reference).into();
        }
        // As buildx has it.
        if !built.provenance.is_null()
            && std::env::var("BUILDX_METADATA_PROVENANCE").as_deref() != Ok("disabled")
        {
            let key = "buildx.build.provenance";
            if self.platforms.len() > 1 {
                for platform in &self.platforms {
                    metadata[format!("{key}/{platform}")] = built.provenance.clone();
                }
            } else {
                metadata[key] = built.provenance.clone();
            }
        }
        if built.id.is_empty() {
            return Ok(metadata);
        }
        metadata["containerimage.config.digest"] = built.id.clone().into();
        metadata["containerimage.digest"] = descriptor["digest"].clone();
        metadata["containerimage.descriptor"] = descriptor.clone();
        if !self.tags().is_empty() {
            let names: Outcome<Vec<String>> =
                self.tags().iter().map(|tag| Ok(images::parse(tag)?.or_latest().to_string())).collect();
            metadata["image.name"] = names?.join(",").into();
        }
        Ok(metadata)
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
fn parse(text: &str, options: &mut Options) -> Outcome<Output> {
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
                kind = ["local", "tar", "oci", "docker", "image", "registry", "cacheonly"]
                    .into_iter()
                    .find(|known| *known == value)
                    .ok_or_else(|| {
                        wrong(format!(
                            "type {value:?} is none of local, tar, oci, docker, image, registry and cacheonly"
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
            "rewrite-timestamp" if matches!(value.as_str(), "true" | "false") => {
                options.rewrite_timestamps |= value == "true";
            }
            "attestation-prefix" => options.attestation_prefix = Some(value),
            "platform-split" if matches!(value.as_str(), "true" | "false") => {
                options.platform_split = Some(value == "true");
            }
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
    if !matches!(kind, "local" | "tar")
        && (options.attestation_prefix.is_some() || options.platform_split.is_some())
    {
        return Err(wrong(
            "attestation-prefix and platform-split are for the types local and tar".to_owned(),
        ));
    }
    // Where buildx writes to standard output by itself, so does this.
    let file = dest.clone().filter(|dest| dest != "-");
    Ok(match (kind, dest) {
        ("", _) => return Err(wrong("type is required".to_owned())),
        ("local", Some(dest)) => Output::Local(dest),
        ("local", None) => return Err(wrong("dest is required for local output".to_owned())),
        ("tar", _) => Output::Tar(file),
        ("cacheonly", _) => Output::CacheOnly,
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
            ("type=cacheonly", Output::CacheOnly),
            ("type=local,dest=o,platform-split=false,attestation-prefix=x-", Output::Local("o".to_owned())),
            ("type=registry", image(&[], true)),
            ("type=image,\"name=a:1,b:2\",push=true", image(&["a:1", "b:2"], true)),
        ] {
            assert_eq!(parse(text, &mut Options::default()).unwrap(), wanted, "{text}");
        }
        for (text, words) in [
            ("type=local", "dest is required"),
            ("dest=x", "type is required"),
            ("type=zip,dest=x", "is none of"),
            ("type=local,dest=x,push=true", "are for the types image and registry"),
            ("type=image,push=maybe", "is not true or false"),
            ("type=oci,dest=x,tar=false", "tar is not built yet"),
            ("type=docker,dest=/", "not a directory"),
            ("type=oci,dest=x,platform-split=true", "are for the types local and tar"),
        ] {
            let error = parse(text, &mut Options::default()).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
