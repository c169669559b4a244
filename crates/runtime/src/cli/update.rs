//! `update`: new limits for a container, kept in its record.

use std::fs;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::options::Options;
use super::record::Status;
use super::{Global, commands};
use crate::error::Error;
use crate::spec::LinuxResources;

/// More than any description of limits needs.
const LARGEST: u64 = 1 << 20;

pub(super) fn run(global: &Global, options: &Options) -> Result<(), Error> {
    let (dir, mut record) = commands::open(global, options.id()?)?;
    let _lock = dir.lock()?;
    commands::need(&record, &dir, &[Status::Created, Status::Running, Status::Paused], "updated")?;
    let schemata = ["l3-cache-schema", "mem-bw-schema"].map(|flag| options.text(flag).map(str::to_owned));
    let schemata: Vec<String> = schemata.into_iter().flatten().collect();
    if !schemata.is_empty() {
        record.cgroup.reclassify(&schemata)?;
    }
    let changes = match options.path("resources") {
        Some(file) => from_file(&file)?,
        None => from_flags(options)?,
    };
    let what = "the new limits";
    let parse = |value: Value| -> Result<LinuxResources, Error> {
        serde_json::from_value(value).map_err(|e| Error::invalid(format!("{what}: {e}")))
    };
    let wanted = parse(changes.clone())?;
    record.cgroup.extend(&wanted)?;
    dir.save(&record)?;
    record.cgroup.update(&wanted)?;
    let Some(linux) = std::sync::Arc::make_mut(&mut record.spec).linux_mut() else { return Ok(()) };
    let mut all = serde_json::to_value(linux.resources()).unwrap_or_default();
    merge(&mut all, changes);
    linux.set_resources(Some(parse(all)?));
    dir.save(&record)
}

fn from_file(file: &Path) -> Result<Value, Error> {
    let what = || format!("reading {}", file.display());
    let mut bytes = Vec::new();
    if file == Path::new("-") {
        std::io::stdin().take(LARGEST).read_to_end(&mut bytes).map_err(|e| Error::os(what(), e))?;
    } else {
        let opened = fs::File::open(file).map_err(|e| Error::os(what(), e))?;
        opened.take(LARGEST).read_to_end(&mut bytes).map_err(|e| Error::os(what(), e))?;
    }
    serde_json::from_slice(&bytes).map_err(|e| Error::invalid(format!("{}: {e}", what())))
}

fn from_flags(options: &Options) -> Result<Value, Error> {
    let (mut memory, mut cpu) = (Map::new(), Map::new());
    for (flag, field) in [
        ("memory", "limit"),
        ("memory-reservation", "reservation"),
        ("memory-swap", "swap"),
        ("kernel-memory-tcp", "kernelTCP"),
    ] {
        if let Some(bytes) = options.bytes(flag)? {
            memory.insert(field.to_owned(), bytes.into());
        }
    }
    // Kernels have not had it since 5.4; runc takes it and does nothing as well.
    options.bytes("kernel-memory")?;
    for (flag, field) in [
        ("cpu-period", "period"),
        ("cpu-quota", "quota"),
        ("cpu-burst", "burst"),
        ("cpu-share", "shares"),
        ("cpu-rt-period", "realtimePeriod"),
        ("cpu-rt-runtime", "realtimeRuntime"),
        ("cpu-idle", "idle"),
    ] {
        if let Some(number) = options.number::<i64>(flag)? {
            cpu.insert(field.to_owned(), number.into());
        }
    }
    for (flag, field) in [("cpuset-cpus", "cpus"), ("cpuset-mems", "mems")] {
        if let Some(list) = options.text(flag) {
            cpu.insert(field.to_owned(), list.into());
        }
    }
    let mut all = Map::new();
    for (name, fields) in [("memory", memory), ("cpu", cpu)] {
        if !fields.is_empty() {
            all.insert(name.to_owned(), fields.into());
        }
    }
    if let Some(limit) = options.number::<i64>("pids-limit")? {
        all.insert("pids".to_owned(), json!({"limit": limit}));
    }
    if let Some(weight) = options.number::<u16>("blkio-weight")? {
        all.insert("blockIO".to_owned(), json!({"weight": weight}));
    }
    Ok(all.into())
}

/// What `changes` names replaces what is there.
fn merge(into: &mut Value, changes: Value) {
    match (into, changes) {
        (Value::Object(fields), Value::Object(changes)) => {
            for (name, value) in changes {
                merge(fields.entry(name).or_insert(Value::Null), value);
            }
        }
        (slot, value) => *slot = value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_merged_by_name() {
        let mut all = json!({"memory": {"limit": 1, "swap": 2}, "pids": {"limit": 3}});
        merge(&mut all, json!({"memory": {"limit": 5}, "cpu": {"shares": 9}}));
        assert_eq!(
            all,
            json!({"memory": {"limit": 5, "swap": 2}, "pids": {"limit": 3}, "cpu": {"shares": 9}})
        );
    }
}
