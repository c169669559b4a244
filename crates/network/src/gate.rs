//! The gate: a pair of interfaces of the host that leads to itself, by which packets for published ports come back
//! after the host's own input rules have seen and accepted them.
//!
//! A published port is reached by changing the destination before routing, so the packet is forwarded and the rules
//! that the administrator wrote for incoming packets (the chains on the input hook, whoever made them) never see it.
//! With the gate it is not changed at first: it goes to the input hook with its true destination and interface. Only
//! if every chain there accepts it does our own last chain get it, and sends a copy out of one end of the gate. It
//! comes in by the other end, and from there published ports are open. Connection tracking knows the connection from
//! then on, whatever interface its packets come from, so only the first packet of each takes the way round.
//!
//! Invariant: nothing but our own chain sends anything through it: neither end has a route or a name of its own.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::error::Error;
use crate::link;
use crate::mac::MacAddr;
use crate::naming::hashed;
use crate::nft::{IPV4, IPV6};
use crate::socket::Socket;
use crate::sysctl;
use crate::wire::Messages;

const ALIAS: &str = "brigantine gate";

/// Both ends have the same: without ARP the kernel addresses every frame to the sender's own.
const MAC: [u8; 6] = [0x02, 0x42, 0, 0, 0, 0x53];
const NEIGHBOUR4: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 1);
const NEIGHBOUR6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x77);
/// Makes the loose check of source addresses look at routes at all.
const OWN4: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 2);

/// The pair, as the firewall needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gate {
    /// Index and name of the end that packets leave by.
    pub way_out: u32,
    pub way_out_name: String,
    /// Name of the end that they come in by.
    pub way_in: String,
    pub neighbour4: Ipv4Addr,
    pub neighbour6: Ipv6Addr,
}

impl Gate {
    /// The families that have input rules of their own.
    pub fn families() -> impl Iterator<Item = u8> {
        [IPV4, IPV6].into_iter().filter(|family| *family == IPV4 || sysctl::has_ipv6())
    }

    /// Finds or makes the pair that belongs to a firewall table.
    pub fn ensure(socket: &mut Socket, table: &str) -> Result<Self, Error> {
        let [out, back] = names(table);
        if link::find(socket, &out)?.is_none() {
            let mut batch = Messages::new();
            link::add_pair(&mut batch, [&out, &back], MacAddr::new(MAC));
            socket.execute(batch)?;
        }
        let vanished = |name: &str| Error::BridgeConflict {
            bridge: name.to_owned(),
            reason: "is not the pair of interfaces that it shall be; remove it".to_owned(),
        };
        let way_out = link::find(socket, &out)?.ok_or_else(|| vanished(&out))?;
        let way_in = link::find(socket, &back)?.ok_or_else(|| vanished(&back))?;
        if way_out.kind != "veth" || way_in.kind != "veth" {
            return Err(vanished(&out));
        }
        // The strictest of this and the value for all interfaces holds: loose, whatever the host says.
        sysctl::ensure(&format!("ipv4/conf/{back}/rp_filter"), "2")?;
        sysctl::ensure(&format!("ipv4/conf/{back}/forwarding"), "1")?;
        if sysctl::has_ipv6() {
            for end in [&out, &back] {
                sysctl::ensure(&format!("ipv6/conf/{end}/disable_ipv6"), "0")?;
                sysctl::ensure(&format!("ipv6/conf/{end}/accept_ra"), "0")?;
            }
        }
        let mut batch = Messages::new();
        for (end, name) in [(&way_out, &out), (&way_in, &back)] {
            link::set_alias(&mut batch, end.index, name, ALIAS);
            link::without_link_local(&mut batch, end.index, name);
            link::set_up(&mut batch, end.index, name);
        }
        link::add_address(&mut batch, way_in.index, &back, IpNet::from(std::net::IpAddr::V4(OWN4)));
        if sysctl::has_ipv6() {
            link::add_device_route(
                &mut batch,
                way_out.index,
                &out,
                IpNet::from(std::net::IpAddr::V6(NEIGHBOUR6)),
            );
        }
        socket.execute(batch)?;
        for name in [&out, &back] {
            link::wait_until_ready(socket, name)?;
        }
        Ok(Self {
            way_out: way_out.index,
            way_out_name: out,
            way_in: back,
            neighbour4: NEIGHBOUR4,
            neighbour6: NEIGHBOUR6,
        })
    }

    /// Removes the pair, if it is there.
    pub fn remove(socket: &mut Socket, table: &str) -> Result<(), Error> {
        let [out, _] = names(table);
        let mut batch = Messages::new();
        link::delete_by_name(&mut batch, &out);
        match socket.execute(batch) {
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
            result => result,
        }
    }
}

fn names(table: &str) -> [String; 2] {
    ["o", "i"].map(|end| hashed("gate", table, end))
}
