//! Filters of system calls: they hold from the program's exec on and for execs, their listeners hear of the container, and
//! what is wrong with them is told by name.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod bundle;

use std::fs;
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use bundle::{Bundle, eventually};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::{Value, json};

fn run(bundle: &Bundle) -> String {
    bundle.good(&["run", "--bundle", bundle.dir(), &bundle.id])
}

fn refusal(bundle: &Bundle) -> String {
    let says = bundle.bad(&["run", "--bundle", bundle.dir(), &bundle.id]);
    bundle.assert_nothing_left();
    says
}

/// What a seccomp agent gets: the state, and the listener.
fn agent(listener: &UnixListener) -> (Value, std::os::fd::OwnedFd) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut bytes = vec![0; 16 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut data = [std::io::IoSliceMut::new(&mut bytes)];
    let got = rustix::net::recvmsg(&stream, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap().bytes;
    let mut fds = control.drain().filter_map(|m| match m {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.next().unwrap().next().unwrap();
    bytes.truncate(got);
    stream.read_to_end(&mut bytes).unwrap();
    (serde_json::from_slice(&bytes).unwrap(), fd)
}

/// A container whose program asks the listener, its state as its creation tells it to the agent, and the listener.
fn asking(no_new_privileges: bool) -> (Bundle, UnixListener, Value, std::os::fd::OwnedFd) {
    let bundle = Bundle::new(&["/bin/sh", "-c", "echo begun; mkdir /made; echo end; sleep 1000"]);
    let socket = bundle.path("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    bundle.configure(|c| {
        c["process"]["noNewPrivileges"] = json!(no_new_privileges);
        c["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", "SECCOMP_FILTER_FLAG_TSYNC"],
            "listenerPath": socket,
            "listenerMetadata": "my words",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}],
        });
    });
    let (state, fd) = std::thread::scope(|scope| {
        let heard = scope.spawn(|| agent(&listener));
        bundle.good(&["create", "--bundle", bundle.dir(), &bundle.id]);
        heard.join().unwrap()
    });
    bundle.good(&["start", &bundle.id]);
    assert_eq!(
        (&state["fds"], &state["pid"], &state["metadata"]),
        (&json!(["seccompFd"]), &bundle.state()["pid"], &json!("my words"))
    );
    (bundle, listener, state, fd)
}

#[test]
fn a_seccomp_listener_is_there_from_the_creation_on() {
    let (bundle, _listener, state, fd) = asking(false);
    assert_eq!(state["state"]["status"], json!("creating"));
    eventually("the program begins", || bundle.container_output() == "begun\n");
    drop(fd);
    eventually("the program goes on", || bundle.container_output().ends_with("end\n"));
    assert!(!bundle.root().join("made").exists());
}

#[test]
fn a_seccomp_listener_is_asked() {
    let (bundle, listener, state, fd) = asking(true);
    let pid = bundle.state()["pid"].clone();
    assert_eq!((&state["state"]["id"], &state["state"]["pid"]), (&json!(bundle.id), &pid));
    let asked = |fd: &std::os::fd::OwnedFd| {
        let mut fds = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
        let soon = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&soon)), Ok(1), "the listener is asked");
    };
    asked(&fd);
    assert_eq!(bundle.container_output(), "begun\n");
    // Without a listener there is no such call.
    drop(fd);
    eventually("the program goes on", || bundle.container_output().ends_with("end\n"));
    assert!(!bundle.root().join("made").exists());

    // An exec has a listener of its own.
    let mut exec = bundle.command();
    let exec = exec.args(["exec", &bundle.id, "mkdir", "/second"]).stderr(Stdio::piped()).spawn().unwrap();
    let (state, fd) = agent(&listener);
    assert_eq!(state["state"]["status"], json!("running"));
    asked(&fd);
    drop(fd);
    let done = exec.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&done.stderr).contains("not implemented"), "{done:?}");
}

#[test]
fn a_listener_that_cannot_work_is_refused() {
    let bundle = Bundle::new(&["/bin/true"]);
    let set = |filter: Value| bundle.configure(|c| c["linux"]["seccomp"] = filter);
    let rule = |name: &str| json!([{"names": [name], "action": "SCMP_ACT_NOTIFY"}]);
    set(json!({"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/x"}));
    assert!(refusal(&bundle).contains("cannot be used as default action"));
    set(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rule("mkdir")}));
    assert!(refusal(&bundle).contains("without a listenerPath"));
    set(json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x", "syscalls": rule("write")}));
    assert!(refusal(&bundle).contains("SCMP_ACT_NOTIFY cannot be used for the write syscall"));
    set(json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/no/agent", "syscalls": rule("mkdir")}));
    assert!(refusal(&bundle).contains("failed to connect with seccomp agent at \"/no/agent\": no such file"));
    // Who never asks needs nobody.
    set(
        json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/no/agent", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_LOG"}]}),
    );
    run(&bundle);
}

