//! What a process becomes: user, privileges, limits, program, compiled from the spec's process.

use std::ffi::CString;
use std::path::Path;
use std::sync::OnceLock;

use brigantine_sys::exec::StringVector;
use brigantine_sys::process::Scheduling;
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::error::Error;
use crate::mounts::c_string;
use crate::plan::{Filter, ProcessPlan};
use crate::spec::{
    Capabilities, Capability, IOPriorityClass, LinuxSchedulerPolicy, PosixRlimitType, Process,
};

/// Kernel order: the position is the capability's number.
pub(crate) const CAPABILITIES: &[Capability] = &[
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// The highest capability this kernel knows.
pub(crate) fn last_capability() -> u32 {
    static LAST: OnceLock<u32> = OnceLock::new();
    *LAST.get_or_init(|| {
        // It refuses to speak of others (prctl(2), PR_CAPBSET_READ): two questions instead of a file below /proc.
        let knows = |number: u32| {
            let one = CapabilitySet::from_bits_retain(1 << number);
            rustix::thread::capability_is_in_bounding_set(one).is_ok()
        };
        let mut last = 40;
        while last > 0 && !knows(last) {
            last -= 1;
        }
        while last < 63 && knows(last + 1) {
            last += 1;
        }
        last
    })
}

/// Names this kernel does not know are left out, as runc does.
fn bits(set: Option<&Capabilities>) -> u64 {
    let known = (1_u64 << (last_capability() + 1)) - 1;
    let mut bits = 0;
    for (number, capability) in CAPABILITIES.iter().enumerate() {
        if set.is_some_and(|s| s.contains(capability)) {
            bits |= 1 << number;
        }
    }
    bits & known
}

/// Ambient capabilities that are asked for in vain: the kernel raises only what is permitted and inheritable.
pub(crate) fn unraised(process: &Process) -> Vec<String> {
    let sets = process.capabilities().as_ref();
    let ambient = bits(sets.and_then(|s| s.ambient().as_ref()));
    let permitted = bits(sets.and_then(|s| s.permitted().as_ref()));
    let inheritable = bits(sets.and_then(|s| s.inheritable().as_ref()));
    let lost = ambient & !(permitted & inheritable);
    let names = CAPABILITIES.iter().enumerate().filter(|(number, _)| lost & 1 << number != 0);
    names.map(|(_, capability)| format!("CAP_{capability}")).collect()
}

pub(crate) fn compile(
    process: &Process,
    filter: Option<(Filter, u32)>,
    make_cwd: bool,
) -> Result<ProcessPlan, Error> {
    let args = process.args().as_deref().unwrap_or_default();
    let Some(program) = args.first() else {
        return Err(Error::invalid("process.args is empty: nothing to execute"));
    };
    let cwd = process.cwd();
    if !cwd.is_absolute() {
        return Err(Error::invalid(format!(
            "the working directory {:?} is not an absolute path",
            cwd.display()
        )));
    }
    let env = process.env().as_deref().unwrap_or_default();
    let env = last_of_each(env);
    let find_home = !env.iter().any(|e| e.starts_with("HOME=") && e.len() > 5);
    let env = env.iter().filter(|e| !(find_home && **e == "HOME="));
    let env = env.map(|e| c_string(*e, "environment variable")).collect::<Result<Vec<_>, _>>()?;
    let argv = args.iter().map(|a| c_string(a.as_str(), "argument")).collect::<Result<Vec<_>, _>>()?;
    let (searched, candidates) = candidates(program, process)?;
    let user = process.user();
    let sets = process.capabilities().as_ref();
    let bounding = bits(sets.and_then(|s| s.bounding().as_ref()));
    let effective = bits(sets.and_then(|s| s.effective().as_ref()));
    let permitted = bits(sets.and_then(|s| s.permitted().as_ref()));
    let inheritable = bits(sets.and_then(|s| s.inheritable().as_ref()));
    let ambient = bits(sets.and_then(|s| s.ambient().as_ref()));
    let known = (1_u64 << (last_capability() + 1)) - 1;
    let set = CapabilitySet::from_bits_retain;
    let groups = user.additional_gids().iter().flatten().map(|&gid| gid_of(gid)).collect::<Result<_, _>>()?;
    Ok(ProcessPlan {
        program: program.clone(),
        candidates,
        searched,
        argv: StringVector::new(argv),
        envp: if find_home { StringVector::with_room(env, 1100) } else { StringVector::new(env) },
        find_home,
        cwd: path(cwd)?,
        make_cwd,
        keyring: true,
        own_stdio: true,
        rlimits: process
            .rlimits()
            .iter()
            .flatten()
            .map(|limit| {
                let (resource, name) = resource(limit.typ());
                if limit.soft() > limit.hard() {
                    return Err(Error::invalid(format!(
                        "{name}: the soft limit {} exceeds the hard limit {}",
                        limit.soft(),
                        limit.hard()
                    )));
                }
                let value = |n: u64| (n != u64::MAX).then_some(n);
                let limit = Rlimit { current: value(limit.soft()), maximum: value(limit.hard()) };
                Ok((resource, limit, name))
            })
            .collect::<Result<_, _>>()?,
        labels: labels(process)?,
        personality: None,
        scheduling: scheduling(process)?,
        io_priority: process.io_priority().as_ref().map(|p| {
            let class = match p.class() {
                IOPriorityClass::IoprioClassRt => 1,
                IOPriorityClass::IoprioClassBe => 2,
                IOPriorityClass::IoprioClassIdle => 3,
            };
            class << 13 | (p.priority() as i32 & 7)
        }),
        memory_policy: None,
        start_hooks: Vec::new(),
        uid: uid_of(user.uid())?,
        gid: gid_of(user.gid())?,
        groups,
        set_groups: true,
        umask: user.umask(),
        drop_bounding: known & !bounding,
        capabilities: CapabilitySets {
            effective: set(effective & permitted),
            permitted: set(permitted),
            inheritable: set(inheritable),
        },
        ambient: ambient & permitted & inheritable,
        no_new_privileges: process.no_new_privileges().unwrap_or_default(),
        seccomp: filter,
        listened_early: false,
        die_with_parent: false,
        preserve_fds: 0,
    })
}

/// Of variables with one name the last counts, in the place of the first.
fn last_of_each(env: &[String]) -> Vec<&str> {
    let name = |e: &str| e.split('=').next().unwrap_or_default().len();
    let mut places = std::collections::HashMap::with_capacity(env.len());
    let mut kept: Vec<&str> = Vec::with_capacity(env.len());
    for variable in env.iter().map(String::as_str) {
        match places.entry(&variable[..name(variable)]) {
            std::collections::hash_map::Entry::Occupied(place) => kept[*place.get()] = variable,
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(kept.len());
                kept.push(variable);
            }
        }
    }
    kept
}

