//! From settings to what the daemon and the engine are configured with.
//!
//! Invariant: a value that does not parse is an error naming its setting, never a default.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use brigantine_engine::Config;
use brigantine_engine::config::{DefaultCgroupns, DefaultIpc};
use brigantine_engine::runtimes::{OWN, Runtime, RuntimeTable};
use brigantine_engine::userns::Remap;
use serde_json::Value;

use super::settings::{Given, SettingsError};
use super::tls::TlsFiles;

/// Everything the daemon was told.
#[derive(Debug, Clone)]
pub struct Options {
    pub engine: Config,
    pub hosts: Vec<Host>,
    pub pidfile: PathBuf,
    /// The socket's group, if one was named.
    pub group: Option<String>,
    pub log_format: LogFormat,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// For TCP sockets.
    pub tls: Option<TlsFiles>,
    pub live: Live,
}

/// What a SIGHUP may change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Live {
    pub debug: bool,
    pub log_level: LogLevel,
    pub labels: Vec<String>,
    pub registry_mirrors: Vec<String>,
    pub insecure_registries: Vec<String>,
    pub max_concurrent_downloads: usize,
    pub max_concurrent_uploads: usize,
    pub max_download_attempts: usize,
    pub http_proxy: Option<String>,
    pub https_proxy: Option<String>,
    pub no_proxy: Option<String>,
    pub runtimes: RuntimeTable,
    pub authorization_plugins: Arc<[String]>,
}

/// Least severe messages to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogLevel {
    Trace,
    Debug,
    #[default]
    Info,
    Warn,
    Error,
}

/// How the daemon's log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    Unix(PathBuf),
    /// With mutual TLS.
    Tcp(SocketAddr),
    /// Sockets of the service manager: all, or the one with this position or descriptor number.
    Inherited(Option<usize>),
}

