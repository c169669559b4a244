//! What a container sees of its control groups.

use std::path::Path;

use brigantine_sys::mount::{Change, attr};

use super::options::{Options, Unnamed, changes};
use super::tree::tree;
use super::{Context, Draft, c_string, target};
use crate::error::Error;
use crate::handover::{Groups, Hand};
use crate::plan::{FsMount, Role, Step, Tree, TreeMount};

/// The container's own groups at `destination`: on v1 a directory per hierarchy, on v2 the group.
pub(super) fn cgroup(
    destination: &Path,
    options: &Options,
    context: &Context<'_>,
    draft: &mut Draft,
) -> Result<(), Error> {
    let Some(group) = context.cgroup else { return Ok(()) };
    let Draft { steps, hands, .. } = draft;
    let is_elsewhere = |dir: &Path| context.rootfs.is_none_or(|root| !dir.starts_with(root));
    let views = if group.is_unified() { Vec::new() } else { group.v1_views() };
    // By who is not busy meanwhile. In a user namespace file systems are its own.
    let apart = !views.is_empty() && !context.late && context.user.is_none();
    if apart && views.iter().all(|(_, _, dir)| is_elsewhere(dir)) && Groups::can_be_assembled() {
        let mut groups = Groups {
            attributes: options.set,
            views: Vec::with_capacity(views.len()),
            changes: changes(options, Unnamed::Kept),
            links: Vec::new(),
            at: destination.to_owned(),
        };
        for (label, names, dir) in views {
            for name in names.iter().filter(|name| **name != label) {
                groups.links.push((c_string(name.as_str(), "cgroup")?, c_string(label.as_str(), "cgroup")?));
            }
            groups.views.push((c_string(label, "cgroup")?, dir));
        }
        hands.push(Hand::Groups(groups));
        steps.push(Step::Attach(TreeMount {
            tree: Tree::Handed(hands.len() - 1),
            directory: true,
            target: target(destination, false)?,
            source: "cgroup".to_owned(),
            over_proc: false,
        }));
        return Ok(());
    }
    let mut own = |dir: &Path, at: &Path| -> Result<Step, Error> {
        let what = || format!("mounting cgroup {} at {}", dir.display(), at.display());
        let tree = if !group.is_unified() && !context.late && is_elsewhere(dir) {
            // It may not be there yet.
            hands.push(Hand::Tree {
                dir: dir.to_owned(),
                changes: changes(options, Unnamed::Kept),
                at: at.to_owned(),
            });
            Tree::Handed(hands.len() - 1)
        } else {
            tree(dir, options, Unnamed::Kept, context, &what)?
        };
        Ok(Step::Attach(TreeMount {
            tree,
            directory: true,
            target: target(at, false)?,
            source: dir.display().to_string(),
            over_proc: false,
        }))
    };
    if group.is_unified() {
        let Some(dir) = group.directory() else { return Ok(()) };
        let depth = Path::new(group.path()).components().count() - 1;
        let top = dir.ancestors().nth(depth).unwrap_or(dir);
        steps.push(own(if context.cgroup_namespace { dir } else { top }, destination)?);
        return Ok(());
    }
    steps.push(Step::Mount(Box::new(FsMount {
        fstype: c"tmpfs".to_owned(),
        parameters: vec![(c"mode".to_owned(), Some(c"0755".to_owned()))],
        attributes: (options.set & !attr::RDONLY) as u32,
        propagation: Vec::new(),
        target: target(destination, false)?,
        role: Role::Groups,
        keep_mode: false,
        copy_up: false,
        over_proc: false,
    })));
    for (label, names, dir) in views {
        steps.push(own(&dir, &destination.join(&label))?);
        for name in names.iter().filter(|name| **name != label) {
            steps.push(Step::Symlink {
                target: c_string(label.as_str(), "cgroup")?,
                dir: target(destination, false)?,
                name: c_string(name.as_str(), "cgroup")?,
                replace: false,
            });
        }
    }
    if options.set & attr::RDONLY != 0 {
        let change = Change { set: attr::RDONLY, ..Change::default() };
        steps.push(Step::Change { target: target(destination, false)?, change, recursive: false });
    }
    Ok(())
}
