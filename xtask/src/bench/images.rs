//! `cargo xtask bench images`: images moved to and from a registry on loopback, side by side with the peers installed.
//!
//! Invariant: every contender has an engine, a network, a registry process and a directory of its own, all do the same
//! in turns within one run, and beside each time stand the processor time (of the engine, its client and both
//! registries, by a cgroup of their own) and the bytes written to disk meanwhile (of the whole machine: run it on an
//! idle one). It ends: no command runs for ever, no round begins that would not fit into the time, and what it made
//! goes with it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use brigantine_testkit::Sandbox;
use serde_json::{Value, json};

use super::{
    contender::{self, Contender},
    figure::{Figure, figure, median},
    server::{Make, Server},
};
use crate::{build, packages, say};

/// What the image is made of: files of this machine's own trees, in order of their names.
const TREES: &[&str] = &["/usr"];
const LAYERS: usize = 6;
/// How many of them, in number and bytes: all of Debian's usual trees but their largest files.
const FULL: Limits = Limits { files: 150_000, bytes: 2_360 << 20, disk: 18 << 30 };
/// Enough to see that everything works.
const SMALL: Limits = Limits { files: 3_000, bytes: 60 << 20, disk: 2 << 30 };
/// No single command may take longer.
const LONGEST: Duration = Duration::from_mins(10);

#[derive(Clone, Copy)]
struct Limits {
    files: usize,
    bytes: u64,
    /// What everybody's copies of it take at the most, in bytes.
    disk: u64,
}

/// What the image in the archive is called.
const LOADED: &str = "localhost/loaded:first";

/// Ports within each contender's own network.
const SOURCE: u16 = 5001;
const TARGET: u16 = 5002;

/// All of it, in about `time`; the results go to standard output and, unless the image is the `small` one, below
/// `bench/results`.
pub fn run(rounds: usize, time: Duration, small: bool) -> Result<()> {
    let began = Instant::now();
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
        for task in TASKS {
            for station in &stations {
                // The slowest once only: nothing is compared with it.
                if round > 1 && station.contender.is_podman() {
                    continue;
                }
                let name = station.contender.name();
                let figure = (task.run)(station).with_context(|| format!("{name}: {}", task.name))?;
                figures.add(task.name, name, figure);
            }
            if let Some((name, floor)) = task.floor {
                figures.add(task.name, name, floor(&stations[0])?);
            }
        }
        done = round;
        if round < rounds && began.elapsed() + round_began.elapsed() > time {
            say::note("another round would take longer than there is time for (--minutes)");
            break;
        }
    }
    drop(stations);
    record(done, &image, &figures, small)
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
    /// What nobody can do without, with its name.
    floor: Option<(&'static str, Work)>,
    goal: Goal,
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
    /// As long as it takes to copy the bytes; how many times that is said, none is wanted.
    Disk,
}

const COPY_BLOBS: &str = "skopeo copy to a directory";
const COPY_ARCHIVE: &str = "cp of the archive";
const SYNCED_COPY: &str = "the same, synced";

