//! Networks: their records, their addresses, and the plumbing that the network crate does for them.
//!
//! `bridge`, `host` and `none` always exist. Who is on a network is derived from the containers' records; which
//! addresses are taken is known here.

mod plumbing;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};

use bollard_stubs::models::{Ipam as IpamRequest, IpamConfig, NetworkCreateRequest};
use brigantine_network::{BridgeSpec, Ipam, IpamError};
use ipnet::{IpNet, Ipv4Net};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(crate) use plumbing::Plumbing;

use crate::config::Config;
use crate::db::{Batch, Db, Durability, Snapshot, Table};
use crate::error::Context;
use crate::events::{Events, Kind};
use crate::ids::new_id;
use crate::sync::lock;
use crate::{Error, Filters, Result};

const VERSION: u32 = 1;

/// A network as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
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
    /// The bridge on the host, for networks that have one.
    #[serde(default)]
    pub bridge: Option<BridgeSpec>,
}

/// What carries a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Driver {
    Bridge,
    Host,
    Null,
}

impl Driver {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Host => "host",
            Self::Null => "null",
        }
    }
}

impl Record {
    pub(crate) fn is_predefined(&self) -> bool {
        matches!(self.name.as_str(), "bridge" | "host" | "none")
    }
}

#[derive(Debug, Default)]
struct Index {
    records: BTreeMap<String, Record>,
    addresses: HashMap<String, Ipam>,
}

/// The networks service.
#[derive(Debug)]
pub struct Networks {
    config: Arc<Config>,
    db: Db,
    events: Arc<Events>,
    plumbing: Arc<Plumbing>,
    index: Mutex<Index>,
    changing: tokio::sync::Mutex<()>,
}

impl Networks {
    pub(crate) async fn open(
        config: Arc<Config>,
        db: Db,
        events: Arc<Events>,
        plumbing: Plumbing,
        snapshot: &mut Snapshot,
    ) -> Result<Self> {
        let networks = Self {
            config,
            db,
            events,
            plumbing: Arc::new(plumbing),
            index: Mutex::default(),
            changing: tokio::sync::Mutex::new(()),
        };
        for record in snapshot.take::<Record>(Table::Networks) {
            match record {
                Ok(record) => networks.enter(record)?,
                Err(error) => {
                    tracing::error!(error = Error::internal("a network is lost").because(error).report());
                }
            }
        }
        networks.predefined().await?;
        Ok(networks)
    }

    pub(crate) fn plumbing(&self) -> Arc<Plumbing> {
        Arc::clone(&self.plumbing)
    }

    /// All bridges that networks need, for the start of the engine.
    pub(crate) fn bridges(&self) -> Vec<BridgeSpec> {
        lock(&self.index).records.values().filter_map(|record| record.bridge.clone()).collect()
    }

    fn enter(&self, record: Record) -> Result<()> {
        let mut index = lock(&self.index);
        if let Some(bridge) = &record.bridge {
            let ipam = addresses(bridge, &record)?;
            index.addresses.insert(record.id.clone(), ipam);
        }
        index.records.insert(record.id.clone(), record);
        Ok(())
    }

    /// Makes `bridge`, `host` and `none` if they are not there, and gives `bridge` what the flags say now.
    async fn predefined(&self) -> Result<()> {
        let existing =
            |name: &str| lock(&self.index).records.values().find(|record| record.name == name).cloned();
        let mut batch = Batch::new();
        for (name, driver) in [("bridge", Driver::Bridge), ("host", Driver::Host), ("none", Driver::Null)] {
            let found = existing(name);
            if name == "bridge" && self.config.bridge == "none" {
                continue;
            }
            let bridge = match (driver, &found) {
                (Driver::Bridge, found) => Some(self.default_bridge(found.as_ref())?),
                _ => None,
            };
            if found.as_ref().is_some_and(|found| found.bridge == bridge) {
                continue;
            }
            let record = Record {
                version: VERSION,
                id: found.as_ref().map_or_else(new_id, |found| found.id.clone()),
                name: name.to_owned(),
                driver,
                created: found.map_or_else(Timestamp::now, |found| found.created),
                internal: false,
                attachable: false,
                options: self.default_options(driver),
                labels: BTreeMap::new(),
                ipam_options: BTreeMap::new(),
                ip_range: None,
                reserved: BTreeMap::new(),
                bridge,
            };
            batch = batch
                .put(Table::Networks, &record.id, name, &record)
                .doing(|| format!("store network {name}"))?;
            self.enter(record)?;
        }
        self.db.apply(batch, Durability::Written).await.doing(|| "store the predefined networks".to_owned())
    }

