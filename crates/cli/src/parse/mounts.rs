//! `--volume`, `--mount`, `--tmpfs`.

use bollard_stubs::models::{
    Mount, MountBindOptions, MountBindOptionsPropagationEnum as Propagation, MountImageOptions,
    MountTmpfsOptions, MountType, MountVolumeOptions, MountVolumeOptionsDriverConfig,
};

use super::{comma_separated, truth};
use crate::units;

#[derive(Debug, PartialEq, Eq)]
pub enum Volume {
    /// `source:target[:options]` as the engine takes it.
    Bind(String),
    /// A path inside alone: a volume without a name.
    Anonymous(String),
}

pub fn volume(spec: &str) -> Result<Volume, String> {
    if spec.is_empty() {
        return Err("invalid empty volume spec".to_owned());
    }
    let Some((source, rest)) = spec.split_once(':') else { return Ok(Volume::Anonymous(spec.to_owned())) };
    if source.starts_with('.') {
        let here = std::env::current_dir().map_err(|error| format!("getwd: {error}"))?;
        return Ok(Volume::Bind(format!("{}:{rest}", clean(&here.join(source)))));
    }
    Ok(Volume::Bind(spec.to_owned()))
}

/// A path without `.` and `..`, by its words alone.
fn clean(path: &std::path::Path) -> String {
    let mut parts: Vec<&std::ffi::OsStr> = Vec::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                parts.pop();
            }
            std::path::Component::Normal(name) => parts.push(name),
            _ => {}
        }
    }
    let joined: Vec<_> = parts.iter().map(|part| part.to_string_lossy()).collect();
    format!("/{}", joined.join("/"))
}

/// `path[:options]`.
pub fn tmpfs(spec: &str) -> (String, String) {
    let (path, options) = spec.split_once(':').unwrap_or((spec, ""));
    (path.to_owned(), options.to_owned())
}

pub fn mount(spec: &str) -> Result<Mount, String> {
    let mut mount = Mount { typ: Some(MountType::VOLUME), ..Mount::default() };
    let mut kind = "volume".to_owned();
    let mut bind = MountBindOptions::default();
    let mut volume = MountVolumeOptions::default();
    let mut tmpfs = MountTmpfsOptions::default();
    let mut image = MountImageOptions::default();
    let (mut has_bind, mut has_volume, mut has_tmpfs, mut has_image) = (false, false, false, false);
    let invalid = |key: &str, value: &str| format!("invalid value for {key}: {value}");
    for field in comma_separated(spec)? {
        let (key, value) = if let Some((key, value)) = field.split_once('=') {
            (key.to_ascii_lowercase(), value.to_owned())
        } else {
            let key = field.to_ascii_lowercase();
            if !["readonly", "ro", "volume-nocopy", "bind-nonrecursive"].contains(&key.as_str()) {
                return Err(format!("invalid field '{field}' must be a key=value pair"));
            }
            (key, "true".to_owned())
        };
        let switch = || truth(&value).ok_or_else(|| invalid(&key, &value));
        has_bind |= key.starts_with("bind-");
        has_volume |= key.starts_with("volume-");
        has_tmpfs |= key.starts_with("tmpfs-");
        has_image |= key.starts_with("image-");
        match key.as_str() {
            "type" => kind = value.to_ascii_lowercase(),
            "source" | "src" => {
                mount.source = Some(if value.starts_with('.') {
                    let here = std::env::current_dir().map_err(|error| format!("getwd: {error}"))?;
                    clean(&here.join(&value))
                } else {
                    value.clone()
                });
            }
            "target" | "dst" | "destination" => mount.target = Some(value.clone()),
            "readonly" | "ro" => mount.read_only = Some(switch()?),
            "consistency" => mount.consistency = Some(value.to_ascii_lowercase()),
            "bind-propagation" => {
                bind.propagation = Some(match value.to_ascii_lowercase().as_str() {
                    "private" => Propagation::PRIVATE,
                    "rprivate" => Propagation::RPRIVATE,
                    "shared" => Propagation::SHARED,
                    "rshared" => Propagation::RSHARED,
                    "slave" => Propagation::SLAVE,
                    "rslave" => Propagation::RSLAVE,
                    _ => return Err(invalid(&key, &value)),
                });
            }
            "bind-nonrecursive" => bind.non_recursive = Some(switch()?),
            "bind-create-mountpoint" | "bind-create-src" => bind.create_mountpoint = Some(switch()?),
            "bind-recursive" => match value.as_str() {
                "enabled" => {}
                "disabled" => bind.non_recursive = Some(true),
                "writable" => bind.read_only_non_recursive = Some(true),
                "readonly" => bind.read_only_force_recursive = Some(true),
                _ => {
                    return Err(format!(
                        "invalid value for {key}: {value} (must be \"enabled\", \"disabled\", \"writable\", or \"readonly\")"
                    ));
                }
            },
            "volume-nocopy" => volume.no_copy = Some(switch()?),
            "volume-subpath" => volume.subpath = Some(value.clone()),
            "volume-label" => {
                let (name, text) = value.split_once('=').unwrap_or((&value, ""));
                volume.labels.get_or_insert_default().insert(name.to_owned(), text.to_owned());
            }
            "volume-driver" => driver(&mut volume).name = Some(value.clone()),
            "volume-opt" => {
                let (name, text) = value.split_once('=').unwrap_or((&value, ""));
                driver(&mut volume).options.get_or_insert_default().insert(name.to_owned(), text.to_owned());
            }
            "image-subpath" => image.subpath = Some(value.clone()),
            "tmpfs-size" => {
                tmpfs.size_bytes =
                    Some(units::parse_bytes(&value).ok().ok_or_else(|| invalid(&key, &value))?);
            }
            "tmpfs-mode" => {
                let mode = i64::from_str_radix(&value, 8);
                tmpfs.mode = Some(mode.ok().ok_or_else(|| invalid(&key, &value))?);
            }
            _ => return Err(format!("unexpected key '{key}' in '{field}'")),
        }
    }
    if mount.target.as_deref().unwrap_or_default().is_empty() {
        return Err("target is required".to_owned());
    }
    for (given, family) in
        [(has_bind, "bind"), (has_volume, "volume"), (has_tmpfs, "tmpfs"), (has_image, "image")]
    {
        if given && kind != family {
            return Err(format!("cannot mix '{family}-*' options with mount type '{kind}'"));
        }
    }
    mount.typ = Some(match kind.as_str() {
        "bind" => MountType::BIND,
        "volume" => MountType::VOLUME,
        "tmpfs" => MountType::TMPFS,
        "image" => MountType::IMAGE,
        "cluster" => MountType::CLUSTER,
        "npipe" => MountType::NPIPE,
        other => return Err(format!("invalid mount config for type \"{other}\": mount type unknown")),
    });
    mount.bind_options = has_bind.then_some(bind);
    mount.volume_options = has_volume.then_some(volume);
    mount.tmpfs_options = has_tmpfs.then_some(tmpfs);
    mount.image_options = has_image.then_some(image);
    Ok(mount)
}

