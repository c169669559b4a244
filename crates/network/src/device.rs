//! rtnetlink requests that make virtual devices other than bridges and their ports. Constants are those of
//! `linux/if_link.h` and `linux/neighbour.h`.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::link::{INFO_DATA, INFO_KIND, VETH_INFO_PEER, link_header, octets};
use crate::mac::MacAddr;
use crate::subinterface::{IpvlanFlag, IpvlanMode, MacvlanMode, SubinterfaceKind};
use crate::wire::{Attributes, Messages, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};

const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;
const IFLA_VLAN_ID: u16 = 1;
const IFLA_MACVLAN_MODE: u16 = 1;
const IFLA_IPVLAN_MODE: u16 = 1;
const IFLA_IPVLAN_FLAGS: u16 = 2;
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_VXLAN_LOCAL6: u16 = 17;
const IFLA_VXLAN_UDP_ZERO_CSUM6_RX: u16 = 20;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;
const NTF_SELF: u8 = 2;

fn add(
    batch: &mut Messages,
    what: String,
    kind: &str,
    fill: impl FnOnce(&mut Attributes<'_>),
    data: impl FnOnce(&mut Attributes<'_>),
) {
    batch.push(what, libc::RTM_NEWLINK, NEW, &link_header(0, 0, 0), |link| {
        fill(link);
        link.nest(libc::IFLA_LINKINFO, |info| {
            info.text(INFO_KIND, kind).nest(INFO_DATA, data);
        });
    });
}

/// The kernel takes no alias with the request that makes an interface.
fn mark(batch: &mut Messages, name: &str, alias: &str) {
    batch.push(format!("mark {name}"), libc::RTM_SETLINK, 0, &link_header(0, 0, 0), |link| {
        link.text(libc::IFLA_IFNAME, name).bytes(libc::IFLA_IFALIAS, alias.as_bytes());
    });
}

pub(crate) fn add_dummy(batch: &mut Messages, name: &str, alias: &str) {
    let named = |link: &mut Attributes<'_>| {
        link.text(libc::IFLA_IFNAME, name);
    };
    add(batch, format!("create dummy interface {name}"), "dummy", named, |_| {});
    mark(batch, name, alias);
}

/// A pair of which only the first end is of use, as it has a carrier.
pub(crate) fn add_lonely_pair(batch: &mut Messages, names: [&str; 2], alias: &str) {
    let what = format!("create veth pair {} and {}", names[0], names[1]);
    let named = |link: &mut Attributes<'_>| {
        link.text(libc::IFLA_IFNAME, names[0]);
    };
    add(batch, what, "veth", named, |data| {
        data.nest_after(VETH_INFO_PEER, &link_header(0, 0, 0), |peer| {
            peer.text(libc::IFLA_IFNAME, names[1]);
        });
    });
    mark(batch, names[0], alias);
}

/// An 802.1q interface on `base`.
pub(crate) fn add_vlan(batch: &mut Messages, name: &str, base: u32, id: u16, alias: &str) {
    let named = |link: &mut Attributes<'_>| {
        link.text(libc::IFLA_IFNAME, name).u32(libc::IFLA_LINK, base);
    };
    add(batch, format!("create VLAN interface {name}"), "vlan", named, |data| {
        data.bytes(IFLA_VLAN_ID, &id.to_ne_bytes());
    });
    mark(batch, name, alias);
}

/// An interface below a parent of the host, made directly in a container's namespace.
#[derive(Debug)]
pub(crate) struct Subinterface<'a> {
    pub name: &'a str,
    pub netns: BorrowedFd<'a>,
    pub parent: u32,
    pub kind: SubinterfaceKind,
    /// ipvlan interfaces have their parent's, and with passthru it is the parent's that counts.
    pub mac: Option<MacAddr>,
    pub mtu: Option<u32>,
}

