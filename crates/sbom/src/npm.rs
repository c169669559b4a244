//! JavaScript's packages: what is installed in `node_modules`, and `package-lock.json`.

use std::collections::BTreeMap;
use std::io;

use serde::Deserialize;
use serde_json::Value;

use crate::Found;
use crate::files::Seen;
use crate::package::{Kind, Package};

#[derive(Deserialize)]
struct Installed {
    #[serde(default)]
    name: String,
    #[serde(default)]
    version: String,
    #[serde(default)]
    license: Value,
    #[serde(default)]
    author: Value,
}

/// A package's own `package.json`; others are somebody's project or test data.
pub(crate) fn installed(file: &Seen<'_>, found: &mut Found) -> io::Result<()> {
    let mut parts = file.path().rsplit('/').skip(1);
    let (name, above) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let scoped = above.starts_with('@') && parts.next() == Some("node_modules");
    if name.is_empty() || !(above == "node_modules" || scoped) {
        return Ok(());
    }
    let document: Installed = serde_json::from_slice(&file.read()?).map_err(io::Error::other)?;
    if document.name.is_empty() || document.version.is_empty() {
        return Ok(());
    }
    let text = |value: &Value, key: &str| {
        value.as_str().or_else(|| value.get(key)?.as_str()).unwrap_or_default().to_owned()
    };
    let mut package = Package::new(Kind::Npm, &document.name, &document.version, file.path());
    package.license = text(&document.license, "type");
    package.supplier = text(&document.author, "name");
    found.packages.insert(package);
    Ok(())
}

#[derive(Deserialize)]
struct Lock {
    /// Version 2 and later: by path.
    #[serde(default)]
    packages: BTreeMap<String, Locked>,
    /// Version 1: by name.
    #[serde(default)]
    dependencies: BTreeMap<String, Locked>,
}

#[derive(Deserialize)]
struct Locked {
    #[serde(default)]
    version: String,
    #[serde(default)]
    license: Value,
}

pub(crate) fn lock(file: &Seen<'_>, found: &mut Found) -> io::Result<()> {
    // What lies in a package is that package's own, and not installed by it.
    if file.path().contains("node_modules/") {
        return Ok(());
    }
    let lock: Lock = serde_json::from_slice(&file.read()?).map_err(io::Error::other)?;
    let by_path =
        lock.packages.iter().filter_map(|(path, one)| Some((path.rsplit_once("node_modules/")?.1, one)));
    let by_name =
        lock.dependencies.iter().filter(|_| lock.packages.is_empty()).map(|(name, one)| (name.as_str(), one));
    for (name, one) in by_path.chain(by_name).filter(|(_, one)| !one.version.is_empty()) {
        let mut package = Package::new(Kind::Npm, name, &one.version, file.path());
        one.license.as_str().unwrap_or_default().clone_into(&mut package.license);
        found.packages.insert(package);
    }
    Ok(())
}
