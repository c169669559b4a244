//! Published ports: what is asked for, and the reservation of host ports by bound sockets.
//!
//! Invariant: a port that was handed out is bound by a socket in `held` until the last copy of that socket
//! is closed, so that neither a program on the host nor another engine gets it meanwhile. The sockets never
//! listen: a packet that the firewall does not redirect is refused, not swallowed.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Transport protocol of a published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

impl FromStr for Protocol {
    type Err = PortError;

    fn from_str(text: &str) -> Result<Self, PortError> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "sctp" => Ok(Self::Sctp),
            _ => Err(PortError::Protocol(text.to_owned())),
        }
    }
}

/// A port specification that says nothing usable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    #[error("invalid protocol: {0:?} (tcp, udp and sctp are known)")]
    Protocol(String),
    #[error("invalid port: {0:?} is not a number from 1 to 65535")]
    Port(String),
    #[error("invalid port range: {0:?}")]
    Range(String),
    #[error("invalid IP address: {0:?}")]
    HostIp(String),
    #[error("invalid ranges specified for container and host Ports: {container} and {host}")]
    RangeMismatch { container: String, host: String },
    #[error("no port specified: {0:?}")]
    Empty(String),
}

/// Which host port is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostPort {
    /// Any free one of the host's range for local ports.
    Ephemeral,
    Fixed(u16),
    /// The lowest free one from first to last.
    Range(u16, u16),
}

impl FromStr for HostPort {
    type Err = PortError;

    /// As in the API's `HostPort`: empty or `0`, `8080`, or `8000-8010`.
    fn from_str(text: &str) -> Result<Self, PortError> {
        if text.is_empty() || text == "0" {
            return Ok(Self::Ephemeral);
        }
        let (first, last) = parse_range(text)?;
        Ok(if first == last { Self::Fixed(first) } else { Self::Range(first, last) })
    }
}

/// One port of a container to be published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRequest {
    pub protocol: Protocol,
    /// `None`: all addresses of the host, of each family the container has.
    pub host_ip: Option<IpAddr>,
    pub host_port: HostPort,
    pub container_port: u16,
}

impl PortRequest {
    /// From the API's port binding: key `80/tcp`, value `HostIp` and `HostPort`.
    pub fn from_binding(container: &str, host_ip: &str, host_port: &str) -> Result<Self, PortError> {
        let (port, protocol) = split_protocol(container)?;
        Ok(Self {
            protocol,
            host_ip: parse_host_ip(host_ip)?,
            host_port: host_port.parse()?,
            container_port: parse_port(port)?,
        })
    }

    /// From the command line's `-p`: `[[ip:][hostPort]:]containerPort[/protocol]`, either port a range.
    pub fn from_publish(text: &str) -> Result<Vec<Self>, PortError> {
        let (rest, protocol) = split_protocol(text)?;
        let (rest, container) = rest.rsplit_once(':').unwrap_or(("", rest));
        if container.is_empty() {
            return Err(PortError::Empty(text.to_owned()));
        }
        let (ip, host) = if let Some(bracketed) = rest.strip_prefix('[') {
            let (ip, host) = bracketed.split_once(']').ok_or_else(|| PortError::HostIp(rest.to_owned()))?;
            (ip, host.strip_prefix(':').unwrap_or(host))
        } else {
            rest.rsplit_once(':').unwrap_or(("", rest))
        };
        let host_ip = parse_host_ip(ip)?;
        let (first, last) = parse_range(container)?;
        let request = |container_port, host_port| Self { protocol, host_ip, host_port, container_port };
        match host.parse()? {
            HostPort::Ephemeral => {
                Ok((first..=last).map(|port| request(port, HostPort::Ephemeral)).collect())
            }
            HostPort::Fixed(port) if first == last => Ok(vec![request(first, HostPort::Fixed(port))]),
            HostPort::Range(low, high) if first == last => {
                Ok(vec![request(first, HostPort::Range(low, high))])
            }
            HostPort::Range(low, high) if high - low == last - first => Ok((first..=last)
                .zip(low..=high)
                .map(|(port, host)| request(port, HostPort::Fixed(host)))
                .collect()),
            HostPort::Fixed(_) | HostPort::Range(..) => {
                Err(PortError::RangeMismatch { container: container.to_owned(), host: host.to_owned() })
            }
        }
    }
}

