//! What loading and packing cost in bytes, counted by the kernel for this process alone.

mod common;

use std::io::Read as _;

use brigantine_image::{Digest, Storage, Store, archive, layer};
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

/// What could not become a layer leaves no blob, and what is a layer already keeps its own.
#[test]
fn a_packed_layer_that_cannot_be_placed_leaves_nothing() {
    for storage in [Storage::Erofs, Storage::Overlay] {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("image");
        let store = Store::open_with(&root, Some(storage)).unwrap();
        let upper = |text: &str| {
            let upper = dir.path().join("upper");
            std::fs::create_dir_all(&upper).unwrap();
            std::fs::write(upper.join("f"), text).unwrap();
            upper
        };
        let blobs = || store.content().walk().unwrap().iter().map(Digest::to_string).collect::<Vec<_>>();
        let lease = store.lease().unwrap();
        let (first, _) = store.adopt_upper(&lease, &upper("one")).unwrap().unwrap();
        drop(lease);
        let kept = [first.digest.to_string()];
        assert_eq!(blobs(), kept);
        // No place for layers.
        let (layers, away) = (root.join("layers"), root.join("away"));
        std::fs::rename(&layers, &away).unwrap();
        let lease = store.lease().unwrap();
        let failed = store.adopt_upper(&lease, &upper("two"));
        std::fs::rename(&away, &layers).unwrap();
        assert!(failed.is_err(), "{storage}: {failed:?}");
        assert_eq!(blobs(), kept, "{storage}");
        // The next time there is one.
        let (second, _) = store.adopt_upper(&lease, &upper("two")).unwrap().unwrap();
        assert!(store.content().has(&second.digest));
    }
}

/// What a builder has made is read once and written once, as blob and layer alike.
#[test]
fn a_packed_layer_is_handled_once() {
    let dir = tempfile::tempdir().unwrap();
    let upper = dir.path().join("upper");
    std::fs::create_dir(&upper).unwrap();
    // Not a multiple of anything.
    std::fs::write(upper.join("large"), vec![7; (16 << 20) + 12_345]).unwrap();
    let mut archive = Vec::new();
    layer::pack_upper(&upper, &mut archive).unwrap();
    let size = archive.len() as u64;
    let store = Store::open_with(&dir.path().join("image"), Some(Storage::Erofs)).unwrap();
    let lease = store.lease().unwrap();
    let before = moved();
    let (descriptor, info) = store.adopt_upper(&lease, &upper).unwrap().unwrap();
    let after = moved();
    let (read, written) = (after.0 - before.0, after.1 - before.1);
    assert!(read < size + size / 8 && written < size + size / 8, "{read} read, {written} of {size} written");

    assert_eq!((&descriptor.digest, descriptor.size), (&Digest::sha256(&archive), size));
    let mut blob = Vec::new();
    store.content().open(&descriptor.digest).unwrap().read_to_end(&mut blob).unwrap();
    assert!(blob == archive, "the blob is what packing it again gives");
    assert_eq!((info.diff_id, info.entries), (descriptor.digest, 1));
    let left = || std::fs::read_dir(dir.path().join("image/tmp")).unwrap().count();
    assert_eq!(left(), 0);
    // One that cannot be read leaves nothing.
    assert!(store.adopt_upper(&lease, &dir.path().join("none")).is_err());
    assert_eq!(left(), 0);
}
