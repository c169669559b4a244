//! `cargo xtask bench run`: starts of containers, side by side with the peers that are installed.
//!
//! Invariant: all contenders are measured in one run and in turns, each on an engine and a network of its own, on the
//! same image, so that ratios hold although the machine's speed varies.

pub mod builds;
mod contender;
pub mod engine;
mod figure;
pub mod images;
mod meter;
pub mod network;
pub mod registry;
pub mod runtime;
mod server;
mod spread;

use std::{collections::BTreeMap, fs, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use brigantine_testkit::fixtures;
use contender::Contender;
pub use contender::answers;
use serde_json::{Value, json};

use crate::{build, packages, root, say};

const NETWORKS: &[&str] = &["bridge", "none", "host"];
/// Starts at the same moment.
const PARALLEL: usize = 32;

/// All of it; the results go to standard output and below `bench/results`.
pub fn run(rounds: usize) -> Result<()> {
    packages::install(&[packages::BUILD, packages::IMAGES, packages::DEMO])?;
    let dist = build::build(build::Profile::Release)?;
    say::step("Making the image (debian:bookworm)");
    let image = fixtures::debian_bookworm()?;
    say::step("Starting the contenders");
    let contenders = contender::all(&dist, &image)?;
    let mut results = BTreeMap::new();
    for network in NETWORKS {
        say::step(&format!("run --rm --network {network} debian:bookworm true, {rounds} rounds in turns"));
        let mut times = vec![Vec::new(); contenders.len()];
        for round in 0..=rounds {
            for (contender, times) in contenders.iter().zip(&mut times) {
                let took = contender.run_true(network)?;
                // The first one fills caches.
                if round > 0 {
                    times.push(took);
                }
            }
        }
        results.insert(format!("run, {network}"), table(&contenders, &times));
    }
    say::step(&format!("{PARALLEL} starts in parallel, bridge, 3 rounds in turns"));
    let mut times = vec![Vec::new(); contenders.len()];
    for _ in 0..3 {
        for (contender, times) in contenders.iter().zip(&mut times) {
            times.extend(contender.run_many(PARALLEL)?);
        }
    }
    results.insert(format!("{PARALLEL} in parallel"), table(&contenders, &times));
    say::step("Memory of one idle container");
    let mut memory = Vec::new();
    for contender in &contenders {
        let (monitor, program) = contender.idle_memory()?;
        say::note(&format!(
            "{:24} monitor {monitor:>8} KiB private, program {program} KiB",
            contender.name()
        ));
        memory.push(json!({ "who": contender.name(), "monitor_kib": monitor, "program_kib": program }));
    }
    results.insert("idle memory".to_owned(), Value::Array(memory));
    write("run", &json!({ "rounds": rounds, "results": results }))
}

/// Prints one scenario and returns it.
fn table(contenders: &[Contender], times: &[Vec<Duration>]) -> Value {
    let of = |n: usize, share: f64| {
        let mut sorted = times[n].clone();
        sorted.sort_unstable();
        let at = ((sorted.len() - 1) as f64 * share).round() as usize;
        sorted[at].as_secs_f64() * 1e3
    };
    let docker = contenders.iter().position(Contender::is_docker);
    let mut rows = Vec::new();
    for (n, contender) in contenders.iter().enumerate() {
        let (least, median, most) = (of(n, 0.0), of(n, 0.5), of(n, 1.0));
        let ratio = docker.map(|d| of(d, 0.5) / median);
        let times_faster = ratio.map_or_else(String::new, |r| format!("  docker takes {r:.1} times as long"));
        let name = contender.name();
        say::note(&format!(
            "{name:24} median {median:8.1} ms  (min {least:.1}, max {most:.1}){times_faster}"
        ));
        rows.push(json!({ "who": name, "median_ms": median, "min_ms": least, "max_ms": most, "docker_over_this": ratio, "samples": times[n].len() }));
    }
    Value::Array(rows)
}

/// The same command, ended when it takes too long (coreutils' timeout, which does not outlive it). Where its output goes is
/// to be said afterwards.
fn limited(command: &Command, limit: Duration) -> Command {
    let mut limited = Command::new("timeout");
    limited.arg("--kill-after=10").arg(limit.as_secs().to_string());
    follow(&mut limited, command);
    limited
}

/// Which rows are measured: all, or those that have one of these texts in their names.
#[derive(Debug, Default)]
pub struct Only(pub Vec<String>);

impl Only {
    fn wants(&self, row: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|text| row.contains(text.as_str()))
    }
}

/// What was measured today before, if only some rows were wanted now.
fn of_today(name: &str, only: &Only) -> Result<BTreeMap<String, Value>> {
    if only.0.is_empty() {
        return Ok(BTreeMap::new());
    }
    let path = root().join(format!("bench/results/{name}-{}.json", today()?));
    let Ok(text) = fs::read_to_string(&path) else { return Ok(BTreeMap::new()) };
    let mut former: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_value(former["results"].take())?)
}

/// Makes `command` the last words of `front`, with its environment.
fn follow(front: &mut Command, command: &Command) {
    front.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => front.env(name, value),
            None => front.env_remove(name),
        };
    }
}

fn today() -> Result<String> {
    Ok(say::read(Command::new("date").args(["-u", "+%Y-%m-%d"]))?.trim().to_owned())
}

/// Writes the figures, with the machine they are of.
fn write(name: &str, figures: &Value) -> Result<()> {
    let date = today()?;
    let commit = say::read(Command::new("git").args(["rev-parse", "--short", "HEAD"]).current_dir(root()));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let mut all = json!({
        "date": date, "commit": commit.unwrap_or_default().trim(), "kernel": kernel.trim(), "cores": cores,
    });
    if let (Value::Object(all), Value::Object(figures)) = (&mut all, figures) {
        all.extend(figures.clone());
    }
    let dir = root().join("bench/results");
    fs::create_dir_all(&dir)?;
    let path = dir.join(format!("{name}-{date}.json"));
    fs::write(&path, serde_json::to_string_pretty(&all)? + "\n")
        .with_context(|| path.display().to_string())?;
    say::step(&format!("Written to {}", path.display()));
    Ok(())
}
