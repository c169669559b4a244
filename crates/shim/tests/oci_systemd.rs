//! The systemd cgroup driver, against a message bus (the reference daemon) and a stand-in for systemd: what is
//! asked for, what becomes of it, and that nothing stays.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod bundle;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bundle::{Bundle, Done, eventually};
use serde_json::{Value, json};

struct Bus {
    dir: tempfile::TempDir,
    top: String,
    daemon: Child,
    systemd: Child,
}

impl Bus {
    fn start(bundle: &Bundle) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("bus");
        let config = format!(
            "<busconfig><listen>unix:path={}</listen><auth>EXTERNAL</auth><policy context='default'>\
             <allow send_destination='*'/><allow own='*'/><allow eavesdrop='true'/></policy></busconfig>",
            socket.display()
        );
        fs::write(dir.path().join("bus.conf"), config).unwrap();
        let quiet = |command: &mut Command| command.stdin(Stdio::null()).spawn().unwrap();
        let conf = dir.path().join("bus.conf");
        let daemon = quiet(Command::new("dbus-daemon").arg("--nofork").arg("--config-file").arg(conf));
        eventually("the bus listens", || socket.exists());
        let top = format!("{}.top", bundle.id);
        // Brought along: the test may run where its source is not.
        let stand_in = dir.path().join("fake_systemd.py");
        fs::write(&stand_in, include_str!("fake_systemd.py")).unwrap();
        let systemd = quiet(
            Command::new("/usr/bin/python3")
                .arg(&stand_in)
                .arg(dir.path().join("log"))
                .arg(&top)
                .env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}", socket.display())),
        );
        let bus = Self { dir, top, daemon, systemd };
        eventually("systemd's stand-in is there", || !bus.log().is_empty());
        bus
    }

    fn address(&self) -> String {
        format!("unix:path={}/bus,guid=0123", self.dir.path().display())
    }

    fn log(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn calls(&self, name: &str) -> Vec<Value> {
        self.log().into_iter().filter(|c| c["call"] == name).collect()
    }

    fn run(&self, bundle: &Bundle, words: &[&str]) -> Done {
        let out = bundle.path("systemd.out");
        let mut command = bundle.command();
        command.env("DBUS_SYSTEM_BUS_ADDRESS", self.address()).arg("--systemd-cgroup").args(words);
        // Files, for a container that stays holds them.
        command.stdout(fs::File::create(&out).unwrap());
        command.stderr(fs::File::create(format!("{out}.err")).unwrap());
        let status = command.status().unwrap();
        let read = |file: &str| fs::read_to_string(file).unwrap();
        Done { code: status.code().unwrap(), out: read(&out), err: read(&format!("{out}.err")) }
    }

    /// What is left in any hierarchy.
    fn left(&self) -> Vec<PathBuf> {
        let mut left = Vec::new();
        for root in ["/sys/fs/cgroup".into(), "/sys/fs/cgroup".into()].into_iter().chain(hierarchies()) {
            let top: PathBuf = Path::new(&root).join(&self.top);
            let Ok(slices) = fs::read_dir(&top) else { continue };
            for slice in slices.flatten().filter(|e| e.path().is_dir()) {
                let scopes = fs::read_dir(slice.path()).unwrap().flatten();
                left.extend(scopes.map(|e| e.path()).filter(|p| p.is_dir()));
            }
        }
        left
    }
}

fn hierarchies() -> impl Iterator<Item = PathBuf> {
    fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|e| e.path()).filter(|p| p.is_dir())
}

impl Drop for Bus {
    fn drop(&mut self) {
        for child in [&mut self.systemd, &mut self.daemon] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        for root in hierarchies().chain(["/sys/fs/cgroup".into()]) {
            let top = root.join(&self.top);
            for slice in fs::read_dir(&top).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
                fs::remove_dir(slice.path()).ok();
            }
            fs::remove_dir(&top).ok();
        }
    }
}

