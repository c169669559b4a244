//! Starting, ending, and what is left when something dies: the daemon, the monitor, the container.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use brigantine_shim::{
    Client, Config, Event, ExitRecord, FailureKind, Found, Inherited, SpawnError, Status, find, spawn,
};
use brigantine_sys::SealedExe;
use common::{Fixture, eventually};

fn kill(pid: i32, signal: i32) {
    let status =
        Command::new("/bin/kill").arg(format!("-{signal}")).arg(pid.to_string()).status().expect("kill");
    assert!(status.success());
}

#[test]
fn a_record_is_written_and_everything_goes() {
    let fixture = Fixture::shell("exit 42");
    let mut running = fixture.start();
    let exit = running.exited();
    assert_eq!(exit.exit_code, 42);
    assert_eq!(exit.container_pid, running.spawned.container_pid);
    assert!(exit.started_at <= exit.finished_at);
    assert_eq!(ExitRecord::read(&fixture.config.exit_path).unwrap(), Some(exit.clone()));
    let state = running.client.state().unwrap();
    assert_eq!((state.status, state.exit), (Status::Stopped, Some(exit)));
    running.client.release().unwrap();
    fixture.assert_nothing_left();
}

#[test]
fn the_monitor_is_detached_from_its_spawner() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    let proc = |what: &str| fs::read_to_string(format!("/proc/{}/{what}", running.spawned.shim_pid)).unwrap();
    let stat = proc("stat");
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    assert_ne!(fields[1], std::process::id().to_string(), "not a child of the spawner");
    assert_eq!(fields[3], running.spawned.shim_pid.to_string(), "in a session of its own");
    assert_eq!(proc("comm").trim(), "brig-shim");
    let cwd = fs::read_link(format!("/proc/{}/cwd", running.spawned.shim_pid)).unwrap();
    assert_eq!(cwd.to_str(), Some("/"));
    assert_eq!(proc("status").lines().find(|l| l.starts_with("Threads:")).unwrap(), "Threads:\t1");
    assert_eq!(fs::metadata(&fixture.config.dir).unwrap().permissions().mode() & 0o777, 0o700);
    let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", running.spawned.container_pid)).unwrap();
    assert_eq!(score.trim(), "0", "the container does not inherit the monitor's protection");
}

#[test]
fn a_start_that_fails_leaves_nothing() {
    for (args, kind, code) in [
        (&["nonsense"][..], FailureKind::NotFound, 127),
        (&["/bin/nonsense"], FailureKind::NotFound, 127),
        (&["/etc"], FailureKind::PermissionDenied, 126),
    ] {
        let fixture = Fixture::new(args);
        match fixture.try_start(Vec::new()) {
            Err(SpawnError::Launch(failure)) => {
                assert_eq!((failure.kind, failure.exit_code()), (kind, code), "{failure}");
                assert!(failure.message.contains(args[0]), "{failure}");
            }
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it started"),
        }
        fixture.assert_nothing_left();
        assert!(!fixture.config.exit_path.exists());
    }
}

#[test]
fn a_root_that_is_missing_and_a_log_that_cannot_be_written_are_told() {
    let fixture = Fixture::new(&["/bin/true"])
        .with(|c| c.rootfs = brigantine_shim::Rootfs::Path("/nonexistent/root".into()));
    let Err(SpawnError::Launch(failure)) = fixture.try_start(Vec::new()) else { panic!("it started") };
    assert!(failure.message.contains("/nonexistent/root"), "{failure}");
    fixture.assert_nothing_left();

    let fixture = Fixture::new(&["/bin/true"]).with(|c| {
        c.log = brigantine_shim::LogConfig::JsonFile(brigantine_shim::JsonFileLog::new(
            "/nonexistent/log".into(),
        ));
    });
    let Err(SpawnError::Launch(failure)) = fixture.try_start(Vec::new()) else { panic!("it started") };
    assert!(failure.message.contains("/nonexistent/log"), "{failure}");
    fixture.assert_nothing_left();
}

#[test]
fn a_second_monitor_for_the_same_container_is_refused() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    let Err(SpawnError::Launch(failure)) = fixture.try_start(Vec::new()) else { panic!("it started") };
    assert_eq!(failure.kind, FailureKind::Conflict);
    assert_eq!(running.client.state().unwrap().status, Status::Running);
}

