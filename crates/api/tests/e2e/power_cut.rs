//! A power cut at any moment: the engine's data is on a disk that loses what was not flushed (or some of it, in any
//! order), below a real kernel file system. What was acknowledged is there and whole when the engine starts again, what
//! was not is there whole or not at all, and the next pull goes through.
//!
//! `BRIG_TEST_CUTS=50 cargo nextest run -p brigantine-api --test e2e power_cut:: --no-capture` does it more often.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use brigantine_testkit::disk::{Cut, Disk, Format};
use brigantine_testkit::peers::Registry;
use brigantine_testkit::{Engine, eventually, fixtures, http};

use crate::crash::{Acknowledged, Chance, ORPHANS, no_leftovers, number, runs_whole, sample, tell};

const OPERATIONS: [&str; 7] = ["pull", "load", "commit", "import", "rmi", "push", "prune"];
const ENTRIES: usize = 4;

/// An engine on such a disk.
pub struct Powered {
    pub engine: Engine,
    disk: Option<Disk>,
    boots: u32,
}

impl Powered {
    pub fn new(format: Format) -> Self {
        let mut engine = Engine::start();
        engine.stop_daemon();
        let durable = Disk::format(engine.dir(), format, 400 << 20);
        let disk = Disk::mount(engine.sandbox(), &durable, &engine.data_root());
        engine.restart_daemon();
        Self { engine, disk: Some(disk), boots: 0 }
    }

    pub fn disk(&self) -> &Disk {
        self.disk.as_ref().unwrap()
    }

