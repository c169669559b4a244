//! An OCI resource description written to a group's files.

use std::path::Path;

use super::{Cgroup, read, write};
use crate::error::Error;
use crate::spec::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

/// What every group has: what docker's statistics, pausing and confinement need.
const ALWAYS: &[&str] = &["memory", "cpu", "cpuacct", "pids", "freezer", "devices", "blkio"];

/// The controllers that a group with these limits needs.
pub(super) fn controllers(resources: Option<&LinuxResources>) -> Vec<&'static str> {
    let mut all = ALWAYS.to_vec();
    let Some(resources) = resources else { return all };
    if resources
        .cpu()
        .as_ref()
        .is_some_and(|c| set(c.cpus().as_ref()).is_some() || set(c.mems().as_ref()).is_some())
    {
        all.push("cpuset");
    }
    if resources.hugepage_limits().as_ref().is_some_and(|h| !h.is_empty()) {
        all.push("hugetlb");
    }
    if let Some(network) = resources.network() {
        if network.class_id().is_some_and(|id| id != 0) {
            all.push("net_cls");
        }
        if network.priorities().as_ref().is_some_and(|p| !p.is_empty()) {
            all.push("net_prio");
        }
    }
    if resources.rdma().as_ref().is_some_and(|r| !r.is_empty()) {
        all.push("rdma");
    }
    all
}

fn set(text: Option<&String>) -> Option<&str> {
    text.map(String::as_str).filter(|t| !t.is_empty())
}

pub(super) fn apply(group: &Cgroup, resources: &LinuxResources) -> Result<(), Error> {
    if let Some(memory) = resources.memory() {
        match (group.v1_dir("memory"), v2(group, "memory")) {
            (Some(dir), _) => memory_v1(dir, memory)?,
            (None, Some(dir)) => memory_v2(dir, memory)?,
            (None, None) if memory.limit().is_some_and(|l| l != 0) => return Err(missing("memory")),
            (None, None) => {}
        }
    }
    if let Some(cpu) = resources.cpu() {
        match (group.v1_dir("cpu"), v2(group, "cpu")) {
            (Some(dir), _) => cpu_v1(dir, cpu)?,
            (None, Some(dir)) => cpu_v2(dir, cpu)?,
            (None, None) if cpu.quota().is_some_and(|q| q > 0) => return Err(missing("cpu")),
            (None, None) => {}
        }
        if set(cpu.cpus().as_ref()).is_some() || set(cpu.mems().as_ref()).is_some() {
            let Some(dir) = group.v1_dir("cpuset").or_else(|| v2(group, "cpuset")) else {
                return Err(missing("cpuset"));
            };
            for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
                if let Some(value) = set(value.as_ref()) {
                    write(&dir.join(file), value)?;
                }
            }
        }
    }
    if let Some(pids) = resources.pids() {
        let Some(dir) = group.v1_dir("pids").or_else(|| v2(group, "pids")) else {
            return Err(missing("pids"));
        };
        // None at all would not even let the container's own process in.
        let text = match pids.limit() {
            0 => "1".to_owned(),
            limit if limit > 0 => limit.to_string(),
            _ => "max".to_owned(),
        };
        write(&dir.join("pids.max"), &text)?;
    }
    if let Some(block) = resources.block_io() {
        match (group.v1_dir("blkio"), v2(group, "io")) {
            (Some(dir), _) => block_v1(dir, block)?,
            (None, Some(dir)) => block_v2(dir, block)?,
            (None, None) => {}
        }
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        if limit.page_size().contains('/') {
            return Err(Error::invalid(format!("huge page size {:?}", limit.page_size())));
        }
        let (dir, file) = match (group.v1_dir("hugetlb"), v2(group, "hugetlb")) {
            (Some(dir), _) => (dir, format!("hugetlb.{}.limit_in_bytes", limit.page_size())),
            (None, Some(dir)) => (dir, format!("hugetlb.{}.max", limit.page_size())),
            (None, None) => return Err(missing("hugetlb")),
        };
        write(&dir.join(file), &limit.limit().to_string())?;
    }
    if let Some(network) = resources.network() {
        if let Some(id) = network.class_id().filter(|&id| id != 0) {
            let dir = group.v1_dir("net_cls").ok_or_else(|| missing("net_cls"))?;
            write(&dir.join("net_cls.classid"), &id.to_string())?;
        }
        for priority in network.priorities().iter().flatten() {
            let dir = group.v1_dir("net_prio").ok_or_else(|| missing("net_prio"))?;
            write(&dir.join("net_prio.ifpriomap"), &format!("{} {}", priority.name(), priority.priority()))?;
        }
    }
    for (device, limit) in resources.rdma().iter().flatten() {
        let dir = group.v1_dir("rdma").or_else(|| v2(group, "rdma")).ok_or_else(|| missing("rdma"))?;
        let mut line = device.clone();
        if let Some(n) = limit.hca_handles() {
            line = format!("{line} hca_handle={n}");
        }
        if let Some(n) = limit.hca_objects() {
            line = format!("{line} hca_object={n}");
        }
        write(&dir.join("rdma.max"), &line)?;
    }
    if let Some(unified) = resources.unified().as_ref().filter(|u| !u.is_empty()) {
        let dir = group.v2_dir().filter(|_| group.is_unified()).ok_or_else(|| {
            Error::unsupported(
                "invalid configuration: \"unified\" resources are given, but cgroup v2 is not in use here",
            )
        })?;
        for (file, value) in unified {
            if file.contains('/') || file == "cgroup.procs" {
                return Err(Error::invalid(format!("unified resource {file:?} is not a limit's file")));
            }
            write(&dir.join(file), value)?;
        }
    }
    Ok(())
}

