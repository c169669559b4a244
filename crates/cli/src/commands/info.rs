//! `brig info`.

use std::fmt::Write as _;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::NEWEST;
use crate::context::Context;
use crate::fault::Outcome;
use crate::value::Value;
use crate::{listing, output, units};

pub static COMMAND: Command = Command {
    name: "info",
    usage: "[OPTIONS]",
    about: "Show what there is to know of the engine",
    flags: &[Flag::text("format", "'json', or a Go template").short('f')],
    operands: Operands::None,
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let asked = async { context.client.get("/info").send().await?.value().await };
    let (info, fault) = match asked.await {
        Ok(info) => (info, None),
        Err(fault) => (Value::Null, Some(fault)),
    };
    let format = matches.text("format");
    if !format.is_empty() {
        if let Some(fault) = fault {
            return Err(fault);
        }
        let client = Value::Map(vec![
            ("Debug".to_owned(), Value::Bool(context.debug)),
            ("Version".to_owned(), Value::from(env!("CARGO_PKG_VERSION"))),
            ("DefaultAPIVersion".to_owned(), Value::from(NEWEST)),
            ("Context".to_owned(), Value::from("default")),
            ("Plugins".to_owned(), Value::List(Vec::new())),
        ]);
        let mut entries = info.entries().to_vec();
        entries.push(("ClientInfo".to_owned(), client));
        output::line(&listing::document(format, &Value::Map(entries))?);
        return Ok(());
    }
    let mut out = format!(
        "Client:\n Version:    {}\n Context:    default\n Debug Mode: {}\n\nServer:\n",
        env!("CARGO_PKG_VERSION"),
        context.debug
    );
    if let Some(fault) = fault {
        output::write(&out);
        return Err(fault);
    }
    human(&info, &mut out);
    output::write(&out);
    for warning in info.at("Warnings").list() {
        output::error_line(warning.text());
    }
    Ok(())
}

fn human(info: &Value, out: &mut String) {
    let mut line = |text: String| writeln!(out, "{text}").unwrap_or_default();
    let text = |key: &str| info.at(key).text().to_owned();
    line(format!(" Containers: {}", info.at("Containers").int()));
    line(format!("  Running: {}", info.at("ContainersRunning").int()));
    line(format!("  Paused: {}", info.at("ContainersPaused").int()));
    line(format!("  Stopped: {}", info.at("ContainersStopped").int()));
    line(format!(" Images: {}", info.at("Images").int()));
    line(format!(" Server Version: {}", text("ServerVersion")));
    line(format!(" Storage Driver: {}", text("Driver")));
    for pair in info.at("DriverStatus").list() {
        if let [key, value] = pair.list() {
            line(format!("  {}: {}", key.text(), value.text()));
        }
    }
    for (key, title) in [
        ("LoggingDriver", "Logging Driver"),
        ("CgroupDriver", "Cgroup Driver"),
        ("CgroupVersion", "Cgroup Version"),
    ] {
        if !text(key).is_empty() {
            line(format!(" {title}: {}", text(key)));
        }
    }
    let words = |list: &Value| list.list().iter().map(Value::text).collect::<Vec<_>>().join(" ");
    let plugins = info.at("Plugins");
    line(" Plugins:".to_owned());
    line(format!("  Volume: {}", words(plugins.at("Volume"))));
    line(format!("  Network: {}", words(plugins.at("Network"))));
    if !plugins.at("Authorization").list().is_empty() {
        line(format!("  Authorization: {}", words(plugins.at("Authorization"))));
    }
    line(format!("  Log: {}", words(plugins.at("Log"))));
    let swarm = info.at("Swarm").at("LocalNodeState").text();
    line(format!(" Swarm: {}", if swarm.is_empty() { "inactive" } else { swarm }));
    let runtimes: Vec<&str> = info.at("Runtimes").entries().iter().map(|(name, _)| name.as_str()).collect();
    if !runtimes.is_empty() {
        line(format!(" Runtimes: {}", runtimes.join(" ")));
        line(format!(" Default Runtime: {}", text("DefaultRuntime")));
    }
    if !text("InitBinary").is_empty() {
        line(format!(" Init Binary: {}", text("InitBinary")));
    }
    for (key, title) in [("ContainerdCommit", "containerd"), ("RuncCommit", "runc"), ("InitCommit", "init")] {
        if info.at(key).get("ID").is_some() {
            line(format!(" {title} version: {}", info.at(key).at("ID").text()));
        }
    }
    let options = info.at("SecurityOptions").list();
    if !options.is_empty() {
        line(" Security Options:".to_owned());
        for option in options {
            for (index, pair) in option.text().split(',').enumerate() {
                match pair.split_once('=') {
                    Some(("name", name)) if index == 0 => line(format!("  {name}")),
                    Some(("profile", value)) => line(format!("   Profile: {value}")),
                    Some((key, value)) => line(format!("   {key}: {value}")),
                    None => line(format!("  {pair}")),
                }
            }
        }
    }
    for (key, title) in [
        ("KernelVersion", "Kernel Version"),
        ("OperatingSystem", "Operating System"),
        ("OSType", "OSType"),
        ("Architecture", "Architecture"),
    ] {
        line(format!(" {title}: {}", text(key)));
    }
    line(format!(" CPUs: {}", info.at("NCPU").int()));
    line(format!(" Total Memory: {}", units::binary_size(info.at("MemTotal").float())));
    line(format!(" Name: {}", text("Name")));
    line(format!(" ID: {}", text("ID")));
    line(format!(" Docker Root Dir: {}", text("DockerRootDir")));
    let debug = info.at("Debug").bool();
    line(format!(" Debug Mode: {debug}"));
    if debug {
        line(format!("  File Descriptors: {}", info.at("NFd").int()));
        line(format!("  Goroutines: {}", info.at("NGoroutines").int()));
        line(format!("  System Time: {}", text("SystemTime")));
        line(format!("  EventsListeners: {}", info.at("NEventsListener").int()));
    }
    for (key, title) in [("HttpProxy", "HTTP Proxy"), ("HttpsProxy", "HTTPS Proxy"), ("NoProxy", "No Proxy")]
    {
        if !text(key).is_empty() {
            line(format!(" {title}: {}", text(key)));
        }
    }
    let list = |line: &mut dyn FnMut(String), title: &str, items: &[Value]| {
        if !items.is_empty() {
            line(format!(" {title}:"));
            for item in items {
                line(format!("  {}", item.text()));
            }
        }
    };
    list(&mut line, "Labels", info.at("Labels").list());
    line(format!(" Experimental: {}", info.at("ExperimentalBuild").bool()));
    let registries = info.at("RegistryConfig");
    let insecure: Vec<Value> = registries
        .at("IndexConfigs")
        .entries()
        .iter()
        .filter(|(_, index)| !index.at("Secure").bool())
        .map(|(name, _)| Value::Text(name.clone()))
        .chain(registries.at("InsecureRegistryCIDRs").list().iter().cloned())
        .collect();
    list(&mut line, "Insecure Registries", &insecure);
    list(&mut line, "Registry Mirrors", registries.at("Mirrors").list());
    line(format!(" Live Restore Enabled: {}", info.at("LiveRestoreEnabled").bool()));
    if !text("ProductLicense").is_empty() {
        line(format!(" Product License: {}", text("ProductLicense")));
    }
    line(String::new());
}
