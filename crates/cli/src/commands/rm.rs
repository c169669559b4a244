//! `brig rm`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::{container_path, for_each};
use crate::context::Context;
use crate::fault::{Fault, Outcome};

pub static COMMAND: Command = Command {
    name: "rm",
    usage: "[OPTIONS] CONTAINER [CONTAINER...]",
    about: "Remove one or more containers",
    flags: &[
        Flag::switch("force", "Kill a running container first").short('f'),
        Flag::switch("link", "Remove a link, not the container").short('l'),
        Flag::switch("volumes", "Remove the container's unnamed volumes too").short('v'),
    ],
    operands: Operands::AtLeast(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let force = matches.is("force");
    for_each(matches.operands(), async |name| {
        let name = name.trim_matches('/');
        if name.is_empty() {
            return Err(Fault::said("container name cannot be empty"));
        }
        context
            .client
            .delete(container_path(name, ""))
            .flag("force", force)
            .flag("v", matches.is("volumes"))
            .flag("link", matches.is("link"))
            .done()
            .await
    })
    .await
}
