//! `brig system check`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::value::Value;
use crate::{output, units};

pub static COMMAND: Command = Command {
    name: "check",
    usage: "[OPTIONS]",
    about: "Check every blob and layer of the image store against its digest",
    flags: &[
        Flag::switch("repair", "Put right what is wrong and remove what nothing refers to"),
        Flag::text("format", "'json' for programs"),
    ],
    operands: Operands::None,
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let repair = matches.is("repair");
    let answer = context.client.post("/system/check").flag("repair", repair).send().await?.value().await?;
    let problems = answer.at("Problems").list();
    match matches.text("format") {
        "json" => output::line(&answer.to_json()),
        "" => {
            for problem in problems {
                output::line(&describe(problem));
            }
            let read = units::human_size(answer.at("Bytes").float(), 3);
            output::line(&format!(
                "{} blobs and layers read ({read}), {} problems",
                answer.at("Objects").int(),
                problems.len()
            ));
            if repair && !problems.is_empty() {
                output::line(&format!(
                    "Repaired: {} given back",
                    units::human_size(answer.at("Reclaimed").float(), 3)
                ));
            }
        }
        other => return Err(Fault::said(format!("--format {other:?}: only json is known here"))),
    }
    if problems.is_empty() || repair {
        return Ok(());
    }
    Err(Fault::said("there are problems: brig system check --repair puts them right"))
}

fn describe(problem: &Value) -> String {
    let of = |key: &str| problem.at(key).text().to_owned();
    let bytes = || units::human_size(problem.at("Bytes").float(), 3);
    match problem.at("Kind").text() {
        "corrupt-blob" => {
            let images: Vec<&str> = problem.at("Images").list().iter().map(Value::text).collect();
            format!("corrupt blob {} (images to pull again: {})", of("Blob"), images.join(", "))
        }
        "corrupt-layer" => format!("corrupt layer {}: it is made again from its blob", of("Layer")),
        "broken-image" => {
            let names: Vec<&str> = problem.at("Names").list().iter().map(Value::text).collect();
            format!("broken image {} ({}): {}", of("Image"), names.join(", "), of("Reason"))
        }
        "missing-blob" => format!("image {} lacks blob {}: pull it again", of("Image"), of("Blob")),
        "orphan-blob" => format!("orphan blob {} ({})", of("Blob"), bytes()),
        "orphan-layer" => format!("orphan layer {} ({})", of("Layer"), bytes()),
        other => format!("{other}: {}", problem.to_json()),
    }
}
