//! Checkpoint and restore, by the criu in PATH (or the one that `BRIGANTINE_CRIU` names); where that one cannot work
//! with the kernel, its own check says so, and only the refusals are tested.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod bundle;

use std::fs;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use bundle::{Bundle, Done, eventually};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::json;

fn criu() -> String {
    std::env::var("BRIGANTINE_CRIU").unwrap_or_else(|_| "criu".to_owned())
}

fn able(feature: &[&str]) -> bool {
    let mut check = Command::new(criu());
    let done = check
        .arg("check")
        .args(feature)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    done.is_ok_and(|status| status.success())
}

fn run(bundle: &Bundle, words: &[&str], out: &str) -> Done {
    let mut command = bundle.command();
    command.arg("--criu").arg(criu()).args(words);
    command.stdout(fs::OpenOptions::new().create(true).append(true).open(bundle.path(out)).unwrap());
    command.stderr(fs::File::create(bundle.path("criu.err")).unwrap());
    let status = command.status().unwrap();
    let err = fs::read_to_string(bundle.path("criu.err")).unwrap();
    Done { code: status.code().unwrap(), out: String::new(), err }
}

/// A container that counts into a file, with a file and a group of the host's mounted.
fn counting() -> Bundle {
    let bundle =
        Bundle::new(&["/bin/sh", "-c", "n=0; while :; do n=$((n+1)); echo $n >>/count; sleep 0.05; done"]);
    let (source, outer) = (bundle.path("source"), bundle.path("outer"));
    fs::write(&source, "text\n").unwrap();
    fs::create_dir(&outer).unwrap();
    bundle.configure(|c| {
        let mounts = c["mounts"].as_array_mut().unwrap();
        for (at, source, access) in
            [("/etc/bound", &source, "ro"), ("/outer", &outer, "rw"), ("/outer/in/bound", &source, "ro")]
        {
            mounts.push(
                json!({"destination": at, "type": "bind", "source": source, "options": ["bind", access]}),
            );
        }
        c["linux"]["maskedPaths"] = json!(["/proc/kcore", "/proc/acpi"]);
        c["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
    });
    let done = run(&bundle, &["run", "-d", "--bundle", bundle.dir(), &bundle.id], "first.out");
    assert_eq!((done.code, done.err.as_str()), (0, ""));
    eventually("it counts", || counted(&bundle) >= 3);
    bundle
}

fn counted(bundle: &Bundle) -> usize {
    let text = fs::read_to_string(bundle.root().join("count")).unwrap_or_default();
    let numbers: Vec<usize> = text.lines().map(|l| l.parse().unwrap()).collect();
    // Nothing begins anew, and nothing is left out.
    assert!(numbers.iter().enumerate().all(|(at, n)| *n == at + 1), "{numbers:?}");
    numbers.len()
}

#[test]
fn a_container_goes_on_where_it_was() {
    if !able(&[]) {
        return;
    }
    let bundle = counting();
    let (images, work) = (bundle.path("images"), bundle.path("work"));
    let id = bundle.id.as_str();
    let done = run(
        &bundle,
        &["checkpoint", "--image-path", &images, "--work-path", &work, "--leave-running", id],
        "x",
    );
    assert_eq!((done.code, done.err.as_str()), (0, ""));
    assert_eq!(bundle.status(), "running");
    let then = counted(&bundle);
    eventually("it still counts", || counted(&bundle) > then);

    let done = run(&bundle, &["checkpoint", "--image-path", &images, "--work-path", &work, id], "x");
    assert_eq!((done.code, done.err.as_str()), (0, ""));
    bundle.assert_nothing_left();
    let stopped = counted(&bundle);
    // Mount points that somebody has tidied away come back.
    fs::remove_dir_all(bundle.path("outer/in")).unwrap();
    let pid_file = bundle.path("pid");
    let words = [
        "restore",
        "-d",
        "--bundle",
        bundle.dir(),
        "--image-path",
        &images,
        "--work-path",
        &work,
        "--pid-file",
        &pid_file,
        id,
    ];
    let done = run(&bundle, &words, "second.out");
    assert_eq!((done.code, done.err.as_str()), (0, ""));
    eventually("it goes on counting", || counted(&bundle) > stopped + 3);
    let state = bundle.state();
    assert_eq!(
        (&state["status"], &state["pid"].to_string()),
        (&json!("running"), &fs::read_to_string(&pid_file).unwrap())
    );
    assert_eq!(bundle.good(&["exec", id, "cat", "/etc/bound", "/outer/in/bound"]), "text\ntext\n");
    assert!(bundle.bad(&["exec", id, "nope"]).contains("not found in $PATH"));
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", state["pid"])).unwrap();
    assert!(groups.lines().any(|l| l.ends_with(&format!("/{id}"))), "{groups}");
    // The restorer's mounts are nobody else's.
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains("criu-root"));
    bundle.good(&["delete", "--force", id]);
    bundle.assert_nothing_left();
}

