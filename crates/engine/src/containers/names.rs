//! What the network helper is told of a container: its names and addresses on networks of its users' making, whom it may
//! ask, and which of its ports are relayed.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use brigantine_network::helper::{Relayed, Residence, Resident};
use brigantine_network::names::DnsChoice;

use super::{Container, Containers, Live, Record, Sandbox};
use crate::config::Config;
use crate::error::Context;
use crate::networks::{Networks, Plumbing};
use crate::{Error, Result};

/// All names that a container has on a network: its own, its aliases, the start of its id and its host name.
pub(super) fn of_endpoint(record: &Record, network: &str) -> Vec<String> {
    let aliases =
        record.endpoints.get(network).and_then(|settings| settings.aliases.clone()).unwrap_or_default();
    let mut names = vec![record.name.clone()];
    let more = aliases.into_iter().chain([crate::ids::short(&record.id).to_owned()]);
    for name in more.chain(record.config.hostname.clone()).filter(|name| !name.is_empty()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Whether a container on these networks asks the engine for names: as soon as one of them is of a user's making.
pub(super) fn has_names(networks: &Networks, names: &[String]) -> bool {
    networks.plumbing().helper().is_some()
        && names.iter().any(|name| networks.find(name).is_ok_and(|network| !network.is_predefined()))
}

/// The servers, search domains and options that hold for a container.
pub(super) fn choice(record: &Record, config: &Config) -> DnsChoice {
    let host = &record.host_config;
    let or = |given: &Option<Vec<String>>, default: &[String]| match given.as_deref() {
        None | Some([]) => default.to_vec(),
        Some(given) => given.to_vec(),
    };
    DnsChoice {
        servers: or(&host.dns, &config.dns),
        search: or(&host.dns_search, &config.dns_search),
        options: or(&host.dns_options, &config.dns_options),
    }
}

/// The container as the helper shall know it. `links` are aliases with the ids they stand for.
pub(super) fn resident(
    networks: &Networks,
    config: &Config,
    record: &Record,
    links: BTreeMap<String, String>,
    sandbox: &Sandbox,
) -> Resident {
    let interfaces = sandbox.attachment.iter().flat_map(|attachment| &attachment.interfaces);
    let mut resident = Resident {
        id: record.id.clone(),
        residences: Vec::new(),
        links,
        servers: choice(record, config).servers.iter().filter_map(|server| server.parse().ok()).collect(),
        forwards: false,
    };
    for (name, interface) in sandbox.networks.iter().zip(interfaces) {
        let Ok(network) = networks.find(name) else { continue };
        resident.forwards |= network.has_exit();
        if network.is_predefined() {
            continue;
        }
        resident.residences.push(Residence {
            network: network.id.clone(),
            network_name: network.name.clone(),
            names: of_endpoint(record, name),
            ipv4: interface.ipv4(),
            ipv6: interface.ipv6(),
        });
    }
    resident
}

/// Which of a container's host sockets are relayed, and where to. `held` are the sockets of its ports, in their order.
pub(super) fn relayed(
    attachment: &brigantine_network::Attachment,
    held: &[OwnedFd],
) -> std::io::Result<Vec<(OwnedFd, Relayed)>> {
    let ports = attachment.ports.iter().zip(held).filter(|(port, _)| port.needs_relay());
    ports
        .map(|(port, socket)| {
            let to = SocketAddr::new(port.container_ip, port.container_port);
            Ok((socket.try_clone()?, Relayed { protocol: port.protocol, to }))
        })
        .collect()
}

impl Containers {
    /// The ids behind the aliases that a container's links give to others, on networks of its users' making.
    pub(super) fn aliases(&self, record: &Record) -> BTreeMap<String, String> {
        let links = record.endpoints.values().flat_map(|settings| settings.links.iter().flatten());
        links
            .filter_map(|link| {
                let (target, alias) = link.split_once(':').unwrap_or((link, link));
                Some((alias.to_owned(), self.find(target).ok()?.id.clone()))
            })
            .collect()
    }

    /// Running containers whose links give `target` another name on a network learn that it is there.
    pub(super) async fn tell_aliases(&self, target: &Container) {
        for container in self.all() {
            let links = container.with(|inner| {
                let settings = inner.live.iter().flat_map(|_| inner.record.endpoints.values());
                settings.flat_map(|settings| settings.links.iter().flatten().cloned()).collect::<Vec<_>>()
            });
            let leads_there = |link: &String| {
                let name = link.split_once(':').map_or(link.as_str(), |(name, _)| name);
                self.find(name).is_ok_and(|other| other.id == target.id)
            };
            if container.id != target.id
                && links.iter().any(leads_there)
                && let Err(error) = self.rename_resident(&container).await
            {
                tracing::warn!(container = container.id, error = error.report(), "tell of a link's target");
            }
        }
    }

    /// Tells the helper what has changed of a running container.
    pub(super) async fn rename_resident(&self, container: &Container) -> Result<()> {
        let Some(live) = container.live() else { return Ok(()) };
        let sandbox = live.sandbox();
        if !sandbox.named {
            return Ok(());
        }
        let record = container.record();
        let resident = resident(&self.networks, &self.config, &record, self.aliases(&record), &sandbox);
        let plumbing = self.networks.plumbing();
        crate::blocking(move || plumbing.put_resident(resident, None, false)).await
    }

    /// Connects to the helper and brings it up to date: those that it serves and should not, and those that it should.
    pub(super) fn meet_helper(self: &Arc<Self>) {
        let plumbing = self.networks.plumbing();
        let Some(helper) = plumbing.helper() else { return };
        let served = match helper.connect() {
            Ok(served) => served,
            Err(error) => {
                let error = Error::internal("names of containers are not answered").because(error).report();
                tracing::error!(error);
                return;
            }
        };
        self.networks.share_names();
        let mut unknown: Vec<String> = Vec::new();
        for id in &served {
            if self.find(id).ok().and_then(|container| container.live()).is_none() {
                unknown.push(id.clone());
            }
        }
        for id in unknown {
            if let Err(error) = helper.forget(&id) {
                tracing::warn!(container = id, %error, "forget a container that has ended");
            }
        }
        for container in self.all() {
            let Some(live) = container.live() else { continue };
            let sandbox = live.sandbox();
            if !sandbox.named {
                continue;
            }
            let record = container.record();
            let resident = resident(&self.networks, &self.config, &record, self.aliases(&record), &sandbox);
            let outcome = if served.contains(&container.id) {
                plumbing.put_resident(resident, None, false)
            } else {
                super::plug::namespace(&live)
                    .and_then(|netns| plumbing.put_resident(resident, Some(netns.as_fd()), true))
            };
            if let Err(error) = outcome {
                tracing::warn!(container = container.id, error = error.report(), "enter a container's names");
            }
        }
    }

    /// Starts the helper and watches over it as long as the engine is there.
    pub(crate) fn keep_helper(self: &Arc<Self>) {
        let Some(helper) = self.networks.plumbing().helper() else { return };
        let engine = Arc::downgrade(self);
        let watching = std::thread::Builder::new().name("network helper".to_owned()).spawn(move || {
            loop {
                helper.wait_until_lost();
                let Some(containers) = engine.upgrade() else { return };
                tracing::warn!("the network helper has ended; it is started again");
                containers.meet_helper();
                drop(containers);
                // One that ends at once is not started in a circle.
                std::thread::sleep(std::time::Duration::from_millis(500));
            }
        });
        if let Err(error) = watching {
            tracing::warn!(%error, "watch over the network helper");
        }
    }
}

/// What the helper does for a container that is about to start.
pub(super) fn enter(
    plumbing: &Plumbing,
    resident: Option<Resident>,
    sandbox: &mut brigantine_network::Sandbox,
) -> Result<()> {
    let id = sandbox.attachment.id.clone();
    let relayed =
        relayed(&sandbox.attachment, &sandbox.held).doing(|| format!("relay ports of container {id}"))?;
    if !relayed.is_empty() {
        plumbing.relay(&id, &relayed)?;
    }
    match resident {
        Some(resident) => {
            let made = sandbox.names.take();
            plumbing.enter_resident(resident, sandbox.netns.as_fd(), made)
        }
        None => Ok(()),
    }
}

/// Whether the helper has anything of a container.
pub(super) fn is_helped(live: &Live) -> bool {
    let sandbox = live.sandbox();
    let ports =
        sandbox.attachment.iter().flat_map(|attachment| attachment.ports.iter().chain(&attachment.parked));
    sandbox.named || sandbox.held || ports.into_iter().any(brigantine_network::PublishedPort::needs_relay)
}
