//! What a bridge shall be, whether that can be, and making it so. Invariant: a validated description has a
//! gateway inside each subnet and a name the kernel takes; a bridge that is not ours is used, never changed.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::layout::Layout;
use crate::link;
use crate::mac::MacAddr;
use crate::socket::Socket;
use crate::subnet::overlap;
use crate::sysctl;
use crate::tunnel::Tunnel;
use crate::wire::Messages;

/// How containers of a bridge are reached from other machines and reach them, for one family of addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GatewayMode {
    /// By published ports only; outbound traffic gets the host's address if the bridge masquerades.
    #[default]
    Nat,
    /// As with `Nat`, and by every port of a container's own address.
    NatUnprotected,
    /// At their own addresses, by published ports only and without translation: the network's routers know the way.
    Routed,
    /// Not at all: not even the host has an address on the bridge. For internal bridges.
    Isolated,
}

impl std::str::FromStr for GatewayMode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "nat" => Ok(Self::Nat),
            "nat-unprotected" => Ok(Self::NatUnprotected),
            "routed" => Ok(Self::Routed),
            "isolated" => Ok(Self::Isolated),
            _ => Err(()),
        }
    }
}

/// A bridge of the engine on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeSpec {
    /// Interface name, at most 15 bytes.
    pub name: String,
    pub subnet: Option<Ipv4Net>,
    /// The host's address on the bridge.
    pub gateway: Option<Ipv4Addr>,
    pub subnet6: Option<Ipv6Net>,
    pub gateway6: Option<Ipv6Addr>,
    /// The kernel's default (1500) if `None`.
    pub mtu: Option<u32>,
    /// No way in or out but among its containers and the host itself.
    pub internal: bool,
    /// Whether containers of the bridge reach each other.
    pub icc: bool,
    /// Whether traffic that leaves the host gets the host's address.
    pub masquerade: bool,
    #[serde(default)]
    pub mode4: GatewayMode,
    #[serde(default)]
    pub mode6: GatewayMode,
    /// The gateway's IPv4 address is somebody else's: the bridge is not given it.
    #[serde(default)]
    pub inhibit_ipv4: bool,
    /// Interfaces of the host from which published ports are reached at the containers' own addresses, too.
    #[serde(default)]
    pub trusted: Vec<String>,
    /// What joins the bridge with those of other hosts.
    #[serde(default)]
    pub tunnel: Option<Tunnel>,
}

impl BridgeSpec {
    /// An IPv4 bridge with docker's defaults: masquerade, containers reach each other.
    pub fn new(name: impl Into<String>, subnet: Ipv4Net, gateway: Ipv4Addr) -> Self {
        Self {
            name: name.into(),
            subnet: Some(subnet.trunc()),
            gateway: Some(gateway),
            subnet6: None,
            gateway6: None,
            mtu: None,
            internal: false,
            icc: true,
            masquerade: true,
            mode4: GatewayMode::Nat,
            mode6: GatewayMode::Nat,
            inhibit_ipv4: false,
            trusted: Vec::new(),
            tunnel: None,
        }
    }

    /// How an address of the bridge is reached.
    pub fn mode(&self, address: std::net::IpAddr) -> GatewayMode {
        if address.is_ipv4() { self.mode4 } else { self.mode6 }
    }

    pub fn layout(&self) -> Layout {
        Layout {
            subnet: self.subnet,
            gateway: self.gateway,
            subnet6: self.subnet6,
            gateway6: self.gateway6,
            internal: self.internal,
        }
    }

    /// The host's addresses on the bridge, with prefix length.
    pub(crate) fn addresses(&self) -> Vec<IpNet> {
        let ipv4 = self.subnet.zip(self.gateway).filter(|_| !self.inhibit_ipv4);
        let ipv4 = ipv4.and_then(|(subnet, gateway)| Ipv4Net::new(gateway, subnet.prefix_len()).ok());
        let ipv6 = self.subnet6.zip(self.gateway6);
        let ipv6 = ipv6.and_then(|(subnet, gateway)| Ipv6Net::new(gateway, subnet.prefix_len()).ok());
        ipv4.map(IpNet::V4).into_iter().chain(ipv6.map(IpNet::V6)).collect()
    }

    pub(crate) fn subnets(&self) -> Vec<IpNet> {
        self.layout().subnets()
    }

    /// Derived from the first address of the network, so that it stays the same.
    fn mac(&self) -> MacAddr {
        let layout = self.layout();
        let first = layout.gateways().next().or_else(|| layout.subnets().first().map(IpNet::network));
        first.map_or_else(|| MacAddr::new([2, 0x42, 0, 0, 0, 1]), MacAddr::from_ip)
    }

