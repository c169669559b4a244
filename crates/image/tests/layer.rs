//! Layers: what an archive says becomes the tree it describes; what it must not do it cannot.

mod common;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use brigantine_image::layer::{self, Indexed, LayerError};
use brigantine_image::{Algorithm, Digest, LayerFiles, Lower, Replica, open_union};
use common::{Tar, listing, run};
use rustix::fs::XattrFlags;

/// Applies the archive below a directory whose surroundings are checked to be untouched.
#[track_caller]
fn apply(archive: &[u8]) -> (tempfile::TempDir, Result<layer::Applied, LayerError>) {
    let (dir, result) = extract(archive);
    indexed_alike(archive, &dir.path().join("target"), &result);
    (dir, result)
}

fn extract(archive: &[u8]) -> (tempfile::TempDir, Result<layer::Applied, LayerError>) {
    let dir = tempfile::tempdir().expect("a directory");
    let target = dir.path().join("target");
    fs::create_dir(&target).expect("a target");
    fs::write(dir.path().join("outside"), b"outside").expect("a file outside");
    let result = layer::apply(archive, &target, Algorithm::Sha256);
    assert_eq!(fs::read(dir.path().join("outside")).expect("the file outside"), b"outside");
    assert_eq!(common::files(dir.path()), 2, "something was written outside");
    (dir, result)
}

/// What is packed as a whole tree comes back with every name, also where a layer's would hide something.
#[test]
fn a_trees_names_are_names() {
    let dir = tempfile::tempdir().expect("a directory");
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    for made in ["a", ".wh.gone", ".wh..", "d/.wh..wh..opq", "d/.wh.f", "d/f", ".wh..wh.plnk/1", ".wh.d/x"] {
        let path = from.join(made);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, made).expect("a file");
    }
    fs::create_dir(&to).expect("a target");
    let mut archive = Vec::new();
    layer::pack(&from, &mut archive).expect("an archive");
    layer::apply_tree(&archive[..], &to, Algorithm::Sha256).expect("it comes back");
    assert_eq!(listing(&to), listing(&from));
}

/// Every archive of these tests is indexed as well: what is refused must be refused in the same words, and what is not
/// must mount as the very tree that was extracted.
#[track_caller]
fn indexed_alike(archive: &[u8], target: &Path, extracted: &Result<layer::Applied, LayerError>) {
    let own = target.with_file_name("index");
    fs::create_dir(&own).expect("a directory");
    let indexed = layer::index(archive, &own, Algorithm::Sha256);
    match (indexed, extracted) {
        (Err(error), Err(expected)) => {
            assert_eq!(error.to_string(), expected.to_string());
            assert_eq!(error.is_input(), expected.is_input());
        }
        (Ok(Indexed::Whole(found)), Ok(expected)) => {
            assert_eq!(
                (&found.diff_id, found.size, found.entries),
                (&expected.diff_id, expected.size, expected.entries)
            );
            let files =
                LayerFiles::Erofs { index: own.join(layer::INDEX), archive: own.join(layer::ARCHIVE) };
            let mounted = files.open().expect("it mounts");
            let root = |path: &Path| {
                let m = fs::metadata(path).expect("a root");
                (m.mode(), m.uid(), m.gid())
            };
            assert_eq!(root(mounted.path()), root(target));
            let (ours, theirs) = (listing(mounted.path()), listing(target));
            assert_eq!(ours.len(), theirs.len(), "{ours:#?} {theirs:#?}");
            for (ours, theirs) in ours.iter().zip(&theirs) {
                // Directories that no entry describes were made just now.
                let timeless = |line: &str| {
                    let mut words: Vec<String> = line.split(' ').map(str::to_owned).collect();
                    if line.contains(" 40755 0:0 ") || line.contains(" 20000 0:0 ") {
                        words.retain(|word| word.split_once('.').is_none_or(|(_, nanos)| nanos.len() != 9));
                    }
                    words
                };
                assert!(ours == theirs || timeless(ours) == timeless(theirs), "{ours}\n{theirs}");
            }
        }
        (indexed, extracted) => panic!("indexed: {indexed:?}, extracted: {extracted:?}"),
    }
    fs::remove_dir_all(own).expect("it goes");
}

