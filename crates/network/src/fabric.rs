//! The engine's network: the one handle through which bridges, sandboxes and the firewall are changed.
//!
//! Invariant: what the maps here say is what the kernel has, or will have again after the next load of the
//! firewall, which follows from them alone. No lock is held while the kernel makes a container's interfaces,
//! so containers are connected in parallel as far as the kernel lets them.

mod endpoints;
mod foreign;
mod lay;
mod leaves;
mod live;
mod names;
mod plan;
mod publish;
mod segments;
mod shield;

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use ipnet::IpNet;

pub use live::DefaultRoutes;
pub use names::NameSockets;

use crate::background::Background;
use crate::bridge::BridgeSpec;
use crate::cni::{NetworkList, Places, Plugins};
use crate::error::Error;
use crate::firewall::{Firewall, FirewallBackend};
use crate::link::{self, Link};
use crate::nft;
use crate::ports::PortTable;
use crate::sandbox::{Attachment, Counters, Sandbox, SandboxSpec};
use crate::socket::Socket;
use crate::wire::Messages;
use endpoints::Endpoints;
pub(crate) use lay::enter;
use segments::{Bridge, Parent};
use shield::GateState;

/// How an engine uses the host's network.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the engine's nf_tables table, unique on the host: `brigantine-brig0`.
    pub table: String,
    /// What the firewall is made with.
    pub backend: FirewallBackend,
    /// How many network namespaces to keep ready. 0: none.
    pub warm: usize,
    /// Whether the host's own rules for input decide about published ports, too.
    pub host_firewall: bool,
    /// Whether the engine relays what the kernel cannot route: published ports on `::1`, and those on addresses of
    /// IPv6 for containers that have none.
    pub relay: bool,
    /// Whom the namespaces of sandboxes that ask for it ([`SandboxSpec::owned`]) belong to.
    pub owner: Option<Owner>,
    /// Where the plugins of CNI networks are.
    pub cni: Places,
}

/// The id maps of user namespaces that own network namespaces: lines of `INSIDE HOST COUNT`, as
/// `/proc/<pid>/uid_map` takes them (user_namespaces(7)). Each namespace gets an owner of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub uid_map: String,
    pub gid_map: String,
}

/// A container that outlived the engine's former run.
#[derive(Clone, Debug)]
pub struct Live {
    pub attachment: Attachment,
}

/// What [`Fabric::reconcile`] found to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Interfaces of containers that no longer run, removed from the bridges.
    pub removed_links: Vec<String>,
    /// Containers of which an interface is missing on the host: `(container id, interface)`.
    pub missing_links: Vec<(String, String)>,
    /// Chains of other firewalls that drop forwarded packets by default: `ip filter FORWARD`. Only their owner
    /// can make them accept.
    pub obstacles: Vec<String>,
}

/// See the crate's documentation. Shared by reference; every method blocks for netlink round trips only.
#[derive(Debug)]
pub struct Fabric {
    firewall: Firewall,
    background: Background,
    bridges: RwLock<BTreeMap<String, Bridge>>,
    parents: RwLock<BTreeMap<String, Parent>>,
    /// Networks of CNI plugins.
    foreign: RwLock<BTreeMap<String, NetworkList>>,
    plugins: Plugins,
    endpoints: Mutex<Endpoints>,
    ports: Mutex<PortTable>,
    /// Idle sockets of the host's namespace.
    sockets: Mutex<Vec<Socket>>,
    /// Serialises changes of bridges and loads of the firewall.
    changing: Mutex<()>,
    gate: Mutex<GateState>,
    relay: bool,
}

/// Marks the ports of bridges, and says whose they are.
const ALIAS: &str = "brigantine:";

impl Fabric {
    /// Opens the fabric in the calling thread's network namespace. Changes nothing yet: the engine then calls
    /// [`Fabric::ensure_bridge`] for each bridge and [`Fabric::reconcile`] once, which loads the firewall.
    pub fn open(config: Config) -> Result<Self, Error> {
        if config.table.is_empty() || config.table.len() > 200 || config.table.contains(char::is_whitespace) {
            return Err(Error::InvalidBridge {
                bridge: config.table,
                reason: "not usable as the name of a firewall table".to_owned(),
            });
        }
        Ok(Self {
            firewall: Firewall::open(config.table, config.backend),
            background: Background::start(config.warm, config.owner),
            bridges: RwLock::default(),
            parents: RwLock::default(),
            foreign: RwLock::default(),
            plugins: Plugins::new(config.cni),
            endpoints: Mutex::default(),
            ports: Mutex::default(),
            sockets: Mutex::default(),
            changing: Mutex::default(),
            gate: Mutex::new(if config.host_firewall { GateState::Wanted } else { GateState::Without }),
            relay: config.relay,
        })
    }