/// The unified directory, if that controller was handed down to it.
fn v2<'a>(group: &'a Cgroup, controller: &str) -> Option<&'a Path> {
    let probe = match controller {
        "memory" => "memory.max",
        "cpu" => "cpu.max",
        "cpuset" => "cpuset.cpus",
        "pids" => "pids.max",
        "io" => "io.max",
        "rdma" => "rdma.max",
        _ => "cgroup.procs",
    };
    group.v2_dir().filter(|dir| dir.join(probe).exists())
}

fn missing(controller: &str) -> Error {
    Error::unsupported(format!(
        "a {controller} limit is given, but the {controller} cgroup controller is not available"
    ))
}

fn limit_text(value: i64, none: &str) -> String {
    if value == -1 { none.to_owned() } else { value.to_string() }
}

fn memory_v1(dir: &Path, memory: &LinuxMemory) -> Result<(), Error> {
    let limit_file = dir.join("memory.limit_in_bytes");
    let swap_file = dir.join("memory.memsw.limit_in_bytes");
    let limit = memory.limit().filter(|&l| l != 0);
    // No limit on memory means none on memory and swap together, unless said otherwise.
    let swap = memory.swap().filter(|&s| s != 0).or_else(|| (limit == Some(-1)).then_some(-1));
    let swap = swap.filter(|&s| s != -1 || swap_file.exists());
    let write_limit = || limit.map_or(Ok(()), |l| write(&limit_file, &l.to_string()));
    let write_swap = || swap.map_or(Ok(()), |s| write(&swap_file, &s.to_string()));
    // The kernel keeps memory <= memory+swap at every step: grow the sum first, shrink it last.
    let grows = match swap {
        Some(-1) => true,
        Some(s) => read(&limit_file)?.trim().parse::<u64>().is_ok_and(|now| now < s.unsigned_abs()),
        None => false,
    };
    if grows {
        write_swap()?;
        write_limit()?;
    } else {
        write_limit()?;
        write_swap()?;
    }
    if let Some(n) = memory.reservation().filter(|&n| n != 0) {
        write(&dir.join("memory.soft_limit_in_bytes"), &n.to_string())?;
    }
    if let Some(n) = memory.kernel_tcp().filter(|&n| n != 0) {
        write(&dir.join("memory.kmem.tcp.limit_in_bytes"), &n.to_string())?;
    }
    if memory.disable_oom_killer() == Some(true) {
        write(&dir.join("memory.oom_control"), "1")?;
    }
    match memory.swappiness() {
        None | Some(u64::MAX) => {}
        Some(n) if n <= 100 => write(&dir.join("memory.swappiness"), &n.to_string())?,
        Some(n) => return Err(Error::invalid(format!("swappiness {n} is not between 0 and 100"))),
    }
    Ok(())
}

