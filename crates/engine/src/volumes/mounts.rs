//! Mounts as requests name them (`Binds`, `Mounts`, `Volumes`, `Tmpfs`), parsed into one form.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use bollard_stubs::models::{HostConfig, Mount, MountBindOptionsPropagationEnum, MountType};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Error, Result};

/// What stands behind a mount point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum MountKind {
    Bind,
    Volume,
    Tmpfs,
    /// An image's files, read-only; `name` is the image as it was named.
    Image,
}

/// A mount of a container, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountRecord {
    pub kind: MountKind,
    /// The volume's name.
    #[serde(default)]
    pub name: String,
    /// The host path of a bind.
    #[serde(default)]
    pub source: String,
    pub destination: String,
    /// The mode as written (`ro`, `z` …), for inspect.
    #[serde(default)]
    pub mode: String,
    pub rw: bool,
    #[serde(default)]
    pub propagation: String,
    /// A missing source is created as a directory (`Binds`), or is an error (`Mounts`).
    #[serde(default)]
    pub create_source: bool,
    /// Do not fill an empty volume from the image.
    #[serde(default)]
    pub no_copy: bool,
    #[serde(default)]
    pub non_recursive: bool,
    /// Mounts below a read-only bind become read-only too.
    #[serde(default)]
    pub read_only_recursive: bool,
    #[serde(default)]
    pub subpath: String,
    /// Its owner on the host is seen as the container's user, and what that user makes is the owner's.
    #[serde(default)]
    pub map_owner: bool,
    /// Options of a tmpfs.
    #[serde(default)]
    pub options: Vec<String>,
    /// An image's id and its layers by diff id, lowest first.
    #[serde(default)]
    pub image: String,
    #[serde(default)]
    pub layers: Vec<String>,
}

impl MountRecord {
    fn at(kind: MountKind, destination: &str) -> Self {
        Self {
            kind,
            name: String::new(),
            source: String::new(),
            destination: destination.to_owned(),
            mode: String::new(),
            rw: true,
            propagation: String::new(),
            create_source: false,
            no_copy: false,
            non_recursive: false,
            read_only_recursive: false,
            subpath: String::new(),
            map_owner: false,
            options: Vec::new(),
            image: String::new(),
            layers: Vec::new(),
        }
    }

    pub(crate) fn volume_at(name: &str, destination: &str) -> Self {
        Self { name: name.to_owned(), ..Self::at(MountKind::Volume, destination) }
    }

    /// The volume's name if this is one.
    pub(crate) fn volume(&self) -> Option<&str> {
        (self.kind == MountKind::Volume).then_some(self.name.as_str())
    }

    /// The entry in inspect's `Mounts`; `source` is where a volume's files are, `driver` whose it is.
    pub(crate) fn document(&self, source: &Path, driver: &str) -> Value {
        match self.kind {
            MountKind::Bind => json!({
                "Type": "bind", "Source": self.source, "Destination": self.destination, "Mode": self.mode, "RW": self.rw,
                "Propagation": if self.propagation.is_empty() { "rprivate" } else { &self.propagation },
            }),
            MountKind::Volume => json!({
                "Type": "volume", "Name": self.name, "Source": source, "Destination": self.destination,
                "Driver": driver, "Mode": if self.mode.is_empty() { "z" } else { &self.mode }, "RW": self.rw,
                "Propagation": self.propagation,
            }),
            MountKind::Tmpfs => json!({
                "Type": "tmpfs", "Source": "", "Destination": self.destination, "Mode": "", "RW": self.rw,
                "Propagation": "",
            }),
            MountKind::Image => json!({
                "Type": "image", "Name": self.name, "Source": self.image, "Destination": self.destination, "Mode": "",
                "RW": false, "Propagation": "",
            }),
        }
    }
}

/// A mount that is asked for, and the settings of a volume that may have to be made for it.
#[derive(Debug, Clone)]
pub(crate) struct Requested {
    pub mount: MountRecord,
    /// Empty when none is named.
    pub volume_driver: String,
    pub volume_labels: BTreeMap<String, String>,
    pub volume_options: BTreeMap<String, String>,
}

impl From<MountRecord> for Requested {
    fn from(mount: MountRecord) -> Self {
        Self {
            mount,
            volume_driver: String::new(),
            volume_labels: BTreeMap::new(),
            volume_options: BTreeMap::new(),
        }
    }
}

