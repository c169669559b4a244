//! `brig save`.

use std::io::Write as _;

use http_body_util::BodyExt;
use hyper::body::Incoming;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::{output, terminal};

pub static COMMAND: Command = Command {
    name: "save",
    usage: "[OPTIONS] IMAGE [IMAGE...]",
    about: "Write one or more images to an archive",
    flags: &[
        Flag::text("compression", "Compress the archive: gzip or zstd (both with :LEVEL)").default("none"),
        Flag::text("output", "Write to this file instead of standard output").short('o'),
        Flag::list("platform", "Save only this platform's variant"),
    ],
    operands: Operands::AtLeast(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let target = matches.optional("output");
    if target.is_none() && terminal::stdout_is_terminal() {
        return Err(Fault::said("cowardly refusing to save to a terminal. Use the -o flag or redirect"));
    }
    let mut ask = context.client.get("/images/get");
    for name in matches.operands() {
        ask = ask.query("names", name);
    }
    for platform in matches.list("platform") {
        ask = ask.query("platform", platform);
    }
    let body = ask.maybe("compression", matches.optional("compression")).send().await?.into_stream();
    into_file_or_stdout(body, target).await
}

/// Writes an answer's bytes to a file, which appears under its name only when it is whole, or to standard output.
pub async fn into_file_or_stdout(mut body: Incoming, target: Option<&str>) -> Outcome {
    let mut file = match target {
        Some(path) => {
            let dir = std::path::Path::new(path).parent().filter(|dir| !dir.as_os_str().is_empty());
            let made = tempfile::NamedTempFile::new_in(dir.unwrap_or_else(|| std::path::Path::new(".")));
            Some((made.map_err(Fault::io(format_args!("creating {path}")))?, path))
        }
        None => None,
    };
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Fault::said(format!("the engine's answer broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        match &mut file {
            Some((file, path)) => file.write_all(&data).map_err(Fault::io(format_args!("writing {path}")))?,
            None => output::write_bytes(&data),
        }
    }
    if let Some((file, path)) = file {
        file.persist(path)
            .map_err(|error| Fault::said(format!("writing {path}: {}", output::os_text(&error.error))))?;
    }
    Ok(())
}
