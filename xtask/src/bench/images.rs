//! `cargo xtask bench images`: images moved to and from a registry on loopback, side by side with the peers installed.
//!
//! Invariant: every contender has an engine, a network, a registry process and a directory of its own, all do the same
//! in turns within one run, and beside each time stand the processor time (of the engine, its client and both
//! registries, by a cgroup of their own) and the bytes written to disk meanwhile (of the whole machine: run it on an
//! idle one).

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use brigantine_testkit::{Sandbox, until};
use serde_json::{Value, json};

use super::{
    contender::{self, Contender},
    meter::Meter,
};
use crate::{build, packages, root, say};

/// What the image is made of: files of this machine's own trees, in order of their names.
const TREES: &[&str] = &["/usr"];
const LAYERS: usize = 6;
/// How many of them, in number and bytes: all of Debian's usual trees but their largest files.
const FULL: Limits = Limits { files: 150_000, bytes: 2_360 << 20 };
/// Enough to see that everything works.
const SMALL: Limits = Limits { files: 3_000, bytes: 60 << 20 };

#[derive(Clone, Copy)]
struct Limits {
    files: usize,
    bytes: u64,
}

/// What the image in the archive is called.
const LOADED: &str = "localhost/loaded:first";

/// Ports within each contender's own network.
const SOURCE: u16 = 5001;
const TARGET: u16 = 5002;

/// All of it; the results go to standard output and, unless the image is the `small` one, below `bench/results`.
pub fn run(rounds: usize, small: bool) -> Result<()> {
    packages::install(&[packages::BUILD, packages::TEST])?;
    // As for the tests: executables that are there already.
    let dist = match std::env::var_os("BRIG_TEST_DIST") {
        Some(dist) => PathBuf::from(dist),
        None => build::build(build::Profile::Release)?,
    };
    let work = tempfile::Builder::new().prefix("brig-bench-").tempdir()?;
    say::step("Making the image: layers of this machine's /usr, in a registry and in an archive");
    let image = Fixture::make(work.path(), if small { SMALL } else { FULL })?;
    say::note(&image.described);
    say::step("Starting the contenders");
    let contenders = contender::for_images(&dist)?;
    let mut stations = Vec::new();
    for contender in &contenders {
        say::note(contender.name());
        stations.push(Station::new(contender, &image)?);
    }
    let mut figures: BTreeMap<&str, Vec<Vec<Figure>>> = BTreeMap::new();
    for round in 1..=rounds {
        say::step(&format!("Round {round} of {rounds}"));
        for task in TASKS {
            for (n, station) in stations.iter().enumerate() {
                // The slowest once only: nothing is compared with it.
                if round > 1 && station.contender.is_podman() {
                    continue;
                }
                let figure = (task.run)(station)
                    .with_context(|| format!("{}: {}", station.contender.name(), task.name))?;
                say::note(&format!("{:28} {:24} {figure}", task.name, station.contender.name()));
                let of = figures.entry(task.name).or_insert_with(|| vec![Vec::new(); contenders.len() + 1]);
                of[n].push(figure);
            }
        }
        if let Some(figure) = copy(&stations[0])? {
            say::note(&format!("{:28} {:24} {figure}", "cold pull", "skopeo copy to a directory"));
            if let Some(of) = figures.get_mut("cold pull") {
                of[contenders.len()].push(figure);
            }
        }
    }
    drop(stations);
    let names: Vec<String> = contenders.iter().map(|contender| contender.name().to_owned()).collect();
    record(rounds, &image, &names, &figures, small)
}

struct Task {
    name: &'static str,
    run: fn(&Station<'_>) -> Result<Figure>,
}

/// In this order, each leaving what the next one needs.
const TASKS: &[Task] = &[
    Task { name: "cold pull", run: |station| station.measured("pull", &[source("first")]) },
    Task { name: "pull, one layer changed", run: |station| station.measured("pull", &[source("second")]) },
    Task { name: "push", run: |station| station.push() },
    Task { name: "save", run: |station| station.save() },
    Task { name: "rmi", run: |station| station.remove() },
    Task { name: "load, layers not compressed", run: |station| station.load() },
    Task { name: "push of what was loaded", run: |station| station.push_loaded() },
];

/// What one task took.
#[derive(Clone, Copy)]
struct Figure {
    wall: Duration,
    /// Processor time of the engine, its client and its registries; not of the kernel's writeback.
    cpu: Duration,
    /// Bytes written to its disks, until everything was on them.
    written: u64,
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (wall, cpu) = (self.wall.as_secs_f64(), self.cpu.as_secs_f64());
        write!(f, "{wall:7.2} s  CPU {cpu:7.2} s  written {:6} MB", self.written / 1_000_000)
    }
}

fn figure(meter: &Meter, work: impl FnOnce() -> Result<()>) -> Result<Figure> {
    rustix::fs::sync();
    let before = (meter.cpu()?, written()?);
    let began = Instant::now();
    work()?;
    let wall = began.elapsed();
    let cpu = meter.cpu()?.saturating_sub(before.0);
    rustix::fs::sync();
    Ok(Figure { wall, cpu, written: written()?.saturating_sub(before.1) })
}

/// Processor time spent on anything, from `/proc/stat`.
pub fn busy() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat")?;
    let words = text.lines().next().context("/proc/stat is empty")?.split_ascii_whitespace().skip(1);
    let ticks: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
    // Idle and waiting are the fourth and fifth; guests count as user time already.
    let total: u64 =
        ticks.iter().take(8).enumerate().filter(|(n, _)| !matches!(n, 3 | 4)).map(|(_, t)| t).sum();
    Ok(Duration::from_millis(total * 10))
}

