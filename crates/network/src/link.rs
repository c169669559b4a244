//! rtnetlink requests: interfaces, addresses and routes. Functions that build push into a batch and do not
//! talk; functions that ask take the socket.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use crate::error::Error;
use crate::mac::MacAddr;
use crate::sandbox::Counters;
use crate::socket::Socket;
use crate::wire::{
    Attributes, Messages, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, attribute, attributes, text,
    u32_at, u64_at,
};

const IFF_UP: u32 = 1;
const IFF_NOARP: u32 = 0x80;
pub(crate) const INFO_KIND: u16 = 1;
pub(crate) const INFO_DATA: u16 = 2;
const INFO_PORT_KIND: u16 = 4;
const INFO_PORT_DATA: u16 = 5;
const BRIDGE_PORT_STATE: u16 = 1;
const BRIDGE_PORT_FORWARDING: u8 = 3;
const BRIDGE_PORT_HAIRPIN: u16 = 4;
const BRIDGE_PORT_ISOLATED: u16 = 33;
pub(crate) const VETH_INFO_PEER: u16 = 1;
const OPERSTATE_UP: u8 = 6;
const NUD_REACHABLE: u16 = 2;
const NUD_STALE: u16 = 4;
const NTF_MASTER: u8 = 4;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_MODE_NONE: u8 = 1;
const IFA_F_NODAD: u32 = 2;
const IFA_FLAGS: u16 = 8;

/// Longest wait for an interface; a container that starts a moment too early is better than none.
const READY_PATIENCE: Duration = Duration::from_millis(100);

/// Index of the loopback interface in every network namespace.
pub(crate) const LOOPBACK: u32 = 1;

/// An interface as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub index: u32,
    pub name: String,
    /// `bridge`, `veth`, …; empty for hardware.
    pub kind: String,
    pub master: Option<u32>,
    pub mtu: u32,
    pub alias: String,
    pub counters: Counters,
    /// Packets pass: the kernel has seen the carrier, and a bridge's port forwards.
    pub is_ready: bool,
}

/// `struct ifinfomsg`.
pub(crate) fn link_header(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}

/// A veth pair: one end here, the other directly in `netns`.
#[derive(Debug)]
pub(crate) struct Veth<'a> {
    pub host_name: &'a str,
    pub bridge: u32,
    pub netns: BorrowedFd<'a>,
    pub peer_name: &'a str,
    pub peer_mac: MacAddr,
    pub mtu: Option<u32>,
}

pub(crate) fn add_veth(batch: &mut Messages, veth: &Veth<'_>) {
    let what = format!("create veth pair {} with peer {}", veth.host_name, veth.peer_name);
    let header = link_header(0, 0, 0);
    batch.push(what, libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &header, |link| {
        link.text(libc::IFLA_IFNAME, veth.host_name).u32(libc::IFLA_MASTER, veth.bridge);
        if let Some(mtu) = veth.mtu {
            link.u32(libc::IFLA_MTU, mtu);
        }
        link.nest(libc::IFLA_LINKINFO, |info| {
            info.text(INFO_KIND, "veth").nest(INFO_DATA, |data| {
                let peer_header = link_header(0, 0, 0);
                data.nest_after(VETH_INFO_PEER, &peer_header, |peer| {
                    peer.text(libc::IFLA_IFNAME, veth.peer_name)
                        .bytes(libc::IFLA_ADDRESS, &veth.peer_mac.bytes())
                        .u32(libc::IFLA_NET_NS_FD, veth.netns.as_raw_fd() as u32);
                    if let Some(mtu) = veth.mtu {
                        peer.u32(libc::IFLA_MTU, mtu);
                    }
                });
            });
        });
    });
}

