//! Whether programs of another platform run here: by the processor itself, or by an emulator that the kernel knows
//! (binfmt_misc, Documentation/admin-guide/binfmt-misc.rst).
//!
//! Invariant: a step that could not run is refused before anything of it exists.

use std::path::Path;

use brigantine_image::Platform;

use crate::error::{Result, invalid};

const REGISTERED: &str = "/proc/sys/fs/binfmt_misc";

/// Fails, with the remedy, unless programs for `platform` run here.
pub(crate) fn require(platform: &str) -> Result<()> {
    require_in(platform, &Platform::host().architecture, Path::new(REGISTERED))
}

fn require_in(text: &str, host: &str, registered: &Path) -> Result<()> {
    let platform: Platform = text.parse().map_err(|error| invalid(format!("{error}")))?;
    let remedy = "register an emulator (Debian and Ubuntu: apt-get install qemu-user-static), \
                  build for this machine's platform, or run the step in a stage FROM --platform=$BUILDPLATFORM";
    let arch = platform.architecture.as_str();
    if platform.os != "linux" {
        return Err(invalid(format!("a RUN for {text} cannot run on Linux")));
    }
    if arch == host || matches!((host, arch), ("amd64", "386") | ("arm64", "arm")) {
        return Ok(());
    }
    let none = || invalid(format!("nothing here runs programs for {text}: {remedy}"));
    let header = elf_header(arch).ok_or_else(none)?;
    let Ok(entries) = std::fs::read_dir(registered) else { return Err(none()) };
    let mut unfixed = None;
    for entry in entries.flatten() {
        let Ok(format) = std::fs::read_to_string(entry.path()) else { continue };
        if !matches(&format, &header) {
            continue;
        }
        let field =
            |name: &str| format.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
        if field("flags:").contains('F') {
            return Ok(());
        }
        unfixed = Some(field("interpreter").to_owned());
    }
    match unfixed {
        None => Err(none()),
        Some(interpreter) => Err(invalid(format!(
            "{interpreter}, which runs programs for {text}, is registered without the flag F and would be looked \
             for in the image: {remedy}"
        ))),
    }
}

/// The first bytes of a program, as the ELF specification has them.
fn elf_header(arch: &str) -> Option<[u8; 20]> {
    const LITTLE: u8 = 1;
    const BIG: u8 = 2;
    let (bits, order, machine): (u8, u8, u16) = match arch {
        "amd64" => (2, LITTLE, 62),
        "386" => (1, LITTLE, 3),
        "arm64" => (2, LITTLE, 183),
        "arm" => (1, LITTLE, 40),
        "riscv64" => (2, LITTLE, 243),
        "ppc64le" => (2, LITTLE, 21),
        "ppc64" => (2, BIG, 21),
        "s390x" => (2, BIG, 22),
        "mips64le" => (2, LITTLE, 8),
        "mips64" => (2, BIG, 8),
        "loong64" => (2, LITTLE, 258),
        _ => return None,
    };
    let number = |value: u16| if order == LITTLE { value.to_le_bytes() } else { value.to_be_bytes() };
    let mut header = [0; 20];
    header[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', bits, order, 1]);
    header[16..18].copy_from_slice(&number(2));
    header[18..].copy_from_slice(&number(machine));
    Some(header)
}

/// Whether a registered format is enabled and takes programs that begin so.
fn matches(format: &str, header: &[u8; 20]) -> bool {
    let field =
        |name: &str| format.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    if format.lines().next() != Some("enabled") || !matches!(field("offset"), "" | "0") {
        return false;
    }
    let Ok(magic) = hex::decode(field("magic")) else { return false };
    let Ok(mask) = hex::decode(field("mask")) else { return false };
    // More than the header would be about what is not known here.
    !magic.is_empty()
        && magic.len() <= header.len()
        && magic.iter().zip(header).enumerate().all(|(at, (wanted, byte))| {
            let mask = mask.get(at).copied().unwrap_or(0xff);
            byte & mask == wanted & mask
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const AARCH64: &str = "enabled\ninterpreter /usr/libexec/qemu-binfmt/aarch64-binfmt-P\nflags: POCF\noffset 0\n\
        magic 7f454c460201010000000000000000000200b700\nmask ffffffffffffff00fffffffffffffffffeffffff\n";

    #[test]
    fn what_runs_is_known_and_what_does_not_has_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |platform: &str| require_in(platform, "amd64", dir.path()).unwrap_err().to_string();
        require_in("linux/amd64", "amd64", dir.path()).unwrap();
        require_in("linux/386", "amd64", dir.path()).unwrap();
        assert!(refused("linux/arm64").contains("apt-get install qemu-user-static"));
        std::fs::write(dir.path().join("qemu-aarch64"), AARCH64).unwrap();
        std::fs::write(dir.path().join("status"), "enabled\n").unwrap();
        require_in("linux/arm64", "amd64", dir.path()).unwrap();
        assert!(refused("linux/arm/v7").contains("nothing here runs programs for linux/arm/v7"));
        assert!(refused("linux/s390x").contains("nothing here"));
        assert!(refused("linux/toy").contains("nothing here"));
        assert!(refused("windows/amd64").contains("cannot run on Linux"));
        std::fs::write(dir.path().join("qemu-aarch64"), AARCH64.replace("POCF", "OC")).unwrap();
        assert!(refused("linux/arm64").contains("without the flag F"));
        std::fs::write(dir.path().join("qemu-aarch64"), AARCH64.replace("enabled", "disabled")).unwrap();
        assert!(refused("linux/arm64").contains("nothing here"));
        let missing = require_in("linux/arm64", "amd64", &dir.path().join("nothing")).unwrap_err();
        assert!(missing.to_string().contains("nothing here"));
    }
}
