//! What plugins say that they have made.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use crate::error::Error;
use crate::mac::MacAddr;

/// A container's interface as its plugins made it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Made {
    pub mac: Option<MacAddr>,
    pub addresses: Vec<IpNet>,
    /// Where default routes lead.
    pub gateways: Vec<IpAddr>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Document {
    interfaces: Vec<Interface>,
    ips: Vec<Address>,
    routes: Vec<Route>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Interface {
    name: String,
    mac: String,
    sandbox: String,
}

#[derive(Debug, Deserialize)]
struct Address {
    address: IpNet,
    #[serde(default)]
    gateway: Option<IpAddr>,
    #[serde(default)]
    interface: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct Route {
    dst: IpNet,
    #[serde(default)]
    gw: Option<IpAddr>,
}

/// Reads the result of the last plugin of a network, as far as it is about the container's `interface`.
pub(super) fn read(network: &str, interface: &str, result: &Value) -> Result<Made, Error> {
    let document: Document = Document::deserialize(result).map_err(|error| Error::CniResult {
        network: network.to_owned(),
        reason: format!("{error}, in {:.300}", result.to_string()),
    })?;
    let is_own = |one: &Interface| {
        one.name == interface && (!one.sandbox.is_empty() || document.interfaces.len() == 1)
    };
    let own = document.interfaces.iter().position(is_own);
    let addresses: Vec<&Address> = document
        .ips
        .iter()
        .filter(|ip| ip.interface.is_none() || own.is_none() || ip.interface == own)
        .collect();
    let gateway = |route: &Route| {
        let of_address = || {
            let same_family =
                addresses.iter().find(|ip| ip.address.addr().is_ipv4() == route.dst.addr().is_ipv4());
            same_family.and_then(|ip| ip.gateway)
        };
        route.gw.or_else(of_address)
    };
    let default_routes = document.routes.iter().filter(|route| route.dst.prefix_len() == 0);
    Ok(Made {
        mac: own.and_then(|at| document.interfaces[at].mac.parse().ok()),
        gateways: default_routes.filter_map(gateway).collect(),
        addresses: addresses.iter().map(|ip| ip.address).collect(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_containers_own_interface_is_told_from_the_hosts() {
        let result = json!({
            "cniVersion": "1.0.0",
            "interfaces": [
                { "name": "cni0", "mac": "00:11:22:33:44:55" },
                { "name": "veth1", "mac": "00:11:22:33:44:56" },
                { "name": "eth0", "mac": "00:11:22:33:44:57", "sandbox": "/run/x" },
            ],
            "ips": [
                { "interface": 2, "address": "10.7.0.5/16", "gateway": "10.7.0.1" },
                { "interface": 0, "address": "10.7.0.1/16" },
                { "interface": 2, "address": "fd07::5/64", "gateway": "fd07::1" },
            ],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "10.8.0.0/16", "gw": "10.7.0.9" }, { "dst": "::/0", "gw": "fd07::2" }],
            "dns": {},
        });
        let made = read("net", "eth0", &result).unwrap();
        assert_eq!(made.mac.unwrap().to_string(), "00:11:22:33:44:57");
        assert_eq!(made.addresses, ["10.7.0.5/16".parse::<IpNet>().unwrap(), "fd07::5/64".parse().unwrap()]);
        assert_eq!(made.gateways, ["10.7.0.1".parse::<IpAddr>().unwrap(), "fd07::2".parse().unwrap()]);
        assert_eq!(read("net", "eth0", &Value::Null).map_or(0, |made| made.addresses.len()), 0);
    }

    #[test]
    fn nonsense_is_refused_with_the_networks_name() {
        let error = read("net", "eth0", &json!({ "ips": [{ "address": "here" }] })).unwrap_err().to_string();
        assert!(error.contains("net") && error.contains("here"), "{error}");
    }
}
