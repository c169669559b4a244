//! `cargo xtask bench registry`: `brig registry serve` beside Debian's docker-registry.
//!
//! Invariant: both stand in networks of their own and are given the same images in turns within one run by the same
//! client, skopeo. Nobody has seen a round's images before. Processor time is the server's alone, by a cgroup of its own;
//! the client's own work is in the wall time of both.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use brigantine_testkit::Sandbox;
use serde_json::{Value, json};

use super::{
    figure::{Figure, figure, median},
    meter::Meter,
    server::{Make, Server},
};
use crate::{build, packages, say};

/// No single copy may take longer.
const LONGEST: Duration = Duration::from_mins(5);
/// The first's, and so on: skopeo remembers by address what a registry has.
const PORT: u16 = 5101;

/// An image to move.
struct Scenario {
    name: &'static str,
    layers: usize,
    /// Length of each, in bytes, about.
    size: u64,
    /// So many clients at once, each with an image of its own.
    clients: usize,
}

const FULL: &[Scenario] = &[
    Scenario { name: "one large blob", layers: 1, size: 512 << 20, clients: 1 },
    Scenario { name: "100 small blobs", layers: 100, size: 8 << 10, clients: 1 },
    Scenario { name: "8 clients, 4 blobs each", layers: 4, size: 8 << 20, clients: 8 },
];
const SMALL: &[Scenario] = &[
    Scenario { name: "one large blob", layers: 1, size: 64 << 20, clients: 1 },
    Scenario { name: "100 small blobs", layers: 100, size: 8 << 10, clients: 1 },
    Scenario { name: "8 clients, 4 blobs each", layers: 4, size: 1 << 20, clients: 8 },
];

/// All of it; the results go to standard output and, unless the images are the `small` ones, below `bench/results`.
pub fn run(rounds: usize, small: bool) -> Result<()> {
    packages::install(&[packages::BUILD, packages::TEST])?;
    let dist = match std::env::var_os("BRIG_TEST_DIST") {
        Some(dist) => PathBuf::from(dist),
        None => build::build(build::Profile::Release)?,
    };
    let brig = dist.join("brig");
    let work = tempfile::Builder::new().prefix("brig-bench-").tempdir()?;
    let makes = [("brig registry serve", Make::Ours(&brig)), ("docker-registry", Make::Debians)];
    let mut stations = Vec::new();
    for (port, (name, make)) in (PORT..).zip(makes) {
        stations.push(Station::new(name, make, port)?);
    }
    let mut results = BTreeMap::new();
    for scenario in if small { SMALL } else { FULL } {
        say::step(&format!("{}, {rounds} rounds in turns", scenario.name));
        let mut figures: Vec<[Vec<Figure>; 2]> = stations.iter().map(|_| Default::default()).collect();
        for round in 0..rounds {
            let images: Vec<PathBuf> =
                (0..scenario.clients).map(|n| work.path().join(format!("image{n}"))).collect();
            for image in &images {
                make_image(image, scenario)?;
            }
            for (station, figures) in stations.iter().zip(&mut figures) {
                figures[0].push(station.push(&images, round)?);
                figures[1].push(station.pull(&images, round)?);
                station.empty()?;
            }
            for image in images {
                fs::remove_dir_all(image)?;
            }
        }
        for (n, direction) in ["push", "pull"].into_iter().enumerate() {
            let title = format!("{direction}, {}", scenario.name);
            say::note(&title);
            let theirs = figures.last().and_then(|of| median(&of[n], |figure| figure.wall.as_secs_f64()));
            let mut rows = Vec::new();
            for (station, of) in stations.iter().zip(&figures) {
                let Some(wall) = median(&of[n], |figure| figure.wall.as_secs_f64()) else { continue };
                let cpu = median(&of[n], |figure| figure.cpu.as_secs_f64()).unwrap_or_default();
                let ratio = theirs.map(|theirs| wall / theirs);
                let shown =
                    ratio.map_or_else(String::new, |ratio| format!("  {ratio:.2} of docker-registry's"));
                say::note(&format!(
                    "  {:20} {wall:7.3} s  CPU of the server {cpu:7.3} s{shown}",
                    station.name
                ));
                rows.push(json!({
                    "who": station.name, "median_s": wall, "server_cpu_s": cpu, "of_docker_registry": ratio,
                    "samples": of[n].len(),
                }));
            }
            results.insert(title, Value::Array(rows));
        }
    }
    if small {
        return Ok(());
    }
    super::write("registry", &json!({ "rounds": rounds, "results": results }))
}

/// One server with a network and a directory.
struct Station<'a> {
    name: &'static str,
    make: Make<'a>,
    sandbox: Sandbox,
    meter: Meter,
    port: u16,
    server: std::cell::RefCell<Option<Server>>,
}

