//! What a container changed in its image's files: an overlay's upper directory read as docker tells it.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use brigantine_image::Replica;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use serde::Serialize;

use super::path;
use crate::Result;
use crate::error::Context;

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    Modified = 0,
    Added = 1,
    Deleted = 2,
}

/// One changed path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Changed {
    pub path: String,
    #[serde(serialize_with = "as_number")]
    pub kind: ChangeKind,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's form of such a function")]
fn as_number<S: serde::Serializer>(kind: &ChangeKind, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u8(*kind as u8)
}

/// The changes, and what in the upper directory is the engine's own.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub changed: BTreeMap<String, ChangeKind>,
    /// Mount points that starting the container has made; absolute.
    pub engines: BTreeSet<String>,
}

/// Mount points of every container: docker keeps them in a layer of their own.
const MOUNT_POINTS: [&str; 7] =
    ["/proc", "/sys", "/dev", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/.dockerenv"];

/// The same of a plain copy.
pub(super) fn of_copy(replica: &Replica) -> Result<Changes> {
    let mut changes = Changes::default();
    let root = replica.root();
    for (path, change) in replica.changes()? {
        let path = format!("/{}", String::from_utf8_lossy(&path));
        let kind = match change {
            brigantine_image::Change::Added => ChangeKind::Added,
            brigantine_image::Change::Modified => ChangeKind::Modified,
            brigantine_image::Change::Removed => ChangeKind::Deleted,
        };
        if kind == ChangeKind::Added && MOUNT_POINTS.contains(&path.as_str()) && is_bare_at(&root, &path) {
            changes.engines.insert(path);
        } else {
            changes.changed.insert(path, kind);
        }
    }
    // Directories that differ only by mount points in them.
    let above: BTreeSet<String> =
        changes.engines.iter().filter_map(|path| Some(path.rsplit_once('/')?.0.to_owned())).collect();
    for dir in above {
        let within = format!("{dir}/");
        if changes.changed.keys().any(|path| path.starts_with(&within)) {
            continue;
        }
        if changes.changed.remove(&dir) == Some(ChangeKind::Added) {
            changes.engines.insert(dir);
        }
    }
    mark_parents(&mut changes);
    Ok(changes)
}

/// Reads `upper` against the image's files below `lower`. What is gone while it is read is no change.
pub(super) fn changes(upper: &Path, lower: impl AsFd) -> Result<Changes> {
    let what = || format!("read the container's changes in {}", upper.display());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(upper, flags, Mode::empty()).doing(what)?;
    let mut changes = Changes::default();
    let mut left = vec![String::new()];
    while let Some(dir) = left.pop() {
        let Some(opened) = open(&root, &dir).doing(what)? else { continue };
        let mut only_engines = true;
        let mut any = false;
        for entry in Dir::read_from(&opened).doing(what)? {
            let entry = entry.doing(what)?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if matches!(name, "." | "..") {
                continue;
            }
            let stat = match rustix::fs::statat(&opened, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error).doing(what),
            };
            any = true;
            let path = format!("{dir}/{name}");
            let below = look(lower.as_fd(), &path).doing(what)?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            if below.is_none() && MOUNT_POINTS.contains(&path.as_str()) && is_bare(&opened, name, &stat) {
                changes.engines.insert(path);
                continue;
            }
            only_engines = false;
            if kind == FileType::CharacterDevice && stat.st_rdev == 0 {
                if below.is_some() {
                    changes.changed.insert(path, ChangeKind::Deleted);
                }
                continue;
            }
            let is_dir = kind == FileType::Directory;
            match below {
                None => {
                    changes.changed.insert(path.clone(), ChangeKind::Added);
                }
                Some(old) if is_dir && same_directory(&old, &stat) => {}
                Some(_) => {
                    changes.changed.insert(path.clone(), ChangeKind::Modified);
                }
            }
            if is_dir {
                left.push(path);
            }
        }
        // A directory that differs only by a mount point in it.
        if any && only_engines {
            if changes.changed.get(&dir) == Some(&ChangeKind::Added) {
                changes.engines.insert(dir.clone());
            }
            changes.changed.remove(&dir);
        }
    }
    mark_parents(&mut changes);
    Ok(changes)
}

