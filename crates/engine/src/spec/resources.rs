//! Limits: what the request says in docker's terms, as the runtime specification's resources.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use bollard_stubs::models::{HostConfig, ThrottleDevice};
use brigantine_runtime::profile;
use brigantine_runtime::spec::{
    LinuxBlockIo, LinuxBlockIoBuilder, LinuxCpu, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup,
    LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxMemory, LinuxPids, LinuxResources, LinuxThrottleDevice,
    LinuxThrottleDeviceBuilder, LinuxWeightDevice, LinuxWeightDeviceBuilder, PosixRlimit, PosixRlimitBuilder,
    PosixRlimitType,
};

use crate::config::Config;
use crate::error::Context;
use crate::{Error, Result};

/// Everything the control group of a container is set to, device rules included.
pub(crate) fn resources(host: &HostConfig, devices: &[LinuxDevice]) -> Result<LinuxResources> {
    let mut resources = limits(host)?;
    let rules = if host.privileged.unwrap_or_default() {
        vec![rule(true, None, None, None, "rwm")?]
    } else {
        let mut rules = profile::device_rules();
        for (device, request) in devices.iter().zip(host.devices.iter().flatten()) {
            let access = request.cgroup_permissions.as_deref().filter(|p| !p.is_empty()).unwrap_or("rwm");
            rules.push(rule(true, Some(device.typ()), Some(device.major()), Some(device.minor()), access)?);
        }
        for text in host.device_cgroup_rules.iter().flatten() {
            rules.push(parse_device_rule(text)?);
        }
        rules
    };
    resources.set_devices(Some(rules));
    Ok(resources)
}

/// The limits alone, as an update of a running container sends them: what is not set stays.
pub(crate) fn limits(host: &HostConfig) -> Result<LinuxResources> {
    let mut resources = LinuxResources::default();
    resources.set_memory(memory(host));
    resources.set_cpu(cpu(host));
    if let Some(limit) = host.pids_limit.filter(|limit| *limit != 0) {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit.max(-1));
        resources.set_pids(Some(pids));
    }
    resources.set_block_io(block_io(host)?);
    resources.set_devices(None);
    Ok(resources)
}

fn memory(host: &HostConfig) -> Option<LinuxMemory> {
    let limit = host.memory.filter(|bytes| *bytes != 0);
    let swap = match (host.memory_swap.unwrap_or_default(), limit) {
        // As much swap again as memory, when nothing is said.
        (0, Some(limit)) if limit > 0 => Some(limit.saturating_mul(2)),
        (0, _) => None,
        (swap, _) => Some(swap),
    };
    let swappiness = host.memory_swappiness.and_then(|value| u64::try_from(value).ok());
    let reservation = host.memory_reservation.filter(|bytes| *bytes != 0);
    let no_oom = host.oom_kill_disable.filter(|disable| *disable);
    if limit.is_none() && swap.is_none() && swappiness.is_none() && reservation.is_none() && no_oom.is_none()
    {
        return None;
    }
    let mut memory = LinuxMemory::default();
    memory.set_limit(limit);
    memory.set_swap(swap);
    memory.set_reservation(reservation);
    memory.set_swappiness(swappiness);
    memory.set_disable_oom_killer(no_oom);
    Some(memory)
}

fn cpu(host: &HostConfig) -> Option<LinuxCpu> {
    const PERIOD: i64 = 100_000;
    let (mut period, mut quota) = (host.cpu_period.filter(|v| *v != 0), host.cpu_quota.filter(|v| *v != 0));
    if let Some(nano) = host.nano_cpus.filter(|nano| *nano > 0) {
        period = Some(PERIOD);
        quota = Some((i128::from(nano) * i128::from(PERIOD) / 1_000_000_000) as i64);
    }
    let text = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
    let unsigned = |value: Option<i64>| value.and_then(|v| u64::try_from(v).ok()).filter(|v| *v != 0);
    let shares = unsigned(host.cpu_shares);
    let (cpus, mems) = (text(&host.cpuset_cpus), text(&host.cpuset_mems));
    let realtime_period = unsigned(host.cpu_realtime_period);
    let realtime_runtime = host.cpu_realtime_runtime.filter(|v| *v != 0);
    let nothing = period.is_none()
        && quota.is_none()
        && shares.is_none()
        && cpus.is_none()
        && mems.is_none()
        && realtime_period.is_none()
        && realtime_runtime.is_none();
    if nothing {
        return None;
    }
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(shares);
    cpu.set_period(unsigned(period));
    cpu.set_quota(quota);
    cpu.set_cpus(cpus);
    cpu.set_mems(mems);
    cpu.set_realtime_period(realtime_period);
    cpu.set_realtime_runtime(realtime_runtime);
    Some(cpu)
}

