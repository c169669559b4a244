//! Alpine packages: the records of `apk`'s database of what is installed (wiki.alpinelinux.org/wiki/Apk_spec).

use std::io;

use crate::files::Files;
use crate::package::{Kind, Package};
use crate::{Distribution, Found};

pub(crate) fn packages(files: &Files<'_>, of: &Distribution, found: &mut Found) -> io::Result<()> {
    // The second is where newer ones keep it; often both are one.
    for path in ["lib/apk/db/installed", "usr/lib/apk/db/installed"] {
        let Some(text) = files.read(path)? else { continue };
        for record in String::from_utf8_lossy(&text).split("\n\n") {
            let field = |key: char| {
                record.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap_or_default()
            };
            let (name, version) = (field('P'), field('V'));
            if name.is_empty() || version.is_empty() {
                continue;
            }
            let mut package = Package::of_distribution(Kind::Apk, of, name, version, field('A'), path);
            field('L').clone_into(&mut package.license);
            field('m').clone_into(&mut package.supplier);
            found.packages.insert(package);
        }
        break;
    }
    Ok(())
}
