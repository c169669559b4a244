//! The builder: Dockerfile to graph, solver, cache, exporters.
//!
//! Start at [`Builder::build`]. A Dockerfile is parsed ([`dockerfile`]), converted to a graph of operations with
//! content-addressed definitions ([`graph`], [`convert`]) and solved; the target's layers and configuration become an
//! image of the store. Nothing is committed in between: a step works on the snapshots of those before it.

pub mod convert;
pub mod dockerfile;
pub mod graph;

mod access;
mod attest;
mod binfmt;
mod building;
mod cache;
mod caches;
mod chmod;
mod compression;
mod context;
mod definition;
mod deliver;
mod epoch;
mod error;
mod export;
mod gc;
mod hashes;
mod history;
mod ids;
mod lent;
mod pattern;
mod product;
mod prune;
mod received;
mod records;
mod remote;
mod request;
mod resolve;
mod run;
mod snapshot;
mod solver;
mod source;
mod tree;
mod users;
mod wanted;
mod write;
mod xattrs;

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigantine_image::Digest;

pub use attest::purl as package_url;
pub use cache::{CacheFrom, CachePlace, CacheTo};
pub use caches::{CacheMount, Carried, MountName, Way};
pub use convert::outline::{Outline, Targets};
pub use convert::{Options, Plan, Step, named_context};
pub use error::Error;
pub use gc::{Gc, filter};
pub use history::{BuildRecord, StepRecord};
pub use lent::LentFolder;
pub use pattern::Ignore;
pub use prune::{Chosen, Entry, Prune, Pruned, Space};
pub use records::Snapshot;
pub use request::{Built, Checked, ContextSource, Event, Product, Remark, Request, Setup, Side};
pub use run::{Joined, Network};
pub use wanted::{Annotation, Export, Level, Provenance};

pub(crate) use crate::building::{beside, send};
use crate::caches::Caches;
use crate::error::{Context as _, Result};
use crate::records::Records;
use crate::run::Executor;
use crate::solver::Solver;

/// The builder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Builder {
    solver: Arc<Solver>,
    data: PathBuf,
}

impl Builder {
    /// Opens a builder: ends what an earlier one left running and removes what it left lying about. Blocks.
    pub fn open(setup: Setup) -> Result<Self> {
        let Setup { data, run_dir, exe, store, network, cgroup_parent, systemd_cgroup, shm_size } = setup;
        let contexts = data.join("contexts");
        for dir in [data.clone(), data.join("snapshots"), data.join("caches"), contexts, run_dir.clone()] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .doing(|| format!("create {}", dir.display()))?;
            // What many files are made in lies away from where as many were removed.
            brigantine_image::tree::spread(&dir).doing(|| format!("open {}", dir.display()))?;
        }
        let tmp = data.join("tmp");
        let executor =
            Executor { exe, network, run_dir, tmp: tmp.clone(), cgroup_parent, systemd_cgroup, shm_size };
        executor.sweep();
        snapshot::remove_tree(&tmp);
        fs::DirBuilder::new().mode(0o700).create(&tmp).doing(|| format!("create {}", tmp.display()))?;
        let records = Records::open(&data.join("build.db"))?;
        let known: std::collections::HashSet<String> =
            records.all()?.into_iter().map(|snapshot| snapshot.id).collect();
        let snapshots = data.join("snapshots");
        let entries = fs::read_dir(&snapshots).doing(|| format!("read {}", snapshots.display()))?;
        for entry in entries.flatten() {
            if !known.contains(&*entry.file_name().to_string_lossy()) {
                snapshot::remove_tree(&entry.path());
            }
        }
        let caches = Caches::new(data.join("caches"));
        let contexts = received::Contexts::new(data.join("contexts"));
        let solver = Arc::new(Solver::new(store, records, executor, caches, contexts, snapshots, tmp));
        Ok(Self { solver, data })
    }

    /// The diff ids of layers in the image store that the cache leads to: not to be collected.
    pub fn held_layers(&self) -> Vec<Digest> {
        match self.solver.records.all() {
            Ok(all) => all.iter().filter_map(|snapshot| snapshot.diff_id.as_deref()?.parse().ok()).collect(),
            Err(error) => {
                tracing::error!(error = error.report(), "list the build cache");
                Vec::new()
            }
        }
    }

    /// Syncs what the cache holds, so that a power cut does not cost making it again. Blocks.
    pub fn settle(&self) -> Result<()> {
        let until = records::now();
        let what = || format!("sync {}", self.data.display());
        let root = fs::File::open(&self.data).doing(what)?;
        rustix::fs::syncfs(&root).doing(what)?;
        self.solver.records.settled(until)
    }

    /// Where files may be kept for as long as a build runs.
    pub fn spool(&self) -> PathBuf {
        self.solver.tmp.clone()
    }

    /// The builder's own directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    pub(crate) fn solver(&self) -> &Arc<Solver> {
        &self.solver
    }
}
