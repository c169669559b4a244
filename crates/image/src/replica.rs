//! Plain copies, where there is no overlay: a container's own tree, copied from its image's files, and what has changed
//! in it since.
//!
//! Invariants: a copy is complete and synced before it stands under its name. What has changed is told by comparing
//! with the image's files; content is read only of files whose change time, which nobody in a container can set, is not
//! before the copy's end.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, SeekFrom, Stat, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use crate::error::{IoContext as _, Result};
use crate::layer::{self, LayerError, Packed, xattrs};
use crate::snapshot::{Lower, open_union};

/// The tree, within the directory of a copy.
const TREE: &str = "root";
/// Written when the copy was complete; its own change time is the end of copying.
const DONE: &str = "copied";

/// What happened to a path since the copy was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Added,
    Modified,
    Removed,
}

/// A container's own copy of its image's files.
#[derive(Clone, Debug)]
pub struct Replica {
    dir: PathBuf,
    /// The image's files, top first.
    base: Vec<Lower>,
}

impl Replica {
    /// The copy in `dir`, if there is one.
    pub fn find(dir: &Path, base: &[Lower]) -> Option<Self> {
        let there = dir.join(TREE).is_dir() && dir.join(DONE).exists();
        there.then(|| Self { dir: dir.to_owned(), base: base.to_vec() })
    }

    /// The copy in `dir`, made if there is none.
    pub fn make(dir: &Path, base: &[Lower]) -> Result<Self> {
        if let Some(found) = Self::find(dir, base) {
            return Ok(found);
        }
        let (tree, fresh, done) = (dir.join(TREE), dir.join("root.new"), dir.join(DONE));
        // Of an attempt that was broken off, perhaps after the first rename.
        for left in [&fresh, &tree] {
            crate::tree::remove(left).at("remove", left)?;
        }
        fs::create_dir(&fresh).at("create", &fresh)?;
        copy(&open_union(base)?, &fresh).map_err(|source| crate::Error::Layer {
            layer: format!("of the copy in {}", dir.display()),
            source,
        })?;
        let root = File::open(&fresh).at("open", &fresh)?;
        rustix::fs::syncfs(&root).at("sync", &fresh)?;
        fs::rename(&fresh, &tree).at("rename", &fresh)?;
        let mut mark = File::create(&done).at("create", &done)?;
        mark.write_all(b"1\n").and_then(|()| mark.sync_all()).at("write", &done)?;
        File::open(dir).and_then(|dir| dir.sync_all()).at("sync", dir)?;
        Ok(Self { dir: dir.to_owned(), base: base.to_vec() })
    }

    /// The tree's root.
    pub fn root(&self) -> PathBuf {
        self.dir.join(TREE)
    }

    /// What has changed, by path (relative, no leading slash), parents first.
    pub fn changes(&self) -> Result<BTreeMap<Vec<u8>, Change>> {
        let done = self.dir.join(DONE);
        let mark = fs::metadata(&done).at("stat", &done)?;
        let base = open_union(&self.base)?;
        let root = File::open(self.root()).at("open", self.root())?;
        let mut comparison = Comparison {
            base,
            root: root.into(),
            copied: (mark.ctime(), mark.ctime_nsec()),
            found: BTreeMap::new(),
        };
        comparison.run().map_err(|source| crate::Error::Layer {
            layer: format!("of the copy in {}", self.dir.display()),
            source,
        })?;
        Ok(comparison.found)
    }

    /// Writes the layer that the changes amount to, but for those at `without` and below. The same changes give the
    /// same bytes.
    pub fn pack(&self, without: &[Vec<u8>], output: impl io::Write) -> Result<Packed> {
        let changes = self.changes()?;
        layer::pack_changes(&self.root(), &changes, without, output).map_err(|source| crate::Error::Layer {
            layer: format!("of the copy in {}", self.dir.display()),
            source,
        })
    }

    /// Bytes of the regular files that were added or modified.
    pub fn changed_bytes(&self) -> Result<u64> {
        let root = self.root();
        let mut total = 0;
        for (path, change) in self.changes()? {
            let path = root.join(std::ffi::OsStr::new(&*String::from_utf8_lossy(&path)));
            match fs::symlink_metadata(&path) {
                Ok(metadata) if change != Change::Removed && metadata.is_file() => total += metadata.len(),
                _ => {}
            }
        }
        Ok(total)
    }
}

type LayerResult<T> = std::result::Result<T, LayerError>;