#[track_caller]
fn refused(archive: &[u8], reason: &str) {
    let (_dir, result) = apply(archive);
    let error = result.expect_err(reason);
    assert!(error.is_input(), "{error:?}");
    assert!(error.to_string().contains(reason), "{error} should say {reason:?}");
}

fn applied(archive: &[u8]) -> tempfile::TempDir {
    let (dir, result) = apply(archive);
    let found = result.expect("the layer applies");
    assert_eq!(found.diff_id, Digest::sha256(archive));
    dir
}

fn is_whiteout(path: &Path) -> bool {
    let metadata = fs::symlink_metadata(path).expect("a whiteout");
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

fn is_opaque(path: &Path) -> bool {
    let mut value = [0u8; 8];
    rustix::fs::getxattr(path, "trusted.overlay.opaque", &mut value).is_ok_and(|n| value[..n] == *b"y")
}

#[test]
fn nothing_climbs_out() {
    for path in ["../outside", "a/../../outside", "..", "a/.."] {
        refused(&Tar::new().file(path, b"x").done(), "climbs");
        refused(&Tar::new().dir(path).done(), "climbs");
    }
    refused(&Tar::new().hardlink("l", "../outside").done(), "climbs");
    refused(&Tar::new().hardlink("l", "/../outside").done(), "climbs");
    refused(&Tar::new().file(".wh...", b"").done(), "a whiteout of nothing");
    refused(&Tar::new().file("d/.wh..", b"").done(), "a whiteout of nothing");
    refused(&Tar::new().file(".wh.", b"").done(), "a whiteout of nothing");
    refused(&Tar::new().file("", b"x").done(), "can only be a directory");
    refused(&Tar::new().file("./", b"x").symlink("/", "x").done(), "can only be a directory");
}

#[test]
fn nothing_is_written_through_a_link() {
    for target in ["..", "/", "/tmp", "d", "."] {
        let archive = Tar::new().dir("d").symlink("l", target).file("l/outside", b"x").done();
        refused(&archive, "leads through a symbolic link");
        let archive = Tar::new().dir("d").symlink("l", target).file("l/.wh.outside", b"").done();
        refused(&archive, "leads through a symbolic link");
        let archive = Tar::new().dir("d").symlink("l", target).file("l/.wh..wh..opq", b"").done();
        refused(&archive, "leads through a symbolic link");
        let archive = Tar::new().dir("d").symlink("l", target).hardlink("h", "l/outside").done();
        refused(&archive, "hard link to \"l/outside\"");
    }
    // The link itself is replaced, not followed.
    let dir = applied(&Tar::new().symlink("l", "../outside").file("l", b"inside").done());
    assert_eq!(fs::read(dir.path().join("target/l")).unwrap(), b"inside");
    let dir = applied(&Tar::new().symlink("l", "..").dir("l").file("l/f", b"inside").done());
    assert_eq!(fs::read(dir.path().join("target/l/f")).unwrap(), b"inside");
    // A directory that becomes a link while its descriptor is remembered.
    refused(
        &Tar::new().file("d/a", b"").symlink("d", "..").file("d/outside", b"x").done(),
        "leads through a symbolic link",
    );
    // Attributes of directories come last: by then one may have become a link.
    let dir = applied(&Tar::new().dir("d").symlink("d", "..").done());
    assert!(fs::symlink_metadata(dir.path().join("target/d")).unwrap().is_symlink());
}

#[test]
fn hard_links_stay_within_the_layer() {
    refused(&Tar::new().hardlink("l", "nothing").done(), "not in this layer");
    refused(&Tar::new().hardlink("l", "/etc/passwd").done(), "not in this layer");
    refused(&Tar::new().dir("d").hardlink("l", "d").done(), "is a directory");
    refused(&Tar::new().file("d/f", b"").hardlink("d", "d/f").done(), "below itself");
    refused(&Tar::new().hardlink("l", "").done(), "not in this layer");
    let dir = applied(&Tar::new().file("d/a", b"x").hardlink("b", "/d/a").hardlink("b", "b").done());
    let target = dir.path().join("target");
    assert_eq!(
        fs::metadata(target.join("b")).unwrap().ino(),
        fs::metadata(target.join("d/a")).unwrap().ino()
    );
    // A link to a symbolic link is the link itself.
    let dir = applied(&Tar::new().symlink("s", "/etc/passwd").hardlink("h", "s").done());
    assert!(fs::symlink_metadata(dir.path().join("target/h")).unwrap().is_symlink());
}

#[test]
fn absolute_names_are_taken_below_the_root() {
    let dir = applied(&Tar::new().file("/etc/passwd", b"x").file("//a//./b", b"y").done());
    assert_eq!(fs::read(dir.path().join("target/etc/passwd")).unwrap(), b"x");
    assert_eq!(fs::read(dir.path().join("target/a/b")).unwrap(), b"y");
}

#[test]
fn paths_too_deep_or_long_are_refused() {
    refused(&Tar::new().file(&"d/".repeat(10_000), b"").done(), "a path of");
    refused(&Tar::new().file(&"x".repeat(300), b"").done(), "a name of 300 bytes");
    let deep = "d/".repeat(2000) + "f";
    let archive = Tar::new().file(&deep, b"").done();
    let (dir, result) = extract(&archive);
    result.expect("the layer applies");
    assert!(fs::metadata(dir.path().join("target").join(&deep[..2000])).is_ok());
    let indexed = layer::index(&archive[..], dir.path(), Algorithm::Sha256);
    assert!(matches!(indexed, Ok(Indexed::Whole(_))), "{indexed:?}");
    let files =
        LayerFiles::Erofs { index: dir.path().join(layer::INDEX), archive: dir.path().join(layer::ARCHIVE) };
    assert!(fs::metadata(files.open().unwrap().path().join(&deep[..2000])).is_ok());
}

#[test]
fn whiteouts_take_overlays_form() {
    let archive = Tar::new()
        .file("d/.wh.gone", b"")
        .file("o/.wh..wh..opq", b"")
        .file("o/new", b"n")
        .file(".wh..wh.plnk/1.2", b"")
        .file("replaced/old", b"")
        .done();
    let dir = applied(&archive);
    let target = dir.path().join("target");
    assert!(is_whiteout(&target.join("d/gone")));
    assert!(is_opaque(&target.join("o")));
    assert!(!target.join(".wh..wh.plnk").exists());
    // Hidden below and made anew in the same layer: nothing of lower layers shows through.
    for archive in [
        Tar::new().file(".wh.d", b"").dir("d").file("d/f", b"").done(),
        Tar::new().file(".wh.d", b"").file("d/f", b"").done(),
        Tar::new().dir("d").file("d/f", b"").file(".wh.d", b"").done(),
    ] {
        let dir = applied(&archive);
        assert!(is_opaque(&dir.path().join("target/d")));
        assert!(dir.path().join("target/d/f").exists());
    }
    let dir = applied(&Tar::new().file("f", b"x").file(".wh.f", b"").done());
    assert_eq!(fs::read(dir.path().join("target/f")).unwrap(), b"x");
}

/// A plain tree that layers are extracted over each other into is what an overlay of them shows, and what an overlay of
/// their indexes shows.
#[test]
fn layers_over_each_other_are_what_overlay_shows() {
    let below = Tar::new()
        .dir("d")
        .file("d/a", b"below")
        .file("d/b", b"below")
        .dir("d/sub")
        .file("d/sub/x", b"below")
        .file("file", b"below")
        .symlink("link", "d")
        .hardlink("hard", "file")
        .done();
    let stacks = [
        Tar::new().file(".wh.d", b"").done(),
        Tar::new().file(".wh.d", b"").dir("d").file("d/new", b"n").done(),
        Tar::new().dir("d").file("d/new", b"n").file(".wh.d", b"").done(),
        Tar::new().file("d/new", b"n").file(".wh.d", b"").done(),
        Tar::new().file("d/.wh..wh..opq", b"").file("d/a", b"above").done(),
        Tar::new().dir("d").file("d/a", b"above").file("d/.wh..wh..opq", b"").done(),
        Tar::new().dir("d").dir("d/sub").file("d/sub/y", b"n").file("d/.wh..wh..opq", b"").done(),
        Tar::new().file("d/.wh.a", b"").file("d/.wh.sub", b"").done(),
        Tar::new().file("d/.wh.a", b"").file("d/a", b"above").done(),
        Tar::new().file("d/a", b"above").file("d/.wh.a", b"").done(),
        Tar::new().file("d", b"now a file").done(),
        Tar::new().dir("file").file("file/in", b"n").done(),
        Tar::new().file("file/in", b"n").done(),
        Tar::new().file("link/in", b"n").done(),
        Tar::new().dir("link").file("link/in", b"n").done(),
        Tar::new().file("hard", b"above").done(),
        Tar::new().file(".wh.nothing", b"").done(),
        Tar::new().file("file", b"above").hardlink("d/hard", "file").done(),
    ];
    let timeless = |tree: &Path| -> Vec<String> {
        let words = |line: String| {
            let mut words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            words.retain(|word| word.split_once('.').is_none_or(|(_, nanos)| nanos.len() != 9));
            // Links from a lower layer are as many names there as it had: overlay counts no better.
            words.retain(|word| !word.starts_with('x'));
            words.join(" ").replace("\"trusted.overlay.opaque\"", "")
        };
        listing(tree).into_iter().map(words).collect()
    };
    for (number, above) in stacks.iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let (lower, upper, tree) = (path("lower"), path("upper"), path("tree"));
        let (first, second) = (path("first"), path("second"));
        layer::apply(&below[..], &lower, Algorithm::Sha256).unwrap();
        layer::apply(&above[..], &upper, Algorithm::Sha256).unwrap();
        layer::apply_over(&below[..], &tree, Algorithm::Sha256).unwrap();
        layer::apply_over(&above[..], &tree, Algorithm::Sha256).unwrap();
        let shown = |layers: &[Lower]| {
            let union = open_union(layers).unwrap();
            timeless(&Path::new("/proc/self/fd").join(std::os::fd::AsRawFd::as_raw_fd(&union).to_string()))
        };
        let overlay = shown(&[Lower::directory(upper), Lower::directory(lower)]);
        assert_eq!(timeless(&tree), overlay, "stack {number}");
        let indexed = |own: &Path, archive: &[u8]| {
            layer::index(archive, own, Algorithm::Sha256).unwrap();
            LayerFiles::Erofs { index: own.join(layer::INDEX), archive: own.join(layer::ARCHIVE) }
                .open()
                .unwrap()
        };
        assert_eq!(shown(&[indexed(&second, above), indexed(&first, &below)]), overlay, "stack {number}");
    }
}

