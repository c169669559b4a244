//! Volumes: named directories under the data root that outlive containers, volumes of plugins, and what mounts mean.
//!
//! A local volume's directory exists exactly as long as its record; who uses it is derived from the containers' records.

mod copy_up;
mod local;
mod mounts;
mod remote;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bollard_stubs::models::VolumeCreateRequest;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(crate) use copy_up::copy_up;
pub(crate) use mounts::{MountKind, MountRecord, Requested, clean, requested};

use crate::db::{Batch, Db, Durability, Table};
use crate::error::Context;
use crate::events::{Events, Kind};
use crate::ids::new_id;
use crate::plugins::Plugins;
use crate::quota::Quotas;
use crate::sync::lock;
use crate::{Class, Error, Filters, Result, names};

const VERSION: u32 = 1;

/// The engine's own driver.
pub(crate) const LOCAL: &str = "local";

fn local_driver() -> String {
    LOCAL.to_owned()
}

/// A volume as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    pub name: String,
    #[serde(default = "local_driver")]
    pub driver: String,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    pub created: Timestamp,
    /// Made without a name: `volume prune` takes it, and so does `rm -v`.
    #[serde(default)]
    pub anonymous: bool,
}

impl Record {
    /// One that only its plugin knows of.
    fn unknown(name: &str, driver: &str) -> Self {
        Self {
            version: VERSION,
            name: name.to_owned(),
            driver: driver.to_owned(),
            labels: BTreeMap::new(),
            options: BTreeMap::new(),
            created: Timestamp::UNIX_EPOCH,
            anonymous: false,
        }
    }

    /// Whether its files are in its own directory, and nothing is mounted there.
    pub(crate) fn has_own_files(&self) -> bool {
        self.driver == LOCAL && self.options.keys().all(|name| name == local::SIZE)
    }

    /// The project it belongs to: only requests give volumes labels.
    pub(crate) fn project(&self) -> Option<String> {
        self.labels.get(crate::project::LABEL).cloned()
    }
}

/// The label that marks a volume nobody named, as Docker does.
const ANONYMOUS_LABEL: &str = "com.docker.volume.anonymous";

#[derive(Debug, Default)]
struct Index {
    records: BTreeMap<String, Record>,
    /// Containers that have a mount of the volume.
    users: HashMap<String, BTreeSet<String>>,
}

fn no_such_volume(name: &str) -> Error {
    Error::not_found(format!("get {name}: no such volume"))
}

/// The volumes service.
#[derive(Debug)]
pub struct Volumes {
    root: PathBuf,
    db: Db,
    events: Arc<Events>,
    quotas: Quotas,
    index: Mutex<Index>,
    /// Containers that run with a volume that its options mount.
    mounted: Mutex<HashMap<String, BTreeSet<String>>>,
    plugins: Plugins,
    /// Plugins' volumes that containers run with.
    remote: Mutex<HashMap<String, remote::Mounted>>,
    /// Makes creation and removal of one volume's directory and record one step.
    changing: tokio::sync::Mutex<()>,
    /// The same for plugins' volumes: a plugin may take its time.
    changing_remote: tokio::sync::Mutex<()>,
}

impl Volumes {
    pub(crate) fn open(root: PathBuf, db: Db, events: Arc<Events>, records: Vec<Record>) -> Self {
        let records = records.into_iter().map(|record| (record.name.clone(), record)).collect();
        Self {
            quotas: Quotas::new(root.clone()),
            root,
            db,
            events,
            index: Mutex::new(Index { records, users: HashMap::new() }),
            mounted: Mutex::default(),
            plugins: Plugins::default(),
            remote: Mutex::default(),
            changing: tokio::sync::Mutex::new(()),
            changing_remote: tokio::sync::Mutex::new(()),
        }
    }

    /// Where a volume's files are.
    pub(crate) fn data_dir(&self, name: &str) -> PathBuf {
        self.root.join(name).join("_data")
    }

    /// What a mount of the volume binds: its own directory, or the one its options name.
    pub(crate) fn source(&self, name: &str) -> PathBuf {
        let index = lock(&self.index);
        let record = index.records.get(name);
        match record.and_then(bound_device) {
            Some(device) => PathBuf::from(device),
            None if record.is_some_and(|record| record.driver != LOCAL) => {
                drop(index);
                self.remote_source(name)
            }
            None => self.data_dir(name),
        }
    }

