//! `cargo xtask bench runtime`: the OCI command line, side by side with the runtimes that are installed and with the least
//! that makes a container at all (`crates/runtime/examples/floor.rs`).
//!
//! Invariant: everybody does the same in turns within one run, each turn in another order, for what one leaves the kernel
//! to clear away is paid by who comes next; on the same bundles, in a mount namespace that shows
//! version 1 cgroups alone where the machine has both (crun before 1.9 refuses a hybrid) and keeps the records of
//! containers in memory, where `/run` is on every distribution. The mount namespace is made by
//! running this program again.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::{build, packages, root, say};

/// Set in the second run.
const INSIDE: &str = "BRIG_BENCH_RUNTIME_INSIDE";

/// Milliseconds in which the kernel has cleared away what the container before has left, and has sent the processors to
/// sleep, as for who starts a container now and then.
const REST: u64 = 3;

/// One runtime.
struct Contender {
    name: String,
    exe: PathBuf,
}

/// All of it; the results go to standard output and below `bench/results`.
pub fn run(rounds: usize) -> Result<()> {
    let Some(work) = std::env::var_os(INSIDE).map(PathBuf::from) else { return outside(rounds) };
    let mut contenders = vec![Contender { name: "brig-runtime".to_owned(), exe: work.join("brig-runtime") }];
    for name in ["crun", "runc", "youki"] {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path)
            .chain([PathBuf::from("/usr/sbin")])
            .map(|d| d.join(name))
            .find(|p| p.is_file());
        let Some(exe) = found else {
            say::note(&format!("{name} is not installed: left out"));
            continue;
        };
        let said = say::read(Command::new(&exe).arg("--version"))?;
        let version = said.split_whitespace().find(|w| w.starts_with(|c: char| c.is_ascii_digit()));
        let contender = Contender { name: format!("{name} {}", version.unwrap_or("?")), exe };
        // A peer that was built without this machine's cgroups, say, is no reason to measure nobody.
        let tried = run_command(&work, &contender, "bare", "tried").output()?;
        if tried.status.success() {
            contenders.push(contender);
        } else {
            let said = String::from_utf8_lossy(&tried.stderr);
            let said = said.lines().find(|l| !l.is_empty()).unwrap_or_default();
            say::note(&format!("{} runs no container here and is left out: {said}", contender.name));
        }
    }
    let mut results = serde_json::Map::new();
    for bundle in ["bare", "docker"] {
        for (task, rest) in [("run", 0), ("run", REST), ("create+start+delete", 0)] {
            let after = if rest == 0 { String::new() } else { format!(", {rest} ms of rest before each") };
            say::step(&format!("{task} of /bin/true, {bundle} spec, {rounds} rounds in turns{after}"));
            let rows = measure(&work, &contenders, bundle, task, rounds, Duration::from_millis(rest))?;
            results.insert(format!("{task}, {bundle}{after}"), rows);
        }
    }
    say::step("Most memory held by a command (ru_maxrss of run), and the start under a limit of 1 MiB");
    let mut rows = Vec::new();
    for contender in &contenders {
        let kib = peak(&work, contender)?;
        let small = run_command(&work, contender, "small", "small").output()?;
        let starts = small.status.success();
        let said = String::from_utf8_lossy(&small.stderr).lines().next_back().unwrap_or_default().to_owned();
        if !starts {
            Command::new(&contender.exe)
                .arg("--root")
                .arg(work.join("state"))
                .args(["delete", "-f", "small"])
                .output()?;
        }
        let word = if starts { "starts" } else { "does not start" };
        say::note(&format!("{:20} {kib:>8} KiB   with 1 MiB: {word} {said}", contender.name));
        rows.push(json!({ "who": contender.name, "max_rss_kib": kib, "starts_with_1_mib": starts }));
    }
    results.insert("memory".to_owned(), Value::Array(rows));
    record(rounds, &Value::Object(results))
}

/// Builds, makes the bundles, and runs this again in a mount namespace.
fn outside(rounds: usize) -> Result<()> {
    packages::install(&[packages::BUILD, &[("busybox-static", &["busybox"])], RUNTIMES])?;
    say::step("Building brig-runtime and the floor");
    let work = tempfile::Builder::new().prefix("brig-bench-").tempdir()?;
    for (package, kind, name) in
        [("brigantine-shim", "--bin", "brig-runtime"), ("brigantine-runtime", "--example", "floor")]
    {
        let built = build::statically(build::Profile::Release, &["--package", package, kind, name])?;
        let built = if kind == "--example" { built.join("examples") } else { built };
        fs::copy(built.join(name), work.path().join(name))?;
    }
    bundles(work.path())?;
    say::run(
        Command::new(work.path().join("floor"))
            .arg("filter")
            .args([work.path().join("docker/config.json"), work.path().join("filter")]),
    )?;
    fs::create_dir(work.path().join("state"))?;
    let script = "umount -l /sys/fs/cgroup/unified 2>/dev/null; mount -t tmpfs tmpfs \"$BRIG_BENCH_RUNTIME_INSIDE/state\"; exec \"$0\" bench runtime --rounds \"$1\"";
    say::run(
        Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", script])
            .arg(std::env::current_exe()?)
            .arg(rounds.to_string())
            .env(INSIDE, work.path()),
    )
}

