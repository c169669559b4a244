//! `brig port`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::container_path;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;
use crate::value::Value;

pub static COMMAND: Command = Command {
    name: "port",
    usage: "CONTAINER [PRIVATE_PORT[/PROTO]] | audit",
    about: "List the published ports of a container, or where one of them is published",
    flags: &[Flag::text("format", "For 'audit': 'json' for programs")],
    operands: Operands::Between(1, 2),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let name = matches.operand(0);
    if name == "audit" && matches.operands().len() == 1 {
        return audit(context, matches.text("format")).await;
    }
    let document = context.client.get(container_path(name, "/json")).send().await?.value().await?;
    let ports = document.at("NetworkSettings").at("Ports");
    let address = |binding: &Value| {
        let ip = binding.at("HostIp").text();
        let port = binding.at("HostPort").text();
        if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
    };
    if let Some(wanted) = matches.operands().get(1) {
        let (port, proto) = wanted.split_once('/').unwrap_or((wanted, "tcp"));
        if port.parse::<u16>().is_err() {
            return Err(Fault::said(format!(
                "Error: invalid port ({port}): value must be a number from 0 to 65535"
            )));
        }
        let bindings = ports.at(&format!("{port}/{proto}")).list();
        if bindings.is_empty() {
            return Err(Fault::said(format!("Error: No public port '{wanted}' published for {name}")));
        }
        for binding in bindings {
            output::line(&address(binding));
        }
        return Ok(());
    }
    let mut entries: Vec<_> = ports.entries().iter().collect();
    entries.sort_by_key(|(port, _)| {
        let (number, proto) = port.split_once('/').unwrap_or((port, ""));
        (number.parse::<u32>().unwrap_or(0), proto.to_owned())
    });
    for (port, bindings) in entries {
        for binding in bindings.list() {
            output::line(&format!("{port} -> {}", address(binding)));
        }
    }
    Ok(())
}

/// Who can reach the published ports of all running containers.
async fn audit(context: &Context, format: &str) -> Outcome {
    let answer = context.client.get("/ports").send().await?.value().await?;
    match format {
        "json" => {
            output::line(&answer.to_json());
            return Ok(());
        }
        "" => {}
        other => return Err(Fault::said(format!("--format {other:?}: only json is known here"))),
    }
    let mut table =
        vec![["CONTAINER", "PORT", "PUBLISHED AT", "REACHED BY", "DECIDED BY"].map(str::to_owned)];
    for port in answer.list() {
        let at = |ip: &str, number: &str| {
            let (ip, number) = (port.at(ip).text(), port.at(number).int());
            if ip.contains(':') { format!("[{ip}]:{number}") } else { format!("{ip}:{number}") }
        };
        let is_routed = port.at("HostPort").int() == 0;
        let published = if is_routed { at("ContainerIp", "ContainerPort") } else { at("HostIp", "HostPort") };
        let chains: Vec<&str> = port.at("DecidedBy").list().iter().map(Value::text).collect();
        let note = port.at("Note").text();
        table.push([
            port.at("Container").text().to_owned(),
            format!("{}/{}", port.at("ContainerPort").int(), port.at("Protocol").text()),
            published,
            port.at("Reach").text().to_owned(),
            if chains.is_empty() { note.to_owned() } else { format!("{} ({note})", chains.join(", ")) },
        ]);
    }
    let widths: Vec<usize> =
        (0..4).map(|column| table.iter().map(|row| row[column].len()).max().unwrap_or_default()).collect();
    for row in &table {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}   "));
        output::line(&format!("{}{}", cells.collect::<String>(), row[4]));
    }
    Ok(())
}
