//! What a creation request may not say, in docker's words.

use bollard_stubs::models::{HostConfig, RestartPolicyNameEnum};

use crate::{Error, Result};

/// The least memory docker lets a container have.
const LEAST_MEMORY: i64 = 6 << 20;

/// Checks the policy part of a request; the warnings are for its answer.
pub(super) fn host_config(
    host: &HostConfig,
    config: &bollard_stubs::models::ContainerConfig,
) -> Result<Vec<String>> {
    limits(host)?;
    modes(host, config)?;
    super::health::on_failure(host)?;
    if let Some(adj) = host.oom_score_adj
        && !(-1000..=1000).contains(&adj)
    {
        return Err(Error::invalid(format!("Invalid value {adj}, range for oom score adj is [-1000, 1000]")));
    }
    if let Some(server) = host.dns.iter().flatten().find(|server| server.parse::<std::net::IpAddr>().is_err())
    {
        return Err(Error::invalid(format!("bad parameter: the DNS server {server:?} is not an IP address")));
    }
    if host.shm_size.is_some_and(|size| size < 0) {
        return Err(Error::invalid("SHM size can not be less than 0"));
    }
    if host.userns_mode.as_deref().is_some_and(|mode| !matches!(mode, "" | "host")) {
        return Err(Error::invalid(format!(
            "invalid USER mode: {}",
            host.userns_mode.as_deref().unwrap_or_default()
        )));
    }
    Ok(warnings(host))
}

/// Checks what an update may change as well.
pub(super) fn limits(host: &HostConfig) -> Result<()> {
    memory(host)?;
    cpu(host)?;
    restart_policy(host)?;
    if let Some(weight) = host.blkio_weight.filter(|weight| *weight != 0)
        && !(10..=1000).contains(&weight)
    {
        return Err(Error::invalid("Range of blkio weight is from 10 to 1000"));
    }
    Ok(())
}

fn memory(host: &HostConfig) -> Result<()> {
    let limit = host.memory.unwrap_or_default();
    let swap = host.memory_swap.unwrap_or_default();
    let reservation = host.memory_reservation.unwrap_or_default();
    if limit != 0 && limit < LEAST_MEMORY {
        return Err(Error::invalid("Minimum memory limit allowed is 6MB"));
    }
    if limit > 0 && swap > 0 && swap < limit {
        return Err(Error::invalid("Minimum memoryswap limit should be larger than memory limit, see usage"));
    }
    if limit == 0 && swap > 0 {
        return Err(Error::invalid(
            "You should always set the Memory limit when using Memoryswap limit, see usage",
        ));
    }
    if let Some(swappiness) = host.memory_swappiness
        && !(-1..=100).contains(&swappiness)
    {
        return Err(Error::invalid(format!(
            "Invalid value: {swappiness}, valid memory swappiness range is 0-100"
        )));
    }
    if reservation > 0 && reservation < LEAST_MEMORY {
        return Err(Error::invalid("Minimum memory reservation allowed is 6MB"));
    }
    if limit > 0 && reservation > 0 && limit < reservation {
        return Err(Error::invalid(
            "Minimum memory limit can not be less than memory reservation limit, see usage",
        ));
    }
    Ok(())
}