/// All mounts a request names: `Binds` and `Mounts` may not share a destination; the image's and the request's
/// `Volumes`, and `inherited` (volumes-from), fill in where nothing else is mounted.
pub(crate) fn requested(
    host: &HostConfig,
    volumes: &[String],
    inherited: Vec<MountRecord>,
) -> Result<Vec<Requested>> {
    let mut all: BTreeMap<String, Requested> = BTreeMap::new();
    for mount in inherited {
        all.insert(mount.destination.clone(), mount.into());
    }
    let mut named = BTreeSet::new();
    let mut add = |requested: Requested| -> Result<()> {
        let destination = requested.mount.destination.clone();
        if !named.insert(destination.clone()) {
            return Err(Error::invalid(format!("Duplicate mount point: {destination}")));
        }
        all.insert(destination, requested);
        Ok(())
    };
    for bind in host.binds.iter().flatten() {
        add(parse_bind(bind)?.into())?;
    }
    for mount in host.mounts.iter().flatten() {
        add(parse_mount(mount)?)?;
    }
    for destination in host.tmpfs.iter().flatten().map(|(path, _)| path) {
        let path = clean(destination);
        if !path.starts_with('/') {
            return Err(Error::invalid(format!(
                "invalid mount path: '{destination}' mount path must be absolute"
            )));
        }
        if path == "/" {
            return Err(Error::invalid(format!(
                "invalid tmpfs mount '{destination}': destination can't be '/'"
            )));
        }
        if named.contains(&path) {
            return Err(Error::invalid(format!("Duplicate mount point: {path}")));
        }
        all.remove(&path);
        named.insert(path);
    }
    for volume in volumes {
        let destination = clean(volume);
        if !destination.starts_with('/') {
            return Err(Error::invalid(format!(
                "invalid volume specification: '{volume}': invalid mount path: '{volume}' mount path must be absolute"
            )));
        }
        if destination == "/" {
            return Err(Error::invalid("invalid specification: destination can't be '/'"));
        }
        if !named.contains(&destination) {
            all.entry(destination.clone()).or_insert_with(|| MountRecord::volume_at("", &destination).into());
        }
    }
    // Docker's order: parents before what lies in them.
    let mut ordered: Vec<Requested> = all.into_values().collect();
    ordered.sort_by_key(|requested| Path::new(&requested.mount.destination).components().count());
    Ok(ordered)
}

/// `source:destination[:mode]`, or `destination` alone for an anonymous volume.
fn parse_bind(text: &str) -> Result<MountRecord> {
    let wrong = || Error::invalid(format!("invalid volume specification: '{text}'"));
    let parts: Vec<&str> = text.split(':').collect();
    let (source, destination, mode) = match parts[..] {
        [destination] => ("", destination, ""),
        // `destination:mode` of an anonymous volume cannot be told from `source:destination`: the latter it is.
        [source, destination] => (source, destination, ""),
        [source, destination, mode] => (source, destination, mode),
        _ => return Err(wrong()),
    };
    if destination.is_empty() || (parts.len() > 1 && source.is_empty()) {
        return Err(wrong());
    }
    if !destination.starts_with('/') {
        return Err(Error::invalid(format!(
            "invalid volume specification: '{text}': invalid mount config for type \"{}\": invalid mount path: '{destination}' mount path must be absolute",
            if source.starts_with('/') { "bind" } else { "volume" }
        )));
    }
    let destination = clean(destination);
    if destination == "/" {
        return Err(Error::invalid(format!(
            "invalid volume specification: '{text}': invalid specification: destination can't be '/'"
        )));
    }
    let mut mount = if source.starts_with('/') {
        MountRecord {
            source: clean(source),
            create_source: true,
            ..MountRecord::at(MountKind::Bind, &destination)
        }
    } else {
        if !source.is_empty() && !crate::names::is_valid(source) {
            return Err(Error::invalid(format!(
                "create {source}: \"{source}\" includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path"
            )));
        }
        MountRecord::volume_at(source, &destination)
    };
    mode.clone_into(&mut mount.mode);
    for flag in mode.split(',').filter(|flag| !flag.is_empty()) {
        match flag {
            "rw" | "z" | "Z" | "consistent" | "cached" | "delegated" => {}
            "ro" => mount.rw = false,
            "U" | "idmap" => mount.map_owner = true,
            "nocopy" if mount.kind == MountKind::Volume => mount.no_copy = true,
            "private" | "rprivate" | "shared" | "rshared" | "slave" | "rslave"
                if mount.kind == MountKind::Bind =>
            {
                flag.clone_into(&mut mount.propagation);
            }
            _ => return Err(Error::invalid(format!("invalid mode: {mode}"))),
        }
    }
    if mount.kind == MountKind::Bind && mount.propagation.is_empty() {
        "rprivate".clone_into(&mut mount.propagation);
    }
    mount.read_only_recursive = !mount.rw;
    Ok(mount)
}