/// In this order, each leaving what the next one needs.
const TASKS: &[Task] = &[
    Task {
        name: "cold pull",
        run: |station| station.measured("pull", &[source("first")]),
        floor: Some((COPY_BLOBS, copy_blobs)),
        goal: Goal::OfDocker { erofs: 0.2, overlay: 0.5 },
    },
    Task {
        name: "pull, one layer changed",
        run: |station| station.measured("pull", &[source("second")]),
        floor: None,
        goal: Goal::None,
    },
    Task {
        name: "push",
        run: |station| station.push(),
        floor: None,
        goal: Goal::OfDocker { erofs: 0.3, overlay: 0.3 },
    },
    Task {
        name: "save",
        run: |station| station.save(),
        floor: Some((COPY_ARCHIVE, copy_archive)),
        goal: Goal::Disk,
    },
    Task { name: "rmi", run: |station| station.remove(), floor: None, goal: Goal::None },
    Task {
        name: "load, layers not compressed",
        run: |station| station.load(),
        floor: Some((SYNCED_COPY, copy_archive_synced)),
        goal: Goal::Disk,
    },
    Task {
        name: "push of what was loaded (compresses)",
        run: |station| station.push_loaded(),
        floor: None,
        goal: Goal::OfDocker { erofs: 0.3, overlay: 0.3 },
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

/// The image in a registry's directory: tags `first`, and `second` with another last layer.
struct Fixture {
    registry: PathBuf,
    /// The first image as `docker save` writes it, without any compression.
    archive: PathBuf,
    described: String,
}

impl Fixture {
    fn make(work: &Path, limits: Limits) -> Result<Self> {
        let layout = work.join("layout");
        let blobs = layout.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let (files, bytes) = list(work, limits);
        let per_layer = files.len().div_ceil(LAYERS);
        let parts: Vec<&[PathBuf]> = files.chunks(per_layer).collect();
        let layers = layers(work, &blobs, &parts)?;
        let described = format!(
            "{} layers, {} files and directories, {} MB, {} MB in gzip",
            layers.len(),
            files.len(),
            bytes / 1_000_000,
            layers.iter().map(|layer| layer.size).sum::<u64>() / 1_000_000
        );
        let changed = work.join("changed");
        fs::write(&changed, format!("{:?}", Instant::now()))?;
        let last = files.len().saturating_sub(per_layer / 10);
        let mut second: Vec<PathBuf> = files[last..].to_vec();
        second.push(changed.strip_prefix("/")?.to_owned());
        let mut other = layers.clone();
        other.pop();
        other.push(layer(work, &blobs, LAYERS, &second)?);
        let manifests = [manifest(&blobs, &layers, "first")?, manifest(&blobs, &other, "second")?];
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
        let registry = work.join("registry");
        let sandbox = Sandbox::new()?;
        let server = Server::start(Make::Debians, &sandbox, None, &registry, SOURCE)?;
        for tag in ["first", "second"] {
            let mut copy = sandbox.command("skopeo");
            copy.args(["copy", "--insecure-policy", "--dest-tls-verify=false"]);
            copy.arg(format!("oci:{}:{tag}", layout.display()));
            say::read(copy.arg(format!("docker://127.0.0.1:{SOURCE}/many:{tag}")))?;
        }
        drop(server);
        let archive = work.join("first.tar");
        let mut copy = Command::new("skopeo");
        copy.args(["copy", "--insecure-policy"]).arg(format!("oci:{}:first", layout.display()));
        say::read(copy.arg(format!("docker-archive:{}:{LOADED}", archive.display())))?;
        fs::remove_dir_all(&layout)?;
        Ok(Self { registry, archive, described })
    }
}

/// Files and directories below the trees, without the leading slash, and the sum of the files' lengths. What is too
/// much is left out from the largest files on.
fn list(work: &Path, limits: Limits) -> (Vec<PathBuf>, u64) {
    let mut found: Vec<(PathBuf, u64)> = Vec::new();
    let mut waiting: Vec<PathBuf> = TREES.iter().rev().map(PathBuf::from).collect();
    while let Some(path) = waiting.pop() {
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if path.starts_with(work) {
            continue;
        }
        if found.len() == limits.files {
            break;
        }
        if metadata.is_dir() {
            let mut names: Vec<PathBuf> =
                fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
            names.sort_unstable_by(|a, b| b.cmp(a));
            waiting.extend(names);
        }
        let Ok(relative) = path.strip_prefix("/") else { continue };
        found.push((relative.to_owned(), if metadata.is_file() { metadata.len() } else { 0 }));
    }
    let mut bytes: u64 = found.iter().map(|(_, length)| length).sum();
    let mut lengths: Vec<u64> = found.iter().map(|(_, length)| *length).collect();
    lengths.sort_unstable();
    let mut most = u64::MAX;
    while bytes > limits.bytes
        && let Some(length) = lengths.pop()
    {
        bytes -= length;
        most = length;
    }
    (found.into_iter().filter(|(_, length)| *length < most).map(|(path, _)| path).collect(), bytes)
}

/// Makes the layers, as many at a time as there are processors.
fn layers(work: &Path, blobs: &Path, parts: &[&[PathBuf]]) -> Result<Vec<Layer>> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(parts.len());
    let make = || -> Result<Vec<(usize, Layer)>> {
        let mut made = Vec::new();
        loop {
            let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some(files) = parts.get(n) else { return Ok(made) };
            made.push((n, layer(work, blobs, n, files)?));
        }
    };
    let mut all: Vec<(usize, Layer)> = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let tasks: Vec<_> = (0..threads).map(|_| scope.spawn(make)).collect();
        for task in tasks {
            all.extend(task.join().map_err(|_panic| anyhow::anyhow!("making a layer panicked"))??);
        }
        Ok(())
    })?;
    all.sort_unstable_by_key(|(n, _)| *n);
    Ok(all.into_iter().map(|(_, layer)| layer).collect())
}

