//! What a container uses, in docker's documents for either version of control groups.

use std::sync::Arc;

use brigantine_runtime::cgroup::Stats;
use serde_json::{Map, Value, json};

use super::{Container, Containers, Live};
use crate::clock::{ZERO_TIME, rfc3339_nano};
use crate::error::Context;
use crate::{Error, Result};

/// Samples of one container, a second apart.
#[derive(Debug)]
pub struct StatsStream {
    containers: Arc<Containers>,
    container: Arc<Container>,
    /// The last sample's time and CPU part.
    before: Option<(Value, Value)>,
    ticks: tokio::time::Interval,
}

impl Containers {
    /// Samples for as long as somebody takes them.
    pub fn stats(self: &Arc<Self>, reference: &str) -> Result<StatsStream> {
        let container = self.find(reference)?;
        let mut ticks = tokio::time::interval(std::time::Duration::from_secs(1));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        Ok(StatsStream { containers: Arc::clone(self), container, before: None, ticks })
    }

    /// One sample: at once, or with the CPU numbers of a second before beside it.
    pub async fn stats_once(self: &Arc<Self>, reference: &str, one_shot: bool) -> Result<Value> {
        let mut stream = self.stats(reference)?;
        let first = stream.next().await?;
        if one_shot || stream.container.live().is_none() {
            return Ok(first);
        }
        stream.next().await
    }
}

impl StatsStream {
    /// The next sample; for a container that does not run, one of nothing.
    pub async fn next(&mut self) -> Result<Value> {
        self.ticks.tick().await;
        if self.container.with(|inner| inner.removed) {
            return Err(Error::not_found(format!("No such container: {}", self.container.id)));
        }
        let name = format!("/{}", self.container.name());
        let mut document = match self.container.live() {
            Some(live) => match self.sample(&live).await {
                Ok(sample) => sample,
                Err(error) if self.container.live().is_some() => return Err(error),
                Err(_ended) => empty(),
            },
            None => empty(),
        };
        document["id"] = self.container.id.clone().into();
        document["name"] = name.into();
        let (read, cpu) = (document["read"].clone(), document["cpu_stats"].clone());
        if let Some((read, cpu)) = self.before.replace((read, cpu)) {
            document["preread"] = read;
            document["precpu_stats"] = cpu;
        }
        Ok(document)
    }

    async fn sample(&self, live: &Arc<Live>) -> Result<Value> {
        let what = || format!("measure container {}", self.container.id);
        let stats = live.ask(brigantine_shim::Client::stats).await.doing(what)?;
        let (plumbing, id) = (self.containers.networks.plumbing(), self.container.id.clone());
        let running = Arc::clone(live);
        let has_network = live.sandbox().attachment.is_some();
        let limit = self.container.with(|inner| inner.record.host_config.memory.unwrap_or_default());
        crate::blocking(move || {
            let counters = if has_network {
                plumbing.counters(&id, || super::plug::namespace(&running).ok())?
            } else {
                Vec::new()
            };
            let mut networks = Map::new();
            for (name, counters) in counters {
                networks.insert(
                    name,
                    json!({
                        "rx_bytes": counters.rx_bytes, "rx_packets": counters.rx_packets,
                        "rx_errors": counters.rx_errors, "rx_dropped": counters.rx_dropped,
                        "tx_bytes": counters.tx_bytes, "tx_packets": counters.tx_packets,
                        "tx_errors": counters.tx_errors, "tx_dropped": counters.tx_dropped,
                    }),
                );
            }
            let mut document = document(&stats, limit, &host());
            if has_network {
                document["networks"] = Value::Object(networks);
            }
            Ok(document)
        })
        .await
    }
}

/// The host's side of the numbers.
struct Host {
    cpu_nanoseconds: u64,
    online_cpus: usize,
    memory: u64,
}

