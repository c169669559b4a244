//! The network crate's fabric, opened with the engine. A host that does not let us have one can still run containers
//! with the network modes `none` and `host`; the others say what was in the way.

use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use brigantine_network::cni::{NetworkList, Places};
use brigantine_network::helper::{self, Relayed, Resident, SharedNetwork, Sockets};
use brigantine_network::{
    Attachment, BridgeSpec, DefaultRoutes, Fabric, FirewallBackend, InterfaceSpec, Live, NameSockets, Owner,
    PortRequest, Sandbox, SandboxSpec, SubinterfaceSpec, Tunnel,
};
use ipnet::IpNet;

use crate::config::Config;
use crate::error::Context;
use crate::{Class, Error, Result};

/// Namespaces kept ready for the next containers.
const WARM: usize = 4;

/// What makes bridges and sandboxes.
#[derive(Debug)]
pub(crate) struct Plumbing {
    fabric: Result<Fabric, String>,
    firewall: bool,
    /// Answers names and relays ports; not there where the engine runs without a daemon.
    helper: Option<Arc<helper::Client>>,
}

impl Plumbing {
    pub(crate) fn open(config: &Config) -> Self {
        let table = format!("brigantine-{}", config.bridge);
        let owner = config.userns.as_ref().map(|remap| {
            let (uid_map, gid_map) = remap.lines();
            Owner { uid_map, gid_map }
        });
        let how = brigantine_network::Config {
            table,
            backend: config.firewall_backend,
            warm: WARM,
            owner,
            host_firewall: config.host_firewall,
            relay: !config.network_helper.is_empty(),
            cni: Places {
                plugins: config.cni_plugin_dirs.clone(),
                cache: config.data_root.join("cni"),
                namespaces: config.exec_root.join("netns"),
            },
        };
        let fabric = Fabric::open(how).map_err(|error| {
            let error = refused(error).report();
            tracing::warn!(error, "no networks on this host: only the modes none and host work");
            error
        });
        let helper = (fabric.is_ok() && !config.network_helper.is_empty()).then(|| {
            let path = config.exec_root.join("network.sock");
            Arc::new(helper::Client::new(path, config.network_helper.clone()))
        });
        Self { fabric, firewall: config.firewall, helper }
    }

    /// Watches over the firewall's tables as long as the engine is there.
    pub(crate) fn keep_firewall(self: &Arc<Self>) {
        let Ok(fabric) = self.fabric.as_ref() else { return };
        if !self.firewall {
            return;
        }
        let mut events = match fabric.firewall_events() {
            Ok(events) => events,
            Err(error) => {
                tracing::warn!(
                    error = refused(error).report(),
                    "changes of the firewall by others go unnoticed"
                );
                return;
            }
        };
        let plumbing = Arc::downgrade(self);
        let watching = std::thread::Builder::new().name("firewall".to_owned()).spawn(move || {
            while let Some(plumbing) = plumbing.upgrade() {
                if let Ok(fabric) = &plumbing.fabric
                    && let Err(error) = fabric.reassert(&mut events, Duration::from_secs(1))
                {
                    tracing::error!(error = refused(error).report(), "load the firewall again");
                }
            }
        });
        if let Err(error) = watching {
            tracing::warn!(%error, "changes of the firewall by others go unnoticed");
        }
    }

    /// What the firewall is made with, if there is one.
    pub(crate) fn firewall_backend(&self) -> Option<FirewallBackend> {
        self.fabric.as_ref().ok().filter(|_| self.firewall).map(Fabric::firewall_backend)
    }

    pub(crate) fn helper(&self) -> Option<Arc<helper::Client>> {
        self.helper.clone()
    }

    /// Tells the helper about a container; with its network namespace if it is new to it.
    /// `again`: it was known to a former helper.
    pub(crate) fn put_resident(
        &self,
        resident: Resident,
        netns: Option<BorrowedFd<'_>>,
        again: bool,
    ) -> Result<()> {
        let Some(helper) = &self.helper else { return Ok(()) };
        let sockets = match netns {
            None => None,
            Some(netns) => {
                Some(Fabric::name_sockets(netns, again).map_err(refused).and_then(|made| keep(made, netns))?)
            }
        };
        let id = resident.id.clone();
        helper.put(resident, sockets).doing(|| format!("enter the names of container {id}"))
    }

