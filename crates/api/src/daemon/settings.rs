//! The daemon's settings: one table of every flag and every key of the configuration file.
//!
//! Invariant: a setting is built, always so, warned about or refused; none is silently ignored. A key in the file
//! and its flag may not both be given.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// What kind of value a setting takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Switch,
    Text,
    Number,
    /// Bytes, with a unit (`64M`) or without.
    Size,
    /// A list of texts; the flag may be repeated.
    List,
    /// Texts by name; the flag takes `name=value` and may be repeated.
    Map,
    /// Address pools: the flag takes `base=…,size=…`, the file objects.
    Pools,
    /// Resource limits: the flag takes `name=soft:hard`, the file objects.
    Ulimits,
    /// Any JSON; there is no flag.
    Any,
}

/// What giving a setting does.
#[derive(Debug, Clone, Copy)]
pub enum Built {
    Yes,
    /// Accepted without a word: the engine behaves that way whatever is asked, or the value changes nothing here.
    Always,
    /// Accepted with a warning: it has no effect here.
    Warn(&'static str),
    /// Refused unless the value is one of these harmless ones.
    Refuse(&'static [&'static str], &'static str),
}

/// One setting.
#[derive(Debug)]
pub struct Setting {
    pub flag: &'static str,
    pub short: Option<char>,
    /// The key in the configuration file.
    pub key: &'static str,
    pub kind: Kind,
    pub built: Built,
    pub help: &'static str,
}

const fn setting(
    flag: &'static str,
    short: Option<char>,
    key: &'static str,
    kind: Kind,
    built: Built,
    help: &'static str,
) -> Setting {
    Setting { flag, short, key, kind, built, help }
}

use Built::{Always, Refuse, Warn, Yes};
use Kind::{Any, List, Number, Pools, Size, Switch, Text, Ulimits};

const NO_TLS: &str = "TLS is not built yet; use a unix socket, or an SSH connection (docker -H ssh://…)";
const OFF: &[&str] = &["", "false"];

/// Every setting, in the order of `--help`.
pub static SETTINGS: &[Setting] = &[
    setting(
        "data-root",
        None,
        "data-root",
        Text,
        Yes,
        "Where images, containers and volumes live (default /var/lib/brigantine)",
    ),
    setting(
        "exec-root",
        None,
        "exec-root",
        Text,
        Yes,
        "Where sockets and state of running containers live (default /run/brigantine)",
    ),
    setting("host", Some('H'), "hosts", List, Yes, "Where to listen: unix:///path or fd://; may be repeated"),
    setting(
        "pidfile",
        Some('p'),
        "pidfile",
        Text,
        Yes,
        "Where to write the daemon's process id (default EXEC-ROOT/brig.pid)",
    ),
    setting("group", Some('G'), "group", Text, Yes, "Group that may use the unix socket (default docker)"),
    setting("debug", Some('D'), "debug", Switch, Yes, "Log at level debug"),
    setting(
        "log-level",
        Some('l'),
        "log-level",
        Text,
        Yes,
        "Least severe messages to log: trace, debug, info, warn, error, fatal",
    ),
    setting("log-format", None, "log-format", Text, Yes, "Form of the daemon's log: text or json"),
    setting(
        "runtime-exe",
        None,
        "runtime-exe",
        Text,
        Yes,
        "The brig-runtime executable (default: beside brig, ../libexec/brigantine, then $PATH)",
    ),
    setting(
        "bridge",
        Some('b'),
        "bridge",
        Text,
        Yes,
        "Device of the default network (default brig0); none switches it off",
    ),
    setting("bip", None, "bip", Text, Yes, "Address and subnet of the default bridge, such as 172.30.0.1/16"),
    setting("mtu", None, "mtu", Number, Yes, "MTU of container networks"),
    setting(
        "icc",
        None,
        "icc",
        Switch,
        Yes,
        "Let containers of the default network reach each other (default true)",
    ),
    setting("ip", None, "ip", Text, Yes, "Host address for published ports (default 0.0.0.0)"),
    setting("iptables", None, "iptables", Switch, Yes, "Set up the firewall (default true)"),
    setting("ip6tables", None, "ip6tables", Switch, Always, "Set up the firewall for IPv6"),
    setting(
        "ip-forward",
        None,
        "ip-forward",
        Switch,
        Refuse(&["true"], "networks always need forwarding; use --bridge none instead"),
        "Switch on forwarding (default true)",
    ),
    setting(
        "ip-masq",
        None,
        "ip-masq",
        Switch,
        Yes,
        "Masquerade traffic that leaves the default network (default true)",
    ),
    setting(
        "default-address-pool",
        None,
        "default-address-pools",
        Pools,
        Yes,
        "Where networks take subnets from: base=10.0.0.0/8,size=24; may be repeated",
    ),
    setting("dns", None, "dns", List, Yes, "DNS server for containers; may be repeated"),
    setting("dns-search", None, "dns-search", List, Yes, "DNS search domain for containers; may be repeated"),
    setting("dns-opt", None, "dns-opts", List, Yes, "DNS option for containers; may be repeated"),
    setting("host-gateway-ip", None, "host-gateway-ip", Text, Yes, "What host-gateway means in --add-host"),
    setting("label", None, "labels", List, Yes, "Label of the engine, name=value; may be repeated"),
    setting(
        "log-driver",
        None,
        "log-driver",
        Text,
        Yes,
        "Default log driver of containers (default json-file)",
    ),
    setting(
        "log-opt",
        None,
        "log-opts",
        Kind::Map,
        Yes,
        "Default log option of containers, name=value; may be repeated",
    ),
    setting("registry-mirror", None, "registry-mirrors", List, Yes, "Mirror of Docker Hub; may be repeated"),
    setting(
        "insecure-registry",
        None,
        "insecure-registries",
        List,
        Yes,
        "Registry (host:port or CIDR) that may be reached without TLS; may be repeated",
    ),
    setting(
        "max-concurrent-downloads",
        None,
        "max-concurrent-downloads",
        Number,
        Yes,
        "Layers to download at once per pull (default 3)",
    ),
    setting(
        "max-concurrent-uploads",
        None,
        "max-concurrent-uploads",
        Number,
        Yes,
        "Layers to upload at once per push (default 5)",
    ),
    setting(
        "max-download-attempts",
        None,
        "max-download-attempts",
        Number,
        Yes,
        "Attempts to download a layer (default 5)",
    ),
    setting(
        "default-ulimit",
        None,
        "default-ulimits",
        Ulimits,
        Yes,
        "Default resource limit of containers, name=soft[:hard]; may be repeated",
    ),
    setting(
        "default-shm-size",
        None,
        "default-shm-size",
        Size,
        Yes,
        "Default size of /dev/shm (default 64M)",
    ),
    setting("cgroup-parent", None, "cgroup-parent", Text, Yes, "Parent of the containers' cgroups"),
    setting(
        "exec-opt",
        None,
        "exec-opts",
        List,
        Yes,
        "Runtime option: native.cgroupdriver=cgroupfs or systemd",
    ),
    setting("init", None, "init", Switch, Yes, "Run an init in every container"),
    setting(
        "no-new-privileges",
        None,
        "no-new-privileges",
        Switch,
        Yes,
        "Set no-new-privileges in every container",
    ),
    setting(
        "seccomp-profile",
        None,
        "seccomp-profile",
        Text,
        Yes,
        "builtin, unconfined, or a profile's path",
    ),
    setting(
        "shutdown-timeout",
        None,
        "shutdown-timeout",
        Number,
        Yes,
        "Seconds a container gets to stop when all are stopped (default 15)",
    ),
    setting(
        "live-restore",
        None,
        "live-restore",
        Switch,
        Refuse(&["true"], "containers always outlive the daemon here; stop them before it if that is wanted"),
        "Keep containers running while the daemon is away (always so)",
    ),
    setting(
        "storage-driver",
        Some('s'),
        "storage-driver",
        Text,
        Refuse(&["", "overlay2", "overlay", "overlayfs"], "overlay2 is the only storage driver"),
        "Storage driver: overlay2",
    ),
    setting(
        "storage-opt",
        None,
        "storage-opts",
        List,
        Refuse(&[], "there are no storage options"),
        "Storage options: none yet",
    ),
    setting(
        "default-runtime",
        None,
        "default-runtime",
        Text,
        Refuse(
            &["", "brig-runtime", "brig"],
            "other runtimes are not built yet; brig-runtime is the only one",
        ),
        "Runtime of containers: brig-runtime",
    ),
    setting(
        "add-runtime",
        None,
        "runtimes",
        Any,
        Refuse(&[], "other runtimes are not built yet; brig-runtime is the only one"),
        "Register a runtime: not built yet",
    ),
    setting(
        "userland-proxy",
        None,
        "userland-proxy",
        Switch,
        Warn("published ports need no proxy process here"),
        "Use a proxy process for published ports (never needed)",
    ),
    setting(
        "userland-proxy-path",
        None,
        "userland-proxy-path",
        Text,
        Warn("published ports need no proxy process here"),
        "Path of the proxy (never needed)",
    ),
    setting(
        "default-cgroupns-mode",
        None,
        "default-cgroupns-mode",
        Text,
        Refuse(
            &["", "private"],
            "containers get a private cgroup namespace; ask for --cgroupns host on each instead",
        ),
        "Default cgroup namespace: private",
    ),
    setting(
        "default-ipc-mode",
        None,
        "default-ipc-mode",
        Text,
        Refuse(&["", "private"], "containers get a private IPC namespace; ask for --ipc on each instead"),
        "Default IPC namespace: private",
    ),
    setting(
        "userns-remap",
        None,
        "userns-remap",
        Text,
        Refuse(OFF, "user namespaces for all containers are not built yet"),
        "User namespaces for all containers: not built yet",
    ),
    setting(
        "selinux-enabled",
        None,
        "selinux-enabled",
        Switch,
        Refuse(OFF, "SELinux is not supported"),
        "SELinux: not supported",
    ),
    setting(
        "ipv6",
        None,
        "ipv6",
        Switch,
        Refuse(OFF, "IPv6 on the default network is not built yet"),
        "IPv6 on the default network: not built yet",
    ),
    setting(
        "fixed-cidr",
        None,
        "fixed-cidr",
        Text,
        Refuse(&[""], "fixed-cidr is not built yet; choose the subnet with --bip"),
        "Addresses within the default subnet: not built yet",
    ),
    setting(
        "fixed-cidr-v6",
        None,
        "fixed-cidr-v6",
        Text,
        Refuse(&[""], "IPv6 on the default network is not built yet"),
        "IPv6 subnet: not built yet",
    ),
    setting(
        "default-gateway",
        None,
        "default-gateway",
        Text,
        Refuse(&[""], "another default gateway is not built yet"),
        "Default gateway: not built yet",
    ),
    setting(
        "default-gateway-v6",
        None,
        "default-gateway-v6",
        Text,
        Refuse(&[""], "IPv6 on the default network is not built yet"),
        "IPv6 gateway: not built yet",
    ),
    setting(
        "default-network-opt",
        None,
        "default-network-opts",
        Any,
        Refuse(&[], "default network options are not built yet"),
        "Default network options: not built yet",
    ),
    setting(
        "experimental",
        None,
        "experimental",
        Switch,
        Warn("there are no experimental features to switch on"),
        "Experimental features: none",
    ),
    setting(
        "metrics-addr",
        None,
        "metrics-addr",
        Text,
        Refuse(&[""], "metrics are not built yet"),
        "Metrics: not built yet",
    ),
    setting(
        "authorization-plugin",
        None,
        "authorization-plugins",
        List,
        Refuse(
            &[],
            "authorization plugins are not supported; giving their requests a pass would be worse than refusing",
        ),
        "Authorization plugins: not supported",
    ),
    setting("tls", None, "tls", Switch, Refuse(OFF, NO_TLS), "TLS: not built yet"),
    setting("tlsverify", None, "tlsverify", Switch, Refuse(OFF, NO_TLS), "TLS: not built yet"),
    setting("tlscacert", None, "tlscacert", Text, Refuse(&[""], NO_TLS), "TLS: not built yet"),
    setting("tlscert", None, "tlscert", Text, Refuse(&[""], NO_TLS), "TLS: not built yet"),
    setting("tlskey", None, "tlskey", Text, Refuse(&[""], NO_TLS), "TLS: not built yet"),
    setting("raw-logs", None, "raw-logs", Switch, Always, "Full timestamps without colours (always so)"),
    setting(
        "oom-score-adjust",
        None,
        "oom-score-adjust",
        Number,
        Refuse(&["0"], "set OOMScoreAdjust in the service unit instead"),
        "OOM score of the daemon: set it in the service unit",
    ),
    setting(
        "containerd",
        None,
        "containerd",
        Text,
        Warn("this engine needs no containerd"),
        "containerd socket (none is used)",
    ),
    setting("http-proxy", None, "http-proxy", Text, Yes, "Proxy for registries over HTTP"),
    setting("https-proxy", None, "https-proxy", Text, Yes, "Proxy for registries over HTTPS"),
    setting("no-proxy", None, "no-proxy", Text, Yes, "Hosts to reach without proxy"),
    setting("features", None, "features", Any, Warn("features cannot be switched on or off"), ""),
    setting("builder", None, "builder", Any, Warn("the build cache takes no settings yet"), ""),
    setting("proxies", None, "proxies", Any, Refuse(&[], "use http-proxy, https-proxy and no-proxy"), ""),
];

/// The settings that were given, by key, checked for their kind.
pub type Given = BTreeMap<&'static str, Value>;

/// What the command line said.
#[derive(Debug, Default)]
pub struct CommandLine {
    pub given: Given,
    pub config_file: Option<PathBuf>,
    pub validate: bool,
    pub help: bool,
    pub version: bool,
}

/// Why settings cannot be used; each is one line for the person who gave them.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("{0}\nSee 'brig daemon --help'")]
    Flag(String),
    #[error("read the configuration file {}", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration file {} is not valid JSON", .path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("the configuration file {}: {message}", .path.display())]
    File { path: PathBuf, message: String },
    #[error("{name}: {message}")]
    Value { name: String, message: String },
}

