//! Docker's default confinement, as data: what a container gets unless somebody asks otherwise.
//!
//! The filter is `resources/seccomp-default.json`, in docker's own profile format; a user's profile
//! in that format goes through the same code.

use serde::Deserialize;

use crate::error::Error;
use crate::identity::{CAPABILITIES, last_capability};
use crate::spec::{
    Capability, LinuxDevice, LinuxDeviceCgroup, LinuxSeccomp, LinuxSeccompAction, LinuxSyscall, Mount,
};

const SECCOMP: &[u8] = include_bytes!("../resources/seccomp-default.json");

/// What decides which parts of a profile apply.
#[derive(Debug, Clone, Default)]
pub struct SeccompContext {
    /// The container's bounding capabilities.
    pub capabilities: Vec<Capability>,
    /// `(major, minor)`; `None`: the running kernel's.
    pub kernel: Option<(u32, u32)>,
}

/// The fourteen capabilities of a default container.
pub fn capabilities() -> Vec<Capability> {
    use Capability as C;
    vec![
        C::Chown,
        C::DacOverride,
        C::Fsetid,
        C::Fowner,
        C::Mknod,
        C::NetRaw,
        C::Setgid,
        C::Setuid,
        C::Setfcap,
        C::Setpcap,
        C::NetBindService,
        C::SysChroot,
        C::Kill,
        C::AuditWrite,
    ]
}

/// Every capability that this kernel knows (`--privileged`).
pub fn all_capabilities() -> Vec<Capability> {
    CAPABILITIES.iter().take(last_capability() as usize + 1).copied().collect()
}

/// Those that this process may pass on: an engine that is itself confined cannot give what it does not have.
pub fn grantable_capabilities() -> Vec<Capability> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let held = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapBnd:")?.trim(), 16).ok())
        .unwrap_or(u64::MAX);
    // They are listed by number.
    let all = all_capabilities().into_iter().enumerate();
    all.filter(|(number, _)| held & (1 << number) != 0).map(|(_, capability)| capability).collect()
}

