//! The store as a whole: load, save, import, names, removal, collection, and what a crash leaves.

mod common;

use std::fs;
use std::io::Write as _;

use brigantine_image::archive::{self, Commit, Import};
use brigantine_image::explore::{Change, differences, explore};
use brigantine_image::{
    ContainerUse, Digest, Error, ErrorClass, InUse, LayerFiles, Problem, Reference, Removed, Store,
};
use common::{Tar, docker_archive, files, store};

fn load(store: &Store, archive: &[u8]) -> Result<Vec<archive::Loaded>, Error> {
    archive::load(store, archive, &mut |_| {})
}

fn reference(text: &str) -> Reference {
    text.parse().expect("a reference")
}

#[test]
fn a_docker_archive_loads_saves_and_loads_again_with_the_same_ids() {
    let (_dir, first) = store();
    let layers = [Tar::new().file("a", b"1").done(), Tar::new().file("b", b"2").done()];
    let loaded = load(&first, &docker_archive(&["x:1", "y/z:2"], &layers)).unwrap();
    let messages: Vec<String> = loaded.iter().map(archive::Loaded::message).collect();
    assert_eq!(messages, ["Loaded image: x:1", "Loaded image: y/z:2"]);
    let image = first.resolve("x:1").unwrap();
    assert_eq!(first.layer_files(&image).unwrap().len(), 2);
    assert_eq!(image.size, 2);

    let mut saved = Vec::new();
    archive::save(&first, &["x:1".into(), "y/z:2".into()], &mut saved).unwrap();
    let mut again = Vec::new();
    archive::save(&first, &["x:1".into(), "y/z:2".into()], &mut again).unwrap();
    assert!(saved == again, "saving is deterministic");
    let (_dir, second) = store();
    load(&second, &saved).unwrap();
    let copy = second.resolve("y/z:2").unwrap();
    assert_eq!((copy.id, copy.manifest.digest), (image.id.clone(), image.manifest.digest));
    for compressed in common::compressed(&saved) {
        let (_dir, third) = store();
        load(&third, &compressed).unwrap();
        assert_eq!(third.resolve("x:1").unwrap().id, image.id);
    }
}

#[test]
fn images_are_found_by_name_id_and_prefix() {
    let (_dir, store) = store();
    load(&store, &docker_archive(&["app:latest"], &[Tar::new().file("a", b"1").done()])).unwrap();
    let id = store.resolve("app").unwrap().id;
    for name in [id.as_str(), id.hex(), id.short(), &id.as_str()[..20], "docker.io/library/app:latest"] {
        assert_eq!(store.resolve(name).unwrap().id, id, "{name}");
    }
    let missing = store.resolve("nope").unwrap_err();
    assert_eq!(missing.to_string(), "No such image: nope:latest");
    assert_eq!(missing.class(), ErrorClass::NotFound);
    let malformed = store.resolve("a:b:c").unwrap_err();
    assert_eq!(malformed.to_string(), "invalid reference format");
    assert_eq!(malformed.class(), ErrorClass::InvalidParameter);
    assert!(store.resolve("Upper").unwrap_err().to_string().contains("must be lowercase"));
    // A second image makes some one-digit prefix ambiguous only by chance; the empty one always is no name.
    assert!(store.resolve("sha256:").is_err());
}

#[test]
fn a_name_that_moves_leaves_the_old_image_without_one() {
    let (_dir, store) = store();
    load(&store, &docker_archive(&["app:1"], &[Tar::new().file("a", b"1").done()])).unwrap();
    let old = store.resolve("app:1").unwrap().id;
    let loaded = load(&store, &docker_archive(&["app:1"], &[Tar::new().file("a", b"2").done()])).unwrap();
    assert_eq!(loaded[0].replaced, Some(old.clone()));
    assert_eq!(store.list().unwrap().len(), 2);
    assert!(store.image(&old).unwrap().tags.is_empty());
    let pruned = store.prune(false, &InUse::default(), |_| true).unwrap();
    assert!(pruned.removed.contains(&Removed::Deleted(old)));
    assert!(pruned.reclaimed > 0);
    assert_eq!(store.list().unwrap().len(), 1);
}