/// Parses `brig daemon`'s arguments (without the program's and the command's name).
pub fn command_line(args: impl IntoIterator<Item = OsString>) -> Result<CommandLine, SettingsError> {
    use lexopt::Arg;
    let flag_error = |error: lexopt::Error| SettingsError::Flag(error.to_string());
    let mut parsed = CommandLine::default();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next().map_err(flag_error)? {
        let setting = match arg {
            Arg::Long("help") => {
                parsed.help = true;
                continue;
            }
            Arg::Short('h') => {
                parsed.help = true;
                continue;
            }
            Arg::Long("version") | Arg::Short('v') => {
                parsed.version = true;
                continue;
            }
            Arg::Long("validate") => {
                parsed.validate = true;
                continue;
            }
            Arg::Long("config-file") => {
                parsed.config_file = Some(PathBuf::from(parser.value().map_err(flag_error)?));
                continue;
            }
            Arg::Long(name) => SETTINGS
                .iter()
                .find(|setting| setting.flag == name && !setting.help.is_empty())
                .ok_or_else(|| SettingsError::Flag(format!("unknown flag: --{name}")))?,
            Arg::Short(letter) => {
                SETTINGS.iter().find(|setting| setting.short == Some(letter)).ok_or_else(|| {
                    SettingsError::Flag(format!("unknown shorthand flag: '{letter}' in -{letter}"))
                })?
            }
            Arg::Value(value) => {
                return Err(SettingsError::Flag(format!(
                    "brig daemon takes no arguments, but got {:?}",
                    value.to_string_lossy()
                )));
            }
        };
        let text = if setting.kind == Switch {
            parser.optional_value().map_or(Ok("true".to_owned()), OsString::into_string)
        } else {
            parser.value().map_err(flag_error)?.into_string()
        };
        let text =
            text.map_err(|_raw| SettingsError::Flag(format!("--{}: the value is not UTF-8", setting.flag)))?;
        add_flag(&mut parsed.given, setting, &text)
            .map_err(|message| SettingsError::Value { name: format!("--{}", setting.flag), message })?;
    }
    Ok(parsed)
}

