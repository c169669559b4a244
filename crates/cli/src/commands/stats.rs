//! `brig stats`.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::{all_well, chosen_format, container_path};
use crate::context::Context;
use crate::fault::Outcome;
use crate::listing::{Listing, Row, short_id};
use crate::value::Value;
use crate::{output, units};

pub static COMMAND: Command = Command {
    name: "stats",
    usage: "[OPTIONS] [CONTAINER...]",
    about: "Show what containers use, as they use it",
    flags: &[
        Flag::switch("all", "Show stopped containers too").short('a'),
        Flag::text("format", "'table', 'table TEMPLATE', 'json', or a Go template"),
        Flag::switch("no-stream", "Show it once"),
        Flag::switch("no-trunc", "Show everything in full"),
    ],
    operands: Operands::AtLeast(0),
    run: runs!(run),
    ..Command::EMPTY
};

const LISTING: Listing<'static> = Listing {
    kind: "*container.statsContext",
    titles: &[
        ("Container", "CONTAINER"),
        ("ID", "CONTAINER ID"),
        ("Name", "NAME"),
        ("CPUPerc", "CPU %"),
        ("MemUsage", "MEM USAGE / LIMIT"),
        ("MemPerc", "MEM %"),
        ("NetIO", "NET I/O"),
        ("BlockIO", "BLOCK I/O"),
        ("PIDs", "PIDS"),
    ],
    table: "{{.ID}}\t{{.Name}}\t{{.CPUPerc}}\t{{.MemUsage}}\t{{.MemPerc}}\t{{.NetIO}}\t{{.BlockIO}}\t{{.PIDs}}",
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let format = chosen_format(context, matches.text("format"), "statsFormat")?;
    let full = matches.is("no-trunc");
    let chosen = matches.operands();
    if matches.is("no-stream") {
        let names = if chosen.is_empty() { list(context, matches.is("all")).await? } else { chosen.to_vec() };
        let samples = join_all(names.iter().map(|name| sample(context, name))).await;
        let mut rows = Vec::new();
        let mut faults = Vec::new();
        for (name, result) in names.iter().zip(samples) {
            match result {
                Ok(value) => rows.push(row(name, &value, full)),
                Err(fault) => faults.push(fault),
            }
        }
        if faults.is_empty() || !rows.is_empty() {
            LISTING.print(&format, rows)?;
        }
        return all_well(&faults);
    }
    live(context, &matches, &format, full).await
}

/// The table, drawn anew every second until interrupted.
async fn live(context: &Context, matches: &Matches, format: &str, full: bool) -> Outcome {
    let mut before: BTreeMap<String, Value> = BTreeMap::new();
    let fancy = crate::terminal::stdout_is_terminal();
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tick.tick().await;
        let chosen = matches.operands();
        let names = if chosen.is_empty() { list(context, matches.is("all")).await? } else { chosen.to_vec() };
        let samples = join_all(names.iter().map(|name| once(context, name))).await;
        let mut rows = Vec::new();
        let mut now = BTreeMap::new();
        for (name, result) in names.iter().zip(samples) {
            match result {
                Ok(mut value) => {
                    // Each sample is the next one's past.
                    if let (Some(old), Value::Map(entries)) = (before.get(name), &mut value) {
                        entries.retain(|(key, _)| key != "precpu_stats");
                        entries.push(("precpu_stats".to_owned(), old.at("cpu_stats").clone()));
                    }
                    rows.push(row(name, &value, full));
                    now.insert(name.clone(), value);
                }
                Err(fault) if chosen.is_empty() && fault.is_not_found() => {}
                Err(fault) => return Err(fault),
            }
        }
        before = now;
        let text = LISTING.render(format, rows)?;
        if fancy {
            // Home, then each line over the old one, then nothing below.
            output::write(&format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")));
        } else {
            output::write(&text);
        }
    }
}

