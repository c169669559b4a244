//! Clients that send what no client should: each build is refused with the reason, nothing is written outside, and the
//! next honest build of the same folder has what it sent.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use brigantine_testkit::{Engine, eventually};

use super::peer::{Answers, DIR, Peer, SYMLINK, Sends, data, end, entry, fin, link};

const DOCKERFILE: &str = "FROM busybox\nCOPY . /c\nRUN cd /c && find . -type f | sort | xargs md5sum && find . | sort && readlink ln\n";

/// What an honest client has: a directory, a file in it, one beside it and a link.
fn honest() -> Answers {
    Answers::files(&[("d", DIR, ""), ("d/f", 0o644, "deep"), ("ln", SYMLINK, "d/f"), ("top", 0o600, "top\n")])
}

/// Builds with a client that answers so; what the engine says of it.
fn build(engine: &Engine, context: Answers) -> String {
    let peer = Peer::open(engine, "shared", DOCKERFILE, context);
    let path = format!("/build?version=2&remote=client-session&nocache=1&t=x&session={}", peer.session());
    engine.post_bytes(&path, "application/x-tar", b"").text()
}

/// What the kept context holds on disk.
fn kept(engine: &Engine) -> Vec<String> {
    let listed = std::process::Command::new("find")
        .arg(engine.data_root().join("build/contexts"))
        .args(["-mindepth", "3", "-printf", "%P\n"])
        .output()
        .unwrap();
    let mut names: Vec<String> = String::from_utf8_lossy(&listed.stdout)
        .lines()
        .map(|line| line.splitn(3, '/').last().unwrap().to_owned())
        .collect();
    names.sort();
    // While one build still ends, the next has a place of its own.
    names.dedup();
    names
}

#[track_caller]
fn assert_honest(engine: &Engine) {
    let said = build(engine, honest());
    assert!(said.contains("moby.image.id"), "{said}");
    let script = "cd /c; cat d/f top; readlink ln; find . | sort | tr '\\n' ' '; stat -c %a top";
    let seen = engine.docker(["run", "--rm", "x", "sh", "-c", script]).ok();
    assert_eq!(seen, "deeptop\nd/f\n. ./d ./d/f ./ln ./top 600");
    assert_eq!(kept(engine), ["d", "d/f", "ln", "top"]);
}

fn memory(engine: &Engine) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", engine.daemon_pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

#[test]
fn what_a_client_must_not_send_is_refused_and_changes_nothing() {
    let engine = Engine::with_busybox();
    let victim = engine.dir().join("victim");
    fs::write(&victim, "untouched").unwrap();
    let outside = victim.to_str().unwrap();
    let above = engine.dir().to_str().unwrap();
    let long = "n".repeat(1 << 20);
    assert_honest(&engine);
    let f = |size| entry("f", 0o644, size);
    let attacks: Vec<(&str, Vec<Sends>)> = vec![
        ("not a plain path", vec![entry(outside, 0o644, 1)]),
        ("not a plain path", vec![entry("../victim", 0o644, 1)]),
        ("not a plain path", vec![entry("d", DIR, 0), entry("d/../../victim", 0o644, 1)]),
        ("not a plain path", vec![entry("d//x", 0o644, 1)]),
        ("no possible path", vec![entry("a\0b", 0o644, 1)]),
        ("no possible path", vec![entry("", 0o644, 1)]),
        ("no possible path", vec![entry(&long, 0o644, 1)]),
        ("a link to no possible path", vec![link("l", SYMLINK, &long)]),
        ("a link to nothing", vec![link("l", SYMLINK, "")]),
        ("in no directory that was listed", vec![link("l", SYMLINK, above), entry("l/victim", 0o644, 1)]),
        ("in no directory that was listed", vec![f(1), entry("f/x", 0o644, 1)]),
        ("a link to a file that was not listed", vec![link("h", 0o644, outside)]),
        ("a link to a file that was not listed", vec![link("h", 0o644, "../../../victim")]),
        ("a link to a file that was not listed", vec![link("a", SYMLINK, outside), link("h", 0o644, "a")]),
        ("out of order", vec![f(1), f(1)]),
        ("out of order", vec![f(1), entry("f", DIR, 0)]),
        ("out of order", vec![entry("z", 0o644, 1), f(1)]),
        ("has the size -1", vec![f(-1)]),
        ("was not asked for", vec![f(1), data(7, b"x")]),
        ("was not asked for", vec![entry("d", DIR, 0), data(0, b"x")]),
        (
            "was not asked for",
            vec![
                f(1),
                entry("g", 0o644, 1),
                end(),
                Sends::Wait(1),
                data(0, b"x"),
                data(0, b""),
                data(0, b"more"),
            ],
        ),
        ("after the end of the list", vec![f(1), end(), entry("g", 0o644, 1)]),
        ("finished before it was complete", vec![f(1), end(), fin()]),
        ("a packet of kind 9", vec![Sends::Packet(vec![8, 9])]),
        ("message", vec![f(1), end(), Sends::Wait(0), data(0, &vec![0; 5 << 20])]),
        (
            "listed \\\"f\\\" with 1 bytes",
            vec![f(1), end(), Sends::Wait(0), Sends::Endless(data(0, &[0; 32 << 10]).bytes())],
        ),
        ("names in the folder have more than", vec![Sends::Names]),
        (
            "the client's session has ended",
            vec![f(100_000), end(), Sends::Wait(0), data(0, &[b'x'; 50_000]), Sends::Vanish],
        ),
        ("the client's session has ended", vec![entry("d", DIR, 0), entry("d/f", 0o600, 9), Sends::Vanish]),
    ];
    for (words, sends) in attacks {
        let shown = format!("{words}: {:?}", sends.iter().map(Sends::shown).collect::<Vec<_>>());
        let said = build(&engine, Answers::script(sends));
        let ended = words.contains("has ended") && said.contains("the build was cancelled");
        assert!(said.contains("errorDetail") && (said.contains(words) || ended), "{shown}: {}", cut(&said));
        assert!(said.len() < 20_000, "{shown}: {} bytes were said", said.len());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched", "{shown}");
        assert_eq!(fs::metadata(&victim).unwrap().nlink(), 1, "{shown}");
        // Either what was there before the attack, or nothing.
        eventually(&shown, || {
            let left = kept(&engine);
            (left.is_empty() || left == ["d", "d/f", "ln", "top"]).then_some(())
        });
        assert_honest(&engine);
    }
    let most = memory(&engine);
    assert!(most < 900, "{most} MiB");
}