/// Reads a configuration file's settings.
pub fn read_file(path: &Path) -> Result<Given, SettingsError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
    let fail = |message: String| SettingsError::File { path: path.to_owned(), message };
    if text.trim().is_empty() {
        return Ok(Given::new());
    }
    let object: Map<String, Value> = serde_json::from_str(&text)
        .map_err(|source| SettingsError::Json { path: path.to_owned(), source })?;
    let mut given = Given::new();
    let mut unknown = Vec::new();
    for (key, value) in object {
        let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) else {
            unknown.push(key);
            continue;
        };
        if value.is_null() {
            continue;
        }
        let value = check(setting, value).map_err(|message| fail(format!("{key}: {message}")))?;
        given.insert(setting.key, value);
    }
    if !unknown.is_empty() {
        return Err(fail(format!(
            "the following directives don't match any configuration option: {}",
            unknown.join(", ")
        )));
    }
    Ok(given)
}

/// Joins flags and file; a setting in both is an error, as it is for dockerd.
pub fn merge(flags: Given, file: Given, path: &Path) -> Result<Given, SettingsError> {
    let both: Vec<String> = flags
        .iter()
        .filter_map(|(key, flag)| {
            file.get(key).map(|in_file| format!("{key}: (from flag: {flag}, from file: {in_file})"))
        })
        .collect();
    if !both.is_empty() {
        return Err(SettingsError::File {
            path: path.to_owned(),
            message: format!(
                "the following directives are specified both as a flag and in the configuration file: {}",
                both.join(", ")
            ),
        });
    }
    let mut merged = file;
    merged.extend(flags);
    Ok(merged)
}

