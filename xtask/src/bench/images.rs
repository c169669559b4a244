//! `cargo xtask bench images`: images moved to and from a registry on loopback, side by side with the peers installed.
//!
//! Invariant: every contender has an engine, a network, a registry process and a directory of its own, all do the same
//! in turns within one run, and beside each time stand the processor time (of the engine, its client and both
//! registries, by a cgroup of their own) and the bytes written to disk meanwhile (of the whole machine: run it on an
//! idle one). It ends: no command runs for ever, no round begins that would not fit into the time, and what it made
//! goes with it.

mod fixture;
mod floor;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use fixture::{FULL, Fixture, SMALL};
use floor::Floor;
use serde_json::{Value, json};

use super::{
    Only,
    contender::{self, Contender},
    figure::{Figure, figure, median},
    server::{Make, Server},
};
use crate::{build, packages, say};

/// No single command may take longer.
const LONGEST: Duration = Duration::from_mins(10);

/// What the image in the archive is called.
const LOADED: &str = "localhost/loaded:first";

/// Ports within each contender's own network.
const SOURCE: u16 = 5001;
const TARGET: u16 = 5002;

/// All of it or some rows, in about `time`; the results go to standard output and, unless the image is the `small` one,
/// below `bench/results`, beside the day's other rows.
pub fn run(rounds: usize, time: Duration, small: bool, only: &Only) -> Result<()> {
    let began = Instant::now();
    if !CHAINS.iter().any(|chain| chain.wanted(only)) {
        let names: Vec<_> = CHAINS.iter().flat_map(|chain| chain.tasks).map(|task| task.name).collect();
        bail!("--only: no row has such a name; the rows are: {}", names.join("; "));
    }
    packages::install(&[packages::BUILD, packages::TEST])?;
    // As for the tests: executables that are there already.
    let dist = match std::env::var_os("BRIG_TEST_DIST") {
        Some(dist) => PathBuf::from(dist),
        None => build::build(build::Profile::Release)?,
    };
    let limits = if small { SMALL } else { FULL };
    let work = tempfile::Builder::new().prefix("brig-bench-").tempdir()?;
    check_room(work.path(), limits.disk)?;
    say::step("Making the image: layers of this machine's /usr, in a registry and in an archive");
    let image = Fixture::make(work.path(), limits)?;
    say::note(&image.described);
    say::step("Starting the contenders");
    let contenders = contender::for_images(&dist)?;
    let mut stations = Vec::new();
    for contender in &contenders {
        say::note(contender.name());
        stations.push(Station::new(contender, &image)?);
    }
    let mut figures = Figures::default();
    let mut done = 0;
    for round in 1..=rounds {
        say::step(&format!("Round {round} of {rounds}, {} s after the beginning", began.elapsed().as_secs()));
        let round_began = Instant::now();
        for chain in CHAINS.iter().filter(|chain| chain.wanted(only)) {
            chain.run(&stations, round, only, &mut figures)?;
        }
        done = round;
        if round < rounds && began.elapsed() + round_began.elapsed() > time {
            say::note("another round would take longer than there is time for (--minutes)");
            break;
        }
    }
    drop(stations);
    let results = results(&figures);
    if small {
        return Ok(());
    }
    let mut all = super::of_today("images", only)?;
    all.extend(results);
    super::write("images", &json!({ "rounds": done, "image": image.described, "results": all }))
}

/// Fails where so many bytes are not free.
fn check_room(dir: &Path, needed: u64) -> Result<()> {
    let there = rustix::fs::statvfs(dir)?;
    let free = there.f_bavail * there.f_frsize;
    if free < needed {
        bail!(
            "{}: {} GB are free, the images of all contenders take up to {} GB (TMPDIR names another place)",
            dir.display(),
            free >> 30,
            needed >> 30
        );
    }
    Ok(())
}

