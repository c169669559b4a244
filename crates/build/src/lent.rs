//! The client's end of a context: a folder that is listed as far as it is asked for, and read.
//!
//! Invariant: nothing outside of the folder is looked at: every path is opened beneath its root without following a
//! link, and where links lead is worked out within it. Nothing is hashed or read to be listed.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Read};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use brigantine_session::{Asked, Entry, Folder, Kind};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, fstat, openat2, readlinkat, statat};
use rustix::io::Errno;

use crate::pattern::{Glob, Ignore, clean, has_wildcard};
use crate::tree::{beneath, join, names, parts};

/// How many symbolic links one path may go through, as in the kernel.
const MOST_LINKS: u32 = 40;

/// A folder that a client lends to its build.
#[derive(Debug)]
pub struct LentFolder {
    root: OwnedFd,
}

impl LentFolder {
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { root: rustix::fs::open(path, flags, Mode::empty())? })
    }
}

impl Folder for LentFolder {
    fn list(&self, asked: &Asked, listed: &mut dyn FnMut(Entry) -> bool) -> io::Result<()> {
        let patterns = asked.exclude.iter().map(String::as_str);
        let ignore = Ignore::new(patterns).map_err(io::Error::other)?;
        let wanted = Followed { root: &self.root, found: BTreeSet::new() }.all(&asked.follow)?;
        let mut walk = Walk { root: &self.root, ignore, wanted, doubtful: Vec::new(), listed };
        let inside = asked.follow.is_empty() || walk.wanted.contains("");
        walk.dir(&[], inside).map(drop)
    }

    fn open(&self, path: &[u8]) -> io::Result<Box<dyn Read>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = openat2(&self.root, path, flags, Mode::empty(), beneath());
        let file = opened.map_err(|error| failed("read", path, error))?;
        let before = fstat(&file).map_err(|error| failed("read", path, error))?;
        if FileType::from_raw_mode(before.st_mode) != FileType::RegularFile {
            return Err(io::Error::other(format!("{} is no file any more", shown(path))));
        }
        let left = u64::try_from(before.st_size).unwrap_or_default();
        Ok(Box::new(Steady { file: file.into(), before, left, path: path.to_vec() }))
    }
}

fn shown(path: &[u8]) -> String {
    if path.is_empty() { "the folder".to_owned() } else { format!("{:?}", String::from_utf8_lossy(path)) }
}

/// Names the file, and says what the system says of it.
fn failed(what: &str, path: &[u8], error: Errno) -> io::Error {
    let text = io::Error::from(error).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    io::Error::new(io::Error::from(error).kind(), format!("{what} {}: {text}", shown(path)))
}

/// A file's bytes as they were at one time, or an error.
struct Steady {
    file: File,
    before: Stat,
    left: u64,
    path: Vec<u8>,
}

impl Read for Steady {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let changed = || {
            let what = format!("{} was changed while it was being read", shown(&self.path));
            io::Error::other(format!("{what}: build again, or name it in .dockerignore"))
        };
        if self.left == 0 {
            let after = fstat(&self.file)?;
            let times = |stat: &Stat| (nanos(stat.st_mtime, stat.st_mtime_nsec), changed_at(stat));
            let same = after.st_size == self.before.st_size && times(&after) == times(&self.before);
            return if same { Ok(0) } else { Err(changed()) };
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        let n = self.file.read(&mut buf[..most])?;
        if n == 0 && most > 0 {
            return Err(changed());
        }
        self.left -= n as u64;
        Ok(n)
    }
}

/// Where the paths lead that are asked for: these, and the links on the way.
struct Followed<'f> {
    root: &'f OwnedFd,
    found: BTreeSet<String>,
}

/// A path on its way: what is done of it, and what is left (its last part first).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Way {
    done: String,
    left: Vec<String>,
    links: u32,
}

