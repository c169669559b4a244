//! What a file system holds, as a list of packages: of distributions (dpkg, apk, rpm) and of languages (cargo, npm,
//! Python, Go), by what their own tools have written down. Nothing is run and nothing is asked of a network.
//!
//! Start at [`scan`]; [`spdx`] makes the document of what it finds.
//!
//! Invariant: whatever is in the file system, nothing outside of it is opened, and memory is bounded. A database that
//! cannot be read is told of, and what others say stays.

mod apk;
mod cargo;
mod dpkg;
mod elf;
mod files;
mod go;
mod npm;
mod package;
mod python;
mod rpm;
mod spdx;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;

pub use package::{Kind, Package};
pub use spdx::{Subject, spdx};

use crate::files::Files;

/// What was found, and what could not be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// By kind, name and version, each once.
    pub packages: BTreeSet<Package>,
    /// A sentence for each database that could not be read.
    pub unread: Vec<String>,
    /// `debian 12`, as `os-release` has it.
    pub distribution: Option<Distribution>,
}

/// The distribution, by `os-release`(5).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Distribution {
    /// `debian`.
    pub id: String,
    /// `12`.
    pub version: String,
}

/// Looks through everything below a directory, which is taken for a root. Blocks.
pub fn scan(root: impl AsFd) -> io::Result<Found> {
    let files = Files::new(root.as_fd());
    let mut found = Found { distribution: distribution(&files), ..Found::default() };
    let name = found.distribution.clone().unwrap_or_default();
    dpkg::packages(&files, &name, &mut found)?;
    apk::packages(&files, &name, &mut found)?;
    rpm::packages(&files, &name, &mut found)?;
    files.walk(&mut |file| {
        let result = match file.name() {
            "Cargo.lock" => cargo::lock(file, &mut found),
            "package.json" => npm::installed(file, &mut found),
            "package-lock.json" => npm::lock(file, &mut found),
            "METADATA" | "PKG-INFO" => python::metadata(file, &mut found),
            _ if file.is_executable() => elf::Elf::open(file).map(|elf| {
                let Some(mut elf) = elf else { return };
                cargo::auditable(&mut elf, file, &mut found);
                go::program(&mut elf, file, &mut found);
            }),
            _ => Ok(()),
        };
        if let Err(error) = result {
            found.unread.push(format!("{}: {error}", file.path()));
        }
    })?;
    Ok(found)
}

fn distribution(files: &Files<'_>) -> Option<Distribution> {
    let text =
        ["etc/os-release", "usr/lib/os-release"].iter().find_map(|path| files.read(path).ok().flatten())?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim().trim_matches(['"', '\'']).to_owned())
    };
    Some(Distribution { id: value("ID")?, version: value("VERSION_ID").unwrap_or_default() })
}
