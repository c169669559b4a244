//! The sets and maps of the nf_tables table, and which elements bridges and ports are in them.

use crate::bridge::{BridgeSpec, GatewayMode};
use crate::link::octets;
use crate::nft::{Element, Field, Set, Transaction};
use crate::ports::{Protocol, PublishedPort};

pub(super) const BRIDGES: Set = Set { name: "bridges", key: &[Field::Interface], value: &[] };
pub(super) const INTERNAL: Set = Set { name: "internal", key: &[Field::Interface], value: &[] };
pub(super) const MASQUERADE4: Set = Set { name: "masquerade4", key: &[Field::Interface], value: &[] };
pub(super) const MASQUERADE6: Set = Set { name: "masquerade6", key: &[Field::Interface], value: &[] };
/// Bridges that let everything in that is addressed to their containers.
pub(super) const OPEN4: Set = Set { name: "open4", key: &[Field::Interface], value: &[] };
pub(super) const OPEN6: Set = Set { name: "open6", key: &[Field::Interface], value: &[] };
/// Bridges whose containers answer to a ping from outside.
pub(super) const PINGED4: Set = Set { name: "pinged4", key: &[Field::Interface], value: &[] };
pub(super) const PINGED6: Set = Set { name: "pinged6", key: &[Field::Interface], value: &[] };
/// Whose packets go to published ports without asking the host's own rules for input.
pub(super) const TRUSTED: Set = Set { name: "trusted", key: &[Field::Interface], value: &[] };
/// Each bridge with itself: what stays on one bridge.
pub(super) const WITHIN: Set = Set { name: "within", key: &[Field::Interface, Field::Interface], value: &[] };
pub(super) const PORTS4: Set = Set {
    name: "ports4",
    key: &[Field::Ipv4, Field::Protocol, Field::Port],
    value: &[Field::Ipv4, Field::Port],
};
pub(super) const PORTS6: Set = Set {
    name: "ports6",
    key: &[Field::Ipv6, Field::Protocol, Field::Port],
    value: &[Field::Ipv6, Field::Port],
};
pub(super) const ANY4: Set =
    Set { name: "any4", key: &[Field::Protocol, Field::Port], value: &[Field::Ipv4, Field::Port] };
pub(super) const ANY6: Set =
    Set { name: "any6", key: &[Field::Protocol, Field::Port], value: &[Field::Ipv6, Field::Port] };
/// Each container that publishes ports with itself.
pub(super) const SELF4: Set = Set { name: "self4", key: &[Field::Ipv4, Field::Ipv4], value: &[] };
pub(super) const SELF6: Set = Set { name: "self6", key: &[Field::Ipv6, Field::Ipv6], value: &[] };
/// Ports that routed containers publish at their own addresses.
pub(super) const ROUTED4: Set =
    Set { name: "routed4", key: &[Field::Ipv4, Field::Protocol, Field::Port], value: &[] };
pub(super) const ROUTED6: Set =
    Set { name: "routed6", key: &[Field::Ipv6, Field::Protocol, Field::Port], value: &[] };
/// Interfaces of the host with bridges whose published ports they reach at the containers' own addresses.
pub(super) const DIRECT: Set = Set { name: "direct", key: &[Field::Interface, Field::Interface], value: &[] };
/// Ports that are published with translation, as the containers have them.
pub(super) const INNER4: Set =
    Set { name: "inner4", key: &[Field::Ipv4, Field::Protocol, Field::Port], value: &[] };
pub(super) const INNER6: Set =
    Set { name: "inner6", key: &[Field::Ipv6, Field::Protocol, Field::Port], value: &[] };
/// The ends of overlay networks' tunnels, which are no containers' business.
pub(super) const TUNNELS4: Set =
    Set { name: "tunnels4", key: &[Field::Ipv4, Field::Protocol, Field::Port], value: &[] };
pub(super) const TUNNELS6: Set =
    Set { name: "tunnels6", key: &[Field::Ipv6, Field::Protocol, Field::Port], value: &[] };
/// What changes with bridges.
pub(super) const BRIDGE_SETS: [&Set; 13] = [
    &BRIDGES,
    &INTERNAL,
    &MASQUERADE4,
    &MASQUERADE6,
    &OPEN4,
    &OPEN6,
    &PINGED4,
    &PINGED6,
    &TRUSTED,
    &WITHIN,
    &DIRECT,
    &TUNNELS4,
    &TUNNELS6,
];
/// What changes with containers.
pub(super) const PORT_SETS: [&Set; 10] =
    [&PORTS4, &PORTS6, &ANY4, &ANY6, &SELF4, &SELF6, &ROUTED4, &ROUTED6, &INNER4, &INNER6];

