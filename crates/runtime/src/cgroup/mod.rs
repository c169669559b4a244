//! Control groups: one handle over v1, v2 and the hybrid of both.
//!
//! A group is addressed from the root of each hierarchy; processes that are not the container's
//! are never moved, and no directory above the group's own is ever changed except to be created
//! (and, on v2, to hand controllers down).

mod devices;
mod files;
mod hierarchy;
mod limits;
mod making;
mod oom;
mod processes;
mod rdt;
mod stats;
mod systemd;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind};
use crate::spec::{LinuxIntelRdt, LinuxResources};
use files::{children, make_dirs, read, refuse_used, remove, write, write_lines};
use hierarchy::Hierarchies;
use rdt::Class;
use systemd::{Placeholder, Unit};

pub(crate) use making::Making;

pub use oom::OomWatch;
pub use stats::{
    BlkioEntry, BlkioStats, CpuStats, HugetlbStats, MemoryStats, PidsStats, PressureStats, Stats,
};

/// How long the kernel may take to stop, kill or let go of a group's processes.
const PATIENCE: Duration = Duration::from_secs(10);

/// A container's control group: one directory per v1 hierarchy, or one for all on v2.
/// Serialisable: whoever reads it back has the same handle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Absolute within the hierarchies, e.g. `/brigantine/<id>`.
    path: String,
    /// v1 controller name → the group's directory.
    v1: Vec<(String, PathBuf)>,
    /// The group's directory in the unified hierarchy.
    v2: Option<PathBuf>,
    /// Whose it is, if it is systemd's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unit: Option<Unit>,
    /// The class of service that its processes have besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    class: Option<Class>,
}

impl Cgroup {
    /// The group's path within its hierarchies.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Opens the existing group at `path` (absolute in each hierarchy).
    pub fn open(path: &str) -> Result<Self, Error> {
        let path = clean(path)?;
        let found = Hierarchies::get()?;
        let mut v1: Vec<(String, PathBuf)> = found
            .v1
            .iter()
            .map(|(name, mount)| (name.clone(), below(mount, &path)))
            .filter(|(_, dir)| dir.is_dir())
            .collect();
        v1.sort();
        let v2 = found.v2.as_ref().map(|mount| below(mount, &path)).filter(|dir| dir.is_dir());
        if v1.is_empty() && v2.is_none() {
            return Err(Error::new(Kind::State, format!("cgroup {path:?} does not exist")));
        }
        Ok(Self { path, v1, v2, unit: None, class: None })
    }

    /// Creates the group at `path` and writes the limits; on failure nothing is left.
    pub fn create(path: &str, resources: Option<&LinuxResources>) -> Result<Self, Error> {
        let mut making = Making::at(path, resources)?;
        making.finish()?;
        Ok(making.keep())
    }

    /// Has systemd make the group: `path` is `slice:prefix:name`. What comes with it keeps it until the
    /// container's process is in it.
    pub(crate) fn create_unit(
        path: Option<&str>,
        id: &str,
        user: bool,
        resources: Option<&LinuxResources>,
        annotations: &[(String, String)],
    ) -> Result<(Self, Placeholder), Error> {
        let found = Hierarchies::get()?;
        let unit = Unit::parse(path, id, user)?;
        let description = format!("container {id}");
        let placeholder = unit.start(&description, resources, annotations, found.v1.is_empty())?;
        let mut group = Self { path: String::new(), v1: Vec::new(), v2: None, unit: Some(unit), class: None };
        let made = systemd::path_of(placeholder.pid).and_then(|path| {
            group.path = path;
            let mut wanted = limits::controllers(resources);
            // Where systemd looks for a unit's processes.
            wanted.push("systemd");
            let mut made = Vec::new();
            group.lay_out(found, &wanted, &mut made)?;
            // In a unit of systemd's waits the process that it was asked for with: it is nobody else's.
            group.make_version_1(found, &mut made)?;
            group.apply(resources)
        });
        match made {
            Ok(()) => Ok((group, placeholder)),
            Err(error) => {
                drop(placeholder);
                // The first failure is the one to tell.
                drop(group.delete());
                Err(error)
            }
        }
    }