/// What was added or deleted has changed its directory, whatever the times say.
fn mark_parents(changes: &mut Changes) {
    let parents: BTreeSet<String> = changes
        .changed
        .iter()
        .filter(|(_, kind)| **kind != ChangeKind::Modified)
        .filter_map(|(path, _)| path.rsplit_once('/').map(|(parent, _)| parent.to_owned()))
        .filter(|parent| !parent.is_empty())
        .collect();
    for parent in parents {
        changes.changed.entry(parent).or_insert(ChangeKind::Modified);
    }
}

/// An empty file or directory below a root, with nothing followed.
fn is_bare_at(root: &Path, path: &str) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(root) = rustix::fs::open(root, flags, Mode::empty()) else { return false };
    let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
    let Ok(Some(parent)) = open(&root, dir) else { return false };
    match rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => is_bare(&parent, name, &stat),
        Err(_) => false,
    }
}

fn open(root: &OwnedFd, dir: &str) -> rustix::io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    match path::open(root, dir, flags) {
        Ok(dir) => Ok(Some(dir)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(error) => Err(error),
    }
}

fn look(lower: impl AsFd, path: &str) -> rustix::io::Result<Option<Stat>> {
    match path::open(lower, path, OFlags::PATH | OFlags::NOFOLLOW) {
        Ok(found) => rustix::fs::statat(&found, "", AtFlags::EMPTY_PATH).map(Some),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(error) => Err(error),
    }
}

/// An empty file or directory, as a mount point is made.
fn is_bare(parent: &OwnedFd, name: &str, stat: &Stat) -> bool {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => stat.st_size == 0,
        FileType::Directory => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let Ok(dir) = rustix::fs::openat(parent, name, flags, Mode::empty()) else { return false };
            Dir::read_from(&dir).is_ok_and(|mut entries| {
                !entries.any(|entry| {
                    entry.is_ok_and(|entry| !matches!(entry.file_name().to_bytes(), b"." | b".."))
                })
            })
        }
        _ => false,
    }
}

/// Copied up because something in it changed, and not itself.
fn same_directory(old: &Stat, new: &Stat) -> bool {
    FileType::from_raw_mode(old.st_mode) == FileType::Directory
        && old.st_mode == new.st_mode
        && (old.st_uid, old.st_gid) == (new.st_uid, new.st_gid)
        && (old.st_mtime, old.st_mtime_nsec) == (new.st_mtime, new.st_mtime_nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_added_changed_and_mount_points() {
        let dir = tempfile::tempdir().unwrap();
        let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
        for path in ["lower/etc", "lower/keep", "upper/etc", "upper/new", "upper/keep", "upper/proc"] {
            std::fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        std::fs::write(lower.join("etc/passwd"), "old").unwrap();
        std::fs::write(upper.join("etc/passwd"), "new").unwrap();
        std::fs::write(upper.join("new/file"), "").unwrap();
        std::fs::write(upper.join("keep/hosts"), "").unwrap();
        std::fs::write(upper.join("etc/hosts"), "").unwrap();
        let times = std::fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
        for tree in [&lower, &upper] {
            std::fs::File::open(tree.join("etc")).unwrap().set_times(times).unwrap();
        }
        let root = std::fs::File::open(&lower).unwrap();
        let changes = changes(&upper, &root).unwrap();
        let told: Vec<_> = changes.changed.iter().map(|(path, kind)| (path.as_str(), *kind)).collect();
        assert_eq!(
            told,
            [
                ("/etc/passwd", ChangeKind::Modified),
                ("/keep", ChangeKind::Modified),
                ("/keep/hosts", ChangeKind::Added),
                ("/new", ChangeKind::Added),
                ("/new/file", ChangeKind::Added),
            ]
        );
        assert_eq!(changes.engines.iter().collect::<Vec<_>>(), ["/etc/hosts", "/proc"]);
    }
}
