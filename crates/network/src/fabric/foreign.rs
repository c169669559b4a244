//! Containers on networks of CNI plugins: what the plugins are told, and what has become of it.
//!
//! Invariant: as long as a container has an interface of theirs its network namespace is mounted at a file, so that they
//! can take the interface back from it also when the container and the daemon have ended.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::sync::{PoisonError, RwLockReadGuard};

use rustix::mount::{UnmountFlags, mount_bind, unmount};
use serde_json::{Map, Value, json};

use super::plan::Plan;
use super::segments::Segment;
use super::{Fabric, Live, lock};
use crate::bridge::GatewayMode;
use crate::cni::{Attaching, Made, NetworkList};
use crate::error::Error;
use crate::ports::PublishedPort;
use crate::sandbox::{Attachment, Interface, InterfaceSpec, SandboxSpec};

const PORT_MAPPINGS: &str = "portMappings";

/// Where plugins lead to ports, the addresses are not known before.
pub(super) const UNKNOWN: (IpAddr, GatewayMode) =
    (IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), GatewayMode::Nat);

impl Fabric {
    pub(super) fn foreign(&self) -> RwLockReadGuard<'_, BTreeMap<String, NetworkList>> {
        self.foreign.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// A network's configuration in the version that is spoken with its plugins, which have to be there.
    pub fn negotiate(&self, list: NetworkList) -> Result<NetworkList, Error> {
        self.plugins.negotiate(list)
    }

    /// Whether a network's plugins are ready, as they say themselves.
    pub fn status(&self, list: &NetworkList) -> Result<(), Error> {
        self.plugins.status(list)
    }

    /// Makes a network of CNI plugins known. Nothing is executed before a container is connected.
    pub fn ensure_foreign(&self, name: &str, list: &NetworkList) -> Result<(), Error> {
        let mut foreign = self.foreign.write().unwrap_or_else(PoisonError::into_inner);
        if foreign.iter().any(|(other, known)| other != name && known.name() == list.name()) {
            return Err(Error::InvalidCni {
                place: list.name().to_owned(),
                reason: "another network of this engine is made of the CNI network of that name".to_owned(),
            });
        }
        foreign.insert(name.to_owned(), list.clone());
        Ok(())
    }

    /// Forgets a network of CNI plugins that has no containers. They are told that nobody is connected any more.
    pub fn remove_foreign(&self, name: &str) -> Result<(), Error> {
        self.refuse_used(name)?;
        let list = {
            let mut foreign = self.foreign.write().unwrap_or_else(PoisonError::into_inner);
            foreign.remove(name).ok_or_else(|| Error::NoSuchBridge(name.to_owned()))?
        };
        if let Err(error) = self.plugins.collect(&list, &[]) {
            tracing::warn!(network = list.name(), %error, "tell CNI plugins that a network is gone");
        }
        Ok(())
    }

    /// Has the plugins make the interfaces that are theirs, and enters what they have made into the plan.
    pub(super) fn plug(
        &self,
        spec: &SandboxSpec,
        plan: &mut Plan,
        mapped: &[PublishedPort],
        netns: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let mut mapped = Some(mapped).filter(|mapped| !mapped.is_empty());
        for (wanted, (interface, segment)) in spec.interfaces.iter().zip(plan) {
            let Segment::Foreign(list) = segment else { continue };
            let ports = if list.can(PORT_MAPPINGS) { mapped.take() } else { None };
            let at = Attaching {
                container: spec.id.clone(),
                netns: self.hold_namespace(&spec.id, netns)?,
                interface: wanted.name.clone(),
                args: arguments(list, wanted),
                capabilities: capabilities(spec, list, wanted, ports.unwrap_or_default())?,
            };
            enter_made(interface, self.plugins.add(list, &at)?);
        }
        Ok(())
    }

    /// Enters the addresses that plugins have chosen.
    pub(super) fn settle_interfaces(&self, id: &str, plan: &Plan) {
        let made: Vec<&Interface> =
            plan.iter().map(|(interface, _)| interface).filter(|interface| interface.by_plugins).collect();
        if made.is_empty() {
            return;
        }
        let mut endpoints = lock(&self.endpoints);
        let Some(mut attachment) = endpoints.remove(id) else { return };
        for interface in made {
            if let Some(known) = attachment.interfaces.iter_mut().find(|known| known.name == interface.name) {
                known.clone_from(interface);
            }
        }
        endpoints.insert(attachment);
    }

