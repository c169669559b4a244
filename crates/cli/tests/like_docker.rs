//! `brig` and the docker command side by side on one engine: what they print and how they end is the same.
//!
//! Proven on Debian's dockerd with `BRIG_TEST_ENGINE=dockerd`; it holds whatever the engine is.

use brigantine_testkit::{Client, Engine};

/// What a client printed and its exit status, with the client's own name taken out.
fn said(engine: &Engine, client: Client, arguments: &[&str]) -> String {
    let done = engine.client(client, arguments).run();
    let text = format!("status {}\n--- out\n{}--- err\n{}", done.code, done.stdout, done.stderr);
    // Docker writes "See" in a few places where it writes "Run" in all others.
    text.replace("See 'docker", "Run 'docker").replace("docker", "brig").replace("Docker", "Brig")
}

#[track_caller]
fn alike(engine: &Engine, arguments: &[&str]) {
    let (theirs, ours) = (said(engine, Client::Docker, arguments), said(engine, Client::Brig, arguments));
    assert!(theirs == ours, "{arguments:?}\n=== docker\n{theirs}\n=== brig\n{ours}");
}

#[test]
fn lists_and_documents() {
    let engine = Engine::with_busybox();
    engine
        .brig([
            "run",
            "-d",
            "--name",
            "web",
            "--network",
            "none",
            "--label",
            "a=b",
            "--label",
            "c",
            "busybox",
            "sleep",
            "600",
        ])
        .ok();
    engine.brig(["create", "--name", "idle", "busybox", "sh", "-c", "echo a rather long command line"]).ok();
    for arguments in [
        &["ps", "--format", "{{.ID}} {{.Names}} {{.Image}} {{.Command}} {{.State}} {{.Ports}} {{.Networks}}"]
            [..],
        &["ps", "-a", "-q"],
        &["ps", "-a", "-q", "--no-trunc"],
        &["ps", "-a", "--filter", "name=idle", "--format", "json"],
        &["ps", "--format", "table {{.Names}}\\t{{.Label \"a\"}}\\t{{upper .Image}}"],
        &["ps", "--format", "{{.Nope}}"],
        &["ps", "--format", "{{.ID"],
        &["images", "-q"],
        &["images", "--digests"],
        &["images", "--format", "json"],
        &["image", "ls", "busybox:latest", "--no-trunc"],
        &["history", "busybox"],
        &["network", "ls", "--format", "{{.Name}} {{.Driver}} {{.Scope}}"],
        &["volume", "ls"],
        &["inspect", "web"],
        &["inspect", "busybox"],
        &["inspect", "bridge"],
        &["inspect", "web", "nope"],
        &[
            "inspect",
            "-f",
            "{{.Name}} {{json .Config.Labels}} {{if .State.Running}}up{{end}} {{len .Config.Cmd}}",
            "web",
        ],
        &["inspect", "-f", "{{range $k, $v := .Config.Labels}}{{$k}}={{$v}};{{end}}", "web"],
        &["inspect", "-f", "{{.State.Nope}}", "web"],
        &["container", "inspect", "nope"],
        &["image", "inspect", "nope"],
        &["port", "web"],
    ] {
        alike(&engine, arguments);
    }
    engine.brig(["rm", "-f", "web", "idle"]).ok();
}

#[test]
fn what_runs_and_what_does_not() {
    let engine = Engine::with_busybox();
    for arguments in [
        &["run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 7"][..],
        &[
            "run",
            "--rm",
            "-e",
            "A=1",
            "-w",
            "/tmp",
            "-u",
            "1:2",
            "-h",
            "here",
            "busybox",
            "sh",
            "-c",
            "id -u; id -g; pwd; hostname; echo $A",
        ],
        &["run", "--rm", "--pull", "never", "nope"],
        &["run", "--rm", "--foo", "busybox"],
        &["run", "--rm", "--restart", "always", "busybox"],
        &["run", "-it", "busybox"],
        &["run"],
        &["run", "-m", "xx", "busybox"],
        &["run", "-p", "70000", "busybox"],
        &["run", "--mount", "type=bind", "busybox"],
        &["run", "--ulimit", "nofile=5:1", "busybox"],
        &["run", "--cpus", "foo", "busybox"],
        &["create", "--pid", "foo", "busybox"],
        &["create", "--env-file", "/nope", "busybox"],
        &["create", "BUSYBOX"],
        &["start", "nope"],
        &["stop", "nope"],
        &["kill", "nope"],
        &["logs", "nope"],
        &["exec", "nope", "ls"],
        &["wait", "nope"],
        &["rm", "nope"],
        &["rmi", "nope"],
        &["attach", "nope"],
        &["rename", "a"],
        &["ps", "extra"],
        &["ps", "--foo"],
        &["ps", "-n", "x"],
        &["nonsense"],
    ] {
        alike(&engine, arguments);
    }
}

#[test]
fn missing_and_forbidden_programs_have_their_exit_statuses() {
    let engine = Engine::with_busybox();
    engine.brig(["run", "--rm", "busybox", "nosuch"]).exits(127).expect_stderr("executable file not found");
    engine.brig(["run", "--rm", "busybox", "/etc"]).exits(126);
}

#[test]
fn input_is_passed_on_to_its_end() {
    let engine = Engine::with_busybox();
    let lines: String = (0..50_000).map(|n| n.to_string() + "\n").collect::<Vec<_>>().concat();
    let done = engine
        .brig(["run", "--rm", "-i", "busybox", "sh", "-c", "cat; echo end"])
        .stdin(lines.clone())
        .exits(0);
    assert!(done.stdout == lines + "end\n", "lost bytes: {} came back", done.stdout.len());
}

#[test]
fn the_detach_keys_leave_the_container_running() {
    let engine = Engine::with_busybox();
    let mut terminal = engine.terminal(
        Client::Brig,
        ["run", "-it", "--name", "box", "busybox", "sh", "-c", "echo ready; sleep 600"],
    );
    terminal.expect("ready");
    terminal.send([16, 17]);
    assert!(terminal.wait().success());
    assert_eq!(engine.brig(["inspect", "-f", "{{.State.Status}}", "box"]).ok(), "running");
    engine.brig(["rm", "-f", "box"]).ok();
}

#[test]
fn the_container_sees_the_terminals_size_and_its_changes() {
    let engine = Engine::with_busybox();
    let script = "echo ready; while ! read -t 1 line; do stty size; done";
    let mut terminal = engine.terminal(Client::Brig, ["run", "--rm", "-it", "busybox", "sh", "-c", script]);
    terminal.expect("ready");
    terminal.resize(41, 123);
    terminal.expect("41 123");
    terminal.send("\r");
    assert!(terminal.wait().success());
}

#[test]
fn an_engine_that_is_not_there_is_named() {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_brig"));
    let done = command.args(["-H", "unix:///nowhere/at.sock", "ps"]).output().expect("brig runs");
    assert_eq!(done.status.code(), Some(1));
    insta::assert_snapshot!("unreachable", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn what_is_not_built_says_so() {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_brig"));
    let done = command.args(["swarm", "init"]).output().expect("brig runs");
    assert_eq!(done.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&done.stderr).contains("'brig swarm' is not built yet"));
}