#[test]
fn a_process_that_its_filter_ends_before_the_exec_has_not_started() {
    let killing = |names: Value| json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": names, "action": "SCMP_ACT_KILL_PROCESS"}]});
    let bundle = Bundle::new(&["/bin/sleep", "1000"]);
    // The exec itself; and a failed exec, whose message the filter holds back.
    for (program, names) in
        [("/bin/sleep", json!(["execve"])), ("/etc/text", json!(["sendto", "sendmsg", "write"]))]
    {
        fs::write(bundle.root().join("etc/text"), "no program").unwrap();
        fs::set_permissions(bundle.root().join("etc/text"), fs::Permissions::from_mode(0o755)).unwrap();
        bundle.configure(|c| {
            c["process"]["args"] = json!([program]);
            c["linux"]["seccomp"] = killing(names);
        });
        let says = refusal(&bundle);
        assert!(says.contains("was ended before its program was executed"), "{says}");
        // Whoever adopts the process may reap it before `start` has looked at it, which then cannot know: where that is
        // the rule, it is not told.
        let told = || {
            bundle.good(&["create", "--bundle", bundle.dir(), &bundle.id]);
            let started = bundle.run(&["start", &bundle.id]);
            bundle.good(&["delete", "--force", &bundle.id]);
            started.code != 0 && started.err.contains("was ended before its program was executed")
        };
        assert!((0..20).any(|_| told()), "{program}");
    }
    // A program that its filter ends has started.
    bundle.configure(|c| {
        c["process"]["args"] = json!(["/bin/mkdir", "/made"]);
        c["linux"]["seccomp"] = killing(json!(["mkdir", "mkdirat"]));
    });
    let done = bundle.run(&["run", "--bundle", bundle.dir(), &bundle.id]);
    assert_eq!((done.code, done.err.as_str()), (128 + 31, ""));
}

/// It is read while the container's process sets itself up already.
#[test]
fn a_filter_holds_for_execs_and_a_wrong_one_is_told_and_leaves_nothing() {
    let bundle = Bundle::new(&["/bin/sleep", "1000"]);
    let set = |filter: Value| bundle.configure(|c| c["linux"]["seccomp"] = filter);
    let denying = json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]);
    set(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": denying}));
    bundle.good(&["run", "--detach", "--bundle", bundle.dir(), &bundle.id]);
    // The first one compiles it, the second takes what is kept.
    for _ in 0..2 {
        let done = bundle.run(&["exec", &bundle.id, "/bin/mkdir", "/made"]);
        assert!(done.code != 0 && done.err.contains("No space left"), "{done:?}");
    }
    let state = fs::read_to_string(format!("{}/state/{}/state.json", bundle.dir(), bundle.id)).unwrap();
    let state: Value = serde_json::from_str(&state).unwrap();
    assert_eq!(state["spec"]["linux"]["seccomp"]["syscalls"], denying);
    bundle.good(&["delete", "--force", &bundle.id]);
    for (filter, says) in [
        (json!({"defaultAction": "SCMP_ACT_JUMP"}), "SCMP_ACT_JUMP"),
        (
            json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 70_000}),
            "errnoRet 70000 is too large",
        ),
        (json!({"syscalls": []}), "defaultAction"),
    ] {
        set(filter);
        let said = refusal(&bundle);
        assert!(said.contains(says), "{said}");
    }
    // One that lets everything through is none.
    set(json!({"defaultAction": "SCMP_ACT_ALLOW"}));
    run(bundle_of_true(&bundle));
}

/// What is compiled is kept for the next container, but believed only if it is whole and its owner's.
#[test]
fn a_filter_is_compiled_once_and_whatever_is_kept_of_it_holds() {
    let bundle = Bundle::new(&["/bin/mkdir", "/made"]);
    let denying = |name: &str| json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]});
    bundle.configure(|c| {
        c["root"]["readonly"] = json!(false);
        c["linux"]["seccomp"] = denying("mkdir");
    });
    let denied = || {
        let done = bundle.run(&["run", "--bundle", bundle.dir(), &bundle.id]);
        assert!(done.code != 0 && done.err.contains("No space left"), "{done:?}");
    };
    let kept = || -> Vec<std::path::PathBuf> {
        let dir = fs::read_dir(bundle.path("state/@filters")).unwrap();
        dir.map(|entry| entry.unwrap().path()).collect()
    };
    denied();
    let [file] = &kept()[..] else { panic!("{:?}", kept()) };
    let (good, first) = (fs::read(file).unwrap(), fs::metadata(file).unwrap());
    assert_eq!(first.permissions().mode() & 0o777, 0o600);
    denied();
    // It was not written anew.
    assert_eq!(fs::metadata(file).unwrap().modified().unwrap(), first.modified().unwrap());
    assert_eq!(bundle.good(&["list", "--quiet"]), "");

    // Another section is another filter.
    bundle.configure(|c| c["linux"]["seccomp"] = denying("rmdir"));
    run(&bundle);
    fs::remove_dir(bundle.root().join("made")).unwrap();
    let others: Vec<_> = kept().into_iter().filter(|other| other != file).collect();
    let [allowing] = &others[..] else { panic!("{others:?}") };

    // The attack: the program that allows it, under the name of the one that does not; whole, in part, and as another's.
    bundle.configure(|c| c["linux"]["seccomp"] = denying("mkdir"));
    let allowing = fs::read(allowing).unwrap();
    assert_eq!(allowing.len(), good.len());
    let mut mixed = good.clone();
    let text = mixed.windows(16).position(|w| w == b"{\"defaultAction\"").unwrap();
    mixed[..text].copy_from_slice(&allowing[..text]);
    let mut unsummed = good.clone();
    unsummed[64..text].copy_from_slice(&allowing[64..text]);
    for bad in [&allowing, &unsummed, &good[..good.len() - 1].to_vec(), &Vec::new()] {
        fs::write(file, bad).unwrap();
        denied();
        assert!(fs::read(file).unwrap() == good, "it is compiled and kept again");
    }
    fs::write(file, &mixed).unwrap();
    for (owner, mode) in [(1, 0o600), (0, 0o620), (0, 0o602)] {
        std::os::unix::fs::chown(file, Some(owner), None).unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
        denied();
        fs::write(file, &mixed).unwrap();
    }
    // That it would have been taken from its owner shows that the test can fail.
    std::os::unix::fs::chown(file, Some(0), None).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    run(&bundle);
}

fn bundle_of_true(bundle: &Bundle) -> &Bundle {
    bundle.configure(|c| c["process"]["args"] = json!(["/bin/true"]));
    bundle
}
