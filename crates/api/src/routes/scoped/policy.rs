//! What a request through a project's socket may say, decided on the very structs that are carried out.
//!
//! Invariant: every field of those structs is named here (no `..`), so that a new one must be decided on before this
//! compiles. What amounts to root on the host, or reaches another project, is refused; so is what nobody has thought
//! about yet.

use bollard_stubs::models::{
    ContainerCreateBody, ContainerUpdateBody, EndpointSettings, ExecConfig, HostConfig,
    HostConfigCgroupnsModeEnum, HostConfigLogConfig, Ipam, Mount, MountType, MountVolumeOptions,
    NetworkCreateRequest, PortMap, VolumeCreateRequest,
};

use crate::http::Error;

type Decision = Result<(), Error>;

/// The default capabilities: adding one of them changes nothing.
const HARMLESS_CAPABILITIES: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// The log drivers that write where the engine says, and the options of theirs that stay there.
const LOG_DRIVERS: [&str; 4] = ["", "json-file", "local", "none"];
const LOG_OPTIONS: [&str; 8] =
    ["max-size", "max-file", "compress", "labels", "labels-regex", "env", "env-regex", "tag"];

/// Network options that concern the network alone.
const NETWORK_OPTIONS: [&str; 3] = [
    "com.docker.network.bridge.enable_icc",
    "com.docker.network.bridge.enable_ip_masquerade",
    "com.docker.network.driver.mtu",
];

const ANNOTATIONS: [&str; 1] = ["brigantine.health-on-failure"];

fn refuse(what: impl std::fmt::Display) -> Decision {
    Err(Error::forbidden(format!("{what} is not allowed through a project's socket")))
}

fn unset<T>(value: Option<&Vec<T>>, what: &str) -> Decision {
    if value.is_none_or(Vec::is_empty) { Ok(()) } else { refuse(what) }
}

fn off(value: Option<bool>, what: &str) -> Decision {
    if value == Some(true) { refuse(what) } else { Ok(()) }
}

fn empty(value: Option<&str>, what: &str) -> Decision {
    if value.is_none_or(str::is_empty) { Ok(()) } else { refuse(what) }
}

/// What names another object, for the caller to look up among the project's.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Named<'a> {
    pub containers: Vec<&'a mut String>,
}

/// Decides on a new container. The references to other containers in it are returned, to be replaced by the ids of
/// the project's; images, volumes and networks are looked up where they are used.
pub fn container(body: &mut ContainerCreateBody, low_ports: bool) -> Result<Named<'_>, Error> {
    let ContainerCreateBody {
        hostname: _,
        domainname: _,
        user: _,
        attach_stdin: _,
        attach_stdout: _,
        attach_stderr: _,
        exposed_ports: _,
        tty: _,
        open_stdin: _,
        stdin_once: _,
        env: _,
        cmd: _,
        healthcheck: _,
        args_escaped: _,
        image: _,
        volumes,
        working_dir: _,
        entrypoint: _,
        network_disabled: _,
        on_build: _,
        labels: _,
        stop_signal: _,
        stop_timeout: _,
        shell: _,
        host_config,
        networking_config,
    } = body;
    // A volume at a path, made for the container.
    if let Some(odd) = volumes.iter().flatten().find(|volume| volume.contains(':')) {
        return refuse(format!("the volume {odd:?}")).map(|()| Named::default());
    }
    let mut named = Named::default();
    for settings in networking_config
        .iter_mut()
        .filter_map(|all| all.endpoints_config.as_mut())
        .flat_map(|all| all.values_mut())
    {
        endpoint(settings)?;
    }
    if let Some(host) = host_config {
        self::host(host, low_ports, &mut named)?;
    }
    Ok(named)
}

