//! Images made of others without running anything: further layers on top, other values in the configuration.
//!
//! Invariant: the result depends on the base, the layers' bytes and the edit alone, so that the same input gives the
//! same digest. Nothing is read from the clock.

use std::collections::BTreeMap;
use std::io::BufRead;

use serde::Deserialize;

use super::changes::{ports, set_env};
use super::create::{Layered, add, keep_layer, undone};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::model::{History, ImageConfig};
use crate::platform::Platform;
use crate::reference::Reference;
use crate::store::{Image, Store};
use crate::tar::{Entry, Kind, Reader, TarError};

/// The time of images whose base has none.
const EPOCH: &str = "1970-01-01T00:00:00Z";

/// What is to be different in the configuration; what is absent stays.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase", deny_unknown_fields)]
pub struct Edit {
    /// A new one makes the base's `Cmd` void, as in a Dockerfile.
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    pub user: Option<String>,
    pub working_dir: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub exposed_ports: Vec<String>,
    pub volumes: Vec<String>,
    pub stop_signal: Option<String>,
    /// `os/architecture[/variant]`: what the image says it is for.
    pub platform: Option<String>,
    /// RFC 3339; the base's when absent.
    pub created: Option<String>,
    pub author: Option<String>,
}

/// An image to be made.
#[derive(Clone, Debug, Default)]
pub struct Compose {
    /// Nothing is below the layers when absent.
    pub base: Option<Digest>,
    pub edit: Edit,
    pub names: Vec<Reference>,
}

/// Makes an image of a base and the members of an archive, each of which is a layer's archive (compressed or not),
/// bottom first; their names go into the history.
pub fn compose(store: &Store, layers: impl BufRead, compose: &Compose) -> Result<Image> {
    if compose.names.iter().any(|name| name.digest().is_some()) {
        return Err(Error::TagWithDigest);
    }
    let base = compose.base.as_ref().map(|id| store.image(id)).transpose()?;
    undone(store, |lease, fresh| {
        let mut descriptors = Vec::new();
        let mut image = ImageConfig::default();
        if let Some(base) = &base {
            for (layer, diff_id) in base.layers.iter().zip(&base.config.rootfs.diff_ids) {
                lease.hold(&layer.digest)?;
                lease.hold(diff_id)?;
            }
            descriptors.clone_from(&base.layers);
            image = (*base.config).clone();
        } else {
            let host = Platform::host();
            (image.os, image.architecture, image.variant) = (host.os, host.architecture, host.variant);
        }
        edit(&mut image, &compose.edit)?;
        let mut reader = Reader::new(layers);
        let mut entry = Entry::default();
        while reader.next(&mut entry).map_err(archive)? {
            let name = String::from_utf8_lossy(&entry.path).into_owned();
            if entry.kind != Kind::File {
                return Err(Error::Archive(format!("{name:?} is not a layer's archive, but no file at all")));
            }
            let Layered { descriptor, info } =
                keep_layer(store, lease, fresh, &mut reader, &format!("{name:?}"))?;
            image.rootfs.diff_ids.push(info.diff_id);
            descriptors.push(descriptor);
            image.history.push(History {
                created: image.created.clone(),
                author: compose.edit.author.clone(),
                created_by: Some(format!("brig image append {name}")),
                ..History::default()
            });
        }
        add(store, lease, fresh, &image, &descriptors, compose.names.clone(), compose.base.clone())
    })
}

fn archive(error: TarError) -> Error {
    match error {
        TarError::Read(source) => Error::ArchiveRead(source),
        other => Error::Archive(other.to_string()),
    }
}

fn edit(image: &mut ImageConfig, edit: &Edit) -> Result<()> {
    let invalid = |what: &str, value: &str, why: &str| Error::Invalid(format!("{what} {value:?}: {why}"));
    let config = &mut image.config;
    if let Some(entrypoint) = &edit.entrypoint {
        config.entrypoint = Some(entrypoint.clone()).filter(|words| !words.is_empty());
        config.cmd = None;
    }
    if let Some(cmd) = &edit.cmd {
        config.cmd = Some(cmd.clone()).filter(|words| !words.is_empty());
    }
    for line in &edit.env {
        match line.split_once('=') {
            Some((name, value)) if !name.is_empty() => set_env(config, name, value),
            _ => return Err(invalid("variable", line, "NAME=VALUE is expected")),
        }
    }
    if let Some(user) = &edit.user {
        config.user.clone_from(user);
    }
    if let Some(dir) = &edit.working_dir {
        if !dir.starts_with('/') {
            return Err(invalid("working directory", dir, "it must be absolute"));
        }
        config.working_dir.clone_from(dir);
    }
    config.labels.extend(edit.labels.clone());
    for port in &edit.exposed_ports {
        config.exposed_ports.extend(
            ports(port).ok_or_else(|| invalid("port", port, "PORT[-PORT][/tcp|udp|sctp] is expected"))?,
        );
    }
    for volume in &edit.volumes {
        if !volume.starts_with('/') {
            return Err(invalid("volume", volume, "it must be absolute"));
        }
        config.volumes.insert(volume.clone());
    }
    if let Some(signal) = &edit.stop_signal {
        config.stop_signal = Some(signal.clone()).filter(|signal| !signal.is_empty());
    }
    if let Some(text) = &edit.platform {
        let platform: Platform =
            text.parse().map_err(|error: crate::PlatformError| Error::Invalid(error.to_string()))?;
        image.os = platform.os;
        image.architecture = platform.architecture;
        image.variant = platform.variant;
    }
    if let Some(author) = &edit.author {
        image.author = Some(author.clone());
    }
    match &edit.created {
        Some(created) => {
            let time: jiff::Timestamp = created
                .parse()
                .map_err(|_error| invalid("time", created, "RFC 3339 is expected: 2024-01-31T12:00:00Z"))?;
            image.created = Some(time.to_string());
        }
        None => {
            image.created.get_or_insert_with(|| EPOCH.to_owned());
        }
    }
    Ok(())
}
