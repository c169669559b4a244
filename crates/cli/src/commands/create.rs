//! `brig create`, and what `run` shares with it: pulling when needed, and the create call.

use std::fs::OpenOptions;
use std::io::Write as _;

use crate::args::{Command, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::parse::container::{self, Pull, Request};
use crate::progress::Sink;
use crate::{images, output};

pub static COMMAND: Command = Command {
    name: "create",
    usage: "[OPTIONS] IMAGE [COMMAND] [ARG...]",
    about: "Create a new container",
    flags: container::FLAGS,
    operands: Operands::AtLeast(1),
    interspersed: false,
    run: runs!(run),
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let request = container::request(context, &matches, false)?;
    let id = create(context, &matches, &request).await?;
    output::line(&id);
    Ok(())
}

/// The new container's id. Pulls the image as `--pull` says.
pub async fn create(context: &Context, matches: &Matches, request: &Request) -> Outcome<String> {
    let policy = container::pull_policy(matches)?;
    let mut id_file = IdFile::open(matches.optional("cidfile"))?;
    let image = request.body.image.as_deref().unwrap_or_default();
    // An id is not a reference: only a reference can be pulled.
    let reference = match image.strip_prefix("sha256:") {
        Some(_) => None,
        None => Some(images::parse(image)?.or_latest()),
    };
    let sink = if matches.is("quiet") { Sink::Nowhere } else { Sink::Stderr };
    let platform = request.platform.as_deref();
    if let (Pull::Always, Some(reference)) = (policy, &reference) {
        images::pull(context, reference, platform, sink).await?;
    }
    let ask = || {
        context
            .client
            .post("/containers/create")
            .maybe("name", request.name.as_deref())
            .maybe("platform", platform)
            .json(&request.body)
    };
    let reply = match ask()?.send().await {
        Err(fault) if policy == Pull::Missing && lacks_image(&fault) => {
            let Some(reference) = &reference else { return Err(fault) };
            if sink != Sink::Nowhere {
                output::error_line(&format!("Unable to find image '{}' locally", reference.familiar()));
            }
            images::pull(context, reference, platform, sink).await?;
            ask()?.send().await?
        }
        other => other?,
    };
    let answer = reply.value().await?;
    for warning in answer.at("Warnings").list() {
        output::error_line(&format!("WARNING: {}", warning.text()));
    }
    let id = answer.at("Id").text().to_owned();
    id_file.write(&id)?;
    Ok(id)
}

fn lacks_image(fault: &Fault) -> bool {
    matches!(fault, Fault::Api { status: 404, message } if message.to_lowercase().contains("no such image"))
}

/// `--cidfile`: must not exist before, and is taken back when no container came of it.
struct IdFile {
    path: Option<String>,
    written: bool,
}

impl IdFile {
    fn open(path: Option<&str>) -> Outcome<Self> {
        if let Some(path) = path {
            match OpenOptions::new().write(true).create_new(true).open(path) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    return Err(Fault::said(format!(
                        "container ID file found, make sure the other container isn't running or delete {path}"
                    )));
                }
                Err(error) => {
                    return Err(Fault::said(format!(
                        "failed to create the container ID file: open {path}: {}",
                        output::os_text(&error)
                    )));
                }
            }
        }
        Ok(Self { path: path.map(str::to_owned), written: false })
    }

    fn write(&mut self, id: &str) -> Outcome {
        let Some(path) = &self.path else { return Ok(()) };
        let mut file = OpenOptions::new()
            .write(true)
            .open(path)
            .map_err(Fault::io(format_args!("failed to write the container ID to {path}")))?;
        file.write_all(id.as_bytes())
            .map_err(Fault::io(format_args!("failed to write the container ID to {path}")))?;
        self.written = true;
        Ok(())
    }
}

impl Drop for IdFile {
    fn drop(&mut self) {
        if let (Some(path), false) = (&self.path, self.written) {
            // Nothing refers to an empty file; if it cannot go, the next run says so.
            drop(std::fs::remove_file(path));
        }
    }
}
