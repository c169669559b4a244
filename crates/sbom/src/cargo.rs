//! Rust's packages: `Cargo.lock`, and what `cargo auditable` builds into programs (section `.dep-v0`: JSON, deflated).

use std::io::{self, Read as _};

use serde::Deserialize;

use crate::Found;
use crate::elf::Elf;
use crate::files::Seen;
use crate::package::{Kind, Package};

/// No list of a program's packages is larger.
const MAX_LIST: u64 = 16 << 20;

/// The tables `[[package]]` of a lock file; their keys are simple enough to be read line by line.
pub(crate) fn lock(file: &Seen<'_>, found: &mut Found) -> io::Result<()> {
    let text = file.read()?;
    let text = String::from_utf8_lossy(&text);
    let value = |table: &str, key: &str| {
        table.lines().find_map(|line| {
            let (name, value) = line.split_once('=')?;
            (name.trim() == key).then(|| value.trim().trim_matches('"').to_owned())
        })
    };
    for table in text.split("[[package]]").skip(1) {
        if let (Some(name), Some(version)) = (value(table, "name"), value(table, "version")) {
            found.packages.insert(Package::new(Kind::Cargo, &name, &version, file.path()));
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct List {
    packages: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    name: String,
    version: String,
}

pub(crate) fn auditable(elf: &mut Elf, file: &Seen<'_>, found: &mut Found) {
    let Some(section) = elf.section(".dep-v0") else { return };
    let mut text = Vec::new();
    let inflated = flate2::read::ZlibDecoder::new(&section[..]).take(MAX_LIST).read_to_end(&mut text);
    match inflated
        .map_err(|error| error.to_string())
        .and_then(|_| serde_json::from_slice::<List>(&text).map_err(|error| error.to_string()))
    {
        Ok(list) => {
            for one in list.packages {
                found.packages.insert(Package::new(Kind::Cargo, &one.name, &one.version, file.path()));
            }
        }
        Err(error) => found.unread.push(format!("{}: its list of packages: {error}", file.path())),
    }
}
