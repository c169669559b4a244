//! What a request says about a new network, read and checked: its subnets, and the options docker's bridge driver knows.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bollard_stubs::models::{Ipam as IpamRequest, IpamConfig};
use brigantine_network::{BridgeSpec, GatewayMode, Layout};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::plumbing;
use crate::{Error, Result};

/// Addresses that a container asks for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wanted {
    pub ipv4: Option<Ipv4Addr>,
    pub ipv6: Option<Ipv6Addr>,
}

/// One family of a network's addresses.
#[derive(Debug)]
pub(super) struct Family<N, A> {
    pub subnet: N,
    /// The one that the request names.
    pub gateway: Option<A>,
    pub range: Option<N>,
    pub reserved: BTreeMap<String, A>,
}

impl<N, A> Family<N, A> {
    pub(super) fn new(subnet: N) -> Self {
        Self { subnet, gateway: None, range: None, reserved: BTreeMap::new() }
    }
}

/// The subnets of a network.
#[derive(Debug, Default)]
pub(super) struct Addressing {
    pub ipv4: Option<Family<Ipv4Net, Ipv4Addr>>,
    pub ipv6: Option<Family<Ipv6Net, Ipv6Addr>>,
}

impl Addressing {
    /// What the request itself says.
    pub(super) fn read(ipam: &IpamRequest) -> Result<Self> {
        let mut given = Self::default();
        for config in ipam.config.iter().flatten() {
            let Some(text) = config.subnet.as_deref().filter(|text| !text.is_empty()) else {
                if config.gateway.as_deref().is_some_and(|gateway| !gateway.is_empty()) {
                    return Err(Error::invalid("invalid network config: a gateway needs a subnet"));
                }
                continue;
            };
            let subnet: IpNet = text
                .parse()
                .map_err(|_bad| Error::invalid(format!("invalid subnet {text}: it should be a CIDR")))?;
            if subnet.trunc() != subnet {
                return Err(Error::invalid(format!(
                    "invalid subnet {subnet}: it should be {}",
                    subnet.trunc()
                )));
            }
            let is_second = match subnet {
                IpNet::V4(_) => given.ipv4.is_some(),
                IpNet::V6(_) => given.ipv6.is_some(),
            };
            if is_second {
                return Err(Error::forbidden("bridge driver doesn't support multiple subnets"));
            }
            let part = Part::read(subnet, config)?;
            match subnet {
                IpNet::V4(subnet) => {
                    given.ipv4 = Some(Family {
                        subnet,
                        gateway: v4(part.gateway),
                        range: match part.range {
                            Some(IpNet::V4(range)) => Some(range),
                            Some(IpNet::V6(_)) | None => None,
                        },
                        reserved: part
                            .reserved
                            .into_iter()
                            .filter_map(|(name, ip)| Some((name, v4(Some(ip))?)))
                            .collect(),
                    });
                }
                IpNet::V6(subnet) => {
                    given.ipv6 = Some(Family {
                        subnet,
                        gateway: v6(part.gateway),
                        range: match part.range {
                            Some(IpNet::V6(range)) => Some(range),
                            Some(IpNet::V4(_)) | None => None,
                        },
                        reserved: part
                            .reserved
                            .into_iter()
                            .filter_map(|(name, ip)| Some((name, v6(Some(ip))?)))
                            .collect(),
                    });
                }
            }
        }
        Ok(given)
    }

    pub(super) fn subnets(&self) -> impl Iterator<Item = IpNet> {
        let ipv4 = self.ipv4.as_ref().map(|family| IpNet::V4(family.subnet));
        ipv4.into_iter().chain(self.ipv6.as_ref().map(|family| IpNet::V6(family.subnet)))
    }

    /// Subnets with their gateways; where none is named it is the first address.
    pub(super) fn layout(&self, internal: bool) -> Layout {
        let (four, six) = (self.ipv4.as_ref(), self.ipv6.as_ref());
        Layout {
            subnet: four.map(|family| family.subnet),
            gateway: four.map(|family| family.gateway.unwrap_or_else(|| super::first_host(family.subnet))),
            subnet6: six.map(|family| family.subnet),
            gateway6: six.map(|family| family.gateway.unwrap_or_else(|| super::first_host6(family.subnet))),
            internal,
        }
    }
}

/// One entry of a request's IPAM configuration, of either family.
struct Part {
    gateway: Option<IpAddr>,
    range: Option<IpNet>,
    reserved: BTreeMap<String, IpAddr>,
}