    /// Creates a volume, or returns the one of that name.
    pub async fn create(&self, request: VolumeCreateRequest) -> Result<Value> {
        let driver = request.driver.unwrap_or_default();
        if request.cluster_volume_spec.is_some() {
            return Err(Error::not_implemented("cluster volumes are not supported"));
        }
        let name = request.name.unwrap_or_default();
        let labels = request.labels.unwrap_or_default().into_iter().collect();
        let options: BTreeMap<_, _> = request.driver_opts.unwrap_or_default().into_iter().collect();
        let record = self.ensure(&name, &driver, labels, options).await?;
        if record.driver == LOCAL {
            return Ok(self.document(&record));
        }
        // It is made, whatever its plugin says of it now.
        Ok(self.inspect_remote(&record).await.unwrap_or_else(|_unknown| self.document(&record)))
    }

    /// Makes sure a volume exists; an empty `name` makes an anonymous one, an empty `driver` is the engine's own, or that
    /// of the volume that exists.
    pub(crate) async fn ensure(
        &self,
        name: &str,
        driver: &str,
        mut labels: BTreeMap<String, String>,
        options: BTreeMap<String, String>,
    ) -> Result<Record> {
        let anonymous = name.is_empty();
        let name = if anonymous { new_id() } else { name.to_owned() };
        if !names::is_valid(&name) {
            return Err(Error::invalid(format!(
                "create {name}: \"{name}\" includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path"
            )));
        }
        let is_remote = !matches!(driver, "" | LOCAL);
        let _changing = if is_remote { &self.changing_remote } else { &self.changing }.lock().await;
        if let Some(found) = lock(&self.index).records.get(&name) {
            if !driver.is_empty() && driver != found.driver {
                return Err(Error::conflict(format!(
                    "create {name}: a volume named {name} already exists with the {} driver. Choose a different volume name",
                    found.driver
                )));
            }
            if !options.is_empty() && options != found.options {
                return Err(Error::conflict(format!(
                    "create {name}: a volume of that name exists with different options"
                )));
            }
            return Ok(found.clone());
        }
        let size = if is_remote { None } else { check_options(&options)? };
        if anonymous {
            labels.insert(ANONYMOUS_LABEL.to_owned(), String::new());
        }
        let record = Record {
            version: VERSION,
            name: name.clone(),
            driver: if is_remote { driver.to_owned() } else { LOCAL.to_owned() },
            labels,
            options,
            created: Timestamp::now(),
            anonymous,
        };
        if is_remote {
            self.create_remote(driver, &name, &record.options).await?;
        } else {
            self.make(&name, size).await?;
        }
        let batch = Batch::new()
            .put(Table::Volumes, &name, &name, &record)
            .doing(|| format!("create volume {name}"))?;
        self.db.apply(batch, Durability::Synced).await.doing(|| format!("create volume {name}"))?;
        lock(&self.index).records.insert(name.clone(), record.clone());
        self.events.publish_of(
            record.project(),
            Kind::Volume,
            "create",
            name,
            driver_attribute(&record.driver),
        );
        Ok(record)
    }

    /// Makes a volume's directory, limited to a size if one is asked for.
    async fn make(&self, name: &str, size: Option<u64>) -> Result<()> {
        let (dir, quotas) = (self.data_dir(name), self.quotas.clone());
        crate::blocking(move || {
            if size.is_some() {
                quotas.check("the volume option \"size\"")?;
            }
            std::fs::create_dir_all(&dir).doing(|| format!("create {}", dir.display()))?;
            let limited = size.map_or(Ok(()), |bytes| quotas.limit(&[&dir], bytes));
            if limited.is_err()
                && let Some(parent) = dir.parent()
            {
                remove_tree(parent)?;
            }
            limited
        })
        .await
    }

    pub async fn inspect(&self, name: &str) -> Result<Value> {
        let record = self.get(name)?;
        if record.driver == LOCAL { Ok(self.document(&record)) } else { self.inspect_remote(&record).await }
    }

