//! Volumes that a plugin keeps (Docker's `VolumeDriver` protocol).
//!
//! The engine keeps a record of each (name, driver, labels, options); where its files are the plugin says when a
//! container starts. Invariants: each container's `Mount` has its `Unmount`, also after the daemon was away; what a
//! plugin says is believed only if it is a directory that is there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Map, Value, json};

use super::{LOCAL, MountRecord, Record, Volumes};
use crate::plugins::{ASKING, DOING};
use crate::sync::lock;
use crate::{Class, Error, Result};

const KIND: &str = "VolumeDriver";

/// A plugin's volume that containers run with.
#[derive(Debug, Default)]
pub(super) struct Mounted {
    /// Unknown after the daemon was away.
    mountpoint: Option<PathBuf>,
    users: BTreeSet<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Place {
    #[serde(default)]
    mountpoint: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Got {
    volume: Told,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    #[serde(default)]
    volumes: Option<Vec<Told>>,
}

/// What a plugin tells about a volume.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Told {
    name: String,
    #[serde(default)]
    mountpoint: String,
    #[serde(default)]
    created_at: String,
    #[serde(default)]
    status: Option<Map<String, Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Capable {
    #[serde(default)]
    capabilities: Capabilities,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Capabilities {
    #[serde(default)]
    scope: String,
}

impl Volumes {
    async fn ask<A: DeserializeOwned>(
        &self,
        driver: &str,
        method: &str,
        body: Value,
        limit: std::time::Duration,
    ) -> Result<A> {
        let called = self.plugins.call(driver, KIND, &format!("{KIND}.{method}"), &body, limit).await;
        called.map_err(|error| {
            if error.class() != Class::NotFound {
                return error;
            }
            Error::not_found(format!("error looking up volume plugin {driver}")).because(error)
        })
    }

    /// Has the plugin make a volume.
    pub(super) async fn create_remote(
        &self,
        driver: &str,
        name: &str,
        options: &BTreeMap<String, String>,
    ) -> Result<()> {
        let body = json!({ "Name": name, "Opts": options });
        self.ask::<IgnoredAny>(driver, "Create", body, DOING).await.map(drop)
    }

    pub(super) async fn remove_remote(&self, driver: &str, name: &str) -> Result<()> {
        self.ask::<IgnoredAny>(driver, "Remove", json!({ "Name": name }), DOING).await.map(drop)
    }

    /// The document of a plugin's volume, with what the plugin knows of it.
    pub(super) async fn inspect_remote(&self, record: &Record) -> Result<Value> {
        let Got { volume } = self.ask(&record.driver, "Get", json!({ "Name": record.name }), ASKING).await?;
        if volume.name != record.name {
            return Err(Error::internal(format!(
                "plugin {}: {KIND}.Get: it was asked for volume {} and told of {:?}",
                record.driver, record.name, volume.name
            )));
        }
        let mut document = self.document(record);
        complete(&mut document, volume);
        document["Scope"] = self.scope(&record.driver).await.into();
        Ok(document)
    }

    /// What plugins tell of their volumes, in the order of their names, and a warning for each plugin that does not.
    pub(super) async fn list_remote(&self, records: &[Record]) -> (Vec<(Record, Value)>, Vec<String>) {
        let mut drivers = crate::plugins::names();
        let used: BTreeSet<String> =
            records.iter().map(|r| r.driver.clone()).filter(|driver| driver != LOCAL).collect();
        drivers.extend(used.iter().cloned());
        let (mut found, mut warnings) = (Vec::new(), Vec::new());
        let asked = drivers.into_iter().map(async |driver| {
            let listed = self.ask::<Listed>(&driver, "List", json!({}), ASKING).await;
            (driver, listed)
        });
        for (driver, listed) in futures_util::future::join_all(asked).await {
            let known = |name: &str| records.iter().find(|r| r.name == name && r.driver == driver);
            let volumes = match listed {
                Ok(listed) => listed.volumes.unwrap_or_default(),
                // Another kind of plugin.
                Err(_) if !used.contains(&driver) => continue,
                Err(error) => {
                    warnings.push(error.report());
                    let own = records.iter().filter(|record| record.driver == driver);
                    found.extend(own.map(|record| (record.clone(), self.document(record))));
                    continue;
                }
            };
            let scope = self.scope(&driver).await;
            for told in volumes {
                // A name that a record of another driver has is not this plugin's to take.
                if records.iter().any(|r| r.name == told.name && r.driver != driver) {
                    continue;
                }
                let record = match known(&told.name) {
                    Some(record) => record.clone(),
                    None => Record::unknown(&told.name, &driver),
                };
                let mut document = self.document(&record);
                complete(&mut document, told);
                document["Scope"] = scope.clone().into();
                found.push((record, document));
            }
        }
        (found, warnings)
    }

    /// Whether the plugin's volumes are this host's; plugins of before it was asked keep `local` ones.
    async fn scope(&self, driver: &str) -> String {
        let asked = self.ask::<Capable>(driver, "Capabilities", json!({}), ASKING).await;
        match asked.map(|capable| capable.capabilities.scope.to_ascii_lowercase()) {
            Ok(scope) if scope == "global" => scope,
            _ => LOCAL.to_owned(),
        }
    }

    /// Where a plugin's volume was mounted for a container that runs with it; empty if that is not known.
    pub(super) fn remote_source(&self, name: &str) -> PathBuf {
        lock(&self.remote).get(name).and_then(|mounted| mounted.mountpoint.clone()).unwrap_or_default()
    }

    /// Has plugins mount what a container needs; for a start. Blocks, on a thread that may.
    pub(super) fn mount_remote(&self, container: &str, mounts: &[MountRecord]) -> Result<()> {
        let names: BTreeSet<&str> = mounts.iter().filter_map(MountRecord::volume).collect();
        for name in names {
            let Some(driver) = self.remote_driver(name) else { continue };
            let body = json!({ "Name": name, "ID": container });
            let asked = self.ask::<Place>(&driver, "Mount", body, DOING);
            let Place { mountpoint } = tokio::runtime::Handle::current().block_on(asked)?;
            // From now on there is something to unmount.
            let mut remote = lock(&self.remote);
            let mounted = remote.entry(name.to_owned()).or_default();
            mounted.users.insert(container.to_owned());
            let path = Path::new(&mountpoint);
            if !path.is_absolute() || !path.is_dir() {
                return Err(Error::internal(format!(
                    "plugin {driver}: {KIND}.Mount: it says that volume {name} is at {mountpoint:?}, which is not a directory of this host's named by an absolute path"
                )));
            }
            mounted.mountpoint = Some(path.to_owned());
        }
        Ok(())
    }

    /// Notes that a container runs, or ran until lately, with plugins' volumes.
    pub(super) fn remote_mounted_for(&self, container: &str, mounts: &[MountRecord]) {
        for name in mounts.iter().filter_map(MountRecord::volume) {
            if self.remote_driver(name).is_some() {
                lock(&self.remote).entry(name.to_owned()).or_default().users.insert(container.to_owned());
            }
        }
    }

    /// Tells plugins that a container has ended. Blocks, on a thread that may.
    pub(super) fn unmount_remote(&self, container: &str) {
        let names: Vec<String> = {
            let mut remote = lock(&self.remote);
            let used = remote
                .iter_mut()
                .filter_map(|(name, mounted)| mounted.users.remove(container).then_some(name));
            let names = used.cloned().collect();
            remote.retain(|_, mounted| !mounted.users.is_empty());
            names
        };
        for name in names {
            let Some(driver) = self.remote_driver(&name) else { continue };
            let body = json!({ "Name": name, "ID": container });
            let asked = self.ask::<IgnoredAny>(&driver, "Unmount", body, DOING);
            if let Err(error) = tokio::runtime::Handle::current().block_on(asked) {
                tracing::warn!(
                    container,
                    volume = name,
                    error = error.report(),
                    "have a plugin unmount a volume"
                );
            }
        }
    }

    fn remote_driver(&self, name: &str) -> Option<String> {
        let index = lock(&self.index);
        index.records.get(name).map(|record| record.driver.clone()).filter(|driver| driver != LOCAL)
    }
}

/// Puts what a plugin tells into a volume's document.
fn complete(document: &mut Value, told: Told) {
    document["Mountpoint"] = told.mountpoint.into();
    if !told.created_at.is_empty() {
        document["CreatedAt"] = told.created_at.into();
    }
    if let Some(status) = told.status.filter(|status| !status.is_empty()) {
        document["Status"] = status.into();
    }
}
