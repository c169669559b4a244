//! What is kept about a container: plain versioned data, never a live object.

use std::collections::BTreeMap;

use bollard_stubs::models::{ContainerConfig, EndpointSettings, HostConfig};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::userns::Remap;
use crate::volumes::MountRecord;

/// The version this engine writes.
pub(crate) const VERSION: u32 = 1;

/// A container as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub version: u32,
    pub id: String,
    /// Without the leading slash.
    pub name: String,
    pub created: Timestamp,
    /// The image's id, `sha256:…`; the reference as asked for is `config.image`.
    pub image_id: String,
    /// The image's layers by diff id, lowest first: they outlive an image that is removed by force.
    #[serde(default)]
    pub layers: Vec<String>,
    /// Entry point and command joined: the program and its arguments.
    pub path: String,
    pub args: Vec<String>,
    /// The request's configuration merged with the image's hints.
    pub config: ContainerConfig,
    pub host_config: HostConfig,
    /// Networks by name, with what was asked for each.
    #[serde(default)]
    pub endpoints: BTreeMap<String, EndpointSettings>,
    #[serde(default)]
    pub mounts: Vec<MountRecord>,
    #[serde(default)]
    pub state: State,
    #[serde(default)]
    pub restart_count: i64,
    /// Stopped by somebody's request: `unless-stopped` leaves it so.
    #[serde(default)]
    pub stopped_by_request: bool,
    /// The project that the request's own labels named; a label of the image does not count.
    #[serde(default)]
    pub project: Option<String>,
    /// Made through the project's socket: what it names must be the project's whenever it starts, too.
    #[serde(default)]
    pub confined: bool,
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    #[default]
    Created,
    Running,
    Paused,
    Restarting,
    Removing,
    Exited,
    Dead,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Restarting => "restarting",
            Self::Removing => "removing",
            Self::Exited => "exited",
            Self::Dead => "dead",
        }
    }

    /// A process of it exists.
    pub fn is_up(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

/// The changing part of a [`Record`]. What it says of a running container is a hint: the shim knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub status: Status,
    #[serde(default)]
    pub pid: i32,
    #[serde(default)]
    pub exit_code: i32,
    #[serde(default)]
    pub error: String,
    #[serde(default)]
    pub oom_killed: bool,
    #[serde(default)]
    pub started_at: Option<Timestamp>,
    #[serde(default)]
    pub finished_at: Option<Timestamp>,
}

impl Record {
    pub(crate) fn tty(&self) -> bool {
        self.config.tty.unwrap_or_default()
    }

    pub(crate) fn auto_remove(&self) -> bool {
        self.host_config.auto_remove.unwrap_or_default()
    }

    pub(crate) fn privileged(&self) -> bool {
        self.host_config.privileged.unwrap_or_default()
    }

    /// Whose ids its ids stand for: the engine's remapping, unless it asked for the host's.
    pub(crate) fn remap<'a>(&self, config: &'a Config) -> Option<&'a Remap> {
        config.userns.as_ref().filter(|_| self.host_config.userns_mode.as_deref() != Some("host"))
    }

    /// The network mode as it counts: `default` and nothing mean `bridge`.
    pub(crate) fn network_mode(&self) -> &str {
        match self.host_config.network_mode.as_deref() {
            None | Some("" | "default") => "bridge",
            Some(mode) => mode,
        }
    }

    pub(crate) fn label(&self, name: &str) -> Option<&str> {
        self.config.labels.as_ref()?.get(name).map(String::as_str)
    }

    /// The image as the creator named it.
    pub(crate) fn image(&self) -> &str {
        self.config.image.as_deref().unwrap_or_default()
    }

    /// The attributes of every event about this container: image, name and all labels.
    pub(crate) fn event_attributes(&self) -> BTreeMap<String, String> {
        let mut attributes: BTreeMap<String, String> =
            self.config.labels.iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        attributes.insert("image".to_owned(), self.image().to_owned());
        attributes.insert("name".to_owned(), self.name.clone());
        attributes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records are read back for ever: this one was written by version 1.
    #[test]
    fn version_1_is_readable() {
        let stored = r#"{"version":1,"id":"ab","name":"x","created":"2026-01-01T00:00:00Z","image_id":"sha256:00",
            "path":"true","args":[],"config":{"Image":"debian","ExposedPorts":{"80/tcp":{}}},"host_config":{"NetworkMode":"default"}}"#;
        let record: Record = serde_json::from_str(stored).unwrap();
        assert_eq!(record.network_mode(), "bridge");
        assert_eq!(record.state.status, Status::Created);
        assert_eq!(record.config.exposed_ports.as_deref(), Some(&["80/tcp".to_owned()][..]));
        assert_eq!(record.event_attributes()["image"], "debian");
    }
}
