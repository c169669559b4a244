//! Seccomp notification: the filter's descriptor is taken from the container's process and handed to
//! whoever the spec names, with the container's state.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use rustix::process::PidfdGetfdFlags;

use crate::error::Error;
use crate::spec::LinuxSeccomp;

/// Who answers a filter's notifications, and what is said about the container.
#[derive(Debug, Clone)]
pub struct Listener {
    socket: PathBuf,
    metadata: String,
    /// The container's state (`state` of the spec's container process state).
    state: serde_json::Value,
}

impl Listener {
    /// The listener that `filter` names; none if it names none or never notifies.
    pub fn of(filter: Option<&LinuxSeccomp>, state: serde_json::Value) -> Option<Self> {
        let filter = filter.filter(|f| crate::seccomp::notifies(f))?;
        let socket = filter.listener_path().clone().filter(|p| !p.as_os_str().is_empty())?;
        Some(Self { socket, metadata: filter.listener_metadata().clone().unwrap_or_default(), state })
    }

    /// Takes descriptor `number` of the process and sends it.
    pub(crate) fn hand_over(&self, pid: i32, pidfd: BorrowedFd<'_>, number: i32) -> Result<(), Error> {
        let fd = rustix::process::pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())
            .map_err(|e| Error::os("taking the seccomp listener of the container", e))?;
        self.send(pid, &fd)
    }

    fn send(&self, pid: i32, listener: &OwnedFd) -> Result<(), Error> {
        let what = || format!("sending the seccomp listener to {:?}", self.socket.display());
        let mut state = self.state.clone();
        if let Some(fields) = state.as_object_mut() {
            fields.entry("pid").or_insert_with(|| pid.into());
        }
        let text = serde_json::json!({
            "ociVersion": crate::OCI_VERSION,
            "fds": ["seccompFd"],
            "pid": pid,
            "metadata": self.metadata,
            "state": state,
        })
        .to_string();
        let failed = |e: rustix::io::Errno| Error::os(what(), e);
        let address = SocketAddrUnix::new(&self.socket).map_err(failed)?;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(failed)?;
        rustix::net::connect(&socket, &address).map_err(|e| {
            Error::os(format!("failed to connect with seccomp agent at {:?}", self.socket.display()), e)
        })?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [listener.as_fd()];
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(failed(rustix::io::Errno::NOBUFS));
        }
        // The descriptor goes with the first bytes; what did not fit follows.
        let mut rest = text.as_bytes();
        let sent = rustix::net::sendmsg(&socket, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL)
            .map_err(failed)?;
        rest = rest.get(sent..).unwrap_or_default();
        while !rest.is_empty() {
            let sent = rustix::net::send(&socket, rest, SendFlags::NOSIGNAL).map_err(failed)?;
            rest = rest.get(sent..).unwrap_or_default();
        }
        Ok(())
    }
}