#[test]
fn a_container_gets_a_scope_of_its_own() {
    let bundle = Bundle::new(&["/bin/sh", "-c", "cat /proc/self/cgroup; sleep 1000"]);
    let bus = Bus::start(&bundle);
    let id = bundle.id.as_str();
    bundle.configure(|c| {
        c["linux"]["cgroupsPath"] = json!(format!("test-a.slice:brig:{id}"));
        c["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 19},
            "cpu": {"shares": 512, "quota": 30000, "period": 100_000}});
        c["annotations"]["org.systemd.property.TimeoutStopSec"] = json!("7");
        c["annotations"]["org.systemd.property.CollectMode"] = json!("'inactive-or-failed'");
    });
    let done = bus.run(&bundle, &["run", "-d", "--bundle", bundle.dir(), id]);
    assert_eq!((done.code, done.err.as_str()), (0, ""));
    let name = format!("brig-{id}.scope");
    let start = bus.calls("start").remove(0);
    assert_eq!((&start["name"], &start["mode"]), (&json!(name), &json!("replace")));
    let p = &start["properties"];
    for (key, value) in [
        ("Slice", json!("test-a.slice")),
        ("Delegate", json!(true)),
        ("DefaultDependencies", json!(false)),
        ("MemoryAccounting", json!(true)),
        ("TasksMax", json!(19)),
        ("CPUQuotaPerSecUSec", json!(300_000)),
        ("TimeoutStopUSec", json!(7_000_000)),
        ("CollectMode", json!("inactive-or-failed")),
    ] {
        assert_eq!(p[key], value, "{key}: {p}");
    }
    assert!(p["MemoryLimit"] == json!(64 << 20) || p["MemoryMax"] == json!(64 << 20), "{p}");

    // The process is where systemd's is, in every hierarchy, and the one that kept the scope is gone.
    let path = format!("/{}/test-a.slice/{name}", bus.top);
    let pid = bundle.state()["pid"].as_i64().unwrap();
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    for line in
        groups.lines().filter(|l| ["name=systemd", "memory", "pids", "freezer"].iter().any(|c| l.contains(c)))
    {
        assert!(line.ends_with(&path), "{groups}");
    }
    assert!(groups.lines().any(|l| l.ends_with(&path)), "{groups}");
    let tracked = if Path::new("/sys/fs/cgroup/systemd").is_dir() {
        "/sys/fs/cgroup/systemd"
    } else {
        "/sys/fs/cgroup"
    };
    let procs = fs::read_to_string(format!("{tracked}{path}/cgroup.procs")).unwrap();
    assert!(
        procs.lines().any(|l| l == pid.to_string()) && !procs.contains(&p["PIDs"][0].to_string()),
        "{procs}"
    );
    let stats = bundle.good(&["events", "--stats", id]);
    assert_eq!(serde_json::from_str::<Value>(&stats).unwrap()["data"]["pids"]["limit"], json!(19));

    // Limits go to systemd as well as to the files.
    assert_eq!(bus.run(&bundle, &["update", "--pids-limit", "23", id]).code, 0);
    let set = bus.calls("set").remove(0);
    assert_eq!(
        (&set["name"], &set["runtime"], &set["properties"]["TasksMax"]),
        (&json!(name), &json!(true), &json!(23))
    );
    assert_eq!(bus.run(&bundle, &["exec", id, "true"]).code, 0);
    assert_eq!(bus.run(&bundle, &["delete", "--force", id]).code, 0);
    assert_eq!(bus.calls("stop").last().unwrap()["name"], json!(name));
    assert_eq!(bus.left(), Vec::<PathBuf>::new());
}

#[test]
fn what_systemd_refuses_is_told_and_leaves_nothing() {
    let bundle = Bundle::new(&["/bin/true"]);
    let bus = Bus::start(&bundle);
    let run = |path: &str| {
        bundle.configure(|c| c["linux"]["cgroupsPath"] = json!(path));
        let done = bus.run(&bundle, &["run", "--bundle", bundle.dir(), &bundle.id]);
        assert_eq!((done.code, done.err.lines().count()), (1, 1), "{done:?}");
        assert_eq!(bus.left(), Vec::<PathBuf>::new());
        done.err
    };
    assert!(
        run("::refused").contains(
            "starting unit \"refused.scope\": Not today. (org.freedesktop.DBus.Error.AccessDenied)"
        )
    );
    assert!(run("::failing").contains("starting unit \"failing.scope\": its job ended with \"failed\""));
    assert!(run("/an/absolute/path").contains("is not of the form slice:prefix:name"));
    bundle.configure(|c| c["process"]["args"] = json!(["/no/such/program"]));
    assert!(run("::gone").contains("no such file or directory"));
    assert_eq!(bus.calls("stop").last().unwrap()["name"], json!("gone.scope"));
    let mut command = bundle.command();
    command.env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/no/such/bus");
    let done =
        command.args(["--systemd-cgroup", "run", "--bundle", bundle.dir(), &bundle.id]).output().unwrap();
    let says = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(
        says.contains("connecting to the message bus \"unix:path=/no/such/bus\": no such file"),
        "{says}"
    );
    bundle.assert_nothing_left();
}

