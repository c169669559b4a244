//! Bridges, addresses, ports and the firewall of containers.
//!
//! [`Fabric`] is the plumbing of one engine: it owns the engine's bridges, its nf_tables table and the
//! network sandboxes of its containers, all spoken to over netlink; no program is executed, but for networks that are made by
//! plugins ([`cni`]) and on hosts where the firewall is made with iptables ([`FirewallBackend`]). Everything it makes dies with the container's network namespace, except firewall elements, which
//! [`Fabric::disconnect`] and [`Fabric::reconcile`] remove. What to connect where (records, names, policy) is
//! the engine's business; what is pure is here as functions and values: [`Ipam`], [`subnet`], [`names`].
//!
//! A packet is forwarded only if no table's forward chain drops it: nf_tables has no verdict by which our
//! table could overrule another one's `policy drop` (docker's iptables FORWARD policy, a strict firewalld
//! zone). On such a host the administrator must accept the bridge's traffic there too.

mod background;
mod bridge;
pub mod cni;
mod conntrack;
mod device;
mod error;
mod fabric;
mod firewall;
mod gate;
pub mod helper;
mod ipam;
mod layout;
mod link;
mod mac;
pub mod names;
mod naming;
mod nft;
mod ports;
mod sandbox;
mod socket;
mod subinterface;
pub mod subnet;
mod sysctl;
pub mod tunnel;
mod watch;
mod wire;

pub use bridge::{BridgeSpec, GatewayMode};
pub use error::Error;
pub use fabric::{Config, DefaultRoutes, Fabric, Live, NameSockets, Owner, Reconciled};
pub use firewall::FirewallBackend;
pub use ipam::{Ipam, IpamError};
pub use layout::Layout;
pub use mac::{MacAddr, MacParseError};
pub use ports::{HostPort, PortError, PortRequest, Protocol, PublishedPort};
pub use sandbox::{Attachment, Counters, Interface, InterfaceSpec, Sandbox, SandboxSpec};
pub use subinterface::{IpvlanFlag, IpvlanMode, MacvlanMode, SubinterfaceKind, SubinterfaceSpec};
pub use tunnel::Tunnel;
pub use watch::FirewallEvents;

/// Whether this host's kernel has IPv6, and it is not turned off for all interfaces.
pub fn has_ipv6() -> bool {
    sysctl::has_ipv6() && !sysctl::is_set("ipv6/conf/all/disable_ipv6")
}
