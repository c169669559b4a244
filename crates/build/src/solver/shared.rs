//! Work that builds share: a step is looked up by its keys, and made once for all who want it at the same time.
//!
//! Invariant: the work is kept alive by those who wait for it only; when the last of them is gone it ends.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, PoisonError, Weak};

use futures_util::future::{FutureExt as _, WeakShared};
use tokio::sync::mpsc;

use super::{Job, Output, Work, blocking};
use crate::Event;
use crate::error::Result;
use crate::graph::{Op, Vertex, VertexId};

type Flying = WeakShared<Work>;

/// A step under way, which others may wait for.
pub(super) struct InFlight {
    work: Flying,
    /// Held by the work.
    listeners: Weak<Listeners>,
}

impl std::fmt::Debug for InFlight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InFlight")
    }
}

/// Who is told what a shared step prints, from its first byte on whenever they came.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    heard: tokio::sync::Mutex<Heard>,
}

#[derive(Debug, Default)]
struct Heard {
    all: Vec<(mpsc::Sender<Event>, VertexId)>,
    /// What was printed so far, the last [`Listeners::REMEMBERED`] bytes of it at least.
    said: VecDeque<(bool, Vec<u8>)>,
    bytes: usize,
    clipped: bool,
}

/// The keys of a step, in the order they are tried.
#[derive(Debug, Default)]
pub(super) struct Keys {
    pub all: Vec<String>,
    /// What stands for the result in the keys of others.
    pub identity: String,
    /// The key of the definition alone, under which it was looked up already.
    pub definition: String,
    pub parts: BTreeMap<String, String>,
}

impl Job {
    /// Looks a step up by its definition, its content, or inputs that came out the same; else makes it.
    pub(super) async fn cached_or(
        self: &Arc<Self>,
        id: VertexId,
        vertex: &Vertex,
        keys: Keys,
        inputs: &[Arc<Output>],
        make: impl FnOnce(Vec<String>, Arc<Listeners>) -> Work + Send + 'static,
    ) -> Result<Arc<Output>> {
        let below = inputs.first().map(|input| input.layers.clone()).unwrap_or_default();
        if !vertex.no_cache {
            for (index, key) in keys.all.iter().enumerate() {
                let solver = Arc::clone(&self.solver);
                let (key, below) = (key.clone(), below.clone());
                let found = blocking(move || solver.known(&key, &below)).await?;
                if let Some(output) = found {
                    for other in keys.all[..index].iter().chain([&keys.definition]) {
                        if let Some(snap) = &output.own {
                            self.solver.records.alias(other, &snap.id)?;
                        }
                    }
                    return Ok(Arc::new(output));
                }
            }
            if let Some(output) = self.imported(&vertex.name, &keys, &below).await? {
                return Ok(output);
            }
        }
        let (job, step, no_cache) = (Arc::clone(self), vertex.name.clone(), vertex.no_cache);
        let (keys, why) = blocking(move || {
            let why = job.why(&step, no_cache, &keys)?;
            Ok((keys, why))
        })
        .await?;
        self.send(Event::Missed { vertex: id, why }).await;
        let last = keys.all.last().cloned().unwrap_or_default();
        let borrows = matches!(&vertex.op, Op::Run(run) if run.borrows());
        let flight = match &self.session {
            // A build that wants everything made anew shares with nobody.
            _ if vertex.no_cache => format!("{last}/{}/{}", self.id, id.0),
            // What the client lends goes with the client.
            Some(session) if borrows => format!("{last}/{}", session.id()),
            _ => last,
        };
        let (work, listeners) = {
            let mut flying = self.solver.flying.lock().unwrap_or_else(PoisonError::into_inner);
            flying.retain(|_, flight| flight.work.upgrade().is_some());
            if let Some(found) = flying
                .get(&flight)
                .and_then(|flight| Some((flight.work.upgrade()?, flight.listeners.upgrade()?)))
            {
                found
            } else {
                let listeners = Arc::new(Listeners::default());
                let all = keys.all.iter().chain([&keys.definition]).cloned().collect();
                let work = make(all, Arc::clone(&listeners)).shared();
                if let Some(weak) = work.downgrade() {
                    flying.insert(flight, InFlight { work: weak, listeners: Arc::downgrade(&listeners) });
                }
                (work, listeners)
            }
        };
        // Side by side: what is told may wait for its reader, which must not keep the step from going on.
        let (output, ()) = futures_util::future::try_join(work, async {
            listeners.join(self.events.clone(), id).await;
            Ok(())
        })
        .await?;
        Ok(output)
    }

    /// A result by one key alone.
    pub(super) async fn quick(&self, key: &str, below: &Output) -> Result<Option<Arc<Output>>> {
        let (solver, own, layers) = (Arc::clone(&self.solver), key.to_owned(), below.layers.clone());
        let found = blocking(move || solver.known(&own, &layers)).await?;
        Ok(found.map(Arc::new))
    }

    pub(super) async fn content(&self, output: &Arc<Output>) -> Result<String> {
        let made = output.content.get_or_try_init(|| async {
            let (solver, lease, layers) =
                (Arc::clone(&self.solver), self.lease.clone(), output.layers.clone());
            blocking(move || solver.content_of(&lease, &layers)).await
        });
        made.await.cloned()
    }
}

impl Listeners {
    /// Bytes of output that are kept for those who come later.
    const REMEMBERED: usize = 1 << 20;

    /// Tells a build what was said so far, and from now on.
    async fn join(&self, events: mpsc::Sender<Event>, vertex: VertexId) {
        let mut heard = self.heard.lock().await;
        if heard.clipped {
            let data =
                b"[the beginning of this step's output is not shown: another build began it]\n".to_vec();
            told(&events, Event::Log { vertex, stderr: true, data }).await;
        }
        for (stderr, data) in &heard.said {
            told(&events, Event::Log { vertex, stderr: *stderr, data: data.clone() }).await;
        }
        heard.all.push((events, vertex));
    }

    pub async fn tell(&self, stderr: bool, data: Vec<u8>) {
        let mut heard = self.heard.lock().await;
        for (events, vertex) in &heard.all {
            told(events, Event::Log { vertex: *vertex, stderr, data: data.clone() }).await;
        }
        heard.bytes += data.len();
        heard.said.push_back((stderr, data));
        while let Some((_, first)) = heard.said.front()
            && heard.bytes - first.len() >= Self::REMEMBERED
        {
            heard.bytes -= first.len();
            heard.said.pop_front();
            heard.clipped = true;
        }
    }
}

async fn told(events: &mpsc::Sender<Event>, event: Event) {
    if events.send(event).await.is_err() {
        tracing::trace!("a step's output had no reader");
    }
}