    /// Takes the disk out of the machine that has lost its power, and starts another one with it.
    pub fn boot(&mut self) {
        self.engine.kill_daemon();
        let durable = self.disk.take().unwrap().take_out(self.engine.sandbox());
        self.disk = Some(Disk::mount(self.engine.sandbox(), &durable, &self.engine.data_root()));
        self.boots += 1;
        // The engine must not take this for the boot in which it wrote what it has.
        let id = self.engine.dir().join("boot_id");
        fs::write(&id, format!("00000000-0000-4000-8000-{:012}\n", self.boots)).unwrap();
        let of_kernel = "/proc/sys/kernel/random/boot_id";
        run(self.engine.sandbox().command("mount").arg("--bind").arg(&id).arg(of_kernel));
        self.engine.restart_daemon();
    }
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn survives(format: Format) {
    let mut chance = Chance::new("power cuts");
    let mut powered = Powered::new(format);
    let registry = Registry::start_ours(&powered.engine);
    let archive = |number: u64, chance: &mut Chance, powered: &Powered| -> (PathBuf, String) {
        let image = sample(&format!("local:{number}"), 2, 300 << 10, chance);
        (image.write(powered.engine.dir(), &format!("local-{number}.tar")), image.id())
    };
    let remote = sample("remote:1", 2, 1 << 20, &mut chance);
    registry.fill(&powered.engine, &remote.write(powered.engine.dir(), "remote.tar"), "remote:1");
    let remote = (format!("{}/remote:1", registry.address()), remote.id());

    let mut acknowledged = Acknowledged::default();
    let mut removed = BTreeSet::new();
    let mut containers = BTreeSet::new();
    let (first, id) = archive(0, &mut chance, &powered);
    powered.engine.load(&first);
    acknowledged.images.insert("local:0".to_owned(), (id, ENTRIES));
    let change = "mkdir /new; for n in $(seq 200); do echo $n > /new/$n; done; ls /data | wc -l";
    powered.engine.brig(["run", "--name", "box", "--network", "none", "local:0", "sh", "-c", change]).ok();
    containers.insert("box".to_owned());
    let mut cut_short = 0;
    let rounds = number("BRIG_TEST_CUTS", OPERATIONS.len() as u64);
    for round in 1..=rounds {
        // What is acknowledged before the cut, then one more operation at the moment of it.
        let name = format!("local:{round}");
        let (path, id) = archive(round, &mut chance, &powered);
        powered.engine.load(&path);
        acknowledged.images.insert(name.clone(), (id, ENTRIES));
        let container = format!("made-{round}");
        powered.engine.brig(["create", "--name", &container, &name]).ok();
        containers.insert(container);
        let operation = OPERATIONS[round as usize % OPERATIONS.len()];
        let target = format!("{operation}ed:{round}");
        let dir = powered.engine.dir().display().to_string();
        let another = archive(rounds + round, &mut chance, &powered);
        // What is pushed is stored on the same disk.
        let store = powered.engine.data_root().join("pushed");
        let target_registry = (operation == "push").then(|| Registry::start_ours_in(&powered.engine, &store));
        let args: Vec<String> = match operation {
            "pull" => vec!["pull".into(), remote.0.clone()],
            "load" => vec!["load".into(), "-i".into(), another.0.display().to_string()],
            "commit" => vec!["commit".into(), "box".into(), target.clone()],
            "import" => vec!["import".into(), format!("{dir}/remote.tar"), target.clone()],
            "push" => {
                let target = pushed_to(target_registry.as_ref().unwrap(), round);
                powered.engine.brig(["tag", &name, &target]).ok();
                vec!["push".into(), target]
            }
            "prune" => {
                powered.engine.load(&another.0);
                vec!["image".into(), "prune".into(), "-af".into()]
            }
            _ => {
                powered.engine.brig(["tag", "local:0", &target]).ok();
                vec!["rmi".into(), target.clone()]
            }
        };
        let mut client = powered.engine.brig(args).spawn();
        std::thread::sleep(chance.of(Duration::from_millis(900)));
        let done = client.try_wait().unwrap().is_some_and(|status| status.success());
        let cut = if round % 2 == 0 { Cut::All } else { Cut::Some { seed: chance.below(u64::MAX) } };
        powered.disk().cut(cut);
        cut_short += u32::from(!done);
        let about = format!("{format:?}, round {round}: {operation}, {cut:?}, acknowledged: {done}");
        drop(target_registry);
        powered.boot();
        client.wait().unwrap();

        let engine = &powered.engine;
        match operation {
            "rmi" if done => drop(removed.insert(target.clone())),
            "prune" if done => drop(removed.insert(format!("local:{}", rounds + round))),
            "push" => is_in_registry(engine, &store, round, (&name, done), &about),
            _ => {}
        }
        let there = |name: &str| engine.request("GET", &format!("/images/{name}/json")).status == 200;
        // A layer that was not synced is made again from its blob when somebody needs it.
        let tolerable: Vec<&str> = ORPHANS.into_iter().chain(["corrupt-layer"]).collect();
        acknowledged.check(engine, &tolerable, &about);
        no_leftovers(&engine.data_root().join("image"), &about);
        for name in &removed {
            assert!(!there(name), "{about}: {name} is back");
        }
        for container in &containers {
            assert_eq!(engine.inspect(container)["Name"], format!("/{container}"), "{about}");
        }
        let (image, entries) = match operation {
            "pull" => (remote.0.clone(), Some(ENTRIES)),
            "load" | "prune" => (format!("local:{}", rounds + round), Some(ENTRIES)),
            "push" => (name.clone(), Some(ENTRIES)),
            "rmi" => ("local:0".to_owned(), Some(ENTRIES)),
            _ => (target, None),
        };
        assert!(
            !done || matches!(operation, "rmi" | "prune") || there(&image),
            "{about}: {image} was acknowledged"
        );
        if there(&image) {
            match entries {
                Some(entries) => runs_whole(engine, &image, entries, &about),
                // A whole root file system, or the archive as one file of it.
                None => drop(engine.brig(["create", "--network", "none", &image, "x"]).ok()),
            }
        }
        // All those of before as well: nothing is lost later on.
        runs_whole(engine, &name, ENTRIES, &about);
        if operation == "pull" {
            engine.brig(["pull", &remote.0]).ok();
            assert_eq!(engine.get(&format!("/images/{}/json", remote.0))["Id"], *remote.1, "{about}");
            runs_whole(engine, &remote.0, ENTRIES, &about);
            engine.brig(["rmi", &remote.0]).ok();
        }
    }
    // Images that nobody acknowledged have layers that nobody needed: a repair takes what is torn of them.
    powered.engine.request("POST", "/system/check?repair=1").expect(200);
    for (name, (_, entries)) in &acknowledged.images {
        runs_whole(&powered.engine, name, *entries, "at the end");
    }
    acknowledged.check(&powered.engine, &ORPHANS, "at the end");
    let cuts = powered.boots;
    tell(&format!("{format:?}: {cuts} cuts, {cut_short} of them before the operation was acknowledged"));
    assert!(powered.disk().flushes() > 0, "nothing was ever flushed");
}

fn pushed_to(registry: &Registry, round: u64) -> String {
    format!("{}/pushed:{round}", registry.address())
}

/// Insists that what was pushed is in the registry, as a whole, if that was acknowledged, and can be pushed otherwise.
#[track_caller]
fn is_in_registry(engine: &Engine, store: &Path, round: u64, (image, done): (&str, bool), about: &str) {
    let registry = Registry::start_ours_in(engine, store);
    let target = pushed_to(&registry, round);
    let id = engine.get(&format!("/images/{image}/json"))["Id"].clone();
    let mut pulled = engine.brig(["pull", &target]).run();
    if pulled.code != 0 {
        assert!(!done && pulled.stderr.contains("not found"), "{about}: {pulled}");
        engine.brig(["tag", image, &target]).ok();
        engine.brig(["push", &target]).ok();
        engine.brig(["rmi", &target]).ok();
        pulled = engine.brig(["pull", &target]).run();
    }
    assert_eq!(pulled.code, 0, "{about}: {pulled}");
    assert_eq!(engine.get(&format!("/images/{target}/json"))["Id"], id, "{about}");
    // Every byte of it, not only what was missing here.
    let (copy, tls) = (engine.dir().join(format!("pushed-{round}.tar")), "--src-tls-verify=false");
    let from = format!("docker://{target}");
    let to = format!("oci-archive:{}", copy.display());
    run(engine.sandbox().command("skopeo").args(["copy", "--insecure-policy", tls, &from, &to]));
    engine.brig(["rmi", &target]).ok();
}

#[test]
fn a_power_cut_costs_nothing_acknowledged_on_ext4() {
    survives(Format::Ext4);
}

#[test]
fn a_power_cut_costs_nothing_acknowledged_on_xfs() {
    survives(Format::Xfs);
}

/// What was acknowledged of containers, volumes and networks.
#[derive(Default)]
struct Records {
    /// Paths that must be there, with a text in what they tell.
    there: BTreeMap<String, String>,
    gone: BTreeSet<String>,
}

/// Makes, changes and removes objects until it is told to stop; what was answered before that is on record.
fn work(socket: &Path, round: u64, stopped: &AtomicBool, records: &Mutex<Records>) {
    let ask = |method: &str, path: &str, body: &str, status: u16| {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        let body = (!body.is_empty()).then_some(("application/json", body.as_bytes()));
        let answer = http::exchange(stream, method, path, body);
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.text());
    };
    for number in 0.. {
        let of = format!("{round}-{number}");
        // Each step's request, then what it makes true.
        type Step<'a> = (&'a str, String, String, u16, Option<(String, String)>, Option<String>);
        let (volume, network) = (format!("/volumes/v{of}"), format!("/networks/n{of}"));
        let (made, renamed) = (format!("/containers/c{of}"), format!("/containers/r{of}"));
        let body = r#"{"Image":"busybox","HostConfig":{"NetworkMode":"none"},"Labels":{"of":"ROUND"}}"#;
        let policy = r#"{"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":7}}"#;
        let inspected = |path: &str, text: &str| Some((format!("{path}/json"), text.to_owned()));
        let steps: [Step<'_>; 7] = [
            (
                "POST",
                "/volumes/create".into(),
                format!(r#"{{"Name":"v{of}","Labels":{{"of":"{of}"}}}}"#),
                201,
                Some((volume.clone(), of.clone())),
                None,
            ),
            (
                "POST",
                format!("/containers/create?name=c{of}"),
                body.replace("ROUND", &of),
                201,
                inspected(&made, &of),
                None,
            ),
            (
                "POST",
                "/networks/create".into(),
                format!(r#"{{"Name":"n{of}","EnableIPv6":false}}"#),
                201,
                Some((network.clone(), of.clone())),
                None,
            ),
            (
                "POST",
                format!("{made}/update"),
                policy.into(),
                200,
                inspected(&made, "\"MaximumRetryCount\":7"),
                None,
            ),
            (
                "POST",
                format!("{made}/rename?name=r{of}"),
                String::new(),
                204,
                inspected(&renamed, "\"MaximumRetryCount\":7"),
                Some(format!("{made}/json")),
            ),
            ("DELETE", network.clone(), String::new(), 204, None, Some(network.clone())),
            ("DELETE", renamed.clone(), String::new(), 204, None, Some(format!("{renamed}/json"))),
        ];
        // Some containers and networks stay: not many, for the address pools have 31.
        let steps = &steps[..if number % 8 == 1 { 5 } else { 7 }];
        for (method, path, body, status, makes, unmakes) in steps {
            // From its request on an object is neither here nor there until the answer.
            let touched = makes.iter().map(|(path, _)| path).chain(unmakes);
            let mut known = records.lock().unwrap();
            for path in touched {
                known.there.remove(path);
                known.gone.remove(path);
            }
            drop(known);
            ask(method, path, body, *status);
            let mut known = records.lock().unwrap();
            if stopped.load(Ordering::SeqCst) {
                // Whether this one is kept nobody promised.
                return;
            }
            if let Some((path, text)) = makes {
                known.there.insert(path.clone(), text.clone());
            }
            known.gone.extend(unmakes.clone());
        }
    }
}

fn records_survive(format: Format) {
    let mut chance = Chance::new("power cuts and records");
    let mut powered = Powered::new(format);
    powered.engine.load(&fixtures::busybox());
    let records = Mutex::new(Records::default());
    for round in 1..=number("BRIG_TEST_CUTS", 3) {
        let stopped = AtomicBool::new(false);
        let cut = if round % 2 == 0 { Cut::All } else { Cut::Some { seed: chance.below(u64::MAX) } };
        let least = records.lock().unwrap().there.len();
        std::thread::scope(|scope| {
            let socket = powered.engine.socket_path();
            let worker = scope.spawn({
                let (stopped, records) = (&stopped, &records);
                move || work(&socket, round, stopped, records)
            });
            eventually("some records", || (records.lock().unwrap().there.len() > least + 4).then_some(()));
            std::thread::sleep(chance.of(Duration::from_millis(700)));
            stopped.store(true, Ordering::SeqCst);
            powered.disk().cut(cut);
            worker.join().unwrap();
        });
        powered.boot();
        let known = records.lock().unwrap();
        for (path, text) in &known.there {
            let answer = powered.engine.request("GET", path);
            assert_eq!(
                answer.status, 200,
                "{format:?}, round {round}, {cut:?}: {path} was acknowledged and is lost"
            );
            assert!(answer.text().contains(text), "{format:?}, round {round}, {cut:?}: {path} has no {text}");
        }
        for path in &known.gone {
            let status = powered.engine.request("GET", path).status;
            assert_eq!(status, 404, "{format:?}, round {round}, {cut:?}: {path} was removed and is back");
        }
        tell(&format!(
            "{format:?}, round {round}: {} records there, {} gone",
            known.there.len(),
            known.gone.len()
        ));
    }
    powered.engine.brig(["run", "--rm", "--network", "none", "busybox", "true"]).ok();
}

#[test]
fn a_power_cut_costs_no_acknowledged_record_on_ext4() {
    records_survive(Format::Ext4);
}

#[test]
fn a_power_cut_costs_no_acknowledged_record_on_xfs() {
    records_survive(Format::Xfs);
}

/// The disk itself: that it forgets, and does not forget too much.
#[test]
fn what_was_not_flushed_is_lost() {
    for format in [Format::Ext4, Format::Xfs] {
        let sandbox = brigantine_testkit::Sandbox::new().unwrap();
        let target = sandbox.dir().join("mnt");
        fs::create_dir(&target).unwrap();
        let durable = Disk::format(sandbox.dir(), format, 400 << 20);
        let disk = Disk::mount(&sandbox, &durable, &target);
        let script =
            "cd $1; mkdir d; echo kept > d/kept; sync -f d; echo lost > lost; echo x >> d/kept; cat lost";
        run(sandbox.command("sh").args(["-ec", script, "sh"]).arg(&target));
        disk.cut(Cut::All);
        let durable = disk.take_out(&sandbox);
        let _disk = Disk::mount(&sandbox, &durable, &target);
        let script = "cd $1; test ! -e lost; test \"$(cat d/kept)\" = kept";
        run(sandbox.command("sh").args(["-ec", script, "sh"]).arg(&target));
    }
}