    fn default_options(&self, driver: Driver) -> BTreeMap<String, String> {
        if driver != Driver::Bridge {
            return BTreeMap::new();
        }
        [
            ("com.docker.network.bridge.default_bridge", "true".to_owned()),
            ("com.docker.network.bridge.enable_icc", self.config.icc.to_string()),
            ("com.docker.network.bridge.enable_ip_masquerade", self.config.ip_masq.to_string()),
            ("com.docker.network.bridge.host_binding_ipv4", "0.0.0.0".to_owned()),
            ("com.docker.network.bridge.name", self.config.bridge.clone()),
            (
                "com.docker.network.driver.mtu",
                if self.config.mtu == 0 { 1500 } else { self.config.mtu }.to_string(),
            ),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    fn default_bridge(&self, found: Option<&Record>) -> Result<BridgeSpec> {
        let (subnet, gateway) = match (self.config.bip, found.and_then(|found| found.bridge.as_ref())) {
            (Some(IpNet::V4(net)), _) => (net.trunc(), net.addr()),
            (Some(IpNet::V6(_)), _) => return Err(Error::invalid("--bip must be an IPv4 address")),
            (None, Some(bridge)) => (bridge.subnet, bridge.gateway),
            (None, None) => {
                let subnet = self.free_subnet()?;
                (subnet, first_host(subnet))
            }
        };
        let mut spec = BridgeSpec::new(self.config.bridge.clone(), subnet, gateway);
        spec.mtu = Some(self.config.mtu).filter(|mtu| *mtu != 0);
        spec.icc = self.config.icc;
        spec.masquerade = self.config.ip_masq;
        Ok(spec)
    }

    fn free_subnet(&self) -> Result<Ipv4Net> {
        use brigantine_network::subnet::{DEFAULT_POOLS, Pool, choose};
        let mut taken: Vec<IpNet> = lock(&self.index)
            .records
            .values()
            .filter_map(|record| record.bridge.as_ref().map(|bridge| IpNet::V4(bridge.subnet)))
            .collect();
        taken.extend(self.plumbing.host_routes());
        let configured: Vec<Pool> = self
            .config
            .default_address_pools
            .iter()
            .map(|(base, size)| Pool { base: *base, size: *size })
            .collect();
        let pools = if configured.is_empty() { DEFAULT_POOLS.to_vec() } else { configured };
        match choose(&pools, &taken) {
            Some(IpNet::V4(net)) => Ok(net),
            Some(IpNet::V6(_)) | None => {
                Err(Error::invalid("all predefined address pools have been fully subnetted"))
            }
        }
    }

    /// Finds a network: full id, name, then unambiguous id prefix.
    pub(crate) fn find(&self, reference: &str) -> Result<Record> {
        let index = lock(&self.index);
        if let Some(record) = index.records.get(reference) {
            return Ok(record.clone());
        }
        let unknown = || Error::not_found(format!("network {reference} not found"));
        if reference.is_empty() {
            return Err(unknown());
        }
        let named: Vec<&Record> = index.records.values().filter(|record| record.name == reference).collect();
        let (matching, by) = if named.is_empty() {
            (index.records.values().filter(|record| record.id.starts_with(reference)).collect(), "ID prefix")
        } else {
            (named, "name")
        };
        match matching[..] {
            [one] => Ok(one.clone()),
            [] => Err(unknown()),
            ref several => Err(Error::invalid(format!(
                "network {reference} is ambiguous ({} matches found on {by})",
                several.len()
            ))),
        }
    }

    /// The id behind a name, id or prefix.
    pub fn resolve(&self, reference: &str) -> Result<String> {
        Ok(self.find(reference)?.id)
    }

    pub async fn create(&self, request: NetworkCreateRequest) -> Result<Value> {
        let name = request.name;
        if name.trim().is_empty() || name.contains('/') {
            return Err(Error::invalid(format!("invalid network name: {name:?}")));
        }
        if matches!(name.as_str(), "bridge" | "host" | "none" | "default") {
            return Err(Error::forbidden(format!(
                "operation is not permitted on predefined {name} network "
            )));
        }
        match request.driver.as_deref() {
            None | Some("" | "bridge") => {}
            Some("host" | "null") => {
                let driver = request.driver.unwrap_or_default();
                return Err(Error::forbidden(format!(
                    "only one instance of \"{driver}\" network is allowed"
                )));
            }
            Some(other) => return Err(Error::not_found(format!("plugin \"{other}\" not found"))),
        }
        if request.enable_ipv6 == Some(true) {
            return Err(Error::not_implemented("IPv6 networks are not supported yet"));
        }
        if request.config_only == Some(true)
            || request.config_from.is_some_and(|from| from.network.is_some_and(|n| !n.is_empty()))
        {
            return Err(Error::not_implemented("configuration-only networks are not supported"));
        }
        let _changing = self.changing.lock().await;
        if lock(&self.index).records.values().any(|record| record.name == name) {
            return Err(Error::conflict(format!("network with name {name} already exists")));
        }
        let ipam = request.ipam.unwrap_or_default();
        let id = new_id();
        let options: BTreeMap<String, String> = request.options.unwrap_or_default().into_iter().collect();
        let internal = request.internal.unwrap_or_default();
        let (subnet, gateway, ip_range, reserved) = self.addressing(&ipam)?;
        let mut bridge = BridgeSpec::new(
            options
                .get("com.docker.network.bridge.name")
                .cloned()
                .unwrap_or_else(|| format!("br-{}", crate::ids::short(&id))),
            subnet,
            gateway,
        );
        let flag = |name: &str, default: bool| {
            options.get(name).map_or(default, |value| matches!(value.as_str(), "true" | "1"))
        };
        bridge.internal = internal;
        bridge.icc = flag("com.docker.network.bridge.enable_icc", true);
        bridge.masquerade = flag("com.docker.network.bridge.enable_ip_masquerade", true) && !internal;
        if let Some(mtu) = options.get("com.docker.network.driver.mtu") {
            let mtu = mtu.parse().map_err(|_nan| Error::invalid(format!("invalid MTU: {mtu}")))?;
            bridge.mtu = Some(mtu);
        }
        bridge.validate().map_err(plumbing::refused)?;
        let record = Record {
            version: VERSION,
            id: id.clone(),
            name: name.clone(),
            driver: Driver::Bridge,
            created: Timestamp::now(),
            internal,
            attachable: request.attachable.unwrap_or_default(),
            options,
            labels: request.labels.unwrap_or_default().into_iter().collect(),
            ipam_options: ipam.options.unwrap_or_default().into_iter().collect(),
            ip_range,
            reserved,
            bridge: Some(bridge.clone()),
        };
        addresses(&bridge, &record)?;
        let plumbing = self.plumbing();
        crate::blocking(move || plumbing.ensure_bridge(&bridge)).await?;
        let what = || format!("store network {name}");
        let batch = Batch::new().put(Table::Networks, &id, &name, &record).doing(what)?;
        self.db.apply(batch, Durability::Synced).await.doing(what)?;
        self.enter(record)?;
        self.publish("create", &id, &name, "bridge", &[]);
        Ok(json!({ "Id": id, "Warning": "" }))
    }

    /// Subnet, gateway, range and reserved addresses of a new network.
    #[expect(
        clippy::type_complexity,
        reason = "four parts of one decision, taken apart at once by the only caller"
    )]
    fn addressing(
        &self,
        ipam: &IpamRequest,
    ) -> Result<(Ipv4Net, Ipv4Addr, Option<Ipv4Net>, BTreeMap<String, Ipv4Addr>)> {
        if let Some(driver) = ipam.driver.as_deref().filter(|driver| !matches!(*driver, "" | "default")) {
            return Err(Error::not_found(format!("could not find plugin {driver} in v1 plugin registry")));
        }
        let configs: Vec<&IpamConfig> = ipam
            .config
            .iter()
            .flatten()
            .filter(|c| c.subnet.as_deref().is_some_and(|s| !s.is_empty()))
            .collect();
        let config = match configs[..] {
            [] => {
                if ipam.config.iter().flatten().any(|c| c.gateway.as_deref().is_some_and(|g| !g.is_empty())) {
                    return Err(Error::invalid("invalid network config: a gateway needs a subnet"));
                }
                let subnet = self.free_subnet()?;
                return Ok((subnet, first_host(subnet), None, BTreeMap::new()));
            }
            [one] => one,
            _ => return Err(Error::not_implemented("networks with several subnets are not supported yet")),
        };
        let text = config.subnet.as_deref().unwrap_or_default();
        let subnet: IpNet = text
            .parse()
            .map_err(|_bad| Error::invalid(format!("invalid subnet {text}: it should be a CIDR")))?;
        let IpNet::V4(subnet) = subnet else {
            return Err(Error::not_implemented("IPv6 networks are not supported yet"));
        };
        if subnet.trunc() != subnet {
            return Err(Error::invalid(format!("invalid subnet {subnet}: it should be {}", subnet.trunc())));
        }
        let overlapping = lock(&self.index)
            .records
            .values()
            .filter_map(|record| Some((record.name.clone(), record.bridge.as_ref()?.subnet)))
            .find(|(_, other)| other.contains(&subnet) || subnet.contains(other));
        if overlapping.is_some() {
            return Err(Error::forbidden("Pool overlaps with other one on this address space"));
        }
        let address = |text: &str| {
            text.parse::<Ipv4Addr>()
                .ok()
                .filter(|address| subnet.contains(address))
                .ok_or_else(|| Error::invalid(format!("address {text} is not in subnet {subnet}")))
        };
        let gateway = match config.gateway.as_deref().filter(|gateway| !gateway.is_empty()) {
            Some(gateway) => address(gateway)?,
            None => first_host(subnet),
        };
        let ip_range =
            match config.ip_range.as_deref().filter(|range| !range.is_empty()) {
                Some(range) => {
                    Some(range.parse::<Ipv4Net>().ok().filter(|range| subnet.contains(range)).ok_or_else(
                        || Error::invalid(format!("invalid ip-range {range} for subnet {subnet}")),
                    )?)
                }
                None => None,
            };
        let reserved = config
            .auxiliary_addresses
            .iter()
            .flatten()
            .map(|(name, text)| Ok((name.clone(), address(text)?)))
            .collect::<Result<_>>()?;
        Ok((subnet, gateway, ip_range, reserved))
    }

