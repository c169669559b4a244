//! User namespaces that exist only for their id maps: what an idmapped mount is given.

use std::os::fd::OwnedFd;

use brigantine_sys::spawn::{self, ns};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

use crate::error::Error;
use crate::spec::LinuxIdMapping;

/// Lines as `/proc/<pid>/uid_map` takes them.
pub(crate) fn lines(maps: &[LinuxIdMapping]) -> String {
    let line = |m: &LinuxIdMapping| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size());
    maps.iter().map(line).collect()
}

/// Whether a map is of this one id, which nobody needs privileges for.
pub(crate) fn is_only(map: &str, id: u32) -> bool {
    let mut fields = map.split_whitespace().skip(1);
    let host = fields.next().and_then(|f| f.parse().ok());
    map.lines().count() == 1 && host == Some(id) && fields.next() == Some("1")
}

/// Whether the kernel lets nobody in this process's user namespace change supplementary groups.
pub(crate) fn groups_denied(pid: &str) -> Result<bool, Error> {
    let file = format!("/proc/{pid}/setgroups");
    let text = std::fs::read_to_string(&file).map_err(|e| Error::os(format!("reading {file}"), e))?;
    Ok(text.trim() == "deny")
}

/// A user namespace with these maps, which nobody lives in.
pub(crate) fn user_namespace(uid: &str, gid: &str) -> Result<OwnedFd, Error> {
    let what = || "making a user namespace for an idmapped mount".to_owned();
    let (read, write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| Error::os(what(), e))?;
    let mut write = Some(write);
    let child = spawn::clone(ns::USER, None, || {
        drop(write.take());
        // Waits for the end of its maker's interest.
        rustix::io::read(&read, &mut [0_u8; 1]).map_or(1, |_| 0)
    })
    .map_err(|e| Error::os(what(), e))?;
    let result = (|| {
        for (file, text) in [("uid_map", uid), ("gid_map", gid)] {
            std::fs::write(format!("/proc/{}/{file}", child.pid), text)
                .map_err(|e| Error::os(format!("{}: writing {:?} to {file}", what(), text.trim()), e))?;
        }
        rustix::fs::open(
            format!("/proc/{}/ns/user", child.pid),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| Error::os(what(), e))
    })();
    drop(write);
    // It ends by itself when the pipe does; nobody else waits for it.
    pidfd_send_signal(&child.pidfd, Signal::KILL).ok();
    while let Err(rustix::io::Errno::INTR) =
        waitid(WaitId::PidFd(std::os::fd::AsFd::as_fd(&child.pidfd)), WaitIdOptions::EXITED)
    {}
    result
}