fn cpu(host: &HostConfig) -> Result<()> {
    let set = |value: Option<i64>| value.is_some_and(|value| value > 0);
    let nano = host.nano_cpus.unwrap_or_default();
    if nano > 0 && set(host.cpu_period) {
        return Err(Error::invalid("Conflicting options: Nano CPUs and CPU Period cannot both be set"));
    }
    if nano > 0 && set(host.cpu_quota) {
        return Err(Error::invalid("Conflicting options: Nano CPUs and CPU Quota cannot both be set"));
    }
    let online = std::thread::available_parallelism().map_or(1, usize::from);
    if nano < 0 || nano > i64::try_from(online).unwrap_or(i64::MAX).saturating_mul(1_000_000_000) {
        return Err(Error::invalid(format!(
            "range of CPUs is from 0.01 to {online}.00, as there are only {online} CPUs available"
        )));
    }
    if let Some(period) = host.cpu_period.filter(|period| *period != 0)
        && !(1_000..=1_000_000).contains(&period)
    {
        return Err(Error::invalid(
            "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)",
        ));
    }
    if let Some(quota) = host.cpu_quota.filter(|quota| *quota != 0)
        && quota > 0
        && quota < 1_000
    {
        return Err(Error::invalid("CPU cfs quota can not be less than 1ms (i.e. 1000)"));
    }
    for (list, what, file) in [
        (&host.cpuset_cpus, "cpus", "/sys/devices/system/cpu/online"),
        (&host.cpuset_mems, "mems", "/sys/devices/system/node/online"),
    ] {
        let Some(list) = list.as_deref().filter(|list| !list.is_empty()) else { continue };
        let wanted =
            numbers(list).ok_or_else(|| Error::invalid(format!("Invalid value {list} for cpuset {what}")))?;
        let Ok(online) = std::fs::read_to_string(file) else { continue };
        let online = online.trim();
        if let Some(available) = numbers(online)
            && wanted.iter().any(|number| !available.contains(number))
        {
            let what = if what == "cpus" { "CPUs" } else { "memory nodes" };
            return Err(Error::invalid(format!(
                "Requested {what} are not available - requested {list}, available: {online}"
            )));
        }
    }
    Ok(())
}