fn memory_v2(dir: &Path, memory: &LinuxMemory) -> Result<(), Error> {
    let limit = memory.limit().filter(|&l| l != 0);
    if let Some(swap) = memory.swap().filter(|&s| s != 0) {
        let text = match (swap, limit) {
            (-1, _) => "max".to_owned(),
            (_, None | Some(-1)) => {
                return Err(Error::invalid("a limit on memory and swap needs one on memory"));
            }
            (sum, Some(limit)) if sum < limit => {
                return Err(Error::invalid(format!(
                    "memory and swap together ({sum}) are less than memory ({limit})"
                )));
            }
            (sum, Some(limit)) => (sum - limit).to_string(),
        };
        let file = dir.join("memory.swap.max");
        if file.exists() || text != "0" && text != "max" {
            write(&file, &text)?;
        }
    }
    if let Some(limit) = limit {
        write(&dir.join("memory.max"), &limit_text(limit, "max"))?;
    }
    if let Some(n) = memory.reservation().filter(|&n| n != 0) {
        write(&dir.join("memory.low"), &limit_text(n, "max"))?;
    }
    Ok(())
}

fn cpu_v1(dir: &Path, cpu: &LinuxCpu) -> Result<(), Error> {
    if let Some(n) = cpu.shares().filter(|&n| n != 0) {
        write(&dir.join("cpu.shares"), &n.to_string())?;
    }
    let period = cpu.period().filter(|&n| n != 0);
    let quota = cpu.quota().filter(|&n| n != 0);
    let write_period = || period.map_or(Ok(()), |n| write(&dir.join("cpu.cfs_period_us"), &n.to_string()));
    // A new period may be refused while the old quota stands; then the quota goes first.
    let period_later = write_period().is_err();
    if let Some(n) = quota {
        write(&dir.join("cpu.cfs_quota_us"), &n.to_string())?;
    }
    if period_later {
        write_period()?;
    }
    if let Some(n) = cpu.burst() {
        write(&dir.join("cpu.cfs_burst_us"), &n.to_string())?;
    }
    if let Some(n) = cpu.realtime_period().filter(|&n| n != 0) {
        write(&dir.join("cpu.rt_period_us"), &n.to_string())?;
    }
    if let Some(n) = cpu.realtime_runtime().filter(|&n| n != 0) {
        write(&dir.join("cpu.rt_runtime_us"), &n.to_string())?;
    }
    if let Some(n) = cpu.idle() {
        write(&dir.join("cpu.idle"), &n.to_string())?;
    }
    Ok(())
}

/// v1 shares (2 to 262144) on v2's scale of weights (1 to 10000), as runc and systemd convert.
pub(super) fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// 10..1000 on v1's scale is 1..10000 on v2's.
pub(super) fn weight_of_block(weight: u16) -> u64 {
    1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990
}

