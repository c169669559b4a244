//! Dockerfiles that are wrong, and steps, disks and clients that fail: told clearly, and nothing is left of them.

use brigantine_testkit::eventually;

use super::{Given, Yard};

#[test]
fn what_is_wrong_is_refused_in_words_that_help() {
    let yard = Yard::new();
    let none = || -> [(&str, Given<'_>); 0] { [] };
    let link = |target| [("a", Given::Link(target))];
    yard.host.leaving_nothing(|| {
        for (dockerfile, words) in [
            ("", "file with no instructions"),
            ("FROM busybox\nEXPOSE 99999\n", "99999"),
            ("FROM busybox\nSTOPSIGNAL SIGNOPE\n", "SIGNOPE"),
            ("FROM busybox\nUSER nobodyhere\nRUN true\n", "nobodyhere"),
            ("FROM busybox\nHEALTHCHECK --interval=5 CMD x\n", "interval"),
            ("FROM busybox\nCOPY --chmod=1 --chmod=2 a b\n", "chmod"),
            ("FROM busybox\nCOPY --chwon=1 a b\n", "unknown flag: --chwon"),
            ("FROM busybox\nRUN <<EOT\necho\n", "EOT"),
            ("FROM busybox\nRUN --mount=type=foo true\n", "foo"),
            ("FROM busybox\nRUN --mount=type=bind,target=/ true\n", "/"),
            ("FROM busybox\nRUN --mount=type=secret,id=zz,required true\n", "secret zz: not found"),
            ("FROM busybox\nRUN --security=insecure true\n", "--allow security.insecure"),
            ("FROM busybox AS a\nRUN --mount=type=cache,target=/c,from=a true\nFROM a\n", "circular"),
            ("FROM busybox AS s\nFROM busybox\nRUN --mount=type=cache,target=/c,from=s,source=/bin/sh true\n", "no directory"),
            ("FROM busybox\nADD http://127.0.0.1:1/x /x\n", "127.0.0.1:1"),
        ] {
            yard.refuses(dockerfile.as_bytes(), &none(), &[], words);
        }
        yard.refuses(b"FROM busybox\n", &none(), &["--allow", "everything"], "invalid entitlement: everything");
        // A link in the context leads nowhere outside of it.
        for target in ["a", "/etc/passwd", "../../../../../../etc/passwd"] {
            yard.refuses(b"FROM busybox\nCOPY a /a\n", &link(target), &[], "a");
        }
        yard.refuses(b"FROM busybox\nCOPY a/passwd /a\n", &link("/etc"), &[], "a/passwd");
        yard.refuses(b"FROM busybox\nCOPY --chown=nobodyhere f /\n", &[("f", Given::Text(""))], &[], "nobodyhere");
        let mut huge = b"FROM busybox\n#".to_vec();
        huge.resize(17 << 20, b'x');
        yard.refuses(&huge, &none(), &[], "at most 16777216");
        yard.host.cli(["builder", "prune", "-af"]).ok();
        yard.host.cli(["image", "prune", "-f"]).ok();
    });
}

#[test]
fn steps_that_misbehave() {
    let mut yard = Yard::new();
    let none = || -> [(&str, Given<'_>); 0] { [] };
    // More output than anybody reads at once, and none of it text.
    let (output, _) = yard.build(
        b"FROM busybox\nRUN head -c 20000000 /dev/zero | tr '\\0' '\\377'; echo the end\nRUN echo ok\n",
        &none(),
        &[],
    );
    assert_eq!(output.code, 0, "{}", &output.stderr[output.stderr.len().saturating_sub(2000)..]);
    assert!(output.stdout.contains("the end"));
    // What a step leaves running ends with it.
    yard.shows("FROM busybox\nRUN (sleep 1000 &) ; sleep 1001 & echo x > /o\n", &none(), "cat /o", "x");
    let left: Vec<_> =
        yard.host.sandbox().processes().into_iter().filter(|(_, line)| line.contains("sleep 100")).collect();
    assert!(left.is_empty(), "{left:?}");
    yard.refuses(
        b"FROM busybox\nRUN --mount=type=tmpfs,target=/t dd if=/dev/zero of=/t/x bs=1M count=200\n",
        &none(),
        &["-m", "32m", "--memory-swap", "32m"],
        "out of memory",
    );
    // A chain of steps may be as long as a file system's stack of layers.
    let long = "RUN echo x >> /o\n".repeat(125);
    yard.shows(&format!("FROM busybox\n{long}"), &none(), "wc -l < /o", "125");
    let labels = "LABEL l=x\n".repeat(600);
    yard.shows(&format!("FROM busybox\n{labels}"), &none(), "echo ok", "ok");

    // A client that goes takes its step with it.
    let dockerfile = b"FROM busybox\nRUN echo waiting; sleep 1234\n";
    let (dir, tag) = yard.folder(dockerfile, &none());
    let mut client = yard.host.cli(["build", "-t", &tag, dir.to_str().unwrap()]).spawn();
    let sleeps =
        |yard: &Yard| yard.host.sandbox().processes().iter().any(|(_, line)| line.ends_with("sleep 1234"));
    eventually("the step to run", || sleeps(&yard).then_some(()));
    client.kill().unwrap();
    assert!(!client.wait().unwrap().success());
    eventually("the step to end", || (!sleeps(&yard)).then_some(()));

    // A disk that is full fails the step; what was there before is still right.
    yard.host.engine.stop_daemon();
    let data = yard.host.data_root();
    let small = ["-t", "tmpfs", "-o", "size=48m", "tmpfs", data.to_str().unwrap()];
    assert!(yard.host.sandbox().command("mount").args(small).status().unwrap().success());
    yard.host.engine.restart_daemon();
    yard.host.load(&brigantine_testkit::fixtures::busybox());
    let keeps = "FROM busybox\nRUN echo kept > /kept\n";
    yard.shows(keeps, &none(), "cat /kept", "kept");
    let full = format!("{keeps}RUN dd if=/dev/zero of=/x bs=1M count=100\n");
    yard.refuses(full.as_bytes(), &none(), &[], "No space left on device");
    yard.shows(keeps, &none(), "cat /kept", "kept");
}

/// What is wrong, where, and the lines around it.
#[test]
fn what_is_missing_is_told_with_its_place() {
    let yard = Yard::new();
    let none = || -> [(&str, Given<'_>); 0] { [] };
    for (dockerfile, place, shown) in [
        ("FROM busybox\nRUN true\n  COPY nothere /x\n", "Dockerfile:3:3: ", "   3 | >>>   COPY nothere /x"),
        (
            "FROM busybox AS x\nCOPY --from=later /x /x\nFROM busybox AS later\nFROM x\n",
            "Dockerfile:2:1: ",
            "comes later in the Dockerfile",
        ),
        ("FROM later AS x\nFROM busybox AS later\nFROM x\n", "Dockerfile:1:1: ", "   1 | >>> FROM later"),
        ("FROM busybox AS a\nCOPY --from=a /x /x\n", "Dockerfile:2:1: ", "circular dependency"),
        (
            "FROM busybox\nCOPY --from=127.0.0.1:1/no /x /x\n",
            "Dockerfile:2:1: ",
            "pull the base image 127.0.0.1:1/no",
        ),
        ("FROM 127.0.0.1:1/no\n", "Dockerfile:1:1: ", "   1 | >>> FROM 127.0.0.1:1/no"),
        ("FROM busybox\nCOPY --from=busybox /nothere /x\n", "Dockerfile:2:1: ", "/nothere"),
        (
            "FROM busybox\nRUN --mount=type=secret,id=zz,required true\n",
            "Dockerfile:2:1: ",
            "secret zz: not found",
        ),
        (
            "FROM busybox\nRUN --mount=from=busybox,source=/nothere,target=/m true\n",
            "Dockerfile:2:1: ",
            "nothere",
        ),
        (
            "FROM busybox\nCOPY --from=$X /x /x\n",
            "Dockerfile:2:1: ",
            "variable expansion is not supported for --from",
        ),
        (
            "FROM busybox\nRUN true \\\n  && true\nCOPY --form=a b c\n",
            "Dockerfile:4:1: ",
            "did you mean from?",
        ),
    ] {
        yard.refuses(dockerfile.as_bytes(), &none(), &[], place);
        yard.refuses(dockerfile.as_bytes(), &none(), &[], shown);
        // Whatever form the answer has.
        let (dir, _) = yard.folder(dockerfile.as_bytes(), &none());
        let mut terminal = yard.host.terminal(["build", dir.to_str().unwrap()]);
        assert!(!terminal.wait().success());
        assert!(terminal.shown().contains(place), "{dockerfile}: {}", terminal.shown());
    }
    yard.refuses(
        b"FROM busybox AS one\n",
        &none(),
        &["--target", "two"],
        "target stage \"two\" could not be found (stages: one)",
    );
    yard.refuses(
        b"# syntax=example.com/other:1\nFROM busybox\n",
        &none(),
        &[],
        "the frontend example.com/other:1 is not run",
    );
}

#[test]
fn a_huge_dockerfile_and_a_context_of_links_pipes_and_devices() {
    let yard = Yard::new();
    let (dir, tag) = yard.folder(b"FROM busybox\n", &[]);
    let file = std::fs::File::create(dir.join("Dockerfile")).unwrap();
    file.set_len(1 << 30).unwrap();
    let args = ["build", "-t", &tag, dir.to_str().unwrap()];
    let refused = yard.host.cli(args).run();
    let words = "1073741824 bytes long: at most 16777216 are read";
    assert!(refused.code != 0 && refused.stderr.contains(words), "{refused}");
    // Sent all the same, by a client that does not look, it takes no memory.
    let peak = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", yard.host.daemon_pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let before = peak();
    let docker = yard.host.docker(args).env("DOCKER_BUILDKIT", "0").run();
    assert!(docker.code != 0 && docker.stderr.contains("at most"), "{docker}");
    let after = peak();
    assert!(after < before + (100 << 10), "{before} kB before, {after} kB after");

    // Links that lead round in a circle and out are links; what is neither file nor folder is not taken.
    let files = [
        ("d/f", Given::Text("x")),
        ("d/up", Given::Link("..")),
        ("self", Given::Link("self")),
        ("a", Given::Link("b")),
        ("b", Given::Link("a")),
        ("out", Given::Link("/etc")),
    ];
    let (dir, tag) = yard.folder(b"FROM busybox\nCOPY . /c/\nRUN cd /c && find . | sort > /list\n", &files);
    let sh = |script: &str| {
        let output = std::process::Command::new("sh").current_dir(&dir).args(["-ec", script]).status();
        assert!(output.unwrap().success(), "{script}");
    };
    sh(
        "mkfifo pipe; mknod null c 1 3 2>/dev/null || true; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")' 2>/dev/null || true",
    );
    yard.host.cli(["build", "-t", &tag, dir.to_str().unwrap()]).ok();
    let listed = yard.host.cli(["run", "--rm", &tag, "cat", "/list"]).ok();
    assert_eq!(listed, ".\n./Dockerfile\n./a\n./b\n./d\n./d/f\n./d/up\n./out\n./self");
    for source in ["self", "a", "d/up/d/up/self"] {
        let dockerfile = format!("FROM busybox\nCOPY {source} /x\n");
        yard.refuses(dockerfile.as_bytes(), &files, &[], source);
    }
    // A Dockerfile that leads out, or round.
    for target in ["/etc/passwd", "Dockerfile", "../../../../etc/passwd"] {
        std::fs::remove_file(dir.join("Dockerfile")).unwrap();
        std::os::unix::fs::symlink(target, dir.join("Dockerfile")).unwrap();
        let refused = yard.host.cli(["build", dir.to_str().unwrap()]).run();
        assert!(refused.code != 0 && !refused.stdout.contains("root:"), "{target}: {refused}");
    }
}
