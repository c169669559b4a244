//! `cargo xtask`: the one way to build, install, show, test, check and measure; a developer's and CI's alike.
//!
//! Each command says what it installs or runs before it does so, and fails with the first thing that failed.

mod bench;
mod build;
mod demo;
mod fuzz;
mod install;
mod layering;
mod lint;
mod packages;
mod say;
mod test;
mod vm;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Result, bail};
use lexopt::prelude::*;

const USAGE: &str = "\
cargo xtask COMMAND

  build [--debug]         both executables into target/dist (or target/dist-debug)
  install [--prefix DIR]  executables, systemd units and completions (default /usr/local)
  demo                    builds, then shows a container of each kind, with timings
  test [FILTER...]        builds, then runs all tests (or those that match)
  soak                    kills the daemon 100 times under 50 containers at work
  lint                    format, clippy, layering, dependency rules
  bench run [--rounds N]  starts of containers, side by side with the peers that are installed
  bench images [--rounds N] [--minutes N] [--small] [--only TEXT]...  pull, push, save, load and rmi, likewise;
                          small: only to see that it works; only the rows with one of these texts in their names
  bench registry [--rounds N] [--small]  `brig registry serve` beside docker-registry
  bench engine [--rounds N] [--small]  the Engine API: latencies, logs, attach, density, the daemon's start, likewise
  bench network [--rounds N] [--small] [--only TEXT]...  start costs of drivers, throughput, connections, names,
                          likewise; only the rows with one of these texts in their names
  bench build [--rounds N] [--small] [--only ROW]...  images built by brig, docker with BuildKit and buildah, likewise
  bench runtime [--rounds N]  the OCI command line, likewise, and with the least that makes a container
  vm [--script FILE] [FILTER...]  the runtime's tests and the engine in a virtual machine with cgroup v2, AppArmor
                          and systemd
  fuzz [--seconds N]      config.json as a fuzzer makes it (600 s)

Commands that need Debian packages install them (as root) and say so first.";

/// Benchmarks that have a small form.
const SMALL: [&str; 5] = ["images", "registry", "engine", "network", "build"];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say::error(&e);
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut parser = lexopt::Parser::from_env();
    let command = match parser.next()? {
        Some(Value(command)) => command.string()?,
        Some(Short('h') | Long("help")) => return say::line(USAGE),
        Some(other) => bail!("{}\n\n{USAGE}", other.unexpected()),
        None => bail!("which command?\n\n{USAGE}"),
    };
    let mut debug = false;
    let mut prefix = PathBuf::from("/usr/local");
    let mut rounds = None;
    let mut script = None;
    let mut seconds = 600;
    let mut minutes = 25;
    let mut small = false;
    let mut words: Vec<String> = Vec::new();
    let mut only: Vec<String> = Vec::new();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("debug") if command == "build" => debug = true,
            Long("prefix") if command == "install" => prefix = parser.value()?.into(),
            Long("rounds") if command == "bench" => rounds = Some(parser.value()?.parse()?),
            Long("minutes") if words == ["images"] => minutes = parser.value()?.parse()?,
            Long("small") if matches!(words.as_slice(), [one] if SMALL.contains(&one.as_str())) => {
                small = true;
            }
            Long("only") if words == ["build"] => {
                only.extend(parser.value()?.string()?.split(',').map(str::to_owned));
            }
            // Names of its rows have commas in them.
            Long("only") if words == ["network"] || words == ["images"] => {
                only.push(parser.value()?.string()?);
            }
            Long("seconds") if command == "fuzz" => seconds = parser.value()?.parse()?,
            Long("script") if command == "vm" => script = Some(PathBuf::from(parser.value()?)),
            Value(word) if matches!(command.as_str(), "test" | "bench" | "vm") => words.push(word.string()?),
            Short('h') | Long("help") => return say::line(USAGE),
            other => bail!("{command}: {}", other.unexpected()),
        }
    }
    match command.as_str() {
        "build" => {
            build::build(if debug { build::Profile::Debug } else { build::Profile::Release }).map(|_| ())
        }
        "install" => install::install(&prefix),
        "demo" => demo::demo(),
        "test" => test::test(&words),
        "soak" => test::soak(),
        "lint" => lint::lint(),
        "bench" if words == ["run"] => bench::run(rounds.unwrap_or(15)),
        "bench" if words == ["images"] => {
            bench::images::run(rounds.unwrap_or(2), Duration::from_mins(minutes), small, &bench::Only(only))
        }
        "bench" if words == ["registry"] => bench::registry::run(rounds.unwrap_or(5), small),
        "bench" if words == ["engine"] => bench::engine::run(rounds.unwrap_or(15), small),
        "bench" if words == ["network"] => {
            bench::network::run(rounds.unwrap_or(20), small, &bench::Only(only))
        }
        "bench" if words == ["build"] => bench::builds::run(rounds.unwrap_or(5), small, &only),
        "bench" if words == ["runtime"] => bench::runtime::run(rounds.unwrap_or(50)),
        "bench" => bail!(
            "bench: say `cargo xtask bench run`, `images`, `registry`, `engine`, `network`, `build` or `runtime`"
        ),
        "fuzz" => fuzz::fuzz(seconds),
        "vm" => vm::vm(&words, script),
        other => bail!("unknown command {other}\n\n{USAGE}"),
    }
}

/// The workspace's root.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}
