//! The OCI command line, as podman, containerd and people use it: each test has its own bundle and state directory.

mod bundle;

use std::fs;
use std::path::Path;

use bundle::{Bundle, eventually};
use serde_json::{Value, json};

#[test]
fn a_container_lives_from_create_to_delete() {
    let bundle = Bundle::new(&["/bin/sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done"]);
    let pid_file = bundle.path("pid");
    let id = bundle.id.as_str();
    bundle.good(&["create", "--bundle", bundle.dir(), "--pid-file", &pid_file, id]);

    let state = bundle.state();
    assert_eq!((&state["id"], &state["status"]), (&json!(id), &json!("created")));
    assert_eq!(state["bundle"], json!(fs::canonicalize(bundle.dir()).unwrap()));
    assert_eq!(state["annotations"], json!({"org.example.colour": "blue"}));
    assert!(state["ociVersion"].as_str().unwrap().starts_with("1."));
    let pid = state["pid"].as_i64().unwrap();
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), pid.to_string());
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(bundle.container_output(), "", "nothing runs before start");

    assert!(bundle.bad(&["pause", "unknown"]).contains("container does not exist: unknown"));
    bundle.good(&["start", id]);
    eventually("the program runs", || bundle.container_output() == "up\n");
    assert_eq!(bundle.status(), "running");
    assert!(bundle.bad(&["start", id]).contains("cannot be started: it is running"));

    let listed: Value = serde_json::from_str(&bundle.good(&["list", "--format", "json"])).unwrap();
    assert_eq!((&listed[0]["id"], &listed[0]["pid"], &listed[1]), (&json!(id), &json!(pid), &Value::Null));
    assert_eq!(bundle.good(&["list", "-q"]).trim(), id);
    let table = bundle.good(&["list"]);
    assert!(table.starts_with("ID ") && table.contains("running"), "{table}");
    let pids: Vec<i64> = serde_json::from_str(&bundle.good(&["ps", "--format", "json", id])).unwrap();
    assert!(pids.contains(&pid), "{pids:?}");
    assert!(bundle.good(&["ps", id]).contains("echo up"));

    bundle.good(&["pause", id]);
    assert_eq!(bundle.status(), "paused");
    assert!(bundle.bad(&["exec", id, "true"]).contains("cannot exec in a paused container"));
    assert!(bundle.bad(&["pause", id]).contains("it is paused"));
    bundle.good(&["resume", id]);
    assert_eq!(bundle.status(), "running");
    assert!(bundle.bad(&["resume", id]).contains("it is running"));

    bundle.good(&["kill", id, "TERM"]);
    eventually("the container stops", || bundle.status() == "stopped");
    assert_eq!(bundle.state()["pid"], json!(0));
    assert!(bundle.bad(&["kill", id, "TERM"]).contains("container not running"));
    assert!(bundle.bad(&["exec", id, "true"]).contains("it is stopped"));
    bundle.good(&["delete", id]);
    assert!(bundle.bad(&["state", id]).contains("does not exist"));
    bundle.assert_nothing_left();
}

#[test]
fn run_passes_output_and_status() {
    for (script, code) in [
        ("echo out; exit 42", 42),
        ("echo out", 0),
        ("echo out; (sh -c 'kill -9 $$'; exit $?) 2>/dev/null", 137),
    ] {
        let bundle = Bundle::new(&["/bin/sh", "-c", script]);
        let done = bundle.run(&["run", "--bundle", bundle.dir(), &bundle.id]);
        assert_eq!((done.code, done.out.as_str(), done.err.as_str()), (code, "out\n", ""), "{script}");
        bundle.assert_nothing_left();
    }
}

