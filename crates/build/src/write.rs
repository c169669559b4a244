//! Writing a step's files: into the upper directory of its snapshot, as overlay would have them there.
//!
//! Nothing is mounted. What is below is only looked at; a directory that is there below is mirrored in the upper
//! directory with its owner, mode and times before something is put into it, so that the union changes nothing else
//! and the same inputs give the same layer. No link of either side is followed by the kernel.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, mkdirat, openat2, unlinkat,
    utimensat,
};
use rustix::io::Errno;

use crate::chmod::Chmod;
use crate::error::{Context, Error, Result, invalid};
use crate::pattern::{Ignore, clean};
use crate::tree::{Entry, Selected, Tree, beneath, join, last};
use crate::xattrs;

/// What files get that have no time of their own when nothing else is asked for: 1980-01-01, the oldest that every
/// archive format can hold.
pub(crate) const NO_TIME: i64 = 315_532_800;

/// Owner, mode and time of something to be written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub seconds: i64,
    pub nanos: u32,
}

impl Attributes {
    fn of(stat: &Stat) -> Self {
        Self {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            seconds: stat.st_mtime,
            nanos: stat.st_mtime_nsec as u32,
        }
    }

    fn times(self) -> Timestamps {
        let time = Timespec { tv_sec: self.seconds, tv_nsec: i64::from(self.nanos) };
        Timestamps { last_access: time, last_modification: time }
    }
}

/// How sources are to be copied.
#[derive(Debug, Clone, Default)]
pub(crate) struct CopyOptions {
    pub owner: Option<(u32, u32)>,
    pub chmod: Option<Chmod>,
    pub parents: bool,
    pub exclude: Ignore,
    /// Archives among the sources are unpacked (ADD).
    pub unpack: bool,
}

/// Writes into one upper directory.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    lower: Option<&'a Tree>,
    upper: OwnedFd,
    /// First path of files with several names, by identity in their source.
    links: HashMap<(u64, u64), Vec<u8>>,
    cancelled: Arc<AtomicBool>,
    /// Time of what has none.
    time: i64,
}

impl<'a> Writer<'a> {
    pub fn new(
        lower: Option<&'a Tree>,
        upper: OwnedFd,
        time: Option<i64>,
        cancelled: Arc<AtomicBool>,
    ) -> Self {
        Self { lower, upper, links: HashMap::new(), cancelled, time: time.unwrap_or(NO_TIME) }
    }

    fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }

    fn plain(&self, mode: u32, owner: (u32, u32)) -> Attributes {
        Attributes { mode, uid: owner.0, gid: owner.1, seconds: self.time, nanos: 0 }
    }

    fn in_upper(&self, path: &[u8]) -> Result<Option<Stat>> {
        if path.is_empty() {
            return Ok(Some(rustix::fs::fstat(&self.upper).doing(|| "stat the snapshot".to_owned())?));
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat2(&self.upper, path, flags, Mode::empty(), beneath()) {
            Ok(fd) => Ok(Some(rustix::fs::fstat(&fd).doing(|| "stat the snapshot".to_owned())?)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(error).doing(|| format!("look up /{}", lossy(path))),
        }
    }

    fn lookup(&self, path: &str) -> Result<Option<Stat>> {
        match self.in_upper(path.as_bytes())? {
            Some(stat) => Ok(Some(stat)),
            None => self.lower.map_or(Ok(None), |lower| lower.stat(path)),
        }
    }

    fn is_dir(&self, path: &str) -> Result<bool> {
        Ok(self.lookup(path)?.is_some_and(|stat| kind(&stat) == FileType::Directory))
    }

    /// The path with links resolved as far as it exists; what does not exist stays as it is.
    pub fn resolve(&self, path: &str) -> Result<String> {
        let mut links = 0;
        let mut done: Vec<String> = Vec::new();
        let mut todo: Vec<String> =
            path.split('/').rev().filter(|p| !p.is_empty() && *p != ".").map(str::to_owned).collect();
        while let Some(part) = todo.pop() {
            if part == ".." {
                done.pop();
                continue;
            }
            done.push(part);
            let here = done.join("/");
            let Some(stat) = self.lookup(&here)? else { continue };
            if kind(&stat) != FileType::Symlink {
                continue;
            }
            links += 1;
            if links > 40 {
                return Err(invalid(format!("{path}: too many levels of symbolic links")));
            }
            let target = match rustix::fs::readlinkat(&self.upper, &here, Vec::new()) {
                Ok(target) => target,
                Err(_not_here) => match self.lower {
                    Some(lower) => lower.link(here.as_bytes())?,
                    None => return Err(Error::NotFound(format!("{here} is gone"))),
                },
            };
            let target = target.to_string_lossy().into_owned();
            done.pop();
            if target.starts_with('/') {
                done.clear();
            }
            todo.extend(target.split('/').rev().filter(|p| !p.is_empty() && *p != ".").map(str::to_owned));
        }
        Ok(done.join("/"))
    }

    /// Makes a directory and those above it that are missing; what is there below is mirrored. True if it was made new.
    pub fn mkdirs(&mut self, path: &str, new: Attributes) -> Result<bool> {
        let mut here = String::new();
        let mut made = false;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            here = join(&here, part);
            made = self.mkdir(&here, new)?;
        }
        Ok(made)
    }

    /// One directory whose parent is in the upper directory already; true if it was there nowhere.
    fn mkdir(&mut self, path: &str, new: Attributes) -> Result<bool> {
        if let Some(stat) = self.in_upper(path.as_bytes())? {
            return if kind(&stat) == FileType::Directory {
                Ok(false)
            } else {
                Err(invalid(format!("cannot copy to non-directory: /{path}")))
            };
        }
        let below = self.lower.map_or(Ok(None), |lower| lower.stat(path))?;
        match below {
            Some(stat) if kind(&stat) != FileType::Directory => {
                Err(invalid(format!("cannot copy to non-directory: /{path}")))
            }
            Some(stat) => {
                self.new_dir(path, Attributes::of(&stat))?;
                self.mirror_xattrs(path)?;
                // Copying attributes has touched nothing but the inode; the time is set last.
                self.touch(path.as_bytes(), Attributes::of(&stat))?;
                Ok(false)
            }
            None => {
                self.new_dir(path, new)?;
                Ok(true)
            }
        }
    }

    fn new_dir(&self, path: &str, attributes: Attributes) -> Result<()> {
        let what = || format!("make the directory /{path}");
        let (parent, name) = self.parent(path.as_bytes())?;
        mkdirat(&parent, &name[..], Mode::from_raw_mode(0o700)).doing(what)?;
        Self::dress_dir(&parent, &name, attributes).doing(what)
    }

    fn dress_dir(parent: &OwnedFd, name: &[u8], attributes: Attributes) -> rustix::io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = openat2(parent, name, flags, Mode::empty(), beneath())?;
        rustix::fs::fchown(&dir, Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)))?;
        rustix::fs::fchmod(&dir, Mode::from_raw_mode(attributes.mode))?;
        rustix::fs::futimens(&dir, &attributes.times())
    }

    fn mirror_xattrs(&self, path: &str) -> Result<()> {
        let Some(lower) = self.lower else { return Ok(()) };
        let what = || format!("copy the attributes of /{path}");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let from = lower.open(path.as_bytes(), flags).doing(what)?;
        let to =
            openat2(&self.upper, path, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), beneath())
                .doing(what)?;
        xattrs::copy(from.as_fd(), to.as_fd()).doing(what)
    }

    fn touch(&self, path: &[u8], attributes: Attributes) -> Result<()> {
        let (parent, name) = self.parent(path)?;
        utimensat(&parent, &name[..], &attributes.times(), AtFlags::SYMLINK_NOFOLLOW)
            .doing(|| format!("set the time of /{}", lossy(path)))
    }

    /// The descriptor of a path's directory in the upper directory, and its last part.
    fn parent(&self, path: &[u8]) -> Result<(OwnedFd, Vec<u8>)> {
        let at = path.iter().rposition(|b| *b == b'/');
        let (dir, name) = match at {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&b"."[..], path),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = openat2(&self.upper, dir, flags, Mode::empty(), beneath())
            .doing(|| format!("open the directory of /{}", lossy(path)))?;
        Ok((dir, name.to_vec()))
    }

    /// Whether the directory (resolved) is there with exactly this content of attributes: nothing to do for a WORKDIR.
    pub fn has_dir(&self, path: &str) -> Result<bool> {
        if path.is_empty() { Ok(true) } else { self.is_dir(path) }
    }

    /// WORKDIR: the directory, made for the user if it is not there.
    pub fn workdir(&mut self, path: &str, owner: (u32, u32)) -> Result<()> {
        let path = self.resolve(path)?;
        if self.has_dir(&path)? {
            return Ok(());
        }
        let attributes = self.plain(0o755, owner);
        self.mkdirs(&path, attributes).map(drop)
    }

    /// A small file made of text (a heredoc).
    pub fn file_of(
        &mut self,
        destination: &str,
        name: &str,
        data: &[u8],
        options: &CopyOptions,
    ) -> Result<()> {
        let owner = options.owner.unwrap_or((0, 0));
        let target = self.target(destination, name, false, owner)?;
        let mut attributes = self.plain(0o644, owner);
        if let Some(chmod) = &options.chmod {
            attributes.mode = chmod.apply(attributes.mode, false);
        }
        self.put_file(target.as_bytes(), &mut io::Cursor::new(data), attributes)
    }

    /// A downloaded file.
    pub fn file_from(
        &mut self,
        destination: &str,
        name: &str,
        mut data: File,
        modified: Option<i64>,
        options: &CopyOptions,
    ) -> Result<()> {
        let owner = options.owner.unwrap_or((0, 0));
        if options.unpack {
            let target = self.resolve(&clean(destination))?;
            let attributes = self.plain(0o755, owner);
            self.mkdirs(&target, attributes)?;
            return self.unpack(data, &target, options);
        }
        let target = self.target(destination, name, false, owner)?;
        let mut attributes = self.plain(0o600, owner);
        attributes.seconds = modified.unwrap_or(self.time);
        if let Some(chmod) = &options.chmod {
            attributes.mode = chmod.apply(attributes.mode, false);
        }
        self.put_file(target.as_bytes(), &mut data, attributes)
    }

    /// Where a single source goes; the directories above are made.
    fn target(&mut self, destination: &str, name: &str, many: bool, owner: (u32, u32)) -> Result<String> {
        let resolved = self.resolve(&clean_absolute(destination))?;
        let into = many
            || destination.ends_with('/')
            || destination.ends_with("/.")
            || destination == "."
            || self.is_dir(&resolved)?;
        let new = self.plain(0o755, owner);
        if into {
            self.mkdirs(&resolved, new)?;
            return Ok(join(&resolved, last(name)));
        }
        if let Some((dir, _)) = resolved.rsplit_once('/') {
            let dir = dir.to_owned();
            self.mkdirs(&dir, new)?;
        }
        Ok(resolved)
    }

    /// COPY and ADD of what was selected in `source`.
    pub fn copy(
        &mut self,
        source: &Tree,
        selected: &[Selected],
        destination: &str,
        many: bool,
        options: &CopyOptions,
    ) -> Result<()> {
        for one in selected {
            self.check()?;
            if options.parents {
                let root = self.resolve(&clean_absolute(destination))?;
                self.copy_with_parents(source, one, &root, options)?;
            } else {
                self.copy_one(source, one, destination, many, options)?;
            }
        }
        Ok(())
    }

    fn copy_one(
        &mut self,
        source: &Tree,
        one: &Selected,
        destination: &str,
        many: bool,
        options: &CopyOptions,
    ) -> Result<()> {
        let owner = options.owner.unwrap_or((0, 0));
        if one.dir {
            let target = self.resolve(&clean_absolute(destination))?;
            return self.copy_tree(source, one, &target, options);
        }
        if options.unpack
            && let Some(file) = archive(source, &one.path)?
        {
            let target = self.resolve(&clean_absolute(destination))?;
            let attributes = self.plain(0o755, owner);
            self.mkdirs(&target, attributes)?;
            return self.unpack(file, &target, options);
        }
        if !options.exclude.is_empty() && options.exclude.excludes(&one.name) {
            return Ok(());
        }
        let target = self.target(destination, &one.name, many, owner)?;
        for entry in source.walk(&one.path)? {
            self.put_entry(source, &entry, target.as_bytes(), options, true)?;
        }
        Ok(())
    }

    /// `--parents`: the source keeps its path, from a `/./` on where it has one.
    fn copy_with_parents(
        &mut self,
        source: &Tree,
        one: &Selected,
        root: &str,
        options: &CopyOptions,
    ) -> Result<()> {
        let target = join_paths(root, &one.name);
        let mut from = String::new();
        let parent = target.rsplit_once('/').map(|(dir, _)| dir.to_owned()).unwrap_or_default();
        let skip = root.split('/').filter(|p| !p.is_empty()).count();
        let mut here = String::new();
        for (depth, part) in parent.split('/').filter(|p| !p.is_empty()).enumerate() {
            here = join(&here, part);
            let mut attributes = self.plain(0o755, options.owner.unwrap_or((0, 0)));
            if depth >= skip {
                from = join(&from, part);
                if let Some(stat) = source.stat(&from)? {
                    attributes = Self::attributes(source, &stat, options);
                }
            }
            self.mkdir(&here, attributes)?;
        }
        if one.dir {
            return self.copy_tree(source, one, &target, options);
        }
        for entry in source.walk(&one.path)? {
            self.put_entry(source, &entry, target.as_bytes(), options, true)?;
        }
        Ok(())
    }

    /// The contents of a directory into another.
    fn copy_tree(
        &mut self,
        source: &Tree,
        one: &Selected,
        target: &str,
        options: &CopyOptions,
    ) -> Result<()> {
        let mut dirs: Vec<(Vec<u8>, Attributes)> = Vec::new();
        for entry in source.walk(&one.path)? {
            self.check()?;
            let relative = &entry.path[one.path.len()..];
            let relative = relative.strip_prefix(b"/").unwrap_or(relative);
            if relative.is_empty() {
                // What a directory is copied to is a new one, unless the source keeps its path (`--parents`).
                let attributes = if options.parents {
                    Self::attributes(source, &entry.stat, options)
                } else {
                    self.plain(0o755, options.owner.unwrap_or((0, 0)))
                };
                let mut above = attributes;
                above.mode = 0o755;
                if let Some((dir, _)) = target.rsplit_once('/') {
                    let dir = dir.to_owned();
                    self.mkdirs(&dir, above)?;
                }
                if !target.is_empty() && self.mkdir(target, attributes)? {
                    dirs.push((target.as_bytes().to_vec(), attributes));
                } else if let Some(stat) = self.in_upper(target.as_bytes())? {
                    dirs.push((target.as_bytes().to_vec(), Attributes::of(&stat)));
                }
                continue;
            }
            if !options.exclude.is_empty() && options.exclude.excludes(&String::from_utf8_lossy(relative)) {
                continue;
            }
            let mut path = target.as_bytes().to_vec();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(relative);
            if kind(&entry.stat) == FileType::Directory {
                let attributes = Self::attributes(source, &entry.stat, options);
                let text = String::from_utf8(path.clone()).map_err(|_bad| {
                    invalid(format!("the directory name {} is not valid UTF-8", lossy(&path)))
                })?;
                self.mkdirs(&text, attributes)?;
                dirs.push((path, attributes));
            } else {
                if !options.exclude.is_empty() {
                    // Directories that were left out come with what is in them.
                    let text = String::from_utf8_lossy(&path).into_owned();
                    if let Some((dir, _)) = text.rsplit_once('/') {
                        let attributes = self.plain(0o755, options.owner.unwrap_or((0, 0)));
                        self.mkdirs(dir, attributes)?;
                    }
                }
                self.put_entry(source, &entry, &path, options, false)?;
            }
        }
        // Last, for the files written into them have touched their times.
        for (path, attributes) in dirs.into_iter().rev() {
            if path.is_empty() {
                continue;
            }
            let (parent, name) = self.parent(&path)?;
            Self::dress_dir(&parent, &name, attributes)
                .doing(|| format!("set the mode of /{}", lossy(&path)))?;
        }
        Ok(())
    }

    fn attributes(source: &Tree, stat: &Stat, options: &CopyOptions) -> Attributes {
        let mut attributes = Attributes::of(stat);
        if source.ownerless() {
            (attributes.uid, attributes.gid) = (0, 0);
        }
        if let Some(owner) = options.owner {
            (attributes.uid, attributes.gid) = owner;
        }
        if let Some(chmod) = &options.chmod {
            attributes.mode = chmod.apply(attributes.mode, kind(stat) == FileType::Directory);
        }
        attributes
    }

    /// One file, link or device.
    fn put_entry(
        &mut self,
        source: &Tree,
        entry: &Entry,
        target: &[u8],
        options: &CopyOptions,
        _top: bool,
    ) -> Result<()> {
        let what = || format!("copy /{}", lossy(&entry.path));
        let attributes = Self::attributes(source, &entry.stat, options);
        match kind(&entry.stat) {
            FileType::RegularFile => {
                let key = (entry.stat.st_dev, entry.stat.st_ino);
                if entry.stat.st_nlink > 1 {
                    if let Some(first) = self.links.get(&key).cloned() {
                        return self.hard_link(&first, target);
                    }
                    self.links.insert(key, target.to_vec());
                }
                let file =
                    File::from(source.open(&entry.path, OFlags::RDONLY | OFlags::NONBLOCK).doing(what)?);
                let out = self.create(target)?;
                copy_data(&file, &out).doing(what)?;
                if !source.ownerless() {
                    xattrs::copy(file.as_fd(), out.as_fd()).doing(what)?;
                }
                Self::dress_file(&out, attributes).doing(what)
            }
            FileType::Symlink => {
                let link = source.link(&entry.path)?;
                self.symlink(link.to_bytes(), target, attributes)
            }
            file_type @ (FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice) => {
                self.node(target, file_type, entry.stat.st_rdev, attributes)
            }
            // Sockets live only while somebody listens.
            _ => Ok(()),
        }
    }

    /// Removes what the upper directory has at the place of a file; a directory there, or below, is in the way.
    fn clear(&self, target: &[u8]) -> Result<(OwnedFd, Vec<u8>)> {
        let blocked = || invalid(format!("cannot replace to directory /{} with file", lossy(target)));
        match self.in_upper(target)? {
            Some(stat) if kind(&stat) == FileType::Directory => return Err(blocked()),
            Some(_) => {
                let (parent, name) = self.parent(target)?;
                unlinkat(&parent, &name[..], AtFlags::empty())
                    .doing(|| format!("replace /{}", lossy(target)))?;
                return Ok((parent, name));
            }
            None => {}
        }
        if let Some(lower) = self.lower
            && let Ok(text) = std::str::from_utf8(target)
            && lower.stat(text)?.is_some_and(|stat| kind(&stat) == FileType::Directory)
        {
            return Err(blocked());
        }
        self.parent(target)
    }

    fn create(&self, target: &[u8]) -> Result<File> {
        let (parent, name) = self.clear(target)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat2(&parent, &name[..], flags, Mode::from_raw_mode(0o600), beneath())
            .doing(|| format!("create /{}", lossy(target)))?;
        Ok(File::from(fd))
    }

    fn dress_file(file: &File, attributes: Attributes) -> rustix::io::Result<()> {
        rustix::fs::fchown(file, Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)))?;
        rustix::fs::fchmod(file, Mode::from_raw_mode(attributes.mode))?;
        rustix::fs::futimens(file, &attributes.times())
    }

    fn put_file(&self, target: &[u8], data: &mut dyn Read, attributes: Attributes) -> Result<()> {
        let what = || format!("write /{}", lossy(target));
        let mut out = self.create(target)?;
        let mut buffer = vec![0_u8; 128 << 10];
        loop {
            self.check()?;
            let n = data.read(&mut buffer).doing(what)?;
            if n == 0 {
                break;
            }
            out.write_all(&buffer[..n]).doing(what)?;
        }
        Self::dress_file(&out, attributes).doing(what)
    }

    fn symlink(&self, link: &[u8], target: &[u8], attributes: Attributes) -> Result<()> {
        let what = || format!("make the link /{}", lossy(target));
        let (parent, name) = self.clear(target)?;
        rustix::fs::symlinkat(link, &parent, &name[..]).doing(what)?;
        let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        rustix::fs::chownat(&parent, &name[..], Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .doing(what)?;
        utimensat(&parent, &name[..], &attributes.times(), AtFlags::SYMLINK_NOFOLLOW).doing(what)
    }

    fn hard_link(&self, first: &[u8], target: &[u8]) -> Result<()> {
        if first == target {
            return Ok(());
        }
        let what = || format!("link /{}", lossy(target));
        let (from, from_name) = self.parent(first)?;
        let (parent, name) = self.clear(target)?;
        rustix::fs::linkat(&from, &from_name[..], &parent, &name[..], AtFlags::empty()).doing(what)
    }

    fn node(&self, target: &[u8], file_type: FileType, device: u64, attributes: Attributes) -> Result<()> {
        let what = || format!("make the node /{}", lossy(target));
        let (parent, name) = self.clear(target)?;
        rustix::fs::mknodat(&parent, &name[..], file_type, Mode::from_raw_mode(attributes.mode), device)
            .doing(what)?;
        let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        rustix::fs::chownat(&parent, &name[..], Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .doing(what)?;
        rustix::fs::chmodat(&parent, &name[..], Mode::from_raw_mode(attributes.mode), AtFlags::empty())
            .doing(what)?;
        utimensat(&parent, &name[..], &attributes.times(), AtFlags::SYMLINK_NOFOLLOW).doing(what)
    }

    /// Unpacks an archive (compressed or not) into a directory.
    fn unpack(&mut self, file: File, target: &str, options: &CopyOptions) -> Result<()> {
        let bad = |error: io::Error| invalid(format!("unpack the archive: {error}"));
        let mut archive = ::tar::Archive::new(crate::compression::decode(file).map_err(bad)?);
        let mut dirs: Vec<(String, Attributes)> = Vec::new();
        for entry in archive.entries().map_err(bad)? {
            self.check()?;
            let mut entry = entry.map_err(bad)?;
            let name = String::from_utf8(entry.path_bytes().into_owned())
                .map_err(|_bad| invalid("unpack the archive: a name in it is not valid UTF-8"))?;
            let relative = clean(&name);
            if relative.is_empty() || (!options.exclude.is_empty() && options.exclude.excludes(&relative)) {
                continue;
            }
            let path = join_paths(target, &relative);
            let header = entry.header();
            let mut attributes = Attributes {
                mode: header.mode().map_err(bad)? & 0o7777,
                uid: header.uid().map_err(bad)? as u32,
                gid: header.gid().map_err(bad)? as u32,
                seconds: header.mtime().map_err(bad)? as i64,
                nanos: 0,
            };
            let kind = header.entry_type();
            if let Some(owner) = options.owner {
                (attributes.uid, attributes.gid) = owner;
            }
            if let Some(chmod) = &options.chmod {
                attributes.mode = chmod.apply(attributes.mode, kind.is_dir());
            }
            // An archive may hold a link to a directory and then something in it: links above are resolved inside.
            let (dir, last_part) = path.rsplit_once('/').unwrap_or(("", &path));
            let dir = self.resolve(dir)?;
            let mut above = attributes;
            above.mode = 0o755;
            self.mkdirs(&dir, above)?;
            let path = join(&dir, last_part);
            let device = || -> io::Result<u64> {
                Ok(rustix::fs::makedev(
                    header.device_major()?.unwrap_or(0),
                    header.device_minor()?.unwrap_or(0),
                ))
            };
            match kind {
                kind if kind.is_dir() => {
                    self.mkdir(&path, attributes)?;
                    dirs.push((path, attributes));
                }
                kind if kind.is_symlink() => {
                    let link = entry.link_name_bytes().unwrap_or_default().into_owned();
                    self.symlink(&link, path.as_bytes(), attributes)?;
                }
                kind if kind.is_hard_link() => {
                    let link = entry.link_name_bytes().unwrap_or_default().into_owned();
                    let first = join_paths(target, &clean(&String::from_utf8_lossy(&link)));
                    self.hard_link(first.as_bytes(), path.as_bytes())?;
                }
                kind if kind.is_fifo() => self.node(path.as_bytes(), FileType::Fifo, 0, attributes)?,
                kind if kind.is_character_special() => {
                    let device = device().map_err(bad)?;
                    self.node(path.as_bytes(), FileType::CharacterDevice, device, attributes)?;
                }
                kind if kind.is_block_special() => {
                    let device = device().map_err(bad)?;
                    self.node(path.as_bytes(), FileType::BlockDevice, device, attributes)?;
                }
                kind if kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse() => {
                    self.put_file(path.as_bytes(), &mut entry, attributes)?;
                }
                _ => {}
            }
        }
        for (path, attributes) in dirs.into_iter().rev() {
            let (parent, name) = self.parent(path.as_bytes())?;
            Self::dress_dir(&parent, &name, attributes).doing(|| format!("set the mode of /{path}"))?;
        }
        Ok(())
    }
}

/// The file, if it is an archive that ADD unpacks.
fn archive(source: &Tree, path: &str) -> Result<Option<File>> {
    let what = || format!("read /{path}");
    let Some(stat) = source.stat(path)? else { return Ok(None) };
    if kind(&stat) != FileType::RegularFile {
        return Ok(None);
    }
    let open = || source.open(path.as_bytes(), OFlags::RDONLY | OFlags::NONBLOCK).map(File::from).doing(what);
    Ok(if crate::compression::is_archive(open()?).doing(what)? { Some(open()?) } else { None })
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// An absolute or relative destination as a path from the root.
fn clean_absolute(path: &str) -> String {
    clean(path)
}

fn join_paths(base: &str, path: &str) -> String {
    if base.is_empty() { path.to_owned() } else { format!("{base}/{path}") }
}

/// Shares the blocks where the file system can, else copies inside the kernel where it can.
fn copy_data(mut from: &File, mut to: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    io::copy(&mut from, &mut to).map(drop)
}
