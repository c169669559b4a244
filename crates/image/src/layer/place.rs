//! Finding the place of an entry: parent directories by descriptor, never through a symbolic link, never outside.
//!
//! Every lookup starts at the target's descriptor and is bounded by the kernel (openat2 with BENEATH, NO_SYMLINKS,
//! NO_MAGICLINKS, NO_XDEV); the final component is used relative to its parent's descriptor and never followed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, XattrFlags};
use rustix::io::Errno;

use super::{LayerError, NAME_MAX, OPAQUE_XATTR, PATH_MAX, lossy};
use crate::tree;

/// How many parent directories are kept open.
const CACHED: usize = 16;

const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

type Result<T> = std::result::Result<T, LayerError>;

/// A directory being filled.
pub(super) struct Target {
    root: Rc<OwnedFd>,
    /// Parents used last, the latest at the end.
    cache: Vec<(Vec<u8>, Rc<OwnedFd>)>,
    /// Whether modes given at creation are exact (no umask in the way).
    pub exact_modes: bool,
    /// Whether there were directories before, which may hand down access lists to what is made in them.
    pub inherits: bool,
    /// Directories nobody described, made on the way.
    pub implied: u64,
}

impl Target {
    pub fn open(path: &Path, exact_modes: bool, inherits: bool) -> io::Result<Self> {
        let root = Rc::new(OwnedFd::from(File::open(path)?));
        Ok(Self { root, cache: Vec::new(), exact_modes: exact_modes && !inherits, inherits, implied: 0 })
    }

    pub fn root(&self) -> Rc<OwnedFd> {
        Rc::clone(&self.root)
    }

