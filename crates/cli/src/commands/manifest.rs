//! `brig manifest`: lists of several platforms' images, made here and put into a registry without an engine.
//!
//! A list that is being made is one file in the client's configuration directory, replaced as a whole.

use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::Arc;

use brigantine_image::model::{Descriptor, Document, Index};
use brigantine_image::{Platform, Reference, media};
use brigantine_registry::copy::{CopyOptions, Location};
use serde::{Deserialize, Serialize};

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::value::Value;
use crate::{images, output, registries};

const INSECURE: Flag = Flag::switch("insecure", "The registries may be reached without TLS");
const CERTS: Flag =
    Flag::text("certs-dir", "Directory of hosts' certificates and hosts.toml, before the system's");

pub static INSPECT: Command = Command {
    name: "inspect",
    usage: "[OPTIONS] [LIST] MANIFEST",
    about: "Show a manifest or a list of them",
    flags: &[
        CERTS,
        INSECURE,
        Flag::switch("verbose", "Show the descriptor, and each manifest of a list").short('v'),
    ],
    operands: Operands::Between(1, 2),
    run: runs!(inspect),
    ..Command::EMPTY
};

pub static CREATE: Command = Command {
    name: "create",
    usage: "[OPTIONS] LIST MANIFEST [MANIFEST...]",
    about: "Make a list of several platforms' images, here",
    flags: &[Flag::switch("amend", "Add to a list that is there").short('a'), CERTS, INSECURE],
    operands: Operands::AtLeast(2),
    run: runs!(create),
    ..Command::EMPTY
};

pub static ANNOTATE: Command = Command {
    name: "annotate",
    usage: "[OPTIONS] LIST MANIFEST",
    about: "Say which platform one image of a list is for",
    flags: &[
        Flag::text("arch", "Architecture"),
        Flag::text("os", "Operating system"),
        Flag::list("os-features", "Features of the operating system that are needed"),
        Flag::text("os-version", "Version of the operating system"),
        Flag::text("variant", "Variant of the architecture"),
    ],
    operands: Operands::Exactly(2),
    run: runs!(annotate),
    ..Command::EMPTY
};

pub static PUSH: Command = Command {
    name: "push",
    usage: "[OPTIONS] LIST",
    about: "Put a list, and the images it names, into its repository",
    flags: &[CERTS, INSECURE, Flag::switch("purge", "Remove the list here afterwards").short('p')],
    operands: Operands::Exactly(1),
    run: runs!(push),
    ..Command::EMPTY
};

pub static REMOVE: Command = Command {
    name: "rm",
    usage: "LIST [LIST...]",
    about: "Remove lists that were made here",
    operands: Operands::AtLeast(1),
    run: runs!(remove),
    ..Command::EMPTY
};

/// A list that is being made.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Draft {
    entries: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// Where the image is.
    source: String,
    manifest: Descriptor,
}

fn path(context: &Context, list: &Reference) -> PathBuf {
    let name = list.to_string().replace(['/', ':', '@'], "_");
    context.config_dir.join("manifests").join(format!("{name}.brig.json"))
}