impl<'a> Station<'a> {
    fn new(name: &'static str, make: Make<'a>, port: u16) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let meter = Meter::new(&sandbox)?;
        // skopeo keeps a database of who has which blobs there and syncs it for each one: not what is measured.
        say::read(sandbox.command("mount").args(["-t", "tmpfs", "tmpfs", "/var/lib"]))?;
        let station = Self { name, make, sandbox, meter, port, server: std::cell::RefCell::default() };
        station.start()?;
        Ok(station)
    }

    fn start(&self) -> Result<()> {
        let dir = self.sandbox.dir().join("registry");
        let server = Server::start(self.make, &self.sandbox, Some(&self.meter), &dir, self.port)?;
        self.server.replace(Some(server));
        Ok(())
    }

    /// Starts it anew with nothing.
    fn empty(&self) -> Result<()> {
        self.server.replace(None);
        fs::remove_dir_all(self.sandbox.dir().join("registry"))?;
        self.start()
    }

    fn push(&self, images: &[PathBuf], round: usize) -> Result<Figure> {
        self.all(images, |n, image| {
            let mut command = self.skopeo();
            command.arg("--dest-tls-verify=false").arg(format!("dir:{}", image.display()));
            command.arg(self.named(n, round));
            command
        })
    }

    fn pull(&self, images: &[PathBuf], round: usize) -> Result<Figure> {
        let to = self.sandbox.dir().join("pulled");
        fs::create_dir(&to)?;
        let figure = self.all(images, |n, _image| {
            let mut command = self.skopeo();
            command.arg("--src-tls-verify=false").arg(self.named(n, round));
            command.arg(format!("dir:{}", to.join(n.to_string()).display()));
            command
        })?;
        for (n, image) in images.iter().enumerate() {
            for entry in fs::read_dir(image)? {
                let name = entry?.file_name();
                let pulled = to.join(n.to_string()).join(&name);
                if fs::metadata(&pulled)?.len() != fs::metadata(image.join(&name))?.len() {
                    bail!("{}: {} is not what was pushed", self.name, pulled.display());
                }
            }
        }
        fs::remove_dir_all(to)?;
        Ok(figure)
    }

    fn named(&self, n: usize, round: usize) -> String {
        format!("docker://127.0.0.1:{}/bench/r{round}/i{n}:t", self.port)
    }

    fn skopeo(&self) -> Command {
        let mut command = self.sandbox.net_command("skopeo");
        // Its cache of where blobs are.
        command.env("XDG_DATA_HOME", self.sandbox.dir()).args([
            "copy",
            "--insecure-policy",
            "--preserve-digests",
        ]);
        command
    }

    /// All at once.
    fn all(&self, images: &[PathBuf], command: impl Fn(usize, &Path) -> Command) -> Result<Figure> {
        figure(&self.meter, || {
            let mut running: Vec<(String, Child)> = Vec::new();
            for (n, image) in images.iter().enumerate() {
                let mut command = super::limited(&command(n, image), LONGEST);
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
                running.push((say::spelled(&command), command.spawn()?));
            }
            for (spelled, child) in running {
                let output = child.wait_with_output()?;
                if !output.status.success() {
                    bail!("{}: {spelled}: {}", self.name, String::from_utf8_lossy(&output.stderr).trim_end());
                }
            }
            Ok(())
        })
    }
}

/// An image as skopeo's `dir:` has it, of layers nobody has seen.
fn make_image(dir: &Path, scenario: &Scenario) -> Result<()> {
    fs::create_dir(dir)?;
    let noise = File::open("/dev/urandom")?;
    let mut names = vec![dir.join("config")];
    fs::write(&names[0], format!(r#"{{"architecture":"amd64","os":"linux","made":"{}"}}"#, dir.display()))?;
    for n in 0..scenario.layers {
        let path = dir.join(format!("layer{n}"));
        let mut file = File::create(&path)?;
        // What no program takes for something that it should compress: an empty gzip member, and noise.
        let mut gzip = Command::new("gzip").arg("-nc").stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        std::io::copy(gzip.stdout.as_mut().context("a pipe")?, &mut file)?;
        gzip.wait()?;
        std::io::copy(&mut (&noise).take(scenario.size), &mut file)?;
        file.flush()?;
        names.push(path);
    }
    let sums = say::read(Command::new("sha256sum").args(&names))?;
    let mut described = Vec::new();
    for (path, line) in names.iter().zip(sums.lines()) {
        let digest = line.split_ascii_whitespace().next().context("sha256sum says nothing")?;
        let size = fs::metadata(path)?.len();
        fs::rename(path, dir.join(digest))?;
        described.push((digest.to_owned(), size));
    }
    let descriptor = |kind: &str, (digest, size): &(String, u64)| {
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": format!("sha256:{digest}"),
            "size": size,
        })
    };
    let (config, layers) = described.split_first().context("an image has a configuration")?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", config),
        "layers": layers.iter().map(|layer| descriptor("layer.v1.tar+gzip", layer)).collect::<Vec<_>>(),
    });
    fs::write(dir.join("manifest.json"), serde_json::to_vec(&manifest)?)?;
    fs::write(dir.join("version"), "Directory Transport Version: 1.1\n")?;
    Ok(())
}
