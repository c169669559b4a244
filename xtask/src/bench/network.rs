//! `cargo xtask bench network`: what networks cost at the start, and what goes through them, side by side with the peers
//! installed.
//!
//! Invariant: all contenders are measured in one run and in turns, each on a machine (network namespace) of its own with
//! another machine beside it, with the same programs of Debian's in the same image: iperf3, wrk and nginx.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    net::UdpSocket,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use brigantine_testkit::{Outside, fixtures, sandbox, until};
use serde_json::{Value, json};

use super::{
    Only,
    contender::{self, Contender},
    spread::{self, Spread},
};
use crate::{build, packages, say};

const IMAGE: &str = "load:latest";

/// How much of everything.
#[derive(Clone, Copy)]
struct Size {
    seconds: u64,
    samples: usize,
    parallel: usize,
}

const FULL: Size = Size { seconds: 2, samples: 9, parallel: 32 };
/// Enough to see that everything works, in less than two minutes.
const SMALL: Size = Size { seconds: 1, samples: 1, parallel: 8 };

type Results = BTreeMap<String, Value>;

/// All of it, or some rows; the results go to standard output and, unless it is the `small` form, below `bench/results`,
/// beside the day's other rows.
pub fn run(rounds: usize, small: bool, only: &Only) -> Result<()> {
    packages::install(&[packages::BUILD, packages::DEMO, packages::LOAD])?;
    let dist = match std::env::var_os("BRIG_TEST_DIST") {
        Some(dist) => PathBuf::from(dist),
        None => build::build(build::Profile::Release)?,
    };
    let (size, rounds) = if small { (SMALL, rounds.min(3)) } else { (FULL, rounds) };
    let image = fixtures::load_programs()?;
    say::step("Starting the contenders");
    let contenders = contender::all(&dist, &image)?;
    let stations: Vec<Station<'_>> = contenders
        .iter()
        .filter(|contender| !contender.name().contains("docker CLI"))
        .map(Station::open)
        .collect::<Result<_>>()?;
    let mut results = Results::new();
    starts(&stations, rounds, only, &mut results)?;
    let row = format!("{} at once", size.parallel);
    if only.wants(&row) {
        let measure: Measure = |station, size| station.parallel(size);
        rates(&row, "ms", &stations, measure, size, &mut results)?;
    }
    let kinds: [(&str, &str, Measure); 9] = [
        ("TCP, container to container", MBIT, |station, size| station.iperf("client", "", false, size)),
        ("TCP, published, from another machine", MBIT, |station, size| {
            station.iperf_from_outside(false, size)
        }),
        ("TCP, published, hairpin", MBIT, |station, size| station.iperf("client", HOST, false, size)),
        ("TCP, bridge to bridge", MBIT, |station, size| station.iperf("stranger", HOST, false, size)),
        ("UDP, container to container", MBIT, |station, size| station.iperf("client", "", true, size)),
        ("UDP, published, from another machine", MBIT, |station, size| {
            station.iperf_from_outside(true, size)
        }),
        ("connections, container to container", "1/s", |station, size| station.connections(size)),
        ("connections, published, from another machine", "1/s", |station, size| {
            station.connections_from_outside(size)
        }),
        ("connections, published, from the host", "1/s", |station, size| station.connections_from_host(size)),
    ];
    let wanted: Vec<_> = kinds.into_iter().filter(|(what, ..)| only.wants(what)).collect();
    if !wanted.is_empty() || only.wants(NAMES) {
        for station in &stations {
            station.serve()?;
        }
    }
    for (what, unit, measure) in wanted {
        rates(what, unit, &stations, measure, size, &mut results)?;
    }
    if only.wants(NAMES) {
        names(&stations, size, &mut results)?;
    }
    if small {
        return Ok(());
    }
    let mut all = super::of_today("network", only)?;
    all.extend(results);
    super::write("network", &json!({ "rounds": rounds, "results": all }))
}

/// The engine's address on the LAN with the other machine.
const HOST: &str = "192.0.2.2";

const MBIT: &str = "Mbit/s";
const NAMES: &str = "names";

type Measure = for<'a, 'b> fn(&'a Station<'b>, Size) -> Result<f64>;

