//! The flags of `run` and `create`, and the request they make.

use std::collections::HashMap;

use bollard_stubs::models::{
    ContainerCreateBody, DeviceRequest, HealthConfig, HostConfig, HostConfigCgroupnsModeEnum as CgroupNs,
    HostConfigLogConfig, PortMap, RestartPolicy, RestartPolicyNameEnum as Restart,
};

use super::{environment, limits, mounts, networks, ports, security};
use crate::args::{Flag, Matches};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::terminal;

/// What `run` and `create` share. `run` has more.
pub const FLAGS: &[Flag] = &[
    Flag::list("add-host", "Add a line to the container's hosts file (host:ip)"),
    Flag::one("annotation", "map", "Add an annotation for the OCI runtime").as_list(),
    Flag::list("attach", "Attach to STDIN, STDOUT or STDERR").short('a'),
    Flag::one("blkio-weight", "uint16", "Relative block IO weight, 10 to 1000, or 0 for none"),
    Flag::list("blkio-weight-device", "Relative block IO weight of one device"),
    Flag::list("cap-add", "Add a Linux capability"),
    Flag::list("cap-drop", "Drop a Linux capability"),
    Flag::text("cgroup-parent", "Put the container's cgroup below this one"),
    Flag::text("cgroupns", "Cgroup namespace: host or private"),
    Flag::text("cidfile", "Write the container's ID to this file"),
    Flag::one("cpu-count", "int", "CPU count (Windows only)").hidden(),
    Flag::one("cpu-percent", "int", "CPU percent (Windows only)").hidden(),
    Flag::one("cpu-period", "int", "Length of the CPU scheduler's period, in microseconds"),
    Flag::one("cpu-quota", "int", "CPU time per period, in microseconds"),
    Flag::one("cpu-rt-period", "int", "Length of the real-time scheduler's period, in microseconds"),
    Flag::one("cpu-rt-runtime", "int", "Real-time CPU time per period, in microseconds"),
    Flag::one("cpu-shares", "int", "Relative CPU weight").short('c'),
    Flag::one("cpus", "decimal", "Number of CPUs, fractions allowed"),
    Flag::text("cpuset-cpus", "CPUs to run on (0-3, 0,1)"),
    Flag::text("cpuset-mems", "Memory nodes to use (0-3, 0,1)"),
    Flag::list("device", "Give the container a device of the host"),
    Flag::list("device-cgroup-rule", "Add a rule to the list of allowed devices"),
    Flag::list("device-read-bps", "Limit reads from a device, in bytes a second"),
    Flag::list("device-read-iops", "Limit reads from a device, in operations a second"),
    Flag::list("device-write-bps", "Limit writes to a device, in bytes a second"),
    Flag::list("device-write-iops", "Limit writes to a device, in operations a second"),
    Flag::switch("disable-content-trust", "Accepted, without effect").default("true").hidden(),
    Flag::list("dns", "Ask this name server"),
    Flag::list("dns-option", "Set an option of the resolver").alias("dns-opt"),
    Flag::list("dns-search", "Look names up in this domain, too"),
    Flag::text("domainname", "NIS domain name of the container"),
    Flag::text("entrypoint", "Run this instead of the image's entrypoint"),
    Flag::list("env", "Set an environment variable").short('e'),
    Flag::list("env-file", "Set the environment variables that a file lists"),
    Flag::list("expose", "Declare a port or a range of ports"),
    Flag::one("gpus", "gpu-request", "Give the container GPUs ('all' for all of them)"),
    Flag::list("group-add", "Join one more group"),
    Flag::text("health-cmd", "Command that tells whether the container is well"),
    Flag::one("health-interval", "duration", "Time between health checks (ms|s|m|h)"),
    Flag::text("health-on-failure", "What happens when it becomes unhealthy: none, restart, stop or kill"),
    Flag::one("health-retries", "int", "Failures in a row that mean unhealthy"),
    Flag::one(
        "health-start-interval",
        "duration",
        "Time between health checks during the start period (ms|s|m|h)",
    ),
    Flag::one(
        "health-start-period",
        "duration",
        "Time to start up, in which failures do not count (ms|s|m|h)",
    ),
    Flag::one("health-timeout", "duration", "Longest time a health check may take (ms|s|m|h)"),
    Flag::text("hostname", "Host name inside the container").short('h'),
    Flag::switch("init", "Run an init that forwards signals and reaps processes"),
    Flag::switch("interactive", "Keep standard input open").short('i'),
    Flag::one("io-maxbandwidth", "bytes", "Windows only").hidden(),
    Flag::one("io-maxiops", "uint", "Windows only").hidden(),
    Flag::text("ip", "IPv4 address"),
    Flag::text("ip6", "IPv6 address"),
    Flag::text("ipc", "IPC namespace to use"),
    Flag::text("isolation", "Isolation technology").hidden(),
    Flag::one("kernel-memory", "bytes", "Accepted, without effect").hidden(),
    Flag::list("label", "Set a label").short('l'),
    Flag::list("label-file", "Set the labels that a file lists"),
    Flag::list("link", "Link to another container"),
    Flag::list("link-local-ip", "Link-local address"),
    Flag::text("log-driver", "Where the container's output is kept"),
    Flag::list("log-opt", "Set an option of the log driver"),
    Flag::text("mac-address", "MAC address"),
    Flag::one("memory", "bytes", "Memory limit").short('m'),
    Flag::one("memory-reservation", "bytes", "Memory to keep when the host runs short"),
    Flag::one("memory-swap", "bytes", "Limit of memory and swap together, -1 for none"),
    Flag::one("memory-swappiness", "int", "How readily to swap, 0 to 100").default("-1"),
    Flag::list("mount", "Mount a volume, a directory of the host, a tmpfs or an image"),
    Flag::text("name", "Name of the container"),
    Flag::list("network", "Connect to this network").alias("net"),
    Flag::list("network-alias", "Another name in the network").alias("net-alias"),
    Flag::switch("no-healthcheck", "Do not check the container's health"),
    Flag::switch("oom-kill-disable", "Do not kill when memory is exhausted"),
    Flag::one("oom-score-adj", "int", "How willingly to be killed when memory is short (-1000 to 1000)"),
    Flag::text("pid", "PID namespace to use"),
    Flag::one("pids-limit", "int", "Greatest number of processes, -1 for no limit"),
    Flag::text("platform", "Platform of the image (os/architecture)"),
    Flag::switch("privileged", "Give the container all privileges of the host"),
    Flag::list("publish", "Publish a port on the host").short('p'),
    Flag::switch("publish-all", "Publish all declared ports on free ports of the host").short('P'),
    Flag::text("pull", "Pull the image first: always, missing or never").default("missing"),
    Flag::switch("quiet", "Do not show the progress of a pull").short('q'),
    Flag::switch("read-only", "Make the root file system read-only"),
    Flag::text("restart", "When to start the container again after it ended").default("no"),
    Flag::switch("rm", "Remove the container, and its unnamed volumes, when it ends"),
    Flag::text("runtime", "OCI runtime to use"),
    Flag::list("security-opt", "Set a security option"),
    Flag::one("shm-size", "bytes", "Size of /dev/shm"),
    Flag::text("stop-signal", "Signal that asks the container to stop"),
    Flag::one("stop-timeout", "int", "Seconds from that signal to the kill"),
    Flag::list("storage-opt", "Set an option of the root file system's storage"),
    Flag::one("sysctl", "map", "Set a kernel parameter of the container's namespaces").as_list(),
    Flag::list("tmpfs", "Mount a tmpfs (path[:options])"),
    Flag::switch("tty", "Give the container a terminal").short('t'),
    Flag::one("ulimit", "ulimit", "Set a resource limit (name=soft[:hard])").as_list(),
    Flag::switch("use-api-socket", "Give the container the engine's socket").hidden(),
    Flag::text("user", "User to run as (name|uid[:group|gid])").short('u'),
    Flag::text("userns", "User namespace to use"),
    Flag::text("uts", "UTS namespace to use"),
    Flag::list("volume", "Mount a volume or a directory of the host (source:target[:options])").short('v'),
    Flag::text("volume-driver", "Driver of unnamed volumes"),
    Flag::list("volumes-from", "Mount the volumes of another container"),
    Flag::text("workdir", "Working directory inside the container").short('w'),
];

