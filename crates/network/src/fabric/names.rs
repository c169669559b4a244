//! The sockets by which a container asks for names: made inside its network namespace, served by another process.
//!
//! The container asks 127.0.0.11 on port 53, but the sockets are bound to ports of the kernel's choice and rules in the
//! namespace lead there: so a name server that runs in the container can have port 53 on all addresses to itself.
//!
//! ```text
//! in  (input, last)  to 127.0.0.11, port 53: to the socket's port
//! out (output, raw)  from 127.0.0.11, the socket's port: from port 53
//! ```
//!
//! Invariant: nothing of it is tracked. Translation by connections (as docker has it) would cost the namespace connection
//! tracking, at its making and with each packet of the container's; here each packet's port is written over as it comes by.
//! Rules of the container's own see port 53 on both ways.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::Fabric;
use super::lay::enter;
use crate::error::Error;
use crate::nft::{Bytes, Expression as E, FAMILY_INET, Hook, INPUT, IPV4, OUTPUT, PortOf, R0, Transaction};
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
    /// Makes the sockets, and the rules that lead to them; with `again` in place of those that were there.
    pub fn name_sockets(netns: BorrowedFd<'_>, again: bool) -> Result<NameSockets, Error> {
        enter(netns, || NameSockets::bind(again))?
    }
}

impl NameSockets {
    /// Makes them in the calling thread's network namespace, which is new.
    pub(crate) fn make() -> Result<Self, Error> {
        Self::bind(false)
    }

    fn bind(again: bool) -> Result<Self, Error> {
        let (udp, tcp) = bound(0).map_err(refused)?;
        let ports = udp.local_addr().and_then(|udp| Ok((udp.port(), tcp.local_addr()?.port())));
        let (udp_port, tcp_port) = ports.map_err(refused)?;
        if let Err(error) = lead(udp_port, tcp_port, again) {
            tracing::debug!(%error, "no rules for the name server's address: it takes port 53 itself");
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

fn lead(udp: u16, tcp: u16, again: bool) -> Result<(), Error> {
    let mut transaction = Transaction::new(TABLE);
    // Former engines had a table for both families, which translated.
    for family in if again { &[FAMILY_INET, IPV4][..] } else { &[] } {
        transaction.on(*family, TABLE);
        transaction.add_table();
        transaction.delete_table();
    }
    transaction.on(IPV4, TABLE);
    transaction.add_table();
    transaction.add_chain("in", Some(Hook { kind: "filter", number: INPUT, priority: i32::MAX }));
    transaction.add_chain("out", Some(Hook { kind: "filter", number: OUTPUT, priority: -300 }));
    let address = Bytes::new(&NAME_SERVER.octets());
    for (protocol, port) in [(Protocol::Udp, udp), (Protocol::Tcp, tcp)] {
        for (chain, offset, whose, from, to) in
            [("in", 16, PortOf::Destination, PORT, port), ("out", 12, PortOf::Source, port, PORT)]
        {
            transaction.add_rule(
                chain,
                "the name server",
                &[
                    // Each packet comes by here: most go on after this.
                    E::LoadNetwork { offset, length: 4, register: R0 },
                    E::Is { register: R0, value: address },
                    E::LoadProtocol(R0),
                    E::Is { register: R0, value: Bytes::new(&[protocol.number()]) },
                    E::LoadPort(whose, R0),
                    E::Is { register: R0, value: Bytes::new(&from.to_be_bytes()) },
                    E::Load { register: R0, value: Bytes::new(&to.to_be_bytes()) },
                    E::WritePort { whose, protocol, register: R0 },
                ],
            );
        }
    }
    Socket::netfilter()?.commit(transaction.finish())
}
