//! The mounts of a container: the system's, the three name files, and what was asked for.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use brigantine_runtime::profile;
use brigantine_runtime::spec::{LinuxIdMapping, LinuxIdMappingBuilder, Mount, MountBuilder};

use super::{Inputs, Namespace};
use crate::containers::Record;
use crate::error::Context;
use crate::volumes::{MountKind, MountRecord};
use crate::{Error, Result};

/// Where `--init` finds the reaper inside the container.
pub(super) const INIT: &str = "/sbin/brig-init";

pub(super) fn mounts(inputs: &Inputs<'_>) -> Result<Vec<Mount>> {
    let record = inputs.record;
    let host = &record.host_config;
    let shm = host.shm_size.filter(|size| *size > 0).unwrap_or(inputs.config.default_shm_size);
    let mut own: Vec<Mount> = Vec::new();
    for (mount, source) in record.mounts.iter().zip(&inputs.mount_sources) {
        let mut made = one(mount, &source.to_string_lossy())?;
        if mount.map_owner {
            map_owner(&mut made, source, inputs)?;
        // What is the engine's own keeps its owners on disk; a directory of the host's shows its true ones.
        } else if mount.kind == MountKind::Volume {
            shift(&mut made, inputs);
        }
        own.push(made);
    }
    for (destination, options) in host.tmpfs.iter().flatten() {
        let mut all = ["noexec", "nosuid", "nodev"].map(str::to_owned).to_vec();
        for option in options.split(',').filter(|option| !option.is_empty()) {
            // `exec` takes back `noexec`, and so on.
            let opposite = option.strip_prefix("no").map_or_else(|| format!("no{option}"), str::to_owned);
            all.retain(|earlier| *earlier != opposite && earlier != option);
            all.push(option.to_owned());
        }
        own.push(mount(&crate::volumes::clean(destination), "tmpfs", "tmpfs", all)?);
    }
    own.sort_by_key(|mount| mount.destination().components().count());

    let covered = |destination: &Path| own.iter().any(|mount| mount.destination() == destination);
    let mut all: Vec<Mount> = Vec::new();
    for mut default in profile::mounts(u64::try_from(shm).unwrap_or_default()) {
        let destination = default.destination().clone();
        let under_dev = covered(Path::new("/dev")) && destination.starts_with("/dev");
        if covered(&destination) || under_dev {
            continue;
        }
        if destination == Path::new("/dev/shm") {
            match (&inputs.ipc, host.ipc_mode.as_deref()) {
                (Namespace::Of(_), _) if inputs.shared_memory.is_some() => {
                    let source = inputs.shared_memory.as_deref().unwrap_or(Path::new(""));
                    let options = ["rbind", "rprivate"].map(str::to_owned).to_vec();
                    default = mount("/dev/shm", "bind", &source.to_string_lossy(), options)?;
                }
                (Namespace::Host, _) => {
                    default = mount(
                        "/dev/shm",
                        "bind",
                        "/dev/shm",
                        ["rbind", "rprivate"].map(str::to_owned).to_vec(),
                    )?;
                }
                (_, Some("none")) => continue,
                _ => {}
            }
        }
        if record.privileged() && matches!(default.typ().as_deref(), Some("sysfs" | "cgroup")) {
            let writable = default.options().iter().flatten().filter(|o| *o != "ro").cloned().collect();
            default.set_options(Some(writable));
        }
        all.push(default);
    }
    for (file, destination) in
        [("resolv.conf", "/etc/resolv.conf"), ("hostname", "/etc/hostname"), ("hosts", "/etc/hosts")]
    {
        if !covered(Path::new(destination)) {
            let source = inputs.names_dir.join(file);
            let options = ["rbind", "rprivate"].map(str::to_owned).to_vec();
            let mut file = mount(destination, "bind", &source.to_string_lossy(), options)?;
            shift(&mut file, inputs);
            all.push(file);
        }
    }
    if host.init.unwrap_or(inputs.config.init) {
        let options = ["bind", "ro", "rprivate"].map(str::to_owned).to_vec();
        all.push(mount(INIT, "bind", &inputs.reaper.to_string_lossy(), options)?);
    }
    all.append(&mut own);
    Ok(all)
}

/// Owners on disk are those seen in the container, whatever ids the container's stand for.
fn shift(mount: &mut Mount, inputs: &Inputs<'_>) {
    if inputs.remap.is_some() {
        let mut options = mount.options().clone().unwrap_or_default();
        options.push("idmap".to_owned());
        mount.set_options(Some(options));
    }
}

