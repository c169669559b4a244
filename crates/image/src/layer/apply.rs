//! Applying a layer: from its archive into an empty directory, in overlay's form, or over the layers below it.
//!
//! One thread decompresses and hashes, another (with a umask of its own) makes the files. Directories get their
//! owner, mode, attributes and time last, because making things in them changes these and a set-group-id bit would
//! be inherited.

use std::collections::HashSet;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::place::{Target, is_whiteout, normalise, set_opaque, split};
use super::stream::{self, Chunks};
use super::{DiffId, LayerError, MARK, OPAQUE, OPAQUE_XATTR, WHITEOUT, lossy};
use crate::compress;
use crate::digest::{Algorithm, Digest};
use crate::tar::{Entry, Kind, Reader, Time};

const DISK_BLOCK: u64 = 4096;
/// Links shorter than this live in their inode.
const INLINE_LINK: usize = 60;
const SPECIAL_BITS: u32 = 0o7000;

type Result<T> = std::result::Result<T, LayerError>;

/// What applying a layer found.
#[derive(Clone, Debug)]
pub struct Applied {
    /// Digest of the uncompressed archive.
    pub diff_id: Digest,
    /// Sum of the lengths of regular files.
    pub size: u64,
    /// What the tree takes on disk, in whole blocks.
    pub disk: u64,
    pub entries: u64,
}

/// Extracts the archive `reader` yields (compressed or not) into the empty directory `target`.
/// The caller compares the digest; until it has, and the directory is where it belongs, nobody may use the tree.
pub fn apply(reader: impl Read, target: &Path, algorithm: Algorithm) -> Result<Applied> {
    run(reader, target, DiffId::Hashed(algorithm), Names::Layers, None)
}

/// The same, with the digest from where the caller says.
pub(crate) fn apply_named(reader: impl Read, target: &Path, diff_id: DiffId<'_>) -> Result<Applied> {
    run(reader, target, diff_id, Names::Layers, None)
}

/// Extracts the archive of a whole tree, as [`super::pack`] writes it, into the empty directory `target`: there is nothing
/// below it, so nothing in it is a whiteout, and each name is a name.
pub fn apply_tree(reader: impl Read, target: &Path, algorithm: Algorithm) -> Result<Applied> {
    run(reader, target, DiffId::Hashed(algorithm), Names::Literal, None)
}

/// Extracts the archive over what the layers below it have left in `target`: what it hides is removed. Of what was found
/// `disk` tells nothing.
pub fn apply_over(reader: impl Read, target: &Path, algorithm: Algorithm) -> Result<Applied> {
    run(reader, target, DiffId::Hashed(algorithm), Names::Layers, Some(HashSet::new()))
}

/// What names that begin with `.wh.` are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    /// Whiteouts and marks.
    Layers,
    /// Files like others.
    Literal,
}

fn run(
    reader: impl Read,
    target: &Path,
    diff_id: DiffId<'_>,
    names: Names,
    over: Option<HashSet<Vec<u8>>>,
) -> Result<Applied> {
    let mut decoded = compress::decode(reader).map_err(LayerError::Read)?;
    let (feed, chunks) = stream::pipe();
    let mut hasher = diff_id.hasher();
    let found = std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            // Without it (a sandbox may forbid it) every mode is set once more.
            let exact_modes = brigantine_sys::umask::clear_for_this_thread().is_ok();
            extract(chunks, target, exact_modes, names, over)
        });
        feed.run(&mut decoded, |chunk| {
            if let Some(hasher) = &mut hasher {
                hasher.update(chunk);
            }
        });
        match writer.join() {
            Ok(found) => found,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })?;
    let diff_id = diff_id.finish(hasher)?;
    Ok(Applied { diff_id, size: found.size, disk: found.disk, entries: found.entries })
}

#[derive(Default)]
struct Found {
    size: u64,
    disk: u64,
    entries: u64,
}

