//! Writing a step's files: into the upper directory of its snapshot, as overlay would have them there.
//!
//! Nothing is mounted. What is below is only looked at; a directory that is there below is mirrored in the upper
//! directory with its owner, mode and times before something is put into it, so that the union changes nothing else
//! and the same inputs give the same layer. No link of either side is followed by the kernel.

mod copy;
mod place;
mod unpack;

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, mkdirat, openat2, utimensat,
};
use rustix::io::Errno;

use crate::chmod::Chmod;
use crate::error::{Context, Error, Result, invalid};
use crate::pattern::{Ignore, clean};
use crate::tree::{Tree, beneath, join, last};
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
    /// Directories that were there nowhere before: nothing below is in the way in them.
    made: HashSet<Vec<u8>>,
    /// The directory that was written into last. None is ever replaced.
    last: RefCell<Option<(Vec<u8>, Rc<OwnedFd>)>>,
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
        Self {
            lower,
            upper,
            links: HashMap::new(),
            made: HashSet::new(),
            last: RefCell::default(),
            cancelled,
            time: time.unwrap_or(NO_TIME),
        }
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
                self.made.insert(path.as_bytes().to_vec());
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
    fn parent(&self, path: &[u8]) -> Result<(Rc<OwnedFd>, Vec<u8>)> {
        let at = path.iter().rposition(|b| *b == b'/');
        let (dir, name) = match at {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&b"."[..], path),
        };
        if let Some((last, fd)) = &*self.last.borrow()
            && last == dir
        {
            return Ok((Rc::clone(fd), name.to_vec()));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = openat2(&self.upper, dir, flags, Mode::empty(), beneath())
            .doing(|| format!("open the directory of /{}", lossy(path)))?;
        let opened = Rc::new(opened);
        *self.last.borrow_mut() = Some((dir.to_vec(), Rc::clone(&opened)));
        Ok((opened, name.to_vec()))
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
