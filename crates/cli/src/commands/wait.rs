//! `brig wait`.

use crate::args::{Command, Matches, Operands, runs};
use crate::commands::{all_well, container_path};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;

pub static COMMAND: Command = Command {
    name: "wait",
    usage: "CONTAINER [CONTAINER...]",
    about: "Wait until one or more containers stop, then print their exit statuses",
    operands: Operands::AtLeast(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let mut faults = Vec::new();
    for name in matches.operands() {
        let answer = async { context.client.post(container_path(name, "/wait")).send().await?.value().await };
        match answer.await {
            Ok(answer) if !answer.at("Error").is_null() => {
                faults.push(Fault::said(answer.at("Error").at("Message").text()));
            }
            Ok(answer) => output::line(&answer.at("StatusCode").to_string()),
            Err(fault) => faults.push(fault),
        }
    }
    all_well(&faults)
}