/// Refuses what is not built; returns the warnings for what has no effect.
pub fn review(given: &Given) -> Result<Vec<String>, SettingsError> {
    let mut warnings = Vec::new();
    for setting in SETTINGS {
        let Some(value) = given.get(setting.key) else { continue };
        match setting.built {
            Yes | Always => {}
            Warn(sentence) => warnings.push(format!("{} has no effect: {sentence}", setting.key)),
            Refuse(harmless, sentence) => {
                let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                let empty = value.as_array().is_some_and(Vec::is_empty)
                    || value.as_object().is_some_and(Map::is_empty);
                if !empty && !harmless.contains(&shown.as_str()) {
                    return Err(SettingsError::Value {
                        name: setting.key.to_owned(),
                        message: format!("{shown} is refused: {sentence}"),
                    });
                }
            }
        }
    }
    Ok(warnings)
}

/// The text of `--help`.
pub fn help() -> String {
    let mut text = String::from(
        "Usage: brig daemon [OPTIONS]\n\nRuns the engine in the foreground and serves the Engine API.\n\nOptions:\n",
    );
    let mut line = |short: Option<char>, flag: &str, value: &str, help: &str| {
        let short = short.map_or_else(|| "    ".to_owned(), |letter| format!("-{letter}, "));
        let left = format!("  {short}--{flag}{value}");
        for part in [format!("{left:<42}"), " ".to_owned(), help.to_owned(), "\n".to_owned()] {
            text.push_str(&part);
        }
    };
    line(None, "config-file", " FILE", "Configuration file (default /etc/brigantine/daemon.json)");
    line(None, "validate", "", "Check the settings and exit");
    line(Some('v'), "version", "", "Print the version and exit");
    line(Some('h'), "help", "", "Print this help and exit");
    for setting in SETTINGS.iter().filter(|setting| !setting.help.is_empty()) {
        let value = match setting.kind {
            Switch => "",
            Number => " N",
            Size => " BYTES",
            Kind::Map | Ulimits => " NAME=VALUE",
            Text | List | Pools | Any => " VALUE",
        };
        line(setting.short, setting.flag, value, setting.help);
    }
    text
}

