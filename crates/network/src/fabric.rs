//! The engine's network: the one handle through which bridges, sandboxes and the firewall are changed.
//!
//! Invariant: what the maps here say is what the kernel has, or will have again after the next load of the
//! firewall, which follows from them alone. No lock is held while the kernel makes a container's interfaces,
//! so containers are connected in parallel as far as the kernel lets them.

mod live;
mod names;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use brigantine_sys::netns;
use ipnet::IpNet;

pub use live::DefaultRoutes;
pub use names::NameSockets;

use crate::background::{Background, Ready};
use crate::bridge::{BridgeSpec, GatewayMode, check_interface_name, configure_forwarding, ensure_link};
use crate::conntrack;
use crate::error::Error;
use crate::firewall::{Change, Contents, Firewall};
use crate::gate::Gate;
use crate::link::{self, Link, PortMode, Veth};
use crate::mac::MacAddr;
use crate::ports::{PortTable, Protocol, PublishedPort, Reservation};
use crate::sandbox::{Attachment, Counters, Interface, InterfaceSpec, Sandbox, SandboxSpec};
use crate::socket::Socket;
use crate::subnet::overlap;
use crate::sysctl;
use crate::watch::FirewallEvents;
use crate::wire::Messages;

/// How an engine uses the host's network.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the engine's nf_tables table, unique on the host: `brigantine-brig0`.
    pub table: String,
    /// How many network namespaces to keep ready. 0: none.
    pub warm: usize,
    /// Whether the host's own rules for input decide about published ports, too.
    pub host_firewall: bool,
    /// Whether the engine relays what the kernel cannot route: published ports on `::1`, and those on addresses of
    /// IPv6 for containers that have none.
    pub relay: bool,
    /// Whom the namespaces of sandboxes that ask for it ([`SandboxSpec::owned`]) belong to.
    pub owner: Option<Owner>,
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
    endpoints: Mutex<Endpoints>,
    ports: Mutex<PortTable>,
    /// Idle sockets of the host's namespace.
    sockets: Mutex<Vec<Socket>>,
    /// Serialises changes of bridges and loads of the firewall.
    changing: Mutex<()>,
    gate: Mutex<GateState>,
    relay: bool,
}

/// What is known of the way round to published ports.
#[derive(Debug)]
enum GateState {
    /// Not wanted, or the kernel cannot.
    Without,
    Wanted,
    Open(Gate),
}

#[derive(Clone, Debug)]
pub(crate) struct Bridge {
    spec: BridgeSpec,
    index: u32,
}

#[derive(Debug, Default)]
struct Endpoints {
    by_id: HashMap<String, Attachment>,
    /// Which container has an address of a bridge.
    by_address: HashMap<(String, IpAddr), String>,
}

impl Endpoints {
    fn insert(&mut self, attachment: Attachment) {
        for (interface, address) in addresses(&attachment) {
            self.by_address.insert((interface.bridge.clone(), address), attachment.id.clone());
        }
        self.by_id.insert(attachment.id.clone(), attachment);
    }

    fn remove(&mut self, id: &str) -> Option<Attachment> {
        let attachment = self.by_id.remove(id)?;
        for (interface, address) in addresses(&attachment) {
            self.by_address.remove(&(interface.bridge.clone(), address));
        }
        Some(attachment)
    }
}

fn addresses(attachment: &Attachment) -> impl Iterator<Item = (&Interface, IpAddr)> {
    let interfaces = attachment.interfaces.iter();
    interfaces.flat_map(|interface| interface.addresses.iter().map(move |net| (interface, net.addr())))
}