#[test]
fn a_container_with_a_terminal_goes_on_at_another() {
    if !able(&[]) {
        return;
    }
    let bundle = Bundle::new(&["/bin/sh", "-c", "n=0; while read line; do n=$((n+1)); echo $n: $line; done"]);
    bundle.configure(|c| c["process"]["terminal"] = json!(true));
    let (images, socket, id) = (bundle.path("images"), bundle.path("console.sock"), bundle.id.as_str());
    let listener = UnixListener::bind(&socket).unwrap();
    let say = |terminal: &mut fs::File, text: &str, wanted: &str| {
        writeln!(terminal, "{text}").unwrap();
        let (mut said, mut buffer) = (String::new(), [0; 256]);
        while !said.contains(wanted) {
            let length = terminal.read(&mut buffer).unwrap();
            said.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    };
    let made = ["run", "-d", "--console-socket", &socket, "--bundle", bundle.dir(), id];
    assert_eq!(run(&bundle, &made, "x").err, "");
    let mut first = terminal(&listener);
    say(&mut first, "before", "1: before");
    // Groups as they are: whatever criu makes is the container's from the start.
    let manage = ["--manage-cgroups-mode", "ignore", "--image-path", &images];
    assert_eq!(run(&bundle, &[&["checkpoint"][..], &manage, &[id]].concat(), "x").err, "");
    let restore = ["restore", "-d", "--console-socket", &socket, "--bundle", bundle.dir()];
    assert_eq!(run(&bundle, &[&restore[..], &manage, &[id]].concat(), "x").err, "");
    let mut second = terminal(&listener);
    say(&mut second, "after", "2: after");
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", bundle.state()["pid"])).unwrap();
    assert!(groups.lines().any(|l| l.ends_with(&format!("/{id}"))), "{groups}");
    bundle.good(&["delete", "--force", id]);
    bundle.assert_nothing_left();
}

/// What comes through a console socket.
fn terminal(listener: &UnixListener) -> fs::File {
    let (stream, _) = listener.accept().unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    let mut data = [std::io::IoSliceMut::new(&mut name)];
    rustix::net::recvmsg(&stream, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fd.unwrap().into()
}

#[test]
fn a_checkpoint_may_come_in_two_parts() {
    // Changed memory is found by the kernel's soft-dirty bits, which not every kernel has.
    if !able(&["--feature", "mem_dirty_track"]) {
        return;
    }
    let bundle = counting();
    let (first, second) = (bundle.path("first"), bundle.path("second"));
    let id = bundle.id.as_str();
    let done = run(&bundle, &["checkpoint", "--pre-dump", "--image-path", &first, id], "x");
    assert_eq!((done.code, done.err.as_str()), (0, ""));
    assert_eq!(bundle.status(), "running");
    let refused =
        run(&bundle, &["checkpoint", "--parent-path", "/absolute", "--image-path", &second, id], "x");
    assert!(refused.err.contains("not a directory relative to the images"), "{refused:?}");
    let done = run(&bundle, &["checkpoint", "--parent-path", "../first", "--image-path", &second, id], "x");
    assert_eq!((done.code, done.err.as_str()), (0, ""));
    let stopped = counted(&bundle);
    // In the foreground, as `run` is.
    let mut restore = bundle.command();
    let mut restore = restore
        .args(["--criu", &criu(), "restore", "--bundle", bundle.dir(), "--image-path", &second, id])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually("it goes on counting", || counted(&bundle) > stopped + 3);
    bundle.good(&["kill", id, "KILL"]);
    assert_eq!(restore.wait().unwrap().code(), Some(137));
    bundle.assert_nothing_left();
}

#[test]
fn what_cannot_be_checkpointed_is_refused_in_words() {
    let bundle = Bundle::sleeping();
    let id = bundle.id.as_str();
    let images = bundle.path("images");
    let says = bundle.bad(&["--criu", "/no/criu", "checkpoint", "--image-path", &images, id]);
    assert!(says.contains("executing criu: /no/criu cannot be executed"), "{says}");
    let says = bundle.bad(&["--criu", "no-such-criu", "checkpoint", "--image-path", &images, id]);
    assert!(says.contains("\"no-such-criu\" is not in $PATH"), "{says}");
    let says = bundle.bad(&["checkpoint", "--manage-cgroups-mode", "odd", "--image-path", &images, id]);
    assert!(says.contains("\"odd\" is not one of"), "{says}");
    // A criu that fails is quoted.
    let fake = bundle.path("criu");
    let work = bundle.path("work");
    let script = format!(
        "#!/bin/sh\n[ $1 = swrk ] || exit 2\n\
        echo '(00.1) Error (criu/x.c:1): first' >{work}/dump.log; echo '(00.2) Error (criu/y.c:7): the cause' >>{work}/dump.log\n\
        echo '(00.3) Error (criu/cr-dump.c:9): Dumping FAILED.' >>{work}/dump.log; exit 1\n"
    );
    fs::write(&fake, script).unwrap();
    fs::set_permissions(&fake, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let says =
        bundle.bad(&["--criu", &fake, "checkpoint", "--work-path", &work, "--image-path", &images, id]);
    assert!(says.contains("criu dump: exit status: 1: the cause (log: "), "{says}");
    assert_eq!(bundle.status(), "running");
    let says = bundle.bad(&["restore", "--bundle", bundle.dir(), "--image-path", "/no/images", "other"]);
    assert!(says.contains("reading /no/images/descriptors.json: no such file"), "{says}");
    assert!(bundle.bad(&["state", "other"]).contains("does not exist"));
}