/// Decides on a container's place on a network.
pub fn endpoint(settings: &EndpointSettings) -> Decision {
    let EndpointSettings {
        ipam_config: _,
        links,
        mac_address: _,
        aliases: _,
        driver_opts,
        gw_priority: _,
        // What clients send back of an inspection; it counts for nothing.
        network_id: _,
        endpoint_id: _,
        gateway: _,
        ip_address: _,
        ip_prefix_len: _,
        ipv6_gateway: _,
        global_ipv6_address: _,
        global_ipv6_prefix_len: _,
        dns_names: _,
    } = settings;
    unset(links.as_ref(), "a link (containers of one network know each other by name)")?;
    if driver_opts.as_ref().is_some_and(|options| !options.is_empty()) {
        return refuse("an option for a network's driver");
    }
    Ok(())
}

fn host<'a>(host: &'a mut HostConfig, low_ports: bool, named: &mut Named<'a>) -> Decision {
    let HostConfig {
        cpu_shares: _,
        memory: _,
        cgroup_parent,
        blkio_weight: _,
        blkio_weight_device,
        blkio_device_read_bps,
        blkio_device_write_bps,
        blkio_device_read_iops,
        blkio_device_write_iops,
        cpu_period: _,
        cpu_quota: _,
        cpu_realtime_period,
        cpu_realtime_runtime,
        cpuset_cpus: _,
        cpuset_mems: _,
        devices,
        device_cgroup_rules,
        device_requests,
        memory_reservation: _,
        memory_swap: _,
        memory_swappiness: _,
        nano_cpus: _,
        oom_kill_disable,
        init: _,
        pids_limit: _,
        ulimits: _,
        cpu_count: _,
        cpu_percent: _,
        io_maximum_iops: _,
        io_maximum_bandwidth: _,
        binds,
        container_id_file: _,
        log_config,
        network_mode,
        port_bindings,
        restart_policy: _,
        auto_remove: _,
        volume_driver,
        volumes_from,
        mounts,
        console_size: _,
        annotations,
        cap_add,
        cap_drop: _,
        cgroupns_mode,
        dns: _,
        dns_options: _,
        dns_search: _,
        extra_hosts: _,
        group_add: _,
        ipc_mode,
        cgroup,
        links,
        oom_score_adj,
        pid_mode,
        privileged,
        publish_all_ports: _,
        readonly_rootfs: _,
        security_opt,
        storage_opt: _,
        tmpfs: _,
        uts_mode,
        userns_mode,
        shm_size: _,
        sysctls,
        runtime,
        isolation: _,
        masked_paths,
        readonly_paths,
    } = host;
    off(*privileged, "--privileged")?;
    empty(cgroup_parent.as_deref(), "--cgroup-parent")?;
    empty(cgroup.as_deref(), "a foreign control group")?;
    unset(blkio_weight_device.as_ref(), "a limit for a device of the host")?;
    for limits in
        [blkio_device_read_bps, blkio_device_write_bps, blkio_device_read_iops, blkio_device_write_iops]
    {
        unset(limits.as_ref(), "a limit for a device of the host")?;
    }
    if [*cpu_realtime_period, *cpu_realtime_runtime].into_iter().flatten().any(|value| value != 0) {
        return refuse("real-time scheduling");
    }
    unset(devices.as_ref(), "--device")?;
    unset(device_cgroup_rules.as_ref(), "--device-cgroup-rule")?;
    unset(device_requests.as_ref(), "a request for devices (--gpus)")?;
    off(*oom_kill_disable, "--oom-kill-disable")?;
    if oom_score_adj.is_some_and(|adj| adj < 0) {
        return refuse("a negative --oom-score-adj");
    }
    if let Some(log) = log_config {
        logging(log)?;
    }
    match volume_driver.as_deref() {
        None | Some("" | "local") => {}
        Some(other) => return refuse(format!("the volume driver {other}")),
    }
    for bind in binds.iter().flatten() {
        if bind.starts_with(['/', '.', '~']) || !bind.contains(':') {
            return refuse(format!("the bind mount {bind:?}"));
        }
    }
    for mount in mounts.iter().flatten() {
        self::mount(mount)?;
    }
    ports(port_bindings.as_ref(), low_ports)?;
    if let Some(other) =
        annotations.iter().flatten().map(|(name, _)| name).find(|name| !ANNOTATIONS.contains(&name.as_str()))
    {
        return refuse(format!("the annotation {other}"));
    }
    for capability in cap_add.iter().flatten() {
        let plain = capability.to_ascii_uppercase();
        if !HARMLESS_CAPABILITIES.contains(&plain.strip_prefix("CAP_").unwrap_or(&plain)) {
            return refuse(format!("--cap-add {capability}"));
        }
    }
    if matches!(cgroupns_mode, Some(HostConfigCgroupnsModeEnum::HOST)) {
        return refuse("--cgroupns host");
    }
    for (mode, what) in
        [(network_mode, "--network"), (ipc_mode, "--ipc"), (pid_mode, "--pid"), (uts_mode, "--uts")]
    {
        match mode {
            Some(mode) if mode == "host" => return refuse(format!("{what} host")),
            Some(mode) if mode.starts_with("container:") => named.containers.push(mode),
            _ => {}
        }
    }
    empty(userns_mode.as_deref(), "--userns")?;
    unset(links.as_ref(), "--link (containers of one network know each other by name)")?;
    for option in security_opt.iter().flatten() {
        if !matches!(
            option.as_str(),
            "no-new-privileges" | "no-new-privileges:true" | "no-new-privileges=true"
        ) {
            return refuse(format!("--security-opt {option}"));
        }
    }
    if sysctls.as_ref().is_some_and(|all| !all.is_empty()) {
        return refuse("--sysctl");
    }
    match runtime.as_deref() {
        None | Some("" | "brig-runtime" | "runc" | "io.containerd.runc.v2") => {}
        Some(other) => return refuse(format!("--runtime {other}")),
    }
    if masked_paths.is_some() || readonly_paths.is_some() {
        return refuse("a choice of masked or read-only paths");
    }
    for other in volumes_from.iter_mut().flatten() {
        named.containers.push(other);
    }
    Ok(())
}

