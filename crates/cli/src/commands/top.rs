//! `brig top`.

use crate::args::{Command, Matches, Operands, runs};
use crate::commands::container_path;
use crate::context::Context;
use crate::fault::Outcome;
use crate::value::Value;
use crate::{listing, output};

pub static COMMAND: Command = Command {
    name: "top",
    usage: "CONTAINER [ps OPTIONS]",
    about: "Show the running processes of a container",
    operands: Operands::AtLeast(1),
    interspersed: false,
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let arguments = matches.operands()[1..].join(" ");
    let arguments = Some(arguments.as_str()).filter(|text| !text.is_empty());
    let answer = context
        .client
        .get(container_path(matches.operand(0), "/top"))
        .maybe("ps_args", arguments)
        .send()
        .await?
        .value()
        .await?;
    let line = |cells: &Value| cells.list().iter().map(Value::text).collect::<Vec<_>>().join("\t") + "\n";
    let mut text = line(answer.at("Titles"));
    text.extend(answer.at("Processes").list().iter().map(line));
    output::write(&listing::align_wide(&text));
    Ok(())
}
