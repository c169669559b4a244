//! Choice of a free subnet from a list of pools. Pure: what is taken (the host's routes, other networks) is
//! given; see [`crate::Fabric::host_routes`].

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// A pool to cut subnets of one size from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    pub base: IpNet,
    /// Prefix length of the subnets.
    pub size: u8,
}

/// The pools used when none are configured: first the one of the default bridge, then what docker also uses,
/// without docker's own default network.
pub const DEFAULT_POOLS: [Pool; 3] = [
    Pool { base: v4([172, 30, 0, 0], 16), size: 16 },
    Pool { base: v4([172, 16, 0, 0], 12), size: 16 },
    Pool { base: v4([192, 168, 0, 0], 16), size: 20 },
];

/// Docker's default bridge; left alone, even if docker is not there yet.
const DOCKER_DEFAULT: IpNet = v4([172, 17, 0, 0], 16);

const fn v4(octets: [u8; 4], prefix: u8) -> IpNet {
    let [a, b, c, d] = octets;
    IpNet::V4(Ipv4Net::new_assert(std::net::Ipv4Addr::new(a, b, c, d), prefix))
}

/// Whether two subnets share an address.
pub fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(&other.network()) || other.contains(&one.network())
}

/// The first subnet of the pools that overlaps with none of `taken`.
pub fn choose(pools: &[Pool], taken: &[IpNet]) -> Option<IpNet> {
    pools.iter().find_map(|pool| {
        let is_free = |subnet: &IpNet| {
            !overlap(subnet, &DOCKER_DEFAULT) && !taken.iter().any(|other| overlap(subnet, other))
        };
        match pool.base {
            IpNet::V4(base) => base.subnets(pool.size).ok()?.map(IpNet::V4).find(is_free),
            IpNet::V6(base) => base.subnets(pool.size).ok()?.map(IpNet::V6).find(is_free),
        }
    })
}

/// A unique local /64 made of 40 bits of `seed` (RFC 4193) and subnet number 0.
pub fn unique_local(seed: [u8; 5]) -> Ipv6Net {
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&seed);
    Ipv6Net::new_assert(octets.into(), 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn takes_the_first_free_subnet_and_avoids_routes() {
        assert_eq!(choose(&DEFAULT_POOLS, &[]), Some(net("172.30.0.0/16")));
        assert_eq!(choose(&DEFAULT_POOLS, &[net("172.30.5.0/24")]), Some(net("172.16.0.0/16")));
        let taken = [net("172.30.0.0/16"), net("172.16.0.0/16")];
        assert_eq!(choose(&DEFAULT_POOLS, &taken), Some(net("172.18.0.0/16")), "docker's own is left alone");
        assert_eq!(choose(&DEFAULT_POOLS, &[net("172.16.0.0/12")]), Some(net("192.168.0.0/20")));
        assert_eq!(choose(&DEFAULT_POOLS, &[net("0.0.0.0/0")]), None);
    }

    #[test]
    fn overlap_is_symmetric_and_keeps_families_apart() {
        assert!(overlap(&net("10.0.0.0/8"), &net("10.1.0.0/16")));
        assert!(overlap(&net("10.1.0.0/16"), &net("10.0.0.0/8")));
        assert!(!overlap(&net("10.0.0.0/16"), &net("10.1.0.0/16")));
        assert!(!overlap(&net("::/0"), &net("10.1.0.0/16")));
    }

    #[test]
    fn a_pool_smaller_than_its_subnets_yields_nothing() {
        assert_eq!(choose(&[Pool { base: net("10.0.0.0/24"), size: 16 }], &[]), None);
    }
}
