//! The local driver's mount options (`type`, `device`, `o`): file systems that are mounted at a volume's directory while
//! containers run with it, as mount(8) would.
//!
//! Invariant: such a file system is mounted on the host exactly once, from the first container's start to the last
//! one's end, also when the daemon was away in between.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::net::ToSocketAddrs;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};

use super::{LOCAL, MountRecord, Volumes};
use crate::error::Context;
use crate::sync::lock;
use crate::{Error, Result};

/// The option that limits a volume's own directory.
pub(super) const SIZE: &str = "size";

/// What options ask to be mounted.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mount {
    typ: String,
    device: String,
    flags: MountFlags,
    /// What is for the file system itself.
    data: Vec<String>,
}

impl Mount {
    /// `None` when nothing is to be mounted: no options, or a bind, which needs none.
    pub(super) fn of(options: &BTreeMap<String, String>) -> Result<Option<Self>> {
        if options.keys().all(|name| name == SIZE) {
            return Ok(None);
        }
        let get = |name: &str| options.get(name).map(String::as_str).filter(|value| !value.is_empty());
        let words: Vec<&str> =
            get("o").unwrap_or_default().split(',').filter(|word| !word.is_empty()).collect();
        let device = get("device").ok_or_else(|| Error::invalid("missing required option: \"device\""))?;
        if words.iter().any(|word| matches!(*word, "bind" | "rbind")) {
            return if Path::new(device).is_absolute() {
                Ok(None)
            } else {
                Err(Error::invalid(format!("invalid device: {device}: must be an absolute path")))
            };
        }
        let typ = get("type").ok_or_else(|| Error::invalid("missing required option: \"type\""))?;
        let mut flags = MountFlags::empty();
        let mut data = Vec::new();
        for word in words {
            match flag(word) {
                Some((set, true)) => flags |= set,
                Some((clear, false)) => flags -= clear,
                None => data.push(word.to_owned()),
            }
        }
        if [typ, device].into_iter().chain(data.iter().map(String::as_str)).any(|text| text.contains('\0')) {
            return Err(Error::invalid("a volume option contains a zero byte"));
        }
        Ok(Some(Self { typ: typ.to_owned(), device: device.to_owned(), flags, data }))
    }

    /// Mounts it. Blocks.
    fn mount(&self, target: &Path) -> Result<()> {
        let what = || format!("failed to mount local volume: mount {}:{}", self.device, target.display());
        let mut data = self.data.clone();
        for option in &mut data {
            // The kernel resolves no names; mount.nfs and mount.cifs do.
            if let Some(host) = option.strip_prefix("addr=")
                && matches!(self.typ.as_str(), "nfs" | "nfs4" | "cifs")
                && host.parse::<std::net::IpAddr>().is_err()
            {
                let mut found = (host, 0_u16).to_socket_addrs().doing(|| format!("lookup {host}"))?;
                let address =
                    found.next().ok_or_else(|| Error::internal(format!("lookup {host}: no such host")))?;
                *option = format!("addr={}", address.ip());
            }
        }
        let data = CString::new(data.join(",")).doing(what)?;
        rustix::mount::mount(
            self.device.as_str(),
            target,
            self.typ.as_str(),
            self.flags,
            Some(data.as_c_str()),
        )
        .doing(what)
    }
}

/// A word of mount(8) that is a flag of mount(2), and whether it sets it.
fn flag(word: &str) -> Option<(MountFlags, bool)> {
    Some(match word {
        "ro" => (MountFlags::RDONLY, true),
        "rw" => (MountFlags::RDONLY, false),
        "nosuid" => (MountFlags::NOSUID, true),
        "suid" => (MountFlags::NOSUID, false),
        "nodev" => (MountFlags::NODEV, true),
        "dev" => (MountFlags::NODEV, false),
        "noexec" => (MountFlags::NOEXEC, true),
        "exec" => (MountFlags::NOEXEC, false),
        "sync" => (MountFlags::SYNCHRONOUS, true),
        "async" => (MountFlags::SYNCHRONOUS, false),
        "dirsync" => (MountFlags::DIRSYNC, true),
        "noatime" => (MountFlags::NOATIME, true),
        "atime" => (MountFlags::NOATIME, false),
        "nodiratime" => (MountFlags::NODIRATIME, true),
        "relatime" => (MountFlags::RELATIME, true),
        "strictatime" => (MountFlags::STRICTATIME, true),
        "defaults" => (MountFlags::empty(), true),
        _ => return None,
    })
}