#[derive(Debug)]
pub struct Request {
    pub body: ContainerCreateBody,
    pub name: Option<String>,
    pub platform: Option<String>,
    pub attach_stdin: bool,
    pub attach_output: (bool, bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pull {
    Always,
    Missing,
    Never,
}

pub fn pull_policy(matches: &Matches) -> Outcome<Pull> {
    match matches.text("pull") {
        "always" => Ok(Pull::Always),
        "missing" | "" => Ok(Pull::Missing),
        "never" => Ok(Pull::Never),
        other => Err(refused(
            matches,
            format!("invalid pull option: '{other}': must be one of \"always\", \"missing\" or \"never\""),
        )),
    }
}

/// A refusal that docker words as the command's own, with exit status 125.
fn refused(matches: &Matches, text: String) -> Fault {
    Fault::Coded {
        text: format!("brig: {text}\n\nRun '{} --help' for more information", matches.path()),
        code: 125,
    }
}

/// Reads the flags. `detached` is `run -d`: nothing is attached then.
pub fn request(context: &Context, matches: &Matches, detached: bool) -> Outcome<Request> {
    let refuse = |text: String| refused(matches, text);
    if matches.is("use-api-socket") {
        return Err(refuse("--use-api-socket is not built yet".to_owned()));
    }
    let attach = attachments(matches)?;
    let interactive = matches.is("interactive");
    let (stdin, stdout, stderr) = match (&attach, detached) {
        (_, true) => (false, false, false),
        (None, false) => (interactive, true, true),
        (Some((i, o, e)), false) => (*i || (interactive && !o && !e), *o, *e),
    };
    for variable in matches.list("env") {
        environment::check_variable(variable).map_err(|why| matches.invalid("env", variable, &why))?;
    }
    for label in matches.list("label") {
        if label.is_empty() || label.starts_with('=') {
            return Err(matches.invalid("label", label, &format!("invalid label '{label}': empty name")));
        }
    }
    let mut env = environment::variables(&matches.list("env-file"), &matches.list("env")).map_err(refuse)?;
    let has = |env: &[String], name: &str| env.iter().any(|line| line.split('=').next() == Some(name));
    let proxies: Vec<String> = context
        .config()?
        .proxies()
        .into_iter()
        .filter(|(name, _)| !has(&env, name))
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    env.extend(proxies);

    let mut bindings = PortMap::new();
    for spec in matches.list("publish") {
        ports::publish(spec, &mut bindings).map_err(refuse)?;
    }
    let mut exposed: Vec<String> = bindings.keys().cloned().collect();
    for spec in matches.list("expose") {
        exposed.extend(ports::expose(spec).map_err(refuse)?);
    }
    exposed.sort();
    exposed.dedup();

    let mut binds = Vec::new();
    let mut anonymous = Vec::new();
    for spec in matches.list("volume") {
        match mounts::volume(spec).map_err(refuse)? {
            mounts::Volume::Bind(bind) => binds.push(bind),
            mounts::Volume::Anonymous(path) => anonymous.push(path),
        }
    }
    let mut mounted = Vec::new();
    for spec in matches.list("mount") {
        mounted.push(mounts::mount(spec).map_err(|why| matches.invalid("mount", spec, &why))?);
    }
    let tmpfs: HashMap<String, String> = matches.list("tmpfs").into_iter().map(mounts::tmpfs).collect();
    let (network_mode, networking_config) = networks::from_flags(matches)?;
    let tty = matches.is("tty");
    let mut operands = matches.operands().iter();
    let image = operands.next().cloned().unwrap_or_default();
    let command: Vec<String> = operands.cloned().collect();

    let mut host = host_config(matches)?;
    host.binds = some(binds);
    host.mounts = some(mounted);
    host.tmpfs = (!tmpfs.is_empty()).then_some(tmpfs);
    host.port_bindings = (!bindings.is_empty()).then_some(bindings);
    host.network_mode = Some(network_mode);
    if tty {
        host.console_size =
            terminal::size().map(|(height, width)| vec![usize::from(height), usize::from(width)]);
    }
    let body = ContainerCreateBody {
        hostname: owned(matches, "hostname"),
        domainname: owned(matches, "domainname"),
        user: owned(matches, "user"),
        attach_stdin: Some(stdin),
        attach_stdout: Some(stdout),
        attach_stderr: Some(stderr),
        exposed_ports: some(exposed),
        tty: Some(tty),
        open_stdin: Some(interactive),
        stdin_once: Some(interactive && stdin),
        env: some(env),
        cmd: some(command),
        healthcheck: health(matches)?,
        image: Some(image),
        volumes: some(anonymous),
        working_dir: owned(matches, "workdir"),
        entrypoint: matches.given("entrypoint").then(|| vec![matches.text("entrypoint").to_owned()]),
        labels: Some(
            environment::labels(&matches.list("label-file"), &matches.list("label")).map_err(refuse)?,
        ),
        stop_signal: owned(matches, "stop-signal"),
        stop_timeout: matches.int("stop-timeout")?,
        host_config: Some(host),
        networking_config,
        ..ContainerCreateBody::default()
    };
    Ok(Request {
        body,
        name: owned(matches, "name"),
        platform: owned(matches, "platform").or_else(|| {
            std::env::var("DOCKER_DEFAULT_PLATFORM").ok().filter(|platform| !platform.is_empty())
        }),
        attach_stdin: stdin,
        attach_output: (stdout, stderr),
    })
}

fn host_config(matches: &Matches) -> Outcome<HostConfig> {
    let refuse = |text: String| refused(matches, text);
    let security = security::options(&matches.list("security-opt")).map_err(refuse)?;
    for flag in ["pid", "uts", "userns", "cgroupns"] {
        security::namespace(flag, matches.text(flag)).map_err(refuse)?;
    }
    let swappiness = matches.int("memory-swappiness")?.unwrap_or(-1);
    if !(-1..=100).contains(&swappiness) {
        return Err(refuse(format!("invalid value: {swappiness}. Valid memory swappiness range is 0-100")));
    }
    let mut devices = Vec::new();
    let mut interfaces = Vec::new();
    for spec in matches.list("device") {
        match limits::device(spec).map_err(refuse)? {
            limits::Device::Host(device) => devices.push(device),
            limits::Device::Interface(name) => interfaces.push(name),
        }
    }
    let mut requests = Vec::new();
    if !interfaces.is_empty() {
        requests.push(DeviceRequest {
            driver: Some("cdi".to_owned()),
            device_ids: Some(interfaces),
            ..DeviceRequest::default()
        });
    }
    if let Some(spec) = matches.optional("gpus") {
        requests.push(limits::gpus(spec).map_err(|why| matches.invalid("gpus", spec, &why))?);
    }
    for option in matches.list("storage-opt") {
        if !option.contains('=') {
            return Err(refuse("invalid storage option".to_owned()));
        }
    }
    for option in matches.list("sysctl") {
        if !option.contains('=') {
            return Err(matches.invalid("sysctl", option, &format!("sysctl '{option}' is not allowed")));
        }
    }
    let mut extra_hosts = Vec::new();
    for line in matches.list("add-host") {
        let pair = line.split_once('=').or_else(|| line.split_once(':')).filter(|(name, _)| !name.is_empty());
        let (name, address) = pair.ok_or_else(|| {
            matches.invalid("add-host", line, &format!("bad format for add-host: {line:?}"))
        })?;
        let bare = address.trim_start_matches('[').trim_end_matches(']');
        if bare != "host-gateway" && bare.parse::<std::net::IpAddr>().is_err() {
            return Err(matches.invalid(
                "add-host",
                line,
                &format!("invalid IP address in add-host: {bare:?}"),
            ));
        }
        extra_hosts.push(format!("{name}:{bare}"));
    }
    for address in matches.list("dns") {
        if address.parse::<std::net::IpAddr>().is_err() {
            return Err(matches.invalid(
                "dns",
                address,
                &format!("IP address is not correctly formatted: {address}"),
            ));
        }
    }
    let nano_cpus = match matches.optional("cpus") {
        Some(text) => Some(limits::cpus(text).map_err(|why| matches.invalid("cpus", text, &why))?),
        None => None,
    };
    let weight = matches.int("blkio-weight")?.and_then(|weight| u16::try_from(weight).ok());
    let log_driver = matches.text("log-driver");
    let log_options = environment::pairs(&matches.list("log-opt"));
    if log_driver == "none" && !log_options.is_empty() {
        return Err(refuse(format!("invalid logging opts for driver {log_driver}")));
    }
    let map = |flag: &str| {
        let pairs = environment::pairs(&matches.list(flag));
        (!pairs.is_empty()).then_some(pairs)
    };
    let mut annotations = map("annotation");
    if let Some(action) = matches.optional("health-on-failure") {
        annotations
            .get_or_insert_default()
            .insert("brigantine.health-on-failure".to_owned(), action.to_owned());
    }
    Ok(HostConfig {
        annotations,
        auto_remove: Some(matches.is("rm")),
        blkio_device_read_bps: each(matches, "device-read-bps", limits::bytes_rate)?,
        blkio_device_read_iops: each(matches, "device-read-iops", limits::io_rate)?,
        blkio_device_write_bps: each(matches, "device-write-bps", limits::bytes_rate)?,
        blkio_device_write_iops: each(matches, "device-write-iops", limits::io_rate)?,
        blkio_weight: weight,
        blkio_weight_device: each(matches, "blkio-weight-device", limits::weight_device)?,
        cap_add: matches.some_list("cap-add"),
        cap_drop: matches.some_list("cap-drop"),
        cgroup_parent: owned(matches, "cgroup-parent"),
        cgroupns_mode: match matches.text("cgroupns") {
            "host" => Some(CgroupNs::HOST),
            "private" => Some(CgroupNs::PRIVATE),
            _ => None,
        },
        container_id_file: owned(matches, "cidfile"),
        cpu_count: matches.int("cpu-count")?,
        cpu_percent: matches.int("cpu-percent")?,
        cpu_period: matches.int("cpu-period")?,
        cpu_quota: matches.int("cpu-quota")?,
        cpu_realtime_period: matches.int("cpu-rt-period")?,
        cpu_realtime_runtime: matches.int("cpu-rt-runtime")?,
        cpu_shares: matches.int("cpu-shares")?,
        cpuset_cpus: owned(matches, "cpuset-cpus"),
        cpuset_mems: owned(matches, "cpuset-mems"),
        device_cgroup_rules: matches.some_list("device-cgroup-rule"),
        device_requests: some(requests),
        devices: some(devices),
        dns: matches.some_list("dns"),
        dns_options: matches.some_list("dns-option"),
        dns_search: matches.some_list("dns-search"),
        extra_hosts: some(extra_hosts),
        group_add: matches.some_list("group-add"),
        init: matches.given("init").then(|| matches.is("init")),
        ipc_mode: owned(matches, "ipc"),
        links: matches.some_list("link"),
        log_config: (!log_driver.is_empty() || !log_options.is_empty())
            .then(|| HostConfigLogConfig { typ: Some(log_driver.to_owned()), config: Some(log_options) }),
        masked_paths: security.unmasked.then(Vec::new),
        memory: matches.bytes("memory")?,
        memory_reservation: matches.bytes("memory-reservation")?,
        memory_swap: matches.bytes("memory-swap")?,
        memory_swappiness: (swappiness >= 0).then_some(swappiness),
        nano_cpus,
        oom_kill_disable: matches.is("oom-kill-disable").then_some(true),
        oom_score_adj: matches.int("oom-score-adj")?,
        pid_mode: owned(matches, "pid"),
        pids_limit: matches.int("pids-limit")?,
        privileged: Some(matches.is("privileged")),
        publish_all_ports: Some(matches.is("publish-all")),
        readonly_paths: security.unmasked.then(Vec::new),
        readonly_rootfs: Some(matches.is("read-only")),
        restart_policy: Some(restart_policy(matches.text("restart")).map_err(refuse)?),
        runtime: owned(matches, "runtime"),
        security_opt: some(security.options),
        shm_size: matches.bytes("shm-size")?,
        storage_opt: map("storage-opt"),
        sysctls: map("sysctl"),
        ulimits: each(matches, "ulimit", limits::ulimit)?,
        userns_mode: owned(matches, "userns"),
        uts_mode: owned(matches, "uts"),
        volume_driver: owned(matches, "volume-driver"),
        volumes_from: matches.some_list("volumes-from"),
        ..HostConfig::default()
    })
}

fn owned(matches: &Matches, flag: &str) -> Option<String> {
    matches.optional(flag).map(str::to_owned)
}

fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

fn each<T>(
    matches: &Matches,
    flag: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Outcome<Option<Vec<T>>> {
    let mut all = Vec::new();
    for text in matches.list(flag) {
        all.push(parse(text).map_err(|why| matches.invalid(flag, text, &why))?);
    }
    Ok(some(all))
}

/// `--attach`: which of the three streams, or None when the flag was not given.
fn attachments(matches: &Matches) -> Outcome<Option<(bool, bool, bool)>> {
    let given = matches.list("attach");
    if given.is_empty() {
        return Ok(None);
    }
    let mut found = (false, false, false);
    for stream in given {
        match stream.to_ascii_lowercase().as_str() {
            "stdin" => found.0 = true,
            "stdout" => found.1 = true,
            "stderr" => found.2 = true,
            _ => return Err(matches.invalid("attach", stream, "valid streams are STDIN, STDOUT and STDERR")),
        }
    }
    Ok(Some(found))
}

/// `no`, `always`, `unless-stopped`, `on-failure[:times]`.
pub fn restart_policy(text: &str) -> Result<RestartPolicy, String> {
    let (name, count) = match text.split_once(':') {
        Some((name, count)) => {
            let wrong = |_: std::num::ParseIntError| {
                "invalid restart policy format: maximum retry count must be an integer".to_owned()
            };
            (name, Some(count.parse::<i64>().map_err(wrong)?))
        }
        None => (text, None),
    };
    let name = match name {
        "" | "no" => Restart::NO,
        "always" => Restart::ALWAYS,
        "unless-stopped" => Restart::UNLESS_STOPPED,
        "on-failure" => Restart::ON_FAILURE,
        other => {
            return Err(format!(
                "invalid restart policy '{other}': use one of no, always, on-failure, unless-stopped"
            ));
        }
    };
    Ok(RestartPolicy { name: Some(name), maximum_retry_count: Some(count.unwrap_or(0)) })
}

fn health(matches: &Matches) -> Outcome<Option<HealthConfig>> {
    let timings = ["health-interval", "health-timeout", "health-start-period", "health-start-interval"];
    let some = matches.given("health-cmd")
        || matches.given("health-retries")
        || timings.iter().any(|flag| matches.given(flag));
    if matches.is("no-healthcheck") {
        if some {
            return Err(refused(matches, "--no-healthcheck conflicts with --health-* options".to_owned()));
        }
        return Ok(Some(HealthConfig { test: Some(vec!["NONE".to_owned()]), ..HealthConfig::default() }));
    }
    if !some {
        return Ok(None);
    }
    let duration = |flag: &str| -> Outcome<Option<i64>> {
        let value = matches.duration(flag)?;
        if value.is_some_and(|value| value < 0) {
            return Err(refused(matches, format!("--{flag} cannot be negative")));
        }
        Ok(value)
    };
    let retries = matches.int("health-retries")?;
    if retries.is_some_and(|retries| retries < 0) {
        return Err(refused(matches, "--health-retries cannot be negative".to_owned()));
    }
    Ok(Some(HealthConfig {
        test: matches.optional("health-cmd").map(|command| vec!["CMD-SHELL".to_owned(), command.to_owned()]),
        interval: duration("health-interval")?,
        timeout: duration("health-timeout")?,
        start_period: duration("health-start-period")?,
        start_interval: duration("health-start-interval")?,
        retries,
    }))
}