fn failed(operation: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> LayerError {
    let entry = String::from_utf8_lossy(path).into_owned();
    move |error| LayerError::Os { operation, entry, source: error.into() }
}

fn failed_io(operation: &'static str, path: &[u8]) -> impl FnOnce(io::Error) -> LayerError {
    let entry = String::from_utf8_lossy(path).into_owned();
    move |source| LayerError::Os { operation, entry, source }
}

fn open_dir(root: &OwnedFd, path: &[u8]) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let name = if path.is_empty() { b"." } else { path };
    rustix::fs::openat2(root, name, flags, Mode::empty(), resolve)
}

fn open_file(dir: &OwnedFd, name: &CString) -> std::result::Result<File, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty()).map(File::from)
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn below(path: &[u8], name: &CString) -> Vec<u8> {
    if path.is_empty() { name.to_bytes().to_vec() } else { [path, b"/", name.to_bytes()].concat() }
}

/// The entries of a directory by name.
fn entries(dir: &OwnedFd, path: &[u8]) -> LayerResult<BTreeMap<CString, Stat>> {
    let mut found = BTreeMap::new();
    for entry in Dir::read_from(dir).map_err(failed("read", path))? {
        let entry = entry.map_err(failed("read", path))?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => drop(found.insert(name.to_owned(), stat)),
            // Gone meanwhile: a running container's tree changes.
            Err(Errno::NOENT) => {}
            Err(error) => return Err(failed("stat", path)(error)),
        }
    }
    Ok(found)
}

/// Copies a whole tree into the empty directory `target`: owners, modes, times, attributes, links and holes as they are.
/// Data is shared where the file system can do that.
fn copy(source: &OwnedFd, target: &Path) -> LayerResult<()> {
    let target: OwnedFd = File::open(target).map_err(failed_io("open", b"the copy"))?.into();
    // What has several names, by its first one.
    let mut links: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut directories = vec![(Vec::new(), rustix::fs::fstat(source).map_err(failed("stat", b""))?)];
    let mut waiting = vec![Vec::new()];
    while let Some(path) = waiting.pop() {
        let from = open_dir(source, &path).map_err(failed("open", &path))?;
        let to = open_dir(&target, &path).map_err(failed("open", &path))?;
        for (name, stat) in entries(&from, &path)? {
            let path = below(&path, &name);
            if kind(&stat) == FileType::Directory {
                rustix::fs::mkdirat(&to, &name, Mode::RWXU).map_err(failed("mkdir", &path))?;
                waiting.push(path.clone());
                directories.push((path, stat));
                continue;
            }
            if stat.st_nlink > 1 {
                let first = links.entry((stat.st_dev, stat.st_ino)).or_insert_with(|| path.clone());
                if *first != path {
                    rustix::fs::linkat(&target, &first[..], &to, &name, AtFlags::empty())
                        .map_err(failed("link", &path))?;
                    continue;
                }
            }
            copy_one(&from, &to, &name, &path, &stat)?;
        }
    }
    // Making things in a directory changes its time, so these come last and the deepest first.
    for (path, stat) in directories.iter().rev() {
        let from = open_dir(source, path).map_err(failed("open", path))?;
        let to = open_dir(&target, path).map_err(failed("open", path))?;
        rustix::fs::fchown(&to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))
            .map_err(failed("chown", path))?;
        rustix::fs::fchmod(&to, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(failed("chmod", path))?;
        for (name, value) in attributes_of(&from, path)? {
            set_attribute(path, &name, |name| rustix::fs::fsetxattr(&to, name, &value, XattrFlags::empty()))?;
        }
        rustix::fs::futimens(&to, &times(stat)).map_err(failed("set the time of", path))?;
    }
    Ok(())
}

