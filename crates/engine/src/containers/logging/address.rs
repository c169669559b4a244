//! Where a collector is: as it was given, resolved, and tried.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use brigantine_shim::tls::Trust;
use brigantine_shim::{Endpoint, TlsEndpoint};

use super::no_driver;
use crate::Result;

/// How long a collector may take to accept a connection when a container starts.
const CONNECT: Duration = Duration::from_secs(5);

/// A collector's address as it was given.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Address {
    Udp(String),
    Tcp(String),
    Tls(String),
    Datagram(PathBuf),
    Stream(PathBuf),
}

impl Address {
    /// Asks for the name's address. Blocks.
    pub(super) fn resolve(self, trust: Trust) -> Result<Endpoint> {
        Ok(match self {
            Self::Stream(path) => Endpoint::Stream(path),
            Self::Datagram(path) => Endpoint::Datagram(path),
            Self::Udp(host) => Endpoint::Udp(look_up(&host)?),
            Self::Tcp(host) => Endpoint::Tcp(look_up(&host)?),
            Self::Tls(host) => Endpoint::Tls(TlsEndpoint {
                address: look_up(&host)?,
                name: without_port(&host).to_owned(),
                trust: with_known_authorities(trust),
            }),
        })
    }
}

/// The daemon's environment may name authorities; monitors have none.
fn with_known_authorities(mut trust: Trust) -> Trust {
    trust.authorities.extend(std::env::var_os("SSL_CERT_FILE").map(PathBuf::from));
    trust
}

fn look_up(host: &str) -> Result<SocketAddr> {
    match host.to_socket_addrs().map(|mut all| all.next()) {
        Ok(Some(address)) => Ok(address),
        Ok(None) => Err(no_driver(&format!("lookup {host}: no such host"))),
        Err(error) => Err(no_driver(&format!("lookup {host}")).because(error)),
    }
}

/// Docker does not start a container whose collector is not there, or not who it should be.
pub(super) fn reach(endpoint: &Endpoint) -> Result<()> {
    let (reached, name) = match endpoint {
        Endpoint::Udp(_) => return Ok(()),
        Endpoint::Datagram(path) => {
            (std::fs::metadata(path).map(drop), format!("unixgram {}", path.display()))
        }
        Endpoint::Stream(path) => (try_out(endpoint), format!("unix {}", path.display())),
        Endpoint::Tcp(address) => (try_out(endpoint), format!("tcp {address}")),
        Endpoint::Tls(tls) => (try_out(endpoint), format!("tcp+tls {}", tls.address)),
    };
    reached.map_err(|error| no_driver(&format!("dial {name}")).because(error))
}

fn try_out(endpoint: &Endpoint) -> std::io::Result<()> {
    brigantine_shim::log::reach(endpoint, CONNECT)
}

/// `host`, with `port` if it names none.
pub(super) fn with_port(host: &str, port: u16) -> String {
    if port_of(host).is_some() { host.to_owned() } else { format!("{host}:{port}") }
}

fn port_of(host: &str) -> Option<usize> {
    let (name, port) = host.rsplit_once(':')?;
    let is_port = port.parse::<u16>().is_ok() && (!name.contains(':') || name.ends_with(']'));
    is_port.then_some(name.len())
}

fn without_port(host: &str) -> &str {
    let name = port_of(host).map_or(host, |at| &host[..at]);
    name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_the_callers_or_the_protocols() {
        assert_eq!(with_port("log", 514), "log:514");
        assert_eq!(with_port("[::1]:99", 514), "[::1]:99");
        assert_eq!(with_port("[::1]", 514), "[::1]:514");
        assert_eq!(without_port("[::1]:99"), "::1");
        assert_eq!(without_port("log:514"), "log");
    }
}
