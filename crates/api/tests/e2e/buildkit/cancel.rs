//! Builds that are ended by their id, as docker's BuildKit client ends them when it is interrupted.

use std::time::Duration;

use brigantine_testkit::{Engine, Terminal, eventually, until};

use super::context;
use super::peer::{Answers, Peer};

const ENDLESS: &str = "FROM busybox\nRUN echo begun && sleep 1000\n";

fn steps(engine: &Engine) -> usize {
    engine.sandbox().processes().iter().filter(|(_, command)| command == "sleep 1000").count()
}

#[track_caller]
fn cancel(engine: &Engine, query: &str, status: u16) {
    let answer = engine.post_bytes(&format!("/build/cancel{query}"), "", b"");
    assert_eq!(answer.status, status, "{query}: {}", answer.text());
}

#[test]
fn a_build_is_cancelled_by_its_id_and_no_other_is() {
    let engine = Engine::with_busybox();
    engine.leaving_nothing(|| {
        std::thread::scope(|scope| {
            let build = |key: &str, id: &'static str| {
                let peer = Peer::open(&engine, key, ENDLESS, Answers::files(&[]));
                let path = format!(
                    "/build?version=2&remote=client-session&nocache=1&session={}&buildid={id}",
                    peer.session()
                );
                let engine = &engine;
                // The client stays: it is the id alone that ends the build.
                let answer = scope.spawn(move || engine.post_bytes(&path, "application/x-tar", b"").text());
                (peer, answer)
            };
            let (_first, one) = build("one", "the-one");
            let (_second, other) = build("two", "the-other");
            let (_third, same) = build("three", "the-one");
            eventually("all steps run", || (steps(&engine) == 3).then_some(()));
            cancel(&engine, "", 400);
            cancel(&engine, "?id=", 400);
            cancel(&engine, "?id=nobody", 204);
            let changed = until(Duration::from_millis(300), || (steps(&engine) != 3).then_some(()));
            assert!(changed.is_none(), "an id that nobody has ends nothing");
            cancel(&engine, "?id=the-one", 204);
            for ended in [one, same] {
                let said = ended.join().unwrap();
                assert!(said.contains("the build was cancelled"), "{said}");
            }
            eventually("their steps are gone", || (steps(&engine) == 1).then_some(()));
            assert!(!other.is_finished());
            cancel(&engine, "?id=the-one", 204);
            cancel(&engine, "?id=the-other", 204);
            assert!(other.join().unwrap().contains("the build was cancelled"));
            eventually("no step is left", || (steps(&engine) == 0).then_some(()));
        });
        engine.docker(["builder", "prune", "-af"]).ok();
    });
}

#[test]
fn an_interrupted_docker_command_cancels_its_build() {
    let engine = Engine::with_busybox();
    let dir = context(&engine, "ctx", &[("Dockerfile", ENDLESS)]);
    engine.leaving_nothing(|| {
        let mut command =
            engine.buildkit(["build", "--progress", "plain", dir.to_str().unwrap()]).into_command();
        command.env("TERM", "xterm");
        let mut terminal = Terminal::spawn(command);
        eventually("the step runs", || (steps(&engine) == 1).then_some(()));
        terminal.send("\u{3}");
        assert!(!terminal.wait().success());
        eventually("the step is ended", || (steps(&engine) == 0).then_some(()));
        let log = engine.daemon_log();
        assert!(log.contains("a build is to be cancelled") && log.contains("builds=1"), "{log}");
        engine.docker(["builder", "prune", "-af"]).ok();
    });
}
