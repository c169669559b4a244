//! Connecting and disconnecting a container that runs: the interface in its network namespace, its routes and ports, the
//! engine's note beside its monitor, and its hosts file.
//!
//! Invariant: the caller holds the container's `lifecycle` lock; after a failure everything is as it was.

use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bollard_stubs::models::EndpointSettings;
use brigantine_network::{Attachment, DefaultRoutes};
use brigantine_sys::netns;

use super::{Container, Containers, Live, Record, Sandbox, endpoint};
use crate::error::Context;
use crate::ids::new_id;
use crate::networks::{self, Placed};
use crate::{Error, Result};

impl Containers {
    /// Gives a running container its interface on `network`.
    pub(super) async fn plug(
        self: &Arc<Self>,
        container: &Arc<Container>,
        live: &Arc<Live>,
        network: &networks::Record,
        settings: &EndpointSettings,
    ) -> Result<()> {
        let before = live.sandbox();
        let Some(attachment) = before.attachment.clone() else {
            return Err(Error::conflict(format!(
                "container {} has no network namespace of its own to connect",
                container.id
            )));
        };
        let is_taken = |name: &str| attachment.interfaces.iter().any(|interface| interface.name == name);
        let name = endpoint::interface_name(settings, network.interface_prefix(), is_taken);
        let Some(interface) = endpoint::interface(&self.networks, network, settings, name)? else {
            return Ok(());
        };
        let give_back = || {
            for net in &interface.addresses {
                self.networks.give_address_back(&network.id, net.addr());
            }
        };
        let mut record = container.record();
        record.endpoints.insert(network.name.clone(), settings.clone());
        let mut names = before.networks.clone();
        names.push(network.name.clone());
        let interfaces: Vec<String> = attachment
            .interfaces
            .iter()
            .map(|one| one.name.clone())
            .chain([interface.name.clone()])
            .collect();
        let placed = self.placed(&record, &names, &interfaces);
        let placed = match placed {
            Ok(placed) => placed,
            Err(error) => {
                give_back();
                return Err(error);
            }
        };
        let work = {
            let (plumbing, live, id, interface) =
                (self.networks.plumbing(), Arc::clone(live), container.id.clone(), interface.clone());
            move || {
                let netns = namespace(&live)?;
                plumbing.attach(&id, netns.as_fd(), &interface, &placed)
            }
        };
        let (attachment, held) = match crate::blocking(work).await {
            Ok(done) => done,
            Err(error) => {
                give_back();
                return Err(error);
            }
        };
        let mut endpoints = before.endpoints.clone();
        endpoints.insert(network.name.clone(), new_id());
        let made = attachment.interfaces.iter().find(|made| made.name == interface.name);
        let own: Vec<IpAddr> = made.iter().flat_map(|made| &made.addresses).map(ipnet::IpNet::addr).collect();
        let sandbox = Sandbox {
            attachment: Some(attachment),
            named: before.named || super::names::has_names(&self.networks, &names),
            held: before.held || !held.is_empty(),
            networks: names,
            endpoints,
        };
        self.replugged(container, live, &record, sandbox, held).await?;
        self.edit_hosts(&record, &own, true).await
    }

    /// Takes a running container's interface on `network` away.
    pub(super) async fn unplug(
        self: &Arc<Self>,
        container: &Arc<Container>,
        live: &Arc<Live>,
        network: &networks::Record,
    ) -> Result<()> {
        let before = live.sandbox();
        let Some(at) = before.networks.iter().position(|name| *name == network.name) else { return Ok(()) };
        let Some(interface) =
            before.attachment.as_ref().and_then(|attachment| attachment.interfaces.get(at)).cloned()
        else {
            return Ok(());
        };
        let mut record = container.record();
        record.endpoints.remove(&network.name);
        let (mut names, mut endpoints) = (before.networks.clone(), before.endpoints.clone());
        names.remove(at);
        endpoints.remove(&network.name);
        let remaining = before.attachment.iter().flat_map(|attachment: &Attachment| &attachment.interfaces);
        let interfaces: Vec<String> =
            remaining.map(|one| one.name.clone()).filter(|name| *name != interface.name).collect();
        let placed = self.placed(&record, &names, &interfaces)?;
        let work = {
            let (plumbing, live, id, name) =
                (self.networks.plumbing(), Arc::clone(live), container.id.clone(), interface.name.clone());
            move || {
                let netns = namespace(&live)?;
                plumbing.detach(&id, netns.as_fd(), &name, &placed)
            }
        };
        let (attachment, held) = crate::blocking(work).await?;
        let own: Vec<IpAddr> = interface.addresses.iter().map(ipnet::IpNet::addr).collect();
        for address in &own {
            self.networks.give_address_back(&network.id, *address);
        }
        let sandbox = Sandbox {
            attachment: Some(attachment),
            named: before.named,
            held: before.held || !held.is_empty(),
            networks: names,
            endpoints,
        };
        self.replugged(container, live, &record, sandbox, held).await?;
        self.edit_hosts(&record, &own, false).await
    }

