//! Overlay networks: a bridge whose ports include a VXLAN tunnel (RFC 7348) to bridges of other hosts.
//!
//! There is no control plane. Each host knows the others by a list; frames for everybody, and for those whose place is
//! not known yet, are sent to each of them, and the kernel learns who is where from what comes back. Addresses are told
//! apart by each host giving out a range of its own. Nothing is encrypted.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use serde::{Deserialize, Serialize};

use crate::bridge::BridgeSpec;
use crate::device::{self, Vxlan};
use crate::error::Error;
use crate::link;
use crate::naming::{hash, hashed};
use crate::socket::Socket;
use crate::subinterface::unsupported;
use crate::wire::Messages;

/// IANA's port for VXLAN.
pub const DEFAULT_PORT: u16 = 4789;

/// One end of an overlay network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnel {
    /// Number of the network between the hosts, the same on all of them: 1 to 16777215.
    pub vni: u32,
    /// UDP port, the same on all hosts.
    pub port: u16,
    /// This host's address towards the others. `None`: the one that the first of them is reached from.
    pub local: Option<IpAddr>,
    /// The other hosts, all of one family.
    pub peers: Vec<IpAddr>,
}

impl Tunnel {
    pub(crate) fn validate(&self) -> Result<(), String> {
        if !(1..1 << 24).contains(&self.vni) {
            return Err(format!("VXLAN id {} is not between 1 and 16777215", self.vni));
        }
        if self.port == 0 {
            return Err("UDP port 0 is none".to_owned());
        }
        let Some(first) = self.peers.first() else {
            return Err("an overlay network needs the addresses of the other hosts".to_owned());
        };
        for (at, host) in self.peers.iter().chain(&self.local).enumerate() {
            if host.is_unspecified() || host.is_multicast() || host.is_loopback() {
                return Err(format!("{host} is not the address of a host"));
            }
            if host.is_ipv4() != first.is_ipv4() {
                return Err(format!("{first} and {host} are of different families"));
            }
            if self.peers[..at.min(self.peers.len())].contains(host) {
                return Err(format!("{host} is there twice"));
            }
        }
        Ok(())
    }

    /// What the headers around a frame take: Ethernet, VXLAN, UDP and IP.
    fn overhead(&self) -> u32 {
        if self.peers.first().is_some_and(IpAddr::is_ipv6) { 70 } else { 50 }
    }
}

/// The description with everything decided that depends on the host: this end's address, and an MTU that leaves room.
pub(crate) fn complete(socket: &mut Socket, spec: &BridgeSpec) -> Result<BridgeSpec, Error> {
    let Some(tunnel) = &spec.tunnel else { return Ok(spec.clone()) };
    let invalid = |reason: String| Error::InvalidBridge { bridge: spec.name.clone(), reason };
    let local = match (tunnel.local, tunnel.peers.first()) {
        (Some(local), _) => local,
        (None, Some(peer)) => {
            source_for(*peer).map_err(|error| invalid(format!("no way to the other host {peer}: {error}")))?
        }
        (None, None) => return Err(invalid("no other host".to_owned())),
    };
    let underlay = link::owner_of(socket, local)?
        .ok_or_else(|| invalid(format!("this host does not have the address {local}")))?;
    let links = link::all(socket)?;
    let underlay = links.iter().find(|link| link.index == underlay);
    let room = underlay.map_or(1500, |link| link.mtu).saturating_sub(tunnel.overhead());
    let mtu = spec.mtu.unwrap_or(room);
    if mtu > room {
        let name = underlay.map_or("the interface", |link| &link.name);
        return Err(invalid(format!("MTU {mtu} is more than {name} has room for in a tunnel: {room}")));
    }
    let completed = BridgeSpec {
        mtu: Some(mtu),
        tunnel: Some(Tunnel { local: Some(local), ..tunnel.clone() }),
        ..spec.clone()
    };
    completed.validate()?;
    Ok(completed)
}

