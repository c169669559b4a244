//! Build contexts that come as an archive: unpacked into a folder of the builder's own, hashed on the way.
//!
//! Invariant: nothing is written outside the folder, whatever the archive says; what `.dockerignore` leaves out is
//! read over, not kept.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, mkdirat, openat2};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use crate::error::{Context as _, Result, invalid};
use crate::pattern::clean;
use crate::received::Former;
use crate::tree::{beneath, open_dir};

/// The most entries a context may have.
const MOST_ENTRIES: u64 = 5_000_000;

/// An unpacked context.
#[derive(Debug, Default)]
pub(crate) struct Unpacked {
    pub hashes: HashMap<Vec<u8>, [u8; 32]>,
    /// The files that have one name.
    pub files: HashMap<Vec<u8>, Content>,
    /// Bytes of files.
    pub bytes: u64,
    /// The latest time of an entry, in seconds since the epoch.
    pub latest: Option<i64>,
}

/// What a file is, but for its name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Content {
    pub mode: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    pub size: u64,
    pub hash: [u8; 32],
}

/// Unpacks an archive, compressed or not; a bare Dockerfile in its place becomes a context with only that.
/// What `former` has of it is taken from there.
pub(crate) fn unpack(
    source: impl Read,
    target: &Path,
    dockerfile: &str,
    mut former: Option<Former>,
) -> Result<Unpacked> {
    let bad = |error: io::Error| invalid(format!("read the build context: {error}"));
    let mut source = io::BufReader::with_capacity(1 << 17, crate::compression::decode(source).map_err(bad)?);
    let mut head = [0_u8; 512];
    let mut have = 0;
    while have < head.len() {
        match source.read(&mut head[have..]).map_err(bad)? {
            0 => break,
            n => have += n,
        }
    }
    let root = open_dir(target)?;
    let mut unpacked = Unpacked::default();
    if have == 0 {
        return Ok(unpacked);
    }
    let padding = head[..have].iter().all(|b| *b == 0);
    if !padding && (have < head.len() || !crate::compression::is_header(&head)) {
        if head[..have].contains(&0) {
            return Err(invalid("the build context is neither a tar archive nor a Dockerfile"));
        }
        let limit = crate::dockerfile::MOST as u64 + 1;
        let mut rest = io::Cursor::new(head[..have].to_vec()).chain(source).take(limit);
        let mut text = Vec::new();
        rest.read_to_end(&mut text).map_err(bad)?;
        let name = if dockerfile.is_empty() { "Dockerfile" } else { dockerfile };
        let file = make(&root, &clean(name))?;
        write_all(file, &text)?;
        return Ok(unpacked);
    }
    let mut archive = tar::Archive::new(io::Cursor::new(head[..have].to_vec()).chain(source));
    let mut dirs: Vec<(String, u32, i64)> = Vec::new();
    let mut entries = 0_u64;
    for entry in archive.entries().map_err(bad)? {
        let mut entry = entry.map_err(bad)?;
        entries += 1;
        if entries > MOST_ENTRIES {
            return Err(invalid(format!("the build context has more than {MOST_ENTRIES} entries")));
        }
        let name = String::from_utf8(entry.path_bytes().into_owned()).map_err(|error| {
            invalid(format!(
                "the build context has a name that is not valid UTF-8: {:?}",
                String::from_utf8_lossy(error.as_bytes())
            ))
        })?;
        if name.split('/').any(|part| part == "..") {
            return Err(invalid(format!("the build context has an entry outside of it: {name:?}")));
        }
        let path = clean(&name);
        if path.is_empty() {
            continue;
        }
        let kind = entry.header().entry_type();
        let mode = entry.header().mode().map_err(bad)? & 0o7777;
        let mtime = entry.header().mtime().map_err(bad)?.cast_signed();
        let what = || format!("unpack {path:?} of the build context");
        unpacked.latest = unpacked.latest.max(Some(mtime));
        parents(&root, &path)?;
        // What is replaced is not there any more; of a directory nothing is known.
        unpacked.files.remove(path.as_bytes());
        unpacked.hashes.remove(path.as_bytes());
        if kind.is_dir() {
            remove_other(&root, &path, true)?;
            match mkdirat(&root, &path, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error).doing(what),
            }
            dirs.push((path, mode, mtime));
        } else if kind.is_symlink() {
            let link = entry.link_name_bytes().unwrap_or_default().into_owned();
            let (parent, last) = parent_of(&root, &path)?;
            remove_other(&root, &path, false)?;
            rustix::fs::symlinkat(&link[..], &parent, &last).doing(what)?;
            rustix::fs::utimensat(&parent, &last, &times(mtime), AtFlags::SYMLINK_NOFOLLOW).doing(what)?;
        } else if kind.is_hard_link() {
            let link = clean(&String::from_utf8_lossy(&entry.link_name_bytes().unwrap_or_default()));
            let (from, from_name) = parent_of(&root, &link)?;
            let (parent, last) = parent_of(&root, &path)?;
            remove_other(&root, &path, false)?;
            rustix::fs::linkat(&from, &from_name, &parent, &last, AtFlags::empty()).doing(what)?;
            // Changing one of its names would change the other: it is not for the next time.
            unpacked.files.remove(link.as_bytes());
            if let Some(hash) = unpacked.hashes.get(link.as_bytes()).copied() {
                unpacked.hashes.insert(path.into_bytes(), hash);
            }
        } else if kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse() {
            remove_other(&root, &path, false)?;
            let size = entry.size();
            let moved = match &mut former {
                Some(former) if former.may_have(&path, size) => {
                    let mut data = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
                    entry.read_to_end(&mut data).map_err(bad)?;
                    let hash = Sha256::digest(&data).into();
                    let content = Content { mode, mtime, size: data.len() as u64, hash };
                    place(&root, &path, &content, &data, former)?;
                    Some(content)
                }
                _ => None,
            };
            let content = if let Some(content) = moved {
                content
            } else {
                let (size, hash) = write(&root, &path, &mut entry, (mode, mtime))?;
                Content { mode, mtime, size, hash }
            };
            unpacked.bytes += content.size;
            unpacked.hashes.insert(path.clone().into_bytes(), content.hash);
            unpacked.files.insert(path.into_bytes(), content);
        }
        // Devices, pipes and sockets of a context are of no use in an image.
    }
    for (path, mode, mtime) in dirs.into_iter().rev() {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let what = || format!("unpack {path:?} of the build context");
        // It may have been replaced by a later entry.
        let Ok(dir) = openat2(&root, &path, flags, Mode::empty(), beneath()) else { continue };
        rustix::fs::fchmod(&dir, Mode::from_raw_mode(mode)).doing(what)?;
        rustix::fs::futimens(&dir, &times(mtime)).doing(what)?;
    }
    Ok(unpacked)
}

