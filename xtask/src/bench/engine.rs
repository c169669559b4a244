//! `cargo xtask bench engine`: the Engine API's latencies, throughput and density, side by side with the peers installed.
//!
//! Invariant: all contenders answer the same requests from the same client over a unix socket, in turns within one run,
//! each in a sandbox of its own with the same image. Beside times of throughput stands the processor time of the whole
//! machine: run it on an idle one.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::Read as _,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Stdio},
    sync::Barrier,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use brigantine_testkit::{Response, fixtures, http, until};
use serde_json::{Value, json};

use super::contender::{self, Contender, answers};
use super::figure::busy;
use crate::{build, packages, say};

/// How much of everything.
#[derive(Clone, Copy)]
struct Size {
    /// Containers that lie about while latencies are measured again.
    crowd: usize,
    /// Bytes that a container prints.
    printed: u64,
    /// Idle containers whose memory is counted.
    idle: usize,
    /// Running containers that a daemon finds when it starts.
    running: usize,
}

const FULL: Size = Size { crowd: 1000, printed: 128 << 20, idle: 50, running: 200 };
/// Enough to see that everything works.
const SMALL: Size = Size { crowd: 20, printed: 8 << 20, idle: 3, running: 5 };

/// Containers that are started at once.
const TOGETHER: usize = 32;

/// It ends at once when it is told to.
const POLITE: &str = "trap 'exit 0' TERM; sleep 1000 & wait";

/// All of it; the results go to standard output and, unless it is the `small` form, below `bench/results`.
pub fn run(rounds: usize, small: bool) -> Result<()> {
    packages::install(&[packages::BUILD, packages::TEST])?;
    // As for the tests: executables that are there already.
    let dist = match std::env::var_os("BRIG_TEST_DIST") {
        Some(dist) => PathBuf::from(dist),
        None => build::build(build::Profile::Release)?,
    };
    let size = if small { SMALL } else { FULL };
    say::step("Starting the contenders");
    let contenders = contender::for_api(&dist)?;
    let stations: Vec<Station> =
        contenders.iter().map(|contender| Station::open(contender, size)).collect::<Result<_>>()?;
    let mut results = BTreeMap::new();
    latencies("alone", &stations, rounds, &mut results)?;
    together(&stations, rounds.clamp(1, 5), &mut results)?;
    streams(&stations, size.printed, 3, &mut results)?;
    density(&stations, size.idle, &mut results)?;
    say::step(&format!("Creating {} containers", size.crowd));
    for station in &stations {
        let began = Instant::now();
        station.crowd(size.crowd)?;
        let each = began.elapsed().as_secs_f64() * 1e3 / size.crowd as f64;
        say::note(&format!("{:24} {each:8.2} ms each", station.name()));
    }
    latencies(&format!("with {} containers", size.crowd), &stations, rounds, &mut results)?;
    begins(&stations, size, &mut results)?;
    if small {
        return Ok(());
    }
    super::write("engine", &json!({ "rounds": rounds, "results": results }))
}

/// A contender that answers on a socket.
struct Station<'a> {
    contender: &'a Contender,
    socket: PathBuf,
    /// Podman's service; a daemon belongs to its sandbox.
    service: Option<Child>,
    size: Size,
}

impl Drop for Station<'_> {
    fn drop(&mut self) {
        if let Some(service) = &mut self.service
            && let Err(error) = service.kill().and_then(|()| service.wait())
        {
            say::note(&format!("ending a service: {error}"));
        }
    }
}

impl<'a> Station<'a> {
    fn open(contender: &'a Contender, size: Size) -> Result<Self> {
        let socket = contender.sandbox().dir().join("sock");
        let mut service = None;
        if contender.is_podman() {
            let mut command = contender.command("system");
            command.args(["service", "--time", "0"]).arg(format!("unix://{}", socket.display()));
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            service = Some(command.spawn()?);
            until(Duration::from_secs(30), || answers(&socket).then_some(()))
                .context("podman's service does not answer")?;
        }
        let station = Self { contender, socket, service, size };
        let archive = fs::read(fixtures::busybox())?;
        let stream = station.connect()?;
        let loaded =
            http::exchange(stream, "POST", "/images/load?quiet=1", Some(("application/x-tar", &archive)));
        ensure(&loaded, &[200], "load")?;
        Ok(station)
    }

