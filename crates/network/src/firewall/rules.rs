//! The rules in iptables' language: the same promises as those of the nf_tables table, as far as chains that are shared with
//! others let them be kept.
//!
//! ```text
//! RAW     (raw PREROUTING, first)       from a bridge with a loopback address, or to the end of a tunnel: drop
//! PRE     (nat PREROUTING)              to an address of the host, from a bridge, the gate or (without a gate) anywhere:
//!                                       PORT
//! OUT     (nat OUTPUT)                  to an address of the host: PORT
//! PORT    EXACT, ANY                    dnat by address and port, then by port
//! POST    (nat POSTROUTING)             as the table's chain of that name
//! ISO     (filter FORWARD, first)       what must not be forwarded is dropped; the rest goes back to the host's own rules
//! CLOSED                                the end of ISO: what is published without translation goes back, all else is dropped
//! FWD     (filter FORWARD, last)        what none of the host's rules has decided about is accepted, whatever the policy
//! GATE    (security INPUT, last)        to a published port, and the host's own rules have let it through: GATED
//! GATED                                 a copy goes round by the gate, the packet itself is dropped
//! ```

use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;

use super::Contents;
use crate::bridge::{BridgeSpec, GatewayMode};
use crate::gate::Gate;
use crate::naming::hashed;
use crate::ports::PublishedPort;

/// A chain of our own, and from where it is reached: built-in chain, whether it is first there, and on what condition.
pub(super) struct Chain {
    pub table: &'static str,
    pub name: String,
    pub jump: Option<Jump>,
}

pub(super) struct Jump {
    pub from: &'static str,
    pub is_first: bool,
    pub condition: &'static str,
}

/// A rule of a chain of our own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub table: &'static str,
    pub chain: String,
    /// It goes before all others of its chain.
    pub is_first: bool,
    pub text: String,
}

const LOCAL: &str = "-m addrtype --dst-type LOCAL ";

/// Writes the rules of one family.
pub(super) struct Writer {
    prefix: String,
    pub is_ipv4: bool,
}

impl Writer {
    pub fn new(table: &str, is_ipv4: bool) -> Self {
        let bridge = table.strip_prefix("brigantine-").unwrap_or(table);
        // A chain's name has 28 bytes at most.
        let short = if bridge.len() <= 15 { bridge.to_owned() } else { hashed("", table, "") };
        Self { prefix: format!("BRIG-{short}"), is_ipv4 }
    }

    fn name(&self, part: &str) -> String {
        format!("{}-{part}", self.prefix)
    }

    /// The chains, in an order in which none is used before it is there.
    pub fn chains(&self, has_gate: bool) -> Vec<Chain> {
        let jump = |from, is_first, condition| Some(Jump { from, is_first, condition });
        let chain = |table, part, jump| Chain { table, name: self.name(part), jump };
        let mut chains = vec![chain("raw", "RAW", jump("PREROUTING", true, ""))];
        // What is dropped is dropped before anything leads there.
        chains.extend([
            chain("filter", "CLOSED", None),
            chain("filter", "ISO", jump("FORWARD", true, "")),
            chain("filter", "FWD", jump("FORWARD", false, "")),
            chain("nat", "EXACT", None),
            chain("nat", "ANY", None),
            chain("nat", "PORT", None),
            chain("nat", "PRE", jump("PREROUTING", false, LOCAL)),
            chain("nat", "OUT", jump("OUTPUT", false, LOCAL)),
            chain("nat", "POST", jump("POSTROUTING", false, "")),
        ]);
        if has_gate {
            chains.push(chain("security", "GATED", None));
            chains.push(chain("security", "GATE", jump("INPUT", false, "")));
        }
        chains
    }

    fn rule(&self, table: &'static str, part: &str, text: String) -> Rule {
        Rule { table, chain: self.name(part), is_first: false, text }
    }

