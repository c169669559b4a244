//! `run` and its flags: what the program in the container sees, and what its end looks like outside.

use std::fs;

use brigantine_testkit::Client;

use crate::Host;

both![
    output_and_status_of_the_program_are_the_commands,
    a_missing_program_is_127_and_a_file_that_is_none_126,
    a_mistake_in_the_command_is_125,
    death_by_a_signal_is_128_and_its_number,
    flags_reach_the_program,
    an_env_file_and_the_clients_environment_reach_the_program,
    an_entrypoint_is_replaced_with_its_arguments,
    a_user_is_found_by_name_and_number,
    names_are_unique,
    rm_removes_the_container_and_its_name,
    detached_prints_the_id_and_goes_on,
    a_real_distribution_runs,
    init_reaps_and_forwards,
    labels_are_kept_and_selected_by,
    a_file_gets_the_id,
];

fn output_and_status_of_the_program_are_the_commands(client: Client) {
    let host = Host::new(client);
    let output = host.cli(["run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 3"]).exits(3);
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!(host.busybox(&["echo", "hi"]), "hi");
    host.assert_nothing_left();
}

fn a_missing_program_is_127_and_a_file_that_is_none_126(client: Client) {
    let host = Host::new(client);
    let missing = host.cli(["run", "--rm", "busybox", "no-such-program"]).exits(127);
    missing.expect_stderr("no-such-program").expect_stderr("executable file not found in $PATH");
    host.cli(["run", "--rm", "busybox", "/no/such/program"])
        .exits(127)
        .expect_stderr("no such file or directory");
    host.cli(["run", "--rm", "busybox", "/etc/passwd"]).exits(126).expect_stderr("permission denied");
    host.cli(["run", "--rm", "busybox", "/etc"]).exits(126);
    host.assert_nothing_left();
}

fn a_mistake_in_the_command_is_125(client: Client) {
    let host = Host::new(client);
    host.cli(["run", "--no-such-flag", "busybox"]).exits(125).expect_stderr("no-such-flag");
    host.cli(["run", "--rm", "--memory", "many", "busybox", "true"]).exits(125);
    host.cli(["run", "--rm", "--name", "a b", "busybox", "true"]).exits(125).expect_stderr("a b");
    host.cli(["run", "--rm", "-v", "relative/path:/x:bad", "busybox", "true"]).exits(125);
    host.assert_nothing_left();
}

fn death_by_a_signal_is_128_and_its_number(client: Client) {
    let host = Host::new(client);
    host.cli(["run", "--rm", "busybox", "sh", "-c", "sh -c 'kill -9 $$'; exit $?"]).exits(137);
    let id = host.background(&[], "trap 'exit 9' USR1; while :; do sleep 0.1; done");
    host.cli(["kill", &id]).ok();
    assert_eq!(host.cli(["wait", &id]).ok(), "137");
}

fn flags_reach_the_program(client: Client) {
    let host = Host::new(client);
    assert_eq!(
        host.script(&["-e", "A=1 2", "-w", "/some/where/new"], "echo $A; pwd"),
        "1 2\n/some/where/new"
    );
    assert_eq!(host.script(&["--hostname", "ship"], "hostname; cat /etc/hostname"), "ship\nship");
    assert_eq!(host.script(&["--ulimit", "nofile=1234:2345"], "ulimit -n; ulimit -Hn"), "1234\n2345");
    assert_eq!(
        host.script(&[], "echo $PATH; echo $HOME; echo $PWD; umask"),
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n/root\n/\n0022"
    );
    let hostname = host.script(&[], "hostname");
    assert_eq!(hostname.len(), 12, "a container's own hostname is its short id: {hostname}");
}

fn an_env_file_and_the_clients_environment_reach_the_program(client: Client) {
    let host = Host::new(client);
    let file = host.dir().join("env");
    fs::write(&file, "# a comment\nFROM_FILE=yes = it is\nPASSED\nNOT_SET\n").unwrap();
    let file = file.to_str().unwrap();
    let run = ["run", "--rm", "--env-file", file, "-e", "ALSO", "busybox", "env"];
    let seen = host.cli(run).env("PASSED", "1").env("ALSO", "2").ok();
    let lines: Vec<_> = seen.lines().collect();
    for line in ["FROM_FILE=yes = it is", "PASSED=1", "ALSO=2"] {
        assert!(lines.contains(&line), "{line} in {lines:?}");
    }
    assert!(!seen.contains("NOT_SET"), "{lines:?}");
}

fn an_entrypoint_is_replaced_with_its_arguments(client: Client) {
    let host = Host::new(client);
    assert_eq!(host.cli(["run", "--rm", "--entrypoint", "echo", "busybox", "a", "b"]).ok(), "a b");
    // The image's command belongs to the image's entry point, and goes with it.
    assert_eq!(host.cli(["run", "--rm", "--entrypoint", "echo", "busybox"]).ok(), "");
}

fn a_user_is_found_by_name_and_number(client: Client) {
    let host = Host::new(client);
    let ids = "id -u; id -g; id -G; echo $HOME";
    assert_eq!(host.script(&["-u", "guest"], ids), "1000\n1000\n1000 10\n/home");
    assert_eq!(host.script(&["-u", "1000:10"], "id -u; id -g"), "1000\n10");
    assert_eq!(host.script(&["-u", "4321"], "id -u; id -g; id -G"), "4321\n0\n0");
    assert_eq!(
        host.script(&["-u", "guest", "--group-add", "root", "--group-add", "77"], "id -G"),
        "1000 0 10 77"
    );
    let output = host.cli(["run", "--rm", "-u", "nobody-here", "busybox", "true"]).run();
    assert!(output.code == 125 || output.code == 126, "{output}");
    assert!(output.stderr.contains("nobody-here"), "{output}");
    host.assert_nothing_left();
}

