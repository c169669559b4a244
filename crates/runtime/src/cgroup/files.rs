//! Directories and files of control groups, as the kernel takes them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::hierarchy;
use crate::error::{Error, Kind};

pub(super) fn write(file: &Path, text: &str) -> Result<(), Error> {
    write_lines(file, std::iter::once(text))
}

/// Each line in a write of its own, as the kernel takes them.
pub(super) fn write_lines(file: &Path, lines: impl Iterator<Item = impl AsRef<str>>) -> Result<(), Error> {
    use rustix::fs::{Mode, OFlags, open};
    let cause = |text: &str, e| Error::os(format!("writing {text:?} to {}", file.display()), e);
    let mut fd = None;
    for line in lines {
        let line = line.as_ref();
        let open = || open(file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        let fd = match &fd {
            Some(fd) => fd,
            None => fd.insert(open().map_err(|e| cause(line, e))?),
        };
        rustix::io::write(fd, line.as_bytes()).map_err(|e| cause(line, e))?;
    }
    Ok(())
}

/// A file whose size is not known before it is read, as those of the kernel: in large pieces, for each may be made anew.
pub(super) fn read(file: &Path) -> Result<String, Error> {
    use rustix::fs::{Mode, OFlags, open};
    let cause = |e: io::Error| Error::os(format!("reading {}", file.display()), e);
    let fd = open(file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| cause(e.into()))?;
    let mut all = Vec::new();
    let mut piece = [0_u8; 4096];
    loop {
        match rustix::io::read(&fd, &mut piece) {
            Ok(0) => break,
            Ok(length) => all.extend_from_slice(&piece[..length]),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(cause(e.into())),
        }
    }
    String::from_utf8(all).map_err(|e| cause(io::Error::new(io::ErrorKind::InvalidData, e)))
}

/// A directory that existed before is taken over only if nobody is in it, and nobody would get stuck in it: frozen, or
/// about to be, whoever enters stops before it has said anything.
pub(super) fn refuse_used(dir: &Path) -> Result<(), Error> {
    let says =
        |file: &str, text: &str| fs::read_to_string(dir.join(file)).is_ok_and(|state| state.trim() != text);
    if says("freezer.state", "THAWED") || says("cgroup.freeze", "0") {
        return Err(Error::new(Kind::State, "container's cgroup unexpectedly frozen"));
    }
    let list = dir.join("cgroup.procs");
    let count = fs::read_to_string(&list).map_or(0, |text| text.lines().count());
    if count > 0 {
        let text = format!("container's cgroup is not empty: {} lists {count} processes", list.display());
        return Err(Error::new(Kind::State, text));
    }
    Ok(())
}

/// False if it was there.
pub(super) fn make_dirs(mount: &Path, dir: &Path, cpuset: bool) -> Result<bool, Error> {
    match fs::create_dir(dir) {
        Ok(()) => {
            if cpuset {
                hierarchy::inherit_cpuset(dir)?;
            }
            Ok(true)
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) if e.kind() == io::ErrorKind::NotFound && dir != mount => {
            let parent = dir.parent().unwrap_or(mount);
            if parent == mount {
                return Err(Error::os(format!("creating cgroup {}", dir.display()), e));
            }
            make_dirs(mount, parent, cpuset)?;
            make_dirs(mount, dir, cpuset)
        }
        Err(e) => Err(Error::os(format!("creating cgroup {}", dir.display()), e)),
    }
}

pub(super) fn children(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

/// Removes a group's directory, children first if there are any.
pub(super) fn remove(dir: &Path) -> Result<(), Error> {
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut pause = Duration::from_micros(200);
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => {
                let below = children(dir);
                for child in &below {
                    remove(child)?;
                }
                if Instant::now() > deadline {
                    return Err(Error::os(format!("removing cgroup {}", dir.display()), e));
                }
                if below.is_empty() {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(20));
                }
            }
        }
    }
}
