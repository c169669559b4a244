//! Which capabilities a container gets: docker's default set, changed by what the request adds and drops.

use brigantine_runtime::profile;
use brigantine_runtime::spec::{Capability, LinuxCapabilities};

use crate::{Error, Result};

/// The set a container's processes are bounded by.
pub(crate) fn bounding(privileged: bool, add: &[String], drop: &[String]) -> Result<Vec<Capability>> {
    if privileged {
        return Ok(profile::grantable_capabilities());
    }
    let add = parse("CapAdd", add)?;
    let drop = parse("CapDrop", drop)?;
    let without = |set: Vec<Capability>, drop: &[Capability]| -> Vec<Capability> {
        set.into_iter().filter(|capability| !drop.contains(capability)).collect()
    };
    Ok(match (add, drop) {
        // `--cap-add ALL` begins with everything, `--cap-drop ALL` with nothing.
        (None, drop) => without(profile::grantable_capabilities(), &drop.unwrap_or_default()),
        (Some(add), None) => add,
        (Some(add), Some(drop)) => {
            let mut set = without(profile::capabilities(), &drop);
            set.extend(add.into_iter().filter(|capability| {
                !profile::capabilities().contains(capability) || drop.contains(capability)
            }));
            set
        }
    })
}

/// The names as capabilities; `None` when one of them is `ALL`.
fn parse(field: &str, names: &[String]) -> Result<Option<Vec<Capability>>> {
    let mut all = false;
    let mut set = Vec::new();
    for name in names {
        let upper = name.to_ascii_uppercase();
        if upper == "ALL" {
            all = true;
            continue;
        }
        let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
        let capability = serde_json::from_value(full.clone().into())
            .map_err(|_unknown| Error::invalid(format!("invalid {field}: unknown capability: \"{full}\"")))?;
        set.push(capability);
    }
    Ok(if all { None } else { Some(set) })
}

/// The sets of a process: all of `bounding` for root, only the bounding set for others, as execve would leave them.
pub(crate) fn sets(bounding: &[Capability], uid: u32) -> LinuxCapabilities {
    let set = || bounding.iter().copied().collect::<brigantine_runtime::spec::Capabilities>();
    let mut sets = LinuxCapabilities::default();
    let active = if uid == 0 { set() } else { [].into_iter().collect() };
    sets.set_bounding(Some(set()));
    sets.set_effective(Some(active.clone()));
    sets.set_permitted(Some(active));
    sets.set_inheritable(Some([].into_iter().collect()));
    sets.set_ambient(Some([].into_iter().collect()));
    sets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn adds_and_drops_by_any_spelling() {
        let set = bounding(false, &names(&["net_admin"]), &names(&["CAP_CHOWN", "Kill"])).unwrap();
        assert!(set.contains(&Capability::NetAdmin));
        assert!(!set.contains(&Capability::Chown) && !set.contains(&Capability::Kill));
        assert_eq!(set.len(), profile::capabilities().len() - 1);
    }

    #[test]
    fn all_means_all() {
        assert!(bounding(false, &[], &names(&["ALL"])).unwrap().is_empty());
        assert_eq!(bounding(false, &names(&["CHOWN"]), &names(&["all"])).unwrap(), [Capability::Chown]);
        let most = bounding(false, &names(&["ALL"]), &names(&["SYS_ADMIN"])).unwrap();
        assert!(!most.contains(&Capability::SysAdmin));
    }

    #[test]
    fn unknown_names_are_refused() {
        let error = bounding(false, &names(&["fly"]), &[]).unwrap_err();
        assert_eq!(error.to_string(), "invalid CapAdd: unknown capability: \"CAP_FLY\"");
    }

    #[test]
    fn only_root_has_active_capabilities() {
        let sets = sets(&[Capability::Chown], 1000);
        assert!(sets.effective().as_ref().unwrap().is_empty());
        assert_eq!(sets.bounding().as_ref().unwrap().len(), 1);
    }
}
