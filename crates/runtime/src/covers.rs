//! Read-only and masked paths.

use std::collections::HashSet;
use std::path::{Component, Path};

use crate::error::Error;
use crate::mounts::{is_of_groups, target};
use crate::plan::Step;
use crate::spec::{Linux, Spec};

/// In the order of the spec, each path once.
pub(crate) fn compile(linux: &Linux) -> Result<Vec<Step>, Error> {
    let once = |list: Option<&Vec<String>>| {
        let mut seen = HashSet::new();
        let mut list = list.cloned().unwrap_or_default();
        list.retain(|path| seen.insert(path.clone()));
        list
    };
    let mut steps = Vec::new();
    for path in once(linux.readonly_paths().as_ref()) {
        steps.push(Step::Readonly(target(Path::new(&path), false)?));
    }
    for path in once(linux.masked_paths().as_ref()) {
        steps.push(Step::Mask(target(Path::new(&path), false)?));
    }
    Ok(steps)
}

/// Whether none of them can lead to where groups are mounted, whatever links there are: it does not matter then which comes
/// first. In a proc or sys file system of the container's own, links lead nowhere else.
pub(crate) fn are_apart_from_groups(spec: &Spec) -> bool {
    let mounts = || spec.mounts().iter().flatten();
    let is_own = |place: &str, typ: &str| {
        mounts().any(|m| m.destination() == Path::new(place) && m.typ().as_deref() == Some(typ))
    };
    let holds = |place: &str| {
        mounts().any(|m| {
            !is_of_groups(m) && m.destination() != Path::new(place) && m.destination().starts_with(place)
        })
    };
    let proc =
        is_own("/proc", "proc") && !mounts().any(|m| is_of_groups(m) && m.destination().starts_with("/proc"));
    let sys = is_own("/sys", "sysfs") && !holds("/sys");
    let groups_in_sys = mounts()
        .filter(|m| is_of_groups(m))
        .all(|m| !m.destination().starts_with("/sys") || m.destination().starts_with("/sys/fs/cgroup"));
    let is_apart = |path: &String| {
        let path = Path::new(path);
        let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        let below = |place: &str| path != Path::new(place) && path.starts_with(place);
        plain
            && (proc && below("/proc")
                || sys && groups_in_sys && below("/sys") && !path.starts_with("/sys/fs"))
    };
    let Some(linux) = spec.linux() else { return true };
    linux.readonly_paths().iter().chain(linux.masked_paths()).flatten().all(is_apart)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn apart(mounts: &[(&str, &str)], masked: &[&str]) -> bool {
        let mounts: Vec<_> = mounts.iter().map(|(to, typ)| json!({"destination": to, "type": typ})).collect();
        let spec = json!({
            "ociVersion": "1.0.2", "mounts": mounts,
            "linux": {"maskedPaths": masked, "readonlyPaths": ["/proc/sys"]},
        });
        are_apart_from_groups(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn what_may_lead_to_the_groups_waits_for_them() {
        let usual = [("/proc", "proc"), ("/sys", "sysfs"), ("/sys/fs/cgroup", "cgroup")];
        assert!(apart(&usual, &["/proc/kcore", "/sys/firmware"]));
        for path in ["/sys", "/sys/fs", "/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/proc", "/", "/etc/link"]
        {
            assert!(!apart(&usual, &[path]), "{path}");
        }
        assert!(!apart(&usual, &["/proc/../sys/fs/cgroup"]));
        assert!(!apart(&usual[1..], &[]));
        assert!(!apart(&[usual[0], usual[2]], &["/sys/firmware"]));
        let with = |more: (&'static str, &'static str)| [&usual[..], &[more]].concat();
        assert!(!apart(&with(("/sys/images", "bind")), &["/sys/firmware"]));
        assert!(apart(&with(("/proc/images", "bind")), &["/proc/images/link"]));
        assert!(!apart(&with(("/proc/groups", "cgroup")), &[]));
        assert!(!apart(&with(("/sys/firmware", "cgroup2")), &["/sys/firmware"]));
    }
}
