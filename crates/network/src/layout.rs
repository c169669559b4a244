//! The addresses of a network: what bridges and sub-interfaces have in common, and what of it can be checked without
//! looking at the host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// A network's subnets and the routers on them; a family without a subnet is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    pub subnet: Option<Ipv4Net>,
    /// Where containers send what is not for the subnet. `None`: there is no way out by this family.
    pub gateway: Option<Ipv4Addr>,
    pub subnet6: Option<Ipv6Net>,
    pub gateway6: Option<Ipv6Addr>,
    /// No way out at all.
    pub internal: bool,
}

impl Layout {
    pub fn subnets(&self) -> Vec<IpNet> {
        let ipv4 = self.subnet.map(|net| IpNet::V4(net.trunc()));
        ipv4.into_iter().chain(self.subnet6.map(|net| IpNet::V6(net.trunc()))).collect()
    }

    pub fn gateways(&self) -> impl Iterator<Item = IpAddr> {
        self.gateway.map(IpAddr::V4).into_iter().chain(self.gateway6.map(IpAddr::V6))
    }

    /// The gateway of each family that a default route may lead to.
    pub fn exits(&self) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        if self.internal { (None, None) } else { (self.gateway, self.gateway6) }
    }

    /// Why these are not the addresses of a network, if so.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.subnet.is_none() && self.subnet6.is_none() {
            return Err("it has a subnet of neither family".to_owned());
        }
        if let Some(subnet) = self.subnet {
            if subnet.prefix_len() > 30 || subnet.prefix_len() < 1 {
                return Err(format!("subnet {subnet} has no room for a gateway and a container"));
            }
            if subnet.addr().is_loopback() || subnet.addr().is_multicast() {
                return Err(format!("subnet {subnet} is not one for hosts"));
            }
        }
        if let Some(subnet) = self.subnet6.filter(|subnet| subnet.prefix_len() > 126) {
            return Err(format!("subnet {subnet} has no room for a gateway and a container"));
        }
        match (self.subnet, self.gateway.filter(|gateway| !gateway.is_unspecified())) {
            (Some(subnet), Some(gateway))
                if !subnet.contains(&gateway)
                    || gateway == subnet.network()
                    || gateway == subnet.broadcast() =>
            {
                return Err(format!("gateway {gateway} is not a host address of {subnet}"));
            }
            (None, Some(gateway)) => return Err(format!("gateway {gateway} has no subnet")),
            _ => {}
        }
        match (self.subnet6, self.gateway6.filter(|gateway| !gateway.is_unspecified())) {
            (Some(subnet), Some(gateway)) if !subnet.contains(&gateway) => {
                Err(format!("gateway {gateway} is not in {subnet}"))
            }
            (None, Some(gateway)) => Err(format!("gateway {gateway} has no subnet")),
            _ => Ok(()),
        }
    }

    /// Why this is not an MTU for the network, if so.
    pub(crate) fn check_mtu(&self, mtu: Option<u32>) -> Result<(), String> {
        match mtu {
            Some(mtu) if !(68..=65535).contains(&mtu) => {
                Err(format!("MTU {mtu} is not between 68 and 65535"))
            }
            Some(mtu) if self.subnet6.is_some() && mtu < 1280 => {
                Err("IPv6 needs an MTU of at least 1280".to_owned())
            }
            _ => Ok(()),
        }
    }
}
