//! What changes of a container that runs: interfaces that come and go, the default route, and what its ports lead to.
//!
//! Invariant: after a failure the container is connected as it was before.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{BorrowedFd, OwnedFd};

use super::lay::{allow_ipv6, apply_sysctls, enter, has_ipv6};
use super::publish::forget_flows;
use super::{Fabric, foreign, lock};
use crate::error::Error;
use crate::link::{self, PortMode};
use crate::ports::{PortRequest, PublishedPort};
use crate::sandbox::{Attachment, Interface, InterfaceSpec, SandboxSpec};
use crate::socket::Socket;
use crate::wire::Messages;

/// Where a container's default routes shall go: the interface's name inside and the gateway, a family each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DefaultRoutes {
    pub ipv4: Option<(String, Ipv4Addr)>,
    pub ipv6: Option<(String, Ipv6Addr)>,
}

impl Fabric {
    /// Gives a connected container one more interface. `netns` is its network namespace. `ports` are the container's: if
    /// they lead nowhere yet and the interface is made by CNI plugins, those are told of them, and the sockets returned
    /// reserve them. For all others see [`Fabric::republish`].
    pub fn attach(
        &self,
        id: &str,
        netns: BorrowedFd<'_>,
        wanted: &InterfaceSpec,
        ports: &[PortRequest],
    ) -> Result<(Attachment, Vec<OwnedFd>), Error> {
        let present = self.attachment(id)?;
        let spec = SandboxSpec {
            id: id.to_owned(),
            name: present.name.clone(),
            interfaces: vec![wanted.clone()],
            ports: ports.to_vec(),
            ..SandboxSpec::default()
        };
        if present.interfaces.iter().any(|interface| interface.name == wanted.name) {
            return Err(Error::InvalidSandbox {
                container: present.name,
                reason: format!("interface {} is there already", wanted.name),
            });
        }
        let mut plan = self.plan(&spec)?;
        if plan.iter().any(|(interface, _)| !interface.by_plugins) {
            self.verify()?;
        }
        let are_led = !present.ports.is_empty()
            || !present.parked.is_empty()
            || !self.outward(present.interfaces.iter()).is_empty();
        let mapping = if are_led { None } else { foreign::mapping(&spec, &plan)? };
        let (mut ports, held) = match mapping {
            Some(_) => self.reserve(&spec, &[foreign::UNKNOWN])?,
            None => Default::default(),
        };
        let entered = (|| {
            let mut endpoints = lock(&self.endpoints);
            endpoints.place(&mut plan)?;
            let mut attachment = endpoints.remove(id).ok_or_else(|| Error::NotConnected(id.to_owned()))?;
            attachment.interfaces.extend(plan.iter().map(|(interface, _)| interface.clone()));
            endpoints.insert(attachment);
            Ok(())
        })();
        if let Err(error) = entered {
            lock(&self.ports).release(&ports);
            return Err(error);
        }
        let needs_ipv6 = has_ipv6(&plan);
        let open = || {
            if needs_ipv6 {
                allow_ipv6()?;
            }
            Socket::route()
        };
        let made = enter(netns, open)
            .and_then(|inside| inside)
            .and_then(|mut inside| self.lay(&spec, &mut plan, &ports, netns, &mut inside))
            .map(|()| match mapping {
                Some(at) => self.settle(&spec, &plan, at, &mut ports),
                None => self.settle_interfaces(id, &plan),
            })
            .and_then(|()| apply_sysctls(netns, &spec));
        if let Err(error) = made {
            lock(&self.ports).release(&ports);
            if let Err(left) = self.detach(id, netns, &wanted.name) {
                tracing::warn!(error = &left as &dyn std::error::Error, "left over from a failed connection");
            }
            return Err(error);
        }
        Ok((self.attachment(id)?, held))
    }

    /// Takes an interface away, by its name inside. That it is gone already is fine.
    pub fn detach(&self, id: &str, netns: BorrowedFd<'_>, name: &str) -> Result<Attachment, Error> {
        let gone = {
            let mut endpoints = lock(&self.endpoints);
            let mut attachment = endpoints.remove(id).ok_or_else(|| Error::NotConnected(id.to_owned()))?;
            let at = attachment.interfaces.iter().position(|interface| interface.name == name);
            let gone = at.map(|at| attachment.interfaces.remove(at));
            endpoints.insert(attachment);
            gone
        };
        if let Some(interface) = gone.as_ref().filter(|interface| interface.by_plugins) {
            self.pull(id, interface)?;
        } else if let Some(interface) = gone {
            let mut batch = Messages::new();
            let taken = if interface.host_name.is_empty() {
                link::delete_by_name(&mut batch, &interface.name);
                enter(netns, Socket::route)??.execute(batch)
            } else {
                link::delete_by_name(&mut batch, &interface.host_name);
                self.execute(batch)
            };
            match taken {
                Err(error) if error.errno() == Some(libc::ENODEV) => {}
                result => result?,
            }
        }
        self.attachment(id)
    }