fn cpu_v2(dir: &Path, cpu: &LinuxCpu) -> Result<(), Error> {
    if let Some(n) = cpu.idle() {
        write(&dir.join("cpu.idle"), &n.to_string())?;
    }
    if let Some(n) = cpu.shares().filter(|&n| n != 0) {
        write(&dir.join("cpu.weight"), &weight_of_shares(n).to_string())?;
    }
    let quota = cpu.quota().filter(|&n| n != 0);
    let period = cpu.period().filter(|&n| n != 0);
    if quota.is_some() || period.is_some() {
        let mut text = match quota {
            Some(n) if n > 0 => n.to_string(),
            Some(_) => "max".to_owned(),
            // Only the period changes: keep the quota that is there.
            None => read(&dir.join("cpu.max"))?.split(' ').next().unwrap_or("max").to_owned(),
        };
        if let Some(period) = period {
            text = format!("{text} {period}");
        }
        write(&dir.join("cpu.max"), &text)?;
    }
    if let Some(n) = cpu.burst() {
        write(&dir.join("cpu.max.burst"), &n.to_string())?;
    }
    Ok(())
}

fn first_existing(dir: &Path, files: [&str; 2]) -> std::path::PathBuf {
    let [first, second] = files.map(|file| dir.join(file));
    if !first.exists() && second.exists() { second } else { first }
}

fn block_v1(dir: &Path, block: &LinuxBlockIo) -> Result<(), Error> {
    if let Some(weight) = block.weight().filter(|&w| w != 0) {
        write(&first_existing(dir, ["blkio.weight", "blkio.bfq.weight"]), &weight.to_string())?;
    }
    if let Some(weight) = block.leaf_weight().filter(|&w| w != 0) {
        write(&dir.join("blkio.leaf_weight"), &weight.to_string())?;
    }
    for device in block.weight_device().iter().flatten() {
        if let Some(weight) = device.weight().filter(|&w| w != 0) {
            let file = first_existing(dir, ["blkio.weight_device", "blkio.bfq.weight_device"]);
            write(&file, &format!("{}:{} {weight}", device.major(), device.minor()))?;
        }
    }
    let lists = [
        ("blkio.throttle.read_bps_device", block.throttle_read_bps_device()),
        ("blkio.throttle.write_bps_device", block.throttle_write_bps_device()),
        ("blkio.throttle.read_iops_device", block.throttle_read_iops_device()),
        ("blkio.throttle.write_iops_device", block.throttle_write_iops_device()),
    ];
    for (file, list) in lists {
        for device in list.iter().flatten() {
            write(&dir.join(file), &format!("{}:{} {}", device.major(), device.minor(), device.rate()))?;
        }
    }
    Ok(())
}

fn block_v2(dir: &Path, block: &LinuxBlockIo) -> Result<(), Error> {
    if let Some(weight) = block.weight().filter(|&w| w != 0) {
        let bfq = dir.join("io.bfq.weight");
        if bfq.exists() {
            write(&bfq, &weight.to_string())?;
        } else {
            write(&dir.join("io.weight"), &weight_of_block(weight).to_string())?;
        }
    }
    let lists = [
        ("rbps", block.throttle_read_bps_device()),
        ("wbps", block.throttle_write_bps_device()),
        ("riops", block.throttle_read_iops_device()),
        ("wiops", block.throttle_write_iops_device()),
    ];
    for (key, list) in lists {
        for device in list.iter().flatten() {
            let rate = match device.rate() {
                0 => "max".to_owned(),
                rate => rate.to_string(),
            };
            write(&dir.join("io.max"), &format!("{}:{} {key}={rate}", device.major(), device.minor()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn weights_keep_their_order_and_their_range(a in any::<u64>(), b in any::<u64>(), c: u16, d: u16) {
            let (low, high) = (weight_of_shares(a.min(b)), weight_of_shares(a.max(b)));
            prop_assert!((1..=10_000).contains(&low) && low <= high && high <= 10_000);
            let (low, high) = (weight_of_block(c.min(d)), weight_of_block(c.max(d)));
            prop_assert!((1..=10_000).contains(&low) && low <= high && high <= 10_000);
        }
    }

    #[test]
    fn shares_map_onto_weights() {
        assert_eq!(weight_of_shares(2), 1);
        assert_eq!(weight_of_shares(1024), 39);
        assert_eq!(weight_of_shares(262_144), 10_000);
        assert_eq!(weight_of_shares(u64::MAX), 10_000);
    }
}
