//! `brig port`.

use crate::args::{Command, Matches, Operands, runs};
use crate::commands::container_path;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;
use crate::value::Value;

pub static COMMAND: Command = Command {
    name: "port",
    usage: "CONTAINER [PRIVATE_PORT[/PROTO]]",
    about: "List the published ports of a container, or where one of them is published",
    operands: Operands::Between(1, 2),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let name = matches.operand(0);
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
