//! Where the hierarchies are mounted, and how a new group in them is made usable.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use super::{read, write};
use crate::error::Error;

/// The mounted hierarchies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchies {
    /// Controller (or `name=…` without the prefix) → mount point.
    pub v1: Vec<(String, PathBuf)>,
    pub v2: Option<PathBuf>,
    /// What the unified hierarchy's root has to give.
    pub v2_controllers: Vec<String>,
}

impl Hierarchies {
    /// Read once: hierarchies do not move while a process lives.
    pub fn get() -> Result<&'static Self, Error> {
        static FOUND: OnceLock<Hierarchies> = OnceLock::new();
        static READING: Mutex<()> = Mutex::new(());
        if let Some(found) = FOUND.get() {
            return Ok(found);
        }
        // Whoever comes meanwhile waits. There is nothing behind the lock that a panic could have left half done.
        let _reading = READING.lock();
        if let Some(found) = FOUND.get() {
            return Ok(found);
        }
        let table = read(Path::new("/proc/self/mountinfo"))?;
        let mut found = parse(&table);
        if let Some(mount) = &found.v2 {
            let names = read(&mount.join("cgroup.controllers"))?;
            found.v2_controllers = names.split_whitespace().map(str::to_owned).collect();
        }
        Ok(FOUND.get_or_init(|| found))
    }
}

/// Reads a mountinfo table. The first mount of each hierarchy counts.
fn parse(table: &str) -> Hierarchies {
    let mut found = Hierarchies { v1: Vec::new(), v2: None, v2_controllers: Vec::new() };
    for line in table.lines() {
        let Some((mount, super_block)) = line.split_once(" - ") else { continue };
        let Some(point) = mount.split(' ').nth(4) else { continue };
        let point = unescaped(point);
        let mut fields = super_block.split(' ');
        match fields.next() {
            Some("cgroup2") if found.v2.is_none() => found.v2 = Some(point),
            Some("cgroup") => {
                let options = fields.nth(1).unwrap_or_default();
                for option in options.split(',') {
                    let name = option.strip_prefix("name=").unwrap_or(option);
                    let known = V1_CONTROLLERS.contains(&name) || option.starts_with("name=");
                    if known && !found.v1.iter().any(|(seen, _)| seen == name) {
                        found.v1.push((name.to_owned(), point.clone()));
                    }
                }
            }
            _ => {}
        }
    }
    found
}

/// A path as the kernel writes it: white space and backslashes are three octal digits after a backslash
/// (proc_pid_mountinfo(5)).
fn unescaped(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        let byte = digits.and_then(|d| u8::from_str_radix(d, 8).ok()).filter(|_| first == b'\\');
        bytes.push(byte.unwrap_or(first));
        rest = if byte.is_some() { &after[3..] } else { after };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

const V1_CONTROLLERS: &[&str] = &[
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "devices",
    "freezer",
    "blkio",
    "pids",
    "hugetlb",
    "net_cls",
    "net_prio",
    "perf_event",
    "rdma",
    "misc",
];

/// A fresh v1 cpuset is empty and takes no process: it starts with what its parent has.
pub(super) fn inherit_cpuset(dir: &Path) -> Result<(), Error> {
    let Some(parent) = dir.parent() else { return Ok(()) };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let value = read(&parent.join(file))?;
        if read(&dir.join(file))?.trim().is_empty() {
            write(&dir.join(file), value.trim())?;
        }
    }
    Ok(())
}

/// Creates a group in the unified hierarchy, handing down every controller on the way. False if it was there.
pub(super) fn make_v2(mount: &Path, dir: &Path, controllers: &[String]) -> Result<bool, Error> {
    let Ok(relative) = dir.strip_prefix(mount) else {
        return Err(Error::invalid(format!("cgroup {} is not below {}", dir.display(), mount.display())));
    };
    let mut at = mount.to_owned();
    let mut made = false;
    for part in relative.components() {
        hand_down(&at, controllers)?;
        at.push(part);
        made = match fs::create_dir(&at) {
            Ok(()) => true,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(Error::os(format!("creating cgroup {}", at.display()), e)),
        };
    }
    Ok(made)
}

fn hand_down(dir: &Path, controllers: &[String]) -> Result<(), Error> {
    let file = dir.join("cgroup.subtree_control");
    let have = read(&file)?;
    let missing: Vec<&String> =
        controllers.iter().filter(|name| !have.split_whitespace().any(|h| h == *name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let all = missing.iter().map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ");
    if write(&file, &all).is_ok() {
        return Ok(());
    }
    // One that cannot be handed down (realtime tasks keep `cpu` at the root) must not bar the rest;
    // a limit that needs it then fails by name.
    for name in missing {
        drop(write(&file, &format!("+{name}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_mount_point_is_what_the_kernel_meant(name in "[a-z \\t\\n\\\\]{1,20}", unified: bool, more in any::<String>()) {
            let escaped: String = name
                .chars()
                .map(|c| if c.is_ascii_lowercase() { c.to_string() } else { format!("\\{:03o}", c as u32) })
                .collect();
            let (kind, options) = if unified { ("cgroup2", "rw") } else { ("cgroup", "rw,memory") };
            let table = format!("30 29 0:26 / /{escaped} rw,nosuid shared:4 - {kind} {kind} {options}\n{more}");
            let found = parse(&table);
            let point = PathBuf::from(format!("/{name}"));
            let seen = if unified { found.v2 } else { found.v1.first().map(|(_, at)| at.clone()) };
            prop_assert_eq!(seen, Some(point));
        }

        #[test]
        fn any_table_is_read(table in any::<String>()) {
            let found = parse(&table);
            prop_assert!(found.v1.iter().all(|(name, _)| !name.is_empty()) || table.contains("name="));
        }
    }

    #[test]
    fn a_hybrid_table_is_understood() {
        let table = "\
30 23 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755\n\
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n";
        let found = parse(table);
        assert_eq!(found.v2, Some("/sys/fs/cgroup/unified".into()));
        let names: Vec<&str> = found.v1.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["cpu", "cpuacct", "systemd"]);
    }
}
