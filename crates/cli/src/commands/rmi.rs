//! `brig rmi`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::encode;
use crate::commands::all_well;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;

pub static COMMAND: Command = Command {
    name: "rmi",
    usage: "[OPTIONS] IMAGE [IMAGE...]",
    about: "Remove one or more images",
    flags: &[
        Flag::switch("force", "Remove though containers or other names refer to it").short('f'),
        Flag::switch("no-prune", "Keep parents that nothing else refers to"),
        Flag::list("platform", "Remove only this platform's variant").hidden(),
    ],
    operands: Operands::AtLeast(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let force = matches.is("force");
    let mut faults = Vec::new();
    for name in matches.operands() {
        let answer = async {
            context
                .client
                .delete(format!("/images/{}", encode(name)))
                .flag("force", force)
                .flag("noprune", matches.is("no-prune"))
                .send()
                .await?
                .value()
                .await
        };
        match answer.await {
            Ok(answer) => {
                for step in answer.list() {
                    for (verb, object) in step.entries() {
                        output::line(&format!("{verb}: {}", object.text()));
                    }
                }
            }
            Err(fault @ Fault::Unreachable(_)) => return Err(fault),
            // What is not there need not be removed by force.
            Err(fault) if force && fault.is_not_found() => output::error_line(&fault.to_string()),
            Err(fault) => faults.push(fault),
        }
    }
    all_well(&faults)
}