fn logging(log: &HostConfigLogConfig) -> Decision {
    let HostConfigLogConfig { typ, config } = log;
    let driver = typ.as_deref().unwrap_or_default();
    if !LOG_DRIVERS.contains(&driver) {
        return refuse(format!("--log-driver {driver}"));
    }
    match config.iter().flatten().map(|(name, _)| name).find(|name| !LOG_OPTIONS.contains(&name.as_str())) {
        Some(other) => refuse(format!("--log-opt {other}")),
        None => Ok(()),
    }
}

fn mount(mount: &Mount) -> Decision {
    let Mount {
        target: _,
        source,
        typ,
        read_only: _,
        consistency: _,
        bind_options,
        volume_options,
        image_options: _,
        tmpfs_options: _,
    } = mount;
    if bind_options.is_some() {
        return refuse("a bind mount");
    }
    match typ {
        Some(MountType::TMPFS | MountType::IMAGE) => Ok(()),
        Some(MountType::VOLUME) => {
            if source.as_deref().is_some_and(|source| source.contains('/')) {
                return refuse("a bind mount");
            }
            let Some(MountVolumeOptions { no_copy: _, labels: _, driver_config, subpath: _ }) =
                volume_options
            else {
                return Ok(());
            };
            match driver_config {
                Some(driver)
                    if driver.name.as_deref().is_some_and(|name| !matches!(name, "" | "local"))
                        || driver.options.as_ref().is_some_and(|options| !options.is_empty()) =>
                {
                    refuse("an option for a volume's driver")
                }
                _ => Ok(()),
            }
        }
        Some(MountType::BIND) => refuse("a bind mount"),
        Some(other) => refuse(format!("a mount of type {other}")),
        None => refuse("a mount without a type"),
    }
}