/// Paths that tell of the host or reach into it: hidden.
pub fn masked_paths() -> Vec<String> {
    [
        "/proc/acpi",
        "/proc/asound",
        "/proc/interrupts",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/sched_debug",
        "/proc/scsi",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/sys/devices/virtual/powercap",
        "/sys/firmware",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Paths that may be read, not written.
pub fn readonly_paths() -> Vec<String> {
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"].map(str::to_owned).to_vec()
}

/// proc, dev, devpts, sysfs, cgroup, mqueue and shm, in mounting order. `shm_size` in bytes.
pub fn mounts(shm_size: u64) -> Vec<Mount> {
    let shm_size = format!("size={shm_size}");
    let entry = |destination: &str, typ: &str, source: &str, options: &[&str]| {
        let mut mount = Mount::default();
        mount
            .set_destination(destination.into())
            .set_typ(Some(typ.to_owned()))
            .set_source(Some(source.into()))
            .set_options(Some(options.iter().map(|o| (*o).to_owned()).collect()));
        mount
    };
    vec![
        entry("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        entry("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        entry(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        entry("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        entry("/sys/fs/cgroup", "cgroup", "cgroup", &["ro", "nosuid", "noexec", "nodev"]),
        entry("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        entry("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", &shm_size]),
    ]
}

/// Devices beyond those every container gets from the runtime: none by default.
pub fn devices() -> Vec<LinuxDevice> {
    Vec::new()
}

/// The cgroup device rules of a default container: nothing but what the runtime always allows.
pub fn device_rules() -> Vec<LinuxDeviceCgroup> {
    let mut deny = LinuxDeviceCgroup::default();
    deny.set_allow(false).set_access(Some("rwm".to_owned()));
    vec![deny]
}

/// Docker's default filter for a container with these capabilities.
pub fn seccomp(context: &SeccompContext) -> Result<LinuxSeccomp, Error> {
    parse_seccomp(SECCOMP, context)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: LinuxSeccompAction,
    #[serde(default)]
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
    #[serde(default)]
    arch_map: Option<Vec<ArchMap>>,
    #[serde(default)]
    flags: Option<Vec<serde_json::Value>>,
    #[serde(default)]
    listener_path: Option<String>,
    #[serde(default)]
    syscalls: Option<Vec<Rule>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchMap {
    architecture: String,
    #[serde(default)]
    sub_architectures: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct Rule {
    /// The old form: one name.
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    names: Option<Vec<String>>,
    #[serde(default)]
    includes: Option<Condition>,
    #[serde(default)]
    excludes: Option<Condition>,
    #[serde(flatten)]
    rest: serde_json::Map<String, serde_json::Value>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct Condition {
    #[serde(default)]
    arches: Option<Vec<String>>,
    #[serde(default)]
    caps: Option<Vec<Capability>>,
    #[serde(default)]
    min_kernel: Option<String>,
}

/// The machine in the words profiles use: (docker's name, libseccomp's name).
const MACHINE: (&str, &str) = if cfg!(target_arch = "aarch64") {
    ("arm64", "SCMP_ARCH_AARCH64")
} else {
    ("amd64", "SCMP_ARCH_X86_64")
};

/// A user's own profile in docker's JSON format.
pub fn parse_seccomp(json: &[u8], context: &SeccompContext) -> Result<LinuxSeccomp, Error> {
    let wrong = |e: serde_json::Error| Error::invalid(format!("decoding seccomp profile failed: {e}"));
    let profile: Profile = serde_json::from_slice(json).map_err(wrong)?;
    let listed = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|l| !l.is_empty());
    if listed(&profile.architectures) && profile.arch_map.as_ref().is_some_and(|m| !m.is_empty()) {
        return Err(Error::invalid(
            "both 'architectures' and 'archMap' are specified in the seccomp profile",
        ));
    }
    let mut architectures = profile.architectures.unwrap_or_default();
    for map in profile.arch_map.into_iter().flatten().filter(|m| m.architecture == MACHINE.1) {
        architectures.push(map.architecture);
        architectures.extend(map.sub_architectures.unwrap_or_default());
    }
    let kernel = context.kernel.unwrap_or_else(running_kernel);
    let mut rules = Vec::new();
    for rule in profile.syscalls.into_iter().flatten() {
        if let Some(excludes) = &rule.excludes
            && excludes.any(context, kernel)?
        {
            continue;
        }
        if let Some(includes) = &rule.includes
            && !includes.all(context, kernel)?
        {
            continue;
        }
        let names = match (rule.name, rule.names) {
            (Some(_), Some(_)) => {
                return Err(Error::invalid(
                    "both 'name' and 'names' are specified in a rule of the seccomp profile",
                ));
            }
            (Some(name), None) => vec![name],
            (None, names) => names.unwrap_or_default(),
        };
        let mut fields = rule.rest;
        fields
            .retain(|key, value| matches!(key.as_str(), "action" | "errnoRet" | "args") && !value.is_null());
        fields.insert("names".to_owned(), names.into());
        let rule: LinuxSyscall = serde_json::from_value(fields.into()).map_err(wrong)?;
        rules.push(rule);
    }
    let mut filter = LinuxSeccomp::default();
    filter.set_default_action(profile.default_action);
    filter.set_default_errno_ret(profile.default_errno_ret);
    if !architectures.is_empty() {
        let value = serde_json::Value::from(architectures);
        filter.set_architectures(Some(serde_json::from_value(value).map_err(wrong)?));
    }
    if let Some(flags) = profile.flags.filter(|f| !f.is_empty()) {
        filter.set_flags(Some(serde_json::from_value(flags.into()).map_err(wrong)?));
    }
    filter.set_listener_path(profile.listener_path.filter(|p| !p.is_empty()).map(Into::into));
    filter.set_syscalls(Some(rules));
    Ok(filter)
}

impl Condition {
    fn arch_fits(arches: &[String]) -> bool {
        arches.iter().any(|a| a == MACHINE.0)
    }

    /// True if any part holds (for excludes).
    fn any(&self, context: &SeccompContext, kernel: (u32, u32)) -> Result<bool, Error> {
        Ok(self.arches.as_deref().is_some_and(|a| !a.is_empty() && Self::arch_fits(a))
            || self.caps.iter().flatten().any(|c| context.capabilities.contains(c))
            || self.min_kernel.as_deref().map(parse_kernel).transpose()?.is_some_and(|m| kernel >= m))
    }

    /// True if every part holds (for includes).
    fn all(&self, context: &SeccompContext, kernel: (u32, u32)) -> Result<bool, Error> {
        Ok(self.arches.as_deref().is_none_or(|a| a.is_empty() || Self::arch_fits(a))
            && self.caps.iter().flatten().all(|c| context.capabilities.contains(c))
            && self.min_kernel.as_deref().map(parse_kernel).transpose()?.is_none_or(|m| kernel >= m))
    }
}

fn parse_kernel(text: &str) -> Result<(u32, u32), Error> {
    let wrong = || Error::invalid(format!("seccomp profile: minKernel {text:?} is not of the form \"4.8\""));
    let (major, minor) = text.split_once('.').ok_or_else(wrong)?;
    let number = |t: &str| t.parse::<u32>().map_err(|_unused| wrong());
    Ok((number(major)?, number(minor)?))
}

pub(crate) fn running_kernel() -> (u32, u32) {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_filter_follows_the_capabilities() {
        let names = |capabilities: Vec<Capability>| {
            let filter = seccomp(&SeccompContext { capabilities, kernel: None }).unwrap();
            crate::seccomp::compile(&filter).unwrap().unwrap();
            let rules = filter.syscalls().clone().unwrap();
            let plain = rules.iter().filter(|r| r.args().is_none() && r.errno_ret().is_none());
            plain.flat_map(|r| r.names().clone()).collect::<std::collections::HashSet<_>>()
        };
        let default = names(capabilities());
        assert!(default.contains("chroot") && default.contains("ptrace") && !default.contains("mount"));
        let admin = names(vec![Capability::SysAdmin]);
        assert!(admin.contains("mount") && !admin.contains("chroot"));
    }

    #[test]
    fn an_old_kernel_gets_no_ptrace() {
        let filter = seccomp(&SeccompContext { capabilities: Vec::new(), kernel: Some((4, 7)) }).unwrap();
        assert!(!filter.syscalls().iter().flatten().any(|r| r.names().contains(&"ptrace".to_owned())));
    }

    #[test]
    fn profiles_that_contradict_themselves_are_refused() {
        let context = SeccompContext::default();
        for bad in [
            &b"{"[..],
            br#"{"defaultAction":"SCMP_ACT_NONSENSE"}"#,
            br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"name":"a","names":["b"],"action":"SCMP_ACT_ALLOW"}]}"#,
            br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["b"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"x"}}]}"#,
        ] {
            assert!(parse_seccomp(bad, &context).is_err());
        }
    }
}