/// Adds one flag's text to what was given.
fn add_flag(given: &mut Given, setting: &'static Setting, text: &str) -> Result<(), String> {
    let list = |given: &mut Given, item: Value| {
        if let Value::Array(items) = given.entry(setting.key).or_insert_with(|| json!([])) {
            items.push(item);
        }
    };
    let entry = |given: &mut Given, name: &str, item: Value| {
        if let Value::Object(items) = given.entry(setting.key).or_insert_with(|| json!({})) {
            items.insert(name.to_owned(), item);
        }
    };
    match setting.kind {
        Switch => {
            let on = match text {
                "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
                "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
                other => return Err(format!("{other:?} is neither true nor false")),
            };
            given.insert(setting.key, json!(on));
        }
        Text => {
            given.insert(setting.key, json!(text));
        }
        Number => {
            let number: i64 = text.parse().map_err(|_error| format!("{text:?} is not a whole number"))?;
            given.insert(setting.key, json!(number));
        }
        Size => {
            given.insert(setting.key, json!(bytes(text)?));
        }
        List => list(given, json!(text)),
        Any => list(given, json!(text)),
        Kind::Map => {
            let (name, value) = text.split_once('=').unwrap_or((text, ""));
            entry(given, name, json!(value));
        }
        Pools => {
            let mut pool = Map::new();
            for part in text.split(',') {
                match part.split_once('=') {
                    Some(("base", base)) => pool.insert("base".to_owned(), json!(base)),
                    Some(("size", size)) => {
                        let size: u8 =
                            size.parse().map_err(|_error| format!("{size:?} is not a prefix length"))?;
                        pool.insert("size".to_owned(), json!(size))
                    }
                    _ => return Err(format!("{part:?}: expected base=SUBNET,size=PREFIX")),
                };
            }
            list(given, check_pool(Value::Object(pool))?);
        }
        Ulimits => {
            let (name, limits) =
                text.split_once('=').ok_or_else(|| format!("{text:?}: expected name=soft[:hard]"))?;
            let number =
                |text: &str| text.parse::<i64>().map_err(|_error| format!("{text:?} is not a whole number"));
            let (soft, hard) = match limits.split_once(':') {
                Some((soft, hard)) => (number(soft)?, number(hard)?),
                None => (number(limits)?, number(limits)?),
            };
            entry(given, name, check_ulimit(json!({"Name": name, "Soft": soft, "Hard": hard}))?);
        }
    }
    Ok(())
}

