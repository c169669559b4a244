//! The network of a container that starts: its interfaces with addresses taken, and the ports to publish.

use std::collections::BTreeMap;
use std::net::IpAddr;

use brigantine_network::{InterfaceSpec, PortRequest, SandboxSpec};

use super::start::Plan;
use super::{Record, endpoint, names};
use crate::config::Config;
use crate::ids::new_id;
use crate::networks::Networks;
use crate::spec::Namespace;
use crate::{Error, Result};

/// The container's interfaces as wanted, with addresses taken.
pub(super) struct Wires {
    /// `None` when no sandbox of its own is made.
    pub spec: Option<SandboxSpec>,
    pub networks: Vec<String>,
    pub endpoints: BTreeMap<String, String>,
    /// Taken addresses by network id.
    pub taken: Vec<(String, IpAddr)>,
    /// Questions for names go to the engine.
    pub has_names: bool,
}

impl Wires {
    pub(super) fn lay(plan: &Plan) -> Result<Self> {
        let mut wires = Self {
            spec: None,
            networks: Vec::new(),
            endpoints: BTreeMap::new(),
            taken: Vec::new(),
            has_names: false,
        };
        if plan.network != Namespace::Private {
            return Ok(wires);
        }
        if let Err(error) = wires.connect(plan) {
            wires.give_back(&plan.networks);
            return Err(error);
        }
        Ok(wires)
    }

    fn connect(&mut self, plan: &Plan) -> Result<()> {
        let record = &plan.record;
        let mut spec = SandboxSpec {
            id: record.id.clone(),
            name: record.name.clone(),
            owned: record.remap(&plan.config).is_some(),
            ..SandboxSpec::default()
        };
        // The network of the mode comes first: it has eth0.
        let mode = record.network_mode();
        let mut names: Vec<&String> = record.endpoints.keys().collect();
        names.sort_by_key(|name| name.as_str() != mode);
        let mut connected = Vec::new();
        for name in names {
            let network = plan.networks.find(name)?;
            let settings = &record.endpoints[name];
            let taken = |name: &str| spec.interfaces.iter().any(|one: &InterfaceSpec| one.name == name);
            let interface = endpoint::interface_name(settings, network.interface_prefix(), taken);
            let Some(interface) = endpoint::interface(&plan.networks, &network, settings, interface)? else {
                continue;
            };
            self.taken.extend(interface.addresses.iter().map(|net| (network.id.clone(), net.addr())));
            connected.push((network, interface.name.clone(), settings.gw_priority.unwrap_or_default()));
            spec.interfaces.push(interface);
            self.networks.push(name.clone());
            self.endpoints.insert(name.clone(), new_id());
        }
        let routes = endpoint::default_routes(connected.iter().map(|(network, interface, priority)| {
            endpoint::Exit { network, interface, priority: *priority }
        }));
        for interface in &mut spec.interfaces {
            interface.gateway =
                routes.ipv4.as_ref().filter(|route| route.0 == interface.name).map(|route| route.1);
            interface.gateway6 =
                routes.ipv6.as_ref().filter(|route| route.0 == interface.name).map(|route| route.1);
        }
        if !spec.interfaces.is_empty() {
            let way_out =
                routes.ipv4.as_ref().map(|route| &route.0).or(routes.ipv6.as_ref().map(|route| &route.0));
            let exit = connected.iter().find(|one| way_out == Some(&one.1));
            spec.ports = port_requests(record, &plan.config, exit.map(|(network, ..)| network))?;
        }
        self.has_names = names::has_names(&plan.networks, &self.networks);
        spec.named = self.has_names;
        self.spec = Some(spec);
        Ok(())
    }

    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        self.taken.iter().map(|(_, address)| *address).collect()
    }

    pub(super) fn give_back(&self, networks: &Networks) {
        for (network, address) in &self.taken {
            networks.give_address_back(network, *address);
        }
    }
}

/// Ports to publish: what is bound, and with `-P` everything else that is exposed. `exit` is the network that they are
/// published from.
pub(super) fn port_requests(
    record: &Record,
    config: &Config,
    exit: Option<&crate::networks::Record>,
) -> Result<Vec<PortRequest>> {
    let wrong = |port: &str| {
        let port = port.to_owned();
        move |error: brigantine_network::PortError| {
            Error::invalid(format!("invalid port specification: \"{port}\"")).because(error)
        }
    };
    let host = &record.host_config;
    let mut requests = Vec::new();
    let bindings: BTreeMap<_, _> = host.port_bindings.iter().flatten().collect();
    for (port, bindings) in &bindings {
        let bindings = bindings.as_deref().unwrap_or_default();
        if bindings.is_empty() {
            requests.push(PortRequest::from_binding(port, "", "").map_err(wrong(port))?);
        }
        for binding in bindings {
            let ip = binding.host_ip.as_deref().unwrap_or_default();
            let host_port = binding.host_port.as_deref().unwrap_or_default();
            requests.push(PortRequest::from_binding(port, ip, host_port).map_err(wrong(port))?);
        }
    }
    if host.publish_all_ports == Some(true) {
        let mut exposed: Vec<_> = record.config.exposed_ports.iter().flatten().collect();
        exposed.sort();
        for port in exposed {
            if !bindings.contains_key(port) {
                requests.push(PortRequest::from_binding(port, "", "").map_err(wrong(port))?);
            }
        }
    }
    let default = exit.and_then(crate::networks::Record::host_binding).or(config.default_ip);
    for request in &mut requests {
        request.host_ip = request.host_ip.or(default);
    }
    Ok(requests)
}
