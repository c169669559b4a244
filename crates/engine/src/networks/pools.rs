//! The addresses of one network: which are taken, and taking them.

use std::net::IpAddr;

use brigantine_network::{Ipam, IpamError};
use ipnet::IpNet;

use super::{Record, Wanted};
use crate::error::Context;
use crate::{Error, Result};

/// A pool for each family that the network has.
#[derive(Debug)]
pub(super) struct Pools {
    ipv4: Option<Ipam>,
    ipv6: Option<Ipam>,
}

impl Pools {
    /// Those of a network, if containers have addresses on it.
    pub(super) fn of(record: &Record) -> Result<Option<Self>> {
        let Some(layout) = record.layout() else { return Ok(None) };
        let wrong = |error| Error::invalid(format!("addresses of network {}", record.name)).because(error);
        let gateways: Vec<IpAddr> = layout.gateways().filter(|gateway| !gateway.is_unspecified()).collect();
        let of = |is_ipv4: bool| gateways.iter().copied().filter(move |ip| ip.is_ipv4() == is_ipv4);
        let reserved4 = of(true).chain(record.reserved.values().copied().map(IpAddr::V4));
        let reserved6 = of(false).chain(record.reserved6.values().copied().map(IpAddr::V6));
        let ipv4 = layout
            .subnet
            .map(|subnet| Ipam::new(IpNet::V4(subnet), record.ip_range.map(IpNet::V4), reserved4));
        let ipv6 = layout
            .subnet6
            .map(|subnet| Ipam::new(IpNet::V6(subnet), record.ip_range6.map(IpNet::V6), reserved6));
        Ok(Some(Self { ipv4: ipv4.transpose().map_err(wrong)?, ipv6: ipv6.transpose().map_err(wrong)? }))
    }

    /// Takes addresses, given ones or the next, one of each family; none if one of them cannot be had.
    pub(super) fn take(&mut self, wanted: &Wanted) -> Result<Vec<IpNet>> {
        let mut taken = Vec::with_capacity(2);
        let took = take_from(self.ipv4.as_mut(), wanted.ipv4.map(IpAddr::V4), &mut taken)
            .and_then(|()| take_from(self.ipv6.as_mut(), wanted.ipv6.map(IpAddr::V6), &mut taken));
        if let Err(error) = took {
            for net in taken {
                self.release(net.addr());
            }
            return Err(error);
        }
        Ok(taken)
    }

    pub(super) fn release(&mut self, address: IpAddr) {
        let pool = if address.is_ipv4() { &mut self.ipv4 } else { &mut self.ipv6 };
        if let Some(pool) = pool {
            pool.release(address);
        }
    }
}

fn take_from(pool: Option<&mut Ipam>, wanted: Option<IpAddr>, taken: &mut Vec<IpNet>) -> Result<()> {
    match (pool, wanted) {
        (Some(pool), wanted) => taken.push(take(pool, wanted)?),
        (None, Some(address)) => {
            return Err(Error::invalid(format!(
                "invalid endpoint settings: no configured subnet contains IP address {address}"
            )));
        }
        (None, None) => {}
    }
    Ok(())
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
