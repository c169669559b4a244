//! What the host is: kernel, distribution, memory, control groups.
//!
//! Invariant: read each time it is asked; nothing here fails, what cannot be read is empty or absent.

use std::path::Path;

/// Control group abilities that limits need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cgroups {
    /// Version 2 holds the controllers.
    pub unified: bool,
    pub memory: bool,
    pub swap: bool,
    pub cpu_quota: bool,
    pub cpu_shares: bool,
    pub cpuset: bool,
    pub pids: bool,
}

impl Cgroups {
    pub fn detect() -> Self {
        Self::of(Path::new("/sys/fs/cgroup"))
    }

    fn of(root: &Path) -> Self {
        if let Ok(controllers) = std::fs::read_to_string(root.join("cgroup.controllers")) {
            let has = |name: &str| controllers.split_whitespace().any(|controller| controller == name);
            return Self {
                unified: true,
                memory: has("memory"),
                swap: has("memory") && !is_file_content("/proc/swaps", ""),
                cpu_quota: has("cpu"),
                cpu_shares: has("cpu"),
                cpuset: has("cpuset"),
                pids: has("pids"),
            };
        }
        let there = |file: &str| root.join(file).exists();
        Self {
            unified: false,
            memory: there("memory/memory.limit_in_bytes"),
            swap: there("memory/memory.memsw.limit_in_bytes"),
            cpu_quota: there("cpu/cpu.cfs_quota_us")
                || there("cpu/docker")
                || there("cpu,cpuacct/cpu.cfs_quota_us"),
            cpu_shares: there("cpu/cpu.shares") || there("cpu,cpuacct/cpu.shares"),
            cpuset: there("cpuset/cpuset.cpus"),
            pids: there("pids"),
        }
    }
}

fn is_file_content(path: &str, content: &str) -> bool {
    std::fs::read_to_string(path).is_ok_and(|text| text.trim() == content)
}

/// Whether a setting's file says `1` or `Y`.
pub fn is_one(path: &str) -> bool {
    is_file_content(path, "1") || is_file_content(path, "Y")
}

pub fn kernel_version() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The architecture as Go and image manifests name it.
pub fn go_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

/// The distribution.
#[derive(Debug, Default)]
pub struct OsRelease {
    pub name: String,
    pub version: String,
}

pub fn os_release() -> OsRelease {
    let text = std::fs::read_to_string("/etc/os-release")
        .or_else(|_missing| std::fs::read_to_string("/usr/lib/os-release"))
        .unwrap_or_default();
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
            .unwrap_or_default()
    };
    OsRelease { name: field("PRETTY_NAME"), version: field("VERSION_ID") }
}

/// Bytes of memory.
pub fn memory_total() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0_u64) * 1024
}

pub fn count_entries(dir: &str) -> usize {
    std::fs::read_dir(dir).map_or(0, Iterator::count)
}

/// The kind of file system a directory is on.
pub fn filesystem(path: &Path) -> String {
    let Ok(stat) = rustix::fs::statfs(path) else { return "unknown".to_owned() };
    match stat.f_type as u32 {
        0xEF53 => "extfs".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683E => "btrfs".to_owned(),
        0x0102_1994 => "tmpfs".to_owned(),
        0x794C_7630 => "overlayfs".to_owned(),
        0x2FC1_2FC1 => "zfs".to_owned(),
        0xF2F5_2010 => "f2fs".to_owned(),
        other => format!("0x{other:x}"),
    }
}

/// A proxy's URL fit for showing.
pub fn without_password(proxy: &str) -> String {
    let Ok(mut url) = url::Url::parse(proxy) else { return proxy.to_owned() };
    if url.password().is_some() && url.set_password(Some("xxxxx")).is_err() {
        return String::new();
    }
    url.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_cgroup_versions_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("memory")).unwrap();
        std::fs::write(dir.path().join("memory/memory.limit_in_bytes"), "1").unwrap();
        let first = Cgroups::of(dir.path());
        assert!(!first.unified && first.memory && !first.pids);
        std::fs::write(dir.path().join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        let second = Cgroups::of(dir.path());
        assert!(second.unified && second.memory && second.pids && second.cpu_quota && second.cpuset);
    }

    #[test]
    fn a_proxys_password_is_not_shown() {
        assert_eq!(without_password("http://u:p@proxy:1/"), "http://u:xxxxx@proxy:1/");
        assert_eq!(without_password("proxy:3128"), "proxy:3128");
    }
}