#[test]
fn an_archive_cannot_steer_overlay() {
    let archive = Tar::new()
        .pax(&[
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.user.kept", b"v"),
        ])
        .dir("d")
        .done();
    let dir = applied(&archive);
    let target = dir.path().join("target/d");
    assert!(!is_opaque(&target));
    let mut value = [0u8; 64];
    assert!(rustix::fs::getxattr(&target, "trusted.overlay.redirect", &mut value).is_err());
    assert_eq!(rustix::fs::getxattr(&target, "user.kept", &mut value), Ok(1));
}

#[test]
fn metadata_is_exact() {
    let archive = Tar::new()
        .pax(&[("mtime", b"1234567890.123456789"), ("uid", b"3000000000"), ("gid", b"7")])
        .entry(tar::EntryType::Directory, "dir", "", b"")
        .file("dir/later", b"x")
        .pax(&[("mtime", b"-5.5"), ("uid", b"12")])
        .file("old", b"")
        .entry(tar::EntryType::Fifo, "fifo", "", b"")
        .done();
    let dir = applied(&archive);
    let target = dir.path().join("target");
    let metadata = fs::metadata(target.join("dir")).unwrap();
    assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (1_234_567_890, 123_456_789));
    assert_eq!((metadata.uid(), metadata.gid()), (3_000_000_000, 7));
    assert_eq!(fs::metadata(target.join("old")).unwrap().mtime(), -6);
    assert!(fs::symlink_metadata(target.join("fifo")).unwrap().file_type().is_fifo());
    assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o7777, 0o755);
}

