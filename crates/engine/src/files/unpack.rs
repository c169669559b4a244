//! An archive's entries become files below a directory of a container, by docker's rules.
//!
//! The directory of each entry is opened anew below the container's root (see [`super::path`]); the entry itself is
//! made relative to it and never followed. An entry whose name or whose link's target leads out of the directory is
//! refused, as docker does, though it could not leave the container.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use brigantine_image::tar::{Entry, Kind, Reader, TarError, Time};
use brigantine_image::{decode, tree};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::path;
use crate::error::Context;
use crate::userns::Remap;
use crate::{Error, Result};

/// How an archive is unpacked.
#[derive(Debug, Clone, Default)]
pub(super) struct Rules {
    /// What the ids in the archive stand for on the host.
    pub ids: Option<Remap>,
    /// Neither a directory by something else nor something else by a directory.
    pub no_overwrite_dir_non_dir: bool,
    /// Who owns what is made, instead of what the archive says.
    pub owner: Option<(u32, u32)>,
}

/// Unpacks `archive`, compressed or not, below the directory `target` (absolute, links resolved).
pub(super) fn unpack(
    root: BorrowedFd<'_>,
    target: &str,
    archive: impl Read + Send,
    rules: Rules,
) -> Result<()> {
    let plain =
        decode(archive).map_err(|error| Error::invalid("read the archive that was sent").because(error))?;
    let mut reader = Reader::new(BufReader::with_capacity(1 << 17, plain));
    let mut unpacking = Unpacking { root, target, rules, parent: None, directories: Vec::new() };
    let mut entry = Entry::default();
    while reader.next(&mut entry).map_err(wrong_archive)? {
        unpacking.entry(&entry, &mut reader)?;
    }
    reader.drain().map_err(wrong_archive)?;
    unpacking.finish()
}

struct Unpacking<'a> {
    root: BorrowedFd<'a>,
    target: &'a str,
    rules: Rules,
    /// The directory used last.
    parent: Option<(String, OwnedFd)>,
    /// Directories whose time is set when everything is in them.
    directories: Vec<(String, Time)>,
}