    /// The driver of a volume; the engine's own for one that is not there.
    pub(crate) fn driver(&self, name: &str) -> String {
        lock(&self.index).records.get(name).map_or_else(local_driver, |record| record.driver.clone())
    }

    fn get(&self, name: &str) -> Result<Record> {
        lock(&self.index).records.get(name).cloned().ok_or_else(|| no_such_volume(name))
    }

    /// Refuses a volume that is not of the project as if it were not there.
    pub fn within(&self, name: &str, project: &str) -> Result<()> {
        match self.get(name) {
            Ok(record) if record.project().as_deref() == Some(project) => Ok(()),
            Ok(_) => Err(no_such_volume(name)),
            Err(error) => Err(error),
        }
    }

    pub async fn list(&self, filters: &Filters) -> Result<Value> {
        filters.only(&["name", "driver", "label", "dangling"])?;
        let dangling = filters.boolean("dangling")?;
        let (records, used) = {
            let index = lock(&self.index);
            let used: BTreeSet<String> = index
                .users
                .iter()
                .filter(|(_, users)| !users.is_empty())
                .map(|(name, _)| name.clone())
                .collect();
            (index.records.values().cloned().collect::<Vec<_>>(), used)
        };
        let (mut all, warnings) = self.list_remote(&records).await;
        let own = records.iter().filter(|record| record.driver == LOCAL);
        all.extend(own.map(|record| (record.clone(), self.document(record))));
        all.sort_by(|(one, _), (other, _)| one.name.cmp(&other.name));
        let volumes: Vec<Value> = all
            .into_iter()
            .filter(|(record, _)| {
                dangling.is_none_or(|wanted| used.contains(&record.name) != wanted)
                    && filters.exact("driver", &record.driver)
                    && filters.matches("name", &record.name)
                    && filters.labels("label", |label| record.labels.get(label).map(String::as_str))
            })
            .map(|(_, document)| document)
            .collect();
        Ok(json!({ "Volumes": volumes, "Warnings": warnings }))
    }

    pub async fn remove(&self, name: &str, force: bool) -> Result<()> {
        let is_remote = self.driver(name) != LOCAL;
        let _changing = if is_remote { &self.changing_remote } else { &self.changing }.lock().await;
        let record = match self.get(name) {
            Err(error) if force && error.class() == Class::NotFound => return Ok(()),
            Err(error) => return Err(error),
            Ok(record) => record,
        };
        let users: Vec<String> =
            lock(&self.index).users.get(name).iter().flat_map(|u| u.iter().cloned()).collect();
        if !users.is_empty() {
            return Err(Error::conflict(format!("remove {name}: volume is in use - [{}]", users.join(", "))));
        }
        if is_remote {
            match self.remove_remote(&record.driver, name).await {
                Ok(()) => {}
                // A plugin that is gone for good must not keep the record.
                Err(error) if force => {
                    tracing::warn!(
                        volume = name,
                        error = error.report(),
                        "a volume is forgotten, its plugin did not remove it"
                    );
                }
                Err(error) => return Err(error),
            }
        } else {
            self.delete_files(&record).await?;
        }
        self.forget(&record).await
    }

    async fn delete_files(&self, record: &Record) -> Result<()> {
        let (dir, data) = (self.root.join(&record.name), self.data_dir(&record.name));
        let (quotas, limited) = (self.quotas.clone(), record.options.contains_key(local::SIZE));
        crate::blocking(move || {
            let project = if limited { crate::quota::project_of(&data) } else { None };
            remove_tree(&dir)?;
            quotas.forget(project);
            Ok(())
        })
        .await
    }

    async fn forget(&self, record: &Record) -> Result<()> {
        let name = &record.name;
        self.db
            .apply(Batch::new().delete(Table::Volumes, name), Durability::Synced)
            .await
            .doing(|| format!("remove volume {name}"))?;
        lock(&self.index).records.remove(name);
        self.events.publish_of(
            record.project(),
            Kind::Volume,
            "destroy",
            name,
            driver_attribute(&record.driver),
        );
        Ok(())
    }