fn copy_one(from: &OwnedFd, to: &OwnedFd, name: &CString, path: &[u8], stat: &Stat) -> LayerResult<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    match kind(stat) {
        FileType::RegularFile => {
            let source = open_file(from, name).map_err(failed("open", path))?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let target = rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR)
                .map_err(failed("create", path))?;
            copy_data(&source, &target, stat.st_size as u64).map_err(failed("copy", path))?;
            rustix::fs::fchown(&target, Some(uid), Some(gid)).map_err(failed("chown", path))?;
            rustix::fs::fchmod(&target, mode).map_err(failed("chmod", path))?;
            for (name, value) in attributes_of(&source, path)? {
                set_attribute(path, &name, |name| {
                    rustix::fs::fsetxattr(&target, name, &value, XattrFlags::empty())
                })?;
            }
            return rustix::fs::futimens(&target, &times(stat)).map_err(failed("set the time of", path));
        }
        FileType::Symlink => {
            let link = rustix::fs::readlinkat(from, name, Vec::new()).map_err(failed("read link", path))?;
            rustix::fs::symlinkat(link.as_c_str(), to, name).map_err(failed("symlink", path))?;
        }
        FileType::CharacterDevice | FileType::BlockDevice | FileType::Fifo => {
            rustix::fs::mknodat(to, name, kind(stat), mode, stat.st_rdev).map_err(failed("mknod", path))?;
        }
        // Sockets live only while somebody listens.
        _ => return Ok(()),
    }
    rustix::fs::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(failed("chown", path))?;
    if kind(stat) != FileType::Symlink {
        rustix::fs::chmodat(to, name, mode, AtFlags::empty()).map_err(failed("chmod", path))?;
    }
    for (attribute, value) in attributes_at(from, name, path)? {
        let at = at(to, name);
        set_attribute(path, &attribute, |attribute| {
            rustix::fs::lsetxattr(&at[..], attribute, &value, XattrFlags::empty())
        })?;
    }
    rustix::fs::utimensat(to, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(failed("set the time of", path))
}

/// Copies a file's data, holes as holes.
fn copy_data(source: &File, target: &OwnedFd, length: u64) -> std::result::Result<(), Errno> {
    if length == 0 {
        return Ok(());
    }
    if rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(());
    }
    let mut at = 0;
    while at < length {
        let start = match rustix::fs::seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => at,
            Err(error) => return Err(error),
        };
        let end = match rustix::fs::seek(source, SeekFrom::Hole(start)) {
            Ok(end) => end,
            Err(Errno::INVAL | Errno::NXIO) => length,
            Err(error) => return Err(error),
        };
        at = start;
        while at < end {
            let (mut from, mut to) = (at, at);
            let most = usize::try_from(end - at).unwrap_or(usize::MAX).min(1 << 30);
            match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), most) {
                Ok(0) => break,
                Ok(n) => at += n as u64,
                // Between these file systems the kernel does not copy by itself.
                Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                    at += copy_by_hand(source, target, at, end - at)?;
                }
                Err(error) => return Err(error),
            }
        }
        if at < end {
            break;
        }
    }
    rustix::fs::ftruncate(target, length)
}

fn copy_by_hand(source: &File, target: &OwnedFd, at: u64, length: u64) -> std::result::Result<u64, Errno> {
    let mut buffer = vec![0; usize::try_from(length).unwrap_or(usize::MAX).min(1 << 18)];
    let n = rustix::io::pread(source, &mut buffer, at)?;
    if n == 0 {
        // Shorter than it was a moment ago.
        return Err(Errno::IO);
    }
    let mut done = 0;
    while done < n {
        done += rustix::io::pwrite(target, &buffer[done..n], at + done as u64)?;
    }
    Ok(n as u64)
}

fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    }
}

type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

fn attributes_of(fd: impl AsFd, path: &[u8]) -> LayerResult<Attributes> {
    let mut found = xattrs(
        path,
        |buffer| rustix::fs::flistxattr(&fd, buffer),
        |name, buffer| rustix::fs::fgetxattr(&fd, name, buffer),
    )?;
    found.sort();
    Ok(found)
}

/// The path of what cannot be opened without doing something.
fn at(dir: &OwnedFd, name: &CString) -> Vec<u8> {
    [format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes(), name.to_bytes()].concat()
}

fn attributes_at(dir: &OwnedFd, name: &CString, path: &[u8]) -> LayerResult<Attributes> {
    let at = at(dir, name);
    let mut found = xattrs(
        path,
        |buffer| rustix::fs::llistxattr(&at[..], buffer),
        |name, buffer| rustix::fs::lgetxattr(&at[..], name, buffer),
    )?;
    found.sort();
    Ok(found)
}

/// A file system that knows no such attributes does without; capabilities it must not lose.
fn set_attribute(
    path: &[u8],
    name: &[u8],
    set: impl FnOnce(&str) -> std::result::Result<(), Errno>,
) -> LayerResult<()> {
    let Ok(name) = std::str::from_utf8(name) else { return Ok(()) };
    match set(name) {
        Err(Errno::OPNOTSUPP) if name != "security.capability" => Ok(()),
        result => result.map_err(failed("set an extended attribute of", path)),
    }
}

/// A walk through a copy and what it was made of, side by side.
struct Comparison {
    base: OwnedFd,
    root: OwnedFd,
    /// When the copy was complete.
    copied: (i64, i64),
    found: BTreeMap<Vec<u8>, Change>,
}