/// Checks and normalises a value from the file.
fn check(setting: &Setting, value: Value) -> Result<Value, String> {
    let wrong = |expected: &str, value: &Value| Err(format!("expected {expected}, got {value}"));
    match (setting.kind, value) {
        (Any, value) => Ok(value),
        (Switch, value @ Value::Bool(_)) => Ok(value),
        (Switch, value) => wrong("true or false", &value),
        (Text, value @ Value::String(_)) => Ok(value),
        (Text, value) => wrong("a string", &value),
        (Number, value) if value.is_i64() => Ok(value),
        (Number, value) => wrong("a whole number", &value),
        (Size, Value::String(text)) => bytes(&text).map(|size| json!(size)),
        (Size, value) if value.is_i64() => Ok(value),
        (Size, value) => wrong("a size", &value),
        (List, Value::Array(items)) if items.iter().all(Value::is_string) => Ok(Value::Array(items)),
        (List, value) => wrong("a list of strings", &value),
        (Kind::Map, Value::Object(items)) if items.values().all(Value::is_string) => Ok(Value::Object(items)),
        (Kind::Map, value) => wrong("an object of strings", &value),
        (Pools, Value::Array(items)) => items.into_iter().map(check_pool).collect(),
        (Pools, value) => wrong("a list of {\"base\":…,\"size\":…}", &value),
        (Ulimits, Value::Object(items)) => {
            let items: Result<Map<String, Value>, String> =
                items.into_iter().map(|(name, value)| Ok((name, check_ulimit(value)?))).collect();
            items.map(Value::Object)
        }
        (Ulimits, value) => wrong("an object of {\"Name\":…,\"Soft\":…,\"Hard\":…}", &value),
    }
}

fn check_pool(pool: Value) -> Result<Value, String> {
    let fits = pool.get("base").is_some_and(Value::is_string) && pool.get("size").is_some_and(Value::is_u64);
    if fits { Ok(pool) } else { Err(format!("an address pool needs base and size, got {pool}")) }
}

fn check_ulimit(limit: Value) -> Result<Value, String> {
    let number = |key: &str| limit.get(key).and_then(Value::as_i64);
    match (number("Soft"), number("Hard")) {
        (Some(soft), Some(hard)) if hard != -1 && (soft > hard || soft == -1) => {
            Err(format!("the soft limit {soft} is above the hard limit {hard}"))
        }
        (Some(_), Some(_)) => Ok(limit),
        _ => Err(format!("a limit needs Soft and Hard, got {limit}")),
    }
}

