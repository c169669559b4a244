//! The builder as part of the engine: it gets the engine's image store, runtime and networks.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use brigantine_build::{Builder, Joined, Setup};
use brigantine_network::helper::{Residence, Resident};
use brigantine_network::names::{
    DnsChoice, RESOLVED_UPSTREAM, hosts_file, resolv_conf, resolv_conf_of_names, resolv_conf_on_host,
};
use brigantine_network::{InterfaceSpec, SandboxSpec};
use brigantine_sys::SealedExe;
use ipnet::IpNet;

use crate::config::Config;
use crate::containers::extra_host;
use crate::events::Kind;
use crate::images::Images;
use crate::networks::{Networks, Wanted};
use crate::sync::lock;
use crate::{Class, Engine, Error, Result};

/// Opens the builder. Blocks.
pub(crate) fn open(
    config: &Arc<Config>,
    images: &Images,
    networks: &Arc<Networks>,
    exe: &Arc<SealedExe>,
) -> Result<Builder> {
    let network =
        StepNetwork { config: Arc::clone(config), networks: Arc::clone(networks), taken: Mutex::default() };
    Builder::open(Setup {
        data: config.data_root.join("build"),
        run_dir: config.exec_root.join("b"),
        exe: Arc::clone(exe),
        store: images.store().clone(),
        network: Arc::new(network),
        cgroup_parent: config.cgroup_parent.clone(),
        systemd_cgroup: config.systemd_cgroup,
        shm_size: config.default_shm_size,
    })
    .map_err(|error| Error::internal("open the builder").because(error.report()))
}

/// What fills the disk may not be builds.
pub(crate) const COLLECT_EVERY: Duration = Duration::from_mins(10);

/// Takes from the build cache what is beyond its bounds, with the layers that only the cache had.
pub(crate) async fn collect(engine: &Engine) {
    let (builder, gc) = (engine.builder().clone(), engine.config().build_gc.clone());
    match crate::blocking(move || Ok(builder.collect(&gc)?)).await {
        Ok(pruned) if pruned.deleted.is_empty() => {}
        Ok(pruned) => {
            engine.containers().collect_layers().await;
            tracing::info!(objects = pruned.deleted.len(), bytes = pruned.reclaimed, "collected build cache");
            let attributes = BTreeMap::from([("reclaimed".to_owned(), pruned.reclaimed.to_string())]);
            engine.events().publish(Kind::Builder, "prune", "", attributes);
        }
        Err(error) => tracing::error!(error = error.report(), "keep the build cache within its bounds"),
    }
}

impl From<brigantine_build::Error> for Error {
    fn from(error: brigantine_build::Error) -> Self {
        use brigantine_build::Error as Build;
        use brigantine_registry::Class as Registry;
        let cause = match &error {
            Build::Place { cause, .. } => cause,
            other => other,
        };
        let class = match cause {
            Build::Dockerfile { .. } | Build::Invalid(_) | Build::Session(_) => Class::InvalidParameter,
            Build::NotFound(_) => Class::NotFound,
            Build::Busy(_) => Class::Conflict,
            Build::NotImplemented(_) => Class::NotImplemented,
            Build::Registry { source, .. } => match source.class() {
                Registry::NotFound => Class::NotFound,
                Registry::Unauthorized => Class::Unauthorized,
                Registry::InvalidParameter => Class::InvalidParameter,
                Registry::Internal => Class::Internal,
            },
            _ => Class::Internal,
        };
        Self::of(class, error.report())
    }
}

/// Gives the steps of builds their networks: the default bridge's, the host's, none, or one by name.
#[derive(Debug)]
struct StepNetwork {
    config: Arc<Config>,
    networks: Arc<Networks>,
    /// The addresses of each step under way, with its network.
    taken: Mutex<HashMap<String, (String, Vec<IpAddr>)>>,
}