    /// All rules, those of ports included.
    pub fn rules(&self, contents: &Contents<'_>) -> Vec<Rule> {
        let mut rules = Vec::new();
        let mut add = |table, part: &str, text: String| rules.push(self.rule(table, part, text));
        let bridges = contents.bridges;
        if self.is_ipv4 {
            for bridge in bridges {
                for side in ["-d", "-s"] {
                    add("raw", "RAW", format!("-i {} {side} 127.0.0.0/8 -j DROP", bridge.name));
                }
            }
        }
        let tunnels = bridges.iter().filter_map(|bridge| bridge.tunnel.as_ref());
        for (tunnel, end) in
            tunnels.flat_map(|one| one.peers.iter().chain(&one.local).map(move |end| (one, end)))
        {
            for (BridgeSpec { name, .. }, protocol) in
                bridges.iter().flat_map(|bridge| [(bridge, "tcp"), (bridge, "udp")])
            {
                if end.is_ipv4() == self.is_ipv4 {
                    let port = tunnel.port;
                    add("raw", "RAW", format!("-i {name} -d {end} -p {protocol} --dport {port} -j DROP"));
                }
            }
        }
        self.forwarding(bridges, &mut add);
        add("nat", "PORT", format!("-j {}", self.name("EXACT")));
        add("nat", "PORT", format!("-j {}", self.name("ANY")));
        let to_ports = format!("-j {}", self.name("PORT"));
        match contents.gate {
            Some(gate) => {
                for trusted in trusted(gate, bridges) {
                    add("nat", "PRE", format!("-i {trusted} {to_ports}"));
                }
            }
            None => add("nat", "PRE", to_ports.clone()),
        }
        if !self.is_ipv4 {
            // Nothing routes it to a bridge; a relay has it.
            add("nat", "OUT", "-d ::1/128 -j RETURN".to_owned());
        }
        add("nat", "OUT", to_ports);
        self.translation(bridges, &mut add);
        if let Some(gate) = contents.gate {
            for trusted in trusted(gate, bridges) {
                add("security", "GATE", format!("-i {trusted} -j RETURN"));
            }
            add("security", "GATE", "-m conntrack ! --ctstate NEW -j RETURN".to_owned());
            let neighbour: IpAddr =
                if self.is_ipv4 { gate.neighbour4.into() } else { gate.neighbour6.into() };
            add("security", "GATED", format!("-j TEE --gateway {neighbour} --oif {}", gate.way_out_name));
            add("security", "GATED", "-j DROP".to_owned());
        }
        rules.extend(self.ports(contents.ports, bridges, contents.gate.is_some()));
        rules
    }

