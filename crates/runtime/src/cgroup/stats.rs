//! What a group has used: everything docker's stats answer needs, from v1 or v2 files.

use std::collections::BTreeMap;

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Cgroup;
use crate::error::{Error, Kind};

/// One reading of a group. What a hierarchy does not tell is zero, empty or `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    /// True if read from the unified hierarchy (some of docker's fields depend on it).
    pub unified: bool,
    pub cpu: CpuStats,
    pub memory: MemoryStats,
    pub pids: PidsStats,
    pub blkio: BlkioStats,
    /// Page size (`2MB`) → use.
    pub hugetlb: BTreeMap<String, HugetlbStats>,
}

/// Times in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuStats {
    pub total: u64,
    pub user: u64,
    pub system: u64,
    /// v1 only.
    pub per_cpu: Vec<u64>,
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_time: u64,
    pub pressure: Option<PressureStats>,
}

/// Bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryStats {
    pub usage: u64,
    /// v1: `max_usage_in_bytes`; v2: `memory.peak` where the kernel has it.
    pub max_usage: u64,
    /// `u64::MAX` where there is none.
    pub limit: u64,
    pub fail_count: u64,
    pub swap_usage: u64,
    pub swap_limit: u64,
    /// The kernel's own `memory.stat`, unchanged.
    pub stat: BTreeMap<String, u64>,
    pub oom_kills: u64,
    pub pressure: Option<PressureStats>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PidsStats {
    pub current: u64,
    /// `None`: no limit.
    pub limit: Option<u64>,
}

/// One number about one device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BlkioEntry {
    pub major: u64,
    pub minor: u64,
    /// `Read`, `Write`, `Sync`, `Async`, `Discard`, `Total` (v1); `read`, `write` (v2).
    pub op: String,
    pub value: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BlkioStats {
    pub service_bytes: Vec<BlkioEntry>,
    pub serviced: Vec<BlkioEntry>,
    pub pressure: Option<PressureStats>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HugetlbStats {
    pub usage: u64,
    pub max_usage: u64,
    pub fail_count: u64,
}

/// Totals in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PressureStats {
    pub some_total: u64,
    pub full_total: u64,
}

/// Reads everything that is there; files a kernel does not have are skipped.
pub(super) fn read(group: &Cgroup) -> Result<Stats, Error> {
    if !group.exists() {
        return Err(Error::new(Kind::State, format!("cgroup {:?} does not exist", group.path())));
    }
    let mut stats = Stats { unified: group.is_unified(), ..Stats::default() };
    if stats.unified {
        if let Some(dir) = group.v2_dir() {
            read_v2(dir, &mut stats);
        }
    } else {
        read_v1(group, &mut stats);
    }
    Ok(stats)
}

fn text(dir: &Path, file: &str) -> Option<String> {
    std::fs::read_to_string(dir.join(file)).ok()
}

/// A single number; `max` is `u64::MAX`.
fn number(dir: &Path, file: &str) -> Option<u64> {
    let text = text(dir, file)?;
    match text.trim() {
        "max" => Some(u64::MAX),
        n => n.parse().ok(),
    }
}