#[test]
fn a_bomb_takes_no_memory_and_a_truncated_layer_says_so() {
    // 300 MB of zeros in a few hundred kilobytes, most of it after the end of the archive.
    let mut archive = Tar::new().file("f", b"x").done();
    archive.resize(300 << 20, 0);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&archive).unwrap();
    let bombs = [("zstd", zstd::encode_all(&archive[..], 1).unwrap()), ("gzip", gzip.finish().unwrap())];
    drop(archive);
    for (name, bomb) in bombs {
        assert!(bomb.len() < 1 << 20);
        // Forgets what making the bombs took.
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = peak_memory();
        let (_dir, result) = apply(&bomb);
        result.unwrap();
        let grown = peak_memory() - before;
        assert!(grown < 64 << 10, "{name}: {grown} KiB for a layer");
    }
    for compressed in common::compressed(&Tar::new().file("f", &[7; 9000]).done()) {
        let (_dir, result) = apply(&compressed[..compressed.len() - 12]);
        let error = result.unwrap_err();
        assert!(error.is_input(), "{error:?}");
    }
    refused(&Tar::new().file("f", &[7; 9000]).done()[..5000], "ends early");
}

/// `cap_net_raw=ep` as the kernel keeps it: VFS_CAP_REVISION_2, effective; permitted and inheritable, low and high.
const CAP_NET_RAW: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = [0u8; 256];
    match rustix::fs::lgetxattr(path, name, &mut value) {
        Ok(n) => Some(value[..n].to_vec()),
        Err(rustix::io::Errno::NODATA) => None,
        Err(error) => panic!("{}: {name}: {error}", path.display()),
    }
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// An access list as the kernel keeps it (posix_acl_xattr.h): for the owner, user 1000, the group, the mask, others.
fn access_list(owner: u16, named: u16, group: u16, mask: u16, others: u16) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (0x01u16, owner, NOBODY),
        (0x02, named, 1000),
        (0x04, group, NOBODY),
        (0x10, mask, NOBODY),
        (0x20, others, NOBODY),
    ] {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

#[test]
fn access_lists_come_through() {
    let file = access_list(6, 4, 4, 4, 0);
    let directory = access_list(7, 5, 5, 5, 0);
    let inherited = access_list(7, 7, 7, 7, 7);
    let access = format!("SCHILY.xattr.{ACCESS}");
    let default = format!("SCHILY.xattr.{DEFAULT}");
    let archive = Tar::new()
        .pax(&[(&access, &directory), (&default, &inherited)])
        .dir("d")
        .file("d/plain", b"made while its directory had no list yet")
        .dir("d/below")
        .pax(&[(&access, &file)])
        .file("f", b"x")
        .done();
    let dir = applied(&archive);
    let tree = dir.path().join("target");
    assert_eq!(xattr(&tree.join("f"), ACCESS), Some(file.clone()));
    assert_eq!(fs::metadata(tree.join("f")).unwrap().mode() & 0o777, 0o640, "the group's bits are the mask");
    assert_eq!(xattr(&tree.join("d"), ACCESS), Some(directory));
    assert_eq!(xattr(&tree.join("d"), DEFAULT), Some(inherited.clone()));
    // What an archive does not give, a directory's default does not add.
    for path in ["d/plain", "d/below"] {
        assert_eq!(
            (xattr(&tree.join(path), ACCESS), xattr(&tree.join(path), DEFAULT)),
            (None, None),
            "{path}"
        );
    }
    // As a container changes it: what is packed and applied again has the same lists.
    let mut packed = Vec::new();
    layer::pack_upper(&tree, &mut packed).unwrap();
    let again = applied(&packed);
    assert_eq!(listing(&again.path().join("target")), listing(&tree));

    // Another layer's entries below a directory with defaults, where there is no overlay to keep them apart.
    let second =
        Tar::new().file("d/plain", b"2").dir("d/new").file("d/new/f", b"3").symlink("d/l", "x").done();
    layer::apply_over(&second[..], &tree, Algorithm::Sha256).unwrap();
    for (path, mode) in [("d/plain", 0o644), ("d/new", 0o755), ("d/new/f", 0o644)] {
        let path = tree.join(path);
        assert_eq!((xattr(&path, ACCESS), xattr(&path, DEFAULT)), (None, None), "{}", path.display());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, mode, "{}", path.display());
    }
    assert_eq!(xattr(&tree.join("d"), DEFAULT), Some(inherited));
    // And a copy of the whole, as a container without overlay gets.
    let copy = dir.path().join("copy");
    fs::create_dir(&copy).unwrap();
    let replica = Replica::make(&copy, &[Lower::directory(tree.clone())]).unwrap();
    assert_eq!(listing(&replica.root()), listing(&tree));
    assert!(replica.changes().unwrap().is_empty());
}

