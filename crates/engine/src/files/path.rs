//! Paths in a container as docker reads them, and their resolution below the container's root.
//!
//! Opening never trusts a path that was looked at before: whatever is opened is opened with
//! `openat2(RESOLVE_IN_ROOT)`, so a link or a directory that the container swaps meanwhile can at worst lead to
//! another place in the same container. What [`target_of`] finds is told to people and opened never.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

const RESOLVE: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

/// Links followed before a path is taken for a loop, as the kernel counts.
const LINKS: usize = 40;

/// How often a look-up is repeated that a concurrent rename has disturbed.
const RETRIES: usize = 128;

/// A path split as docker does: what is looked up with links followed, and a last part that is not followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Split {
    /// Absolute.
    pub dir: String,
    /// Empty: the directory itself.
    pub base: String,
    /// What docker calls it: the last part as written, `.`, or `/`.
    pub name: String,
    /// The whole path, absolute and without a trailing slash.
    pub whole: String,
}

/// `path` from the container's root, with a trailing `/` or `/.` kept in mind.
pub(super) fn split(path: &str) -> Split {
    let whole = crate::volumes::clean(&format!("/{path}"));
    let dot = path == "." || path.ends_with("/.");
    let itself = dot || path.ends_with('/') || whole == "/";
    let (dir, base) = whole.rsplit_once('/').unwrap_or(("", &whole));
    let name = if dot {
        "."
    } else if whole == "/" {
        "/"
    } else {
        base
    };
    let name = name.to_owned();
    if itself {
        return Split { dir: whole.clone(), base: String::new(), name, whole };
    }
    let dir = if dir.is_empty() { "/" } else { dir };
    Split { dir: dir.to_owned(), base: base.to_owned(), name, whole: whole.clone() }
}

/// Opens a path below `root`, links followed, without any right but that of looking from there.
pub(super) fn open(root: impl AsFd, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let relative = path.trim_start_matches('/');
    let relative = if relative.is_empty() { "." } else { relative };
    let flags = flags | OFlags::CLOEXEC;
    for _ in 1..RETRIES {
        match openat2(root.as_fd(), relative, flags, Mode::empty(), RESOLVE) {
            Err(Errno::AGAIN) => std::thread::yield_now(),
            other => return other,
        }
    }
    openat2(root.as_fd(), relative, flags, Mode::empty(), RESOLVE)
}

/// Where `path` leads, as an absolute path of the container; parts that are not there are kept as they are.
/// `None` when it loops.
pub(super) fn target_of(root: impl AsFd, path: &str) -> rustix::io::Result<Option<String>> {
    let mut left: VecDeque<String> = parts(path);
    let mut done: Vec<String> = Vec::new();
    let mut links = 0;
    while let Some(part) = left.pop_front() {
        if part == ".." {
            done.pop();
            continue;
        }
        done.push(part);
        let here = done.join("/");
        let stat = match lstat(root.as_fd(), &here) {
            Ok(stat) => stat,
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            Err(error) => return Err(error),
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            continue;
        }
        links += 1;
        if links > LINKS {
            return Ok(None);
        }
        let link = open(root.as_fd(), &here, OFlags::PATH | OFlags::NOFOLLOW)?;
        let text = rustix::fs::readlinkat(&link, "", Vec::new())?.to_string_lossy().into_owned();
        if text.starts_with('/') {
            done.clear();
        } else {
            done.pop();
        }
        for part in parts(&text).into_iter().rev() {
            left.push_front(part);
        }
    }
    Ok(Some(format!("/{}", done.join("/"))))
}

fn lstat(root: impl AsFd, path: &str) -> rustix::io::Result<rustix::fs::Stat> {
    let found = open(root, path, OFlags::PATH | OFlags::NOFOLLOW)?;
    rustix::fs::statat(&found, "", AtFlags::EMPTY_PATH)
}

fn parts(path: &str) -> VecDeque<String> {
    path.split('/').filter(|part| !matches!(*part, "" | ".")).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_trailing_slash_or_dot_means_what_a_link_leads_to() {
        let of = |path: &str| {
            let split = split(path);
            (split.dir, split.base, split.name)
        };
        let triple = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        assert_eq!(of("/a/b"), triple("/a", "b", "b"));
        assert_eq!(of("a"), triple("/", "a", "a"));
        assert_eq!(of("/a/b/"), triple("/a/b", "", "b"));
        assert_eq!(of("/a/b/."), triple("/a/b", "", "."));
        assert_eq!(of("/"), triple("/", "", "/"));
        assert_eq!(of("."), triple("/", "", "."));
        assert_eq!(of("/../../a/../b"), triple("/", "b", "b"));
    }

    #[test]
    fn links_lead_nowhere_but_into_the_root() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("d/sub")).unwrap();
        symlink("/d", dir.path().join("abs")).unwrap();
        symlink("../../../../d/sub", dir.path().join("d/up")).unwrap();
        symlink("loop2", dir.path().join("loop1")).unwrap();
        symlink("loop1", dir.path().join("loop2")).unwrap();
        let root = std::fs::File::open(dir.path()).unwrap();
        let to = |path: &str| target_of(&root, path).unwrap();
        assert_eq!(to("/abs/up").as_deref(), Some("/d/sub"));
        assert_eq!(to("/abs/none/x").as_deref(), Some("/d/none/x"));
        assert_eq!(to("/loop1"), None);
        assert!(open(&root, "/abs/up", OFlags::PATH).is_ok());
        assert_eq!(open(&root, "/loop1", OFlags::PATH).unwrap_err(), Errno::LOOP);
        assert_eq!(open(&root, "/../../etc/passwd", OFlags::PATH).unwrap_err(), Errno::NOENT);
    }
}
