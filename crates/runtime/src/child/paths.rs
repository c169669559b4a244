//! Paths inside the root file system, opened and made. Same invariant as `child`: nothing here allocates, locks, logs or
//! panics; what is opened is in the root, whatever links say.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{Stage, at};
use crate::plan::{Part, Target};

/// A directory that is open for one use, or anyway.
pub(super) enum Directory<'a> {
    Kept(BorrowedFd<'a>),
    Opened(OwnedFd),
}

impl AsFd for Directory<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Kept(fd) => *fd,
            Self::Opened(fd) => fd.as_fd(),
        }
    }
}

impl Stage<'_> {
    pub(super) fn open_at(&self, path: &CStr, flags: OFlags, strict: bool) -> Result<OwnedFd, Errno> {
        let Some(root) = &self.root else { return Err(Errno::BADF) };
        let (root, path) = match (&self.proc, &self.sys) {
            (Some(proc), _) if below(path, b"proc").is_some() => (proc, below(path, b"proc").unwrap_or(c".")),
            (_, Some(sys)) if below(path, b"sys").is_some() => (sys, below(path, b"sys").unwrap_or(c".")),
            _ => (root, path),
        };
        let mut resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        if strict {
            resolve |= ResolveFlags::NO_SYMLINKS;
        }
        loop {
            match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // A rename elsewhere at the wrong moment: the kernel asks to try again.
                Err(Errno::AGAIN) => {}
                other => return other,
            }
        }
    }

    pub(super) fn open(&self, target: &Target, flags: OFlags) -> Result<OwnedFd, (Part, Errno)> {
        self.open_at(&target.path, flags, target.strict).map_err(at(Part::Open))
    }

    /// A place right in a file system that an earlier step made, if that is where `path` leads: as long as it is not
    /// there, nothing can be in its way.
    pub(super) fn within<'b>(&self, path: &'b CStr) -> Option<(BorrowedFd<'_>, &'b CStr)> {
        let dev = self.dev.as_ref().map(|fd| (fd, &b"dev"[..]));
        let groups = self.groups.as_ref().map(|(at, fd)| (fd, at.to_bytes()));
        let found = [dev, groups].into_iter().flatten().find_map(|(fd, at)| Some((fd, below(path, at)?)));
        found.filter(|(_, name)| !name.to_bytes().contains(&b'/')).map(|(fd, name)| (fd.as_fd(), name))
    }

    /// What is mounted at `path` hides such a file system that is there or below.
    pub(super) fn cover(&mut self, path: &CStr) {
        let over = |at: &CStr| path == c"." || below(at, path.to_bytes()).is_some();
        if over(c"dev") {
            self.dev = None;
        }
        if self.groups.as_ref().is_some_and(|(at, _)| over(at)) {
            self.groups = None;
        }
    }

    /// Makes a directory right in such a file system; nothing, if something is there already.
    pub(super) fn fresh<'b>(
        &self,
        path: &'b CStr,
    ) -> Result<Option<(BorrowedFd<'_>, &'b CStr)>, (Part, Errno)> {
        let Some((dir, name)) = self.within(path) else { return Ok(None) };
        match rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => Ok(Some((dir, name))),
            Err(Errno::EXIST) => Ok(None),
            Err(e) => Err((Part::Create, e)),
        }
    }

    /// Opens a directory for use by descriptor, making it if needed.
    pub(super) fn directory(&self, target: &Target) -> Result<Directory<'_>, (Part, Errno)> {
        match &self.dev {
            Some(dev) if target.path.to_bytes() == b"dev" => Ok(Directory::Kept(dev.as_fd())),
            _ => self.ensure(target, true).map(Directory::Opened),
        }
    }

    /// Opens `target` (O_PATH), creating it and the directories above it if they are missing.
    pub(super) fn ensure(&self, target: &Target, directory: bool) -> Result<OwnedFd, (Part, Errno)> {
        self.ensure_path(target.path.as_c_str(), target.strict, directory, 0)
    }

    pub(super) fn ensure_path(
        &self,
        wanted: &CStr,
        strict: bool,
        directory: bool,
        links: u32,
    ) -> Result<OwnedFd, (Part, Errno)> {
        match self.open_at(wanted, OFlags::PATH, strict) {
            Err(Errno::NOENT) => {}
            other => return other.map_err(at(Part::Open)),
        }
        let mut prefix = [0_u8; 4096];
        let bytes = wanted.to_bytes();
        if bytes.len() >= prefix.len() {
            return Err((Part::Open, Errno::NAMETOOLONG));
        }
        let (mut above, mut start) = self.deepest(bytes, &mut prefix, strict)?;
        // Nothing of what follows can be reached: each part is missing, or a link to what is missing.
        while start < bytes.len() {
            let rest = &bytes[start..];
            let length = rest.iter().position(|&b| b == b'/').unwrap_or(rest.len());
            let end = start + length;
            let last = end == bytes.len();
            if length == 0 {
                start = end + 1;
                continue;
            }
            let path = c_prefix(bytes, end, &mut prefix)?;
            let name = CStr::from_bytes_with_nul(&path.to_bytes_with_nul()[start..])
                .map_err(|_unused| (Part::Open, Errno::INVAL))?;
            let made = if last && !directory {
                let mode = Mode::from_raw_mode(0o644);
                rustix::fs::mknodat(&above, name, FileType::RegularFile, mode, 0)
            } else {
                rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(0o755))
            };
            let there = made == Err(Errno::EXIST);
            if !there {
                made.map_err(at(Part::Create))?;
            }
            above = match self.open_at(path, OFlags::PATH, strict) {
                // A link to nothing: what it leads to is made.
                Err(Errno::NOENT) if there && !strict && links < 40 => {
                    let mut led = [0_u8; 4096];
                    let led = follow(above.as_fd(), name, &bytes[..start], &bytes[end..], &mut led)?;
                    return self.ensure_path(led, strict, directory, links + 1);
                }
                // Its own, or that of another container with the same root, which was quicker.
                other => other.map_err(at(Part::Open))?,
            };
            start = end + 1;
        }
        Ok(above)
    }

    /// The deepest directory on the way to `path` that is there (mostly the last but one), and where in the path
    /// the rest begins.
    pub(super) fn deepest(
        &self,
        path: &[u8],
        prefix: &mut [u8; 4096],
        strict: bool,
    ) -> Result<(OwnedFd, usize), (Part, Errno)> {
        let mut end = path.len();
        while let Some(cut) = path[..end].iter().rposition(|&b| b == b'/') {
            if cut > 0 {
                match self.open_at(c_prefix(path, cut, prefix)?, OFlags::PATH, strict) {
                    Err(Errno::NOENT) => {}
                    other => return other.map(|fd| (fd, cut + 1)).map_err(at(Part::Open)),
                }
            }
            end = cut;
        }
        let root = rustix::io::fcntl_dupfd_cloexec(self.root()?, 0).map_err(at(Part::Open))?;
        Ok((root, 0))
    }
}