#[test]
fn run_detached_leaves_the_container() {
    let bundle = Bundle::new(&["/bin/sh", "-c", "echo up; exec sleep 1000"]);
    let pid_file = bundle.path("pid");
    bundle.good(&["run", "-d", "--bundle", bundle.dir(), "--pid-file", &pid_file, &bundle.id]);
    assert_eq!(bundle.status(), "running");
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), bundle.state()["pid"].to_string());
    bundle.good(&["kill", &bundle.id, "SIGKILL"]);
    eventually("the container stops", || bundle.status() == "stopped");
    bundle.good(&["delete", &bundle.id]);
    bundle.assert_nothing_left();
}

#[test]
fn a_program_that_cannot_start_is_told_and_leaves_nothing() {
    for (program, says) in [
        ("nope", "exec: \"nope\": executable file not found in $PATH"),
        ("/bin/nope", "exec: \"/bin/nope\": stat /bin/nope: no such file or directory"),
        ("/etc", "exec: \"/etc\": "),
    ] {
        let bundle = Bundle::new(&[program]);
        assert!(bundle.bad(&["run", "--bundle", bundle.dir(), &bundle.id]).contains(says));
        assert!(bundle.bad(&["state", &bundle.id]).contains("does not exist"));
        bundle.assert_nothing_left();
    }
}

#[test]
fn exec_runs_another_program() {
    let bundle = Bundle::sleeping();
    let id = bundle.id.as_str();
    let done = bundle.run(&["exec", id, "sh", "-c", "echo inside; echo wrong >&2; hostname; exit 7"]);
    assert_eq!((done.code, done.out.as_str(), done.err.as_str()), (7, "inside\nbox\n", "wrong\n"));
    let script = "echo $COLOUR; pwd; id -u; id -g; id -G; grep NoNewPrivs /proc/self/status";
    let options = ["--env", "COLOUR=red", "--cwd", "/tmp", "--user", "1000:1001", "--additional-gids", "7"];
    let words = [&["exec"][..], &options, &["--no-new-privs", id, "sh", "-c", script]].concat();
    assert_eq!(bundle.good(&words), "red\n/tmp\n1000\n1001\n1001 7\nNoNewPrivs:\t1\n");
    // What follows the program is the program's.
    assert_eq!(bundle.good(&["exec", id, "--", "echo", "-d", "--help"]), "-d --help\n");

    let process = bundle.path("process.json");
    let text = json!({"user": {"uid": 5, "gid": 5}, "args": ["id", "-u"], "env": ["PATH=/bin"], "cwd": "/"});
    fs::write(&process, text.to_string()).unwrap();
    assert_eq!(bundle.good(&["exec", "--process", &process, id]), "5\n");

    let pid_file = bundle.path("exec.pid");
    bundle.good(&["exec", "-d", "--pid-file", &pid_file, id, "sleep", "999"]);
    let pid = fs::read_to_string(&pid_file).unwrap();
    assert!(fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap().contains("999"));

    assert!(bundle.bad(&["exec", id, "nope"]).contains("executable file not found in $PATH"));
    assert!(bundle.bad(&["exec", id]).contains("a program is needed"));
    assert!(bundle.bad(&["exec", "--user", "root", id, "id"]).contains("\"root\""));
    assert!(bundle.bad(&["exec", "--cap", "CAP_NONSENSE", id, "id"]).contains("CAP_NONSENSE"));
    bundle.good(&["delete", "--force", id]);
    eventually("the exec'd process goes too", || !Path::new(&format!("/proc/{pid}/exe")).exists());
    bundle.assert_nothing_left();
}

#[test]
fn an_unknown_container_is_named() {
    let bundle = Bundle::new(&["true"]);
    for words in [
        &["state", "nobody"][..],
        &["start", "nobody"],
        &["kill", "nobody", "9"],
        &["delete", "nobody"],
        &["exec", "nobody", "true"],
        &["ps", "nobody"],
        &["pause", "nobody"],
        &["resume", "nobody"],
        &["events", "--stats", "nobody"],
    ] {
        assert!(bundle.bad(words).contains("container does not exist: nobody"), "{words:?}");
    }
    // Whoever forces it wants it gone, and it is.
    bundle.good(&["delete", "--force", "nobody"]);
    assert!(bundle.bad(&["list", "-q"]).contains("no such file"));
}

