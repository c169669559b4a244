//! What the client is configured with: mirrors, registries without TLS, limits, proxies.
//!
//! Invariant: plain HTTP is only ever spoken to loopback and to what `insecure` names.

use std::net::IpAddr;
use std::time::Duration;

/// Configuration of a [`Client`](crate::Client).
#[derive(Debug, Clone)]
pub struct Config {
    /// Base URLs of mirrors of docker.io, tried in order before it.
    pub mirrors: Vec<String>,
    /// `host`, `host:port` or address ranges that may be reached without TLS, or with any certificate.
    pub insecure: Vec<String>,
    /// Directories of hosts' own settings: `HOST/hosts.toml` as containerd reads it, `HOST/{ca.crt,*.cert,*.key}` as
    /// docker does. The first one that has the host counts.
    pub hosts: Vec<std::path::PathBuf>,
    pub max_downloads: usize,
    pub max_uploads: usize,
    /// Attempts at one transfer that make no progress before it fails.
    pub attempts: usize,
    /// How long a transfer may stand still.
    pub stall: Duration,
    /// First pause before trying again; doubles each time.
    pub back_off: Duration,
    pub http_proxy: Option<String>,
    pub https_proxy: Option<String>,
    pub no_proxy: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mirrors: Vec::new(),
            insecure: Vec::new(),
            hosts: Vec::new(),
            max_downloads: 3,
            max_uploads: 5,
            attempts: 5,
            stall: Duration::from_mins(1),
            back_off: Duration::from_millis(500),
            http_proxy: None,
            https_proxy: None,
            no_proxy: None,
        }
    }
}

/// Where hosts' settings are looked for, in order.
const HOSTS: [&str; 3] = ["/etc/brigantine/certs.d", "/etc/docker/certs.d", "/etc/containerd/certs.d"];

impl Config {
    /// The defaults, with this machine's settings of hosts.
    pub fn for_host() -> Self {
        Self { hosts: HOSTS.map(std::path::PathBuf::from).to_vec(), ..Self::default() }
    }

    /// Whether the registry at `domain` (`host[:port]`) may be reached without TLS.
    pub(crate) fn is_insecure(&self, domain: &str) -> bool {
        let host = host_of(domain);
        let address: Option<IpAddr> = host.parse().ok();
        if host == "localhost" || host.ends_with(".localhost") || address.is_some_and(|ip| ip.is_loopback()) {
            return true;
        }
        self.insecure
            .iter()
            .any(|rule| rule == domain || rule == host || address.is_some_and(|ip| range_contains(rule, ip)))
    }
}

/// The host of `host`, `host:port`, `[v6]` or `[v6]:port`.
pub(crate) fn host_of(domain: &str) -> &str {
    if let Some(rest) = domain.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    domain.split(':').next().unwrap_or(domain)
}

fn range_contains(range: &str, ip: IpAddr) -> bool {
    let Some((base, bits)) = range.split_once('/') else { return false };
    let (Ok(base), Ok(bits)) = (base.parse::<IpAddr>(), bits.parse::<u32>()) else { return false };
    match (base, ip) {
        (IpAddr::V4(base), IpAddr::V4(ip)) if bits <= 32 => {
            let shift = 32 - bits;
            u32::from(base).checked_shr(shift).unwrap_or(0) == u32::from(ip).checked_shr(shift).unwrap_or(0)
        }
        (IpAddr::V6(base), IpAddr::V6(ip)) if bits <= 128 => {
            let shift = 128 - bits;
            u128::from(base).checked_shr(shift).unwrap_or(0) == u128::from(ip).checked_shr(shift).unwrap_or(0)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_named_registries_may_be_without_tls() {
        let config = Config {
            insecure: vec!["10.0.0.0/8".into(), "lab:5000".into(), "old".into()],
            ..Config::default()
        };
        for domain in
            ["localhost:5000", "127.0.0.1:1", "127.8.8.8", "[::1]:5000", "10.2.3.4:5000", "lab:5000", "old:1"]
        {
            assert!(config.is_insecure(domain), "{domain}");
        }
        for domain in
            ["docker.io", "lab", "lab:5001", "11.0.0.1", "localhost.example.com", "[2001:db8::1]:5000"]
        {
            assert!(!config.is_insecure(domain), "{domain}");
        }
    }
}
