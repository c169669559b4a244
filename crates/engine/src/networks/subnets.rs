//! Choosing the subnets of new networks, as far as a request leaves them open.

use bollard_stubs::models::Ipam as IpamRequest;
use brigantine_network::subnet::{DEFAULT_POOLS, Pool, choose, overlap, unique_local};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::options::{Addressing, Family};
use super::{Driver, Networks};
use crate::sync::lock;
use crate::{Error, Result};

/// Which families a request asks for; `None` where it does not say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Families {
    pub ipv4: Option<bool>,
    pub ipv6: Option<bool>,
}

impl Networks {
    /// A unique local /64 that nothing else has (RFC 4193).
    pub(super) fn free_subnet6(&self) -> Result<Ipv6Net> {
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
            if !taken.iter().any(|other| overlap(other, &IpNet::V6(subnet))) {
                return Ok(subnet);
            }
        }
        Err(Error::internal("no unique local subnet is free"))
    }

    /// What a new subnet must not overlap with: those of other networks and whatever the host has a route to.
    fn taken(&self) -> Vec<IpNet> {
        let mut taken: Vec<IpNet> = {
            let index = lock(&self.index);
            let layouts = index.records.values().filter_map(super::Record::layout);
            layouts.flat_map(|layout| layout.subnets()).collect()
        };
        taken.extend(self.plumbing.host_routes());
        taken
    }

    pub(super) fn free_subnet(&self) -> Result<Ipv4Net> {
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

    /// The subnets of a new network. Gateways that nobody named are still open.
    pub(super) fn addressing(
        &self,
        driver: Driver,
        ipam: &IpamRequest,
        families: Families,
    ) -> Result<Addressing> {
        if let Some(driver) = ipam.driver.as_deref().filter(|driver| !matches!(*driver, "" | "default")) {
            return Err(Error::not_found(format!("could not find plugin {driver} in v1 plugin registry")));
        }
        let mut plan = Addressing::read(ipam)?;
        for (is_given, enabled, family) in
            [(plan.ipv4.is_some(), families.ipv4, "IPv4"), (plan.ipv6.is_some(), families.ipv6, "IPv6")]
        {
            if is_given && enabled == Some(false) {
                return Err(Error::invalid(format!(
                    "invalid network config: an {family} subnet is given, but {family} is not enabled for the network"
                )));
            }
        }
        for subnet in plan.subnets() {
            let overlapping = lock(&self.index)
                .records
                .values()
                .flat_map(|record| record.layout().into_iter().flat_map(|layout| layout.subnets()))
                .any(|other| overlap(&other, &subnet));
            if overlapping {
                return Err(Error::forbidden("Pool overlaps with other one on this address space"));
            }
        }
        // IPv6 comes with every bridge, unless it is not wanted or the host has none. Who says which addresses a
        // network has, gets those alone: clients compare what they find with what they asked for.
        let by_default = || driver == Driver::Bridge && plan.ipv4.is_none() && self.plumbing.has_ipv6();
        let ipv6 = plan.ipv6.is_some() || families.ipv6.unwrap_or_else(by_default);
        let ipv4 = plan.ipv4.is_some() || families.ipv4 != Some(false);
        if !ipv4 && !ipv6 {
            return Err(Error::invalid("IPv4 or IPv6 must be enabled"));
        }
        if ipv4 && plan.ipv4.is_none() {
            plan.ipv4 = Some(Family::new(self.free_subnet()?));
        }
        if ipv6 && plan.ipv6.is_none() {
            plan.ipv6 = Some(Family::new(self.free_subnet6()?));
        }
        Ok(plan)
    }
}