/// A contender on its machine, beside another machine.
struct Station<'a> {
    contender: &'a Contender,
    outside: Outside,
    /// The server's inner address; known once it runs.
    server: RefCell<String>,
}

impl<'a> Station<'a> {
    fn name(&self) -> &str {
        self.contender.name()
    }

    fn open(contender: &'a Contender) -> Result<Self> {
        let outside = Outside::beside(contender.sandbox());
        let station = Self { contender, outside, server: RefCell::default() };
        station.cli("network", &["create", "own"])?;
        station.cli("network", &["create", "other"])?;
        if !contender.is_podman() {
            let lan = ["create", "-d", "macvlan", "--subnet", "192.0.2.0/24", "-o", "parent=lan0", "lan"];
            station.cli("network", &lan)?;
        }
        Ok(station)
    }

    fn cli(&self, verb: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.contender.command(verb);
        let output = command.args(arguments).stdin(Stdio::null()).output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{}: {}: {said}", self.contender.name(), say::spelled(&command));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Runs the servers: iperf3 and nginx, both published; a client on the same bridge, and one on another.
    fn serve(&self) -> Result<()> {
        let script = "iperf3 -s >/dev/null & exec nginx -c /etc/nginx.conf";
        self.cli(
            "run",
            &[
                "-d",
                "--name",
                "server",
                "--network",
                "own",
                "-p",
                "5201:5201",
                "-p",
                "5201:5201/udp",
                "-p",
                "8080:80",
                IMAGE,
                "sh",
                "-c",
                script,
            ],
        )?;
        for (name, network) in [("client", "own"), ("stranger", "other")] {
            self.cli("run", &["-d", "--name", name, "--network", network, IMAGE, "sleep", "100000"])?;
        }
        let format = "{{(index .NetworkSettings.Networks \"own\").IPAddress}}";
        *self.server.borrow_mut() = self.cli("inspect", &["-f", format, "server"])?;
        let address = self.server.borrow().clone();
        let ready = until(Duration::from_secs(30), || {
            let got = self.cli("exec", &["client", "wget", "-q", "-O", "-", &format!("http://{address}/")]);
            got.is_ok_and(|text| text == "hello").then_some(())
        });
        ready.with_context(|| format!("{}: nginx does not answer", self.contender.name()))
    }

    /// A command in a container.
    fn exec(&self, container: &str, words: &[String]) -> Result<String> {
        let words: Vec<&str> = [container].into_iter().chain(words.iter().map(String::as_str)).collect();
        self.cli("exec", &words)
    }

    /// Mbit/s that arrive from `container` at `to`, the server itself if that is empty.
    fn iperf(&self, container: &str, to: &str, udp: bool, size: Size) -> Result<f64> {
        let server = self.server.borrow().clone();
        received(&self.exec(container, &iperf(if to.is_empty() { &server } else { to }, udp, size))?)
    }

    fn iperf_from_outside(&self, udp: bool, size: Size) -> Result<f64> {
        received(&on(self.outside.command("env"), &iperf(HOST, udp, size))?)
    }

    /// New connections a second from the other container, each with one request.
    fn connections(&self, size: Size) -> Result<f64> {
        let url = format!("http://{}:80/", self.server.borrow());
        requests(&self.exec("client", &wrk(&url, size))?)
    }

    fn connections_from_outside(&self, size: Size) -> Result<f64> {
        requests(&on(self.outside.command("env"), &wrk(&format!("http://{HOST}:8080/"), size))?)
    }

    fn connections_from_host(&self, size: Size) -> Result<f64> {
        let command = self.contender.sandbox().net_command("env");
        requests(&on(command, &wrk("http://127.0.0.1:8080/", size))?)
    }

    /// How long many starts at once take until the last one is done.
    fn parallel(&self, size: Size) -> Result<f64> {
        let mut commands: Vec<Command> = (0..size.parallel)
            .map(|_| {
                let mut command = self.contender.command("run");
                command.args(["--rm", IMAGE, "true"]).stdin(Stdio::null());
                command
            })
            .collect();
        let began = Instant::now();
        std::thread::scope(|scope| {
            let tasks: Vec<_> =
                commands.iter_mut().map(|command| scope.spawn(|| say::read(command).map(|_| ()))).collect();
            tasks.into_iter().try_for_each(|task| task.join().unwrap_or_else(|_| bail!("a start panicked")))
        })?;
        Ok(began.elapsed().as_secs_f64() * 1e3)
    }

    /// How long each question for the server's name takes, one after the other.
    fn questions(&self, size: Size) -> Result<Option<Vec<Duration>>> {
        let conf = self.cli("exec", &["client", "cat", "/etc/resolv.conf"])?;
        let server =
            conf.lines().find_map(|line| line.strip_prefix("nameserver ")).unwrap_or_default().to_owned();
        let pid = self.cli("inspect", &["-f", "{{.State.Pid}}", "client"])?;
        let netns = std::fs::File::open(self.contender.sandbox().proc(pid).join("ns/net"))?.into();
        let socket = sandbox::within(&netns, || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect((server.as_str(), 53))?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            Ok::<_, std::io::Error>(socket)
        })?;
        let mut question = b"\0\0\x01\0\0\x01\0\0\0\0\0\0\x06server\0\0\x01\0\x01".to_vec();
        let mut answer = [0; 512];
        let (began, mut times) = (Instant::now(), Vec::new());
        while began.elapsed() < Duration::from_secs(size.seconds) {
            let [high, low] = (times.len() as u16).to_be_bytes();
            question[..2].copy_from_slice(&[high, low]);
            let asked = Instant::now();
            socket.send(&question)?;
            let length = match socket.recv(&mut answer) {
                Ok(length) => length,
                // Its default networks have no names.
                Err(_silence) if times.is_empty() => return Ok(None),
                Err(error) => return Err(error).context("a question without an answer"),
            };
            if length < 12 || answer[..2] != question[..2] || answer[7] == 0 {
                bail!("{}: the name is not known", self.contender.name());
            }
            times.push(asked.elapsed());
        }
        Ok(Some(times))
    }
}