    /// The same, and where the ports lead that the plugins of interface `at` were told of.
    pub(super) fn settle(&self, spec: &SandboxSpec, plan: &Plan, at: usize, ports: &mut [PublishedPort]) {
        self.settle_interfaces(&spec.id, plan);
        let Some((interface, _)) = plan.get(at) else { return };
        let address = interface.ipv4().map(IpAddr::V4).or(interface.ipv6().map(IpAddr::V6));
        if let Some(address) = address {
            for port in ports.iter_mut() {
                port.container_ip = address;
            }
        }
        if let Some(attachment) = lock(&self.endpoints).by_id.get_mut(&spec.id) {
            attachment.ports = ports.to_vec();
        }
    }

    /// Takes back what plugins have made for a container, as far as they can; the first failure is told.
    pub(super) fn unplug(&self, id: &str, interfaces: &[Interface]) -> Result<(), Error> {
        let theirs = interfaces.iter().rev().filter(|interface| interface.by_plugins);
        let outcomes: Vec<Result<(), Error>> = theirs.map(|one| self.delete_foreign(id, one)).collect();
        if !outcomes.is_empty() {
            self.let_namespace_go(id);
        }
        outcomes.into_iter().collect()
    }

    /// Takes one interface of a running container back.
    pub(super) fn pull(&self, id: &str, interface: &Interface) -> Result<(), Error> {
        self.delete_foreign(id, interface)?;
        let mut endpoints = lock(&self.endpoints);
        let Some(attachment) = endpoints.by_id.get_mut(id) else { return Ok(()) };
        let led =
            |port: &PublishedPort| interface.addresses.iter().any(|net| net.addr() == port.container_ip);
        let gone: Vec<PublishedPort> = attachment.ports.iter().copied().filter(led).collect();
        attachment.ports.retain(|port| !led(port));
        let is_last = !attachment.interfaces.iter().any(|interface| interface.by_plugins);
        drop(endpoints);
        lock(&self.ports).release(&gone);
        if is_last {
            self.let_namespace_go(id);
        }
        Ok(())
    }

    fn delete_foreign(&self, id: &str, interface: &Interface) -> Result<(), Error> {
        let list = self.foreign().get(&interface.bridge).cloned();
        let Some(list) = list else { return Ok(()) };
        self.plugins.del(Some(&list), list.name(), id, &interface.name, &self.plugins.namespace_of(id))
    }

    /// Takes back what has been left of containers that do not run any more, and says what is wrong with those that do.
    /// Other containers do not depend on it, so what fails is logged.
    pub(super) fn collect_foreign(&self, live: &[Live]) {
        let networks = self.foreign().clone();
        let on = |name: &str| -> Vec<(String, String)> {
            let interfaces = live.iter().flat_map(|Live { attachment }| {
                attachment.interfaces.iter().map(|interface| (&attachment.id, interface))
            });
            interfaces
                .filter(|(_, interface)| interface.by_plugins && interface.bridge == name)
                .map(|(id, interface)| (id.clone(), interface.name.clone()))
                .collect()
        };
        for (name, list) in &networks {
            let valid = on(name);
            if let Err(error) = self.plugins.status(list) {
                tracing::warn!(network = list.name(), %error, "a CNI network is not ready for containers");
            }
            match self.plugins.collect(list, &valid) {
                Ok(0) => {}
                Ok(count) => {
                    tracing::info!(
                        network = list.name(),
                        count,
                        "took back connections of containers that have ended"
                    );
                }
                Err(error) => {
                    tracing::warn!(network = list.name(), %error, "take back connections of containers that have ended");
                }
            }
            for (container, interface) in valid {
                let netns = self.plugins.namespace_of(&container);
                if let Err(error) = self.plugins.check(list.name(), &container, &interface, &netns) {
                    tracing::warn!(container, interface, %error, "a connection to a CNI network is not as it was made");
                }
            }
        }
        for id in self.plugins.namespaces() {
            if !live.iter().any(|Live { attachment }| attachment.id == id && has_theirs(attachment)) {
                self.let_namespace_go(&id);
            }
        }
    }

    /// Mounts a network namespace at its file, if it is not; returns the path.
    fn hold_namespace(&self, id: &str, netns: BorrowedFd<'_>) -> Result<String, Error> {
        let file = self.plugins.namespace_file(id);
        let hold = || -> std::io::Result<()> {
            if file.exists() {
                let (there, own) = (rustix::fs::stat(&file)?, rustix::fs::fstat(netns)?);
                if (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino) {
                    return Ok(());
                }
            }
            self.let_namespace_go(id);
            if let Some(dir) = file.parent() {
                std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            }
            std::fs::File::create(&file)?;
            Ok(mount_bind(format!("/proc/self/fd/{}", netns.as_raw_fd()), &file)?)
        };
        let path = file.display().to_string();
        let what = || format!("mount the network namespace of container {id} at {path}");
        hold().map_err(|source| Error::CniCache { what: what(), source })?;
        Ok(path)
    }