/// A veth pair with both ends here, neither of which asks for its neighbours.
pub(crate) fn add_pair(batch: &mut Messages, names: [&str; 2], mac: MacAddr) {
    let what = format!("create veth pair {} and {}", names[0], names[1]);
    let header = link_header(0, IFF_NOARP, IFF_NOARP);
    batch.push(what, libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &header, |link| {
        link.text(libc::IFLA_IFNAME, names[0]).bytes(libc::IFLA_ADDRESS, &mac.bytes());
        link.nest(libc::IFLA_LINKINFO, |info| {
            info.text(INFO_KIND, "veth").nest(INFO_DATA, |data| {
                data.nest_after(VETH_INFO_PEER, &header, |peer| {
                    peer.text(libc::IFLA_IFNAME, names[1]).bytes(libc::IFLA_ADDRESS, &mac.bytes());
                });
            });
        });
    });
}

/// A route to what is reached directly.
pub(crate) fn add_device_route(batch: &mut Messages, index: u32, name: &str, to: IpNet) {
    let mut header = default_route(family(to.addr()));
    header[1] = to.prefix_len();
    header[6] = libc::RT_SCOPE_LINK;
    let what = format!("route {to} to {name}");
    batch.push(what, libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &header, |route| {
        route.bytes(libc::RTA_DST, &octets(to.addr())).u32(libc::RTA_OIF, index);
    });
}

/// Names the owner and keeps the kernel from giving a bridge's port an IPv6 address of its own.
pub(crate) fn dress_port(batch: &mut Messages, name: &str, alias: &str) {
    let what = format!("configure {name}");
    batch.push(what, libc::RTM_SETLINK, 0, &link_header(0, 0, 0), |link| {
        link.text(libc::IFLA_IFNAME, name).bytes(libc::IFLA_IFALIAS, alias.as_bytes());
        no_link_local(link);
    });
}

/// What a bridge's port does besides the usual.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PortMode {
    /// Reaches the bridge itself, but no other isolated port.
    pub isolated: bool,
    /// Frames may leave by the port they came from.
    pub hairpin: bool,
}

pub(crate) fn set_port_mode(batch: &mut Messages, name: &str, mode: PortMode) {
    let what = format!("configure bridge port {name}");
    batch.push(what, libc::RTM_NEWLINK, 0, &link_header(0, 0, 0), |link| {
        link.text(libc::IFLA_IFNAME, name).nest(libc::IFLA_LINKINFO, |info| {
            info.text(INFO_PORT_KIND, "bridge").nest(INFO_PORT_DATA, |data| {
                data.u8(BRIDGE_PORT_HAIRPIN, u8::from(mode.hairpin))
                    .u8(BRIDGE_PORT_ISOLATED, u8::from(mode.isolated));
            });
        });
    });
}

pub(crate) fn set_up_by_name(batch: &mut Messages, name: &str) {
    let what = format!("bring up {name}");
    batch.push(what, libc::RTM_SETLINK, 0, &link_header(0, IFF_UP, IFF_UP), |link| {
        link.text(libc::IFLA_IFNAME, name);
    });
}

pub(crate) fn set_up(batch: &mut Messages, index: u32, name: &str) {
    let what = format!("bring up {name}");
    batch.push(what, libc::RTM_SETLINK, 0, &link_header(index, IFF_UP, IFF_UP), |_| {});
}

/// Keeps an interface free of IPv6 altogether until it is given an address.
pub(crate) fn without_link_local(batch: &mut Messages, index: u32, name: &str) {
    let what = format!("turn off automatic IPv6 addresses of {name}");
    batch.push(what, libc::RTM_SETLINK, 0, &link_header(index, 0, 0), no_link_local);
}

fn no_link_local(link: &mut Attributes<'_>) {
    link.nest(libc::IFLA_AF_SPEC, |families| {
        families.nest(libc::AF_INET6 as u16, |inet6| {
            inet6.u8(INET6_ADDR_GEN_MODE, ADDR_GEN_MODE_NONE);
        });
    });
}

