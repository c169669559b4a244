//! The network sandbox of a container as values: what is asked for, what came of it, and the durable part
//! from which an engine that was restarted takes it up again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::fabric::NameSockets;
use crate::mac::MacAddr;
use crate::ports::{PortRequest, PublishedPort};

/// What the engine wants for a container. With no interfaces it is `--network none`: only a loopback.
#[derive(Clone, Debug, Default)]
pub struct SandboxSpec {
    /// The container's id: the key for [`crate::Fabric::disconnect`].
    pub id: String,
    /// The container's name, for messages.
    pub name: String,
    /// It gets sockets by which names are asked for.
    pub named: bool,
    /// The namespace belongs to the fabric's configured owner, and so may its processes.
    pub owned: bool,
    pub interfaces: Vec<InterfaceSpec>,
    /// Published on the interface with the default route of the family, if its bridge has an outside.
    pub ports: Vec<PortRequest>,
    /// `net.*` settings, written inside the namespace after the interfaces are there.
    pub sysctls: Vec<(String, String)>,
}

/// One interface of a container on one network.
#[derive(Clone, Debug, Default)]
pub struct InterfaceSpec {
    /// The name of the network; it was given to `ensure_bridge`, `ensure_parent` or `ensure_foreign` before.
    pub bridge: String,
    /// Name inside the container: `eth0`.
    pub name: String,
    /// Derived from the first address if not given.
    pub mac: Option<MacAddr>,
    /// Addresses with the prefix length of their subnet, each within the bridge's subnets. On a network of CNI plugins
    /// those that are asked for; their prefix does not matter.
    pub addresses: Vec<IpNet>,
    /// Addresses of the link beside those: each within 169.254.0.0/16 or fe80::/64.
    pub link_local: Vec<IpAddr>,
    /// Default route, if this interface shall carry it; the unspecified address is a route without a router.
    pub gateway: Option<Ipv4Addr>,
    pub gateway6: Option<Ipv6Addr>,
    /// `net.*` settings of this interface, written once it is there.
    pub sysctls: Vec<(String, String)>,
}

/// A connected sandbox. Dropping it closes the descriptors: the namespace lives on only in the container's
/// processes, and the ports' reservation only in whoever holds `held` (the shim).
#[derive(Debug)]
pub struct Sandbox {
    pub netns: OwnedFd,
    /// For whoever answers names, if that was asked for.
    pub names: Option<NameSockets>,
    /// Bound, not listening sockets: as long as one copy is open no program on the host can take the port.
    pub held: Vec<OwnedFd>,
    /// What to persist with the container's record.
    pub attachment: Attachment,
}

/// The durable description of a connected container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    pub id: String,
    pub name: String,
    pub interfaces: Vec<Interface>,
    pub ports: Vec<PublishedPort>,
    /// Ports that are the container's, but lead nowhere as long as it has no address for them.
    #[serde(default)]
    pub parked: Vec<PublishedPort>,
}

impl Attachment {
    /// Whether CNI plugins lead to a port's address, and not the engine's own firewall.
    pub fn is_led_by_plugins(&self, port: &PublishedPort) -> bool {
        let is_at =
            |interface: &&Interface| interface.addresses.iter().any(|net| net.addr() == port.container_ip);
        self.interfaces.iter().find(is_at).is_some_and(|interface| interface.by_plugins)
    }

    /// The ports that the engine's own firewall leads.
    pub(crate) fn own_ports(&self) -> impl Iterator<Item = PublishedPort> {
        self.ports.iter().copied().filter(|port| !self.is_led_by_plugins(port))
    }
}

/// An interface as made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    pub bridge: String,
    /// Which of the bridge's leaves it is on; 0 is the bridge itself.
    #[serde(default)]
    pub leaf: u16,
    /// Plugins have made it, and take it away.
    #[serde(default)]
    pub by_plugins: bool,
    /// Name inside the container.
    pub name: String,
    /// Name of the other end, a port of the bridge, on the host; empty if there is none.
    pub host_name: String,
    pub mac: MacAddr,
    pub addresses: Vec<IpNet>,
    #[serde(default)]
    pub link_local: Vec<IpAddr>,
    pub gateway: Option<Ipv4Addr>,
    pub gateway6: Option<Ipv6Addr>,
}

impl Interface {
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        self.addresses.iter().find_map(|net| match net.addr() {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        })
    }

    pub fn ipv6(&self) -> Option<Ipv6Addr> {
        self.addresses.iter().find_map(|net| match net.addr() {
            IpAddr::V6(ip) => Some(ip),
            IpAddr::V4(_) => None,
        })
    }
}

/// What an interface has carried, seen from inside the container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}
