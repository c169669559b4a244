//! A step as an OCI specification: docker's default confinement, or none where `--security=insecure` asks for that.

use std::path::{Path, PathBuf};

use brigantine_runtime::profile::{self, SeccompContext};
use brigantine_runtime::spec::{
    Capabilities, Linux, LinuxCapabilities, LinuxCpu, LinuxDeviceCgroup, LinuxMemory, LinuxNamespaceBuilder,
    LinuxNamespaceType, LinuxResources, PosixRlimitBuilder, PosixRlimitType, Process, RootBuilder, Spec,
    UserBuilder,
};

use super::mounts::{bind, mount, secret, set_mode};
use super::{Executor, Joined, Ready, Task};
use crate::dockerfile::MountKind;
use crate::error::{Context, Error, Result, invalid};
use crate::graph::Limits;
use crate::users;

impl Executor {
    /// The specification, and where its mounts go. Writes the files that it names.
    pub(super) fn spec(&self, task: &Task<'_>, joined: &Joined, files: &Path) -> Result<(Spec, Vec<String>)> {
        let run = task.run;
        let around = &run.around;
        let user = users::resolve(&run.user, task.root)?;
        let mut env = run.env.clone();
        env.extend(around.proxy.iter().cloned());
        let mut mounts =
            profile::mounts(around.shm_size.filter(|n| *n > 0).unwrap_or(self.shm_size).unsigned_abs());
        if run.insecure {
            for mount in &mut mounts {
                if matches!(mount.typ().as_deref(), Some("sysfs" | "cgroup")) {
                    let writable = mount.options().iter().flatten().filter(|o| *o != "ro").cloned().collect();
                    mount.set_options(Some(writable));
                }
            }
        }
        for (name, text) in [("hosts", &joined.hosts), ("resolv.conf", &joined.resolv_conf)] {
            let path = files.join(name);
            std::fs::write(&path, text).doing(|| format!("write {}", path.display()))?;
            mounts.push(bind(&format!("/etc/{name}"), &path, true));
        }
        for (name, text) in &run.scripts {
            let path = files.join(format!("script-{}", hex::encode(name)));
            std::fs::write(&path, text).doing(|| format!("write {}", path.display()))?;
            set_mode(&path, 0o755)?;
            mounts.push(bind(&format!("/dev/pipes/{name}"), &path, true));
        }
        let mut own = Vec::new();
        for (number, (wanted, ready)) in run.mounts.iter().zip(&task.mounts).enumerate() {
            match wanted.kind {
                MountKind::Secret => {
                    secret(wanted, number, task.secrets, files, &mut own, &mut env)?;
                }
                _ => mount(wanted, ready, number, files, &mut own)?,
            }
        }
        let agent = run
            .mounts
            .iter()
            .zip(&task.mounts)
            .find(|(wanted, ready)| wanted.kind == MountKind::Ssh && matches!(ready, Ready::Path(_)));
        if let Some((agent, _)) = agent
            && !env.iter().any(|line| line.starts_with("SSH_AUTH_SOCK="))
        {
            env.push(format!("SSH_AUTH_SOCK={}", agent.target));
        }
        own.sort_by_key(|mount| mount.destination().components().count());
        mounts.append(&mut own);
        let targets = mounts.iter().map(|mount| mount.destination().to_string_lossy().into_owned()).collect();

        let bounding = if run.insecure { profile::grantable_capabilities() } else { profile::capabilities() };
        let mut process = Process::default();
        process.set_terminal(Some(false));
        process.set_args(Some(run.args.clone()));
        process.set_env(Some(env));
        process.set_cwd(PathBuf::from(&run.cwd));
        process.set_user(
            UserBuilder::default()
                .uid(user.uid)
                .gid(user.gid)
                .additional_gids(user.groups)
                .build()
                .map_err(|error| Error::Executor(format!("describe the step's user: {error}")))?,
        );
        process.set_capabilities(Some(capability_sets(&bounding, user.uid)));
        process.set_rlimits(Some(rlimits(&around.limits)?));
        process.set_no_new_privileges(Some(false));

        let mut linux = Linux::default();
        let mut namespaces = vec![
            LinuxNamespaceType::Mount,
            LinuxNamespaceType::Uts,
            LinuxNamespaceType::Ipc,
            LinuxNamespaceType::Pid,
            LinuxNamespaceType::Cgroup,
        ];
        if !joined.host {
            namespaces.push(LinuxNamespaceType::Network);
        }
        let namespaces = namespaces
            .into_iter()
            .map(|typ| LinuxNamespaceBuilder::default().typ(typ).build())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| Error::Executor(format!("describe the step's namespaces: {error}")))?;
        linux.set_namespaces(Some(namespaces));
        linux.set_resources(Some(resources(&around.limits, run.insecure)));
        linux.set_cgroups_path(Some(self.cgroup(&around.limits, &task.id)));
        if !run.insecure {
            let context = SeccompContext { capabilities: bounding, ..SeccompContext::default() };
            let filter = profile::seccomp(&context)
                .map_err(|error| Error::Executor(format!("load the default seccomp profile: {error}")))?;
            linux.set_seccomp(Some(filter));
        }
        linux.set_masked_paths(Some(if run.insecure { Vec::new() } else { profile::masked_paths() }));
        linux.set_readonly_paths(Some(if run.insecure { Vec::new() } else { profile::readonly_paths() }));
        let mut spec = Spec::default();
        spec.set_linux(Some(linux));
        spec.set_mounts(Some(mounts));
        spec.set_process(Some(process));
        spec.set_hostname(Some(around.hostname.clone()).filter(|name| !name.is_empty()));
        spec.set_root(Some(
            RootBuilder::default()
                .path("rootfs")
                .readonly(false)
                .build()
                .map_err(|error| Error::Executor(format!("describe the step's root: {error}")))?,
        ));
        Ok((spec, targets))
    }

    fn cgroup(&self, limits: &Limits, id: &str) -> PathBuf {
        let parent = limits.cgroup_parent.as_deref().filter(|parent| !parent.is_empty());
        if self.systemd_cgroup {
            return PathBuf::from(format!("{}:brigantine:{id}", parent.unwrap_or("system.slice")));
        }
        Path::new("/").join(parent.unwrap_or(&self.cgroup_parent)).join(id)
    }
}

