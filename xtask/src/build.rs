//! `cargo xtask build`: the two executables, side by side in `target/dist`.
//!
//! Invariant: what is there is complete and of one source state; `brig-runtime` is static, checked in its ELF header.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{packages, root, say};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    Release,
    /// Quicker to build; what tests use.
    Debug,
}

impl Profile {
    /// Cargo's name for its directory.
    fn dir(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Debug => "debug",
        }
    }
}

/// Where the executables go.
pub fn dist(profile: Profile) -> PathBuf {
    brigantine_testkit::fixtures::target_dir().join(match profile {
        Profile::Release => "dist",
        Profile::Debug => "dist-debug",
    })
}

/// What makes an executable static, and as small and quick to start as it can be.
const STATIC_FLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static";

/// Builds both and returns their directory.
pub fn build(profile: Profile) -> Result<PathBuf> {
    packages::install(&[packages::BUILD])?;
    say::step("Building brig and brig-runtime");
    let target = brigantine_testkit::fixtures::target_dir();
    say::run(cargo(profile).args(["--package", "brigantine-cli", "--bin", "brig"]))?;
    let dist = dist(profile);
    fs::create_dir_all(&dist)?;
    place(&target.join(profile.dir()).join("brig"), &dist)?;
    runtime(profile)?;
    for name in ["brig", "brig-runtime"] {
        let size = fs::metadata(dist.join(name))?.len();
        say::note(&format!("{} ({:.1} MB)", dist.join(name).display(), size as f64 / 1e6));
    }
    Ok(dist)
}

/// Builds `brig-runtime` alone and returns its place.
pub fn runtime(profile: Profile) -> Result<PathBuf> {
    let built = statically(profile, &["--package", "brigantine-shim", "--bin", "brig-runtime"])?;
    let dist = dist(profile);
    fs::create_dir_all(&dist)?;
    let runtime = place(&built.join("brig-runtime"), &dist)?;
    if let Some(interpreter) = interpreter(&runtime)? {
        bail!("{} is not static: it asks for {interpreter}", runtime.display());
    }
    Ok(runtime)
}

/// Builds something static and returns the directory that it is in.
pub fn statically(profile: Profile, what: &[&str]) -> Result<PathBuf> {
    // With an explicit target the flags do not apply to build scripts and macros, which cannot be static.
    let triple = static_triple()?;
    let mut command = cargo(profile);
    command.args(["--target", &triple]).args(what).env("RUSTFLAGS", STATIC_FLAGS);
    if triple.ends_with("-musl") {
        // Bundled C code needs nothing of a C library but the names in standard headers, which any has; checks that call
        // into glibc are left out.
        let variable = |name: &str| format!("{name}_{}", triple.replace('-', "_"));
        for (name, value) in [("CC", "cc"), ("CFLAGS", "-U_FORTIFY_SOURCE")] {
            if std::env::var_os(variable(name)).is_none() {
                command.env(variable(name), value);
            }
        }
    }
    say::run(&mut command)?;
    Ok(brigantine_testkit::fixtures::target_dir().join(triple).join(profile.dir()))
}

/// What static executables are built for: musl, whose start takes a third of a millisecond less than glibc's, if Rust's
/// library for it is there or can be had.
fn static_triple() -> Result<String> {
    let host = host_triple()?;
    let musl = host.replace("-linux-gnu", "-linux-musl");
    let there = || -> Result<bool> {
        let directory = say::read(rustc().args(["--print", "target-libdir", "--target", &musl]))?;
        Ok(Path::new(directory.trim()).is_dir())
    };
    if there()? {
        return Ok(musl);
    }
    say::note(&format!("rustup target add {musl}"));
    let why = match Command::new("rustup").args(["target", "add", &musl]).output() {
        Ok(done) if done.status.success() && there()? => return Ok(musl),
        Ok(done) => last_line(&done.stderr).unwrap_or_else(|| "it is not where rustc looks".to_owned()),
        Err(e) => format!("rustup: {e}"),
    };
    say::note(&format!(
        "Rust's library for {musl} is not to be had ({why}): brig-runtime is linked with glibc"
    ));
    Ok(host)
}

/// What a program said at last.
fn last_line(said: &[u8]) -> Option<String> {
    let said = String::from_utf8_lossy(said);
    said.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
}

fn rustc() -> Command {
    Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
}

fn cargo(profile: Profile) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).arg("build").args(["--locked", "--quiet"]);
    command.args((profile == Profile::Release).then_some("--release"));
    command
}

/// Copies an executable beside its place, then renames: a running one is not written to.
fn place(from: &Path, dir: &Path) -> Result<PathBuf> {
    let name = from.file_name().context("an executable has a name")?;
    let to = dir.join(name);
    let part = dir.join(format!(".{}.part", name.display()));
    fs::copy(from, &part).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::rename(&part, &to)?;
    Ok(to)
}

pub fn host_triple() -> Result<String> {
    let text = say::read(rustc().arg("-vV"))?;
    let host = text.lines().find_map(|l| l.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc -vV names no host")
}

/// The dynamic linker that a 64-bit little-endian ELF file asks for (its `PT_INTERP`), if any.
fn interpreter(file: &Path) -> Result<Option<String>> {
    const PT_INTERP: u64 = 3;
    let bytes = fs::read(file)?;
    let number = |at: usize, n: usize| -> Result<u64> {
        let raw = bytes.get(at..at + n).context("the ELF file is cut short")?;
        Ok(raw.iter().rev().fold(0, |sum, b| (sum << 8) | u64::from(*b)))
    };
    if !bytes.starts_with(b"\x7fELF\x02\x01") {
        bail!("{} is no 64-bit little-endian ELF file", file.display());
    }
    let (start, size, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
    for i in 0..count {
        let header = (start + i * size) as usize;
        if number(header, 4)? == PT_INTERP {
            let (at, n) = (number(header + 8, 8)? as usize, number(header + 0x20, 8)? as usize);
            let path = bytes.get(at..at + n).context("the ELF file is cut short")?;
            return Ok(Some(String::from_utf8_lossy(path).trim_end_matches('\0').to_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_executable_is_told_from_a_static_one() {
        // This very test is dynamic; Debian's busybox-static says what it is by its name.
        let own = std::env::current_exe().unwrap();
        assert!(interpreter(&own).unwrap().unwrap().contains("/ld-linux"));
        assert_eq!(interpreter(Path::new("/bin/busybox")).unwrap(), None);
    }
}
