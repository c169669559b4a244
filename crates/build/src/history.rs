//! What the last builds did: of each step whether it was cached, why not, and how long it took.
//!
//! Invariant: a build that ends in whatever way is on record, one that nobody waited for as `cancelled`; only the
//! last [`MOST`] are kept.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::graph::{Graph, VertexId};
use crate::records::now;
use crate::solver::Solver;
use crate::{Builder, Event};

/// How many builds are remembered.
pub(crate) const MOST: usize = 100;

/// A build on record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct BuildRecord {
    pub id: String,
    /// Names the image got.
    pub tags: Vec<String>,
    pub target: String,
    /// Nanoseconds since the epoch.
    pub started: i64,
    pub ended: i64,
    /// `done`, `failed` or `cancelled`.
    pub outcome: String,
    /// The image's id, or the error.
    pub result: String,
    pub steps: Vec<StepRecord>,
}

/// One step of a build on record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct StepRecord {
    pub name: String,
    pub started: i64,
    pub ended: i64,
    pub cached: bool,
    /// Why it was not cached.
    pub why: String,
    pub error: Option<String>,
}

/// Takes down what happens in one build; written when it is dropped.
#[derive(Debug)]
pub(crate) struct Recording {
    solver: Arc<Solver>,
    record: BuildRecord,
    steps: Arc<Steps>,
}

/// The steps so far.
#[derive(Debug, Default)]
pub(crate) struct Steps(Mutex<BTreeMap<VertexId, StepRecord>>);

impl Steps {
    pub fn note(&self, graph: &Graph, event: &Event) {
        let mut steps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Started { vertex } => {
                let name = graph.get(*vertex).name.clone();
                steps.insert(*vertex, StepRecord { name, started: now(), ..StepRecord::default() });
            }
            Event::Missed { vertex, why } => {
                if let Some(step) = steps.get_mut(vertex) {
                    step.why.clone_from(why);
                }
            }
            Event::Finished { vertex, cached, error, .. } => {
                if let Some(step) = steps.get_mut(vertex) {
                    step.ended = now();
                    step.cached = *cached;
                    step.error.clone_from(error);
                }
            }
            _ => {}
        }
    }
}

impl Recording {
    pub fn new(solver: Arc<Solver>, id: &str, tags: Vec<String>, target: String) -> Self {
        let record = BuildRecord {
            id: id.to_owned(),
            tags,
            target,
            started: now(),
            ended: 0,
            outcome: "cancelled".to_owned(),
            result: String::new(),
            steps: Vec::new(),
        };
        Self { solver, record, steps: Arc::default() }
    }

    pub fn steps(&self) -> Arc<Steps> {
        Arc::clone(&self.steps)
    }

    pub fn ended(&mut self, result: &Result<crate::Built>) {
        let (outcome, result) = match result {
            Ok(built) => ("done", built.image.as_ref().map(|image| image.id.to_string()).unwrap_or_default()),
            Err(crate::Error::Cancelled) => ("cancelled", String::new()),
            Err(error) => ("failed", error.report()),
        };
        outcome.clone_into(&mut self.record.outcome);
        self.record.result = result;
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.record.ended = now();
        let mut steps = self.steps.0.lock().unwrap_or_else(PoisonError::into_inner);
        self.record.steps = std::mem::take(&mut *steps).into_values().collect();
        if let Err(error) = self.solver.records.add_build(&self.record) {
            tracing::warn!(error = error.report(), "note a build");
        }
    }
}

impl Builder {
    /// The last builds, the latest first. Blocks.
    pub fn history(&self) -> Result<Vec<BuildRecord>> {
        self.solver().records.builds()
    }
}
