//! Limits and annotations as properties of units (systemd.resource-control(5)).

use super::bus::Value;
use crate::cgroup::limits::{weight_of_block, weight_of_shares};
use crate::error::Error;
use crate::spec::LinuxResources;

type Property = (String, Value);

fn number(name: &str, value: u64) -> Property {
    (name.to_owned(), Value::U64(value))
}

/// -1 is no limit.
fn limit(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// What systemd itself would otherwise undo when it reloads. Device rules are not among it.
pub(super) fn of_resources(resources: &LinuxResources, unified: bool) -> Result<Vec<Property>, Error> {
    let mut all = Vec::new();
    if let Some(memory) = resources.memory() {
        if let Some(n) = memory.limit().filter(|&n| n != 0) {
            all.push(number(if unified { "MemoryMax" } else { "MemoryLimit" }, limit(n)));
        }
        if let Some(n) = memory.reservation().filter(|&n| n != 0 && unified) {
            all.push(number("MemoryLow", limit(n)));
        }
        if let (Some(sum), Some(memory)) = (memory.swap().filter(|&n| n != 0 && unified), memory.limit()) {
            let swap = if sum == -1 { u64::MAX } else { limit((sum - memory).max(0)) };
            all.push(number("MemorySwapMax", swap));
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(n) = cpu.shares().filter(|&n| n != 0) {
            all.push(if unified { number("CPUWeight", weight_of_shares(n)) } else { number("CPUShares", n) });
        }
        let period = cpu.period().filter(|&n| n != 0);
        if let Some(n) = period {
            all.push(number("CPUQuotaPeriodUSec", n));
        }
        if let Some(quota) = cpu.quota().filter(|&n| n != 0) {
            // Per second, and in whole hundredths, as systemd counts.
            let per_second = match u64::try_from(quota) {
                Ok(quota) => (quota * 1_000_000 / period.unwrap_or(100_000)).next_multiple_of(10_000),
                Err(_) => u64::MAX,
            };
            all.push(number("CPUQuotaPerSecUSec", per_second));
        }
        for (name, list) in [("AllowedCPUs", cpu.cpus()), ("AllowedMemoryNodes", cpu.mems())] {
            let Some(list) = list.as_deref().filter(|l| !l.is_empty() && unified) else { continue };
            let words = crate::identity::bit_list(list, name)?;
            let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            while bytes.last() == Some(&0) {
                bytes.pop();
            }
            all.push((name.to_owned(), Value::Bytes(bytes)));
        }
    }
    if let Some(n) = resources.pids().as_ref().map(crate::spec::LinuxPids::limit) {
        // Zero means one: the first process is in it.
        all.push(number("TasksMax", if n == 0 { 1 } else { limit(n) }));
    }
    if let Some(weight) = resources.block_io().as_ref().and_then(crate::spec::LinuxBlockIo::weight)
        && weight != 0
    {
        all.push(if unified {
            number("IOWeight", weight_of_block(weight))
        } else {
            number("BlockIOWeight", weight.into())
        });
    }
    Ok(all)
}

/// A property from an annotation, its value written as `busctl` and runc take it: `'text'`, `true`,
/// `uint64 5`. Seconds become microseconds (`TimeoutStopSec` is `TimeoutStopUSec` on the bus).
pub(super) fn of_annotation(name: &str, value: &str) -> Result<Property, Error> {
    let wrong =
        || Error::invalid(format!("annotation org.systemd.property.{name}: {value:?} is not understood"));
    let letters = name.chars().all(|c| c.is_ascii_alphanumeric());
    if name.len() < 3 || !letters || !name.starts_with(|c: char| c.is_ascii_uppercase()) {
        return Err(Error::invalid(format!(
            "annotation org.systemd.property.{name}: not the name of a property"
        )));
    }
    let value = value.trim();
    let parsed = if let Some(text) = ['\'', '"'].iter().find_map(|q| value.strip_prefix(*q)?.strip_suffix(*q))
    {
        Value::Text(text.to_owned())
    } else if let Ok(yes) = value.parse() {
        Value::Bool(yes)
    } else {
        let (kind, number) = value.split_once(' ').unwrap_or(("int32", value));
        let number = number.trim();
        match kind {
            "int32" => Value::I32(number.parse().map_err(|_unused| wrong())?),
            "int64" => Value::I64(number.parse().map_err(|_unused| wrong())?),
            "uint32" => Value::U32(number.parse().map_err(|_unused| wrong())?),
            "uint64" => Value::U64(number.parse().map_err(|_unused| wrong())?),
            _ => return Err(wrong()),
        }
    };
    match name.strip_suffix("Sec").filter(|stem| !stem.ends_with('U')) {
        Some(stem) => {
            let seconds = match parsed {
                Value::I32(n) => u64::try_from(n).ok(),
                Value::I64(n) => u64::try_from(n).ok(),
                Value::U32(n) => Some(n.into()),
                Value::U64(n) => Some(n),
                _ => None,
            };
            let micro = seconds.and_then(|s| s.checked_mul(1_000_000)).ok_or_else(wrong)?;
            Ok((format!("{stem}USec"), Value::U64(micro)))
        }
        None => Ok((name.to_owned(), parsed)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_properties() {
        let resources: LinuxResources = serde_json::from_value(serde_json::json!({
            "memory": {"limit": 1024, "swap": 4096}, "pids": {"limit": -1},
            "cpu": {"quota": 25000, "period": 50000, "shares": 1024, "cpus": "0,9"},
        }))
        .unwrap();
        let all = of_resources(&resources, true).unwrap();
        let find = |name: &str| all.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
        assert_eq!(find("MemoryMax"), Some(Value::U64(1024)));
        assert_eq!(find("MemorySwapMax"), Some(Value::U64(3072)));
        assert_eq!(find("TasksMax"), Some(Value::U64(u64::MAX)));
        assert_eq!(find("CPUQuotaPerSecUSec"), Some(Value::U64(500_000)));
        assert_eq!(find("AllowedCPUs"), Some(Value::Bytes(vec![1, 2])));
        let all = of_resources(&resources, false).unwrap();
        assert!(all.contains(&number("MemoryLimit", 1024)) && all.contains(&number("CPUShares", 1024)));
    }

    #[test]
    fn annotations_become_properties() {
        let p = |n: &str, v: &str| of_annotation(n, v).unwrap();
        assert_eq!(p("CollectMode", "'inactive-or-failed'").1, Value::Text("inactive-or-failed".into()));
        assert_eq!(p("TimeoutStopSec", "5"), number("TimeoutStopUSec", 5_000_000));
        assert_eq!(p("TimeoutStopUSec", "uint64 7"), number("TimeoutStopUSec", 7));
        assert_eq!(p("SendSIGHUP", "true").1, Value::Bool(true));
        for (name, value) in [("x", "1"), ("Bad-Name", "1"), ("CPUWeight", "[1]"), ("CPUWeight", "uint64 x")]
        {
            assert!(of_annotation(name, value).is_err());
        }
    }
}
