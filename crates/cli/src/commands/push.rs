//! `brig push`.

use brigantine_image::Reference;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::encode;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::images::{self, AUTH_HEADER};
use crate::output;
use crate::progress::{Progress, Sink};

pub static COMMAND: Command = Command {
    name: "push",
    usage: "[OPTIONS] NAME[:TAG]",
    about: "Upload an image to a registry",
    flags: &[
        Flag::switch("all-tags", "Upload every tag of the repository").short('a'),
        Flag::text("compression", "For layers not compressed yet: gzip, zstd (both with :LEVEL) or none")
            .default("gzip"),
        Flag::switch("disable-content-trust", "Accepted, without effect").default("true").hidden(),
        Flag::text("platform", "Upload only this platform's variant"),
        Flag::switch("quiet", "Do not show progress").short('q'),
    ],
    operands: Operands::Exactly(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let mut reference = images::parse(matches.operand(0))?;
    let (all, quiet) = (matches.is("all-tags"), matches.is("quiet"));
    if all && !reference.is_name_only() {
        return Err(Fault::said("tag can't be used with --all-tags/-a"));
    }
    if !all {
        if reference.is_name_only() && !quiet {
            output::line("Using default tag: latest");
        }
        reference = reference.or_latest();
    }
    let sink = if quiet { Sink::Nowhere } else { Sink::Stdout };
    push(context, &reference, matches.optional("platform"), matches.optional("compression"), sink).await?;
    if quiet {
        output::line(&reference.to_string());
    }
    Ok(())
}

/// Uploads the image of that name; all tags of a repository without one.
pub async fn push(
    context: &Context,
    reference: &Reference,
    platform: Option<&str>,
    compression: Option<&str>,
    sink: Sink,
) -> Outcome {
    let credentials = images::credentials(context, reference)?;
    let lines = context
        .client
        .post(format!("/images/{}/push", encode(&reference.familiar_name())))
        .maybe("tag", reference.tag())
        .maybe("platform", platform)
        .maybe("compression", compression)
        // Docker's engine refuses a push without this header, even an empty one.
        .header(AUTH_HEADER, &credentials.header())
        .send()
        .await?
        .into_lines();
    Progress::new(sink).follow(lines, |_| {}).await
}
