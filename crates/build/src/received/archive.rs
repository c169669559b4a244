//! Build contexts that come as an archive, time and again: what has not changed since the last one is moved, not
//! written anew.
//!
//! An archive brings every byte, so that nothing has to be believed: a file is the same only if its bytes have the same
//! SHA-256. The new tree is made beside the former one, with the same care as any, and takes from it what is the same.
//!
//! Invariant: the index says only what is on disk: it goes before the first change and comes back after the last.

use std::collections::HashMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, openat2, renameat, statat};

use super::Taken;
use super::index::{Index, Known, What, sort_key};
use crate::context::{Content, Unpacked, unpack};
use crate::error::{Context as _, Result};
use crate::snapshot::remove_tree;
use crate::tree::{beneath, open_dir};

/// Files that are larger are written anew in any case: whether they are the same is known only when they are read.
const MOST: u64 = 16 << 20;

/// The tree of the last time.
#[derive(Debug)]
pub(crate) struct Former {
    root: OwnedFd,
    files: HashMap<Vec<u8>, Known>,
}

impl Former {
    /// Whether it may hold a file of that size at that path.
    pub fn may_have(&self, path: &str, size: u64) -> bool {
        size <= MOST && self.files.get(path.as_bytes()).is_some_and(|known| known.size == size)
    }

    /// Moves the file to `name` in `dir` if it has that content: true if it did, with its mode and time as they were.
    pub fn give(&mut self, path: &str, content: &Content, dir: &OwnedFd, name: &str) -> Option<Content> {
        let known = self.files.get(path.as_bytes())?;
        if known.hash() != Some(content.hash) || known.size != content.size {
            return None;
        }
        let mtime = known.mtime.div_euclid(1_000_000_000);
        let was = Content { mode: known.mode, mtime, size: known.size, hash: content.hash };
        let (above, last) = path.rsplit_once('/').unwrap_or((".", path));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let from = openat2(&self.root, above, flags, Mode::empty(), beneath()).ok()?;
        // The index says so already; it costs little to be sure that it is a file, of that length and of one name.
        let stat = statat(&from, last, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        let whole = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
            && u64::try_from(stat.st_size) == Ok(known.size)
            && stat.st_nlink == 1;
        if !whole {
            return None;
        }
        renameat(&from, last, dir, name).ok()?;
        // Another entry of that name does not find it any more.
        self.files.remove(path.as_bytes());
        Some(was)
    }
}

/// Unpacks into the place of a kept context: the folder with the files, and what was unpacked. Blocks.
pub(crate) fn receive_archive(
    source: impl std::io::Read,
    taken: &Taken,
    dockerfile: &str,
) -> Result<(PathBuf, Unpacked)> {
    let dir = taken.dir();
    let (index, files, new) = (dir.join("index"), dir.join("files"), dir.join("new"));
    remove_tree(&new);
    let former = match Index::read(&index) {
        Some(found) => {
            let known = found.files.into_iter().filter(|known| known.is(What::File));
            let files = open_dir(&files)
                .map(|root| Former { root, files: known.map(|known| (known.path.clone(), known)).collect() });
            files.ok()
        }
        None => None,
    };
    match fs::remove_file(&index) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).doing(|| format!("remove {}", index.display()));
        }
        _ => {}
    }
    make_spread(&new)?;
    let unpacked = match unpack(source, &new, dockerfile, former) {
        Ok(unpacked) => unpacked,
        Err(error) => {
            // Part of the former tree has been moved: neither is of use to anybody.
            remove_tree(&new);
            remove_tree(&files);
            return Err(error);
        }
    };
    remove_tree(&files);
    fs::rename(&new, &files).doing(|| format!("rename {}", new.display()))?;
    let mut known: Vec<Known> = unpacked
        .files
        .iter()
        .filter_map(|(path, content)| {
            Some(Known {
                path: path.clone(),
                what: What::File as i32,
                mode: content.mode,
                size: content.size,
                // One that cannot be told is written anew each time.
                mtime: content.mtime.checked_mul(1_000_000_000)?,
                target: Vec::new(),
                hash: content.hash.to_vec(),
                state: 0,
            })
        })
        .collect();
    known.sort_by_cached_key(|known| sort_key(&known.path));
    Index::write(&index, known)?;
    Ok((files, unpacked))
}