    fn let_namespace_go(&self, id: &str) {
        let file = self.plugins.namespace_file(id);
        if !file.exists() {
            return;
        }
        // Not mounted any more after a reboot, say; the file goes in any case.
        if let Err(error) = unmount(&file, UnmountFlags::DETACH) {
            tracing::debug!(%error, "unmount a network namespace");
        }
        if let Err(error) = std::fs::remove_file(&file) {
            tracing::warn!(file = %file.display(), %error, "remove the file of a network namespace");
        }
    }
}

/// The interface whose plugins lead to a container's ports; `None` if it has none on such networks, or no ports.
pub(super) fn mapping(spec: &SandboxSpec, plan: &Plan) -> Result<Option<usize>, Error> {
    if spec.ports.is_empty() {
        return Ok(None);
    }
    let mut without = None;
    for (at, (_, segment)) in plan.iter().enumerate() {
        if let Segment::Foreign(list) = segment {
            if list.can(PORT_MAPPINGS) {
                return Ok(Some(at));
            }
            without = without.or(Some(list.name()));
        }
    }
    without.map_or(Ok(None), |name| {
        Err(Error::InvalidSandbox {
            container: spec.name.clone(),
            reason: format!(
                "its ports cannot be published: no plugin of CNI network {name} has the capability {PORT_MAPPINGS} (portmap has it)"
            ),
        })
    })
}

fn has_theirs(attachment: &Attachment) -> bool {
    attachment.interfaces.iter().any(|interface| interface.by_plugins)
}

/// `CNI_ARGS`, by the names that plugins have agreed on.
fn arguments(list: &NetworkList, wanted: &InterfaceSpec) -> Vec<(String, String)> {
    // Those that are asked about one of them refuse all others without that.
    let mut arguments = vec![("IgnoreUnknown".to_owned(), "1".to_owned())];
    if !list.can("ips")
        && let Some(net) = wanted.addresses.first()
    {
        arguments.push(("IP".to_owned(), net.addr().to_string()));
    }
    if !list.can("mac")
        && let Some(mac) = wanted.mac
    {
        arguments.push(("MAC".to_owned(), mac.to_string()));
    }
    arguments
}

/// What is asked for beyond the network, by capability (CONVENTIONS.md of the specification).
fn capabilities(
    spec: &SandboxSpec,
    list: &NetworkList,
    wanted: &InterfaceSpec,
    ports: &[PublishedPort],
) -> Result<Map<String, Value>, Error> {
    let mut given = Map::new();
    // Those by IPv6 addresses of the host are relayed.
    let mapped = ports.iter().filter(|port| port.host_ip.is_ipv4());
    let mapped: Vec<Value> = mapped
        .map(|port| {
            let mut mapping = json!({
                "hostPort": port.host_port,
                "containerPort": port.container_port,
                "protocol": port.protocol.to_string(),
            });
            if !port.host_ip.is_unspecified() {
                mapping["hostIP"] = port.host_ip.to_string().into();
            }
            mapping
        })
        .collect();
    if !mapped.is_empty() {
        given.insert(PORT_MAPPINGS.to_owned(), mapped.into());
    }
    if list.can("ips") && !wanted.addresses.is_empty() {
        let addresses: Vec<String> = wanted.addresses.iter().map(|net| net.addr().to_string()).collect();
        given.insert("ips".to_owned(), addresses.into());
    } else if wanted.addresses.len() > 1 {
        return Err(Error::InvalidSandbox {
            container: spec.name.clone(),
            reason: format!(
                "CNI network {} takes one address to be asked for: none of its plugins has the capability ips",
                list.name()
            ),
        });
    }
    if let Some(mac) = wanted.mac
        && list.can("mac")
    {
        given.insert("mac".to_owned(), mac.to_string().into());
    }
    Ok(given)
}

fn enter_made(interface: &mut Interface, made: Made) {
    if let Some(mac) = made.mac {
        interface.mac = mac;
    }
    interface.addresses = made.addresses;
    for gateway in made.gateways {
        match gateway {
            IpAddr::V4(gateway) => interface.gateway = interface.gateway.or(Some(gateway)),
            IpAddr::V6(gateway) => interface.gateway6 = interface.gateway6.or(Some(gateway)),
        }
    }
}
