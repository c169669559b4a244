//! Steps that run a program.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brigantine_image::{Lower, Replica, Storage};
use brigantine_registry::redacted;
use futures_util::FutureExt as _;
use rustix::fs::FileType;

use super::known::Step;
use super::{Job, Keys, Listeners, Made, Output, blocking, definition, digest_of};
use crate::dockerfile::MountKind;
use crate::error::{Context as _, Error, Result, invalid};
use crate::graph::{Run, RunMount, Vertex, VertexId};
use crate::records;
use crate::run::{Ready, Task, resolve_source};
use crate::snapshot::{Fresh, Layer, hold};
use crate::tree::Tree;
use crate::write::{CopyOptions, Writer};

/// What is run, and what is known of it beforehand.
struct About {
    run: Run,
    /// Digests of the files that mounts show or begin with, by the mount's place.
    bases: BTreeMap<usize, String>,
    name: String,
    family: String,
}

/// The copies that mounts of a step were made of; they go with it, however it ends.
struct Copies {
    tmp: PathBuf,
    id: String,
    count: usize,
}

impl Drop for Copies {
    fn drop(&mut self) {
        for index in 0..self.count {
            crate::snapshot::remove_tree(&self.tmp.join(format!("{}-{index}", self.id)));
        }
    }
}

impl Job {
    pub(super) async fn run(
        self: &Arc<Self>,
        id: VertexId,
        vertex: &Vertex,
        run: &Run,
        inputs: &[Arc<Output>],
    ) -> Result<Arc<Output>> {
        let text = definition(&vertex.op)?;
        let mut keys = Keys::default();
        keys.parts.insert("operation".to_owned(), text.clone());
        keys.parts.insert("below".to_owned(), inputs[0].key.clone());
        let mut mounted = Vec::new();
        let mut bases = BTreeMap::new();
        let taken = self.taken(id).await?;
        for (index, mount) in run.mounts.iter().enumerate() {
            let Some(input) = mount.input else { continue };
            if inputs[input].tree.is_none() {
                let key = digest_of(&[&inputs[input].key, &mount.source]);
                mounted.push(inputs[input].key.clone());
                bases.insert(index, key);
                continue;
            }
            let content = taken.get(index).map(|(digest, _)| digest.clone()).unwrap_or_default();
            keys.parts.insert(format!("mount {}", mount.target), content.clone());
            bases.insert(index, content.clone());
            mounted.push(content);
        }
        let key = digest_of(&["run", &text, &inputs[0].key, &mounted.join(",")]);
        keys.identity.clone_from(&key);
        keys.definition = self.definition_key(id).await?;
        keys.all.push(key);
        let same =
            if vertex.no_cache { None } else { self.same_inputs(&text, &mounted, inputs, &keys).await? };
        if let Some(output) = same {
            return Ok(output);
        }
        let job = Arc::clone(self);
        let (run, inputs_for, name) = (run.clone(), inputs.to_vec(), vertex.name.clone());
        let family = digest_of(&["run family", &text, &mounted.join(",")]);
        self.cached_or(id, vertex, keys, inputs, move |keys, listeners| {
            let about = About { run, bases, name, family };
            async move { job.execute(about, inputs_for, keys, listeners).await }.boxed()
        })
        .await
    }

    /// The same program on a file system that was made again but holds the same: what it did then holds.
    async fn same_inputs(
        &self,
        text: &str,
        mounted: &[String],
        inputs: &[Arc<Output>],
        keys: &Keys,
    ) -> Result<Option<Arc<Output>>> {
        let key = &keys.identity;
        if self.solver.records.find(key)?.is_some() {
            return Ok(None);
        }
        let family = digest_of(&["run family", text, &mounted.join(",")]);
        if self.solver.records.find(&format!("family:{family}"))?.is_none() {
            return Ok(None);
        }
        let content = self.content(&inputs[0]).await?;
        let by_content = digest_of(&["run content", &family, &content]);
        let (solver, below, own) = (Arc::clone(&self.solver), inputs[0].layers.clone(), by_content);
        let found = blocking(move || solver.known(&own, &below)).await?;
        let Some(output) = found else { return Ok(None) };
        if let Some(snap) = &output.own {
            self.solver.records.alias(key, &snap.id)?;
            self.solver.records.alias(&keys.definition, &snap.id)?;
        }
        Ok(Some(Arc::new(output)))
    }

