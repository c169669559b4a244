//! What a group has used: everything docker's stats answer needs, from v1 or v2 files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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
