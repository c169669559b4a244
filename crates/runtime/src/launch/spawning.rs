//! The clone of a container's process, and the maps of its user namespace.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use brigantine_sys::spawn::{self, ns};
use brigantine_sys::{Replacement, fd as descriptors};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{WaitId, WaitIdOptions, waitid};

use super::setup::receive_raw;
use crate::compile::{self, Compiled, within};
use crate::error::{Error, Kind};
use crate::plan::{MESSAGE_LENGTH, Plan};
use crate::{child, idmap};

/// `channel`: the two ends of [`pair`], the caller's and the container's process's, which has nobody else after this.
pub(super) fn spawn_plan(
    compiled: &mut Compiled,
    target: Option<BorrowedFd<'_>>,
    (ours, theirs): (BorrowedFd<'_>, OwnedFd),
) -> Result<spawn::Child, Error> {
    let Compiled { plan, new, around, first, .. } = compiled;
    if !first.is_empty() {
        return spawn_behind(first, around, *new, target, plan, (ours, &theirs));
    }
    within(around, || {
        spawn::clone(*new, target, || {
            // The parent's end must not stay open in the child, or its death would go unnoticed.
            descriptors::close_inherited(ours);
            child::run(plan, theirs.as_fd())
        })
        .map_err(|e| {
            let hint = match e {
                rustix::io::Errno::PERM => " (new namespaces need privileges)",
                rustix::io::Errno::NOSPC => " (too many namespaces)",
                rustix::io::Errno::INVAL => " (does this kernel have all kinds of namespaces?)",
                _ => "",
            };
            Error::os(format!("cloning the container's process{hint}"), e)
        })
    })
}

/// Clones the container's process from one in between, which has entered namespaces from which there is
/// no way back. The container's process is the caller's child all the same.
fn spawn_behind(
    first: &[(OwnedFd, u64, &'static str)],
    around: &[(OwnedFd, u64, &'static str)],
    new: u64,
    target: Option<BorrowedFd<'_>>,
    plan: &mut Plan,
    (ours, theirs): (BorrowedFd<'_>, &OwnedFd),
) -> Result<spawn::Child, Error> {
    let what = "cloning the container's process in its user namespace";
    let (here, there) = pair()?;
    let mut here = Some(here);
    // Born in the group as its child is to be: once in the user namespace it could not put it there.
    let between = spawn::clone(0, target, || {
        drop(here.take());
        // Whoever lives in that user namespace must not come by the caller's executable either.
        let executable = std::mem::take(&mut plan.executable);
        let out_of_reach = executable.as_ref().map_or(Ok(()), Replacement::apply);
        std::mem::forget(executable);
        let made = out_of_reach.map_err(|e| (u8::MAX, e)).and_then(|()| enter_first(first, around));
        let made = made.and_then(|()| {
            spawn::clone_sibling(new, None, || {
                descriptors::close_inherited(ours);
                child::run(plan, theirs.as_fd())
            })
            .map_err(|e| (u8::MAX, e))
        });
        match made {
            Ok(child) => child::send_process(there.as_fd(), child.pid, child.pidfd.as_fd()),
            Err((place, errno)) => child::send_refusal(there.as_fd(), place, errno),
        }
    })
    .map_err(|e| Error::os(what, e))?;
    drop(there);
    let here = here.ok_or_else(|| Error::os(what, rustix::io::Errno::BADF))?;
    let mut bytes = [0_u8; MESSAGE_LENGTH];
    let received = receive_raw(here.as_fd(), &mut bytes);
    while let Err(rustix::io::Errno::INTR) =
        waitid(WaitId::PidFd(between.pidfd.as_fd()), WaitIdOptions::EXITED)
    {}
    let number = i32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    match received? {
        (MESSAGE_LENGTH, Some(pidfd)) => Ok(spawn::Child { pid: number, pidfd }),
        (MESSAGE_LENGTH, None) => {
            let place = usize::from(bytes[1]);
            let name = first.iter().chain(around).nth(place).map(|(_, _, name)| *name);
            let step = name.map_or_else(|| what.to_owned(), |name| format!("entering the {name} namespace"));
            Err(Error::os(step, std::io::Error::from_raw_os_error(number)))
        }
        _ => Err(Error::os(what, rustix::io::Errno::SRCH)),
    }
}

/// In the process in between: nothing here allocates.
fn enter_first(
    first: &[(OwnedFd, u64, &'static str)],
    around: &[(OwnedFd, u64, &'static str)],
) -> Result<(), (u8, rustix::io::Errno)> {
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    // Whoever lives in that user namespace must not trace or read this process.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .map_err(|e| (u8::MAX, e))?;
    for (place, (fd, bits, _)) in first.iter().chain(around).enumerate() {
        spawn::setns(fd.as_fd(), *bits).map_err(|e| (place as u8, e))?;
        if bits & ns::USER != 0 {
            let (uid, gid) = (rustix::process::Uid::ROOT, rustix::process::Gid::ROOT);
            // Denied where a user without privileges made the namespace; then there are none to drop.
            set_thread_groups(&[]).ok();
            set_thread_res_gid(gid, gid, gid).map_err(|e| (u8::MAX, e))?;
            set_thread_res_uid(uid, uid, uid).map_err(|e| (u8::MAX, e))?;
        }
    }
    Ok(())
}

/// A channel between a container's process and its creator.
pub(super) fn pair() -> Result<(OwnedFd, OwnedFd), Error> {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|e| Error::os("opening a channel to the container", e))
}

/// The maps of a new user namespace: by oneself where the kernel allows it, else by the system's set-uid
/// helpers, which know what the user was given.
pub(super) fn write_maps(pid: i32, uid: &str, gid: &str) -> Result<(), Error> {
    if rustix::process::geteuid().is_root() && compile::privileged() {
        write_proc(pid, "gid_map", gid)?;
        return write_proc(pid, "uid_map", uid);
    }
    if idmap::is_only(gid, rustix::process::getegid().as_raw()) {
        write_proc(pid, "setgroups", "deny")?;
        write_proc(pid, "gid_map", gid)?;
    } else {
        map_by_helper("newgidmap", pid, gid)?;
    }
    if idmap::is_only(uid, rustix::process::geteuid().as_raw()) {
        write_proc(pid, "uid_map", uid)
    } else {
        map_by_helper("newuidmap", pid, uid)
    }
}

fn map_by_helper(program: &str, pid: i32, map: &str) -> Result<(), Error> {
    let what = || format!("{program} {pid} {}", map.trim().replace('\n', " "));
    let mut command = std::process::Command::new(program);
    command.arg(pid.to_string()).args(map.split_whitespace());
    command.stdin(std::process::Stdio::null());
    brigantine_sys::signals::unblock_in(&mut command);
    let done = command.output().map_err(|e| {
        let hint = match e.kind() {
            std::io::ErrorKind::NotFound => " (more ids than one's own need the package uidmap)",
            _ => "",
        };
        Error::os(format!("{}{hint}", what()), e)
    })?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr).trim().replace('\n', "; ");
    Err(Error::new(Kind::Os, format!("{}: {said}", what())))
}

pub(super) fn write_proc(pid: i32, file: &str, text: &str) -> Result<(), Error> {
    std::fs::write(format!("/proc/{pid}/{file}"), text)
        .map_err(|e| Error::os(format!("writing {:?} to {file} of the container's process", text.trim()), e))
}