fn extract(
    chunks: Chunks,
    target: &Path,
    exact_modes: bool,
    names: Names,
    over: Option<HashSet<Vec<u8>>>,
) -> Result<Found> {
    let place = Target::open(target, exact_modes, over.is_some()).map_err(|source| LayerError::Os {
        operation: "open",
        entry: target.display().to_string(),
        source,
    })?;
    let mut extraction = Extraction { place, directories: Vec::new(), found: Found::default(), names, over };
    rustix::fs::fchmod(extraction.place.root(), Mode::from_raw_mode(0o755))
        .map_err(|error| os("chmod", b"/", error))?;
    let mut reader = Reader::new(chunks);
    let mut entry = Entry::default();
    let mut path = Vec::new();
    while reader.next(&mut entry)? {
        extraction.found.entries += 1;
        normalise(&entry.path, &mut path)
            .map_err(|problem| LayerError::Entry { entry: shortened(&entry.path), problem })?;
        extraction.entry(&entry, &path, &mut reader)?;
    }
    reader.drain()?;
    extraction.finish()
}

/// What a directory gets at the end.
struct Directory {
    path: Vec<u8>,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Time,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

struct Extraction {
    place: Target,
    directories: Vec<Directory>,
    found: Found,
    names: Names,
    /// The paths this layer has, where there are others below it: a whiteout speaks of those only.
    over: Option<HashSet<Vec<u8>>>,
}

impl Extraction {
    fn entry(&mut self, entry: &Entry, path: &[u8], reader: &mut Reader<Chunks>) -> Result<()> {
        if path.is_empty() {
            if entry.kind != Kind::Directory {
                return Err(refuse(&entry.path, "the layer's root can only be a directory"));
            }
            self.describe_directory(entry, path);
            return Ok(());
        }
        let (parent_path, name) = split(path);
        let marked = || parent_path.split(|&b| b == b'/').any(|c| c.starts_with(MARK));
        if self.names == Names::Layers && (name.starts_with(WHITEOUT) || marked()) {
            return self.whiteout(path);
        }
        let parent = self.parent(parent_path)?;
        let parent = parent.as_fd();
        if self.over.is_some() {
            if entry.kind == Kind::CharDevice && entry.device == (0, 0) {
                // Overlay's own form of a whiteout.
                return self.hide(path, parent, name);
            }
            self.note(path);
        }
        match entry.kind {
            Kind::Directory => self.directory(entry, path, parent, name),
            Kind::File => self.file(entry, path, parent, name, reader),
            Kind::HardLink => self.hard_link(entry, path, parent, name),
            Kind::Symlink => {
                if entry.link.is_empty() {
                    return Err(refuse(path, "a symbolic link to nothing"));
                }
                self.make(path, parent, name, "symlink", || {
                    rustix::fs::symlinkat(&entry.link[..], parent, name)
                })?;
                if entry.link.len() >= INLINE_LINK {
                    self.found.disk += DISK_BLOCK;
                }
                self.attributes(entry, path, parent, name, false)
            }
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                let file_type = match entry.kind {
                    Kind::CharDevice => FileType::CharacterDevice,
                    Kind::BlockDevice => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = rustix::fs::makedev(entry.device.0, entry.device.1);
                let mode = Mode::from_raw_mode(entry.mode & 0o777);
                self.make(path, parent, name, "mknod", || {
                    rustix::fs::mknodat(parent, name, file_type, mode, device)
                })?;
                self.disinherit(path, parent, name)?;
                self.attributes(entry, path, parent, name, true)
            }
        }
    }

    /// The directory an entry is to be made in; what lower layers have in its way gives way.
    fn parent(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>> {
        let Some(made) = &self.over else { return self.place.directory(path) };
        if !path.is_empty() && !made.contains(path) {
            let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
            for end in ends.chain([path.len()]) {
                let (parent, name) = split(&path[..end]);
                let there = self.place.existing(parent).map_err(|error| os("open", parent, error))?;
                let Some(dir) = there else { break };
                let stat = match rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => stat,
                    Err(Errno::NOENT) => break,
                    Err(error) => return Err(os("stat", &path[..end], error)),
                };
                let is_lower = self.over.as_ref().is_some_and(|made| !made.contains(&path[..end]));
                if is_lower && FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                    self.remove(&path[..end], dir.as_fd(), name)?;
                    break;
                }
            }
        }
        let dir = self.place.directory(path)?;
        self.note(path);
        Ok(dir)
    }

    /// Remembers that this layer has the path, and those above it.
    fn note(&mut self, path: &[u8]) {
        let Some(made) = &mut self.over else { return };
        let mut path = path;
        while !path.is_empty() && made.insert(path.to_vec()) {
            path = split(path).0;
        }
    }

    fn remove(&mut self, path: &[u8], parent: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        self.place.clear(parent, name).map_err(|source| LayerError::Os {
            operation: "remove",
            entry: lossy(path),
            source,
        })
    }

