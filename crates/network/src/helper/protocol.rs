//! What daemon and helper say to each other: one JSON document a packet of a `SOCK_SEQPACKET` socket, with descriptors
//! as control messages. Each request has one answer.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::share::SharedNetwork;
use crate::ports::Protocol;

/// Raised when either side would misread the other.
pub(super) const VERSION: u32 = 2;
/// Most descriptors of one packet (the kernel takes 253).
pub(super) const MOST_FDS: usize = 128;
/// No document is larger.
const LARGEST: usize = 1 << 20;

/// A container as names know it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resident {
    pub id: String,
    pub residences: Vec<Residence>,
    /// Names that this container alone knows, and the ids of those they stand for.
    pub links: BTreeMap<String, String>,
    /// Servers to ask from within the container's network instead of the host's.
    pub servers: Vec<IpAddr>,
    /// Whether questions about other names are asked outside; not for a container without a way out.
    pub forwards: bool,
}

/// Its place on one network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Residence {
    /// The network's id and name.
    pub network: String,
    pub network_name: String,
    /// All names it has there; the first is the one that its address is called.
    pub names: Vec<String>,
    pub ipv4: Option<Ipv4Addr>,
    pub ipv6: Option<Ipv6Addr>,
}

/// What a container's questions come in by.
#[derive(Debug)]
pub struct Sockets {
    pub udp: OwnedFd,
    pub tcp: OwnedFd,
    pub netns: OwnedFd,
}

/// Where a bound socket of the host leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relayed {
    pub protocol: Protocol,
    pub to: SocketAddr,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    Hello,
    /// Which containers the helper serves.
    List,
    /// Enters or changes a container. Descriptors: none, or UDP, TCP and network namespace.
    Put(Resident),
    /// All overlay networks: what is known of them is shared with their other hosts.
    Share(Vec<SharedNetwork>),
    /// Descriptors: bound sockets, one for each entry.
    Relay {
        id: String,
        relayed: Vec<Relayed>,
    },
    /// Descriptors: whatever shall stay open as long as the container is there.
    Hold {
        id: String,
    },
    Forget {
        id: String,
    },
    /// Leave at once.
    Quit,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Version(u32),
    Served(Vec<String>),
    Done,
    Failed(String),
}

pub(super) fn send(
    socket: BorrowedFd<'_>,
    document: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let text = serde_json::to_vec(document)?;
    if text.len() > LARGEST || fds.len() > MOST_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "too much for one message to the network helper",
        ));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(socket, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)
    })?;
    Ok(())
}

/// `None` when the other side has gone.
pub(super) fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut text = vec![0; LARGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            fds.extend(some);
        }
    }
    Ok(Some((serde_json::from_slice(&text[..received.bytes])?, fds)))
}

/// Room for the largest document on its way.
pub(super) fn enlarge(socket: impl AsFd) {
    if let Err(error) = rustix::net::sockopt::set_socket_send_buffer_size(&socket, 2 * LARGEST) {
        tracing::debug!(%error, "enlarge a socket's buffer");
    }
}