/// Writes what an entry brings: how much it was, and its hash.
fn write(
    root: &OwnedFd,
    path: &str,
    entry: &mut impl Read,
    (mode, mtime): (u32, i64),
) -> Result<(u64, [u8; 32])> {
    let what = || format!("unpack {path:?} of the build context");
    let mut file = make(root, path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0_u8; 64 << 10];
    let mut size = 0;
    loop {
        let n =
            entry.read(&mut buffer).map_err(|error| invalid(format!("read the build context: {error}")))?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        file.write_all(&buffer[..n]).doing(what)?;
        size += n as u64;
    }
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).doing(what)?;
    rustix::fs::futimens(&file, &times(mtime)).doing(what)?;
    Ok((size, hasher.finalize().into()))
}

/// Takes a file of the former tree that has this content, or writes it.
fn place(root: &OwnedFd, path: &str, content: &Content, data: &[u8], former: &mut Former) -> Result<()> {
    let what = || format!("unpack {path:?} of the build context");
    let (parent, last) = parent_of(root, path)?;
    let Some(was) = former.give(path, content, &parent, &last) else {
        return write(root, path, &mut io::Cursor::new(data), (content.mode, content.mtime)).map(drop);
    };
    if was.mode != content.mode {
        let mode = Mode::from_raw_mode(content.mode);
        rustix::fs::chmodat(&parent, &last, mode, AtFlags::empty()).doing(what)?;
    }
    if was.mtime != content.mtime {
        rustix::fs::utimensat(&parent, &last, &times(content.mtime), AtFlags::SYMLINK_NOFOLLOW)
            .doing(what)?;
    }
    Ok(())
}

fn times(seconds: i64) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

fn write_all(mut file: File, text: &[u8]) -> Result<()> {
    file.write_all(text).doing(|| "write the Dockerfile".to_owned())?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644)).doing(|| "write the Dockerfile".to_owned())
}