/// KiB.
fn peak_memory() -> i64 {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("VmHWM");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

/// Everything a tree can hold, packed by GNU tar in each of its formats.
#[test]
fn trees_come_out_as_gnu_tar_packed_them() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    let script = r#"
        set -e; mkdir -p "$1"; cd "$1"
        mkdir -p a/b/c "$(printf 'n%.0s' $(seq 120))/$(printf 'm%.0s' $(seq 120))"
        echo hello > a/f; ln a/f a/b/hard; ln -s ../f a/b/soft; ln -s "$(printf 't%.0s' $(seq 200))" long
        echo x > "$(printf 'n%.0s' $(seq 120))/$(printf 'm%.0s' $(seq 120))/leaf"
        truncate -s 5M sparse; printf data | dd of=sparse bs=1 seek=1000000 conv=notrunc status=none
        printf tail | dd of=sparse bs=1 seek=5242000 conv=notrunc status=none
        truncate -s 1M hole
        cp /bin/true suid; chown 5:6 suid; chmod 6755 suid
        mkfifo fifo; mknod chr c 1 3; mknod blk b 7 0; chown 1000:1000 chr
        mkdir sticky; chmod 3777 sticky; chown 0:50 sticky; echo s > sticky/in
        touch -d '1969-12-31 23:00:00.5 UTC' suid; touch -d '2001-02-03 04:05:06.789 UTC' a
        chown -h 33:33 long; echo u > 'uniçøde file'; chmod 000 'uniçøde file'
    "#;
    run(Command::new("sh").args(["-c", script, "sh"]).arg(&tree));
    let attribute = |path: &str, name: &str, value: &[u8]| {
        let time = fs::metadata(tree.join(path)).unwrap().modified().unwrap();
        rustix::fs::setxattr(tree.join(path), name, value, XattrFlags::empty()).unwrap();
        fs::File::open(tree.join(path)).unwrap().set_modified(time).unwrap();
    };
    attribute("a/f", "user.test", b"value");
    attribute("a/f", "security.capability", CAP_NET_RAW);
    attribute("sticky", "user.directory", b"\0binary\xff");
    for format in [
        &["--format=posix", "--xattrs", "--xattrs-include=*", "--sparse"][..],
        &["--format=posix", "--xattrs", "--xattrs-include=*", "--sparse", "--sparse-version=0.1"],
        &["--format=posix", "--xattrs", "--xattrs-include=*", "--sparse", "--sparse-version=0.0"],
        &["--format=gnu", "--sparse"],
        &["--format=gnu"],
    ] {
        let archive = dir.path().join("archive.tar");
        run(Command::new("tar").args(format).arg("-cf").arg(&archive).arg("-C").arg(&tree).arg("."));
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        for target in [&ours, &theirs] {
            fs::create_dir(target).unwrap();
        }
        let extract = ["--xattrs", "--xattrs-include=*", "--same-owner", "--numeric-owner", "-xpf"];
        run(Command::new("tar").args(extract).arg(&archive).arg("-C").arg(&theirs));
        let applied = layer::apply(fs::File::open(&archive).unwrap(), &ours, Algorithm::Sha256);
        indexed_alike(&fs::read(&archive).unwrap(), &ours, &applied);
        let over = dir.path().join("over");
        fs::create_dir(&over).unwrap();
        layer::apply_over(fs::File::open(&archive).unwrap(), &over, Algorithm::Sha256).unwrap();
        assert_eq!(listing(&over), listing(&ours), "{format:?}: into a plain tree");
        let copy = dir.path().join("copy");
        fs::create_dir(&copy).unwrap();
        let replica = Replica::make(&copy, &[Lower::directory(over.clone())]).unwrap();
        assert_eq!(listing(&replica.root()), listing(&ours), "{format:?}: a copy of that");
        assert!(replica.changes().unwrap().is_empty());
        for tree in [&over, &copy] {
            fs::remove_dir_all(tree).unwrap();
        }
        let (left, right) = (listing(&ours), listing(&theirs));
        if format.contains(&"--xattrs") {
            for (path, name, value) in [
                ("a/f", "user.test", &b"value"[..]),
                ("a/b/hard", "security.capability", CAP_NET_RAW),
                ("sticky", "user.directory", b"\0binary\xff"),
            ] {
                assert_eq!(
                    xattr(&ours.join(path), name).as_deref(),
                    Some(value),
                    "{format:?}: {path} {name}"
                );
            }
        }
        for (left, right) in left.iter().zip(&right) {
            assert_eq!(left, right, "{format:?}");
        }
        assert_eq!(left.len(), right.len());
        if format.contains(&"--sparse") {
            assert!(
                fs::metadata(ours.join("sparse")).unwrap().blocks() < 200,
                "{format:?}: holes stay holes"
            );
        }
        // Packed by us and applied again, it is the same tree; packed twice, the same bytes.
        let mut packed = Vec::new();
        layer::pack(&ours, &mut packed).unwrap();
        let mut again = Vec::new();
        layer::pack(&ours, &mut again).unwrap();
        assert!(packed == again);
        fs::remove_dir_all(&theirs).unwrap();
        fs::create_dir(&theirs).unwrap();
        layer::apply(&packed[..], &theirs, Algorithm::Sha256).unwrap();
        assert_eq!(listing(&theirs), left);
        for target in [&ours, &theirs] {
            fs::remove_dir_all(target).unwrap();
        }
    }
}

#[test]
fn an_upper_directory_becomes_a_layer_and_back() {
    let archive =
        Tar::new().file(".wh.gone", b"").dir("d").file("d/.wh..wh..opq", b"").file("d/f", b"x").done();
    let dir = applied(&archive);
    let upper = dir.path().join("target");
    let mut packed = Vec::new();
    layer::pack_upper(&upper, &mut packed).unwrap();
    let mut names: Vec<String> = tar::Archive::new(&packed[..])
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    names.sort();
    assert_eq!(names, [".wh.gone", "d/", "d/.wh..wh..opq", "d/f"]);
    let second = applied(&packed);
    let mut again = Vec::new();
    layer::pack_upper(&second.path().join("target"), &mut again).unwrap();
    assert!(again == packed);
    assert!(is_whiteout(&second.path().join("target/gone")));
}
