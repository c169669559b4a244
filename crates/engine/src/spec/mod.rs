//! From a container's record to the runtime specification: docker's default confinement, and what the request changes.
//!
//! Everything here is decided by the requester's policy; of the image only its hints (program, environment, user,
//! directory) have come into the record.

pub(crate) mod capabilities;
mod mounts;
mod process;
pub(crate) mod resources;
mod security;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use brigantine_runtime::profile;
use brigantine_runtime::spec::{
    Linux, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, RootBuilder, Spec,
};

pub(crate) use process::{defaults as default_environment, process, set as set_variable, user};

use crate::Result;
use crate::config::Config;
use crate::containers::Record;
use crate::error::Context;
use crate::userns::Remap;
use crate::users::User;

/// Where one of a container's namespaces comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Namespace {
    /// Its own.
    Private,
    /// The host's.
    Host,
    /// That of another container, by its first process.
    Of(i32),
}

/// What the engine found out for a specification beside the record.
#[derive(Debug)]
pub(crate) struct Inputs<'a> {
    pub record: &'a Record,
    pub config: &'a Config,
    /// Where `hosts`, `hostname` and `resolv.conf` are; another container's directory when its network is shared.
    pub names_dir: &'a Path,
    /// The container's own copy of the reaper (`--init`).
    pub reaper: &'a Path,
    pub user: User,
    pub network: Namespace,
    pub pid: Namespace,
    pub ipc: Namespace,
    pub uts: Namespace,
    pub cgroup: Namespace,
    /// Whose ids those in the container stand for.
    pub remap: Option<&'a Remap>,
    /// Host paths of the mounts in the record's order.
    pub mount_sources: Vec<PathBuf>,
    /// Where `/dev/shm` of the container is whose IPC namespace is joined.
    pub shared_memory: Option<PathBuf>,
    /// The host's name, for containers that share it.
    pub host_name: &'a str,
    /// Variables of legacy links: after the defaults, before what anybody sets.
    pub link_variables: Vec<String>,
}

/// The specification of a container.
pub(crate) fn build(inputs: &Inputs<'_>) -> Result<Spec> {
    let (record, host) = (inputs.record, &inputs.record.host_config);
    let privileged = record.privileged();
    let bounding = capabilities::bounding(
        privileged,
        host.cap_add.as_deref().unwrap_or_default(),
        host.cap_drop.as_deref().unwrap_or_default(),
    )?;
    let security = security::Options::parse(host.security_opt.as_deref().unwrap_or_default(), inputs.config)?;

    let mut devices = resources::devices(host)?;
    let cgroup = resources::resources(host, &devices)?;
    if privileged {
        devices.extend(resources::host_devices());
    }

    let mut linux = Linux::default();
    linux.set_namespaces(Some(namespaces(inputs)?));
    if let Some(remap) = inputs.remap {
        let (users, groups) = remap.mappings()?;
        linux.set_uid_mappings(Some(users));
        linux.set_gid_mappings(Some(groups));
    }
    linux.set_resources(Some(cgroup));
    linux.set_devices(Some(devices));
    linux.set_cgroups_path(Some(cgroups_path(record, inputs.config)));
    linux.set_sysctl(Some(sysctls(inputs)));
    linux.set_rootfs_propagation(mounts::root_propagation(record).map(str::to_owned));
    linux.set_seccomp(if privileged { None } else { security.seccomp(&bounding)? });
    let open_paths = privileged || security.open_paths;
    let paths = |given: &Option<Vec<String>>, default: fn() -> Vec<String>| match given {
        Some(given) => given.clone(),
        None if open_paths => Vec::new(),
        None => default(),
    };
    linux.set_masked_paths(Some(paths(&host.masked_paths, profile::masked_paths)));
    linux.set_readonly_paths(Some(paths(&host.readonly_paths, profile::readonly_paths)));

    let mut spec = Spec::default();
    spec.set_linux(Some(linux));
    spec.set_mounts(Some(mounts::mounts(inputs)?));
    spec.set_process(Some(process(inputs, &bounding, &security)?));
    spec.set_root(Some(
        RootBuilder::default()
            .path("rootfs")
            .readonly(host.readonly_rootfs.unwrap_or_default())
            .build()
            .doing(|| "describe the root file system".to_owned())?,
    ));
    let hostname = match inputs.uts {
        Namespace::Private => Some(record.config.hostname.clone().unwrap_or_default()),
        Namespace::Host | Namespace::Of(_) => None,
    };
    spec.set_hostname(hostname.filter(|name| !name.is_empty()));
    let domain = record.config.domainname.clone().filter(|name| !name.is_empty());
    spec.set_domainname(if inputs.uts == Namespace::Private { domain } else { None });
    spec.set_annotations(Some(host.annotations.clone().unwrap_or_default()));
    Ok(spec)
}

pub(crate) use security::Options as SecurityOptions;

/// Where the container's control group is.
fn cgroups_path(record: &Record, config: &Config) -> PathBuf {
    let parent = record.host_config.cgroup_parent.as_deref().filter(|parent| !parent.is_empty());
    if config.systemd_cgroup {
        let slice = parent.unwrap_or("system.slice");
        return PathBuf::from(format!("{slice}:brigantine:{}", record.id));
    }
    Path::new("/").join(parent.unwrap_or(&config.cgroup_parent)).join(&record.id)
}

