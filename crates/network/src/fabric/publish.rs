//! Published ports: where they lead, their reservation on the host, and the firewall's elements for them.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::{Fabric, lock};
use crate::bridge::GatewayMode;
use crate::conntrack;
use crate::error::Error;
use crate::firewall::Change;
use crate::ports::{Protocol, PublishedPort, Reservation};
use crate::sandbox::{Interface, SandboxSpec};
use crate::sysctl;

/// How long a start waits for ports that were given back just before.
const PORT_PATIENCE: Duration = Duration::from_millis(500);

impl Fabric {
    /// The addresses that a container's ports are published at, one a family, and how they are reached: that of the
    /// interface with the default route, else the first that has an outside.
    pub(super) fn outward<'a>(
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
    pub(super) fn reserve(
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

    /// Makes the ports reachable and remembers them as the container's.
    pub(super) fn publish(&self, spec: &SandboxSpec, ports: &[PublishedPort]) -> Result<(), Error> {
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

    pub(super) fn withdraw(&self, ports: &[PublishedPort]) -> Result<(), Error> {
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
}

pub(super) fn forget_flows(ports: &[PublishedPort]) {
    if ports.iter().any(|port| port.protocol == Protocol::Udp)
        && let Err(error) = conntrack::forget(ports)
    {
        tracing::warn!(%error, "flows to a published UDP port may go to its former owner until they end");
    }
}
