//! `brig builder cache …`: cache mounts listed, as archives, in registries and in folders.

use brigantine_image::Reference;
use brigantine_session::Lending;
use http::Method;

use crate::args::{Command, Flag, Group, Matches, Operands, runs, verb};
use crate::client::Ask;
use crate::commands::build_cache::{Caches, Place};
use crate::commands::save::into_file_or_stdout;
use crate::commands::{build_lend, upload};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::images::{self, AUTH_HEADER};
use crate::listing::{Listing, Row};
use crate::progress::{Progress, Sink};
use crate::{output, terminal, units};

pub static CACHE: Group = Group {
    name: "cache",
    about: "Manage cache mounts",
    entries: &[verb(&LS), verb(&EXPORT), verb(&IMPORT)],
};

static LS: Command = Command {
    name: "ls",
    usage: "[OPTIONS]",
    about: "List cache mounts",
    flags: &[Flag::text("format", "'table', 'table TEMPLATE', 'json', or a Go template")],
    operands: Operands::None,
    run: runs!(list),
    ..Command::EMPTY
};

const NAMESPACE: Flag = Flag::text("namespace", "The BUILDKIT_CACHE_MOUNT_NS that builds use the mount with");

static EXPORT: Command = Command {
    name: "export",
    usage: "[OPTIONS] ID",
    about: "Write a cache mount's files to a tar archive, a registry or a folder",
    flags: &[
        NAMESPACE,
        Flag::text("output", "Write a tar archive to this file instead of standard output").short('o'),
        Flag::text(
            "to",
            "NAME[:TAG] in a registry, type=registry,ref=NAME or type=local,dest=FOLDER[,tag=TAG] (with compression=zstd, gzip or uncompressed)",
        ),
    ],
    operands: Operands::Exactly(1),
    run: runs!(export),
    ..Command::EMPTY
};

static IMPORT: Command = Command {
    name: "import",
    usage: "[OPTIONS] ID FILE|-\n       brig builder cache import [OPTIONS] --from PLACE [ID]",
    about: "Replace a cache mount's files by those of a tar archive, or of one that was exported to a registry or a folder",
    flags: &[
        Flag::text(
            "from",
            "NAME[:TAG] in a registry, type=registry,ref=NAME or type=local,src=FOLDER[,tag=TAG]; without ID the mount keeps its own",
        ),
        NAMESPACE,
    ],
    operands: Operands::Between(0, 2),
    run: runs!(import),
    ..Command::EMPTY
};

async fn list(context: &Context, matches: Matches) -> Outcome {
    let listing = Listing {
        kind: "*build.cacheMount",
        titles: &[
            ("ID", "CACHE ID"),
            ("Namespace", "NAMESPACE"),
            ("Size", "SIZE"),
            ("LastUsedSince", "LAST USED"),
            ("InUse", "IN USE"),
        ],
        table: "{{.ID}}\t{{.Namespace}}\t{{.Size}}\t{{.LastUsedSince}}\t{{.InUse}}",
    };
    let all = context.client.get("/build/caches").send().await?.value().await?;
    let rows = all.list().iter().map(|mount| {
        Row::new()
            .with("ID", mount.at("Id").text())
            .with("Namespace", mount.at("Namespace").text())
            .with("Size", units::human_size(mount.at("Size").float(), 3))
            .with("LastUsedSince", units::ago(mount.at("LastUsed").int() / 1_000_000_000))
            .with("InUse", mount.at("InUse").bool().to_string())
    });
    listing.print(matches.text("format"), rows.collect())
}

async fn export(context: &Context, matches: Matches) -> Outcome {
    let target = matches.optional("output");
    if let Some(to) = matches.optional("to") {
        if target.is_some() {
            return Err(Fault::said("--output and --to: a cache mount goes to one place at a time"));
        }
        let mut caches = Caches::default();
        let place = caches.mount_to(to)?;
        let ask = context
            .client
            .post("/build/caches/export")
            .query("to", &place.text())
            .query("id", matches.operand(0))
            .maybe("namespace", matches.optional("namespace"));
        return carry(context, ask, &place, &caches).await;
    }
    if target.is_none() && terminal::stdout_is_terminal() {
        return Err(Fault::said("cowardly refusing to save to a terminal. Use the -o flag or redirect"));
    }
    let ask = context
        .client
        .get("/build/caches/archive")
        .query("id", matches.operand(0))
        .maybe("namespace", matches.optional("namespace"));
    into_file_or_stdout(ask.send().await?.into_stream(), target).await
}

async fn import(context: &Context, matches: Matches) -> Outcome {
    let operands = matches.operands();
    let namespace = matches.optional("namespace");
    if let Some(from) = matches.optional("from") {
        let id = match operands {
            [] if namespace.is_some() => {
                return Err(Fault::said(
                    "--namespace needs an ID: without one the mount keeps both of its own",
                ));
            }
            [] => None,
            [id] => Some(id.as_str()),
            _ => return Err(Fault::said("--from and a FILE: a cache mount comes from one place")),
        };
        let mut caches = Caches::default();
        let place = caches.mount_from(from)?;
        let ask = context.client.post("/build/caches/import").query("from", &place.text());
        let ask = ask.maybe("id", id).maybe("namespace", namespace);
        return carry(context, ask, &place, &caches).await;
    }
    let [id, file] = operands else {
        return Err(matches.usage("an ID and a FILE are needed, or --from", 1));
    };
    let body = upload::body_of(upload::open(file)?);
    context
        .client
        .ask(Method::PUT, "/build/caches/archive")
        .query("id", id)
        .maybe("namespace", namespace)
        .stream(body, "application/x-tar")
        .send()
        .await?;
    Ok(())
}

/// Has the engine carry a cache mount, and shows it.
async fn carry(context: &Context, mut ask: Ask<'_>, place: &Place, caches: &Caches) -> Outcome {
    // What is wrong with the name is said by the engine.
    if let Some(reference) = place.reference().and_then(|name| Reference::parse(name).ok()) {
        let credentials = images::credentials(context, &reference)?;
        if !credentials.is_empty() {
            ask = ask.header(AUTH_HEADER, &credentials.header());
        }
    }
    let lending = Lending { folders: caches.folders(), ..Lending::default() };
    let lent = build_lend::lend(context, lending, None).await?;
    let ask = ask.maybe("session", lent.as_ref().map(|lent| lent.session.as_str()));
    let mut result = Ok(());
    let mut said = None;
    let lines = ask.send().await?.into_lines();
    let heard = |aux: &crate::value::Value| {
        if aux.get("CacheWritten").is_some() {
            result = caches.written(aux);
        } else {
            said = Some(format!("{}: digest: {}", aux.at("ID").text(), aux.at("Digest").text()));
        }
    };
    Progress::new(Sink::Stdout).follow(lines, heard).await?;
    result?;
    if let Some(line) = said {
        output::line(&line);
    }
    Ok(())
}