    /// Removes a network that `users` says nobody is on.
    pub(crate) async fn remove(&self, record: &Record, users: &[String]) -> Result<()> {
        if record.is_predefined() {
            return Err(Error::forbidden(format!(
                "{} is a pre-defined network and cannot be removed",
                record.name
            )));
        }
        if !users.is_empty() {
            return Err(Error::forbidden(format!(
                "error while removing network: network {} id {} has active endpoints",
                record.name, record.id
            )));
        }
        let _changing = self.changing.lock().await;
        self.db
            .apply(Batch::new().delete(Table::Networks, &record.id), Durability::Synced)
            .await
            .doing(|| format!("remove network {}", record.name))?;
        {
            let mut index = lock(&self.index);
            index.records.remove(&record.id);
            index.addresses.remove(&record.id);
        }
        if let Some(bridge) = &record.bridge {
            let (plumbing, name) = (self.plumbing(), bridge.name.clone());
            crate::blocking(move || plumbing.remove_bridge(&name)).await?;
        }
        self.publish("destroy", &record.id, &record.name, record.driver.as_str(), &[]);
        Ok(())
    }

    /// Records that pass `filters`; `in_use` says whether a network has containers.
    pub(crate) fn select(&self, filters: &Filters, in_use: impl Fn(&Record) -> bool) -> Result<Vec<Record>> {
        filters.only(&["driver", "id", "label", "name", "scope", "type", "dangling"])?;
        let dangling = filters.boolean("dangling")?;
        for wanted in filters.values("type") {
            if !matches!(wanted.as_str(), "builtin" | "custom") {
                return Err(Error::invalid(format!("invalid filter 'type={wanted}'")));
            }
        }
        let records: Vec<Record> = lock(&self.index).records.values().cloned().collect();
        Ok(records
            .into_iter()
            .filter(|record| {
                let kind = if record.is_predefined() { "builtin" } else { "custom" };
                filters.exact("driver", record.driver.as_str())
                    && filters.matches("name", &record.name)
                    && (!filters.contains("id")
                        || filters.values("id").iter().any(|id| record.id.starts_with(id.as_str())))
                    && filters.labels("label", |label| record.labels.get(label).map(String::as_str))
                    && filters.exact("scope", "local")
                    && filters.exact("type", kind)
                    && dangling.is_none_or(|wanted| (!record.is_predefined() && !in_use(record)) == wanted)
            })
            .collect())
    }

