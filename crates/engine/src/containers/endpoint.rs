//! One endpoint: what is asked of a container's place on a network, checked, and what becomes of it: an interface.

use std::net::IpAddr;

use bollard_stubs::models::EndpointSettings;
use brigantine_network::{DefaultRoutes, Interface, InterfaceSpec, MacAddr};
use ipnet::IpNet;

use crate::networks::{self, Networks, Wanted};
use crate::{Error, Result};

/// Options of an endpoint, as docker names them.
const SYSCTLS: &str = "com.docker.network.endpoint.sysctls";
const INTERFACE: &str = "com.docker.network.endpoint.ifname";

/// Checks what is asked of one endpoint.
pub(super) fn check(network: &str, settings: &EndpointSettings) -> Result<()> {
    let invalid = |reason: String| {
        Error::invalid(format!("invalid config for network {network}: invalid endpoint settings:\n{reason}"))
    };
    let wanted = wanted(settings).map_err(|error| invalid(error.to_string()))?;
    if matches!(network, "bridge" | "host" | "none") && (wanted.ipv4.is_some() || wanted.ipv6.is_some()) {
        return Err(invalid(
            "user specified IP address is supported on user defined networks only".to_owned(),
        ));
    }
    link_local(settings).map_err(|error| invalid(error.to_string()))?;
    mac(settings).map_err(|error| invalid(error.to_string()))?;
    sysctls(settings, "eth0").map_err(|error| invalid(error.to_string()))?;
    if let Some(name) = option(settings, INTERFACE)
        && (name.is_empty()
            || name.len() > 15
            || name.contains(['/', ':', ' '])
            || matches!(name, "lo" | "." | ".."))
    {
        return Err(invalid(format!("invalid interface name {name:?}")));
    }
    Ok(())
}

fn option<'a>(settings: &'a EndpointSettings, name: &str) -> Option<&'a str> {
    settings.driver_opts.as_ref()?.get(name).map(String::as_str)
}

/// The addresses asked for.
pub(super) fn wanted(settings: &EndpointSettings) -> Result<Wanted> {
    let Some(ipam) = &settings.ipam_config else { return Ok(Wanted::default()) };
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let ipv4 = given(&ipam.ipv4_address)
        .map(|text| text.parse().map_err(|_bad| Error::invalid(format!("invalid IPv4 address: {text}"))))
        .transpose()?;
    let ipv6 = given(&ipam.ipv6_address)
        .map(|text| text.parse().map_err(|_bad| Error::invalid(format!("invalid IPv6 address: {text}"))))
        .transpose()?;
    Ok(Wanted { ipv4, ipv6 })
}

/// The addresses of the link asked for beside those of the network.
fn link_local(settings: &EndpointSettings) -> Result<Vec<IpAddr>> {
    let Some(ipam) = &settings.ipam_config else { return Ok(Vec::new()) };
    let given = ipam.link_local_ips.iter().flatten();
    given
        .map(|text| {
            let is_link_local = |address: &IpAddr| match address {
                IpAddr::V4(address) => address.is_link_local(),
                IpAddr::V6(address) => address.is_unicast_link_local(),
            };
            let address = text.parse::<IpAddr>().ok().filter(is_link_local);
            address.ok_or_else(|| Error::invalid(format!("invalid link-local IP address: {text}")))
        })
        .collect()
}

fn mac(settings: &EndpointSettings) -> Result<Option<MacAddr>> {
    let Some(text) = settings.mac_address.as_deref().filter(|mac| !mac.is_empty()) else { return Ok(None) };
    text.parse()
        .map(Some)
        .map_err(|error| Error::invalid(format!("invalid MAC address {text}")).because(error))
}

/// `net.ipv4.conf.IFNAME.log_martians=1,…`, of this interface alone.
fn sysctls(settings: &EndpointSettings, interface: &str) -> Result<Vec<(String, String)>> {
    let Some(text) = option(settings, SYSCTLS).filter(|text| !text.is_empty()) else { return Ok(Vec::new()) };
    text.split(',')
        .map(|entry| {
            let parts: Vec<&str> = entry.split(['.', '=']).collect();
            match entry.split_once('=') {
                // The docker command makes small letters of it.
                Some((_, value))
                    if parts.len() == 6 && parts[0] == "net" && parts[3].eq_ignore_ascii_case("IFNAME") =>
                {
                    Ok((format!("net/{}/{}/{interface}/{}", parts[1], parts[2], parts[4]), value.to_owned()))
                }
                _ => Err(Error::invalid(format!(
                    "invalid sysctl {entry:?} in {SYSCTLS}: net.FAMILY.KIND.IFNAME.NAME=VALUE is expected"
                ))),
            }
        })
        .collect()
}

/// The name of the interface inside: the one asked for, or the first with the network's prefix that is free.
pub(super) fn interface_name(
    settings: &EndpointSettings,
    prefix: &str,
    is_taken: impl Fn(&str) -> bool,
) -> String {
    option(settings, INTERFACE).map_or_else(
        || {
            (0_u32..4096)
                .map(|number| format!("{prefix}{number}"))
                .find(|name| !is_taken(name))
                .unwrap_or_default()
        },
        str::to_owned,
    )
}