const RUNTIMES: &[packages::Need] = &[("runc", &["runc"]), ("crun", &["crun"])];

/// A root file system of busybox with three specs.
fn bundles(work: &Path) -> Result<()> {
    let rootfs = work.join("rootfs");
    for dir in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    fs::copy("/bin/busybox", rootfs.join("bin/busybox"))?;
    std::os::unix::fs::symlink("busybox", rootfs.join("bin/true"))?;
    let runtime = work.join("brig-runtime");
    for name in ["bare", "docker", "small"] {
        let dir = work.join(name);
        fs::create_dir(&dir)?;
        say::run(Command::new(&runtime).args(["spec", "--bundle"]).arg(&dir))?;
        let file = dir.join("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&file)?)?;
        spec["ociVersion"] = json!("1.0.2");
        spec["process"]["terminal"] = json!(false);
        spec["process"]["args"] = json!(["/bin/true"]);
        spec["root"]["path"] = json!(rootfs);
        let namespaces = spec["linux"]["namespaces"].as_array_mut().context("namespaces")?;
        namespaces.retain(|n| n["type"] != "cgroup");
        if name == "docker" {
            dockers(&mut spec)?;
        }
        if name == "small" {
            spec["linux"]["resources"]["memory"] = json!({ "limit": 1 << 20 });
        }
        fs::write(&file, spec.to_string())?;
    }
    Ok(())
}

/// What docker asks for by default, and limits.
fn dockers(spec: &mut Value) -> Result<()> {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    spec["process"]["capabilities"] =
        json!({ "bounding": capabilities, "effective": capabilities, "permitted": capabilities });
    spec["process"]["noNewPrivileges"] = json!(false);
    let rule = |major: u64, minor: u64| json!({ "allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm" });
    let devices: Vec<Value> = [json!({ "allow": false, "access": "rwm" })]
        .into_iter()
        .chain([(1, 5), (1, 3), (1, 9), (1, 8), (5, 0), (5, 1)].map(|(major, minor)| rule(major, minor)))
        .collect();
    spec["linux"]["resources"] = json!({
        "devices": devices,
        "memory": { "limit": 512 << 20, "swap": 512 << 20 },
        "cpu": { "shares": 512, "quota": 50_000, "period": 100_000 },
        "pids": { "limit": 100 },
    });
    let profile = fs::read(root().join("crates/runtime/resources/seccomp-default.json"))?;
    let profile: Value = serde_json::from_slice(&profile)?;
    let rules = profile["syscalls"].as_array().context("the profile has rules")?;
    // Those for everybody and for this architecture: what the engine sends, all but a few.
    let for_all = |r: &&Value| {
        let empty = |k: &str| r[k].as_object().is_none_or(serde_json::Map::is_empty);
        let arches = r["includes"]["arches"].as_array();
        empty("excludes") && (empty("includes") || arches.is_some_and(|a| a.iter().any(|a| a == "amd64")))
    };
    let plain: Vec<Value> = rules
        .iter()
        .filter(for_all)
        .map(|r| {
            let mut rule = r.clone();
            if let Some(fields) = rule.as_object_mut() {
                fields.retain(|key, value| {
                    matches!(key.as_str(), "names" | "action" | "args" | "errnoRet") && !value.is_null()
                });
            }
            rule
        })
        .collect();
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": plain,
    });
    Ok(())
}

fn run_command(work: &Path, contender: &Contender, bundle: &str, id: &str) -> Command {
    let mut command = Command::new(&contender.exe);
    command.arg("--root").arg(work.join("state")).args(["run", "--bundle"]).arg(work.join(bundle)).arg(id);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn timed(command: &mut Command) -> Result<Duration> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let began = Instant::now();
    // Descriptors may be inherited by a container that goes on, so nothing is read until it is known to have failed.
    let mut child = command.spawn()?;
    let status = child.wait()?;
    let took = began.elapsed();
    if !status.success() {
        let mut said = String::new();
        if let Some(mut err) = child.stderr.take() {
            std::io::Read::read_to_string(&mut err, &mut said)?;
        }
        bail!("{} ended with {status}: {said}", say::spelled(command));
    }
    Ok(took)
}