#[test]
fn devices_are_left_out_and_a_file_that_grows_is_taken_again() {
    let engine = Engine::with_busybox();
    let device = 1 << 26 | 1 << 21 | 0o666;
    let pipe = 1 << 25 | 0o666;
    let mut sends = vec![
        entry("d", DIR, 0),
        entry("d/f", 0o644, 4),
        entry("dev", device, 0),
        link("ln", SYMLINK, "d/f"),
        entry("pipe", pipe, 0),
        entry("socket", 1 << 24 | 0o666, 0),
        entry("top", 0o600, 2),
        end(),
        Sends::Wait(1),
        data(1, b"deep"),
        data(1, b""),
        Sends::Wait(6),
        // Longer than it was when it was listed.
        data(6, b"top\n"),
        data(6, b""),
    ];
    sends.push(Sends::Finish);
    let said = build(&engine, Answers::script(sends));
    assert!(said.contains("moby.image.id"), "{said}");
    assert_eq!(kept(&engine), ["d", "d/f", "ln", "top"]);
    assert_eq!(engine.docker(["run", "--rm", "x", "cat", "/c/top"]).ok(), "top");
    // It is asked for again, for what was kept is not what was listed.
    let (asked, context) = honest().counted();
    let said = build(&engine, context);
    assert!(said.contains("moby.image.id"), "{said}");
    assert_eq!(*asked.lock().unwrap(), [3]);
    assert_honest(&engine);
}

#[test]
fn a_client_that_is_silent_holds_nobody_up_but_itself() {
    let engine = Engine::with_busybox();
    std::thread::scope(|scope| {
        let peer = Peer::open(
            &engine,
            "shared",
            DOCKERFILE,
            Answers::script(vec![entry("f", 0o644, 9), end(), Sends::Wait(0), data(0, b"half"), Sends::Hang]),
        );
        let path = format!("/build?version=2&remote=client-session&session={}", peer.session());
        let engine = &engine;
        let stuck = scope.spawn(move || engine.post_bytes(&path, "application/x-tar", b"").text());
        eventually("the silent one is asked", || peer.was_asked().then_some(()));
        // The same folder: it gets a place of its own.
        let said = build(engine, honest());
        assert!(said.contains("moby.image.id"), "{said}");
        peer.leave();
        let said = stuck.join().unwrap();
        assert!(said.contains("has ended") || said.contains("was cancelled"), "{said}");
    });
    assert!(build(&engine, honest()).contains("moby.image.id"));
}

/// The end, where an error is.
fn cut(text: &str) -> String {
    let count = text.chars().count();
    text.chars().skip(count.saturating_sub(2000)).collect()
}