    fn forwarding(&self, bridges: &[BridgeSpec], add: &mut impl FnMut(&'static str, &str, String)) {
        let mut drop_or_return = |text: String| add("filter", "ISO", text);
        for BridgeSpec { name, .. } in bridges {
            drop_or_return(format!("-i {name} -o {name} -j RETURN"));
        }
        for BridgeSpec { name, .. } in bridges.iter().filter(|bridge| bridge.internal) {
            drop_or_return(format!("-i {name} -j DROP"));
            drop_or_return(format!("-o {name} -j DROP"));
        }
        for bridge in bridges.iter().filter(|bridge| !bridge.internal) {
            let name = &bridge.name;
            drop_or_return(format!("-o {name} -m conntrack --ctstate RELATED,ESTABLISHED -j RETURN"));
            drop_or_return(format!("-o {name} -m conntrack --ctstate DNAT -j RETURN"));
            match self.mode(bridge) {
                GatewayMode::Routed => {
                    let ping = if self.is_ipv4 { "icmp" } else { "ipv6-icmp" };
                    drop_or_return(format!("-o {name} -p {ping} -j RETURN"));
                }
                GatewayMode::NatUnprotected => drop_or_return(format!("-o {name} -j RETURN")),
                GatewayMode::Nat | GatewayMode::Isolated => {}
            }
            // Not to come back here: what goes back from there goes back to the host's rules.
            drop_or_return(format!("-o {name} -g {}", self.name("CLOSED")));
        }
        for BridgeSpec { name, .. } in bridges {
            add("filter", "FWD", format!("-i {name} -j ACCEPT"));
            add("filter", "FWD", format!("-o {name} -j ACCEPT"));
        }
        add("filter", "CLOSED", "-j DROP".to_owned());
    }

    fn translation(&self, bridges: &[BridgeSpec], add: &mut impl FnMut(&'static str, &str, String)) {
        for bridge in bridges {
            let name = &bridge.name;
            if let Some(subnet) = self.subnet(bridge) {
                add(
                    "nat",
                    "POST",
                    format!("-s {subnet} -o {name} -m conntrack --ctstate DNAT -j MASQUERADE"),
                );
            }
            if self.is_ipv4 {
                add("nat", "POST", format!("-s 127.0.0.0/8 -o {name} -j MASQUERADE"));
            }
        }
        for BridgeSpec { name, .. } in bridges {
            add("nat", "POST", format!("-o {name} -j RETURN"));
        }
        for bridge in bridges.iter().filter(|bridge| bridge.masquerade && !bridge.internal) {
            if let Some(subnet) = self.subnet(bridge)
                && !matches!(self.mode(bridge), GatewayMode::Routed | GatewayMode::Isolated)
            {
                add("nat", "POST", format!("-s {subnet} -j MASQUERADE"));
            }
        }
    }

    /// What ports add to that.
    pub fn ports(&self, ports: &[PublishedPort], bridges: &[BridgeSpec], has_gate: bool) -> Vec<Rule> {
        let mut rules: Vec<Rule> = Vec::new();
        let mut add = |rule: Rule| {
            if !rules.contains(&rule) {
                rules.push(rule);
            }
        };
        for port in ports.iter().filter(|port| port.container_ip.is_ipv4() == self.is_ipv4) {
            let inner =
                format!("-d {} -p {} --dport {}", port.container_ip, port.protocol, port.container_port);
            let open = |condition: String| Rule {
                table: "filter",
                chain: self.name("CLOSED"),
                is_first: true,
                text: format!("{condition}{inner} -j RETURN"),
            };
            if port.is_routed() {
                add(open(String::new()));
                continue;
            }
            let home = bridges
                .iter()
                .find(|bridge| bridge.subnets().iter().any(|subnet| subnet.contains(&port.container_ip)));
            for (trusted, bridge) in
                home.iter().flat_map(|bridge| bridge.trusted.iter().map(|one| (one, &bridge.name)))
            {
                add(open(format!("-i {trusted} -o {bridge} ")));
            }
            if port.host_ip.is_ipv4() != self.is_ipv4 {
                // Families are not translated into each other; a relay has it.
                continue;
            }
            let mut outer = String::new();
            if !port.host_ip.is_unspecified() {
                write!(outer, "-d {} ", port.host_ip).ok();
            }
            write!(outer, "-p {} --dport {}", port.protocol, port.host_port).ok();
            let to = std::net::SocketAddr::new(port.container_ip, port.container_port);
            let kind = if port.host_ip.is_unspecified() { "ANY" } else { "EXACT" };
            add(self.rule("nat", kind, format!("{outer} -j DNAT --to-destination {to}")));
            if has_gate {
                add(self.rule("security", "GATE", format!("{outer} -j {}", self.name("GATED"))));
            }
        }
        rules
    }

    fn subnet(&self, bridge: &BridgeSpec) -> Option<IpNet> {
        bridge.subnets().into_iter().find(|subnet| subnet.addr().is_ipv4() == self.is_ipv4)
    }

    fn mode(&self, bridge: &BridgeSpec) -> GatewayMode {
        if self.is_ipv4 { bridge.mode4 } else { bridge.mode6 }
    }
}

/// Whose packets go to published ports without asking the host's own rules for input.
fn trusted<'a>(gate: &'a Gate, bridges: &'a [BridgeSpec]) -> impl Iterator<Item = &'a str> {
    ["lo", gate.way_in.as_str()].into_iter().chain(bridges.iter().map(|bridge| bridge.name.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ports::Protocol;

    #[test]
    fn names_of_chains_fit() {
        for table in ["brigantine-brig0", "brigantine-abcdefghijklmno", &"x".repeat(200)] {
            for chain in Writer::new(table, true).chains(true) {
                assert!(chain.name.len() <= 28, "{}", chain.name);
            }
        }
    }

    #[test]
    fn ports_are_rules_of_their_family() {
        let port = |host: &str, inner: &str| PublishedPort {
            protocol: Protocol::Tcp,
            host_ip: host.parse().unwrap(),
            host_port: 8080,
            container_ip: inner.parse().unwrap(),
            container_port: 80,
        };
        let ports = [port("0.0.0.0", "172.30.0.2"), port("::", "fd00::2"), port("::", "172.30.0.2")];
        let texts = |is_ipv4: bool| -> Vec<String> {
            let rules = Writer::new("brigantine-brig0", is_ipv4).ports(&ports, &[], true);
            rules.iter().map(|rule| format!("{} {}", rule.chain, rule.text)).collect()
        };
        assert_eq!(
            texts(true),
            [
                "BRIG-brig0-ANY -p tcp --dport 8080 -j DNAT --to-destination 172.30.0.2:80",
                "BRIG-brig0-GATE -p tcp --dport 8080 -j BRIG-brig0-GATED"
            ]
        );
        assert_eq!(
            texts(false)[0],
            "BRIG-brig0-ANY -p tcp --dport 8080 -j DNAT --to-destination [fd00::2]:80"
        );
        let local =
            Writer::new("brigantine-brig0", true).ports(&[port("127.0.0.1", "172.30.0.2")], &[], false);
        assert_eq!(local[0].text, "-d 127.0.0.1 -p tcp --dport 8080 -j DNAT --to-destination 172.30.0.2:80");
    }
}
