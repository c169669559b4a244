//! Networks: their records, their addresses, and the plumbing that the network crate does for them.
//!
//! `bridge`, `host` and `none` always exist. Who is on a network is derived from the containers' records; which
//! addresses are taken is known here.

mod options;
mod plumbing;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex};

use bollard_stubs::models::{Ipam as IpamRequest, NetworkCreateRequest};
use brigantine_network::{BridgeSpec, Ipam, IpamError};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(crate) use options::Wanted;
use options::{Addressing, Given};
pub(crate) use plumbing::{Placed, Plumbing};

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

#[derive(Debug, Default)]
struct Index {
    records: BTreeMap<String, Record>,
    addresses: HashMap<String, Pools>,
}

/// The addresses of one network, a pool for each family that it has.
#[derive(Debug)]
struct Pools {
    ipv4: Ipam,
    ipv6: Option<Ipam>,
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
            let pools = addresses(bridge, &record)?;
            index.addresses.insert(record.id.clone(), pools);
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
            let range = self.config.fixed_cidr.filter(|_| driver == Driver::Bridge);
            if found.as_ref().is_some_and(|found| found.bridge == bridge && found.ip_range == range) {
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
                ip_range: self.config.fixed_cidr.filter(|_| driver == Driver::Bridge),
                reserved: BTreeMap::new(),
                ip_range6: None,
                reserved6: BTreeMap::new(),
                ipv6_by_default: false,
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
        if let Some(range) = self.config.fixed_cidr
            && !spec.subnet.contains(&range)
        {
            return Err(Error::invalid(format!(
                "--fixed-cidr {range} is not within the default bridge's subnet {}",
                spec.subnet
            )));
        }
        if self.config.ipv6 {
            let subnet =
                match (self.config.fixed_cidr_v6, found.and_then(|found| found.bridge.as_ref()?.subnet6)) {
                    (Some(subnet), _) => subnet,
                    (None, Some(subnet)) => subnet,
                    (None, None) => self.free_subnet6()?,
                };
            (spec.subnet6, spec.gateway6) = (Some(subnet), Some(first_host6(subnet)));
        }
        Ok(spec)
    }

    /// A unique local /64 that nothing else has (RFC 4193).
    fn free_subnet6(&self) -> Result<Ipv6Net> {
        use brigantine_network::subnet::{Pool, choose, unique_local};
        let taken = self.taken();
        let pools: Vec<Pool> = self
            .config
            .default_address_pools
            .iter()
            .filter(|(base, _)| base.addr().is_ipv6())
            .map(|(base, size)| Pool { base: *base, size: *size })
            .collect();
        if !pools.is_empty() {
            return match choose(&pools, &taken) {
                Some(IpNet::V6(net)) => Ok(net),
                Some(IpNet::V4(_)) | None => {
                    Err(Error::invalid("all predefined address pools have been fully subnetted"))
                }
            };
        }
        for _ in 0..16 {
            let subnet = unique_local(crate::ids::random_bytes());
            if !taken.iter().any(|other| brigantine_network::subnet::overlap(other, &IpNet::V6(subnet))) {
                return Ok(subnet);
            }
        }
        Err(Error::internal("no unique local subnet is free"))
    }

    /// What a new subnet must not overlap with: those of other networks and whatever the host has a route to.
    fn taken(&self) -> Vec<IpNet> {
        let mut taken: Vec<IpNet> = {
            let index = lock(&self.index);
            let bridges = index.records.values().filter_map(|record| record.bridge.as_ref());
            bridges
                .flat_map(|bridge| {
                    std::iter::once(IpNet::V4(bridge.subnet)).chain(bridge.subnet6.map(IpNet::V6))
                })
                .collect()
        };
        taken.extend(self.plumbing.host_routes());
        taken
    }

    fn free_subnet(&self) -> Result<Ipv4Net> {
        use brigantine_network::subnet::{DEFAULT_POOLS, Pool, choose};
        let taken = self.taken();
        let configured: Vec<Pool> = self
            .config
            .default_address_pools
            .iter()
            .filter(|(base, _)| base.addr().is_ipv4())
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
        self.find_among(reference, |_all| true)
    }

    /// The id behind a name, id or prefix, among the networks of a project.
    pub fn resolve_within(&self, reference: &str, project: &str) -> Result<String> {
        Ok(self.find_among(reference, |record| record.project().as_deref() == Some(project))?.id)
    }

