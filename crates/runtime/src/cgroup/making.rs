//! A container's group on the way to being made, by either driver.
//!
//! A process is born in the group of the unified hierarchy; those of version 1 it enters later, so they are made beside
//! it. Invariant: unless the group is kept, nothing of it stays but what was there before.

use std::path::PathBuf;

use super::systemd::Placeholder;
use super::{Cgroup, Hierarchies, clean, limits, refuse_used, remove};
use crate::error::Error;
use crate::spec::{LinuxResources, Spec};

#[derive(Debug)]
pub(crate) struct Making {
    group: Cgroup,
    /// To be written when the rest of the group is made.
    resources: Option<LinuxResources>,
    complete: bool,
    /// What did not exist before, until the group is complete.
    made: Vec<PathBuf>,
    /// What comes with a scope of systemd's keeps it while it has no process.
    placeholder: Option<Placeholder>,
    kept: bool,
}

impl Making {
    /// The group that a spec asks for. One of systemd's is complete, and so is that of a caller who may have to do
    /// without; of others there is what a process is born in.
    pub(crate) fn begin(id: &str, spec: &Spec, systemd: bool, rootless: bool) -> Result<Self, Error> {
        let linux = spec.linux().as_ref();
        let given = linux.and_then(|l| l.cgroups_path().as_ref());
        let resources = linux.and_then(|l| l.resources().as_ref());
        let mut making = if systemd {
            let annotations = spec.annotations().iter().flatten();
            let annotations: Vec<_> = annotations.map(|(k, v)| (k.clone(), v.clone())).collect();
            let given = given.map(|path| path.to_string_lossy());
            // Whoever is not root has a manager of its own.
            let user = rootless && !rustix::process::geteuid().is_root();
            let (group, placeholder) =
                Cgroup::create_unit(given.as_deref(), id, user, resources, &annotations)?;
            Self::complete(group, Some(placeholder))
        } else {
            let path = match given {
                Some(path) if path.is_absolute() => path.to_string_lossy().into_owned(),
                Some(path) if !path.as_os_str().is_empty() => format!("/brigantine/{}", path.display()),
                _ => format!("/brigantine/{id}"),
            };
            if rootless {
                match Cgroup::create(&path, resources) {
                    Err(e) if Cgroup::dispensable(&e, resources) => Self::complete(Cgroup::none(&path), None),
                    other => Self::complete(other?, None),
                }
            } else {
                Self::at(&path, resources)?
            }
        };
        if let Some(wish) = linux.and_then(|l| l.intel_rdt().as_ref()) {
            making.group.classify(id, wish)?;
        }
        Ok(making)
    }

    /// The group at `path`, with what a process is born in.
    pub(super) fn at(path: &str, resources: Option<&LinuxResources>) -> Result<Self, Error> {
        let group = Cgroup { path: clean(path)?, v1: Vec::new(), v2: None, unit: None, class: None };
        let mut making = Self {
            group,
            resources: resources.cloned(),
            complete: false,
            made: Vec::new(),
            placeholder: None,
            kept: false,
        };
        let wanted = limits::controllers(resources);
        let there = making.group.lay_out(Hierarchies::get()?, &wanted, &mut making.made)?;
        // Now, for later the container's own process is in it.
        if let Some(dir) = making.group.v2_dir().filter(|_| there) {
            refuse_used(dir)?;
        }
        Ok(making)
    }

    fn complete(group: Cgroup, placeholder: Option<Placeholder>) -> Self {
        Self { group, resources: None, complete: true, made: Vec::new(), placeholder, kept: false }
    }

    /// The group as it will be: its directories are decided on, but not all of them are there.
    pub(crate) fn planned(&self) -> &Cgroup {
        &self.group
    }

    /// Makes what is not there yet, and writes the limits.
    pub(crate) fn finish(&mut self) -> Result<&Cgroup, Error> {
        if !self.complete {
            if self.group.make_version_1(Hierarchies::get()?, &mut self.made)? {
                self.group.entrances().into_iter().try_for_each(refuse_used)?;
            }
            self.group.apply(self.resources.as_ref())?;
            self.complete = true;
        }
        Ok(&self.group)
    }

    /// The container's process is in the group now, and keeps it.
    pub(crate) fn keep(mut self) -> Cgroup {
        self.kept = true;
        self.group.clone()
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        drop(self.placeholder.take());
        // In what follows, the cause of the failure is what matters: what stays is empty, and goes with the record.
        if self.kept {
            return;
        }
        if self.complete {
            drop(self.group.delete());
            return;
        }
        for dir in &self.made {
            drop(remove(dir));
        }
        if let Some(class) = &self.group.class {
            drop(class.delete());
        }
    }
}