/// The words as the last ones of a command.
fn on(mut command: Command, words: &[String]) -> Result<String> {
    say::read(command.args(words))
}

fn iperf(to: &str, udp: bool, size: Size) -> Vec<String> {
    let seconds = size.seconds.to_string();
    let datagrams: &[&str] = if udp { &["-u", "-b", "0", "-l", "1400"] } else { &[] };
    let words = ["iperf3", "-c", to, "-t", &seconds, "-J"];
    words.iter().chain(datagrams).map(|word| (*word).to_owned()).collect()
}

fn wrk(url: &str, size: Size) -> Vec<String> {
    let seconds = format!("{}s", size.seconds);
    // A header without its blank is no header to wrk: it would keep its connections.
    let words = ["wrk", "-t", "1", "-c", "16", "-d", &seconds, "-H", "Connection: close", url];
    words.map(str::to_owned).to_vec()
}

fn received(text: &str) -> Result<f64> {
    let report: Value = serde_json::from_str(text).context("iperf3's report")?;
    let end = &report["end"];
    let sum =
        if end["sum_received"]["bits_per_second"].is_number() { &end["sum_received"] } else { &end["sum"] };
    let sent = sum["bits_per_second"].as_f64().with_context(|| format!("iperf3: {}", report["error"]))?;
    let lost = end["sum"]["lost_percent"].as_f64().unwrap_or_default();
    Ok(sent * (1.0 - lost / 100.0) / 1e6)
}

fn requests(text: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
    Ok(line.with_context(|| format!("wrk: {text}"))?.trim().parse()?)
}

/// Positions of `count` in turns: forwards, then backwards, so that whoever comes after whom changes.
fn in_turns(count: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |n| if round.is_multiple_of(2) { n } else { count - 1 - n })
}