    /// Removes what lower layers have at a path.
    fn hide(&mut self, path: &[u8], parent: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        if self.over.as_ref().is_some_and(|made| made.contains(path)) {
            return self.hide_below(path);
        }
        self.remove(path, parent, name)
    }

    /// Removes what lower layers have in a directory of this layer's, at any depth.
    fn hide_below(&mut self, path: &[u8]) -> Result<()> {
        let mut waiting = vec![path.to_vec()];
        while let Some(path) = waiting.pop() {
            let dir = match self.place.open_readable(&path) {
                Ok(dir) => dir,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(error) => return Err(os("open", &path, error)),
            };
            for entry in Dir::read_from(&dir).map_err(|error| os("read", &path, error))? {
                let entry = entry.map_err(|error| os("read", &path, error))?;
                let name = entry.file_name().to_bytes();
                if matches!(name, b"." | b"..") {
                    continue;
                }
                let child = if path.is_empty() { name.to_vec() } else { [&path[..], b"/", name].concat() };
                if self.over.as_ref().is_some_and(|made| made.contains(&child)) {
                    waiting.push(child);
                } else {
                    self.remove(&child, dir.as_fd(), name)?;
                }
            }
        }
        Ok(())
    }

    /// Makes an entry where one may stand already: the later wins.
    fn make<T>(
        &mut self,
        path: &[u8],
        parent: BorrowedFd<'_>,
        name: &[u8],
        operation: &'static str,
        make: impl Fn() -> rustix::io::Result<T>,
    ) -> Result<T> {
        match make() {
            Ok(made) => Ok(made),
            Err(Errno::EXIST) => {
                self.place.clear(parent, name).map_err(|source| LayerError::Os {
                    operation: "replace",
                    entry: lossy(path),
                    source,
                })?;
                make().map_err(|error| os(operation, path, error))
            }
            Err(error) => Err(os(operation, path, error)),
        }
    }

    fn disinherit(&self, path: &[u8], parent: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        self.place
            .disinherit(parent, name)
            .map_err(|error| os("remove the inherited access list of", path, error))
    }