impl ProcessPlan {
    /// Where supplementary groups are not to be changed (`denied`), none may be asked for, and none are set.
    pub(crate) fn without_groups(&mut self, denied: bool) -> Result<(), Error> {
        if denied && !self.groups.is_empty() {
            return Err(Error::invalid(
                "additionalGids: a user namespace made without privileges takes no supplementary groups",
            ));
        }
        self.set_groups &= !denied;
        Ok(())
    }
}

fn path(path: &Path) -> Result<CString, Error> {
    use std::os::unix::ffi::OsStrExt;
    c_string(path.as_os_str().as_bytes(), "working directory")
}

fn uid_of(raw: u32) -> Result<Uid, Error> {
    if raw == u32::MAX {
        Err(Error::invalid("user id 4294967295 is reserved"))
    } else {
        Ok(Uid::from_raw(raw))
    }
}

fn gid_of(raw: u32) -> Result<Gid, Error> {
    if raw == u32::MAX {
        Err(Error::invalid("group id 4294967295 is reserved"))
    } else {
        Ok(Gid::from_raw(raw))
    }
}

/// Where the program may be: itself if it names a path, else below each directory of PATH.
fn candidates(program: &str, process: &Process) -> Result<(bool, Vec<CString>), Error> {
    if program.contains('/') {
        return Ok((false, vec![c_string(program, "program")?]));
    }
    if program.is_empty() {
        return Ok((true, Vec::new()));
    }
    let env = process.env().as_deref().unwrap_or_default();
    let path = env.iter().rev().find_map(|e| e.strip_prefix("PATH=")).unwrap_or_default();
    let list = path.split(':').filter(|dir| dir.starts_with('/'));
    let list = list.map(|dir| c_string(format!("{}/{program}", dir.trim_end_matches('/')), "program"));
    Ok((true, list.collect::<Result<_, _>>()?))
}