impl Options {
    pub fn from_given(given: &Given) -> Result<Self, SettingsError> {
        let mut engine = Config::default();
        if let Some(path) = text(given, "data-root") {
            engine.data_root = absolute("data-root", path)?;
        }
        for key in ["storage-driver", "storage"] {
            let Some(name) = text(given, key).filter(|name| !name.is_empty()) else { continue };
            let storage =
                name.parse().map_err(|error: brigantine_image::Error| value(key, &error.to_string()))?;
            if engine.storage.replace(storage).is_some_and(|other| other != storage) {
                return Err(value(key, "storage and storage-driver say different things"));
            }
        }
        if engine.storage.is_none()
            && let Ok(name) = std::env::var("BRIG_STORAGE")
            && !name.is_empty()
        {
            let unknown = |error: brigantine_image::Error| value("BRIG_STORAGE", &error.to_string());
            engine.storage = Some(name.parse().map_err(unknown)?);
        }
        if let Some(path) = text(given, "exec-root") {
            engine.exec_root = absolute("exec-root", path)?;
        }
        engine.runtime_exe = match text(given, "runtime-exe") {
            Some(path) => absolute("runtime-exe", path)?,
            None => find_runtime(),
        };
        if let Some(bridge) = text(given, "bridge").filter(|bridge| !bridge.is_empty()) {
            bridge.clone_into(&mut engine.bridge);
        }
        engine.bip = parsed(given, "bip", "an address with its prefix, such as 172.30.0.1/16")?;
        if engine.bip.is_some() && engine.bridge == "none" {
            return Err(value("bip", "the default network is switched off by --bridge none"));
        }
        engine.fixed_cidr = parsed(given, "fixed-cidr", "an IPv4 subnet, such as 172.30.4.0/24")?;
        engine.ipv6 = switch(given, "ipv6", engine.ipv6);
        engine.fixed_cidr_v6 = parsed(given, "fixed-cidr-v6", "an IPv6 subnet, such as fd00:1::/64")?;
        if engine.fixed_cidr_v6.is_some() && !engine.ipv6 {
            return Err(value("fixed-cidr-v6", "it needs --ipv6"));
        }
        let plugin_dirs = list(given, "cni-plugin-dirs");
        if !plugin_dirs.is_empty() {
            engine.cni_plugin_dirs =
                plugin_dirs.iter().map(|dir| absolute("cni-plugin-dirs", dir)).collect::<Result<_, _>>()?;
        }
        if let Some(dir) = text(given, "cni-config-dir").filter(|dir| !dir.is_empty()) {
            engine.cni_config_dir = absolute("cni-config-dir", dir)?;
        }
        if let Some(name) = text(given, "firewall-backend") {
            engine.firewall_backend = name.parse().map_err(|()| {
                value("firewall-backend", &format!("{name:?} is none: nftables, iptables or auto"))
            })?;
        }
        engine.host_firewall = switch(given, "host-firewall", engine.host_firewall);
        if let Some(mtu) = number(given, "mtu") {
            engine.mtu = u32::try_from(mtu)
                .ok()
                .filter(|mtu| *mtu == 0 || (68..=65535).contains(mtu))
                .ok_or_else(|| value("mtu", &format!("{mtu} is not between 68 and 65535")))?;
        }
        engine.icc = switch(given, "icc", engine.icc);
        engine.firewall = switch(given, "iptables", engine.firewall);
        engine.ip_masq = switch(given, "ip-masq", engine.ip_masq);
        engine.default_ip = parsed(given, "ip", "an IP address")?;
        engine.default_gateway = parsed(given, "default-gateway", "an IPv4 address")?;
        engine.default_gateway_v6 = parsed(given, "default-gateway-v6", "an IPv6 address")?;
        if engine.default_gateway_v6.is_some() && !engine.ipv6 {
            return Err(value("default-gateway-v6", "it needs --ipv6"));
        }
        for (driver, options) in
            given.get("default-network-opts").and_then(Value::as_object).into_iter().flatten()
        {
            let options = options.as_object().into_iter().flatten();
            let options =
                options.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())));
            engine.network_options.insert(driver.clone(), options.collect());
        }
        engine.default_ipc = match text(given, "default-ipc-mode") {
            None | Some("" | "private") => DefaultIpc::Private,
            Some("shareable") => DefaultIpc::Shareable,
            Some(other) => {
                return Err(value(
                    "default-ipc-mode",
                    &format!("{other:?} is neither private nor shareable"),
                ));
            }
        };
        engine.default_cgroupns = match text(given, "default-cgroupns-mode") {
            None | Some("" | "private") => DefaultCgroupns::Private,
            Some("host") => DefaultCgroupns::Host,
            Some(other) => {
                return Err(value(
                    "default-cgroupns-mode",
                    &format!("{other:?} is neither private nor host"),
                ));
            }
        };
        engine.host_gateway = parsed(given, "host-gateway-ip", "an IP address")?;
        for pool in given.get("default-address-pools").and_then(Value::as_array).into_iter().flatten() {
            engine.default_address_pools.push(address_pool(pool)?);
        }
        engine.dns = list(given, "dns");
        for server in &engine.dns {
            IpAddr::from_str(server)
                .map_err(|_error| value("dns", &format!("{server:?} is not an IP address")))?;
        }
        engine.dns_search = list(given, "dns-search");
        engine.dns_options = list(given, "dns-opts");
        if let Some(parent) = text(given, "cgroup-parent").filter(|parent| !parent.is_empty()) {
            parent.clone_into(&mut engine.cgroup_parent);
        }
        for option in list(given, "exec-opts") {
            engine.systemd_cgroup = match option.split_once('=') {
                Some(("native.cgroupdriver", "systemd")) => true,
                Some(("native.cgroupdriver", "cgroupfs")) => false,
                _ => {
                    return Err(value(
                        "exec-opts",
                        &format!(
                            "{option:?}: expected native.cgroupdriver=cgroupfs or native.cgroupdriver=systemd"
                        ),
                    ));
                }
            };
        }
        if let Some(driver) = text(given, "log-driver") {
            driver.clone_into(&mut engine.log_driver);
        }
        engine.log_opts = map(given, "log-opts");
        if let Some(size) = number(given, "default-shm-size") {
            engine.default_shm_size = size;
        }
        if let Some(builder) = given.get("builder") {
            engine.build_gc =
                brigantine_build::Gc::parse(builder).map_err(|error| value("builder", &error))?;
        }
        for (name, limit) in given.get("default-ulimits").and_then(Value::as_object).into_iter().flatten() {
            let number = |key: &str| limit.get(key).and_then(Value::as_i64).unwrap_or(-1);
            engine.default_ulimits.insert(name.clone(), (number("Soft"), number("Hard")));
        }
        engine.init = switch(given, "init", engine.init);
        engine.no_new_privileges = switch(given, "no-new-privileges", engine.no_new_privileges);
        if let Some(profile) = text(given, "seccomp-profile").filter(|profile| !profile.is_empty()) {
            profile.clone_into(&mut engine.seccomp_profile);
            if profile.starts_with('/') && !Path::new(profile).is_file() {
                return Err(value("seccomp-profile", &format!("there is no file {profile}")));
            }
        }
        if let Some(seconds) = number(given, "shutdown-timeout") {
            engine.shutdown_timeout =
                u32::try_from(seconds).map_err(|_error| value("shutdown-timeout", "must not be negative"))?;
        }
        if let Some(whose) = text(given, "userns-remap").filter(|whose| !whose.is_empty()) {
            let remap = Remap::from_host(whose).map_err(|error| value("userns-remap", &error.report()))?;
            engine.userns = Some(remap);
        }
        let live = Live::from_given(given)?;
        engine.labels.clone_from(&live.labels);
        engine.runtimes.clone_from(&live.runtimes);

        let mut hosts =
            list(given, "hosts").iter().map(|host| host.parse()).collect::<Result<Vec<_>, _>>()?;
        if hosts.is_empty() {
            hosts.push(Host::Unix(engine.exec_root.join("brig.sock")));
        }
        let pidfile = match text(given, "pidfile").filter(|path| !path.is_empty()) {
            Some(path) => absolute("pidfile", path)?,
            None => engine.exec_root.join("brig.pid"),
        };
        let log_format = match text(given, "log-format") {
            None | Some("" | "text") => LogFormat::Text,
            Some("json") => LogFormat::Json,
            Some(other) => return Err(value("log-format", &format!("{other:?} is neither text nor json"))),
        };
        let group = text(given, "group").map(str::to_owned);
        let metrics = parsed(given, "metrics-addr", "an address and port, such as 127.0.0.1:9323")?;
        let tls = tls_files(given)?;
        if tls.is_none() && hosts.iter().any(|host| matches!(host, Host::Tcp(_))) {
            return Err(value(
                "hosts",
                "tcp:// needs --tlsverify: without it everybody who reaches the port is root on this machine. Use a unix socket, an SSH connection, or --tlsverify with --tlscacert, --tlscert and --tlskey",
            ));
        }
        Ok(Self { engine, hosts, pidfile, group, log_format, metrics, tls, live })
    }
}