    fn directory(&mut self, entry: &Entry, path: &[u8], parent: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => {
                self.found.disk += DISK_BLOCK;
                self.disinherit(path, parent, name)?;
            }
            Err(Errno::EXIST) => {
                let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|error| os("stat", path, error))?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                    self.make(path, parent, name, "mkdir", || {
                        rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))
                    })?;
                    self.found.disk += DISK_BLOCK;
                    self.disinherit(path, parent, name)?;
                    if self.over.is_none() && self.names == Names::Layers && is_whiteout(&stat) {
                        set_opaque(parent, name).map_err(|error| os("mark opaque", path, error))?;
                    }
                }
            }
            Err(error) => return Err(os("mkdir", path, error)),
        }
        self.describe_directory(entry, path);
        Ok(())
    }

    fn describe_directory(&mut self, entry: &Entry, path: &[u8]) {
        self.directories.push(Directory {
            path: path.to_vec(),
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: entry.xattrs.clone(),
        });
    }

    fn file(
        &mut self,
        entry: &Entry,
        path: &[u8],
        parent: BorrowedFd<'_>,
        name: &[u8],
        reader: &mut Reader<Chunks>,
    ) -> Result<()> {
        let foreign = entry.uid != 0 || entry.gid != 0;
        let late_mode = foreign || entry.mode & SPECIAL_BITS != 0 || !self.place.exact_modes;
        let mode = Mode::from_raw_mode(if late_mode { 0o600 } else { entry.mode });
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            self.make(path, parent, name, "create", || rustix::fs::openat(parent, name, flags, mode))?;
        self.disinherit(path, parent, name)?;
        match &entry.sparse {
            None => {
                copy(&file, path, reader, entry.stored)?;
                self.found.disk += entry.stored.next_multiple_of(DISK_BLOCK);
            }
            Some(map) => {
                for &(offset, length) in map {
                    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(offset))
                        .map_err(|error| os("seek in", path, error))?;
                    copy(&file, path, reader, length)?;
                    self.found.disk += length.next_multiple_of(DISK_BLOCK);
                }
                rustix::fs::ftruncate(&file, entry.size)
                    .map_err(|error| os("set the length of", path, error))?;
            }
        }
        self.found.size += entry.size;
        if foreign {
            rustix::fs::fchown(&file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
                .map_err(|error| os("chown", path, error))?;
        }
        if late_mode {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode))
                .map_err(|error| os("chmod", path, error))?;
        }
        for (attribute, value) in wanted(&entry.xattrs) {
            let attribute = attribute_name(path, attribute)?;
            set(path, attribute, rustix::fs::fsetxattr(&file, attribute, value, XattrFlags::empty()))?;
        }
        rustix::fs::futimens(&file, &times(entry.mtime)).map_err(|error| os("set the time of", path, error))
    }

    fn hard_link(&mut self, entry: &Entry, path: &[u8], parent: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        let mut source = Vec::new();
        let target = || lossy(&entry.link);
        normalise(&entry.link, &mut source)
            .map_err(|problem| refuse(path, &format!("hard link to {:?}: {problem}", target())))?;
        if source == path {
            return Ok(());
        }
        let missing = || refuse(path, &format!("hard link to {:?}, which is not in this layer", target()));
        if source.is_empty() {
            return Err(missing());
        }
        let (source_parent, source_name) = split(&source);
        let source_parent = match self.place.existing(source_parent) {
            Ok(Some(found)) => found,
            Ok(None) => return Err(missing()),
            Err(Errno::LOOP) => {
                return Err(refuse(
                    path,
                    &format!("hard link to {:?}, which leads through a symbolic link", target()),
                ));
            }
            Err(error) => return Err(os("open", &source, error)),
        };
        let link = || rustix::fs::linkat(&source_parent, source_name, parent, name, AtFlags::empty());
        match link() {
            Ok(()) => Ok(()),
            Err(Errno::NOENT) => Err(missing()),
            Err(Errno::PERM) => {
                Err(refuse(path, &format!("hard link to {:?}, which is a directory", target())))
            }
            Err(Errno::EXIST) => {
                // What goes must not be, or contain, what is to be linked.
                if source.starts_with(path) && source.get(path.len()) == Some(&b'/') {
                    return Err(refuse(path, &format!("hard link to {:?}, which is below itself", target())));
                }
                self.make(path, parent, name, "link", link)
            }
            Err(error) => Err(os("link", path, error)),
        }
    }

    /// Owner, attributes and time of what cannot be opened without doing something.
    fn attributes(
        &mut self,
        entry: &Entry,
        path: &[u8],
        parent: BorrowedFd<'_>,
        name: &[u8],
        has_mode: bool,
    ) -> Result<()> {
        let foreign = entry.uid != 0 || entry.gid != 0;
        if foreign {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|error| os("chown", path, error))?;
        }
        if has_mode && (!self.place.exact_modes || entry.mode & SPECIAL_BITS != 0) {
            // Made a moment ago and certainly no link.
            rustix::fs::chmodat(parent, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())
                .map_err(|error| os("chmod", path, error))?;
        }
        for (attribute, value) in wanted(&entry.xattrs) {
            let attribute = attribute_name(path, attribute)?;
            let link = [format!("/proc/self/fd/{}/", parent.as_raw_fd()).as_bytes(), name].concat();
            set(path, attribute, rustix::fs::lsetxattr(&link[..], attribute, value, XattrFlags::empty()))?;
        }
        rustix::fs::utimensat(parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| os("set the time of", path, error))
    }

    /// An entry whose name says that something of lower layers is hidden.
    fn whiteout(&mut self, path: &[u8]) -> Result<()> {
        let (parent_path, name) = split(path);
        if name == OPAQUE && !parent_path.split(|&b| b == b'/').any(|c| c.starts_with(MARK)) {
            self.parent(parent_path)?;
            if self.over.is_some() {
                return self.hide_below(parent_path);
            }
            let dir =
                self.place.open_readable(parent_path).map_err(|error| os("open", parent_path, error))?;
            return rustix::fs::fsetxattr(&dir, OPAQUE_XATTR, b"y", XattrFlags::empty())
                .map_err(|error| os("mark opaque", parent_path, error));
        }
        if name.starts_with(MARK) || parent_path.split(|&b| b == b'/').any(|c| c.starts_with(MARK)) {
            // Marks of storage drivers long gone.
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(refuse(path, "a whiteout of nothing that can be hidden"));
        }
        let parent = self.parent(parent_path)?;
        if self.over.is_some() {
            let path =
                if parent_path.is_empty() { hidden.to_vec() } else { [parent_path, b"/", hidden].concat() };
            return self.hide(&path, parent.as_fd(), hidden);
        }
        let made = rustix::fs::mknodat(&parent, hidden, FileType::CharacterDevice, Mode::empty(), 0);
        match made {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => {
                // The layer has the name itself; a whiteout speaks of lower layers only.
                let stat = rustix::fs::statat(&parent, hidden, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|error| os("stat", path, error))?;
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    set_opaque(&parent, hidden).map_err(|error| os("mark opaque", path, error))?;
                }
                Ok(())
            }
            Err(error) => Err(os("make a whiteout for", path, error)),
        }
    }

    /// Gives directories what they get last.
    fn finish(mut self) -> Result<Found> {
        self.place.forget();
        for entry in &self.directories {
            let path = &entry.path[..];
            let dir = match self.place.open_readable(path) {
                Ok(dir) => dir,
                // A later entry took its place.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(error) => return Err(os("open", path, error)),
            };
            if entry.uid != 0 || entry.gid != 0 {
                rustix::fs::fchown(&dir, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
                    .map_err(|error| os("chown", path, error))?;
            }
            if entry.mode != 0o755 || !self.place.exact_modes {
                rustix::fs::fchmod(&dir, Mode::from_raw_mode(entry.mode))
                    .map_err(|error| os("chmod", path, error))?;
            }
            for (attribute, value) in wanted(&entry.xattrs) {
                let attribute = attribute_name(path, attribute)?;
                set(path, attribute, rustix::fs::fsetxattr(&dir, attribute, value, XattrFlags::empty()))?;
            }
            rustix::fs::futimens(&dir, &times(entry.mtime))
                .map_err(|error| os("set the time of", path, error))?;
        }
        self.found.disk += DISK_BLOCK * (1 + self.place.implied);
        Ok(self.found)
    }
}