fn namespaces(inputs: &Inputs<'_>) -> Result<Vec<LinuxNamespace>> {
    use LinuxNamespaceType as Type;
    let mut list = vec![namespace(Type::Mount, None)?];
    for (typ, from, file) in [
        (Type::Uts, &inputs.uts, "uts"),
        (Type::Ipc, &inputs.ipc, "ipc"),
        (Type::Pid, &inputs.pid, "pid"),
        (Type::Network, &inputs.network, "net"),
        (Type::Cgroup, &inputs.cgroup, "cgroup"),
    ] {
        match from {
            Namespace::Private => list.push(namespace(typ, None)?),
            Namespace::Host => {}
            Namespace::Of(pid) => list.push(namespace(typ, Some(format!("/proc/{pid}/ns/{file}")))?),
        }
    }
    if inputs.remap.is_some() {
        // Whoever shares a network also shares its owner: nobody else may mount its sysfs.
        list.push(match &inputs.network {
            Namespace::Of(pid) => namespace(Type::User, Some(format!("/proc/{pid}/ns/user")))?,
            Namespace::Private | Namespace::Host => namespace(Type::User, None)?,
        });
    }
    Ok(list)
}

fn namespace(typ: LinuxNamespaceType, path: Option<String>) -> Result<LinuxNamespace> {
    let mut builder = LinuxNamespaceBuilder::default().typ(typ);
    if let Some(path) = path {
        builder = builder.path(path);
    }
    builder.build().doing(|| format!("describe the {typ} namespace"))
}

/// What is asked for, and two settings that make low ports and ping work for everybody in a network of one's own.
fn sysctls(inputs: &Inputs<'_>) -> HashMap<String, String> {
    let mut sysctls = inputs.record.host_config.sysctls.clone().unwrap_or_default();
    if inputs.network == Namespace::Private {
        // The kernel takes only groups that there are.
        let last = inputs.remap.map_or(i32::MAX.unsigned_abs(), Remap::last_group);
        for (name, value) in [
            ("net.ipv4.ip_unprivileged_port_start", "0".to_owned()),
            ("net.ipv4.ping_group_range", format!("0 {last}")),
        ] {
            sysctls.entry(name.to_owned()).or_insert(value);
        }
    }
    sysctls
}

/// An I/O error's words alone, in lower case as docker and runc print them.
pub(crate) fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use bollard_stubs::models::{ContainerConfig, HostConfig};

    use super::*;

    fn record(host_config: HostConfig) -> Record {
        Record {
            version: 1,
            id: "c0ffee".into(),
            name: "web".into(),
            created: jiff::Timestamp::now(),
            image_id: "sha256:0".into(),
            layers: Vec::new(),
            path: "sh".into(),
            args: vec!["-c".into(), "true".into()],
            config: ContainerConfig {
                hostname: Some("web".into()),
                env: Some(vec!["A=b".into()]),
                ..Default::default()
            },
            host_config,
            endpoints: std::collections::BTreeMap::default(),
            mounts: Vec::new(),
            state: serde_json::from_str("{\"status\":\"created\"}").unwrap(),
            restart_count: 0,
            stopped_by_request: false,
            project: None,
            confined: false,
        }
    }

    fn build_with(host_config: HostConfig) -> Result<Spec> {
        let record = record(host_config);
        build(&Inputs {
            record: &record,
            config: &Config::default(),
            names_dir: Path::new("/data/c0ffee"),
            reaper: Path::new("/data/c0ffee/init"),
            user: User { uid: 0, gid: 0, groups: vec![0], home: "/root".into() },
            network: Namespace::Private,
            pid: Namespace::Private,
            ipc: Namespace::Private,
            uts: Namespace::Private,
            cgroup: Namespace::Private,
            remap: None,
            mount_sources: Vec::new(),
            shared_memory: None,
            host_name: "host",
            link_variables: Vec::new(),
        })
    }

    #[test]
    fn a_plain_container_is_confined() {
        let spec = build_with(HostConfig {
            security_opt: Some(vec!["seccomp=unconfined".into()]),
            ..Default::default()
        })
        .unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["sh", "-c", "true"]);
        let env = process.env().as_ref().unwrap();
        assert!(
            env.iter().any(|e| e == "HOSTNAME=web")
                && env.iter().any(|e| e == "A=b")
                && env.iter().any(|e| e == "HOME=/root")
        );
        assert_eq!(
            spec.linux().as_ref().unwrap().cgroups_path().as_deref(),
            Some(Path::new("/brigantine/c0ffee"))
        );
        assert_eq!(spec.linux().as_ref().unwrap().namespaces().as_ref().unwrap().len(), 6);
        assert_eq!(spec.hostname().as_deref(), Some("web"));
    }

    #[test]
    fn bad_options_are_refused() {
        let error =
            build_with(HostConfig { security_opt: Some(vec!["colour=red".into()]), ..Default::default() })
                .unwrap_err();
        assert_eq!(error.to_string(), "invalid --security-opt 2: \"colour=red\"");
    }
}
