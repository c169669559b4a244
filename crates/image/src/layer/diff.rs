//! Making a layer's archive: of what a container changed (an overlay's upper directory), or of a whole tree.
//!
//! The order is by name, directories before what they contain, so that the same tree gives the same bytes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read as _, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::place::is_whiteout;
use super::{LayerError, OPAQUE, OPAQUE_XATTR, PATH_MAX, WHITEOUT, lossy};
use crate::replica::Change;
use crate::tar::{Entry, Kind, Time, Writer};

type Result<T> = std::result::Result<T, LayerError>;

/// What was packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    pub entries: u64,
    /// Sum of the lengths of regular files.
    pub size: u64,
}

/// From a user and a group on this host to those that an archive is to say.
pub type Owners = Box<dyn Fn(u32, u32) -> (u32, u32)>;

/// Writes the layer that an overlay's upper directory amounts to: whiteouts and opaque directories in OCI's form.
pub fn pack_upper(upper: &Path, output: impl Write) -> Result<Packed> {
    pack_upper_without(upper, &[], output)
}

/// The same without what is at these paths (relative, no leading slash), and what is below them.
pub fn pack_upper_without(upper: &Path, without: &[Vec<u8>], output: impl Write) -> Result<Packed> {
    let mut packing = Packing::new(open_root(upper)?, output, true);
    packing.without = without;
    packing.run()
}

/// Writes the layer that these changes of a tree amount to, but for what is at `without` and below: whiteouts for what
/// was removed, and the directories above what changed.
pub(crate) fn pack_changes(
    tree: &Path,
    changes: &BTreeMap<Vec<u8>, Change>,
    without: &[Vec<u8>],
    output: impl Write,
) -> Result<Packed> {
    let mut packing = Packing::new(open_root(tree)?, output, false);
    packing.changes(changes, without)?;
    packing.writer.finish().map_err(LayerError::Write)?;
    Ok(packing.packed)
}

/// Writes a whole tree as it is.
pub fn pack(tree: &Path, output: impl Write) -> Result<Packed> {
    Packing::new(open_root(tree)?, output, false).run()
}

/// Writes what the directory `parent` has under `base`, with everything below it, as `name`. Links are not followed.
/// With an empty `base` it is `parent` itself. `owners` says what user and group an entry is to have instead of its
/// own on this host.
pub fn pack_as(
    parent: OwnedFd,
    base: &[u8],
    name: &[u8],
    output: impl Write,
    owners: Option<Owners>,
) -> Result<Packed> {
    let (root, dir) = if base.is_empty() {
        (parent, true)
    } else {
        let stat = rustix::fs::statat(&parent, base, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| os("stat", base, error))?;
        (parent, FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
    };
    if dir {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let base = if base.is_empty() { b"." } else { base };
        let root =
            rustix::fs::openat(&root, base, flags, Mode::empty()).map_err(|error| os("open", base, error))?;
        let stat = rustix::fs::fstat(&root).map_err(|error| os("stat", base, error))?;
        let mut packing = Packing::new(root, output, false);
        packing.prefix = name.to_vec();
        packing.owners = owners;
        packing.directory(&[], &stat)?;
        return packing.run();
    }
    let name = CString::new(name).map_err(|source| LayerError::Os {
        operation: "name",
        entry: lossy(name),
        source: source.into(),
    })?;
    let base = CString::new(base).map_err(|source| LayerError::Os {
        operation: "open",
        entry: lossy(base),
        source: source.into(),
    })?;
    let stat = rustix::fs::statat(&root, &base, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|error| os("stat", base.to_bytes(), error))?;
    let dir = root.try_clone().map_err(LayerError::Read)?;
    let mut packing = Packing::new(root, output, false);
    packing.owners = owners;
    packing.one(&dir, &base, name.to_bytes(), &stat)?;
    packing.writer.finish().map_err(LayerError::Write)?;
    Ok(packing.packed)
}

fn open_root(path: &Path) -> Result<OwnedFd> {
    let file = File::open(path).map_err(|source| LayerError::Os {
        operation: "open",
        entry: path.display().to_string(),
        source,
    })?;
    Ok(file.into())
}

struct Packing<'a, W> {
    root: OwnedFd,
    writer: Writer<W>,
    overlay: bool,
    /// Goes before every path.
    prefix: Vec<u8>,
    /// Paths to leave out.
    without: &'a [Vec<u8>],
    owners: Option<Owners>,
    /// The first name of files with several.
    links: HashMap<(u64, u64), Vec<u8>>,
    packed: Packed,
}