/// The interface of an endpoint, with addresses taken from its network; `None` if the network has none to give.
pub(super) fn interface(
    networks: &Networks,
    network: &networks::Record,
    settings: &EndpointSettings,
    name: String,
) -> Result<Option<InterfaceSpec>> {
    refuse_template(network)?;
    let Some(segment) = network.segment() else { return Ok(None) };
    let (mac, sysctls) = (mac(settings)?, sysctls(settings, &name)?);
    let link_local = link_local(settings)?;
    let wanted = wanted(settings)?;
    let addresses = if network.foreign.is_some() {
        // Their plugins give them out.
        let asked = wanted.ipv4.map(IpAddr::V4).into_iter().chain(wanted.ipv6.map(IpAddr::V6));
        asked.map(IpNet::from).collect()
    } else {
        networks.take_addresses(&network.id, &wanted)?
    };
    Ok(Some(InterfaceSpec {
        bridge: segment.to_owned(),
        name,
        mac,
        addresses,
        link_local,
        gateway: None,
        gateway6: None,
        sysctls,
    }))
}

/// A configuration-only network is none.
pub(super) fn refuse_template(network: &networks::Record) -> Result<()> {
    if network.template.is_some() {
        return Err(Error::forbidden(format!(
            "network {} is a configuration for other networks; containers cannot be connected to it",
            network.name
        )));
    }
    Ok(())
}

/// A network with a way out that a container is on.
#[derive(Debug)]
pub(super) struct Exit<'a> {
    pub network: &'a networks::Record,
    /// The interface's name inside.
    pub interface: &'a str,
    pub priority: i64,
}

/// Which interface carries the default routes: that of the highest priority, then of the network whose name comes first.
pub(super) fn default_routes<'a>(exits: impl Iterator<Item = Exit<'a>>) -> DefaultRoutes {
    let mut exits: Vec<Exit<'_>> = exits.filter(|exit| exit.network.has_exit()).collect();
    exits.sort_by(|one, other| {
        other.priority.cmp(&one.priority).then_with(|| one.network.name.cmp(&other.network.name))
    });
    let mut routes = DefaultRoutes::default();
    for exit in &exits {
        let (ipv4, ipv6) = exit.network.exits();
        if let Some(gateway) = ipv4 {
            routes.ipv4.get_or_insert_with(|| (exit.interface.to_owned(), gateway));
        }
        if let Some(gateway) = ipv6 {
            routes.ipv6.get_or_insert_with(|| (exit.interface.to_owned(), gateway));
        }
    }
    routes
}

/// The parts of an endpoint's document that say where it is.
pub(super) fn addresses(
    network: &networks::Record,
    interface: &Interface,
) -> [(&'static str, serde_json::Value); 6] {
    let of_plugins = (interface.gateway, interface.gateway6);
    let (gateway4, gateway6) = if network.foreign.is_some() { of_plugins } else { network.exits() };
    let net = |is_ipv4: bool| interface.addresses.iter().find(|net| net.addr().is_ipv4() == is_ipv4);
    let address = |is_ipv4| net(is_ipv4).map_or_else(String::new, |net| net.addr().to_string());
    let length = |is_ipv4| net(is_ipv4).map_or(0, IpNet::prefix_len);
    let gateway = |gateway: Option<IpAddr>| {
        let router = gateway.filter(|gateway| !gateway.is_unspecified());
        router.map_or_else(String::new, |router| router.to_string())
    };
    [
        ("Gateway", gateway(gateway4.map(IpAddr::V4)).into()),
        ("IPAddress", address(true).into()),
        ("IPPrefixLen", length(true).into()),
        ("IPv6Gateway", gateway(gateway6.map(IpAddr::V6)).into()),
        ("GlobalIPv6Address", address(false).into()),
        ("GlobalIPv6PrefixLen", length(false).into()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &str, value: &str) -> EndpointSettings {
        EndpointSettings {
            driver_opts: Some([(name.to_owned(), value.to_owned())].into()),
            ..EndpointSettings::default()
        }
    }

    #[test]
    fn sysctls_are_of_the_interface_alone() {
        let settings = with(SYSCTLS, "net.ipv4.conf.IFNAME.log_martians=1,net.ipv6.conf.IFNAME.accept_ra=0");
        assert_eq!(
            sysctls(&settings, "eth1.5").unwrap(),
            [
                ("net/ipv4/conf/eth1.5/log_martians".to_owned(), "1".to_owned()),
                ("net/ipv6/conf/eth1.5/accept_ra".to_owned(), "0".to_owned())
            ]
        );
        for bad in ["net.ipv4.ip_forward=1", "net.ipv4.conf.all.log_martians=1", "kernel.x.y.IFNAME.z=1", "x"]
        {
            assert!(check("mine", &with(SYSCTLS, bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_of_the_link_are_told_from_others() {
        let with = |text: &str| EndpointSettings {
            ipam_config: Some(bollard_stubs::models::EndpointIpamConfig {
                link_local_ips: Some(vec![text.to_owned()]),
                ..Default::default()
            }),
            ..EndpointSettings::default()
        };
        assert!(check("bridge", &with("169.254.8.8")).is_ok());
        assert!(check("mine", &with("fe80::7")).is_ok());
        for bad in ["10.0.0.1", "2001:db8::1", "x", ""] {
            assert!(check("mine", &with(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn interfaces_get_the_first_free_name() {
        let none = EndpointSettings::default();
        assert_eq!(interface_name(&none, "eth", |name| name == "eth0"), "eth1");
        assert_eq!(interface_name(&none, "lan", |_| false), "lan0");
        assert_eq!(interface_name(&with(INTERFACE, "lan"), "eth", |_| true), "lan");
        assert!(check("mine", &with(INTERFACE, "a/b")).is_err());
    }
}