/// A port as published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PublishedPort {
    pub protocol: Protocol,
    /// Unspecified (`0.0.0.0`, `::`) for all addresses of the host.
    pub host_ip: IpAddr,
    pub host_port: u16,
    pub container_ip: IpAddr,
    pub container_port: u16,
}

impl PublishedPort {
    /// A port that a routed container publishes at its own address, without one of the host's (which is 0).
    pub fn is_routed(&self) -> bool {
        self.host_port == 0
    }

    /// Whether programs reach it through a relay, in whole or in part: the kernel routes `::1` to no bridge, and
    /// translates between families nowhere.
    pub fn needs_relay(&self) -> bool {
        let IpAddr::V6(host) = self.host_ip else { return false };
        !self.is_routed()
            && self.protocol != Protocol::Sctp
            && (host.is_unspecified() || host.is_loopback() || self.container_ip.is_ipv4())
    }
}

fn split_protocol(text: &str) -> Result<(&str, Protocol), PortError> {
    match text.split_once('/') {
        Some((rest, protocol)) => Ok((rest, protocol.parse()?)),
        None => Ok((text, Protocol::Tcp)),
    }
}

fn parse_host_ip(text: &str) -> Result<Option<IpAddr>, PortError> {
    if text.is_empty() {
        return Ok(None);
    }
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    bare.parse().map(Some).map_err(|_not_an_address| PortError::HostIp(text.to_owned()))
}

fn parse_port(text: &str) -> Result<u16, PortError> {
    match text.parse::<u16>() {
        Ok(port) if port != 0 && text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(port),
        _ => Err(PortError::Port(text.to_owned())),
    }
}

fn parse_range(text: &str) -> Result<(u16, u16), PortError> {
    let Some((first, last)) = text.split_once('-') else {
        let port = parse_port(text)?;
        return Ok((port, port));
    };
    let (first, last) = (parse_port(first)?, parse_port(last)?);
    if first <= last { Ok((first, last)) } else { Err(PortError::Range(text.to_owned())) }
}

/// For how long the process that held a released port may take to end.
const LETTING_GO: Duration = Duration::from_secs(2);

/// Who has which host port in this engine. The sockets themselves belong to the sandboxes.
#[derive(Debug, Default)]
pub(crate) struct PortTable {
    owners: HashMap<(Protocol, IpAddr, u16), Owner>,
    /// Where the next search for an ephemeral port begins: freed ports rest as long as possible, since
    /// clients may still send to them.
    next_ephemeral: u16,
    /// Ports given back a moment ago; their sockets may still be open in a shim that is about to end.
    released: HashMap<(Protocol, IpAddr, u16), Instant>,
}

#[derive(Debug)]
struct Owner {
    id: String,
    name: String,
}

/// Ports taken for one container; not yet in the firewall.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub ports: Vec<PublishedPort>,
    pub held: Vec<OwnedFd>,
}

impl PortTable {
    /// Reserves all `requests` for container `id` or none. `addresses` are the container's, one a family. With `relay`
    /// a container without IPv6 has its ports on the host's addresses of IPv6, too.
    pub fn reserve(
        &mut self,
        id: &str,
        name: &str,
        requests: &[PortRequest],
        addresses: &[IpAddr],
        local_range: (u16, u16),
        relay: bool,
    ) -> Result<Reservation, Error> {
        let mut taken = Reservation { ports: Vec::with_capacity(requests.len()), held: Vec::new() };
        for request in requests {
            if let Err(error) = self.reserve_one(id, name, request, addresses, local_range, relay, &mut taken)
            {
                self.release(&taken.ports);
                return Err(error);
            }
        }
        Ok(taken)
    }

    /// Enters ports that are held elsewhere (by a container that outlived the engine).
    pub fn adopt(&mut self, id: &str, name: &str, ports: &[PublishedPort]) {
        for port in ports {
            self.owners.insert(key(port), Owner { id: id.to_owned(), name: name.to_owned() });
        }
    }

    pub fn release(&mut self, ports: &[PublishedPort]) {
        let now = Instant::now();
        self.released.retain(|_, since| now.duration_since(*since) < LETTING_GO);
        for port in ports {
            self.owners.remove(&key(port));
            self.released.insert(key(port), now);
        }
    }

