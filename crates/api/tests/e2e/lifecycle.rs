//! create, start, stop, kill, wait, rm, ps, logs, exec, inspect, events, version, info; names and id prefixes.

use std::time::{Duration, Instant};

use brigantine_testkit::{Client, Engine, eventually};
use serde_json::json;

use crate::Host;

both![
    create_then_start_with_attached_output,
    stop_is_gentle_and_then_not,
    stop_uses_the_stop_signal,
    kill_sends_the_named_signal,
    a_running_container_is_not_removed_but_by_force,
    wait_gives_the_status,
    a_container_starts_again_with_its_files,
    ps_lists_what_it_should,
    an_id_prefix_is_enough_and_an_ambiguous_one_is_refused,
    logs_are_complete_and_selected,
    logs_follow_until_the_end,
    exec_runs_beside_the_program,
    exec_failures_have_their_statuses,
    inspect_says_what_was_asked_for,
    events_tell_the_story,
    version_and_info_answer,
];

const FOREVER: &str = "trap 'exit 0' TERM; while :; do sleep 0.1; done";

fn create_then_start_with_attached_output(client: Client) {
    let host = Host::new(client);
    let id = host.cli(["create", "--name", "cc", "busybox", "sh", "-c", "echo out; exit 4"]).ok();
    assert_eq!(host.inspect(&id)["State"]["Status"], "created");
    let output = host.cli(["start", "-a", "cc"]).exits(4);
    assert_eq!(output.stdout, "out\n");
    assert_eq!(host.cli(["logs", "cc"]).ok(), "out");
    host.cli(["rm", "cc"]).ok();
    host.assert_nothing_left();
}

fn stop_is_gentle_and_then_not(client: Client) {
    let host = Host::new(client);
    let gentle = host.background(&[], "trap 'exit 6' TERM; echo up; while :; do sleep 0.1; done");
    host.wait_log(&gentle, "up");
    host.cli(["stop", &gentle]).ok();
    assert_eq!(host.inspect(&gentle)["State"]["ExitCode"], 6);
    let deaf = host.background(&[], "trap '' TERM; echo up; while :; do sleep 0.1; done");
    host.wait_log(&deaf, "up");
    let began = Instant::now();
    host.cli(["stop", "-t", "1", &deaf]).ok();
    // Docker waits for what cannot be heard, too.
    assert!(!host.is_peer() || began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
    assert_eq!(host.inspect(&deaf)["State"]["ExitCode"], 137);
    let busy = host.background(&[], "trap : TERM; echo up; while :; do sleep 0.1; done");
    host.wait_log(&busy, "up");
    let began = Instant::now();
    host.cli(["stop", "-t", "1", &busy]).ok();
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
    assert_eq!(host.inspect(&busy)["State"]["ExitCode"], 137);
    // Stopping a stopped one is no error.
    host.cli(["stop", &deaf]).ok();
}

fn stop_uses_the_stop_signal(client: Client) {
    let host = Host::new(client);
    let flags = ["--stop-signal", "USR1", "--stop-timeout", "20"];
    let id = host.background(&flags, "trap 'exit 8' USR1; echo up; while :; do sleep 0.1; done");
    host.wait_log(&id, "up");
    host.cli(["stop", &id]).ok();
    assert_eq!(host.inspect(&id)["State"]["ExitCode"], 8);
}

fn kill_sends_the_named_signal(client: Client) {
    let host = Host::new(client);
    let id = host.background(&[], "trap 'echo got' USR2; echo up; while :; do sleep 0.05; done");
    host.wait_log(&id, "up");
    for name in ["USR2", "SIGUSR2", "12"] {
        host.cli(["kill", "-s", name, &id]).ok();
    }
    host.wait_log(&id, "got");
    host.cli(["kill", "-s", "NOSUCH", &id]).exits(1).expect_stderr("NOSUCH");
    host.cli(["kill", &id]).ok();
    host.wait_state(&id, "exited");
    assert_eq!(host.inspect(&id)["State"]["ExitCode"], 137);
    host.cli(["kill", &id]).exits(1).expect_stderr("is not running");
}

fn a_running_container_is_not_removed_but_by_force(client: Client) {
    let host = Host::new(client);
    let id = host.background(&["--name", "rr"], FOREVER);
    host.cli(["rm", "rr"]).exits(1).expect_stderr("remove");
    host.cli(["rm", "-f", &id]).ok();
    host.cli(["inspect", "rr"]).exits(1).expect_stderr("no such object: rr");
    assert_eq!(host.request("GET", "/containers/rr/json").expect(404).message(), "No such container: rr");
    host.assert_nothing_left();
}

fn wait_gives_the_status(client: Client) {
    let host = Host::new(client);
    let id = host.background(&[], "sleep 0.3; exit 11");
    assert_eq!(host.cli(["wait", &id]).ok(), "11");
    assert_eq!(host.cli(["wait", &id]).ok(), "11");
    host.cli(["wait", "nobody"]).exits(1).expect_stderr("No such container: nobody");
}

fn a_container_starts_again_with_its_files(client: Client) {
    let host = Host::new(client);
    let script = "echo x >>/kept; wc -l </kept; rm /etc/os-release 2>/dev/null || echo gone";
    let id = host.background(&[], script);
    host.wait_state(&id, "exited");
    assert_eq!(host.cli(["start", "-a", &id]).ok(), "2\ngone");
    host.cli(["start", &id]).ok();
    host.wait_state(&id, "exited");
    assert_eq!(host.cli(["logs", &id]).ok(), "1\n2\ngone\n3\ngone");
    host.cli(["rm", &id]).ok();
    host.assert_nothing_left();
}

fn ps_lists_what_it_should(client: Client) {
    let host = Host::new(client);
    let up = host.background(&["--name", "up"], FOREVER);
    let down = host.background(&["--name", "down"], "exit 3");
    host.wait_state(&down, "exited");
    assert_eq!(host.cli(["ps", "--no-trunc", "-q"]).ok(), up);
    let table = host.cli(["ps", "-a"]).ok();
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[0].starts_with("CONTAINER ID   IMAGE     COMMAND"), "{table}");
    assert!(lines.iter().any(|l| l.contains(&up[..12]) && l.contains("Up ") && l.ends_with("up")), "{table}");
    assert!(lines.iter().any(|l| l.contains("Exited (3) ") && l.ends_with("down")), "{table}");
    let format = ["ps", "-a", "--format", "{{.Names}}|{{.Image}}|{{.State}}"];
    assert_eq!(host.cli(format).ok(), "down|busybox|exited\nup|busybox|running");
    assert_eq!(host.cli(["ps", "-aq", "--filter", "status=exited"]).ok(), down[..12]);
    assert_eq!(host.cli(["ps", "-aq", "--filter", "name=^up$"]).ok(), up[..12]);
    assert_eq!(host.cli(["ps", "-aq", "--filter", "exited=3"]).ok(), down[..12]);
    assert_eq!(host.cli(["ps", "-lq"]).ok(), down[..12]);
}

