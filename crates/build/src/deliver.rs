//! A result's files to the client's session: one by one, or as an archive.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Write};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::Arc;

use brigantine_image::layer;
use brigantine_image::tar::{Time, Writer};
use brigantine_session::{Entry, Kind, Session};
use rustix::fs::{FileType, OFlags};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::attest::file_subject;
use crate::error::{Context as _, Error, Result, invalid};
use crate::graph::VertexId;
use crate::product::Solved;
use crate::snapshot::{Layer, hold};
use crate::tree::Tree;

/// Sends the files of the target one by one. Blocks.
pub(crate) fn files(solved: &Solved, session: &Arc<Session>, runtime: &tokio::runtime::Handle) -> Result<()> {
    with_tree(solved, solved.plan.target, |tree, _| {
        let entries = listing(tree)?;
        let open = |path: &[u8]| {
            tree.open(path, OFlags::RDONLY | OFlags::NONBLOCK).map(File::from).map_err(Into::into)
        };
        session.send_files(runtime, entries, open)?;
        Ok(())
    })
}

/// Sends the files of all platforms as one archive, with what attests to them. Blocks.
pub(crate) fn archive(
    solved: &Solved,
    session: &Arc<Session>,
    runtime: &tokio::runtime::Handle,
    name: &'static str,
) -> Result<()> {
    let mut output = session.archive(runtime, name)?;
    let packed = pack_all(solved, &mut output);
    // Why the client took no more says more than that it did not.
    output.finish()?;
    packed
}

fn pack_all(solved: &Solved, output: &mut dyn Write) -> Result<()> {
    let plan = &solved.plan;
    let others = plan.others.iter().map(|other| (other.platform.clone(), other.target));
    let all: Vec<_> = std::iter::once((plan.config.platform(), plan.target)).chain(others).collect();
    let wanted = &solved.options.export;
    let split = wanted.platform_split.unwrap_or(all.len() > 1);
    for (platform, target) in &all {
        with_tree(solved, *target, |tree, layers| {
            let label = platform.to_string().replace('/', "_");
            let prefix = if split { label.as_str() } else { "" };
            pack(tree, prefix, output)?;
            if !wanted.needs_index() {
                return Ok(());
            }
            let subjects = subjects(tree)?;
            let mut writer = Writer::new(Unended::new(output));
            let time = Time { seconds: solved.epoch.unwrap_or(solved.ended / 1_000_000_000), nanos: 0 };
            for (name, text) in solved.exporting().attestation_files(platform, layers, &subjects)? {
                let path = match (split, name.split_once('.')) {
                    (true, _) => format!("{prefix}/{name}"),
                    // Several platforms in one folder: each has its own.
                    (false, Some((stem, rest))) if all.len() > 1 => format!("{stem}.{label}.{rest}"),
                    (false, _) => name,
                };
                writer.append_bytes(&path, &text, time).map_err(sending)?;
            }
            writer.finish().map_err(sending)?;
            Ok(())
        })?;
    }
    output.write_all(&[0; 2 * BLOCK]).map_err(sending)
}

fn sending(error: io::Error) -> Error {
    Error::Executor(format!("send the result: {error}"))
}

/// Works on the files of a target.
fn with_tree(
    solved: &Solved,
    target: VertexId,
    work: impl FnOnce(&Tree, &[Layer]) -> Result<()>,
) -> Result<()> {
    let solver = &solved.solver;
    let target = solved.results.get(&target).ok_or_else(|| invalid("the target was not made"))?;
    let held = hold(&solver.store, &solver.mounts, &solved.lease, &target.layers)?;
    work(&Tree::held(&held, Arc::clone(&solver.hashes))?, &target.layers)
}

/// Packs a tree below `prefix`; the archive is not ended.
fn pack(tree: &Tree, prefix: &str, output: &mut dyn Write) -> Result<()> {
    let root = tree.open(b"", OFlags::RDONLY | OFlags::DIRECTORY).doing(|| "open the result".to_owned())?;
    let output = Unended::new(output);
    let packed = if prefix.is_empty() {
        let path = format!("/proc/self/fd/{}", root.as_raw_fd());
        layer::pack(Path::new(&path), output)
    } else {
        layer::pack_as(root, b"", prefix.as_bytes(), output, None)
    };
    packed.map(drop).map_err(|error| Error::Executor(format!("pack the result: {error}")))
}

/// Every file of a tree with its digest.
fn subjects(tree: &Tree) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for file in tree.walk("")? {
        if FileType::from_raw_mode(file.stat.st_mode) != FileType::RegularFile {
            continue;
        }
        let path = String::from_utf8_lossy(&file.path).into_owned();
        let what = || format!("read {path} of the result");
        let mut opened = File::from(tree.open(&file.path, OFlags::RDONLY | OFlags::NONBLOCK).doing(what)?);
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            match opened.read(&mut buffer).doing(what)? {
                0 => break,
                n => hasher.update(&buffer[..n]),
            }
        }
        all.push(file_subject(&path, &hasher.finalize()));
    }
    Ok(all)
}

/// Blocks of an archive.
const BLOCK: usize = 512;

/// Keeps back the two blocks of zeros that end an archive, so that another can follow.
struct Unended<'w> {
    output: &'w mut dyn Write,
    kept: Vec<u8>,
}

impl<'w> Unended<'w> {
    fn new(output: &'w mut dyn Write) -> Self {
        Self { output, kept: Vec::new() }
    }
}

impl Write for Unended<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.kept.extend_from_slice(buf);
        let over = self.kept.len().saturating_sub(2 * BLOCK);
        self.output.write_all(&self.kept[..over])?;
        self.kept.drain(..over);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// Everything in a tree, as it is sent. Devices, pipes and sockets are left out.
fn listing(tree: &Tree) -> Result<Vec<Entry>> {
    let mut names: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut entries = Vec::new();
    for file in tree.walk("")? {
        if file.path.is_empty() {
            continue;
        }
        let stat = &file.stat;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink(tree.link(&file.path)?.into_bytes()),
            FileType::RegularFile => {
                let first = (stat.st_nlink > 1)
                    .then(|| names.entry((stat.st_dev, stat.st_ino)).or_insert_with(|| file.path.clone()))
                    .filter(|first| **first != file.path);
                match first {
                    Some(first) => Kind::HardLink(first.clone()),
                    None => Kind::File { size: stat.st_size.unsigned_abs() },
                }
            }
            _ => continue,
        };
        entries.push(Entry {
            kind,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stat
                .st_mtime
                .saturating_mul(1_000_000_000)
                .saturating_add(stat.st_mtime_nsec.cast_signed()),
            path: file.path,
            state: 0,
        });
    }
    Ok(entries)
}