    /// Whether the refusal is of a port that was a container's until just now, so that it pays to try again.
    pub fn may_pass(&self, refusal: &Error) -> bool {
        let Error::PortInUse { protocol, host_ip, port, owner: None, .. } = refusal else { return false };
        let since = self.released.iter().find(|((proto, ip, number), _)| {
            proto == protocol && number == port && ip.is_ipv4() == host_ip.is_ipv4()
        });
        since.is_some_and(|(_, since)| since.elapsed() < LETTING_GO)
    }

    #[expect(clippy::too_many_arguments, reason = "the loop body of its only caller, which has them all")]
    fn reserve_one(
        &mut self,
        id: &str,
        name: &str,
        request: &PortRequest,
        addresses: &[IpAddr],
        local_range: (u16, u16),
        relay: bool,
        taken: &mut Reservation,
    ) -> Result<(), Error> {
        let mut targets: Vec<(IpAddr, IpAddr)> = addresses
            .iter()
            .filter_map(|&container| match (request.host_ip, container) {
                (None, IpAddr::V4(_)) => Some((Ipv4Addr::UNSPECIFIED.into(), container)),
                (None, IpAddr::V6(_)) => Some((Ipv6Addr::UNSPECIFIED.into(), container)),
                (Some(host), _) if host.is_ipv4() == container.is_ipv4() => Some((host, container)),
                (Some(_), _) => None,
            })
            .collect();
        // What no packet can be translated to is relayed, if the host has such addresses at all.
        if relay
            && request.protocol != Protocol::Sctp
            && let Some(ipv4) = addresses.iter().find(|ip| ip.is_ipv4())
            && !addresses.iter().any(IpAddr::is_ipv6)
        {
            match request.host_ip {
                Some(host) if host.is_ipv6() => targets.push((host, *ipv4)),
                None if has_ipv6() => targets.push((Ipv6Addr::UNSPECIFIED.into(), *ipv4)),
                Some(_) | None => {}
            }
        }
        if targets.is_empty() {
            return Err(Error::InvalidSandbox {
                container: name.to_owned(),
                reason: match request.host_ip {
                    Some(ip) => format!(
                        "port {} cannot be published on {ip}: the container has no address of that family",
                        request.container_port
                    ),
                    None => format!(
                        "port {} cannot be published: the container has no address",
                        request.container_port
                    ),
                },
            });
        }
        let mut attempt = |port: u16, table: &mut Self| -> Result<(), Refusal> {
            let sockets = table.bind_all(request.protocol, &targets, port)?;
            for &(host_ip, container_ip) in &targets {
                let published = PublishedPort {
                    protocol: request.protocol,
                    host_ip,
                    host_port: port,
                    container_ip,
                    container_port: request.container_port,
                };
                table.owners.insert(key(&published), Owner { id: id.to_owned(), name: name.to_owned() });
                taken.ports.push(published);
            }
            taken.held.extend(sockets);
            Ok(())
        };
        let refused = |refusal: Refusal, port: u16| match refusal {
            Refusal::Taken { host_ip, owner } => Error::PortInUse {
                endpoint: name.to_owned(),
                host_ip,
                port,
                protocol: request.protocol,
                owner: owner.filter(|(owner_id, _)| owner_id != id).map(|(_, owner_name)| owner_name),
            },
            Refusal::Bind { host_ip, source } => Error::PortBind {
                endpoint: name.to_owned(),
                host_ip,
                port,
                protocol: request.protocol,
                source,
            },
        };
        let (first, last, start) = match request.host_port {
            HostPort::Fixed(port) => return attempt(port, self).map_err(|refusal| refused(refusal, port)),
            HostPort::Range(first, last) => (first, last, first),
            HostPort::Ephemeral => {
                let (first, last) = local_range;
                (first, last, self.next_ephemeral.clamp(first, last))
            }
        };
        for port in (start..=last).chain(first..start) {
            match attempt(port, self) {
                Ok(()) => {
                    if request.host_port == HostPort::Ephemeral {
                        self.next_ephemeral = if port == last { first } else { port + 1 };
                    }
                    return Ok(());
                }
                Err(Refusal::Taken { .. }) => {}
                Err(refusal @ Refusal::Bind { .. }) => return Err(refused(refusal, port)),
            }
        }
        Err(Error::PortsExhausted { endpoint: name.to_owned(), first, last, protocol: request.protocol })
    }