    /// Takes an address of a network, a given one or the next.
    pub(crate) fn take_address(&self, id: &str, wanted: Option<Ipv4Addr>) -> Result<Ipv4Addr> {
        let mut index = lock(&self.index);
        let Some(addresses) = index.addresses.get_mut(id) else {
            return Err(Error::not_found(format!("network {id} not found")));
        };
        match wanted {
            Some(address) => match addresses.reserve(IpAddr::V4(address)) {
                Ok(()) => Ok(address),
                Err(IpamError::InUse(_)) => Err(Error::forbidden("Address already in use")),
                Err(error) => Err(Error::invalid(format!("invalid address {address}")).because(error)),
            },
            None => match addresses.allocate() {
                Ok(IpAddr::V4(address)) => Ok(address),
                Ok(IpAddr::V6(address)) => {
                    Err(Error::internal(format!("network {id} gave the address {address} for IPv4")))
                }
                Err(error) => {
                    Err(Error::internal("no available IPv4 addresses on this network's address pools")
                        .because(error))
                }
            },
        }
    }

    pub(crate) fn give_address_back(&self, id: &str, address: Ipv4Addr) {
        if let Some(addresses) = lock(&self.index).addresses.get_mut(id) {
            addresses.release(IpAddr::V4(address));
        }
    }