impl Part {
    fn read(subnet: IpNet, config: &IpamConfig) -> Result<Self> {
        let address = |text: &str| {
            text.parse::<IpAddr>()
                .ok()
                .filter(|address| subnet.contains(address))
                .ok_or_else(|| Error::invalid(format!("address {text} is not in subnet {subnet}")))
        };
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let gateway = given(&config.gateway).as_deref().map(address).transpose()?;
        let range =
            given(&config.ip_range)
                .map(|range| {
                    range.parse::<IpNet>().ok().filter(|range| subnet.contains(range)).ok_or_else(|| {
                        Error::invalid(format!("invalid ip-range {range} for subnet {subnet}"))
                    })
                })
                .transpose()?;
        let reserved = config
            .auxiliary_addresses
            .iter()
            .flatten()
            .map(|(name, text)| Ok((name.clone(), address(text)?)))
            .collect::<Result<_>>()?;
        Ok(Self { gateway, range, reserved })
    }
}

fn v4(address: Option<IpAddr>) -> Option<Ipv4Addr> {
    match address {
        Some(IpAddr::V4(address)) => Some(address),
        Some(IpAddr::V6(_)) | None => None,
    }
}

fn v6(address: Option<IpAddr>) -> Option<Ipv6Addr> {
    match address {
        Some(IpAddr::V6(address)) => Some(address),
        Some(IpAddr::V4(_)) | None => None,
    }
}

/// Address that published ports of a network bind when the request names none.
pub(crate) const HOST_BINDING: &str = "com.docker.network.bridge.host_binding_ipv4";

/// What the names of the network's interfaces begin with in containers.
pub(crate) const INTERFACE_PREFIX: &str = "com.docker.network.container_iface_prefix";

/// The options of a request, by type.
#[derive(Debug, Clone, Copy)]
pub(super) struct Options<'a>(pub &'a BTreeMap<String, String>);

impl<'a> Options<'a> {
    pub(super) fn text(self, name: &str) -> Option<&'a str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub(super) fn flag(self, name: &str, default: bool) -> Result<bool> {
        match self.text(name) {
            None => Ok(default),
            Some("true" | "1" | "t" | "T" | "TRUE" | "True") => Ok(true),
            Some("false" | "0" | "f" | "F" | "FALSE" | "False") => Ok(false),
            Some(other) => {
                Err(Error::invalid(format!("invalid value {other:?} of option {name}: true or false")))
            }
        }
    }

    pub(super) fn mtu(self) -> Result<Option<u32>> {
        let mtu = self.text("com.docker.network.driver.mtu");
        mtu.map(|mtu| mtu.parse().map_err(|_nan| Error::invalid(format!("invalid MTU: {mtu}")))).transpose()
    }

    /// One of a few words.
    pub(super) fn choice<T: std::str::FromStr + Default>(self, name: &str, words: &str) -> Result<T> {
        match self.text(name) {
            None => Ok(T::default()),
            Some(text) => text.parse().map_err(|_unknown| {
                Error::invalid(format!("invalid value {text:?} of option {name}: {words}"))
            }),
        }
    }
}

/// The bridge that a request for a network describes.
pub(super) fn bridge(
    id: &str,
    internal: bool,
    options: &BTreeMap<String, String>,
    plan: &Addressing,
) -> Result<BridgeSpec> {
    let given = Options(options);
    let name = given
        .text("com.docker.network.bridge.name")
        .map_or_else(|| format!("br-{}", crate::ids::short(id)), str::to_owned);
    let mode = |name: &str| {
        given.choice::<GatewayMode>(name, "nat, nat-unprotected, routed or isolated (with --internal)")
    };
    let (mode4, mode6) = (
        mode("com.docker.network.bridge.gateway_mode_ipv4")?,
        mode("com.docker.network.bridge.gateway_mode_ipv6")?,
    );
    let trusted = given.text("com.docker.network.bridge.trusted_host_interfaces").unwrap_or_default();
    let layout = plan.layout(internal);
    let bridge = BridgeSpec {
        name,
        subnet: layout.subnet,
        gateway: gateway(layout.gateway, plan.ipv4.as_ref().and_then(|family| family.gateway), mode4)?,
        subnet6: layout.subnet6,
        gateway6: gateway(layout.gateway6, plan.ipv6.as_ref().and_then(|family| family.gateway), mode6)?,
        mtu: given.mtu()?,
        internal,
        icc: given.flag("com.docker.network.bridge.enable_icc", true)?,
        masquerade: given.flag("com.docker.network.bridge.enable_ip_masquerade", true)? && !internal,
        mode4,
        mode6,
        inhibit_ipv4: given.flag("com.docker.network.bridge.inhibit_ipv4", false)?,
        trusted: trusted.split(':').filter(|name| !name.is_empty()).map(str::to_owned).collect(),
        tunnel: None,
    };
    if let Some(address) = given.text(HOST_BINDING)
        && address.parse::<IpAddr>().is_err()
    {
        return Err(Error::invalid(format!(
            "invalid value {address:?} of option {HOST_BINDING}: an IP address"
        )));
    }
    check_prefix(given)?;
    bridge.validate().map_err(plumbing::refused)?;
    Ok(bridge)
}