/// Whoever owns the source is seen as the container's user, and the other way round; all other ids are what they are.
fn map_owner(mount: &mut Mount, source: &Path, inputs: &Inputs<'_>) -> Result<()> {
    let what = || format!("map the owner of {}", source.display());
    if inputs.remap.is_some() {
        return Err(Error::invalid(format!(
            "{}: this needs a container with the host's user namespace (--userns=host)",
            what()
        )));
    }
    let found = std::fs::metadata(source).doing(what)?;
    if (found.uid(), found.gid()) == (inputs.user.uid, inputs.user.gid) {
        return Ok(());
    }
    mount.set_uid_mappings(Some(exchange(found.uid(), inputs.user.uid)?));
    mount.set_gid_mappings(Some(exchange(found.gid(), inputs.user.gid)?));
    Ok(())
}

/// All ids, with these two exchanged.
fn exchange(one: u32, other: u32) -> Result<Vec<LinuxIdMapping>> {
    let (low, high) = (one.min(other), one.max(other));
    let mut maps = Vec::new();
    let mut add = |disk: u32, seen: u32, size: u32| -> Result<()> {
        if size > 0 {
            let map = LinuxIdMappingBuilder::default().container_id(disk).host_id(seen).size(size).build();
            maps.push(map.doing(|| "describe an id mapping".to_owned())?);
        }
        Ok(())
    };
    if low == high {
        add(0, 0, u32::MAX)?;
        return Ok(maps);
    }
    add(0, 0, low)?;
    add(low, high, 1)?;
    add(low + 1, low + 1, high - low - 1)?;
    add(high, low, 1)?;
    // The last id of all means none.
    add(high + 1, high + 1, u32::MAX - high - 1)?;
    Ok(maps)
}

fn one(record: &MountRecord, source: &str) -> Result<Mount> {
    let access = if record.rw { "rw" } else { "ro" };
    match record.kind {
        MountKind::Tmpfs => {
            let mut options = ["noexec", "nosuid", "nodev", access].map(str::to_owned).to_vec();
            for option in &record.options {
                let opposite = option.strip_prefix("no").map_or_else(|| format!("no{option}"), str::to_owned);
                options.retain(|earlier| *earlier != opposite);
                options.push(option.clone());
            }
            mount(&record.destination, "tmpfs", "tmpfs", options)
        }
        MountKind::Image => {
            let options = ["bind", "ro", "rprivate"].map(str::to_owned).to_vec();
            mount(&record.destination, "bind", source, options)
        }
        MountKind::Bind | MountKind::Volume => {
            let bind = if record.non_recursive { "bind" } else { "rbind" };
            // Of a writable one nothing is said: what the host's mount forbids, it forbids in the container too.
            let recursive = record.read_only_recursive && !record.non_recursive;
            let access = (!record.rw).then_some(if recursive { "rro" } else { "ro" });
            let propagation = if record.propagation.is_empty() { "rprivate" } else { &record.propagation };
            let options = [Some(bind), access, Some(propagation)].into_iter().flatten().map(str::to_owned);
            let options = options.collect();
            mount(&record.destination, "bind", source, options)
        }
    }
}

fn mount(destination: &str, typ: &str, source: &str, options: Vec<String>) -> Result<Mount> {
    MountBuilder::default()
        .destination(destination)
        .typ(typ)
        .source(source)
        .options(options)
        .build()
        .doing(|| format!("describe the mount at {destination}"))
}

/// The propagation the root must have for a shared or slave bind below it to work.
pub(super) fn root_propagation(record: &Record) -> Option<&'static str> {
    let any =
        |words: [&str; 2]| record.mounts.iter().any(|mount| words.contains(&mount.propagation.as_str()));
    if any(["shared", "rshared"]) {
        Some("shared")
    } else if any(["slave", "rslave"]) {
        Some("slave")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ids_change_places_and_the_others_stay() {
        let maps = exchange(1000, 0).unwrap();
        let seen = |disk: u32| {
            maps.iter().find_map(|map| {
                let at = disk.checked_sub(map.container_id()).filter(|at| *at < map.size())?;
                Some(map.host_id() + at)
            })
        };
        for (disk, expected) in
            [(0, 1000), (1000, 0), (1, 1), (999, 999), (1001, 1001), (4_294_967_294, 4_294_967_294)]
        {
            assert_eq!(seen(disk), Some(expected));
        }
        assert_eq!(seen(u32::MAX), None);
        assert_eq!(exchange(7, 7).unwrap().len(), 1);
    }
}