/// Whether a file system is mounted at this directory.
fn is_mounted(dir: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
    statx(CWD, dir, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

impl Volumes {
    /// Mounts what a container's volumes ask for; for a start. What was mounted when one fails is unmounted. Blocks, on a
    /// thread that may.
    pub(crate) fn mount_for(&self, container: &str, mounts: &[MountRecord]) -> Result<()> {
        let mounted = self.mount_local(container, mounts).and_then(|()| self.mount_remote(container, mounts));
        if mounted.is_err() {
            self.unmount_for(container);
        }
        mounted
    }

    fn mount_local(&self, container: &str, mounts: &[MountRecord]) -> Result<()> {
        for name in mounts.iter().filter_map(MountRecord::volume) {
            let own = |record: &&super::Record| record.driver == LOCAL;
            let options =
                lock(&self.index).records.get(name).filter(own).map(|record| record.options.clone());
            let Some(mount) = Mount::of(&options.unwrap_or_default())? else { continue };
            let mut mounted = lock(&self.mounted);
            let dir = self.data_dir(name);
            if !is_mounted(&dir) {
                mount.mount(&dir)?;
            }
            mounted.entry(name.to_owned()).or_default().insert(container.to_owned());
        }
        Ok(())
    }

    /// Notes that a container that was found running, or has just ended, has its volumes mounted.
    pub(crate) fn mounted_for(&self, container: &str, mounts: &[MountRecord]) {
        self.remote_mounted_for(container, mounts);
        let mut mounted = lock(&self.mounted);
        for name in mounts.iter().filter_map(MountRecord::volume) {
            if is_mounted(&self.data_dir(name)) {
                mounted.entry(name.to_owned()).or_default().insert(container.to_owned());
            }
        }
    }

    /// A container has ended: unmounts what nobody else runs with. Blocks, on a thread that may.
    pub(crate) fn unmount_for(&self, container: &str) {
        self.unmount_remote(container);
        let mut mounted = lock(&self.mounted);
        mounted.retain(|name, users| {
            users.remove(container);
            if users.is_empty() {
                self.unmount(name);
            }
            !users.is_empty()
        });
    }

    /// Unmounts what no running container needs: a daemon was away when they ended. Blocks.
    pub(crate) fn unmount_unused(&self) {
        let mounted = lock(&self.mounted);
        let names: BTreeSet<String> = lock(&self.index)
            .records
            .iter()
            .filter(|(name, record)| {
                record.driver == LOCAL && !record.options.is_empty() && !mounted.contains_key(*name)
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            if is_mounted(&self.data_dir(&name)) {
                self.unmount(&name);
            }
        }
    }

    fn unmount(&self, name: &str) {
        let dir = self.data_dir(name);
        if let Err(error) = rustix::mount::unmount(&dir, UnmountFlags::empty()) {
            tracing::warn!(volume = name, %error, "unmount the volume's file system; it goes when it is not busy");
            if let Err(error) = rustix::mount::unmount(&dir, UnmountFlags::DETACH) {
                tracing::warn!(volume = name, %error, "detach the volume's file system");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Result<Option<Mount>> {
        Mount::of(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn options_are_flags_or_the_file_systems_own() {
        let mount = of(&[("type", "tmpfs"), ("device", "tmpfs"), ("o", "size=1m,noexec,uid=7,ro,rw")])
            .unwrap()
            .unwrap();
        assert_eq!(mount.flags, MountFlags::NOEXEC);
        assert_eq!(mount.data, ["size=1m", "uid=7"]);
        assert_eq!(of(&[]).unwrap(), None);
        assert_eq!(of(&[("type", "none"), ("o", "bind"), ("device", "/x")]).unwrap(), None);
        assert_eq!(of(&[("type", "tmpfs")]).unwrap_err().to_string(), "missing required option: \"device\"");
        assert_eq!(of(&[("device", "x")]).unwrap_err().to_string(), "missing required option: \"type\"");
    }
}
