//! The container document: docker's shape in full, with the fields older clients read beside today's.

use std::collections::BTreeMap;
use std::sync::Arc;

use bollard_stubs::models::{ContainerConfig, HostConfig};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Container, Containers, Live, Record, Status, logging, logs};
use crate::Result;
use crate::clock::{rfc3339_nano, rfc3339_or_zero};
use crate::own::Own;
use crate::volumes::{LOCAL, MountRecord};

/// What docker's document has where nothing was asked for.
fn host_defaults() -> Value {
    json!({
        "Binds": null, "ContainerIDFile": "", "LogConfig": { "Type": "json-file", "Config": {} },
        "NetworkMode": "bridge", "PortBindings": {}, "RestartPolicy": { "Name": "no", "MaximumRetryCount": 0 },
        "AutoRemove": false, "VolumeDriver": "", "VolumesFrom": null, "ConsoleSize": [0, 0], "CapAdd": null,
        "CapDrop": null, "CgroupnsMode": "private", "Dns": [], "DnsOptions": [], "DnsSearch": [], "ExtraHosts": null,
        "GroupAdd": null, "IpcMode": "private", "Cgroup": "", "Links": null, "OomScoreAdj": 0, "PidMode": "",
        "Privileged": false, "PublishAllPorts": false, "ReadonlyRootfs": false, "SecurityOpt": null, "UTSMode": "",
        "UsernsMode": "", "ShmSize": 67_108_864, "Runtime": "brig-runtime", "Isolation": "", "CpuShares": 0, "Memory": 0,
        "NanoCpus": 0, "CgroupParent": "", "BlkioWeight": 0, "BlkioWeightDevice": [], "BlkioDeviceReadBps": [],
        "BlkioDeviceWriteBps": [], "BlkioDeviceReadIOps": [], "BlkioDeviceWriteIOps": [], "CpuPeriod": 0,
        "CpuQuota": 0, "CpuRealtimePeriod": 0, "CpuRealtimeRuntime": 0, "CpusetCpus": "", "CpusetMems": "",
        "Devices": [], "DeviceCgroupRules": null, "DeviceRequests": null, "MemoryReservation": 0, "MemorySwap": 0,
        "MemorySwappiness": null, "OomKillDisable": null, "PidsLimit": null, "Ulimits": null, "CpuCount": 0,
        "CpuPercent": 0, "IOMaximumIOps": 0, "IOMaximumBandwidth": 0,
    })
}

fn config_defaults() -> Value {
    json!({
        "Hostname": "", "Domainname": "", "User": "", "AttachStdin": false, "AttachStdout": false,
        "AttachStderr": false, "Tty": false, "OpenStdin": false, "StdinOnce": false, "Env": [], "Cmd": null,
        "Image": "", "Volumes": null, "WorkingDir": "", "Entrypoint": null, "OnBuild": null, "Labels": {},
    })
}

/// `given` over `defaults`.
fn over(defaults: Value, given: &impl Serialize) -> Value {
    let mut document = defaults;
    if let (Some(document), Ok(Value::Object(given))) =
        (document.as_object_mut(), serde_json::to_value(given))
    {
        for (name, value) in given {
            if !value.is_null() {
                document.insert(name, value);
            }
        }
    }
    document
}

pub(super) fn config(config: &ContainerConfig) -> Value {
    let mut document = over(config_defaults(), config);
    for name in ["Volumes", "ExposedPorts"] {
        if document[name].as_object().is_some_and(Map::is_empty) {
            if name == "Volumes" {
                document[name] = Value::Null;
            } else if let Some(document) = document.as_object_mut() {
                document.remove(name);
            }
        }
    }
    document
}

