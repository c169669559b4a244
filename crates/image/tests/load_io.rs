//! What loading costs in bytes, counted by the kernel for this process alone.

mod common;

use brigantine_image::{Storage, Store, archive};
use common::{Tar, docker_archive};

/// Bytes read and written by system calls so far.
fn moved() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/self/io").expect("counts");
    let of = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("a count");
        line.trim().parse().expect("a number")
    };
    (of("rchar:"), of("wchar:"))
}

/// A layer that is not compressed is written once and not read again where it is kept as an archive, and read once where
/// it is extracted.
#[test]
fn a_plain_layer_is_handled_once() {
    let layer = Tar::new().file("large", &vec![7; 16 << 20]).done();
    let archive = docker_archive(&["x:1"], &[layer]);
    let size = archive.len() as u64;
    for (storage, reads, writes) in [(Storage::Erofs, 0, 1), (Storage::Overlay, 1, 2)] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_with(&dir.path().join("image"), Some(storage)).unwrap();
        let before = moved();
        archive::load(&store, &archive[..], &mut |_| {}).unwrap();
        let after = moved();
        let (read, written) = (after.0 - before.0, after.1 - before.1);
        let little = size / 8;
        assert!(
            (reads * size..reads * size + little).contains(&(read + little / 2)),
            "{storage}: {read} of {size} read"
        );
        assert!(written < writes * size + little, "{storage}: {written} of {size} written");
    }
}