type Work = fn(&Station<'_>) -> Result<Figure>;

struct Task {
    name: &'static str,
    run: Work,
    /// What nobody can do without.
    floors: &'static [Floor],
    goal: Goal,
    /// Done, though not shown, if any of the chain is wanted: it makes or removes what the others need.
    always: bool,
}

/// Tasks in this order.
struct Chain {
    tasks: &'static [Task],
}

impl Chain {
    fn wanted(&self, only: &Only) -> bool {
        self.tasks.iter().any(|task| only.wants(task.name))
    }

    fn run(&self, stations: &[Station<'_>], round: usize, only: &Only, figures: &mut Figures) -> Result<()> {
        for task in self.tasks {
            let wanted = only.wants(task.name);
            if !wanted && !task.always {
                continue;
            }
            for station in stations {
                // The slowest once only: nothing is compared with it.
                if round > 1 && station.contender.is_podman() {
                    continue;
                }
                let name = station.contender.name();
                let figure = (task.run)(station).with_context(|| format!("{name}: {}", task.name))?;
                if wanted {
                    figures.add(task.name, name, figure);
                }
            }
            for (name, floor) in task.floors.iter().filter(|_| wanted) {
                figures.add(task.name, name, floor(&stations[0])?);
            }
        }
        Ok(())
    }
}

/// What the time of one of ours is held against.
#[derive(Clone, Copy)]
enum Goal {
    None,
    /// Parts of docker's time: with EROFS, with overlay.
    OfDocker {
        erofs: f64,
        overlay: f64,
    },
    /// As long as the disk takes for it: how many times a floor's time is said, none is wanted.
    Disk,
}

const CHAINS: &[Chain] = &[Chain { tasks: PULLED }, Chain { tasks: LOADED_TASKS }];

const PULLED: &[Task] = &[
    Task {
        name: "cold pull",
        run: |station| station.measured("pull", &[source("first")]),
        floors: &[floor::BLOBS],
        goal: Goal::OfDocker { erofs: 0.2, overlay: 0.5 },
        always: true,
    },
    Task {
        name: "pull, one layer changed",
        run: |station| station.measured("pull", &[source("second")]),
        floors: &[],
        goal: Goal::None,
        always: true,
    },
    Task {
        name: "push",
        run: |station| station.push_as(&source("first")),
        floors: &[],
        goal: Goal::OfDocker { erofs: 0.3, overlay: 0.3 },
        always: false,
    },
    Task {
        name: "save",
        run: |station| station.save(),
        floors: &[floor::COPY],
        goal: Goal::Disk,
        always: false,
    },
    Task { name: "rmi", run: |station| station.remove(), floors: &[], goal: Goal::None, always: true },
];

const LOADED_TASKS: &[Task] = &[
    Task {
        name: "load, layers not compressed",
        run: |station| station.load(),
        floors: &[floor::SYNCED_COPY, floor::TWO_COPIES, floor::UNPACKED],
        goal: Goal::Disk,
        always: true,
    },
    Task {
        name: "push of what was loaded (compresses)",
        run: |station| station.push_as(LOADED),
        floors: &[],
        goal: Goal::OfDocker { erofs: 0.3, overlay: 0.3 },
        always: false,
    },
    Task {
        name: "rmi of what was loaded",
        run: |station| station.measured("rmi", &[LOADED.to_owned()]),
        floors: &[],
        goal: Goal::None,
        always: true,
    },
];

/// By task and who did it, in the order of the first.
#[derive(Default)]
struct Figures {
    of: BTreeMap<&'static str, Vec<(String, Vec<Figure>)>>,
}

impl Figures {
    fn add(&mut self, task: &'static str, who: &str, figure: Figure) {
        say::note(&format!("{task:37} {who:28} {figure}"));
        let rows = self.of.entry(task).or_default();
        match rows.iter_mut().find(|(name, _)| name == who) {
            Some((_, figures)) => figures.push(figure),
            None => rows.push((who.to_owned(), vec![figure])),
        }
    }
}

/// One contender with its registries and files.
struct Station<'a> {
    contender: &'a Contender,
    image: &'a Fixture,
    target: PathBuf,
    _registries: [Server; 2],
}

impl<'a> Station<'a> {
    fn new(contender: &'a Contender, image: &'a Fixture) -> Result<Self> {
        let target = contender.sandbox().dir().join("pushed");
        let start = |dir: &Path, port| {
            Server::start(Make::Debians, contender.sandbox(), contender.meter(), dir, port)
        };
        let registries = [start(&image.registry, SOURCE)?, start(&target, TARGET)?];
        Ok(Self { contender, image, target, _registries: registries })
    }

    fn do_it(&self, verb: &str, args: &[String]) -> Result<()> {
        let mut command = self.contender.command(verb);
        if self.contender.is_podman() && matches!(verb, "pull" | "push") {
            command.arg("--tls-verify=false");
        }
        command.args(args);
        command = super::limited(&command, LONGEST);
        if let Some(meter) = self.contender.meter() {
            command = meter.metered(command);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let output = command.output()?;
        if !output.status.success() {
            bail!("{}: {}", say::spelled(&command), String::from_utf8_lossy(&output.stderr).trim_end());
        }
        Ok(())
    }

    fn measured(&self, verb: &str, args: &[String]) -> Result<Figure> {
        let meter = self.contender.meter().context("a contender for images is metered")?;
        figure(meter, || self.do_it(verb, args))
    }

    /// To an empty registry, and as what no registry has yet.
    fn push_as(&self, image: &str) -> Result<Figure> {
        let stored = self.target.join("docker");
        let name = format!("127.0.0.1:{TARGET}/pushed:first");
        self.do_it("tag", &[image.to_owned(), name.clone()])?;
        let figure = self.measured("push", std::slice::from_ref(&name))?;
        self.do_it("rmi", &[name])?;
        fs::remove_dir_all(stored)?;
        Ok(figure)
    }

    fn save(&self) -> Result<Figure> {
        let archive = self.contender.sandbox().dir().join("saved.tar");
        let to = archive.display().to_string();
        let figure = self.measured("save", &["-o".to_owned(), to, source("first")])?;
        fs::remove_file(archive)?;
        Ok(figure)
    }

    fn remove(&self) -> Result<Figure> {
        self.measured("rmi", &[source("first"), source("second")])
    }

    fn load(&self) -> Result<Figure> {
        self.image.read_archive()?;
        self.measured("load", &["-i".to_owned(), self.image.archive.display().to_string()])
    }
}

fn source(tag: &str) -> String {
    format!("127.0.0.1:{SOURCE}/many:{tag}")
}

/// Medians, ratios and what is wanted, also on standard output.
fn results(figures: &Figures) -> BTreeMap<String, Value> {
    let mut results = BTreeMap::new();
    for task in CHAINS.iter().flat_map(|chain| chain.tasks) {
        let Some(all) = figures.of.get(task.name) else { continue };
        say::step(task.name);
        let wall_of = |wanted: &dyn Fn(&str) -> bool| {
            all.iter()
                .find(|(name, _)| wanted(name))
                .and_then(|(_, of)| median(of, |figure| figure.wall.as_secs_f64()))
        };
        let docker = wall_of(&|name| name.starts_with("docker "));
        let floors: Vec<(&str, f64)> = task
            .floors
            .iter()
            .filter_map(|(floor, _)| Some((*floor, wall_of(&|name| name == *floor)?)))
            .collect();
        let mut rows = Vec::new();
        for (name, of) in all {
            let Some(wall) = median(of, |figure| figure.wall.as_secs_f64()) else { continue };
            let cpu = median(of, |figure| figure.cpu.as_secs_f64()).unwrap_or_default();
            let written = median(of, |figure| figure.written as f64).unwrap_or_default();
            let ratio = docker.map(|docker| wall / docker);
            let of_floors: BTreeMap<&str, f64> =
                floors.iter().map(|(floor, took)| (*floor, wall / took)).collect();
            let judged =
                name.starts_with("brig").then(|| judge(task.goal, name, ratio, &of_floors)).flatten();
            let shown = ratio.map_or_else(String::new, |ratio| format!("  {ratio:.2} of docker's"));
            let wanted = judged.as_ref().map_or_else(String::new, |(text, _)| format!("  ({text})"));
            say::note(&format!(
                "{name:28} {wall:7.2} s  CPU {cpu:7.2} s  written {:6.0} MB{shown}{wanted}",
                written / 1e6
            ));
            let times: Vec<f64> = of.iter().map(|figure| figure.wall.as_secs_f64()).collect();
            rows.push(json!({
                "who": name, "median_s": wall, "cpu_s": cpu, "written_bytes": written, "of_docker": ratio,
                "of_floors": of_floors, "goal": judged.as_ref().map(|(text, _)| text.clone()),
                "met": judged.and_then(|(_, met)| met), "samples_s": times,
            }));
        }
        results.insert(task.name.to_owned(), Value::Array(rows));
    }
    results
}

/// What is wanted of one of ours, and whether it is so.
fn judge(
    goal: Goal,
    who: &str,
    ratio: Option<f64>,
    of_floors: &BTreeMap<&str, f64>,
) -> Option<(String, Option<bool>)> {
    match goal {
        Goal::None => None,
        Goal::OfDocker { erofs, overlay } => {
            let most = if who.contains("erofs") { erofs } else { overlay };
            let met = ratio? <= most;
            Some((format!("wanted: {most} or less: {}", if met { "met" } else { "missed" }), Some(met)))
        }
        Goal::Disk => {
            let all: Vec<String> =
                of_floors.iter().map(|(floor, times)| format!("{times:.2} of {floor}")).collect();
            Some((format!("wanted: the disk's pace: {}", all.join("; ")), None))
        }
    }
}
