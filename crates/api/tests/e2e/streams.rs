//! Bytes between the user and the program: half-close, volume, terminals, detaching, signals, several at once.

use std::{
    io::{Read as _, Write as _},
    net::Shutdown,
    time::Duration,
};

use brigantine_testkit::{Client, Engine, eventually, http};
use serde_json::json;

use crate::Host;

both![
    the_end_of_input_reaches_the_program,
    megabytes_pass_both_ways_unchanged,
    output_of_a_quick_program_is_never_lost,
    a_terminal_has_a_size_and_follows_the_window,
    detach_keys_leave_the_program_running,
    an_attached_client_passes_signals_on,
    exec_has_a_terminal,
    attach_shares_the_output,
];

fn the_end_of_input_reaches_the_program(client: Client) {
    let host = Host::new(client);
    assert_eq!(host.cli(["run", "--rm", "-i", "busybox", "cat"]).stdin("hi\n").ok(), "hi");
    // What the program says after its input ended still comes.
    let script = "wc -c; sleep 0.3; echo late";
    assert_eq!(host.cli(["run", "--rm", "-i", "busybox", "sh", "-c", script]).stdin("12345").ok(), "5\nlate");
    // Without -i there is no input at all.
    assert_eq!(host.cli(["run", "--rm", "busybox", "cat"]).stdin("lost").ok(), "");
    host.assert_nothing_left();
}

fn megabytes_pass_both_ways_unchanged(client: Client) {
    let host = Host::new(client);
    let line =
        (0..=250u8).map(|b| if b == b'\n' { b' ' } else { b % 95 + 32 }).map(char::from).collect::<String>();
    let text = format!("{line}\n").repeat(16_000);
    let back = host.cli(["run", "--rm", "-i", "busybox", "cat"]).stdin(text.clone()).exits(0);
    assert_eq!(back.stdout.len(), text.len());
    assert!(back.stdout == text);
    host.assert_nothing_left();
}

fn output_of_a_quick_program_is_never_lost(client: Client) {
    let host = Host::new(client);
    for n in 0..10 {
        assert_eq!(host.busybox(&["echo", &n.to_string()]), n.to_string());
    }
}

fn a_terminal_has_a_size_and_follows_the_window(client: Client) {
    let host = Host::new(client);
    let mut terminal = host.terminal(["run", "--rm", "-it", "busybox", "sh"]);
    terminal.expect("# ");
    terminal.send("tty; stty size\n");
    terminal.expect("/dev/pts/0");
    terminal.expect("24 80");
    terminal.resize(40, 100);
    eventually("the new size in the container", || {
        terminal.send("stty size\n");
        std::thread::sleep(Duration::from_millis(50));
        terminal.shown().contains("40 100").then_some(())
    });
    terminal.send("exit 13\n");
    assert_eq!(terminal.wait().code(), Some(13));
}

fn detach_keys_leave_the_program_running(client: Client) {
    let host = Host::new(client);
    let mut terminal = host.terminal(["run", "-it", "--name", "dd", "busybox", "sh"]);
    terminal.expect("# ");
    terminal.send("echo o''k\n");
    terminal.expect("ok");
    terminal.send([0x10, 0x11]);
    assert_eq!(terminal.wait().code(), Some(0), "{}", terminal.shown());
    assert_eq!(host.inspect("dd")["State"]["Running"], true);
    let mut again = host.terminal(["attach", "--detach-keys", "ctrl-x,q", "dd"]);
    again.send("\necho a''gain\n");
    again.expect("again");
    again.send([0x18, b'q']);
    again.wait();
    assert_eq!(host.inspect("dd")["State"]["Running"], true);
}

fn an_attached_client_passes_signals_on(client: Client) {
    let host = Host::new(client);
    let script = "trap 'echo caught; exit 21' TERM; echo up; while :; do sleep 0.05; done";
    let mut child = host.cli(["run", "--rm", "--name", "sig", "busybox", "sh", "-c", script]).spawn();
    host.wait_log("sig", "up");
    let kill = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(21));
    assert_eq!(text, "up\ncaught\n");
}