/// A directory whose own directories lie far from each other on the disk.
fn make_spread(dir: &Path) -> Result<()> {
    fs::DirBuilder::new().mode(0o700).create(dir).doing(|| format!("create {}", dir.display()))?;
    brigantine_image::tree::spread(dir).doing(|| format!("open {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::super::Contexts;
    use super::*;

    fn archive(files: &[(&str, u32, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, mode, text) in files {
            let mut header = tar::Header::new_gnu();
            header.set_mode(*mode);
            header.set_mtime(7);
            header.set_size(text.len() as u64);
            builder.append_data(&mut header, name, text.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn what_is_the_same_is_moved_and_the_rest_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let contexts = Contexts::new(dir.path().to_owned());
        let receive = |files: &[(&str, u32, &str)]| {
            let taken = contexts.take("archive:x").unwrap();
            receive_archive(&archive(files)[..], &taken, "").unwrap().0
        };
        let look = |path: &Path| {
            let metadata = fs::metadata(path).unwrap();
            (metadata.ino(), metadata.mode() & 0o7777, fs::read_to_string(path).unwrap())
        };
        let files = receive(&[
            ("d/same", 0o644, "a"),
            ("d/other", 0o644, "b"),
            ("mode", 0o644, "c"),
            ("gone", 0o644, "d"),
        ]);
        let (same, other, mode) =
            (look(&files.join("d/same")), look(&files.join("d/other")), look(&files.join("mode")));
        // Same length, same time, another byte; and a directory where a file was.
        let files = receive(&[
            ("d/same", 0o644, "a"),
            ("d/other", 0o644, "B"),
            ("mode", 0o755, "c"),
            ("gone/in", 0o644, "d"),
        ]);
        assert_eq!(look(&files.join("d/same")), same);
        assert_eq!(look(&files.join("d/other")).2, "B");
        assert_ne!(look(&files.join("d/other")).0, other.0);
        assert_eq!(look(&files.join("mode")), (mode.0, 0o755, "c".to_owned()));
        assert_eq!(look(&files.join("gone/in")).2, "d");
        // An archive that ends too early leaves nothing that the next one would believe.
        let taken = contexts.take("archive:x").unwrap();
        let cut = &archive(&[("d/same", 0o644, "a"), ("mode", 0o755, &"c".repeat(4000))])[..2048];
        assert!(receive_archive(cut, &taken, "").is_err());
        drop(taken);
        let place = dir.path().join(fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().file_name());
        assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
        let files = receive(&[("d/same", 0o644, "a")]);
        assert_eq!(look(&files.join("d/same")).2, "a");
        assert!(!files.join("mode").exists());
    }

    #[test]
    fn what_an_archive_replaces_is_not_known_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let contexts = Contexts::new(dir.path().to_owned());
        let mut builder = tar::Builder::new(Vec::new());
        let mut add = |name: &str, kind: tar::EntryType, link: &str, text: &str| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(0o644);
            header.set_mtime(7);
            header.set_size(text.len() as u64);
            match link {
                "" => builder.append_data(&mut header, name, text.as_bytes()).unwrap(),
                link => builder.append_link(&mut header, name, link).unwrap(),
            }
        };
        add("file", tar::EntryType::Regular, "", "a");
        add("link", tar::EntryType::Regular, "", "a");
        add("hard", tar::EntryType::Regular, "", "a");
        add("other", tar::EntryType::Regular, "", "b");
        add("link", tar::EntryType::Symlink, "/etc/passwd", "");
        add("hard", tar::EntryType::Link, "other", "");
        let first = builder.into_inner().unwrap();
        let taken = contexts.take("archive:x").unwrap();
        let (files, unpacked) = receive_archive(&first[..], &taken, "").unwrap();
        assert!(!unpacked.hashes.contains_key(&b"link"[..]));
        assert_eq!(unpacked.hashes[&b"hard"[..]], unpacked.hashes[&b"other"[..]]);
        assert_eq!(unpacked.files.keys().collect::<Vec<_>>(), [b"file"]);
        let second = archive(&[
            ("file", 0o644, "a"),
            ("link", 0o644, "a"),
            ("hard", 0o600, "a"),
            ("other", 0o644, "b"),
        ]);
        receive_archive(&second[..], &taken, "").unwrap();
        for (name, text) in [("file", "a"), ("link", "a"), ("hard", "a"), ("other", "b")] {
            let metadata = fs::symlink_metadata(files.join(name)).unwrap();
            assert!(metadata.is_file() && metadata.nlink() == 1, "{name}");
            assert_eq!(fs::read_to_string(files.join(name)).unwrap(), text);
        }
    }

    #[test]
    fn what_is_kept_is_not_believed_after_another_boot() {
        let dir = tempfile::tempdir().unwrap();
        let contexts = Contexts::new(dir.path().to_owned());
        let taken = contexts.take("archive:x").unwrap();
        let sent = archive(&[("f", 0o644, "a")]);
        let (files, _) = receive_archive(&sent[..], &taken, "").unwrap();
        let first = fs::metadata(files.join("f")).unwrap().ino();
        // As a power cut leaves a file that was not synced.
        let index = taken.dir().join("index");
        let mut found = Index::read(&index).unwrap();
        found.boot = "another".to_owned();
        fs::write(&index, prost::Message::encode_to_vec(&found)).unwrap();
        fs::write(files.join("f"), "\0").unwrap();
        receive_archive(&sent[..], &taken, "").unwrap();
        assert_eq!(fs::read_to_string(files.join("f")).unwrap(), "a");
        assert_ne!(fs::metadata(files.join("f")).unwrap().ino(), first);
    }
}