/// The files of mutual TLS, where docker has them unless they are named.
fn tls_files(given: &Given) -> Result<Option<TlsFiles>, SettingsError> {
    if !switch(given, "tlsverify", false) {
        if switch(given, "tls", false) {
            return Err(value("tls", "TLS alone lets everybody in: --tlsverify is needed"));
        }
        return Ok(None);
    }
    let dir = std::env::var_os("DOCKER_CERT_PATH").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".docker"),
        PathBuf::from,
    );
    let file = |key: &str, name: &str| match text(given, key).filter(|path| !path.is_empty()) {
        Some(path) => absolute(key, path),
        None => Ok(dir.join(name)),
    };
    Ok(Some(TlsFiles {
        authority: file("tlscacert", "ca.pem")?,
        certificate: file("tlscert", "cert.pem")?,
        key: file("tlskey", "key.pem")?,
    }))
}

impl Live {
    pub fn from_given(given: &Given) -> Result<Self, SettingsError> {
        let count = |key: &'static str, default: usize| match number(given, key) {
            None | Some(0) => Ok(default),
            Some(n) => {
                usize::try_from(n).map_err(|_error| value(key, &format!("{n} is not a number of transfers")))
            }
        };
        let labels = list(given, "labels");
        for label in &labels {
            if label.split_once('=').is_none_or(|(name, _)| name.is_empty()) {
                return Err(value("labels", &format!("{label:?}: expected name=value")));
            }
        }
        let owned = |key| text(given, key).filter(|text| !text.is_empty()).map(str::to_owned);
        Ok(Self {
            debug: switch(given, "debug", false),
            log_level: text(given, "log-level").map_or(Ok(LogLevel::Info), LogLevel::from_str)?,
            labels,
            registry_mirrors: list(given, "registry-mirrors"),
            insecure_registries: list(given, "insecure-registries"),
            max_concurrent_downloads: count("max-concurrent-downloads", 3)?,
            max_concurrent_uploads: count("max-concurrent-uploads", 5)?,
            max_download_attempts: count("max-download-attempts", 5)?,
            http_proxy: owned("http-proxy"),
            https_proxy: owned("https-proxy"),
            no_proxy: owned("no-proxy"),
            runtimes: runtimes(given)?,
            authorization_plugins: list(given, "authorization-plugins").into(),
        })
    }

    /// What to log once `--debug` is taken into account.
    pub fn level(&self) -> LogLevel {
        match self.log_level {
            LogLevel::Trace => LogLevel::Trace,
            _ if self.debug => LogLevel::Debug,
            level => level,
        }
    }
}