/// `0-2,4` as numbers.
fn numbers(list: &str) -> Option<std::collections::BTreeSet<u32>> {
    let mut all = std::collections::BTreeSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last > 8192 {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

/// Checks the restart policy, also of an update.
pub(super) fn restart_policy(host: &HostConfig) -> Result<()> {
    let Some(policy) = &host.restart_policy else { return Ok(()) };
    let retries = policy.maximum_retry_count.unwrap_or_default();
    match policy.name.unwrap_or(RestartPolicyNameEnum::EMPTY) {
        RestartPolicyNameEnum::ON_FAILURE => {
            if retries < 0 {
                return Err(Error::invalid("invalid restart policy: maximum retry count cannot be negative"));
            }
        }
        name => {
            if retries != 0 {
                let text =
                    if name == RestartPolicyNameEnum::EMPTY { "no".to_owned() } else { name.to_string() };
                return Err(Error::invalid(format!(
                    "invalid restart policy: maximum retry count can only be used with 'on-failure' (not '{text}')"
                )));
            }
        }
    }
    let restarts =
        !matches!(policy.name, None | Some(RestartPolicyNameEnum::EMPTY | RestartPolicyNameEnum::NO));
    if restarts && host.auto_remove.unwrap_or_default() {
        return Err(Error::invalid("can't create 'AutoRemove' container with restart policy"));
    }
    Ok(())
}

fn modes(host: &HostConfig, config: &bollard_stubs::models::ContainerConfig) -> Result<()> {
    let mode = |value: &Option<String>| value.clone().unwrap_or_default();
    let (ipc, pid, uts, network) =
        (mode(&host.ipc_mode), mode(&host.pid_mode), mode(&host.uts_mode), mode(&host.network_mode));
    let of_container = |mode: &str| mode.strip_prefix("container:").is_some_and(|id| !id.is_empty());
    if !matches!(ipc.as_str(), "" | "host" | "none" | "private" | "shareable") && !of_container(&ipc) {
        return Err(Error::invalid(format!("invalid IPC mode: {ipc}")));
    }
    if !matches!(pid.as_str(), "" | "host" | "private") && !of_container(&pid) {
        return Err(Error::invalid(format!("invalid PID mode: {pid}")));
    }
    if !matches!(uts.as_str(), "" | "host" | "private") {
        return Err(Error::invalid(format!("invalid UTS mode: {uts}")));
    }
    let hostname = config.hostname.as_deref().is_some_and(|name| !name.is_empty());
    if uts == "host" && hostname {
        return Err(Error::invalid("conflicting options: hostname and the UTS mode"));
    }
    if network == "container:" {
        return Err(Error::invalid("Invalid network mode: invalid container format container:<name|id>"));
    }
    if of_container(&network) {
        if hostname {
            return Err(Error::invalid("conflicting options: hostname and the network mode"));
        }
        if host.dns.as_ref().is_some_and(|dns| !dns.is_empty()) {
            return Err(Error::invalid("conflicting options: dns and the network mode"));
        }
        if host.extra_hosts.as_ref().is_some_and(|hosts| !hosts.is_empty()) {
            return Err(Error::invalid(
                "conflicting options: custom host-to-IP mapping and the network mode",
            ));
        }
        if host.port_bindings.as_ref().is_some_and(|ports| !ports.is_empty())
            || host.publish_all_ports == Some(true)
        {
            return Err(Error::invalid(
                "conflicting options: port publishing and the container type network mode",
            ));
        }
        if config.exposed_ports.as_ref().is_some_and(|ports| !ports.is_empty()) {
            return Err(Error::invalid(
                "conflicting options: port exposing and the container type network mode",
            ));
        }
    }
    Ok(())
}

/// What cannot be had together with user namespaces (docker's texts, where it has one).
pub(super) fn remapped(host: &HostConfig) -> Result<()> {
    let is_host = |mode: &Option<String>| mode.as_deref() == Some("host");
    let refused = |what: &str| {
        Err(Error::invalid(format!(
            "{what} when user namespaces are enabled: ask for the host's user namespace with --userns=host"
        )))
    };
    if host.privileged == Some(true) {
        return refused("privileged mode is incompatible with user namespaces; it is not available");
    }
    if is_host(&host.network_mode) {
        return refused("cannot share the host's network namespace");
    }
    if is_host(&host.pid_mode) {
        return refused("cannot share the host PID namespace");
    }
    if is_host(&host.ipc_mode) {
        return refused("cannot share the host IPC namespace");
    }
    if is_host(&host.uts_mode) {
        return refused("cannot share the host UTS namespace");
    }
    Ok(())
}

fn warnings(host: &HostConfig) -> Vec<String> {
    let mut warnings = Vec::new();
    if host.network_mode.as_deref() == Some("host")
        && host.port_bindings.as_ref().is_some_and(|ports| !ports.is_empty())
    {
        warnings.push("Published ports are discarded when using host network mode".to_owned());
    }
    if host.oom_kill_disable == Some(true) && host.memory.unwrap_or_default() == 0 {
        warnings.push(
            "OOM killer is disabled for the container, but no memory limit is set, this can result in the system running out of resources."
                .to_owned(),
        );
    }
    if host.privileged == Some(true) && host.cap_drop.as_ref().is_some_and(|caps| !caps.is_empty()) {
        warnings.push("a privileged container keeps the capabilities that cap-drop names".to_owned());
    }
    warnings
}

#[cfg(test)]
mod tests {
    use bollard_stubs::models::{ContainerConfig, RestartPolicy};

    use super::*;

    fn text(host: HostConfig) -> String {
        host_config(&host, &ContainerConfig::default()).unwrap_err().to_string()
    }

    #[test]
    fn limits_are_checked_in_dockers_words() {
        assert_eq!(
            text(HostConfig { memory: Some(1024), ..Default::default() }),
            "Minimum memory limit allowed is 6MB"
        );
        assert!(
            text(HostConfig { memory_swap: Some(1 << 30), ..Default::default() })
                .starts_with("You should always set the Memory")
        );
        assert!(
            text(HostConfig { nano_cpus: Some(1 << 50), ..Default::default() })
                .starts_with("range of CPUs is from 0.01 to")
        );
        assert_eq!(
            text(HostConfig { cpuset_cpus: Some("x".into()), ..Default::default() }),
            "Invalid value x for cpuset cpus"
        );
        assert!(
            text(HostConfig { cpuset_cpus: Some("0-4000".into()), ..Default::default() })
                .starts_with("Requested CPUs are not available")
        );
        assert_eq!(
            text(HostConfig { ipc_mode: Some("odd".into()), ..Default::default() }),
            "invalid IPC mode: odd"
        );
        let policy = RestartPolicy { name: Some(RestartPolicyNameEnum::ALWAYS), maximum_retry_count: None };
        assert_eq!(
            text(HostConfig { auto_remove: Some(true), restart_policy: Some(policy), ..Default::default() }),
            "can't create 'AutoRemove' container with restart policy"
        );
    }

    #[test]
    fn an_empty_request_is_fine() {
        assert!(host_config(&HostConfig::default(), &ContainerConfig::default()).unwrap().is_empty());
    }
}
