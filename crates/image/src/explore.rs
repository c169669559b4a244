//! Looking into images: what each layer adds, changes and hides, and what that wastes; and how two images differ.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use serde::Serialize;

use crate::digest::Digest;
use crate::erofs::{Content, NodeId, Tree};
use crate::error::{Error, IoContext as _, Result};
use crate::layer;
use crate::snapshot::{LayerFiles, open_union};
use crate::store::{Image, Store};

/// An image, layer by layer.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Explored {
    pub id: Digest,
    /// Sum of the lengths of the files of all layers.
    pub size: u64,
    /// Bytes of files that a higher layer replaces or removes: they are carried and never seen.
    pub wasted: u64,
    /// What is seen of what is carried, 0 to 1.
    pub efficiency: f64,
    /// Bottom first.
    pub layers: Vec<ExploredLayer>,
    /// Files carried more than is of use, most bytes first.
    pub wasted_paths: Vec<Wasted>,
}

/// One layer of an image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct ExploredLayer {
    pub diff_id: Digest,
    pub blob: Digest,
    /// What history says made it.
    pub created_by: String,
    /// Sum of the lengths of its files.
    pub size: u64,
    pub added: u64,
    pub modified: u64,
    pub removed: u64,
    /// By path.
    pub entries: Vec<ExploredEntry>,
}

/// What a layer does to one path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct ExploredEntry {
    pub path: String,
    pub change: Change,
    #[serde(rename = "Type")]
    pub kind: &'static str,
    /// In octal, as `ls` and `chmod` have it.
    pub mode: String,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub link: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    Added,
    Modified,
    Removed,
}

/// A path with bytes nobody sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Wasted {
    pub path: String,
    pub bytes: u64,
    /// How often a copy was hidden.
    pub times: u64,
}

/// What the layers so far amount to: paths with the lengths of their files.
#[derive(Default)]
struct Union {
    paths: BTreeMap<Vec<u8>, u64>,
    wasted: BTreeMap<Vec<u8>, (u64, u64)>,
}

impl Union {
    fn waste(&mut self, path: &[u8], bytes: u64) {
        if bytes > 0 {
            let wasted = self.wasted.entry(path.to_vec()).or_default();
            *wasted = (wasted.0 + bytes, wasted.1 + 1);
        }
    }

    /// Hides all below `path`; tells how much that was.
    fn hide_below(&mut self, path: &[u8]) -> u64 {
        let mut from = path.to_vec();
        if !from.is_empty() {
            from.push(b'/');
        }
        let below: Vec<(Vec<u8>, u64)> = self
            .paths
            .range(from.clone()..)
            .take_while(|(path, _)| path.starts_with(&from))
            .map(|(path, bytes)| (path.clone(), *bytes))
            .collect();
        for (path, bytes) in &below {
            self.paths.remove(path);
            self.waste(path, *bytes);
        }
        below.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// What each layer of an image holds and does. Reads every layer's archive once.
pub fn explore(store: &Store, image: &Image) -> Result<Explored> {
    let lease = store.lease()?;
    for layer in &image.layers {
        lease.hold(&layer.digest)?;
    }
    let mut union = Union::default();
    let mut layers = Vec::new();
    let mut commands = image
        .config
        .history
        .iter()
        .filter(|step| !step.empty_layer)
        .map(|step| step.created_by.clone().unwrap_or_default());
    for (diff_id, blob) in image.config.rootfs.diff_ids.iter().zip(&image.layers) {
        let error = |source| Error::Layer { layer: diff_id.to_string(), source };
        let archive = match store.layer_archive(diff_id)? {
            Some(archive) => archive,
            None => store.content().open(&blob.digest)?,
        };
        let tree = layer::tree_of(archive)
            .map_err(error)?
            .ok_or_else(|| Error::Invalid(format!("layer {diff_id} has more entries than can be shown")))?;
        let mut explored = ExploredLayer {
            diff_id: diff_id.clone(),
            blob: blob.digest.clone(),
            created_by: commands.next().unwrap_or_default(),
            size: 0,
            added: 0,
            modified: 0,
            removed: 0,
            entries: Vec::new(),
        };
        let mut waiting = vec![(Tree::ROOT, Vec::new())];
        while let Some((id, path)) = waiting.pop() {
            visit(&tree, id, &path, &mut union, &mut explored);
            for (name, child) in tree.children(id).into_iter().flatten().rev() {
                let mut below = path.clone();
                if !below.is_empty() {
                    below.push(b'/');
                }
                below.extend_from_slice(name);
                waiting.push((*child, below));
            }
        }
        explored.entries.sort_by(|a, b| a.path.cmp(&b.path));
        layers.push(explored);
    }
    let size = layers.iter().map(|layer| layer.size).sum();
    let wasted: u64 = union.wasted.values().map(|(bytes, _)| bytes).sum();
    let mut wasted_paths: Vec<Wasted> = union
        .wasted
        .iter()
        .map(|(path, (bytes, times))| Wasted { path: shown(path), bytes: *bytes, times: *times })
        .collect();
    wasted_paths.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.path.cmp(&b.path)));
    let efficiency = if size == 0 { 1.0 } else { (size - wasted.min(size)) as f64 / size as f64 };
    Ok(Explored { id: image.id.clone(), size, wasted, efficiency, layers, wasted_paths })
}

