//! `brig diff`.

use crate::args::{Command, Matches, Operands, runs};
use crate::commands::container_path;
use crate::context::Context;
use crate::fault::Outcome;
use crate::output;

pub static COMMAND: Command = Command {
    name: "diff",
    usage: "CONTAINER",
    about: "List what a container has changed in its image's files",
    operands: Operands::Exactly(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let answer =
        context.client.get(container_path(matches.operand(0), "/changes")).send().await?.value().await?;
    for change in answer.list() {
        let letter = match change.at("Kind").int() {
            0 => 'C',
            1 => 'A',
            _ => 'D',
        };
        output::line(&format!("{letter} {}", change.at("Path").text()));
    }
    Ok(())
}