#[test]
fn removing_follows_dockers_rules_and_gives_the_bytes_back() {
    let (_dir, store) = store();
    let empty = common::disk(store.root());
    load(&store, &docker_archive(&["app:1"], &[Tar::new().file("a", &[1; 10_000]).done()])).unwrap();
    let image = store.resolve("app:1").unwrap();
    store.tag("app:1", &reference("other")).unwrap();

    let conflict = store.remove(image.id.short(), false, true, &InUse::default()).unwrap_err();
    assert_eq!(
        conflict.to_string(),
        format!(
            "conflict: unable to delete {} (must be forced) - image is referenced in multiple repositories",
            image.id.short()
        )
    );
    assert_eq!(conflict.class(), ErrorClass::Conflict);
    let removed = store.remove("other", false, true, &InUse::default()).unwrap();
    assert_eq!(removed, [Removed::Untagged("other:latest".into())]);

    let user = |running| ContainerUse { container: "c".repeat(64), running };
    let mut in_use = InUse::default();
    in_use.images.insert(image.id.clone(), vec![user(true)]);
    in_use.layers.extend(image.config.rootfs.diff_ids.iter().cloned());
    let conflict = store.remove("app:1", false, true, &in_use).unwrap_err().to_string();
    assert_eq!(
        conflict,
        format!(
            "conflict: unable to remove repository reference \"app:1\" (must force) - container cccccccccccc is \
             using its referenced image {}",
            image.id.short()
        )
    );
    let by_id = store.remove(image.id.as_str(), true, true, &in_use).unwrap_err().to_string();
    assert!(
        by_id.contains("(cannot be forced) - image is being used by running container cccccccccccc"),
        "{by_id}"
    );
    // By force the name goes, the image stays for its container.
    assert_eq!(store.remove("app:1", true, true, &in_use).unwrap(), [Removed::Untagged("app:1".into())]);
    in_use.images.insert(image.id.clone(), vec![user(false)]);
    let stopped = store.remove(image.id.hex(), false, true, &in_use).unwrap_err().to_string();
    assert!(stopped.contains("(must be forced) - image is being used by stopped container"), "{stopped}");
    let removed = store.remove(image.id.hex(), true, true, &in_use).unwrap();
    assert_eq!(removed, [Removed::Deleted(image.id.clone())]);
    let diff_id = &image.config.rootfs.diff_ids[0];
    assert!(store.layer(diff_id).unwrap().is_some(), "the container still has its layer");
    store.gc(&InUse::default()).unwrap();
    assert!(store.layer(diff_id).unwrap().is_none());
    assert_eq!(common::disk(store.root()), empty);
    assert_eq!(
        store.remove("app:1", false, true, &InUse::default()).unwrap_err().to_string(),
        "No such image: app:1"
    );
}

#[test]
fn removing_the_only_name_removes_image_and_layers() {
    let (_dir, store) = store();
    let empty = common::disk(store.root());
    let shared = Tar::new().file("shared", b"s").done();
    load(&store, &docker_archive(&["a:1"], &[shared.clone(), Tar::new().file("a", b"a").done()])).unwrap();
    load(&store, &docker_archive(&["b:1"], &[shared, Tar::new().file("b", b"b").done()])).unwrap();
    let image = store.resolve("a:1").unwrap();
    let usage = store.usage().unwrap();
    assert_eq!((usage.images[0].shared, usage.images[0].unique, usage.layers), (1, 1, 3));
    let removed = store.remove("a:1", false, true, &InUse::default()).unwrap();
    assert_eq!(removed.len(), 3, "{removed:?}");
    assert_eq!(removed[..2], [Removed::Untagged("a:1".into()), Removed::Deleted(image.id)]);
    assert_eq!(store.layer_files(&store.resolve("b:1").unwrap()).unwrap().len(), 2);
    store.remove("b:1", false, true, &InUse::default()).unwrap();
    assert_eq!(common::disk(store.root()), empty);
}

