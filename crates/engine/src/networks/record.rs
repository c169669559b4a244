//! A network as it is stored, and docker's document of it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bollard_stubs::models::Ipam as IpamRequest;
use brigantine_network::cni::NetworkList;
use brigantine_network::{BridgeSpec, Layout, SubinterfaceSpec};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::options;

/// A network as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(super) version: u32,
    pub id: String,
    pub name: String,
    pub driver: Driver,
    pub created: Timestamp,
    #[serde(default)]
    pub internal: bool,
    #[serde(default)]
    pub attachable: bool,
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The request's IPAM driver options.
    #[serde(default)]
    pub ipam_options: BTreeMap<String, String>,
    #[serde(default)]
    pub ip_range: Option<Ipv4Net>,
    #[serde(default)]
    pub reserved: BTreeMap<String, Ipv4Addr>,
    #[serde(default)]
    pub ip_range6: Option<Ipv6Net>,
    #[serde(default)]
    pub reserved6: BTreeMap<String, Ipv6Addr>,
    /// Nobody asked for its IPv6. Clients that did not must not be told of a difference: docker-compose 1 would make the
    /// network anew.
    #[serde(default)]
    pub ipv6_by_default: bool,
    /// The bridge on the host, for networks that have one.
    #[serde(default)]
    pub bridge: Option<BridgeSpec>,
    /// The interface of the host below which containers have theirs, for networks that work so.
    #[serde(default)]
    pub parent: Option<SubinterfaceSpec>,
    /// What CNI plugins are told, for networks that they make.
    #[serde(default)]
    pub foreign: Option<NetworkList>,
    /// It is no network but what others are made from.
    #[serde(default)]
    pub template: Option<Template>,
    /// The name of the network that it was made from.
    #[serde(default)]
    pub config_from: String,
}

/// What a configuration-only network gives to those that are made from it, beside its options.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Template {
    pub ipam: IpamRequest,
    pub ipv4: Option<bool>,
    pub ipv6: Option<bool>,
}

/// What carries a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Driver {
    Bridge,
    Macvlan,
    Ipvlan,
    Overlay,
    Cni,
    Host,
    Null,
}

impl Driver {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Macvlan => "macvlan",
            Self::Ipvlan => "ipvlan",
            Self::Overlay => "overlay",
            Self::Cni => "cni",
            Self::Host => "host",
            Self::Null => "null",
        }
    }
}

/// Reserved addresses of these names are routers (docker's, for its bridge driver).
pub(super) const DEFAULT_GATEWAY: &str = "DefaultGatewayIPv4";
pub(super) const DEFAULT_GATEWAY6: &str = "DefaultGatewayIPv6";

impl Record {
    /// Its subnets and gateways, if containers have interfaces on it.
    pub(crate) fn layout(&self) -> Option<Layout> {
        let bridge = self.bridge.as_ref().map(BridgeSpec::layout);
        bridge.or_else(|| self.parent.as_ref().map(SubinterfaceSpec::layout))
    }

    /// What the network crate knows it by.
    pub(crate) fn segment(&self) -> Option<&str> {
        if self.foreign.is_some() {
            return Some(&self.id);
        }
        let bridge = self.bridge.as_ref().map(|bridge| &bridge.name);
        bridge.or_else(|| self.parent.as_ref().map(|parent| &parent.name)).map(String::as_str)
    }

    /// The routers that containers get out by: its gateways, or those that take their place.
    pub(crate) fn exits(&self) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        let (ipv4, ipv6) = self.layout().map(|layout| layout.exits()).unwrap_or_default();
        (
            ipv4.map(|gateway| self.reserved.get(DEFAULT_GATEWAY).copied().unwrap_or(gateway)),
            ipv6.map(|gateway| self.reserved6.get(DEFAULT_GATEWAY6).copied().unwrap_or(gateway)),
        )
    }

    /// Whether containers get out by it.
    pub(crate) fn has_exit(&self) -> bool {
        // What plugins make leads out as far as anybody knows.
        self.foreign.is_some() || self.layout().is_some_and(|layout| layout.exits() != (None, None))
    }

    /// What the names of its interfaces begin with in containers.
    pub(crate) fn interface_prefix(&self) -> &str {
        self.options.get(options::INTERFACE_PREFIX).map_or("eth", String::as_str)
    }

    pub(crate) fn is_predefined(&self) -> bool {
        matches!(self.name.as_str(), "bridge" | "host" | "none")
    }

    /// The project it belongs to: only requests give networks labels.
    pub(crate) fn project(&self) -> Option<String> {
        self.labels.get(crate::project::LABEL).cloned()
    }

    /// Where published ports are bound when nobody says so; `None` for all addresses.
    pub(crate) fn host_binding(&self) -> Option<IpAddr> {
        let address: IpAddr = self.options.get(options::HOST_BINDING)?.parse().ok()?;
        (!address.is_unspecified()).then_some(address)
    }
}

/// docker's document of a network; `containers` is its `Containers`.
pub(crate) fn document(record: &Record, containers: Value) -> Value {
    let mut config = Vec::new();
    if let Some(layout) = record.layout() {
        let ranges = [record.ip_range.map(IpNet::V4), record.ip_range6.map(IpNet::V6)];
        let reserved = [json!(record.reserved), json!(record.reserved6)];
        let subnets = [
            layout.subnet.map(|net| (IpNet::V4(net), layout.gateway.map(IpAddr::V4))),
            layout.subnet6.map(|net| (IpNet::V6(net), layout.gateway6.map(IpAddr::V6))),
        ];
        for ((subnet, range), reserved) in subnets.into_iter().zip(ranges).zip(reserved) {
            let Some((subnet, gateway)) = subnet else { continue };
            let mut entry = json!({ "Subnet": subnet.to_string() });
            if let Some(gateway) = gateway.filter(|gateway| !gateway.is_unspecified()) {
                entry["Gateway"] = gateway.to_string().into();
            }
            if let Some(range) = range {
                entry["IPRange"] = range.to_string().into();
            }
            if reserved.as_object().is_some_and(|reserved| !reserved.is_empty()) {
                entry["AuxiliaryAddresses"] = reserved;
            }
            config.push(entry);
        }
    }
    if let Some(template) = &record.template {
        config.extend(template.ipam.config.iter().flatten().map(|part| json!(part)));
    }
    let ipam_options = if record.ipam_options.is_empty() { Value::Null } else { json!(record.ipam_options) };
    json!({
        "Name": record.name,
        "Id": record.id,
        "Created": crate::clock::rfc3339_nano(record.created),
        "Scope": "local",
        "Driver": record.driver.as_str(),
        "EnableIPv4": record.layout().is_none_or(|layout| layout.subnet.is_some()),
        "EnableIPv6": !record.ipv6_by_default
            && record.layout().is_some_and(|layout| layout.subnet6.is_some()),
        "IPAM": { "Driver": if record.foreign.is_some() { "cni" } else { "default" }, "Options": ipam_options, "Config": config },
        "Internal": record.internal,
        "Attachable": record.attachable,
        "Ingress": false,
        "ConfigFrom": { "Network": record.config_from },
        "ConfigOnly": record.template.is_some(),
        "Containers": containers,
        "Options": record.options,
        "Labels": record.labels,
    })
}