impl Followed<'_> {
    fn all(mut self, paths: &[String]) -> io::Result<BTreeSet<String>> {
        let mut ways: Vec<Way> = paths
            .iter()
            .map(|path| Way { done: String::new(), left: parts(&clean(path)), links: 0 })
            .collect();
        let mut seen: HashSet<Way> = ways.iter().cloned().collect();
        while let Some(way) = ways.pop() {
            for next in self.step(way)? {
                if seen.insert(next.clone()) {
                    ways.push(next);
                }
            }
        }
        Ok(self.found)
    }

    fn step(&mut self, mut way: Way) -> io::Result<Vec<Way>> {
        let Some(part) = way.left.pop() else {
            self.found.insert(way.done);
            return Ok(Vec::new());
        };
        match part.as_str() {
            ".." => {
                way.done = way.done.rsplit_once('/').map(|(dir, _)| dir.to_owned()).unwrap_or_default();
                Ok(vec![way])
            }
            "**" => {
                let mut all = Vec::new();
                for name in self.names(&way.done)? {
                    let done = join(&way.done, &name);
                    if self.kind(&done) == Some(FileType::Directory) {
                        let mut left = way.left.clone();
                        left.push("**".to_owned());
                        all.push(Way { done, left, links: way.links });
                    }
                }
                all.push(way);
                Ok(all)
            }
            part if has_wildcard(part) => {
                let glob = Glob::new(part).map_err(io::Error::other)?;
                let names = self.names(&way.done)?;
                let found = names.iter().filter(|name| glob.matches(name));
                Ok(found.filter_map(|name| self.enter(way.clone(), name)).collect())
            }
            part => Ok(self.enter(way, part).into_iter().collect()),
        }
    }

    /// One part further, through the link if it is one.
    fn enter(&mut self, mut way: Way, name: &str) -> Option<Way> {
        let here = join(&way.done, name);
        if self.kind(&here)? != FileType::Symlink {
            way.done = here;
            return Some(way);
        }
        let target = readlinkat(self.root, &*here, Vec::new()).ok()?;
        let target = target.to_string_lossy().into_owned();
        self.found.insert(here);
        if target.starts_with('/') {
            way.done.clear();
        }
        way.left.extend(parts(&target));
        way.links += 1;
        (way.links <= MOST_LINKS).then_some(way)
    }

    /// What is there without following a link, if it can be reached without one.
    fn kind(&self, path: &str) -> Option<FileType> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = openat2(self.root, path, flags, Mode::empty(), beneath()).ok()?;
        Some(FileType::from_raw_mode(fstat(&found).ok()?.st_mode))
    }

    fn names(&self, dir: &str) -> io::Result<Vec<String>> {
        if !dir.is_empty() && self.kind(dir) != Some(FileType::Directory) {
            return Ok(Vec::new());
        }
        let names = open_beneath(self.root, dir.as_bytes()).and_then(|dir| names(&dir));
        let names = names.map_err(|error| failed("read the directory", dir.as_bytes(), error))?;
        Ok(names.into_iter().map(|name| String::from_utf8_lossy(name.as_bytes()).into_owned()).collect())
    }
}

fn open_beneath(root: &OwnedFd, dir: &[u8]) -> Result<OwnedFd, Errno> {
    let dir = if dir.is_empty() { b"." } else { dir };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(root, dir, flags, Mode::empty(), beneath())
}

struct Walk<'w> {
    root: &'w OwnedFd,
    ignore: Ignore,
    /// Paths, with all that is in them.
    wanted: BTreeSet<String>,
    /// Directories that are listed only if something in them is.
    doubtful: Vec<Entry>,
    listed: &'w mut dyn FnMut(Entry) -> bool,
}