    pub(crate) fn publish(&self, action: &str, id: &str, name: &str, driver: &str, more: &[(&str, &str)]) {
        let mut attributes =
            BTreeMap::from([("name".to_owned(), name.to_owned()), ("type".to_owned(), driver.to_owned())]);
        for (key, value) in more {
            attributes.insert((*key).to_owned(), (*value).to_owned());
        }
        self.events.publish(Kind::Network, action, id, attributes);
    }
}

/// docker's document of a network; `containers` is its `Containers`.
pub(crate) fn document(record: &Record, containers: Value) -> Value {
    let config: Vec<Value> = record
        .bridge
        .iter()
        .map(|bridge| {
            let mut config =
                json!({ "Subnet": bridge.subnet.to_string(), "Gateway": bridge.gateway.to_string() });
            if let Some(range) = record.ip_range {
                config["IPRange"] = range.to_string().into();
            }
            if !record.reserved.is_empty() {
                config["AuxiliaryAddresses"] = json!(record.reserved);
            }
            config
        })
        .collect();
    let ipam_options = if record.ipam_options.is_empty() && record.is_predefined() {
        Value::Null
    } else {
        json!(record.ipam_options)
    };
    json!({
        "Name": record.name,
        "Id": record.id,
        "Created": crate::clock::rfc3339_nano(record.created),
        "Scope": "local",
        "Driver": record.driver.as_str(),
        "EnableIPv4": true,
        "EnableIPv6": false,
        "IPAM": { "Driver": "default", "Options": ipam_options, "Config": config },
        "Internal": record.internal,
        "Attachable": record.attachable,
        "Ingress": false,
        "ConfigFrom": { "Network": "" },
        "ConfigOnly": false,
        "Containers": containers,
        "Options": record.options,
        "Labels": record.labels,
    })
}

fn first_host(subnet: Ipv4Net) -> Ipv4Addr {
    subnet.hosts().next().unwrap_or_else(|| subnet.addr())
}

fn addresses(bridge: &BridgeSpec, record: &Record) -> Result<Ipam> {
    let reserved = std::iter::once(bridge.gateway).chain(record.reserved.values().copied()).map(IpAddr::V4);
    Ipam::new(IpNet::V4(bridge.subnet), record.ip_range.map(IpNet::V4), reserved)
        .map_err(|error| Error::invalid(format!("addresses of network {}", record.name)).because(error))
}