#[test]
fn an_id_is_taken_once() {
    let bundle = Bundle::sleeping();
    let before = bundle.state();
    for command in ["create", "run"] {
        let says = bundle.bad(&[command, "--bundle", bundle.dir(), &bundle.id]);
        assert!(says.contains(&format!("container with given ID already exists: {}", bundle.id)), "{says}");
    }
    assert_eq!(bundle.state(), before, "the first one goes on");
    for id in ["../x", "a/b", "..", "a b"] {
        assert!(bundle.bad(&["create", "--bundle", bundle.dir(), id]).contains("container id"), "{id}");
    }
}

#[test]
fn a_running_container_is_deleted_only_by_force() {
    let bundle = Bundle::sleeping();
    let says = bundle.bad(&["delete", &bundle.id]);
    assert!(says.contains("cannot be deleted: it is running"), "{says}");
    assert_eq!(bundle.status(), "running");
    bundle.good(&["delete", "--force", &bundle.id]);
    bundle.assert_nothing_left();

    let bundle = Bundle::new(&["/bin/sleep", "1000"]);
    bundle.good(&["create", "--bundle", bundle.dir(), &bundle.id]);
    // One that never started has nothing to lose.
    bundle.good(&["delete", &bundle.id]);
    bundle.assert_nothing_left();
}

#[test]
fn errors_go_to_the_log_that_the_caller_reads() {
    let bundle = Bundle::new(&["/bin/nope"]);
    let log = bundle.path("log.json");
    bundle.bad(&["--log", &log, "--log-format", "json", "run", "--bundle", bundle.dir(), &bundle.id]);
    let text = fs::read_to_string(&log).unwrap();
    let line: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(line["level"], json!("error"));
    assert!(line["msg"].as_str().unwrap().contains("stat /bin/nope: no such file or directory"), "{line}");
    assert!(line["time"].as_str().unwrap().ends_with('Z'));
    let log = bundle.path("log.text");
    bundle.bad(&["--log", &log, "state", "nobody"]);
    assert!(
        fs::read_to_string(&log).unwrap().contains("level=error msg=\"container does not exist: nobody\"")
    );
}

#[test]
fn bad_words_are_errors() {
    let bundle = Bundle::sleeping();
    let id = bundle.id.as_str();
    for (words, says) in [
        (&["nonsense"][..], "\"nonsense\" is not a command"),
        (&["run", "--nonsense", "x"], "--nonsense"),
        (&["state"], "a container id is needed"),
        (&["kill", id, "NOPE"], "signal \"NOPE\" is not known"),
        (&["kill", id, "65"], "signal \"65\" is not known"),
        (&["list", "--format", "yaml"], "format \"yaml\""),
        (&["--log-format", "yaml", "list"], "log format \"yaml\""),
        (&["run", "--bundle", "/no/such/bundle", "x"], "/no/such/bundle"),
        (&["update", "--memory", "much", id], "--memory: \"much\""),
        (&["state", id, "more"], "one argument too many"),
    ] {
        let text = bundle.bad(words);
        assert!(text.contains(says), "{words:?}: {text}");
    }
    assert_eq!(bundle.status(), "running");
}

#[test]
fn a_broken_bundle_is_named_and_leaves_nothing() {
    let bundle = Bundle::new(&["true"]);
    let config = bundle.path("config.json");
    let good = fs::read_to_string(&config).unwrap();
    let mut no_root: Value = serde_json::from_str(&good).unwrap();
    no_root.as_object_mut().unwrap().remove("root");
    let mut terminal: Value = serde_json::from_str(&good).unwrap();
    terminal["process"]["terminal"] = json!(true);
    for (text, says) in [
        ("{\"ociVersion\": ", "config.json"),
        ("{\"process\": 3}", "config.json"),
        (&no_root.to_string(), "no root"),
        (&terminal.to_string(), "needs --console-socket"),
    ] {
        fs::write(&config, text).unwrap();
        let told = bundle.bad(&["create", "--bundle", bundle.dir(), &bundle.id]);
        assert!(told.contains(says), "{text}: {told}");
        bundle.assert_nothing_left();
    }
    fs::remove_file(&config).unwrap();
    assert!(bundle.bad(&["create", "--bundle", bundle.dir(), &bundle.id]).contains("config.json"));
    bundle.assert_nothing_left();
}