fn an_id_prefix_is_enough_and_an_ambiguous_one_is_refused(client: Client) {
    let host = Host::new(client);
    // Seventeen ids: two of them begin with the same digit.
    let ids: Vec<_> = (0..17).map(|_| host.cli(["create", "busybox"]).ok()).collect();
    let twins = ids.iter().filter(|id| id[..1] == ids[16][..1]).count();
    let first = ids.iter().find(|a| ids.iter().filter(|b| a[..1] == b[..1]).count() > 1).unwrap();
    assert!(twins >= 1);
    assert_eq!(host.cli(["inspect", "-f", "{{.Id}}", &first[..10]]).ok(), *first);
    host.cli(["start", &first[..1]]).exits(1).expect_stderr("multiple IDs found with provided prefix");
}

fn logs_are_complete_and_selected(client: Client) {
    let host = Host::new(client);
    let id = host.background(&[], "for i in 1 2 3 4 5; do echo line $i; done; sleep 0.2; echo bad >&2");
    host.cli(["wait", &id]).ok();
    let output = host.cli(["logs", &id]).exits(0);
    assert_eq!(output.stdout, "line 1\nline 2\nline 3\nline 4\nline 5\n");
    assert_eq!(output.stderr, "bad\n");
    let output = host.cli(["logs", "--tail", "2", &id]).exits(0);
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("line 5\n", "bad\n"));
    let stamped = host.cli(["logs", "-t", "--tail", "1", &id]).exits(0).stderr;
    let (time, text) = stamped.trim_end().split_once(' ').unwrap();
    assert_eq!(text, "bad");
    assert!(time.len() >= 20 && time.contains('T') && time.ends_with('Z'), "{time}");
    assert_eq!(host.cli(["logs", "--since", "2099-01-01T00:00:00Z", &id]).ok(), "");
    assert_eq!(host.cli(["logs", "--since", "1h", &id]).ok().lines().count(), 5);
    // A line longer than any buffer, and a last one without an end.
    let id = host.background(&[], "head -c 100000 /dev/zero | tr '\\0' x; echo; printf end");
    host.cli(["wait", &id]).ok();
    let text = host.cli(["logs", &id]).exits(0).stdout;
    assert_eq!(text.len(), 100_004);
    assert!(text.ends_with("x\nend"));
}

