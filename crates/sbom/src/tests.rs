//! File systems made by hand, as each tool leaves them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::*;

fn put(root: &Path, path: &str, content: impl AsRef<[u8]>) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn scanned(root: &Path) -> Found {
    scan(fs::File::open(root).unwrap()).unwrap()
}

fn purls(found: &Found) -> Vec<&str> {
    found.packages.iter().map(|package| package.purl.as_str()).collect()
}

#[test]
fn distributions_and_languages_are_found_by_their_own_files() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(root, "etc/os-release", "ID=debian\nVERSION_ID=\"12\"\n");
    put(
        root,
        "var/lib/dpkg/status",
        "Package: libc6\nStatus: install ok installed\nMaintainer: A B <a@b>\nArchitecture: amd64\nVersion: 2.36-9+deb12u1\n\
         Description: x\n more: y\n\nPackage: gone\nStatus: deinstall ok config-files\nVersion: 1\n",
    );
    put(root, "var/lib/dpkg/status.d/base", "Package: base-files\nVersion: 12\nArchitecture: all\n");
    put(root, "var/lib/dpkg/status.d/base.md5sums", "0  x\n");
    put(root, "lib/apk/db/installed", "P:musl\nV:1.2.4-r2\nA:x86_64\nL:MIT\n\nP:zlib\nV:1.3-r0\n");
    put(
        root,
        "src/Cargo.lock",
        "version = 3\n\n[[package]]\nname = \"serde\"\nversion = \"1.0.1\"\nsource = \"x\"\n",
    );
    put(root, "app/node_modules/@a/b/package.json", r#"{"name":"@a/b","version":"2.0.0","license":"MIT"}"#);
    put(root, "app/node_modules/c/test/package.json", r#"{"name":"fixture","version":"9.9.9"}"#);
    put(
        root,
        "app/package-lock.json",
        r#"{"packages":{"":{"version":"1.0.0"},"node_modules/d":{"version":"3.1.0"}}}"#,
    );
    put(
        root,
        "usr/lib/python3/Foo_Bar-1.dist-info/METADATA",
        "Metadata-Version: 2.1\nName: Foo_Bar\nVersion: 1.0\n\nName: no\n",
    );
    put(root, "node_modules/bad/package.json", "{");
    let found = scanned(root);
    assert_eq!(
        purls(&found),
        [
            "pkg:deb/debian/base-files@12?arch=all&distro=debian-12",
            "pkg:deb/debian/libc6@2.36-9%2Bdeb12u1?arch=amd64&distro=debian-12",
            "pkg:apk/debian/musl@1.2.4-r2?arch=x86_64&distro=debian-12",
            "pkg:apk/debian/zlib@1.3-r0?distro=debian-12",
            "pkg:cargo/serde@1.0.1",
            "pkg:npm/%40a/b@2.0.0",
            "pkg:npm/d@3.1.0",
            "pkg:pypi/foo-bar@1.0",
        ]
    );
    assert_eq!(found.unread.len(), 1, "{:?}", found.unread);
    assert!(found.unread[0].starts_with("node_modules/bad/package.json: "), "{:?}", found.unread);
    let subject =
        Subject { name: "x:1".to_owned(), created: "2024-01-01T00:00:00Z".to_owned(), ..Subject::default() };
    let document = spdx(&subject, &found);
    assert_eq!(document["packages"].as_array().unwrap().len(), 9);
    assert_eq!(document, spdx(&subject, &scanned(root)), "the same files give the same document");
    assert_eq!(document["packages"][2]["supplier"], "Person: A B (a@b)");
}

/// One header of rpm's with texts and numbers.
fn header(texts: &[(u32, &str)], epoch: Option<u32>) -> Vec<u8> {
    let (mut index, mut data) = (Vec::new(), Vec::new());
    let mut count = 0_u32;
    let mut add = |tag: u32, kind: u32, value: &[u8]| {
        while kind == 4 && data.len() % 4 != 0 {
            data.push(0);
        }
        for number in [tag, kind, u32::try_from(data.len()).unwrap(), 1] {
            index.extend(number.to_be_bytes());
        }
        data.extend_from_slice(value);
        count += 1;
    };
    for (tag, text) in texts {
        add(*tag, 6, format!("{text}\0").as_bytes());
    }
    if let Some(epoch) = epoch {
        add(1003, 4, &epoch.to_be_bytes());
    }
    let mut all = Vec::new();
    all.extend(count.to_be_bytes());
    all.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    all.extend(index);
    all.extend(data);
    all
}

#[test]
fn rpm_is_read_from_both_of_its_databases() {
    let bash = header(
        &[(1000, "bash"), (1001, "5.2"), (1002, "3.fc39"), (1022, "x86_64"), (1014, "GPLv3+")],
        Some(1),
    );
    let key = header(&[(1000, "gpg-pubkey"), (1001, "1")], None);
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(root, "etc/os-release", "ID=fedora\nVERSION_ID=39\n");
    fs::create_dir_all(root.join("var/lib/rpm")).unwrap();
    let database = rusqlite::Connection::open(root.join("var/lib/rpm/rpmdb.sqlite")).unwrap();
    database.execute_batch("CREATE TABLE Packages (hnum INTEGER PRIMARY KEY, blob BLOB NOT NULL)").unwrap();
    for blob in [&bash, &key, &vec![1, 2, 3]] {
        database.execute("INSERT INTO Packages (blob) VALUES (?1)", [blob]).unwrap();
    }
    drop(database);
    let found = scanned(root);
    assert_eq!(purls(&found), ["pkg:rpm/fedora/bash@5.2-3.fc39?arch=x86_64&epoch=1"]);
    assert_eq!(found.packages.first().unwrap().version, "1:5.2-3.fc39");
    assert_eq!(found.unread, ["var/lib/rpm/rpmdb.sqlite: a header in it is malformed"]);

    // The other one: a page of slots, then blobs in blocks of 16 bytes.
    fs::remove_file(root.join("var/lib/rpm/rpmdb.sqlite")).unwrap();
    let mut ndb = vec![0_u8; 4096];
    ndb[..4].copy_from_slice(b"RpmP");
    ndb[12..16].copy_from_slice(&1_u32.to_le_bytes());
    for slot in (32..4096).step_by(16) {
        ndb[slot..slot + 4].copy_from_slice(b"Slot");
    }
    ndb[36..40].copy_from_slice(&7_u32.to_le_bytes());
    ndb[40..44].copy_from_slice(&256_u32.to_le_bytes());
    ndb.extend(b"BlbS");
    for number in [7, 0, u32::try_from(bash.len()).unwrap()] {
        ndb.extend(number.to_le_bytes());
    }
    ndb.extend(&bash);
    put(root, "var/lib/rpm/Packages.db", &ndb);
    let found = scanned(root);
    assert_eq!(purls(&found), ["pkg:rpm/fedora/bash@5.2-3.fc39?arch=x86_64&epoch=1"]);
    for length in [0, 16, 40, 4100, ndb.len() - 1] {
        put(root, "var/lib/rpm/Packages.db", &ndb[..length]);
        assert!(scanned(root).packages.is_empty(), "{length}");
    }
}

/// A program with one section of its own.
fn elf(name: &str, content: &[u8]) -> Vec<u8> {
    let names = format!("\0{name}\0.shstrtab\0");
    let mut file = vec![0_u8; 64];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let content_at = file.len();
    file.extend(content);
    let names_at = file.len();
    file.extend(names.as_bytes());
    let table = file.len();
    let section = |name: usize, offset: usize, size: usize| {
        let mut header = vec![0_u8; 64];
        header[..4].copy_from_slice(&u32::try_from(name).unwrap().to_le_bytes());
        header[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
        header
    };
    file.extend(section(0, 0, 0));
    file.extend(section(1, content_at, content.len()));
    file.extend(section(name.len() + 2, names_at, names.len()));
    file[40..48].copy_from_slice(&(table as u64).to_le_bytes());
    file[58..60].copy_from_slice(&64_u16.to_le_bytes());
    file[60..62].copy_from_slice(&3_u16.to_le_bytes());
    file[62..64].copy_from_slice(&2_u16.to_le_bytes());
    file
}

fn program(root: &Path, path: &str, content: &[u8]) {
    put(root, path, content);
    fs::set_permissions(root.join(path), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn programs_tell_what_was_built_into_them() {
    use std::io::Write as _;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let mut deflated = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    deflated.write_all(br#"{"packages":[{"name":"rand","version":"0.9.0","source":"crates.io"}]}"#).unwrap();
    let auditable = elf(".dep-v0", &deflated.finish().unwrap());
    program(root, "bin/rust", &auditable);
    let mark = "0123456789abcdef";
    let lines = format!(
        "{mark}path\texample.com/x\nmod\texample.com/x\t(devel)\t\ndep\tgithub.com/A/b\tv1.2.3\th1:=\n\
         dep\told.org/c\tv1.0.0\n=>\tnew.org/c\tv1.1.0\th1:=\n{mark}"
    );
    let mut info = b"\xff Go buildinf:\x08\x02".to_vec();
    info.resize(32, 0);
    info.push(8);
    info.extend(b"go1.22.1");
    let length = lines.len();
    info.extend([u8::try_from(length & 0x7f).unwrap() | 0x80, u8::try_from(length >> 7).unwrap()]);
    info.extend(lines.as_bytes());
    program(root, "bin/go", &elf(".go.buildinfo", &info));
    program(root, "bin/torn", &auditable[..auditable.len() - 100]);
    program(
        root,
        "bin/script",
        b"#!/bin/sh\nexit 0\n# not a program, but long enough to be looked at as one\n",
    );
    let found = scanned(root);
    assert_eq!(
        purls(&found),
        [
            "pkg:cargo/rand@0.9.0",
            "pkg:golang/example.com/x",
            "pkg:golang/github.com/a/b@v1.2.3",
            "pkg:golang/new.org/c@v1.1.0",
            "pkg:golang/stdlib@1.22.1",
        ]
    );
    assert!(found.unread.is_empty(), "{:?}", found.unread);
}

#[test]
fn links_lead_nowhere_outside() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    put(dir.path(), "secret/status", "Package: outside\nStatus: install ok installed\nVersion: 1\n");
    fs::create_dir_all(root.join("var/lib")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("secret"), root.join("var/lib/dpkg")).unwrap();
    std::os::unix::fs::symlink("../../secret/status", root.join("Cargo.lock")).unwrap();
    std::os::unix::fs::symlink("/etc", root.join("etc")).unwrap();
    let found = scanned(&root);
    assert_eq!(found, Found::default());
}
