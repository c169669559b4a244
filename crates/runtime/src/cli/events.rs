//! `events`: statistics in the form that runc prints, and notices of a lack of memory.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Serialize;
use serde_json::{Value, json};

use super::options::{Options, duration};
use super::record::Status;
use super::{Global, commands, print};
use crate::cgroup::{BlkioEntry, HugetlbStats, PressureStats, Stats};
use crate::error::Error;

/// In runc's order: there are readers that look at a line's beginning.
#[derive(Debug, Serialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
}

pub(super) fn run(global: &Global, options: &Options) -> Result<(), Error> {
    let (dir, record) = commands::open(global, options.id()?)?;
    let interval = options.text("interval").map_or(Ok(Duration::from_secs(5)), duration)?;
    commands::need(&record, &dir, &[Status::Created, Status::Running, Status::Paused], "watched")?;
    let event = |kind: &str, data: Option<Value>| {
        let line = serde_json::to_string(&Event { kind, id: &record.id, data });
        print(&line.map_err(|e| Error::os("writing JSON", std::io::Error::from(e)))?)
    };
    if options.has("stats") {
        return event("stats", Some(shown(&record.cgroup.stats()?)));
    }
    let failed = |e: rustix::io::Errno| Error::os("watching the container", e);
    let pid = Pid::from_raw(record.pid).ok_or_else(|| failed(rustix::io::Errno::SRCH))?;
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(failed)?;
    let watch = record.cgroup.oom_events()?;
    let mut kills = record.cgroup.oom_kills()?;
    let mut next = std::time::Instant::now() + interval;
    loop {
        let left = next.saturating_duration_since(std::time::Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut fds = vec![PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
        fds.extend(watch.as_ref().map(|w| PollFd::new(w, PollFlags::IN)));
        match poll(&mut fds, Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(failed(e)),
        }
        let ended = !fds[0].revents().is_empty();
        let noticed = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        if let (true, Some(watch)) = (noticed, &watch) {
            watch.clear();
        }
        let now = record.cgroup.oom_kills()?;
        for _ in kills..now {
            event("oom", None)?;
        }
        kills = kills.max(now);
        if ended || !record.alive() {
            return Ok(());
        }
        if std::time::Instant::now() >= next {
            next += interval;
            if record.cgroup.exists() {
                event("stats", Some(shown(&record.cgroup.stats()?)))?;
            }
        }
    }
}

/// As runc's `types.Stats` is written.
fn shown(stats: &Stats) -> Value {
    let memory = &stats.memory;
    let raw = |name: &str| memory.stat.get(name).copied().unwrap_or_default();
    let entries = |list: &[BlkioEntry]| {
        let one = |e: &BlkioEntry| json!({"major": e.major, "minor": e.minor, "op": e.op, "value": e.value});
        Value::from(list.iter().map(one).collect::<Vec<_>>())
    };
    let huge = |h: &HugetlbStats| json!({"usage": h.usage, "max": h.max_usage, "failcnt": h.fail_count});
    let mut shown = json!({
        "cpu": {
            "usage": {
                "total": stats.cpu.total,
                "percpu": stats.cpu.per_cpu,
                "kernel": stats.cpu.system,
                "user": stats.cpu.user,
            },
            "throttling": {
                "periods": stats.cpu.periods,
                "throttledPeriods": stats.cpu.throttled_periods,
                "throttledTime": stats.cpu.throttled_time,
            },
        },
        "memory": {
            "cache": if stats.unified { raw("file") } else { raw("cache") },
            "usage": {
                "limit": memory.limit,
                "usage": memory.usage,
                "max": memory.max_usage,
                "failcnt": memory.fail_count,
            },
            "swap": {
                "limit": memory.swap_limit,
                "usage": if stats.unified { memory.swap_usage } else { memory.usage + memory.swap_usage },
                "max": 0,
                "failcnt": 0,
            },
            "raw": memory.stat,
        },
        "pids": {"current": stats.pids.current, "limit": stats.pids.limit.unwrap_or_default()},
        "blkio": {
            "ioServiceBytesRecursive": entries(&stats.blkio.service_bytes),
            "ioServicedRecursive": entries(&stats.blkio.serviced),
        },
        "hugetlb": stats.hugetlb.iter().map(|(size, h)| (size.clone(), huge(h))).collect::<serde_json::Map<_, _>>(),
    });
    let psi = |p: &PressureStats| json!({"some": {"total": p.some_total}, "full": {"total": p.full_total}});
    for (part, pressure) in
        [("cpu", &stats.cpu.pressure), ("memory", &memory.pressure), ("blkio", &stats.blkio.pressure)]
    {
        if let (Some(pressure), Some(fields)) = (pressure, shown[part].as_object_mut()) {
            fields.insert("psi".to_owned(), psi(pressure));
        }
    }
    shown
}