pub(crate) fn add_bridge(batch: &mut Messages, name: &str, mac: MacAddr, mtu: Option<u32>) {
    let what = format!("create bridge {name}");
    batch.push(what, libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &link_header(0, 0, 0), |link| {
        link.text(libc::IFLA_IFNAME, name).bytes(libc::IFLA_ADDRESS, &mac.bytes());
        if let Some(mtu) = mtu {
            link.u32(libc::IFLA_MTU, mtu);
        }
        link.nest(libc::IFLA_LINKINFO, |info| {
            info.text(INFO_KIND, "bridge");
        });
    });
}

/// Names the owner.
pub(crate) fn set_alias(batch: &mut Messages, index: u32, name: &str, alias: &str) {
    let what = format!("mark {name}");
    batch.push(what, libc::RTM_SETLINK, 0, &link_header(index, 0, 0), |link| {
        link.bytes(libc::IFLA_IFALIAS, alias.as_bytes());
    });
}

pub(crate) fn set_mtu(batch: &mut Messages, index: u32, name: &str, mtu: u32) {
    let what = format!("set the MTU of {name} to {mtu}");
    batch.push(what, libc::RTM_SETLINK, 0, &link_header(index, 0, 0), |link| {
        link.u32(libc::IFLA_MTU, mtu);
    });
}

pub(crate) fn delete(batch: &mut Messages, index: u32, name: &str) {
    batch.push(format!("delete interface {name}"), libc::RTM_DELLINK, 0, &link_header(index, 0, 0), |_| {});
}

pub(crate) fn delete_by_name(batch: &mut Messages, name: &str) {
    let what = format!("delete interface {name}");
    batch.push(what, libc::RTM_DELLINK, 0, &link_header(0, 0, 0), |link| {
        link.text(libc::IFLA_IFNAME, name);
    });
}

/// Adds (or confirms) an address; IPv6 without duplicate address detection: the engine hands them out.
pub(crate) fn add_address(batch: &mut Messages, index: u32, name: &str, address: IpNet) {
    let mut header = [0; 8];
    header[0] = family(address.addr());
    header[1] = address.prefix_len();
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    let what = format!("add address {address} to {name}");
    batch.push(what, libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &header, |body| match address {
        IpNet::V4(net) => {
            let bytes = net.addr().octets();
            body.bytes(libc::IFA_LOCAL, &bytes)
                .bytes(libc::IFA_ADDRESS, &bytes)
                .bytes(libc::IFA_BROADCAST, &net.broadcast().octets());
        }
        IpNet::V6(net) => {
            let bytes = net.addr().octets();
            body.bytes(libc::IFA_LOCAL, &bytes).bytes(libc::IFA_ADDRESS, &bytes).u32(IFA_FLAGS, IFA_F_NODAD);
        }
    });
}

pub(crate) fn delete_address(batch: &mut Messages, index: u32, name: &str, address: IpNet) {
    let mut header = [0; 8];
    header[0] = family(address.addr());
    header[1] = address.prefix_len();
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    let what = format!("remove address {address} from {name}");
    batch.push(what, libc::RTM_DELADDR, 0, &header, |body| {
        body.bytes(libc::IFA_LOCAL, &octets(address.addr()));
    });
}

/// Adds the default route, or replaces the one there is. The unspecified address is no router: everything is reached by
/// the interface directly.
pub(crate) fn set_default_route(batch: &mut Messages, index: u32, gateway: IpAddr) {
    let what = format!("set the default route via {gateway}");
    let mut header = default_route(family(gateway));
    if gateway.is_unspecified() {
        header[6] = libc::RT_SCOPE_LINK;
    }
    batch.push(what, libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &header, |route| {
        if !gateway.is_unspecified() {
            route.bytes(libc::RTA_GATEWAY, &octets(gateway));
        }
        route.u32(libc::RTA_OIF, index);
    });
}

pub(crate) fn delete_default_route(batch: &mut Messages, is_ipv4: bool) {
    let family = (if is_ipv4 { libc::AF_INET } else { libc::AF_INET6 }) as u8;
    batch.push("remove the default route", libc::RTM_DELROUTE, 0, &default_route(family), |_| {});
}

