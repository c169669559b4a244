//! How a registry is run.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::{Config, Credentials};

/// Options of a [`Server`](super::Server).
#[derive(Debug, Clone)]
pub struct Options {
    /// Addresses to listen on, `host:port`.
    pub listen: Vec<String>,
    pub source: Source,
    /// Refuse what changes anything.
    pub read_only: bool,
    /// Take manifests that name content which is not there.
    pub sparse: bool,
    pub access: Access,
    pub tls: Option<Tls>,
    /// Serve `/metrics` there instead of beside the registry.
    pub metrics: Option<SocketAddr>,
    pub quotas: Quotas,
    pub collection: Collection,
    pub limits: Limits,
}

/// Where content is.
#[derive(Debug, Clone)]
pub enum Source {
    /// Storage of its own, below this directory.
    Storage(PathBuf),
    /// Storage of its own, filled from another registry as it is asked for.
    Cache { root: PathBuf, upstream: Box<Upstream> },
    /// An engine's image store, read only.
    Engine(PathBuf),
}

/// The registry that a cache is for.
#[derive(Debug, Clone)]
pub struct Upstream {
    /// `https://host[:port]`, or `http://…` for one without TLS.
    pub url: String,
    pub credentials: Option<Credentials>,
    /// For how long a tag that was asked for is not asked for again.
    pub fresh: Duration,
    /// Content that nobody asked for so long is removed; `None` keeps it.
    pub keep: Option<Duration>,
    pub config: Config,
}

/// Who may use the registry.
#[derive(Debug, Clone)]
pub enum Access {
    Open,
    Htpasswd {
        file: PathBuf,
        realm: String,
        /// Reading needs no password.
        anonymous_read: bool,
    },
    Token {
        /// URL of the token server.
        realm: String,
        service: String,
        issuer: String,
        /// PEM public keys or certificates, or a JSON Web Key Set.
        keys: PathBuf,
    },
}

/// TLS of the registry itself.
#[derive(Debug, Clone)]
pub struct Tls {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Clients have to show a certificate of this authority.
    pub client_authority: Option<PathBuf>,
}

/// Bytes that repositories may hold.
#[derive(Debug, Clone, Default)]
pub struct Quotas {
    pub default: Option<u64>,
    /// `name` or `prefix/*`, first match first.
    pub named: Vec<(String, u64)>,
}

impl Quotas {
    /// The quota of a repository, in bytes.
    pub(super) fn of(&self, repository: &str) -> Option<u64> {
        let named = self.named.iter().find(|(pattern, _)| match pattern.strip_suffix("/*") {
            Some(prefix) => repository.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/')),
            None => pattern == repository,
        });
        named.map(|(_, bytes)| *bytes).or(self.default)
    }
}

/// When and what garbage is collected.
#[derive(Debug, Clone)]
pub struct Collection {
    /// `None`: only when asked to.
    pub interval: Option<Duration>,
    /// What was used so lately is never garbage: it may belong to a push that is going on.
    pub grace: Duration,
    /// Manifests without a tag, and not named by another one, are garbage too.
    pub untagged: bool,
    /// Unfinished uploads nobody went on with for so long are garbage.
    pub uploads: Duration,
}

impl Default for Collection {
    fn default() -> Self {
        Self {
            interval: Some(Duration::from_hours(6)),
            grace: Duration::from_hours(24),
            untagged: false,
            uploads: Duration::from_hours(7 * 24),
        }
    }
}

/// What clients may take of the registry's resources.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of a manifest.
    pub manifest: usize,
    /// The longest silence of a client, either way.
    pub patience: Duration,
    /// Connections at once; further ones wait.
    pub connections: usize,
    /// The most entries of one answer of a list.
    pub page: usize,
    /// What clients are told is the smallest chunk worth sending.
    pub chunk: Option<u64>,
    /// How long requests may go on after the registry was told to stop.
    pub farewell: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            manifest: 8 << 20,
            patience: Duration::from_mins(2),
            connections: 4096,
            page: 1000,
            chunk: None,
            farewell: Duration::from_secs(30),
        }
    }
}

impl Options {
    /// Options with everything but these at its default.
    pub fn new(listen: impl Into<String>, source: Source) -> Self {
        Self {
            listen: vec![listen.into()],
            source,
            read_only: false,
            sparse: false,
            access: Access::Open,
            tls: None,
            metrics: None,
            quotas: Quotas::default(),
            collection: Collection::default(),
            limits: Limits::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_matching_quota_counts() {
        let quotas = Quotas { default: Some(1), named: vec![("a/b".into(), 2), ("a/*".into(), 3)] };
        assert_eq!(quotas.of("a/b"), Some(2));
        assert_eq!(quotas.of("a/c/d"), Some(3));
        assert_eq!(quotas.of("ab"), Some(1));
        assert_eq!(quotas.of("a"), Some(1));
    }
}