pub(super) fn bridge_elements(bridge: &BridgeSpec) -> Vec<(&'static Set, Element)> {
    let name = interface_name(&bridge.name);
    let mut elements = vec![
        (&BRIDGES, single(&bridge.name)),
        (&TRUSTED, single(&bridge.name)),
        (&WITHIN, Element { key: [name.clone(), name.clone()].concat(), value: Vec::new() }),
    ];
    let trusted: std::collections::BTreeSet<&String> = bridge.trusted.iter().collect();
    elements.extend(trusted.into_iter().map(|from| {
        (&DIRECT, Element { key: [interface_name(from), name.clone()].concat(), value: Vec::new() })
    }));
    if let Some(tunnel) = &bridge.tunnel {
        for end in tunnel.peers.iter().chain(&tunnel.local) {
            let set = if end.is_ipv4() { &TUNNELS4 } else { &TUNNELS6 };
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let mut key = octets(*end);
                key.extend([protocol.number(), 0, 0, 0]);
                key.extend(port_field(tunnel.port));
                elements.push((set, Element { key, value: Vec::new() }));
            }
        }
    }
    if bridge.internal {
        elements.push((&INTERNAL, single(&bridge.name)));
        return elements;
    }
    for (mode, masquerade, open, pinged) in
        [(bridge.mode4, &MASQUERADE4, &OPEN4, &PINGED4), (bridge.mode6, &MASQUERADE6, &OPEN6, &PINGED6)]
    {
        match mode {
            GatewayMode::Routed => elements.push((pinged, single(&bridge.name))),
            GatewayMode::NatUnprotected => elements.push((open, single(&bridge.name))),
            GatewayMode::Nat | GatewayMode::Isolated => {}
        }
        if bridge.masquerade && !matches!(mode, GatewayMode::Routed | GatewayMode::Isolated) {
            elements.push((masquerade, single(&bridge.name)));
        }
    }
    elements
}

pub(super) fn single(interface: &str) -> Element {
    Element { key: interface_name(interface), value: Vec::new() }
}

/// As the kernel compares it: padded with zeros.
fn interface_name(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(16, 0);
    bytes
}

pub(super) fn add_ports(transaction: &mut Transaction<'_>, ports: &[PublishedPort]) {
    for set in PORT_SETS {
        transaction.add_elements(set, &elements_for(set, ports));
    }
}

/// The elements of `ports` that belong into this set.
pub(super) fn elements_for(set: &Set, ports: &[PublishedPort]) -> Vec<Element> {
    let mut elements: Vec<Element> = ports.iter().filter_map(|port| element(set, port)).collect();
    elements.sort_unstable();
    elements.dedup();
    elements
}

fn element(set: &Set, port: &PublishedPort) -> Option<Element> {
    let container = octets(port.container_ip);
    let (routed, inner) = if port.container_ip.is_ipv4() { (&ROUTED4, &INNER4) } else { (&ROUTED6, &INNER6) };
    if set.name == routed.name || set.name == inner.name {
        let mut key = container;
        key.extend([port.protocol.number(), 0, 0, 0]);
        key.extend(port_field(port.container_port));
        let is_of_set = port.is_routed() == (set.name == routed.name);
        return is_of_set.then(|| Element { key, value: Vec::new() });
    }
    if port.is_routed() {
        return None;
    }
    if port.host_ip.is_ipv4() != port.container_ip.is_ipv4() {
        // Families are not translated into each other; a relay has it.
        return None;
    }
    let is_any = port.host_ip.is_unspecified();
    let (exact, any, own) =
        if port.host_ip.is_ipv4() { (&PORTS4, &ANY4, &SELF4) } else { (&PORTS6, &ANY6, &SELF6) };
    if set.name == own.name {
        return Some(Element { key: [container.as_slice(), &container].concat(), value: Vec::new() });
    }
    if set.name != (if is_any { any } else { exact }).name {
        return None;
    }
    let mut key = if is_any { Vec::new() } else { octets(port.host_ip) };
    key.extend([port.protocol.number(), 0, 0, 0]);
    key.extend(port_field(port.host_port));
    let mut value = container;
    value.extend(port_field(port.container_port));
    Some(Element { key, value })
}

fn port_field(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(host: &str, container: &str) -> PublishedPort {
        PublishedPort {
            protocol: Protocol::Udp,
            host_ip: host.parse().unwrap(),
            host_port: 0x1234,
            container_ip: container.parse().unwrap(),
            container_port: 0x5678,
        }
    }

    #[test]
    fn a_port_is_in_the_map_of_its_kind_and_its_container_once_in_the_set_of_its_own() {
        let any = published("0.0.0.0", "172.30.0.2");
        let exact = published("127.0.0.1", "172.30.0.2");
        let ports = [any, exact, published("::", "fd00::2")];
        assert_eq!(
            elements_for(&ANY4, &ports),
            [Element {
                key: vec![17, 0, 0, 0, 0x12, 0x34, 0, 0],
                value: vec![172, 30, 0, 2, 0x56, 0x78, 0, 0],
            }]
        );
        assert_eq!(elements_for(&PORTS4, &ports)[0].key, [127, 0, 0, 1, 17, 0, 0, 0, 0x12, 0x34, 0, 0]);
        assert_eq!(
            elements_for(&SELF4, &ports),
            [Element { key: vec![172, 30, 0, 2, 172, 30, 0, 2], value: vec![] }]
        );
        assert_eq!(elements_for(&ANY6, &ports)[0].value.len(), 20);
        assert!(elements_for(&PORTS6, &ports).is_empty());
    }
}