fn capability_sets(bounding: &[brigantine_runtime::spec::Capability], uid: u32) -> LinuxCapabilities {
    let all = || bounding.iter().copied().collect::<Capabilities>();
    let active = || if uid == 0 { all() } else { Capabilities::default() };
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(all()));
    sets.set_effective(Some(active()));
    sets.set_permitted(Some(active()));
    sets.set_inheritable(Some(Capabilities::default()));
    sets.set_ambient(Some(Capabilities::default()));
    sets
}

fn resources(limits: &Limits, insecure: bool) -> LinuxResources {
    let mut resources = LinuxResources::default();
    let mut devices = profile::device_rules();
    if insecure {
        let mut all = LinuxDeviceCgroup::default();
        all.set_allow(true).set_access(Some("rwm".to_owned()));
        devices = vec![all];
    }
    resources.set_devices(Some(devices));
    if let Some(limit) = limits.memory.filter(|n| *n > 0) {
        let mut memory = LinuxMemory::default();
        memory.set_limit(Some(limit));
        memory.set_swap(Some(limits.memory_swap.filter(|n| *n != 0).unwrap_or(limit.saturating_mul(2))));
        resources.set_memory(Some(memory));
    }
    let text = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
    let (cpus, mems) = (text(&limits.cpuset_cpus), text(&limits.cpuset_mems));
    let (shares, period) = (limits.cpu_shares.filter(|n| *n > 0), limits.cpu_period.filter(|n| *n > 0));
    let quota = limits.cpu_quota.filter(|n| *n != 0);
    if shares.is_some() || period.is_some() || quota.is_some() || cpus.is_some() || mems.is_some() {
        let mut cpu = LinuxCpu::default();
        cpu.set_shares(shares);
        cpu.set_period(period);
        cpu.set_quota(quota);
        cpu.set_cpus(cpus);
        cpu.set_mems(mems);
        resources.set_cpu(Some(cpu));
    }
    resources
}

fn rlimits(limits: &Limits) -> Result<Vec<brigantine_runtime::spec::PosixRlimit>> {
    limits
        .ulimits
        .iter()
        .map(|(name, soft, hard)| {
            let unknown = || invalid(format!("invalid ulimit type: {name}"));
            let full = format!("RLIMIT_{}", name.to_ascii_uppercase());
            let typ: PosixRlimitType = serde_json::from_value(full.into()).map_err(|_unknown| unknown())?;
            PosixRlimitBuilder::default()
                .typ(typ)
                .soft(soft.unsigned_abs())
                .hard(hard.unsigned_abs())
                .build()
                .map_err(|_bad| unknown())
        })
        .collect()
}
