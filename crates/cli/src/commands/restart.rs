//! `brig restart`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::{container_path, for_each};
use crate::context::Context;
use crate::fault::Outcome;

pub static COMMAND: Command = Command {
    name: "restart",
    usage: "[OPTIONS] CONTAINER [CONTAINER...]",
    about: "Restart one or more containers",
    flags: &[
        Flag::text("signal", "Signal that asks the container to stop").short('s'),
        Flag::one("timeout", "int", "Seconds to wait before killing, -1 for ever").short('t').alias("time"),
    ],
    operands: Operands::AtLeast(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let timeout = matches.int("timeout")?.map(|seconds| seconds.to_string());
    for_each(matches.operands(), async |name| {
        context
            .client
            .post(container_path(name, "/restart"))
            .maybe("signal", matches.optional("signal"))
            .maybe("t", timeout.as_deref())
            .done()
            .await
    })
    .await
}