async fn list(context: &Context, all: bool) -> Outcome<Vec<String>> {
    let answer = context.client.get("/containers/json").flag("all", all).send().await?.value().await?;
    Ok(answer.list().iter().map(|container| short_id(container.at("Id").text()).to_owned()).collect())
}

/// One sample that knows its past: the engine takes two.
async fn sample(context: &Context, name: &str) -> Outcome<Value> {
    context.client.get(container_path(name, "/stats")).query("stream", "0").send().await?.value().await
}

async fn once(context: &Context, name: &str) -> Outcome<Value> {
    let ask = context.client.get(container_path(name, "/stats")).query("stream", "0").query("one-shot", "1");
    ask.send().await?.value().await
}

fn row(container: &str, value: &Value, full: bool) -> Row {
    let id = value.at("id").text();
    let (used, limit) = memory(value.at("memory_stats"));
    let share = if limit > 0.0 { used / limit * 100.0 } else { 0.0 };
    let (received, sent) =
        value.at("networks").entries().iter().fold((0.0, 0.0), |(rx, tx), (_, network)| {
            (rx + network.at("rx_bytes").float(), tx + network.at("tx_bytes").float())
        });
    let (mut read, mut written) = (0.0, 0.0);
    for entry in value.at("blkio_stats").at("io_service_bytes_recursive").list() {
        match entry.at("op").text().chars().next() {
            Some('r' | 'R') => read += entry.at("value").float(),
            Some('w' | 'W') => written += entry.at("value").float(),
            _ => {}
        }
    }
    let pair = |a: f64, b: f64| format!("{} / {}", units::human_size(a, 3), units::human_size(b, 3));
    Row::new()
        .with("Container", container)
        .with("ID", if full { id } else { short_id(id) })
        .with("Name", value.at("name").text().trim_start_matches('/'))
        .with("CPUPerc", format!("{:.2}%", cpu(value)))
        .with("MemUsage", format!("{} / {}", units::binary_size(used), units::binary_size(limit)))
        .with("MemPerc", format!("{share:.2}%"))
        .with("NetIO", pair(received, sent))
        .with("BlockIO", pair(read, written))
        .with("PIDs", value.at("pids_stats").at("current").int().to_string())
}

/// What is used without the page cache, as cgroup v1 and v2 each call it; and the limit.
fn memory(stats: &Value) -> (f64, f64) {
    let usage = stats.at("usage").float();
    let detail = stats.at("stats");
    let cache = ["total_inactive_file", "inactive_file"]
        .iter()
        .find_map(|key| detail.get(key))
        .map_or(0.0, Value::float);
    let used = if cache < usage { usage - cache } else { usage };
    (used, stats.at("limit").float())
}

/// Percent of one CPU.
fn cpu(value: &Value) -> f64 {
    let (now, before) = (value.at("cpu_stats"), value.at("precpu_stats"));
    let delta = |path: fn(&Value) -> f64| path(now) - path(before);
    let used = delta(|stats| stats.at("cpu_usage").at("total_usage").float());
    let whole = delta(|stats| stats.at("system_cpu_usage").float());
    let mut count = now.at("online_cpus").float();
    if count <= 0.0 {
        count = now.at("cpu_usage").at("percpu_usage").list().len() as f64;
    }
    if used > 0.0 && whole > 0.0 { used / whole * count * 100.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_one_cpu_and_without_cache() {
        let value = Value::parse(
            br#"{"cpu_stats":{"cpu_usage":{"total_usage":300},"system_cpu_usage":2000,"online_cpus":2},
                 "precpu_stats":{"cpu_usage":{"total_usage":200},"system_cpu_usage":1000}}"#,
        )
        .unwrap();
        assert!((cpu(&value) - 20.0).abs() < 1e-9);
        let stats = Value::parse(
            br#"{"usage":1000,"limit":4000,"stats":{"total_inactive_file":400,"inactive_file":1}}"#,
        )
        .unwrap();
        assert_eq!(memory(&stats), (600.0, 4000.0));
    }
}