    fn name(&self) -> &str {
        self.contender.name()
    }

    fn connect(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(&self.socket).with_context(|| self.name().to_owned())?;
        stream.set_read_timeout(Some(Duration::from_mins(2)))?;
        Ok(stream)
    }

    /// One request that must answer one of `statuses`.
    fn ask(&self, method: &str, path: &str, body: Option<&Value>, statuses: &[u16]) -> Result<Response> {
        let text = body.map(ToString::to_string);
        let body = text.as_ref().map(|text| ("application/json", text.as_bytes()));
        let answer = http::exchange(self.connect()?, method, path, body);
        ensure(&answer, statuses, &format!("{}: {method} {path}", self.name()))?;
        Ok(answer)
    }

    /// A new container that runs `script`; its id.
    fn create(&self, script: &str, more: Value) -> Result<String> {
        let mut host = json!({
            // What podman would set is more than root may have on some machines.
            "Ulimits": [{ "Name": "nofile", "Soft": 1024, "Hard": 1024 }, { "Name": "nproc", "Soft": 1024, "Hard": 1024 }],
            "NetworkMode": "none",
        });
        if self.contender.is_podman() {
            host["CgroupParent"] = format!("/{}", self.contender.sandbox().cgroup()).into();
        }
        if let (Value::Object(host), Value::Object(more)) = (&mut host, more) {
            host.extend(more);
        }
        let body = json!({ "Image": "busybox", "Cmd": ["sh", "-c", script], "HostConfig": host });
        let answer = self.ask("POST", "/containers/create", Some(&body), &[201])?;
        Ok(answer.json()["Id"].as_str().context("no id")?.to_owned())
    }

    fn remove(&self, id: &str) -> Result<()> {
        self.ask("DELETE", &format!("/containers/{id}?force=1"), None, &[200, 204]).map(drop)
    }

    fn crowd(&self, count: usize) -> Result<()> {
        (0..count).try_for_each(|_| self.create("true", json!({})).map(drop))
    }