    fn bind_all(
        &self,
        protocol: Protocol,
        targets: &[(IpAddr, IpAddr)],
        port: u16,
    ) -> Result<Vec<OwnedFd>, Refusal> {
        let mut sockets = Vec::with_capacity(targets.len());
        for &(host_ip, _) in targets {
            if let Some(owner) = self.owner(protocol, host_ip, port) {
                return Err(Refusal::Taken { host_ip, owner: Some((owner.id.clone(), owner.name.clone())) });
            }
            match bind(protocol, host_ip, port) {
                Ok(socket) => sockets.push(socket),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    return Err(Refusal::Taken { host_ip, owner: None });
                }
                Err(source) => return Err(Refusal::Bind { host_ip, source }),
            }
        }
        Ok(sockets)
    }

    /// Who has the port on this address, or on all, or (if all are wanted) on any.
    fn owner(&self, protocol: Protocol, host_ip: IpAddr, port: u16) -> Option<&Owner> {
        let wildcard: IpAddr = match host_ip {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        self.owners
            .get(&(protocol, host_ip, port))
            .or_else(|| self.owners.get(&(protocol, wildcard, port)))
            .or_else(|| {
                let same_family = |ip: &IpAddr| ip.is_ipv4() == host_ip.is_ipv4();
                host_ip
                    .is_unspecified()
                    .then(|| {
                        self.owners
                            .iter()
                            .find(|((proto, ip, number), _)| {
                                *proto == protocol && *number == port && same_family(ip)
                            })
                            .map(|(_, owner)| owner)
                    })
                    .flatten()
            })
    }
}

enum Refusal {
    Taken { host_ip: IpAddr, owner: Option<(String, String)> },
    Bind { host_ip: IpAddr, source: io::Error },
}

/// Whether programs on this host can bind addresses of IPv6.
fn has_ipv6() -> bool {
    bind_with(Protocol::Udp, Ipv6Addr::LOCALHOST.into(), 0, false).is_ok()
}

fn key(port: &PublishedPort) -> (Protocol, IpAddr, u16) {
    (port.protocol, port.host_ip, port.host_port)
}

/// Binds without listening. First without address reuse, which no other bind can share; if that fails,
/// perhaps only for connections of a former server that linger in TIME_WAIT, once more with it, which still
/// fails if somebody listens or holds the port.
fn bind(protocol: Protocol, ip: IpAddr, port: u16) -> io::Result<OwnedFd> {
    match bind_with(protocol, ip, port, false) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && protocol == Protocol::Tcp => {
            bind_with(protocol, ip, port, true)
        }
        result => result,
    }
}

