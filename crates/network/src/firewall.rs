//! The engine's nf_tables table.
//!
//! Invariant: the table is replaced as a whole in one transaction, and between replacements only elements of
//! its sets and maps change; so at every moment the kernel holds a consistent table that follows from the
//! engine's bridges and published ports. Other tables are never touched.
//!
//! ```text
//! raw         (prerouting, raw)     from a bridge with a loopback address: drop
//! prerouting  (prerouting, dstnat)  to an address of the host: jump ports
//! output      (output, dstnat)      to an address of the host: jump ports
//! ports                             dnat by map (address, protocol, port), then by (protocol, port)
//! forward     (forward, filter)     established: accept; within a bridge: accept; from or to an internal
//!                                   bridge: drop; to a bridge: accept what was published, drop the rest
//! postrouting (postrouting, srcnat) published port used from the same bridge, or from the host's loopback:
//!                                   masquerade; to another bridge: as it is; from a bridge: masquerade
//! ```
//!
//! The loopback rule is what makes `route_localnet` on the bridges safe: without it a container that crafts
//! packets could reach services that the host offers on 127.0.0.1 only.

use std::io;
use std::sync::{Mutex, PoisonError};

use crate::bridge::BridgeSpec;
use crate::error::Error;
use crate::link::octets;
use crate::nft::{
    ALL_CHAINS, DroppingChain, Element, Expression as E, FAMILY_INET, FORWARD, Field, Hook, IPV4, IPV6,
    OUTPUT, POSTROUTING, PREROUTING, R0, Set, Transaction, dropping_chain, get_table,
};
use crate::ports::PublishedPort;
use crate::socket::Socket;

const BRIDGES: Set = Set { name: "bridges", key: &[Field::Interface], value: &[] };
const INTERNAL: Set = Set { name: "internal", key: &[Field::Interface], value: &[] };
const MASQUERADE: Set = Set { name: "masquerade", key: &[Field::Interface], value: &[] };
/// Each bridge with itself: what stays on one bridge.
const WITHIN: Set = Set { name: "within", key: &[Field::Interface, Field::Interface], value: &[] };
const PORTS4: Set = Set {
    name: "ports4",
    key: &[Field::Ipv4, Field::Protocol, Field::Port],
    value: &[Field::Ipv4, Field::Port],
};
const PORTS6: Set = Set {
    name: "ports6",
    key: &[Field::Ipv6, Field::Protocol, Field::Port],
    value: &[Field::Ipv6, Field::Port],
};
const ANY4: Set =
    Set { name: "any4", key: &[Field::Protocol, Field::Port], value: &[Field::Ipv4, Field::Port] };
const ANY6: Set =
    Set { name: "any6", key: &[Field::Protocol, Field::Port], value: &[Field::Ipv6, Field::Port] };
/// Each container that publishes ports with itself.
const SELF4: Set = Set { name: "self4", key: &[Field::Ipv4, Field::Ipv4], value: &[] };
const SELF6: Set = Set { name: "self6", key: &[Field::Ipv6, Field::Ipv6], value: &[] };
/// What changes with containers.
const PORT_SETS: [&Set; 6] = [&PORTS4, &PORTS6, &ANY4, &ANY6, &SELF4, &SELF6];

/// `established` and `related`.
const ESTABLISHED: u32 = 2 | 4;
/// `IPS_DST_NAT`.
const DESTINATION_CHANGED: u32 = 1 << 5;

/// Handle on the table. Changes are serialised here as the kernel would do anyway.
#[derive(Debug)]
pub(crate) struct Firewall {
    table: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    socket: Option<Socket>,
    loaded: bool,
}

impl State {
    fn socket(&mut self) -> Result<&mut Socket, Error> {
        if self.socket.is_none() {
            self.socket = Some(Socket::netfilter().map_err(|error| unavailable("nfnetlink", error))?);
        }
        // Just filled.
        self.socket.as_mut().ok_or_else(|| Error::Kernel {
            what: "open a netlink socket".to_owned(),
            detail: None,
            source: io::ErrorKind::NotConnected.into(),
        })
    }
}