#[test]
fn signals_pause_and_processes() {
    let fixture = Fixture::shell("trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.05; done");
    let mut running = fixture.start_attached();
    let mut attach = running.attach.take().unwrap();
    common::read_until(&mut attach, "ready");
    assert!(running.client.pids().unwrap().contains(&running.spawned.container_pid));
    assert!(running.client.stats().unwrap().pids.current >= 1);
    running.client.pause().unwrap();
    assert_eq!(running.client.state().unwrap().status, Status::Paused);
    assert!(running.client.pause().is_err());
    running.client.resume().unwrap();
    assert_eq!(running.client.state().unwrap().status, Status::Running);
    running.client.kill(15, false).unwrap();
    assert_eq!(running.exited().exit_code, 9);
    assert!(running.client.kill(15, false).is_err());
}

#[test]
fn a_paused_container_is_killed() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let mut running = fixture.start();
    running.client.pause().unwrap();
    running.client.kill(9, false).unwrap();
    assert_eq!(running.exited().signal, Some(9));
    running.client.release().unwrap();
    fixture.assert_nothing_left();
}

#[test]
fn running_out_of_memory_is_recorded_and_told() {
    let fixture = Fixture::shell("x=a; while :; do x=$x$x; done").with_memory(32 << 20);
    let mut running = fixture.start();
    let mut events = Vec::new();
    let exit = loop {
        match running.events.read().unwrap().unwrap() {
            Event::Exited(exit) => break exit,
            other => events.push(other),
        }
    };
    assert_eq!((exit.exit_code, exit.oom_killed), (137, true));
    assert!(events.contains(&Event::Oom), "{events:?}");
}

#[test]
fn a_further_process_that_runs_out_of_memory_is_told_while_the_container_runs() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]).with_memory(32 << 20);
    let mut running = fixture.start();
    let hog = fixture.exec("hog", &["sh", "-c", "x=a; while :; do x=$x$x; done"]);
    let mut exec = running.client.exec(&hog).unwrap();
    assert_eq!(common::read_output(&mut exec.stream).exec.unwrap().exit_code, 137);
    let mut events = [running.events.read().unwrap().unwrap(), running.events.read().unwrap().unwrap()];
    events.sort_by_key(|e| *e == Event::Oom);
    assert!(matches!(&events, [Event::ExecExited(_), Event::Oom]), "{events:?}");
    let state = running.client.state().unwrap();
    assert_eq!((state.status, state.oom_killed), (Status::Running, true));
}

#[test]
fn limits_are_updated() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]).with_memory(64 << 20);
    let running = fixture.start();
    let resources = serde_json::from_value(serde_json::json!({"memory": {"limit": 48 << 20}})).unwrap();
    running.client.update(&resources).unwrap();
    assert_eq!(running.client.stats().unwrap().memory.limit, 48 << 20);
}

/// The daemon of [`a_killed_daemon_leaves_the_container_running`]; a test only in name.
#[test]
fn daemon_half() {
    let Ok(config) = std::env::var("BRIGANTINE_TEST_DAEMON") else { return };
    let config: Config = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
    let exe = SealedExe::from_path(&common::runtime()).unwrap();
    let (mut events, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let inherited = Inherited {
        netns: None,
        layers: Vec::new(),
        held: Vec::new(),
        attach: Vec::new(),
        events: Some(theirs),
    };
    spawn(&exe, &config, inherited).unwrap();
    fs::write(config.exit_path.with_extension("started"), "").unwrap();
    let mut buffer = [0];
    drop(std::io::Read::read(&mut events, &mut buffer));
    thread::sleep(Duration::from_secs(100));
}

#[test]
fn a_killed_daemon_leaves_the_container_running() {
    let fixture =
        Fixture::shell("n=0; while [ $n -lt 40 ]; do n=$((n+1)); echo line $n; sleep 0.02; done; exit 6");
    let config = fixture.temp.path().join("config.json");
    fs::write(&config, serde_json::to_vec(&fixture.config).unwrap()).unwrap();
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "daemon_half", "--nocapture"])
        .env("BRIGANTINE_TEST_DAEMON", &config)
        .spawn()
        .unwrap();
    eventually("the container starts", || fixture.config.exit_path.with_extension("started").exists());
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let Found::Monitored(client) = find(&fixture.config.dir, &fixture.config.exit_path).unwrap() else {
        panic!("the monitor went with the daemon")
    };
    assert_eq!(client.state().unwrap().status, Status::Running);
    eventually("the record appears", || fixture.config.exit_path.exists());
    fixture.assert_nothing_left();
    let Found::Exited(exit) = find(&fixture.config.dir, &fixture.config.exit_path).unwrap() else { panic!() };
    assert_eq!((exit.exit_code, exit.monitor_lost), (6, false));
    let log: Vec<u8> = fixture.log().into_iter().flat_map(|(_, bytes)| bytes).collect();
    let expected = (1..=40).map(|n| format!("line {n}")).collect::<Vec<_>>().join("\n") + "\n";
    assert_eq!(String::from_utf8_lossy(&log), expected);
}

