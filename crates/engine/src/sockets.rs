//! Projects' sockets: what each may do, kept until it is removed. Whoever serves the API listens on them.
//!
//! Invariant: a socket is known to others only after its record is on the disk, so that its removal can be trusted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Mutex;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::db::{Batch, Db, Durability, Table};
use crate::error::Context;
use crate::project::{Confinement, ImageGrant};
use crate::sync::lock;
use crate::{Error, Result, names};

const VERSION: u32 = 1;

/// What a project's socket may be used for beside looking at the project.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Allow {
    /// Making, starting, stopping, removing, attaching to containers.
    Containers,
    /// Executing commands in running containers.
    Exec,
    /// Copying files in and out.
    Files,
    Volumes,
    Networks,
    /// Pulling images, which may then be used.
    Pull,
    /// Publishing ports below 1024.
    LowPorts,
}

impl Allow {
    pub const ALL: [Self; 7] = [
        Self::Containers,
        Self::Exec,
        Self::Files,
        Self::Volumes,
        Self::Networks,
        Self::Pull,
        Self::LowPorts,
    ];

    /// What is allowed where nothing is said.
    pub const USUAL: [Self; 5] = [Self::Containers, Self::Exec, Self::Files, Self::Volumes, Self::Networks];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Containers => "containers",
            Self::Exec => "exec",
            Self::Files => "files",
            Self::Volumes => "volumes",
            Self::Networks => "networks",
            Self::Pull => "pull",
            Self::LowPorts => "low-ports",
        }
    }

    pub fn parse(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == text).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.into_iter().map(Self::as_str).collect();
            Error::invalid(format!("unknown permission {text:?}: it is one of {}", known.join(", ")))
        })
    }
}

/// A socket as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Socket {
    version: u32,
    pub name: String,
    pub project: String,
    pub path: PathBuf,
    /// Who may connect: the owner and the group of the path.
    pub uid: u32,
    pub gid: u32,
    pub allow: BTreeSet<Allow>,
    pub images: ImageGrant,
    pub created: Timestamp,
}

/// What a new socket is to be.
#[derive(Debug, Clone)]
pub struct SocketRequest {
    pub name: String,
    pub project: String,
    pub path: PathBuf,
    pub uid: u32,
    pub gid: u32,
    pub allow: BTreeSet<Allow>,
    pub images: Vec<String>,
}

/// The records of all sockets.
#[derive(Debug)]
pub struct Sockets {
    db: Db,
    records: Mutex<BTreeMap<String, Socket>>,
    /// Makes creation and removal one step.
    changing: tokio::sync::Mutex<()>,
}

impl Sockets {
    pub(crate) fn open(db: Db, records: Vec<Socket>) -> Self {
        let records = records.into_iter().map(|one| (one.name.clone(), one)).collect();
        Self { db, records: Mutex::new(records), changing: tokio::sync::Mutex::new(()) }
    }

    pub fn all(&self) -> Vec<Socket> {
        lock(&self.records).values().cloned().collect()
    }

    pub fn get(&self, name: &str) -> Result<Socket> {
        lock(&self.records)
            .get(name)
            .cloned()
            .ok_or_else(|| Error::not_found(format!("No such socket: {name}")))
    }

    pub async fn create(&self, request: SocketRequest) -> Result<Socket> {
        if !names::is_valid(&request.name) {
            return Err(Error::invalid(format!(
                "invalid socket name ({}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed",
                request.name
            )));
        }
        if request.project.is_empty() {
            return Err(Error::invalid("the socket's project must be named"));
        }
        let _changing = self.changing.lock().await;
        if self.get(&request.name).is_ok() {
            return Err(Error::conflict(format!("a socket with name {} already exists", request.name)));
        }
        let socket = Socket {
            version: VERSION,
            name: request.name,
            project: request.project,
            path: request.path,
            uid: request.uid,
            gid: request.gid,
            allow: request.allow,
            images: ImageGrant { names: request.images, pulled: BTreeSet::new() },
            created: Timestamp::now(),
        };
        self.store(&socket).await?;
        Ok(socket)
    }

    pub async fn remove(&self, name: &str) -> Result<()> {
        let _changing = self.changing.lock().await;
        self.get(name)?;
        self.db
            .apply(Batch::new().delete(Table::Sockets, name), Durability::Synced)
            .await
            .doing(|| format!("remove socket {name}"))?;
        lock(&self.records).remove(name);
        Ok(())
    }

    /// Lets a socket use an image that was pulled through it.
    pub async fn grant(&self, name: &str, image: &str) -> Result<()> {
        let _changing = self.changing.lock().await;
        let mut socket = self.get(name)?;
        if socket.images.pulled.insert(image.to_owned()) {
            self.store(&socket).await?;
        }
        Ok(())
    }

    /// What a request through a socket is confined to, as of now; none once the socket is removed.
    pub fn confinement(&self, name: &str) -> Result<Confinement> {
        let socket = self.get(name)?;
        Ok(Confinement { project: socket.project, images: socket.images })
    }

    async fn store(&self, socket: &Socket) -> Result<()> {
        let what = || format!("store socket {}", socket.name);
        let batch = Batch::new().put(Table::Sockets, &socket.name, &socket.name, socket).doing(what)?;
        self.db.apply(batch, Durability::Synced).await.doing(what)?;
        lock(&self.records).insert(socket.name.clone(), socket.clone());
        Ok(())
    }
}
