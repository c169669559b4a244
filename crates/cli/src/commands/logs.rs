//! `brig logs`.

use http_body_util::BodyExt;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::container_path;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::streams::{Frames, put};
use crate::{output, units};

pub static COMMAND: Command = Command {
    name: "logs",
    usage: "[OPTIONS] CONTAINER",
    about: "Fetch the logs of a container",
    flags: &[
        Flag::switch("details", "Show the attributes kept with each line"),
        Flag::switch("follow", "Go on as the container writes").short('f'),
        Flag::text(
            "since",
            "Show what was written after a time (2026-01-02T13:23:37Z) or within a duration (42m)",
        ),
        Flag::text("tail", "Number of lines to show from the end").short('n').default("all"),
        Flag::switch("timestamps", "Show when each line was written").short('t'),
        Flag::text(
            "until",
            "Show what was written before a time (2026-01-02T13:23:37Z) or a duration ago (42m)",
        ),
    ],
    operands: Operands::Exactly(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let moment = |flag: &str| match matches.optional(flag) {
        Some(text) => units::point_in_time(text)
            .map(Some)
            .map_err(|why| Fault::said(format!("invalid value for \"{flag}\": {why}"))),
        None => Ok(None),
    };
    let (since, until) = (moment("since")?, moment("until")?);
    let document =
        context.client.get(container_path(matches.operand(0), "/json")).send().await?.value().await?;
    let terminal = document.at("Config").at("Tty").bool();
    let mut body = context
        .client
        .get(container_path(document.at("Id").text(), "/logs"))
        .query("stdout", "1")
        .query("stderr", "1")
        .flag("follow", matches.is("follow"))
        .flag("timestamps", matches.is("timestamps"))
        .flag("details", matches.is("details"))
        .query("tail", matches.text("tail"))
        .maybe("since", since.as_deref())
        .maybe("until", until.as_deref())
        .send()
        .await?
        .into_stream();
    let mut frames = Frames::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Fault::said(format!("the engine's answer broke off: {error}")))?;
        if let Ok(data) = frame.into_data() {
            if terminal {
                output::write_bytes(&data);
            } else {
                frames.feed(&data, put)?;
            }
        }
    }
    Ok(())
}
