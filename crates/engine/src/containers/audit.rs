//! Who can reach the published ports of running containers, and which rules of the host decide about it.
//!
//! What is told is what the engine knows for sure: the addresses that a port is bound to, and which chains of the host's
//! firewall see the first packet of a connection. What single rules of theirs say is not evaluated.

use std::net::IpAddr;
use std::sync::Arc;

use brigantine_network::PublishedPort;
use serde_json::{Value, json};

use super::Containers;
use crate::Result;
use crate::networks::Judges;

/// Where connections to a port may come from, as far as addresses decide that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// Programs of this host only.
    Host,
    /// Machines of networks with private addresses.
    Lan,
    /// Every machine that reaches one of the host's addresses.
    Anyone,
}

impl Reach {
    fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Lan => "lan",
            Self::Anyone => "anyone",
        }
    }
}

impl Containers {
    /// One entry for each published port of a running container, by container and port.
    pub async fn audit_ports(self: &Arc<Self>) -> Result<Vec<Value>> {
        let plumbing = self.networks.plumbing();
        let judges = crate::blocking(move || plumbing.judges()).await?;
        let mut entries = Vec::new();
        for container in self.all() {
            let Some(attachment) = container.live().and_then(|live| live.sandbox().attachment.clone()) else {
                continue;
            };
            for port in &attachment.ports {
                let reach = reach(port, &judges.addresses);
                let (decided_by, note) = verdict(port, reach, &judges);
                let place =
                    (container.name(), port.container_port, port.protocol, port.host_ip, port.host_port);
                let entry = json!({
                    "Container": container.name(),
                    "Id": container.id,
                    "Protocol": port.protocol.to_string(),
                    "HostIp": port.host_ip.to_string(),
                    "HostPort": port.host_port,
                    "ContainerIp": port.container_ip.to_string(),
                    "ContainerPort": port.container_port,
                    "Reach": reach.as_str(),
                    "DecidedBy": decided_by,
                    "Note": note,
                });
                entries.push((place, entry));
            }
        }
        entries.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(entries.into_iter().map(|(_, entry)| entry).collect())
    }
}

/// By the address that the port is bound to; for all addresses, by the widest of those that the host has.
fn reach(port: &PublishedPort, own: &[IpAddr]) -> Reach {
    if port.is_routed() {
        return of_address(port.container_ip);
    }
    if !port.host_ip.is_unspecified() {
        return of_address(port.host_ip);
    }
    let same_family = own.iter().filter(|ip| ip.is_ipv4() == port.host_ip.is_ipv4());
    let widest = same_family.map(|ip| of_address(*ip)).max_by_key(|reach| *reach as u8);
    widest.unwrap_or(Reach::Host)
}

fn of_address(address: IpAddr) -> Reach {
    match address {
        address if address.is_loopback() => Reach::Host,
        IpAddr::V4(ip) if ip.is_private() || ip.is_link_local() || is_shared(ip) => Reach::Lan,
        IpAddr::V6(ip) if ip.is_unique_local() || ip.is_unicast_link_local() => Reach::Lan,
        _ => Reach::Anyone,
    }
}

/// 100.64.0.0/10 (RFC 6598).
fn is_shared(ip: std::net::Ipv4Addr) -> bool {
    let [first, second, ..] = ip.octets();
    first == 100 && second & 0xc0 == 64
}

/// The chains of the host that have to let a connection from another machine through, and what that means.
fn verdict(port: &PublishedPort, reach: Reach, judges: &Judges) -> (Vec<String>, String) {
    if reach == Reach::Host {
        return (Vec::new(), "not reached from other machines".to_owned());
    }
    if port.is_routed() {
        return by(&judges.forward, "forward", "reached at the container's own address");
    }
    if port.host_ip.is_ipv6() && port.container_ip.is_ipv4() {
        return by(&judges.input, "input", "relayed by the network helper");
    }
    if !judges.has_gate {
        return by(&judges.forward, "forward", "the host's input rules are not asked (--host-firewall)");
    }
    // What they let in is forwarded after that.
    let both: Vec<String> = judges.input.iter().chain(&judges.forward).cloned().collect();
    by(&both, "input or forward", "the host's input rules are asked")
}

fn by(chains: &[String], hook: &str, how: &str) -> (Vec<String>, String) {
    let said = if chains.is_empty() {
        format!("{how}; no {hook} chain drops by default: open, but for single rules")
    } else {
        format!("{how}; closed unless these chains accept it")
    };
    (chains.to_vec(), said)
}

#[cfg(test)]
mod tests {
    use brigantine_network::Protocol;

    use super::*;

    fn port(host: &str, number: u16) -> PublishedPort {
        PublishedPort {
            protocol: Protocol::Tcp,
            host_ip: host.parse().unwrap(),
            host_port: number,
            container_ip: "172.30.0.2".parse().unwrap(),
            container_port: 80,
        }
    }

    #[test]
    fn who_reaches_a_port_follows_from_addresses() {
        let at_home: Vec<IpAddr> =
            ["127.0.0.1", "192.168.1.5", "fd00::5"].map(|ip| ip.parse().unwrap()).into();
        let exposed = [&at_home[..], &["203.0.113.5".parse().unwrap()]].concat();
        assert_eq!(reach(&port("127.0.0.1", 80), &exposed), Reach::Host);
        assert_eq!(reach(&port("0.0.0.0", 80), &at_home), Reach::Lan);
        assert_eq!(reach(&port("0.0.0.0", 80), &exposed), Reach::Anyone);
        assert_eq!(reach(&port("::", 80), &exposed), Reach::Lan);
        assert_eq!(reach(&port("100.64.1.1", 80), &[]), Reach::Lan);
        assert_eq!(reach(&port("203.0.113.5", 80), &[]), Reach::Anyone);
        assert_eq!(reach(&port("0.0.0.0", 80), &[]), Reach::Host, "a host without a network");
        assert_eq!(reach(&port("0.0.0.0", 0), &exposed), Reach::Lan, "routed: the container's own address");
    }

    #[test]
    fn who_decides_is_told() {
        let judges = |has_gate, input: &[&str]| Judges {
            has_gate,
            input: input.iter().map(|chain| (*chain).to_owned()).collect(),
            forward: vec!["ip filter FORWARD".to_owned()],
            addresses: Vec::new(),
        };
        let open = port("0.0.0.0", 80);
        let strict = judges(true, &["inet filter input"]);
        assert_eq!(verdict(&open, Reach::Anyone, &strict).0, ["inet filter input", "ip filter FORWARD"]);
        let (chains, note) = verdict(&open, Reach::Anyone, &judges(true, &[]));
        assert!(chains == ["ip filter FORWARD"] && note.contains("closed unless"), "{note}");
        let nobody = Judges { forward: Vec::new(), ..judges(true, &[]) };
        assert!(verdict(&open, Reach::Anyone, &nobody).1.contains("open"));
        let (chains, note) = verdict(&open, Reach::Lan, &judges(false, &["inet filter input"]));
        assert!(chains == ["ip filter FORWARD"] && note.contains("not asked"), "{note}");
        assert!(verdict(&port("127.0.0.1", 80), Reach::Host, &strict).0.is_empty());
    }
}
