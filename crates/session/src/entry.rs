//! Files as the two sides name them: Go's mode bits in a message, plain ones here; and the order they come in.

use crate::error::{Error, Result};
use crate::messages::Stat;

/// Go's `os.FileMode`.
mod go {
    pub const DIR: u32 = 1 << 31;
    pub const SYMLINK: u32 = 1 << 27;
    pub const SETUID: u32 = 1 << 23;
    pub const SETGID: u32 = 1 << 22;
    pub const STICKY: u32 = 1 << 20;
    /// Every bit that says what kind of file it is: directory, link, device, pipe, socket, character device, other.
    pub const TYPE: u32 = DIR | SYMLINK | 1 << 26 | 1 << 25 | 1 << 24 | 1 << 21 | 1 << 19;
}

/// The longest path and link, in bytes, as in the kernel.
const MOST_PATH: usize = 4096;

/// What a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Bytes.
    File {
        size: u64,
    },
    /// Another name of an earlier file.
    HardLink(Vec<u8>),
    Directory,
    Symlink(Vec<u8>),
    /// A device, a pipe or a socket.
    Other,
}

/// One file of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative, without `.` and `..`.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permissions with set-id and sticky bits, as in `st_mode`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Nanoseconds since the epoch.
    pub mtime: i64,
    /// What tells one state of the file from another, besides its size and time; 0 if the sender does not say. Only
    /// `brig` does.
    pub state: u64,
}

impl Entry {
    pub(crate) fn of(stat: Stat) -> Result<Self> {
        let shown = || shown(&stat.path);
        if stat.linkname.len() > MOST_PATH || stat.linkname.contains(&0) {
            return Err(Error::protocol(format!("{:?} is a link to no possible path", shown())));
        }
        let kind = match stat.mode & go::TYPE {
            0 if stat.linkname.is_empty() => Kind::File {
                size: u64::try_from(stat.size).map_err(|_negative| {
                    Error::protocol(format!("{:?} has the size {}", shown(), stat.size))
                })?,
            },
            0 => Kind::HardLink(stat.linkname),
            go::DIR => Kind::Directory,
            go::SYMLINK if stat.linkname.is_empty() => {
                return Err(Error::protocol(format!("{:?} is a link to nothing", shown())));
            }
            go::SYMLINK => Kind::Symlink(stat.linkname),
            _ => Kind::Other,
        };
        let mut mode = stat.mode & 0o777;
        for (theirs, ours) in [(go::SETUID, 0o4000), (go::SETGID, 0o2000), (go::STICKY, 0o1000)] {
            if stat.mode & theirs != 0 {
                mode |= ours;
            }
        }
        let Stat { path, uid, gid, mtime, state, .. } = stat;
        Ok(Self { path, kind, mode, uid, gid, mtime, state })
    }

    /// As it is sent; what is no file, directory or link is sent as an empty file nobody can ask for.
    pub(crate) fn into_stat(self) -> Stat {
        let mut mode = self.mode & 0o777;
        for (ours, theirs) in [(0o4000, go::SETUID), (0o2000, go::SETGID), (0o1000, go::STICKY)] {
            if self.mode & ours != 0 {
                mode |= theirs;
            }
        }
        let (size, linkname) = match self.kind {
            Kind::File { size } => (i64::try_from(size).unwrap_or(i64::MAX), Vec::new()),
            Kind::HardLink(to) => (0, to),
            Kind::Directory => {
                mode |= go::DIR;
                (0, Vec::new())
            }
            Kind::Symlink(to) => {
                mode |= go::SYMLINK;
                (0, to)
            }
            Kind::Other => (0, Vec::new()),
        };
        Stat {
            path: self.path,
            mode,
            uid: self.uid,
            gid: self.gid,
            size,
            mtime: self.mtime,
            linkname,
            devmajor: 0,
            devminor: 0,
            state: self.state,
        }
    }
}

/// Checks the order of a listing: every directory before what is in it, names ascending, nothing twice.
#[derive(Debug, Default)]
pub(crate) struct Order {
    last: Vec<u8>,
    /// The open directories, each below the one before.
    dirs: Vec<Vec<u8>>,
}