    /// Takes up the containers that still run, removes what is left of others and loads the firewall in one
    /// transaction. To be called once at start, also with no containers. If it fails with
    /// [`Error::FirewallUnavailable`] sandboxes without interfaces still work; others are tried again, and
    /// refused with the same error.
    pub fn reconcile(&self, live: &[Live]) -> Result<Reconciled, Error> {
        let _changing = lock(&self.changing);
        {
            let (mut endpoints, mut ports) = (lock(&self.endpoints), lock(&self.ports));
            for Live { attachment } in live {
                ports.adopt(&attachment.id, &attachment.name, &attachment.ports);
                ports.adopt(&attachment.id, &attachment.name, &attachment.parked);
                endpoints.insert(attachment.clone());
            }
        }
        let links = self.with_socket(link::all)?;
        let own: HashSet<u32> = self.bridges().values().map(|bridge| bridge.index).collect();
        let mut report = Reconciled::default();
        let expected: HashSet<String> = {
            let endpoints = lock(&self.endpoints);
            let names = endpoints.by_id.values().flat_map(|attachment| &attachment.interfaces);
            names.map(|interface| interface.host_name.clone()).collect()
        };
        let is_stale = |link: &&Link| {
            link.alias.starts_with(ALIAS)
                && link.master.is_some_and(|master| own.contains(&master))
                && !expected.contains(&link.name)
        };
        for link in links.iter().filter(is_stale) {
            let mut batch = Messages::new();
            link::delete(&mut batch, link.index, &link.name);
            match self.execute(batch) {
                Err(error) if error.errno() == Some(libc::ENODEV) => {}
                result => result?,
            }
            report.removed_links.push(link.name.clone());
        }
        let present: HashSet<&str> = links.iter().map(|link| link.name.as_str()).collect();
        for Live { attachment } in live {
            let on_host = attachment.interfaces.iter().filter(|one| !one.host_name.is_empty());
            for interface in on_host.filter(|one| !present.contains(one.host_name.as_str())) {
                report.missing_links.push((attachment.id.clone(), interface.name.clone()));
            }
        }
        self.collect_foreign(live);
        if !self.bridges().is_empty() {
            self.load()?;
            report.obstacles = self.firewall.obstacles()?;
            let (of_firewalld, others): (Vec<_>, Vec<_>) =
                report.obstacles.iter().partition(|chain| chain.split(' ').nth(1) == Some(nft::FIREWALLD));
            for chain in others {
                tracing::warn!(
                    chain,
                    "this chain of the host drops forwarded packets unless a rule accepts them; containers on bridges \
                     have no way out until it has one for their traffic"
                );
            }
            if !of_firewalld.is_empty() {
                tracing::info!(
                    "firewalld runs: containers have a way out as long as their bridges are in its zone trusted \
                     (firewall-cmd --permanent --zone=trusted --add-interface=NAME; firewall-cmd --reload)"
                );
            }
        }
        Ok(report)
    }

    /// Makes a container's sandbox. After an error nothing of it is left.
    pub fn connect(&self, spec: &SandboxSpec) -> Result<Sandbox, Error> {
        let mut plan = self.plan(spec)?;
        self.claim(spec, &mut plan)?;
        let result = self.build(spec, &mut plan);
        if result.is_err() {
            lock(&self.endpoints).remove(&spec.id);
        }
        result
    }

