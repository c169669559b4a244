//! Addresses of one subnet. Invariant: an address is handed out at most once until it is released; network,
//! broadcast and reserved addresses never are. Pure: no clock, no kernel, the value is its own record.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Why no address could be given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    #[error("no available IPv{} addresses on this network's address pool {subnet}", if subnet.addr().is_ipv4() { 4 } else { 6 })]
    Exhausted { subnet: IpNet },
    #[error("Address already in use: {0}")]
    InUse(IpAddr),
    #[error("invalid address: {address} does not belong to the subnet {subnet}")]
    OutOfSubnet { address: IpAddr, subnet: IpNet },
    #[error("invalid range: {range} is not within the subnet {subnet}")]
    OutOfRange { range: IpNet, subnet: IpNet },
}

/// The allocator of a subnet: next free address after the last one given, wrapping around at the end, so
/// that an address rests as long as possible before another container gets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipam {
    subnet: IpNet,
    /// Where automatic allocation takes from; the whole subnet if `None`.
    range: Option<IpNet>,
    used: BTreeSet<IpAddr>,
    last: Option<IpAddr>,
}

impl Ipam {
    /// `reserved` are addresses never handed out, such as the gateway's.
    pub fn new(
        subnet: IpNet,
        range: Option<IpNet>,
        reserved: impl IntoIterator<Item = IpAddr>,
    ) -> Result<Self, IpamError> {
        let subnet = subnet.trunc();
        if let Some(range) = range
            && !subnet.contains(&range.trunc())
        {
            return Err(IpamError::OutOfRange { range, subnet });
        }
        let mut ipam =
            Self { subnet, range: range.map(|range| range.trunc()), used: BTreeSet::new(), last: None };
        for address in reserved {
            ipam.reserve(address)?;
        }
        Ok(ipam)
    }

    pub fn subnet(&self) -> IpNet {
        self.subnet
    }

    /// Hands out the next free address.
    pub fn allocate(&mut self) -> Result<IpAddr, IpamError> {
        let (first, last) = self.bounds();
        if first > last {
            return Err(IpamError::Exhausted { subnet: self.subnet });
        }
        let after = self.last.map(number).filter(|last_given| (first..last).contains(last_given));
        let start = after.map_or(first, |given| given + 1);
        let found = self.first_free(start, last).or_else(|| self.first_free(first, start.saturating_sub(1)));
        let address = self.address(found.ok_or(IpamError::Exhausted { subnet: self.subnet })?);
        self.used.insert(address);
        self.last = Some(address);
        Ok(address)
    }

    /// Takes a given address.
    pub fn reserve(&mut self, address: IpAddr) -> Result<(), IpamError> {
        let is_edge = match self.subnet {
            IpNet::V4(net) if net.prefix_len() < 31 => {
                address == IpAddr::V4(net.network()) || address == IpAddr::V4(net.broadcast())
            }
            IpNet::V4(_) | IpNet::V6(_) => false,
        };
        if !self.subnet.contains(&address) || is_edge {
            return Err(IpamError::OutOfSubnet { address, subnet: self.subnet });
        }
        if self.used.insert(address) { Ok(()) } else { Err(IpamError::InUse(address)) }
    }

    /// Gives an address back; whether it was in use.
    pub fn release(&mut self, address: IpAddr) -> bool {
        self.used.remove(&address)
    }

    pub fn is_used(&self, address: IpAddr) -> bool {
        self.used.contains(&address)
    }

    /// First and last address for hosts in the range.
    fn bounds(&self) -> (u128, u128) {
        let range = self.range.unwrap_or(self.subnet);
        let (mut first, mut last) = (number(range.network()), number(range.broadcast()));
        let (net_first, net_last) = (number(self.subnet.network()), number(self.subnet.broadcast()));
        match self.subnet {
            IpNet::V4(net) if net.prefix_len() < 31 => {
                first = first.max(net_first + 1);
                last = last.min(net_last - 1);
            }
            IpNet::V4(_) => {}
            // The all-zero host part is the subnet's router anycast address.
            IpNet::V6(net) if net.prefix_len() < 127 => first = first.max(net_first + 1),
            IpNet::V6(_) => {}
        }
        (first, last)
    }