/// Ports below 1024 speak for the host.
fn ports(bindings: Option<&PortMap>, low: bool) -> Decision {
    if low {
        return Ok(());
    }
    for binding in bindings.into_iter().flatten().filter_map(|(_, all)| all.as_ref()).flatten() {
        let port = binding.host_port.as_deref().unwrap_or_default();
        let first = port.split('-').next().unwrap_or_default();
        if first.trim().parse::<u32>().is_ok_and(|port| (1..1024).contains(&port)) {
            return refuse(format!("publishing port {port} (below 1024)"));
        }
    }
    Ok(())
}

/// Decides on a command in a running container.
pub fn exec(config: &ExecConfig) -> Decision {
    let ExecConfig {
        attach_stdin: _,
        attach_stdout: _,
        attach_stderr: _,
        console_size: _,
        detach_keys: _,
        tty: _,
        env: _,
        cmd: _,
        privileged,
        user: _,
        working_dir: _,
    } = config;
    off(*privileged, "exec --privileged")
}

/// Decides on a change of a container.
pub fn update(body: &ContainerUpdateBody) -> Decision {
    let ContainerUpdateBody {
        cpu_shares: _,
        memory: _,
        cgroup_parent,
        blkio_weight: _,
        blkio_weight_device,
        blkio_device_read_bps,
        blkio_device_write_bps,
        blkio_device_read_iops,
        blkio_device_write_iops,
        cpu_period: _,
        cpu_quota: _,
        cpu_realtime_period,
        cpu_realtime_runtime,
        cpuset_cpus: _,
        cpuset_mems: _,
        devices,
        device_cgroup_rules,
        device_requests,
        memory_reservation: _,
        memory_swap: _,
        memory_swappiness: _,
        nano_cpus: _,
        oom_kill_disable,
        init: _,
        pids_limit: _,
        ulimits: _,
        cpu_count: _,
        cpu_percent: _,
        io_maximum_iops: _,
        io_maximum_bandwidth: _,
        restart_policy: _,
    } = body;
    empty(cgroup_parent.as_deref(), "a control group's parent")?;
    unset(blkio_weight_device.as_ref(), "a limit for a device of the host")?;
    for limits in
        [blkio_device_read_bps, blkio_device_write_bps, blkio_device_read_iops, blkio_device_write_iops]
    {
        unset(limits.as_ref(), "a limit for a device of the host")?;
    }
    if [*cpu_realtime_period, *cpu_realtime_runtime].into_iter().flatten().any(|value| value != 0) {
        return refuse("real-time scheduling");
    }
    unset(devices.as_ref(), "a device")?;
    unset(device_cgroup_rules.as_ref(), "a device rule")?;
    unset(device_requests.as_ref(), "a request for devices")?;
    off(*oom_kill_disable, "switching the OOM killer off")
}

/// Decides on a new volume.
pub fn volume(request: &VolumeCreateRequest) -> Decision {
    let VolumeCreateRequest { name: _, driver, driver_opts, labels: _, cluster_volume_spec } = request;
    match driver.as_deref() {
        None | Some("" | "local") => {}
        Some(other) => return refuse(format!("the volume driver {other}")),
    }
    if driver_opts.as_ref().is_some_and(|options| !options.is_empty()) {
        return refuse("an option for a volume's driver");
    }
    if cluster_volume_spec.is_some() {
        return refuse("a cluster volume");
    }
    Ok(())
}