    /// Gives what runs in the group a class of service.
    pub(crate) fn classify(&mut self, id: &str, wish: &LinuxIntelRdt) -> Result<(), Error> {
        self.class = Some(Class::make(id, wish)?);
        Ok(())
    }

    /// Changes the class of service: lines of resctrl's schemata.
    pub(crate) fn reclassify(&self, lines: &[String]) -> Result<(), Error> {
        match &self.class {
            Some(class) => class.write(lines),
            None => Err(Error::new(
                Kind::State,
                "the container has no class of service: its spec has no linux.intelRdt",
            )),
        }
    }

    /// Moves the container's process into the group by the hand of its manager, if the caller's own cannot.
    pub(crate) fn attach(&self, pid: i32) -> Result<(), Error> {
        if let Some(class) = &self.class {
            class.enter(pid)?;
        }
        match &self.unit {
            Some(unit) if unit.is_users() => unit.attach(pid),
            _ => Ok(()),
        }
    }

    fn is_attached_to(&self) -> bool {
        self.unit.as_ref().is_some_and(Unit::is_users)
    }

    /// No group at all: processes stay where their creator is.
    pub(crate) fn none(path: &str) -> Self {
        Self { path: path.to_owned(), v1: Vec::new(), v2: None, unit: None, class: None }
    }

