//! Archives and stores for tests.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![expect(clippy::unwrap_used, reason = "only tests use it")]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use brigantine_image::{Digest, Store};
use tempfile::TempDir;

pub fn store() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("image")).unwrap();
    (dir, store)
}

/// Number of entries of a directory.
pub fn files(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

/// Bytes of all files of a store but its index.
pub fn disk(dir: &Path) -> u64 {
    let mut total = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        if metadata.is_dir() {
            total += disk(&entry.path());
        } else if entry.file_name() != "index.json" {
            total += metadata.len();
        }
    }
    total
}

/// An archive under construction: entries exactly as told, good or bad.
pub struct Tar {
    builder: tar::Builder<Vec<u8>>,
}

impl Tar {
    pub fn new() -> Self {
        Self { builder: tar::Builder::new(Vec::new()) }
    }

    pub fn entry(mut self, kind: tar::EntryType, path: &str, link: &str, data: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
        header.set_mtime(1_000_000_000);
        header.set_size(data.len() as u64);
        let mut long = |marker: u8, text: &str| {
            let mut extra = tar::Header::new_gnu();
            extra.set_entry_type(tar::EntryType::new(marker));
            extra.set_size(text.len() as u64 + 1);
            extra.set_cksum();
            let data = [text.as_bytes(), b"\0"].concat();
            self.builder.append(&extra, &data[..]).unwrap();
        };
        if path.len() > 100 {
            long(b'L', path);
        }
        if link.len() > 100 {
            long(b'K', link);
        }
        let gnu = header.as_gnu_mut().unwrap();
        let n = path.len().min(100);
        gnu.name[..n].copy_from_slice(&path.as_bytes()[..n]);
        let n = link.len().min(100);
        gnu.linkname[..n].copy_from_slice(&link.as_bytes()[..n]);
        header.set_cksum();
        self.builder.append(&header, data).unwrap();
        self
    }

    pub fn file(self, path: &str, data: &[u8]) -> Self {
        self.entry(tar::EntryType::Regular, path, "", data)
    }

    pub fn dir(self, path: &str) -> Self {
        self.entry(tar::EntryType::Directory, path, "", b"")
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(tar::EntryType::Symlink, path, target, b"")
    }

    pub fn hardlink(self, path: &str, target: &str) -> Self {
        self.entry(tar::EntryType::Link, path, target, b"")
    }

    /// Records for the entry that follows.
    pub fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.builder.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    pub fn done(self) -> Vec<u8> {
        self.builder.into_inner().unwrap()
    }
}

/// An archive as docker 20.10 writes it.
pub fn docker_archive(tags: &[&str], layers: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| Digest::sha256(layer).to_string()).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "created": "2024-01-01T00:00:00Z",
        "config": { "Cmd": ["sh"], "Env": null },
        "history": layers.iter().map(|_| serde_json::json!({ "created_by": "test" })).collect::<Vec<_>>(),
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = serde_json::to_vec(&config).unwrap();
    let config_name = format!("{}.json", Digest::sha256(&config).hex());
    let names: Vec<String> = (0..layers.len()).map(|n| format!("{n}/layer.tar")).collect();
    let manifest = serde_json::json!([{ "Config": config_name, "RepoTags": tags, "Layers": names }]);
    let mut archive = Tar::new();
    for (name, layer) in names.iter().zip(layers) {
        archive = archive.file(name, layer);
    }
    archive.file(&config_name, &config).file("manifest.json", &serde_json::to_vec(&manifest).unwrap()).done()
}

/// The data in every form of compression.
pub fn compressed(data: &[u8]) -> Vec<Vec<u8>> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(data).unwrap();
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bzip2.write_all(data).unwrap();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(data).unwrap();
    vec![
        gzip.finish().unwrap(),
        bzip2.finish().unwrap(),
        xz.finish().unwrap(),
        zstd::encode_all(data, 1).unwrap(),
    ]
}

/// Runs a program that has to succeed; returns what it wrote.
pub fn run(command: &mut Command) -> String {
    let output = command.output().expect("it runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// One line for each entry: all that can be known of it but inode and change time.
pub fn listing(root: &Path) -> Vec<String> {
    fn walk(root: &Path, dir: &Path, lines: &mut Vec<String>) {
        for entry in fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            let m = fs::symlink_metadata(&path).expect("metadata");
            let content = match m.file_type() {
                t if t.is_symlink() => fs::read_link(&path).expect("a link").display().to_string(),
                t if t.is_file() => Digest::sha256(&fs::read(&path).expect("a file")).to_string(),
                _ => format!("{:x}", m.rdev()),
            };
            let mut list = [0u8; 4096];
            let n = rustix::fs::llistxattr(&path, &mut list).expect("attributes");
            let mut xattrs = Vec::new();
            for name in list[..n].split(|&b| b == 0).filter(|name| !name.is_empty()) {
                let mut value = [0u8; 4096];
                let n = rustix::fs::lgetxattr(&path, name, &mut value).expect("an attribute");
                xattrs.push((String::from_utf8_lossy(name).into_owned(), value[..n].to_vec()));
            }
            xattrs.sort();
            let links = if m.is_dir() { 0 } else { m.nlink() };
            lines.push(format!(
                "{} {:o} {}:{} {}.{:09} x{links} {content} {xattrs:?}",
                path.strip_prefix(root).expect("below the root").display(),
                m.mode(),
                m.uid(),
                m.gid(),
                m.mtime(),
                m.mtime_nsec(),
            ));
            if m.is_dir() {
                walk(root, &path, lines);
            }
        }
    }
    let mut lines = Vec::new();
    walk(root, root, &mut lines);
    lines.sort();
    lines
}