impl Walk<'_> {
    /// Lists what is in a directory, `inside` if all of it is wanted: whether anybody listens still.
    fn dir(&mut self, dir: &[u8], inside: bool) -> io::Result<bool> {
        for (entry, inside) in self.found(dir, inside)? {
            let path = entry.path.clone();
            let is_dir = entry.kind == Kind::Directory;
            let out = !self.ignore.is_empty() && self.ignore.excludes(&String::from_utf8_lossy(&path));
            if !is_dir {
                if !out && !self.show(entry) {
                    return Ok(false);
                }
                continue;
            }
            if out && !self.ignore.may_take_again_below(&String::from_utf8_lossy(&path)) {
                continue;
            }
            if out || !inside {
                self.doubtful.push(entry);
            } else if !self.show(entry) {
                return Ok(false);
            }
            if !self.dir(&path, inside)? {
                return Ok(false);
            }
            self.doubtful.pop_if(|last| last.path == path);
        }
        Ok(true)
    }

    fn show(&mut self, entry: Entry) -> bool {
        self.doubtful.drain(..).all(|dir| (self.listed)(dir)) && (self.listed)(entry)
    }

    /// What is in a directory and may be wanted, in order: each with whether all of it is.
    fn found(&self, dir: &[u8], inside: bool) -> io::Result<Vec<(Entry, bool)>> {
        let what = |error| failed("read the directory", dir, error);
        let opened = match open_beneath(self.root, dir) {
            Ok(opened) => opened,
            // Files of a folder that is worked in come and go.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if !dir.is_empty() => return Ok(Vec::new()),
            Err(error) => return Err(what(error)),
        };
        let mut all = Vec::new();
        for name in names(&opened).map_err(what)? {
            let mut path = dir.to_vec();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name.as_bytes());
            let Some(inside) = self.wants(&path, inside) else { continue };
            let stat = match statat(&opened, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(failed("look at", &path, error)),
            };
            let kind = match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => Kind::File { size: stat.st_size.unsigned_abs() },
                FileType::Directory => Kind::Directory,
                FileType::Symlink => match readlinkat(opened.as_fd(), &name, Vec::new()) {
                    Ok(target) => Kind::Symlink(target.into_bytes()),
                    Err(Errno::NOENT | Errno::INVAL) => continue,
                    Err(error) => return Err(failed("look at", &path, error)),
                },
                // Devices, pipes and sockets are of no use in an image.
                _ => continue,
            };
            if inside || kind == Kind::Directory {
                let (mode, mtime) = (stat.st_mode & 0o7777, nanos(stat.st_mtime, stat.st_mtime_nsec));
                let entry = Entry { path, kind, mode, uid: 0, gid: 0, mtime, state: state(&stat) };
                all.push((entry, inside));
            }
        }
        Ok(all)
    }

    /// Whether a path is wanted itself, or something in it may be (false); `None` if neither.
    fn wants(&self, path: &[u8], inside: bool) -> Option<bool> {
        if inside {
            return Some(true);
        }
        let text = String::from_utf8_lossy(path);
        if self.wanted.contains(&*text) {
            return Some(true);
        }
        let below = format!("{text}/");
        let next = self.wanted.range(below.clone()..).next();
        next.is_some_and(|next| next.starts_with(&below)).then_some(false)
    }
}

fn nanos(seconds: i64, nanos: u64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos.cast_signed())
}

fn changed_at(stat: &Stat) -> i64 {
    nanos(stat.st_ctime, stat.st_ctime_nsec)
}

