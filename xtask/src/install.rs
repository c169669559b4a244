//! `cargo xtask install`: what a machine needs to run the engine as a service.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::{build, root, say};

/// Shells and where each looks for completions, below the prefix.
const COMPLETIONS: &[(&str, &str)] = &[
    ("bash", "share/bash-completion/completions/brig"),
    ("zsh", "share/zsh/site-functions/_brig"),
    ("fish", "share/fish/vendor_completions.d/brig.fish"),
];

/// Builds in release mode and installs below `prefix`.
pub fn install(prefix: &Path) -> Result<()> {
    let dist = build::build(build::Profile::Release)?;
    say::step(&format!("Installing below {}", prefix.display()));
    let put = |bytes: &[u8], to: &str, mode: u32| -> Result<()> {
        let path = prefix.join(to);
        let dir = path.parent().context("a path below the prefix")?;
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        // A running executable is replaced, not written to.
        let part = path.with_extension("brig-part");
        fs::write(&part, bytes).with_context(|| format!("cannot write {}", part.display()))?;
        fs::set_permissions(&part, fs::Permissions::from_mode(mode))?;
        fs::rename(&part, &path)?;
        say::note(&path.display().to_string());
        Ok(())
    };
    put(&fs::read(dist.join("brig"))?, "bin/brig", 0o755)?;
    put(&fs::read(dist.join("brig-runtime"))?, "libexec/brigantine/brig-runtime", 0o755)?;
    for unit in ["brigantine.service", "brigantine.socket"] {
        let text = fs::read_to_string(root().join("packaging").join(unit))?;
        let text = text.replace("@PREFIX@", &prefix.display().to_string());
        put(text.as_bytes(), &format!("lib/systemd/system/{unit}"), 0o644)?;
    }
    for (shell, path) in COMPLETIONS {
        let text = say::read(Command::new(dist.join("brig")).args(["completion", shell]))?;
        put(text.as_bytes(), path, 0o644)?;
    }
    say::note("to start the engine with the machine: systemctl enable --now brigantine.socket");
    Ok(())
}
