//! Telling what has changed in a copy since it was made.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

use super::{
    Change, LayerResult, attributes_at, below, entries, failed, failed_io, kind, open_dir, open_file,
};

/// A walk through a copy and what it was made of, side by side.
pub(super) struct Comparison {
    pub base: OwnedFd,
    pub root: OwnedFd,
    /// When the copy was complete.
    pub copied: (i64, i64),
    /// The inodes of its directories then.
    pub inodes: HashMap<Vec<u8>, u64>,
    pub found: BTreeMap<Vec<u8>, Change>,
}

impl Comparison {
    pub fn run(&mut self) -> LayerResult<()> {
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
                            let moved = moved || self.is_another(&path, &old, &stat);
                            waiting.push((path, moved));
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

    /// Whether this directory is not the one that was copied here.
    fn is_another(&self, path: &[u8], old: &Stat, new: &Stat) -> bool {
        match self.inodes.get(path) {
            Some(inode) => *inode != new.st_ino,
            // Of a copy that does not say: one that was changed, and still has its time, was moved.
            None => {
                self.touched(new) && (old.st_mtime, old.st_mtime_nsec) == (new.st_mtime, new.st_mtime_nsec)
            }
        }
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
