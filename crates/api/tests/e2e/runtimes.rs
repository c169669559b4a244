//! Containers made by other OCI runtimes through our monitor: Debian's crun and runc, named on the command line, in the
//! configuration, or by a path. Whatever a client does with a container, it does with these.

use std::fs;

use brigantine_testkit::{Client, Engine, fixtures};
use serde_json::json;

use crate::Host;

const CRUN: &str = "/usr/bin/crun";
const RUNC: &str = "/usr/sbin/runc";

#[test]
fn crun_makes_containers_as_the_own_runtime_does() {
    // Nobody configured it: it is known because it is installed.
    let mut engine = Engine::builder().busybox().start();
    engine.stop_daemon();
    // Debian's takes no hybrid hierarchy that has controllers in its second version. The sandbox's mounts are its own.
    let hybrid = "/sys/fs/cgroup/unified";
    if fs::exists(hybrid).unwrap() {
        assert!(engine.sandbox().command("umount").arg(hybrid).status().unwrap().success());
    }
    engine.restart_daemon();
    whole_life(engine, "crun");
}

#[test]
fn debians_runc_makes_containers_as_the_own_runtime_does() {
    whole_life(Engine::builder().busybox().flag(format!("--add-runtime=runc={RUNC}")).start(), "runc");
}

fn whole_life(engine: Engine, runtime: &str) {
    let mut host = Host { engine, client: Client::Docker };
    let listed =
        host.cli(["info", "--format", "{{range $name, $r := .Runtimes}}{{$name}}={{$r.Path}} {{end}}"]).ok();
    let path = if runtime == "crun" { CRUN } else { RUNC };
    assert!(listed.contains(&format!("{runtime}={path} ")), "{listed}");
    assert!(listed.contains("brig-runtime="), "{listed}");
    let flag = format!("--runtime={runtime}");

    // Streams, status, files, names, terminal.
    let run = ["run", "--rm", "-i", &flag, "busybox", "sh", "-c"];
    let output = host
        .cli(run.iter().chain(&["cat; echo err >&2; touch /made; hostname -i >/dev/null && exit 7"]))
        .stdin("to it\n")
        .exits(7);
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("to it\n", "err\n"));
    let mut terminal =
        host.terminal(["run", "--rm", "-it", &flag, "busybox", "sh", "-c", "stty size; tty; exit 3"]);
    terminal.expect("24 80");
    terminal.expect("/dev/pts/");
    assert_eq!(terminal.wait().code(), Some(3));
    host.cli(["run", "--rm", &flag, "busybox", "/no/such/program"]).exits(127).expect_stderr("no such file");
    host.cli(["run", "--rm", &flag, "busybox", "/etc/passwd"]).exits(126).expect_stderr("permission denied");

    // One that stays, with limits and an init.
    let script = "trap 'echo got USR1' USR1; trap 'exit 9' TERM; echo up; n=0; while :; do n=$((n+1)); echo line $n; sleep 0.1; done";
    let flags = [flag.as_str(), "--name=one", "-m=64m", "--pids-limit=40", "--hostname=other", "-e=A=b"];
    let id = host.background(&flags, script);
    host.wait_log("one", "up");
    assert_eq!(host.inspect("one")["HostConfig"]["Runtime"], runtime);
    let pid = host.container_pid("one");
    let executable = fs::read_link(host.sandbox().proc(pid).join("exe")).unwrap();
    assert!(executable.ends_with("busybox"), "{}", executable.display());
    let outside =
        fs::read_to_string(host.sandbox().proc(host.daemon_pid()).join("mounts")).unwrap_or_default();
    assert!(!outside.contains(&id), "the host sees a mount of the container: {outside}");

    let exec = |script: &str| host.cli(["exec", "-i", "one", "sh", "-c", script]).stdin("in").run();
    let output = exec("echo $A $HOSTNAME; hostname; cat; echo e >&2; exit 5");
    assert_eq!(
        (output.code, output.stdout.as_str(), output.stderr.as_str()),
        (5, "b other\nother\nin", "e\n")
    );
    let missing = host.cli(["exec", "one", "nothing"]).exits(127);
    assert!(missing.stdout.contains("not found"), "{missing}");
    assert_eq!(
        host.cli(["exec", "-u", "guest", "-w", "/tmp", "one", "sh", "-c", "id -un; pwd"]).ok(),
        "guest\n/tmp"
    );
    // Debian's crun gives an exec's terminal no size; the monitor does, a moment later.
    let script_of_terminal = "until stty size 2>/dev/null | grep '[1-9]'; do sleep 0.05; done; tty";
    let mut terminal = host.terminal(["exec", "-it", "one", "sh", "-c", script_of_terminal]);
    terminal.expect("24 80");
    terminal.expect("/dev/pts/");
    assert_eq!(terminal.wait().code(), Some(0));

    let limit =
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max";
    assert_eq!(host.cli(["exec", "one", "sh", "-c", limit]).ok(), "67108864");
    host.cli(["update", "-m", "96m", "--memory-swap", "192m", "one"]).ok();
    assert_eq!(host.cli(["exec", "one", "sh", "-c", limit]).ok(), "100663296");
    assert!(host.cli(["top", "one"]).ok().contains("sleep 0.1"));
    let stats =
        host.cli(["stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}} {{.PIDs}}", "one"]).ok();
    assert!(stats.starts_with("one ") && stats.contains("/ 96MiB"), "{stats}");

    host.cli(["pause", "one"]).ok();
    assert_eq!(host.inspect("one")["State"]["Status"], "paused");
    host.cli(["exec", "one", "true"]).exits(1).expect_stderr("paused");
    host.cli(["unpause", "one"]).ok();
    host.cli(["kill", "-s", "USR1", "one"]).ok();
    host.wait_log("one", "got USR1");

    // The daemon goes and comes; nothing of the container is lost.
    let short = host.background(&[&flag, "--name=short"], "sleep 2; exit 21");
    host.engine.kill_daemon();
    std::thread::sleep(std::time::Duration::from_millis(2200));
    host.engine.restart_daemon();
    host.wait_state(&short, "exited");
    assert_eq!(host.inspect(&short)["State"]["ExitCode"], 21);
    assert_eq!(host.container_pid("one"), pid);
    assert_eq!(host.cli(["exec", "one", "sh", "-c", "echo again; exit 4"]).exits(4).stdout, "again\n");
    let log = host.cli(["logs", "one"]).ok();
    let numbers: Vec<u32> = log.lines().filter_map(|l| l.strip_prefix("line ")?.parse().ok()).collect();
    assert!(numbers.len() > 20 && numbers.windows(2).all(|n| n[1] == n[0] + 1), "{log}");

    // Its end, a second life, removal.
    host.cli(["stop", "one"]).ok();
    assert_eq!(host.inspect("one")["State"]["ExitCode"], 9);
    host.cli(["start", "one"]).ok();
    host.wait_exec("one", &["true"]);
    host.cli(["rm", "-f", "one"]).ok();
    host.cli(["rm", "short"]).ok();
    host.assert_nothing_left();
}