    /// The same for a container that is about to start, with the sockets that came with its sandbox.
    pub(crate) fn enter_resident(
        &self,
        resident: Resident,
        netns: BorrowedFd<'_>,
        made: Option<NameSockets>,
    ) -> Result<()> {
        let (Some(helper), Some(made)) = (&self.helper, made) else {
            return self.put_resident(resident, Some(netns), false);
        };
        let id = resident.id.clone();
        let sockets = keep(made, netns)?;
        helper.put(resident, Some(sockets)).doing(|| format!("enter the names of container {id}"))
    }

    /// The tunnel of a network's bridge, as it was made.
    pub(crate) fn tunnel(&self, bridge: &str) -> Option<Tunnel> {
        self.fabric.as_ref().ok()?.tunnel(bridge)
    }

    pub(crate) fn share(&self, networks: Vec<SharedNetwork>) -> Result<()> {
        match &self.helper {
            Some(helper) => helper.share(networks).doing(|| "tell the network helper of networks".to_owned()),
            None => Ok(()),
        }
    }

    pub(crate) fn relay(&self, id: &str, relayed: &[(OwnedFd, Relayed)]) -> Result<()> {
        match &self.helper {
            Some(helper) => helper.relay(id, relayed).doing(|| format!("relay ports of container {id}")),
            None => Ok(()),
        }
    }

    pub(crate) fn hold(&self, id: &str, held: &[OwnedFd]) -> Result<()> {
        match &self.helper {
            Some(helper) => helper.hold(id, held).doing(|| format!("hold ports of container {id}")),
            None => Ok(()),
        }
    }