    /// Checks what can be checked without looking at the host.
    pub fn validate(&self) -> Result<(), Error> {
        check_interface_name(&self.name)?;
        for interface in &self.trusted {
            check_interface_name(interface)?;
        }
        let invalid = |reason: String| Error::InvalidBridge { bridge: self.name.clone(), reason };
        let layout = self.layout();
        layout.check().and_then(|()| layout.check_mtu(self.mtu)).map_err(invalid)?;
        for (subnet, has_gateway, mode) in [
            (self.subnet.map(IpNet::V4), self.gateway.is_some(), self.mode4),
            (self.subnet6.map(IpNet::V6), self.gateway6.is_some(), self.mode6),
        ] {
            match (subnet, mode) {
                (Some(_), GatewayMode::Isolated) if !self.internal => {
                    return Err(invalid("the gateway mode isolated is for internal networks".to_owned()));
                }
                (Some(subnet), GatewayMode::Isolated) if has_gateway => {
                    return Err(invalid(format!("in the gateway mode isolated, {subnet} has no gateway")));
                }
                (Some(subnet), mode) if !has_gateway && mode != GatewayMode::Isolated => {
                    return Err(invalid(format!("subnet {subnet} has no gateway")));
                }
                _ => {}
            }
        }
        match &self.tunnel {
            Some(tunnel) => tunnel.validate().map_err(invalid),
            None => Ok(()),
        }
    }
}

/// What the kernel takes as an interface's name (`dev_valid_name`).
pub(crate) fn check_interface_name(name: &str) -> Result<(), Error> {
    let bad = name.is_empty()
        || name.len() > 15
        || name == "."
        || name == ".."
        || name.bytes().any(|byte| {
            byte == b'/' || byte == b':' || byte == 0 || byte.is_ascii_whitespace() || byte == 0x0b
        });
    if bad { Err(Error::InterfaceName(name.to_owned())) } else { Ok(()) }
}

/// The bridge's own address on an IPv6 network, besides the gateway's.
const GATEWAY_LINK_LOCAL: IpNet =
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1), 64));

/// Marks the bridges.
const BRIDGE_ALIAS: &str = "brigantine bridge";

/// What the host needs to forward for the bridge, and what it must not take from the bridge's containers.
pub(crate) fn configure_forwarding(spec: &BridgeSpec) -> Result<(), Error> {
    if sysctl::has_ipv6() {
        // A container that sends router advertisements must not become the host's router (CVE-2020-13401).
        sysctl::ensure(&format!("ipv6/conf/{}/accept_ra", spec.name), "0")?;
    }
    if spec.internal {
        return Ok(());
    }
    if spec.subnet.is_some() {
        sysctl::ensure("ipv4/ip_forward", "1")?;
        sysctl::ensure(&format!("ipv4/conf/{}/route_localnet", spec.name), "1")?;
    }
    if spec.subnet6.is_some() {
        sysctl::forward_ipv6()?;
    }
    Ok(())
}

/// Finds or makes the bridge's interface and gives it its addresses; its index, and whether it was made.
pub(crate) fn ensure_link(socket: &mut Socket, spec: &BridgeSpec) -> Result<(u32, bool), Error> {
    let conflict = |reason: String| Error::BridgeConflict { bridge: spec.name.clone(), reason };
    let existing = link::find(socket, &spec.name)?;
    check_routes(socket, spec, existing.as_ref().map(|link| link.index))?;
    if existing.is_none() {
        let mut batch = Messages::new();
        link::add_bridge(&mut batch, &spec.name, spec.mac(), spec.mtu);
        socket.execute(batch)?;
    }
    let link = match &existing {
        Some(link) => link.clone(),
        None => link::find(socket, &spec.name)?.ok_or_else(|| conflict("vanished at once".to_owned()))?,
    };
    if link.kind != "bridge" {
        let kind = if link.kind.is_empty() { "a hardware interface" } else { &link.kind };
        return Err(conflict(format!("is not a bridge but {kind}; choose another name")));
    }
    let wanted = spec.addresses();
    let present = if existing.is_some() { link::addresses_of(socket, link.index)? } else { Vec::new() };
    let mut batch = Messages::new();
    let is_foreign =
        |address: &&IpNet| !wanted.contains(address) && (!spec.inhibit_ipv4 || address.addr().is_ipv6());
    let foreign: Vec<&IpNet> = present.iter().filter(is_foreign).collect();
    if let Some(first) = foreign.first() {
        // A bridge of ours that nobody is on follows a changed subnet; anything else is not ours to change.
        let is_in_use =
            link.alias != BRIDGE_ALIAS || link::all(socket)?.iter().any(|one| one.master == Some(link.index));
        if is_in_use {
            return Err(conflict(format!(
                "has the address {first} where {} is wanted; remove it (ip link delete {}) or choose another bridge or subnet",
                wanted.first().map_or_else(String::new, ToString::to_string),
                spec.name
            )));
        }
        for address in foreign {
            link::delete_address(&mut batch, link.index, &spec.name, *address);
        }
    }
    if existing.is_none() {
        link::set_alias(&mut batch, link.index, &spec.name, BRIDGE_ALIAS);
    }
    for address in wanted.iter().filter(|address| !present.contains(address)) {
        link::add_address(&mut batch, link.index, &spec.name, *address);
    }
    if spec.gateway6.is_some() {
        // An address that is ready at once: the kernel asks for neighbours from the link-local one only.
        link::without_link_local(&mut batch, link.index, &spec.name);
        link::add_address(&mut batch, link.index, &spec.name, GATEWAY_LINK_LOCAL);
    }
    if let (Some(mtu), Some(_)) = (spec.mtu, &existing) {
        link::set_mtu(&mut batch, link.index, &spec.name, mtu);
    }
    link::set_up(&mut batch, link.index, &spec.name);
    let result = socket.execute(batch);
    if result.is_err() && existing.is_none() {
        let mut undo = Messages::new();
        link::delete(&mut undo, link.index, &spec.name);
        if let Err(error) = socket.execute(undo) {
            tracing::warn!(bridge = spec.name, %error, "left over from a failed creation");
        }
    }
    result.map(|()| (link.index, existing.is_none()))
}