/// Writes data of the current entry straight from the reader's buffer.
fn copy(file: &OwnedFd, path: &[u8], reader: &mut Reader<Chunks>, mut length: u64) -> Result<()> {
    while length > 0 {
        let data = reader.data()?;
        let n = usize::try_from(length).unwrap_or(usize::MAX).min(data.len());
        let mut rest = &data[..n];
        while !rest.is_empty() {
            match rustix::io::write(file, rest) {
                Ok(written) => rest = &rest[written..],
                Err(Errno::INTR) => {}
                Err(error) => return Err(os("write", path, error)),
            }
        }
        reader.consume(n);
        length -= n as u64;
    }
    Ok(())
}

/// Attributes an archive may set: not those that steer overlay itself.
pub(super) fn wanted(xattrs: &[(Vec<u8>, Vec<u8>)]) -> impl Iterator<Item = (&[u8], &[u8])> {
    xattrs
        .iter()
        .filter(|(name, _)| !name.starts_with(b"trusted.overlay.") && !name.starts_with(b"user.overlay."))
        .map(|(name, value)| (&name[..], &value[..]))
}

fn attribute_name<'a>(path: &[u8], name: &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(name)
        .map_err(|_not_text| refuse(path, "the name of an extended attribute is not UTF-8"))
}

/// A file system or kernel that knows no such attributes does without; labels of another host's LSM mean nothing here.
fn set(path: &[u8], name: &str, result: rustix::io::Result<()>) -> Result<()> {
    match result {
        Err(Errno::OPNOTSUPP) if name != "security.capability" => Ok(()),
        Err(_) if matches!(name, "security.selinux" | "security.ima" | "security.evm") => Ok(()),
        Err(error) => Err(os("set an extended attribute of", path, error)),
        Ok(()) => Ok(()),
    }
}

fn times(mtime: Time) -> Timestamps {
    let time = Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn os(operation: &'static str, path: &[u8], error: Errno) -> LayerError {
    LayerError::Os { operation, entry: lossy(path), source: io::Error::from(error) }
}

pub(super) fn refuse(path: &[u8], problem: &str) -> LayerError {
    LayerError::Entry { entry: shortened(path), problem: problem.to_owned() }
}

/// A path for a message: hostile ones can be long.
pub(super) fn shortened(path: &[u8]) -> String {
    const SHOWN: usize = 200;
    if path.len() <= SHOWN {
        return lossy(path);
    }
    format!("{}…", lossy(&path[..SHOWN]))
}