fn visit(tree: &Tree, id: NodeId, path: &[u8], union: &mut Union, layer: &mut ExploredLayer) {
    let node = tree.node(id);
    if path.is_empty() {
        return;
    }
    let before = union.paths.get(path).copied();
    let (kind, size, link) = match &node.content {
        Content::Directory { opaque, .. } => {
            if *opaque {
                union.hide_below(path);
            }
            ("directory", 0, &[][..])
        }
        Content::File(data) => ("file", data.size, &[][..]),
        Content::Symlink(target) => ("symlink", 0, &target[..]),
        Content::CharDevice(0, 0) => {
            let hidden = union.hide_below(path);
            if let Some(bytes) = union.paths.remove(path) {
                union.waste(path, bytes);
                layer.removed += 1;
                layer.entries.push(ExploredEntry {
                    path: shown(path),
                    change: Change::Removed,
                    kind: "whiteout",
                    mode: String::new(),
                    uid: 0,
                    gid: 0,
                    size: bytes + hidden,
                    link: String::new(),
                });
            }
            return;
        }
        Content::CharDevice(..) | Content::BlockDevice(..) => ("device", 0, &[][..]),
        Content::Fifo => ("fifo", 0, &[][..]),
    };
    if !tree.is_directory(id) {
        union.hide_below(path);
        if let Some(bytes) = before {
            union.waste(path, bytes);
        }
    }
    union.paths.insert(path.to_vec(), size);
    layer.size += size;
    let change = if before.is_some() { Change::Modified } else { Change::Added };
    match change {
        Change::Added => layer.added += 1,
        // Archives repeat the directories above what they hold.
        Change::Modified if kind == "directory" => return,
        _ => layer.modified += 1,
    }
    layer.entries.push(ExploredEntry {
        path: shown(path),
        change,
        kind,
        mode: format!("{:04o}", node.attributes.mode),
        uid: node.attributes.uid,
        gid: node.attributes.gid,
        size,
        link: String::from_utf8_lossy(link).into_owned(),
    });
}

fn shown(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path))
}

/// How two images differ in what a container of each would see.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Differences {
    /// Whether the images are one and the same.
    pub identical: bool,
    pub files: Vec<Difference>,
    /// Configuration fields that differ: name, then the value of each.
    pub config: Vec<(String, String, String)>,
}

/// One path that is not the same in both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Difference {
    pub path: String,
    pub change: Change,
    /// Of a modified path: `type`, `content`, `mode`, `owner`, `time`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub what: Vec<&'static str>,
    pub size_before: u64,
    pub size_after: u64,
}

/// Compares what containers of two images would see. Files with the same length and time are taken to be the same.
pub fn differences(store: &Store, before: &Image, after: &Image) -> Result<Differences> {
    let mut found = Differences { identical: before.id == after.id, ..Differences::default() };
    if found.identical {
        return Ok(found);
    }
    let root = |image: &Image| -> Result<OwnedFd> {
        store.ensure_unpacked(image)?;
        let lower: Vec<_> = store.layer_files(image)?.iter().map(LayerFiles::open).collect::<Result<_>>()?;
        open_union(&lower)
    };
    if before.config.rootfs.diff_ids != after.config.rootfs.diff_ids {
        let roots = (root(before)?, root(after)?);
        let mut waiting = vec![Vec::new()];
        while let Some(path) = waiting.pop() {
            compare(&roots, &path, &mut waiting, &mut found.files)?;
        }
        found.files.sort_by(|a, b| a.path.cmp(&b.path));
    }
    let document = |image: &Image| serde_json::to_value(&*image.config).unwrap_or_default();
    let (left, right) = (document(before), document(after));
    let mut fields = Vec::new();
    for (name, left, right) in
        [("config.", left.get("config"), right.get("config")), ("", Some(&left), Some(&right))]
    {
        let map = |value: Option<&serde_json::Value>| {
            value.and_then(|v| v.as_object()).cloned().unwrap_or_default()
        };
        let (left, right) = (map(left), map(right));
        let mut keys: Vec<&String> = left.keys().chain(right.keys()).collect();
        keys.sort();
        keys.dedup();
        for key in keys {
            if matches!((name, &key[..]), ("", "config" | "rootfs" | "history"))
                || left.get(key) == right.get(key)
            {
                continue;
            }
            let text = |value: Option<&serde_json::Value>| value.map(ToString::to_string).unwrap_or_default();
            fields.push((format!("{name}{key}"), text(left.get(key)), text(right.get(key))));
        }
    }
    found.config = fields;
    Ok(found)
}