    /// Lets the helper drop what it has of a container. A helper that has gone has dropped it.
    pub(crate) fn forget(&self, id: &str) {
        if let Some(helper) = &self.helper
            && let Err(error) = helper.forget(id)
        {
            tracing::debug!(container = id, %error, "the network helper forgets a container");
        }
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

    pub(crate) fn ensure_parent(&self, spec: &SubinterfaceSpec) -> Result<()> {
        self.fabric()?.ensure_parent(spec).map_err(refused)
    }

    pub(crate) fn remove_parent(&self, name: &str) -> Result<()> {
        self.fabric()?.remove_parent(name).map_err(refused)
    }

    /// Makes a network of CNI plugins known, in the version that they know, if they are there.
    pub(crate) fn add_foreign(&self, name: &str, list: NetworkList) -> Result<NetworkList> {
        let fabric = self.fabric()?;
        let list = fabric.negotiate(list).map_err(refused)?;
        fabric.ensure_foreign(name, &list).map_err(refused)?;
        Ok(list)
    }

    /// What the plugins of a network say that keeps them from connecting containers, if anything does.
    pub(crate) fn foreign_warning(&self, list: &NetworkList) -> Option<String> {
        Some(refused(self.fabric().ok()?.status(list).err()?).report())
    }

    pub(crate) fn remove_foreign(&self, name: &str) -> Result<()> {
        self.fabric()?.remove_foreign(name).map_err(refused)
    }

    /// Makes the bridges, takes up what still runs, loads the firewall. What fails is logged: it will fail again,
    /// with its reason, for the container that needs it.
    pub(crate) fn reconcile(&self, carriers: &Carriers, live: Vec<Attachment>) {
        let Ok(fabric) = self.fabric.as_ref() else { return };
        for parent in &carriers.parents {
            if let Err(error) = fabric.ensure_parent(parent) {
                let parent = parent.parent_name();
                tracing::warn!(
                    parent,
                    error = refused(error).report(),
                    "set up a network's parent interface"
                );
            }
        }
        for (name, list) in &carriers.foreign {
            if let Err(error) = fabric.ensure_foreign(name, list) {
                tracing::warn!(
                    network = list.name(),
                    error = refused(error).report(),
                    "take up a CNI network"
                );
            }
        }
        for bridge in &carriers.bridges {
            if let Err(error) = fabric.ensure_bridge(bridge) {
                tracing::warn!(bridge = bridge.name, error = refused(error).report(), "set up a bridge");
            }
        }
        let live: Vec<Live> = live.into_iter().map(|attachment| Live { attachment }).collect();
        if !self.firewall && live.is_empty() && carriers.foreign.is_empty() {
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

    /// Gives a running container one more interface, and its routes and ports their place.
    pub(crate) fn attach(
        &self,
        container: &str,
        netns: BorrowedFd<'_>,
        interface: &InterfaceSpec,
        wanted: &Placed,
    ) -> Result<(Attachment, Vec<OwnedFd>)> {
        let fabric = self.fabric()?;
        let (_, mut held) = fabric.attach(container, netns, interface, &wanted.ports).map_err(refused)?;
        let placed = place(fabric, container, netns, wanted).map(|(attachment, more)| {
            held.extend(more);
            (attachment, held)
        });
        if placed.is_err()
            && let Err(error) = fabric.detach(container, netns, &interface.name)
        {
            tracing::warn!(container, error = refused(error).report(), "left over from a failed connection");
        }
        placed
    }

    /// Takes an interface of a running container away.
    pub(crate) fn detach(
        &self,
        container: &str,
        netns: BorrowedFd<'_>,
        interface: &str,
        wanted: &Placed,
    ) -> Result<(Attachment, Vec<OwnedFd>)> {
        let fabric = self.fabric()?;
        fabric.detach(container, netns, interface).map_err(refused)?;
        place(fabric, container, netns, wanted)
    }

    /// Whether containers can have IPv6 here.
    pub(crate) fn has_ipv6(&self) -> bool {
        self.fabric.is_ok() && brigantine_network::has_ipv6()
    }

    pub(crate) fn disconnect(&self, container: &str) -> Result<()> {
        match self.fabric.as_ref() {
            Ok(fabric) => fabric.disconnect(container).map_err(refused),
            Err(_unavailable) => Ok(()),
        }
    }

    /// `netns` is asked for the container's network namespace if it is needed.
    pub(crate) fn counters(
        &self,
        container: &str,
        netns: impl FnOnce() -> Option<OwnedFd>,
    ) -> Result<Vec<(String, brigantine_network::Counters)>> {
        match self.fabric.as_ref() {
            Ok(fabric) => fabric.counters(container, netns).map_err(refused),
            Err(_unavailable) => Ok(Vec::new()),
        }
    }

    pub(crate) fn judges(&self) -> Result<Judges> {
        let Ok(fabric) = self.fabric.as_ref() else { return Ok(Judges::default()) };
        Ok(Judges {
            has_gate: fabric.has_gate(),
            input: fabric.input_policies().map_err(refused)?,
            forward: fabric.forward_policies().map_err(refused)?,
            addresses: fabric.host_addresses().map_err(refused)?,
        })
    }

    pub(crate) fn host_routes(&self) -> Vec<IpNet> {
        self.fabric.as_ref().ok().and_then(|fabric| fabric.host_routes().ok()).unwrap_or_default()
    }
}

/// Whose rules decide about connections from other machines.
#[derive(Debug, Default)]
pub(crate) struct Judges {
    /// The host's input rules are asked about published ports.
    pub has_gate: bool,
    /// Chains on the input and on the forward hook that drop by default.
    pub input: Vec<String>,
    pub forward: Vec<String>,
    /// The host's own addresses.
    pub addresses: Vec<IpAddr>,
}

/// What all networks need on the host.
#[derive(Debug)]
pub(crate) struct Carriers {
    pub bridges: Vec<BridgeSpec>,
    pub parents: Vec<SubinterfaceSpec>,
    /// Networks of CNI plugins by id.
    pub foreign: Vec<(String, NetworkList)>,
}

/// Where a container's default routes and published ports shall be.
#[derive(Debug)]
pub(crate) struct Placed {
    pub routes: DefaultRoutes,
    pub ports: Vec<PortRequest>,
}

fn place(
    fabric: &Fabric,
    container: &str,
    netns: BorrowedFd<'_>,
    wanted: &Placed,
) -> Result<(Attachment, Vec<OwnedFd>)> {
    fabric.set_default_routes(container, netns, &wanted.routes).map_err(refused)?;
    fabric.republish(container, &wanted.ports).map_err(refused)
}

/// Sockets with the namespace that they are in, for the helper.
fn keep(made: NameSockets, netns: BorrowedFd<'_>) -> Result<Sockets> {
    let netns = netns.try_clone_to_owned().doing(|| "keep a network namespace".to_owned())?;
    Ok(Sockets { udp: made.udp, tcp: made.tcp, netns })
}

/// The network crate's refusal as the engine's, by class.
pub(super) fn refused(error: brigantine_network::Error) -> Error {
    use brigantine_network::Error as E;
    let class = match &error {
        E::SubnetInUse { .. } | E::BridgeInUse { .. } => Class::Forbidden,
        E::Unsupported { .. } => Class::NotImplemented,
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
