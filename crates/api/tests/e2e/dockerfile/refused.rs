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
