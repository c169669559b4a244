//! The kernel's kills for lack of memory: how many there were, and the notice of the next one.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;

use super::{Cgroup, files, stats};
use crate::error::Error;

impl Cgroup {
    /// A watch on out-of-memory kills in the group; `None` where no memory controller is.
    pub fn oom_events(&self) -> Result<Option<OomWatch>, Error> {
        if let Some(dir) = self.v1_dir("memory") {
            let what = || format!("watching {} for lack of memory", dir.display());
            let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|e| Error::os(what(), e))?;
            let control = fs::File::open(dir.join("memory.oom_control")).map_err(|e| Error::os(what(), e))?;
            let line = format!("{} {}", fd.as_raw_fd(), control.as_raw_fd());
            files::write(&dir.join("cgroup.event_control"), &line)?;
            return Ok(Some(OomWatch { fd }));
        }
        let Some(file) = self.v2_dir().map(|dir| dir.join("memory.events")).filter(|file| file.exists())
        else {
            return Ok(None);
        };
        let what = || format!("watching {}", file.display());
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .map_err(|e| Error::os(what(), e))?;
        inotify::add_watch(&fd, &file, inotify::WatchFlags::MODIFY).map_err(|e| Error::os(what(), e))?;
        Ok(Some(OomWatch { fd }))
    }

    /// How many processes of the group the kernel has killed for lack of memory.
    pub fn oom_kills(&self) -> Result<u64, Error> {
        let file = match (self.v1_dir("memory"), self.v2_dir()) {
            (Some(dir), _) => dir.join("memory.oom_control"),
            (None, Some(dir)) => dir.join("memory.events"),
            (None, None) => return Ok(0),
        };
        match fs::read_to_string(&file) {
            Ok(text) => Ok(stats::keyed(&text).get("oom_kill").copied().unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(e) => Err(Error::os(format!("reading {}", file.display()), e)),
        }
    }
}

/// Becomes readable when the kernel may have killed a process of the group, or the group is gone.
#[derive(Debug)]
pub struct OomWatch {
    fd: OwnedFd,
}

impl OomWatch {
    /// Takes the notice, so that the next poll waits for a new one.
    pub fn clear(&self) {
        let mut buffer = [0_u8; 512];
        // Nothing to read is what is wanted.
        rustix::io::read(&self.fd, &mut buffer).ok();
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