    /// The same among those that are `wanted`; the others might as well not be there.
    fn find_among(&self, reference: &str, wanted: impl Fn(&Record) -> bool) -> Result<Record> {
        let index = lock(&self.index);
        if let Some(record) = index.records.get(reference).filter(|record| wanted(record)) {
            return Ok(record.clone());
        }
        let unknown = || Error::not_found(format!("network {reference} not found"));
        if reference.is_empty() {
            return Err(unknown());
        }
        let records = || index.records.values().filter(|record| wanted(record));
        let named: Vec<&Record> = records().filter(|record| record.name == reference).collect();
        let (matching, by) = if named.is_empty() {
            (records().filter(|record| record.id.starts_with(reference)).collect(), "ID prefix")
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
        if request.enable_ipv4 == Some(false) {
            return Err(Error::not_implemented("networks without IPv4 are not supported yet"));
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
        let has_ipv6_subnet =
            ipam.config.iter().flatten().any(|one| one.subnet.as_deref().is_some_and(|s| s.contains(':')));
        let plan = self.addressing(&ipam, request.enable_ipv6)?;
        let bridge = options::bridge(&id, internal, &options, &plan)?;
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
            ip_range: plan.range,
            reserved: plan.reserved,
            ip_range6: plan.range6,
            reserved6: plan.reserved6,
            ipv6_by_default: request.enable_ipv6.is_none() && !has_ipv6_subnet,
            bridge: Some(bridge.clone()),
        };
        addresses(&bridge, &record)?;
        let plumbing = self.plumbing();
        crate::blocking(move || plumbing.ensure_bridge(&bridge)).await?;
        let what = || format!("store network {name}");
        let batch = Batch::new().put(Table::Networks, &id, &name, &record).doing(what)?;
        self.db.apply(batch, Durability::Synced).await.doing(what)?;
        self.enter(record.clone())?;
        self.publish("create", &record, &[]);
        Ok(json!({ "Id": id, "Warning": "" }))
    }

    /// The subnets of a new network, as far as the request leaves them open.
    fn addressing(&self, ipam: &IpamRequest, enable_ipv6: Option<bool>) -> Result<Addressing> {
        if let Some(driver) = ipam.driver.as_deref().filter(|driver| !matches!(*driver, "" | "default")) {
            return Err(Error::not_found(format!("could not find plugin {driver} in v1 plugin registry")));
        }
        let given = Given::read(ipam)?;
        if given.ipv6.is_some() && enable_ipv6 == Some(false) {
            return Err(Error::invalid(
                "invalid network config: an IPv6 subnet is given, but IPv6 is not enabled for the network",
            ));
        }
        // IPv6 comes with every network, unless it is not wanted or the host has none. Who says which addresses a
        // network has, gets those alone: clients compare what they find with what they asked for.
        let by_default = || given.ipv4.is_none() && self.plumbing.has_ipv6();
        let ipv6 = given.ipv6.is_some() || enable_ipv6.unwrap_or_else(by_default);
        for subnet in given.subnets() {
            let overlapping = lock(&self.index).records.values().any(|record| {
                record.bridge.as_ref().is_some_and(|bridge| {
                    let known =
                        std::iter::once(IpNet::V4(bridge.subnet)).chain(bridge.subnet6.map(IpNet::V6));
                    known.into_iter().any(|other| brigantine_network::subnet::overlap(&other, &subnet))
                })
            });
            if overlapping {
                return Err(Error::forbidden("Pool overlaps with other one on this address space"));
            }
        }
        let mut plan = if let Some(plan) = given.ipv4 {
            plan
        } else {
            let subnet = self.free_subnet()?;
            Addressing::new(subnet, first_host(subnet))
        };
        if let Some(six) = given.ipv6 {
            (plan.subnet6, plan.range6, plan.reserved6) =
                (Some((six.subnet, six.gateway)), six.range, six.reserved);
        } else if ipv6 {
            let subnet = self.free_subnet6()?;
            plan.subnet6 = Some((subnet, first_host6(subnet)));
        }
        Ok(plan)
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
        self.publish("destroy", record, &[]);
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

    /// Takes addresses of a network, given ones or the next, one of each family that it has.
    pub(crate) fn take_addresses(&self, id: &str, wanted: &Wanted) -> Result<Vec<IpNet>> {
        let mut index = lock(&self.index);
        let Some(pools) = index.addresses.get_mut(id) else {
            return Err(Error::not_found(format!("network {id} not found")));
        };
        let ipv4 = take(&mut pools.ipv4, wanted.ipv4.map(IpAddr::V4))?;
        let ipv6 = match (&mut pools.ipv6, wanted.ipv6) {
            (Some(pool), wanted) => match take(pool, wanted.map(IpAddr::V6)) {
                Ok(net) => Some(net),
                Err(error) => {
                    pools.ipv4.release(ipv4.addr());
                    return Err(error);
                }
            },
            (None, Some(address)) => {
                pools.ipv4.release(ipv4.addr());
                return Err(Error::invalid(format!(
                    "invalid endpoint settings: no configured subnet contains IP address {address}"
                )));
            }
            (None, None) => None,
        };
        Ok(std::iter::once(ipv4).chain(ipv6).collect())
    }

    pub(crate) fn give_address_back(&self, id: &str, address: IpAddr) {
        if let Some(pools) = lock(&self.index).addresses.get_mut(id) {
            let pool = if address.is_ipv4() { Some(&mut pools.ipv4) } else { pools.ipv6.as_mut() };
            if let Some(pool) = pool {
                pool.release(address);
            }
        }
    }

    pub(crate) fn publish(&self, action: &str, network: &Record, more: &[(&str, &str)]) {
        let mut attributes = BTreeMap::from([
            ("name".to_owned(), network.name.clone()),
            ("type".to_owned(), network.driver.as_str().to_owned()),
        ]);
        for (key, value) in more {
            attributes.insert((*key).to_owned(), (*value).to_owned());
        }
        self.events.publish_of(network.project(), Kind::Network, action, network.id.clone(), attributes);
    }
}

/// docker's document of a network; `containers` is its `Containers`.
pub(crate) fn document(record: &Record, containers: Value) -> Value {
    let mut config = Vec::new();
    if let Some(bridge) = &record.bridge {
        let ranges = [record.ip_range.map(IpNet::V4), record.ip_range6.map(IpNet::V6)];
        let reserved = [json!(record.reserved), json!(record.reserved6)];
        let subnets = [
            Some((IpNet::V4(bridge.subnet), IpAddr::V4(bridge.gateway))),
            bridge.subnet6.zip(bridge.gateway6).map(|(net, gateway)| (IpNet::V6(net), IpAddr::V6(gateway))),
        ];
        for ((subnet, range), reserved) in subnets.into_iter().zip(ranges).zip(reserved) {
            let Some((subnet, gateway)) = subnet else { continue };
            let mut entry = json!({ "Subnet": subnet.to_string(), "Gateway": gateway.to_string() });
            if let Some(range) = range {
                entry["IPRange"] = range.to_string().into();
            }
            if reserved.as_object().is_some_and(|reserved| !reserved.is_empty()) {
                entry["AuxiliaryAddresses"] = reserved;
            }
            config.push(entry);
        }
    }
    let ipam_options = if record.ipam_options.is_empty() { Value::Null } else { json!(record.ipam_options) };
    json!({
        "Name": record.name,
        "Id": record.id,
        "Created": crate::clock::rfc3339_nano(record.created),
        "Scope": "local",
        "Driver": record.driver.as_str(),
        "EnableIPv4": true,
        "EnableIPv6": !record.ipv6_by_default
            && record.bridge.as_ref().is_some_and(|bridge| bridge.subnet6.is_some()),
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

fn take(pool: &mut Ipam, wanted: Option<IpAddr>) -> Result<IpNet> {
    let length = pool.subnet().prefix_len();
    let address = match wanted {
        Some(address) => match pool.reserve(address) {
            Ok(()) => address,
            Err(IpamError::InUse(_)) => return Err(Error::forbidden("Address already in use")),
            Err(IpamError::OutOfSubnet { .. }) => {
                return Err(Error::invalid(format!(
                    "invalid endpoint settings: no configured subnet contains IP address {address}"
                )));
            }
            Err(error) => return Err(Error::invalid(format!("invalid address {address}")).because(error)),
        },
        None => pool.allocate().map_err(|error| {
            let family = if pool.subnet().addr().is_ipv4() { 4 } else { 6 };
            Error::internal(format!("no available IPv{family} addresses on this network's address pools"))
                .because(error)
        })?,
    };
    IpNet::new(address, length).doing(|| format!("address {address}"))
}

fn first_host(subnet: Ipv4Net) -> Ipv4Addr {
    subnet.hosts().next().unwrap_or_else(|| subnet.addr())
}

fn first_host6(subnet: Ipv6Net) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(subnet.network()) + 1)
}

fn addresses(bridge: &BridgeSpec, record: &Record) -> Result<Pools> {
    let wrong = |error| Error::invalid(format!("addresses of network {}", record.name)).because(error);
    let reserved = std::iter::once(bridge.gateway).chain(record.reserved.values().copied()).map(IpAddr::V4);
    let ipv4 =
        Ipam::new(IpNet::V4(bridge.subnet), record.ip_range.map(IpNet::V4), reserved).map_err(wrong)?;
    let ipv6 = match bridge.subnet6 {
        Some(subnet) => {
            let reserved =
                bridge.gateway6.into_iter().chain(record.reserved6.values().copied()).map(IpAddr::V6);
            Some(Ipam::new(IpNet::V6(subnet), record.ip_range6.map(IpNet::V6), reserved).map_err(wrong)?)
        }
        None => None,
    };
    Ok(Pools { ipv4, ipv6 })
}
