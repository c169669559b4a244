//! `brig pull`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::progress::Sink;
use crate::{images, output};

pub static COMMAND: Command = Command {
    name: "pull",
    usage: "[OPTIONS] NAME[:TAG|@DIGEST]",
    about: "Download an image from a registry",
    flags: &[
        Flag::switch("all-tags", "Download every tag of the repository").short('a'),
        Flag::switch("disable-content-trust", "Accepted, without effect").default("true").hidden(),
        Flag::text("platform", "Platform of the image (os/architecture)"),
        Flag::switch("quiet", "Do not show progress").short('q'),
    ],
    operands: Operands::Exactly(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let mut reference = images::parse(matches.operand(0))?;
    let all = matches.is("all-tags");
    if all && !reference.is_name_only() {
        return Err(Fault::said("tag can't be used with --all-tags/-a"));
    }
    let quiet = matches.is("quiet");
    if !all {
        if reference.is_name_only() && !quiet {
            output::line("Using default tag: latest");
        }
        reference = reference.or_latest();
    }
    let sink = if quiet { Sink::Nowhere } else { Sink::Stdout };
    images::pull(context, &reference, matches.optional("platform"), sink).await?;
    output::line(&reference.to_string());
    Ok(())
}