fn driver(volume: &mut MountVolumeOptions) -> &mut MountVolumeOptionsDriverConfig {
    volume.driver_config.get_or_insert_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_split_by_their_first_colon() {
        assert_eq!(volume("/data").unwrap(), Volume::Anonymous("/data".into()));
        assert_eq!(volume("v:/data:ro").unwrap(), Volume::Bind("v:/data:ro".into()));
        let here = std::env::current_dir().unwrap();
        assert_eq!(volume("./x/../y:/data").unwrap(), Volume::Bind(format!("{}/y:/data", here.display())));
        assert_eq!(volume("").unwrap_err(), "invalid empty volume spec");
    }

    #[test]
    fn mounts_parse() {
        let found = mount("type=bind,src=/a,dst=/b,ro,bind-propagation=rslave").unwrap();
        assert_eq!((found.source.as_deref(), found.target.as_deref()), (Some("/a"), Some("/b")));
        assert_eq!(found.read_only, Some(true));
        assert_eq!(
            mount("type=tmpfs,dst=/t,tmpfs-size=1m,tmpfs-mode=1770").unwrap().tmpfs_options.unwrap().mode,
            Some(0o1770)
        );
        assert_eq!(
            mount("src=v,dst=/v,\"volume-opt=o=a,b\"")
                .unwrap()
                .volume_options
                .unwrap()
                .driver_config
                .unwrap()
                .options
                .unwrap()["o"],
            "a,b"
        );
    }

    #[test]
    fn refusals_are_dockers() {
        for (spec, text) in [
            ("x", "invalid field 'x' must be a key=value pair"),
            ("type=bind", "target is required"),
            ("target=/a,foo=bar", "unexpected key 'foo' in 'foo=bar'"),
            ("type=bind,src=/a,dst=/b,ro=maybe", "invalid value for ro: maybe"),
            ("type=tmpfs,dst=/x,tmpfs-size=zz", "invalid value for tmpfs-size: zz"),
            (
                "type=volume,dst=/x,bind-propagation=shared",
                "cannot mix 'bind-*' options with mount type 'volume'",
            ),
            ("type=foo,dst=/x", "invalid mount config for type \"foo\": mount type unknown"),
        ] {
            assert_eq!(mount(spec).unwrap_err(), text);
        }
    }
}
