//! `brig tag`.

use crate::args::{Command, Matches, Operands, runs};
use crate::client::encode;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::images;

pub static COMMAND: Command = Command {
    name: "tag",
    usage: "SOURCE_IMAGE[:TAG] TARGET_IMAGE[:TAG]",
    about: "Give an image another name",
    operands: Operands::Exactly(2),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let (source, target) = (matches.operand(0), matches.operand(1));
    let reference = images::parse(target).map_err(|fault| {
        Fault::said(format!("Error parsing reference: {target:?} is not a valid repository/tag: {fault}"))
    })?;
    if reference.digest().is_some() {
        return Err(Fault::said("refusing to create a tag with a digest reference"));
    }
    context
        .client
        .post(format!("/images/{}/tag", encode(source)))
        .query("repo", &reference.familiar_name())
        .maybe("tag", reference.or_latest().tag())
        .done()
        .await
}