    /// Where routes and ports belong when the container is on `names` by `interfaces`.
    fn placed(&self, record: &Record, names: &[String], interfaces: &[String]) -> Result<Placed> {
        let networks = names.iter().map(|name| self.networks.find(name)).collect::<Result<Vec<_>>>()?;
        let exits = networks.iter().zip(interfaces).map(|(network, interface)| endpoint::Exit {
            network,
            interface,
            priority: record.endpoints.get(&network.name).and_then(|one| one.gw_priority).unwrap_or_default(),
        });
        let routes: DefaultRoutes = endpoint::default_routes(exits);
        let way_out =
            routes.ipv4.as_ref().map(|route| &route.0).or(routes.ipv6.as_ref().map(|route| &route.0));
        let exit = way_out.and_then(|name| interfaces.iter().position(|one| one == name));
        let exit = exit.and_then(|at| networks.get(at));
        let ports = super::wires::port_requests(record, &self.config, exit)?;
        Ok(Placed { routes, ports })
    }

    /// Makes what has changed known: to the next daemon by the note, to the helper, and to the container by its
    /// `resolv.conf` if it has names from now on.
    async fn replugged(
        self: &Arc<Self>,
        container: &Arc<Container>,
        live: &Arc<Live>,
        record: &Record,
        sandbox: Sandbox,
        held: Vec<OwnedFd>,
    ) -> Result<()> {
        let became_named = sandbox.named && !live.sandbox().named;
        let resident = sandbox.named.then(|| {
            super::names::resident(&self.networks, &self.config, record, self.aliases(record), &sandbox)
        });
        let (run_dir, dir, note) = (self.run_dir(&container.id), self.dir(&container.id), sandbox.clone());
        let (plumbing, living) = (self.networks.plumbing(), Arc::clone(live));
        let choice = super::names::choice(record, &self.config);
        live.connected(sandbox);
        let id = container.id.clone();
        crate::blocking(move || {
            super::start::write_note(&run_dir, &note)?;
            if let Some(attachment) = note.attachment.as_ref().filter(|_| !held.is_empty()) {
                let relayed = super::names::relayed(attachment, &held)
                    .doing(|| format!("relay ports of container {id}"))?;
                plumbing.relay(&id, &relayed)?;
                plumbing.hold(&id, &held)?;
            }
            let Some(resident) = resident else { return Ok(()) };
            if !became_named {
                return plumbing.put_resident(resident, None, false);
            }
            plumbing.put_resident(resident, Some(namespace(&living)?.as_fd()), false)?;
            let path = dir.join("resolv.conf");
            let what = || format!("edit {}", path.display());
            let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
            let present = std::fs::read_to_string(&path).doing(what)?;
            let is_ours = [true, false]
                .into_iter()
                .any(|ipv6| present == super::name_files::resolv_conf_of_host(&host, &choice, ipv6));
            // What somebody has written there stays.
            if is_ours {
                std::fs::write(&path, brigantine_network::names::resolv_conf_of_names(&host, &choice))
                    .doing(what)?;
            }
            Ok(())
        })
        .await
    }

    /// Enters addresses into the container's hosts file, or takes them out; what else stands there stays.
    async fn edit_hosts(&self, record: &Record, own: &[IpAddr], enter: bool) -> Result<()> {
        let path = self.dir(&record.id).join("hosts");
        let hostname = record.config.hostname.clone().unwrap_or_default();
        let domain = record.config.domainname.clone().unwrap_or_default();
        let own = own.to_vec();
        crate::blocking(move || {
            let what = || format!("edit {}", path.display());
            let mut text = std::fs::read_to_string(&path).doing(what)?;
            for address in own {
                let line = brigantine_network::names::own_entry(address, &hostname, &domain);
                if enter {
                    text.push_str(&line);
                } else {
                    text = text.split_inclusive('\n').filter(|other| *other != line).collect();
                }
            }
            // In place: it is mounted.
            std::fs::write(&path, text).doing(what)
        })
        .await
    }
}

/// The network namespace of the container: its process is the monitor's child as long as the monitor says so, so the
/// number cannot have become another process's before that.
pub(super) fn namespace(live: &Live) -> Result<OwnedFd> {
    let what = || format!("open the network namespace of process {}", live.pid);
    let netns = netns::of_process(live.pid).map_err(std::io::Error::from).doing(what)?;
    let state =
        live.client.state().map_err(|error| Error::conflict("the container has ended").because(error))?;
    if state.container_pid == live.pid { Ok(netns) } else { Err(Error::conflict("the container has ended")) }
}