#[test]
fn runtimes_come_from_the_configuration_and_from_paths() {
    let engine = Engine::builder()
        .busybox()
        .etc(
            "brigantine/daemon.json",
            json!({
                "runtimes": {
                    "mine": { "path": RUNC, "runtimeArgs": ["--systemd-cgroup=false"] },
                    "gone": { "path": "/no/such/runtime" },
                },
                "default-runtime": "mine",
            })
            .to_string(),
        )
        .start();
    let host = Host { engine, client: Client::Docker };
    assert_eq!(host.cli(["info", "--format", "{{.DefaultRuntime}}"]).ok(), "mine");
    let id = host.background(&[], "exit 0");
    assert_eq!(host.inspect(&id)["HostConfig"]["Runtime"], "mine");
    host.cli(["wait", &id]).ok();
    // docker's name for its default is still the own runtime's.
    let id = host.background(&["--runtime=runc"], "exit 0");
    assert_eq!(host.inspect(&id)["HostConfig"]["Runtime"], "runc");
    host.script(&[&format!("--runtime={RUNC}")], "true");

    host.cli(["run", "--rm", "--runtime=kata", "busybox", "true"])
        .exits(125)
        .expect_stderr("unknown or invalid runtime name: kata (there are brig-runtime, crun, gone, mine;");
    host.cli(["run", "--rm", "--runtime=gone", "busybox", "true"])
        .exits(125)
        .expect_stderr("/no/such/runtime is not an executable file");
    host.cli(["run", "--rm", &format!("-v={}:/x:rshared", host.dir().display()), "busybox", "true"])
        .exits(125)
        .expect_stderr("built for this engine's own runtime only");
}

#[test]
fn a_runtime_that_fails_is_quoted_and_leaves_nothing() {
    let host = Host::new(Client::Docker);
    let broken = host.dir().join("broken");
    fixtures::script(
        &broken,
        "#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in --log) log=$2;; create) echo '{\"level\":\"error\",\"msg\":\"the moon is full\"}' >$log; exit 1;; esac; shift; done\n",
    );
    let flag = format!("--runtime={}", broken.display());
    host.cli(["run", "--rm", &flag, "busybox", "true"]).exits(125).expect_stderr("the moon is full");
    let mute = host.dir().join("mute");
    fixtures::script(&mute, "#!/bin/sh\nexit 3\n");
    let flag = format!("--runtime={}", mute.display());
    host.cli(["run", "--rm", &flag, "busybox", "true"])
        .exits(125)
        .expect_stderr("failed with status 3 and gave no reason");
    host.assert_nothing_left();
}