/// A directory half packed.
struct Frame {
    path: Vec<u8>,
    /// What is left to do, the next at the end.
    names: Vec<CString>,
}

impl<W: Write> Packing<'_, W> {
    fn new(root: OwnedFd, output: W, overlay: bool) -> Self {
        Self {
            root,
            writer: Writer::new(output),
            overlay,
            prefix: Vec::new(),
            without: &[],
            owners: None,
            links: HashMap::new(),
            packed: Packed::default(),
        }
    }

    fn run(mut self) -> Result<Packed> {
        let mut dir = self.open(&[])?;
        let mut stack = vec![Frame { path: Vec::new(), names: names(&dir, &[])? }];
        while let Some(frame) = stack.last_mut() {
            let Some(name) = frame.names.pop() else {
                stack.pop();
                // A directory that has gone meanwhile has nothing more to give.
                while let Some(parent) = stack.last_mut() {
                    match self.reopen(&parent.path)? {
                        Some(again) => {
                            dir = again;
                            break;
                        }
                        None => parent.names.clear(),
                    }
                    stack.pop();
                }
                continue;
            };
            let mut path = frame.path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name.to_bytes());
            if path.len() > PATH_MAX {
                let problem = format!("a path of {} bytes: at most {PATH_MAX} are possible", path.len());
                return Err(LayerError::Entry { entry: lossy(&path[..200]), problem });
            }
            if self.without.contains(&path) {
                continue;
            }
            let stat = match rustix::fs::statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                // Gone meanwhile: the tree of a running container changes.
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(os("stat", &path, error)),
            };
            if self.one(&dir, &name, &path, &stat)? {
                let Some(child) = self.reopen(&path)? else { continue };
                dir = child;
                if self.overlay && is_opaque(&dir).map_err(|error| os("read attributes of", &path, error))? {
                    self.mark([&path[..], b"/", OPAQUE].concat())?;
                }
                let names = names(&dir, &path)?;
                stack.push(Frame { path, names });
            }
        }
        self.writer.finish().map_err(LayerError::Write)?;
        Ok(self.packed)
    }

    fn changes(&mut self, changes: &BTreeMap<Vec<u8>, Change>, without: &[Vec<u8>]) -> Result<()> {
        let mut written: HashSet<&[u8]> = HashSet::new();
        for (path, change) in changes {
            let below =
                |dir: &Vec<u8>| path.strip_prefix(&dir[..]).is_some_and(|rest| rest.first() == Some(&b'/'));
            if without.iter().any(|dir| dir == path || below(dir)) {
                continue;
            }
            // The directories above it, which may not have changed themselves.
            for (end, _) in path.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
                if written.insert(&path[..end]) {
                    self.at(&path[..end])?;
                }
            }
            if !written.insert(path) {
                continue;
            }
            match change {
                Change::Removed => {
                    let at = path.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
                    self.mark([&path[..at], WHITEOUT, &path[at..]].concat())?;
                }
                // What took another's place hides all that was in it.
                Change::Added | Change::Modified => self.at(path)?,
            }
        }
        Ok(())
    }

    /// Writes what is at a path, without what is below it.
    fn at(&mut self, path: &[u8]) -> Result<()> {
        let slash = path.iter().rposition(|&byte| byte == b'/');
        let (parent, name) = slash.map_or((&[][..], path), |slash| (&path[..slash], &path[slash + 1..]));
        let Some(dir) = self.reopen(parent)? else { return Ok(()) };
        let Ok(name) = CString::new(name) else { return Ok(()) };
        match rustix::fs::statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => self.one(&dir, &name, path, &stat).map(drop),
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(os("stat", path, error)),
        }
    }

    /// A directory met before; `None` when it has gone or become something else: a running container's tree changes.
    fn reopen(&self, path: &[u8]) -> Result<Option<OwnedFd>> {
        match self.open(path) {
            Ok(dir) => Ok(Some(dir)),
            Err(LayerError::Os { source, .. })
                if !self.overlay
                    && matches!(
                        Errno::from_io_error(&source),
                        Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
                    ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn open(&self, path: &[u8]) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let name = if path.is_empty() { b"." } else { path };
        rustix::fs::openat2(&self.root, name, flags, Mode::empty(), resolve)
            .map_err(|error| os("open", path, error))
    }

    /// Writes one entry; true for a directory whose content is to follow.
    fn one(&mut self, dir: &OwnedFd, name: &CString, path: &[u8], stat: &Stat) -> Result<bool> {
        let mut entry = entry(path, stat);
        let file_type = FileType::from_raw_mode(stat.st_mode);
        if self.overlay && is_whiteout(stat) {
            let at = path.len() - name.to_bytes().len();
            self.mark([&path[..at], WHITEOUT, name.to_bytes()].concat())?;
            return Ok(false);
        }
        if file_type != FileType::Directory && stat.st_nlink > 1 {
            let key = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.links.get(&key) {
                entry.kind = Kind::HardLink;
                entry.link.clone_from(first);
                self.append(&mut entry, &mut io::empty())?;
                return Ok(false);
            }
            self.links.insert(key, path.to_vec());
        }
        match file_type {
            FileType::Directory => return self.directory(path, stat),
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
                    Ok(file) => File::from(file),
                    Err(Errno::NOENT) => return Ok(false),
                    Err(error) => return Err(os("open", path, error)),
                };
                entry.stored = stat.st_size as u64;
                entry.size = entry.stored;
                entry.xattrs = xattrs(
                    path,
                    |buffer| rustix::fs::flistxattr(&file, buffer),
                    |name, buffer| rustix::fs::fgetxattr(&file, name, buffer),
                )?;
                self.packed.size += entry.size;
                // A file that shrinks while it is read is filled up with zeros.
                self.append(&mut entry, &mut file.chain(io::repeat(0)))?;
                return Ok(false);
            }
            FileType::Symlink => {
                entry.kind = Kind::Symlink;
                entry.link = match rustix::fs::readlinkat(dir, name, Vec::new()) {
                    Ok(link) => link.into_bytes(),
                    Err(Errno::NOENT) => return Ok(false),
                    Err(error) => return Err(os("read link", path, error)),
                };
            }
            FileType::CharacterDevice | FileType::BlockDevice => {
                entry.kind = match file_type {
                    FileType::CharacterDevice => Kind::CharDevice,
                    _ => Kind::BlockDevice,
                };
                entry.device = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
            }
            FileType::Fifo => entry.kind = Kind::Fifo,
            // Sockets live only while somebody listens.
            _ => return Ok(false),
        }
        self.append(&mut entry, &mut io::empty())?;
        Ok(false)
    }

    /// Writes a directory's own entry; false when it has gone.
    fn directory(&mut self, path: &[u8], stat: &Stat) -> Result<bool> {
        let Some(child) = self.reopen(path)? else { return Ok(false) };
        let mut entry = entry(path, stat);
        entry.kind = Kind::Directory;
        if !path.is_empty() {
            entry.path.push(b'/');
        }
        entry.xattrs = xattrs(
            path,
            |buffer| rustix::fs::flistxattr(&child, buffer),
            |name, buffer| rustix::fs::fgetxattr(&child, name, buffer),
        )?;
        self.append(&mut entry, &mut io::empty())?;
        Ok(true)
    }

    /// Writes an entry that says something by its name.
    fn mark(&mut self, path: Vec<u8>) -> Result<()> {
        self.append(&mut Entry { path, ..Entry::default() }, &mut io::empty())
    }

    fn append(&mut self, entry: &mut Entry, data: &mut dyn io::Read) -> Result<()> {
        self.packed.entries += 1;
        if let Some(owners) = &self.owners {
            (entry.uid, entry.gid) = owners(entry.uid, entry.gid);
        }
        if !self.prefix.is_empty() {
            let prefixed = |path: &[u8]| [&self.prefix[..], b"/", path].concat();
            entry.path = prefixed(&entry.path);
            if entry.kind == Kind::HardLink {
                entry.link = prefixed(&entry.link);
            }
        }
        self.writer.append(entry, data).map_err(LayerError::Write)
    }
}

