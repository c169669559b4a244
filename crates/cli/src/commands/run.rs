//! `brig run`: create, attach, wait, start, in this order, so that no byte and no exit status is lost.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::{container_path, create};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::parse::container;
use crate::streams::{self, Caught, End, Resized, Session};
use crate::value::Value;
use crate::{output, terminal};

const OWN_FLAGS: [Flag; 3] = [
    Flag::switch("detach", "Run in the background and print the container's ID").short('d'),
    Flag::text("detach-keys", "Keys that detach from the container"),
    Flag::switch("sig-proxy", "Pass signals on to the container").default("true"),
];

static FLAGS: [Flag; container::FLAGS.len() + OWN_FLAGS.len()] = {
    let mut all = [OWN_FLAGS[0]; container::FLAGS.len() + OWN_FLAGS.len()];
    let mut index = 0;
    while index < all.len() {
        all[index] = if index < container::FLAGS.len() {
            container::FLAGS[index]
        } else {
            OWN_FLAGS[index - container::FLAGS.len()]
        };
        index += 1;
    }
    all
};

pub static COMMAND: Command = Command {
    name: "run",
    usage: "[OPTIONS] IMAGE [COMMAND] [ARG...]",
    about: "Create and run a new container from an image",
    flags: &FLAGS,
    operands: Operands::AtLeast(1),
    interspersed: false,
    run: runs!(run),
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    match attempt(context, &matches).await {
        // Whatever stops a run before its container runs is 125 and says where help is.
        Err(fault @ (Fault::Api { .. } | Fault::Unreachable(_) | Fault::Said(_))) => {
            Err(wrapped(&matches, &fault, 125))
        }
        other => other,
    }
}

fn wrapped(matches: &Matches, fault: &Fault, code: i32) -> Fault {
    Fault::Coded {
        text: format!("brig: {fault}\n\nRun '{} --help' for more information", matches.path()),
        code,
    }
}

async fn attempt(context: &Context, matches: &Matches) -> Outcome {
    let client = &context.client;
    let detached = matches.is("detach");
    if detached && matches.given("attach") {
        return Err(Fault::Coded {
            text: "conflicting options: cannot specify both --attach and --detach".to_owned(),
            code: 1,
        });
    }
    let removes = matches.is("rm");
    if removes && !matches!(matches.text("restart"), "no" | "") {
        return Err(Fault::said("conflicting options: cannot specify both --restart and --rm"));
    }
    let request = container::request(context, matches, detached)?;
    let tty = matches.is("tty");
    if tty && request.attach_stdin && !terminal::stdin_is_terminal() {
        return Err(Fault::Coded { text: "the input device is not a TTY".to_owned(), code: 1 });
    }
    let keys = streams::detach_keys(context, matches.optional("detach-keys"))?;
    let id = create::create(context, matches, &request).await?;
    let (stdout, stderr) = request.attach_output;
    let attached = request.attach_stdin || stdout || stderr;
    if !attached {
        start(context, matches, &id).await?;
        output::line(&id);
        return Ok(());
    }
    let caught = matches.is("sig-proxy").then(Caught::all);
    let (wire, early) = client
        .post(container_path(&id, "/attach"))
        .query("stream", "1")
        .flag("stdin", request.attach_stdin)
        .flag("stdout", stdout)
        .flag("stderr", stderr)
        .maybe("detachKeys", matches.optional("detach-keys"))
        .hijack()
        .await?;
    let condition = if removes { "removed" } else { "next-exit" };
    // The answer's head says that the engine waits; its body is the exit status.
    let waiting = client.post(container_path(&id, "/wait")).query("condition", condition).send().await?;
    if let Err(fault) = start(context, matches, &id).await {
        if removes {
            // The engine removes what never ran; leave when it has, unless that takes unreasonably long.
            drop(tokio::time::timeout(std::time::Duration::from_secs(10), waiting.value()).await);
        }
        return Err(fault);
    }
    let raw = terminal::Raw::enter_if(tty && request.attach_stdin)?;
    let session = Session {
        wire,
        early,
        terminal: tty,
        stdin: request.attach_stdin,
        output: stdout || stderr,
        detach_keys: keys,
    };
    let resized = Resized::Container(id.clone());
    let has_window = tty && terminal::stdout_is_terminal();
    let aside = async {
        let resize = async {
            if has_window {
                // The size went along with the create call; engines before 1.42 have to be told again.
                resized.follow(client, older_than_console_size(&client.version())).await;
            }
            std::future::pending::<()>().await;
        };
        let signals = async {
            match caught {
                Some(caught) => caught.pass_on(client, &id).await,
                None if tty => streams::end_on_signal().await,
                None => std::future::pending().await,
            }
        };
        tokio::join!(resize, signals);
    };
    let end = streams::beside(
        async {
            let end = session.run().await?;
            match end {
                End::Detached => Ok::<_, Fault>(None),
                End::Closed => waiting.value().await.map(Some),
            }
        },
        aside,
    )
    .await;
    drop(raw);
    match end? {
        None => Ok(()),
        Some(answer) => exit_status(&answer),
    }
}

fn older_than_console_size(version: &str) -> bool {
    version.split_once('.').and_then(|(_, minor)| minor.parse::<u32>().ok()).is_some_and(|minor| minor < 42)
}

/// The exit status that a wait answered with.
pub fn exit_status(answer: &Value) -> Outcome {
    let problem = answer.at("Error").at("Message").text();
    if !problem.is_empty() {
        return Err(Fault::Coded { text: format!("Error waiting for container: {problem}"), code: 125 });
    }
    match i32::try_from(answer.at("StatusCode").int()).unwrap_or(125) {
        0 => Ok(()),
        code => Err(Fault::Exit(code)),
    }
}

/// Starts the container; a failure carries the exit status that docker gives it.
async fn start(context: &Context, matches: &Matches, id: &str) -> Outcome {
    match context.client.post(container_path(id, "/start")).done().await {
        Err(fault @ Fault::Api { .. }) => {
            let code = start_failure(&fault.to_string());
            Err(wrapped(matches, &fault, code))
        }
        other => other,
    }
}

/// 127 when the program is missing, 126 when it cannot be executed, else 125.
pub fn start_failure(text: &str) -> i32 {
    let lower = text.to_lowercase();
    if ["executable file not found", "no such file or directory", "system cannot find the file specified"]
        .iter()
        .any(|sign| lower.contains(sign))
    {
        127
    } else if ["permission denied", "not a directory", "is a directory", "exec format error"]
        .iter()
        .any(|sign| lower.contains(sign))
    {
        126
    } else {
        125
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_failures_have_dockers_exit_statuses() {
        assert_eq!(start_failure("exec: \"nosuch\": executable file not found in $PATH"), 127);
        assert_eq!(start_failure("exec: \"/x\": stat /x: no such file or directory"), 127);
        assert_eq!(start_failure("exec: \"/etc\": permission denied"), 126);
        assert_eq!(start_failure("driver failed"), 125);
    }
}
