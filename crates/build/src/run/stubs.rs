//! Mount points: what mounting makes in a step's file system, and takes back when the step has ended.

use std::path::{Path, PathBuf};

use super::mounts::is_opaque;
use crate::error::Result;
use crate::tree::{Tree, join};

/// Paths that mounting will make and that are not the step's: each with those above it that are missing.
pub(super) fn missing(root: &Tree, targets: &[String]) -> Result<Vec<String>> {
    let mut stubs = Vec::new();
    for target in targets {
        let mut here = String::new();
        for part in target.split('/').filter(|part| !part.is_empty()) {
            here = join(&here, part);
            if root.canonical(&here)?.is_none() && !stubs.contains(&here) {
                stubs.push(here.clone());
            }
        }
    }
    Ok(stubs)
}

/// Removes from the upper directory what only mounting has made: the stubs, and copies of directories made for them.
pub(super) fn tidy(upper: &Path, stubs: &[String]) {
    let mut parents: Vec<PathBuf> = Vec::new();
    for stub in stubs.iter().rev() {
        let path = upper.join(stub);
        // What is not there, or was filled by the step, stays as it is.
        let removed = match std::fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => std::fs::remove_dir(&path).is_ok(),
            Ok(metadata) if metadata.is_file() && metadata.len() == 0 => std::fs::remove_file(&path).is_ok(),
            _ => false,
        };
        if removed && let Some(parent) = path.parent() {
            parents.push(parent.to_owned());
        }
    }
    for parent in parents {
        if parent != upper && !is_opaque(&parent) {
            // Only an empty one goes: a copy of a directory below that shows nothing new.
            std::fs::remove_dir(&parent).unwrap_or_default();
        }
    }
}
