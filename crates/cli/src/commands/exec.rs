//! `brig exec`.

use bollard_stubs::models::ExecConfig;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::encode;
use crate::commands::container_path;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::parse::environment;
use crate::streams::{self, End, Resized, Session};
use crate::terminal;
use crate::value::Value;

pub static COMMAND: Command = Command {
    name: "exec",
    usage: "[OPTIONS] CONTAINER COMMAND [ARG...]",
    about: "Execute a command in a running container",
    flags: &[
        Flag::switch("detach", "Run the command in the background").short('d'),
        Flag::text("detach-keys", "Keys that detach from the command"),
        Flag::list("env", "Set an environment variable").short('e'),
        Flag::list("env-file", "Set the environment variables that a file lists"),
        Flag::switch("interactive", "Keep standard input open").short('i'),
        Flag::switch("privileged", "Give the command all privileges"),
        Flag::switch("tty", "Give the command a terminal").short('t'),
        Flag::text("user", "User to run as (name|uid[:group|gid])").short('u'),
        Flag::text("workdir", "Working directory of the command").short('w'),
    ],
    operands: Operands::AtLeast(2),
    interspersed: false,
    run: runs!(run),
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let client = &context.client;
    let detach = matches.is("detach");
    let (tty, stdin) = (matches.is("tty"), matches.is("interactive") && !detach);
    if tty && stdin && !terminal::stdin_is_terminal() {
        return Err(Fault::said("the input device is not a TTY"));
    }
    for variable in matches.list("env") {
        environment::check_variable(variable).map_err(|why| matches.invalid("env", variable, &why))?;
    }
    let env = environment::variables(&matches.list("env-file"), &matches.list("env"))
        .map_err(|text| Fault::Coded { text, code: 125 })?;
    let keys = streams::detach_keys(context, matches.optional("detach-keys"))?;
    let size = if tty { terminal::size() } else { None };
    let console = size.map(|(height, width)| vec![usize::from(height), usize::from(width)]);
    let owned = |flag: &str| matches.optional(flag).map(str::to_owned);
    let body = ExecConfig {
        attach_stdin: Some(stdin),
        attach_stdout: Some(!detach),
        attach_stderr: Some(!detach),
        console_size: console.clone().map(|size| size.into_iter().map(|n| n as _).collect()),
        detach_keys: owned("detach-keys"),
        tty: Some(tty),
        env: (!env.is_empty()).then_some(env),
        cmd: Some(matches.operands()[1..].to_vec()),
        privileged: Some(matches.is("privileged")),
        user: owned("user"),
        working_dir: owned("workdir"),
    };
    let created =
        client.post(container_path(matches.operand(0), "/exec")).json(&body)?.send().await?.value().await?;
    let id = created.at("Id").text().to_owned();
    if id.is_empty() {
        return Err(Fault::said("exec ID empty"));
    }
    let mut start = vec![("Detach".to_owned(), Value::Bool(detach)), ("Tty".to_owned(), Value::Bool(tty))];
    if let Some((height, width)) = size {
        let size = vec![Value::Int(i64::from(height)), Value::Int(i64::from(width))];
        start.push(("ConsoleSize".to_owned(), Value::List(size)));
    }
    let ask = client.post(format!("/exec/{}/start", encode(&id))).json(&Value::Map(start))?;
    if detach {
        return ask.done().await;
    }
    let (wire, early) = ask.hijack().await?;
    let raw = terminal::Raw::enter_if(tty && stdin)?;
    let session = Session { wire, early, terminal: tty, stdin, output: true, detach_keys: keys };
    let resized = Resized::Exec(id.clone());
    let aside = async {
        let resize = async {
            if tty && terminal::stdout_is_terminal() {
                resized.follow(client, true).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::join!(resize, streams::end_on_signal());
    };
    let end = streams::beside(session.run(), aside).await?;
    drop(raw);
    if end == End::Detached {
        return Err(Fault::said("read escape sequence"));
    }
    let document = client.get(format!("/exec/{}/json", encode(&id))).send().await?.value().await?;
    match i32::try_from(document.at("ExitCode").int()).unwrap_or(125) {
        0 => Ok(()),
        code => Err(Fault::Exit(code)),
    }
}