/// Whether a change of elements could be made on the table as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Change {
    Done,
    /// The table is not loaded, or somebody took it or parts of it away: load it whole.
    Reload,
}

impl Firewall {
    pub fn new(table: String) -> Self {
        Self { table, state: Mutex::default() }
    }

    pub fn is_loaded(&self) -> bool {
        self.lock().loaded
    }

    /// Replaces the table, whatever it was, by one for these bridges and ports.
    pub fn load(&self, bridges: &[BridgeSpec], ports: &[PublishedPort]) -> Result<(), Error> {
        let mut transaction = Transaction::new(&self.table);
        // Adding first makes the deletion succeed in any case.
        transaction.add_table();
        transaction.delete_table();
        transaction.add_table();
        for set in [&BRIDGES, &INTERNAL, &MASQUERADE, &WITHIN].into_iter().chain(PORT_SETS) {
            transaction.add_set(set);
        }
        add_rules(&mut transaction);
        for bridge in bridges {
            for (set, element) in bridge_elements(bridge) {
                transaction.add_elements(set, &[element]);
            }
        }
        add_ports(&mut transaction, ports);
        let mut state = self.lock();
        state.loaded = false;
        let result = state.socket()?.commit(transaction.finish());
        state.loaded = result.is_ok();
        result.map_err(|error| match &error {
            Error::Kernel { what, .. } => {
                let missing = what.clone();
                unavailable(&missing, error)
            }
            _ => error,
        })
    }

    pub fn add_bridge(&self, bridge: &BridgeSpec) -> Result<Change, Error> {
        self.change(|transaction| {
            for (set, element) in bridge_elements(bridge) {
                transaction.add_elements(set, &[element]);
            }
        })
    }

    pub fn remove_bridge(&self, bridge: &BridgeSpec) -> Result<Change, Error> {
        self.change(|transaction| {
            for (set, element) in bridge_elements(bridge) {
                transaction.delete_elements(set, &[element]);
            }
        })
    }

    pub fn publish(&self, ports: &[PublishedPort]) -> Result<Change, Error> {
        self.change(|transaction| add_ports(transaction, ports))
    }

    pub fn withdraw(&self, ports: &[PublishedPort]) -> Result<Change, Error> {
        self.change(|transaction| {
            for set in PORT_SETS {
                let elements = elements_for(set, ports);
                transaction.delete_elements(set, &elements);
            }
        })
    }

    /// Removes the table.
    pub fn unload(&self) -> Result<(), Error> {
        let mut transaction = Transaction::new(&self.table);
        transaction.add_table();
        transaction.delete_table();
        let mut state = self.lock();
        state.loaded = false;
        state.socket()?.commit(transaction.finish())
    }

