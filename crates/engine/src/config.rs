//! What the daemon's flags decide for the engine: places, defaults for containers, the default bridge.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::runtimes::RuntimeTable;
use crate::userns::Remap;

/// Configuration of an [`Engine`](crate::Engine), fixed while it is open.
#[derive(Debug, Clone)]
pub struct Config {
    /// Images, containers' writable layers and the database; survives a reboot.
    pub data_root: PathBuf,
    /// How new image layers are kept; the best way that works when not given.
    pub storage: Option<brigantine_image::Storage>,
    /// Sockets and state of running containers; need not survive a reboot.
    pub exec_root: PathBuf,
    /// The static `brig-runtime` executable; it is copied into a sealed memfd when the engine opens.
    pub runtime_exe: PathBuf,
    /// Other OCI runtimes, and which one is the default, when the engine opens.
    pub runtimes: RuntimeTable,
    /// The default bridge's device name; `none` switches the default bridge off.
    pub bridge: String,
    /// The default bridge's address and subnet, e.g. `172.30.0.1/16`.
    pub bip: Option<IpNet>,
    /// Where in the default bridge's subnet its containers' addresses are.
    pub fixed_cidr: Option<Ipv4Net>,
    /// IPv6 on the default bridge, and its subnet there; one is made if that is not given.
    pub ipv6: bool,
    pub fixed_cidr_v6: Option<Ipv6Net>,
    /// MTU of the default bridge; 0 takes the kernel's.
    pub mtu: u32,
    /// Containers on the default bridge may talk to each other.
    pub icc: bool,
    /// Set up the firewall (masquerading, published ports).
    pub firewall: bool,
    /// What the firewall is made with.
    pub firewall_backend: brigantine_network::FirewallBackend,
    /// The host's own rules for incoming packets decide about published ports, too.
    pub host_firewall: bool,
    /// Directories of CNI plugins, in the order of searching, and that of the configurations of their networks.
    pub cni_plugin_dirs: Vec<PathBuf>,
    pub cni_config_dir: PathBuf,
    /// The command that starts the network helper; without one containers have no names for each other.
    pub network_helper: Vec<OsString>,
    /// Routers that containers of the default bridge use, other than the bridge itself.
    pub default_gateway: Option<Ipv4Addr>,
    pub default_gateway_v6: Option<Ipv6Addr>,
    /// Options of new networks, by driver.
    pub network_options: BTreeMap<String, BTreeMap<String, String>>,
    /// Masquerade traffic that leaves the default bridge.
    pub ip_masq: bool,
    /// Host address that published ports bind when a request names none.
    pub default_ip: Option<std::net::IpAddr>,
    /// Pools that user-defined networks take their subnets from: pool and the prefix length of each subnet.
    pub default_address_pools: Vec<(IpNet, u8)>,
    /// DNS settings used when a container brings none.
    pub dns: Vec<String>,
    pub dns_search: Vec<String>,
    pub dns_options: Vec<String>,
    /// What `host-gateway` means in extra hosts; the default bridge's address when empty.
    pub host_gateway: Option<std::net::IpAddr>,
    /// Parent of the containers' cgroups.
    pub cgroup_parent: String,
    pub systemd_cgroup: bool,
    /// Default log driver and its options.
    pub log_driver: String,
    pub log_opts: BTreeMap<String, String>,
    /// IPC and cgroup namespaces of containers that name none.
    pub default_ipc: DefaultIpc,
    pub default_cgroupns: DefaultCgroupns,
    /// Size of /dev/shm when the request has none, in bytes.
    pub default_shm_size: i64,
    /// What the build cache is kept to.
    pub build_gc: brigantine_build::Gc,
    /// Default resource limits: name → (soft, hard).
    pub default_ulimits: BTreeMap<String, (i64, i64)>,
    /// Run `--init` in every container that does not say otherwise.
    pub init: bool,
    pub no_new_privileges: bool,
    /// `builtin`, `unconfined` or a path to a profile.
    pub seccomp_profile: String,
    /// Ids of the host for those in containers; without it they are the same.
    pub userns: Option<Remap>,
    /// Labels of the engine itself, `key=value`.
    pub labels: Vec<String>,
    /// Where vendors describe devices (CDI); later ones go before.
    pub cdi_dirs: Vec<PathBuf>,
    /// Seconds a container gets to stop when the engine is asked to stop its containers.
    pub shutdown_timeout: u32,
}

/// IPC namespaces that containers can have unasked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DefaultIpc {
    #[default]
    Private,
    /// One that others may join.
    Shareable,
}

/// Cgroup namespaces that containers can have unasked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DefaultCgroupns {
    #[default]
    Private,
    Host,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_root: PathBuf::from("/var/lib/brigantine"),
            storage: None,
            exec_root: PathBuf::from("/run/brigantine"),
            runtime_exe: PathBuf::from("brig-runtime"),
            runtimes: RuntimeTable::default(),
            bridge: "brig0".to_owned(),
            bip: None,
            fixed_cidr: None,
            ipv6: false,
            fixed_cidr_v6: None,
            mtu: 0,
            icc: true,
            firewall: true,
            firewall_backend: brigantine_network::FirewallBackend::default(),
            host_firewall: true,
            cni_plugin_dirs: ["/opt/cni/bin", "/usr/libexec/cni", "/usr/lib/cni"].map(PathBuf::from).into(),
            cni_config_dir: PathBuf::from("/etc/cni/net.d"),
            network_helper: Vec::new(),
            default_gateway: None,
            default_gateway_v6: None,
            network_options: BTreeMap::new(),
            ip_masq: true,
            default_ip: None,
            default_address_pools: Vec::new(),
            dns: Vec::new(),
            dns_search: Vec::new(),
            dns_options: Vec::new(),
            host_gateway: None,
            cgroup_parent: "/brigantine".to_owned(),
            systemd_cgroup: false,
            log_driver: "json-file".to_owned(),
            log_opts: BTreeMap::new(),
            default_ipc: DefaultIpc::default(),
            default_cgroupns: DefaultCgroupns::default(),
            default_shm_size: 64 << 20,
            build_gc: brigantine_build::Gc::default(),
            default_ulimits: BTreeMap::new(),
            init: false,
            no_new_privileges: false,
            seccomp_profile: "builtin".to_owned(),
            userns: None,
            labels: Vec::new(),
            cdi_dirs: crate::cdi::DIRS.iter().map(PathBuf::from).collect(),
            shutdown_timeout: 15,
        }
    }
}