    /// How long each request of a container's life takes.
    fn life(&self) -> Result<Vec<(&'static str, Duration)>> {
        let mut times = Vec::new();
        let mut timed = |what: &'static str, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
            let began = Instant::now();
            work()?;
            times.push((what, began.elapsed()));
            Ok(())
        };
        let mut id = String::new();
        timed("create", &mut || {
            id = self.create(POLITE, json!({}))?;
            Ok(())
        })?;
        timed("start", &mut || self.ask("POST", &format!("/containers/{id}/start"), None, &[204]).map(drop))?;
        timed("inspect", &mut || self.ask("GET", &format!("/containers/{id}/json"), None, &[200]).map(drop))?;
        timed("list running", &mut || self.ask("GET", "/containers/json", None, &[200]).map(drop))?;
        timed("list all", &mut || self.ask("GET", "/containers/json?all=1", None, &[200]).map(drop))?;
        timed("exec true, to its end", &mut || self.exec(&id))?;
        timed("stop", &mut || {
            self.ask("POST", &format!("/containers/{id}/stop?t=10"), None, &[204]).map(drop)
        })?;
        timed("remove", &mut || self.remove(&id))?;
        Ok(times)
    }

    /// Starts [`TOGETHER`] containers at once, and one alone before: how long each start takes.
    fn together(&self) -> Result<(Duration, Vec<Duration>)> {
        // A thread has the socket and nothing else of the station.
        let socket = self.socket.as_path();
        let start = |id: &str| -> Result<Duration> {
            let stream = UnixStream::connect(socket)?;
            stream.set_read_timeout(Some(Duration::from_mins(2)))?;
            let began = Instant::now();
            let path = format!("/containers/{id}/start");
            ensure(&http::exchange(stream, "POST", &path, None), &[204], &path)?;
            Ok(began.elapsed())
        };
        let alone = self.create(POLITE, json!({}))?;
        let single = start(&alone)?;
        self.remove(&alone)?;
        let ids = (0..TOGETHER).map(|_| self.create(POLITE, json!({}))).collect::<Result<Vec<_>>>()?;
        let barrier = Barrier::new(ids.len());
        let times = std::thread::scope(|scope| {
            let threads: Vec<_> = ids
                .iter()
                .map(|id| {
                    scope.spawn(|| {
                        barrier.wait();
                        start(id)
                    })
                })
                .collect();
            let joined = threads.into_iter().map(|t| t.join().map_err(|_panic| anyhow!("a start panicked")));
            joined.map(|time| time.and_then(|time| time)).collect::<Result<Vec<_>>>()
        });
        for id in &ids {
            self.remove(id)?;
        }
        Ok((single, times?))
    }

    fn exec(&self, id: &str) -> Result<()> {
        let body = json!({ "Cmd": ["true"], "AttachStdout": true, "AttachStderr": true });
        let made = self.ask("POST", &format!("/containers/{id}/exec"), Some(&body), &[201])?.json();
        let exec = made["Id"].as_str().context("no exec id")?;
        let (head, mut stream) =
            http::hijack(self.connect()?, &format!("/exec/{exec}/start"), "{\"Detach\":false}", true);
        ensure(&head, &[101, 200], "exec start")?;
        stream.read_to_end(&mut Vec::new())?;
        let state = self.ask("GET", &format!("/exec/{exec}/json"), None, &[200])?.json();
        if state["ExitCode"] != 0 {
            bail!("{}: an exec ended with {}", self.name(), state["ExitCode"]);
        }
        Ok(())
    }

    /// A container prints as fast as it can, into its log: how long until it has ended.
    fn log(&self) -> Result<(Duration, Duration)> {
        let line = "0123456789".repeat(10);
        let options =
            json!({ "LogConfig": { "Type": "json-file", "Config": { "max-size": "50m", "max-file": "2" } } });
        let id = self.create(&format!("yes {line} | head -c {}", self.size.printed), options)?;
        let (before, began) = (busy()?, Instant::now());
        self.ask("POST", &format!("/containers/{id}/start"), None, &[204])?;
        self.ask("POST", &format!("/containers/{id}/wait"), None, &[200])?;
        let took = (began.elapsed(), busy()?.saturating_sub(before));
        self.remove(&id)?;
        Ok(took)
    }

    /// The same to an attached client, without a log.
    fn attach(&self) -> Result<(Duration, Duration)> {
        let options = json!({ "LogConfig": { "Type": "none" } });
        let id = self.create(&format!("head -c {} /dev/zero", self.size.printed), options)?;
        let path = format!("/containers/{id}/attach?stream=1&stdout=1&stderr=1");
        let (head, mut stream) = http::hijack(self.connect()?, &path, "", true);
        ensure(&head, &[101, 200], "attach")?;
        let (before, began) = (busy()?, Instant::now());
        self.ask("POST", &format!("/containers/{id}/start"), None, &[204])?;
        let mut total = 0_u64;
        let mut buffer = vec![0; 256 << 10];
        loop {
            match stream.read(&mut buffer)? {
                0 => break,
                n => total += n as u64,
            }
        }
        let took = (began.elapsed(), busy()?.saturating_sub(before));
        if total < self.size.printed {
            bail!("{}: {total} bytes of {} came", self.name(), self.size.printed);
        }
        self.remove(&id)?;
        Ok(took)
    }

    /// Private KiB of each of `count` idle containers' monitors, and how much less memory there is with each.
    fn idle(&self, count: usize) -> Result<(f64, f64)> {
        let before = available()?;
        let mut ids = Vec::new();
        for _ in 0..count {
            let id = self.create("exec sleep 1000", json!({}))?;
            self.ask("POST", &format!("/containers/{id}/start"), None, &[204])?;
            ids.push(id);
        }
        // A moment to settle; nothing reports that.
        std::thread::sleep(Duration::from_secs(2));
        let less = before.saturating_sub(available()?) as f64 / count as f64;
        let mut private = 0;
        for id in &ids {
            let state = self.ask("GET", &format!("/containers/{id}/json"), None, &[200])?.json();
            private += self.contender.monitor_memory(&state["State"]["Pid"].to_string())?;
        }
        for id in &ids {
            self.remove(id)?;
        }
        Ok((private as f64 / count as f64, less))
    }
}