    /// Removes unused volumes: anonymous ones, or with the filter `all` every one.
    pub async fn prune(&self, filters: &Filters, named_too: bool) -> Result<Value> {
        filters.only(&["label", "label!", "all"])?;
        let all = filters.boolean("all")?.unwrap_or(named_too);
        let candidates: Vec<Record> = {
            let index = lock(&self.index);
            index
                .records
                .values()
                .filter(|record| {
                    let label = |name: &str| record.labels.get(name).map(String::as_str);
                    // What plugins have may be others' as well.
                    record.driver == LOCAL
                        && (all || record.anonymous)
                        && index.users.get(&record.name).is_none_or(BTreeSet::is_empty)
                        && filters.labels("label", label)
                        && (!filters.contains("label!") || !filters.labels("label!", label))
                })
                .cloned()
                .collect()
        };
        let mut deleted = Vec::new();
        let mut reclaimed = 0_u64;
        for record in candidates {
            let dir = self.data_dir(&record.name);
            let size = crate::blocking(move || Ok(crate::disk::usage(&dir))).await?;
            match self.remove(&record.name, false).await {
                Ok(()) => {
                    reclaimed += size;
                    deleted.push(record.name);
                }
                Err(error) if matches!(error.class(), Class::Conflict | Class::NotFound) => {}
                Err(error) => return Err(error),
            }
        }
        self.events.publish(
            Kind::Volume,
            "prune",
            "",
            BTreeMap::from([("reclaimed".to_owned(), reclaimed.to_string())]),
        );
        Ok(json!({ "VolumesDeleted": deleted, "SpaceReclaimed": reclaimed }))
    }

    /// Volumes with size and number of users, for `system df`.
    pub async fn usage(self: &Arc<Self>) -> Result<Vec<Value>> {
        let this = Arc::clone(self);
        crate::blocking(move || {
            let local = |record: &&Record| record.driver == LOCAL;
            let records: Vec<Record> = lock(&this.index).records.values().filter(local).cloned().collect();
            Ok(records
                .iter()
                .map(|record| {
                    let users = lock(&this.index).users.get(&record.name).map_or(0, BTreeSet::len);
                    let mut document = this.document(record);
                    document["UsageData"] =
                        json!({ "Size": crate::disk::usage(&this.data_dir(&record.name)), "RefCount": users });
                    document
                })
                .collect())
        })
        .await
    }

    /// Tells that a container that starts (`mount`) or has ended (`unmount`) uses its volumes.
    pub(crate) fn tell_use(&self, action: &'static str, container: &str, mounts: &[MountRecord]) {
        for mount in mounts {
            let Some(record) = mount.volume().and_then(|name| self.get(name).ok()) else { continue };
            let mut attributes = driver_attribute(&record.driver);
            attributes.insert("container".to_owned(), container.to_owned());
            if action == "mount" {
                attributes.insert("destination".to_owned(), mount.destination.clone());
                attributes.insert("propagation".to_owned(), mount.propagation.clone());
                attributes.insert("read/write".to_owned(), mount.rw.to_string());
            }
            self.events.publish_of(record.project(), Kind::Volume, action, record.name, attributes);
        }
    }

    /// Notes that a container has these mounts.
    pub(crate) fn acquire(&self, container: &str, mounts: &[MountRecord]) {
        let mut index = lock(&self.index);
        for name in mounts.iter().filter_map(MountRecord::volume) {
            index.users.entry(name.to_owned()).or_default().insert(container.to_owned());
        }
    }

    /// Notes that a container is gone; with `remove_anonymous` its unnamed volumes go with it unless others use them.
    pub(crate) async fn release(&self, container: &str, mounts: &[MountRecord], remove_anonymous: bool) {
        for name in mounts.iter().filter_map(MountRecord::volume) {
            let unused = {
                let mut index = lock(&self.index);
                match index.users.get_mut(name) {
                    Some(users) => {
                        users.remove(container);
                        let unused = users.is_empty();
                        if unused {
                            index.users.remove(name);
                        }
                        unused
                    }
                    None => true,
                }
            };
            let anonymous = || lock(&self.index).records.get(name).is_some_and(|record| record.anonymous);
            if remove_anonymous && unused && anonymous() {
                match self.remove(name, true).await {
                    Ok(()) => {}
                    Err(error) if error.class() == Class::Conflict => {}
                    Err(error) => {
                        tracing::warn!(volume = name, error = error.report(), "remove an anonymous volume");
                    }
                }
            }
        }
    }