#[test]
fn a_lease_keeps_what_nobody_refers_to_yet() {
    let (_dir, store) = store();
    let lease = store.lease().unwrap();
    let digest = store.content().put(&lease, b"content").unwrap();
    store.gc(&InUse::default()).unwrap();
    assert!(store.content().has(&digest));
    drop(lease);
    store.gc(&InUse::default()).unwrap();
    assert!(!store.content().has(&digest));
}

#[test]
fn content_becomes_visible_only_when_it_is_right() {
    let (_dir, store) = store();
    let lease = store.lease().unwrap();
    let digest = Digest::sha256(b"hello");
    let mut ingest = store.content().ingest(&lease, &digest, Some(5)).unwrap();
    ingest.write_all(b"hel").unwrap();
    assert!(matches!(ingest.commit(), Err(Error::SizeMismatch { actual: 3, .. })));
    let mut ingest = store.content().ingest(&lease, &digest, Some(5)).unwrap();
    ingest.write_all(b"jello").unwrap();
    assert!(matches!(ingest.commit(), Err(Error::DigestMismatch { .. })));
    let mut ingest = store.content().ingest(&lease, &digest, Some(5)).unwrap();
    assert!(ingest.write_all(b"hello!").is_err());
    drop(ingest);
    assert!(!store.content().has(&digest));
    assert_eq!(files(&store.root().join("tmp")), 0);
    let mut ingest = store.content().ingest(&lease, &digest, Some(5)).unwrap();
    ingest.write_all(b"hello").unwrap();
    assert_eq!(ingest.commit().unwrap(), digest);
    assert_eq!(store.content().read(&digest).unwrap(), b"hello");
}

#[test]
fn a_partial_download_is_taken_up_again() {
    let (_dir, store) = store();
    let lease = store.lease().unwrap();
    let digest = Digest::sha256(b"hello");
    let mut ingest = store.content().resume(&lease, &digest, Some(5)).unwrap();
    ingest.write_all(b"hel").unwrap();
    // Somebody else at the same content starts from nothing.
    assert_eq!(store.content().resume(&lease, &digest, Some(5)).unwrap().offset(), 0);
    drop(ingest);
    let store = Store::open(store.root()).unwrap();
    let mut ingest = store.content().resume(&lease, &digest, Some(5)).unwrap();
    assert_eq!(ingest.offset(), 3);
    ingest.write_all(b"lo").unwrap();
    assert_eq!(ingest.commit().unwrap(), digest);
    assert_eq!(files(&store.root().join("tmp")), 0);
}

#[test]
fn pruning_gives_up_what_failed_pulls_brought() {
    let (_dir, store) = store();
    let empty = common::disk(store.root());
    let lease = store.lease().unwrap();
    store.content().put(&lease, b"a layer that came before another one failed").unwrap();
    let digest = Digest::sha256(b"hello");
    let mut partial = store.content().resume(&lease, &digest, Some(5)).unwrap();
    partial.write_all(b"hel").unwrap();
    // Somebody is at both.
    let busy = store.prune(false, &InUse::default(), |_| true).unwrap();
    assert_eq!((busy.removed.len(), busy.reclaimed), (0, 0));
    drop((partial, lease));
    assert_eq!(store.usage().unwrap().blobs, 2 * 4096);
    let pruned = store.prune(false, &InUse::default(), |_| true).unwrap();
    assert!(pruned.reclaimed > 0 && pruned.removed.is_empty(), "{pruned:?}");
    assert_eq!(common::disk(store.root()), empty);
    assert_eq!(files(&store.root().join("tmp")), 0);
}

#[test]
fn opening_removes_what_a_crash_left_but_nothing_alive() {
    let (_dir, store) = store();
    let tmp = store.root().join("tmp");
    fs::write(tmp.join("ingest-dead"), b"x").unwrap();
    fs::create_dir_all(tmp.join("layer-dead/diff/a/b")).unwrap();
    let lease = store.lease().unwrap();
    let alive = store.content().ingest_unnamed(&lease).unwrap();
    Store::open(store.root()).unwrap();
    assert_eq!(files(&tmp), 1);
    drop(alive);
    assert_eq!(files(&tmp), 0);
}