impl StepNetwork {
    fn connect(&self, step: &str, mode: &str, hostname: &str, hosts: &[String]) -> Result<Joined> {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let choice = DnsChoice {
            servers: self.config.dns.clone(),
            search: self.config.dns_search.clone(),
            options: self.config.dns_options.clone(),
        };
        let name = if matches!(mode, "" | "default") { "bridge" } else { mode };
        let gateway = self
            .config
            .host_gateway
            .or_else(|| self.networks.find("bridge").ok()?.layout()?.gateways().next());
        let extra = hosts
            .iter()
            .filter_map(|line| extra_host(line, gateway).transpose())
            .collect::<Result<Vec<_>>>()?;
        let resolv = read("/etc/resolv.conf");
        if name == "host" {
            let mut hosts = read("/etc/hosts");
            for (name, address) in &extra {
                hosts.extend([address.as_str(), "\t", name.as_str(), "\n"]);
            }
            let resolv_conf = resolv_conf_on_host(&resolv, &choice);
            return Ok(Joined { netns: None, host: true, hosts, resolv_conf });
        }
        let mut spec =
            SandboxSpec { id: step.to_owned(), name: format!("build step {step}"), ..SandboxSpec::default() };
        let mut addresses = Vec::new();
        let mut named = None;
        // A host that lets us have no bridge still builds what needs no network.
        if name != "none" && !(name == "bridge" && self.config.bridge == "none") {
            let network = self.networks.find(name)?;
            let Some(segment) = network.segment() else {
                return Err(Error::invalid(format!("network {name} cannot be used by a build")));
            };
            let nets = self.networks.take_addresses(&network.id, &Wanted::default())?;
            addresses.extend(nets.iter().map(IpNet::addr));
            lock(&self.taken).insert(step.to_owned(), (network.id.clone(), addresses.clone()));
            if !network.is_predefined() && self.networks.plumbing().helper().is_some() {
                named = Some(resident(step, hostname, &network, &nets, &choice));
            }
            let (gateway, gateway6) = network.exits();
            spec.interfaces.push(InterfaceSpec {
                bridge: segment.to_owned(),
                name: "eth0".to_owned(),
                mac: None,
                addresses: nets,
                link_local: Vec::new(),
                gateway,
                gateway6,
                sysctls: Vec::new(),
            });
        }
        let plumbing = self.networks.plumbing();
        let sandbox = plumbing.connect(&spec)?;
        let resolv_conf = if let Some(resident) = named {
            plumbing.put_resident(resident, Some(sandbox.netns.as_fd()), false)?;
            resolv_conf_of_names(&resolv, &choice)
        } else {
            let upstream = std::fs::read_to_string(RESOLVED_UPSTREAM).ok();
            resolv_conf(&resolv, upstream.as_deref(), &choice, false)
        };
        Ok(Joined {
            netns: Some(sandbox.netns),
            host: false,
            hosts: hosts_file(&extra, &addresses, hostname, ""),
            resolv_conf,
        })
    }
}

/// A step as the network helper shall know it: it may ask for the names on its network.
fn resident(
    step: &str,
    hostname: &str,
    network: &crate::networks::Record,
    nets: &[IpNet],
    choice: &DnsChoice,
) -> Resident {
    let address = |net: &IpNet| net.addr();
    Resident {
        id: step.to_owned(),
        residences: vec![Residence {
            network: network.id.clone(),
            network_name: network.name.clone(),
            names: vec![hostname.to_owned()],
            ipv4: nets.iter().map(address).find_map(|ip| match ip {
                IpAddr::V4(ip) => Some(ip),
                IpAddr::V6(_) => None,
            }),
            ipv6: nets.iter().map(address).find_map(|ip| match ip {
                IpAddr::V6(ip) => Some(ip),
                IpAddr::V4(_) => None,
            }),
        }],
        links: BTreeMap::new(),
        servers: choice.servers.iter().filter_map(|server| server.parse().ok()).collect(),
        forwards: network.has_exit(),
    }
}

impl brigantine_build::Network for StepNetwork {
    fn join(&self, step: &str, mode: &str, hostname: &str, hosts: &[String]) -> Result<Joined, String> {
        self.connect(step, mode, hostname, hosts).map_err(|error| {
            self.leave(step);
            error.report()
        })
    }

    fn leave(&self, step: &str) {
        self.networks.plumbing().forget(step);
        if let Err(error) = self.networks.plumbing().disconnect(step) {
            tracing::warn!(step, error = error.report(), "disconnect a build step");
        }
        let taken = lock(&self.taken).remove(step);
        if let Some((network, addresses)) = taken {
            for address in addresses {
                self.networks.give_address_back(&network, address);
            }
        }
    }
}
