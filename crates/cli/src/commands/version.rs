//! `brig version`.

use std::fmt::Write as _;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::NEWEST;
use crate::context::Context;
use crate::fault::Outcome;
use crate::value::Value;
use crate::{listing, output};

pub static COMMAND: Command = Command {
    name: "version",
    usage: "[OPTIONS]",
    about: "Show the versions of client and engine",
    flags: &[Flag::text("format", "'json', or a Go template").short('f')],
    operands: Operands::None,
    run: runs!(run),
    ..Command::EMPTY
};

/// The machine's architecture as images name it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

async fn run(context: &Context, matches: Matches) -> Outcome {
    let asked = async { context.client.get("/version").send().await?.value().await };
    let (server, fault) = match asked.await {
        Ok(server) => (server, None),
        Err(fault) => (Value::Null, Some(fault)),
    };
    let version = context.client.version();
    let text = |value: &str| Value::Text(value.to_owned());
    let client = Value::Map(
        [
            ("Version", text(env!("CARGO_PKG_VERSION"))),
            ("ApiVersion", text(&version)),
            ("DefaultAPIVersion", text(NEWEST)),
            ("Os", text("linux")),
            ("Arch", text(architecture())),
            ("Context", text("default")),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .to_vec(),
    );
    let format = matches.text("format");
    if format.is_empty() {
        output::write(&human(&version, &server));
    } else {
        let all = Value::Map(vec![("Client".to_owned(), client), ("Server".to_owned(), server)]);
        output::line(&listing::document(format, &all)?);
    }
    fault.map_or(Ok(()), Err)
}

fn human(version: &str, server: &Value) -> String {
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").unwrap_or_default();
    let spoken =
        if version == NEWEST { version.to_owned() } else { format!("{version} (downgraded from {NEWEST})") };
    line("Client:".to_owned());
    for (name, value) in [
        ("Version:", env!("CARGO_PKG_VERSION").to_owned()),
        ("API version:", spoken),
        ("OS/Arch:", format!("linux/{}", architecture())),
        ("Context:", "default".to_owned()),
    ] {
        line(format!(" {name:18} {value}"));
    }
    if server.is_null() {
        return out;
    }
    let platform = server.at("Platform").at("Name").text();
    line(format!("\nServer:{}{platform}", if platform.is_empty() { "" } else { " " }));
    for component in server.at("Components").list() {
        let details = component.at("Details");
        let detail = |key: &str| details.at(key).text().to_owned();
        line(format!(" {}:", component.at("Name").text()));
        let mut shown = vec![("Version:", component.at("Version").text().to_owned())];
        if details.get("ApiVersion").is_some() {
            shown.push((
                "API version:",
                format!("{} (minimum version {})", detail("ApiVersion"), detail("MinAPIVersion")),
            ));
        }
        for (key, name) in
            [("GoVersion", "Go version:"), ("GitCommit", "Git commit:"), ("BuildTime", "Built:")]
        {
            if details.get("ApiVersion").is_some() && !detail(key).is_empty() {
                shown.push((name, detail(key)));
            }
        }
        if details.get("ApiVersion").is_some() {
            shown.push(("OS/Arch:", format!("{}/{}", detail("Os"), detail("Arch"))));
            shown.push(("Experimental:", detail("Experimental")));
        } else if details.get("GitCommit").is_some() {
            shown.push(("GitCommit:", detail("GitCommit")));
        }
        for (name, value) in shown {
            line(format!("  {name:17} {value}"));
        }
    }
    out
}
