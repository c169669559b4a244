//! Hooks of every kind: where and when they run, what they are told, and what their failure means.

mod bundle;

use std::fs;
use std::path::Path;

use bundle::{Bundle, eventually};
use serde_json::{Value, json};

fn hook(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin", "OWN=yes"]})
}

#[test]
fn all_hooks_run_in_order_and_in_their_places() {
    let bundle = Bundle::new(&["/bin/sh", "-c", "echo program >>/log; cat /log /from-hook; sleep 1000"]);
    let id = bundle.id.as_str();
    let log = bundle.root().join("log");
    let (host, log) = (bundle.path("host-only"), log.to_str().unwrap().to_owned());
    fs::write(&host, "").unwrap();
    // Outside, in the host's name spaces; `$0` is a program's own.
    let outside = |kind: &str| {
        hook(&format!(
            "test -e {host} && echo {kind} $(grep -o '\"status\":\"[a-z]*\"' | cut -d: -f2) $OWN >>{log}"
        ))
    };
    bundle.configure(|c| {
        c["hooks"] = json!({
            "prestart": [outside("prestart")],
            "createRuntime": [outside("createRuntime")],
            // In the container's mounts, before its root is: the host's files are there, the directory is the root.
            "createContainer": [hook(&format!(
                "test -e {host} && test $(readlink /proc/self/ns/uts) != {} && \
                 mount -t tmpfs none ./tmp && echo mounted >./from-hook && echo createContainer $OWN >>./log",
                fs::read_link("/proc/self/ns/uts").unwrap().display()))],
            "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c",
                "cat >/state; test ! -e $HOST && echo startContainer $OWN >>/log"], "env": ["PATH=/bin", "OWN=yes", format!("HOST={host}")]}],
            "poststart": [outside("poststart")],
            "poststop": [outside("poststop")],
        });
    });
    bundle.good(&["create", "--bundle", bundle.dir(), id]);
    let created = "prestart \"creating\" yes\ncreateRuntime \"creating\" yes\ncreateContainer yes\n";
    assert_eq!(fs::read_to_string(&log).unwrap(), created);
    bundle.good(&["start", id]);
    eventually("the program has written", || bundle.container_output().contains("mounted"));
    let text = fs::read_to_string(&log).unwrap();
    let started = format!("{created}startContainer yes\n");
    assert!(text.starts_with(&started) && text.contains("\nprogram\n"), "{text}");
    assert!(text.contains("\npoststart \"running\" yes\n"), "{text}");
    assert!(bundle.good(&["exec", id, "grep", " /tmp ", "/proc/self/mountinfo"]).contains("tmpfs"));
    let state: Value = serde_json::from_slice(&fs::read(bundle.root().join("state")).unwrap()).unwrap();
    assert_eq!((&state["id"], &state["status"], &state["pid"]), (&json!(id), &json!("created"), &json!(1)));
    assert_eq!(state["annotations"], json!({"org.example.colour": "blue"}));
    bundle.good(&["delete", "--force", id]);
    assert!(fs::read_to_string(&log).unwrap().ends_with("poststop \"stopped\" yes\n"));
    bundle.assert_nothing_left();
}

#[test]
fn a_hook_that_fails_stops_the_container_and_says_why() {
    for kind in ["prestart", "createRuntime", "createContainer", "startContainer"] {
        let bundle = Bundle::new(&["/bin/true"]);
        let set = |hook: Value| bundle.configure(|c| c["hooks"] = json!({kind: [hook]}));
        let run = || bundle.bad(&["run", "--bundle", bundle.dir(), &bundle.id]);
        set(hook("echo broken >&2; exit 3"));
        let says = run();
        assert!(says.contains(&format!("{kind} hook #0: \"/bin/sh\": exit status: 3")), "{says}");
        assert!(says.contains("broken"), "{says}");
        set(json!({"path": "/no/such/hook"}));
        let says = run();
        assert!(
            says.contains(&format!("{kind} hook #0: \"/no/such/hook\": no such file or directory")),
            "{says}"
        );
        set(json!({"path": "relative"}));
        assert!(run().contains("not absolute"));
        set(json!({"path": "/bin/sh", "timeout": 0}));
        assert!(run().contains("a timeout of 0 seconds"));
        bundle.assert_nothing_left();
    }
}

#[test]
fn a_hook_that_takes_too_long_is_ended() {
    for kind in ["createRuntime", "createContainer", "startContainer"] {
        let bundle = Bundle::new(&["/bin/true"]);
        let mark = bundle.root().join("pid");
        // Inside and outside, this is the same file.
        let script = format!(
            "echo $$ >{}; exec sleep 1000",
            if kind == "startContainer" { "/pid" } else { mark.to_str().unwrap() }
        );
        bundle.configure(|c| {
            let mut slow = hook(&script);
            slow["timeout"] = json!(1);
            c["hooks"] = json!({kind: [slow]});
        });
        let says = bundle.bad(&["run", "--bundle", bundle.dir(), &bundle.id]);
        assert!(says.contains(&format!("{kind} hook #0: \"/bin/sh\": timed out")), "{says}");
        let pid = fs::read_to_string(&mark).unwrap();
        if kind == "createRuntime" {
            assert!(!Path::new(&format!("/proc/{}", pid.trim())).exists(), "it runs on");
        }
        bundle.assert_nothing_left();
    }
}

#[test]
fn the_root_is_seen_at_its_own_place_by_who_enters_the_mount_namespace() {
    let bundle = Bundle::new(&["/bin/sh", "-c", "cat /etc/entered"]);
    let root = bundle.root();
    // As hooks for graphics cards do it.
    let script = format!(
        "pid=$(grep -o '\"pid\":[0-9]*' | cut -d: -f2); nsenter -t $pid -m sh -c \
         'mount -t tmpfs none {0}/etc && echo seen >{0}/etc/entered'",
        root.display()
    );
    bundle.configure(|c| c["hooks"] = json!({"createRuntime": [hook(&script)]}));
    assert_eq!(bundle.good(&["run", "--bundle", bundle.dir(), &bundle.id]), "seen\n");
    assert!(!root.join("etc/entered").exists());
    bundle.assert_nothing_left();
}

#[test]
fn a_start_hook_is_under_the_programs_filter_and_has_its_environment() {
    let bundle = Bundle::new(&["/bin/cat", "/seen"]);
    let start = |script: &str| json!({"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
    bundle.configure(|c| {
        c["process"]["env"] = json!(["PATH=/bin", "ONE=two"]);
        c["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL"},
            // As the filters of docker's kind do it.
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]});
        c["hooks"] = start("echo $ONE $HOME >/seen");
    });
    assert_eq!(bundle.good(&["run", "--bundle", bundle.dir(), &bundle.id]), "two /\n");
    bundle.configure(|c| c["hooks"] = start("exec mkdir /made"));
    let says = bundle.bad(&["run", "--bundle", bundle.dir(), &bundle.id]);
    assert!(says.contains("startContainer hook #0: \"/bin/sh\": signal: bad system call"), "{says}");
    assert!(!bundle.root().join("made").exists());
    bundle.assert_nothing_left();
}
