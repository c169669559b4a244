//! Steps that write files: COPY, ADD, WORKDIR and heredocs.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures_util::FutureExt as _;

use super::explain::FILES;
use super::known::Step;
use super::lookup::{Taken, is_source};
use super::{Cancel, Job, Keys, Output, blocking, definition, digest_of};
use crate::chmod::Chmod;
use crate::error::{Context as _, Error, Result, invalid};
use crate::graph::{Action, How, Vertex, VertexId};
use crate::pattern::Ignore;
use crate::records;
use crate::snapshot::{Fresh, Layer, hold};
use crate::tree::{Listing, Tree};
use crate::users;
use crate::write::{CopyOptions, Writer};

impl Job {
    pub(super) async fn files(
        self: &Arc<Self>,
        id: VertexId,
        vertex: &Vertex,
        actions: &[Action],
        inputs: &[Arc<Output>],
    ) -> Result<Arc<Output>> {
        let linked = all_linked(actions);
        let text = definition(&vertex.op)?;
        let epoch = format!("{:?}", self.epoch);
        let dest = if linked { "scratch" } else { inputs[0].key.as_str() };
        let sources: Vec<&str> = inputs.iter().skip(1).map(|input| input.key.as_str()).collect();
        let mut keys = Keys { definition: self.definition_key(id).await?, ..Keys::default() };
        keys.parts.insert("operation".to_owned(), text.clone());
        keys.parts.insert("below".to_owned(), dest.to_owned());
        let local = inputs.iter().skip(1).any(|input| input.tree.is_some());
        if !local {
            keys.all.push(digest_of(&["files", &text, dest, &epoch, &sources.join(",")]));
            if sources.is_empty() {
                keys.identity.clone_from(&keys.all[0]);
            } else if !vertex.no_cache
                && let Some(output) = self.quick(&keys.all[0], &inputs[0]).await?
            {
                if let Some(snap) = &output.own {
                    self.solver.records.alias(&keys.definition, &snap.id)?;
                }
                return Ok(output);
            }
        }
        if keys.identity.is_empty() {
            let taken = self.contents(id, vertex, actions, inputs).await?;
            let contents: Vec<&str> = taken.iter().map(|(digest, _)| digest.as_str()).collect();
            let contents = contents.join(",");
            if let Some(files) = Listing::joined(taken.iter().map(|(_, listing)| listing)) {
                keys.parts.insert(FILES.to_owned(), files);
            }
            let key = digest_of(&["files", &text, dest, &epoch, &contents]);
            keys.parts.insert("content".to_owned(), contents);
            keys.identity.clone_from(&key);
            keys.all.push(key);
        }
        let below = if linked { Vec::new() } else { inputs[0].layers.clone() };
        let job = Arc::clone(self);
        let (all_inputs, actions, name) = (inputs.to_vec(), actions.to_vec(), vertex.name.clone());
        let identity = keys.identity.clone();
        let base = inputs[0].layers.clone();
        self.cached_or(id, vertex, keys, inputs, move |keys, listeners| {
            async move {
                // Nothing is said, but whoever joins must find it.
                let _listeners = listeners;
                let _turn =
                    job.solver.turns.clone().acquire_owned().await.map_err(|_closed| Error::Cancelled)?;
                let cancel = Cancel(Arc::default());
                let flag = Arc::clone(&cancel.0);
                blocking(move || {
                    let snapshot = crate::ids::new();
                    let fresh = Fresh::make(&job.solver.snapshots, &snapshot)?;
                    job.write(&fresh, &below, &actions, &all_inputs, flag)?;
                    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
                    let step = Step {
                        id: snapshot,
                        identity: &identity,
                        name: &name,
                        below: &base,
                        keys: &keys,
                        created: records::now(),
                    };
                    let output = job.solver.finish(fresh, step)?;
                    Ok(Arc::new(output))
                })
                .await
            }
            .boxed()
        })
        .await
    }

    /// What is taken from each source, by content.
    async fn contents(
        self: &Arc<Self>,
        id: VertexId,
        vertex: &Vertex,
        actions: &[Action],
        inputs: &[Arc<Output>],
    ) -> Result<Taken> {
        if vertex.inputs.iter().skip(1).all(|input| is_source(self.graph.get(*input))) {
            return self.taken(id).await;
        }
        let job = Arc::clone(self);
        let inputs: Vec<Option<Arc<Output>>> = inputs.iter().cloned().map(Some).collect();
        let actions = actions.to_vec();
        let contents = blocking(move || {
            let contents = actions.iter().map(|action| job.action_content(action, &inputs));
            contents.collect::<Result<Vec<_>>>()
        });
        contents.await.map(Arc::new)
    }

