//! What a request says about a new network, read and checked: its subnets, and the options docker's bridge driver knows.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bollard_stubs::models::{Ipam as IpamRequest, IpamConfig};
use brigantine_network::{BridgeSpec, GatewayMode};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::plumbing;
use crate::{Error, Result};

/// Addresses that a container asks for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wanted {
    pub ipv4: Option<Ipv4Addr>,
    pub ipv6: Option<Ipv6Addr>,
}

/// The subnets of a network.
#[derive(Debug)]
pub(super) struct Addressing {
    pub subnet: Ipv4Net,
    pub gateway: Ipv4Addr,
    pub range: Option<Ipv4Net>,
    pub reserved: BTreeMap<String, Ipv4Addr>,
    pub subnet6: Option<(Ipv6Net, Ipv6Addr)>,
    pub range6: Option<Ipv6Net>,
    pub reserved6: BTreeMap<String, Ipv6Addr>,
}

impl Addressing {
    pub(super) fn new(subnet: Ipv4Net, gateway: Ipv4Addr) -> Self {
        Self {
            subnet,
            gateway,
            range: None,
            reserved: BTreeMap::new(),
            subnet6: None,
            range6: None,
            reserved6: BTreeMap::new(),
        }
    }
}

/// The IPv6 part of [`Addressing`].
#[derive(Debug)]
pub(super) struct Addressing6 {
    pub subnet: Ipv6Net,
    pub gateway: Ipv6Addr,
    pub range: Option<Ipv6Net>,
    pub reserved: BTreeMap<String, Ipv6Addr>,
}

/// What the request itself says.
#[derive(Debug)]
pub(super) struct Given {
    pub ipv4: Option<Addressing>,
    pub ipv6: Option<Addressing6>,
}

impl Given {
    pub(super) fn read(ipam: &IpamRequest) -> Result<Self> {
        let mut given = Self { ipv4: None, ipv6: None };
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
                    let mut plan = Addressing::new(
                        subnet,
                        v4(part.gateway).unwrap_or_else(|| super::first_host(subnet)),
                    );
                    plan.range = match part.range {
                        Some(IpNet::V4(range)) => Some(range),
                        Some(IpNet::V6(_)) | None => None,
                    };
                    plan.reserved = part
                        .reserved
                        .into_iter()
                        .filter_map(|(name, ip)| Some((name, v4(Some(ip))?)))
                        .collect();
                    given.ipv4 = Some(plan);
                }
                IpNet::V6(subnet) => {
                    given.ipv6 = Some(Addressing6 {
                        subnet,
                        gateway: v6(part.gateway).unwrap_or_else(|| super::first_host6(subnet)),
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
        let ipv4 = self.ipv4.as_ref().map(|plan| IpNet::V4(plan.subnet));
        ipv4.into_iter().chain(self.ipv6.as_ref().map(|plan| IpNet::V6(plan.subnet)))
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

/// The bridge that a request for a network describes.
pub(super) fn bridge(
    id: &str,
    internal: bool,
    options: &BTreeMap<String, String>,
    plan: &Addressing,
) -> Result<BridgeSpec> {
    let option = |name: &str| options.get(name).map(String::as_str).filter(|value| !value.is_empty());
    let name = option("com.docker.network.bridge.name")
        .map_or_else(|| format!("br-{}", crate::ids::short(id)), str::to_owned);
    let mut bridge = BridgeSpec::new(name, plan.subnet, plan.gateway);
    (bridge.subnet6, bridge.gateway6) = plan.subnet6.unzip();
    let flag = |name: &str, default: bool| match option(name) {
        None => Ok(default),
        Some("true" | "1" | "t" | "T" | "TRUE" | "True") => Ok(true),
        Some("false" | "0" | "f" | "F" | "FALSE" | "False") => Ok(false),
        Some(other) => {
            Err(Error::invalid(format!("invalid value {other:?} of option {name}: true or false")))
        }
    };
    bridge.internal = internal;
    bridge.icc = flag("com.docker.network.bridge.enable_icc", true)?;
    bridge.masquerade = flag("com.docker.network.bridge.enable_ip_masquerade", true)? && !internal;
    let mode = |name: &str| match option(name) {
        None => Ok(GatewayMode::Nat),
        Some("isolated") => Err(Error::not_implemented(
            "the gateway mode isolated is not supported yet: --internal keeps a network to itself and the host",
        )),
        Some(text) => text.parse().map_err(|()| {
            Error::invalid(format!("unknown gateway mode {text}: nat, nat-unprotected or routed"))
        }),
    };
    bridge.mode4 = mode("com.docker.network.bridge.gateway_mode_ipv4")?;
    bridge.mode6 = mode("com.docker.network.bridge.gateway_mode_ipv6")?;
    if let Some(mtu) = option("com.docker.network.driver.mtu") {
        let mtu = mtu.parse().map_err(|_nan| Error::invalid(format!("invalid MTU: {mtu}")))?;
        bridge.mtu = Some(mtu);
    }
    if let Some(address) = option(HOST_BINDING)
        && address.parse::<IpAddr>().is_err()
    {
        return Err(Error::invalid(format!(
            "invalid value {address:?} of option {HOST_BINDING}: an IP address"
        )));
    }
    bridge.validate().map_err(plumbing::refused)?;
    Ok(bridge)
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
        let given =
            Given::read(&request(&[("10.1.0.0/16", "", "10.1.5.0/24"), ("fd00:1::/64", "fd00:1::9", "")]))
                .unwrap();
        let four = given.ipv4.unwrap();
        assert_eq!((four.gateway, four.range), ([10, 1, 0, 1].into(), Some("10.1.5.0/24".parse().unwrap())));
        assert_eq!(given.ipv6.unwrap().gateway, "fd00:1::9".parse::<Ipv6Addr>().unwrap());
    }

    #[test]
    fn what_fits_nowhere_is_refused_by_name() {
        let text = |configs: &[(&str, &str, &str)]| Given::read(&request(configs)).unwrap_err().to_string();
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
        let plan = Addressing::new("10.1.0.0/16".parse().unwrap(), [10, 1, 0, 1].into());
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
        ] {
            assert!(with(name, value).is_err(), "{name}={value}");
        }
    }
}
