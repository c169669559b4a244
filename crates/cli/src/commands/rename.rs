//! `brig rename`.

use crate::args::{Command, Matches, Operands, runs};
use crate::commands::container_path;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;

pub static COMMAND: Command = Command {
    name: "rename",
    usage: "CONTAINER NEW_NAME",
    about: "Rename a container",
    operands: Operands::Exactly(2),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let (old, new) = (matches.operand(0).trim(), matches.operand(1).trim());
    if old.is_empty() || new.is_empty() {
        return Err(Fault::said("Error: Neither old nor new names may be empty"));
    }
    match context.client.post(container_path(old, "/rename")).query("name", new).done().await {
        Err(fault @ Fault::Api { .. }) => {
            output::error_line(&fault.to_string());
            Err(Fault::said(format!("Error: failed to rename container named {old}")))
        }
        other => other,
    }
}