fn logs_follow_until_the_end(client: Client) {
    let host = Host::new(client);
    let id = host.background(&[], "for i in 1 2 3 4 5 6; do echo $i; sleep 0.1; done; exit 1");
    assert_eq!(host.cli(["logs", "-f", &id]).ok(), "1\n2\n3\n4\n5\n6");
}

fn exec_runs_beside_the_program(client: Client) {
    let host = Host::new(client);
    let id = host.background(&["-e", "A=1", "-w", "/tmp", "--hostname", "h"], FOREVER);
    let output = host.cli(["exec", &id, "sh", "-c", "echo $A; pwd; hostname; echo e >&2; exit 9"]).exits(9);
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("1\n/tmp\nh\n", "e\n"));
    assert_eq!(
        host.cli(["exec", "-e", "B=2", "-w", "/etc", "-u", "guest", &id, "sh", "-c", "echo $B; pwd; id -un"])
            .ok(),
        "2\n/etc\nguest"
    );
    assert_eq!(host.cli(["exec", "-i", &id, "cat"]).stdin("through").ok(), "through");
    host.cli(["exec", "-d", &id, "touch", "/tmp/made"]).ok();
    eventually("the detached exec's file", || {
        (host.cli(["exec", &id, "test", "-e", "/tmp/made"]).run().code == 0).then_some(())
    });
    // The same confinement as the container's own program.
    let same = "grep -E '^(CapEff|CapBnd|Seccomp|NoNewPrivs):' /proc/self/status";
    let (own, beside) = (host.script(&[], same), host.cli(["exec", &id, "sh", "-c", same]).ok());
    assert_eq!(own, beside);
    host.cli(["rm", "-f", &id]).ok();
    host.assert_nothing_left();
}

fn exec_failures_have_their_statuses(client: Client) {
    let host = Host::new(client);
    let id = host.background(&[], FOREVER);
    let output = host.cli(["exec", &id, "no-such-program"]).run();
    // 126 is what Docker 20.10 made of it.
    assert!(output.code == 127 || host.is_peer(), "{output}");
    assert!((output.stdout + &output.stderr).contains("executable file not found"));
    host.cli(["exec", &id, "/etc/passwd"]).exits(126);
    host.cli(["exec", "-d", "nobody", "true"]).exits(1).expect_stderr("No such container: nobody");
    host.cli(["stop", "-t", "5", &id]).ok();
    host.cli(["exec", &id, "true"]).exits(1).expect_stderr("is not running");
}

fn inspect_says_what_was_asked_for(client: Client) {
    let host = Host::new(client);
    let flags = [
        "--name",
        "ii",
        "-m",
        "64m",
        "--cpus",
        "0.5",
        "--pids-limit",
        "33",
        "--cap-add",
        "NET_ADMIN",
        "-p",
        "80",
        "--stop-timeout",
        "7",
    ];
    let id = host.cli(["create"].iter().chain(&flags).chain(&["busybox", "sleep", "1"])).ok();
    let info = host.inspect("ii");
    assert_eq!(info["Id"], id.as_str());
    assert_eq!(info["Config"]["Cmd"], json!(["sleep", "1"]));
    assert_eq!(info["Path"], "sleep");
    assert_eq!(info["Args"], json!(["1"]));
    assert_eq!(info["Config"]["Image"], "busybox");
    assert_eq!(info["Config"]["StopTimeout"], 7);
    assert_eq!(info["Config"]["Hostname"], id[..12]);
    assert_eq!(info["HostConfig"]["Memory"], 64 << 20);
    assert_eq!(info["HostConfig"]["NanoCpus"], 500_000_000);
    assert_eq!(info["HostConfig"]["PidsLimit"], 33);
    assert!(info["HostConfig"]["CapAdd"][0].as_str().unwrap().ends_with("NET_ADMIN"));
    assert_eq!(info["HostConfig"]["PortBindings"]["80/tcp"][0]["HostPort"], "");
    assert_eq!(info["State"]["Status"], "created");
    assert_eq!(info["State"]["StartedAt"], "0001-01-01T00:00:00Z");
    assert!(info["Image"].as_str().unwrap().starts_with("sha256:"));
    assert_eq!(info["Platform"], "linux");
    let text = host.cli(["inspect", "ii"]).ok();
    let list: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list[0]["Id"], id.as_str());
    assert_eq!(
        host.cli(["inspect", "-f", "{{.State.Status}} {{json .Config.Cmd}}", "ii"]).ok(),
        "created [\"sleep\",\"1\"]"
    );
}

