//! The networks that always exist, `bridge`, `host` and `none`; `bridge` is as the daemon's flags say now.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use brigantine_network::BridgeSpec;
use ipnet::IpNet;
use jiff::Timestamp;

use super::record::{DEFAULT_GATEWAY, DEFAULT_GATEWAY6};
use super::{Driver, Networks, Record, VERSION, first_host, first_host6};
use crate::db::{Batch, Durability, Table};
use crate::error::Context;
use crate::ids::new_id;
use crate::sync::lock;
use crate::{Error, Result};

/// Reserved addresses of both families.
type Routers = (BTreeMap<String, Ipv4Addr>, BTreeMap<String, Ipv6Addr>);

impl Networks {
    /// Makes `bridge`, `host` and `none` if they are not there, and gives `bridge` what the flags say now.
    pub(super) async fn predefined(&self) -> Result<()> {
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
            let (reserved, reserved6) =
                bridge.as_ref().map_or(Ok(Default::default()), |it| self.routers(it))?;
            let is_same = |found: &Record| {
                found.bridge == bridge
                    && found.ip_range == range
                    && found.reserved == reserved
                    && found.reserved6 == reserved6
            };
            if found.as_ref().is_some_and(is_same) {
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
                ip_range: range,
                reserved,
                ip_range6: None,
                reserved6,
                ipv6_by_default: false,
                bridge,
                parent: None,
                foreign: None,
                template: None,
                config_from: String::new(),
            };
            batch = batch
                .put(Table::Networks, &record.id, name, &record)
                .doing(|| format!("store network {name}"))?;
            self.enter(record)?;
        }
        self.db.apply(batch, Durability::Written).await.doing(|| "store the predefined networks".to_owned())
    }

    /// The routers that containers of the default bridge use instead of it, which nobody else may have.
    fn routers(&self, bridge: &BridgeSpec) -> Result<Routers> {
        let outside = |flag: &str, router: IpAddr| {
            Error::invalid(format!("--{flag} {router} is not an address of the default bridge's subnet"))
        };
        let mut routers = Routers::default();
        if let Some(router) = self.config.default_gateway {
            if !bridge.subnet.is_some_and(|subnet| subnet.contains(&router)) {
                return Err(outside("default-gateway", router.into()));
            }
            routers.0.extend(
                [(DEFAULT_GATEWAY.to_owned(), router)].into_iter().filter(|_| bridge.gateway != Some(router)),
            );
        }
        if let Some(router) = self.config.default_gateway_v6 {
            if !bridge.subnet6.is_some_and(|subnet| subnet.contains(&router)) {
                return Err(outside("default-gateway-v6", router.into()));
            }
            routers.1.extend(
                [(DEFAULT_GATEWAY6.to_owned(), router)]
                    .into_iter()
                    .filter(|_| bridge.gateway6 != Some(router)),
            );
        }
        Ok(routers)
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
        let known = found.and_then(|found| found.bridge.as_ref()?.subnet.zip(found.bridge.as_ref()?.gateway));
        let (subnet, gateway) = match (self.config.bip, known) {
            (Some(IpNet::V4(net)), _) => (net.trunc(), net.addr()),
            (Some(IpNet::V6(_)), _) => return Err(Error::invalid("--bip must be an IPv4 address")),
            (None, Some(known)) => known,
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
            && !subnet.contains(&range)
        {
            return Err(Error::invalid(format!(
                "--fixed-cidr {range} is not within the default bridge's subnet {subnet}"
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
}
