//! Receiving: a listing compared with what is there, and only what differs asked for and written.
//!
//! Invariant: nothing is written outside the folder (every path is opened beneath it, without following a link); the
//! index says only what is on disk: it goes before the first change and comes back after the last.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::Write as _;
use std::iter::Peekable;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use brigantine_session::{Entry, Kind, News, Receiver};
use rustix::fs::{
    AtFlags, Mode, OFlags, Timespec, Timestamps, linkat, mkdirat, openat2, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::index::{Index, Known, What, sort_key};
use crate::error::{Context as _, Error, Result, invalid};
use crate::snapshot::remove_tree;
use crate::tree::{beneath, open_dir};

/// So many bytes may come of a file beyond those it was listed with: it may be written to while it is sent.
const GROWTH: u64 = 16 << 20;

/// What was received.
#[derive(Debug, Default)]
pub(crate) struct Received {
    pub hashes: HashMap<Vec<u8>, [u8; 32]>,
    /// Bytes that came over the wire.
    pub bytes: u64,
}

/// Makes the folder `dir` hold what the client has; `most` is the most bytes to take. Blocks.
pub(crate) fn receive(
    dir: &Path,
    receiver: Receiver,
    most: u64,
    progress: impl FnMut(u64),
) -> Result<Received> {
    let folder = Folder::open(dir)?;
    let received = take(folder, receiver, most, progress);
    if received.is_err() && !dir.join("index").exists() {
        // Nobody knows what of it is whole: the next time begins anew.
        remove_tree(&dir.join("files"));
    }
    received
}

fn take(
    mut folder: Folder,
    mut receiver: Receiver,
    most: u64,
    mut progress: impl FnMut(u64),
) -> Result<Received> {
    let mut bytes = 0_u64;
    while let Some(news) = receiver.news()? {
        match news {
            News::Listed(number, entry) => {
                if folder.listed(number, entry)? {
                    receiver.ask(number)?;
                }
            }
            News::ListEnd => folder.list_end(),
            News::Data(number, data) => {
                bytes += data.len() as u64;
                if bytes > most {
                    return Err(invalid(format!("the client sent more than {most} bytes")));
                }
                folder.data(number, &data)?;
                progress(bytes);
            }
            News::End(number) => folder.end(number)?,
        }
    }
    receiver.finish()?;
    let hashes = folder.close()?;
    Ok(Received { hashes, bytes })
}

/// A file that is being received.
struct Coming {
    entry: Entry,
    size: u64,
    open: Option<(File, Sha256, u64)>,
}

struct Folder {
    index: PathBuf,
    root: OwnedFd,
    old: Peekable<std::vec::IntoIter<(Vec<u8>, Known)>>,
    new: BTreeMap<Vec<u8>, Known>,
    /// What is not there any more, directories before what is in them.
    gone: Vec<Known>,
    coming: HashMap<u32, Coming>,
    /// Another name, and whether it has to be made.
    links: Vec<(Entry, Vec<u8>, bool)>,
    files: HashSet<Vec<u8>>,
    /// Files whose bytes are new.
    rewritten: HashSet<Vec<u8>>,
    /// Directories whose mode or time is to be set.
    touched: HashSet<Vec<u8>>,
    changed: bool,
}

impl Folder {
    fn open(dir: &Path) -> Result<Self> {
        let (index, files) = (dir.join("index"), dir.join("files"));
        let old = if let Some(index) = Index::read(&index) {
            index.files
        } else {
            remove_tree(&files);
            Vec::new()
        };
        if old.is_empty() {
            use std::os::unix::fs::DirBuilderExt as _;
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&files)
                .doing(|| format!("create {}", files.display()))?;
        }
        let old: Vec<_> = old.into_iter().map(|known| (sort_key(&known.path), known)).collect();
        Ok(Self {
            index,
            root: open_dir(&files)?,
            old: old.into_iter().peekable(),
            new: BTreeMap::new(),
            gone: Vec::new(),
            coming: HashMap::new(),
            links: Vec::new(),
            files: HashSet::new(),
            rewritten: HashSet::new(),
            touched: HashSet::new(),
            changed: false,
        })
    }

    /// Before every change.
    fn change(&mut self, path: &[u8]) -> Result<()> {
        if !self.changed {
            self.changed = true;
            match std::fs::remove_file(&self.index) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).doing(|| format!("remove {}", self.index.display()));
                }
                _ => {}
            }
        }
        if let (parent, _) = split(path)
            && !parent.is_empty()
        {
            self.touched.insert(parent.to_vec());
        }
        Ok(())
    }

    /// Takes one listed file in: whether its bytes are wanted.
    fn listed(&mut self, number: u32, entry: Entry) -> Result<bool> {
        let key = sort_key(&entry.path);
        while let Some((_, known)) = self.old.next_if(|(old, _)| *old < key) {
            self.gone.push(known);
        }
        let known = self.old.next_if(|(old, _)| *old == key).map(|(_, known)| known);
        let mut next = Known {
            path: entry.path.clone(),
            what: What::File as i32,
            mode: entry.mode,
            size: 0,
            mtime: entry.mtime,
            target: Vec::new(),
            hash: Vec::new(),
            state: entry.state,
        };
        let same_time = |known: &Known| known.mtime == entry.mtime;
        match &entry.kind {
            Kind::Other => {
                // Of no use in an image.
                self.gone.extend(known);
                return Ok(false);
            }
            Kind::Directory => {
                next.what = What::Directory as i32;
                match known {
                    Some(known) if known.is(What::Directory) => {
                        if known.mode != entry.mode || !same_time(&known) {
                            self.change(&entry.path)?;
                            self.touched.insert(entry.path.clone());
                        }
                    }
                    known => {
                        self.clear(known)?;
                        self.change(&entry.path)?;
                        mkdirat(&self.root, &entry.path[..], Mode::from_raw_mode(0o700))
                            .doing(|| what(&entry.path))?;
                        self.touched.insert(entry.path.clone());
                    }
                }
            }
            Kind::Symlink(target) => {
                next.what = What::Symlink as i32;
                next.target.clone_from(target);
                match known {
                    Some(known)
                        if known.is(What::Symlink) && known.target == *target && same_time(&known) => {}
                    known => {
                        self.clear(known)?;
                        self.change(&entry.path)?;
                        let (parent, last) = self.parent(&entry.path)?;
                        symlinkat(&target[..], &parent, last).doing(|| what(&entry.path))?;
                        utimensat(&parent, last, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
                            .doing(|| what(&entry.path))?;
                    }
                }
            }
            Kind::HardLink(target) => {
                if !self.files.contains(target) {
                    return Err(invalid(format!(
                        "the client's {} is a link to a file that was not listed before it",
                        shown(&entry.path)
                    )));
                }
                let keep =
                    known.as_ref().is_some_and(|known| known.is(What::HardLink) && known.target == *target);
                if !keep {
                    self.clear(known)?;
                }
                let target = target.clone();
                self.links.push((entry, target, !keep));
                return Ok(false);
            }
            Kind::File { size } => {
                next.size = *size;
                self.files.insert(entry.path.clone());
                match known {
                    Some(known)
                        if known.is(What::File)
                            && known.size == *size
                            && same_time(&known)
                            && known.state == entry.state
                            && known.hash().is_some() =>
                    {
                        if known.mode != entry.mode {
                            self.change(&entry.path)?;
                            let file = self.reopen(&entry.path)?;
                            rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode))
                                .doing(|| what(&entry.path))?;
                        }
                        next.hash = known.hash;
                    }
                    known => {
                        self.clear(known)?;
                        self.rewritten.insert(entry.path.clone());
                        let size = *size;
                        self.coming.insert(number, Coming { entry, size, open: None });
                        return Ok(true);
                    }
                }
            }
        }
        self.new.insert(key, next);
        Ok(false)
    }

    fn list_end(&mut self) {
        self.gone.extend(self.old.by_ref().map(|(_, known)| known));
    }

    fn data(&mut self, number: u32, data: &[u8]) -> Result<()> {
        if let Some(coming) = self.coming.get(&number)
            && coming.open.is_none()
        {
            let path = coming.entry.path.clone();
            let file = self.create(&path)?;
            if let Some(coming) = self.coming.get_mut(&number) {
                coming.open = Some((file, Sha256::new(), 0));
            }
        }
        if let Some(Coming { entry, size, open: Some((file, hasher, written)) }) =
            self.coming.get_mut(&number)
        {
            hasher.update(data);
            *written += data.len() as u64;
            if *written > size.saturating_add(GROWTH) {
                return Err(invalid(format!(
                    "the client listed {} with {size} bytes, and has sent {written}: if something writes to it, leave it out of the context (.dockerignore)",
                    shown(&entry.path)
                )));
            }
            file.write_all(data).doing(|| what(&entry.path))?;
        }
        Ok(())
    }

    fn end(&mut self, number: u32) -> Result<()> {
        let Some(Coming { entry, size, open }) = self.coming.remove(&number) else { return Ok(()) };
        let (file, hasher, written) = match open {
            Some(open) => open,
            None => (self.create(&entry.path)?, Sha256::new(), 0),
        };
        rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode)).doing(|| what(&entry.path))?;
        rustix::fs::futimens(&file, &times(entry.mtime)).doing(|| what(&entry.path))?;
        let known = Known {
            what: What::File as i32,
            mode: entry.mode,
            // It changed while it was sent: to be asked for again.
            size: if written == size { size } else { u64::MAX },
            mtime: entry.mtime,
            target: Vec::new(),
            hash: hasher.finalize().to_vec(),
            state: entry.state,
            path: entry.path,
        };
        self.new.insert(sort_key(&known.path), known);
        Ok(())
    }

    /// Does what has to wait for everything else: the known hashes.
    fn close(mut self) -> Result<HashMap<Vec<u8>, [u8; 32]>> {
        for (entry, target, make) in std::mem::take(&mut self.links) {
            let make = make || self.rewritten.contains(&target);
            let failed = || what(&entry.path);
            if make {
                self.change(&entry.path)?;
                let (parent, last) = self.parent(&entry.path)?;
                match unlinkat(&parent, last, AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(error) => return Err(error).doing(failed),
                }
                let (from, name) = self.parent(&target)?;
                linkat(&from, name, &parent, last, AtFlags::empty()).doing(failed)?;
            }
            let Some(known) = self.new.get(&sort_key(&target)) else { continue };
            let link =
                Known { path: entry.path.clone(), what: What::HardLink as i32, target, ..known.clone() };
            self.new.insert(sort_key(&entry.path), link);
        }
        for known in std::mem::take(&mut self.gone).into_iter().rev() {
            self.remove(&known)?;
        }
        let mut touched: Vec<_> = std::mem::take(&mut self.touched).into_iter().collect();
        touched.sort_unstable();
        for path in touched.into_iter().rev() {
            let Some(known) = self.new.get(&sort_key(&path)) else { continue };
            if !known.is(What::Directory) {
                // Something else is in the place of one that was emptied.
                continue;
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let dir =
                openat2(&self.root, &path[..], flags, Mode::empty(), beneath()).doing(|| what(&path))?;
            rustix::fs::fchmod(&dir, Mode::from_raw_mode(known.mode)).doing(|| what(&path))?;
            rustix::fs::futimens(&dir, &times(known.mtime)).doing(|| what(&path))?;
        }
        let hashes = self
            .new
            .values()
            .filter_map(|known| Some((known.path.clone(), known.hash()?)))
            .collect::<HashMap<_, _>>();
        if self.changed {
            Index::write(&self.index, self.new.into_values().collect())?;
        }
        Ok(hashes)
    }

    /// Removes what is in the place of something of another kind, with all that is in it.
    fn clear(&mut self, known: Option<Known>) -> Result<()> {
        let Some(known) = known else { return Ok(()) };
        let mut all = vec![known];
        let mut below = all[0].path.clone();
        below.push(b'/');
        while let Some((_, known)) = self.old.next_if(|(_, known)| known.path.starts_with(&below)) {
            all.push(known);
        }
        all.iter().rev().try_for_each(|known| self.remove(known))
    }

    fn remove(&mut self, known: &Known) -> Result<()> {
        self.change(&known.path)?;
        let (parent, last) = match self.parent(&known.path) {
            Ok(found) => found,
            // Its directory is gone, or is something else by now.
            Err(Error::Io { source, .. })
                if matches!(Errno::from_io_error(&source), Some(Errno::NOENT | Errno::NOTDIR)) =>
            {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let flags = if known.is(What::Directory) { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        match unlinkat(&parent, last, flags) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error).doing(|| format!("remove {} of the build context", shown(&known.path))),
        }
    }

    /// A path's directory, and its last part.
    fn parent<'p>(&self, path: &'p [u8]) -> Result<(OwnedFd, &'p [u8])> {
        let (dir, last) = split(path);
        let dir = if dir.is_empty() { b"." } else { dir };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok((openat2(&self.root, dir, flags, Mode::empty(), beneath()).doing(|| what(path))?, last))
    }

    fn create(&mut self, path: &[u8]) -> Result<File> {
        self.change(path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat2(&self.root, path, flags, Mode::from_raw_mode(0o600), beneath())
            .map(File::from)
            .doing(|| what(path))
    }

    fn reopen(&self, path: &[u8]) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        openat2(&self.root, path, flags, Mode::empty(), beneath()).doing(|| what(path))
    }
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

fn times(nanos: i64) -> Timestamps {
    let time = Timespec { tv_sec: nanos.div_euclid(1_000_000_000), tv_nsec: nanos.rem_euclid(1_000_000_000) };
    Timestamps { last_access: time, last_modification: time }
}

fn shown(path: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(path))
}

fn what(path: &[u8]) -> String {
    format!("write {} of the build context", shown(path))
}