fn block_io(host: &HostConfig) -> Result<Option<LinuxBlockIo>> {
    let weight = host.blkio_weight.filter(|weight| *weight != 0);
    let weights: Vec<LinuxWeightDevice> = host
        .blkio_weight_device
        .iter()
        .flatten()
        .map(|device| {
            let (major, minor) = block_device(device.path.as_deref().unwrap_or_default())?;
            let weight = u16::try_from(device.weight.unwrap_or_default())
                .ok()
                .filter(|weight| (10..=1000).contains(weight))
                .ok_or_else(|| Error::invalid("Range of blkio weight is from 10 to 1000"))?;
            LinuxWeightDeviceBuilder::default()
                .major(major)
                .minor(minor)
                .weight(weight)
                .build()
                .doing(|| "describe a block device's weight".to_owned())
        })
        .collect::<Result<_>>()?;
    let read_bps = throttle(host.blkio_device_read_bps.as_deref())?;
    let write_bps = throttle(host.blkio_device_write_bps.as_deref())?;
    let read_iops = throttle(host.blkio_device_read_iops.as_deref())?;
    let write_iops = throttle(host.blkio_device_write_iops.as_deref())?;
    let nothing = weight.is_none()
        && [&read_bps, &write_bps, &read_iops, &write_iops].into_iter().all(Vec::is_empty)
        && weights.is_empty();
    if nothing {
        return Ok(None);
    }
    let mut builder = LinuxBlockIoBuilder::default()
        .weight_device(weights)
        .throttle_read_bps_device(read_bps)
        .throttle_write_bps_device(write_bps)
        .throttle_read_iops_device(read_iops)
        .throttle_write_iops_device(write_iops);
    if let Some(weight) = weight {
        builder = builder.weight(weight);
    }
    builder.build().map(Some).doing(|| "describe the block device limits".to_owned())
}

fn throttle(devices: Option<&[ThrottleDevice]>) -> Result<Vec<LinuxThrottleDevice>> {
    devices
        .unwrap_or_default()
        .iter()
        .map(|device| {
            let (major, minor) = block_device(device.path.as_deref().unwrap_or_default())?;
            let rate = u64::try_from(device.rate.unwrap_or_default())
                .map_err(|_negative| Error::invalid("a block device's rate cannot be negative"))?;
            LinuxThrottleDeviceBuilder::default()
                .major(major)
                .minor(minor)
                .rate(rate)
                .build()
                .doing(|| "describe a block device's limit".to_owned())
        })
        .collect()
}

fn block_device(path: &str) -> Result<(i64, i64)> {
    let metadata = std::fs::metadata(path)
        .map_err(|error| Error::invalid(format!("block device {path}")).because(error))?;
    if !metadata.file_type().is_block_device() {
        return Err(Error::invalid(format!("{path} is not a block device")));
    }
    Ok((i64::from(rustix::fs::major(metadata.rdev())), i64::from(rustix::fs::minor(metadata.rdev()))))
}

fn rule(
    allow: bool,
    typ: Option<LinuxDeviceType>,
    major: Option<i64>,
    minor: Option<i64>,
    access: &str,
) -> Result<LinuxDeviceCgroup> {
    let mut builder = LinuxDeviceCgroupBuilder::default()
        .allow(allow)
        .typ(typ.unwrap_or(LinuxDeviceType::A))
        .access(access);
    if let Some(major) = major {
        builder = builder.major(major);
    }
    if let Some(minor) = minor {
        builder = builder.minor(minor);
    }
    builder.build().doing(|| "describe a device rule".to_owned())
}

/// `c 42:* rmw`: type, major and minor (or `*`), access.
pub(crate) fn parse_device_rule(text: &str) -> Result<LinuxDeviceCgroup> {
    let wrong = || Error::invalid(format!("invalid device cgroup rule format: '{text}'"));
    let [typ, numbers, access] = text.split(' ').collect::<Vec<_>>()[..] else { return Err(wrong()) };
    let typ = match typ {
        "a" => LinuxDeviceType::A,
        "b" => LinuxDeviceType::B,
        "c" => LinuxDeviceType::C,
        _ => return Err(wrong()),
    };
    let (major, minor) = numbers.split_once(':').ok_or_else(wrong)?;
    let number = |text: &str| match text {
        "*" => Ok(-1),
        text => text.parse::<u32>().map(i64::from).map_err(|_not_a_number| wrong()),
    };
    if access.is_empty() || access.len() > 3 || !access.bytes().all(|b| b"rwm".contains(&b)) {
        return Err(wrong());
    }
    rule(true, Some(typ), Some(number(major)?), Some(number(minor)?), access)
}

/// The device nodes that `--device` asks for; a directory on the host means every node in it.
pub(crate) fn devices(host: &HostConfig) -> Result<Vec<LinuxDevice>> {
    let mut devices = Vec::new();
    for mapping in host.devices.iter().flatten() {
        let source = mapping.path_on_host.as_deref().unwrap_or_default();
        let target = mapping.path_in_container.as_deref().filter(|path| !path.is_empty()).unwrap_or(source);
        if let Some(access) = mapping.cgroup_permissions.as_deref()
            && !access.bytes().all(|b| b"rwm".contains(&b))
        {
            return Err(Error::invalid(format!("invalid device mode: {access}")));
        }
        devices.push(device(source, target)?);
    }
    Ok(devices)
}