/// Directories that no entry of their own came for.
fn parents(root: &OwnedFd, path: &str) -> Result<()> {
    let Some((dir, _)) = path.rsplit_once('/') else { return Ok(()) };
    for at in dir.match_indices('/').map(|(at, _)| at).chain([dir.len()]) {
        let dir = &dir[..at];
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat2(root, dir, flags, Mode::empty(), beneath()) {
            Ok(_) => {}
            Err(Errno::NOENT) => {
                mkdirat(root, dir, Mode::from_raw_mode(0o755))
                    .doing(|| format!("make {dir:?} of the build context"))?;
            }
            Err(Errno::LOOP | Errno::NOTDIR) => {
                return Err(invalid(format!(
                    "the build context has {path:?} below {dir:?}, which is not a directory"
                )));
            }
            Err(error) => return Err(error).doing(|| format!("look at {dir:?} of the build context")),
        }
    }
    Ok(())
}

fn parent_of(root: &OwnedFd, path: &str) -> Result<(OwnedFd, String)> {
    let (dir, last) = path.rsplit_once('/').unwrap_or((".", path));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat2(root, dir, flags, Mode::empty(), beneath())
        .doing(|| format!("look at {dir:?} of the build context"))?;
    Ok((dir, last.to_owned()))
}

/// A later entry of the same name replaces an earlier one.
fn remove_other(root: &OwnedFd, path: &str, keep_dir: bool) -> Result<()> {
    let (parent, last) = parent_of(root, path)?;
    match rustix::fs::unlinkat(&parent, &last, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) if keep_dir => Ok(()),
        Err(Errno::ISDIR) => {
            Err(invalid(format!("the build context has {path:?} twice, as a directory and as a file")))
        }
        Err(error) => Err(error).doing(|| format!("replace {path:?} of the build context")),
    }
}

fn make(root: &OwnedFd, path: &str) -> Result<File> {
    parents(root, path)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::from_raw_mode(0o600), beneath())
        .map(File::from)
        .doing(|| format!("create {path:?} of the build context"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, text) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o640);
            header.set_mtime(7);
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            let data = if kind.is_file() { text.as_bytes() } else { &[] };
            if !kind.is_file() && !text.is_empty() {
                header.set_link_name_literal(text).unwrap();
            }
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn nothing_leaves_the_context() {
        use tar::EntryType as T;
        let outside = tempfile::tempdir().unwrap();
        let away = outside.path().to_str().unwrap();
        for entries in [
            vec![("../x", T::Regular, "evil")],
            vec![("a/../../x", T::Regular, "evil")],
            vec![("l", T::Symlink, away), ("l/x", T::Regular, "evil")],
            vec![("d", T::Directory, ""), ("d", T::Regular, "x")],
        ] {
            let dir = tempfile::tempdir().unwrap();
            let error = unpack(&archive(&entries)[..], dir.path(), "", None).unwrap_err();
            assert!(matches!(error, crate::Error::Invalid(_)), "{error:?}");
        }
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        let dir = tempfile::tempdir().unwrap();
        let entries = [
            ("/abs", T::Regular, "inside"),
            ("l", T::Symlink, "/etc"),
            ("l", T::Regular, "later"),
            ("h", T::Link, "abs"),
        ];
        let unpacked = unpack(&archive(&entries)[..], dir.path(), "", None).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("abs")).unwrap(), "inside");
        assert_eq!(std::fs::read_to_string(dir.path().join("l")).unwrap(), "later");
        assert_eq!(unpacked.hashes[&b"h"[..]], unpacked.hashes[&b"abs"[..]]);
    }

    #[test]
    fn a_bare_dockerfile_is_a_context() {
        let dir = tempfile::tempdir().unwrap();
        unpack(&b"FROM scratch\n"[..], dir.path(), "", None).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("Dockerfile")).unwrap(), "FROM scratch\n");
        assert!(unpack(&b"\x01\0binary"[..], dir.path(), "x", None).is_err());
        // Cut short.
        let whole = archive(&[("f", tar::EntryType::Regular, &"x".repeat(4096))]);
        let dir = tempfile::tempdir().unwrap();
        assert!(unpack(&whole[..2048], dir.path(), "", None).is_err());
    }
}