/// How long a start waits for ports that were given back just before.
const PORT_PATIENCE: Duration = Duration::from_millis(500);

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
            firewall: Firewall::new(config.table),
            background: Background::start(config.warm, config.owner),
            bridges: RwLock::default(),
            endpoints: Mutex::default(),
            ports: Mutex::default(),
            sockets: Mutex::default(),
            changing: Mutex::default(),
            gate: Mutex::new(if config.host_firewall { GateState::Wanted } else { GateState::Without }),
            relay: config.relay,
        })
    }

    /// Makes the bridge, or takes an existing one that fits, and brings it up.
    pub fn ensure_bridge(&self, spec: &BridgeSpec) -> Result<(), Error> {
        spec.validate()?;
        let _changing = lock(&self.changing);
        let mut known: Vec<BridgeSpec> = self.specs();
        known.retain(|other| other.name != spec.name);
        for other in &known {
            for (own, theirs) in pairs(&spec.subnets(), &other.subnets()) {
                if overlap(&own, &theirs) {
                    return Err(Error::SubnetInUse {
                        bridge: spec.name.clone(),
                        subnet: own,
                        other: theirs,
                        device: other.name.clone(),
                    });
                }
            }
        }
        let (index, is_made) = self.with_socket(|socket| ensure_link(socket, spec))?;
        if let Err(error) = configure_forwarding(spec) {
            if is_made {
                let mut batch = Messages::new();
                link::delete(&mut batch, index, &spec.name);
                if let Err(error) = self.execute(batch) {
                    tracing::warn!(bridge = spec.name, %error, "left over from a failed creation");
                }
            }
            return Err(error);
        }
        let former = {
            let mut bridges = self.bridges.write().unwrap_or_else(PoisonError::into_inner);
            bridges.insert(spec.name.clone(), Bridge { spec: spec.clone(), index })
        };
        if self.firewall.is_loaded() {
            let is_new = former.is_none_or(|former| former.spec == *spec);
            if !is_new || self.firewall.add_bridge(spec)? == Change::Reload {
                self.load()?;
            }
        }
        Ok(())
    }

    /// Removes a bridge that has no containers; with the last one the firewall's table goes, too.
    pub fn remove_bridge(&self, name: &str) -> Result<(), Error> {
        let _changing = lock(&self.changing);
        let in_use: Vec<String> = {
            let endpoints = lock(&self.endpoints);
            let is_on = |attachment: &&Attachment| {
                attachment.interfaces.iter().any(|interface| interface.bridge == name)
            };
            endpoints.by_id.values().filter(is_on).map(|attachment| attachment.name.clone()).collect()
        };
        if !in_use.is_empty() {
            return Err(Error::BridgeInUse { bridge: name.to_owned(), containers: in_use });
        }
        let (bridge, is_last) = {
            let mut bridges = self.bridges.write().unwrap_or_else(PoisonError::into_inner);
            let bridge = bridges.remove(name).ok_or_else(|| Error::NoSuchBridge(name.to_owned()))?;
            (bridge, bridges.is_empty())
        };
        if is_last {
            if self.firewall.is_loaded() {
                self.firewall.unload()?;
            }
            self.close_gate()?;
        } else if self.firewall.is_loaded() && self.firewall.remove_bridge(&bridge.spec)? == Change::Reload {
            self.load()?;
        }
        let mut batch = Messages::new();
        link::delete(&mut batch, bridge.index, name);
        match self.execute(batch) {
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
            result => result,
        }
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
            for interface in
                attachment.interfaces.iter().filter(|one| !present.contains(one.host_name.as_str()))
            {
                report.missing_links.push((attachment.id.clone(), interface.name.clone()));
            }
        }
        if !self.bridges().is_empty() {
            self.load()?;
            report.obstacles = self.firewall.obstacles()?;
            for chain in &report.obstacles {
                tracing::warn!(
                    chain,
                    "this chain of the host drops forwarded packets unless a rule accepts them; containers on bridges \
                     have no way out until it has one for their traffic"
                );
            }
        }
        Ok(report)
    }

    /// Makes a container's sandbox. After an error nothing of it is left.
    pub fn connect(&self, spec: &SandboxSpec) -> Result<Sandbox, Error> {
        let plan = self.plan(spec)?;
        self.claim(spec, &plan)?;
        let result = self.build(spec, &plan);
        if result.is_err() {
            lock(&self.endpoints).remove(&spec.id);
        }
        result
    }

    /// Removes what does not die with the container. Unknown ids are fine: the call is repeatable.
    pub fn disconnect(&self, id: &str) -> Result<(), Error> {
        let Some(attachment) = lock(&self.endpoints).remove(id) else { return Ok(()) };
        lock(&self.ports).release(&attachment.parked);
        let withdrawn = self.withdraw(&attachment.ports);
        self.background.expect_gone(attachment.interfaces.into_iter().map(|interface| interface.host_name));
        withdrawn
    }

    /// The destinations the host has routes for, other than default routes; for [`crate::subnet::choose`].
    pub fn host_routes(&self) -> Result<Vec<IpNet>, Error> {
        let routes = self.with_socket(link::routes)?;
        Ok(routes.into_iter().map(|route| route.destination).collect())
    }

    /// What the container's interfaces have carried, by name inside the container.
    pub fn counters(&self, id: &str) -> Result<Vec<(String, Counters)>, Error> {
        let interfaces =
            lock(&self.endpoints).by_id.get(id).map(|one| one.interfaces.clone()).unwrap_or_default();
        self.with_socket(|socket| {
            let mut found = Vec::with_capacity(interfaces.len());
            for interface in interfaces {
                if let Some(link) = link::find(socket, &interface.host_name)? {
                    found.push((interface.name, seen_from_the_other_end(link.counters)));
                }
            }
            Ok(found)
        })
    }

    /// Reloads the firewall table if somebody removed it (`nft flush ruleset`, a firewall restart);
    /// whether that was necessary.
    pub fn verify(&self) -> Result<bool, Error> {
        if self.bridges().is_empty() || (self.firewall.is_loaded() && self.firewall.exists()?) {
            return Ok(false);
        }
        tracing::warn!("the firewall's table is not there; loading it");
        self.reload()?;
        Ok(true)
    }

    /// Waits for somebody else to take something out of the firewall's tables, for at most `patience`, and loads them
    /// again if that happened; whether it did.
    pub fn reassert(&self, events: &mut FirewallEvents, patience: Duration) -> Result<bool, Error> {
        let own: Vec<u32> = self.firewall.port().into_iter().collect();
        if !events.wait(self.firewall.table(), &own, patience) || !self.firewall.is_loaded() {
            return Ok(false);
        }
        tracing::warn!(
            table = self.firewall.table(),
            "somebody changed the firewall's table; loading it again"
        );
        self.reload()?;
        Ok(true)
    }

    /// Chains of the host that drop incoming packets by default, and so decide about published ports as long as
    /// [`Fabric::has_gate`].
    pub fn input_policies(&self) -> Result<Vec<String>, Error> {
        self.firewall.input_policies()
    }

    /// Whether the host's own rules for input decide about published ports.
    pub fn has_gate(&self) -> bool {
        matches!(*lock(&self.gate), GateState::Open(_))
    }

    /// Checks the request against the bridges and pairs each interface with its bridge.
    fn plan(&self, spec: &SandboxSpec) -> Result<Vec<(Interface, Bridge)>, Error> {
        let invalid = |reason: String| Error::InvalidSandbox { container: spec.name.clone(), reason };
        let bridges = self.bridges();
        let mut plan = Vec::with_capacity(spec.interfaces.len());
        let mut names = HashSet::new();
        for wanted in &spec.interfaces {
            check_interface_name(&wanted.name)?;
            if !names.insert(&wanted.name) || wanted.name == "lo" {
                return Err(invalid(format!("interface {} is there already", wanted.name)));
            }
            let bridge =
                bridges.get(&wanted.bridge).ok_or_else(|| Error::NoSuchBridge(wanted.bridge.clone()))?;
            check_addresses(wanted, &bridge.spec).map_err(invalid)?;
            let mac = wanted.mac.or_else(|| wanted.addresses.first().map(|net| MacAddr::from_ip(net.addr())));
            let mac = mac.ok_or_else(|| invalid(format!("interface {} has no address", wanted.name)))?;
            if !mac.is_usable() {
                return Err(invalid(format!("{mac} is not an address for an interface")));
            }
            let interface = Interface {
                bridge: wanted.bridge.clone(),
                name: wanted.name.clone(),
                host_name: host_name()?,
                mac,
                addresses: wanted.addresses.clone(),
                link_local: wanted.link_local.clone(),
                gateway: wanted.gateway,
                gateway6: wanted.gateway6,
            };
            plan.push((interface, bridge.clone()));
        }
        Ok(plan)
    }

    /// Enters the container, unless it or one of its addresses is there already.
    fn claim(&self, spec: &SandboxSpec, plan: &[(Interface, Bridge)]) -> Result<(), Error> {
        let mut endpoints = lock(&self.endpoints);
        if endpoints.by_id.contains_key(&spec.id) {
            return Err(Error::AlreadyConnected(spec.name.clone()));
        }
        for (interface, _) in plan {
            endpoints.refuse_taken(interface)?;
        }
        endpoints.insert(Attachment {
            id: spec.id.clone(),
            name: spec.name.clone(),
            interfaces: plan.iter().map(|(interface, _)| interface.clone()).collect(),
            ports: Vec::new(),
            parked: Vec::new(),
        });
        Ok(())
    }

    /// The addresses that a container's ports are published at, one a family, and how they are reached: that of the
    /// interface with the default route, else the first that has an outside.
    fn outward<'a>(
        &self,
        interfaces: impl Iterator<Item = &'a Interface> + Clone,
    ) -> Vec<(IpAddr, GatewayMode)> {
        let bridges = self.bridges();
        let find = |is_ipv4: bool| {
            let candidates = interfaces.clone().filter_map(|interface| {
                let bridge = &bridges.get(&interface.bridge)?.spec;
                let address =
                    interface.addresses.iter().map(IpNet::addr).find(|ip| ip.is_ipv4() == is_ipv4)?;
                let has_route =
                    if is_ipv4 { interface.gateway.is_some() } else { interface.gateway6.is_some() };
                (!bridge.internal).then_some((has_route, address, bridge.mode(address)))
            });
            let best =
                candidates.clone().find(|(has_route, ..)| *has_route).or_else(|| candidates.clone().next());
            best.map(|(_, address, mode)| (address, mode))
        };
        [find(true), find(false)].into_iter().flatten().collect()
    }

    /// Takes the ports; an internal network has no outside to publish them to.
    fn reserve(
        &self,
        spec: &SandboxSpec,
        outward: &[(IpAddr, GatewayMode)],
    ) -> Result<(Vec<PublishedPort>, Vec<OwnedFd>), Error> {
        if spec.ports.is_empty() || outward.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        let translated: Vec<IpAddr> =
            outward.iter().filter(|(_, mode)| *mode != GatewayMode::Routed).map(|(ip, _)| *ip).collect();
        let mut reserved = if translated.is_empty() {
            Reservation { ports: Vec::new(), held: Vec::new() }
        } else {
            self.reserve_ports(spec, &translated)?
        };
        for (address, _) in outward.iter().filter(|(_, mode)| *mode == GatewayMode::Routed) {
            for request in &spec.ports {
                let host_ip: IpAddr = if address.is_ipv4() {
                    std::net::Ipv4Addr::UNSPECIFIED.into()
                } else {
                    std::net::Ipv6Addr::UNSPECIFIED.into()
                };
                let open = PublishedPort {
                    protocol: request.protocol,
                    host_ip,
                    host_port: 0,
                    container_ip: *address,
                    container_port: request.container_port,
                };
                if !reserved.ports.contains(&open) {
                    reserved.ports.push(open);
                }
            }
        }
        Ok((reserved.ports, reserved.held))
    }

    /// A container that is restarted wants the ports that its former shim lets go of in this moment.
    fn reserve_ports(&self, spec: &SandboxSpec, own: &[IpAddr]) -> Result<Reservation, Error> {
        let range = sysctl::local_port_range();
        let deadline = Instant::now() + PORT_PATIENCE;
        loop {
            let error = {
                let mut ports = lock(&self.ports);
                match ports.reserve(&spec.id, &spec.name, &spec.ports, own, range, self.relay) {
                    Err(error) if ports.may_pass(&error) && Instant::now() < deadline => error,
                    result => return result,
                }
            };
            tracing::debug!(%error, "waiting for a port to be let go");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn build(&self, spec: &SandboxSpec, plan: &[(Interface, Bridge)]) -> Result<Sandbox, Error> {
        if !plan.is_empty() {
            // Without the firewall there would be neither isolation nor a way out.
            self.verify()?;
        }
        let (ports, held) = self.reserve(spec, &self.outward(plan.iter().map(|(one, _)| one)))?;
        let made = self.make_interfaces(spec, plan).and_then(|netns| {
            self.publish(spec, &ports)?;
            Ok(netns)
        });
        match made {
            Ok(netns) => {
                let interfaces = plan.iter().map(|(interface, _)| interface.clone()).collect();
                let attachment = Attachment {
                    id: spec.id.clone(),
                    name: spec.name.clone(),
                    interfaces,
                    ports,
                    parked: Vec::new(),
                };
                Ok(Sandbox { netns, held, attachment })
            }
            Err(error) => {
                lock(&self.ports).release(&ports);
                for (interface, _) in plan {
                    let mut batch = Messages::new();
                    link::delete_by_name(&mut batch, &interface.host_name);
                    match self.execute(batch) {
                        Err(gone) if gone.errno() == Some(libc::ENODEV) => {}
                        Err(error) => tracing::warn!(%error, "left over from a failed start"),
                        Ok(()) => {}
                    }
                }
                Err(error)
            }
        }
    }

    fn make_interfaces(&self, spec: &SandboxSpec, plan: &[(Interface, Bridge)]) -> Result<OwnedFd, Error> {
        let Ready { netns, socket: mut inside, guarded } = self.background.take(spec.owned)?;
        if !plan.is_empty() {
            guarded?;
            self.lay(spec, plan, netns.as_fd(), &mut inside)?;
        }
        apply_sysctls(netns.as_fd(), spec)?;
        Ok(netns)
    }

    /// Makes the interfaces, in the host's namespace and in the container's, which `inside` is a socket of.
    fn lay(
        &self,
        spec: &SandboxSpec,
        plan: &[(Interface, Bridge)],
        netns: BorrowedFd<'_>,
        inside: &mut Socket,
    ) -> Result<(), Error> {
        if plan.iter().any(|(interface, _)| interface.ipv6().is_some()) {
            allow_ipv6(netns)?;
        }
        let mut host = Messages::new();
        for (interface, bridge) in plan {
            link::add_veth(
                &mut host,
                &Veth {
                    host_name: &interface.host_name,
                    bridge: bridge.index,
                    netns,
                    peer_name: &interface.name,
                    peer_mac: interface.mac,
                    mtu: bridge.spec.mtu,
                },
            );
            link::dress_port(&mut host, &interface.host_name, &format!("{ALIAS}{}", spec.id));
            // Where frames on bridges pass the firewall (br_netfilter), a container's packets to its own
            // published port turn around at its port of the bridge.
            let mode = PortMode { isolated: !bridge.spec.icc, hairpin: !spec.ports.is_empty() };
            if mode != PortMode::default() {
                link::set_port_mode(&mut host, &interface.host_name, mode);
            }
            link::set_up_by_name(&mut host, &interface.host_name);
        }
        self.execute(host)?;
        let mut container = Messages::new();
        for (interface, _) in plan {
            let made = link::find(inside, &interface.name)?;
            let made = made.ok_or_else(|| Error::InvalidSandbox {
                container: spec.name.clone(),
                reason: format!("interface {} vanished at once", interface.name),
            })?;
            configure_inside(&mut container, interface, made.index);
        }
        inside.execute(container)?;
        self.with_socket(|socket| {
            let mut announcements = Messages::new();
            for (interface, bridge) in plan {
                let port = link::wait_until_ready(socket, &interface.host_name)?;
                link::wait_until_ready(socket, &bridge.spec.name)?;
                link::announce(&mut announcements, port, &interface.host_name, interface.mac);
                for net in &interface.addresses {
                    let (bridge, name) = (bridge.index, &bridge.spec.name);
                    link::introduce(&mut announcements, bridge, name, net.addr(), interface.mac);
                }
            }
            if let Err(error) = socket.execute(announcements) {
                // A full neighbour table, say. They are learned by asking, then.
                tracing::debug!(%error, "a container's addresses are not announced");
            }
            Ok(())
        })
    }

    /// Makes the ports reachable and remembers them as the container's.
    fn publish(&self, spec: &SandboxSpec, ports: &[PublishedPort]) -> Result<(), Error> {
        if ports.is_empty() {
            return Ok(());
        }
        if let Some(attachment) = lock(&self.endpoints).by_id.get_mut(&spec.id) {
            attachment.ports = ports.to_vec();
        }
        let result = match self.firewall.publish(ports) {
            Ok(Change::Done) => Ok(()),
            Ok(Change::Reload) => self.reload(),
            Err(error) => Err(error),
        };
        if result.is_err() {
            if let Some(attachment) = lock(&self.endpoints).by_id.get_mut(&spec.id) {
                attachment.ports.clear();
            }
            return result;
        }
        forget_flows(ports);
        Ok(())
    }

    fn withdraw(&self, ports: &[PublishedPort]) -> Result<(), Error> {
        if ports.is_empty() {
            return Ok(());
        }
        let result = match self.firewall.withdraw(ports) {
            Ok(Change::Done) => Ok(()),
            Ok(Change::Reload) => self.reload(),
            Err(error) => Err(error),
        };
        lock(&self.ports).release(ports);
        forget_flows(ports);
        result
    }

    fn reload(&self) -> Result<(), Error> {
        let _changing = lock(&self.changing);
        self.load()
    }

    /// Loads the firewall from what is known. The caller holds `changing`.
    fn load(&self) -> Result<(), Error> {
        let ports: Vec<PublishedPort> = {
            let endpoints = lock(&self.endpoints);
            endpoints.by_id.values().flat_map(|attachment| attachment.ports.iter().copied()).collect()
        };
        let bridges = self.specs();
        let mut state = lock(&self.gate);
        if let GateState::Wanted = *state
            && !bridges.is_empty()
        {
            *state = match self.with_socket(|socket| Gate::ensure(socket, self.firewall.table())) {
                Ok(gate) => GateState::Open(gate),
                Err(error) => {
                    without_gate(&error);
                    GateState::Without
                }
            };
        }
        let gate = match &*state {
            GateState::Open(gate) => Some(gate),
            GateState::Without | GateState::Wanted => None,
        };
        let contents = Contents { bridges: &bridges, ports: &ports, gate };
        match self.firewall.load(&contents) {
            Err(error @ Error::FirewallUnavailable { .. }) if gate.is_some() => {
                self.firewall.load(&Contents { gate: None, ..contents })?;
                without_gate(&error);
                *state = GateState::Without;
                self.with_socket(|socket| Gate::remove(socket, self.firewall.table()))
            }
            result => result,
        }
    }

    fn close_gate(&self) -> Result<(), Error> {
        let mut state = lock(&self.gate);
        if let GateState::Open(_) = *state {
            *state = GateState::Wanted;
            self.with_socket(|socket| Gate::remove(socket, self.firewall.table()))?;
        }
        Ok(())
    }

    fn bridges(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Bridge>> {
        self.bridges.read().unwrap_or_else(PoisonError::into_inner)
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

fn pairs(one: &[IpNet], other: &[IpNet]) -> Vec<(IpNet, IpNet)> {
    one.iter().flat_map(|own| other.iter().map(|theirs| (*own, *theirs))).collect()
}

fn check_addresses(wanted: &InterfaceSpec, bridge: &BridgeSpec) -> Result<(), String> {
    for address in &wanted.link_local {
        let is_link_local = match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        if !is_link_local {
            return Err(format!("{address} is not a link-local address"));
        }
    }
    for net in &wanted.addresses {
        let subnet = bridge.subnets().into_iter().find(|subnet| subnet.contains(&net.addr()));
        match subnet {
            Some(subnet) if subnet.prefix_len() == net.prefix_len() => {}
            Some(subnet) => return Err(format!("address {net} must have the prefix length of {subnet}")),
            None => return Err(format!("address {net} is not in a subnet of bridge {}", bridge.name)),
        }
        let ip = net.addr();
        if IpAddr::V4(bridge.gateway) == ip
            || bridge.gateway6.is_some_and(|gateway| IpAddr::V6(gateway) == ip)
        {
            return Err(format!("address {ip} is the gateway of bridge {}", bridge.name));
        }
    }
    for (family, count) in [
        ("IPv4", wanted.addresses.iter().filter(|net| net.addr().is_ipv4()).count()),
        ("IPv6", wanted.addresses.iter().filter(|net| net.addr().is_ipv6()).count()),
    ] {
        if count > 1 {
            return Err(format!("interface {} has {count} {family} addresses", wanted.name));
        }
    }
    Ok(())
}

/// A name no other interface has: 44 random bits.
fn host_name() -> Result<String, Error> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(|source| {
        Error::Kernel {
            what: "choose a name for an interface".to_owned(),
            detail: None,
            source: source.into(),
        }
    })?;
    Ok(format!("veth{:011x}", u64::from_ne_bytes(bytes) >> 20))
}

fn configure_inside(batch: &mut Messages, interface: &Interface, index: u32) {
    if interface.ipv6().is_none() {
        link::without_link_local(batch, index, &interface.name);
    }
    link::set_up(batch, index, &interface.name);
    for address in &interface.addresses {
        link::add_address(batch, index, &interface.name, *address);
    }
    for address in &interface.link_local {
        link::add_address(batch, index, &interface.name, link_local_net(*address));
    }
    if let Some(gateway) = interface.gateway {
        link::set_default_route(batch, index, gateway.into());
    }
    if let Some(gateway) = interface.gateway6 {
        link::set_default_route(batch, index, gateway.into());
    }
}

/// An address of the link with the prefix that all of them share (RFC 3927, RFC 4291 section 2.5.6).
fn link_local_net(address: IpAddr) -> IpNet {
    IpNet::new_assert(address, if address.is_ipv4() { 16 } else { 64 })
}

fn without_gate(error: &Error) {
    tracing::warn!(
        error = error as &dyn std::error::Error,
        "published ports pass by the host's own rules for input: this kernel has no way round to offer"
    );
}

/// A host that has IPv6 turned off passes that on to new namespaces.
fn allow_ipv6(netns: BorrowedFd<'_>) -> Result<(), Error> {
    let inside = || {
        sysctl::ensure("ipv6/conf/all/disable_ipv6", "0")?;
        sysctl::ensure("ipv6/conf/default/disable_ipv6", "0")
    };
    enter(netns, inside)?
}

fn apply_sysctls(netns: BorrowedFd<'_>, spec: &SandboxSpec) -> Result<(), Error> {
    let all = || spec.interfaces.iter().flat_map(|interface| &interface.sysctls).chain(&spec.sysctls);
    if all().next().is_none() {
        return Ok(());
    }
    let inside = || {
        all().try_for_each(|(key, value)| {
            sysctl::set_for_container(key, value).map_err(|source| Error::ContainerSysctl {
                container: spec.name.clone(),
                key: key.clone(),
                value: value.clone(),
                source,
            })
        })
    };
    enter(netns, inside)?
}

fn enter<T: Send>(netns: BorrowedFd<'_>, inside: impl FnOnce() -> T + Send) -> Result<T, Error> {
    netns::within(netns, inside).map_err(|source| Error::Kernel {
        what: "enter a network namespace".to_owned(),
        detail: None,
        source: source.into(),
    })
}

fn forget_flows(ports: &[PublishedPort]) {
    if ports.iter().any(|port| port.protocol == Protocol::Udp)
        && let Err(error) = conntrack::forget(ports)
    {
        tracing::warn!(%error, "flows to a published UDP port may go to its former owner until they end");
    }
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
