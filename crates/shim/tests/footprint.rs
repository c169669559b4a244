//! What a monitor costs. The bounds are for what is shipped, a static release build: point `BRIGANTINE_RUNTIME` at one,
//! and set `BRIG_TEST_RELEASE`. Without that the numbers are only printed.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod common;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use common::{Fixture, runtime};

/// Kilobytes of memory that a process shares with nobody, and of its anonymous memory.
fn private_kb(pid: i32) -> (u64, u64) {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let field = |name: &str| -> u64 {
        let line = rollup.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (field("Private_Dirty:"), field("Anonymous:"))
}

#[test]
fn an_idle_monitor_is_small() {
    // Much output first: its buffers must be gone when it is over.
    let fixture = Fixture::shell("seq 1 300000; sleep 1000");
    let mut running = fixture.start_attached();
    let mut attach = running.attach.take().unwrap();
    common::read_until(&mut attach, "\n300000\n");
    thread::sleep(Duration::from_secs(2));
    let (dirty, anonymous) = private_kb(running.spawned.shim_pid);
    eprintln!("idle monitor: {anonymous} KiB anonymous, {dirty} KiB private dirty");
    // The rest of what is private is the executable's own pages, which one monitor alone has mapped here: they are one
    // sealed copy for all monitors of a daemon.
    if std::env::var_os("BRIG_TEST_RELEASE").is_some() {
        assert!(anonymous <= 150 && dirty <= 300, "{anonymous} KiB, {dirty} KiB");
    }
}

#[test]
fn a_start_is_quick() {
    let fixtures: Vec<Fixture> = (0..20).map(|_| Fixture::new(&["/bin/sleep", "1000"])).collect();
    let mut times: Vec<Duration> = fixtures
        .iter()
        .map(|fixture| {
            let since = Instant::now();
            let running = fixture.start();
            let time = since.elapsed();
            drop(running);
            time
        })
        .collect();
    times.sort();
    eprintln!("{}: start: median {:?}, fastest {:?}", runtime().display(), times[10], times[0]);
}
