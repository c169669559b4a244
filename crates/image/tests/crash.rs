//! Killed at any moment, the store shows nothing half-made, and opening it again removes what was left.

mod common;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use brigantine_image::{Digest, InUse, Store, archive};
use common::{Tar, docker_archive};

const ROOT: &str = "BRIGANTINE_TEST_CRASH_ROOT";

fn images() -> Vec<Vec<u8>> {
    (0..4u8)
        .map(|n| {
            let files = (0..150).fold(Tar::new(), |tar, f| tar.file(&format!("d{}/f{f}", f % 7), &[n; 3000]));
            docker_archive(&[&format!("image:{n}")], &[files.done()])
        })
        .collect()
}

/// Run as a child process only: loads and removes without end.
#[test]
#[ignore = "the child of the test below"]
fn child() {
    let root = PathBuf::from(std::env::var_os(ROOT).unwrap());
    let images = images();
    loop {
        for image in &images {
            let store = Store::open(&root).unwrap();
            let loaded = archive::load(&store, &image[..], &mut |_| {}).unwrap();
            store.remove(loaded[0].image.as_str(), true, true, &InUse::default()).unwrap();
            archive::load(&store, &image[..], &mut |_| {}).unwrap();
        }
        let store = Store::open(&root).unwrap();
        store.prune(true, &InUse::default(), |_| true).unwrap();
    }
}

#[test]
fn a_kill_leaves_every_visible_image_whole_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("image");
    Store::open(&root).unwrap();
    for round in 0..12u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "child"])
            .env(ROOT, &root)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(120 + round * 37));
        child.kill().unwrap();
        child.wait().unwrap();

        let store = Store::open(&root).unwrap();
        assert_eq!(common::files(&root.join("tmp")), 0, "leftovers are gone");
        for image in store.list().unwrap() {
            store.ensure_unpacked(&image).unwrap();
            let lower = store.layer_files(&image).unwrap()[0].open().unwrap();
            let tree = lower.path();
            assert_eq!((0..7).map(|n| common::files(&tree.join(format!("d{n}")))).sum::<usize>(), 150);
        }
        for blob in store.content().walk().unwrap() {
            assert_eq!(Digest::sha256(&store.content().read(&blob).unwrap()), blob);
        }
        store.prune(true, &InUse::default(), |_| true).unwrap();
        store.gc(&InUse::default()).unwrap();
        assert!(store.content().walk().unwrap().is_empty());
        assert_eq!(common::files(&root.join("layers")), 0);
        assert_eq!(common::files(&root.join("leases")), 0);
    }
}
