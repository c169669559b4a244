//! Debian packages: the stanzas of `/var/lib/dpkg/status` (deb-control(5)), and of `status.d` in images without dpkg.

use std::collections::BTreeMap;
use std::io;

use crate::files::Files;
use crate::package::{Kind, Package};
use crate::{Distribution, Found};

const STATUS: &str = "var/lib/dpkg/status";
const DIR: &str = "var/lib/dpkg/status.d";

pub(crate) fn packages(files: &Files<'_>, of: &Distribution, found: &mut Found) -> io::Result<()> {
    if let Some(text) = files.read(STATUS)? {
        stanzas(&String::from_utf8_lossy(&text), STATUS, of, true, found);
    }
    for name in files.names(DIR)?.into_iter().filter(|name| !name.ends_with(".md5sums")) {
        let path = format!("{DIR}/{name}");
        if let Some(text) = files.read(&path)? {
            stanzas(&String::from_utf8_lossy(&text), &path, of, false, found);
        }
    }
    Ok(())
}

fn stanzas(text: &str, source: &str, of: &Distribution, says_status: bool, found: &mut Found) {
    for stanza in text.split("\n\n") {
        let mut fields: BTreeMap<String, &str> = BTreeMap::new();
        for line in stanza.lines().filter(|line| !line.starts_with([' ', '\t'])) {
            if let Some((name, value)) = line.split_once(':') {
                fields.insert(name.to_ascii_lowercase(), value.trim());
            }
        }
        let field = |name: &str| fields.get(name).copied().unwrap_or_default();
        let (name, version) = (field("package"), field("version"));
        // What was removed may have left its configuration files.
        if name.is_empty() || version.is_empty() || (says_status && !field("status").ends_with(" installed"))
        {
            continue;
        }
        let mut package =
            Package::of_distribution(Kind::Deb, of, name, version, field("architecture"), source);
        field("maintainer").clone_into(&mut package.supplier);
        found.packages.insert(package);
    }
}
