//! Terminals: handed to a console socket, or joined with the caller's own.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use rustix::termios::{OptionalActions, Termios};

use crate::error::Error;

/// Sends a terminal's master to whoever listens at `socket`.
pub(crate) fn hand_over(socket: &Path, master: BorrowedFd<'_>) -> Result<(), Error> {
    let failed = |e| Error::os(format!("sending the terminal to {}", socket.display()), e);
    let address = SocketAddrUnix::new(socket).map_err(failed)?;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(failed)?;
    rustix::net::connect(&fd, &address).map_err(failed)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [master];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(failed(rustix::io::Errno::NOBUFS));
    }
    rustix::net::sendmsg(&fd, &[IoSlice::new(b"/dev/ptmx")], &mut control, SendFlags::NOSIGNAL)
        .map(|_| ())
        .map_err(failed)
}

/// Puts the caller's terminal back as it was.
struct Restore(Option<Termios>);

impl Drop for Restore {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // Nothing is left to do about a terminal that is gone.
            rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, before).ok();
        }
    }
}

/// Copies between the caller's terminal and `master` until `process` ends.
pub(crate) fn join(master: &OwnedFd, process: BorrowedFd<'_>) -> Result<(), Error> {
    let failed = |e| Error::os("copying to and from the terminal", e);
    let stdin = rustix::stdio::stdin();
    let before = rustix::termios::tcgetattr(stdin).ok();
    if let Some(before) = &before {
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(stdin, OptionalActions::Drain, &raw).map_err(failed)?;
        if let Ok(size) = rustix::termios::tcgetwinsize(stdin) {
            rustix::termios::tcsetwinsize(master, size).map_err(failed)?;
        }
    }
    let _restore = Restore(before);
    let mut buffer = [0_u8; 8192];
    let (mut input, mut ended) = (true, false);
    loop {
        let mut fds =
            vec![PollFd::new(master, PollFlags::IN), PollFd::from_borrowed_fd(process, PollFlags::IN)];
        if input {
            fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
        }
        // Once the process has ended, what is still in the terminal is taken, and no more waited for.
        let soon = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut fds, ended.then_some(&soon)) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(failed(e)),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if ready.first() == Some(&true) {
            match rustix::io::read(master, &mut buffer) {
                Ok(0) | Err(rustix::io::Errno::IO) => return Ok(()),
                Ok(length) => write_all(rustix::stdio::stdout(), &buffer[..length]).map_err(failed)?,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(e) => return Err(failed(e)),
            }
        } else if ended {
            return Ok(());
        }
        ended = ready.get(1) == Some(&true);
        if ready.get(2) == Some(&true) {
            match rustix::io::read(stdin, &mut buffer) {
                Ok(0) | Err(_) => input = false,
                Ok(length) => write_all(master.as_fd(), &buffer[..length]).map_err(failed)?,
            }
        }
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), rustix::io::Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
