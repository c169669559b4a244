//! `brig attach`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::{container_path, run};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::streams::{self, Caught, End, Resized, Session};
use crate::terminal;

pub static COMMAND: Command = Command {
    name: "attach",
    usage: "[OPTIONS] CONTAINER",
    about: "Attach standard input, output and error to a running container",
    flags: &[
        Flag::text("detach-keys", "Keys that detach from the container"),
        Flag::switch("no-stdin", "Do not attach standard input"),
        Flag::switch("sig-proxy", "Pass signals on to the container").default("true"),
    ],
    operands: Operands::Exactly(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let client = &context.client;
    let name = matches.operand(0);
    let keys = streams::detach_keys(context, matches.optional("detach-keys"))?;
    let document = client.get(container_path(name, "/json")).send().await?.value().await?;
    let state = document.at("State");
    let refusal = if state.at("Restarting").bool() {
        Some("cannot attach to a restarting container, wait until it is running")
    } else if state.at("Paused").bool() {
        Some("cannot attach to a paused container, unpause it first")
    } else if !state.at("Running").bool() {
        Some("cannot attach to a stopped container, start it first")
    } else {
        None
    };
    if let Some(text) = refusal {
        return Err(Fault::said(text));
    }
    let id = document.at("Id").text().to_owned();
    let config = document.at("Config");
    let tty = config.at("Tty").bool();
    let stdin = !matches.is("no-stdin") && config.at("OpenStdin").bool();
    if tty && stdin && !terminal::stdin_is_terminal() {
        return Err(Fault::said("the input device is not a TTY"));
    }
    let caught = (matches.is("sig-proxy") && !tty).then(Caught::all);
    let waiting = client.post(container_path(&id, "/wait")).send().await?;
    let (wire, early) = client
        .post(container_path(&id, "/attach"))
        .query("stream", "1")
        .flag("stdin", stdin)
        .query("stdout", "1")
        .query("stderr", "1")
        .maybe("detachKeys", matches.optional("detach-keys"))
        .hijack()
        .await?;
    let raw = terminal::Raw::enter_if(tty && stdin)?;
    let resized = Resized::Container(id.clone());
    if tty && terminal::stdout_is_terminal() {
        // A change of size makes the program inside draw itself anew.
        if let Some((height, width)) = terminal::size() {
            drop(resized.to(client, height + 1, width + 1).await);
        }
    }
    let session = Session { wire, early, terminal: tty, stdin, output: true, detach_keys: keys };
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
    match end {
        End::Detached => Err(Fault::said("read escape sequence")),
        End::Closed => run::exit_status(&waiting.value().await?),
    }
}
