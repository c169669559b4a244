//! Where the engine listens, and the sentence for when it does not.

use std::fmt;
use std::path::PathBuf;

use crate::fault::{Fault, Outcome};

/// The socket a daemon listens on when nobody says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/brigantine/brig.sock";

#[derive(Debug, Clone)]
pub struct Endpoint {
    pub address: Address,
    /// Nobody chose this address: the client may start a daemon for it.
    pub is_default: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Unix(PathBuf),
    Tcp(String),
}

impl Endpoint {
    /// `-H`, then $BRIG_HOST, then $DOCKER_HOST, then the default socket.
    pub fn choose(flag: Option<&str>) -> Outcome<Self> {
        let chosen = flag
            .map(str::to_owned)
            .or_else(|| std::env::var("BRIG_HOST").ok().filter(|host| !host.is_empty()))
            .or_else(|| std::env::var("DOCKER_HOST").ok().filter(|host| !host.is_empty()));
        match chosen {
            Some(host) => Ok(Self { address: parse(&host)?, is_default: false }),
            None => Ok(Self { address: Address::Unix(DEFAULT_SOCKET.into()), is_default: true }),
        }
    }

    pub fn host_header(&self) -> &str {
        match &self.address {
            Address::Unix(_) => "localhost",
            Address::Tcp(authority) => authority,
        }
    }
}

fn parse(host: &str) -> Outcome<Address> {
    match host.split_once("://") {
        Some(("unix", path)) if !path.is_empty() => Ok(Address::Unix(path.into())),
        Some(("tcp" | "http", authority)) if !authority.is_empty() => {
            let authority = authority.trim_end_matches('/');
            let has_port = authority.rsplit(']').next().is_some_and(|tail| tail.contains(':'));
            Ok(Address::Tcp(if has_port { authority.to_owned() } else { format!("{authority}:2375") }))
        }
        Some((scheme @ ("ssh" | "https" | "npipe" | "fd"), _)) => Err(Fault::said(format!(
            "{host}: connecting by {scheme}:// is not built yet; use unix:// or tcp://"
        ))),
        _ if host.starts_with('/') => Ok(Address::Unix(host.into())),
        _ => Err(Fault::said(format!(
            "unable to parse docker host `{host}`: use unix:///path/to.sock or tcp://host:port"
        ))),
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Unix(path) => write!(f, "unix://{}", path.display()),
            Address::Tcp(authority) => write!(f, "tcp://{authority}"),
        }
    }
}

/// No engine answers at an address: which one, why, and what to do. Opens with docker's words, which scripts look for.
#[derive(Debug, thiserror::Error)]
#[error("Cannot connect to the Docker daemon at {address}. Is the docker daemon running? ({why}){advice}")]
pub struct Unreachable {
    pub address: String,
    pub why: String,
    pub advice: String,
}

impl Unreachable {
    pub fn new(endpoint: &Endpoint, error: &std::io::Error) -> Self {
        let why = crate::output::os_text(error);
        let advice = match (&endpoint.address, error.kind()) {
            (Address::Unix(path), std::io::ErrorKind::PermissionDenied) => {
                format!(
                    "\nYour user may not open {}: become root, or join the group that owns it.",
                    path.display()
                )
            }
            (Address::Unix(_), _) => format!("\nStart one with: brig daemon -H {endpoint}"),
            (Address::Tcp(_), _) => String::new(),
        };
        Self { address: endpoint.to_string(), why, advice }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_parse() {
        assert_eq!(parse("unix:///x/y.sock").unwrap(), Address::Unix("/x/y.sock".into()));
        assert_eq!(parse("tcp://127.0.0.1").unwrap(), Address::Tcp("127.0.0.1:2375".into()));
        assert_eq!(parse("tcp://[::1]:99/").unwrap(), Address::Tcp("[::1]:99".into()));
        assert!(parse("ssh://x").unwrap_err().to_string().contains("not built yet"));
        assert!(parse("junk").unwrap_err().to_string().contains("junk"));
    }
}