#[derive(Clone)]
struct Layer {
    digest: String,
    diff_id: String,
    size: u64,
}

fn layer(work: &Path, blobs: &Path, n: usize, files: &[PathBuf]) -> Result<Layer> {
    let names = work.join(format!("{n}.list"));
    let mut list = File::create(&names)?;
    for file in files {
        list.write_all(file.as_os_str().as_encoded_bytes())?;
        list.write_all(&[0])?;
    }
    let archive = work.join(format!("{n}.tar"));
    let mut tar = Command::new("tar");
    tar.args(["--numeric-owner", "--no-recursion", "--null", "-C", "/", "-cf"])
        .arg(&archive)
        .arg("-T")
        .arg(&names);
    say::read(&mut tar)?;
    let packed = work.join(format!("{n}.tar.gz"));
    let mut gzip = Command::new("gzip");
    gzip.args(["-n", "-c"]).stdin(File::open(&archive)?).stdout(File::create(&packed)?);
    if !gzip.status()?.success() {
        bail!("gzip failed");
    }
    let hash = |path: &Path| -> Result<String> {
        let text = say::read(Command::new("sha256sum").arg(path))?;
        Ok(text.split_ascii_whitespace().next().unwrap_or_default().to_owned())
    };
    let (digest, diff_id) = (hash(&packed)?, hash(&archive)?);
    let size = fs::metadata(&packed)?.len();
    fs::remove_file(&archive)?;
    fs::rename(&packed, blobs.join(&digest))?;
    Ok(Layer { digest, diff_id, size })
}

/// Writes an image's documents; returns what the index says of it.
fn manifest(blobs: &Path, layers: &[Layer], tag: &str) -> Result<Value> {
    let put = |document: &Value| -> Result<(String, usize)> {
        let raw = serde_json::to_vec(document)?;
        let path = blobs.join("part");
        fs::write(&path, &raw)?;
        let digest = say::read(Command::new("sha256sum").arg(&path))?;
        let digest = digest.split_ascii_whitespace().next().unwrap_or_default().to_owned();
        fs::rename(path, blobs.join(&digest))?;
        Ok((format!("sha256:{digest}"), raw.len()))
    };
    let diff_ids: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", layer.diff_id)).collect();
    let (config, config_size) = put(&json!({
        "architecture": oci_architecture(), "os": "linux", "created": "2026-01-01T00:00:00Z",
        "config": { "Cmd": ["sh"] }, "history": [], "rootfs": { "type": "layers", "diff_ids": diff_ids },
    }))?;
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    let listed: Vec<Value> = layers
        .iter()
        .map(|layer| {
            json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": format!("sha256:{}", layer.digest), "size": layer.size,
            })
        })
        .collect();
    let (digest, size) = put(&json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size },
        "layers": listed,
    }))?;
    Ok(json!({
        "mediaType": MANIFEST, "digest": digest, "size": size,
        "annotations": { "org.opencontainers.image.ref.name": tag },
    }))
}

fn oci_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
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

    fn push(&self) -> Result<Figure> {
        self.push_as(&source("first"))
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
        self.measured("load", &["-i".to_owned(), self.image.archive.display().to_string()])
    }

    /// Its layers are compressed on the way.
    fn push_loaded(&self) -> Result<Figure> {
        let figure = self.push_as(LOADED)?;
        self.do_it("rmi", &[LOADED.to_owned()])?;
        Ok(figure)
    }
}

fn source(tag: &str) -> String {
    format!("127.0.0.1:{SOURCE}/many:{tag}")
}

