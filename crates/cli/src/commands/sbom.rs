//! `brig sbom`: what an image holds, as an SPDX document or as a table.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::encode;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::listing::{Listing, Row};
use crate::{images, output};

pub static COMMAND: Command = Command {
    name: "sbom",
    usage: "[OPTIONS] IMAGE",
    about: "Show which packages an image holds",
    flags: &[
        Flag::text("format", "'table', 'spdx-json' (SPDX 2.3), or a Go template").default("table"),
        Flag::text("output", "Write to this file instead of standard output").short('o'),
        Flag::text("platform", "Which of the image's variants to pull (os/arch[/variant])"),
    ],
    operands: Operands::Exactly(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let name = matches.operand(0);
    let ask = || context.client.get(format!("/images/{}/sbom", encode(name)));
    let document = match ask().send().await {
        Ok(reply) => reply.bytes().await?,
        Err(fault) if fault.is_not_found() => {
            let reference = images::parse(name)?.or_latest();
            images::pull(context, &reference, matches.optional("platform"), crate::progress::Sink::Stderr)
                .await?;
            ask().send().await?.bytes().await?
        }
        Err(fault) => return Err(fault),
    };
    let document: serde_json::Value = serde_json::from_slice(&document)
        .map_err(|error| Fault::said(format!("read the engine's answer: {error}")))?;
    if matches.text("format") == "spdx-json" {
        let text = format!("{document:#}\n");
        if let Some(path) = matches.optional("output").filter(|path| *path != "-") {
            return std::fs::write(path, text).map_err(Fault::io(path));
        }
        output::write(&text);
        return Ok(());
    }
    if matches.given("output") {
        return Err(Fault::said("--output is for --format spdx-json"));
    }
    let listing = Listing {
        kind: "*sbom.package",
        titles: &[("Type", "TYPE"), ("Name", "NAME"), ("Version", "VERSION"), ("PURL", "PURL")],
        table: "{{.Type}}\t{{.Name}}\t{{.Version}}",
    };
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    // The first is the image itself.
    let packages = document["packages"].as_array().into_iter().flatten().skip(1).map(|package| {
        let purl = text(&package["externalRefs"][0]["referenceLocator"]);
        let kind = purl.trim_start_matches("pkg:").split('/').next().unwrap_or_default().to_owned();
        Row::new()
            .with("Type", kind)
            .with("Name", text(&package["name"]))
            .with("Version", text(&package["versionInfo"]))
            .with("PURL", purl)
    });
    listing.print(matches.text("format"), packages.collect())?;
    if let Some(comment) = document["comment"].as_str() {
        output::error_line(comment);
    }
    Ok(())
}
