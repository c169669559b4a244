//! `brig inspect` and the inspect commands of each kind of object.

use crate::args::{Command, Flag, Matches, Operands};
use crate::client::encode;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::value::Value;
use crate::{listing, output};

const FORMAT: Flag = Flag::text("format", "'json', or a Go template").short('f');
const SIZE: Flag = Flag::switch("size", "Add the sizes of a container's files").short('s');

pub static ANY: Command = Command {
    name: "inspect",
    usage: "[OPTIONS] NAME|ID [NAME|ID...]",
    about: "Show what the engine knows of an object",
    flags: &[FORMAT, SIZE, Flag::text("type", "Look only among objects of this type")],
    operands: Operands::AtLeast(1),
    run: |context, matches| {
        Box::pin(async move {
            let kinds: &[&str] = match matches.text("type") {
                "" => &["container", "image", "network", "volume"],
                "container" => &["container"],
                "image" => &["image"],
                "network" => &["network"],
                "volume" => &["volume"],
                kind @ ("node" | "service" | "task" | "plugin" | "secret" | "config") => {
                    return Err(Fault::said(format!("objects of type {kind} are not built yet")));
                }
                other => {
                    return Err(Fault::said(format!(
                        "unknown type: {other:?}: must be one of \"config\", \"container\", \"image\", \"network\", \"node\", \"plugin\", \"secret\", \"service\", \"task\", \"volume\""
                    )));
                }
            };
            inspect(context, &matches, kinds).await
        })
    },
    ..Command::EMPTY
};

pub static CONTAINER: Command = Command {
    usage: "[OPTIONS] CONTAINER [CONTAINER...]",
    about: "Show what the engine knows of one or more containers",
    flags: &[FORMAT, SIZE],
    run: |context, matches| Box::pin(async move { inspect(context, &matches, &["container"]).await }),
    ..ANY
};

pub static IMAGE: Command = Command {
    usage: "[OPTIONS] IMAGE [IMAGE...]",
    about: "Show what the engine knows of one or more images",
    flags: &[FORMAT, Flag::text("platform", "Show this platform's variant")],
    run: |context, matches| Box::pin(async move { inspect(context, &matches, &["image"]).await }),
    ..ANY
};

pub static NETWORK: Command = Command {
    usage: "[OPTIONS] NETWORK [NETWORK...]",
    about: "Show what the engine knows of one or more networks",
    flags: &[FORMAT, Flag::switch("verbose", "Show more, for diagnosis").short('v')],
    run: |context, matches| Box::pin(async move { inspect(context, &matches, &["network"]).await }),
    ..ANY
};

pub static VOLUME: Command = Command {
    usage: "[OPTIONS] VOLUME [VOLUME...]",
    about: "Show what the engine knows of one or more volumes",
    flags: &[FORMAT],
    run: |context, matches| Box::pin(async move { inspect(context, &matches, &["volume"]).await }),
    ..ANY
};

async fn inspect(context: &Context, matches: &Matches, kinds: &[&str]) -> Outcome {
    let format = matches.text("format");
    let mut found = Vec::new();
    let mut faults = Vec::new();
    for name in matches.operands() {
        match find(context, matches, kinds, name).await {
            Ok(value) => found.push(value),
            Err(fault @ Fault::Unreachable(_)) => return Err(fault),
            Err(fault) => faults.push(fault),
        }
    }
    if format.is_empty() {
        output::line(&Value::List(found).to_indented());
    } else {
        let mut text = String::new();
        let mut wrong = None;
        for value in &found {
            match listing::document(format, value) {
                Ok(rendered) => text.push_str(&(rendered + "\n")),
                Err(fault) => {
                    wrong = Some(fault);
                    break;
                }
            }
        }
        // Docker prints an empty line when nothing could be shown.
        output::write(if text.is_empty() { "\n" } else { &text });
        faults.extend(wrong);
    }
    super::all_well(&faults)
}

/// The first object of that name, looked for in the order of `kinds`.
async fn find(context: &Context, matches: &Matches, kinds: &[&str], name: &str) -> Outcome<Value> {
    for kind in kinds {
        let path = match *kind {
            "container" => format!("/containers/{}/json", encode(name)),
            "image" => format!("/images/{}/json", encode(name)),
            kind => format!("/{kind}s/{}", encode(name)),
        };
        let mut ask = context.client.get(path);
        if *kind == "container" && matches.has_flag("size") {
            ask = ask.flag("size", matches.is("size"));
        }
        if *kind == "image" && matches.has_flag("platform") {
            ask = ask.maybe("platform", matches.optional("platform"));
        }
        if *kind == "network" && matches.has_flag("verbose") {
            ask = ask.flag("verbose", matches.is("verbose"));
        }
        match ask.send().await {
            Ok(reply) => return reply.value().await,
            Err(fault) if fault.is_not_found() && kinds.len() > 1 => {}
            Err(Fault::Api { status: 400, .. }) if kinds.len() > 1 && *kind == "image" => {}
            Err(fault) => return Err(fault),
        }
    }
    Err(Fault::said(format!("Error: No such object: {name}")))
}