/// A plain copy of all blobs.
fn copy_blobs(station: &Station<'_>) -> Result<Figure> {
    let to = station.contender.sandbox().dir().join("copied");
    let meter = station.contender.meter().context("a contender for images is metered")?;
    let figure = figure(meter, || {
        let mut command = station.contender.sandbox().net_command("skopeo");
        command.args(["copy", "--insecure-policy", "--src-tls-verify=false"]);
        command.arg(format!("docker://{}", source("first"))).arg(format!("dir:{}", to.display()));
        say::read(&mut meter.metered(super::limited(&command, LONGEST))).map(drop)
    })?;
    fs::remove_dir_all(to)?;
    Ok(figure)
}

/// A plain copy of the whole image's bytes.
fn copy_archive(station: &Station<'_>) -> Result<Figure> {
    copied(station, false)
}

/// One that is on the disk at its end, as what was loaded is.
fn copy_archive_synced(station: &Station<'_>) -> Result<Figure> {
    copied(station, true)
}

fn copied(station: &Station<'_>, synced: bool) -> Result<Figure> {
    let to = station.contender.sandbox().dir().join("copied.tar");
    let meter = station.contender.meter().context("a contender for images is metered")?;
    let figure = figure(meter, || {
        // Not by reference: the bytes are what is measured.
        let script = if synced {
            "cp --reflink=never \"$0\" \"$1\" && sync \"$1\""
        } else {
            "cp --reflink=never \"$0\" \"$1\""
        };
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(&station.image.archive).arg(&to);
        say::read(&mut meter.metered(super::limited(&command, LONGEST))).map(drop)
    })?;
    fs::remove_file(to)?;
    Ok(figure)
}

/// Medians, ratios and what is wanted, on standard output and in a file.
fn record(rounds: usize, image: &Fixture, figures: &Figures, small: bool) -> Result<()> {
    let mut results = BTreeMap::new();
    for task in TASKS {
        say::step(task.name);
        let Some(all) = figures.of.get(task.name) else { continue };
        let wall_of = |wanted: &dyn Fn(&str) -> bool| {
            all.iter()
                .find(|(name, _)| wanted(name))
                .and_then(|(_, of)| median(of, |figure| figure.wall.as_secs_f64()))
        };
        let docker = wall_of(&|name| name.starts_with("docker "));
        let floor = task.floor.and_then(|(floor, _)| wall_of(&|name| name == floor));
        let mut rows = Vec::new();
        for (name, of) in all {
            let Some(wall) = median(of, |figure| figure.wall.as_secs_f64()) else { continue };
            let cpu = median(of, |figure| figure.cpu.as_secs_f64()).unwrap_or_default();
            let written = median(of, |figure| figure.written as f64).unwrap_or_default();
            let ratio = docker.map(|docker| wall / docker);
            let of_floor = floor.map(|floor| wall / floor);
            let judged = name.starts_with("brig").then(|| judge(task.goal, name, ratio, of_floor)).flatten();
            let shown = ratio.map_or_else(String::new, |ratio| format!("  {ratio:.2} of docker's"));
            let wanted = judged.as_ref().map_or_else(String::new, |(text, _)| format!("  ({text})"));
            say::note(&format!(
                "{name:28} {wall:7.2} s  CPU {cpu:7.2} s  written {:6.0} MB{shown}{wanted}",
                written / 1e6
            ));
            rows.push(json!({
                "who": name, "median_s": wall, "cpu_s": cpu, "written_bytes": written, "of_docker": ratio,
                "of_floor": of_floor, "goal": judged.as_ref().map(|(text, _)| text.clone()),
                "met": judged.and_then(|(_, met)| met), "samples": of.len(),
            }));
        }
        results.insert(task.name, Value::Array(rows));
    }
    if small {
        return Ok(());
    }
    super::write("images", &json!({ "rounds": rounds, "image": image.described, "results": results }))
}

/// What is wanted of one of ours, and whether it is so.
fn judge(goal: Goal, who: &str, ratio: Option<f64>, of_floor: Option<f64>) -> Option<(String, Option<bool>)> {
    match goal {
        Goal::None => None,
        Goal::OfDocker { erofs, overlay } => {
            let most = if who.contains("erofs") { erofs } else { overlay };
            let met = ratio? <= most;
            Some((format!("wanted: {most} or less: {}", if met { "met" } else { "missed" }), Some(met)))
        }
        Goal::Disk => {
            Some((format!("wanted: the disk's pace: {:.2} of a plain copy's time", of_floor?), None))
        }
    }
}