fn host_config(record: &Record) -> Value {
    let host: &HostConfig = &record.host_config;
    let mut document = over(host_defaults(), host);
    let open = record.privileged();
    for (name, given, default) in [
        ("MaskedPaths", &host.masked_paths, brigantine_runtime::profile::masked_paths as fn() -> Vec<String>),
        ("ReadonlyPaths", &host.readonly_paths, brigantine_runtime::profile::readonly_paths),
    ] {
        document[name] = match given {
            Some(given) => json!(given),
            None if open => Value::Null,
            None => json!(default()),
        };
    }
    document["Links"] = json!(super::links::shown(record));
    document
}

impl Containers {
    /// The whole document of a container; `size` measures its files.
    pub async fn inspect(self: &Arc<Self>, reference: &str, size: bool) -> Result<Value> {
        let container = self.find(reference)?;
        let mut document = self.document(&container);
        if size {
            let (rw, root) = self.sizes(&container).await?;
            document["SizeRw"] = rw.into();
            document["SizeRootFs"] = root.into();
        }
        Ok(document)
    }

    /// Bytes the container has written, and those with its image's.
    pub(super) async fn sizes(self: &Arc<Self>, container: &Arc<Container>) -> Result<(u64, u64)> {
        let (dir, image) = (self.dir(&container.id), container.with(|inner| inner.record.image_id.clone()));
        let own = crate::blocking(move || Ok(Own::usage(&dir))).await?;
        let image = self.images.resolve(&image).await.map_or(0, |image| image.size);
        Ok((own, own + image))
    }

    fn document(&self, container: &Container) -> Value {
        let (record, live, health) =
            container.with(|inner| (inner.record.clone(), inner.live.clone(), inner.health_document()));
        let dir = self.dir(&record.id);
        let state = &record.state;
        let mut state_document = json!({
            "Status": state.status.as_str(),
            "Running": state.status.is_up() || state.status == Status::Restarting,
            "Paused": state.status == Status::Paused,
            "Restarting": state.status == Status::Restarting,
            "OOMKilled": state.oom_killed,
            "Dead": state.status == Status::Dead,
            "Pid": live.as_ref().map_or(0, |live| live.pid),
            "ExitCode": state.exit_code,
            "Error": state.error,
            "StartedAt": rfc3339_or_zero(state.started_at),
            "FinishedAt": rfc3339_or_zero(state.finished_at),
        });
        if let Some(health) = health {
            state_document["Health"] = health;
        }
        let has_log = logging::has_path(&record);
        let copied = Some(dir.join("root")).filter(|root| root.is_dir());
        let driver = if copied.is_some() { "vfs" } else { "overlay2" };
        json!({
            "Id": record.id,
            "Created": rfc3339_nano(record.created),
            "Path": record.path,
            "Args": record.args,
            "State": state_document,
            "Image": record.image_id,
            "ResolvConfPath": dir.join("resolv.conf"),
            "HostnamePath": dir.join("hostname"),
            "HostsPath": dir.join("hosts"),
            "LogPath": if has_log { json!(logs::log_path(&dir, &record.id)) } else { json!("") },
            "Name": format!("/{}", record.name),
            "RestartCount": record.restart_count,
            "Driver": driver,
            "Platform": "linux",
            "MountLabel": "",
            "ProcessLabel": "",
            "AppArmorProfile": "",
            "ExecIDs": self.exec_ids(&record.id),
            "HostConfig": host_config(&record),
            "GraphDriver": { "Name": driver, "Data": self.graph(&record, copied) },
            "Mounts": self.mount_points(&record),
            "Config": config(&record.config),
            "NetworkSettings": self.network_settings(&record, live.as_deref()),
        })
    }

    /// Where the files are; `copied` is the root that is a copy of the image's.
    fn graph(&self, record: &Record, copied: Option<std::path::PathBuf>) -> Value {
        let dir = self.dir(&record.id);
        if let Some(root) = copied {
            return json!({ "ID": record.id, "MergedDir": root });
        }
        let lower = self.images.known_layers(&record.image_id).unwrap_or_default();
        let lower: Vec<String> =
            lower.iter().map(|layer| layer.shown().to_string_lossy().into_owned()).collect();
        json!({
            "ID": record.id, "LowerDir": lower.join(":"), "UpperDir": dir.join("upper"), "WorkDir": dir.join("work"),
            "MergedDir": "",
        })
    }

