//! Go's modules: what the linker writes into programs since Go 1.18 (section `.go.buildinfo`; Go's debug/buildinfo).

use crate::Found;
use crate::elf::Elf;
use crate::files::Seen;
use crate::package::{Kind, Package};

const MAGIC: &[u8] = b"\xff Go buildinf:";
/// Texts follow in place, each after its length.
const INLINE: u8 = 2;

pub(crate) fn program(elf: &mut Elf, file: &Seen<'_>, found: &mut Found) {
    let Some(section) = elf.section(".go.buildinfo") else { return };
    let Some((version, modules)) = texts(&section) else {
        found.unread.push(format!("{}: a program of Go before 1.18: its modules are not read", file.path()));
        return;
    };
    let mut add = |name: &str, version: &str| {
        let mut package = Package::new(Kind::Go, name, version, file.path());
        name.clone_into(&mut package.name);
        found.packages.insert(package);
    };
    let release = version.split(' ').next().unwrap_or_default();
    add("stdlib", release.trim_start_matches("go"));
    let mut lines = modules.lines().peekable();
    while let Some(line) = lines.next() {
        let mut fields = line.split('\t');
        if !matches!(fields.next(), Some("mod" | "dep")) {
            continue;
        }
        let mut named = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        // What it was replaced by is what is in the program.
        if let Some(other) = lines.peek().and_then(|line| line.strip_prefix("=>\t")) {
            let mut fields = other.split('\t');
            named = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        }
        let (name, version) = named;
        if !name.is_empty() && !name.starts_with(['.', '/']) {
            add(name, if version == "(devel)" { "" } else { version });
        }
    }
}

/// The compiler's version and the lines about modules.
fn texts(section: &[u8]) -> Option<(String, String)> {
    let start = section.windows(MAGIC.len()).position(|window| window == MAGIC)?;
    let info = section.get(start..)?;
    if info.get(15)? & INLINE == 0 {
        return None;
    }
    let mut rest = info.get(32..)?;
    let version = text(&mut rest)?;
    let modules = text(&mut rest)?;
    // The lines stand between two marks of 16 bytes.
    let lines = if modules.len() >= 33 { &modules[16..modules.len() - 16] } else { &[] };
    Some((String::from_utf8_lossy(version).into_owned(), String::from_utf8_lossy(lines).into_owned()))
}

/// A text after its length, which is seven bits a byte, the low ones first.
fn text<'t>(rest: &mut &'t [u8]) -> Option<&'t [u8]> {
    let (mut length, mut shift) = (0_u64, 0_u32);
    loop {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        length |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            break;
        }
        shift += 7;
    }
    let (text, after) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    *rest = after;
    Some(text)
}