pub(crate) fn add_subinterface(batch: &mut Messages, wanted: &Subinterface<'_>) {
    let what = format!("create {} interface {}", wanted.kind.name(), wanted.name);
    let named = |link: &mut Attributes<'_>| {
        link.text(libc::IFLA_IFNAME, wanted.name)
            .u32(libc::IFLA_LINK, wanted.parent)
            .u32(libc::IFLA_NET_NS_FD, wanted.netns.as_raw_fd() as u32);
        if let Some(mac) = wanted.mac {
            link.bytes(libc::IFLA_ADDRESS, &mac.bytes());
        }
        if let Some(mtu) = wanted.mtu {
            link.u32(libc::IFLA_MTU, mtu);
        }
    };
    add(batch, what, wanted.kind.name(), named, |data| match wanted.kind {
        SubinterfaceKind::Macvlan(mode) => {
            let mode = match mode {
                MacvlanMode::Private => 1,
                MacvlanMode::Vepa => 2,
                MacvlanMode::Bridge => 4,
                MacvlanMode::Passthru => 8,
            };
            data.u32(IFLA_MACVLAN_MODE, mode);
        }
        SubinterfaceKind::Ipvlan(mode, flag) => {
            let mode: u16 = match mode {
                IpvlanMode::L2 => 0,
                IpvlanMode::L3 => 1,
                IpvlanMode::L3s => 2,
            };
            let flag: u16 = match flag {
                IpvlanFlag::Bridge => 0,
                IpvlanFlag::Private => 1,
                IpvlanFlag::Vepa => 2,
            };
            data.bytes(IFLA_IPVLAN_MODE, &mode.to_ne_bytes()).bytes(IFLA_IPVLAN_FLAGS, &flag.to_ne_bytes());
        }
    });
}

/// A tunnel of VXLAN (RFC 7348) as a port of a bridge.
#[derive(Debug)]
pub(crate) struct Vxlan<'a> {
    pub name: &'a str,
    pub bridge: u32,
    pub vni: u32,
    pub port: u16,
    pub local: IpAddr,
    pub mtu: u32,
    pub alias: &'a str,
}

pub(crate) fn add_vxlan(batch: &mut Messages, tunnel: &Vxlan<'_>) {
    let named = |link: &mut Attributes<'_>| {
        link.text(libc::IFLA_IFNAME, tunnel.name)
            .u32(libc::IFLA_MASTER, tunnel.bridge)
            .u32(libc::IFLA_MTU, tunnel.mtu);
    };
    add(batch, format!("create VXLAN interface {}", tunnel.name), "vxlan", named, |data| {
        let local = if tunnel.local.is_ipv4() { IFLA_VXLAN_LOCAL } else { IFLA_VXLAN_LOCAL6 };
        data.u32(IFLA_VXLAN_ID, tunnel.vni)
            .bytes(local, &octets(tunnel.local))
            .bytes(IFLA_VXLAN_PORT, &tunnel.port.to_be_bytes())
            .u8(IFLA_VXLAN_LEARNING, 1);
        if tunnel.local.is_ipv6() {
            data.u8(IFLA_VXLAN_UDP_ZERO_CSUM6_RX, 1);
        }
    });
    mark(batch, tunnel.name, tunnel.alias);
}

/// Sends frames for everybody, and for those whose place is not known yet, to one more end of the tunnel.
pub(crate) fn add_peer(batch: &mut Messages, tunnel: u32, name: &str, peer: IpAddr) {
    let mut header = [0; 12];
    header[0] = libc::AF_BRIDGE as u8;
    header[4..8].copy_from_slice(&tunnel.to_ne_bytes());
    header[8..10].copy_from_slice(&(NUD_NOARP | NUD_PERMANENT).to_ne_bytes());
    header[10] = NTF_SELF;
    let what = format!("enter peer {peer} of {name}");
    batch.push(what, libc::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_APPEND, &header, |body| {
        body.bytes(NDA_LLADDR, &[0; 6]).bytes(NDA_DST, &octets(peer));
    });
}

/// A pair of interfaces the first of which is a port of `bridge`.
pub(crate) fn add_trunk(batch: &mut Messages, names: [&str; 2], bridge: u32, mtu: Option<u32>) {
    let what = format!("create veth pair {} and {}", names[0], names[1]);
    let named = |link: &mut Attributes<'_>| {
        link.text(libc::IFLA_IFNAME, names[0]).u32(libc::IFLA_MASTER, bridge);
        if let Some(mtu) = mtu {
            link.u32(libc::IFLA_MTU, mtu);
        }
    };
    add(batch, what, "veth", named, |data| {
        data.nest_after(VETH_INFO_PEER, &link_header(0, 0, 0), |peer| {
            peer.text(libc::IFLA_IFNAME, names[1]);
            if let Some(mtu) = mtu {
                peer.u32(libc::IFLA_MTU, mtu);
            }
        });
    });
}