/// An entry with what all kinds have.
fn entry(path: &[u8], stat: &Stat) -> Entry {
    Entry {
        path: path.to_vec(),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: Time { seconds: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 },
        ..Entry::default()
    }
}

/// The names in a directory, last first.
fn names(dir: &OwnedFd, path: &[u8]) -> Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir).map_err(|error| os("read", path, error))? {
        let entry = entry.map_err(|error| os("read", path, error))?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(CString::from(entry.file_name()));
        }
    }
    names.sort_unstable_by(|a, b| b.cmp(a));
    Ok(names)
}

fn is_opaque(dir: impl AsFd) -> rustix::io::Result<bool> {
    let mut value = [0u8; 1];
    match rustix::fs::fgetxattr(dir, OPAQUE_XATTR, &mut value) {
        Ok(n) => Ok(n == 1 && value == *b"y"),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(false),
        Err(error) => Err(error),
    }
}

/// All attributes that belong to the content rather than to this host.
pub(crate) fn xattrs(
    path: &[u8],
    list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
    get: impl Fn(&str, &mut [u8]) -> rustix::io::Result<usize>,
) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    // The kernel's limits for the list and for a value.
    const MAX: usize = 64 << 10;
    let mut buffer = [0u8; 4096];
    let listed = match list(&mut buffer) {
        Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Ok(n) => buffer[..n].to_vec(),
        Err(Errno::RANGE) => {
            let mut large = vec![0u8; MAX];
            let n = list(&mut large).map_err(|error| os("read attributes of", path, error))?;
            large.truncate(n);
            large
        }
        Err(error) => return Err(os("read attributes of", path, error)),
    };
    let mut found = Vec::new();
    let mut value = vec![0u8; MAX];
    for name in listed.split(|&b| b == 0).filter(|name| !name.is_empty()) {
        let Ok(text) = std::str::from_utf8(name) else { continue };
        if text == "trusted.overlay.redirect" || text == "trusted.overlay.metacopy" {
            return Err(LayerError::Entry {
                entry: lossy(path),
                problem: format!(
                    "{text} is set: the overlay was mounted with an option layers cannot express"
                ),
            });
        }
        if text.starts_with("trusted.overlay.")
            || text.starts_with("user.overlay.")
            || matches!(text, "security.selinux" | "security.ima" | "security.evm")
        {
            continue;
        }
        match get(text, &mut value) {
            Ok(n) => found.push((name.to_vec(), value[..n].to_vec())),
            Err(Errno::NODATA) => {}
            Err(error) => return Err(os("read an attribute of", path, error)),
        }
    }
    Ok(found)
}

fn os(operation: &'static str, path: &[u8], error: Errno) -> LayerError {
    LayerError::Os { operation, entry: lossy(path), source: io::Error::from(error) }
}