impl FromStr for LogLevel {
    type Err = SettingsError;

    fn from_str(text: &str) -> Result<Self, SettingsError> {
        Ok(match text.to_ascii_lowercase().as_str() {
            "trace" => Self::Trace,
            "debug" => Self::Debug,
            "" | "info" => Self::Info,
            "warn" | "warning" => Self::Warn,
            "error" | "fatal" | "panic" => Self::Error,
            _ => {
                return Err(value(
                    "log-level",
                    &format!("{text:?} is none of trace, debug, info, warn, error and fatal"),
                ));
            }
        })
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
            Self::Inherited(None) => f.write_str("fd://"),
            Self::Inherited(Some(number)) => write!(f, "fd://{number}"),
        }
    }
}

impl FromStr for Host {
    type Err = SettingsError;

    fn from_str(host: &str) -> Result<Self, SettingsError> {
        let refuse = |message: &str| Err(value("hosts", &format!("{host:?}: {message}")));
        let host = host.trim();
        if let Some(path) = host.strip_prefix("unix://") {
            return absolute("hosts", path).map(Self::Unix);
        }
        if let Some(which) = host.strip_prefix("fd://") {
            return match which {
                "" | "*" => Ok(Self::Inherited(None)),
                number => match number.parse::<usize>() {
                    Ok(number) => Ok(Self::Inherited(Some(number))),
                    Err(_) => refuse("sockets of the service manager are named by number"),
                },
            };
        }
        if let Some(address) = host.strip_prefix("tcp://") {
            let address = address.trim_end_matches('/');
            // docker's port for TLS.
            let address = match address.strip_prefix(':') {
                Some(port) => format!("0.0.0.0:{port}"),
                None if address.parse::<IpAddr>().is_ok() => format!("{address}:2376"),
                None => address.replace("localhost:", "127.0.0.1:"),
            };
            return match address.parse() {
                Ok(address) => Ok(Self::Tcp(address)),
                Err(_) => refuse("expected an IP address and a port"),
            };
        }
        refuse("expected unix:///path, tcp://address:port or fd://")
    }
}

fn value(name: &str, message: &str) -> SettingsError {
    SettingsError::Value { name: name.to_owned(), message: message.to_owned() }
}

fn text<'g>(given: &'g Given, key: &str) -> Option<&'g str> {
    given.get(key).and_then(Value::as_str)
}

fn number(given: &Given, key: &str) -> Option<i64> {
    given.get(key).and_then(Value::as_i64)
}

fn switch(given: &Given, key: &str, default: bool) -> bool {
    given.get(key).and_then(Value::as_bool).unwrap_or(default)
}

fn list(given: &Given, key: &str) -> Vec<String> {
    let items = given.get(key).and_then(Value::as_array).into_iter().flatten();
    items.filter_map(Value::as_str).map(str::to_owned).collect()
}

fn map(given: &Given, key: &str) -> BTreeMap<String, String> {
    let items = given.get(key).and_then(Value::as_object).into_iter().flatten();
    items.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

fn parsed<T: FromStr>(given: &Given, key: &'static str, expected: &str) -> Result<Option<T>, SettingsError> {
    match text(given, key).filter(|text| !text.is_empty()) {
        None => Ok(None),
        Some(text) => {
            text.parse().map(Some).map_err(|_error| value(key, &format!("{text:?} is not {expected}")))
        }
    }
}

fn absolute(key: &str, path: &str) -> Result<PathBuf, SettingsError> {
    if path.is_empty() {
        return Err(value(key, "the path is empty"));
    }
    std::path::absolute(path).map_err(|error| value(key, &format!("{path:?}: {error}")))
}

fn address_pool(pool: &Value) -> Result<(ipnet::IpNet, u8), SettingsError> {
    let base = pool.get("base").and_then(Value::as_str).unwrap_or_default();
    let size = pool.get("size").and_then(Value::as_u64).unwrap_or_default();
    let wrong = |message: String| value("default-address-pools", &message);
    let net: ipnet::IpNet = base.parse().map_err(|_error| wrong(format!("{base:?} is not a subnet")))?;
    let size =
        u8::try_from(size).ok().filter(|size| *size >= net.prefix_len() && *size <= net.max_prefix_len());
    let size = size.ok_or_else(|| wrong(format!("subnets of that size do not fit into {base}")))?;
    Ok((net, size))
}

/// Other OCI runtimes: those that are configured, and crun where it is installed.
fn runtimes(given: &Given) -> Result<RuntimeTable, SettingsError> {
    let mut table = RuntimeTable::default();
    for (name, runtime) in given.get("runtimes").and_then(Value::as_object).into_iter().flatten() {
        let path = runtime.get("path").and_then(Value::as_str).unwrap_or_default().into();
        let args = runtime.get("runtimeArgs").and_then(Value::as_array).into_iter().flatten();
        let args = args.filter_map(Value::as_str).map(str::to_owned).collect();
        table.others.insert(name.clone(), Runtime { path, args });
    }
    if let Some(path) = on_path("crun") {
        table.others.entry("crun".to_owned()).or_insert(Runtime { path, args: Vec::new() });
    }
    text(given, "default-runtime")
        .filter(|name| !name.is_empty())
        .unwrap_or(OWN)
        .clone_into(&mut table.default);
    table.check().map_err(|error| value("default-runtime", &error.to_string()))?;
    Ok(table)
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|found| found.is_absolute() && found.is_file())
}