    /// What an action takes from its source, where that is given. Blocks.
    pub(super) fn action_content(
        &self,
        action: &Action,
        inputs: &[Option<Arc<Output>>],
    ) -> Result<(String, Listing)> {
        match action {
            Action::Copy { input, sources, how, .. } => {
                let Some(input) = &inputs[*input] else { return Ok(Default::default()) };
                let tree = self.tree(input)?;
                let mut all = Vec::new();
                for source in sources {
                    all.extend(tree.select(pivot(source, how).1.as_str())?);
                }
                let exclude = Ignore::new(how.exclude.iter().map(String::as_str)).map_err(invalid)?;
                let any_mode =
                    matches!(how.chmod.as_deref(), Some(mode) if mode.bytes().all(|b| b.is_ascii_digit()));
                tree.digest_and_listing(&all, &exclude, any_mode, how.parents)
            }
            Action::Download { input, .. } => {
                let key = inputs[*input].as_ref().map(|input| input.key.clone());
                Ok((key.unwrap_or_default(), Listing::default()))
            }
            Action::Text { .. } | Action::Directory { .. } => Ok(Default::default()),
        }
    }

    /// Carries the actions out in a fresh snapshot. Blocks.
    fn write(
        &self,
        fresh: &Fresh,
        below: &[Layer],
        actions: &[Action],
        inputs: &[Arc<Output>],
        cancelled: Arc<AtomicBool>,
    ) -> Result<()> {
        let held = hold(&self.solver.store, &self.solver.mounts, &self.lease, below)?;
        let lower = Tree::held(&held, Arc::clone(&self.solver.hashes))?;
        // Names are those of the stage, even where nothing else of it matters (`--link`).
        let names = if below.is_empty() {
            self.tree(&inputs[0])?
        } else {
            Arc::new(Tree::held(&held, Arc::clone(&self.solver.hashes))?)
        };
        let upper = crate::tree::open_dir(&fresh.diff())?;
        let mut writer =
            Writer::new(if below.is_empty() { None } else { Some(&lower) }, upper, self.epoch, cancelled);
        for action in actions {
            match action {
                Action::Directory { path, owner } => {
                    let owner = if owner.is_empty() { (0, 0) } else { users::owner(owner, &names)? };
                    writer.workdir(path, owner)?;
                }
                Action::Text { name, data, destination, how } => {
                    let options = options(how, &names)?;
                    writer.file_of(destination, name, data.as_bytes(), &options)?;
                }
                Action::Download { input, destination, how } => {
                    let options = options(how, &names)?;
                    let file =
                        inputs[*input].file.as_ref().ok_or_else(|| invalid("a download is not there"))?;
                    let data =
                        std::fs::File::open(&file.path).doing(|| format!("open {}", file.path.display()))?;
                    writer.file_from(destination, &file.name, data, file.found.modified, &options)?;
                }
                Action::Copy { input, sources, destination, many, how } => {
                    let options = options(how, &names)?;
                    let tree = self.tree(&inputs[*input])?;
                    let mut all = Vec::new();
                    for source in sources {
                        let (strip, source) = pivot(source, how);
                        let mut found = tree.select(&source)?;
                        for one in &mut found {
                            if let Some(rest) = one.name.strip_prefix(&strip) {
                                one.name = rest.trim_start_matches('/').to_owned();
                            }
                        }
                        all.extend(found);
                    }
                    let many = *many || all.len() > 1;
                    if many && all.len() > 1 && !destination.ends_with('/') && !how.parents {
                        return Err(invalid(
                            "When using COPY with more than one source file, the destination must be a directory and end with a /",
                        ));
                    }
                    writer.copy(&tree, &all, destination, many, &options)?;
                }
            }
        }
        Ok(())
    }
}

/// Whether nothing of what they are laid on matters.
pub(super) fn all_linked(actions: &[Action]) -> bool {
    !actions.is_empty() && actions.iter().all(|action| how(action).is_some_and(|how| how.link))
}

fn how(action: &Action) -> Option<&How> {
    match action {
        Action::Copy { how, .. } | Action::Text { how, .. } | Action::Download { how, .. } => Some(how),
        Action::Directory { .. } => None,
    }
}

fn options(how: &How, names: &Tree) -> Result<CopyOptions> {
    Ok(CopyOptions {
        owner: how
            .owner
            .as_deref()
            .filter(|text| !text.is_empty())
            .map(|text| users::owner(text, names))
            .transpose()?,
        chmod: how.chmod.as_deref().filter(|text| !text.is_empty()).map(Chmod::parse).transpose()?,
        parents: how.parents,
        exclude: Ignore::new(how.exclude.iter().map(String::as_str)).map_err(invalid)?,
        unpack: how.unpack,
    })
}

/// With `--parents`, what stands before `/./` is not part of the copy's path.
fn pivot(source: &str, how: &How) -> (String, String) {
    match source.split_once("/./") {
        Some((before, after)) if how.parents => {
            let before = crate::pattern::clean(before);
            (before.clone(), crate::pattern::clean(&format!("{before}/{after}")))
        }
        _ => (String::new(), source.to_owned()),
    }
}
