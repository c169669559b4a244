//! What a step sees mounted: secrets as files, host paths, and parts of its inputs.
//!
//! Invariant: an input is never written to: what a step writes into a mount of one goes with the step.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use brigantine_image::Lower;
use brigantine_runtime::spec::Mount;

use super::Ready;
use crate::error::{Context, Error, Result, invalid};
use crate::graph::RunMount;

fn entry(target: &str, typ: &str, source: &str, options: Vec<String>) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(PathBuf::from(target))
        .set_typ(Some(typ.to_owned()))
        .set_source(Some(PathBuf::from(source)))
        .set_options(Some(options));
    mount
}

pub(super) fn bind(target: &str, source: &Path, read_only: bool) -> Mount {
    let access = if read_only { "ro" } else { "rw" };
    entry(
        target,
        "bind",
        &source.to_string_lossy(),
        ["rbind", access, "rprivate"].map(str::to_owned).to_vec(),
    )
}

pub(super) fn set_mode(path: &Path, mode: u32) -> Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .doing(|| format!("set the mode of {}", path.display()))
}

pub(super) fn secret(
    wanted: &RunMount,
    number: usize,
    secrets: &BTreeMap<String, Vec<u8>>,
    files: &Path,
    mounts: &mut Vec<Mount>,
    env: &mut Vec<String>,
) -> Result<()> {
    let Some(value) = secrets.get(&wanted.id) else {
        if wanted.required {
            return Err(Error::NotFound(format!("secret {}: not found", wanted.id)));
        }
        return Ok(());
    };
    if let Some(name) = &wanted.env {
        let text = String::from_utf8(value.clone()).map_err(|_bad| {
            invalid(format!("secret {} is not valid UTF-8: it cannot be a variable", wanted.id))
        })?;
        env.push(format!("{name}={text}"));
    }
    if wanted.target.is_empty() {
        return Ok(());
    }
    let path = files.join(format!("secret-{number}"));
    std::fs::write(&path, value).doing(|| format!("write the secret {}", wanted.id))?;
    set_mode(&path, wanted.mode.unwrap_or(0o400))?;
    std::os::unix::fs::chown(&path, Some(wanted.uid), Some(wanted.gid))
        .doing(|| format!("give the secret {} away", wanted.id))?;
    mounts.push(bind(&wanted.target, &path, true));
    Ok(())
}

pub(super) fn mount(
    wanted: &RunMount,
    ready: &Ready,
    number: usize,
    files: &Path,
    mounts: &mut Vec<Mount>,
) -> Result<()> {
    match ready {
        Ready::Nothing => {}
        Ready::Path(path) => mounts.push(bind(&wanted.target, path, wanted.read_only)),
        Ready::Tmpfs => {
            let mut options = ["nosuid", "noexec", "nodev"].map(str::to_owned).to_vec();
            options.extend(wanted.size.map(|size| format!("size={size}")));
            mounts.push(entry(&wanted.target, "tmpfs", "tmpfs", options));
        }
        Ready::Layers { lowers, path } => mounts.push(layers(wanted, lowers, path, number, files)?),
    }
    Ok(())
}

/// A part of an input's file system: an overlay of that part of each layer, or the file itself.
fn layers(wanted: &RunMount, lowers: &[Lower], path: &str, number: usize, files: &Path) -> Result<Mount> {
    let mut parts = Vec::new();
    for lower in lowers {
        match part(lower.path(), path)? {
            Part::Missing => {}
            Part::File(file) => {
                if parts.is_empty() {
                    // A change to it would change the input: it is read only whatever was asked for.
                    return Ok(bind(&wanted.target, &file, true));
                }
                break;
            }
            Part::Directory { path, last } => {
                parts.push(path);
                if last {
                    break;
                }
            }
            Part::Hidden => break,
        }
    }
    match &parts[..] {
        [] => Err(Error::NotFound(format!("\"/{path}\": not found"))),
        [one] if wanted.read_only => Ok(bind(&wanted.target, one, true)),
        parts => {
            let mut options: Vec<String> =
                parts.iter().map(|part| format!("lowerdir+={}", part.display())).collect();
            if wanted.read_only {
                options.push("ro".to_owned());
            } else {
                // What is written there is nobody's.
                for (option, sub) in [("upperdir", "upper"), ("workdir", "work")] {
                    let path = files.join(format!("mount-{number}-{sub}"));
                    std::fs::create_dir(&path).doing(|| format!("create {}", path.display()))?;
                    options.push(format!("{option}={}", path.display()));
                }
            }
            if wanted.read_only && parts.len() == 1 {
                options.retain(|option| option != "ro");
            }
            Ok(entry(&wanted.target, "overlay", "overlay", options))
        }
    }
}

enum Part {
    Missing,
    /// Lower layers show nothing here.
    Hidden,
    File(PathBuf),
    Directory {
        path: PathBuf,
        last: bool,
    },
}

/// What one layer has at a path (no links in it).
fn part(layer: &Path, path: &str) -> Result<Part> {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let mut here = layer.to_owned();
    let mut opaque = is_opaque(&here);
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    for (index, name) in parts.iter().enumerate() {
        here.push(name);
        let metadata = match std::fs::symlink_metadata(&here) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(if opaque { Part::Hidden } else { Part::Missing });
            }
            Err(error) => return Err(error).doing(|| format!("look at {}", here.display())),
        };
        if metadata.file_type().is_char_device() && metadata.rdev() == 0 {
            return Ok(Part::Hidden);
        }
        if !metadata.is_dir() {
            return Ok(if index + 1 == parts.len() { Part::File(here) } else { Part::Hidden });
        }
        opaque |= is_opaque(&here);
    }
    Ok(Part::Directory { path: here, last: opaque })
}

pub(super) fn is_opaque(dir: &Path) -> bool {
    let mut value = [0_u8; 1];
    matches!(rustix::fs::lgetxattr(dir, "trusted.overlay.opaque", &mut value), Ok(1) if value == *b"y")
}