fn host() -> Host {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    // Ticks of 1/100 s: user to steal, guest time is in user's already.
    let ticks: u64 = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .take(8)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    let online = stat.lines().skip(1).take_while(|line| line.starts_with("cpu")).count();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .unwrap_or_default();
    Host { cpu_nanoseconds: ticks * 10_000_000, online_cpus: online.max(1), memory: memory * 1024 }
}

fn document(stats: &Stats, limit: i64, host: &Host) -> Value {
    let cpu = &stats.cpu;
    let mut usage = json!({
        "total_usage": cpu.total, "usage_in_kernelmode": cpu.system, "usage_in_usermode": cpu.user,
    });
    if !stats.unified {
        usage["percpu_usage"] = json!(cpu.per_cpu);
    }
    let memory = &stats.memory;
    let configured = u64::try_from(limit).ok().filter(|limit| *limit > 0);
    let limit = configured.unwrap_or(memory.limit).min(host.memory);
    let mut memory_stats = json!({ "usage": memory.usage, "limit": limit, "stats": memory.stat });
    if !stats.unified {
        memory_stats["max_usage"] = memory.max_usage.into();
        if memory.fail_count > 0 {
            memory_stats["failcnt"] = memory.fail_count.into();
        }
    }
    let entries = |list: &[brigantine_runtime::cgroup::BlkioEntry]| -> Value {
        if list.is_empty() {
            return Value::Null;
        }
        list.iter()
            .map(|e| json!({ "major": e.major, "minor": e.minor, "op": e.op, "value": e.value }))
            .collect()
    };
    let mut pids = json!({ "current": stats.pids.current });
    pids["limit"] = stats.pids.limit.unwrap_or(u64::MAX).into();
    json!({
        "read": rfc3339_nano(jiff::Timestamp::now()),
        "preread": ZERO_TIME,
        "os_type": "linux",
        "pids_stats": pids,
        "blkio_stats": {
            "io_service_bytes_recursive": entries(&stats.blkio.service_bytes),
            "io_serviced_recursive": entries(&stats.blkio.serviced),
            "io_queue_recursive": null, "io_service_time_recursive": null, "io_wait_time_recursive": null,
            "io_merged_recursive": null, "io_time_recursive": null, "sectors_recursive": null,
        },
        "num_procs": 0,
        "storage_stats": {},
        "cpu_stats": {
            "cpu_usage": usage,
            "system_cpu_usage": host.cpu_nanoseconds,
            "online_cpus": host.online_cpus,
            "throttling_data": {
                "periods": cpu.periods, "throttled_periods": cpu.throttled_periods, "throttled_time": cpu.throttled_time,
            },
        },
        "precpu_stats": no_cpu(),
        "memory_stats": memory_stats,
    })
}

fn no_cpu() -> Value {
    json!({
        "cpu_usage": { "total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0 },
        "throttling_data": { "periods": 0, "throttled_periods": 0, "throttled_time": 0 },
    })
}

/// What docker answers about a container that does not run.
fn empty() -> Value {
    json!({
        "read": ZERO_TIME, "preread": ZERO_TIME, "os_type": "linux", "pids_stats": {},
        "blkio_stats": {
            "io_service_bytes_recursive": null, "io_serviced_recursive": null, "io_queue_recursive": null,
            "io_service_time_recursive": null, "io_wait_time_recursive": null, "io_merged_recursive": null,
            "io_time_recursive": null, "sectors_recursive": null,
        },
        "num_procs": 0, "storage_stats": {}, "cpu_stats": no_cpu(), "precpu_stats": no_cpu(), "memory_stats": {},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_the_hosts_memory_when_there_is_none() {
        let host = Host { cpu_nanoseconds: 5, online_cpus: 2, memory: 1000 };
        let mut stats = Stats { unified: true, ..Stats::default() };
        stats.memory.limit = u64::MAX;
        let sample = document(&stats, 0, &host);
        assert_eq!(sample["memory_stats"]["limit"], 1000);
        assert!(sample["cpu_stats"]["cpu_usage"].get("percpu_usage").is_none());
        assert_eq!(document(&stats, 500, &host)["memory_stats"]["limit"], 500);
    }
}