    /// Walks the used addresses, not the subnet: the cost grows with a run of used ones only.
    fn first_free(&self, from: u128, to: u128) -> Option<u128> {
        if from > to {
            return None;
        }
        let mut candidate = from;
        for used in self.used.range(self.address(from)..=self.address(to)) {
            if number(*used) > candidate {
                break;
            }
            candidate += 1;
        }
        (candidate <= to).then_some(candidate)
    }

    fn address(&self, number: u128) -> IpAddr {
        match self.subnet {
            IpNet::V4(_) => Ipv4Addr::from(number as u32).into(),
            IpNet::V6(_) => Ipv6Addr::from(number).into(),
        }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn ipam(subnet: &str, gateway: &str) -> Ipam {
        Ipam::new(subnet.parse().unwrap(), None, [ip(gateway)]).unwrap()
    }

    #[test]
    fn hands_out_addresses_in_sequence_and_wraps_around() {
        let mut pool = ipam("10.0.0.0/29", "10.0.0.1");
        let given: Vec<_> = (0..5).map(|_| pool.allocate().unwrap().to_string()).collect();
        assert_eq!(given, ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
        assert_eq!(pool.allocate(), Err(IpamError::Exhausted { subnet: "10.0.0.0/29".parse().unwrap() }));
        assert!(pool.release(ip("10.0.0.3")));
        assert!(!pool.release(ip("10.0.0.3")));
        assert_eq!(pool.allocate(), Ok(ip("10.0.0.3")));
        pool.release(ip("10.0.0.2"));
        pool.release(ip("10.0.0.5"));
        assert_eq!(pool.allocate(), Ok(ip("10.0.0.5")), "goes on after the last one given");
        assert_eq!(pool.allocate(), Ok(ip("10.0.0.2")));
    }

    #[test]
    fn refuses_what_is_taken_or_foreign() {
        let mut pool = ipam("10.0.0.0/24", "10.0.0.1");
        pool.reserve(ip("10.0.0.7")).unwrap();
        assert_eq!(pool.reserve(ip("10.0.0.7")), Err(IpamError::InUse(ip("10.0.0.7"))));
        for foreign in ["10.0.1.1", "10.0.0.0", "10.0.0.255", "fd00::1"] {
            assert!(matches!(pool.reserve(ip(foreign)), Err(IpamError::OutOfSubnet { .. })), "{foreign}");
        }
    }

    #[test]
    fn keeps_to_a_range_and_to_ipv6() {
        let range = Some("10.0.0.128/30".parse().unwrap());
        let mut pool = Ipam::new("10.0.0.0/24".parse().unwrap(), range, [ip("10.0.0.1")]).unwrap();
        let given: Vec<_> = (0..4).map(|_| pool.allocate().unwrap().to_string()).collect();
        assert_eq!(given, ["10.0.0.128", "10.0.0.129", "10.0.0.130", "10.0.0.131"]);
        assert!(pool.allocate().is_err());
        assert!(Ipam::new("10.0.0.0/24".parse().unwrap(), Some("10.0.0.0/16".parse().unwrap()), []).is_err());
        let mut six = ipam("fd00:1::/64", "fd00:1::1");
        assert_eq!(six.allocate(), Ok(ip("fd00:1::2")));
        assert_eq!(six.allocate(), Ok(ip("fd00:1::3")));
    }

    #[test]
    fn survives_being_written_down() {
        let mut pool = ipam("10.0.0.0/24", "10.0.0.1");
        pool.allocate().unwrap();
        let text = serde_json::to_string(&pool).unwrap();
        let mut back: Ipam = serde_json::from_str(&text).unwrap();
        assert_eq!(back, pool);
        assert_eq!(back.allocate(), pool.allocate());
    }

    #[test]
    fn never_gives_an_address_twice_in_a_full_sixteen_bit_subnet() {
        let mut pool = ipam("172.30.0.0/16", "172.30.0.1");
        let mut seen = BTreeSet::new();
        for _ in 0..65533 {
            assert!(seen.insert(pool.allocate().unwrap()));
        }
        assert!(pool.allocate().is_err());
    }
}