/// The file's number and when it was last changed in any way, which nobody can set back. What was changed just now may
/// change once more without its time telling: such a state does not come again.
fn state(stat: &Stat) -> u64 {
    let changed = changed_at(stat);
    // Some file systems count in seconds only.
    let tick = if changed % 1_000_000_000 == 0 { 2_000_000_000 } else { 20_000_000 };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
    let mut hasher = DefaultHasher::new();
    (stat.st_ino, if now.saturating_sub(changed) < tick { now } else { changed }).hash(&mut hasher);
    hasher.finish().max(1)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn folder(files: &[&str]) -> (tempfile::TempDir, LentFolder) {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let folder = LentFolder::open(dir.path()).unwrap();
        (dir, folder)
    }

    fn listed(folder: &LentFolder, follow: &[&str], exclude: &[&str]) -> String {
        let owned = |all: &[&str]| all.iter().map(|&text| text.to_owned()).collect();
        let asked = Asked { follow: owned(follow), exclude: owned(exclude) };
        let mut all = Vec::new();
        let took = |entry: Entry| {
            all.push(String::from_utf8(entry.path).unwrap());
            true
        };
        folder.list(&asked, &mut { took }).unwrap();
        all.join(" ")
    }

    #[test]
    fn what_is_asked_for_is_listed_with_what_links_lead_to() {
        let (dir, folder) = folder(&["a/f", "a.txt", "b/c/f", "b/d/g", "e/f", "z"]);
        let link = |target: &str, name: &str| symlink(target, dir.path().join(name)).unwrap();
        link("b/c", "to-c");
        link("/e/../e/f", "a/to-e");
        link("../../../../../etc/passwd", "out");
        link("self", "self");
        link("self/x", "b/self");
        for (follow, wanted) in [
            (&[][..], "a a/f a/to-e a.txt b b/c b/c/f b/d b/d/g b/self e e/f out self to-c z"),
            (&[""], "a a/f a/to-e a.txt b b/c b/c/f b/d b/d/g b/self e e/f out self to-c z"),
            (&["b/c"], "b b/c b/c/f"),
            (&["b/c/nothing", "z/nothing", "nothing"], ""),
            (&["to-c/f"], "b b/c b/c/f to-c"),
            (&["a/to-e"], "a a/to-e e e/f"),
            (&["b/../z", "../../a.txt"], "a.txt z"),
            (&["*/*/f"], "a a/to-e b b/c b/c/f b/self out self to-c"),
            (&["b/*/g", "a/t*"], "a a/to-e b b/d b/d/g b/self e e/f"),
            (&["**/g"], "b b/d b/d/g"),
            (&["to-*/f"], "b b/c b/c/f to-c"),
            (&["out", "self", "b/self"], "b b/self out self"),
        ] {
            assert_eq!(listed(&folder, follow, &[]), wanted, "{follow:?}");
        }
        for (exclude, wanted) in [
            (&["*", "!b/d"][..], "b b/d b/d/g"),
            (&["*", "!b/nothing"], ""),
            (&["**/f", "out", "self", "b/self", "to-c"], "a a/to-e a.txt b b/c b/d b/d/g e z"),
            (&["a", "b", "e", "?e*", "out", "to-c", "!a/f"], "a a/f a.txt z"),
        ] {
            assert_eq!(listed(&folder, &[], exclude), wanted, "{exclude:?}");
        }
        assert_eq!(listed(&folder, &["b", "z"], &["b/d"]), "b b/c b/c/f b/self z");
    }

    #[test]
    fn a_path_that_leads_out_is_not_opened() {
        let (dir, folder) = folder(&["a/f", "b/f"]);
        for path in ["../x", "/etc/passwd", "a/../../x"] {
            assert!(folder.open(path.as_bytes()).is_err(), "{path}");
        }
        symlink("/etc/passwd", dir.path().join("l")).unwrap();
        symlink("/etc", dir.path().join("e")).unwrap();
        for path in ["l", "e/passwd", "a", "nothing"] {
            let error = folder.open(path.as_bytes()).err().unwrap();
            assert!(error.to_string().contains(path), "{error}");
        }
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_an_error() {
        use std::io::Write as _;
        let (dir, folder) = folder(&["f"]);
        let read = |meanwhile: &dyn Fn(&Path)| {
            let path = dir.path().join("f");
            fs::write(&path, "first").unwrap();
            let mut open = folder.open(b"f").unwrap();
            let mut some = [0; 2];
            open.read_exact(&mut some).unwrap();
            // Further on than the clock's tick.
            std::thread::sleep(std::time::Duration::from_millis(30));
            meanwhile(&path);
            let mut rest = String::new();
            open.read_to_string(&mut rest).map(|_| rest)
        };
        assert_eq!(read(&|_| ()).unwrap(), "rst");
        let append = |path: &Path| {
            fs::OpenOptions::new().append(true).open(path).unwrap().write_all(b"more").unwrap();
        };
        for change in [&append as &dyn Fn(&Path), &|path| fs::write(path, "other").unwrap(), &|path| {
            fs::write(path, "").unwrap();
        }] {
            let error = read(change).unwrap_err().to_string();
            assert!(error.contains("\"f\" was changed while it was being read"), "{error}");
        }
    }

    #[test]
    fn a_state_comes_again_only_when_the_file_was_left_alone() {
        let (dir, folder) = folder(&["f"]);
        let states = || {
            let mut state = 0;
            folder
                .list(&Asked::default(), &mut |entry| {
                    state = entry.state;
                    true
                })
                .unwrap();
            state
        };
        assert_ne!(states(), states());
        let settled = || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            states()
        };
        let first = settled();
        assert_eq!(first, settled());
        // The same length and time, another byte.
        let path = dir.path().join("f");
        let mtime = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, "y").unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_modified(mtime).unwrap();
        assert_ne!(first, settled());
    }
}