fn bind_with(protocol: Protocol, ip: IpAddr, port: u16, reuse: bool) -> io::Result<OwnedFd> {
    let family = if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let (kind, number) = match protocol {
        Protocol::Tcp => (SocketType::STREAM, ipproto::TCP),
        Protocol::Udp => (SocketType::DGRAM, ipproto::UDP),
        Protocol::Sctp => (SocketType::STREAM, ipproto::SCTP),
    };
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, Some(number))?;
    if ip.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if reuse {
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    if protocol == Protocol::Udp {
        // Nothing reads it; whatever gets past the firewall shall not pile up.
        sockopt::set_socket_recv_buffer_size(&socket, 1)?;
    }
    rustix::net::bind(&socket, &SocketAddr::new(ip, port))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(host_port: HostPort) -> PortRequest {
        PortRequest { protocol: Protocol::Tcp, host_ip: None, host_port, container_port: 80 }
    }

    #[test]
    fn bindings_of_the_api_are_read() {
        let port = PortRequest::from_binding("80/udp", "127.0.0.1", "8080").unwrap();
        assert_eq!(port.protocol, Protocol::Udp);
        assert_eq!(port.host_ip, Some("127.0.0.1".parse().unwrap()));
        assert_eq!(port.host_port, HostPort::Fixed(8080));
        assert_eq!(PortRequest::from_binding("80", "", "").unwrap().host_port, HostPort::Ephemeral);
        assert_eq!(PortRequest::from_binding("80/tcp", "", "1-9").unwrap().host_port, HostPort::Range(1, 9));
    }

    #[test]
    fn bad_bindings_are_refused_by_name() {
        for (container, ip, host) in [
            ("80/tcp", "", "70000"),
            ("70000/tcp", "", "80"),
            ("0/tcp", "", "80"),
            ("80/icmp", "", "80"),
            ("80/tcp", "localhost", "80"),
            ("80/tcp", "", "9-1"),
            ("80/tcp", "", "+5"),
            ("80/tcp", "", "-1"),
            ("", "", "80"),
        ] {
            assert!(PortRequest::from_binding(container, ip, host).is_err(), "{container} {ip} {host}");
        }
    }

    #[test]
    fn publish_forms_expand() {
        let one = |text: &str| {
            let all = PortRequest::from_publish(text).unwrap();
            assert_eq!(all.len(), 1, "{text}");
            all[0].clone()
        };
        assert_eq!(one("80"), request(HostPort::Ephemeral));
        assert_eq!(one("8080:80"), request(HostPort::Fixed(8080)));
        assert_eq!(one("8080-8090:80"), request(HostPort::Range(8080, 8090)));
        assert_eq!(one("127.0.0.1::80").host_ip, Some("127.0.0.1".parse().unwrap()));
        assert_eq!(one("[::1]:8080:80/udp").host_ip, Some("::1".parse().unwrap()));
        assert_eq!(one("[::1]:8080:80/udp").protocol, Protocol::Udp);
        let range = PortRequest::from_publish("8000-8002:80-82").unwrap();
        assert_eq!(range.len(), 3);
        assert_eq!((range[2].host_port, range[2].container_port), (HostPort::Fixed(8002), 82));
        for text in [
            "8000-8002:80-81",
            "8000:80-81",
            "70000:80",
            "",
            ":",
            "8080:",
            "1.2.3:80:80",
            "[::1:80:80",
            "80/x",
        ] {
            assert!(PortRequest::from_publish(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_port_is_held_against_programs_and_containers() {
        let mut table = PortTable::default();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = listener.local_addr().unwrap().port();
        let fixed = |port| PortRequest {
            host_ip: Some(Ipv4Addr::LOCALHOST.into()),
            ..request(HostPort::Fixed(port))
        };
        let ip = [IpAddr::from([172, 30, 0, 2])];
        let error = table.reserve("a", "web", &[fixed(taken)], &ip, (32768, 60999), false).unwrap_err();
        let text = format!(
            "driver failed programming external connectivity on endpoint web: Bind for 127.0.0.1:{taken} failed: port is already allocated"
        );
        assert_eq!(error.to_string(), text);
        drop(listener);
        let held = table.reserve("a", "web", &[fixed(taken)], &ip, (32768, 60999), false).unwrap();
        assert!(std::net::TcpListener::bind(("127.0.0.1", taken)).is_err());
        let error = table.reserve("b", "other", &[fixed(taken)], &ip, (32768, 60999), false).unwrap_err();
        assert!(error.to_string().ends_with("port is already allocated (by container web)"), "{error}");
        table.release(&held.ports);
        drop(held);
        table.reserve("b", "other", &[fixed(taken)], &ip, (32768, 60999), false).unwrap();
    }

    #[test]
    fn a_wildcard_conflicts_with_any_address_of_its_family() {
        let mut table = PortTable::default();
        let port = PublishedPort {
            protocol: Protocol::Tcp,
            host_ip: [127, 0, 0, 1].into(),
            host_port: 80,
            container_ip: [172, 30, 0, 2].into(),
            container_port: 80,
        };
        table.adopt("a", "web", &[port]);
        assert!(table.owner(Protocol::Tcp, Ipv4Addr::UNSPECIFIED.into(), 80).is_some());
        assert!(table.owner(Protocol::Tcp, Ipv6Addr::UNSPECIFIED.into(), 80).is_none());
        assert!(table.owner(Protocol::Udp, Ipv4Addr::UNSPECIFIED.into(), 80).is_none());
        assert!(table.owner(Protocol::Tcp, [127, 0, 0, 2].into(), 80).is_none());
    }

    #[test]
    fn a_failure_releases_the_ports_taken_before() {
        let mut table = PortTable::default();
        let ip = [IpAddr::from([172, 30, 0, 2])];
        let requests = [
            PortRequest { host_ip: Some(Ipv4Addr::LOCALHOST.into()), ..request(HostPort::Ephemeral) },
            PortRequest { host_ip: Some([192, 0, 2, 99].into()), ..request(HostPort::Ephemeral) },
        ];
        let error = table.reserve("a", "web", &requests, &ip, (40000, 40100), false).unwrap_err();
        assert!(matches!(error, Error::PortBind { .. }), "{error}");
        assert!(table.owners.is_empty());
    }
}
