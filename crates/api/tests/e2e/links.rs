//! Legacy links, MAC addresses, signals without effect, health over a restart of the daemon, execs that are kept.

use std::time::{Duration, Instant};

use brigantine_testkit::{Client, eventually};

use crate::Host;

both![
    a_link_gives_names_and_variables,
    stop_does_not_wait_for_a_process_that_cannot_hear,
    an_unhealthy_container_is_restarted_when_asked,
    top_shows_processes
];

fn a_link_gives_names_and_variables(client: Client) {
    let host = Host::new(client);
    host.cli([
        "run", "-d", "--name", "store", "--expose", "5432", "-e", "USER=me", "busybox", "sleep", "1000",
    ])
    .ok();
    let flags = ["run", "--name", "app", "--link", "store:db", "busybox", "sh", "-c"];
    let script = "grep -w db /etc/hosts | cut -f2; echo $DB_NAME $DB_ENV_USER $DB_PORT_5432_TCP_PROTO; ping -c 1 -W 5 db >/dev/null && echo reached";
    let out = host.cli(flags.iter().chain(&[script])).ok();
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].starts_with("db ") && lines[0].ends_with(" store"), "{out}");
    assert_eq!(&lines[1..], ["/app/db me tcp", "reached"]);
    assert_eq!(host.inspect("app")["HostConfig"]["Links"][0], "/store:/app/db");
    let names = host.get("/containers/json?all=1&filters=%7B%22name%22%3A%5B%22store%22%5D%7D");
    assert!(names[0]["Names"].as_array().unwrap().iter().any(|name| name == "/app/db"), "{names}");
    host.cli(["rm", "--link", "/app/db"]).ok();
    assert!(host.inspect("app")["HostConfig"]["Links"].is_null());
    host.cli(["create", "--link", "nobody:x", "busybox"])
        .exits(1)
        .expect_stderr("could not get container for nobody");
    host.cli(["kill", "store"]).ok();
    host.cli(["run", "--rm", "--link", "store:db", "busybox", "true"])
        .exits(125)
        .expect_stderr("Cannot link to a non running container");
}

fn stop_does_not_wait_for_a_process_that_cannot_hear(client: Client) {
    let host = Host::new(client);
    host.background(&["--name", "deaf"], "trap '' TERM; echo up; while true; do sleep 1; done");
    host.wait_log("deaf", "up");
    let began = Instant::now();
    host.cli(["stop", "deaf"]).ok();
    if !host.is_peer() {
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }
    assert_eq!(host.inspect("deaf")["State"]["ExitCode"], 137);
    // One that listens gets its time.
    host.background(
        &["--name", "slow"],
        "trap 'sleep 2; exit 3' TERM; echo up; while true; do sleep 0.1; done",
    );
    host.wait_log("slow", "up");
    host.cli(["stop", "slow"]).ok();
    assert_eq!(host.inspect("slow")["State"]["ExitCode"], 3);
}

fn an_unhealthy_container_is_restarted_when_asked(client: Client) {
    let host = Host::new(client);
    let flags = [
        "run",
        "-d",
        "--name",
        "sick",
        "--health-cmd",
        "test ! -e /sick",
        "--health-interval",
        "200ms",
        "--health-retries",
        "2",
        "--annotation",
        "brigantine.health-on-failure=restart",
        "busybox",
        "sh",
        "-c",
        "rm -f /sick; sleep 1000",
    ];
    host.cli(flags).ok();
    let health = |wanted: &str| {
        eventually(&format!("health to be {wanted}"), || {
            (host.inspect("sick")["State"]["Health"]["Status"] == wanted).then_some(())
        });
    };
    health("healthy");
    let started = host.inspect("sick")["State"]["StartedAt"].clone();
    host.cli(["exec", "sick", "touch", "/sick"]).ok();
    eventually("another start", || (host.inspect("sick")["State"]["StartedAt"] != started).then_some(()));
    health("healthy");
    host.cli(["create", "--annotation", "brigantine.health-on-failure=dance", "busybox"])
        .exits(1)
        .expect_stderr("invalid annotation");
}

fn top_shows_processes(client: Client) {
    let host = Host::new(client);
    host.cli(["run", "-d", "--name", "busy", "busybox", "sleep", "1234"]).ok();
    let out = host.cli(["top", "busy"]).ok();
    assert!(
        out.lines()
            .next()
            .unwrap()
            .split_whitespace()
            .eq(["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]),
        "{out}"
    );
    assert!(out.lines().nth(1).unwrap().starts_with("root") && out.ends_with("sleep 1234"), "{out}");
    let out = host.cli(["top", "busy", "-o", "pid,comm"]).ok();
    assert!(out.ends_with("sleep"), "{out}");
}

/// What a client knew before the daemon was killed it finds again.
#[test]
fn health_and_execs_outlive_the_daemon() {
    let mut host = Host::new(Client::Docker);
    host.cli([
        "run",
        "-d",
        "--name",
        "kept",
        "--health-cmd",
        "true",
        "--health-interval",
        "300ms",
        "busybox",
        "sleep",
        "1000",
    ])
    .ok();
    eventually("health", || (host.inspect("kept")["State"]["Health"]["Status"] == "healthy").then_some(()));
    let exec = |command: &str| {
        let body = serde_json::json!({ "Cmd": ["sh", "-c", command], "AttachStdout": true });
        host.post("/containers/kept/exec", &body).expect(201).json()["Id"].as_str().unwrap().to_owned()
    };
    let (waiting, running, ended) = (exec("exit 4"), exec("sleep 1000"), exec("exit 7"));
    let detached = serde_json::json!({ "Detach": true });
    for id in [&running, &ended] {
        host.post(&format!("/exec/{id}/start"), &detached).expect(200);
    }
    eventually("the exec's end", || {
        (host.get(&format!("/exec/{ended}/json"))["ExitCode"] == 7).then_some(())
    });
    let log = host.inspect("kept")["State"]["Health"]["Log"].as_array().unwrap().len();
    host.engine.kill_daemon();
    host.engine.restart_daemon();
    let health = host.inspect("kept")["State"]["Health"].clone();
    assert_eq!(health["Status"], "healthy");
    assert!(log > 0 && !health["Log"].as_array().unwrap().is_empty(), "{health}");
    assert_eq!(host.get(&format!("/exec/{ended}/json"))["ExitCode"], 7);
    let still = host.get(&format!("/exec/{running}/json"));
    assert_eq!(
        (still["Running"].as_bool(), still["Pid"].as_i64().is_some_and(|pid| pid > 0)),
        (Some(true), true)
    );
    host.post(&format!("/exec/{waiting}/start"), &detached).expect(200);
    eventually("the exec's end", || {
        (host.get(&format!("/exec/{waiting}/json"))["ExitCode"] == 4).then_some(())
    });
    host.post(&format!("/exec/{ended}/start"), &detached).expect(409);
}

/// The field that clients below API 1.44 send.
#[test]
fn a_mac_address_may_stand_beside_the_networks() {
    let host = Host::new(Client::Docker);
    let body = serde_json::json!({ "Image": "busybox", "Cmd": ["cat", "/sys/class/net/eth0/address"], "MacAddress": "02:42:ac:11:00:0a" });
    let id =
        host.post("/v1.41/containers/create", &body).expect(201).json()["Id"].as_str().unwrap().to_owned();
    host.cli(["start", "-a", &id]).ok();
    assert_eq!(host.cli(["logs", &id]).ok(), "02:42:ac:11:00:0a");
}
