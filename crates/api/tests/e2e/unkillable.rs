//! The daemon is killed again and again while containers work: nothing of them may notice, and nothing may be lost.
//!
//! The size is bounded for everyday runs; `BRIG_TEST_KILLS` and `BRIG_TEST_CONTAINERS` make it larger.

use std::time::Duration;

use brigantine_testkit::{Client, eventually};

use crate::Host;

fn size(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Not a random generator, but other moments every time.
fn pause(seed: usize) -> Duration {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Duration::from_millis((u64::from(now.subsec_nanos()) / 1000 + seed as u64 * 7919) % 400)
}

#[test]
fn a_daemon_that_is_killed_over_and_over_loses_nothing() {
    let (kills, count) = (size("BRIG_TEST_KILLS", 10), size("BRIG_TEST_CONTAINERS", 10));
    let mut host = Host::new(Client::Docker);
    let script =
        "i=0; while [ ! -e /stop ]; do echo line $i; i=$((i+1)); sleep 0.02; done; echo lines $i; exit 7";
    let name = |number: usize| format!("worker{number}");
    for number in 0..count {
        let name = name(number);
        let port = (20000 + number).to_string();
        let publish = format!("{port}:80");
        let mut args = vec!["run", "-d", "--name", &name, "-p", &publish];
        if number % 2 == 0 {
            args.extend(["--health-cmd", "true", "--health-interval", "500ms"]);
        }
        args.extend(["busybox", "sh", "-c", script]);
        host.cli(args).ok();
    }
    // Its policy goes on, whoever is the daemon at the time.
    let ends = "echo again; sleep 0.3; exit 1";
    host.cli(["run", "-d", "--name", "phoenix", "--restart", "always", "busybox", "sh", "-c", ends]).ok();
    let started: Vec<_> = (0..count).map(|n| host.inspect(&name(n))["State"]["StartedAt"].clone()).collect();
    for kill in 0..kills {
        // Something is always under way: an exec, a container that comes and goes.
        let busy = host.cli(["exec", &name(kill % count), "sh", "-c", "sleep 0.2"]).spawn();
        let brief = host.cli(["run", "--rm", "busybox", "true"]).spawn();
        std::thread::sleep(pause(kill));
        host.engine.kill_daemon();
        std::thread::sleep(pause(kill + 1));
        host.engine.restart_daemon();
        for mut child in [busy, brief] {
            child.kill().ok();
            child.wait().unwrap();
        }
    }
    for (number, before) in started.iter().enumerate() {
        let state = host.inspect(&name(number))["State"].clone();
        assert_eq!(
            (&state["Status"], &state["StartedAt"]),
            (&serde_json::json!("running"), before),
            "{number}"
        );
    }
    eventually("health to go on", || {
        (0..count)
            .step_by(2)
            .all(|n| host.inspect(&name(n))["State"]["Health"]["Status"] == "healthy")
            .then_some(())
    });
    let again = host.inspect("phoenix")["RestartCount"].as_i64().unwrap();
    eventually("the policy to go on", || {
        (host.inspect("phoenix")["RestartCount"].as_i64().unwrap() > again).then_some(())
    });
    for number in 0..count {
        host.cli(["exec", &name(number), "touch", "/stop"]).ok();
    }
    // One ends without a daemon.
    host.engine.kill_daemon();
    std::thread::sleep(Duration::from_millis(500));
    host.engine.restart_daemon();
    for number in 0..count {
        host.wait_state(&name(number), "exited");
        assert_eq!(host.inspect(&name(number))["State"]["ExitCode"], 7);
        let logs = host.cli(["logs", &name(number)]).ok();
        let lines: Vec<&str> = logs.lines().collect();
        let last = lines.last().unwrap();
        assert_eq!(*last, format!("lines {}", lines.len() - 1), "{}", name(number));
        for (at, line) in lines[..lines.len() - 1].iter().enumerate() {
            assert_eq!(*line, format!("line {at}"), "{}", name(number));
        }
    }
    host.cli(["rm", "-f", "phoenix"]).ok();
    for number in 0..count {
        host.cli(["rm", &name(number)]).ok();
    }
    // What the kills have cut short is gone, or can be removed.
    for id in host.cli(["ps", "-aq"]).ok().lines() {
        host.cli(["rm", "-f", id]).ok();
    }
    host.assert_nothing_left();
}

/// Many clients at once, on the same containers and on their own.
#[test]
fn clients_at_once_leave_no_wrong_state() {
    let host = Host::new(Client::Docker);
    host.cli(["create", "--name", "shared", "busybox", "sleep", "1000"]).ok();
    let clients = 32;
    std::thread::scope(|scope| {
        for number in 0..clients {
            let host = &host;
            scope.spawn(move || {
                let own = format!("own{number}");
                let body = serde_json::json!({ "Image": "busybox", "Cmd": ["sleep", "1000"] });
                host.post(&format!("/containers/create?name={own}"), &body).expect(201);
                for round in 0..3 {
                    host.request("POST", &format!("/containers/{own}/start")).expect(204);
                    // Of the shared one, somebody else may have had the same or the opposite idea.
                    let verb = ["start", "kill", "restart?t=0", "stop?t=0"][(number + round) % 4];
                    let answer = host.request("POST", &format!("/containers/shared/{verb}"));
                    assert!(
                        matches!(answer.status, 204 | 304 | 409),
                        "{verb}: {} {}",
                        answer.status,
                        answer.text()
                    );
                    host.request("POST", &format!("/containers/{own}/kill")).expect(204);
                }
                host.request("DELETE", &format!("/containers/{own}?force=1")).expect(204);
            });
        }
    });
    host.request("DELETE", "/containers/shared?force=1").expect(204);
    assert_eq!(host.get("/containers/json?all=1").as_array().map_or(0, Vec::len), 0);
    host.assert_nothing_left();
}