/// The runtime beside this program, in its libexec directory, or on the path.
fn find_runtime() -> PathBuf {
    const NAME: &str = "brig-runtime";
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned));
    let near =
        beside.into_iter().flat_map(|dir| [dir.join(NAME), dir.join("../libexec/brigantine").join(NAME)]);
    near.chain(on_path(NAME)).find(|candidate| candidate.is_file()).unwrap_or_else(|| PathBuf::from(NAME))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::super::settings::command_line;
    use super::*;

    fn options(args: &[&str]) -> Result<Options, String> {
        let line = command_line(args.iter().map(OsString::from)).map_err(|error| error.to_string())?;
        Options::from_given(&line.given).map_err(|error| error.to_string())
    }

    #[test]
    fn places_follow_the_exec_root() {
        let options = options(&["--exec-root", "/run/x"]).unwrap();
        assert_eq!(options.hosts, [Host::Unix("/run/x/brig.sock".into())]);
        assert_eq!(options.pidfile, Path::new("/run/x/brig.pid"));
    }

    #[test]
    fn plain_tcp_is_refused_with_a_sentence() {
        let error = options(&["-H", "tcp://0.0.0.0:2375"]).unwrap_err();
        assert!(error.contains("everybody who reaches the port is root"), "{error}");
        assert!(
            options(&["-H", "ftp://x"])
                .unwrap_err()
                .contains("expected unix:///path, tcp://address:port or fd://")
        );
    }

    #[test]
    fn values_that_do_not_parse_name_their_setting() {
        for (args, says) in [
            (["--bip", "banana"], "bip: \"banana\" is not an address"),
            (["--dns", "banana"], "dns: \"banana\" is not an IP address"),
            (["--mtu", "7"], "mtu: 7 is not between"),
            (["--label", "lonely"], "labels: \"lonely\": expected name=value"),
            (["--log-level", "loud"], "log-level: \"loud\" is none of"),
            (["--exec-opt", "x=y"], "exec-opts: \"x=y\""),
            (
                ["--default-address-pool", "base=10.0.0.0/24,size=16"],
                "default-address-pools: subnets of that size",
            ),
            (["--storage-driver", "btrfs"], "storage-driver: storage \"btrfs\" is not known"),
            (["--storage=erofs", "-soverlay2"], "storage and storage-driver say different things"),
            (["--default-runtime", "kata"], "default-runtime: unknown or invalid runtime name: kata"),
            (["--seccomp-profile", "/nonexistent"], "seccomp-profile: there is no file"),
        ] {
            let error = options(&args).unwrap_err();
            assert!(error.contains(says), "{args:?}: {error}");
        }
    }

    #[test]
    fn the_engines_configuration_is_filled() {
        let options = options(&[
            "--bip",
            "172.31.7.1/24",
            "--exec-opt",
            "native.cgroupdriver=systemd",
            "--icc=false",
            "--iptables=false",
            "--default-ulimit",
            "nofile=10:20",
            "--label",
            "a=b",
            "-D",
        ])
        .unwrap();
        assert_eq!(options.engine.bip.unwrap().to_string(), "172.31.7.1/24");
        assert!(options.engine.systemd_cgroup && !options.engine.icc && !options.engine.firewall);
        assert_eq!(options.engine.default_ulimits["nofile"], (10, 20));
        assert_eq!(options.engine.labels, ["a=b"]);
        assert_eq!(options.live.level(), LogLevel::Debug);
    }
}
