//! The least that makes a container: clone3, the mounts of `runc spec`, pivot_root, exec. What it takes is what the kernel
//! takes; `cargo xtask bench runtime` measures runtimes against it. It checks nothing and confines nobody.
//!
//! `floor ROOTFS PROGRAM [CGROUP]`: with a cgroup's name, a group is made in every version 1 hierarchy, entered, and
//! removed in the end.

use std::ffi::{CStr, CString, OsString};
use std::fs::{self, OpenOptions};
use std::io::{Error, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;

use brigantine_sys::exec::{StringVector, execve};
use brigantine_sys::spawn::{self, ns};
use rustix::fs::{CWD, Mode};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};
use rustix::process::{WaitId, WaitIdOptions, waitid};

/// Type, place, parameters.
type Mount = (&'static CStr, &'static CStr, &'static [(&'static CStr, &'static CStr)]);

const MOUNTS: &[Mount] = &[
    (c"proc", c"proc", &[]),
    (c"tmpfs", c"dev", &[(c"mode", c"755"), (c"size", c"65536k")]),
    (c"devpts", c"dev/pts", &[(c"ptmxmode", c"0666"), (c"mode", c"0620"), (c"gid", c"5")]),
    (c"tmpfs", c"dev/shm", &[(c"mode", c"1777"), (c"size", c"65536k")]),
    (c"mqueue", c"dev/mqueue", &[]),
    (c"sysfs", c"sys", &[]),
];

fn main() -> Result<ExitCode, Error> {
    let mut words = std::env::args_os().skip(1);
    let mut word =
        || words.next().ok_or_else(|| Error::new(ErrorKind::InvalidInput, "floor ROOTFS PROGRAM [CGROUP]"));
    let text = |w: OsString| CString::new(w.into_vec()).map_err(Error::from);
    let (root, program, group) = (text(word()?)?, text(word()?)?, word().ok());
    let mut groups: Vec<PathBuf> = Vec::new();
    let mut tasks: Vec<OwnedFd> = Vec::new();
    if let Some(group) = group {
        for hierarchy in ["memory", "cpu", "cpuacct", "pids", "freezer", "devices", "blkio"] {
            let mount = PathBuf::from("/sys/fs/cgroup").join(hierarchy);
            if mount.exists() {
                let dir = mount.join(&group);
                fs::create_dir(&dir)?;
                tasks.push(OpenOptions::new().write(true).open(dir.join("tasks"))?.into());
                groups.push(dir);
            }
        }
    }
    let argv = StringVector::new(vec![program.clone()]);
    let envp = StringVector::new(vec![c"PATH=/bin".to_owned()]);
    let new = ns::MOUNT | ns::PID | ns::IPC | ns::UTS | ns::NETWORK | ns::CGROUP;
    let child = spawn::clone(new, None, || {
        let failed = match enter(&root, &tasks) {
            Ok(()) => execve(&program, &argv, &envp),
            Err(e) => e,
        };
        failed.raw_os_error()
    })?;
    let status = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED)?;
    for dir in groups {
        fs::remove_dir(dir)?;
    }
    let code = status.and_then(|s| s.exit_status()).unwrap_or(255);
    Ok(ExitCode::from(code as u8))
}

fn enter(root: &CStr, tasks: &[OwnedFd]) -> Result<(), Errno> {
    for list in tasks {
        rustix::io::write(list, b"0")?;
    }
    rustix::mount::mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = rustix::mount::open_tree(CWD, root, flags)?;
    move_to(tree.as_fd(), root)?;
    rustix::process::fchdir(&tree)?;
    for (typ, place, parameters) in MOUNTS {
        let context = rustix::mount::fsopen(*typ, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in *parameters {
            rustix::mount::fsconfig_set_string(&context, *key, *value)?;
        }
        rustix::mount::fsconfig_create(&context)?;
        let (flags, attributes) = (FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOSUID);
        let mounted = rustix::mount::fsmount(&context, flags, attributes)?;
        match rustix::fs::mkdir(*place, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e),
        }
        move_to(mounted.as_fd(), place)?;
    }
    rustix::process::pivot_root(c".", c".")?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
    rustix::process::chdir(c"/")
}

fn move_to(tree: BorrowedFd<'_>, place: &CStr) -> Result<(), Errno> {
    rustix::mount::move_mount(tree, c"", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}