impl Order {
    pub fn check(&mut self, entry: &Entry) -> Result<()> {
        let path = &entry.path;
        let shown = || shown(path);
        if path.is_empty() || path.len() > MOST_PATH || path.contains(&0) {
            return Err(Error::protocol(format!("{:?} is no possible path", shown())));
        }
        if path.split(|b| *b == b'/').any(|part| matches!(part, b"" | b"." | b"..")) {
            return Err(Error::protocol(format!("{:?} is not a plain path within the folder", shown())));
        }
        if !self.last.is_empty() && sort_key(path) <= sort_key(&self.last) {
            return Err(Error::protocol(format!(
                "{:?} comes after {:?}: the listing is out of order",
                shown(),
                self::shown(&self.last)
            )));
        }
        let parent = path.iter().rposition(|b| *b == b'/').map_or(&b""[..], |at| &path[..at]);
        while self.dirs.last().is_some_and(|dir| dir != parent) {
            self.dirs.pop();
        }
        if !parent.is_empty() && self.dirs.is_empty() {
            return Err(Error::protocol(format!("{:?} is in no directory that was listed", shown())));
        }
        if entry.kind == Kind::Directory {
            self.dirs.push(path.clone());
        }
        self.last.clone_from(path);
        Ok(())
    }
}

/// A path for people; of one that is too long, its beginning.
fn shown(path: &[u8]) -> String {
    const MOST: usize = 256;
    match path.get(..MOST) {
        Some(begin) if path.len() > MOST => {
            format!("{}… ({} bytes)", String::from_utf8_lossy(begin), path.len())
        }
        _ => String::from_utf8_lossy(path).into_owned(),
    }
}

/// Bytes that sort as paths do part by part: the separator below everything else.
pub(crate) fn sort_key(path: &[u8]) -> impl Ord + '_ {
    // Nothing in a path is 0.
    path.iter().map(|b| if *b == b'/' { 0 } else { *b }).collect::<Vec<u8>>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: Kind) -> Entry {
        Entry { path: path.into(), kind, mode: 0o644, uid: 0, gid: 0, mtime: 0, state: 0 }
    }

    fn listed(paths: &[&str]) -> Result<()> {
        let mut order = Order::default();
        paths.iter().try_for_each(|path| {
            let (path, kind) = match path.strip_suffix('/') {
                Some(dir) => (dir, Kind::Directory),
                None => (*path, Kind::File { size: 0 }),
            };
            order.check(&entry(path, kind))
        })
    }

    #[test]
    fn a_listing_is_in_order_and_inside() {
        listed(&["a/", "a/b/", "a/b/c", "a/d", "a.txt", "b"]).unwrap();
        for bad in [
            &["../x"][..],
            &["/x"],
            &["a/", "a/../../x"],
            &["a/", "a/./x"],
            &["a//x"],
            &["a/x"],
            &["a", "a/x"],
            &["b", "a"],
            &["a", "a"],
            &["a.txt", "a/"],
            &["a/", "b/", "a/x"],
            &["a/", "a/b", "a/b/c"],
            &["."],
            &[""],
            &["a\0b"],
        ] {
            assert!(matches!(listed(bad), Err(Error::Protocol(_))), "{bad:?}");
        }
    }

    #[test]
    fn modes_are_translated_both_ways() {
        for (kind, mode) in [
            (Kind::File { size: 3 }, 0o4755),
            (Kind::Directory, 0o1777),
            (Kind::Symlink(b"x".to_vec()), 0o777),
            (Kind::HardLink(b"x".to_vec()), 0o2644),
        ] {
            let mut one = entry("a", kind);
            one.mode = mode;
            assert_eq!(Entry::of(one.clone().into_stat()).unwrap(), one);
        }
        let stat = |mode, linkname: &str, size| Stat {
            path: b"a".to_vec(),
            mode,
            linkname: linkname.into(),
            size,
            ..Stat::default()
        };
        assert_eq!(Entry::of(stat(1 << 26 | 1 << 21, "", 0)).unwrap().kind, Kind::Other);
        assert!(Entry::of(stat(0o644, "", -1)).is_err());
        assert!(Entry::of(stat(1 << 27, "", 0)).is_err());
        assert!(Entry::of(stat(0, "a\0", 0)).is_err());
    }
}
