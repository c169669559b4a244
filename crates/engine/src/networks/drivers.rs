//! What a request for a network of the drivers macvlan, ipvlan and overlay describes.

use std::collections::BTreeMap;
use std::net::IpAddr;

use brigantine_network::{
    BridgeSpec, IpvlanFlag, IpvlanMode, MacvlanMode, SubinterfaceKind, SubinterfaceSpec, Tunnel, tunnel,
};

use super::options::{self, Addressing, Options};
use super::plumbing;
use crate::{Error, Result};

/// The other hosts of an overlay network, and what else it needs that docker leaves to Swarm.
const PEERS: &str = "brigantine.overlay.peers";
const LOCAL: &str = "brigantine.overlay.local";
const PORT: &str = "brigantine.overlay.port";
/// As docker's driver calls them.
const VXLAN_IDS: &str = "com.docker.network.driver.overlay.vxlanid_list";
const ENCRYPTED: &str = "encrypted";

pub(super) fn macvlan(
    id: &str,
    internal: bool,
    options: &BTreeMap<String, String>,
    plan: &Addressing,
) -> Result<SubinterfaceSpec> {
    let mode: MacvlanMode = Options(options).choice("macvlan_mode", "bridge, private, vepa or passthru")?;
    subinterface(id, internal, options, plan, SubinterfaceKind::Macvlan(mode))
}

pub(super) fn ipvlan(
    id: &str,
    internal: bool,
    options: &BTreeMap<String, String>,
    plan: &Addressing,
) -> Result<SubinterfaceSpec> {
    let given = Options(options);
    let mode: IpvlanMode = given.choice("ipvlan_mode", "l2, l3 or l3s")?;
    let flag: IpvlanFlag = given.choice("ipvlan_flag", "bridge, private or vepa")?;
    subinterface(id, internal, options, plan, SubinterfaceKind::Ipvlan(mode, flag))
}

fn subinterface(
    id: &str,
    internal: bool,
    options: &BTreeMap<String, String>,
    plan: &Addressing,
    kind: SubinterfaceKind,
) -> Result<SubinterfaceSpec> {
    let given = Options(options);
    let parent = given.text("parent").map(str::to_owned);
    let layout = plan.layout(internal || parent.is_none());
    // Beyond layer 2 there is nobody to ask for the way: everything is reached by the interface itself.
    let is_routed = matches!(kind, SubinterfaceKind::Ipvlan(IpvlanMode::L3 | IpvlanMode::L3s, _));
    let spec = SubinterfaceSpec {
        name: format!("dm-{}", crate::ids::short(id)),
        kind,
        parent,
        subnet: layout.subnet,
        gateway: layout.gateway.map(|gateway| if is_routed { [0; 4].into() } else { gateway }),
        subnet6: layout.subnet6,
        gateway6: layout.gateway6.map(|gateway| if is_routed { [0_u16; 8].into() } else { gateway }),
        mtu: given.mtu()?,
        internal: layout.internal,
    };
    options::check_prefix(given)?;
    spec.validate().map_err(plumbing::refused)?;
    Ok(spec)
}

/// A bridge with a tunnel to others of the same name. Each host gives out addresses of its own range, and has the first
/// of them on its bridge: there is nobody who could tell them apart otherwise.
pub(super) fn overlay(
    name: &str,
    id: &str,
    internal: bool,
    options: &BTreeMap<String, String>,
    plan: &Addressing,
) -> Result<BridgeSpec> {
    let given = Options(options);
    if given.0.contains_key(ENCRYPTED) && given.flag(ENCRYPTED, true)? {
        return Err(Error::not_implemented(
            "encrypted overlay networks are not supported: put them on a link that is, such as WireGuard or IPsec",
        ));
    }
    let mut gateways = BTreeMap::new();
    for (subnet, range, gateway) in [
        plan.ipv4.as_ref().map(|one| {
            (
                one.subnet.to_string(),
                one.range.map(|range| IpAddr::V4(super::first_host(range))),
                one.gateway.map(IpAddr::V4),
            )
        }),
        plan.ipv6.as_ref().map(|one| {
            (
                one.subnet.to_string(),
                one.range.map(|range| IpAddr::V6(super::first_host6(range))),
                one.gateway.map(IpAddr::V6),
            )
        }),
    ]
    .into_iter()
    .flatten()
    {
        let Some(first) = range else {
            return Err(Error::invalid(format!(
                "an overlay network needs --subnet, the same on all hosts, and --ip-range, the part of it that this host gives out and no other does (for {subnet})"
            )));
        };
        let gateway = gateway.unwrap_or(first);
        gateways.insert(gateway.is_ipv4(), gateway);
    }
    let peers = given.text(PEERS).ok_or_else(|| {
        Error::invalid(format!(
            "an overlay network needs the addresses of the other hosts: -o {PEERS}=ADDRESS[,ADDRESS...]"
        ))
    })?;
    let address = |option: &str, text: &str| {
        text.parse::<IpAddr>().map_err(|_bad| {
            Error::invalid(format!("invalid value {text:?} of option {option}: an IP address"))
        })
    };
    let number = |option: &str, most: u32| {
        let text = given.text(option);
        text.map(|text| {
            text.parse::<u32>().ok().filter(|number| (1..=most).contains(number)).ok_or_else(|| {
                Error::invalid(format!(
                    "invalid value {text:?} of option {option}: a number from 1 to {most}"
                ))
            })
        })
        .transpose()
    };
    let tunnel = Tunnel {
        vni: number(VXLAN_IDS, 0x00ff_ffff)?.unwrap_or_else(|| number_of(name)),
        port: number(PORT, 65535)?.map_or(tunnel::DEFAULT_PORT, |port| port as u16),
        local: given.text(LOCAL).map(|text| address(LOCAL, text)).transpose()?,
        peers: peers.split(',').map(|text| address(PEERS, text.trim())).collect::<Result<_>>()?,
    };
    let mut bridge = options::bridge(id, internal, options, plan)?;
    for gateway in gateways.into_values() {
        match gateway {
            IpAddr::V4(gateway) => bridge.gateway = Some(gateway),
            IpAddr::V6(gateway) => bridge.gateway6 = Some(gateway),
        }
    }
    bridge.tunnel = Some(tunnel);
    bridge.validate().map_err(plumbing::refused)?;
    Ok(bridge)
}