    pub(super) fn mount_points(&self, record: &Record) -> Vec<Value> {
        let document = |mount: &MountRecord| match mount
            .volume()
            .map(|name| (name, self.volumes.driver(name)))
        {
            Some((name, driver)) if driver != LOCAL => mount.document(&self.volumes.source(name), &driver),
            _ => mount.document(&self.volumes.data_dir(&mount.name), LOCAL),
        };
        record.mounts.iter().map(document).collect()
    }

    /// Networks with their addresses, ports, and the older fields of the default bridge.
    fn network_settings(&self, record: &Record, live: Option<&Live>) -> Value {
        let networks = self.network_endpoints(record, live);
        let bridge = networks.get("bridge").cloned().unwrap_or_else(|| json!({}));
        let old = |name: &str| match &bridge[name] {
            Value::Null => json!(""),
            value => value.clone(),
        };
        let number = |name: &str| bridge[name].as_i64().unwrap_or_default();
        json!({
            "Bridge": "",
            "SandboxID": live.map_or("", |_| &record.id),
            "SandboxKey": live.map_or_else(String::new, |live| format!("/proc/{}/ns/net", live.pid)),
            "Ports": ports(record, live),
            "HairpinMode": false,
            "LinkLocalIPv6Address": "",
            "LinkLocalIPv6PrefixLen": 0,
            "SecondaryIPAddresses": null,
            "SecondaryIPv6Addresses": null,
            "EndpointID": old("EndpointID"),
            "Gateway": old("Gateway"),
            "GlobalIPv6Address": old("GlobalIPv6Address"),
            "GlobalIPv6PrefixLen": number("GlobalIPv6PrefixLen"),
            "IPAddress": old("IPAddress"),
            "IPPrefixLen": number("IPPrefixLen"),
            "IPv6Gateway": old("IPv6Gateway"),
            "MacAddress": old("MacAddress"),
            "Networks": networks,
        })
    }
}

/// `{"80/tcp": [{HostIp, HostPort}…], "81/tcp": null}`; empty when it does not run.
fn ports(record: &Record, live: Option<&Live>) -> Value {
    let sandbox = live.map(Live::sandbox);
    let Some(attachment) = sandbox.as_ref().and_then(|sandbox| sandbox.attachment.as_ref()) else {
        return json!({});
    };
    if attachment.interfaces.is_empty() {
        return json!({});
    }
    let mut ports: BTreeMap<String, Option<Vec<Value>>> = BTreeMap::new();
    for port in record.config.exposed_ports.iter().flatten() {
        ports.insert(port.clone(), None);
    }
    for port in &attachment.ports {
        let entry = ports.entry(format!("{}/{}", port.container_port, port.protocol)).or_default();
        let host_port = if port.is_routed() { String::new() } else { port.host_port.to_string() };
        let binding = json!({ "HostIp": port.host_ip.to_string(), "HostPort": host_port });
        entry.get_or_insert_default().push(binding);
    }
    json!(ports)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_docker_has_is_there() {
        let host = over(host_defaults(), &HostConfig { memory: Some(5), ..Default::default() });
        assert_eq!(host["Memory"], 5);
        assert_eq!(host["Binds"], Value::Null);
        assert_eq!(host["RestartPolicy"]["Name"], "no");
        let config = config(&ContainerConfig {
            volumes: Some(vec![]),
            exposed_ports: Some(vec![]),
            ..Default::default()
        });
        assert_eq!(config["Volumes"], Value::Null);
        assert!(config.get("ExposedPorts").is_none());
        assert_eq!(config["Labels"], json!({}));
    }
}