fn parse_mount(request: &Mount) -> Result<Requested> {
    let kind = match request.typ {
        Some(MountType::BIND) => MountKind::Bind,
        Some(MountType::VOLUME) => MountKind::Volume,
        Some(MountType::TMPFS) => MountKind::Tmpfs,
        Some(MountType::IMAGE) => MountKind::Image,
        Some(other) => {
            return Err(Error::invalid(format!(
                "invalid mount config for type \"{other}\": mount type unknown"
            )));
        }
        None => return Err(Error::invalid("invalid mount config for type \"\": mount type unknown")),
    };
    let word = match kind {
        MountKind::Bind => "bind",
        MountKind::Volume => "volume",
        MountKind::Tmpfs => "tmpfs",
        MountKind::Image => "image",
    };
    let wrong = |why: String| Error::invalid(format!("invalid mount config for type \"{word}\": {why}"));
    let target = request.target.as_deref().unwrap_or_default();
    if target.is_empty() {
        return Err(wrong("field Target must not be empty".to_owned()));
    }
    if !target.starts_with('/') {
        return Err(wrong(format!("invalid mount path: '{target}' mount path must be absolute")));
    }
    let destination = clean(target);
    if destination == "/" {
        return Err(wrong("invalid specification: destination can't be '/'".to_owned()));
    }
    let source = request.source.clone().unwrap_or_default();
    let mut mount =
        MountRecord { rw: !request.read_only.unwrap_or_default(), ..MountRecord::at(kind, &destination) };
    for (given, of) in [
        (request.bind_options.is_some(), MountKind::Bind),
        (request.volume_options.is_some(), MountKind::Volume),
        (request.tmpfs_options.is_some(), MountKind::Tmpfs),
        (request.image_options.is_some(), MountKind::Image),
    ] {
        if given && of != kind {
            let field = match of {
                MountKind::Bind => "BindOptions",
                MountKind::Volume => "VolumeOptions",
                MountKind::Tmpfs => "TmpfsOptions",
                MountKind::Image => "ImageOptions",
            };
            return Err(wrong(format!("field {field} must not be specified")));
        }
    }
    let mut requested = Requested::from(mount.clone());
    match kind {
        MountKind::Bind => {
            if source.is_empty() {
                return Err(wrong("field Source must not be empty".to_owned()));
            }
            if !source.starts_with('/') {
                return Err(wrong(format!("invalid mount path: '{source}' mount path must be absolute")));
            }
            mount.source = clean(&source);
            "rprivate".clone_into(&mut mount.propagation);
            mount.read_only_recursive = !mount.rw;
            if let Some(options) = &request.bind_options {
                if let Some(propagation) =
                    options.propagation.filter(|p| *p != MountBindOptionsPropagationEnum::EMPTY)
                {
                    mount.propagation = propagation.to_string();
                }
                mount.non_recursive = options.non_recursive.unwrap_or_default();
                mount.create_source = options.create_mountpoint.unwrap_or_default();
                if options.read_only_non_recursive.unwrap_or_default() {
                    mount.read_only_recursive = false;
                }
            }
            if !mount.create_source && !Path::new(&mount.source).exists() {
                return Err(wrong(format!("bind source path does not exist: {}", mount.source)));
            }
        }
        MountKind::Volume => {
            if !source.is_empty() && !crate::names::is_valid(&source) {
                return Err(wrong(format!(
                    "\"{source}\" includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed"
                )));
            }
            mount.name = source;
            if let Some(options) = &request.volume_options {
                mount.no_copy = options.no_copy.unwrap_or_default();
                mount.subpath = options.subpath.clone().unwrap_or_default();
                if !stays_inside(&mount.subpath) {
                    return Err(wrong(format!(
                        "subpath must be a relative path within the volume: {}",
                        mount.subpath
                    )));
                }
                if let Some(driver) = &options.driver_config {
                    requested.volume_driver = driver.name.clone().unwrap_or_default();
                    requested.volume_options =
                        driver.options.clone().unwrap_or_default().into_iter().collect();
                    if matches!(requested.volume_driver.as_str(), "" | super::LOCAL) {
                        super::check_options(&requested.volume_options)?;
                    }
                }
                requested.volume_labels = options.labels.clone().unwrap_or_default().into_iter().collect();
            }
        }
        MountKind::Image => {
            if source.is_empty() {
                return Err(wrong("field Source must not be empty".to_owned()));
            }
            mount.name = source;
            mount.rw = false;
            mount.subpath = request
                .image_options
                .as_ref()
                .and_then(|options| options.subpath.clone())
                .unwrap_or_default();
            if !stays_inside(&mount.subpath) {
                return Err(wrong(format!(
                    "subpath must be a relative path within the image: {}",
                    mount.subpath
                )));
            }
        }
        MountKind::Tmpfs => {
            if !source.is_empty() {
                return Err(wrong("field Source must not be specified".to_owned()));
            }
            if let Some(options) = &request.tmpfs_options {
                if let Some(size) = options.size_bytes.filter(|size| *size > 0) {
                    mount.options.push(format!("size={size}"));
                }
                if let Some(mode) = options.mode.filter(|mode| *mode > 0) {
                    mount.options.push(format!("mode={mode:o}"));
                }
                mount.options.extend(options.options.iter().flatten().map(|pair| pair.join("=")));
            }
        }
    }
    requested.mount = mount;
    Ok(requested)
}