    async fn execute(
        self: Arc<Self>,
        about: About,
        inputs: Vec<Arc<Output>>,
        keys: Vec<String>,
        listeners: Arc<Listeners>,
    ) -> Result<Arc<Output>> {
        let About { run, bases, name, family } = about;
        if let Some(platform) = &run.foreign {
            crate::binfmt::require(platform)?;
        }
        let _turn = self.solver.turns.clone().acquire_owned().await.map_err(|_closed| Error::Cancelled)?;
        let held_caches = self.solver.caches.take(&run, &self.cache_namespace, &bases).await?;
        let id = crate::ids::new();
        let copies = Copies { tmp: self.solver.tmp.clone(), id: id.clone(), count: run.mounts.len() };
        let mut lent = self.borrow(&run, &id).await?;
        let (secrets, agents) = (Arc::clone(&lent.secrets), lent.sockets.clone());
        let lent_files = std::mem::take(&mut lent.files);
        let job = Arc::clone(&self);
        let (own_run, own_inputs, own_id) = (run.clone(), inputs.clone(), id.clone());
        let paths = held_caches.paths.clone();
        let (fresh, replica, running) = blocking(move || {
            let fresh = Fresh::make(&job.solver.snapshots, &own_id)?;
            let held = hold(&job.solver.store, &job.solver.mounts, &job.lease, &own_inputs[0].layers)?;
            let root = Tree::held(&held, Arc::clone(&job.solver.hashes))?;
            let replica = match job.solver.store.storage() {
                Storage::Copy => Some(
                    Replica::make(fresh.dir(), &held.lowers)
                        .doing(|| "copy the file system below a step".to_owned())?,
                ),
                _ => None,
            };
            let mut mounts = Vec::new();
            let mut also_held = Vec::new();
            for (index, mount) in own_run.mounts.iter().enumerate() {
                mounts.push(match (mount.kind, mount.input) {
                    (MountKind::Tmpfs, _) => Ready::Tmpfs,
                    (MountKind::Secret, _) => Ready::Nothing,
                    (MountKind::Ssh, _) => match agents.get(&index) {
                        Some(socket) => Ready::Path(socket.clone()),
                        None => Ready::Nothing,
                    },
                    (MountKind::Cache, input) => match paths.get(&index) {
                        Some(path) => {
                            if let Some(input) = input {
                                let name = format!("{own_id}-{index}");
                                job.begin_cache(&own_inputs[input], mount, path, &name)?;
                            }
                            Ready::Path(path.clone())
                        }
                        None => Ready::Nothing,
                    },
                    (MountKind::Bind, Some(input)) => {
                        let output = &own_inputs[input];
                        if output.tree.is_some() {
                            let copy = job.materialise(output, &format!("{own_id}-{index}"))?;
                            let tree = Tree::layers(
                                &[Lower::directory(copy.clone())],
                                Arc::clone(&job.solver.hashes),
                            )?;
                            let path = resolve_source(&tree, &mount.source)?;
                            Ready::Layers { lowers: vec![Lower::directory(copy)], path }
                        } else {
                            let held =
                                hold(&job.solver.store, &job.solver.mounts, &job.lease, &output.layers)?;
                            let tree = Tree::held(&held, Arc::clone(&job.solver.hashes))?;
                            let path = resolve_source(&tree, &mount.source)?;
                            let lowers = held.lowers.clone();
                            also_held.push(held);
                            if lowers.iter().all(|lower| lower.mount().is_none()) {
                                Ready::Layers { lowers, path }
                            } else {
                                // A layer that is a mount of this process has no path that others could use.
                                let copy = job.copy_of(&tree, &path, &format!("{own_id}-{index}"))?;
                                Ready::Layers {
                                    lowers: vec![Lower::directory(copy)],
                                    path: crate::tree::last(&path).to_owned(),
                                }
                            }
                        }
                    }
                    (MountKind::Bind, None) => Ready::Nothing,
                });
            }
            let task = Task {
                id: own_id.clone(),
                run: &own_run,
                lower: held.lowers.clone(),
                upper: fresh.diff(),
                work: fresh.work(),
                replica: replica.as_ref(),
                root: &root,
                mounts,
                secrets: &secrets,
            };
            lent_files.are_the_steps();
            let running = job.solver.executor.start(&task)?;
            Ok((fresh, replica, running))
        })
        .await?;
        let for_log = Arc::clone(&listeners);
        let exit = running
            .finish(move |stderr, data| {
                let listeners = Arc::clone(&for_log);
                let data = data.to_vec();
                async move { listeners.tell(stderr, data).await }.boxed()
            })
            .await?;
        drop(held_caches);
        drop(lent);
        if exit.exit_code != 0 {
            return Err(Error::Exit {
                command: redacted(&run.around.shown).into_owned(),
                code: exit.exit_code,
                oom: exit.oom_killed,
            });
        }
        let by_content = if self.worth_hashing(&inputs[0]) {
            let content = self.content(&inputs[0]).await?;
            Some(digest_of(&["run content", &family, &content]))
        } else {
            None
        };
        let (job, family) = (Arc::clone(&self), format!("family:{family}"));
        blocking(move || {
            drop(copies);
            let identity = keys.first().cloned().unwrap_or_default();
            let mut all: Vec<&str> = keys.iter().map(String::as_str).collect();
            all.push(&family);
            all.extend(by_content.as_deref());
            let below = &inputs[0].layers;
            let step =
                Step { id, identity: &identity, name: &name, below, keys: &all, created: records::now() };
            let output = match &replica {
                None => job.solver.finish(fresh, step)?,
                Some(replica) => {
                    let layer = job
                        .solver
                        .store
                        .adopt_replica(&job.lease, replica, &[])
                        .doing(|| "make a layer of a step's result".to_owned())?;
                    drop(fresh);
                    let layer = layer.map(|(descriptor, _)| (descriptor.digest, descriptor.size));
                    job.solver.record(Made::Layer(layer), step)?
                }
            };
            Ok(Arc::new(output))
        })
        .await
    }