/// Refuses a subnet that the host reaches, in whole or in part, through another interface.
fn check_routes(socket: &mut Socket, spec: &BridgeSpec, own: Option<u32>) -> Result<(), Error> {
    let subnets = spec.subnets();
    let clash = link::routes(socket)?.into_iter().find_map(|route| {
        let is_own = route.device.is_some() && route.device == own;
        let subnet = subnets.iter().find(|subnet| overlap(subnet, &route.destination))?;
        (!is_own).then_some((*subnet, route))
    });
    let Some((subnet, route)) = clash else { return Ok(()) };
    let links = link::all(socket)?;
    let device = links.into_iter().find(|link| Some(link.index) == route.device).map(|link| link.name);
    Err(Error::SubnetInUse {
        bridge: spec.name.clone(),
        subnet,
        other: route.destination,
        device: device.unwrap_or_else(|| "a route of the host".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> BridgeSpec {
        BridgeSpec::new("brig0", "172.30.0.0/16".parse().unwrap(), "172.30.0.1".parse().unwrap())
    }

    #[test]
    fn accepts_a_plain_bridge() {
        spec().validate().unwrap();
        let dual = BridgeSpec {
            subnet6: Some("fd00:1::/64".parse().unwrap()),
            gateway6: Some("fd00:1::1".parse().unwrap()),
            ..spec()
        };
        dual.validate().unwrap();
        assert_eq!(dual.addresses().len(), 2);
        let six = BridgeSpec { subnet: None, gateway: None, ..dual.clone() };
        six.validate().unwrap();
        assert_eq!(six.addresses().len(), 1);
        let isolated =
            BridgeSpec { mode4: GatewayMode::Isolated, gateway: None, internal: true, ..dual.clone() };
        isolated.validate().unwrap();
        assert_eq!(isolated.addresses(), six.addresses());
        assert_eq!(BridgeSpec { inhibit_ipv4: true, ..dual }.addresses(), six.addresses());
    }

    #[test]
    fn refuses_bad_names() {
        for name in ["", "a-name-of-16-byte", "0123456789abcdef", "a/b", "a b", "a:b", ".", ".."] {
            let bad = BridgeSpec { name: name.to_owned(), ..spec() };
            assert!(matches!(bad.validate(), Err(Error::InterfaceName(_))), "{name:?}");
        }
    }

    #[test]
    fn refuses_bad_subnets_and_gateways() {
        let cases = [
            BridgeSpec { gateway: Some("172.31.0.1".parse().unwrap()), ..spec() },
            BridgeSpec { gateway: Some("172.30.0.0".parse().unwrap()), ..spec() },
            BridgeSpec { gateway: Some("172.30.255.255".parse().unwrap()), ..spec() },
            BridgeSpec { subnet: Some("172.30.0.1/32".parse().unwrap()), ..spec() },
            BridgeSpec {
                subnet: Some("127.0.0.0/8".parse().unwrap()),
                gateway: Some("127.0.0.1".parse().unwrap()),
                ..spec()
            },
            BridgeSpec { mtu: Some(10), ..spec() },
            BridgeSpec { subnet: None, ..spec() },
            BridgeSpec { subnet: None, gateway: None, ..spec() },
            BridgeSpec { gateway: None, ..spec() },
            BridgeSpec { mode4: GatewayMode::Isolated, gateway: None, ..spec() },
            BridgeSpec { mode4: GatewayMode::Isolated, internal: true, ..spec() },
            BridgeSpec { gateway6: Some("fd00::1".parse().unwrap()), ..spec() },
            BridgeSpec {
                subnet6: Some("fd00:1::/64".parse().unwrap()),
                gateway6: Some("fd00:2::1".parse().unwrap()),
                ..spec()
            },
        ];
        for case in cases {
            assert!(matches!(case.validate(), Err(Error::InvalidBridge { .. })), "{case:?}");
        }
    }
}
