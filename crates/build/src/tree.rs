//! Looking into file trees: a build context, or the union of a stage's layers.
//!
//! Everything inside is reached from the root's descriptor with `openat2`, links staying inside; the union is a
//! detached mount that ends with its descriptor.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use brigantine_image::Lower;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, openat2, statat};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use crate::error::{Context, Result, invalid};
use crate::hashes::{Hashes, Stack};
use crate::pattern::{Glob, Ignore, has_wildcard};
use crate::snapshot::Held;

/// Files that are read whole (passwd, group, Dockerfile) are no larger.
const MAX_FILE: u64 = 16 << 20;
/// How many symbolic links one path may go through, as in the kernel.
const MAX_LINKS: u32 = 40;

/// A read-only view of files.
#[derive(Debug)]
pub(crate) struct Tree {
    root: OwnedFd,
    /// What is not visible.
    ignore: Ignore,
    /// Owners are of no account: everything belongs to root (a build context).
    ownerless: bool,
    /// Hashes known from writing the files, by path.
    known: HashMap<Vec<u8>, [u8; 32]>,
    hashes: Arc<Hashes>,
    /// Whether file identities last, so that hashes may be remembered by them.
    lasting: bool,
    /// The layers it is of, which do not change.
    stack: Option<Stack>,
}

/// One file of a tree.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// From the tree's root, no leading slash.
    pub path: Vec<u8>,
    pub stat: Stat,
}

/// One source that a pattern found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Selected {
    /// Where it is in the tree, links resolved.
    pub path: String,
    /// As it was asked for or matched: its last part names the copy.
    pub name: String,
    pub dir: bool,
}

/// The files behind a digest, to say later which of them changed; nothing beyond [`Listing::MOST`] of them.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    lines: String,
    count: usize,
}

impl Listing {
    const MOST: usize = 20_000;

    fn add(&mut self, path: &[u8], described: &[u8]) {
        self.count += 1;
        if self.count <= Self::MOST {
            let digest = Sha256::digest(described);
            self.lines.push_str(&hex::encode(&digest[..8]));
            self.lines.push(' ');
            // A newline in a name would look like another file.
            self.lines.push_str(&String::from_utf8_lossy(path).replace('\n', "?"));
            self.lines.push('\n');
        }
    }

    /// All of several listings, unless that is too many.
    pub fn joined<'l>(all: impl Iterator<Item = &'l Self> + Clone) -> Option<String> {
        let count: usize = all.clone().map(|one| one.count).sum();
        (count <= Self::MOST).then(|| all.map(|one| one.lines.as_str()).collect())
    }
}

impl Tree {
    pub fn folder(root: OwnedFd, ignore: Ignore, hashes: Arc<Hashes>) -> Self {
        Self { root, ignore, ownerless: true, known: HashMap::new(), hashes, lasting: true, stack: None }
    }

    /// The same with hashes that are known already.
    pub fn with_known(mut self, known: HashMap<Vec<u8>, [u8; 32]>) -> Self {
        self.known = known;
        self
    }

    /// The union of layers, top first.
    pub fn layers(layers: &[Lower], hashes: Arc<Hashes>) -> Result<Self> {
        let root = brigantine_image::open_union(layers).doing(|| "look into a stage's layers".to_owned())?;
        // In a union, and in a mount of our own, identities end with the mount.
        let lasting = matches!(layers, [one] if one.mount().is_none());
        Ok(Self {
            root,
            ignore: Ignore::default(),
            ownerless: false,
            known: HashMap::new(),
            hashes,
            lasting,
            stack: None,
        })
    }

    /// The union of layers that are held.
    pub fn held(held: &Held<'_>, hashes: Arc<Hashes>) -> Result<Self> {
        let mut tree = Self::layers(&held.lowers, hashes)?;
        tree.stack = Some(held.stack);
        Ok(tree)
    }

    pub fn ownerless(&self) -> bool {
        self.ownerless
    }

    fn visible(&self, path: &str, dir: bool) -> bool {
        self.ignore.is_empty()
            || path.is_empty()
            || !self.ignore.excludes(path)
            || (dir && self.ignore.may_take_again_below(path))
    }