/// Lines of `key value`.
pub(super) fn keyed(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

fn pressure(dir: &Path, file: &str) -> Option<PressureStats> {
    let text = text(dir, file)?;
    let mut stats = PressureStats::default();
    for line in text.lines() {
        let total = line.split(' ').find_map(|f| f.strip_prefix("total="))?.parse().ok()?;
        if line.starts_with("some") {
            stats.some_total = total;
        } else {
            stats.full_total = total;
        }
    }
    Some(stats)
}

fn read_v1(group: &Cgroup, stats: &mut Stats) {
    if let Some(dir) = group.v1_dir("cpuacct") {
        stats.cpu.total = number(dir, "cpuacct.usage").unwrap_or_default();
        stats.cpu.user = number(dir, "cpuacct.usage_user").unwrap_or_default();
        stats.cpu.system = number(dir, "cpuacct.usage_sys").unwrap_or_default();
        stats.cpu.per_cpu = text(dir, "cpuacct.usage_percpu")
            .map(|t| t.split_whitespace().filter_map(|n| n.parse().ok()).collect())
            .unwrap_or_default();
    }
    if let Some(dir) = group.v1_dir("cpu") {
        let all = keyed(&text(dir, "cpu.stat").unwrap_or_default());
        let get = |key: &str| all.get(key).copied().unwrap_or_default();
        stats.cpu.periods = get("nr_periods");
        stats.cpu.throttled_periods = get("nr_throttled");
        stats.cpu.throttled_time = get("throttled_time");
    }
    if let Some(dir) = group.v1_dir("memory") {
        let memory = &mut stats.memory;
        let get = |file: &str| number(dir, file).unwrap_or_default();
        memory.usage = get("memory.usage_in_bytes");
        memory.max_usage = get("memory.max_usage_in_bytes");
        memory.limit = unlimited(get("memory.limit_in_bytes"));
        memory.fail_count = get("memory.failcnt");
        memory.swap_usage = get("memory.memsw.usage_in_bytes").saturating_sub(memory.usage);
        memory.swap_limit = unlimited(number(dir, "memory.memsw.limit_in_bytes").unwrap_or(u64::MAX));
        memory.stat = keyed(&text(dir, "memory.stat").unwrap_or_default());
        let control = keyed(&text(dir, "memory.oom_control").unwrap_or_default());
        memory.oom_kills = control.get("oom_kill").copied().unwrap_or_default();
    }
    if let Some(dir) = group.v1_dir("pids") {
        read_pids(dir, stats);
    }
    if let Some(dir) = group.v1_dir("blkio") {
        let list = |recursive: &str, own: &str| {
            let text = text(dir, recursive).or_else(|| text(dir, own)).unwrap_or_default();
            text.lines().filter_map(blkio_v1_line).collect::<Vec<_>>()
        };
        stats.blkio.service_bytes =
            list("blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_service_bytes");
        stats.blkio.serviced = list("blkio.throttle.io_serviced_recursive", "blkio.throttle.io_serviced");
    }
    if let Some(dir) = group.v1_dir("hugetlb") {
        read_hugetlb(dir, stats, "usage_in_bytes", "max_usage_in_bytes");
    } else if let Some(dir) = group.v2_dir() {
        read_hugetlb(dir, stats, "current", "");
    }
}

/// v1 writes "no limit" as the largest number of whole pages.
fn unlimited(limit: u64) -> u64 {
    if limit >= 0x7fff_ffff_ffff_0000 { u64::MAX } else { limit }
}

fn read_v2(dir: &Path, stats: &mut Stats) {
    let cpu = keyed(&text(dir, "cpu.stat").unwrap_or_default());
    let get = |key: &str| cpu.get(key).copied().unwrap_or_default();
    stats.cpu.total = get("usage_usec") * 1000;
    stats.cpu.user = get("user_usec") * 1000;
    stats.cpu.system = get("system_usec") * 1000;
    stats.cpu.periods = get("nr_periods");
    stats.cpu.throttled_periods = get("nr_throttled");
    stats.cpu.throttled_time = get("throttled_usec") * 1000;
    stats.cpu.pressure = pressure(dir, "cpu.pressure");

    let memory = &mut stats.memory;
    memory.usage = number(dir, "memory.current").unwrap_or_default();
    memory.max_usage = number(dir, "memory.peak").unwrap_or_default();
    memory.limit = number(dir, "memory.max").unwrap_or(u64::MAX);
    memory.swap_usage = number(dir, "memory.swap.current").unwrap_or_default();
    memory.swap_limit = number(dir, "memory.swap.max").unwrap_or(u64::MAX);
    memory.stat = keyed(&text(dir, "memory.stat").unwrap_or_default());
    let events = keyed(&text(dir, "memory.events").unwrap_or_default());
    memory.fail_count = events.get("max").copied().unwrap_or_default();
    memory.oom_kills = events.get("oom_kill").copied().unwrap_or_default();
    memory.pressure = pressure(dir, "memory.pressure");

    read_pids(dir, stats);
    for line in text(dir, "io.stat").unwrap_or_default().lines() {
        let mut fields = line.split(' ');
        let Some((major, minor)) = fields.next().and_then(device) else { continue };
        for field in fields {
            let Some((key, value)) = field.split_once('=') else { continue };
            let Ok(value) = value.parse() else { continue };
            let entry = |op: &str| BlkioEntry { major, minor, op: op.to_owned(), value };
            match key {
                "rbytes" => stats.blkio.service_bytes.push(entry("read")),
                "wbytes" => stats.blkio.service_bytes.push(entry("write")),
                "rios" => stats.blkio.serviced.push(entry("read")),
                "wios" => stats.blkio.serviced.push(entry("write")),
                _ => {}
            }
        }
    }
    stats.blkio.pressure = pressure(dir, "io.pressure");
    read_hugetlb(dir, stats, "current", "");
}

fn read_pids(dir: &Path, stats: &mut Stats) {
    stats.pids.current = number(dir, "pids.current").unwrap_or_default();
    stats.pids.limit = number(dir, "pids.max").filter(|&n| n != u64::MAX);
}

fn read_hugetlb(dir: &Path, stats: &mut Stats, usage: &str, peak: &str) {
    // Page sizes are the same for all groups; they are the kernel's directories.
    for size in hugepage_sizes() {
        let Some(current) = number(dir, &format!("hugetlb.{size}.{usage}")) else { continue };
        let max_usage = if peak.is_empty() { None } else { number(dir, &format!("hugetlb.{size}.{peak}")) };
        let fail_count = number(dir, &format!("hugetlb.{size}.failcnt")).unwrap_or_default();
        let entry = HugetlbStats { usage: current, max_usage: max_usage.unwrap_or_default(), fail_count };
        stats.hugetlb.insert(size.clone(), entry);
    }
}

fn hugepage_sizes() -> &'static [String] {
    static SIZES: std::sync::OnceLock<Vec<String>> = std::sync::OnceLock::new();
    SIZES.get_or_init(|| {
        let Ok(entries) = std::fs::read_dir("/sys/kernel/mm/hugepages") else { return Vec::new() };
        let name = |kib: u64| match kib {
            kib if kib >= 1 << 20 => format!("{}GB", kib >> 20),
            kib if kib >= 1 << 10 => format!("{}MB", kib >> 10),
            kib => format!("{kib}KB"),
        };
        entries
            .flatten()
            .filter_map(|e| {
                let file = e.file_name();
                let kib = file.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
                Some(name(kib))
            })
            .collect()
    })
}

fn device(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn blkio_v1_line(line: &str) -> Option<BlkioEntry> {
    let mut fields = line.split(' ');
    let (major, minor) = device(fields.next()?)?;
    let op = fields.next()?.to_owned();
    Some(BlkioEntry { major, minor, op, value: fields.next()?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_tables_are_read() {
        assert_eq!(keyed("a 1\nbad\nb 2\n").len(), 2);
        let entry = blkio_v1_line("8:0 Read 4096").unwrap();
        assert_eq!((entry.major, entry.op.as_str(), entry.value), (8, "Read", 4096));
        assert!(blkio_v1_line("Total 0").is_none());
    }
}