/// The first `end` bytes of a path as a path of its own.
fn c_prefix<'a>(path: &[u8], end: usize, buffer: &'a mut [u8; 4096]) -> Result<&'a CStr, (Part, Errno)> {
    buffer[..end].copy_from_slice(&path[..end]);
    buffer[end] = 0;
    CStr::from_bytes_with_nul(&buffer[..=end]).map_err(|_unused| (Part::Open, Errno::INVAL))
}

/// The path without its first part, if that is `first`.
pub(super) fn below<'a>(path: &'a CStr, first: &[u8]) -> Option<&'a CStr> {
    let bytes = path.to_bytes_with_nul();
    let rest = bytes.strip_prefix(first)?;
    match rest {
        [0] => Some(c"."),
        [b'/', inner @ ..] => CStr::from_bytes_with_nul(inner).ok(),
        _ => None,
    }
}

/// Where the link `name` in `dir` (whose path is `above`) leads, with `rest` behind it.
fn follow<'a>(
    dir: BorrowedFd<'_>,
    name: &CStr,
    above: &[u8],
    rest: &[u8],
    buffer: &'a mut [u8; 4096],
) -> Result<&'a CStr, (Part, Errno)> {
    let mut link = [0_u8; 4096];
    let length = rustix::fs::readlinkat_raw(dir, name, &mut link[..]).map_err(at(Part::Create))?;
    let link = link.get(..length).unwrap_or_default();
    let above = if link.first() == Some(&b'/') { &[][..] } else { above };
    let mut end = 0;
    for part in [above, link, rest].into_iter().flat_map(|p| p.split(|b| *b == b'/')) {
        match part {
            b"" | b"." => {}
            // Above the root is the root.
            b".." => end = buffer[..end].iter().rposition(|b| *b == b'/').unwrap_or(0),
            part => {
                let from = end + usize::from(end > 0);
                let Some(room) = buffer.get_mut(from..from + part.len() + 1) else {
                    return Err((Part::Open, Errno::NAMETOOLONG));
                };
                room[..part.len()].copy_from_slice(part);
                if end > 0 {
                    buffer[end] = b'/';
                }
                end = from + part.len();
            }
        }
    }
    if end == 0 {
        return Err((Part::Open, Errno::NOENT));
    }
    buffer[end] = 0;
    CStr::from_bytes_with_nul(&buffer[..=end]).map_err(|_unused| (Part::Open, Errno::INVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_within_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let fd = std::fs::File::open(dir.path()).unwrap();
        for (link, above, rest, leads) in [
            ("/a/b", "x/", "", Some(c"a/b")),
            ("../b", "x/y/", "/c", Some(c"x/b/c")),
            ("../../../b", "x/", "", Some(c"b")),
            ("./b//c/", "", "/d", Some(c"b/c/d")),
            ("/", "x/", "", None),
        ] {
            std::os::unix::fs::symlink(link, dir.path().join("link")).unwrap();
            let mut buffer = [0; 4096];
            let found = follow(fd.as_fd(), c"link", above.as_bytes(), rest.as_bytes(), &mut buffer).ok();
            assert_eq!(found, leads, "{link}");
            std::fs::remove_file(dir.path().join("link")).unwrap();
        }
        assert_eq!(below(c"proc/sys", b"proc"), Some(c"sys"));
        assert_eq!(below(c"proc", b"proc"), Some(c"."));
        assert_eq!(below(c"process", b"proc"), None);
    }
}