fn ensure(answer: &Response, statuses: &[u16], what: &str) -> Result<()> {
    if statuses.contains(&answer.status) {
        return Ok(());
    }
    bail!("{what}: {} {}", answer.status, answer.text())
}

/// KiB of memory that could still be used.
fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).context("no MemAvailable")?;
    Ok(line.split_ascii_whitespace().next().context("no MemAvailable")?.parse()?)
}

fn median(times: &[Duration]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}

fn latencies(
    when: &str,
    stations: &[Station<'_>],
    rounds: usize,
    results: &mut BTreeMap<String, Value>,
) -> Result<()> {
    say::step(&format!("Latencies {when}, {rounds} rounds in turns"));
    let mut all: Vec<BTreeMap<&'static str, Vec<Duration>>> = vec![BTreeMap::new(); stations.len()];
    for round in 0..=rounds {
        for (station, times) in stations.iter().zip(&mut all) {
            for (what, took) in station.life()? {
                // The first one fills caches.
                if round > 0 {
                    times.entry(what).or_default().push(took);
                }
            }
        }
    }
    let docker = stations.iter().position(|station| station.contender.is_docker());
    let verbs: Vec<&str> = all.first().map(|times| times.keys().copied().collect()).unwrap_or_default();
    for verb in verbs {
        let mut rows = Vec::new();
        for (station, times) in stations.iter().zip(&all) {
            let own = median(&times[verb]);
            let ratio = docker.map(|docker| median(&all[docker][verb]) / own);
            let told =
                ratio.map_or_else(String::new, |ratio| format!("  docker takes {ratio:.1} times as long"));
            say::note(&format!("{verb:22} {:24} median {own:8.2} ms{told}", station.name()));
            rows.push(json!({ "who": station.name(), "median_ms": own, "docker_over_this": ratio }));
        }
        results.insert(format!("{verb}, {when}"), Value::Array(rows));
    }
    Ok(())
}

/// Many starts at once: the slowest against what the processors could do at best, one start after the other on each.
fn together(stations: &[Station<'_>], rounds: usize, results: &mut BTreeMap<String, Value>) -> Result<()> {
    say::step(&format!("{TOGETHER} starts at once, {rounds} rounds in turns"));
    let mut all = vec![(Vec::new(), Vec::new()); stations.len()];
    for _ in 0..rounds {
        for (station, (alone, times)) in stations.iter().zip(&mut all) {
            let (single, many) = station.together()?;
            alone.push(single);
            times.extend(many);
        }
    }
    let processors = std::thread::available_parallelism()?.get();
    let mut rows = Vec::new();
    for (station, (alone, times)) in stations.iter().zip(&mut all) {
        times.sort_unstable();
        let p99 = times[(times.len() * 99).div_ceil(100) - 1].as_secs_f64() * 1e3;
        let (single, p50) = (median(alone), median(times));
        let best = single * TOGETHER.div_ceil(processors) as f64;
        say::note(&format!(
            "{:24} alone {single:8.2} ms; of {TOGETHER} p50 {p50:8.1} ms, p99 {p99:8.1} ms: {:.2} times {} starts in a row",
            station.name(),
            p99 / best,
            TOGETHER.div_ceil(processors),
        ));
        rows.push(json!({
            "who": station.name(), "alone_ms": single, "p50_ms": p50, "p99_ms": p99, "p99_over_in_a_row": p99 / best,
        }));
    }
    results.insert(format!("{TOGETHER} starts at once"), Value::Array(rows));
    Ok(())
}

type Streaming = for<'a, 'b> fn(&'a Station<'b>) -> Result<(Duration, Duration)>;

fn streams(
    stations: &[Station<'_>],
    printed: u64,
    rounds: usize,
    results: &mut BTreeMap<String, Value>,
) -> Result<()> {
    let kinds: [(&str, Streaming); 2] =
        [("log throughput", |one| one.log()), ("attach throughput", |one| one.attach())];
    for (what, measure) in kinds {
        say::step(&format!("{what}: {} MiB, {rounds} rounds in turns", printed >> 20));
        let mut all = vec![Vec::new(); stations.len()];
        for _ in 0..rounds {
            for (station, times) in stations.iter().zip(&mut all) {
                times.push(measure(station)?);
            }
        }
        let mut rows = Vec::new();
        for (station, times) in stations.iter().zip(&all) {
            let wall = median(&times.iter().map(|(wall, _)| *wall).collect::<Vec<_>>());
            let cpu = median(&times.iter().map(|(_, cpu)| *cpu).collect::<Vec<_>>());
            let speed = printed as f64 / 1e3 / wall;
            say::note(&format!("{:24} {speed:8.0} MB/s  CPU {cpu:6.0} ms", station.name()));
            rows.push(json!({ "who": station.name(), "mb_per_s": speed, "cpu_ms": cpu }));
        }
        results.insert(what.to_owned(), Value::Array(rows));
    }
    Ok(())
}

fn density(stations: &[Station<'_>], count: usize, results: &mut BTreeMap<String, Value>) -> Result<()> {
    say::step(&format!("Memory of {count} idle containers"));
    let mut rows = Vec::new();
    for station in stations {
        let (monitor, less) = station.idle(count)?;
        let mut told = format!(
            "{:24} monitor {monitor:8.0} KiB private each; {less:8.0} KiB less memory each",
            station.name()
        );
        let mut row = json!({ "who": station.name(), "monitor_kib": monitor, "memory_kib": less });
        // What the rest of the machine takes meanwhile is as much as a few containers do.
        if count >= FULL.idle && less > 0.0 {
            let fit = available()? as f64 / less;
            write!(told, "; {fit:.0} would fit here")?;
            row["would_fit"] = fit.into();
        }
        say::note(&told);
        rows.push(row);
    }
    results.insert("density".to_owned(), Value::Array(rows));
    Ok(())
}

/// How long a daemon takes to answer that finds many containers, of them some running (ours; the others without).
fn begins(stations: &[Station<'_>], size: Size, results: &mut BTreeMap<String, Value>) -> Result<()> {
    say::step(&format!(
        "Start of a daemon that finds {} stopped containers and, ours, {} running",
        size.crowd, size.running
    ));
    let mut rows = Vec::new();
    for station in stations.iter().filter(|station| !station.contender.is_podman()) {
        let ours = !station.contender.is_docker();
        if ours {
            for _ in 0..size.running {
                let id = station.create("exec sleep 1000", json!({}))?;
                station.ask("POST", &format!("/containers/{id}/start"), None, &[204])?;
            }
        }
        let mut times = Vec::new();
        for _ in 0..3 {
            times.push(station.contender.restart()?);
        }
        let took = median(&times);
        let running = if ours { size.running } else { 0 };
        say::note(&format!("{:24} {took:8.0} ms ({running} running)", station.name()));
        rows.push(json!({ "who": station.name(), "median_ms": took, "running": running }));
    }
    results.insert("daemon start".to_owned(), Value::Array(rows));
    Ok(())
}
