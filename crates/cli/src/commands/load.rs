//! `brig load`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::upload;
use crate::context::Context;
use crate::fault::Outcome;
use crate::progress::{Progress, Sink};

pub static COMMAND: Command = Command {
    name: "load",
    usage: "[OPTIONS]",
    about: "Load images from an archive",
    flags: &[
        Flag::text("input", "Read from this file instead of standard input").short('i'),
        Flag::list("platform", "Load only this platform's variant"),
        Flag::switch("quiet", "Do not show progress").short('q'),
    ],
    operands: Operands::None,
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let source = upload::open(matches.text("input"))?;
    send(context, upload::body_of(source), matches.is("quiet"), matches.list("platform").first().copied())
        .await
}

/// Sends an archive of images and shows what the engine says of it.
pub async fn send(
    context: &Context,
    body: crate::client::Body,
    quiet: bool,
    platform: Option<&str>,
) -> Outcome {
    let lines = context
        .client
        .post("/images/load")
        .query("quiet", if quiet || !crate::terminal::stdout_is_terminal() { "1" } else { "0" })
        .maybe("platform", platform)
        .stream(body, "application/x-tar")
        .send()
        .await?
        .into_lines();
    Progress::new(Sink::Stdout).follow(lines, |_| {}).await
}
