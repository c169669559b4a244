//! Reading a file system from its root's descriptor: links stay inside it, and what is read is bounded.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, statat};

/// The largest database or document that is read.
const MAX_FILE: u64 = 256 << 20;
/// The largest document of a language's package.
const MAX_DOCUMENT: u64 = 16 << 20;
/// How deep directories are followed.
const MAX_DEPTH: usize = 128;

pub(crate) struct Files<'r> {
    root: BorrowedFd<'r>,
}

/// A file that the walk has come to.
pub(crate) struct Seen<'d> {
    parent: BorrowedFd<'d>,
    name: &'d CStr,
    path: &'d str,
    mode: u32,
    size: u64,
}

impl<'r> Files<'r> {
    pub fn new(root: BorrowedFd<'r>) -> Self {
        Self { root }
    }

    fn open(&self, path: &str, flags: OFlags) -> io::Result<Option<OwnedFd>> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        match openat2(self.root, path, flags, Mode::empty(), resolve) {
            Ok(fd) => Ok(Some(fd)),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// A regular file's content; `None` when there is none.
    pub fn read(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        let Some(fd) = self.open(path, OFlags::RDONLY)? else { return Ok(None) };
        let file = File::from(fd);
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        read_bounded(file, MAX_FILE).map(Some)
    }

    /// The names in a directory; none when there is none.
    pub fn names(&self, path: &str) -> io::Result<Vec<String>> {
        let Some(fd) = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)? else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        for entry in Dir::new(fd)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Comes to every regular file, by name.
    pub fn walk(&self, visit: &mut dyn FnMut(&Seen<'_>)) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(self.root, c".", flags, Mode::empty())?;
        directory(root, "", 0, visit)
    }
}

fn directory(dir: OwnedFd, path: &str, depth: usize, visit: &mut dyn FnMut(&Seen<'_>)) -> io::Result<()> {
    let mut names: Vec<CString> = Vec::new();
    for entry in Dir::read_from(&dir)? {
        let name = entry?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    names.sort();
    for name in names {
        let Ok(stat) = statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        let shown = name.to_string_lossy();
        let path = if path.is_empty() { shown.into_owned() } else { format!("{path}/{shown}") };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory if depth < MAX_DEPTH => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                if let Ok(below) = rustix::fs::openat(&dir, &name, flags, Mode::empty()) {
                    directory(below, &path, depth + 1, visit)?;
                }
            }
            FileType::RegularFile => visit(&Seen {
                parent: std::os::fd::AsFd::as_fd(&dir),
                name: &name,
                path: &path,
                mode: stat.st_mode,
                size: u64::try_from(stat.st_size).unwrap_or_default(),
            }),
            _ => {}
        }
    }
    Ok(())
}

impl Seen<'_> {
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// From the root, without a slash before it.
    pub fn path(&self) -> &str {
        self.path
    }

    pub fn is_executable(&self) -> bool {
        self.mode & 0o111 != 0 && self.size > 64
    }

    pub fn open(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(File::from(rustix::fs::openat(self.parent, self.name, flags, Mode::empty())?))
    }

    /// Its whole content: a document.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        read_bounded(self.open()?, MAX_DOCUMENT)
    }
}

fn read_bounded(file: File, most: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    let read = file.take(most + 1).read_to_end(&mut content)?;
    if read as u64 > most {
        return Err(io::Error::other(format!("it has more than {most} bytes")));
    }
    Ok(content)
}
