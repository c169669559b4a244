//! Making a network: what a request asks for, checked, made on the host, stored.

use std::collections::BTreeMap;

use bollard_stubs::models::{Ipam as IpamRequest, NetworkCreateRequest};
use brigantine_network::{BridgeSpec, SubinterfaceSpec};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::options::Addressing;
use super::subnets::Families;
use super::{Driver, Networks, Record, Template, VERSION, drivers, options};
use crate::db::{Batch, Durability, Table};
use crate::error::Context;
use crate::ids::new_id;
use crate::sync::lock;
use crate::{Error, Result};

/// What carries a new network on the host.
enum Carrier {
    Bridge(BridgeSpec),
    Parent(SubinterfaceSpec),
}

impl Networks {
    pub async fn create(&self, request: NetworkCreateRequest) -> Result<Value> {
        let name = request.name.clone();
        if name.trim().is_empty() || name.contains('/') {
            return Err(Error::invalid(format!("invalid network name: {name:?}")));
        }
        if matches!(name.as_str(), "bridge" | "host" | "none" | "default") {
            return Err(Error::forbidden(format!(
                "operation is not permitted on predefined {name} network "
            )));
        }
        let _changing = self.changing.lock().await;
        if lock(&self.index).records.values().any(|record| record.name == name) {
            return Err(Error::conflict(format!("network with name {name} already exists")));
        }
        let record = if request.config_only == Some(true) {
            template(request)?
        } else {
            let request = self.with_template(request)?;
            self.make(request).await?
        };
        let what = || format!("store network {name}");
        let batch = Batch::new().put(Table::Networks, &record.id, &name, &record).doing(what)?;
        self.db.apply(batch, Durability::Synced).await.doing(what)?;
        let id = record.id.clone();
        self.enter(record.clone())?;
        if record.driver == Driver::Overlay {
            self.share_names();
        }
        self.publish("create", &record, &[]);
        let warning = match record.foreign {
            Some(list) => {
                let plumbing = self.plumbing();
                crate::blocking(move || Ok(plumbing.foreign_warning(&list))).await?.unwrap_or_default()
            }
            None => String::new(),
        };
        Ok(json!({ "Id": id, "Warning": warning }))
    }

    /// A request that names a configuration-only network, with what that says.
    fn with_template(&self, mut request: NetworkCreateRequest) -> Result<NetworkCreateRequest> {
        let from = request.config_from.as_ref().and_then(|from| from.network.clone()).unwrap_or_default();
        if from.is_empty() {
            return Ok(request);
        }
        let record = self.find(&from)?;
        let Some(template) = record.template else {
            return Err(Error::forbidden(format!("{from} is not a configuration network")));
        };
        let ipam = request.ipam.as_ref();
        let is_configured = request.options.as_ref().is_some_and(|options| !options.is_empty())
            || request.labels.as_ref().is_some_and(|labels| !labels.is_empty())
            || request.enable_ipv4 == Some(false)
            || request.enable_ipv6 == Some(true)
            || ipam.is_some_and(|ipam| {
                ipam.driver.as_deref().is_some_and(|driver| !matches!(driver, "" | "default"))
                    || ipam.config.as_ref().is_some_and(|config| !config.is_empty())
                    || ipam.options.as_ref().is_some_and(|options| !options.is_empty())
            });
        if is_configured {
            return Err(Error::forbidden(
                "user specified configurations are not supported if the network depends on a configuration network",
            ));
        }
        request.ipam = Some(template.ipam);
        request.options = Some(record.options.into_iter().collect());
        request.labels = Some(record.labels.into_iter().collect());
        (request.enable_ipv4, request.enable_ipv6) = (template.ipv4, template.ipv6);
        request.config_from = Some(bollard_stubs::models::ConfigReference { network: Some(record.name) });
        Ok(request)
    }

