//! What a bridge shall be, and whether that can be. Invariant: a validated description has a gateway inside
//! each subnet and a name the kernel takes.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// A bridge of the engine on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeSpec {
    /// Interface name, at most 15 bytes.
    pub name: String,
    pub subnet: Ipv4Net,
    /// The host's address on the bridge.
    pub gateway: Ipv4Addr,
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
}

impl BridgeSpec {
    /// An IPv4 bridge with docker's defaults: masquerade, containers reach each other.
    pub fn new(name: impl Into<String>, subnet: Ipv4Net, gateway: Ipv4Addr) -> Self {
        Self {
            name: name.into(),
            subnet: subnet.trunc(),
            gateway,
            subnet6: None,
            gateway6: None,
            mtu: None,
            internal: false,
            icc: true,
            masquerade: true,
        }
    }

    /// The host's addresses on the bridge, with prefix length.
    pub(crate) fn addresses(&self) -> Vec<IpNet> {
        let mut all = Vec::with_capacity(2);
        if let Ok(net) = Ipv4Net::new(self.gateway, self.subnet.prefix_len()) {
            all.push(IpNet::V4(net));
        }
        if let (Some(subnet), Some(gateway)) = (self.subnet6, self.gateway6)
            && let Ok(net) = Ipv6Net::new(gateway, subnet.prefix_len())
        {
            all.push(IpNet::V6(net));
        }
        all
    }

    pub(crate) fn subnets(&self) -> Vec<IpNet> {
        let mut all = vec![IpNet::V4(self.subnet.trunc())];
        all.extend(self.subnet6.map(|net| IpNet::V6(net.trunc())));
        all
    }

    /// Checks what can be checked without looking at the host.
    pub fn validate(&self) -> Result<(), Error> {
        check_interface_name(&self.name)?;
        let invalid = |reason: String| Error::InvalidBridge { bridge: self.name.clone(), reason };
        if self.subnet.prefix_len() > 30 || self.subnet.prefix_len() < 1 {
            return Err(invalid(format!("subnet {} has no room for a gateway and a container", self.subnet)));
        }
        if self.subnet.addr().is_loopback() || self.subnet.addr().is_multicast() {
            return Err(invalid(format!("subnet {} is not one for hosts", self.subnet)));
        }
        if !self.subnet.contains(&self.gateway)
            || self.gateway == self.subnet.network()
            || self.gateway == self.subnet.broadcast()
        {
            return Err(invalid(format!(
                "gateway {} is not a host address of {}",
                self.gateway, self.subnet
            )));
        }
        match (self.subnet6, self.gateway6) {
            (None, None) => {}
            (Some(subnet), Some(gateway)) if subnet.contains(&gateway) => {
                if subnet.prefix_len() > 126 {
                    return Err(invalid(format!(
                        "subnet {subnet} has no room for a gateway and a container"
                    )));
                }
            }
            (Some(subnet), Some(gateway)) => {
                return Err(invalid(format!("gateway {gateway} is not in {subnet}")));
            }
            (Some(subnet), None) => return Err(invalid(format!("subnet {subnet} has no gateway"))),
            (None, Some(gateway)) => return Err(invalid(format!("gateway {gateway} has no subnet"))),
        }
        if let Some(mtu) = self.mtu
            && !(68..=65535).contains(&mtu)
        {
            return Err(invalid(format!("MTU {mtu} is not between 68 and 65535")));
        }
        if self.subnet6.is_some() && self.mtu.is_some_and(|mtu| mtu < 1280) {
            return Err(invalid("IPv6 needs an MTU of at least 1280".to_owned()));
        }
        Ok(())
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
            BridgeSpec { gateway: "172.31.0.1".parse().unwrap(), ..spec() },
            BridgeSpec { gateway: "172.30.0.0".parse().unwrap(), ..spec() },
            BridgeSpec { gateway: "172.30.255.255".parse().unwrap(), ..spec() },
            BridgeSpec { subnet: "172.30.0.1/32".parse().unwrap(), ..spec() },
            BridgeSpec {
                subnet: "127.0.0.0/8".parse().unwrap(),
                gateway: "127.0.0.1".parse().unwrap(),
                ..spec()
            },
            BridgeSpec { mtu: Some(10), ..spec() },
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