    /// The directory `path` (already [`normalise`]d; empty is the root), made with what is above it if need be.
    pub fn directory(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>> {
        if let Some(found) = self.existing(path).map_err(|error| refused(path, error))? {
            return Ok(found);
        }
        let made = self.make_all(path)?;
        self.remember(path, &made);
        Ok(made)
    }

    /// The directory `path` if it is there.
    pub fn existing(&mut self, path: &[u8]) -> std::result::Result<Option<Rc<OwnedFd>>, Errno> {
        if path.is_empty() {
            return Ok(Some(self.root()));
        }
        if let Some(at) = self.cache.iter().rposition(|(known, _)| known == path) {
            let last = self.cache.len() - 1;
            if at != last {
                let hit = self.cache.remove(at);
                self.cache.push(hit);
            }
            return Ok(Some(Rc::clone(&self.cache[last].1)));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat2(&self.root, path, flags, Mode::empty(), RESOLVE) {
            Ok(fd) => {
                let fd = Rc::new(fd);
                self.remember(path, &fd);
                Ok(Some(fd))
            }
            // What is in the way may be a whiteout, which gives way.
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A directory for reading and changing its attributes, below the root and not through links.
    pub fn open_readable(&self, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = if path.is_empty() { b"." } else { path };
        rustix::fs::openat2(&self.root, path, flags, Mode::empty(), RESOLVE)
    }

    /// Forgets open directories: one of them may be about to go.
    pub fn forget(&mut self) {
        self.cache.clear();
    }

    fn remember(&mut self, path: &[u8], fd: &Rc<OwnedFd>) {
        if self.cache.len() == CACHED {
            self.cache.remove(0);
        }
        self.cache.push((path.to_vec(), Rc::clone(fd)));
    }

    fn make_all(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>> {
        let mut at = self.root();
        let mut end = 0;
        for component in path.split(|&b| b == b'/') {
            end += component.len() + usize::from(end > 0);
            let os = |operation: &'static str| {
                move |error: Errno| LayerError::Os {
                    operation,
                    entry: lossy(&path[..end]),
                    source: error.into(),
                }
            };
            let mode = Mode::from_raw_mode(0o755);
            match rustix::fs::mkdirat(&at, component, mode) {
                Ok(()) => {
                    self.implied += 1;
                    self.disinherit(at.as_fd(), component)
                        .map_err(os("remove the inherited access list of"))?;
                    if !self.exact_modes {
                        rustix::fs::chmodat(&at, component, mode, AtFlags::empty()).map_err(os("chmod"))?;
                    }
                }
                Err(Errno::EXIST) => {
                    let stat =
                        rustix::fs::statat(&at, component, AtFlags::SYMLINK_NOFOLLOW).map_err(os("stat"))?;
                    match FileType::from_raw_mode(stat.st_mode) {
                        FileType::Directory => {}
                        _ if is_whiteout(&stat) => {
                            rustix::fs::unlinkat(&at, component, AtFlags::empty()).map_err(os("unlink"))?;
                            rustix::fs::mkdirat(&at, component, mode).map_err(os("mkdir"))?;
                            set_opaque(&at, component).map_err(os("mark opaque"))?;
                            self.implied += 1;
                        }
                        FileType::Symlink => return Err(refused(path, Errno::LOOP)),
                        _ => return Err(refused(path, Errno::NOTDIR)),
                    }
                }
                Err(error) => return Err(os("mkdir")(error)),
            }
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            at = Rc::new(rustix::fs::openat(&at, component, flags, Mode::empty()).map_err(os("open"))?);
        }
        Ok(at)
    }

    /// Takes from what was just made (and is no link) what it has of its directory's default access list.
    pub fn disinherit(&self, parent: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<()> {
        if !self.inherits {
            return Ok(());
        }
        let path = [format!("/proc/self/fd/{}/", parent.as_raw_fd()).as_bytes(), name].concat();
        for list in ["system.posix_acl_access", "system.posix_acl_default"] {
            match rustix::fs::lremovexattr(&path[..], list) {
                // Only directories have defaults, and some file systems have neither.
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::ACCESS) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Removes what stands where another entry is to be made.
    pub fn clear(&mut self, parent: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
        self.forget();
        tree::remove_at(parent, name)
    }
}

/// Marks the directory as hiding all that lower layers have in it.
pub(super) fn set_opaque(parent: impl AsFd, name: &[u8]) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    rustix::fs::fsetxattr(&dir, OPAQUE_XATTR, b"y", XattrFlags::empty())
}

pub(super) fn is_whiteout(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

fn refused(path: &[u8], error: Errno) -> LayerError {
    let problem = match error {
        Errno::LOOP => "the path leads through a symbolic link".to_owned(),
        Errno::NOTDIR => "the path leads through something that is not a directory".to_owned(),
        Errno::XDEV => "the path leads out of the layer".to_owned(),
        error => return LayerError::Os { operation: "open", entry: lossy(path), source: error.into() },
    };
    LayerError::Entry { entry: lossy(path), problem }
}

/// The path below the root, without leading, doubled and trailing slashes and without `.`; `..` is refused.
pub(super) fn normalise(path: &[u8], into: &mut Vec<u8>) -> std::result::Result<(), String> {
    into.clear();
    for component in path.split(|&b| b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err("the path climbs with \"..\"".to_owned()),
            _ if component.len() > NAME_MAX => {
                return Err(format!("a name of {} bytes: at most {NAME_MAX} are possible", component.len()));
            }
            _ => {
                if !into.is_empty() {
                    into.push(b'/');
                }
                into.extend_from_slice(component);
            }
        }
    }
    if into.len() > PATH_MAX {
        return Err(format!("a path of {} bytes: at most {PATH_MAX} are possible", into.len()));
    }
    Ok(())
}

/// Parent and last component of a normalised path.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn normal(path: &str) -> std::result::Result<String, String> {
        let mut into = Vec::new();
        normalise(path.as_bytes(), &mut into)?;
        Ok(String::from_utf8(into).unwrap())
    }

    #[test]
    fn paths_are_made_plain_or_refused() {
        assert_eq!(normal("./a//b/./c/").unwrap(), "a/b/c");
        assert_eq!(normal("/etc/passwd").unwrap(), "etc/passwd");
        assert_eq!(normal("./").unwrap(), "");
        assert_eq!(normal("...").unwrap(), "...");
        for bad in ["..", "../x", "a/../b", "a/..", "/.."] {
            assert!(normal(bad).is_err(), "{bad}");
        }
        assert!(normal(&"a/".repeat(10_000)).is_err());
        assert!(normal(&"a".repeat(256)).is_err());
    }

    proptest! {
        #[test]
        fn a_normal_path_never_climbs(path in "[a./]{0,30}") {
            if let Ok(path) = normal(&path) {
                prop_assert!(!path.starts_with('/') && !path.ends_with('/'));
                prop_assert!(path.is_empty() || path.split('/').all(|c| !matches!(c, "" | "." | "..")));
            }
        }
    }
}
