//! What can go wrong between the engine and the kernel's network. Each variant is one a caller handles
//! differently; each names the object, and the sentence says what to do where that is known.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::ports::Protocol;

/// Failure of an operation on the network of the host or of a container.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name the kernel would not take as that of an interface.
    #[error(
        "invalid interface name {0:?}: it must have 1 to 15 bytes, without '/', ':' or white space, and not be . or .."
    )]
    InterfaceName(String),
    /// Subnet, gateway or another part of a bridge's description is not usable.
    #[error("bridge {bridge}: {reason}")]
    InvalidBridge { bridge: String, reason: String },
    /// An interface that containers cannot have theirs below.
    #[error("parent interface {parent}: {reason}")]
    InvalidParent { parent: String, reason: String },
    /// The kernel was built without what is asked for.
    #[error("this kernel has no {what} ({option}); load the module, or use another driver")]
    Unsupported { what: &'static str, option: &'static str },
    /// What is said of a CNI network is no configuration for one.
    #[error("CNI network configuration {place}: {reason}")]
    InvalidCni { place: String, reason: String },
    /// An executable of a CNI network is not there.
    #[error("CNI plugin {plugin} is not in {}; install it there, or name its directory with --cni-plugin-dir", dirs.join(", "))]
    NoCniPlugin { plugin: String, dirs: Vec<String> },
    /// A CNI plugin has failed, by its own words.
    #[error("CNI plugin {plugin} ({command}, network {network}): {reason}")]
    CniPlugin { plugin: String, command: &'static str, network: String, reason: String },
    /// What the plugins of a network have answered is no result.
    #[error("the plugins of CNI network {network} gave no usable result: {reason}")]
    CniResult { network: String, reason: String },
    /// The files about connections to CNI networks.
    #[error("connections to CNI networks: {what}")]
    CniCache { what: String, source: io::Error },
    /// A description of a sandbox that cannot be made.
    #[error("network of container {container}: {reason}")]
    InvalidSandbox { container: String, reason: String },
    /// The subnet is already reachable by another way than through this bridge.
    #[error(
        "subnet {subnet} of bridge {bridge} overlaps with {other} on {device}; choose another subnet (for the default bridge: --bip)"
    )]
    SubnetInUse { bridge: String, subnet: IpNet, other: IpNet, device: String },
    /// The bridge exists with a state this engine did not give it.
    #[error("interface {bridge} exists, but {reason}")]
    BridgeConflict { bridge: String, reason: String },
    /// The bridge is not one of this fabric.
    #[error("bridge {0} does not exist")]
    NoSuchBridge(String),
    /// Containers are still connected to the bridge.
    #[error("bridge {bridge} has active endpoints: {}", containers.join(", "))]
    BridgeInUse { bridge: String, containers: Vec<String> },
    /// The container already has a sandbox, or the address one of another container.
    #[error("container {0} is already connected")]
    AlreadyConnected(String),
    /// The container has no sandbox of this fabric's.
    #[error("container {0} is not connected")]
    NotConnected(String),
    /// An address that another container of the bridge has.
    #[error("address {address} is already in use on bridge {bridge} by container {owner}")]
    AddressInUse { bridge: String, address: IpAddr, owner: String },
    /// A published port is taken on the host.
    #[error(
        "driver failed programming external connectivity on endpoint {endpoint}: Bind for {}:{port} failed: port is already allocated{}",
        BracketedIp(*host_ip),
        owner.as_ref().map_or_else(String::new, |name| format!(" (by container {name})"))
    )]
    PortInUse { endpoint: String, host_ip: IpAddr, port: u16, protocol: Protocol, owner: Option<String> },
    /// No port is free in the range asked for.
    #[error(
        "driver failed programming external connectivity on endpoint {endpoint}: all ports are allocated in {first}-{last}/{protocol}"
    )]
    PortsExhausted { endpoint: String, first: u16, last: u16, protocol: Protocol },
    /// The host could not bind the port for another reason (foreign address, no permission, no such protocol).
    #[error(
        "driver failed programming external connectivity on endpoint {endpoint}: failed to bind port {}:{port}/{protocol}",
        BracketedIp(*host_ip)
    )]
    PortBind { endpoint: String, host_ip: IpAddr, port: u16, protocol: Protocol, source: io::Error },
    /// The kernel cannot do what the firewall needs.
    #[error(
        "the firewall cannot be set up: {missing} is missing in this kernel or not permitted here; load it, or use --network none or host"
    )]
    FirewallUnavailable { missing: String, source: io::Error },
    /// The programs that write the firewall are not there, or refuse to.
    #[error("the firewall cannot be set up: {program}: {reason}")]
    FirewallProgram { program: String, reason: String },
    /// A kernel setting that could not be written.
    #[error("cannot write {value} to {path}; set it on the host with: sysctl -w {key}={value}")]
    Sysctl { path: String, key: String, value: String, source: io::Error },
    /// A setting asked for by the container that it may not change or that does not exist.
    #[error("sysctl {key}={value} of container {container}")]
    ContainerSysctl { container: String, key: String, value: String, source: io::Error },
    /// The kernel refused a request; `what` names the step and its object.
    #[error("{what}{}", detail.as_ref().map_or_else(String::new, |detail| format!(" ({detail})")))]
    Kernel { what: String, detail: Option<String>, source: io::Error },
}

impl Error {
    /// Whether the caller asked for something malformed, as opposed to the host being in the way.
    pub fn is_invalid_input(&self) -> bool {
        matches!(
            self,
            Self::InterfaceName(_)
                | Self::InvalidBridge { .. }
                | Self::InvalidParent { .. }
                | Self::InvalidSandbox { .. }
                | Self::InvalidCni { .. }
                | Self::NoCniPlugin { .. }
                | Self::ContainerSysctl { .. }
        )
    }

    /// Whether the request is fine but something that exists is in its way.
    pub fn is_conflict(&self) -> bool {
        matches!(
            self,
            Self::SubnetInUse { .. }
                | Self::BridgeConflict { .. }
                | Self::BridgeInUse { .. }
                | Self::AlreadyConnected(_)
                | Self::AddressInUse { .. }
                | Self::PortInUse { .. }
                | Self::PortsExhausted { .. }
        )
    }

    /// The errno of a refused kernel request.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Kernel { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// An address as it stands before `:port`.
struct BracketedIp(IpAddr);

impl std::fmt::Display for BracketedIp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            IpAddr::V4(ip) => ip.fmt(f),
            IpAddr::V6(ip) => write!(f, "[{ip}]"),
        }
    }
}