    /// Whether a group that could not be made for `error` is nothing that anybody asked for.
    pub(crate) fn dispensable(error: &Error, resources: Option<&LinuxResources>) -> bool {
        let forbidden =
            matches!(error.errno(), Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::ENOENT));
        let mut asked = resources.cloned().unwrap_or_default();
        // Whoever has no privileges can make no devices either.
        asked.set_devices(None);
        forbidden && asked == LinuxResources::default()
    }

    /// Groups below this one: each of `below` is (controllers, path), no controllers meaning all others.
    pub(crate) fn inner(&self, below: &[(Vec<String>, String)]) -> Result<Self, Error> {
        let path_of = |controller: &str| {
            let own = below.iter().find(|(list, _)| list.iter().any(|c| c == controller));
            own.or_else(|| below.iter().find(|(list, _)| list.is_empty())).map(|(_, path)| path.as_str())
        };
        let at = |dir: &Path, controller: &str| -> Result<PathBuf, Error> {
            let Some(path) = path_of(controller).filter(|p| !p.trim_matches('/').is_empty()) else {
                return Ok(dir.to_owned());
            };
            let clean = clean(path).map_err(|e| Error::invalid(format!("bad sub cgroup path: {e}")))?;
            let inner = dir.join(clean.trim_start_matches('/'));
            if !inner.is_dir() {
                return Err(Error::os(
                    format!("exec: adding pid to cgroup {}", inner.display()),
                    rustix::io::Errno::NOENT,
                ));
            }
            Ok(inner)
        };
        for (list, _) in below {
            if let Some(unknown) = list.iter().find(|c| self.v1_dir(c).is_none()) {
                return Err(Error::invalid(format!(
                    "unknown controller {unknown}: the container has no such cgroup of version 1"
                )));
            }
        }
        let v1 = self.v1.iter().map(|(name, dir)| Ok((name.clone(), at(dir, name)?)));
        Ok(Self {
            path: self.path.clone(),
            v1: v1.collect::<Result<_, Error>>()?,
            // In a hybrid, the unified group holds what version 1 lacks; it is not asked for by name.
            v2: match &self.v2 {
                Some(dir) if self.v1.is_empty() => Some(at(dir, "")?),
                other => other.clone(),
            },
            unit: None,
            class: self.class.clone(),
        })
    }

    /// Decides on the group's directories, and makes that of the unified hierarchy: processes are born there. Whether
    /// it was there before; if not, `made` gets it.
    fn lay_out(
        &mut self,
        found: &Hierarchies,
        wanted: &[&str],
        made: &mut Vec<PathBuf>,
    ) -> Result<bool, Error> {
        let mut there = false;
        let asked = found.v1.iter().filter(|(name, _)| wanted.contains(&name.as_str()));
        self.v1 = asked.map(|(name, mount)| (name.clone(), below(mount, &self.path))).collect();
        // In a hybrid as well: for a controller that v1 lacks, and because programs take a process's
        // group there for its name. Entering it costs nothing, since the clone does it.
        if let Some(mount) = &found.v2 {
            let lacks =
                |name: &&str| self.v1_dir(name).is_none() && found.v2_controllers.iter().any(|c| c == name);
            let needed = self.v1.is_empty() || wanted.iter().any(lacks);
            let dir = below(mount, &self.path);
            match hierarchy::make_v2(mount, &dir, &found.v2_controllers) {
                Ok(new) => {
                    there |= !new;
                    made.extend(new.then(|| dir.clone()));
                    self.v2 = Some(dir);
                }
                Err(error) if needed => return Err(error),
                // Read-only here, and nothing depends on it.
                Err(_) => {}
            }
        }
        if self.v1.is_empty() && self.v2.is_none() {
            return Err(Error::unsupported("no cgroup hierarchy is mounted"));
        }
        Ok(there)
    }

    /// Makes the directories of version 1. Whether any was there before; `made` gets the others.
    fn make_version_1(&self, found: &Hierarchies, made: &mut Vec<PathBuf>) -> Result<bool, Error> {
        let mut there = false;
        for (name, dir) in &self.v1 {
            let Some((_, mount)) = found.v1.iter().find(|(found, _)| found == name) else { continue };
            if make_dirs(mount, dir, name == "cpuset")? {
                made.push(dir.clone());
            } else {
                // Controllers that are mounted together share it.
                there |= !made.contains(dir);
            }
        }
        Ok(there)
    }

    fn apply(&self, resources: Option<&LinuxResources>) -> Result<(), Error> {
        let Some(resources) = resources else { return Ok(()) };
        limits::apply(self, resources)?;
        devices::apply(self, resources)
    }

    /// Adds what these limits need and the group was made without, and moves its processes there.
    pub fn extend(&mut self, resources: &LinuxResources) -> Result<(), Error> {
        for (name, mount) in &Hierarchies::get()?.v1 {
            let wanted = limits::controllers(Some(resources)).contains(&name.as_str());
            if !wanted || self.v1.is_empty() || self.v1_dir(name).is_some() {
                continue;
            }
            let dir = below(mount, &self.path);
            make_dirs(mount, &dir, name == "cpuset")?;
            for pid in self.procs()? {
                match write(&dir.join("cgroup.procs"), &pid.to_string()) {
                    // It has just ended.
                    Err(e) if e.errno() == Some(libc::ESRCH) => {}
                    other => other?,
                }
            }
            self.v1.push((name.clone(), dir));
        }
        Ok(())
    }

    pub(crate) fn v1_dir(&self, controller: &str) -> Option<&Path> {
        self.v1.iter().find(|(name, _)| name == controller).map(|(_, dir)| dir.as_path())
    }

    pub(crate) fn v2_dir(&self) -> Option<&Path> {
        self.v2.as_deref()
    }

    /// Whether this machine has no hierarchy of version 1.
    pub(crate) fn version_2_alone() -> Result<bool, Error> {
        Ok(Hierarchies::get()?.v1.is_empty())
    }

    /// True where the unified hierarchy is the only one.
    pub fn is_unified(&self) -> bool {
        self.v1.is_empty()
    }

    /// Each directory once (v1 controllers may share one).
    fn directories(&self) -> Vec<&Path> {
        let mut all: Vec<&Path> = self.v1.iter().map(|(_, dir)| dir.as_path()).collect();
        all.extend(self.v2.as_deref());
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Controller directories as a container sees them: the mount's directory name, then the
    /// controllers' own names, then the group's directory.
    pub(crate) fn v1_views(&self) -> Vec<(String, Vec<String>, PathBuf)> {
        let mut views: Vec<(String, Vec<String>, PathBuf)> = Vec::new();
        for (name, dir) in &self.v1 {
            if let Some(view) = views.iter_mut().find(|(_, _, seen)| seen == dir) {
                view.1.push(name.clone());
                continue;
            }
            let depth = Path::new(&self.path).components().count() - 1;
            let mount = dir.ancestors().nth(depth).and_then(Path::file_name);
            let label = mount.map_or_else(|| name.clone(), |m| m.to_string_lossy().into_owned());
            views.push((label, vec![name.clone()], dir.clone()));
        }
        views
    }

    /// For a clone straight into the group, which the kernel does in the unified hierarchy.
    pub(crate) fn clone_target(&self) -> Result<Option<OwnedFd>, Error> {
        use rustix::fs::{Mode, OFlags, open};
        let Some(dir) = self.v2.as_deref().filter(|_| !self.is_attached_to()) else { return Ok(None) };
        open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map(Some)
            .map_err(|e| Error::os(format!("opening cgroup {}", dir.display()), e))
    }

    /// The directories that a process has to enter itself, for a clone cannot do it.
    pub(crate) fn entrances(&self) -> Vec<&Path> {
        let version_1 = |dir: &&Path| self.v2.as_deref() != Some(*dir);
        self.directories().into_iter().filter(version_1).collect()
    }

    /// Moves a process into the group.
    pub fn add(&self, pid: i32) -> Result<(), Error> {
        let text = pid.to_string();
        for dir in self.directories() {
            write(&dir.join("cgroup.procs"), &text)?;
        }
        self.class.as_ref().map_or(Ok(()), |class| class.enter(pid))
    }

    pub fn stats(&self) -> Result<Stats, Error> {
        stats::read(self)
    }

    /// Changes limits; what is `None` stays. Device rules are fixed at creation.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        if let Some(unit) = &self.unit {
            unit.update(resources, self.is_unified())?;
        }
        limits::apply(self, resources)
    }

    /// Removes the group and everything below it; a group that is gone is no error.
    pub fn delete(&self) -> Result<(), Error> {
        if let Some(unit) = &self.unit {
            unit.stop()?;
        }
        for dir in self.directories() {
            remove(dir)?;
        }
        self.class.as_ref().map_or(Ok(()), Class::delete)
    }

    /// Removes the group if nobody is in it and nothing below it; whether that was so. systemd's groups are not.
    pub(crate) fn delete_unused(&self) -> bool {
        let gone = |dir: &&Path| match fs::remove_dir(dir) {
            Ok(()) => true,
            Err(e) => e.kind() == io::ErrorKind::NotFound,
        };
        self.unit.is_none() && self.directories().iter().all(gone)
    }

    /// True while any directory of the group exists.
    pub fn exists(&self) -> bool {
        self.directories().iter().any(|dir| dir.exists())
    }

    /// One directory that stands for the group (for display and for tests).
    pub fn directory(&self) -> Option<&Path> {
        self.v2.as_deref().or_else(|| self.v1.first().map(|(_, dir)| dir.as_path()))
    }

    /// Controller → directory, as the state of an OCI container lists them.
    pub fn paths(&self) -> Vec<(String, PathBuf)> {
        let mut all = self.v1.clone();
        all.extend(self.v2.iter().map(|dir| (String::new(), dir.clone())));
        all
    }
}

