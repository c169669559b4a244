//! Plain copies, where there is no overlay: a container's own tree, copied from its image's files, and what has changed
//! in it since.
//!
//! Invariants: a copy is complete and synced before it stands under its name. What has changed is told by comparing
//! with the image's files; content is read only of files whose change time, which nobody in a container can set, is not
//! before the copy's end, and of those in directories that are not the ones that were copied.

mod compare;
mod copy;

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use compare::Comparison;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::error::{IoContext as _, Result};
use crate::layer::{self, LayerError, Packed, xattrs};
use crate::snapshot::{Lower, open_union};

/// The tree, within the directory of a copy.
const TREE: &str = "root";
/// Written when the copy was complete; its own change time is the end of copying. It has the inode of each directory.
const DONE: &str = "copied";
const VERSION: &[u8] = b"2\n";

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
        let inodes = copy::copy(&open_union(base)?, &fresh).map_err(|source| crate::Error::Layer {
            layer: format!("of the copy in {}", dir.display()),
            source,
        })?;
        let root = File::open(&fresh).at("open", &fresh)?;
        rustix::fs::syncfs(&root).at("sync", &fresh)?;
        fs::rename(&fresh, &tree).at("rename", &fresh)?;
        let mut mark = File::create(&done).at("create", &done)?;
        mark.write_all(&written(&inodes)).and_then(|()| mark.sync_all()).at("write", &done)?;
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
            inodes: read(&fs::read(&done).at("read", &done)?),
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

/// The inodes of directories as [`DONE`] has them: after the version number, a space and path, ended by a zero byte.
fn written(inodes: &[(Vec<u8>, u64)]) -> Vec<u8> {
    let mut text = VERSION.to_vec();
    for (path, inode) in inodes {
        text.extend_from_slice(inode.to_string().as_bytes());
        text.push(b' ');
        text.extend_from_slice(path);
        text.push(0);
    }
    text
}

/// The same, read again. Nothing of a copy that an older version made.
fn read(text: &[u8]) -> HashMap<Vec<u8>, u64> {
    let Some(text) = text.strip_prefix(VERSION) else { return HashMap::new() };
    let one = |record: &[u8]| -> Option<(Vec<u8>, u64)> {
        let space = record.iter().position(|&byte| byte == b' ')?;
        let inode = std::str::from_utf8(&record[..space]).ok()?.parse().ok()?;
        Some((record[space + 1..].to_vec(), inode))
    };
    text.split(|&byte| byte == 0).filter_map(one).collect()
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use rustix::fs::XattrFlags;

    use super::*;

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
        use std::time::{Duration, UNIX_EPOCH};
        let (_dir, replica) = replica(|image| {
            // Files alike in all but their content; directories alike in all, and with times of their own.
            for (n, (name, text)) in [("a", "aaaa"), ("b", "bbbb"), ("c", "cccc")].into_iter().enumerate() {
                let (dir, file) = (image.join(name), image.join(name).join("f"));
                fs::create_dir(&dir).unwrap();
                fs::write(&file, text).unwrap();
                File::options().write(true).open(file).unwrap().set_modified(UNIX_EPOCH).unwrap();
                let time = UNIX_EPOCH + Duration::from_secs(n as u64 / 2);
                File::open(dir).unwrap().set_modified(time).unwrap();
            }
        });
        let at = |name: &str| replica.root().join(name);
        for (from, to) in [("a", "t"), ("b", "a"), ("c", "b"), ("t", "c")] {
            fs::rename(at(from), at(to)).unwrap();
        }
        // One that has a new time as well.
        fs::write(at("c/new"), "").unwrap();
        let changes = told(&replica);
        for name in ["a/f", "b/f", "c/f"] {
            assert!(changes.contains(&(name.to_owned(), Change::Modified)), "{name}: {changes:?}");
        }
    }

    #[test]
    fn inodes_are_written_and_read() {
        let inodes = [(b"a b\n".to_vec(), 7), (Vec::new(), u64::MAX)];
        assert_eq!(read(&written(&inodes)), inodes.into_iter().collect());
        assert!(read(b"1\n").is_empty());
    }
}