    /// Removes what does not die with the container. Unknown ids are fine: the call is repeatable.
    pub fn disconnect(&self, id: &str) -> Result<(), Error> {
        let Some(attachment) = lock(&self.endpoints).remove(id) else { return Ok(()) };
        {
            let led: Vec<_> =
                attachment.ports.iter().copied().filter(|port| attachment.is_led_by_plugins(port)).collect();
            let mut ports = lock(&self.ports);
            ports.release(&attachment.parked);
            ports.release(&led);
        }
        let own: Vec<_> = attachment.own_ports().collect();
        let withdrawn = self.withdraw(&own);
        let unplugged = self.unplug(id, &attachment.interfaces);
        let host_names = attachment.interfaces.into_iter().map(|interface| interface.host_name);
        self.background.expect_gone(host_names.filter(|name| !name.is_empty()));
        withdrawn.and(unplugged)
    }

    /// The destinations the host has routes for, other than default routes; for [`crate::subnet::choose`].
    pub fn host_routes(&self) -> Result<Vec<IpNet>, Error> {
        let routes = self.with_socket(link::routes)?;
        Ok(routes.into_iter().map(|route| route.destination).collect())
    }

    /// The host's addresses that others can reach it by: not those of bridges, and none of a link alone.
    pub fn host_addresses(&self) -> Result<Vec<IpAddr>, Error> {
        let bridges: HashSet<u32> = self.bridges().values().map(|bridge| bridge.index).collect();
        let all = self.with_socket(link::all_addresses)?;
        let is_for_others = |(owner, net): &(u32, IpNet)| match net.addr() {
            _ if bridges.contains(owner) || *owner == link::LOOPBACK => false,
            IpAddr::V4(ip) => !ip.is_link_local(),
            IpAddr::V6(ip) => !ip.is_unicast_link_local(),
        };
        Ok(all.into_iter().filter(is_for_others).map(|(_, net)| net.addr()).collect())
    }

    /// What the container's interfaces have carried, by name inside the container. `netns` is asked for its network
    /// namespace if some of them cannot be seen from the host.
    pub fn counters(
        &self,
        id: &str,
        netns: impl FnOnce() -> Option<OwnedFd>,
    ) -> Result<Vec<(String, Counters)>, Error> {
        let interfaces =
            lock(&self.endpoints).by_id.get(id).map(|one| one.interfaces.clone()).unwrap_or_default();
        let hidden = interfaces.iter().any(|interface| interface.host_name.is_empty());
        let mut inside = match hidden.then(netns).flatten() {
            Some(netns) => Some(enter(std::os::fd::AsFd::as_fd(&netns), Socket::route)??),
            None => None,
        };
        self.with_socket(|socket| {
            let mut found = Vec::with_capacity(interfaces.len());
            for interface in interfaces {
                if !interface.host_name.is_empty() {
                    if let Some(link) = link::find(socket, &interface.host_name)? {
                        found.push((interface.name, seen_from_the_other_end(link.counters)));
                    }
                } else if let Some(inside) = &mut inside
                    && let Some(link) = link::find(inside, &interface.name)?
                {
                    found.push((interface.name, link.counters));
                }
            }
            Ok(found)
        })
    }

    fn bridges(&self) -> RwLockReadGuard<'_, BTreeMap<String, Bridge>> {
        self.bridges.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn parents(&self) -> RwLockReadGuard<'_, BTreeMap<String, Parent>> {
        self.parents.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn specs(&self) -> Vec<BridgeSpec> {
        self.bridges().values().map(|bridge| bridge.spec.clone()).collect()
    }

    fn execute(&self, batch: Messages) -> Result<(), Error> {
        self.with_socket(|socket| socket.execute(batch))
    }

    /// Lends a socket of the host's namespace.
    fn with_socket<T>(&self, work: impl FnOnce(&mut Socket) -> Result<T, Error>) -> Result<T, Error> {
        let idle = lock(&self.sockets).pop();
        let mut socket = match idle {
            Some(socket) => socket,
            None => Socket::route()?,
        };
        let result = work(&mut socket);
        lock(&self.sockets).push(socket);
        result
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the bridge's port received the container sent.
fn seen_from_the_other_end(port: Counters) -> Counters {
    Counters {
        rx_bytes: port.tx_bytes,
        rx_packets: port.tx_packets,
        rx_errors: port.tx_errors,
        rx_dropped: port.tx_dropped,
        tx_bytes: port.rx_bytes,
        tx_packets: port.rx_packets,
        tx_errors: port.rx_errors,
        tx_dropped: port.rx_dropped,
    }
}
