//! Terminals: handed to a console socket, or joined with the caller's own.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use rustix::termios::{OptionalActions, OutputModes, Termios};

use crate::error::Error;

/// Sends a descriptor, with `text`, to whoever listens at `socket`.
pub(crate) fn hand_over(socket: &Path, fd: BorrowedFd<'_>, text: &[u8]) -> Result<(), Error> {
    let failed = |e| Error::os(format!("sending a descriptor to {}", socket.display()), e);
    let address = SocketAddrUnix::new(socket).map_err(failed)?;
    let connection =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(failed)?;
    rustix::net::connect(&connection, &address).map_err(failed)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(failed(rustix::io::Errno::NOBUFS));
    }
    rustix::net::sendmsg(&connection, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL)
        .map(|_| ())
        .map_err(failed)
}

/// The container's terminal, connected to the caller's own, which is put back as it was at the end.
#[derive(Debug)]
pub(crate) struct Joined {
    master: OwnedFd,
    before: Option<Termios>,
    /// Whether the caller may still say something.
    pub input: bool,
}

impl Drop for Joined {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // Nothing is left to do about a terminal that is gone.
            rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, before).ok();
        }
    }
}

impl Joined {
    pub fn new(master: OwnedFd) -> Result<Self, Error> {
        let stdin = rustix::stdio::stdin();
        let before = rustix::termios::tcgetattr(stdin).ok();
        plain_lines(&master)?;
        let joined = Self { master, before, input: true };
        if let Some(before) = &joined.before {
            let mut raw = before.clone();
            raw.make_raw();
            // The container's terminal leaves line ends alone, see below; this one makes of them what it did.
            raw.output_modes |= before.output_modes & OutputModes::OPOST;
            rustix::termios::tcsetattr(stdin, OptionalActions::Drain, &raw).map_err(failed)?;
            joined.resize();
        }
        Ok(joined)
    }

    /// As large as the caller's; where that has no size, it stays as it is.
    pub fn resize(&self) {
        if let Ok(size) = rustix::termios::tcgetwinsize(rustix::stdio::stdin()) {
            rustix::termios::tcsetwinsize(&self.master, size).ok();
        }
    }

    /// Copies what the container wrote; false at its end.
    pub fn output(&self) -> Result<bool, Error> {
        let mut buffer = [0_u8; 8192];
        match rustix::io::read(&self.master, &mut buffer) {
            Ok(0) | Err(rustix::io::Errno::IO) => Ok(false),
            Ok(length) => {
                write_all(rustix::stdio::stdout(), &buffer[..length]).map(|()| true).map_err(failed)
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => Ok(true),
            Err(e) => Err(failed(e)),
        }
    }

    /// Copies what the caller wrote.
    pub fn take_input(&mut self) -> Result<(), Error> {
        let mut buffer = [0_u8; 8192];
        match rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
            Ok(0) | Err(_) => self.input = false,
            Ok(length) => write_all(self.master.as_fd(), &buffer[..length]).map_err(failed)?,
        }
        Ok(())
    }
}

impl AsFd for Joined {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }
}

/// Line ends are translated once, by the caller's terminal, and not at all for a pipe.
pub(crate) fn plain_lines(master: &OwnedFd) -> Result<(), Error> {
    let mut inside = rustix::termios::tcgetattr(master).map_err(failed)?;
    inside.output_modes &= !OutputModes::ONLCR;
    rustix::termios::tcsetattr(master, OptionalActions::Now, &inside).map_err(failed)
}

fn failed(e: rustix::io::Errno) -> Error {
    Error::os("copying to and from the terminal", e)
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