fn names_are_unique(client: Client) {
    let host = Host::new(client);
    host.cli(["create", "--name", "one", "busybox"]).ok();
    let output = host.cli(["run", "--name", "one", "busybox"]).exits(125);
    output.expect_stderr("The container name \"/one\" is already in use by container");
    host.cli(["rm", "one"]).ok();
    host.cli(["run", "--name", "one", "busybox"]).ok();
}

fn rm_removes_the_container_and_its_name(client: Client) {
    let host = Host::new(client);
    for _ in 0..3 {
        host.cli(["run", "--rm", "--name", "again", "busybox", "true"]).ok();
    }
    assert_eq!(host.cli(["ps", "-aq"]).ok(), "");
    host.assert_nothing_left();
}

fn detached_prints_the_id_and_goes_on(client: Client) {
    let host = Host::new(client);
    let id = host.background(&["--name", "bg"], "sleep 1000");
    assert_eq!(id.len(), 64);
    let info = host.inspect(&id);
    assert_eq!(info["Name"], "/bg");
    assert_eq!(info["State"]["Status"], "running");
    assert_eq!(info["State"]["Running"], true);
    assert!(info["State"]["Pid"].as_u64().unwrap() > 0);
    host.cli(["rm", "-f", &id[..12]]).ok();
    host.assert_nothing_left();
}

fn a_real_distribution_runs(client: Client) {
    let host = Host::new(client);
    host.load(&brigantine_testkit::fixtures::debian());
    let run = |script: &str| host.cli(["run", "--rm", "debian:bookworm", "bash", "-c", script]).ok();
    assert!(run("cat /etc/os-release").contains("VERSION_CODENAME=bookworm"));
    assert_eq!(run("dpkg -s bash | grep ^Status; id -un"), "Status: install ok installed\nroot");
    // A package manager's whole tool chain: users, permissions, links, a database, scripts.
    assert_eq!(run("useradd -m sailor && su sailor -c 'cd; touch x; stat -c %U x'"), "sailor");
}

fn init_reaps_and_forwards(client: Client) {
    let host = Host::new(client);
    let id = host.background(&["--init"], "(sleep 0.01 &) ; trap 'exit 5' TERM; while :; do sleep 0.1; done");
    host.wait_state(&id, "running");
    let first =
        host.cli(["exec", &id, "sh", "-c", "tr '\\0' ' ' </proc/1/cmdline; echo; cat /proc/1/comm"]).ok();
    assert!(first.contains("init"), "PID 1 is the reaper: {first}");
    host.cli(["exec", &id, "sh", "-c", "(sleep 0.01 &)"]).ok();
    brigantine_testkit::eventually("no zombie", || {
        let list = host.cli(["exec", &id, "ps", "-o", "stat"]).ok();
        (!list.contains('Z')).then_some(())
    });
    host.cli(["stop", "-t", "20", &id]).ok();
    assert_eq!(host.cli(["wait", &id]).ok(), "5");
}

fn labels_are_kept_and_selected_by(client: Client) {
    let host = Host::new(client);
    let id = host.background(&["--label", "a=1", "-l", "b"], "sleep 1000");
    host.background(&["-l", "a=2"], "sleep 1000");
    assert_eq!(host.cli(["ps", "-q", "--no-trunc", "--filter", "label=a=1"]).ok(), id);
    assert_eq!(host.cli(["ps", "-q", "--filter", "label=a"]).ok().lines().count(), 2);
    assert_eq!(host.cli(["inspect", "-f", "{{index .Config.Labels \"a\"}}", &id]).ok(), "1");
}

fn a_file_gets_the_id(client: Client) {
    let host = Host::new(client);
    let file = host.dir().join("cid");
    let id = host.cli(["create", "--cidfile", file.to_str().unwrap(), "busybox"]).ok();
    assert_eq!(fs::read_to_string(&file).unwrap(), id);
}

/// A container that may change its mounts could make the reaper's file writable: it must not be the host's executable.
#[test]
fn the_reaper_is_a_copy_of_the_containers_own() {
    use std::os::unix::fs::MetadataExt;
    let engine = brigantine_testkit::Engine::with_busybox();
    if engine.is_peer() {
        return;
    }
    let id = engine
        .docker(
            ["run", "-d", "--init", "--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined"]
                .into_iter()
                .chain(["busybox", "sleep", "1000"]),
        )
        .ok();
    let host = std::fs::metadata(brigantine_testkit::engine::executable("brig-runtime")).unwrap();
    let reaper = engine.docker(["exec", &id, "stat", "-Lc", "%s %i", "/proc/1/exe"]).ok();
    let (size, inode) = reaper.split_once(' ').unwrap();
    assert_eq!(size, host.len().to_string(), "it is the reaper");
    assert_ne!(inode, host.ino().to_string());
    let script = "mount -o remount,bind,rw /sbin/brig-init && chmod 700 /sbin/brig-init && echo writable";
    assert_eq!(engine.docker(["exec", &id, "sh", "-c", script]).ok(), "writable");
    assert_eq!(
        std::fs::metadata(brigantine_testkit::engine::executable("brig-runtime")).unwrap().mode(),
        host.mode()
    );
    engine.docker(["rm", "-f", &id]).ok();
    engine.assert_nothing_left();
}
