//! `brig socket`: sockets that let their users at one project and nothing else: create, ls, rm.

use serde_json::json;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::encode;
use crate::commands::{chosen_format, for_each};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::listing::{Listing, Row};
use crate::output;
use crate::value::Value;

pub static CREATE: Command = Command {
    name: "create",
    usage: "[OPTIONS] --project PROJECT [PATH]",
    about: "Create a socket that lets its users at one project's objects only",
    flags: &[
        Flag::list(
            "allow",
            "What it may be used for: containers, exec, files, volumes, networks (these five if not given), pull, low-ports",
        ),
        Flag::list("image", "Images that may be used, by name; * stands for anything"),
        Flag::text("name", "Name of the socket (default: the project's)"),
        Flag::text("owner", "USER[:GROUP] who may connect (default root)"),
        Flag::text("project", "The project: the label com.docker.compose.project of its objects"),
    ],
    operands: Operands::AtMost(1),
    run: runs!(create),
    ..Command::EMPTY
};

pub static LIST: Command = Command {
    name: "ls",
    usage: "[OPTIONS]",
    about: "List projects' sockets",
    flags: &[
        Flag::text("format", "'table', 'table TEMPLATE', 'json', or a Go template"),
        Flag::switch("quiet", "Show names only").short('q'),
    ],
    operands: Operands::None,
    run: runs!(list),
    ..Command::EMPTY
};

pub static REMOVE: Command = Command {
    name: "rm",
    usage: "SOCKET [SOCKET...]",
    about: "Remove one or more projects' sockets",
    flags: &[],
    operands: Operands::AtLeast(1),
    run: runs!(remove),
    ..Command::EMPTY
};

async fn create(context: &Context, matches: Matches) -> Outcome {
    let Some(project) = matches.optional("project").filter(|project| !project.is_empty()) else {
        return Err(Fault::said("--project is needed: whose objects the socket is for"));
    };
    let words: Vec<&str> = matches.list("allow").into_iter().flat_map(|words| words.split(',')).collect();
    let body = json!({
        "Name": matches.optional("name").unwrap_or_default(),
        "Project": project,
        "Path": matches.operands().first().map(String::as_str).unwrap_or_default(),
        "Owner": matches.optional("owner").unwrap_or_default(),
        "Allow": if words.is_empty() { serde_json::Value::Null } else { json!(words) },
        "Images": matches.list("image"),
    });
    let answer = context.client.post("/sockets/create").json(&body)?.send().await?.value().await?;
    output::line(answer.at("Path").text());
    Ok(())
}

const TITLES: &[(&str, &str)] = &[
    ("Name", "NAME"),
    ("Project", "PROJECT"),
    ("Owner", "OWNER"),
    ("Allow", "ALLOW"),
    ("Images", "IMAGES"),
    ("Path", "PATH"),
];

async fn list(context: &Context, matches: Matches) -> Outcome {
    let mut format = chosen_format(context, matches.text("format"), "socketsFormat")?;
    if matches.is("quiet") && !matches.given("format") {
        "{{.Name}}".clone_into(&mut format);
    }
    let answer = context.client.get("/sockets").send().await?.value().await?;
    let listing = Listing {
        kind: "*formatter.socketContext",
        titles: TITLES,
        table: "{{.Name}}\t{{.Project}}\t{{.Owner}}\t{{.Allow}}\t{{.Images}}\t{{.Path}}",
    };
    listing.print(&format, answer.list().iter().map(row).collect())
}

fn row(socket: &Value) -> Row {
    let words = |name: &str| socket.at(name).list().iter().map(Value::text).collect::<Vec<_>>().join(",");
    Row::new()
        .with("Name", socket.at("Name").text())
        .with("Project", socket.at("Project").text())
        .with("Owner", socket.at("Owner").text())
        .with("Allow", words("Allow"))
        .with("Images", words("Images"))
        .with("Path", socket.at("Path").text())
}

async fn remove(context: &Context, matches: Matches) -> Outcome {
    for_each(matches.operands(), async |name| {
        context.client.delete(format!("/sockets/{}", encode(name))).done().await
    })
    .await
}