/// Whether device rules can be made of a description; what else is in it only the kernel can say.
pub(crate) fn check(resources: &LinuxResources) -> Result<(), Error> {
    devices::check(resources)
}

fn below(mount: &Path, path: &str) -> PathBuf {
    mount.join(path.trim_start_matches('/'))
}

/// An absolute path without `.`, `..` or empty parts that names a group of its own.
fn clean(path: &str) -> Result<String, Error> {
    if path.contains('\0') || path.contains('\n') {
        return Err(Error::invalid(format!("cgroup path {path:?}: control characters")));
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(Error::invalid(format!("cgroup path {path:?}: \"..\" is not allowed"))),
            part => parts.push(part),
        }
    }
    if parts.is_empty() {
        return Err(Error::invalid(format!("cgroup path {path:?} names the root")));
    }
    Ok(format!("/{}", parts.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_group_is_below_the_root_or_refused(path in "[a-b/.\\n]{0,16}") {
            if let Ok(clean) = clean(&path) {
                prop_assert!(clean.starts_with('/') && clean.len() > 1 && !clean.contains('\n'));
                prop_assert!(clean[1..].split('/').all(|part| !["", ".", ".."].contains(&part)));
                prop_assert_eq!(super::clean(&clean).unwrap(), clean);
            }
        }
    }

    #[test]
    fn paths_are_absolute_and_stay_below_the_root() {
        assert_eq!(clean("a//b/./c").unwrap(), "/a/b/c");
        for bad in ["", "/", "/a/../..", "a\nb"] {
            assert!(clean(bad).is_err(), "{bad:?}");
        }
    }
}
