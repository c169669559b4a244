//! `brig kill`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::{container_path, for_each};
use crate::context::Context;
use crate::fault::Outcome;

pub static COMMAND: Command = Command {
    name: "kill",
    usage: "[OPTIONS] CONTAINER [CONTAINER...]",
    about: "Send a signal to one or more running containers",
    flags: &[Flag::text("signal", "Signal to send, KILL if none is named").short('s')],
    operands: Operands::AtLeast(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    for_each(matches.operands(), async |name| {
        context
            .client
            .post(container_path(name, "/kill"))
            .maybe("signal", matches.optional("signal"))
            .done()
            .await
    })
    .await
}
