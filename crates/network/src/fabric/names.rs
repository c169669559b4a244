//! The sockets by which a container asks for names: made inside its network namespace, served by another process.
//!
//! The container asks 127.0.0.11 on port 53, but the sockets are bound to ports of the kernel's choice and a rule in the
//! namespace leads there: so a name server that runs in the container can have port 53 on all addresses to itself.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::Fabric;
use super::lay::enter;
use crate::error::Error;
use crate::nft::{Bytes, Expression as E, FAMILY_INET, Hook, IPV4, OUTPUT, R0, Transaction};
use crate::ports::Protocol;
use crate::socket::Socket;

/// Where containers ask, as docker has it.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
const PORT: u16 = 53;
const TABLE: &str = "brigantine-names";

/// A bound and a listening socket inside a container's namespace.
#[derive(Debug)]
pub struct NameSockets {
    pub udp: OwnedFd,
    pub tcp: OwnedFd,
}

impl Fabric {
    /// Makes the sockets, and the rule that leads to them. With `again` in place of one that was there: flows that it
    /// led to sockets that are gone are forgotten.
    pub fn name_sockets(netns: BorrowedFd<'_>, again: bool) -> Result<NameSockets, Error> {
        enter(netns, || {
            let made = NameSockets::make()?;
            // Afterwards: a question asked meanwhile would be led to the former place once more, and so would each
            // that follows from the same port.
            if again && let Err(error) = crate::conntrack::forget_udp(libc::AF_INET as u8, &[PORT]) {
                tracing::debug!(%error, "forget questions to a former name server");
            }
            Ok(made)
        })?
    }
}

impl NameSockets {
    /// Makes them in the calling thread's network namespace.
    pub(crate) fn make() -> Result<Self, Error> {
        let (udp, tcp) = bound(0).map_err(refused)?;
        let ports = udp.local_addr().and_then(|udp| Ok((udp.port(), tcp.local_addr()?.port())));
        let (udp_port, tcp_port) = ports.map_err(refused)?;
        if let Err(error) = lead(udp_port, tcp_port) {
            tracing::debug!(%error, "no rule for the name server's address: it takes port 53 itself");
            let (udp, tcp) = bound(PORT).map_err(refused)?;
            return Ok(Self { udp: udp.into(), tcp: tcp.into() });
        }
        Ok(Self { udp: udp.into(), tcp: tcp.into() })
    }
}

fn refused(source: std::io::Error) -> Error {
    Error::Kernel { what: format!("bind the name server's address {NAME_SERVER}"), detail: None, source }
}

fn bound(port: u16) -> std::io::Result<(UdpSocket, TcpListener)> {
    let udp = UdpSocket::bind((NAME_SERVER, port))?;
    let tcp = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&tcp, true)?;
    rustix::net::bind(&tcp, &SocketAddr::from((NAME_SERVER, port)))?;
    rustix::net::listen(&tcp, 64)?;
    Ok((udp, tcp.into()))
}

fn lead(udp: u16, tcp: u16) -> Result<(), Error> {
    let mut transaction = Transaction::new(TABLE);
    transaction.on(FAMILY_INET, TABLE);
    transaction.add_table();
    transaction.delete_table();
    transaction.add_table();
    transaction.add_chain("output", Some(Hook { kind: "nat", number: OUTPUT, priority: -100 }));
    let address = Bytes::new(&NAME_SERVER.octets());
    for (protocol, port) in [(Protocol::Udp, udp), (Protocol::Tcp, tcp)] {
        transaction.add_rule(
            "output",
            "the name server",
            &[
                E::IsFamily(IPV4),
                E::LoadNetwork { offset: 16, length: 4, register: R0 },
                E::Is { register: R0, value: address },
                E::LoadProtocol(R0),
                E::Is { register: R0, value: Bytes::new(&[protocol.number()]) },
                E::LoadDestinationPort(R0),
                E::Is { register: R0, value: Bytes::new(&PORT.to_be_bytes()) },
                E::Load { register: R0, value: address },
                E::Load { register: R0 + 1, value: Bytes::new(&port.to_be_bytes()) },
                E::DestinationNat { family: IPV4, address: R0, port: R0 + 1 },
            ],
        );
    }
    Socket::netfilter()?.commit(transaction.finish())
}
