//! Nothing is left after `rm`: after success, and after a failure at each step of a start.

use brigantine_testkit::{
    Engine,
    fixtures::{self, Archive, Layer},
};

#[test]
fn after_a_success() {
    let engine = Engine::with_busybox();
    for flags in [
        &["--network", "none"][..],
        &["-p", "80"],
        &["-t"],
        &["--init"],
        &["-m", "32m", "--tmpfs", "/t"],
        &["--network", "host"],
    ] {
        let run = ["run", "--rm"].iter().chain(flags).chain(&["busybox", "true"]);
        engine.docker(run).ok();
        engine.assert_nothing_left();
    }
    let ids: Vec<_> =
        (0..5).map(|_| engine.docker(["run", "-d", "-p", "80", "busybox", "sleep", "1000"]).ok()).collect();
    engine.docker(["rm", "-f"].into_iter().chain(ids.iter().map(String::as_str))).ok();
    engine.assert_nothing_left();
}

#[test]
fn after_a_start_that_failed() {
    let engine = Engine::with_busybox();
    let dir = engine.dir().join("exists");
    std::fs::create_dir(&dir).unwrap();
    let file_over_dir = format!("{}:/etc/passwd", dir.display());
    for (flags, command, text) in [
        (&["--entrypoint", "/no/entry"][..], "x", "/no/entry"),
        (&[][..], "no-such-program", "no-such-program"),
        (&["-p", "80"][..], "/etc/passwd", "permission denied"),
        (&["-u", "nobody-here"][..], "true", "nobody-here"),
        (&["-w", "/etc/passwd"][..], "true", "passwd"),
        (&["-v", &file_over_dir][..], "true", "not a directory"),
        (&["--device", "/dev/no-such-device"][..], "true", "/dev/no-such-device"),
        (&["--sysctl", "net.no.such=1"][..], "true", "no"),
        (&["--security-opt", "seccomp=/no/such/file"][..], "true", "/no/such/file"),
        (&["-m", "1m"][..], "true", "memory"),
    ] {
        let words = ["busybox", command];
        let output = engine.docker(["run", "--rm"].iter().chain(flags).chain(&words)).run();
        assert!((125..=127).contains(&output.code), "{output}");
        output.expect_stderr(text);
        assert_eq!(engine.docker(["ps", "-aq"]).ok(), "");
        engine.assert_nothing_left();
    }
}

#[test]
fn a_container_that_could_not_start_can_be_inspected_and_removed() {
    let engine = Engine::with_busybox();
    engine.docker(["run", "--name", "bad", "busybox", "no-such-program"]).exits(127);
    let info = engine.inspect("bad");
    assert_eq!(info["State"]["Status"], "created");
    assert_eq!(info["State"]["ExitCode"], 127);
    assert!(info["State"]["Error"].as_str().unwrap().contains("no-such-program"));
    engine.docker(["rm", "bad"]).ok();
    engine.assert_nothing_left();
}

#[test]
fn an_image_of_another_architecture_does_not_run() {
    let engine = Engine::start();
    // An ELF header of a machine that nobody has, as program and in the config.
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x16\0\x01\0\0\0".to_vec();
    elf.resize(4096, 0);
    let layer = Layer::default().dir("bin", 0o755).file("bin/alien", 0o755, &elf).finish();
    let image = Archive::new("alien:1").layer(layer).architecture("s390x").cmd(&["/bin/alien"]);
    engine.load(&image.write(engine.dir(), "alien.tar"));
    let output = engine.docker(["run", "--rm", "alien:1"]).run();
    assert!(output.code != 0 && output.stderr.contains("exec format error"), "{output}");
    engine.assert_nothing_left();
}

#[test]
fn no_memory_for_the_start_is_an_error() {
    let engine = Engine::with_busybox();
    // The smallest limit that is allowed; a shell that grows beyond it dies, and the engine stays sane.
    let output = engine
        .docker(["run", "--rm", "-m", "6m", "--memory-swap", "6m", "busybox", "sh", "-c", "tail /dev/zero"])
        .run();
    assert!(output.code != 0, "{output}");
    engine.docker(["run", "--rm", "-m", "6m", "busybox", "true"]).ok();
    engine.assert_nothing_left();
}

#[test]
fn no_mount_of_a_container_is_seen_on_the_host() {
    let engine = Engine::builder().busybox().start();
    if engine.is_peer() {
        return; // Docker mounts its containers' roots in the host's namespace.
    }
    let before = engine.sandbox().mounts();
    let id = engine.docker(["run", "-d", "busybox", "sleep", "1000"]).ok();
    assert_eq!(engine.sandbox().mounts(), before);
    engine.docker(["rm", "-f", &id]).ok();
}

#[test]
fn a_killed_container_of_a_killed_daemon_leaves_nothing() {
    let mut engine = Engine::with_busybox();
    if engine.is_peer() {
        return; // Nobody but its daemon cleans up after Docker's containers.
    }
    let id = engine.docker(["run", "-d", "-p", "80", "busybox", "sleep", "1000"]).ok();
    let pid = engine.container_pid(&id);
    engine.kill_daemon();
    assert!(engine.sandbox().command("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    engine.restart_daemon();
    engine.wait_state(&id, "exited");
    assert_eq!(engine.inspect(&id)["State"]["ExitCode"], 137);
    engine.docker(["rm", &id]).ok();
    engine.assert_nothing_left();
}

#[test]
fn an_image_that_was_removed_leaves_no_layer() {
    let engine = Engine::start();
    if engine.is_peer() {
        return; // This looks into our own store.
    }
    let files = |dir: &str| -> usize {
        let root = engine.data_root().join("image").join(dir);
        std::fs::read_dir(root).map_or(0, |list| list.flatten().count())
    };
    let before = files("layers");
    engine.load(&fixtures::busybox());
    assert!(files("layers") > before);
    engine.docker(["rmi", "busybox"]).ok();
    brigantine_testkit::eventually("the layer's end", || (files("layers") == before).then_some(()));
    assert_eq!(files("tmp"), 0);
}
