//! Containers do not need the daemon: it is killed under them, and nothing is lost.

use std::time::Duration;

use brigantine_testkit::{Client, Engine, Outside, eventually};

/// An engine whose containers outlive the daemon; the peer has to be asked for it.
fn engine() -> Engine {
    let builder = Engine::builder().busybox();
    if Engine::builder().is_peer() { builder.flag("--live-restore").start() } else { builder.start() }
}

const COUNT: &str = "i=0; while [ $i -lt 200 ]; do i=$((i+1)); echo $i; usleep 20000; done; exit 33";

#[test]
fn a_container_writes_on_while_the_daemon_is_dead() {
    let mut engine = engine();
    let id = engine.docker(["run", "-d", "--name", "ww", "busybox", "sh", "-c", COUNT]).ok();
    engine.wait_log(&id, "\n10\n");
    engine.kill_daemon();
    std::thread::sleep(Duration::from_secs(1));
    engine.restart_daemon();
    assert_eq!(engine.docker(["ps", "-q", "--no-trunc"]).ok(), id);
    // Followed to its end through the restarted daemon: every line once, in order.
    let all = engine.docker(["logs", "-f", "ww"]).ok();
    let expected: Vec<_> = (1..=200).map(|i| i.to_string()).collect();
    assert_eq!(all.lines().collect::<Vec<_>>(), expected);
    assert_eq!(engine.docker(["wait", "ww"]).ok(), "33");
    engine.docker(["rm", "ww"]).ok();
    engine.assert_nothing_left();
}

#[test]
fn an_exit_without_a_daemon_is_known_later() {
    let mut engine = engine();
    let script = "while [ ! -e /flag/go ]; do usleep 20000; done; echo last words; exit 42";
    let flag = engine.dir().join("flag");
    std::fs::create_dir(&flag).unwrap();
    let mount = format!("{}:/flag", flag.display());
    let id = engine.docker(["run", "-d", "-v", &mount, "busybox", "sh", "-c", script]).ok();
    let removed = engine.docker(["run", "-d", "--rm", "-v", &mount, "busybox", "sh", "-c", script]).ok();
    let pid = engine.container_pid(&id);
    engine.kill_daemon();
    std::fs::write(flag.join("go"), "").unwrap();
    eventually("the container's end", || (!engine.sandbox().proc(pid).exists()).then_some(()));
    engine.restart_daemon();
    engine.wait_state(&id, "exited");
    let state = engine.inspect(&id)["State"].clone();
    assert_eq!(state["ExitCode"], 42, "{state}");
    assert_eq!(state["OOMKilled"], false);
    assert!(state["FinishedAt"].as_str().unwrap() > state["StartedAt"].as_str().unwrap());
    // Docker's daemon is what reads the output, so this is lost there.
    assert!(engine.is_peer() || engine.docker(["logs", &id]).ok() == "last words");
    eventually("the removal of a container that was to be removed", || {
        (engine.request("GET", &format!("/containers/{removed}/json")).status == 404).then_some(())
    });
    engine.docker(["rm", &id]).ok();
    engine.assert_nothing_left();
}

#[test]
fn a_restarted_daemon_has_every_power_over_its_containers() {
    let mut engine = engine();
    let id = engine
        .docker([
            "run",
            "-d",
            "-i",
            "busybox",
            "sh",
            "-c",
            "trap 'exit 4' TERM; while :; do sleep 0.05; done",
        ])
        .ok();
    engine.kill_daemon();
    engine.restart_daemon();
    assert_eq!(engine.docker(["exec", &id, "echo", "inside"]).ok(), "inside");
    engine.docker(["pause", &id]).ok();
    assert_eq!(engine.inspect(&id)["State"]["Status"], "paused");
    engine.docker(["unpause", &id]).ok();
    engine.docker(["stop", &id]).ok();
    assert_eq!(engine.inspect(&id)["State"]["ExitCode"], 4);
    engine.docker(["start", &id]).ok();
    engine.docker(["rm", "-f", &id]).ok();
    engine.assert_nothing_left();
}

#[test]
fn a_published_port_works_without_a_daemon() {
    let mut engine = engine();
    let outside = Outside::connect(&engine);
    let id = engine
        .docker([
            "run",
            "-d",
            "-p",
            "8080:80",
            "busybox",
            "sh",
            "-c",
            "while :; do echo served | nc -l -p 80; done",
        ])
        .ok();
    let served = || {
        use std::io::{Read as _, Write as _};
        eventually("an answer", || {
            let mut stream = outside.tcp(8080).ok()?;
            stream.write_all(b"x\n").ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            (text == "served\n").then_some(())
        });
    };
    served();
    engine.kill_daemon();
    served();
    engine.restart_daemon();
    served();
    engine.docker(["rm", "-f", &id]).ok();
}

#[test]
fn a_stopped_daemon_leaves_running_containers_alone() {
    let mut engine = engine();
    let id = engine.docker(["run", "-d", "busybox", "sleep", "1000"]).ok();
    let pid = engine.container_pid(&id);
    engine.stop_daemon();
    assert!(engine.sandbox().proc(pid).exists());
    engine.restart_daemon();
    assert_eq!(engine.container_pid(&id), pid);
    assert_eq!(engine.inspect(&id)["State"]["Running"], true);
}

#[test]
fn a_killed_shim_takes_its_container_with_it() {
    let engine = Engine::with_busybox();
    let id = engine.client(Client::Docker, ["run", "-d", "busybox", "sleep", "1000"]).ok();
    let pid = engine.container_pid(&id);
    let status = std::fs::read_to_string(engine.sandbox().proc(pid).join("status")).unwrap();
    let shim = status.lines().find_map(|l| l.strip_prefix("PPid:\t")).unwrap().to_owned();
    let kill = engine.sandbox().command("kill").args(["-9", &shim]).status().unwrap();
    assert!(kill.success());
    engine.wait_state(&id, "exited");
    assert_ne!(engine.inspect(&id)["State"]["ExitCode"], 0);
    if !engine.is_peer() {
        assert!(!engine.sandbox().proc(pid).exists(), "the container outlives its shim");
    }
    engine.docker(["rm", &id]).ok();
    engine.assert_nothing_left();
}
