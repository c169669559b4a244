//! Making a container's interfaces, on the host and inside its network namespace.
//!
//! Invariant: no lock is held while the kernel works; after an error nothing of the sandbox is left.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use brigantine_sys::netns;
use ipnet::IpNet;

use super::plan::Plan;
use super::segments::{Bridge, Parent, Segment};
use super::{ALIAS, Fabric, NameSockets, foreign, lock};
use crate::background::Ready;
use crate::device::{self, Subinterface};
use crate::error::Error;
use crate::link::{self, PortMode, Veth};
use crate::ports::PublishedPort;
use crate::sandbox::{Attachment, Interface, Sandbox, SandboxSpec};
use crate::socket::Socket;
use crate::subinterface::{MacvlanMode, SubinterfaceKind, unsupported};
use crate::sysctl;
use crate::wire::Messages;

/// Containers beyond these are found by asking.
const MOST_INTRODUCED: usize = 400;

impl Fabric {
    pub(super) fn build(&self, spec: &SandboxSpec, plan: &mut Plan) -> Result<Sandbox, Error> {
        if plan.iter().any(|(_, segment)| matches!(segment, Segment::Bridge(_))) {
            // Without the firewall there would be neither isolation nor a way out.
            self.verify()?;
        }
        let outward = self.outward(plan.iter().map(|(one, _)| one));
        let mapping = if outward.is_empty() { foreign::mapping(spec, plan)? } else { None };
        let unknown = [foreign::UNKNOWN];
        let (mut ports, held) = self.reserve(spec, if mapping.is_some() { &unknown } else { &outward })?;
        let mapped: &[PublishedPort] = if mapping.is_some() { &ports } else { &[] };
        let made = self.make_interfaces(spec, plan, mapped).and_then(|netns| {
            if let Some(at) = mapping {
                self.settle(spec, plan, at, &mut ports);
            } else {
                self.settle_interfaces(&spec.id, plan);
                self.publish(spec, &ports)?;
            }
            Ok(netns)
        });
        match made {
            Ok((netns, names)) => {
                let interfaces = plan.iter().map(|(interface, _)| interface.clone()).collect();
                let attachment = Attachment {
                    id: spec.id.clone(),
                    name: spec.name.clone(),
                    interfaces,
                    ports,
                    parked: Vec::new(),
                };
                Ok(Sandbox { netns, names, held, attachment })
            }
            Err(error) => {
                lock(&self.ports).release(&ports);
                let interfaces: Vec<Interface> = plan.iter().map(|(one, _)| one.clone()).collect();
                if let Err(error) = self.unplug(&spec.id, &interfaces) {
                    tracing::warn!(%error, "left over from a failed start");
                }
                // Those without an end here go with the namespace.
                for (interface, _) in plan.iter().filter(|(interface, _)| !interface.host_name.is_empty()) {
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

    fn make_interfaces(
        &self,
        spec: &SandboxSpec,
        plan: &mut Plan,
        mapped: &[PublishedPort],
    ) -> Result<(OwnedFd, Option<NameSockets>), Error> {
        let Ready { netns, socket: mut inside, names, guarded, has_ipv6_off } =
            self.background.take(spec.owned, spec.named)?;
        if !plan.is_empty() {
            guarded?;
            if has_ipv6_off && has_ipv6(plan) {
                enter(netns.as_fd(), allow_ipv6)??;
            }
            self.lay(spec, plan, mapped, netns.as_fd(), &mut inside)?;
        }
        apply_sysctls(netns.as_fd(), spec)?;
        Ok((netns, names))
    }

    /// Makes an interface below a parent. It has no end on the host.
    fn add_below(
        &self,
        spec: &SandboxSpec,
        interface: &Interface,
        parent: &Parent,
        netns: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let kind = parent.spec.kind;
        let has_own_address = match kind {
            SubinterfaceKind::Macvlan(mode) => mode != MacvlanMode::Passthru,
            SubinterfaceKind::Ipvlan(..) => false,
        };
        let mut batch = Messages::new();
        device::add_subinterface(
            &mut batch,
            &Subinterface {
                name: &interface.name,
                netns,
                parent: parent.index,
                kind,
                mac: has_own_address.then_some(interface.mac),
                mtu: parent.spec.mtu,
            },
        );
        self.execute(batch).map_err(|error| {
            let in_the_way = |reason: &str| Error::InvalidParent {
                parent: parent.spec.parent_name().to_owned(),
                reason: format!("container {} cannot have an interface below it: {reason}", spec.name),
            };
            match (error.errno(), kind) {
                (Some(libc::EBUSY), _) => {
                    in_the_way("it is used otherwise, by a bridge or another driver, say")
                }
                (Some(libc::EINVAL), SubinterfaceKind::Macvlan(MacvlanMode::Passthru)) => {
                    in_the_way("with macvlan_mode=passthru there can be one only")
                }
                (_, SubinterfaceKind::Macvlan(_)) => {
                    unsupported(error, "macvlan interfaces", "CONFIG_MACVLAN")
                }
                (_, SubinterfaceKind::Ipvlan(..)) => unsupported(error, "ipvlan interfaces", "CONFIG_IPVLAN"),
            }
        })
    }

    /// Makes the interfaces, in the host's namespace and in the container's, which `inside` is a socket of and which has
    /// IPv6 on if any of them needs it. Plugins come first: routes of theirs give way to ours. They are told of the ports that are `mapped` by them.
    pub(super) fn lay(
        &self,
        spec: &SandboxSpec,
        plan: &mut Plan,
        mapped: &[PublishedPort],
        netns: BorrowedFd<'_>,
        inside: &mut Socket,
    ) -> Result<(), Error> {
        self.plug(spec, plan, mapped, netns)?;
        let plan = &*plan;
        let mut host = Messages::new();
        let mut ports = Vec::with_capacity(plan.len());
        for (interface, segment) in plan {
            match segment {
                Segment::Bridge(bridge) if interface.leaf == 0 => {
                    add_port(&mut host, spec, interface, bridge, netns);
                    ports.push((interface, bridge, None));
                }
                Segment::Bridge(bridge) => {
                    let leaf = self.leaf(bridge, interface.leaf)?;
                    let parent = Parent::of_leaf(&bridge.spec, leaf.parent);
                    self.add_below(spec, interface, &parent, netns)?;
                    ports.push((interface, bridge, Some(leaf)));
                }
                Segment::Parent(parent) => self.add_below(spec, interface, parent, netns)?,
                Segment::Foreign(_) => {}
            }
        }
        self.execute(host)?;
        let mut container = Messages::new();
        for (interface, _) in plan.iter().filter(|(interface, _)| !interface.by_plugins) {
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
            for (interface, bridge, leaf) in ports {
                let (port, name) = match &leaf {
                    Some(leaf) => (leaf.port, &leaf.port_name),
                    None => (link::wait_until_ready(socket, &interface.host_name)?, &interface.host_name),
                };
                link::wait_until_ready(socket, &bridge.spec.name)?;
                link::announce(&mut announcements, port, name, interface.mac);
                // More would fill the kernel's table before any of them is of use.
                let is_crowded = lock(&self.endpoints).by_id.len() > MOST_INTRODUCED || interface.leaf > 0;
                for net in interface.addresses.iter().filter(|_| !is_crowded) {
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
}

/// One end on the bridge, the other in the container.
fn add_port(
    batch: &mut Messages,
    spec: &SandboxSpec,
    interface: &Interface,
    bridge: &Bridge,
    netns: BorrowedFd<'_>,
) {
    link::add_veth(
        batch,
        &Veth {
            host_name: &interface.host_name,
            bridge: bridge.index,
            netns,
            peer_name: &interface.name,
            peer_mac: interface.mac,
            mtu: bridge.spec.mtu,
        },
    );
    link::dress_port(batch, &interface.host_name, &format!("{ALIAS}{}", spec.id));
    // Where frames on bridges pass the firewall (br_netfilter), a container's packets to its own
    // published port turn around at its port of the bridge.
    let mode = PortMode { isolated: !bridge.spec.icc, hairpin: !spec.ports.is_empty() };
    if mode != PortMode::default() {
        link::set_port_mode(batch, &interface.host_name, mode);
    }
    link::set_up_by_name(batch, &interface.host_name);
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

pub(super) fn has_ipv6(plan: &Plan) -> bool {
    plan.iter().any(|(interface, _)| interface.ipv6().is_some())
}

/// A host that has IPv6 turned off passes that on to new namespaces; the calling thread is in one.
pub(super) fn allow_ipv6() -> Result<(), Error> {
    sysctl::ensure("ipv6/conf/all/disable_ipv6", "0")?;
    sysctl::ensure("ipv6/conf/default/disable_ipv6", "0")
}

pub(super) fn apply_sysctls(netns: BorrowedFd<'_>, spec: &SandboxSpec) -> Result<(), Error> {
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

pub(crate) fn enter<T: Send>(netns: BorrowedFd<'_>, inside: impl FnOnce() -> T + Send) -> Result<T, Error> {
    netns::within(netns, inside).map_err(|source| Error::Kernel {
        what: "enter a network namespace".to_owned(),
        detail: None,
        source: source.into(),
    })
}