impl Comparison {
    fn run(&mut self) -> LayerResult<()> {
        // A directory that was moved brings files whose change time says nothing about what was here.
        let mut waiting = vec![(Vec::new(), false)];
        while let Some((path, moved)) = waiting.pop() {
            let (base, root) = (open_dir(&self.base, &path), open_dir(&self.root, &path));
            let base = base.map_err(failed("open", &path))?;
            let root = match root {
                Ok(root) => root,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(error) => return Err(failed("open", &path)(error)),
            };
            let mut before = entries(&base, &path)?;
            for (name, stat) in entries(&root, &path)? {
                let path = below(&path, &name);
                match before.remove(&name) {
                    None => self.added(path, &stat)?,
                    Some(old) if kind(&old) != kind(&stat) => {
                        self.found.insert(path.clone(), Change::Modified);
                        if kind(&stat) == FileType::Directory {
                            self.added_below(path)?;
                        }
                    }
                    Some(old) => {
                        let is_dir = kind(&stat) == FileType::Directory;
                        if !self.same((&base, &root), &name, &path, (&old, &stat), moved)? {
                            self.found.insert(path.clone(), Change::Modified);
                        }
                        if is_dir {
                            let kept_its_time =
                                (old.st_mtime, old.st_mtime_nsec) == (stat.st_mtime, stat.st_mtime_nsec);
                            waiting.push((path, moved || (self.touched(&stat) && kept_its_time)));
                        }
                    }
                }
            }
            for name in before.into_keys() {
                self.found.insert(below(&path, &name), Change::Removed);
            }
        }
        Ok(())
    }

    fn added(&mut self, path: Vec<u8>, stat: &Stat) -> LayerResult<()> {
        self.found.insert(path.clone(), Change::Added);
        if kind(stat) == FileType::Directory { self.added_below(path) } else { Ok(()) }
    }

    fn added_below(&mut self, path: Vec<u8>) -> LayerResult<()> {
        let mut waiting = vec![path];
        while let Some(path) = waiting.pop() {
            let dir = match open_dir(&self.root, &path) {
                Ok(dir) => dir,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(error) => return Err(failed("open", &path)(error)),
            };
            for (name, stat) in entries(&dir, &path)? {
                let path = below(&path, &name);
                self.found.insert(path.clone(), Change::Added);
                if kind(&stat) == FileType::Directory {
                    waiting.push(path);
                }
            }
        }
        Ok(())
    }

    /// Whether anything was done to it since the copy. The kernel's clock for this is coarse: at the same time counts.
    fn touched(&self, stat: &Stat) -> bool {
        (stat.st_ctime, stat.st_ctime_nsec as i64) >= self.copied
    }

    fn same(
        &self,
        dirs: (&OwnedFd, &OwnedFd),
        name: &CString,
        path: &[u8],
        (old, new): (&Stat, &Stat),
        moved: bool,
    ) -> LayerResult<bool> {
        let alike = old.st_mode == new.st_mode
            && (old.st_uid, old.st_gid) == (new.st_uid, new.st_gid)
            && (old.st_mtime, old.st_mtime_nsec) == (new.st_mtime, new.st_mtime_nsec);
        if !alike {
            return Ok(false);
        }
        if !moved && !self.touched(new) {
            return Ok(true);
        }
        let same = match kind(new) {
            FileType::RegularFile => {
                old.st_size == new.st_size && same_content(dirs, name).map_err(failed_io("compare", path))?
            }
            FileType::Symlink => {
                let link = |dir| rustix::fs::readlinkat(dir, name, Vec::new());
                link(dirs.0).map_err(failed("read link", path))?
                    == link(dirs.1).map_err(failed("read link", path))?
            }
            FileType::CharacterDevice | FileType::BlockDevice => old.st_rdev == new.st_rdev,
            _ => true,
        };
        Ok(same && attributes_at(dirs.0, name, path)? == attributes_at(dirs.1, name, path)?)
    }
}

