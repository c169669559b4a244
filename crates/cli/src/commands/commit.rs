//! `brig commit`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::Outcome;
use crate::output;

pub static COMMAND: Command = Command {
    name: "commit",
    usage: "[OPTIONS] CONTAINER [REPOSITORY[:TAG]]",
    about: "Make an image of a container's files and configuration",
    flags: &[
        Flag::text("author", "Who made it").short('a'),
        Flag::list("change", "Apply a Dockerfile instruction to the image").short('c'),
        Flag::text("message", "Say what it is").short('m'),
        Flag::switch("no-pause", "Do not hold the container while its files are read"),
        Flag::switch("pause", "Hold the container while its files are read").short('p').default("true"),
    ],
    operands: Operands::Between(1, 2),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let mut ask = context.client.post("/commit").query("container", matches.operand(0));
    let name = matches.operand(1);
    if !name.is_empty() {
        let reference = crate::images::parse(name)?;
        ask = ask.query("repo", &reference.familiar_name()).maybe("tag", reference.tag());
    }
    ask = ask.maybe("author", matches.optional("author")).maybe("comment", matches.optional("message"));
    if matches.is("no-pause") || !matches.is("pause") {
        ask = ask.query("pause", "0");
    }
    for change in matches.list("change") {
        ask = ask.query("changes", change);
    }
    let answer = ask.send().await?.value().await?;
    output::line(answer.at("Id").text());
    Ok(())
}