/// systemd itself, on its own bus; `cargo xtask vm` boots one and says so. The test runs below it.
#[test]
fn systemd_itself_makes_changes_and_ends_the_scope() {
    if std::env::var_os("BRIG_TEST_SYSTEMD").is_none() {
        eprintln!("not tested: BRIG_TEST_SYSTEMD does not say that systemd runs here");
        return;
    }
    let bundle = Bundle::new(&["/bin/sleep", "1000"]);
    let id = bundle.id.as_str();
    bundle.configure(|c| {
        c["linux"]["cgroupsPath"] = json!(format!("brigtest-a.slice:brig:{id}"));
        c["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 19},
            "cpu": {"shares": 1024, "quota": 30000, "period": 100_000},
            "devices": [{"allow": false, "access": "rwm"}]});
        c["annotations"]["org.systemd.property.TimeoutStopUSec"] = json!("uint64 7000000");
    });
    let run = |words: &[&str]| bundle.good(&[&["--systemd-cgroup"], words].concat());
    let name = format!("brig-{id}.scope");
    let show = |property: &str| {
        let out =
            Command::new("systemctl").args(["show", "--value", "-p", property, &name]).output().unwrap();
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    };
    // A container that stays holds its outputs.
    let mut command = bundle.command();
    command.args(["--systemd-cgroup", "run", "-d", "--bundle", bundle.dir(), id]);
    assert!(command.stdout(Stdio::null()).status().unwrap().success());
    let group = format!("/brigtest.slice/brigtest-a.slice/{name}");
    for (property, value) in [
        ("ActiveState", "active"),
        ("Slice", "brigtest-a.slice"),
        ("ControlGroup", &group),
        ("Delegate", "yes"),
        ("MemoryMax", "67108864"),
        ("TasksMax", "19"),
        ("CPUWeight", "39"),
        ("CPUQuotaPerSecUSec", "300ms"),
        ("TimeoutStopUSec", "7s"),
    ] {
        assert_eq!(show(property), value, "{property}");
    }
    let pid = bundle.state()["pid"].to_string();
    let procs = || fs::read_to_string(format!("/sys/fs/cgroup{group}/cgroup.procs")).unwrap_or_default();
    assert_eq!(procs().trim(), pid, "the container's process alone is in it");
    let file = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup{group}/{name}")).unwrap();
    assert_eq!((file("memory.max").trim(), file("cpu.max").trim()), ("67108864", "30000 100000"));

    run(&["update", "--pids-limit", "23", "--memory", "50331648", id]);
    // A reload writes what systemd believes: the new limits must be its own.
    assert!(Command::new("systemctl").arg("daemon-reload").status().unwrap().success());
    assert_eq!((show("TasksMax"), show("MemoryMax")), ("23".to_owned(), "50331648".to_owned()));
    assert_eq!((file("pids.max").trim(), file("memory.max").trim()), ("23", "50331648"));
    run(&["exec", id, "true"]);
    run(&["pause", id]);
    assert_eq!(bundle.status(), "paused");
    run(&["resume", id]);
    run(&["delete", "--force", id]);
    eventually("the unit is gone", || show("ActiveState") == "inactive");
    assert!(!Path::new("/sys/fs/cgroup").join(&group[1..]).exists());
    bundle.assert_nothing_left();

    // What systemd refuses is told in its words.
    bundle.configure(|c| c["annotations"]["org.systemd.property.NoSuchProperty"] = json!("7"));
    let error = bundle.bad(&["--systemd-cgroup", "run", "--bundle", bundle.dir(), id]);
    assert!(error.contains(&name) && error.contains("NoSuchProperty"), "{error}");
    bundle.assert_nothing_left();
}