fn load(context: &Context, list: &Reference) -> Outcome<Option<Draft>> {
    let path = path(context, list);
    match fs::read(&path) {
        Ok(raw) => serde_json::from_slice(&raw)
            .map(Some)
            .map_err(|error| Fault::said(format!("{}: {error}", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Fault::io(format_args!("reading {}", path.display()))(error)),
    }
}

fn existing(context: &Context, list: &Reference) -> Outcome<Draft> {
    load(context, list)?.ok_or_else(|| Fault::said(format!("No such manifest: {}", list.familiar())))
}

fn store(context: &Context, list: &Reference, draft: &Draft) -> Outcome {
    let path = path(context, list);
    let dir = context.config_dir.join("manifests");
    let write = || -> io::Result<()> {
        fs::create_dir_all(&dir)?;
        let mut temp = tempfile::NamedTempFile::new_in(&dir)?;
        temp.write_all(&serde_json::to_vec(draft)?)?;
        temp.as_file().sync_all()?;
        temp.persist(&path).map_err(|failed| failed.error)?;
        Ok(())
    };
    write().map_err(Fault::io(format_args!("writing {}", path.display())))
}

fn named(text: &str) -> Outcome<Reference> {
    images::parse(text).map(Reference::or_latest)
}

fn client(matches: &Matches, references: &[&Reference]) -> brigantine_registry::Client {
    let insecure = if matches.is("insecure") {
        references.iter().map(|reference| reference.domain().to_owned()).collect()
    } else {
        Vec::new()
    };
    registries::client(insecure, matches.optional("certs-dir"))
}

async fn inspect(context: &Context, matches: Matches) -> Outcome {
    let reference = named(matches.operands().last().map_or("", String::as_str))?;
    if matches.operands().len() == 2 {
        let list = named(matches.operand(0))?;
        let draft = existing(context, &list)?;
        let entry = draft.entries.iter().find(|entry| entry.source == reference.to_string());
        let entry = entry.ok_or_else(|| {
            Fault::said(format!("{} has no manifest {}", list.familiar(), reference.familiar()))
        })?;
        return show(&serde_json::to_vec(&entry.manifest).map_err(|error| Fault::said(error.to_string()))?);
    }
    if let Some(draft) = load(context, &reference)? {
        return show(&index(&draft)?.0);
    }
    let credentials = registries::credentials(context, &reference)?;
    let client = client(&matches, &[&reference]);
    let (descriptor, raw, document) =
        client.manifest(&reference, credentials.clone()).await.map_err(registries::fault)?;
    if !matches.is("verbose") {
        return show(&raw);
    }
    match document {
        Document::Manifest(_) => show(verbose(&reference, &descriptor, &raw)?.to_string().as_bytes()),
        Document::Index(index) => {
            let mut all = Vec::new();
            for child in &index.manifests {
                let named = reference.with_digest(child.digest.clone());
                let (_, raw, _) =
                    client.manifest(&named, credentials.clone()).await.map_err(registries::fault)?;
                all.push(verbose(&named, child, &raw)?);
            }
            show(serde_json::Value::Array(all).to_string().as_bytes())
        }
    }
}

fn verbose(reference: &Reference, descriptor: &Descriptor, raw: &[u8]) -> Outcome<serde_json::Value> {
    let document: serde_json::Value =
        serde_json::from_slice(raw).map_err(|error| Fault::said(error.to_string()))?;
    let key = match descriptor.media_type.as_str() {
        media::OCI_MANIFEST => "OCIManifest",
        media::OCI_INDEX => "OCIIndex",
        media::DOCKER_INDEX => "ManifestList",
        _ => "SchemaV2Manifest",
    };
    Ok(serde_json::json!({ "Ref": reference.to_string(), "Descriptor": descriptor, key: document }))
}

fn show(raw: &[u8]) -> Outcome {
    let value = Value::parse(raw).map_err(|error| Fault::said(error.to_string()))?;
    output::line(&value.to_indented());
    Ok(())
}

async fn create(context: &Context, matches: Matches) -> Outcome {
    let list = named(matches.operand(0))?;
    let mut draft = match load(context, &list)? {
        Some(draft) if matches.is("amend") => draft,
        Some(_) => {
            return Err(Fault::said(format!(
                "refusing to amend an existing manifest list with no --amend flag: {}",
                list.familiar()
            )));
        }
        None => Draft::default(),
    };
    for operand in &matches.operands()[1..] {
        let source = named(operand)?;
        let client = client(&matches, &[&source]);
        let credentials = registries::credentials(context, &source)?;
        let resolved = client.resolve(&source, credentials).await.map_err(registries::fault)?;
        if matches!(resolved.document, Document::Index(_)) {
            return Err(Fault::said(format!(
                "{} is a list of manifests itself: name its images by their digests",
                source.familiar()
            )));
        }
        let mut manifest = resolved.descriptor;
        manifest.platform = resolved.platforms.into_iter().next();
        let source = source.to_string();
        draft.entries.retain(|entry| entry.source != source);
        draft.entries.push(Entry { source, manifest });
    }
    store(context, &list, &draft)?;
    output::line(&format!("Created manifest list {list}"));
    Ok(())
}

async fn annotate(context: &Context, matches: Matches) -> Outcome {
    let (list, source) = (named(matches.operand(0))?, named(matches.operand(1))?);
    let mut draft = existing(context, &list)?;
    let entry = draft.entries.iter_mut().find(|entry| entry.source == source.to_string());
    let entry = entry.ok_or_else(|| {
        Fault::said(format!("manifest for image {} does not exist in {}", source.familiar(), list.familiar()))
    })?;
    let platform = entry.manifest.platform.get_or_insert_with(Platform::default);
    let given = |name: &str| matches.optional(name).map(str::to_owned);
    if let Some(os) = given("os") {
        platform.os = os;
    }
    if let Some(architecture) = given("arch") {
        platform.architecture = architecture;
    }
    platform.variant = given("variant").or(platform.variant.take());
    platform.os_version = given("os-version").or(platform.os_version.take());
    if let Some(features) = matches.some_list("os-features") {
        platform.os_features = Some(features);
    }
    store(context, &list, &draft)
}

/// The list's document and its type: docker's where all of its images are docker's.
fn index(draft: &Draft) -> Outcome<(Vec<u8>, &'static str)> {
    let dockers = draft.entries.iter().all(|entry| entry.manifest.media_type == media::DOCKER_MANIFEST);
    let kind = if dockers { media::DOCKER_INDEX } else { media::OCI_INDEX };
    let index = Index {
        schema_version: 2,
        media_type: Some(kind.to_owned()),
        artifact_type: None,
        manifests: draft.entries.iter().map(|entry| entry.manifest.clone()).collect(),
        subject: None,
        annotations: std::collections::BTreeMap::new(),
    };
    let raw = serde_json::to_vec(&index).map_err(|error| Fault::said(error.to_string()))?;
    Ok((raw, kind))
}

async fn push(context: &Context, matches: Matches) -> Outcome {
    let list = named(matches.operand(0))?;
    let draft = existing(context, &list)?;
    let without = draft.entries.iter().find(|entry| {
        entry.manifest.platform.as_ref().is_none_or(|platform| platform.architecture.is_empty())
    });
    if let Some(entry) = without {
        return Err(Fault::said(format!(
            "manifest {} must have an OS and Architecture to be pushed to a registry: use brig manifest annotate",
            entry.source
        )));
    }
    let to = registries::credentials(context, &list)?;
    for entry in &draft.entries {
        let source = images::parse(&entry.source)?;
        let client = client(&matches, &[&list, &source]);
        let from = source.with_digest(entry.manifest.digest.clone());
        let target = list.with_digest(entry.manifest.digest.clone());
        let options = CopyOptions {
            from: registries::credentials(context, &source)?,
            to: to.clone(),
            ..CopyOptions::default()
        };
        // By its digest, and without a name of its own.
        let (from, target) = (Location::Registry(from), Location::Registry(target));
        client.copy(&from, &target, options, Arc::new(|_step| {})).await.map_err(registries::fault)?;
        output::line(&format!("Pushed ref {}@{}", list.repository(), entry.manifest.digest));
    }
    let (raw, kind) = index(&draft)?;
    let digest =
        client(&matches, &[&list]).put_manifest(&list, kind, raw, to).await.map_err(registries::fault)?;
    output::line(digest.as_str());
    if matches.is("purge") {
        fs::remove_file(path(context, &list)).map_err(Fault::io("removing the list here"))?;
    }
    Ok(())
}

async fn remove(context: &Context, matches: Matches) -> Outcome {
    super::for_each(matches.operands(), async |name| {
        let list = named(name)?;
        match fs::remove_file(path(context, &list)) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Fault::said(format!("No such manifest: {}", list.familiar())))
            }
            Err(error) => Err(Fault::io(format_args!("removing {name}"))(error)),
        }
    })
    .await
}