/// Bytes from `64`, `64k`, `64M`, `64MB`, `1GiB`: units of 1024.
pub fn bytes(text: &str) -> Result<i64, String> {
    let wrong = || format!("{text:?} is not a size such as 64M");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: i64 = number.parse().map_err(|_error| wrong())?;
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(args: &[&str]) -> Result<CommandLine, String> {
        command_line(args.iter().map(OsString::from)).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_take_dockerds_forms() {
        let line = flags(&[
            "-D",
            "-l",
            "warn",
            "--icc=false",
            "-H",
            "unix:///a",
            "--host=fd://",
            "--log-opt",
            "max-size=1m",
            "--default-address-pool",
            "base=10.0.0.0/8,size=24",
            "--default-ulimit",
            "nofile=1024:2048",
            "--default-shm-size=1g",
            "--mtu",
            "1400",
        ])
        .unwrap();
        assert_eq!(line.given["debug"], json!(true));
        assert_eq!(line.given["icc"], json!(false));
        assert_eq!(line.given["hosts"], json!(["unix:///a", "fd://"]));
        assert_eq!(line.given["log-opts"], json!({"max-size": "1m"}));
        assert_eq!(line.given["default-address-pools"], json!([{"base": "10.0.0.0/8", "size": 24}]));
        assert_eq!(line.given["default-ulimits"]["nofile"]["Hard"], json!(2048));
        assert_eq!(line.given["default-shm-size"], json!(1 << 30));
        assert_eq!(line.given["mtu"], json!(1400));
    }

    #[test]
    fn what_is_unknown_or_wrong_is_named() {
        assert!(flags(&["--nonsense"]).unwrap_err().contains("unknown flag: --nonsense"));
        assert!(flags(&["extra"]).unwrap_err().contains("takes no arguments"));
        assert!(flags(&["--mtu", "big"]).unwrap_err().contains("--mtu: \"big\" is not a whole number"));
        assert!(flags(&["--debug=perhaps"]).unwrap_err().contains("neither true nor false"));
        assert!(flags(&["--default-ulimit", "nofile=9:3"]).unwrap_err().contains("above the hard limit"));
    }

    fn file(text: &str) -> Result<Given, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("daemon.json");
        std::fs::write(&path, text).unwrap();
        read_file(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn the_file_is_checked() {
        let given = file(r#"{"debug":true,"labels":["a=b"],"default-shm-size":"128M","mtu":null}"#).unwrap();
        assert_eq!(given["default-shm-size"], json!(128 << 20));
        assert!(!given.contains_key("mtu"));
        assert!(
            file(r#"{"colour":1,"debug":true}"#)
                .unwrap_err()
                .contains("don't match any configuration option: colour")
        );
        assert!(file(r#"{"debug":"yes"}"#).unwrap_err().contains("debug: expected true or false"));
        assert!(file("{").unwrap_err().contains("not valid JSON"));
        assert!(file("").unwrap().is_empty());
    }

    #[test]
    fn a_setting_in_both_places_is_a_conflict() {
        let flags = flags(&["--debug"]).unwrap().given;
        let error =
            merge(flags, file(r#"{"debug":false}"#).unwrap(), Path::new("/f")).unwrap_err().to_string();
        assert!(error.contains("specified both as a flag and in the configuration file: debug: (from flag: true, from file: false)"), "{error}");
    }

    #[test]
    fn what_is_not_built_is_refused_or_warned_about() {
        let review = |args: &[&str]| review(&flags(args).unwrap().given).map_err(|error| error.to_string());
        assert!(review(&["--tlsverify"]).unwrap_err().contains("TLS is not built yet"));
        assert!(review(&["--tlsverify=false"]).is_ok());
        assert!(review(&["--userns-remap", "default"]).is_err());
        assert!(review(&["--add-runtime", "x=y"]).is_err());
        assert_eq!(review(&["--experimental"]).unwrap().len(), 1);
        assert!(review(&["--storage-driver", "overlay2", "--live-restore"]).unwrap().is_empty());
        assert!(review(&["--live-restore=false"]).unwrap_err().contains("outlive the daemon"));
        assert!(review(&["-s", "vfs"]).unwrap_err().contains("only storage driver"));
    }
}