/// The address that the kernel would send from. Connecting sends nothing.
fn source_for(peer: IpAddr) -> std::io::Result<IpAddr> {
    let any: IpAddr = if peer.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.connect(SocketAddr::new(peer, 9))?;
    Ok(socket.local_addr()?.ip())
}

/// Finds or makes the tunnel of a completed description as a port of its bridge.
pub(crate) fn ensure(socket: &mut Socket, spec: &BridgeSpec, bridge: u32) -> Result<(), Error> {
    let (Some(tunnel), Some(mtu)) = (&spec.tunnel, spec.mtu) else { return Ok(()) };
    let Some(local) = tunnel.local else { return Ok(()) };
    let name = device_name(&spec.name);
    let alias = format!("brigantine tunnel {:08x}", hash(&format!("{tunnel:?} {mtu}")));
    let existing = link::find(socket, &name)?;
    if existing.as_ref().is_some_and(|link| link.alias == alias && link.master == Some(bridge)) {
        return Ok(());
    }
    if existing.is_some() {
        remove(socket, &spec.name)?;
    }
    let mut batch = Messages::new();
    let wanted = Vxlan { name: &name, bridge, vni: tunnel.vni, port: tunnel.port, local, mtu, alias: &alias };
    device::add_vxlan(&mut batch, &wanted);
    socket.execute(batch).map_err(|error| match error.errno() {
        Some(libc::EEXIST) => Error::InvalidBridge {
            bridge: spec.name.clone(),
            reason: format!("another VXLAN interface of this host has the id {}; choose another", tunnel.vni),
        },
        _ => unsupported(error, "VXLAN interfaces", "CONFIG_VXLAN"),
    })?;
    let Some(made) = link::find(socket, &name)? else {
        return Err(Error::BridgeConflict { bridge: name, reason: "vanished at once".to_owned() });
    };
    let mut batch = Messages::new();
    for peer in &tunnel.peers {
        device::add_peer(&mut batch, made.index, &name, *peer);
    }
    link::without_link_local(&mut batch, made.index, &name);
    link::set_up(&mut batch, made.index, &name);
    socket.execute(batch)
}

/// Removes the tunnel of a bridge, if there is one.
pub(crate) fn remove(socket: &mut Socket, bridge: &str) -> Result<(), Error> {
    let mut batch = Messages::new();
    link::delete_by_name(&mut batch, &device_name(bridge));
    match socket.execute(batch) {
        Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
        result => result,
    }
}

fn device_name(bridge: &str) -> String {
    hashed("vx", bridge, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_hosts_of_one_family() {
        let tunnel = |local: Option<&str>, peers: &[&str]| Tunnel {
            vni: 7,
            port: DEFAULT_PORT,
            local: local.map(|text| text.parse().unwrap()),
            peers: peers.iter().map(|text| text.parse().unwrap()).collect(),
        };
        tunnel(None, &["192.0.2.1", "192.0.2.2"]).validate().unwrap();
        tunnel(Some("2001:db8::1"), &["2001:db8::2"]).validate().unwrap();
        for (local, peers) in [
            (None, &[][..]),
            (None, &["192.0.2.1", "192.0.2.1"]),
            (Some("192.0.2.1"), &["192.0.2.1"]),
            (Some("2001:db8::1"), &["192.0.2.1"]),
            (None, &["0.0.0.0"]),
            (None, &["127.0.0.1"]),
            (None, &["239.1.1.1"]),
        ] {
            assert!(tunnel(local, peers).validate().is_err(), "{local:?} {peers:?}");
        }
        assert!(Tunnel { vni: 1 << 24, ..tunnel(None, &["192.0.2.1"]) }.validate().is_err());
        assert_eq!(tunnel(None, &["192.0.2.1"]).overhead(), 14 + 8 + 8 + 20);
        assert_eq!(tunnel(None, &["2001:db8::1"]).overhead(), 14 + 8 + 8 + 40);
    }
}
