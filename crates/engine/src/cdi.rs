//! Devices by name: the Container Device Interface (its specification, version 0.8), read and applied by ourselves.
//!
//! A vendor's file says what a container needs for a device: nodes, mounts, variables, hooks, groups. What a request
//! names and no file has is an error that says so, before anything is started.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use bollard_stubs::models::DeviceRequest;
use brigantine_runtime::spec::{
    HookBuilder, LinuxDeviceBuilder, LinuxDeviceCgroupBuilder, LinuxDeviceType, MountBuilder, Spec,
};
use serde::Deserialize;

use crate::error::Context;
use crate::{Error, Result};

/// Where vendors' files are; a later directory goes before an earlier one.
pub(crate) const DIRS: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];

/// No vendor's file is larger.
const LARGEST: u64 = 4 << 20;

/// The kind that `--gpus` means.
const GPUS: &str = "nvidia.com/gpu";

/// A vendor's file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    kind: String,
    #[serde(default)]
    devices: Vec<Device>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Edits {
    env: Vec<String>,
    device_nodes: Vec<Node>,
    mounts: Vec<Mount>,
    hooks: Vec<Hook>,
    #[serde(rename = "additionalGids")]
    additional_gids: Vec<u32>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Node {
    path: String,
    host_path: Option<String>,
    #[serde(rename = "type")]
    typ: Option<String>,
    major: Option<i64>,
    minor: Option<i64>,
    file_mode: Option<u32>,
    permissions: Option<String>,
    uid: Option<u32>,
    gid: Option<u32>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Mount {
    host_path: String,
    container_path: String,
    #[serde(rename = "type")]
    typ: Option<String>,
    options: Vec<String>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Hook {
    hook_name: String,
    path: String,
    args: Vec<String>,
    env: Vec<String>,
    timeout: Option<i64>,
}

/// What the requested devices need, the same thing once.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    edits: Vec<Edits>,
}

/// Finds the devices of a container's requests. Blocks.
pub(crate) fn find(requests: &[DeviceRequest], dirs: &[PathBuf]) -> Result<Wanted> {
    let mut names: Vec<(String, String)> = Vec::new();
    let mut known: Option<BTreeMap<String, Vec<File>>> = None;
    for request in requests {
        let driver = request.driver.as_deref().unwrap_or_default();
        let ids = request.device_ids.as_deref().unwrap_or_default();
        let files = known.get_or_insert_with(|| read(dirs));
        if driver == "cdi" {
            for id in ids {
                names.push(parse(id)?);
            }
            continue;
        }
        let gpu = request.capabilities.iter().flatten().any(|all| all.iter().any(|one| one == "gpu"));
        if !(gpu && matches!(driver, "" | "nvidia") && files.contains_key(GPUS)) {
            return Err(Error::invalid(format!(
                "could not select device driver \"{driver}\" with capabilities: {:?}",
                request.capabilities.as_deref().unwrap_or_default()
            )));
        }
        let kind = GPUS.to_owned();
        match request.count.unwrap_or_default() {
            -1 => names.push((kind, "all".to_owned())),
            count if count > 0 => names.extend((0..count).map(|index| (kind.clone(), index.to_string()))),
            _ => names.extend(ids.iter().map(|id| (kind.clone(), id.clone()))),
        }
    }
    let mut wanted = Wanted::default();
    let mut missing = Vec::new();
    let mut whole = BTreeSet::new();
    let files = known.unwrap_or_default();
    for (kind, name) in names {
        let found =
            files.get(&kind).into_iter().flatten().enumerate().find_map(|(at, file)| {
                Some((at, file, file.devices.iter().find(|device| device.name == name)?))
            });
        let Some((at, file, device)) = found else {
            missing.push(format!("{kind}={name}"));
            continue;
        };
        if whole.insert((kind, at)) {
            wanted.edits.push(file.container_edits.clone());
        }
        wanted.edits.push(device.container_edits.clone());
    }
    if missing.is_empty() {
        return Ok(wanted);
    }
    let dirs: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    Err(Error::invalid(format!(
        "unresolvable CDI devices {}: no file in {} has them",
        missing.join(", "),
        dirs.join(" or ")
    )))
}

/// `vendor.com/class=name`.
fn parse(text: &str) -> Result<(String, String)> {
    match text.split_once('=') {
        Some((kind, name)) if kind.contains('/') && !name.is_empty() => {
            Ok((kind.to_owned(), name.to_owned()))
        }
        _ => Err(Error::invalid(format!("invalid CDI device {text:?}: expected vendor.com/class=name"))),
    }
}

/// All files by kind, those that count first at the front. One that cannot be read is left out, and told.
fn read(dirs: &[PathBuf]) -> BTreeMap<String, Vec<File>> {
    let mut all: BTreeMap<String, Vec<File>> = BTreeMap::new();
    for dir in dirs.iter().rev() {
        let mut paths: Vec<PathBuf> =
            std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
            if !matches!(extension, "json" | "yaml" | "yml") {
                continue;
            }
            match read_file(&path, extension) {
                Ok(file) => all.entry(file.kind.clone()).or_default().push(file),
                Err(error) => tracing::warn!(error = error.report(), "a CDI file is left out"),
            }
        }
    }
    all
}

fn read_file(path: &Path, extension: &str) -> Result<File> {
    let what = || format!("read {}", path.display());
    if std::fs::metadata(path).doing(what)?.len() > LARGEST {
        return Err(Error::invalid(format!("{} is too large", path.display())));
    }
    let text = std::fs::read_to_string(path).doing(what)?;
    if extension == "json" {
        serde_json::from_str(&text).doing(what)
    } else {
        serde_saphyr::from_str(&text).doing(what)
    }
}

impl Wanted {
    /// Puts everything into a specification.
    pub(crate) fn apply(&self, spec: &mut Spec) -> Result<()> {
        for edits in &self.edits {
            environment(spec, edits);
            for node in &edits.device_nodes {
                device(spec, node)?;
            }
            for mount in &edits.mounts {
                let built = MountBuilder::default()
                    .destination(mount.container_path.as_str())
                    .typ(mount.typ.as_deref().unwrap_or("bind"))
                    .source(mount.host_path.as_str())
                    .options(with_bind(mount))
                    .build()
                    .doing(|| format!("describe the mount of {}", mount.host_path))?;
                let mut mounts = spec.mounts().clone().unwrap_or_default();
                mounts.push(built);
                spec.set_mounts(Some(mounts));
            }
            for one in &edits.hooks {
                hook(spec, one)?;
            }
        }
        Ok(())
    }
}

fn with_bind(mount: &Mount) -> Vec<String> {
    let mut options = mount.options.clone();
    let bind = matches!(mount.typ.as_deref(), None | Some("" | "bind"));
    if bind && !options.iter().any(|option| matches!(option.as_str(), "bind" | "rbind")) {
        options.insert(0, "bind".to_owned());
    }
    options
}

fn environment(spec: &mut Spec, edits: &Edits) {
    let Some(process) = spec.process_mut() else { return };
    let mut env = process.env().clone().unwrap_or_default();
    for variable in &edits.env {
        super::spec::set_variable(&mut env, variable);
    }
    process.set_env(Some(env));
    if !edits.additional_gids.is_empty() {
        let mut user = process.user().clone();
        let mut groups = user.additional_gids().clone().unwrap_or_default();
        for group in edits.additional_gids.iter().filter(|group| **group != 0) {
            if !groups.contains(group) {
                groups.push(*group);
            }
        }
        user.set_additional_gids(Some(groups));
        process.set_user(user);
    }
}

/// A node, and the right to use it.
fn device(spec: &mut Spec, node: &Node) -> Result<()> {
    let source = node.host_path.as_deref().filter(|path| !path.is_empty()).unwrap_or(&node.path);
    let what = || format!("use the device {source} of a CDI file");
    let found = std::fs::metadata(source);
    let kind = match (node.typ.as_deref().filter(|typ| !typ.is_empty()), &found) {
        (Some("c" | "u"), _) => LinuxDeviceType::C,
        (Some("b"), _) => LinuxDeviceType::B,
        (Some("p"), _) => LinuxDeviceType::P,
        (Some(other), _) => {
            return Err(Error::invalid(what()).because(format!("type {other:?} is not known")));
        }
        (None, Ok(found)) if found.file_type().is_block_device() => LinuxDeviceType::B,
        (None, Ok(found)) if found.file_type().is_fifo() => LinuxDeviceType::P,
        (None, Ok(_)) => LinuxDeviceType::C,
        (None, Err(error)) => return Err(Error::invalid(what()).because(error.to_string())),
    };
    let number = |given: Option<i64>, of: fn(u64) -> u32| match (given, &found) {
        (Some(number), _) if number != 0 => number,
        (_, Ok(found)) => i64::from(of(found.rdev())),
        (given, Err(_)) => given.unwrap_or_default(),
    };
    let (major, minor) = (number(node.major, rustix::fs::major), number(node.minor, rustix::fs::minor));
    let mode = node.file_mode.unwrap_or_else(|| found.as_ref().map_or(0o666, |found| found.mode() & 0o7777));
    let built = LinuxDeviceBuilder::default()
        .path(node.path.as_str())
        .typ(kind)
        .major(major)
        .minor(minor)
        .file_mode(mode)
        .uid(node.uid.unwrap_or_default())
        .gid(node.gid.unwrap_or_default())
        .build()
        .doing(what)?;
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    let mut devices = linux.devices().clone().unwrap_or_default();
    devices.retain(|device| device.path() != built.path());
    devices.push(built);
    linux.set_devices(Some(devices));
    if matches!(kind, LinuxDeviceType::C | LinuxDeviceType::B) {
        let rule = LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .typ(kind)
            .major(major)
            .minor(minor)
            .access(node.permissions.as_deref().filter(|text| !text.is_empty()).unwrap_or("rwm"))
            .build()
            .doing(what)?;
        let mut resources = linux.resources().clone().unwrap_or_default();
        let mut rules = resources.devices().clone().unwrap_or_default();
        rules.push(rule);
        resources.set_devices(Some(rules));
        linux.set_resources(Some(resources));
    }
    Ok(())
}

fn hook(spec: &mut Spec, one: &Hook) -> Result<()> {
    let what = || format!("use the hook {} of a CDI file", one.path);
    let mut builder =
        HookBuilder::default().path(one.path.as_str()).args(one.args.clone()).env(one.env.clone());
    if let Some(timeout) = one.timeout {
        builder = builder.timeout(timeout);
    }
    let built = builder.build().doing(what)?;
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    let with = |list: &Option<Vec<_>>| {
        let mut list = list.clone().unwrap_or_default();
        list.push(built.clone());
        Some(list)
    };
    match one.hook_name.as_str() {
        "createRuntime" | "prestart" => {
            let list = with(hooks.create_runtime());
            hooks.set_create_runtime(list);
        }
        "createContainer" => {
            let list = with(hooks.create_container());
            hooks.set_create_container(list);
        }
        "startContainer" => {
            let list = with(hooks.start_container());
            hooks.set_start_container(list);
        }
        "poststart" => {
            let list = with(hooks.poststart());
            hooks.set_poststart(list);
        }
        "poststop" => {
            let list = with(hooks.poststop());
            hooks.set_poststop(list);
        }
        other => return Err(Error::invalid(what()).because(format!("there is no hook {other:?}"))),
    }
    spec.set_hooks(Some(hooks));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(id: &str) -> Vec<DeviceRequest> {
        vec![DeviceRequest {
            driver: Some("cdi".into()),
            device_ids: Some(vec![id.into()]),
            ..DeviceRequest::default()
        }]
    }

    #[test]
    fn a_device_brings_what_its_file_says() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join("acme.yaml"),
            "cdiVersion: 0.6.0\nkind: acme.com/thing\ncontainerEdits:\n  env: [ALL=1]\ndevices:\n  - name: one\n    containerEdits:\n      env: [ONE=1]\n      deviceNodes:\n        - path: /dev/thing\n          hostPath: /dev/null\n          permissions: r\n      mounts:\n        - {hostPath: /usr, containerPath: /thing, options: [ro]}\n",
        )
        .unwrap();
        std::fs::write(dir.path().join("broken.json"), "{").unwrap();
        let dirs = [dir.path().to_owned()];
        let wanted = find(&request("acme.com/thing=one"), &dirs).unwrap();
        let mut spec = Spec::default();
        wanted.apply(&mut spec).unwrap();
        let env = spec.process().as_ref().unwrap().env().clone().unwrap();
        assert!(env.contains(&"ALL=1".to_owned()) && env.contains(&"ONE=1".to_owned()), "{env:?}");
        let linux = spec.linux().as_ref().unwrap();
        let device = linux.devices().as_ref().unwrap().last().unwrap().clone();
        assert_eq!((device.path().to_str(), device.major(), device.minor()), (Some("/dev/thing"), 1, 3));
        let rule = linux.resources().as_ref().unwrap().devices().as_ref().unwrap().last().unwrap().clone();
        assert_eq!(rule.access().as_deref(), Some("r"));
        let mount = spec.mounts().as_ref().unwrap().last().unwrap().clone();
        assert_eq!(mount.options().as_ref().unwrap(), &["bind", "ro"]);

        let error = find(&request("acme.com/thing=two"), &dirs).unwrap_err().to_string();
        assert!(error.starts_with("unresolvable CDI devices acme.com/thing=two"), "{error}");
        find(&request("nonsense"), &dirs).unwrap_err();
        let gpu = DeviceRequest {
            count: Some(-1),
            capabilities: Some(vec![vec!["gpu".into()]]),
            ..DeviceRequest::default()
        };
        let error = find(&[gpu], &dirs).unwrap_err().to_string();
        assert!(error.starts_with("could not select device driver"), "{error}");
    }
}