fn measure(
    work: &Path,
    contenders: &[Contender],
    bundle: &str,
    task: &str,
    rounds: usize,
    rest: Duration,
) -> Result<Value> {
    let mut names: Vec<&str> = contenders.iter().map(|c| c.name.as_str()).collect();
    let floors = floors(work, bundle);
    if task == "run" {
        names.extend(floors.iter().map(|(name, _)| *name));
    }
    let mut times = vec![Vec::new(); names.len()];
    let mut order: Vec<usize> = (0..names.len()).collect();
    let mut random = 1;
    for round in 0..=rounds {
        shuffle(&mut order, &mut random);
        for &n in &order {
            std::thread::sleep(rest);
            let took = match contenders.get(n) {
                Some(contender) if task == "run" => timed(&mut run_command(work, contender, bundle, "one"))?,
                Some(contender) => in_steps(work, contender, bundle)?,
                None => timed(Command::new(work.join("floor")).args(&floors[n - contenders.len()].1))?,
            };
            // The first one fills caches.
            if round > 0 {
                times[n].push(took);
            }
        }
    }
    let of = |n: usize, share: f64| {
        let mut sorted = times[n].clone();
        sorted.sort_unstable();
        let at = ((sorted.len() - 1) as f64 * share).round() as usize;
        sorted[at].as_secs_f64() * 1e3
    };
    let ours = of(0, 0.5);
    let mut rows = Vec::new();
    for (n, name) in names.iter().enumerate() {
        let (least, median) = (of(n, 0.0), of(n, 0.5));
        say::note(&format!(
            "{name:20} median {median:7.2} ms  (min {least:.2})  {:.2} of ours",
            median / ours
        ));
        rows.push(json!({ "who": name, "median_ms": median, "min_ms": least, "over_ours": median / ours, "min_over_ours": least / of(0, 0.0) }));
    }
    Ok(Value::Array(rows))
}

/// What each floor is called, and its arguments.
fn floors(work: &Path, bundle: &str) -> [(&'static str, Vec<PathBuf>); 3] {
    let least = [work.join("rootfs"), PathBuf::from("/bin/true")];
    let grouped = [&least[..], &[PathBuf::from("brig-bench-floor")]].concat();
    let mut whole = grouped.clone();
    whole.push(PathBuf::from(bundle));
    whole.extend((bundle == "docker").then(|| work.join("filter")));
    [("floor", least.to_vec()), ("floor, cgroups", grouped), ("floor, whole spec", whole)]
}

/// The same orders in every run of the benchmark.
fn shuffle(order: &mut [usize], random: &mut u64) {
    for last in (1..order.len()).rev() {
        // Knuth's linear congruential generator; its high bits are the good ones.
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(last, (*random >> 33) as usize % (last + 1));
    }
}

/// The three commands' time together; not what passes until the program has ended.
fn in_steps(work: &Path, contender: &Contender, bundle: &str) -> Result<Duration> {
    let pid_file = work.join("pid");
    let words = |all: &[&str]| {
        let mut command = Command::new(&contender.exe);
        command.arg("--root").arg(work.join("state")).args(all);
        command
    };
    let mut create = words(&["create", "--bundle"]);
    create.arg(work.join(bundle)).arg("--pid-file").arg(&pid_file).arg("two");
    let mut took = timed(&mut create)?;
    let pid = fs::read_to_string(&pid_file)?;
    took += timed(&mut words(&["start", "two"]))?;
    let ended = brigantine_testkit::until(Duration::from_secs(10), || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next());
        matches!(state, None | Some("Z" | "X")).then_some(())
    });
    if ended.is_none() {
        bail!("{}: /bin/true does not end", contender.name);
    }
    Ok(took + timed(&mut words(&["delete", "two"]))?)
}

/// KiB, the most of five.
fn peak(work: &Path, contender: &Contender) -> Result<u64> {
    let mut most = 0;
    for _ in 0..5 {
        let mut command = run_command(work, contender, "docker", "three");
        let child = command.spawn()?;
        let (code, kib) = brigantine_sys::process::wait_with_peak(child.id())?;
        if code != 0 {
            bail!("{} ended with {code}", contender.name);
        }
        most = most.max(kib);
    }
    Ok(most)
}

fn record(rounds: usize, results: &Value) -> Result<()> {
    let date = say::read(Command::new("date").args(["-u", "+%Y-%m-%d"]))?.trim().to_owned();
    let commit = say::read(Command::new("git").args(["rev-parse", "--short", "HEAD"]).current_dir(root()));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let all = json!({
        "date": date, "commit": commit.unwrap_or_default().trim(), "kernel": kernel.trim(), "cores": cores,
        "load": load.trim(), "rounds": rounds, "results": results,
    });
    let path = root().join(format!("bench/results/runtime-{date}.json"));
    fs::write(&path, serde_json::to_string_pretty(&all)? + "\n")
        .with_context(|| path.display().to_string())?;
    say::step(&format!("Written to {}", path.display()));
    Ok(())
}