impl Unpacking<'_> {
    fn entry(&mut self, entry: &Entry, reader: &mut Reader<impl io::BufRead>) -> Result<()> {
        let name = text(&entry.path)?;
        let Some(relative) = below(name) else {
            return Err(Error::invalid(format!("{name:?} is outside of {:?}", self.target)));
        };
        if relative.is_empty() {
            return Ok(());
        }
        let target = self.target;
        let what = || format!("copy {name} to {target}");
        let (dir, base) = relative.rsplit_once('/').unwrap_or(("", &relative));
        self.enter(dir).doing(what)?;
        let Some((_, parent)) = self.parent.take() else {
            return Err(Error::internal(what()));
        };
        let made = self.make(parent.as_fd(), dir, base, &relative, entry, reader);
        self.parent = Some((dir.to_owned(), parent));
        made
    }

    fn make(
        &mut self,
        parent: BorrowedFd<'_>,
        dir: &str,
        base: &str,
        relative: &str,
        entry: &Entry,
        reader: &mut Reader<impl io::BufRead>,
    ) -> Result<()> {
        let what = || format!("copy {relative} to {}", self.target);
        let is_dir = entry.kind == Kind::Directory;
        let there = match rustix::fs::statat(parent, base, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(FileType::from_raw_mode(stat.st_mode) == FileType::Directory),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(error).doing(what),
        };
        if let Some(there_dir) = there {
            if self.rules.no_overwrite_dir_non_dir && there_dir != is_dir {
                let (old, new) =
                    if there_dir { ("directory", "non-directory") } else { ("non-directory", "directory") };
                return Err(Error::invalid(format!(
                    "cannot overwrite {old} \"{}\" with {new} \"{}\"",
                    join(self.target, relative),
                    self.target
                )));
            }
            if !(there_dir && is_dir) {
                tree::remove_at(parent, base.as_bytes()).doing(what)?;
            }
        }
        let (uid, gid) = self.rules.owner.unwrap_or((entry.uid, entry.gid));
        let (uid, gid) = match &self.rules.ids {
            None => (uid, gid),
            Some(ids) => ids.outside(uid, gid).ok_or_else(|| {
                Error::invalid(format!(
                    "{}: there is no user {uid} or no group {gid} in the container",
                    what()
                ))
            })?,
        };
        let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        let mode = Mode::from_raw_mode(entry.mode & 0o7777);
        match entry.kind {
            Kind::Directory => {
                match rustix::fs::mkdirat(parent, base, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error).doing(what),
                }
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = rustix::fs::openat(parent, base, flags, Mode::empty()).doing(what)?;
                rustix::fs::fchown(&made, owner.0, owner.1).doing(what)?;
                rustix::fs::fchmod(&made, mode).doing(what)?;
                attributes(made.as_fd(), entry).doing(what)?;
                self.directories.push((relative.to_owned(), entry.mtime));
            }
            Kind::File => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = rustix::fs::openat(parent, base, flags, Mode::RUSR | Mode::WUSR).doing(what)?;
                let mut file = File::from(made);
                self.contents(&mut file, relative, entry, reader)?;
                rustix::fs::fchown(&file, owner.0, owner.1).doing(what)?;
                rustix::fs::fchmod(&file, mode).doing(what)?;
                attributes(file.as_fd(), entry).doing(what)?;
                rustix::fs::futimens(&file, &times(entry.mtime)).doing(what)?;
            }
            Kind::HardLink => {
                let link = text(&entry.link)?;
                let Some(to) = below(link) else {
                    return Err(Error::invalid(format!(
                        "invalid hardlink \"{}\" -> {link:?}: it leads out of \"{}\"",
                        join(self.target, relative),
                        self.target
                    )));
                };
                let (to_dir, to_base) = to.rsplit_once('/').unwrap_or(("", &to));
                let from = self.open(to_dir).doing(what)?;
                rustix::fs::linkat(&from, to_base, parent, base, AtFlags::empty()).doing(what)?;
                return Ok(());
            }
            Kind::Symlink => {
                let link = text(&entry.link)?;
                if below(&format!("{dir}/{link}")).is_none() {
                    return Err(Error::invalid(format!(
                        "invalid symlink \"{}\" -> {link:?}: it leads out of \"{}\"",
                        join(self.target, relative),
                        self.target
                    )));
                }
                rustix::fs::symlinkat(link, parent, base).doing(what)?;
                own_and_date(parent, base, owner, entry.mtime).doing(what)?;
            }
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                let kind = match entry.kind {
                    Kind::CharDevice => FileType::CharacterDevice,
                    Kind::BlockDevice => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = rustix::fs::makedev(entry.device.0, entry.device.1);
                rustix::fs::mknodat(parent, base, kind, mode, device).doing(what)?;
                own_and_date(parent, base, owner, entry.mtime).doing(what)?;
            }
        }
        Ok(())
    }

    fn contents(
        &self,
        file: &mut File,
        relative: &str,
        entry: &Entry,
        reader: &mut Reader<impl io::BufRead>,
    ) -> Result<()> {
        let what = || format!("copy {relative} to {}", self.target);
        let whole = [(0, entry.stored)];
        for &(offset, length) in entry.sparse.as_deref().unwrap_or(&whole) {
            file.seek(SeekFrom::Start(offset)).doing(what)?;
            let mut left = length;
            while left > 0 {
                let data = reader.data().map_err(wrong_archive)?;
                if data.is_empty() {
                    break;
                }
                let count = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
                file.write_all(&data[..count]).doing(what)?;
                reader.consume(count);
                left -= count as u64;
            }
        }
        if entry.sparse.is_some() {
            file.set_len(entry.size).doing(what)?;
        }
        Ok(())
    }

    /// Makes `dir` (relative to the target, empty for itself) the parent at hand, with what is missing of it.
    fn enter(&mut self, dir: &str) -> io::Result<()> {
        if self.parent.as_ref().is_some_and(|(known, _)| known == dir) {
            return Ok(());
        }
        let opened = match self.open(dir) {
            Err(Errno::NOENT) => {
                let mut made = String::new();
                for part in dir.split('/') {
                    let at = self.open(&made)?;
                    match rustix::fs::mkdirat(&at, part, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(error) => return Err(error.into()),
                    }
                    if !made.is_empty() {
                        made.push('/');
                    }
                    made.push_str(part);
                }
                self.open(dir)?
            }
            other => other?,
        };
        self.parent = Some((dir.to_owned(), opened));
        Ok(())
    }

    fn open(&self, dir: &str) -> rustix::io::Result<OwnedFd> {
        path::open(self.root, &join(self.target, dir), OFlags::PATH | OFlags::DIRECTORY)
    }

    /// Sets the directories' times, deepest first; one that has gone meanwhile needs none.
    fn finish(self) -> Result<()> {
        for (relative, mtime) in self.directories.iter().rev() {
            let whole = join(self.target, relative);
            match path::open(self.root, &whole, OFlags::RDONLY | OFlags::DIRECTORY) {
                Ok(dir) => {
                    rustix::fs::futimens(&dir, &times(*mtime))
                        .doing(|| format!("set the time of {whole}"))?;
                }
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(error).doing(|| format!("set the time of {whole}")),
            }
        }
        Ok(())
    }
}