fn resource(typ: PosixRlimitType) -> (Resource, &'static str) {
    use PosixRlimitType as T;
    match typ {
        T::RlimitCpu => (Resource::Cpu, "RLIMIT_CPU"),
        T::RlimitFsize => (Resource::Fsize, "RLIMIT_FSIZE"),
        T::RlimitData => (Resource::Data, "RLIMIT_DATA"),
        T::RlimitStack => (Resource::Stack, "RLIMIT_STACK"),
        T::RlimitCore => (Resource::Core, "RLIMIT_CORE"),
        T::RlimitRss => (Resource::Rss, "RLIMIT_RSS"),
        T::RlimitNproc => (Resource::Nproc, "RLIMIT_NPROC"),
        T::RlimitNofile => (Resource::Nofile, "RLIMIT_NOFILE"),
        T::RlimitMemlock => (Resource::Memlock, "RLIMIT_MEMLOCK"),
        T::RlimitAs => (Resource::As, "RLIMIT_AS"),
        T::RlimitLocks => (Resource::Locks, "RLIMIT_LOCKS"),
        T::RlimitSigpending => (Resource::Sigpending, "RLIMIT_SIGPENDING"),
        T::RlimitMsgqueue => (Resource::Msgqueue, "RLIMIT_MSGQUEUE"),
        T::RlimitNice => (Resource::Nice, "RLIMIT_NICE"),
        T::RlimitRtprio => (Resource::Rtprio, "RLIMIT_RTPRIO"),
        T::RlimitRttime => (Resource::Rttime, "RLIMIT_RTTIME"),
    }
}

fn scheduling(process: &Process) -> Result<Option<Scheduling>, Error> {
    let Some(s) = process.scheduler() else { return Ok(None) };
    use crate::spec::LinuxSchedulerFlag as F;
    let flags = s.flags().iter().flatten().map(|flag| match flag {
        F::SchedResetOnFork => 0x01,
        F::SchedFlagReclaim => 0x02,
        F::SchedFlagDLOverrun => 0x04,
        F::SchedFlagKeepPolicy => 0x08,
        F::SchedFlagKeepParams => 0x10,
        F::SchedFlagUtilClampMin => 0x20,
        F::SchedFlagUtilClampMax => 0x40,
    });
    let flags = flags.fold(0_u64, |all, flag| all | flag);
    let policy = match s.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    Ok(Some(Scheduling {
        size: 0,
        policy,
        flags,
        nice: s.nice().unwrap_or_default(),
        priority: s.priority().unwrap_or_default() as u32,
        runtime: s.runtime().unwrap_or_default(),
        deadline: s.deadline().unwrap_or_default(),
        period: s.period().unwrap_or_default(),
    }))
}

/// A list like `0-3,7` as one bit for each number.
pub(crate) fn bit_list(text: &str, what: &str) -> Result<Vec<u64>, Error> {
    let wrong = || Error::invalid(format!("{what} {text:?} is not a list like \"0-3,7\""));
    let number = |t: &str| t.trim().parse::<usize>().ok().filter(|&n| n < 8192).ok_or_else(wrong);
    let mut words = Vec::new();
    for part in text.split(',').filter(|p| !p.trim().is_empty()) {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if first > last {
            return Err(wrong());
        }
        for bit in first..=last {
            if words.len() <= bit / 64 {
                words.resize(bit / 64 + 1, 0_u64);
            }
            words[bit / 64] |= 1 << (bit % 64);
        }
    }
    if words.is_empty() { Err(wrong()) } else { Ok(words) }
}

pub(crate) fn personality(personality: &crate::spec::LinuxPersonality) -> Result<u64, Error> {
    use crate::spec::LinuxPersonalityDomain as D;
    if personality.flags().as_ref().is_some_and(|f| !f.is_empty()) {
        // The specification has none yet.
        return Err(Error::unsupported("personality flags are not supported"));
    }
    Ok(match personality.domain() {
        D::PerLinux => 0,
        D::PerLinux32 => 8,
    })
}

pub(crate) fn selinux() -> bool {
    Path::new("/sys/fs/selinux/status").exists()
}

