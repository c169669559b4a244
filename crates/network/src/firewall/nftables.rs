//! The engine's nf_tables table.
//!
//! Invariant: the table is replaced as a whole in one transaction, and between replacements only elements of
//! its sets and maps change; so at every moment the kernel holds a consistent table that follows from the
//! engine's bridges and published ports. Other tables are never touched.
//!
//! ```text
//! raw         (prerouting, raw)     from a bridge with a loopback address, or to the end of a tunnel: drop
//! prerouting  (prerouting, dstnat)  to an address of the host, from a bridge, the gate or (without a gate) anywhere:
//!                                   jump ports
//! output      (output, dstnat)      to an address of the host: jump ports
//! ports                             dnat by map (address, protocol, port), then by (protocol, port)
//! forward     (forward, filter)     established: accept; within a bridge: accept; from or to an internal
//!                                   bridge: drop; to a bridge: accept what was published, drop the rest
//! gate        (input, last)         to a published port, and the host's own rules have let it through: mark, for the
//!                                   tables `ip` and `ip6` of the same name, which send it round again by the gate
//! postrouting (postrouting, srcnat) published port used from the same bridge, or from the host's loopback:
//!                                   masquerade; to another bridge: as it is; from a bridge: masquerade
//! ```
//!
//! The loopback rule is what makes `route_localnet` on the bridges safe: without it a container that crafts
//! packets could reach services that the host offers on 127.0.0.1 only.

use std::io;
use std::sync::{Mutex, PoisonError};

use super::sets::{
    ANY4, ANY6, BRIDGE_SETS, BRIDGES, DIRECT, INNER4, INNER6, INTERNAL, MASQUERADE4, MASQUERADE6, OPEN4,
    OPEN6, PINGED4, PINGED6, PORT_SETS, PORTS4, PORTS6, ROUTED4, ROUTED6, SELF4, SELF6, TRUSTED, TUNNELS4,
    TUNNELS6, WITHIN, add_ports, bridge_elements, elements_for, single,
};
use super::{Change, Contents};
use crate::bridge::BridgeSpec;
use crate::error::Error;
use crate::gate::Gate;
use crate::nft::{
    ALL_CHAINS, Bytes, DroppingChain, Element, Expression as E, FAMILY_INET, FORWARD, Hook, INPUT, IPV4,
    IPV6, OUTPUT, POSTROUTING, PREROUTING, R0, Transaction, dropping_chain, family_name, get_table,
};
use crate::ports::PublishedPort;
use crate::socket::Socket;

/// `established` and `related`.
const ESTABLISHED: u32 = 2 | 4;
/// `new`.
const NEW: u32 = 8;
/// `IPS_DST_NAT`.
const DESTINATION_CHANGED: u32 = 1 << 5;

/// Only ever seen between our own last two chains on the input hook.
const GATE_MARK: u32 = 0x6272_6967;
const LAST: i32 = i32::MAX - 1;

/// Handle on the table. Changes are serialised here as the kernel would do anyway.
#[derive(Debug)]
pub(crate) struct Nftables {
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

impl Nftables {
    pub fn new(table: String) -> Self {
        Self { table, state: Mutex::default() }
    }

    pub fn table(&self) -> &str {
        &self.table
    }

    /// The netlink port that changes of our own come from.
    pub fn port(&self) -> Option<u32> {
        self.lock().socket.as_ref().map(Socket::port)
    }

    pub fn is_loaded(&self) -> bool {
        self.lock().loaded
    }

    /// Replaces the table, whatever it was.
    pub fn load(&self, contents: &Contents<'_>) -> Result<(), Error> {
        let mut transaction = Transaction::new(&self.table);
        replace_table(&mut transaction);
        for set in BRIDGE_SETS.into_iter().chain(PORT_SETS) {
            transaction.add_set(set);
        }
        add_rules(&mut transaction, contents.gate.is_some());
        if contents.bridges.iter().any(|bridge| bridge.tunnel.is_some()) {
            close_tunnels(&mut transaction);
        }
        for bridge in contents.bridges {
            add_bridge(&mut transaction, bridge);
        }
        add_ports(&mut transaction, contents.ports);
        let trusted = ["lo"].into_iter().chain(contents.gate.map(|gate| gate.way_in.as_str()));
        let trusted: Vec<Element> = trusted.map(single).collect();
        transaction.add_elements(&TRUSTED, &trusted);
        for family in Gate::families() {
            transaction.on(family, &self.table);
            match contents.gate {
                Some(gate) => {
                    replace_table(&mut transaction);
                    add_gate(&mut transaction, family, gate);
                }
                None => remove_table(&mut transaction),
            }
        }
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
        if bridge.tunnel.is_some() {
            // Perhaps the first one, which brings rules of its own.
            return Ok(Change::Reload);
        }
        self.change(|transaction| add_bridge(transaction, bridge))
    }