    fn document(&self, record: &Record) -> Value {
        json!({
            "Name": record.name,
            "Driver": record.driver,
            "Mountpoint": if record.driver == LOCAL { self.data_dir(&record.name) } else { PathBuf::new() },
            "CreatedAt": crate::clock::rfc3339_seconds(record.created),
            "Labels": if record.labels.is_empty() { Value::Null } else { json!(record.labels) },
            "Options": if record.options.is_empty() { Value::Null } else { json!(record.options) },
            "Scope": "local",
        })
    }
}

fn driver_attribute(driver: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("driver".to_owned(), driver.to_owned())])
}

/// The directory that `type=none,o=bind,device=DIR` names: it is used without being mounted.
fn bound_device(record: &Record) -> Option<&str> {
    let bind = record.options.get("o")?.split(',').any(|option| matches!(option, "bind" | "rbind"));
    if bind { record.options.get("device").map(String::as_str) } else { None }
}

/// Whether the options make sense; the size they limit the volume to.
fn check_options(options: &BTreeMap<String, String>) -> Result<Option<u64>> {
    if let Some(unknown) =
        options.keys().find(|key| !matches!(key.as_str(), "type" | "o" | "device" | "size"))
    {
        return Err(Error::invalid(format!("invalid option: \"{unknown}\"")));
    }
    let mounted = local::Mount::of(options)?.is_some() || options.contains_key("device");
    match options.get(local::SIZE) {
        None => Ok(None),
        Some(_) if mounted => Err(Error::invalid(
            "the volume option \"size\" limits a directory of the engine's own and does not go with \"device\": limit what is mounted by its own options (type=tmpfs, device=tmpfs, o=size=…)",
        )),
        Some(text) => crate::quota::parse(text).map(Some),
    }
}

/// Removes a directory and all in it; one that is not there is fine.
pub(crate) fn remove_tree(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::internal(format!("remove {}", dir.display())).because(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volumes(dir: &Path) -> Arc<Volumes> {
        let (db, _) = Db::open(&dir.join("db")).unwrap();
        Arc::new(Volumes::open(dir.join("volumes"), db, Arc::new(Events::default()), Vec::new()))
    }

    fn request(name: &str) -> VolumeCreateRequest {
        VolumeCreateRequest { name: Some(name.to_owned()), ..Default::default() }
    }

    #[tokio::test]
    async fn create_is_idempotent_and_remove_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = volumes(dir.path());
        let first = volumes.create(request("data")).await.unwrap();
        assert_eq!(volumes.create(request("data")).await.unwrap(), first);
        assert!(dir.path().join("volumes/data/_data").is_dir());
        volumes.remove("data", false).await.unwrap();
        assert!(!dir.path().join("volumes/data").exists());
        let error = volumes.inspect("data").await.unwrap_err();
        assert_eq!(
            (error.class(), error.to_string().as_str()),
            (Class::NotFound, "get data: no such volume")
        );
        volumes.remove("data", true).await.unwrap();
    }

    #[tokio::test]
    async fn a_volume_in_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = volumes(dir.path());
        let anonymous = volumes.create(VolumeCreateRequest::default()).await.unwrap();
        let name = anonymous["Name"].as_str().unwrap().to_owned();
        let mount = [MountRecord::volume_at(&name, "/data")];
        volumes.acquire("c1", &mount);
        let error = volumes.remove(&name, false).await.unwrap_err();
        assert_eq!(error.to_string(), format!("remove {name}: volume is in use - [c1]"));
        assert_eq!(volumes.prune(&Filters::none(), false).await.unwrap()["VolumesDeleted"], json!([]));
        volumes.release("c1", &mount, true).await;
        assert!(volumes.inspect(&name).await.is_err());
    }

    #[tokio::test]
    async fn names_and_options_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = volumes(dir.path());
        assert_eq!(volumes.create(request("../up")).await.unwrap_err().class(), Class::InvalidParameter);
        let mut odd = request("odd");
        odd.driver_opts = Some([("colour".to_owned(), "red".to_owned())].into());
        assert_eq!(volumes.create(odd).await.unwrap_err().to_string(), "invalid option: \"colour\"");
    }
}