/// `struct rtmsg`.
fn default_route(family: u8) -> [u8; 12] {
    let mut header = [0; 12];
    header[0] = family;
    header[4] = libc::RT_TABLE_MAIN;
    header[5] = libc::RTPROT_BOOT;
    header[6] = libc::RT_SCOPE_UNIVERSE;
    header[7] = libc::RTN_UNICAST;
    header
}

/// The interface of that name, if there is one.
pub(crate) fn find(socket: &mut Socket, name: &str) -> Result<Option<Link>, Error> {
    let mut batch = Messages::new();
    let what = format!("look up interface {name}");
    batch.push(what, libc::RTM_GETLINK, NLM_F_ACK, &link_header(0, 0, 0), |link| {
        link.text(libc::IFLA_IFNAME, name);
    });
    let mut found = None;
    match socket.query(batch, |message| found = parse_link(message.payload)) {
        Ok(()) => Ok(found),
        Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Waits until interfaces that were brought up pass packets. The kernel takes notice of a carrier in a work
/// queue, and until then drops what is sent: the first packet would be lost and sent again after a second.
/// Asking for an interface makes newer kernels (6.8) do that work at once; others are given a moment.
/// Returns the interface's index.
pub(crate) fn wait_until_ready(socket: &mut Socket, name: &str) -> Result<u32, Error> {
    let deadline = Instant::now() + READY_PATIENCE;
    loop {
        let Some(link) = find(socket, name)? else {
            let source = io::Error::from_raw_os_error(libc::ENODEV);
            return Err(Error::Kernel { what: format!("wait for interface {name}"), detail: None, source });
        };
        if link.is_ready {
            return Ok(link.index);
        }
        if Instant::now() > deadline {
            tracing::debug!(interface = name, "not ready yet");
            return Ok(link.index);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Tells the bridge behind which of its ports a hardware address is, as if it had learned it; it may remember
/// another one, of a container that had the address before.
pub(crate) fn announce(batch: &mut Messages, port: u32, name: &str, mac: MacAddr) {
    let mut header = [0; 12];
    header[0] = libc::AF_BRIDGE as u8;
    header[4..8].copy_from_slice(&port.to_ne_bytes());
    header[8..10].copy_from_slice(&NUD_REACHABLE.to_ne_bytes());
    header[10] = NTF_MASTER;
    let what = format!("announce {mac} behind {name}");
    batch.push(what, libc::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &header, |body| {
        body.bytes(NDA_LLADDR, &mac.bytes());
    });
}

/// Tells the host the hardware address behind an address on `bridge`, so that its first packet need not ask:
/// an IPv6 address answers only once the kernel has joined its group, at its leisure. The entry is checked by
/// the kernel when it is used, as any it learned.
pub(crate) fn introduce(batch: &mut Messages, bridge: u32, name: &str, address: IpAddr, mac: MacAddr) {
    let mut header = [0; 12];
    header[0] = family(address);
    header[4..8].copy_from_slice(&bridge.to_ne_bytes());
    header[8..10].copy_from_slice(&NUD_STALE.to_ne_bytes());
    let what = format!("introduce {address} on {name}");
    batch.push(what, libc::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &header, |body| {
        body.bytes(NDA_DST, &octets(address)).bytes(NDA_LLADDR, &mac.bytes());
    });
}

pub(crate) fn all(socket: &mut Socket) -> Result<Vec<Link>, Error> {
    socket.dump("list interfaces", libc::RTM_GETLINK, &link_header(0, 0, 0), parse_link)
}

/// Index of the interface that has an address.
pub(crate) fn owner_of(socket: &mut Socket, address: IpAddr) -> Result<Option<u32>, Error> {
    let all = all_addresses(socket)?;
    Ok(all.into_iter().find(|(_, net)| net.addr() == address).map(|(owner, _)| owner))
}

/// Each address with the interface that has it.
pub(crate) fn all_addresses(socket: &mut Socket) -> Result<Vec<(u32, IpNet)>, Error> {
    socket.dump("list addresses", libc::RTM_GETADDR, &[0; 8], |payload| {
        let (prefix, owner) = (*payload.get(1)?, u32_at(payload, 4)?);
        let body = payload.get(8..)?;
        let raw = attribute(body, libc::IFA_LOCAL).or_else(|| attribute(body, libc::IFA_ADDRESS))?;
        Some((owner, IpNet::new(address(raw)?, prefix).ok()?))
    })
}

/// Addresses on an interface, except link-local IPv6 ones.
pub(crate) fn addresses_of(socket: &mut Socket, index: u32) -> Result<Vec<IpNet>, Error> {
    let all = all_addresses(socket)?;
    let is_link_local = |net: &IpNet| matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local());
    Ok(all
        .into_iter()
        .filter(|(owner, net)| *owner == index && !is_link_local(net))
        .map(|(_, net)| net)
        .collect())
}

/// A destination the host can reach, other than by a default route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub destination: IpNet,
    pub device: Option<u32>,
}

/// Unicast routes of all tables but the local one, which repeats every address.
pub(crate) fn routes(socket: &mut Socket) -> Result<Vec<Route>, Error> {
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut header = [0; 12];
        header[0] = family as u8;
        let some = socket.dump("list routes", libc::RTM_GETROUTE, &header, |payload| {
            let (prefix, table, kind) = (*payload.get(1)?, *payload.get(4)?, *payload.get(7)?);
            if table == libc::RT_TABLE_LOCAL || kind != libc::RTN_UNICAST || prefix == 0 {
                return None;
            }
            let body = payload.get(12..)?;
            let destination = IpNet::new(address(attribute(body, libc::RTA_DST)?)?, prefix).ok()?;
            let is_noise = match destination {
                IpNet::V4(_) => false,
                IpNet::V6(net) => net.addr().is_unicast_link_local() || net.addr().is_multicast(),
            };
            let device = attribute(body, libc::RTA_OIF).and_then(|raw| u32_at(raw, 0));
            (!is_noise).then_some(Route { destination, device })
        })?;
        found.extend(some);
    }
    Ok(found)
}

fn parse_link(payload: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(payload, 4)?,
        name: String::new(),
        kind: String::new(),
        master: None,
        mtu: 0,
        alias: String::new(),
        counters: Counters::default(),
        is_ready: false,
    };
    let mut port_state = None;
    for (kind, value) in attributes(payload.get(16..)?) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_MASTER => link.master = u32_at(value, 0),
            libc::IFLA_MTU => link.mtu = u32_at(value, 0)?,
            libc::IFLA_IFALIAS => link.alias = text(value),
            libc::IFLA_LINKINFO => {
                link.kind = attribute(value, INFO_KIND).map(text).unwrap_or_default();
                let port = attribute(value, INFO_PORT_DATA);
                port_state = port.and_then(|port| attribute(port, BRIDGE_PORT_STATE)?.first().copied());
            }
            libc::IFLA_OPERSTATE => link.is_ready = value.first() == Some(&OPERSTATE_UP),
            libc::IFLA_STATS64 => link.counters = parse_counters(value)?,
            _ => {}
        }
    }
    link.is_ready &= port_state.is_none_or(|state| state == BRIDGE_PORT_FORWARDING);
    (!link.name.is_empty()).then_some(link)
}

/// `struct rtnl_link_stats64`.
fn parse_counters(value: &[u8]) -> Option<Counters> {
    let field = |number: usize| u64_at(value, number * 8);
    Some(Counters {
        rx_packets: field(0)?,
        tx_packets: field(1)?,
        rx_bytes: field(2)?,
        tx_bytes: field(3)?,
        rx_errors: field(4)?,
        tx_errors: field(5)?,
        rx_dropped: field(6)?,
        tx_dropped: field(7)?,
    })
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn address(raw: &[u8]) -> Option<IpAddr> {
    match raw.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(raw).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(raw).ok()?).into()),
        _ => None,
    }
}
