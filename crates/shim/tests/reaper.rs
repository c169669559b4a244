//! The `--init` process: signals, orphans, statuses.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod bundle;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use bundle::{Bundle, add_libraries, runtime};

fn init(words: &[&str]) -> Command {
    let mut command = Command::new(runtime());
    command.arg("init").arg("--").args(words).stdin(Stdio::null());
    command
}

fn output(words: &[&str]) -> Output {
    init(words).output().unwrap()
}

#[test]
fn the_programs_status_is_passed_on() {
    for (script, code) in [("exit 0", 0), ("exit 42", 42), ("kill -9 $$", 137), ("kill -15 $$", 143)] {
        assert_eq!(output(&["sh", "-c", script]).status.code(), Some(code), "{script}");
    }
    let done = output(&["sh", "-c", "echo out; echo err >&2"]);
    assert_eq!((&done.stdout[..], &done.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
}

#[test]
fn a_program_that_cannot_be_run_is_126_or_127() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "text").unwrap();
    for (program, code) in [
        ("no-such-program", 127),
        ("/no/such/program", 127),
        (file.to_str().unwrap(), 126),
        (dir.path().to_str().unwrap(), 126),
    ] {
        let done = output(&[program]);
        let says = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(code), "{says}");
        assert!(says.starts_with("init: ") && says.contains(program), "{says}");
    }
    assert_eq!(output(&[]).status.code(), Some(125));
}

#[test]
fn signals_are_forwarded() {
    for signal in ["TERM", "HUP", "USR1", "INT", "RTMIN"] {
        let script =
            format!("trap 'kill $sleep; echo got; exit 5' {signal}; sleep 10 & sleep=$!; echo ready; wait");
        let mut child = init(&["bash", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let pid = child.id().to_string();
        assert!(Command::new("/bin/kill").args(["-s", signal, &pid]).status().unwrap().success());
        assert_eq!(lines.next().unwrap().unwrap(), "got", "{signal}");
        assert_eq!(child.wait().unwrap().code(), Some(5), "{signal}");
    }
}

/// In a container, where the reaper is process 1 and orphans become its children.
#[test]
fn orphans_are_reaped() {
    // Each subshell ends at once and leaves its sleep to process 1. A zombie would still have a status.
    let script = "for i in 1 2 3 4 5; do (sleep 2 & echo $! >>/tmp/orphans); done; sleep 0.02
        for pid in $(cat /tmp/orphans); do grep PPid /proc/$pid/status; done
        sleep 4; for pid in $(cat /tmp/orphans); do test -e /proc/$pid && echo left; done; readlink /proc/1/exe; exit 9";
    let bundle = Bundle::new(&["/sbin/brig-init", "sh", "-c", script]);
    let root = Path::new(bundle.dir()).join("rootfs");
    add_libraries(&root);
    fs::create_dir_all(root.join("sbin")).unwrap();
    fs::copy(runtime(), root.join("sbin/brig-init")).unwrap();
    let done = bundle.run(&["run", "--bundle", bundle.dir(), &bundle.id]);
    assert_eq!((done.code, done.err.as_str()), (9, ""), "{}", done.out);
    assert!(!done.out.contains("left") && done.out.ends_with("/sbin/brig-init\n"), "{}", done.out);
    assert_eq!(done.out.matches("PPid:\t1\n").count(), 5, "{}", done.out);
    bundle.assert_nothing_left();
}

/// As `docker stop` does it: the signal goes to process 1, which must not be deaf to it.
#[test]
fn process_one_hands_a_termination_on() {
    let bundle = Bundle::new(&["/sbin/brig-init", "sleep", "1000"]);
    let root = Path::new(bundle.dir()).join("rootfs");
    add_libraries(&root);
    fs::create_dir_all(root.join("sbin")).unwrap();
    fs::copy(runtime(), root.join("sbin/brig-init")).unwrap();
    bundle.good(&["run", "-d", "--bundle", bundle.dir(), &bundle.id]);
    bundle::eventually("the reaper has a child", || bundle.good(&["ps", &bundle.id]).contains(" sleep 1000"));
    bundle.good(&["kill", &bundle.id, "TERM"]);
    bundle::eventually("the container stops", || bundle.status() == "stopped");
    bundle.good(&["delete", &bundle.id]);
    bundle.assert_nothing_left();
}