/// Decides on a new network: its addresses and its device are chosen by the engine, so that no route of the host's is
/// taken over.
pub fn network(request: &NetworkCreateRequest) -> Decision {
    let NetworkCreateRequest {
        name: _,
        driver,
        scope: _,
        internal: _,
        attachable: _,
        ingress: _,
        config_only,
        config_from,
        ipam,
        enable_ipv4: _,
        enable_ipv6: _,
        options,
        labels: _,
    } = request;
    match driver.as_deref() {
        None | Some("" | "bridge" | "default") => {}
        Some(other) => return refuse(format!("the network driver {other}")),
    }
    off(*config_only, "a configuration-only network")?;
    if config_from.as_ref().is_some_and(|from| from.network.as_ref().is_some_and(|name| !name.is_empty())) {
        return refuse("another network's configuration");
    }
    if let Some(Ipam { driver, config, options }) = ipam {
        if !matches!(driver.as_deref(), None | Some("" | "default")) {
            return refuse("an address driver");
        }
        let chosen = config.iter().flatten().any(|one| {
            [&one.subnet, &one.ip_range, &one.gateway].into_iter().flatten().any(|text| !text.is_empty())
                || one.auxiliary_addresses.as_ref().is_some_and(|all| !all.is_empty())
        });
        if chosen || options.as_ref().is_some_and(|options| !options.is_empty()) {
            return refuse("a choice of a network's addresses");
        }
    }
    match options
        .iter()
        .flatten()
        .map(|(name, _)| name)
        .find(|name| !NETWORK_OPTIONS.contains(&name.as_str()))
    {
        Some(other) => refuse(format!("the network option {other}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn created(host: &Value) -> Result<Vec<String>, String> {
        let mut body: ContainerCreateBody =
            crate::http::json::from_value(json!({ "Image": "busybox", "HostConfig": host })).unwrap();
        container(&mut body, false)
            .map(|named| named.containers.into_iter().map(|name| name.clone()).collect())
            .map_err(|error| error.message)
    }

    #[test]
    fn what_is_root_on_the_host_is_refused() {
        for host in [
            json!({ "Privileged": true }),
            json!({ "privileged": true }),
            json!({ "Binds": ["/:/host"] }),
            json!({ "Binds": ["./x:/host"] }),
            json!({ "Binds": ["/var/run/docker.sock"] }),
            json!({ "Mounts": [{ "Type": "bind", "Source": "/", "Target": "/host" }] }),
            json!({ "Mounts": [{ "Source": "/", "Target": "/host" }] }),
            json!({ "Mounts": [{ "Type": "volume", "Source": "v", "Target": "/v", "VolumeOptions": {
                "DriverConfig": { "Name": "local", "Options": { "type": "none", "o": "bind", "device": "/" } } } }] }),
            json!({ "Mounts": [{ "Type": "volume", "Source": "v", "Target": "/v", "BindOptions": {} }] }),
            json!({ "Mounts": [{ "Type": "npipe", "Source": "v", "Target": "/v" }] }),
            json!({ "NetworkMode": "host" }),
            json!({ "PidMode": "host" }),
            json!({ "IpcMode": "host" }),
            json!({ "UTSMode": "host" }),
            json!({ "UsernsMode": "host" }),
            json!({ "CgroupnsMode": "host" }),
            json!({ "CgroupParent": "/" }),
            json!({ "Cgroup": "container:x" }),
            json!({ "Devices": [{ "PathOnHost": "/dev/sda" }] }),
            json!({ "DeviceCgroupRules": ["a *:* rwm"] }),
            json!({ "DeviceRequests": [{ "Driver": "cdi", "DeviceIDs": ["x/y=z"] }] }),
            json!({ "CapAdd": ["SYS_ADMIN"] }),
            json!({ "CapAdd": ["cap_sys_ptrace"] }),
            json!({ "CapAdd": ["ALL"] }),
            json!({ "SecurityOpt": ["seccomp=unconfined"] }),
            json!({ "SecurityOpt": ["apparmor=unconfined"] }),
            json!({ "SecurityOpt": ["no-new-privileges=false"] }),
            json!({ "SecurityOpt": ["systempaths=unconfined"] }),
            json!({ "Sysctls": { "kernel.core_pattern": "|/x" } }),
            json!({ "MaskedPaths": [] }),
            json!({ "ReadonlyPaths": [] }),
            json!({ "Runtime": "/tmp/evil" }),
            json!({ "OomScoreAdj": -1000 }),
            json!({ "OomKillDisable": true }),
            json!({ "VolumeDriver": "other" }),
            json!({ "LogConfig": { "Type": "syslog", "Config": {} } }),
            json!({ "LogConfig": { "Type": "json-file", "Config": { "other": "x" } } }),
            json!({ "Annotations": { "run.oci.keep_original_groups": "1" } }),
            json!({ "Links": ["other:db"] }),
            json!({ "BlkioDeviceReadBps": [{ "Path": "/dev/sda", "Rate": 1 }] }),
            json!({ "CpuRealtimeRuntime": 1000 }),
            json!({ "PortBindings": { "22/tcp": [{ "HostPort": "22" }] } }),
            json!({ "PortBindings": { "22/tcp": [{ "HostPort": "1000-2000" }] } }),
        ] {
            assert!(created(&host).is_err_and(|text| text.contains("project's socket")), "{host}");
        }
    }

    #[test]
    fn what_a_project_needs_is_allowed() {
        let host = json!({
            "Binds": ["data:/data:ro"],
            "Mounts": [{ "Type": "volume", "Source": "v", "Target": "/v", "VolumeOptions": { "DriverConfig": {} } },
                       { "Type": "tmpfs", "Target": "/tmp" }],
            "Memory": 64 << 20, "NetworkMode": "default", "IpcMode": "private", "CapDrop": ["ALL"], "CapAdd": ["CAP_CHOWN"],
            "SecurityOpt": ["no-new-privileges"], "PortBindings": { "80/tcp": [{ "HostPort": "8080" }], "81/tcp": [{}] },
            "RestartPolicy": { "Name": "always" }, "LogConfig": { "Type": "", "Config": { "max-size": "1m" } },
            "Privileged": false, "MaskedPaths": null, "Runtime": "runc", "OomScoreAdj": 500, "ReadonlyRootfs": true,
        });
        assert_eq!(created(&host), Ok(Vec::new()));
    }

    #[test]
    fn other_containers_are_left_to_be_looked_up() {
        let host = json!({ "NetworkMode": "container:a", "PidMode": "container:b", "IpcMode": "container:c",
            "VolumesFrom": ["d:ro"] });
        assert_eq!(created(&host).unwrap(), ["container:a", "container:c", "container:b", "d:ro"]);
    }

    #[test]
    fn networks_and_volumes_leave_the_host_alone() {
        let network = |body: Value| super::network(&crate::http::json::from_value(body).unwrap());
        assert!(network(json!({ "Name": "n", "Driver": "bridge", "Labels": { "a": "b" }, "IPAM": { "Driver": "default" } })).is_ok());
        for body in [
            json!({ "Name": "n", "Driver": "macvlan" }),
            json!({ "Name": "n", "Options": { "com.docker.network.bridge.name": "eth0" } }),
            json!({ "Name": "n", "IPAM": { "Config": [{ "Subnet": "8.8.8.0/24" }] } }),
            json!({ "Name": "n", "ConfigFrom": { "Network": "other" } }),
        ] {
            assert!(network(body.clone()).is_err(), "{body}");
        }
        let volume = |body: Value| super::volume(&crate::http::json::from_value(body).unwrap());
        assert!(volume(json!({ "Name": "v", "Driver": "local" })).is_ok());
        assert!(
            volume(json!({ "Name": "v", "DriverOpts": { "device": "/", "o": "bind", "type": "none" } }))
                .is_err()
        );
        let exec = |body: Value| super::exec(&crate::http::json::from_value(body).unwrap());
        assert!(exec(json!({ "Cmd": ["sh"], "User": "0" })).is_ok());
        assert!(exec(json!({ "Cmd": ["sh"], "Privileged": true })).is_err());
    }
}
