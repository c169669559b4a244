//! Options that podman, containerd and people give: descriptors, terminals, notifications, limits.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod bundle;

use std::fs;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::Stdio;
use std::time::Duration;

use bundle::{Bundle, eventually};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::{Value, json};

/// The descriptor that comes with the first bytes of a connection.
fn descriptor(listener: &UnixListener) -> (OwnedFd, Vec<u8>) {
    let (stream, _) = listener.accept().unwrap();
    let mut bytes = [0; 64];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut data = [std::io::IoSliceMut::new(&mut bytes)];
    let got = rustix::net::recvmsg(&stream, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut fds = control.drain().filter_map(|m| match m {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.next().unwrap().next().unwrap();
    (fd, bytes[..got.bytes].to_vec())
}

#[test]
fn a_terminal_goes_to_the_console_socket() {
    let bundle = Bundle::new(&["/bin/sh", "-c", "test -t 0 && stty size; read line; echo got $line"]);
    std::os::unix::fs::symlink("busybox", bundle.root().join("bin/stty")).unwrap();
    bundle.configure(|c| {
        c["process"]["terminal"] = json!(true);
        c["process"]["consoleSize"] = json!({"height": 11, "width": 22});
    });
    let (socket, pidfds) = (bundle.path("console.sock"), bundle.path("pidfd.sock"));
    let (listener, pidfd_listener) =
        (UnixListener::bind(&socket).unwrap(), UnixListener::bind(&pidfds).unwrap());
    let says = bundle.bad(&["run", "-d", "--bundle", bundle.dir(), &bundle.id]);
    assert!(says.contains("needs --console-socket"), "{says}");
    let words = [
        "create",
        "--bundle",
        bundle.dir(),
        "--console-socket",
        &socket,
        "--pidfd-socket",
        &pidfds,
        &bundle.id,
    ];
    bundle.good(&words);
    let (master, name) = descriptor(&listener);
    assert_eq!(name, b"/dev/ptmx");
    let (pidfd, _) = descriptor(&pidfd_listener);
    assert!(rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::CONT).is_ok());
    bundle.good(&["start", &bundle.id]);
    let mut master = fs::File::from(master);
    master.write_all(b"hello\n").unwrap();
    let mut said = String::new();
    let mut buffer = [0; 256];
    // The end of a terminal is an error.
    while let Ok(length @ 1..) = master.read(&mut buffer) {
        said.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    assert!(said.contains("11 22\r\n") && said.contains("got hello\r\n"), "{said:?}");

    // An exec has one too.
    bundle.good(&["delete", "--force", &bundle.id]);
    let bundle = Bundle::sleeping();
    let socket = bundle.path("console.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    bundle.good(&[
        "exec",
        "--tty",
        "--detach",
        "--console-socket",
        &socket,
        &bundle.id,
        "sh",
        "-c",
        "test -t 1 && echo tty",
    ]);
    let (master, _) = descriptor(&listener);
    let mut said = Vec::new();
    // A terminal may hand a line out in pieces.
    while !said.ends_with(b"\n") {
        let length = rustix::io::read(&master, &mut buffer).unwrap();
        said.extend_from_slice(&buffer[..length]);
    }
    assert_eq!(said, b"tty\r\n");
    assert!(bundle.bad(&["exec", "-t", "-d", &bundle.id, "true"]).contains("needs --console-socket"));
}

#[test]
fn descriptors_are_preserved_on_request_and_only_then() {
    let script =
        "cat /proc/self/fd/3 2>/dev/null; ls /proc/self/fd | tr '\\n' ' '; echo $LISTEN_FDS $LISTEN_PID";
    let bundle = Bundle::new(&["/bin/sh", "-c", script]);
    std::os::unix::fs::symlink("busybox", bundle.root().join("bin/tr")).unwrap();
    let file = bundle.path("file");
    fs::write(&file, "text\n").unwrap();
    let exe = bundle.exe.display();
    let run = |options: &str, environment: &str| {
        let words = format!(
            "exec {environment} {exe} --root {0}/state run --bundle {0} {options} {1} 3<{file}",
            bundle.dir(),
            bundle.id
        );
        let done = std::process::Command::new("sh").args(["-c", &words]).output().unwrap();
        String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned()
    };
    assert_eq!(run("--preserve-fds 1", ""), "text\n0 1 2 3 4 \n");
    assert_eq!(run("", ""), "0 1 2 3 \n");
    // A number that the runtime itself may get later is not the container's (CVE-2024-21626).
    let says = run("--preserve-fds 4", "");
    assert!(says.contains("descriptor 4 is to be preserved, but it is not open"), "{says}");
    assert_eq!(run("", "env LISTEN_FDS=1 LISTEN_PID=1"), "0 1 2 3 \n", "somebody else's");
    assert_eq!(run("", "sh -c 'LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"' --"), "text\n0 1 2 3 4 1 1\n");
    bundle.assert_nothing_left();
}

#[test]
fn readiness_reaches_the_service_manager() {
    let bundle = Bundle::new(&["/bin/sh", "-c", "echo $NOTIFY_SOCKET; sleep 1000"]);
    let manager = bundle.path("manager.sock");
    let socket = UnixDatagram::bind(&manager).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut create = bundle.command();
    create.env("NOTIFY_SOCKET", &manager).args(["create", "--bundle", bundle.dir(), &bundle.id]);
    assert!(
        create.stdout(fs::File::create(bundle.path("container.out")).unwrap()).status().unwrap().success()
    );
    let mut start = bundle.command();
    start.env("NOTIFY_SOCKET", &manager).args(["start", &bundle.id]);
    let mut start = start.stdout(Stdio::null()).spawn().unwrap();
    eventually("the program runs", || bundle.container_output() == "/run/notify/notify.sock\n");
    assert_eq!(start.try_wait().unwrap(), None, "it waits for the container to be ready");
    // What a program in the container sends.
    let pid = bundle.state()["pid"].to_string();
    let inside = UnixDatagram::unbound().unwrap();
    let address = format!("/proc/{pid}/root/run/notify/notify.sock");
    inside.send_to(b"STATUS=up\nMAINPID=1\n", &address).unwrap();
    inside.send_to(b"READY=1", &address).unwrap();
    let take = || {
        let mut buffer = [0; 200];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    assert_eq!(take(), "STATUS=up\n");
    assert_eq!(take(), "READY=1\n");
    assert_eq!(take(), format!("MAINPID={pid}\n"));
    assert!(start.wait().unwrap().success());
    assert_eq!(bundle.status(), "running");
}

#[test]
fn limits_are_changed_by_flags_and_remembered() {
    let bundle = Bundle::sleeping();
    let id = bundle.id.as_str();
    let data = || -> Value {
        serde_json::from_str::<Value>(&bundle.good(&["events", "--stats", id])).unwrap()["data"].clone()
    };
    bundle.good(&["update", "--memory", "48m", "--memory-swap", "48m", "--pids-limit", "21", id]);
    assert_eq!(data()["memory"]["usage"]["limit"], json!(48 << 20));
    assert_eq!(data()["pids"]["limit"], json!(21));
    // Larger than memory and swap together were; and without a limit.
    bundle.good(&["update", "--memory", "96m", "--memory-swap", "128m", id]);
    assert_eq!(data()["memory"]["usage"]["limit"], json!(96 << 20));
    bundle.good(&["update", "--cpu-period", "50000", "--cpu-quota", "25000", "--cpu-share", "512", id]);
    bundle.good(&["update", "--pids-limit", "-1", id]);
    assert_eq!(data()["pids"]["limit"], json!(0));
    let mut update = bundle.command();
    let mut update = update.args(["update", "-r", "-", id]).stdin(Stdio::piped()).spawn().unwrap();
    update.stdin.take().unwrap().write_all(br#"{"pids": {"limit": 33}}"#).unwrap();
    assert!(update.wait().unwrap().success());
    assert_eq!(data()["pids"]["limit"], json!(33));
    let record: Value =
        serde_json::from_slice(&fs::read(bundle.path(&format!("state/{id}/state.json"))).unwrap()).unwrap();
    let kept = &record["spec"]["linux"]["resources"];
    assert_eq!(
        (&kept["cpu"]["quota"], &kept["pids"]["limit"], &kept["memory"]["swap"]),
        (&json!(25000), &json!(33), &json!(128 << 20))
    );
    assert!(bundle.bad(&["update", "--pids-limit", "x", id]).contains("--pids-limit"));
    assert!(bundle.bad(&["update", "-r", "/no/such", id]).contains("/no/such"));
    assert!(bundle.bad(&["update", "--cpuset-cpus", "nonsense", id]).contains("nonsense"));
}

#[test]
fn processes_are_listed_by_ps_and_events_follow_the_container() {
    let bundle = Bundle::sleeping();
    let id = bundle.id.as_str();
    let table = bundle.good(&["ps", id]);
    assert!(
        table.starts_with("UID ") && table.contains("/bin/sleep 1000") && table.lines().count() == 2,
        "{table}"
    );
    let own = bundle.good(&["ps", id, "-o", "pid,comm"]);
    assert_eq!(
        own.split_whitespace().collect::<Vec<_>>(),
        ["PID", "COMMAND", &bundle.state()["pid"].to_string(), "sleep"]
    );
    assert!(bundle.bad(&["ps", id, "-o", "comm"]).contains("no PID column"));

    let out = fs::File::create(bundle.path("events")).unwrap();
    let mut events = bundle.command();
    let mut events = events.args(["events", "--interval", "20ms", id]).stdout(out).spawn().unwrap();
    let lines = || -> Vec<Value> {
        let text = fs::read_to_string(bundle.path("events")).unwrap();
        text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
    };
    eventually("three readings", || lines().len() >= 3);
    let reading = lines().remove(0);
    assert_eq!((&reading["type"], &reading["id"]), (&json!("stats"), &json!(id)));
    assert!(reading["data"]["memory"]["usage"]["usage"].as_u64().unwrap() > 0, "{reading}");
    bundle.good(&["kill", id, "KILL"]);
    assert!(events.wait().unwrap().success(), "it ends with the container");
    assert!(bundle.bad(&["events", "--stats", id]).contains("it is stopped"));
}

#[test]
fn a_lack_of_memory_is_an_event() {
    let bundle = Bundle::new(&[
        "/bin/sh",
        "-c",
        "read line; sh -c \"x=\\$(dd if=/dev/zero bs=1M count=64 | tr '\\\\0' x)\"; sleep 1000",
    ]);
    std::os::unix::fs::symlink("busybox", bundle.root().join("bin/tr")).unwrap();
    bundle.configure(|c| c["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}}));
    let mut container = bundle.command();
    let mut container = container
        .args(["run", "--bundle", bundle.dir(), &bundle.id])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("it runs", || bundle.run(&["state", &bundle.id]).out.contains("running"));
    let out = fs::File::create(bundle.path("events")).unwrap();
    let mut events = bundle.command();
    let mut events = events.args(["events", "--interval", "20ms", &bundle.id]).stdout(out).spawn().unwrap();
    eventually("events are watched", || fs::read_to_string(bundle.path("events")).unwrap().contains("stats"));
    container.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let told = || fs::read_to_string(bundle.path("events")).unwrap();
    eventually("the lack is told", || told().contains("\"type\":\"oom\""));
    bundle.good(&["kill", &bundle.id, "KILL"]);
    events.wait().unwrap();
    container.wait().unwrap();
}

#[test]
fn an_exec_may_enter_a_group_below_the_containers() {
    let bundle = Bundle::sleeping();
    let id = bundle.id.as_str();
    let hybrid = std::path::Path::new("/sys/fs/cgroup/pids").is_dir();
    let base = if hybrid { "/sys/fs/cgroup/pids" } else { "/sys/fs/cgroup" };
    let inner = format!("{base}/{id}/inner");
    assert!(
        bundle
            .bad(&["exec", "--cgroup", if hybrid { "pids:inner" } else { "inner" }, id, "true"])
            .contains("no such file")
    );
    fs::create_dir(&inner).unwrap();
    let out = bundle.good(&[
        "exec",
        "--cgroup",
        if hybrid { "pids:inner" } else { "inner" },
        id,
        "cat",
        "/proc/self/cgroup",
    ]);
    let line = if hybrid { format!(":pids:/{id}/inner\n") } else { format!("0::/{id}/inner\n") };
    assert!(out.contains(&line), "{out}");
    if hybrid {
        assert!(out.contains(&format!(":memory:/{id}\n")), "{out}");
    }
    assert!(bundle.bad(&["exec", "--cgroup", "../..", id, "true"]).contains("\"..\" is not allowed"));
}

#[test]
fn keep_keeps_the_container_and_debug_says_what_is_done() {
    let bundle = Bundle::new(&["/bin/true"]);
    bundle.good(&["run", "--keep", "--bundle", bundle.dir(), &bundle.id]);
    assert_eq!(bundle.status(), "stopped");
    let log = bundle.path("log");
    bundle.good(&["--debug", "--log", &log, "delete", &bundle.id]);
    assert!(fs::read_to_string(log).unwrap().contains("level=debug msg=\"delete"));
    assert!(bundle.good(&["run", "--help"]).contains("--preserve-fds N"));
    bundle.assert_nothing_left();
}

#[test]
fn processors_are_chosen_for_an_exec() {
    let bundle = Bundle::sleeping();
    let affinity = |text: Value| {
        let file = bundle.path("process.json");
        let process = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin"], "execCPUAffinity": text,
            "args": ["grep", "Cpus_allowed_list", "/proc/self/status"]});
        fs::write(&file, process.to_string()).unwrap();
        bundle.run(&["exec", "--process", &file, &bundle.id])
    };
    assert_eq!(affinity(json!({"final": "0"})).out, "Cpus_allowed_list:\t0\n");
    assert!(affinity(json!({"initial": "x"})).err.contains("execCPUAffinity"));
    assert!(affinity(json!({"final": "5000"})).err.contains("processors"));
    // What the caller was bound to is not the container's business.
    let all = bundle.good(&["exec", &bundle.id, "grep", "Cpus_allowed_list", "/proc/self/status"]);
    let bound = std::process::Command::new("taskset")
        .args(["-c", "0", bundle.exe.to_str().unwrap(), "--root", &bundle.path("state"), "exec", &bundle.id])
        .args(["grep", "Cpus_allowed_list", "/proc/self/status"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&bound.stdout), all);
}

#[test]
fn a_signal_reaches_a_container_with_a_terminal() {
    // Descriptor 0 is no terminal here: the container's is made all the same.
    let bundle = Bundle::new(&[
        "/bin/sh",
        "-c",
        "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.05; done",
    ]);
    bundle.configure(|c| c["process"]["terminal"] = json!(true));
    let out = bundle.path("out");
    let mut run = bundle.command();
    let mut run = run
        .args(["run", "--bundle", bundle.dir(), &bundle.id])
        .stdout(fs::File::create(&out).unwrap())
        .spawn()
        .unwrap();
    eventually("it is ready", || fs::read_to_string(&out).unwrap().contains("ready"));
    let pid = rustix::process::Pid::from_child(&run);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_send_signal(pidfd.as_fd(), rustix::process::Signal::TERM).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(5));
    assert_eq!(fs::read_to_string(&out).unwrap(), "ready\ncaught\n");
    bundle.assert_nothing_left();
}

#[test]
fn a_container_that_waits_holds_nothing_and_can_be_ended() {
    let bundle = Bundle::new(&["/bin/sleep", "1000"]);
    let source = bundle.path("source");
    fs::create_dir(&source).unwrap();
    bundle.configure(|c| {
        for number in 0..40 {
            c["mounts"]
                .as_array_mut()
                .unwrap()
                .push(json!({"destination": format!("/tmp/{number}"), "type": "bind",
                "source": source, "options": ["bind"]}));
        }
        // What it was made of does not count.
        c["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 10}]);
    });
    let words = format!(
        "exec {} --root {1}/state create --bundle {1} {2} 9</etc/passwd >/dev/null 2>&1",
        bundle.exe.display(),
        bundle.dir(),
        bundle.id
    );
    assert!(std::process::Command::new("sh").args(["-c", &words]).status().unwrap().success());
    let pid = bundle.state()["pid"].to_string();
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let (name, leads) = (fd.file_name(), fs::read_link(fd.path()).unwrap().display().to_string());
        let standard = ["0", "1", "2"].iter().any(|n| name == *n);
        assert!(standard || leads.starts_with("socket:"), "{} is {leads}", name.display());
    }
    // The first process of a PID namespace is spared signals that it has no handlers for.
    bundle.good(&["kill", &bundle.id, "TERM"]);
    eventually("it ends", || bundle.status() == "stopped");
    bundle.good(&["delete", &bundle.id]);
    bundle.assert_nothing_left();
}