/// Whether a sub-path names something below where it starts.
fn stays_inside(path: &str) -> bool {
    Path::new(path).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

/// A path without `.`, `..`, doubled and trailing slashes, as text alone allows.
pub(crate) fn clean(path: &str) -> String {
    let mut out = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    out.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(binds: &[&str]) -> HostConfig {
        HostConfig { binds: Some(binds.iter().map(|b| (*b).to_owned()).collect()), ..Default::default() }
    }

    #[test]
    fn binds_are_host_paths_or_volumes() {
        let all =
            requested(&host(&["/a/../src:/dst/:ro", "data:/var/lib/x", "/only"]), &[], Vec::new()).unwrap();
        let by =
            |destination: &str| all.iter().map(|r| &r.mount).find(|m| m.destination == destination).unwrap();
        assert_eq!(
            (by("/dst").kind, by("/dst").source.as_str(), by("/dst").rw),
            (MountKind::Bind, "/src", false)
        );
        assert!(by("/dst").create_source);
        assert_eq!(by("/var/lib/x").volume(), Some("data"));
        assert_eq!(by("/only").volume(), Some(""));
        assert_eq!(all.last().unwrap().mount.destination, "/var/lib/x");
    }

    #[test]
    fn an_owner_can_be_mapped() {
        let all =
            requested(&host(&["/src:/dst:ro,U", "data:/data:idmap", "/x:/y"]), &[], Vec::new()).unwrap();
        let mapped = |destination: &str| {
            all.iter().find(|one| one.mount.destination == destination).map(|one| one.mount.map_owner)
        };
        assert_eq!((mapped("/dst"), mapped("/data"), mapped("/y")), (Some(true), Some(true), Some(false)));
    }

    #[test]
    fn bad_binds_are_named() {
        for (bind, text) in [
            ("a:b:c:d", "invalid volume specification: 'a:b:c:d'"),
            ("/x:", "invalid volume specification: '/x:'"),
            ("/x:/y:fast", "invalid mode: fast"),
            ("/x:/", "invalid volume specification: '/x:/': invalid specification: destination can't be '/'"),
        ] {
            assert_eq!(requested(&host(&[bind]), &[], Vec::new()).unwrap_err().to_string(), text);
        }
        assert!(
            requested(&host(&["/x:y"]), &[], Vec::new())
                .unwrap_err()
                .to_string()
                .contains("mount path must be absolute")
        );
        assert_eq!(
            requested(&host(&["/x:/y", "z1:/y"]), &[], Vec::new()).unwrap_err().to_string(),
            "Duplicate mount point: /y"
        );
    }

    #[test]
    fn image_volumes_give_way_to_what_is_asked_for() {
        let all = requested(&host(&["/src:/data"]), &["/data".to_owned(), "/cache/".to_owned()], Vec::new())
            .unwrap();
        assert_eq!(all.len(), 2);
        assert!(all.iter().any(|r| r.mount.volume() == Some("") && r.mount.destination == "/cache"));
        let tmpfs =
            HostConfig { tmpfs: Some([("/data".to_owned(), String::new())].into()), ..Default::default() };
        assert!(requested(&tmpfs, &["/data".to_owned()], Vec::new()).unwrap().is_empty());
    }

    #[test]
    fn mounts_must_exist_and_fit_their_type() {
        let bind = Mount {
            typ: Some(MountType::BIND),
            source: Some("/does/not/exist".into()),
            target: Some("/x".into()),
            ..Default::default()
        };
        let config = |mount: Mount| HostConfig { mounts: Some(vec![mount]), ..Default::default() };
        assert_eq!(
            requested(&config(bind.clone()), &[], Vec::new()).unwrap_err().to_string(),
            "invalid mount config for type \"bind\": bind source path does not exist: /does/not/exist"
        );
        let odd = Mount { tmpfs_options: Some(bollard_stubs::models::MountTmpfsOptions::default()), ..bind };
        assert!(
            requested(&config(odd), &[], Vec::new())
                .unwrap_err()
                .to_string()
                .contains("field TmpfsOptions must not be specified")
        );
    }
}