/// What each kind of network adds to a start.
fn starts(stations: &[Station<'_>], rounds: usize, only: &Only, results: &mut Results) -> Result<()> {
    let networks = ["none", "host", "bridge", "own", "lan"];
    let row = |network: &str| format!("start, {network}");
    if !networks.iter().any(|network| only.wants(&row(network))) {
        return Ok(());
    }
    say::step(&format!("run --rm with each kind of network, {rounds} rounds in turns"));
    let mut times: Vec<BTreeMap<&str, Vec<f64>>> = vec![BTreeMap::new(); stations.len()];
    for round in 0..=rounds {
        for network in in_turns(networks.len(), round).map(|n| networks[n]) {
            for n in in_turns(stations.len(), round) {
                let station = &stations[n];
                if network == "lan" && station.contender.is_podman() {
                    continue;
                }
                let began = Instant::now();
                station.cli("run", &["--rm", "--network", network, IMAGE, "true"])?;
                // The first one fills caches.
                if round > 0 {
                    times[n].entry(network).or_default().push(began.elapsed().as_secs_f64() * 1e3);
                }
            }
        }
    }
    for network in networks {
        let mut rows = Vec::new();
        for (station, times) in stations.iter().zip(&times) {
            let Some(own) = times.get(network) else { continue };
            // Of the same round, so that a machine that is slower for a while is so for both.
            let added: Vec<f64> = own.iter().zip(&times["none"]).map(|(own, none)| own - none).collect();
            let (own, added) = (Spread::of(own), Spread::of(&added));
            say::note(&format!(
                "{network:8} {:24} {:7.1} ms ({:.1} to {:.1}), {:6.1} more than none ({:.1} to {:.1})",
                station.name(),
                own.median,
                own.quarter,
                own.three_quarters,
                added.median,
                added.low,
                added.high
            ));
            rows.push(json!({
                "who": station.name(), "median_ms": own.median, "quartiles_ms": [own.quarter, own.three_quarters],
                "more_than_none_ms": added.median, "of_which_sure": [added.low, added.high], "samples": own.count,
            }));
        }
        results.insert(row(network), Value::Array(rows));
    }
    Ok(())
}

/// One kind of load, contenders in turns.
fn rates(
    what: &str,
    unit: &str,
    stations: &[Station<'_>],
    measure: Measure,
    size: Size,
    results: &mut Results,
) -> Result<()> {
    say::step(what);
    let mut values = vec![Vec::new(); stations.len()];
    for round in 0..size.samples {
        for n in in_turns(stations.len(), round) {
            let station = &stations[n];
            let one = measure(station, size).with_context(|| format!("{}: {what}", station.name()))?;
            values[n].push(one);
        }
    }
    let docker = stations.iter().position(|station| station.contender.is_docker());
    let mut rows = Vec::new();
    for (station, own) in stations.iter().zip(&values) {
        let ratio = docker.map(|docker| spread::ratio(own, &values[docker]));
        let own = Spread::of(own);
        let told = ratio.map_or_else(String::new, |ratio| {
            format!("  {:.2} times docker's ({:.2} to {:.2})", ratio.median, ratio.low, ratio.high)
        });
        say::note(&format!(
            "{:24} {:8.0} {unit} ({:.0} to {:.0}){told}",
            station.name(),
            own.median,
            own.quarter,
            own.three_quarters
        ));
        rows.push(json!({
            "who": station.name(), "median": own.median, "quartiles": [own.quarter, own.three_quarters], "unit": unit,
            "over_docker": ratio.map(|ratio| ratio.median),
            "of_which_sure": ratio.map(|ratio| [ratio.low, ratio.high]), "samples": own.count,
        }));
    }
    results.insert(what.to_owned(), Value::Array(rows));
    Ok(())
}

/// Questions for a container's name, one after the other.
fn names(stations: &[Station<'_>], size: Size, results: &mut Results) -> Result<()> {
    say::step("Names: questions one after the other");
    let mut rows = Vec::new();
    for station in stations {
        let Some(times) = station.questions(size)? else {
            say::note(&format!("{:24} has no name server", station.name()));
            continue;
        };
        let mut times: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e6).collect();
        times.sort_by(f64::total_cmp);
        let rate = times.len() as f64 / (times.iter().sum::<f64>() / 1e6);
        let (half, most) = (Spread::of(&times).median, times[times.len() * 99 / 100]);
        say::note(&format!("{:24} {rate:8.0} 1/s, median {half:.0} µs, p99 {most:.0} µs", station.name()));
        rows.push(json!({ "who": station.name(), "per_second": rate, "median_us": half, "p99_us": most }));
    }
    results.insert(NAMES.to_owned(), Value::Array(rows));
    Ok(())
}