fn events_tell_the_story(client: Client) {
    let host = Host::new(client);
    let id = host.cli(["run", "--name", "ev", "-l", "k=v", "busybox", "sh", "-c", "exit 2"]).exits(2);
    drop(id);
    host.cli(["rm", "ev"]).ok();
    let until = host.get("/info")["SystemTime"].as_str().unwrap().to_owned();
    let args = ["events", "--since", "1h", "--until", &until, "--filter", "container=ev"];
    let story =
        host.cli(args.iter().chain(&["--format", "{{.Action}} {{index .Actor.Attributes \"k\"}}"])).ok();
    let actions: Vec<_> = story.lines().collect();
    for action in ["create v", "start v", "die v", "destroy v"] {
        assert!(actions.contains(&action), "{action} in {actions:?}");
    }
    let place = |a: &str| actions.iter().position(|x| *x == a).unwrap();
    assert!(
        place("create v") < place("start v")
            && place("start v") < place("die v")
            && place("die v") < place("destroy v")
    );
    let lines = host.cli(args.iter().chain(&["--filter", "event=die"])).ok();
    assert!(
        lines.contains("exitCode=2") && lines.contains("name=ev") && lines.contains("image=busybox"),
        "{lines}"
    );
}

fn version_and_info_answer(client: Client) {
    let host = Host::new(client);
    let text = host.cli(["version"]).ok();
    assert!(text.contains("Client:") && text.contains("Server:"), "{text}");
    let wanted = host.get("/version")["Version"].as_str().unwrap().to_owned();
    assert_eq!(host.cli(["version", "--format", "{{.Server.Version}}"]).ok(), wanted);
    let text = host.cli(["info"]).ok();
    assert!(text.contains("Images: 1") && text.contains("Containers: 0"), "{text}");
    assert_eq!(host.cli(["info", "--format", "{{.OSType}} {{.NCPU}}"]).ok().split(' ').next(), Some("linux"));
}

#[test]
fn statuses_of_a_containers_life() {
    let engine = Engine::with_busybox();
    let body = json!({ "Image": "busybox", "Cmd": ["sh", "-c", FOREVER] });
    let made = engine.post("/containers/create?name=ss", &body).expect(201).json();
    let id = made["Id"].as_str().unwrap();
    assert_eq!(made["Warnings"], json!([]));
    engine.post("/containers/create?name=ss", &body).expect(409);
    engine.request("POST", &format!("/containers/{id}/kill")).expect(409);
    engine.request("POST", "/containers/ss/start").expect(204);
    engine.request("POST", "/containers/ss/start").expect(304);
    engine.request("DELETE", "/containers/ss").expect(409);
    engine.request("POST", "/containers/ss/kill?signal=NOPE").expect(400);
    engine.request("POST", "/containers/ss/stop?t=10").expect(204);
    engine.request("POST", "/containers/ss/stop").expect(304);
    if !engine.is_peer() {
        engine.request("POST", "/containers/ss/wait?condition=sometime").expect(400);
    }
    assert_eq!(engine.request("POST", "/containers/ss/wait").expect(200).json()["StatusCode"], 0);
    engine.request("DELETE", "/containers/ss").expect(204);
    for (method, path) in [
        ("POST", "start"),
        ("POST", "stop"),
        ("POST", "kill"),
        ("POST", "wait"),
        ("GET", "json"),
        ("GET", "logs?stdout=1"),
    ] {
        let message = engine.request(method, &format!("/containers/ss/{path}")).expect(404).message();
        assert_eq!(message, "No such container: ss");
    }
    engine.assert_nothing_left();
}

#[test]
fn every_version_in_range_is_served_and_no_other() {
    let engine = Engine::start();
    let version = engine.get("/version");
    let (low, high) = (version["MinAPIVersion"].as_str().unwrap(), version["ApiVersion"].as_str().unwrap());
    for v in [low, "1.30", "1.40", high] {
        engine.request("GET", &format!("/v{v}/containers/json")).expect(200);
    }
    let new = engine.request("GET", "/v1.99/info").expect(400).message();
    assert_eq!(new, format!("client version 1.99 is too new. Maximum supported API version is {high}"));
    let ping = engine.request("GET", "/_ping").expect(200);
    assert_eq!(ping.text(), "OK");
    assert_eq!(ping.header("api-version"), Some(high));
    assert!(engine.request("HEAD", "/_ping").expect(200).body.is_empty());
}
