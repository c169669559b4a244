//! Sizes of containers and volumes: a directory tree that may not grow beyond a size, by the file system's project
//! quotas.
//!
//! A tree's project is written in its directories and nowhere else: a number that nothing is known of is taken for a new
//! one, and a removed tree gives it back. Invariant: a size that is asked for is enforced, or the request fails.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use brigantine_sys::quota;

use crate::error::Context;
use crate::sync::lock;
use crate::{Error, Result};

/// Numbers below are left to administrators (`/etc/projects`).
const FIRST: u32 = 1 << 20;

/// How many numbers are tried for a new tree.
const TRIES: u32 = 64;

/// The limits of trees below one directory.
#[derive(Debug, Clone)]
pub(crate) struct Quotas {
    root: PathBuf,
    /// Held while a free number is looked for and taken.
    choosing: Arc<Mutex<()>>,
}

impl Quotas {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root, choosing: Arc::default() }
    }

    /// Refuses when sizes cannot be enforced here; `what` is the option that asks for one.
    pub(crate) fn check(&self, what: &str) -> Result<()> {
        let root = open(&self.root)?;
        let enforced = quota::enforced(root.as_fd())
            .doing(|| format!("{what}: ask the file system of {} for its quotas", self.root.display()))?;
        if enforced {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{what} is supported only where the file system enforces project quotas: {} is on one that does not. Use xfs or ext4 (made with -O quota,project) mounted with 'prjquota' ('pquota'), and Linux 5.14 or later",
            self.root.display()
        )))
    }

    /// Limits what is going to be in these empty directories together to `bytes`. Blocks.
    pub(crate) fn limit(&self, dirs: &[&Path], bytes: u64) -> Result<()> {
        let what = || format!("limit the size of {}", self.root.display());
        let root = open(&self.root)?;
        let _choosing = lock(&self.choosing);
        let id = free(&root).doing(what)?.ok_or_else(|| {
            Error::internal(format!(
                "no free project number was found on the file system of {}",
                self.root.display()
            ))
        })?;
        quota::limit(root.as_fd(), id, bytes).doing(what)?;
        let assigned = dirs.iter().try_for_each(|dir| {
            quota::assign(open(dir)?, id).doing(|| format!("limit the size of {}", dir.display()))
        });
        if assigned.is_err() {
            self.forget(Some(id));
        }
        assigned
    }

    /// Gives a number back, if there is one. Blocks.
    pub(crate) fn forget(&self, id: Option<u32>) {
        let Some(id) = id else { return };
        let done = open(&self.root).and_then(|root| {
            quota::limit(root.as_fd(), id, 0).doing(|| format!("take back the limit of project {id}"))
        });
        if let Err(error) = done {
            tracing::warn!(error = error.report(), "a limit on nothing stays");
        }
    }
}

/// The number a directory's limit goes by; to be given back when the directory is gone. Blocks.
pub(crate) fn project_of(dir: &Path) -> Option<u32> {
    let dir = File::open(dir).ok()?;
    quota::project_of(&dir).ok().filter(|id| *id >= FIRST)
}

/// The size in a request's options: docker's only one.
pub(crate) fn size_option<'a>(
    options: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<Option<u64>> {
    let mut size = None;
    for (name, value) in options {
        if name != "size" {
            return Err(Error::invalid(format!("unknown option {name}: the only storage option is size")));
        }
        size = Some(parse(value)?);
    }
    Ok(size)
}

/// `10G` as bytes (units of 1024).
pub(crate) fn parse(text: &str) -> Result<u64> {
    let wrong = || Error::invalid(format!("invalid size: '{text}'"));
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit()).unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = match unit.trim() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_not_a_number| wrong())?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0 && *bytes < 1 << 62).ok_or_else(wrong)
}

/// A number that no tree has.
fn free(root: &File) -> std::result::Result<Option<u32>, brigantine_sys::Errno> {
    for _ in 0..TRIES {
        let id = FIRST | u32::from_ne_bytes(crate::ids::random_bytes()) >> 1;
        if quota::project(root.as_fd(), id)? == (quota::Project { used: 0, limit: 0 }) {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

fn open(dir: &Path) -> Result<File> {
    File::open(dir).doing(|| format!("open {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_dockers_units() {
        assert_eq!(parse("10G").unwrap(), 10 << 30);
        assert_eq!(parse("512 kb").unwrap(), 512 << 10);
        for wrong in ["", "0", "-1", "ten", "1.5G", "99999999999T"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        let options = std::collections::HashMap::from([("colour".to_owned(), "red".to_owned())]);
        assert!(size_option(&options).unwrap_err().to_string().starts_with("unknown option colour"));
    }
}
