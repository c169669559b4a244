//! The network crate's fabric, opened with the engine. A host that does not let us have one can still run containers
//! with the network modes `none` and `host`; the others say what was in the way.

use brigantine_network::{Attachment, BridgeSpec, Fabric, Live, Sandbox, SandboxSpec};
use ipnet::IpNet;

use crate::config::Config;
use crate::{Class, Error, Result};

/// Namespaces kept ready for the next containers.
const WARM: usize = 4;

/// What makes bridges and sandboxes.
#[derive(Debug)]
pub(crate) struct Plumbing {
    fabric: Result<Fabric, String>,
    firewall: bool,
}

impl Plumbing {
    pub(crate) fn open(config: &Config) -> Self {
        let table = format!("brigantine-{}", config.bridge);
        let fabric = Fabric::open(brigantine_network::Config { table, warm: WARM }).map_err(|error| {
            let error = refused(error).report();
            tracing::warn!(error, "no networks on this host: only the modes none and host work");
            error
        });
        Self { fabric, firewall: config.firewall }
    }

    fn fabric(&self) -> Result<&Fabric> {
        self.fabric.as_ref().map_err(|error| Error::internal(format!("networks are not available: {error}")))
    }

    pub(crate) fn ensure_bridge(&self, spec: &BridgeSpec) -> Result<()> {
        self.fabric()?.ensure_bridge(spec).map_err(refused)
    }

    pub(crate) fn remove_bridge(&self, name: &str) -> Result<()> {
        self.fabric()?.remove_bridge(name).map_err(refused)
    }

    /// Makes the bridges, takes up what still runs, loads the firewall. What fails is logged: it will fail again,
    /// with its reason, for the container that needs it.
    pub(crate) fn reconcile(&self, bridges: &[BridgeSpec], live: Vec<Attachment>) {
        let Ok(fabric) = self.fabric.as_ref() else { return };
        for bridge in bridges {
            if let Err(error) = fabric.ensure_bridge(bridge) {
                tracing::warn!(bridge = bridge.name, error = refused(error).report(), "set up a bridge");
            }
        }
        let live: Vec<Live> = live.into_iter().map(|attachment| Live { attachment }).collect();
        if !self.firewall && live.is_empty() {
            return;
        }
        match fabric.reconcile(&live) {
            Ok(found) => {
                for (container, interface) in found.missing_links {
                    tracing::warn!(container, interface, "an interface of a running container is missing");
                }
            }
            Err(error) => tracing::warn!(error = refused(error).report(), "take up the containers' networks"),
        }
    }

    pub(crate) fn connect(&self, spec: &SandboxSpec) -> Result<Sandbox> {
        self.fabric()?.connect(spec).map_err(refused)
    }

    pub(crate) fn disconnect(&self, container: &str) -> Result<()> {
        match self.fabric.as_ref() {
            Ok(fabric) => fabric.disconnect(container).map_err(refused),
            Err(_unavailable) => Ok(()),
        }
    }

    pub(crate) fn counters(&self, container: &str) -> Result<Vec<(String, brigantine_network::Counters)>> {
        match self.fabric.as_ref() {
            Ok(fabric) => fabric.counters(container).map_err(refused),
            Err(_unavailable) => Ok(Vec::new()),
        }
    }

    pub(crate) fn host_routes(&self) -> Vec<IpNet> {
        self.fabric.as_ref().ok().and_then(|fabric| fabric.host_routes().ok()).unwrap_or_default()
    }
}

/// The network crate's refusal as the engine's, by class.
pub(super) fn refused(error: brigantine_network::Error) -> Error {
    use brigantine_network::Error as E;
    let class = match &error {
        E::SubnetInUse { .. } | E::BridgeInUse { .. } => Class::Forbidden,
        error if error.is_invalid_input() => Class::InvalidParameter,
        // docker answers 500 to a port that is taken.
        _ => Class::Internal,
    };
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    Error::of(class, text)
}