fn exec_has_a_terminal(client: Client) {
    let host = Host::new(client);
    let id = host.background(&[], "sleep 1000");
    let mut terminal = host.terminal(["exec", "-it", &id, "sh"]);
    terminal.expect("# ");
    terminal.send("tty; stty size\n");
    terminal.expect("/dev/pts/");
    terminal.expect("24 80");
    terminal.resize(30, 90);
    eventually("the new size in the container", || {
        terminal.send("stty size\n");
        std::thread::sleep(Duration::from_millis(50));
        terminal.shown().contains("30 90").then_some(())
    });
    terminal.send("exit 3\n");
    assert_eq!(terminal.wait().code(), Some(3));
}

fn attach_shares_the_output(client: Client) {
    let host = Host::new(client);
    let id = host.background(&["-i"], "while read x; do echo got $x; done; exit 5");
    let mut watcher = host.cli(["attach", "--no-stdin", &id]).spawn();
    // The watcher is there when the daemon answers it; give it input only then.
    std::thread::sleep(Duration::from_millis(500));
    let mut typist = host.cli(["attach", &id]).spawn();
    typist.stdin.as_mut().unwrap().write_all(b"one\n").unwrap();
    host.wait_log(&id, "got one");
    drop(typist.stdin.take());
    // Its input is not of the kind that ends with its first user, so the program goes on.
    host.cli(["kill", &id]).ok();
    let mut seen = String::new();
    watcher.stdout.take().unwrap().read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "got one\n");
    watcher.wait().unwrap();
    typist.wait().unwrap();
}

/// A container that was only created.
fn created(engine: &Engine, body: &serde_json::Value) -> String {
    engine.post("/containers/create", body).expect(201).json()["Id"].as_str().unwrap().to_owned()
}

#[test]
fn attaching_before_the_start_loses_no_byte() {
    let engine = Engine::with_busybox();
    let body = json!({ "Image": "busybox", "Cmd": ["sh", "-c", "cat; echo done >&2"],
        "OpenStdin": true, "StdinOnce": true, "AttachStdin": true, "AttachStdout": true, "AttachStderr": true });
    let id = created(&engine, &body);
    let version = if engine.is_peer() { "v1.41" } else { "v1.42" };
    let path = format!("/{version}/containers/{id}/attach?stream=1&stdin=1&stdout=1&stderr=1");
    let (head, mut stream) = http::hijack(engine.connect(), &path, "", true);
    assert_eq!(head.status, 101);
    assert_eq!(head.header("upgrade"), Some("tcp"));
    if !engine.is_peer() {
        assert_eq!(head.header("content-type"), Some("application/vnd.docker.multiplexed-stream"));
    }
    engine.request("POST", &format!("/containers/{id}/start")).expect(204);
    stream.get_mut().write_all(b"to and fro\n").unwrap();
    stream.get_ref().shutdown(Shutdown::Write).unwrap();
    let mut raw = Vec::new();
    stream.read_to_end(&mut raw).unwrap();
    let (out, err) = http::demultiplex(&raw);
    assert_eq!((out.as_slice(), err.as_slice()), (&b"to and fro\n"[..], &b"done\n"[..]));
    engine.request("DELETE", &format!("/containers/{id}?force=1")).expect(204);
    engine.assert_nothing_left();
}

#[test]
fn without_an_upgrade_the_stream_follows_a_plain_answer() {
    let engine = Engine::with_busybox();
    let id = created(&engine, &json!({ "Image": "busybox", "Cmd": ["echo", "x"] }));
    let (head, mut stream) =
        http::hijack(engine.connect(), &format!("/containers/{id}/attach?stream=1&stdout=1"), "", false);
    assert_eq!(head.status, 200);
    assert_eq!(head.header("content-type"), Some("application/vnd.docker.raw-stream"));
    engine.request("POST", &format!("/containers/{id}/start")).expect(204);
    let mut raw = Vec::new();
    stream.read_to_end(&mut raw).unwrap();
    assert_eq!(http::demultiplex(&raw).0, b"x\n");
}