/// In the mode `isolated` not even the host has an address.
fn gateway<A: Copy + std::fmt::Display>(
    gateway: Option<A>,
    given: Option<A>,
    mode: GatewayMode,
) -> Result<Option<A>> {
    match (mode, given) {
        (GatewayMode::Isolated, Some(given)) => Err(Error::invalid(format!(
            "gateway {given} is given, but in the gateway mode isolated there is none"
        ))),
        (GatewayMode::Isolated, None) => Ok(None),
        _ => Ok(gateway),
    }
}

/// Names of interfaces have at most 15 bytes.
pub(super) fn check_prefix(given: Options<'_>) -> Result<()> {
    match given.text(INTERFACE_PREFIX) {
        Some(prefix) if prefix.len() > 11 || prefix.contains(['/', ':', ' ', '.']) || prefix == "lo" => {
            Err(Error::invalid(format!(
                "invalid value {prefix:?} of option {INTERFACE_PREFIX}: at most 11 letters"
            )))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(configs: &[(&str, &str, &str)]) -> IpamRequest {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        IpamRequest {
            config: Some(
                configs
                    .iter()
                    .map(|(subnet, gateway, range)| IpamConfig {
                        subnet: text(subnet),
                        gateway: text(gateway),
                        ip_range: text(range),
                        auxiliary_addresses: None,
                    })
                    .collect(),
            ),
            ..IpamRequest::default()
        }
    }

    #[test]
    fn subnets_of_both_families_are_read() {
        let given = Addressing::read(&request(&[
            ("10.1.0.0/16", "", "10.1.5.0/24"),
            ("fd00:1::/64", "fd00:1::9", ""),
        ]))
        .unwrap();
        let layout = given.layout(false);
        assert_eq!(layout.gateway, Some([10, 1, 0, 1].into()));
        assert_eq!(layout.gateway6, Some("fd00:1::9".parse().unwrap()));
        let four = given.ipv4.unwrap();
        assert_eq!((four.gateway, four.range), (None, Some("10.1.5.0/24".parse().unwrap())));
        assert_eq!(given.ipv6.unwrap().gateway, Some("fd00:1::9".parse().unwrap()));
    }

    #[test]
    fn what_fits_nowhere_is_refused_by_name() {
        let text =
            |configs: &[(&str, &str, &str)]| Addressing::read(&request(configs)).unwrap_err().to_string();
        assert!(text(&[("banana", "", "")]).contains("banana"));
        assert!(text(&[("10.1.0.1/16", "", "")]).contains("it should be 10.1.0.0/16"));
        assert!(text(&[("10.1.0.0/16", "10.2.0.1", "")]).contains("10.2.0.1"));
        assert!(text(&[("10.1.0.0/16", "fd00::1", "")]).contains("fd00::1"));
        assert!(text(&[("10.1.0.0/16", "", "10.2.0.0/24")]).contains("10.2.0.0/24"));
        assert!(text(&[("", "10.2.0.1", "")]).contains("a gateway needs a subnet"));
        assert!(text(&[("10.1.0.0/16", "", ""), ("10.2.0.0/16", "", "")]).contains("multiple subnets"));
    }

    #[test]
    fn options_of_the_bridge_are_checked() {
        let plan = Addressing::read(&request(&[("10.1.0.0/16", "", "")])).unwrap();
        let with = |name: &str, value: &str| {
            bridge("abcdefabcdefabcd", false, &[(name.to_owned(), value.to_owned())].into(), &plan)
        };
        assert_eq!(with("com.docker.network.bridge.name", "mine0").unwrap().name, "mine0");
        assert_eq!(with("x", "y").unwrap().name, "br-abcdefabcdef");
        assert!(!with("com.docker.network.bridge.enable_icc", "false").unwrap().icc);
        assert_eq!(
            with("com.docker.network.bridge.gateway_mode_ipv4", "routed").unwrap().mode4,
            GatewayMode::Routed
        );
        for (name, value) in [
            ("com.docker.network.bridge.enable_icc", "perhaps"),
            ("com.docker.network.bridge.gateway_mode_ipv6", "teleport"),
            ("com.docker.network.driver.mtu", "much"),
            ("com.docker.network.bridge.name", "a-name-that-is-far-too-long"),
            (HOST_BINDING, "here"),
            (INTERFACE_PREFIX, "a-prefix-too-long"),
            ("com.docker.network.bridge.trusted_host_interfaces", "eth0:a/b"),
            ("com.docker.network.bridge.gateway_mode_ipv4", "isolated"),
        ] {
            assert!(with(name, value).is_err(), "{name}={value}");
        }
    }
}
