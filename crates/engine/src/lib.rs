//! The engine: containers, execs, volumes, networks, images and events behind one handle.
//!
//! [`Engine`] only joins the services together; each of them owns one kind of record. Everything a running container
//! needs lives in its shim, so an `Engine` may be dropped or killed at any moment and opened again.

#![recursion_limit = "512"]

mod builds;
mod cdi;
mod clock;
mod db;
mod disk;
mod error;
mod filters;
mod ids;
mod names;
mod own;
pub mod plugins;
mod quota;
mod rootfs;
mod spec;
mod sync;
mod users;

pub mod config;
pub mod containers;
pub mod events;
pub mod files;
pub mod images;
pub mod networks;
pub mod project;
pub mod runtimes;
pub mod sockets;
pub mod userns;
pub mod volumes;

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use brigantine_build::Builder;
use brigantine_sys::SealedExe;

pub use clock::{ZERO_TIME, go_duration, parse_moment, rfc3339_nano};
pub use config::Config;
pub use containers::Containers;
pub use error::{Class, Error};
pub use events::Events;
pub use filters::Filters;
pub use images::Images;
pub use networks::Networks;
pub use sockets::Sockets;
pub use volumes::Volumes;

use crate::db::{Db, Table};
use crate::error::Context;

/// What every fallible engine call returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One engine: its services, sharing a data root. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine {
    config: Arc<Config>,
    id: Arc<str>,
    events: Arc<Events>,
    images: Arc<Images>,
    volumes: Arc<Volumes>,
    networks: Arc<Networks>,
    containers: Arc<Containers>,
    sockets: Arc<Sockets>,
    builder: Builder,
    cache_changed: Arc<tokio::sync::Notify>,
}

impl Engine {
    /// Opens the engine: reads its records, finds the containers that still run and takes them up again. The caller
    /// sees to it that no other engine uses the same data root.
    pub async fn open(config: Config) -> Result<Self> {
        let config = Arc::new(config);
        let opened = {
            let config = Arc::clone(&config);
            blocking(move || Opened::open(&config)).await?
        };
        let Opened { id, exe, db, mut snapshot, images, networks } = opened;
        let events = Arc::new(Events::default());
        let volumes = readable(snapshot.take(Table::Volumes), "volume");
        let volumes = Arc::new(Volumes::open(
            config.data_root.join("volumes"),
            db.clone(),
            Arc::clone(&events),
            volumes,
        ));
        let sockets = readable(snapshot.take(Table::Sockets), "socket");
        let sockets = Arc::new(Sockets::open(db.clone(), sockets));
        let networks = Arc::new(
            Networks::open(Arc::clone(&config), db.clone(), Arc::clone(&events), networks, &mut snapshot)
                .await?,
        );
        let images = Arc::new(images);
        let exe = Arc::new(exe);
        let builder = {
            let (config, images, networks, exe) =
                (Arc::clone(&config), Arc::clone(&images), Arc::clone(&networks), Arc::clone(&exe));
            blocking(move || builds::open(&config, &images, &networks, &exe)).await?
        };
        let containers = Containers::new(
            Arc::clone(&config),
            db,
            Arc::clone(&events),
            Arc::clone(&images),
            Arc::clone(&volumes),
            Arc::clone(&networks),
            exe,
            builder.clone(),
        );
        containers.restore(&mut snapshot).await?;
        Ok(Self {
            config,
            id: id.into(),
            events,
            images,
            volumes,
            networks,
            containers,
            sockets,
            builder,
            cache_changed: Arc::default(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The engine's own id, the same as long as its data root is.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    pub fn images(&self) -> &Arc<Images> {
        &self.images
    }

    pub fn volumes(&self) -> &Arc<Volumes> {
        &self.volumes
    }

    pub fn networks(&self) -> &Arc<Networks> {
        &self.networks
    }

    pub fn builder(&self) -> &Builder {
        &self.builder
    }

    /// Has the build cache looked at soon: a build has ended, or an image has gone that had layers of the cache's.
    pub fn check_build_cache(&self) {
        self.cache_changed.notify_one();
    }

    /// Keeps the build cache within its bounds, after builds and now and then. Never ends.
    pub async fn keep_build_cache(self) {
        loop {
            if tokio::time::timeout(builds::COLLECT_EVERY, self.cache_changed.notified()).await.is_err() {
                tracing::trace!("the build cache is looked at by the clock");
            }
            builds::collect(&self).await;
        }
    }

    pub fn sockets(&self) -> &Arc<Sockets> {
        &self.sockets
    }

    pub fn containers(&self) -> &Arc<Containers> {
        &self.containers
    }
}

/// The records that could be read; the others are said to be lost.
fn readable<T>(records: Vec<Result<T, db::DbError>>, what: &str) -> Vec<T> {
    let mut good = Vec::with_capacity(records.len());
    for record in records {
        match record {
            Ok(record) => good.push(record),
            Err(error) => {
                tracing::error!(error = Error::internal(format!("a {what} is lost")).because(error).report());
            }
        }
    }
    good
}

/// What opening does with the disk and the kernel.
struct Opened {
    id: String,
    exe: SealedExe,
    db: Db,
    snapshot: db::Snapshot,
    images: Images,
    networks: networks::Plumbing,
}

impl Opened {
    fn open(config: &Config) -> Result<Self> {
        make_dir(&config.data_root, 0o711)?;
        make_dir(&config.exec_root, 0o711)?;
        for dir in ["containers", "volumes"] {
            let path = config.data_root.join(dir);
            make_dir(&path, 0o711)?;
            // Each of them is a tree of its own, and many come and go.
            brigantine_image::tree::spread(&path).doing(|| format!("open {}", path.display()))?;
        }
        let path = config.exec_root.join("c");
        make_dir(&path, 0o700)?;
        brigantine_image::tree::spread(&path).doing(|| format!("open {}", path.display()))?;
        let id = engine_id(&config.data_root.join("engine-id"))?;
        let exe = SealedExe::from_path(&config.runtime_exe)
            .doing(|| format!("take a copy of the runtime {}", config.runtime_exe.display()))?;
        let path = config.data_root.join("brig.db");
        let (db, snapshot) = Db::open(&path).doing(|| "open the engine's records".to_owned())?;
        let images = Images::open(&config.data_root.join("image"), config.storage)?;
        let networks = networks::Plumbing::open(config);
        Ok(Self { id, exe, db, snapshot, images, networks })
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .doing(|| format!("create directory {}", path.display()))
}

fn engine_id(path: &Path) -> Result<String> {
    match std::fs::read_to_string(path) {
        Ok(id) if !id.trim().is_empty() => return Ok(id.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).doing(|| format!("read {}", path.display())),
    }
    let bytes: [u8; 16] = ids::random_bytes();
    let hex = hex::encode(bytes);
    let id = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
    std::fs::write(path, &id).doing(|| format!("write {}", path.display()))?;
    Ok(id)
}

/// Runs work that blocks off the asynchronous threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(Error::internal("a task of the engine ended early").because(error)),
    }
}
