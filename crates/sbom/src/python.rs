//! Python's packages: `METADATA` in `*.dist-info`, `PKG-INFO` in `*.egg-info`
//! (packaging.python.org/specifications/core-metadata).

use std::io;

use crate::Found;
use crate::files::Seen;
use crate::package::{Kind, Package};

pub(crate) fn metadata(file: &Seen<'_>, found: &mut Found) -> io::Result<()> {
    let dir = file.path().rsplit('/').nth(1).unwrap_or_default();
    if !dir.ends_with(".dist-info") && !dir.ends_with(".egg-info") {
        return Ok(());
    }
    let text = file.read()?;
    let text = String::from_utf8_lossy(&text);
    // The description follows after an empty line.
    let head = text.split("\n\n").next().unwrap_or_default();
    let field = |name: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().trim()
    };
    let (name, version) = (field("Name"), field("Version"));
    if name.is_empty() || version.is_empty() {
        return Ok(());
    }
    let mut package = Package::new(Kind::Python, name, version, file.path());
    let license = match field("License-Expression") {
        "" => field("License"),
        expression => expression,
    };
    license.clone_into(&mut package.license);
    field("Author").clone_into(&mut package.supplier);
    found.packages.insert(package);
    Ok(())
}