    /// Status of a path without following a link at its end; directories above must be real.
    pub fn stat(&self, path: &str) -> Result<Option<Stat>> {
        if path.is_empty() {
            return Ok(Some(
                rustix::fs::fstat(&self.root).doing(|| "stat the root of a file tree".to_owned())?,
            ));
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat2(&self.root, path, flags, Mode::empty(), beneath()) {
            Ok(fd) => Ok(Some(rustix::fs::fstat(&fd).doing(|| format!("stat {path}"))?)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG) => Ok(None),
            Err(error) => Err(error).doing(|| format!("look up {path}")),
        }
    }

    /// The path with all links resolved inside the tree; `None` when it leads to nothing.
    pub fn canonical(&self, path: &str) -> Result<Option<String>> {
        let mut links = 0;
        let mut done: Vec<String> = Vec::new();
        let mut todo: Vec<String> = parts(path);
        while let Some(part) = todo.pop() {
            if part == ".." {
                done.pop();
                continue;
            }
            done.push(part);
            let here = done.join("/");
            let Some(stat) = self.stat(&here)? else { return Ok(None) };
            if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
                links += 1;
                if links > MAX_LINKS {
                    return Err(invalid(format!("{path}: too many levels of symbolic links")));
                }
                let target = rustix::fs::readlinkat(&self.root, &here, Vec::new())
                    .doing(|| format!("read the link {here}"))?;
                let target = target.to_string_lossy().into_owned();
                done.pop();
                if target.starts_with('/') {
                    done.clear();
                }
                todo.extend(parts(&target));
            } else if !todo.is_empty() && FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                return Ok(None);
            }
        }
        let path = done.join("/");
        let dir = self.is_dir(&path)?;
        Ok(self.visible(&path, dir).then_some(path))
    }

    fn is_dir(&self, path: &str) -> Result<bool> {
        Ok(self.stat(path)?.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory))
    }

    /// Opens a file of the tree for reading; directories above must be real.
    pub fn open(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        openat2(&self.root, path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), beneath())
    }

    /// A regular file's contents, links resolved; `None` when there is none.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let Some(path) = self.canonical(path)? else { return Ok(None) };
        let what = || format!("read {path}");
        let file = File::from(self.open(path.as_bytes(), OFlags::RDONLY | OFlags::NONBLOCK).doing(what)?);
        let metadata = file.metadata().doing(what)?;
        if !metadata.is_file() {
            return Ok(None);
        }
        if metadata.len() > MAX_FILE {
            return Err(invalid(format!(
                "{path} is {} bytes long: at most {MAX_FILE} are read",
                metadata.len()
            )));
        }
        let mut contents = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut contents).doing(what)?;
        Ok(Some(contents))
    }

    /// What a source means: itself, or with wildcards everything that matches.
    pub fn select(&self, source: &str) -> Result<Vec<Selected>> {
        let source = crate::pattern::clean(source);
        if !has_wildcard(&source) {
            let Some(path) = self.canonical(&source)? else {
                return Err(crate::error::Error::NotFound(format!("\"/{source}\": not found")));
            };
            let dir = self.is_dir(&path)?;
            return Ok(vec![Selected { path, name: source, dir }]);
        }
        let mut found = vec![String::new()];
        for part in source.split('/') {
            let mut next = Vec::new();
            if part == "**" {
                for base in &found {
                    next.push(base.clone());
                    self.dirs_below(base, &mut next)?;
                }
                found = next;
                continue;
            }
            let glob = Glob::new(part).map_err(invalid)?;
            for base in &found {
                let Some(real) = self.canonical(base)? else { continue };
                if !self.is_dir(&real)? {
                    continue;
                }
                for name in self.names(&real)? {
                    let name = String::from_utf8_lossy(name.as_bytes()).into_owned();
                    if glob.matches(&name) {
                        let path = join(base, &name);
                        if self.canonical(&path)?.is_some() {
                            next.push(path);
                        }
                    }
                }
            }
            found = next;
        }
        found.sort();
        found.dedup();
        let mut selected = Vec::new();
        for name in found {
            let Some(path) = self.canonical(&name)? else { continue };
            let dir = self.is_dir(&path)?;
            selected.push(Selected { path, name, dir });
        }
        Ok(selected)
    }

    fn dirs_below(&self, base: &str, found: &mut Vec<String>) -> Result<()> {
        for entry in self.walk(base)? {
            if FileType::from_raw_mode(entry.stat.st_mode) == FileType::Directory {
                let path = String::from_utf8_lossy(&entry.path).into_owned();
                if path != base {
                    found.push(path);
                }
            }
        }
        Ok(())
    }

    /// The names in a directory, sorted; what is not visible is left out.
    fn names(&self, dir: &str) -> Result<Vec<CString>> {
        let what = || format!("read the directory /{dir}");
        let fd = self.open(dir.as_bytes(), OFlags::RDONLY | OFlags::DIRECTORY).doing(what)?;
        names(&fd).doing(what)
    }

    /// Everything at and below `top` that is visible, directories before what they hold, sorted.
    pub fn walk(&self, top: &str) -> Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = Vec::new();
        let Some(stat) = self.stat(top)? else { return Ok(entries) };
        let top_is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        entries.push(Entry { path: top.as_bytes().to_vec(), stat });
        if !top_is_dir {
            return Ok(entries);
        }
        // Directories that are left out themselves, shown only if something in them is not.
        let mut doubtful: HashMap<Vec<u8>, Stat> = HashMap::new();
        let mut stack: Vec<(Vec<u8>, Stat)> = Vec::new();
        self.push_children(top.as_bytes(), &mut stack)?;
        while let Some((path, stat)) = stack.pop() {
            let dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if !self.ignore.is_empty() {
                let text = String::from_utf8_lossy(&path);
                if self.ignore.excludes(&text) {
                    if dir && self.ignore.may_take_again_below(&text) {
                        doubtful.insert(path.clone(), stat);
                        self.push_children(&path, &mut stack)?;
                    }
                    continue;
                }
            }
            if !doubtful.is_empty() {
                for (at, _) in path.iter().enumerate().filter(|(_, b)| **b == b'/') {
                    if let Some(stat) = doubtful.remove(&path[..at]) {
                        entries.push(Entry { path: path[..at].to_vec(), stat });
                    }
                }
            }
            entries.push(Entry { path: path.clone(), stat });
            if dir {
                self.push_children(&path, &mut stack)?;
            }
        }
        Ok(entries)
    }

    fn push_children(&self, path: &[u8], stack: &mut Vec<(Vec<u8>, Stat)>) -> Result<()> {
        let what = || format!("read the directory /{}", String::from_utf8_lossy(path));
        let dir = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY).doing(what)?;
        for name in names(&dir).doing(what)?.into_iter().rev() {
            let stat = match statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                // Gone meanwhile: a context folder may be worked in.
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error).doing(what),
            };
            let mut child = path.to_vec();
            if !child.is_empty() {
                child.push(b'/');
            }
            child.extend_from_slice(name.as_bytes());
            stack.push((child, stat));
        }
        Ok(())
    }

    /// A context's files have none; nor has what is neither file nor directory.
    fn add_xattrs(&self, entry: &Entry, line: &mut Vec<u8>) -> Result<()> {
        let kind = FileType::from_raw_mode(entry.stat.st_mode);
        if self.ownerless || !matches!(kind, FileType::RegularFile | FileType::Directory) {
            return Ok(());
        }
        let what = || format!("read the attributes of {}", String::from_utf8_lossy(&entry.path));
        let file = self.open(&entry.path, OFlags::RDONLY | OFlags::NONBLOCK).doing(what)?;
        for (name, value) in crate::xattrs::of(file.as_fd()).doing(what)? {
            write!(line, " {}:{}:", name.len(), value.len()).doing(what)?;
            line.extend_from_slice(&name);
            line.extend_from_slice(&value);
        }
        Ok(())
    }

    /// A digest of what copying these sources would bring: names, kinds, modes, owners, contents; no times.
    pub fn digest(
        &self,
        sources: &[Selected],
        exclude: &Ignore,
        any_mode: bool,
        whole_names: bool,
    ) -> Result<String> {
        self.digest_and_listing(sources, exclude, any_mode, whole_names).map(|(digest, _)| digest)
    }

    /// The same, with a list of the files in it.
    pub fn digest_and_listing(
        &self,
        sources: &[Selected],
        exclude: &Ignore,
        any_mode: bool,
        whole_names: bool,
    ) -> Result<(String, Listing)> {
        let mut listing = Listing::default();
        let mut all = Vec::new();
        for source in sources {
            let entries = self.walk(&source.path)?;
            all.push((source, entries));
        }
        let files: Vec<&Entry> =
            all.iter().flat_map(|(_, entries)| entries).filter(|entry| is_file(entry)).collect();
        let sums = self.file_hashes(&files)?;
        let mut sums = sums.into_iter();
        let mut hasher = Sha256::new();
        for (source, entries) in &all {
            let name = if whole_names { &source.name } else { last(&source.name) };
            hasher.update(format!("source {}:{name} {}\n", name.len(), source.dir));
            for entry in entries {
                let sum = is_file(entry).then(|| sums.next()).flatten();
                let relative = &entry.path[source.path.len()..];
                let relative = relative.strip_prefix(b"/").unwrap_or(relative);
                if !exclude.is_empty()
                    && exclude.excludes(&String::from_utf8_lossy(if relative.is_empty() {
                        source.name.as_bytes()
                    } else {
                        relative
                    }))
                {
                    continue;
                }
                let mode = if any_mode { entry.stat.st_mode & !0o7777 } else { entry.stat.st_mode };
                let (uid, gid) = if self.ownerless { (0, 0) } else { (entry.stat.st_uid, entry.stat.st_gid) };
                let mut line = format!("{}:", relative.len()).into_bytes();
                line.extend_from_slice(relative);
                write!(line, " {mode:o} {uid} {gid}").doing(|| "describe a file".to_owned())?;
                match FileType::from_raw_mode(entry.stat.st_mode) {
                    FileType::RegularFile => {
                        write!(line, " {} ", entry.stat.st_size).doing(|| "describe a file".to_owned())?;
                        line.extend_from_slice(&sum.unwrap_or_default());
                    }
                    FileType::Symlink => {
                        let target = self.link(&entry.path)?;
                        write!(line, " {}:", target.as_bytes().len())
                            .doing(|| "describe a link".to_owned())?;
                        line.extend_from_slice(target.as_bytes());
                    }
                    FileType::CharacterDevice | FileType::BlockDevice => {
                        write!(line, " {}", entry.stat.st_rdev).doing(|| "describe a node".to_owned())?;
                    }
                    _ => {}
                }
                self.add_xattrs(entry, &mut line)?;
                line.push(b'\n');
                hasher.update(&line);
                listing.add(&entry.path, &line);
            }
        }
        Ok((hex::encode(hasher.finalize()), listing))
    }

    pub fn link(&self, path: &[u8]) -> Result<CString> {
        rustix::fs::readlinkat(&self.root, path, Vec::new())
            .doing(|| format!("read the link /{}", String::from_utf8_lossy(path)))
    }

    /// The hash of every file, in order; several threads when there is much to read.
    fn file_hashes(&self, files: &[&Entry]) -> Result<Vec<[u8; 32]>> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
        if files.len() < 64 || threads < 2 {
            return files.iter().map(|entry| self.file_hash(entry)).collect();
        }
        let chunk = files.len().div_ceil(threads);
        std::thread::scope(|scope| {
            let workers: Vec<_> = files
                .chunks(chunk)
                .map(|part| {
                    scope.spawn(move || {
                        part.iter().map(|entry| self.file_hash(entry)).collect::<Result<Vec<_>>>()
                    })
                })
                .collect();
            let mut all = Vec::with_capacity(files.len());
            for worker in workers {
                match worker.join() {
                    Ok(part) => all.extend(part?),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok(all)
        })
    }

    fn file_hash(&self, entry: &Entry) -> Result<[u8; 32]> {
        if let Some(known) = self.known.get(&entry.path) {
            return Ok(*known);
        }
        if self.lasting
            && let Some(known) = self.hashes.get(&entry.stat)
        {
            return Ok(known);
        }
        if let Some(stack) = self.stack
            && let Some(known) = self.hashes.get_in_layers(stack, &entry.path, &entry.stat)
        {
            return Ok(known);
        }
        let what = || format!("read /{}", String::from_utf8_lossy(&entry.path));
        let file = File::from(self.open(&entry.path, OFlags::RDONLY | OFlags::NONBLOCK).doing(what)?);
        let hash = hash_file(file).doing(what)?;
        if self.lasting {
            self.hashes.put(&entry.stat, hash);
        }
        if let Some(stack) = self.stack {
            self.hashes.put_in_layers(stack, &entry.path, &entry.stat, hash);
        }
        Ok(hash)
    }
}

fn is_file(entry: &Entry) -> bool {
    FileType::from_raw_mode(entry.stat.st_mode) == FileType::RegularFile
}

fn hash_file(mut file: File) -> std::io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0_u8; 128 << 10];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hasher.finalize().into());
        }
        hasher.update(&buffer[..n]);
    }
}

/// Never out of the tree, never through a link.
pub(crate) fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

/// The path's parts, the next at the end.
pub(crate) fn parts(path: &str) -> Vec<String> {
    path.split('/').rev().filter(|part| !part.is_empty() && *part != ".").map(str::to_owned).collect()
}

pub(crate) fn join(base: &str, name: &str) -> String {
    if base.is_empty() { name.to_owned() } else { format!("{base}/{name}") }
}

/// The last part of a path.
pub(crate) fn last(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Sorted names of a directory.
pub(crate) fn names(dir: &OwnedFd) -> rustix::io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(CString::from(entry.file_name()));
        }
    }
    names.sort_unstable();
    Ok(names)
}

pub(crate) fn open_dir(path: &std::path::Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).doing(|| format!("open {}", path.display()))
}