#[test]
fn hooks_get_the_state_and_are_not_deaf() {
    let bundle = Bundle::new(&["true"]);
    let config = bundle.path("config.json");
    let (state, mask) = (bundle.path("hook.state"), bundle.path("hook.mask"));
    let script = format!("cat >{state}; grep SigBlk /proc/self/status >{mask}");
    let mut spec: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]});
    spec["hooks"] = json!({"createRuntime": [hook]});
    fs::write(&config, spec.to_string()).unwrap();
    bundle.good(&["run", "--bundle", bundle.dir(), &bundle.id]);
    let state: Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    assert_eq!((&state["id"], &state["status"]), (&json!(bundle.id), &json!("creating")));
    assert_eq!(fs::read_to_string(&mask).unwrap(), "SigBlk:\t0000000000000000\n");
    bundle.assert_nothing_left();
}

#[test]
fn spec_writes_a_bundle_that_runs() {
    let bundle = Bundle::new(&["true"]);
    let config = bundle.path("config.json");
    assert!(bundle.bad(&["spec", "--bundle", bundle.dir()]).contains("exists; remove it first"));
    fs::remove_file(&config).unwrap();
    bundle.good(&["spec", "--bundle", bundle.dir()]);
    let mut spec: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    assert_eq!(spec["process"]["args"], json!(["sh"]));
    spec["process"]["terminal"] = json!(false);
    spec["process"]["args"] =
        json!(["sh", "-c", "hostname; grep NoNewPrivs /proc/self/status; echo x > /file"]);
    spec["linux"]["cgroupsPath"] = json!(format!("/{}", bundle.id));
    fs::write(&config, spec.to_string()).unwrap();
    let done = bundle.run(&["run", "--bundle", bundle.dir(), &bundle.id]);
    assert_eq!((done.code, done.out.as_str()), (1, "brig\nNoNewPrivs:\t1\n"), "{}", done.err);
    assert!(done.err.contains("Read-only file system"), "{}", done.err);
    bundle.assert_nothing_left();
}

#[test]
fn features_and_version_are_told() {
    let bundle = Bundle::new(&["true"]);
    let features: Value = serde_json::from_str(&bundle.good(&["features"])).unwrap();
    assert!(features["ociVersionMax"].as_str().unwrap().starts_with("1."));
    assert_eq!(features["linux"]["seccomp"]["enabled"], json!(true));
    assert_eq!(features["linux"]["cgroup"]["systemd"], json!(true));
    assert!(features["linux"]["capabilities"].as_array().unwrap().contains(&json!("CAP_SYS_ADMIN")));
    assert!(bundle.good(&["--version"]).starts_with("brig-runtime version "));
    assert!(bundle.good(&["--help"]).contains("delete"));
}

#[test]
fn statistics_and_new_limits() {
    let bundle = Bundle::sleeping();
    let limits = bundle.path("limits.json");
    fs::write(
        &limits,
        json!({"pids": {"limit": 17}, "memory": {"limit": 64 << 20, "swap": 64 << 20}}).to_string(),
    )
    .unwrap();
    bundle.good(&["update", "-r", &limits, &bundle.id]);
    let stats: Value = serde_json::from_str(&bundle.good(&["events", "--stats", &bundle.id])).unwrap();
    assert_eq!((&stats["type"], &stats["id"]), (&json!("stats"), &json!(bundle.id)));
    assert_eq!(stats["data"]["pids"]["limit"], json!(17));
    assert_eq!(stats["data"]["memory"]["usage"]["limit"], json!(64 << 20));
}
