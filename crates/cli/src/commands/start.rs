//! `brig start`, attached or not.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::{container_path, run};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::streams::{self, Caught, End, Resized, Session};
use crate::{output, terminal};

pub static COMMAND: Command = Command {
    name: "start",
    usage: "[OPTIONS] CONTAINER [CONTAINER...]",
    about: "Start one or more stopped containers",
    flags: &[
        Flag::switch("attach", "Attach to the output, and pass signals on").short('a'),
        Flag::text("checkpoint", "Not built yet").hidden(),
        Flag::text("checkpoint-dir", "Not built yet").hidden(),
        Flag::text("detach-keys", "Keys that detach from the container"),
        Flag::switch("interactive", "Attach to standard input").short('i'),
        Flag::switch("sig-proxy", "Pass signals on to the container").default("true").hidden(),
    ],
    operands: Operands::AtLeast(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    if matches.given("checkpoint") || matches.given("checkpoint-dir") {
        return Err(Fault::said("--checkpoint: checkpoints are not built yet"));
    }
    if matches.is("attach") || matches.is("interactive") {
        if matches.operands().len() > 1 {
            return Err(Fault::said("you cannot start and attach multiple containers at once"));
        }
        return attached(context, &matches).await;
    }
    let mut failed = Vec::new();
    for name in matches.operands() {
        match context.client.post(container_path(name, "/start")).done().await {
            Ok(()) => output::line(name),
            Err(fault @ Fault::Unreachable(_)) => return Err(fault),
            Err(fault) => {
                output::error_line(&fault.to_string());
                failed.push(name.as_str());
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Fault::said(format!("Error: failed to start containers: {}", failed.join(", "))))
}

async fn attached(context: &Context, matches: &Matches) -> Outcome {
    let client = &context.client;
    let name = matches.operand(0);
    let keys = streams::detach_keys(context, matches.optional("detach-keys"))?;
    let document = client.get(container_path(name, "/json")).send().await?.value().await?;
    let id = document.at("Id").text().to_owned();
    let config = document.at("Config");
    let tty = config.at("Tty").bool();
    let stdin = matches.is("interactive") && config.at("OpenStdin").bool();
    if tty && stdin && !terminal::stdin_is_terminal() {
        return Err(Fault::said("the input device is not a TTY"));
    }
    let caught = (matches.is("sig-proxy") && !tty).then(Caught::all);
    let (wire, early) = client
        .post(container_path(&id, "/attach"))
        .query("stream", "1")
        .flag("stdin", stdin)
        .query("stdout", "1")
        .query("stderr", "1")
        .maybe("detachKeys", matches.optional("detach-keys"))
        .hijack()
        .await?;
    let removes = document.at("HostConfig").at("AutoRemove").bool();
    let condition = if removes { "removed" } else { "next-exit" };
    let waiting = client.post(container_path(&id, "/wait")).query("condition", condition).send().await?;
    client.post(container_path(&id, "/start")).done().await?;
    let raw = terminal::Raw::enter_if(tty && stdin)?;
    let session = Session { wire, early, terminal: tty, stdin, output: true, detach_keys: keys };
    let resized = Resized::Container(id.clone());
    let aside = async {
        let resize = async {
            if tty && terminal::stdout_is_terminal() {
                resized.follow(client, true).await;
            }
            std::future::pending::<()>().await;
        };
        let signals = async {
            match caught {
                Some(caught) => caught.pass_on(client, &id).await,
                None => streams::end_on_signal().await,
            }
        };
        tokio::join!(resize, signals);
    };
    let end = streams::beside(session.run(), aside).await?;
    drop(raw);
    if end == End::Detached {
        return Ok(());
    }
    run::exit_status(&waiting.value().await?)
}
