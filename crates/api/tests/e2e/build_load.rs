//! Many builds at once.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout};

use brigantine_testkit::{Client, eventually};

use crate::Host;

const BUILDS: usize = 20;
const LEAVING: usize = 6;

/// The file of that name in a directory below.
fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(dir).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        if path.file_name().is_some_and(|last| last == name) {
            return Some(path);
        }
        path.is_dir().then(|| find(&path, name)).flatten()
    })
}

/// A build that has seen what the step prints: it waits for it.
fn joined(host: &Host, dir: &Path, number: usize) -> (Child, BufReader<ChildStdout>) {
    let tag = format!("load:{number}");
    let mut child = host.cli(["build", "--progress", "plain", "-t", &tag, dir.to_str().unwrap()]).spawn();
    let mut shown = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("tick") || line.contains("RUN") {
        line.clear();
        assert_ne!(shown.read_line(&mut line).unwrap(), 0, "the build ended early");
    }
    (child, shown)
}

#[test]
fn equal_builds_share_a_step_and_who_leaves_takes_it_from_nobody() {
    let host = Host::new(Client::Brig);
    let dir = host.dir().join("ctx");
    fs::create_dir(&dir).unwrap();
    let dockerfile = "FROM busybox\n\
                      RUN --mount=type=cache,target=/c echo run >>/c/log; \
                      until [ -e /c/go ]; do echo tick; sleep 0.05; done; echo made >/made\n";
    fs::write(dir.join("Dockerfile"), dockerfile).unwrap();
    let mut builds: Vec<_> = (0..BUILDS).map(|number| joined(&host, &dir, number)).collect();
    // The one that began the step among them.
    for (mut child, _) in builds.drain(..LEAVING) {
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success());
    }
    let caches = host.data_root().join("build/caches");
    let log = eventually("the step's record", || find(&caches, "log"));
    fs::write(log.with_file_name("go"), "").unwrap();
    for (mut child, mut shown) in builds {
        let mut rest = String::new();
        shown.read_to_string(&mut rest).unwrap();
        assert!(child.wait().unwrap().success(), "{rest}");
    }
    assert_eq!(fs::read_to_string(&log).unwrap(), "run\n");
    for number in LEAVING..BUILDS {
        let tag = format!("load:{number}");
        assert_eq!(host.cli(["run", "--rm", &tag, "cat", "/made"]).ok().trim(), "made");
    }
    assert!(!host.cli(["images", "-q", "load:0"]).ok().contains(|c: char| c.is_ascii_hexdigit()));
    // And it is in the cache.
    host.cli(["build", "-t", "load:again", dir.to_str().unwrap()]).ok();
    assert_eq!(fs::read_to_string(&log).unwrap(), "run\n");
}