fn device(source: &str, target: &str) -> Result<LinuxDevice> {
    let gathering = || format!("error gathering device information while adding custom device \"{source}\"");
    let metadata = std::fs::metadata(source)
        .map_err(|error| Error::invalid(gathering()).because(crate::spec::plain(&error)))?;
    let typ = if metadata.file_type().is_char_device() {
        LinuxDeviceType::C
    } else if metadata.file_type().is_block_device() {
        LinuxDeviceType::B
    } else {
        return Err(Error::invalid(format!("{}: not a device node", gathering())));
    };
    LinuxDeviceBuilder::default()
        .path(target)
        .typ(typ)
        .major(i64::from(rustix::fs::major(metadata.rdev())))
        .minor(i64::from(rustix::fs::minor(metadata.rdev())))
        .file_mode(metadata.mode() & 0o7777)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build()
        .doing(gathering)
}

/// All device nodes of the host, for a privileged container, but for those that every container has of its own.
pub(crate) fn host_devices() -> Vec<LinuxDevice> {
    const OWN: &[&str] =
        &["/dev/pts", "/dev/shm", "/dev/fd", "/dev/mqueue", "/dev/.lxc", "/dev/.lxd-mounts", "/dev/.udev"];
    let mut found = Vec::new();
    let mut waiting = vec![std::path::PathBuf::from("/dev")];
    while let Some(dir) = waiting.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            let text = path.to_string_lossy().into_owned();
            if OWN.contains(&text.as_str()) || text == "/dev/console" {
                continue;
            }
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => waiting.push(path),
                Ok(kind) if kind.is_char_device() || kind.is_block_device() => {
                    if let Ok(device) = device(&text, &text) {
                        found.push(device);
                    }
                }
                _ => {}
            }
        }
    }
    found
}

/// Resource limits of the process: the engine's defaults, overridden by the request's.
pub(crate) fn rlimits(host: &HostConfig, config: &Config) -> Result<Vec<PosixRlimit>> {
    let mut wanted = config.default_ulimits.clone();
    for ulimit in host.ulimits.iter().flatten() {
        let name = ulimit.name.clone().unwrap_or_default();
        wanted.insert(name, (ulimit.soft.unwrap_or_default(), ulimit.hard.unwrap_or_default()));
    }
    wanted
        .into_iter()
        .map(|(name, (soft, hard))| {
            let typ: PosixRlimitType =
                serde_json::from_value(format!("RLIMIT_{}", name.to_ascii_uppercase()).into())
                    .map_err(|_unknown| Error::invalid(format!("invalid ulimit type: {name}")))?;
            if hard >= 0 && (soft > hard || soft < 0) {
                return Err(Error::invalid(format!(
                    "ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}"
                )));
            }
            // -1 is "unlimited", which is all bits set.
            PosixRlimitBuilder::default()
                .typ(typ)
                .soft(soft as u64)
                .hard(hard as u64)
                .build()
                .doing(|| format!("describe ulimit {name}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_asked_is_nothing_set() {
        let limits = limits(&HostConfig::default()).unwrap();
        assert!(
            limits.memory().is_none()
                && limits.cpu().is_none()
                && limits.pids().is_none()
                && limits.block_io().is_none()
        );
    }

    #[test]
    fn memory_and_cpus_in_dockers_terms() {
        let host = HostConfig {
            memory: Some(100 << 20),
            nano_cpus: Some(1_500_000_000),
            pids_limit: Some(50),
            ..Default::default()
        };
        let limits = limits(&host).unwrap();
        let memory = limits.memory().as_ref().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(100 << 20), Some(200 << 20)));
        let cpu = limits.cpu().as_ref().unwrap();
        assert_eq!((cpu.quota(), cpu.period()), (Some(150_000), Some(100_000)));
        assert_eq!(limits.pids().as_ref().unwrap().limit(), 50);
    }

    #[test]
    fn device_rules_are_parsed() {
        let rule = parse_device_rule("c 42:* rm").unwrap();
        assert_eq!((rule.major(), rule.minor(), rule.access().as_deref()), (Some(42), Some(-1), Some("rm")));
        for bad in ["", "c 1:3", "x 1:3 r", "c 1 r", "c 1:3 q", "c a:3 r"] {
            assert!(parse_device_rule(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_missing_device_is_named() {
        let mapping = bollard_stubs::models::DeviceMapping {
            path_on_host: Some("/dev/none-such".into()),
            ..Default::default()
        };
        let error = devices(&HostConfig { devices: Some(vec![mapping]), ..Default::default() }).unwrap_err();
        assert_eq!(
            error.report(),
            "error gathering device information while adding custom device \"/dev/none-such\": no such file or directory"
        );
    }
}