    pub fn remove_bridge(&self, bridge: &BridgeSpec) -> Result<Change, Error> {
        if bridge.tunnel.is_some() {
            // Other networks may have the same ends.
            return Ok(Change::Reload);
        }
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
        remove_table(&mut transaction);
        for family in Gate::families() {
            transaction.on(family, &self.table);
            remove_table(&mut transaction);
        }
        let mut state = self.lock();
        state.loaded = false;
        state.socket()?.commit(transaction.finish())
    }

    /// Whether this kernel has nf_tables at all, or would not say.
    pub fn answers(&self) -> bool {
        match self.exists() {
            Ok(_) => true,
            Err(Error::FirewallUnavailable { source, .. } | Error::Kernel { source, .. }) => {
                matches!(source.raw_os_error(), Some(libc::EPERM | libc::EACCES))
            }
            Err(_) => false,
        }
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
        self.dropping(FORWARD)
    }

    /// Chains of others that drop packets for the host itself by default.
    pub fn input_policies(&self) -> Result<Vec<String>, Error> {
        self.dropping(INPUT)
    }

    fn dropping(&self, hook: u32) -> Result<Vec<String>, Error> {
        let (kind, header) = ALL_CHAINS;
        let mut state = self.lock();
        let chains = state
            .socket()?
            .dump("list nf_tables chains", kind, &header, |payload| dropping_chain(payload, hook))?;
        let name = |chain: DroppingChain| {
            // Bridges' own hooks see other packets.
            if !matches!(chain.family, FAMILY_INET | IPV4 | IPV6) {
                return None;
            }
            let family = family_name(chain.family);
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

fn replace_table(transaction: &mut Transaction<'_>) {
    // Adding first makes the deletion succeed in any case.
    remove_table(transaction);
    transaction.add_table();
}

fn remove_table(transaction: &mut Transaction<'_>) {
    transaction.add_table();
    transaction.delete_table();
}

/// What the host's input rules have let through goes round by the gate.
fn add_gate(transaction: &mut Transaction<'_>, family: u8, gate: &Gate) {
    transaction.add_chain("gate", Some(Hook { kind: "filter", number: INPUT, priority: LAST }));
    let (neighbour, device) = if family == IPV4 {
        (Bytes::new(&gate.neighbour4.octets()), R0 + 1)
    } else {
        (Bytes::new(&gate.neighbour6.octets()), R0 + 4)
    };
    transaction.add_rule(
        "gate",
        "the way round to published ports (nft_dup_ipv4, nft_dup_ipv6)",
        &[
            E::IsMark(GATE_MARK),
            // The copy comes back with it, and to others its bits mean something else.
            E::SetMark(0),
            E::Load { register: R0, value: neighbour },
            E::Load { register: device, value: Bytes::new(&gate.way_out.to_ne_bytes()) },
            E::Duplicate { address: R0, device },
            E::Drop,
        ],
    );
}

fn add_rules(transaction: &mut Transaction<'_>, has_gate: bool) {
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
            // Each packet comes by here: what is cheap is looked at first.
            &[E::IsFamily(IPV4), first_byte(offset), is_loopback, input, E::In(&BRIDGES), E::Drop],
        );
    }
    let to_ports = [E::IsLocalDestination, E::Jump("ports")];
    let trusted = [input, E::In(&TRUSTED)];
    let by_gate: &[E] = if has_gate { &trusted } else { &[] };
    transaction.add_rule("prerouting", "published ports (nft_fib_inet)", &[by_gate, &to_ports].concat());
    // Nothing routes it to a bridge; a relay has it.
    let loopback6 = Bytes::new(&std::net::Ipv6Addr::LOCALHOST.octets());
    transaction.add_rule(
        "output",
        "the IPv6 loopback",
        &[E::IsFamily(IPV6), destination6, E::Is { register: R0, value: loopback6 }, E::Accept],
    );
    transaction.add_rule("output", "published ports (nft_fib_inet)", &to_ports);
    let nat4 = E::DestinationNat { family: IPV4, address: R0, port: R0 + 1 };
    let nat6 = E::DestinationNat { family: IPV6, address: R0, port: R0 + 4 };
    let families = [
        (IPV4, destination4, R0 + 1, &PORTS4, &ANY4, nat4),
        (IPV6, destination6, R0 + 4, &PORTS6, &ANY6, nat6),
    ];
    if has_gate {
        transaction.add_chain("gate", hook("filter", INPUT, LAST - 1));
        let new = [input, E::NotIn(&TRUSTED), E::HasState(NEW)];
        for (family, destination, next, exact, any, _) in families {
            let by_address = [
                E::IsFamily(family),
                destination,
                E::LoadProtocol(next),
                E::LoadDestinationPort(next + 1),
                E::Map(exact),
            ];
            let by_port =
                [E::IsFamily(family), E::LoadProtocol(R0), E::LoadDestinationPort(R0 + 1), E::Map(any)];
            for matches in [&by_address[..], &by_port] {
                transaction.add_rule(
                    "gate",
                    "published ports that the host lets in",
                    &[&new, matches, &[E::SetMark(GATE_MARK)]].concat(),
                );
            }
        }
    }
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
    for (family, proto, destination, next, [routed, inner], open, pinged) in [
        (IPV4, 1, destination4, R0 + 1, [&ROUTED4, &INNER4], &OPEN4, &PINGED4),
        (IPV6, 58, destination6, R0 + 4, [&ROUTED6, &INNER6], &OPEN6, &PINGED6),
    ] {
        transaction.add_rule(
            "forward",
            "ports of routed containers",
            &[
                E::IsFamily(family),
                destination,
                E::LoadProtocol(next),
                E::LoadDestinationPort(next + 1),
                E::In(routed),
                E::Accept,
            ],
        );
        transaction.add_rule(
            "forward",
            "published ports from trusted interfaces",
            &[
                within[0],
                within[1],
                E::In(&DIRECT),
                E::IsFamily(family),
                destination,
                E::LoadProtocol(next),
                E::LoadDestinationPort(next + 1),
                E::In(inner),
                E::Accept,
            ],
        );
        transaction.add_rule(
            "forward",
            "bridges that are open",
            &[E::IsFamily(family), output, E::In(open), E::Accept],
        );
        transaction.add_rule(
            "forward",
            "pings of routed containers",
            &[
                E::IsFamily(family),
                output,
                E::In(pinged),
                E::LoadProtocol(R0),
                E::Equals { register: R0, value: proto, mask: None },
                E::Accept,
            ],
        );
    }
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
    for (family, masquerade) in [(IPV4, &MASQUERADE4), (IPV6, &MASQUERADE6)] {
        transaction.add_rule(
            "postrouting",
            "outbound traffic",
            &[E::IsFamily(family), input, E::In(masquerade), E::Masquerade],
        );
    }
}

/// Containers could put frames into overlay networks, or ask their hosts for names, by the hosts' own ports.
fn close_tunnels(transaction: &mut Transaction<'_>) {
    for (family, offset, length, next, tunnels) in
        [(IPV4, 16, 4, R0 + 1, &TUNNELS4), (IPV6, 24, 16, R0 + 4, &TUNNELS6)]
    {
        transaction.add_rule(
            "raw",
            "the ends of tunnels",
            &[
                E::IsFamily(family),
                E::LoadInputInterface(R0),
                E::In(&BRIDGES),
                E::LoadNetwork { offset, length, register: R0 },
                E::LoadProtocol(next),
                E::LoadDestinationPort(next + 1),
                E::In(tunnels),
                E::Drop,
            ],
        );
    }
}

fn add_bridge(transaction: &mut Transaction<'_>, bridge: &BridgeSpec) {
    for (set, element) in bridge_elements(bridge) {
        transaction.add_elements(set, &[element]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