#[test]
fn wait_answers_its_head_at_once_and_its_body_at_the_end() {
    let engine = Engine::with_busybox();
    let id = created(
        &engine,
        &json!({ "Image": "busybox", "Cmd": ["sh", "-c", "exit 7"], "HostConfig": { "AutoRemove": true } }),
    );
    for condition in ["next-exit", "removed"] {
        let id = if condition == "removed" {
            id.clone()
        } else {
            created(&engine, &json!({ "Image": "busybox", "Cmd": ["sh", "-c", "exit 7"] }))
        };
        let (head, mut stream) = http::hijack(
            engine.connect(),
            &format!("/containers/{id}/wait?condition={condition}"),
            "",
            false,
        );
        assert_eq!(head.status, 200);
        engine.request("POST", &format!("/containers/{id}/start")).expect(204);
        let mut text = String::new();
        stream.get_ref().set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        while !text.contains('}') {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            text.push(char::from(byte[0]));
        }
        assert!(text.contains("\"StatusCode\":7"), "{text}");
    }
    assert!(engine.request("GET", &format!("/containers/{id}/json")).status == 404);
}

#[test]
fn an_exec_streams_and_keeps_its_status() {
    let engine = Engine::with_busybox();
    let id = created(&engine, &json!({ "Image": "busybox", "Cmd": ["sleep", "1000"] }));
    engine.request("POST", &format!("/containers/{id}/start")).expect(204);
    let body = json!({ "Cmd": ["sh", "-c", "cat; exit 6"], "AttachStdin": true, "AttachStdout": true, "AttachStderr": true });
    let exec = engine.post(&format!("/containers/{id}/exec"), &body).expect(201).json();
    let exec = exec["Id"].as_str().unwrap();
    let (head, mut stream) = http::hijack(
        engine.connect(),
        &format!("/exec/{exec}/start"),
        "{\"Detach\":false,\"Tty\":false}",
        true,
    );
    assert_eq!(head.status, 101);
    stream.get_mut().write_all(b"abc").unwrap();
    stream.get_ref().shutdown(Shutdown::Write).unwrap();
    let mut raw = Vec::new();
    stream.read_to_end(&mut raw).unwrap();
    assert_eq!(http::demultiplex(&raw).0, b"abc");
    let status = eventually("the exec's end", || {
        let status = engine.get(&format!("/exec/{exec}/json"));
        (status["Running"] == false).then_some(status)
    });
    assert_eq!(status["ExitCode"], 6);
    assert_eq!(status["ContainerID"], id.as_str());
    assert!(engine.is_peer() || engine.post(&format!("/exec/{exec}/start"), &json!({})).status == 409);
    assert_eq!(
        engine.request("GET", "/exec/nobody/json").expect(404).message(),
        "No such exec instance: nobody"
    );
}

#[test]
fn a_client_that_vanishes_does_not_end_the_program() {
    let engine = Engine::with_busybox();
    let id = created(
        &engine,
        &json!({ "Image": "busybox", "Cmd": ["sh", "-c", "while :; do echo tick; sleep 0.02; done"] }),
    );
    let (_, stream) =
        http::hijack(engine.connect(), &format!("/containers/{id}/attach?stream=1&stdout=1"), "", true);
    engine.request("POST", &format!("/containers/{id}/start")).expect(204);
    drop(stream);
    let before = engine.docker(["logs", &id]).ok().lines().count();
    eventually("the log to grow", || {
        (engine.docker(["logs", &id]).ok().lines().count() > before + 5).then_some(())
    });
    assert_eq!(engine.inspect(&id)["State"]["Running"], true);
}
