//! Descriptor tables.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::check;

/// Bytes written to a unix socket that the other end has not taken yet (SIOCOUTQ, unix(7)), buffers' own size included.
pub fn unread_by_peer(socket: BorrowedFd<'_>) -> Result<usize, Errno> {
    let mut count: libc::c_int = 0;
    // SAFETY: the request stores one int, for which there is one on this stack.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, std::ptr::from_mut(&mut count)) };
    check(libc::c_long::from(result)).map(|_| usize::try_from(count).unwrap_or_default())
}

/// Has the disk begin to write what was written to a file from `offset` on, `length` bytes, and does not wait for it
/// (SYNC_FILE_RANGE_WRITE, sync_file_range(2)). It makes nothing durable: that is for fsync, which then has less to do.
pub fn begin_writeback(file: BorrowedFd<'_>, offset: u64, length: u64) -> Result<(), Errno> {
    let (offset, length) = (offset.cast_signed(), length.cast_signed());
    // SAFETY: it takes no memory, and changes nothing that a program could see.
    let result =
        unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE) };
    check(libc::c_long::from(result)).map(drop)
}

/// Marks every descriptor from `first` up close-on-exec. Usable after a clone.
pub fn close_on_exec_from(first: u32) -> Result<(), Errno> {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: only flags of descriptors change; none is closed under its owner.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) };
    check(result).map(drop)
}

/// Closes a descriptor that this copy of a process has inherited, and whose owner is in the original. Usable after a clone.
pub fn close_inherited(fd: BorrowedFd<'_>) {
    // SAFETY: no memory is touched; in this process nobody uses it, nor is there anybody who would close it again.
    unsafe { libc::close(fd.as_raw_fd()) };
}

/// Closes every descriptor from `first` up but those in `kept`, whoever in this process believes to own them. For a process
/// that uses and drops none of them any more: a copy that will be another program or end. Usable after a clone.
pub fn close_all_but(first: u32, kept: &mut [u32]) -> Result<(), Errno> {
    // SAFETY: no memory is touched; that nobody uses or closes these descriptors any more is the caller's word.
    let close =
        |from: u32, to: u32| check(unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) }).map(drop);
    kept.sort_unstable();
    let mut from = first;
    for &number in kept.iter().filter(|number| **number >= first) {
        if number > from {
            close(from, number - 1)?;
        }
        from = number + 1;
    }
    close(from, u32::MAX)
}

/// Clears close-on-exec on descriptor `number`, which the caller inherited. Usable after a clone.
pub fn keep_on_exec(number: i32) -> Result<(), Errno> {
    // SAFETY: F_SETFD changes a flag of the descriptor if it is open and fails with EBADF otherwise.
    check(libc::c_long::from(unsafe { libc::fcntl(number, libc::F_SETFD, 0) })).map(drop)
}

/// Makes descriptor `target` (0, 1 or 2) a copy of `source`, kept across an exec. Usable after a clone.
pub fn become_stdio(source: BorrowedFd<'_>, target: i32) -> Result<(), Errno> {
    assert!((0..=2).contains(&target), "only standard descriptors may be replaced");
    if source.as_raw_fd() == target {
        return keep_on_exec(target);
    }
    // SAFETY: 0, 1 and 2 are owned by nobody; replacing what they refer to is what this is for.
    check(libc::c_long::from(unsafe { libc::dup2(source.as_raw_fd(), target) })).map(drop)
}

/// Takes over an inherited descriptor by its number (from a command line or the environment).
/// `EBADF` if it is not open. The caller says that nothing else in the process owns it.
pub fn adopt(number: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: F_GETFD only reads the descriptor's flags.
    let open = unsafe { libc::fcntl(number, libc::F_GETFD) };
    check(libc::c_long::from(open))?;
    // SAFETY: the descriptor is open (just checked) and, by the caller's word, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spawn;
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    use std::os::fd::AsFd;

    #[test]
    fn only_what_is_kept_stays_open() {
        let files: Vec<OwnedFd> = (0..5).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect();
        let first = files[0].as_raw_fd() as u32;
        let child = spawn::clone(0, None, || {
            let kept = [files[3].as_raw_fd() as u32, files[1].as_raw_fd() as u32];
            if close_all_but(first, &mut kept.clone()).is_err() {
                return 100;
            }
            // SAFETY: F_GETFD only reads flags.
            let open = |fd: &OwnedFd| unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) } >= 0;
            files.iter().enumerate().map(|(at, fd)| i32::from(open(fd)) << at).sum()
        })
        .unwrap();
        let status = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(0b01010));
    }
}