#[test]
fn a_root_file_system_is_imported_with_changes() {
    let (_dir, store) = store();
    let rootfs = Tar::new().dir("etc").file("etc/hostname", b"h").done();
    let import = Import {
        reference: Some(reference("imported")),
        changes: vec!["CMD [\"sh\"]".into(), "ENV A=b".into()],
        message: "from here".into(),
        platform: None,
    };
    for archive in std::iter::once(rootfs.clone()).chain(common::compressed(&rootfs)) {
        let image = archive::import(&store, &archive[..], &import).unwrap();
        assert_eq!(image.config.config.cmd.as_deref().unwrap(), ["sh"]);
        assert_eq!(image.config.history[0].comment.as_deref(), Some("from here"));
        assert_eq!(image.config.rootfs.diff_ids, [Digest::sha256(&rootfs)]);
        assert_eq!(
            fs::read(store.layer_files(&image).unwrap()[0].open().unwrap().path().join("etc/hostname"))
                .unwrap(),
            b"h"
        );
        let history = store.history(&image).unwrap();
        assert_eq!((history.len(), history[0].size), (1, 1));
    }
    let before = common::disk(store.root());
    for bad in [&rootfs[..700], b"no archive at all", b""] {
        assert!(archive::import(&store, bad, &import).is_err());
    }
    assert_eq!(common::disk(store.root()), before);
}