    async fn make(&self, request: NetworkCreateRequest) -> Result<Record> {
        let driver = match request.driver.as_deref() {
            None | Some("" | "bridge" | "default") => Driver::Bridge,
            Some("macvlan") => Driver::Macvlan,
            Some("ipvlan") => Driver::Ipvlan,
            Some("overlay") => Driver::Overlay,
            Some("cni") => return self.make_foreign(request).await,
            Some(driver @ ("host" | "null")) => {
                return Err(Error::forbidden(format!(
                    "only one instance of \"{driver}\" network is allowed"
                )));
            }
            Some(other) => return Err(Error::not_found(format!("plugin \"{other}\" not found"))),
        };
        let ipam = request.ipam.unwrap_or_default();
        let id = new_id();
        let mut options: BTreeMap<String, String> = request.options.unwrap_or_default().into_iter().collect();
        if let Some(defaults) =
            self.config.network_options.get(driver.as_str()).filter(|_| request.config_from.is_none())
        {
            for (name, value) in defaults {
                options.entry(name.clone()).or_insert_with(|| value.clone());
            }
        }
        let internal = request.internal.unwrap_or_default();
        let has_ipv6_subnet =
            ipam.config.iter().flatten().any(|one| one.subnet.as_deref().is_some_and(|s| s.contains(':')));
        let families = Families { ipv4: request.enable_ipv4, ipv6: request.enable_ipv6 };
        let plan = self.addressing(driver, &ipam, families)?;
        let carrier = carrier(driver, &request.name, &id, internal, &options, &plan)?;
        let (bridge, parent) = match carrier {
            Carrier::Bridge(bridge) => (Some(bridge), None),
            Carrier::Parent(parent) => (None, Some(parent)),
        };
        let (range, reserved) = plan.ipv4.map(|family| (family.range, family.reserved)).unwrap_or_default();
        let (range6, reserved6) = plan.ipv6.map(|family| (family.range, family.reserved)).unwrap_or_default();
        let record = Record {
            version: VERSION,
            id,
            name: request.name,
            driver,
            created: Timestamp::now(),
            internal,
            attachable: request.attachable.unwrap_or_default(),
            options,
            labels: request.labels.unwrap_or_default().into_iter().collect(),
            ipam_options: ipam.options.unwrap_or_default().into_iter().collect(),
            ip_range: range,
            reserved,
            ip_range6: range6,
            reserved6,
            ipv6_by_default: request.enable_ipv6.is_none() && !has_ipv6_subnet,
            bridge,
            parent,
            foreign: None,
            template: None,
            config_from: request.config_from.and_then(|from| from.network).unwrap_or_default(),
        };
        super::pools::Pools::of(&record)?;
        let (plumbing, bridge, parent) = (self.plumbing(), record.bridge.clone(), record.parent.clone());
        crate::blocking(move || {
            bridge.map_or(Ok(()), |bridge| plumbing.ensure_bridge(&bridge))?;
            parent.map_or(Ok(()), |parent| plumbing.ensure_parent(&parent))
        })
        .await?;
        Ok(record)
    }
}

fn carrier(
    driver: Driver,
    name: &str,
    id: &str,
    internal: bool,
    options: &BTreeMap<String, String>,
    plan: &Addressing,
) -> Result<Carrier> {
    Ok(match driver {
        Driver::Macvlan => Carrier::Parent(drivers::macvlan(id, internal, options, plan)?),
        Driver::Ipvlan => Carrier::Parent(drivers::ipvlan(id, internal, options, plan)?),
        Driver::Overlay => Carrier::Bridge(drivers::overlay(name, id, internal, options, plan)?),
        Driver::Bridge | Driver::Cni | Driver::Host | Driver::Null => {
            Carrier::Bridge(options::bridge(id, internal, options, plan)?)
        }
    })
}

/// A configuration-only network: kept as it was asked for, and checked as far as that goes without a host.
fn template(request: NetworkCreateRequest) -> Result<Record> {
    if request.internal == Some(true)
        || request.attachable == Some(true)
        || request.ingress == Some(true)
        || request.scope.as_deref().is_some_and(|scope| !scope.is_empty())
    {
        return Err(Error::forbidden(
            "configuration network can only contain network specific fields. Network operator fields like [ ingress | internal | attachable | scope ] are not supported.",
        ));
    }
    if request.config_from.is_some_and(|from| from.network.is_some_and(|network| !network.is_empty())) {
        return Err(Error::forbidden(
            "a configuration network cannot depend on another configuration network",
        ));
    }
    let ipam: IpamRequest = request.ipam.unwrap_or_default();
    Addressing::read(&ipam)?;
    Ok(Record {
        version: VERSION,
        id: new_id(),
        name: request.name,
        driver: Driver::Null,
        created: Timestamp::now(),
        internal: false,
        attachable: false,
        options: request.options.unwrap_or_default().into_iter().collect(),
        labels: request.labels.unwrap_or_default().into_iter().collect(),
        ipam_options: ipam.options.clone().unwrap_or_default().into_iter().collect(),
        ip_range: None,
        reserved: BTreeMap::new(),
        ip_range6: None,
        reserved6: BTreeMap::new(),
        ipv6_by_default: false,
        bridge: None,
        parent: None,
        foreign: None,
        template: Some(Template { ipam, ipv4: request.enable_ipv4, ipv6: request.enable_ipv6 }),
        config_from: String::new(),
    })
}
