//! `cargo xtask bench build`: images built, side by side with the peers installed.
//!
//! Invariant: every contender has an engine (or, without a daemon, a store), a network and a registry of its own; all
//! build the same folders in turns within one run, none uses what another has left; what is wanted beside each row
//! stands in [`ROWS`].

mod builder;
mod projects;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use brigantine_testkit::fixtures;
use builder::Station;
use projects::Projects;
use serde_json::{Value, json};

use crate::{build, packages, say};

/// How much of everything.
#[derive(Clone, Copy)]
struct Size {
    /// Files of the large context.
    files: usize,
    /// MiB that go from one stage to another.
    copied: u64,
    /// Clients that build the same at once.
    clients: usize,
    /// MiB of the image that is exported and pushed.
    exported: usize,
}

const FULL: Size = Size { files: 50_000, copied: 1024, clients: 20, exported: 128 };
/// Enough to see that everything works.
const SMALL: Size = Size { files: 500, copied: 16, clients: 4, exported: 4 };
/// Stages that depend on nothing but the base image.
const STAGES: usize = 16;

/// One measurement.
struct Row {
    /// As `--only` names it.
    key: &'static str,
    name: &'static str,
    /// At most this part of docker's time is wanted of `brig build`.
    goal: f64,
    run: fn(&Station, &Projects, usize) -> Result<Duration>,
}

const ROWS: &[Row] = &[
    Row { key: "noop", name: "no-op rebuild, six steps", goal: 0.25, run: Station::noop },
    Row { key: "uncached", name: "six steps without cache", goal: 0.2, run: Station::uncached },
    Row { key: "changed", name: "one file changed, six steps", goal: 1.0, run: Station::changed },
    Row { key: "stages", name: "16 stages without cache", goal: 1.0, run: Station::stages },
    Row { key: "cold", name: "context of many files, cold", goal: 1.0, run: Station::cold },
    Row { key: "warm", name: "the same, unchanged", goal: 1.0, run: Station::warm },
    Row { key: "touched", name: "the same, one file changed", goal: 1.0, run: Station::touched },
    Row { key: "copy", name: "COPY of one large file between stages", goal: 1.0, run: Station::copy },
    Row { key: "many", name: "the same build by many at once", goal: 1.0, run: Station::many },
    Row { key: "export", name: "build and export as an archive", goal: 1.0, run: Station::export },
    Row { key: "push", name: "push of a new image", goal: 1.0, run: Station::push },
];

/// The rows named (all, without any); the results go to standard output and, unless it is the `small` form, below
/// `bench/results`.
pub fn run(rounds: usize, small: bool, only: &[String]) -> Result<()> {
    if let Some(unknown) = only.iter().find(|key| !ROWS.iter().any(|row| row.key == **key)) {
        let known: Vec<&str> = ROWS.iter().map(|row| row.key).collect();
        bail!("--only {unknown}: the rows are {}", known.join(", "));
    }
    packages::install(&[packages::BUILD, packages::TEST, packages::PEERS])?;
    let dist = match std::env::var_os("BRIG_TEST_DIST") {
        Some(dist) => PathBuf::from(dist),
        None => build::build(build::Profile::Release)?,
    };
    let (size, rounds) = if small { (SMALL, rounds.min(2)) } else { (FULL, rounds) };
    let work = tempfile::Builder::new().prefix("brig-bench-").tempdir()?;
    let projects = Projects::make(work.path(), size)?;
    say::step("Starting the contenders");
    let stations = stations(&dist, &fixtures::busybox())?;
    let mut results = BTreeMap::new();
    for row in ROWS.iter().filter(|row| only.is_empty() || only.iter().any(|key| key == row.key)) {
        say::step(&format!("{}, {rounds} rounds in turns", row.name));
        let mut times = vec![Vec::new(); stations.len()];
        // The first one fills caches.
        for round in 0..=rounds {
            projects.next(row.key, round)?;
            for (station, times) in stations.iter().zip(&mut times) {
                let took = (row.run)(station, &projects, round)
                    .with_context(|| format!("{}: {}", station.name(), row.name))?;
                if round > 0 {
                    times.push(took);
                }
            }
        }
        results.insert(row.key, table(row, &stations, &times));
    }
    if small {
        return Ok(());
    }
    let suffix = if only.is_empty() { String::new() } else { format!("-{}", only.join("-")) };
    super::write(&format!("build{suffix}"), &json!({ "rounds": rounds, "results": results }))
}

fn stations(dist: &Path, image: &Path) -> Result<Vec<Station>> {
    let mut all = vec![Station::brig(dist)?];
    all.extend(Station::classic(dist)?);
    all.extend(Station::docker()?);
    all.extend(Station::buildah()?);
    for station in &all {
        say::note(station.name());
        station.load(image)?;
    }
    Ok(all)
}

/// Prints one row and returns it.
fn table(row: &Row, stations: &[Station], times: &[Vec<Duration>]) -> Value {
    let of = |n: usize, share: f64| {
        let mut sorted = times[n].clone();
        sorted.sort_unstable();
        let at = ((sorted.len().max(1) - 1) as f64 * share).round() as usize;
        sorted.get(at).map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    let docker = stations.iter().position(Station::is_docker);
    let mut rows = Vec::new();
    for (n, station) in stations.iter().enumerate() {
        let (least, median, most) = (of(n, 0.0), of(n, 0.5), of(n, 1.0));
        let part = docker.map(|docker| median / of(docker, 0.5));
        let met = part.filter(|_| station.is_judged()).map(|part| part <= row.goal);
        let shown = part.map_or_else(String::new, |part| format!("  {part:.2} of docker's"));
        let judged = match met {
            Some(true) => format!("  (wanted: {} or less: met)", row.goal),
            Some(false) => format!("  (wanted: {} or less: MISSED)", row.goal),
            None => String::new(),
        };
        let name = station.name();
        say::note(&format!(
            "{name:28} median {median:9.1} ms  (min {least:.1}, max {most:.1}){shown}{judged}"
        ));
        rows.push(json!({
            "who": name, "median_ms": median, "min_ms": least, "max_ms": most, "of_docker": part,
            "goal": station.is_judged().then_some(row.goal), "met": met, "samples": times[n].len(),
        }));
    }
    json!({ "name": row.name, "rows": rows })
}