    /// Whether an input's content is known for nothing, or cheap to find out: only layers of images, or small ones.
    fn worth_hashing(&self, output: &Output) -> bool {
        const CHEAP: u64 = 64 << 20;
        let mut total = 0;
        for layer in &output.layers {
            if let Layer::Snap(snap) = layer {
                total += self.solver.records.size(&snap.id).unwrap_or(u64::MAX / 1024);
            }
        }
        total <= CHEAP
    }

    /// A copy of a part of a tree under its last name, for a mount. Blocks.
    fn copy_of(&self, tree: &Tree, path: &str, name: &str) -> Result<PathBuf> {
        let target = self.solver.tmp.join(name);
        std::fs::create_dir(&target).doing(|| format!("create {}", target.display()))?;
        let all = tree.select(path)?;
        let mut writer = Writer::new(None, crate::tree::open_dir(&target)?, self.epoch, Arc::default());
        writer.copy(tree, &all, &format!("/{}", crate::tree::last(path)), false, &CopyOptions::default())?;
        Ok(target)
    }

    /// Puts the files that a cache mount begins with where it is to be, unless it is there. Blocks.
    fn begin_cache(&self, output: &Output, mount: &RunMount, path: &Path, name: &str) -> Result<()> {
        if path.exists() {
            return Ok(());
        }
        let what = || format!("fill the cache mount {}", mount.id);
        let tree = self.tree(output)?;
        let source = resolve_source(&tree, &mount.source)?;
        let stat =
            tree.stat(&source)?.filter(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
        let Some(stat) = stat else {
            return Err(invalid(format!(
                "the cache mount {} cannot begin with \"/{source}\": that is no directory",
                mount.id
            )));
        };
        let new = self.solver.tmp.join(name);
        std::fs::create_dir(&new).doing(what)?;
        let all = tree.select(&source)?;
        let mut writer = Writer::new(None, crate::tree::open_dir(&new)?, self.epoch, Arc::default());
        writer.copy(&tree, &all, "/", false, &CopyOptions::default())?;
        let owner = if tree.ownerless() { (0, 0) } else { (stat.st_uid, stat.st_gid) };
        std::os::unix::fs::chown(&new, Some(owner.0), Some(owner.1)).doing(what)?;
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(stat.st_mode & 0o7777)).doing(what)?;
        match std::fs::rename(&new, path) {
            // Another step that shares it was quicker.
            Err(error) if matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => {
                crate::snapshot::remove_tree(&new);
                Ok(())
            }
            other => other.doing(what),
        }
    }

    /// A copy of a context's visible files, for a mount. Blocks.
    fn materialise(&self, output: &Output, name: &str) -> Result<PathBuf> {
        let path = self.solver.tmp.join(name);
        std::fs::create_dir(&path).doing(|| format!("create {}", path.display()))?;
        let tree = self.tree(output)?;
        let all = tree.select("/")?;
        let mut writer = Writer::new(None, crate::tree::open_dir(&path)?, self.epoch, Arc::default());
        writer.copy(&tree, &all, "/", false, &CopyOptions::default())?;
        Ok(path)
    }
}