/// The same on every host: 24 bits that follow from the name, above those that people choose.
fn number_of(name: &str) -> u32 {
    let hash =
        name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    0x0010_0000 | (hash >> 8 & 0x00ef_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(configs: &[(&str, &str, &str)]) -> Addressing {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let config = configs.iter().map(|(subnet, gateway, range)| bollard_stubs::models::IpamConfig {
            subnet: text(subnet),
            gateway: text(gateway),
            ip_range: text(range),
            auxiliary_addresses: None,
        });
        let ipam = bollard_stubs::models::Ipam { config: Some(config.collect()), ..Default::default() };
        Addressing::read(&ipam).unwrap()
    }

    fn options(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    const ID: &str = "abcdefabcdefabcd";

    #[test]
    fn sub_interfaces_have_a_mode_and_a_parent() {
        let lan = plan(&[("192.0.2.0/24", "", "")]);
        let spec =
            macvlan(ID, false, &options(&[("parent", "eth0.7"), ("macvlan_mode", "vepa")]), &lan).unwrap();
        assert_eq!(spec.kind, SubinterfaceKind::Macvlan(MacvlanMode::Vepa));
        assert_eq!(
            (spec.parent_name(), spec.gateway, spec.internal),
            ("eth0.7", Some([192, 0, 2, 1].into()), false)
        );
        let alone = macvlan(ID, false, &options(&[]), &lan).unwrap();
        assert_eq!((alone.parent_name(), alone.internal), ("dm-abcdefabcdef", true));
        let routed = ipvlan(ID, false, &options(&[("parent", "eth0"), ("ipvlan_mode", "l3")]), &lan).unwrap();
        assert_eq!(routed.gateway, Some([0, 0, 0, 0].into()));
        for bad in [("macvlan_mode", "teleport"), ("parent", "lo"), ("com.docker.network.driver.mtu", "x")] {
            let error = macvlan(ID, false, &options(&[bad]), &lan).unwrap_err();
            assert_eq!(error.class(), crate::Class::InvalidParameter, "{bad:?}: {error}");
        }
        assert!(ipvlan(ID, false, &options(&[("ipvlan_mode", "l4")]), &lan).is_err());
    }

    #[test]
    fn an_overlay_gives_out_its_own_range() {
        let shared = plan(&[("10.9.0.0/16", "", "10.9.2.0/24"), ("fd09::/64", "", "fd09::2:0/112")]);
        let spec = overlay("net", ID, false, &options(&[(PEERS, "192.0.2.1, 192.0.2.3")]), &shared).unwrap();
        assert_eq!(spec.gateway, Some([10, 9, 2, 1].into()));
        assert_eq!(spec.gateway6, Some("fd09::2:1".parse().unwrap()));
        let tunnel = spec.tunnel.unwrap();
        assert_eq!((tunnel.port, tunnel.peers.len()), (4789, 2));
        assert!((0x0010_0000..=0x00ff_ffff).contains(&tunnel.vni));
        assert_eq!(tunnel.vni, number_of("net"));
        let chosen = options(&[(PEERS, "192.0.2.1"), (VXLAN_IDS, "42"), (PORT, "8472")]);
        let tunnel = overlay("net", ID, false, &chosen, &shared).unwrap().tunnel.unwrap();
        assert_eq!((tunnel.vni, tunnel.port), (42, 8472));
        let text = |pairs: &[(&str, &str)], plan: &Addressing| {
            overlay("net", ID, false, &options(pairs), plan).unwrap_err().to_string()
        };
        assert!(text(&[], &shared).contains(PEERS));
        assert!(text(&[(PEERS, "192.0.2.1")], &plan(&[("10.9.0.0/16", "", "")])).contains("--ip-range"));
        assert!(text(&[(PEERS, "somewhere")], &shared).contains("somewhere"));
        assert!(text(&[(PEERS, "192.0.2.1"), (ENCRYPTED, "")], &shared).contains("encrypted"));
        assert!(text(&[(PEERS, "192.0.2.1"), (VXLAN_IDS, "99999999")], &shared).contains("99999999"));
    }
}