    /// Makes the default routes lead where `wanted` says; a family without one gets none.
    pub fn set_default_routes(
        &self,
        id: &str,
        netns: BorrowedFd<'_>,
        wanted: &DefaultRoutes,
    ) -> Result<Attachment, Error> {
        let mut inside = enter(netns, Socket::route)??;
        let ipv4 = wanted.ipv4.as_ref().map(|(name, gateway)| (name, IpAddr::V4(*gateway)));
        let ipv6 = wanted.ipv6.as_ref().map(|(name, gateway)| (name, IpAddr::V6(*gateway)));
        let present = self.attachment(id)?;
        for (route, is_ipv4) in [(ipv4, true), (ipv6, false)] {
            if has_route_of_plugins(&present, is_ipv4) {
                if route.is_none() {
                    continue;
                }
                // Theirs stands beside ours, and gives way.
                clear_default_routes(&mut inside, is_ipv4)?;
            }
            let mut batch = Messages::new();
            match route {
                Some((name, gateway)) => {
                    let index = link::find(&mut inside, name)?.map(|link| link.index).ok_or_else(|| {
                        Error::InvalidSandbox {
                            container: id.to_owned(),
                            reason: format!("interface {name} is gone"),
                        }
                    })?;
                    link::set_default_route(&mut batch, index, gateway);
                }
                None => link::delete_default_route(&mut batch, is_ipv4),
            }
            match inside.execute(batch) {
                // There was none.
                Err(error)
                    if route.is_none() && matches!(error.errno(), Some(libc::ESRCH | libc::EAFNOSUPPORT)) => {
                }
                result => result?,
            }
        }
        let mut endpoints = lock(&self.endpoints);
        let attachment = endpoints.by_id.get_mut(id).ok_or_else(|| Error::NotConnected(id.to_owned()))?;
        for interface in attachment.interfaces.iter_mut().filter(|interface| !interface.by_plugins) {
            let (ipv4, ipv6) = (wanted.ipv4.as_ref(), wanted.ipv6.as_ref());
            interface.gateway = ipv4.filter(|(name, _)| *name == interface.name).map(|route| route.1);
            interface.gateway6 = ipv6.filter(|(name, _)| *name == interface.name).map(|route| route.1);
        }
        Ok(attachment.clone())
    }

    /// Publishes the container's ports at the addresses it has now. Host ports that it has stay the same; the sockets
    /// returned reserve those that it did not have.
    pub fn republish(&self, id: &str, requests: &[PortRequest]) -> Result<(Attachment, Vec<OwnedFd>), Error> {
        let present = self.attachment(id)?;
        let outward = self.outward(present.interfaces.iter());
        let reserved: Vec<PublishedPort> = present.ports.iter().chain(&present.parked).copied().collect();
        let leads_there =
            |port: &PublishedPort| outward.iter().any(|(address, _)| *address == port.container_ip);
        let is_settled =
            !reserved.is_empty() && present.parked.is_empty() && reserved.iter().all(leads_there);
        let is_led = reserved.iter().any(|port| present.is_led_by_plugins(port));
        if requests.is_empty() || is_settled || is_led {
            return Ok((present, Vec::new()));
        }
        if reserved.is_empty() {
            let spec = SandboxSpec {
                id: id.to_owned(),
                name: present.name.clone(),
                ports: requests.to_vec(),
                ..SandboxSpec::default()
            };
            let (ports, held) = self.reserve(&spec, &outward)?;
            self.turn_at_port(&present.interfaces)?;
            if let Err(error) = self.publish(&spec, &ports) {
                lock(&self.ports).release(&ports);
                return Err(error);
            }
            return Ok((self.attachment(id)?, held));
        }
        // The ports are reserved as they are; only what they lead to is another address, or none for now.
        let (mut ports, mut parked) = (Vec::new(), Vec::new());
        for port in reserved {
            let same_family = |(address, _): &&(IpAddr, _)| address.is_ipv4() == port.container_ip.is_ipv4();
            match outward.iter().find(same_family) {
                Some((address, _)) => ports.push(PublishedPort { container_ip: *address, ..port }),
                None => parked.push(port),
            }
        }
        self.turn_at_port(&present.interfaces)?;
        if let Some(attachment) = lock(&self.endpoints).by_id.get_mut(id) {
            (attachment.ports, attachment.parked) = (ports, parked);
        }
        // Such changes are few and seldom: the table is written as a whole.
        self.reload()?;
        forget_flows(&present.ports);
        Ok((self.attachment(id)?, Vec::new()))
    }

    /// What is known of a connected container.
    pub fn attachment(&self, id: &str) -> Result<Attachment, Error> {
        lock(&self.endpoints).by_id.get(id).cloned().ok_or_else(|| Error::NotConnected(id.to_owned()))
    }

    /// Lets the interfaces' packets leave by the port of the bridge that they came from.
    fn turn_at_port(&self, interfaces: &[Interface]) -> Result<(), Error> {
        let bridges = self.bridges().clone();
        let mut batch = Messages::new();
        for interface in interfaces.iter().filter(|interface| !interface.host_name.is_empty()) {
            let isolated = bridges.get(&interface.bridge).is_some_and(|bridge| !bridge.spec.icc);
            link::set_port_mode(&mut batch, &interface.host_name, PortMode { isolated, hairpin: true });
        }
        self.execute(batch)
    }
}

/// Whether CNI plugins have made a default route, which is theirs then.
fn has_route_of_plugins(attachment: &Attachment, is_ipv4: bool) -> bool {
    attachment.interfaces.iter().any(|interface| {
        let has_one = if is_ipv4 { interface.gateway.is_some() } else { interface.gateway6.is_some() };
        interface.by_plugins && has_one
    })
}

/// Removes all default routes of a family; there may be several.
fn clear_default_routes(inside: &mut Socket, is_ipv4: bool) -> Result<(), Error> {
    for _ in 0..16 {
        let mut batch = Messages::new();
        link::delete_default_route(&mut batch, is_ipv4);
        match inside.execute(batch) {
            Err(error) if error.errno() == Some(libc::ESRCH) => return Ok(()),
            result => result?,
        }
    }
    Ok(())
}