fn same_content((old, new): (&OwnedFd, &OwnedFd), name: &CString) -> io::Result<bool> {
    let (mut old, mut new) = (open_file(old, name)?, open_file(new, name)?);
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let n = old.read(&mut left)?;
        if n == 0 {
            return Ok(new.read(&mut right[..1])? == 0);
        }
        match new.read_exact(&mut right[..n]) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            result => result?,
        }
        if left[..n] != right[..n] {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    fn replica(fill: impl FnOnce(&Path)) -> (tempfile::TempDir, Replica) {
        let dir = tempfile::tempdir().unwrap();
        let (image, own) = (dir.path().join("image"), dir.path().join("own"));
        fs::create_dir_all(image.join("d/e")).unwrap();
        fs::create_dir(&own).unwrap();
        fill(&image);
        let replica = Replica::make(&own, &[Lower::directory(image)]).unwrap();
        (dir, replica)
    }

    fn told(replica: &Replica) -> Vec<(String, Change)> {
        let changes = replica.changes().unwrap();
        changes.into_iter().map(|(path, change)| (String::from_utf8(path).unwrap(), change)).collect()
    }

    #[test]
    fn a_copy_is_exact_and_has_no_changes() {
        let (dir, replica) = replica(|image| {
            fs::write(image.join("d/f"), "text").unwrap();
            fs::set_permissions(image.join("d/f"), fs::Permissions::from_mode(0o4751)).unwrap();
            std::os::unix::fs::chown(image.join("d"), Some(12), Some(34)).unwrap();
            fs::hard_link(image.join("d/f"), image.join("hard")).unwrap();
            symlink("d/f", image.join("soft")).unwrap();
            let sparse = File::create(image.join("sparse")).unwrap();
            sparse.set_len(8 << 20).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (8 << 20) - 3).unwrap();
            rustix::fs::setxattr(image.join("d/e"), "user.a", b"b", XattrFlags::empty()).unwrap();
        });
        let root = replica.root();
        let metadata = fs::metadata(root.join("d/f")).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.nlink()), (0o4751, 2));
        assert_eq!(metadata.ino(), fs::metadata(root.join("hard")).unwrap().ino());
        assert!(fs::metadata(root.join("sparse")).unwrap().blocks() < 100);
        let before = fs::metadata(dir.path().join("image/d")).unwrap();
        let after = fs::metadata(root.join("d")).unwrap();
        assert_eq!((before.mtime_nsec(), 12, 34), (after.mtime_nsec(), after.uid(), after.gid()));
        assert_eq!(told(&replica), []);
        assert_eq!(replica.pack(&[], io::sink()).unwrap().entries, 0);
    }

    #[test]
    fn every_kind_of_change_is_told() {
        let (_dir, replica) = replica(|image| {
            for name in ["same", "longer", "forged", "mode", "gone", "d/x", "d/e/y", "becomes"] {
                fs::write(image.join(name), "12345").unwrap();
            }
            fs::create_dir(image.join("other")).unwrap();
            fs::write(image.join("other/x"), "54321").unwrap();
        });
        let root = replica.root();
        fs::write(root.join("longer"), "123456").unwrap();
        // The same length, and the time put back: only the change time gives it away.
        let time = fs::metadata(root.join("forged")).unwrap().modified().unwrap();
        fs::write(root.join("forged"), "54321").unwrap();
        File::options().write(true).open(root.join("forged")).unwrap().set_modified(time).unwrap();
        fs::set_permissions(root.join("mode"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::remove_file(root.join("gone")).unwrap();
        fs::remove_file(root.join("becomes")).unwrap();
        fs::create_dir_all(root.join("becomes/deep")).unwrap();
        rustix::fs::setxattr(root.join("d/e/y"), "user.a", b"b", XattrFlags::empty()).unwrap();
        let changes = told(&replica);
        use Change::{Added, Modified, Removed};
        for expected in [
            ("becomes", Modified),
            ("becomes/deep", Added),
            ("d/e/y", Modified),
            ("forged", Modified),
            ("gone", Removed),
            ("longer", Modified),
            ("mode", Modified),
        ] {
            assert!(changes.contains(&(expected.0.to_owned(), expected.1)), "{expected:?} in {changes:?}");
        }
        assert_eq!(changes.len(), 7, "{changes:?}");
    }

    #[test]
    fn a_moved_directory_is_compared_by_content() {
        let same = |path: PathBuf, text: &str| {
            fs::write(&path, text).unwrap();
            File::options().write(true).open(path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        };
        let (_dir, replica) = replica(|image| {
            for (name, text) in [("a", "aaaa"), ("b", "bbbb")] {
                fs::create_dir(image.join(name)).unwrap();
                same(image.join(name).join("f"), text);
                File::open(image.join(name)).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
            }
        });
        let root = replica.root();
        fs::rename(root.join("a"), root.join("t")).unwrap();
        fs::rename(root.join("b"), root.join("a")).unwrap();
        fs::rename(root.join("t"), root.join("b")).unwrap();
        let changes = told(&replica);
        assert!(changes.contains(&("a/f".to_owned(), Change::Modified)), "{changes:?}");
        assert!(changes.contains(&("b/f".to_owned(), Change::Modified)), "{changes:?}");
    }
}
