//! `brig pause` and `brig unpause`.

use crate::args::{Command, Matches, Operands};
use crate::commands::{container_path, for_each};
use crate::context::Context;
use crate::fault::Outcome;

pub static PAUSE: Command = Command {
    name: "pause",
    usage: "CONTAINER [CONTAINER...]",
    about: "Pause all processes of one or more containers",
    operands: Operands::AtLeast(1),
    run: |context, matches| Box::pin(each(context, matches, "/pause")),
    ..Command::EMPTY
};

pub static UNPAUSE: Command = Command {
    name: "unpause",
    about: "Let the processes of one or more paused containers go on",
    run: |context, matches| Box::pin(each(context, matches, "/unpause")),
    ..PAUSE
};

async fn each(context: &Context, matches: Matches, verb: &'static str) -> Outcome {
    for_each(matches.operands(), async |name| context.client.post(container_path(name, verb)).done().await)
        .await
}
