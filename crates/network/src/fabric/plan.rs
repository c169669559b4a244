//! What is asked for a container, checked against the networks and entered as theirs before anything is made.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};

use super::segments::Segment;
use super::{Fabric, leaves, lock};
use crate::bridge::check_interface_name;
use crate::error::Error;
use crate::layout::Layout;
use crate::mac::MacAddr;
use crate::sandbox::{Attachment, Interface, InterfaceSpec, SandboxSpec};

/// Each interface with what it is connected to.
pub(super) type Plan = Vec<(Interface, Segment)>;

impl Fabric {
    /// Checks the request against the networks and pairs each interface with its own.
    pub(super) fn plan(&self, spec: &SandboxSpec) -> Result<Plan, Error> {
        let invalid = |reason: String| Error::InvalidSandbox { container: spec.name.clone(), reason };
        let mut plan = Vec::with_capacity(spec.interfaces.len());
        let mut names = HashSet::new();
        for wanted in &spec.interfaces {
            check_interface_name(&wanted.name)?;
            if !names.insert(&wanted.name) || wanted.name == "lo" {
                return Err(invalid(format!("interface {} is there already", wanted.name)));
            }
            let segment = self.segment(&wanted.bridge)?;
            let by_plugins = matches!(segment, Segment::Foreign(_));
            let addresses = if by_plugins { Vec::new() } else { wanted.addresses.clone() };
            let mac = if by_plugins {
                // Until they have said.
                wanted.mac.or(Some(MacAddr::from_ip(Ipv4Addr::UNSPECIFIED.into())))
            } else {
                check_addresses(wanted, &segment.layout()).map_err(invalid)?;
                wanted.mac.or_else(|| addresses.first().map(|net| MacAddr::from_ip(net.addr())))
            };
            let mac = mac.ok_or_else(|| invalid(format!("interface {} has no address", wanted.name)))?;
            if !mac.is_usable() {
                return Err(invalid(format!("{mac} is not an address for an interface")));
            }
            let interface = Interface {
                bridge: wanted.bridge.clone(),
                leaf: 0,
                by_plugins,
                name: wanted.name.clone(),
                host_name: match segment {
                    Segment::Bridge(_) => host_name()?,
                    Segment::Parent(_) | Segment::Foreign(_) => String::new(),
                },
                mac,
                addresses,
                link_local: wanted.link_local.clone(),
                gateway: wanted.gateway,
                gateway6: wanted.gateway6,
            };
            plan.push((interface, segment));
        }
        Ok(plan)
    }

    /// Enters the container, unless it or one of its addresses is there already.
    pub(super) fn claim(&self, spec: &SandboxSpec, plan: &mut Plan) -> Result<(), Error> {
        let mut endpoints = lock(&self.endpoints);
        if endpoints.by_id.contains_key(&spec.id) {
            return Err(Error::AlreadyConnected(spec.name.clone()));
        }
        endpoints.place(plan)?;
        endpoints.insert(Attachment {
            id: spec.id.clone(),
            name: spec.name.clone(),
            interfaces: plan.iter().map(|(interface, _)| interface.clone()).collect(),
            ports: Vec::new(),
            parked: Vec::new(),
        });
        Ok(())
    }
}

impl super::endpoints::Endpoints {
    /// Finds room for each interface, unless somebody has one of its addresses.
    pub(super) fn place(&self, plan: &mut Plan) -> Result<(), Error> {
        for (interface, segment) in plan {
            self.refuse_taken(interface)?;
            if let Segment::Bridge(_) = segment {
                interface.leaf =
                    leaves::with_room(&interface.bridge, |leaf| self.count(&interface.bridge, leaf))?;
                if interface.leaf > 0 {
                    interface.host_name.clear();
                }
            }
        }
        Ok(())
    }
}

fn check_addresses(wanted: &InterfaceSpec, layout: &Layout) -> Result<(), String> {
    for address in &wanted.link_local {
        let is_link_local = match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        if !is_link_local {
            return Err(format!("{address} is not a link-local address"));
        }
    }
    for net in &wanted.addresses {
        let subnet = layout.subnets().into_iter().find(|subnet| subnet.contains(&net.addr()));
        match subnet {
            Some(subnet) if subnet.prefix_len() == net.prefix_len() => {}
            Some(subnet) => return Err(format!("address {net} must have the prefix length of {subnet}")),
            None => return Err(format!("address {net} is not in a subnet of {}", wanted.bridge)),
        }
        let ip = net.addr();
        if layout.gateways().any(|gateway| gateway == ip) {
            return Err(format!("address {ip} is the gateway of {}", wanted.bridge));
        }
    }
    for (family, count) in [
        ("IPv4", wanted.addresses.iter().filter(|net| net.addr().is_ipv4()).count()),
        ("IPv6", wanted.addresses.iter().filter(|net| net.addr().is_ipv6()).count()),
    ] {
        if count > 1 {
            return Err(format!("interface {} has {count} {family} addresses", wanted.name));
        }
    }
    Ok(())
}

/// A name no other interface has: 44 random bits.
fn host_name() -> Result<String, Error> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(|source| {
        Error::Kernel {
            what: "choose a name for an interface".to_owned(),
            detail: None,
            source: source.into(),
        }
    })?;
    Ok(format!("veth{:011x}", u64::from_ne_bytes(bytes) >> 20))
}