pub(crate) fn memory_policy(
    policy: Option<&crate::spec::LinuxMemoryPolicy>,
) -> Result<Option<crate::plan::MemoryPolicy>, Error> {
    use crate::spec::{MemoryPolicyFlagType as F, MemoryPolicyModeType as M};
    let Some(policy) = policy else { return Ok(None) };
    let mode = match policy.mode() {
        M::MpolDefault => 0,
        M::MpolPreferred => 1,
        M::MpolBind => 2,
        M::MpolInterleave => 3,
        M::MpolLocal => 4,
        M::MpolPreferredMany => 5,
        M::MpolWeightedInterleave => 6,
    };
    let flags = policy.flags().iter().flatten().map(|flag| match flag {
        F::MpolFStaticNodes => 1 << 15,
        F::MpolFRelativeNodes => 1 << 14,
        F::MpolFNumaBalancing => 1 << 13,
    });
    let mode = flags.fold(mode, |all, flag| all | flag);
    let nodes = policy.nodes().as_deref().filter(|n| !n.is_empty());
    let nodes = nodes.map(|n| bit_list(n, "invalid memory policy nodes:")).transpose()?.unwrap_or_default();
    let count: u32 = nodes.iter().map(|word| word.count_ones()).sum();
    if count > 0 && matches!(policy.mode(), M::MpolDefault | M::MpolLocal) {
        return Err(Error::invalid(format!(
            "invalid memory policy: {:?} mode requires 0 nodes but got {count}",
            policy.mode()
        )));
    }
    Ok(Some(crate::plan::MemoryPolicy { mode, nodes }))
}

/// A label that is asked for and cannot be had stops the container.
fn labels(process: &Process) -> Result<Vec<(CString, Vec<u8>)>, Error> {
    let mut labels = Vec::new();
    if let Some(profile) = process.apparmor_profile().as_deref().filter(|p| !p.is_empty()) {
        let enabled =
            std::fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|t| t.starts_with(b"Y"));
        if enabled {
            let file = if Path::new("/proc/self/attr/apparmor").exists() {
                c"self/attr/apparmor/exec"
            } else {
                c"self/attr/exec"
            };
            labels.push((file.to_owned(), format!("exec {profile}").into_bytes()));
        } else if profile != "unconfined" {
            return Err(Error::unsupported(format!(
                "AppArmor profile {profile:?} is asked for, but this kernel has no AppArmor enabled"
            )));
        }
    }
    if let Some(label) = process.selinux_label().as_deref().filter(|l| !l.is_empty()) {
        if !selinux() {
            return Err(Error::unsupported(format!(
                "SELinux label {label:?} is asked for, but this kernel has no SELinux enabled"
            )));
        }
        // The keyring too, which it finds when it is executed: with its maker's label the program might not use its own.
        for file in [c"self/attr/exec", c"self/attr/keycreate"] {
            labels.push((file.to_owned(), label.as_bytes().to_vec()));
        }
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::ProcessBuilder;

    #[test]
    fn capability_numbers_are_the_kernels() {
        assert_eq!(CAPABILITIES.len(), 41);
        let all: Capabilities = [Capability::Chown, Capability::SysAdmin].into_iter().collect();
        assert_eq!(bits(Some(&all)), 1 | 1 << 21);
        assert_eq!(CapabilitySet::SYS_ADMIN.bits(), 1 << 21);
    }

    #[test]
    fn the_last_variable_of_a_name_counts() {
        let env = ["A=1", "B=2", "A=3", "C", "AB=4"].map(str::to_owned);
        assert_eq!(last_of_each(&env), ["A=3", "B=2", "C", "AB=4"]);
    }

    #[test]
    fn lists_are_bits() {
        assert_eq!(bit_list("0-2,5", "x").unwrap(), [0b10_0111]);
        assert_eq!(bit_list("64", "x").unwrap(), [0, 1]);
        for bad in ["", "a", "3-1", "-1", "99999", "1-"] {
            assert!(bit_list(bad, "x").is_err(), "{bad}");
        }
    }

    #[test]
    fn programs_are_looked_for_in_the_containers_path() {
        let process = ProcessBuilder::default().env(vec!["PATH=/a:rel::/b/".to_owned()]).build().unwrap();
        let (searched, found) = candidates("x", &process).unwrap();
        assert!(searched);
        assert_eq!(found, [c"/a/x".to_owned(), c"/b/x".to_owned()]);
        assert_eq!(candidates("./x", &process).unwrap(), (false, vec![c"./x".to_owned()]));
    }
}