#[test]
fn a_new_daemon_subscribes_and_takes_over() {
    let fixture = Fixture::shell("read x; exit 4").with(|c| (c.open_stdin, c.stdin_once) = (true, true));
    let running = fixture.start();
    drop(running.events);
    let client = Client::connect(&fixture.config.dir).unwrap();
    let mut events = brigantine_shim::EventReader::new(client.events().unwrap());
    client.close_stdin().unwrap();
    let Some(Event::Exited(exit)) = events.read().unwrap() else { panic!("no event") };
    assert_eq!(exit.exit_code, 4);
    let mut late = brigantine_shim::EventReader::new(client.events().unwrap());
    assert_eq!(late.read().unwrap(), Some(Event::Exited(exit)));
    client.release().unwrap();
    fixture.assert_nothing_left();
}

#[test]
fn a_killed_monitor_takes_its_container_along_and_is_cleaned_up_after() {
    let fixture = Fixture::shell("sleep 1000 & sleep 1000");
    let mut running = fixture.start();
    running.client.exec(&fixture.exec("e", &["sleep", "1000"])).unwrap();
    kill(running.spawned.shim_pid, 9);
    assert_eq!(running.events.read().unwrap(), None);
    eventually("the container's processes end", || fixture.processes().is_empty());
    let Found::Exited(exit) = find(&fixture.config.dir, &fixture.config.exit_path).unwrap() else { panic!() };
    assert_eq!((exit.exit_code, exit.monitor_lost), (137, true));
    brigantine_shim::clear(&fixture.config.dir).unwrap();
    fixture.assert_nothing_left();
    let Found::Exited(again) = find(&fixture.config.dir, &fixture.config.exit_path).unwrap() else {
        panic!()
    };
    assert_eq!(again, exit);
}

#[test]
fn a_polite_signal_does_not_end_the_monitor() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    for signal in [1, 2, 15] {
        kill(running.spawned.shim_pid, signal);
    }
    assert_eq!(running.client.state().unwrap().status, Status::Running);
}

#[test]
fn fifty_containers_at_once() {
    let fixtures: Vec<Fixture> = (0..50).map(|n| Fixture::shell(&format!("seq 1 100; exit {n}"))).collect();
    thread::scope(|scope| {
        for (n, fixture) in (0..).zip(&fixtures) {
            scope.spawn(move || {
                let mut running = fixture.start_attached();
                assert!(running.output().text().ends_with("\n100\n"));
                assert_eq!(running.exited().exit_code, n);
                running.client.release().unwrap();
            });
        }
    });
    for fixture in &fixtures {
        fixture.assert_nothing_left();
    }
}

#[test]
fn a_long_directory_is_no_obstacle() {
    let fixture = Fixture::shell("exit 0");
    let long = fixture.temp.path().join("x".repeat(200));
    fs::create_dir(&long).unwrap();
    let fixture = fixture.with(|c| c.dir = long.join("y".repeat(100)));
    let mut running = fixture.start();
    assert_eq!(running.exited().exit_code, 0);
    running.client.release().unwrap();
    fixture.assert_nothing_left();
}
