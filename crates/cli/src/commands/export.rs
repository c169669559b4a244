//! `brig export`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::container_path;
use crate::commands::save::into_file_or_stdout;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::terminal;

pub static COMMAND: Command = Command {
    name: "export",
    usage: "[OPTIONS] CONTAINER",
    about: "Write a container's files to an archive, without its volumes",
    flags: &[Flag::text("output", "Write to this file instead of standard output").short('o')],
    operands: Operands::Exactly(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let target = matches.optional("output");
    if target.is_none() && terminal::stdout_is_terminal() {
        return Err(Fault::said("cowardly refusing to save to a terminal. Use the -o flag or redirect"));
    }
    let body = context.client.get(container_path(matches.operand(0), "/export")).send().await?.into_stream();
    into_file_or_stdout(body, target).await
}