/// Bytes written to whole disks, from `/proc/diskstats`.
fn written() -> Result<u64> {
    let mut total = 0;
    for line in BufReader::new(File::open("/proc/diskstats")?).lines() {
        let line = line?;
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (Some(name), Some(sectors)) = (words.get(2), words.get(9)) else { continue };
        let layered = ["loop", "dm-", "md", "zram"].iter().any(|prefix| name.starts_with(prefix));
        if !layered && Path::new("/sys/block").join(name).exists() {
            total += sectors.parse::<u64>()? * 512;
        }
    }
    Ok(total)
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
        let server = Registry::start(&sandbox, None, &registry, SOURCE)?;
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

/// Debian's registry in a sandbox's network.
struct Registry {
    child: Child,
}

impl Registry {
    fn start(sandbox: &Sandbox, meter: Option<&Meter>, dir: &Path, port: u16) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let config = sandbox.dir().join(format!("registry-{port}.yml"));
        let text = format!(
            "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    \
             rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
            dir.display()
        );
        fs::write(&config, text)?;
        let mut command = sandbox.net_command("docker-registry");
        command.arg("serve").arg(&config);
        if let Some(meter) = meter {
            command = meter.metered(command);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let registry = Self { child };
        let up = until(Duration::from_secs(20), || {
            sandbox.within_net(|| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()).then_some(())
        });
        up.context("docker-registry does not start")?;
        Ok(registry)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // nsenter has become the server.
        if self.child.kill().is_ok() {
            self.child.wait().ok();
        }
    }
}

/// One contender with its registries and files.
struct Station<'a> {
    contender: &'a Contender,
    image: &'a Fixture,
    target: PathBuf,
    _registries: [Registry; 2],
}

impl<'a> Station<'a> {
    fn new(contender: &'a Contender, image: &'a Fixture) -> Result<Self> {
        let target = contender.sandbox().dir().join("pushed");
        let start = |dir: &Path, port| Registry::start(contender.sandbox(), contender.meter(), dir, port);
        let registries = [start(&image.registry, SOURCE)?, start(&target, TARGET)?];
        Ok(Self { contender, image, target, _registries: registries })
    }

    fn do_it(&self, verb: &str, args: &[String]) -> Result<()> {
        let mut command = self.contender.command(verb);
        if self.contender.is_podman() && matches!(verb, "pull" | "push") {
            command.arg("--tls-verify=false");
        }
        command.args(args);
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

/// A plain copy of all blobs, as a floor: what no engine can do without.
fn copy(station: &Station<'_>) -> Result<Option<Figure>> {
    if !packages::there("skopeo") {
        return Ok(None);
    }
    let to = station.contender.sandbox().dir().join("copied");
    let meter = station.contender.meter().context("a contender for images is metered")?;
    let figure = figure(meter, || {
        let mut command = station.contender.sandbox().net_command("skopeo");
        command.args(["copy", "--insecure-policy", "--src-tls-verify=false"]);
        command.arg(format!("docker://{}", source("first"))).arg(format!("dir:{}", to.display()));
        say::read(&mut meter.metered(command)).map(drop)
    })?;
    fs::remove_dir_all(to)?;
    Ok(Some(figure))
}

/// Medians and ratios, on standard output and in a file.
fn record(
    rounds: usize,
    image: &Fixture,
    names: &[String],
    figures: &BTreeMap<&str, Vec<Vec<Figure>>>,
    small: bool,
) -> Result<()> {
    let docker = names.iter().position(|name| name.starts_with("docker "));
    let mut results = BTreeMap::new();
    for task in TASKS {
        say::step(task.name);
        let Some(all) = figures.get(task.name) else { continue };
        let reference = docker.and_then(|docker| median(&all[docker], |f| f.wall.as_secs_f64()));
        let mut rows = Vec::new();
        for (n, of) in all.iter().enumerate() {
            let name = names.get(n).map_or("skopeo copy to a directory", String::as_str);
            let Some(wall) = median(of, |f| f.wall.as_secs_f64()) else { continue };
            let cpu = median(of, |f| f.cpu.as_secs_f64()).unwrap_or_default();
            let written = median(of, |f| f.written as f64).unwrap_or_default();
            let ratio = reference.map(|reference| wall / reference);
            let shown = ratio.map_or_else(String::new, |ratio| format!("  {ratio:.2} of docker's"));
            say::note(&format!(
                "{name:28} {wall:7.2} s  CPU {cpu:7.2} s  written {:6.0} MB{shown}",
                written / 1e6
            ));
            rows.push(json!({
                "who": name, "median_s": wall, "cpu_s": cpu, "written_bytes": written, "of_docker": ratio,
                "samples": of.len(),
            }));
        }
        results.insert(task.name, Value::Array(rows));
    }
    if small {
        return Ok(());
    }
    let date = say::read(Command::new("date").args(["-u", "+%Y-%m-%d"]))?.trim().to_owned();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let commit = say::read(Command::new("git").args(["rev-parse", "--short", "HEAD"]).current_dir(root()));
    let document = json!({
        "date": date, "commit": commit.unwrap_or_default().trim(), "kernel": kernel.trim(),
        "cores": std::thread::available_parallelism().map_or(0, usize::from), "rounds": rounds,
        "image": image.described, "results": results,
    });
    let dir = root().join("bench/results");
    fs::create_dir_all(&dir)?;
    let path = dir.join(format!("images-{date}.json"));
    fs::write(&path, serde_json::to_string_pretty(&document)? + "\n")?;
    say::step(&format!("Written to {}", path.display()));
    Ok(())
}

fn median(of: &[Figure], value: impl Fn(&Figure) -> f64) -> Option<f64> {
    let mut sorted: Vec<f64> = of.iter().map(value).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}