    /// Whether the table is there.
    pub fn exists(&self) -> Result<bool, Error> {
        match self.lock().socket()?.query(get_table(&self.table), |_| {}) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Chains of others that drop forwarded packets by default, such as docker's: `ip filter FORWARD`.
    pub fn obstacles(&self) -> Result<Vec<String>, Error> {
        let (kind, header) = ALL_CHAINS;
        let mut state = self.lock();
        let chains = state
            .socket()?
            .dump("list nf_tables chains", kind, &header, |payload| dropping_chain(payload, FORWARD))?;
        let name = |chain: DroppingChain| {
            let family = match chain.family {
                FAMILY_INET => "inet",
                IPV4 => "ip",
                IPV6 => "ip6",
                // Bridges' own hooks see other packets.
                _ => return None,
            };
            (chain.table != self.table).then(|| format!("{family} {} {}", chain.table, chain.name))
        };
        Ok(chains.into_iter().filter_map(name).collect())
    }

    fn change(&self, fill: impl FnOnce(&mut Transaction<'_>)) -> Result<Change, Error> {
        let mut state = self.lock();
        if !state.loaded {
            return Ok(Change::Reload);
        }
        let mut transaction = Transaction::new(&self.table);
        fill(&mut transaction);
        match state.socket()?.commit(transaction.finish()) {
            Ok(()) => Ok(Change::Done),
            Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::EEXIST | libc::EBUSY)) => {
                tracing::warn!(table = self.table, %error, "firewall table is not as it was loaded; loading it again");
                Ok(Change::Reload)
            }
            Err(error) => Err(error),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unavailable(missing: &str, error: Error) -> Error {
    let missing = match error.errno() {
        Some(libc::EPERM | libc::EACCES) => "the right to administer the network (CAP_NET_ADMIN)".to_owned(),
        _ if missing.starts_with("begin") => "nf_tables".to_owned(),
        _ => format!("what is needed to {missing}"),
    };
    match error {
        Error::Kernel { source, .. } => Error::FirewallUnavailable { missing, source },
        error => error,
    }
}

fn add_rules(transaction: &mut Transaction<'_>) {
    let hook = |kind, number, priority| Some(Hook { kind, number, priority });
    transaction.add_chain("ports", None);
    transaction.add_chain("raw", hook("filter", PREROUTING, -300));
    transaction.add_chain("prerouting", hook("nat", PREROUTING, -100));
    transaction.add_chain("output", hook("nat", OUTPUT, -100));
    transaction.add_chain("forward", hook("filter", FORWARD, 0));
    transaction.add_chain("postrouting", hook("nat", POSTROUTING, 100));

    let destination4 = E::LoadNetwork { offset: 16, length: 4, register: R0 };
    let destination6 = E::LoadNetwork { offset: 24, length: 16, register: R0 };
    let is_loopback = E::Equals { register: R0, value: 127, mask: None };
    let first_byte = |offset| E::LoadNetwork { offset, length: 1, register: R0 };
    let input = E::LoadInputInterface(R0);
    let output = E::LoadOutputInterface(R0);
    let within = [E::LoadInputInterface(R0), E::LoadOutputInterface(R0 + 4), E::In(&WITHIN)];

    for (what, offset) in [("loopback destinations", 16), ("loopback sources", 12)] {
        transaction.add_rule(
            "raw",
            what,
            &[E::IsFamily(IPV4), input, E::In(&BRIDGES), first_byte(offset), is_loopback, E::Drop],
        );
    }
    for chain in ["prerouting", "output"] {
        transaction.add_rule(
            chain,
            "published ports (nft_fib_inet)",
            &[E::IsLocalDestination, E::Jump("ports")],
        );
    }
    let nat4 = E::DestinationNat { family: IPV4, address: R0, port: R0 + 1 };
    let nat6 = E::DestinationNat { family: IPV6, address: R0, port: R0 + 4 };
    let families = [
        (IPV4, destination4, R0 + 1, &PORTS4, &ANY4, nat4),
        (IPV6, destination6, R0 + 4, &PORTS6, &ANY6, nat6),
    ];
    for (family, destination, next, exact, any, nat) in families {
        let by_address = [
            E::IsFamily(family),
            destination,
            E::LoadProtocol(next),
            E::LoadDestinationPort(next + 1),
            E::Map(exact),
            nat,
        ];
        transaction.add_rule("ports", "ports published on an address (nft_nat)", &by_address);
        let by_port =
            [E::IsFamily(family), E::LoadProtocol(R0), E::LoadDestinationPort(R0 + 1), E::Map(any), nat];
        transaction.add_rule("ports", "ports published on all addresses (nft_nat)", &by_port);
    }

    transaction.add_rule(
        "forward",
        "established connections (nft_ct)",
        &[E::HasState(ESTABLISHED), E::Accept],
    );
    transaction.add_rule("forward", "traffic within a bridge", &[within[0], within[1], within[2], E::Accept]);
    transaction.add_rule("forward", "internal bridges, outwards", &[input, E::In(&INTERNAL), E::Drop]);
    transaction.add_rule("forward", "internal bridges, inwards", &[output, E::In(&INTERNAL), E::Drop]);
    transaction.add_rule(
        "forward",
        "published ports, inwards",
        &[output, E::In(&BRIDGES), E::HasStatus(DESTINATION_CHANGED), E::Accept],
    );
    transaction.add_rule("forward", "isolation of bridges", &[output, E::In(&BRIDGES), E::Drop]);

    transaction.add_rule(
        "postrouting",
        "published ports used on the same bridge (nft_masq)",
        &[within[0], within[1], within[2], E::HasStatus(DESTINATION_CHANGED), E::Masquerade],
    );
    // Where frames on bridges pass the firewall (br_netfilter) there is no input interface here.
    let pairs = [
        (IPV4, E::LoadNetwork { offset: 12, length: 8, register: R0 }, &SELF4),
        (IPV6, E::LoadNetwork { offset: 8, length: 32, register: R0 }, &SELF6),
    ];
    for (family, addresses, set) in pairs {
        transaction.add_rule(
            "postrouting",
            "published ports used by their own container",
            &[E::IsFamily(family), E::HasStatus(DESTINATION_CHANGED), addresses, E::In(set), E::Masquerade],
        );
    }
    transaction.add_rule(
        "postrouting",
        "published ports used from the loopback",
        &[E::IsFamily(IPV4), output, E::In(&BRIDGES), first_byte(12), is_loopback, E::Masquerade],
    );
    transaction.add_rule("postrouting", "traffic to a bridge", &[output, E::In(&BRIDGES), E::Accept]);
    transaction.add_rule("postrouting", "outbound traffic", &[input, E::In(&MASQUERADE), E::Masquerade]);
}

fn bridge_elements(bridge: &BridgeSpec) -> Vec<(&'static Set, Element)> {
    let name = interface_name(&bridge.name);
    let single = || Element { key: name.clone(), value: Vec::new() };
    let mut elements = vec![
        (&BRIDGES, single()),
        (&WITHIN, Element { key: [name.clone(), name.clone()].concat(), value: Vec::new() }),
    ];
    if bridge.internal {
        elements.push((&INTERNAL, single()));
    } else if bridge.masquerade {
        elements.push((&MASQUERADE, single()));
    }
    elements
}

/// As the kernel compares it: padded with zeros.
fn interface_name(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(16, 0);
    bytes
}

fn add_ports(transaction: &mut Transaction<'_>, ports: &[PublishedPort]) {
    for set in PORT_SETS {
        transaction.add_elements(set, &elements_for(set, ports));
    }
}

/// The elements of `ports` that belong into this set.
fn elements_for(set: &Set, ports: &[PublishedPort]) -> Vec<Element> {
    let mut elements: Vec<Element> = ports.iter().filter_map(|port| element(set, port)).collect();
    elements.sort_unstable();
    elements.dedup();
    elements
}

fn element(set: &Set, port: &PublishedPort) -> Option<Element> {
    let is_any = port.host_ip.is_unspecified();
    let (exact, any, own) =
        if port.host_ip.is_ipv4() { (&PORTS4, &ANY4, &SELF4) } else { (&PORTS6, &ANY6, &SELF6) };
    let container = octets(port.container_ip);
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
    use crate::ports::Protocol;

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

    #[test]
    fn what_the_kernel_lacks_is_named() {
        let refused = |what: &str, code| Error::Kernel {
            what: what.to_owned(),
            detail: None,
            source: io::Error::from_raw_os_error(code),
        };
        let text = |what: &str, code| unavailable(what, refused(what, code)).to_string();
        assert!(text("begin an nf_tables transaction", libc::EOPNOTSUPP).contains("nf_tables is missing"));
        assert!(text("begin an nf_tables transaction", libc::EPERM).contains("CAP_NET_ADMIN"));
        let nat = text("create nat chain output (nft_chain_nat, nf_conntrack)", libc::ENOENT);
        assert!(nat.contains("nft_chain_nat") && nat.contains("--network none or host"), "{nat}");
    }
}