#[test]
fn a_commit_adds_one_layer_and_remembers_its_parent() {
    let (dir, store) = store();
    load(&store, &docker_archive(&["base:1"], &[Tar::new().file("a", b"1").done()])).unwrap();
    let base = store.resolve("base:1").unwrap();
    let upper = dir.path().join("upper");
    fs::create_dir(&upper).unwrap();
    fs::write(upper.join("new"), b"n").unwrap();
    let commit = Commit {
        without: Vec::new(),
        replica: None,
        parent: Some(base.id.clone()),
        upper: Some(upper),
        config: base.config.config.clone(),
        changes: vec!["CMD /new".into()],
        reference: Some(reference("child:1")),
        author: Some("me".into()),
        message: Some("why".into()),
        created_by: "sh".into(),
    };
    let child = archive::commit(&store, &commit).unwrap();
    assert_eq!(child.parent, Some(base.id.clone()));
    assert_eq!(store.layer_files(&child).unwrap().len(), 2);
    assert_eq!(store.history(&child).unwrap()[0].comment, "why");
    store.remove("base:1", false, true, &InUse::default()).unwrap();
    let dependent = store.remove(base.id.as_str(), true, true, &InUse::default()).unwrap_err().to_string();
    assert!(dependent.ends_with("(cannot be forced) - image has dependent child images"), "{dependent}");
    // The nameless parent goes with its child.
    store.remove("child:1", false, true, &InUse::default()).unwrap();
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn a_bad_archive_is_refused_with_a_reason_and_leaves_nothing() {
    let (_dir, store) = store();
    let before = common::disk(store.root());
    let good = docker_archive(&["x:1"], &[Tar::new().file("a", &[5; 5000]).done()]);
    let expect = |archive: &[u8], reason: &str| {
        let error = load(&store, archive).unwrap_err();
        assert!(error.chain().contains(reason), "{:?} should say {reason:?}", error.chain());
        assert_eq!(error.class(), ErrorClass::InvalidParameter, "{}", error.chain());
        assert_eq!(common::disk(store.root()), before, "{reason}");
        assert!(store.list().unwrap().is_empty());
    };
    expect(&good[..good.len() / 2], "ends early");
    expect(b"not an archive, but longer than one header would be".repeat(20).as_slice(), "not a tar header");
    expect(b"", "not an image archive");
    expect(&Tar::new().file("etc/passwd", b"x").done(), "use import");
    let gzip = &common::compressed(&good)[0];
    expect(&gzip[..gzip.len() / 2], "the gzip data is truncated");
    expect(&Tar::new().file("manifest.json", b"[{").done(), "manifest.json is not valid JSON");
    expect(&Tar::new().file("manifest.json", b"[]").done(), "no image in it");
    expect(
        &Tar::new().file("manifest.json", br#"[{"Config":"c.json","Layers":[]}]"#).done(),
        "member c.json is missing",
    );
    expect(&Tar::new().file("../manifest.json", b"[]").done(), "climbs out");
    let config = br#"{"rootfs":{"type":"layers","diff_ids":["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]}}"#;
    let manifest = br#"[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l.tar"]}]"#;
    let layer = Tar::new().file("a", b"1").done();
    let wrong =
        Tar::new().file("manifest.json", manifest).file("c.json", config).file("l.tar", &layer).done();
    expect(&wrong, "not the diff id");
    let blob = format!("blobs/sha256/{}", "0".repeat(64));
    expect(&Tar::new().file(&blob, b"x").done(), "is corrupt");
    let loops = Tar::new().symlink("manifest.json", "m").symlink("m", "manifest.json").done();
    expect(&loops, "leads in circles");
}

#[test]
fn two_stores_on_one_directory_agree() {
    let (_dir, first) = store();
    let second = Store::open(first.root()).unwrap();
    let archive = docker_archive(&["x:1"], &[Tar::new().file("a", &[3; 10_000]).done()]);
    std::thread::scope(|scope| {
        for store in [&first, &second, &first, &second] {
            scope.spawn(|| load(store, &archive).unwrap());
        }
    });
    assert_eq!(first.list().unwrap().len(), 1);
    assert_eq!(second.resolve("x:1").unwrap().id, first.resolve("x:1").unwrap().id);
    assert_eq!(files(&first.root().join("tmp")), 0);
    second.tag("x:1", &reference("y:1")).unwrap();
    assert!(first.resolve("y:1").is_ok());
}

#[test]
fn a_check_finds_what_is_wrong_and_repairs_it() {
    let (_dir, store) = store();
    let layers = [Tar::new().file("a", b"1").done(), Tar::new().file("b", &[7; 5000]).done()];
    load(&store, &docker_archive(&["x:1"], &layers)).unwrap();
    let image = store.resolve("x:1").unwrap();
    store.ensure_unpacked(&image).unwrap();
    let clean = store.check(false, &InUse::default()).unwrap();
    assert_eq!(clean.problems, []);
    assert!(clean.objects >= 4 && clean.bytes > 5000, "{clean:?}");

    // An orphan, a layer's blob with one bit turned, and a damaged layer.
    let lease = store.lease().unwrap();
    let orphan = store.content().put(&lease, b"nobody wants me").unwrap();
    drop(lease);
    let turn = |path: &std::path::Path, at: usize| {
        let mut raw = fs::read(path).unwrap();
        raw[at] ^= 1;
        // As a file of its own: a blob that is not compressed is its layer's archive, too.
        fs::remove_file(path).unwrap();
        fs::write(path, raw).unwrap();
    };
    let blob = image.layers[1].digest.clone();
    turn(&store.content().path(&blob), 700);
    let LayerFiles::Erofs { index, archive } = &store.layer_files(&image).unwrap()[1] else {
        panic!("layers are EROFS here")
    };
    turn(archive, 600);
    let damaged = image.config.rootfs.diff_ids[0].clone();
    let expected = [
        Problem::CorruptBlob { blob: blob.clone(), images: vec![image.id.clone()] },
        Problem::OrphanBlob { blob: orphan.clone(), bytes: 15 },
        Problem::CorruptLayer { layer: damaged.clone() },
    ];
    let found = store.check(false, &InUse::default()).unwrap();
    assert_eq!(found.problems, expected);
    turn(archive, 600);
    turn(index, 1600);
    assert_eq!(store.check(false, &InUse::default()).unwrap().problems, expected);

    let repaired = store.check(true, &InUse::default()).unwrap();
    assert_eq!(repaired.problems, expected);
    assert!(repaired.repaired && repaired.reclaimed > 0);
    assert!(!store.content().has(&orphan) && !store.content().has(&blob));
    // What is derived is made again, what is gone is named until somebody brings it back.
    store.ensure_unpacked(&image).unwrap();
    let missing = [Problem::MissingBlob { image: image.id.clone(), blob: blob.clone() }];
    assert_eq!(store.check(false, &InUse::default()).unwrap().problems, missing);
    load(&store, &docker_archive(&["x:1"], &layers)).unwrap();
    assert_eq!(store.check(false, &InUse::default()).unwrap().problems, []);

    turn(&store.content().path(&image.id), 3);
    let store = Store::open(store.root()).unwrap();
    assert!(store.list().unwrap().is_empty(), "it is not shown as if it could run");
    let found = store.check(true, &InUse::default()).unwrap();
    assert!(
        matches!(&found.problems[0], Problem::BrokenImage { names, .. } if names == &["x:1"]),
        "{found:?}"
    );
    assert_eq!(store.check(false, &InUse::default()).unwrap().problems, []);
    assert_eq!(common::files(&store.root().join("layers")), 0, "its bytes are given back");
}

#[test]
fn an_image_is_explored_layer_by_layer() {
    let (_dir, store) = store();
    let layers = [
        Tar::new()
            .dir("d")
            .file("d/big", &[1; 3000])
            .file("d/kept", &[2; 1000])
            .file("gone", &[3; 500])
            .done(),
        Tar::new().dir("d").file("d/big", &[4; 4000]).file(".wh.gone", b"").symlink("l", "d/big").done(),
        Tar::new().file("d/.wh..wh..opq", b"").file("d/new", b"n").done(),
    ];
    load(&store, &docker_archive(&["x:1"], &layers)).unwrap();
    let explored = explore(&store, &store.resolve("x:1").unwrap()).unwrap();
    let changes = |n: usize| -> Vec<(String, Change)> {
        explored.layers[n].entries.iter().map(|entry| (entry.path.clone(), entry.change)).collect()
    };
    assert_eq!(
        changes(1),
        [
            ("/d/big".to_owned(), Change::Modified),
            ("/gone".to_owned(), Change::Removed),
            ("/l".to_owned(), Change::Added)
        ]
    );
    assert_eq!(changes(2), [("/d/new".to_owned(), Change::Added)]);
    assert_eq!((explored.size, explored.wasted), (8501, 8500));
    assert_eq!(explored.wasted_paths[0].path, "/d/big");
    assert_eq!((explored.wasted_paths[0].bytes, explored.wasted_paths[0].times), (7000, 2));
}

#[test]
fn two_images_are_compared_by_what_their_containers_see() {
    let (_dir, store) = store();
    let base = Tar::new().dir("d").file("d/same", b"s").file("d/gone", b"g").file("d/edited", b"one").done();
    let top = Tar::new()
        .file("d/.wh.gone", b"")
        .file("d/edited", b"two")
        .pax(&[("mtime", b"5")])
        .file("d/same", b"s")
        .file("new", b"n")
        .done();
    load(&store, &docker_archive(&["a:1"], std::slice::from_ref(&base))).unwrap();
    load(&store, &docker_archive(&["b:1"], &[base, top])).unwrap();
    let (a, b) = (store.resolve("a:1").unwrap(), store.resolve("b:1").unwrap());
    let found = differences(&store, &a, &b).unwrap();
    let seen: Vec<(&str, Change, &[&str])> =
        found.files.iter().map(|file| (&file.path[..], file.change, &file.what[..])).collect();
    assert_eq!(
        seen,
        [
            ("/d/gone", Change::Removed, &[][..]),
            ("/d/same", Change::Modified, &["time"][..]),
            ("/new", Change::Added, &[][..]),
        ],
        "an edit that keeps length and time is not looked for"
    );
    assert!(differences(&store, &a, &a).unwrap().identical);
}
