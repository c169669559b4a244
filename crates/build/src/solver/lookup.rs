//! Looking a step's result up before anything that it takes is made.
//!
//! A step has a key of its definition alone: its operation, the same of its inputs, and the digests of what comes from
//! outside. A result that it leads to needs nothing but the file system it stands on: what else went into it is made
//! only if a step really runs.
//!
//! Invariant: what is found this way is what the same definition came to here, or in a cache that the build names;
//! nothing that is to be made anew, or stands on such, is looked up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::{BoxFuture, FutureExt as _, Shared, try_join_all};

use super::{Job, Keys, Output, Own, blocking, definition, digest_of};
use crate::Event;
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, Vertex, VertexId};
use crate::pattern::Ignore;
use crate::tree::Listing;

/// What a step takes of each of its actions' or mounts' sources from outside: a digest, and the files.
pub(super) type Taken = Arc<Vec<(String, Listing)>>;

type Working<T> = Shared<BoxFuture<'static, Result<T>>>;

/// What is known of the vertices of one build before they are made.
pub(super) struct Lookups {
    /// To be made anew, or standing on such.
    anew: Vec<bool>,
    definitions: Mutex<HashMap<VertexId, Working<String>>>,
    taken: Mutex<HashMap<VertexId, Working<Taken>>>,
    passed: Mutex<Passed>,
}

/// Which vertices nobody needs any more.
struct Passed {
    targets: Vec<VertexId>,
    /// Steps whose results were found.
    found: Vec<bool>,
    /// What was not needed, and told.
    told: Vec<bool>,
}

impl Passed {
    fn needed(&self, graph: &Graph) -> Vec<bool> {
        let mut needed = vec![false; graph.vertices.len()];
        self.targets.iter().for_each(|target| needed[target.0] = true);
        for (at, vertex) in graph.vertices.iter().enumerate().rev() {
            // Of a result that was found, only what it stands on is.
            let inputs = if self.found[at] { 1 } else { vertex.inputs.len() };
            if needed[at] {
                vertex.inputs.iter().take(inputs).for_each(|input| needed[input.0] = true);
            }
        }
        needed
    }
}

impl Lookups {
    pub fn new(graph: &Graph, targets: Vec<VertexId>) -> Self {
        let count = graph.vertices.len();
        let mut anew = vec![false; count];
        for (at, vertex) in graph.vertices.iter().enumerate() {
            anew[at] = vertex.no_cache || vertex.inputs.iter().any(|input| anew[input.0]);
        }
        let mut passed = Passed { targets, found: vec![false; count], told: vec![false; count] };
        // What is not needed from the beginning is nothing to tell.
        passed.told = passed.needed(graph).into_iter().map(|needed| !needed).collect();
        Self { anew, definitions: Mutex::default(), taken: Mutex::default(), passed: Mutex::new(passed) }
    }