fn open_dir(root: &OwnedFd, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let name = if path.is_empty() { b"." } else { path };
    rustix::fs::openat2(root, name, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

/// The entries of a directory that is there in both.
fn compare(
    roots: &(OwnedFd, OwnedFd),
    path: &[u8],
    waiting: &mut Vec<Vec<u8>>,
    found: &mut Vec<Difference>,
) -> Result<()> {
    let at = || shown(path);
    let dirs = (open_dir(&roots.0, path).at("open", at())?, open_dir(&roots.1, path).at("open", at())?);
    let mut names: BTreeMap<CString, (Option<Stat>, Option<Stat>)> = BTreeMap::new();
    for (first, dir) in [(true, &dirs.0), (false, &dirs.1)] {
        for entry in Dir::read_from(dir).at("read", at())? {
            let entry = entry.at("read", at())?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).at("stat", at())?;
            let slot = names.entry(name.to_owned()).or_default();
            if first { slot.0 = Some(stat) } else { slot.1 = Some(stat) }
        }
    }
    for (name, stats) in names {
        let mut below = path.to_vec();
        if !below.is_empty() {
            below.push(b'/');
        }
        below.extend_from_slice(name.to_bytes());
        let size = |stat: &Option<Stat>| {
            stat.filter(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile)
                .map_or(0, |s| s.st_size as u64)
        };
        let (size_before, size_after) = (size(&stats.0), size(&stats.1));
        let mut difference = |change, what| {
            found.push(Difference { path: shown(&below), change, what, size_before, size_after });
        };
        match &stats {
            (Some(_), None) => difference(Change::Removed, Vec::new()),
            (None, Some(_)) => difference(Change::Added, Vec::new()),
            (Some(left), Some(right)) => {
                let what = changes(&dirs, &name, left, right).at("compare", shown(&below))?;
                if !what.is_empty() {
                    difference(Change::Modified, what);
                }
                let is_dir = |s: &Stat| FileType::from_raw_mode(s.st_mode) == FileType::Directory;
                if is_dir(left) && is_dir(right) {
                    waiting.push(below);
                }
            }
            (None, None) => {}
        }
    }
    Ok(())
}

fn changes(
    dirs: &(OwnedFd, OwnedFd),
    name: &CString,
    left: &Stat,
    right: &Stat,
) -> io::Result<Vec<&'static str>> {
    let kind = FileType::from_raw_mode(left.st_mode);
    if kind != FileType::from_raw_mode(right.st_mode) {
        return Ok(vec!["type"]);
    }
    let mut what = Vec::new();
    let time = (left.st_mtime, left.st_mtime_nsec) != (right.st_mtime, right.st_mtime_nsec);
    let content = match kind {
        FileType::RegularFile => left.st_size != right.st_size || (time && !same_bytes(dirs, name)?),
        FileType::Symlink => {
            rustix::fs::readlinkat(&dirs.0, name, Vec::new())?
                != rustix::fs::readlinkat(&dirs.1, name, Vec::new())?
        }
        FileType::CharacterDevice | FileType::BlockDevice => left.st_rdev != right.st_rdev,
        _ => false,
    };
    if content {
        what.push("content");
    }
    if left.st_mode != right.st_mode {
        what.push("mode");
    }
    if (left.st_uid, left.st_gid) != (right.st_uid, right.st_gid) {
        what.push("owner");
    }
    // Times of directories change with what is in them.
    if time && kind != FileType::Directory {
        what.push("time");
    }
    Ok(what)
}

fn same_bytes(dirs: &(OwnedFd, OwnedFd), name: &CString) -> io::Result<bool> {
    let open = |dir: &OwnedFd| -> io::Result<io::BufReader<File>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir.as_fd(), name, flags, Mode::empty())?;
        Ok(io::BufReader::with_capacity(1 << 16, File::from(file)))
    };
    let (mut left, mut right) = (open(&dirs.0)?, open(&dirs.1)?);
    let (mut a, mut b) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let n = left.read(&mut a)?;
        if n == 0 {
            return Ok(right.read(&mut b[..1])? == 0);
        }
        match right.read_exact(&mut b[..n]) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            result => result?,
        }
        if a[..n] != b[..n] {
            return Ok(false);
        }
    }
}
