//! `brig import`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::upload;
use crate::context::Context;
use crate::fault::Outcome;
use crate::progress::{Progress, Sink};

pub static COMMAND: Command = Command {
    name: "import",
    usage: "[OPTIONS] file|URL|- [REPOSITORY[:TAG]]",
    about: "Make an image from an archive of a root file system",
    flags: &[
        Flag::list("change", "Apply a Dockerfile instruction to the image").short('c'),
        Flag::text("message", "Say where the image comes from").short('m'),
        Flag::text("platform", "Platform of the image"),
    ],
    operands: Operands::Between(1, 2),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let (source, name) = (matches.operand(0), matches.operand(1));
    // The engine fetches what is not here.
    let remote = source.starts_with("http://") || source.starts_with("https://");
    let mut ask = context
        .client
        .post("/images/create")
        .query("fromSrc", if remote { source } else { "-" })
        .maybe("message", matches.optional("message"))
        .maybe("platform", matches.optional("platform"));
    if !name.is_empty() {
        let reference = crate::images::parse(name)?;
        ask = ask.query("repo", &reference.familiar_name()).maybe("tag", reference.tag());
    }
    for change in matches.list("change") {
        ask = ask.query("changes", change);
    }
    let lines = if remote {
        ask.send().await?.into_lines()
    } else {
        ask.stream(upload::body_of(upload::open(source)?), "application/x-tar").send().await?.into_lines()
    };
    Progress::new(Sink::Stdout).follow(lines, |_| {}).await
}