    /// Lets go of all work.
    pub fn stop(&self) {
        drop(std::mem::take(&mut *lock(&self.definitions)));
        drop(std::mem::take(&mut *lock(&self.taken)));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn is_step(vertex: &Vertex) -> bool {
    matches!(vertex.op, Op::Run(_) | Op::Files(_))
}

/// Whether it comes from outside, as files rather than as a file system.
pub(super) fn is_source(vertex: &Vertex) -> bool {
    matches!(vertex.op, Op::Context { .. } | Op::Http { .. } | Op::Git { .. })
}

impl Job {
    /// The result of a step by its definition alone. What it stands on is made, if it must be.
    pub(super) async fn found(self: &Arc<Self>, id: VertexId) -> Result<Option<Arc<Output>>> {
        if self.lookups.anew[id.0] {
            return Ok(None);
        }
        let key = self.definition_key(id).await?;
        let elsewhere = self.imports().find(std::slice::from_ref(&key)).is_some();
        if !elsewhere && self.solver.records.find(&key)?.is_none() {
            return Ok(None);
        }
        let below = self.result(self.graph.get(id).inputs[0]).await?;
        let found = self.on(id, key, &below).await?;
        if found.is_some() {
            self.pass_over(id).await;
        }
        Ok(found)
    }

    /// The same on top of what is there.
    async fn on(
        self: &Arc<Self>,
        id: VertexId,
        key: String,
        below: &Arc<Output>,
    ) -> Result<Option<Arc<Output>>> {
        if let Some(output) = self.quick(&key, below).await? {
            return Ok(Some(output));
        }
        let keys = Keys { all: vec![key.clone()], identity: key, ..Keys::default() };
        self.imported(&self.graph.get(id).name, &keys, &below.layers).await
    }

    /// The result of a step if it was made, or can be had without making anything.
    pub(crate) async fn at_hand(self: &Arc<Self>, id: VertexId) -> Result<Option<Arc<Output>>> {
        let (mut above, mut at) = (Vec::new(), id);
        let mut below = loop {
            let known = lock(&self.results).get(&at).cloned();
            if let Some(known) = known {
                break known.await?;
            }
            let vertex = self.graph.get(at);
            if !is_step(vertex) {
                break self.result(at).await?;
            }
            above.push(at);
            at = vertex.inputs[0];
        };
        for id in above.into_iter().rev() {
            let key = self.definition_key(id).await?;
            match self.on(id, key, &below).await? {
                Some(found) => below = found,
                None => return Ok(None),
            }
        }
        Ok(Some(below))
    }

    /// Tells of the steps that are not needed any more, as their results would not be looked at.
    async fn pass_over(&self, id: VertexId) {
        if self.graph.get(id).inputs.len() < 2 {
            return;
        }
        let over: Vec<VertexId> = {
            let mut passed = lock(&self.lookups.passed);
            passed.found[id.0] = true;
            let needed = passed.needed(&self.graph);
            let begun = lock(&self.results);
            let over = (0..needed.len()).map(VertexId).filter(|id| {
                !needed[id.0] && !std::mem::replace(&mut passed.told[id.0], true) && !begun.contains_key(id)
            });
            over.collect()
        };
        for vertex in over {
            self.send(Event::Started { vertex }).await;
            let cached = is_step(self.graph.get(vertex));
            self.send(Event::Finished { vertex, cached, key: String::new(), error: None }).await;
        }
    }

    /// The key of a vertex's definition alone. It is worked out once, by a task of its own: a chain of steps may be longer
    /// than a stack is deep.
    pub(crate) fn definition_key(
        self: &Arc<Self>,
        id: VertexId,
    ) -> Shared<BoxFuture<'static, Result<String>>> {
        let mut known = lock(&self.lookups.definitions);
        if let Some(known) = known.get(&id) {
            return known.clone();
        }
        let job = Arc::downgrade(self);
        let work = async move {
            let job = job.upgrade().ok_or(Error::Cancelled)?;
            job.define(id).await
        };
        let shared = Own(tokio::spawn(work.boxed())).boxed().shared();
        known.insert(id, shared.clone());
        shared
    }

    async fn define(self: &Arc<Self>, id: VertexId) -> Result<String> {
        let graph = Arc::clone(&self.graph);
        let vertex = graph.get(id);
        if !is_step(vertex) {
            return Ok(self.result(id).await?.key.clone());
        }
        let keys = try_join_all(vertex.inputs.iter().map(|input| self.definition_key(*input))).await?;
        let taken = self.taken(id).await?;
        let taken: Vec<&str> = taken.iter().map(|(digest, _)| digest.as_str()).collect();
        // Of a context, what is taken says more than where it comes from.
        let sources: Vec<&str> = std::iter::zip(&vertex.inputs, &keys)
            .skip(1)
            .map(|(input, key)| match graph.get(*input).op {
                Op::Context { .. } => "",
                _ => key.as_str(),
            })
            .collect();
        let below = match &vertex.op {
            Op::Files(actions) if super::files::all_linked(actions) => "scratch",
            _ => keys[0].as_str(),
        };
        let epoch = match &vertex.op {
            Op::Files(_) => format!("{:?}", self.epoch),
            _ => String::new(),
        };
        let text = definition(&vertex.op)?;
        Ok(digest_of(&["definition", &text, below, &epoch, &sources.join(","), &taken.join(",")]))
    }

    /// What a step takes from outside, by the places of its actions or mounts; nothing of what other steps make.
    pub(super) fn taken(self: &Arc<Self>, id: VertexId) -> Working<Taken> {
        let mut known = lock(&self.lookups.taken);
        if let Some(known) = known.get(&id) {
            return known.clone();
        }
        let job = Arc::downgrade(self);
        let work = async move {
            let job = job.upgrade().ok_or(Error::Cancelled)?;
            job.take(id).await.map(Arc::new)
        };
        let shared = work.boxed().shared();
        known.insert(id, shared.clone());
        shared
    }

    async fn take(self: &Arc<Self>, id: VertexId) -> Result<Vec<(String, Listing)>> {
        let vertex = self.graph.get(id);
        let outside = vertex.inputs.iter().map(|input| async {
            let source = is_source(self.graph.get(*input));
            if source { self.result(*input).await.map(Some) } else { Ok(None) }
        });
        let inputs = try_join_all(outside).await?;
        if inputs.iter().all(Option::is_none) {
            return Ok(Vec::new());
        }
        let (job, graph) = (Arc::clone(self), Arc::clone(&self.graph));
        blocking(move || match &graph.get(id).op {
            Op::Files(actions) => actions.iter().map(|action| job.action_content(action, &inputs)).collect(),
            Op::Run(run) => run
                .mounts
                .iter()
                .map(|mount| {
                    let input = mount.input.and_then(|input| inputs[input].as_deref());
                    let Some(input) = input.filter(|input| input.tree.is_some()) else {
                        return Ok(Default::default());
                    };
                    let tree = job.tree(input)?;
                    let selected = tree.select(&mount.source)?;
                    Ok((tree.digest(&selected, &Ignore::default(), false, true)?, Listing::default()))
                })
                .collect(),
            _ => Ok(Vec::new()),
        })
        .await
    }
}
