//! Networks: their records, their addresses, and the plumbing that the network crate does for them.
//!
//! `bridge`, `host` and `none` always exist. Who is on a network is derived from the containers' records; which
//! addresses are taken is known here.

mod cni;
mod create;
mod drivers;
mod options;
mod plumbing;
mod pools;
mod predefined;
mod record;
mod subnets;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex};

use brigantine_network::helper::SharedNetwork;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub(crate) use options::Wanted;
pub(crate) use plumbing::{Carriers, Judges, Placed, Plumbing};
use pools::Pools;
pub(crate) use record::{Driver, Record, Template, document};

use crate::config::Config;
use crate::db::{Batch, Db, Durability, Snapshot, Table};
use crate::error::Context;
use crate::events::{Events, Kind};
use crate::sync::lock;
use crate::{Error, Filters, Result};

const VERSION: u32 = 1;

#[derive(Debug, Default)]
struct Index {
    records: BTreeMap<String, Record>,
    addresses: HashMap<String, Pools>,
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

    /// Tells the helper which networks have other hosts whose containers' names are wanted. What fails is logged: the
    /// networks work without.
    pub(crate) fn share_names(&self) {
        let networks: Vec<SharedNetwork> = {
            let index = lock(&self.index);
            let of_tunnel = |record: &Record| {
                let bridge = record.bridge.as_ref().filter(|bridge| bridge.tunnel.is_some())?;
                let tunnel = self.plumbing.tunnel(&bridge.name)?;
                Some(SharedNetwork {
                    network: record.id.clone(),
                    network_name: record.name.clone(),
                    vni: tunnel.vni,
                    local: tunnel.local?,
                    port: tunnel.port,
                    peers: tunnel.peers,
                    subnets: bridge.layout().subnets(),
                })
            };
            index.records.values().filter_map(of_tunnel).collect()
        };
        if let Err(error) = self.plumbing.share(networks) {
            tracing::warn!(error = error.report(), "share names with the other hosts of overlay networks");
        }
    }

    /// What the firewall is made with, as docker calls it; `None` if there is none.
    pub fn firewall_backend(&self) -> Option<&'static str> {
        self.plumbing.firewall_backend().map(|backend| match backend {
            brigantine_network::FirewallBackend::Iptables => "iptables",
            _ => "nftables",
        })
    }

    pub(crate) fn plumbing(&self) -> Arc<Plumbing> {
        Arc::clone(&self.plumbing)
    }

    /// Everything that networks need on the host, for the start of the engine.
    pub(crate) fn carriers(&self) -> Carriers {
        let index = lock(&self.index);
        Carriers {
            bridges: index.records.values().filter_map(|record| record.bridge.clone()).collect(),
            parents: index.records.values().filter_map(|record| record.parent.clone()).collect(),
            foreign: index
                .records
                .values()
                .filter_map(|record| Some((record.id.clone(), record.foreign.clone()?)))
                .collect(),
        }
    }

    fn enter(&self, record: Record) -> Result<()> {
        let mut index = lock(&self.index);
        if let Some(pools) = Pools::of(&record)? {
            index.addresses.insert(record.id.clone(), pools);
        }
        index.records.insert(record.id.clone(), record);
        Ok(())
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
        if record.template.is_some()
            && lock(&self.index).records.values().any(|other| other.config_from == record.name)
        {
            return Err(Error::forbidden(format!("configuration network {:?} is in use", record.name)));
        }
        self.db
            .apply(Batch::new().delete(Table::Networks, &record.id), Durability::Synced)
            .await
            .doing(|| format!("remove network {}", record.name))?;
        {
            let mut index = lock(&self.index);
            index.records.remove(&record.id);
            index.addresses.remove(&record.id);
        }
        if let Some(name) = record.segment() {
            let (plumbing, name) = (self.plumbing(), name.to_owned());
            let (is_bridge, is_foreign) = (record.bridge.is_some(), record.foreign.is_some());
            crate::blocking(move || match (is_bridge, is_foreign) {
                (true, _) => plumbing.remove_bridge(&name),
                (false, true) => plumbing.remove_foreign(&name),
                (false, false) => plumbing.remove_parent(&name),
            })
            .await?;
        }
        if record.driver == Driver::Overlay {
            self.share_names();
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
        pools.take(wanted)
    }

    pub(crate) fn give_address_back(&self, id: &str, address: IpAddr) {
        if let Some(pools) = lock(&self.index).addresses.get_mut(id) {
            pools.release(address);
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

pub(super) fn first_host(subnet: Ipv4Net) -> Ipv4Addr {
    subnet.hosts().next().unwrap_or_else(|| subnet.addr())
}

pub(super) fn first_host6(subnet: Ipv6Net) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(subnet.network()) + 1)
}