fn own_and_date(
    parent: BorrowedFd<'_>,
    base: &str,
    owner: (Option<Uid>, Option<Gid>),
    mtime: Time,
) -> io::Result<()> {
    rustix::fs::chownat(parent, base, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
    rustix::fs::utimensat(parent, base, &times(mtime), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

/// Extended attributes; the host's own labels are not the archive's to set.
fn attributes(file: BorrowedFd<'_>, entry: &Entry) -> io::Result<()> {
    for (name, value) in &entry.xattrs {
        if !(name.starts_with(b"user.") || name == b"security.capability") {
            continue;
        }
        match rustix::fs::fsetxattr(file, name.as_slice(), value, XattrFlags::empty()) {
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn times(mtime: Time) -> Timestamps {
    let at = Timespec { tv_sec: mtime.seconds, tv_nsec: i64::from(mtime.nanos) };
    Timestamps { last_access: at, last_modification: at }
}

/// The path with `.`, `..` and doubled slashes taken out; `None` when it leads above where it starts.
fn below(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

fn join(target: &str, relative: &str) -> String {
    if relative.is_empty() {
        target.to_owned()
    } else {
        format!("{}/{relative}", target.trim_end_matches('/'))
    }
}

fn text(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes)
        .map_err(|error| Error::invalid("a name in the archive is not valid UTF-8").because(error))
}

fn wrong_archive(error: TarError) -> Error {
    Error::invalid("read the archive that was sent").because(error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use brigantine_image::tar::Writer;

    use super::*;

    fn archive(entries: &[(&str, Kind, &str)]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        for (path, kind, data) in entries {
            let mut entry =
                Entry { path: path.as_bytes().to_vec(), kind: *kind, mode: 0o755, ..Entry::default() };
            if matches!(kind, Kind::Symlink | Kind::HardLink) {
                entry.link = data.as_bytes().to_vec();
                writer.append(&entry, &mut io::empty()).unwrap();
            } else {
                entry.stored = data.len() as u64;
                entry.size = entry.stored;
                writer.append(&entry, &mut data.as_bytes()).unwrap();
            }
        }
        writer.finish().unwrap()
    }

    fn run(root: &std::path::Path, target: &str, archive: &[u8], rules: Rules) -> Result<()> {
        let root = File::open(root).unwrap();
        unpack(root.as_fd(), target, archive, rules)
    }

    fn own() -> Rules {
        Rules {
            owner: Some((rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())),
            ..Rules::default()
        }
    }

    #[test]
    fn links_in_the_way_lead_into_the_container_only() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        std::fs::create_dir_all(root.join("real")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        // What a container would swap in: an absolute link to a host's path, and one that climbs.
        symlink(&outside, root.join("trap")).unwrap();
        symlink("../../outside", root.join("climb")).unwrap();
        symlink("/real", root.join("inside")).unwrap();
        let bytes = archive(&[("inside/file", Kind::File, "x")]);
        run(&root, "/", &bytes, own()).unwrap();
        assert!(root.join("real/file").exists());
        for name in ["trap/file", "climb/file"] {
            let bytes = archive(&[(name, Kind::File, "x")]);
            // Either there is no such directory inside, or it is made inside.
            run(&root, "/", &bytes, own()).unwrap_err();
        }
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn entries_that_lead_out_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        for (entry, words) in [
            (("../x", Kind::File, "x"), "is outside of \"/d\""),
            (("x", Kind::Symlink, "../../etc/passwd"), "invalid symlink"),
            (("x", Kind::HardLink, "../etc/passwd"), "invalid hardlink"),
        ] {
            let error = run(dir.path(), "/d", &archive(&[entry]), own()).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
        let cut = archive(&[("file", Kind::File, "contents")]);
        run(dir.path(), "/d", &cut[..700], own()).unwrap_err();
    }

    #[test]
    fn directories_and_files_do_not_replace_each_other_when_asked_not_to() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(dir.path().join("f"), "f").unwrap();
        let rules = Rules { no_overwrite_dir_non_dir: true, ..own() };
        let error = run(dir.path(), "/", &archive(&[("d", Kind::File, "x")]), rules.clone()).unwrap_err();
        assert_eq!(error.to_string(), "cannot overwrite directory \"/d\" with non-directory \"/\"");
        let error = run(dir.path(), "/", &archive(&[("f/", Kind::Directory, "")]), rules).unwrap_err();
        assert_eq!(error.to_string(), "cannot overwrite non-directory \"/f\" with directory \"/\"");
        run(dir.path(), "/", &archive(&[("d", Kind::File, "now a file")]), own()).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("d")).unwrap(), "now a file");
    }
}
