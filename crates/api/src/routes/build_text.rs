//! docker's text of a build: steps in the Dockerfile's order, whatever order they are solved in.
//!
//! Invariant: no line is dropped. What belongs to a later step waits until the steps before it are told, on disk when
//! it is much.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use brigantine_build::graph::VertexId;
use brigantine_build::{Event, Plan};
use brigantine_image::{Digest, Reference};
use serde_json::{Value, json};

use super::build_backlog::Backlog;
use crate::http::{Error, ProgressSink};

/// What a build's last message tells, if there is something to tell.
pub fn result(image: Option<&Digest>, more: Option<Value>) -> Option<Value> {
    let mut aux = more.unwrap_or_else(|| json!({}));
    if let Some(image) = image {
        aux["ID"] = image.to_string().into();
    }
    aux.as_object().is_some_and(|aux| !aux.is_empty()).then_some(aux)
}

/// One vertex as far as it is known.
#[derive(Default)]
struct Vertex {
    started: bool,
    finished: bool,
    failed: bool,
    cached: bool,
    key: String,
    log: Backlog,
}

/// Writes a build's text.
pub struct Text {
    sink: ProgressSink,
    quiet: bool,
    /// Where output waits that is not to be told yet.
    spool: PathBuf,
    plan: Option<Arc<Plan>>,
    vertices: HashMap<VertexId, Vertex>,
    /// The step that is being told.
    at: usize,
    /// Its first line was written.
    opened: bool,
    /// Its `Running in` was written.
    running: bool,
    last_id: String,
    /// The last step with work of its own was taken from the cache.
    last_cached: bool,
    /// The vertex at fault.
    fault: Option<VertexId>,
}

impl Text {
    pub fn new(sink: ProgressSink, quiet: bool, spool: PathBuf) -> Self {
        Self {
            sink,
            quiet,
            spool,
            plan: None,
            vertices: HashMap::new(),
            at: 0,
            opened: false,
            running: false,
            last_id: String::new(),
            last_cached: false,
            fault: None,
        }
    }

    async fn stream(&self, text: impl Into<String>) {
        if !self.quiet {
            self.sink.send(&json!({ "stream": text.into() })).await;
        }
    }

    pub async fn event(&mut self, event: Event) {
        match event {
            Event::Pull(progress) => {
                if !self.quiet {
                    let mut message = json!({ "status": progress.status });
                    if let Some(id) = &progress.id {
                        message["id"] = id.clone().into();
                        message["progressDetail"] = match progress.amount {
                            None => json!({}),
                            Some((current, Some(total))) => json!({ "current": current, "total": total }),
                            Some((current, None)) => json!({ "current": current }),
                        };
                    }
                    self.sink.send(&message).await;
                }
            }
            Event::Planned(plan) => {
                self.plan = Some(plan);
                self.advance().await;
            }
            Event::Started { vertex } => {
                self.vertices.entry(vertex).or_default().started = true;
                self.advance().await;
            }
            Event::Log { vertex, stderr, data } => {
                if !self.quiet {
                    self.vertices.entry(vertex).or_default().log.push(&self.spool, stderr, &data).await;
                }
                self.advance().await;
            }
            Event::Finished { vertex, cached, key, error } => {
                if error.is_some() {
                    self.blame(vertex);
                }
                let known = self.vertices.entry(vertex).or_default();
                known.finished = error.is_none();
                known.failed = error.is_some();
                known.cached = cached;
                known.key = key;
                self.advance().await;
            }
            Event::Note(text) => self.stream(format!("[Note] {text}\n")).await,
            Event::CacheWritten { store, manifest } => {
                let written = json!({ "store": store, "manifest": manifest });
                self.sink.send(&json!({ "aux": { "CacheWritten": written } })).await;
            }
            Event::Missed { .. } | Event::Exporting | Event::Side { .. } => {}
        }
    }

    /// Notes the first vertex that failed by itself, not by what it needs.
    fn blame(&mut self, vertex: VertexId) {
        let failed = |id: &VertexId| self.vertices.get(id).is_some_and(|vertex| vertex.failed);
        let innocent =
            self.plan.as_ref().is_some_and(|plan| plan.graph.get(vertex).inputs.iter().any(failed));
        if !innocent {
            self.fault.get_or_insert(vertex);
        }
    }

    /// Tells whatever can be told in order.
    async fn advance(&mut self) {
        let Some(plan) = self.plan.clone() else { return };
        while let Some(step) = plan.steps.get(self.at) {
            let state = step.vertex.and_then(|vertex| self.vertices.get(&vertex));
            if !self.opened {
                // A step without work of its own is told with the one before it.
                self.opened = true;
                let number = self.at + 1;
                self.stream(format!("Step {number}/{} : {}\n", plan.steps.len(), step.text)).await;
                if step.triggers > 0 {
                    let word = if step.triggers == 1 { "trigger" } else { "triggers" };
                    self.stream(format!("# Executing {} build {word}\n", step.triggers)).await;
                }
            }
            let (finished, cached, key) = match (step.vertex, state) {
                (None, _) => (true, false, format!("{}{}", self.last_id, self.at)),
                (Some(_), Some(state)) => (state.finished, state.cached, state.key.clone()),
                (Some(_), None) => (false, false, String::new()),
            };
            let log = step
                .vertex
                .and_then(|vertex| self.vertices.get_mut(&vertex))
                .map(|v| std::mem::take(&mut v.log));
            let log = log.unwrap_or_default();
            if !log.is_empty() && !self.running {
                self.running = true;
                let id = Digest::sha256(format!("{}{}", self.last_id, step.text).as_bytes());
                self.stream(format!(" ---> Running in {}\n", id.short())).await;
            }
            let mut log = log.into_reader();
            while let Some((stderr, data)) = log.next().await {
                let text = String::from_utf8_lossy(&data);
                // Docker's builder writes what comes from standard error in red.
                self.stream(if stderr { format!("\x1b[91m{text}\x1b[0m") } else { text.into_owned() }).await;
            }
            if !finished {
                return;
            }
            let cached = match step.vertex {
                Some(_) => {
                    self.last_cached = cached;
                    cached
                }
                None => match self.is_kept(&plan) {
                    Some(kept) => kept,
                    None => return,
                },
            };
            if cached {
                self.stream(" ---> Using cache\n").await;
            }
            let id = Digest::sha256(key.as_bytes());
            self.stream(format!(" ---> {}\n", id.short())).await;
            id.short().clone_into(&mut self.last_id);
            self.at += 1;
            self.opened = false;
            self.running = false;
        }
    }

    /// Whether the present step, which has no work of its own, was there before: as the next step with work was, or,
    /// behind the last of them, as that was. `None` as long as nobody knows.
    fn is_kept(&self, plan: &Plan) -> Option<bool> {
        let next = plan.steps.iter().skip(self.at + 1).find_map(|step| step.vertex);
        match next {
            None => Some(self.last_cached),
            Some(vertex) => {
                let state = self.vertices.get(&vertex)?;
                (state.finished || state.failed || !state.log.is_empty()).then_some(state.cached)
            }
        }
    }

    /// The last words of a build that failed: its error's status if nothing was written yet.
    pub async fn failed(&mut self, error: brigantine_build::Error) -> Result<(), Error> {
        if let brigantine_build::Error::Exit { code, .. } = &error {
            let message = error.to_string();
            self.sink
                .send(&json!({ "errorDetail": { "code": code, "message": message }, "error": message }))
                .await;
            return Ok(());
        }
        let error = match (&self.plan, self.fault) {
            (Some(plan), Some(vertex)) => error.at(plan, vertex),
            _ => error,
        };
        Err(brigantine_engine::Error::from(error).into())
    }

    /// `more` is what else the client asked to be told.
    pub async fn succeeded(&mut self, image: Option<&Digest>, tags: &[Reference], more: Option<Value>) {
        if let Some(plan) = &self.plan
            && !plan.unconsumed.is_empty()
        {
            self.stream(format!(
                "[Warning] One or more build-args [{}] were not consumed\n",
                plan.unconsumed.join(" ")
            ))
            .await;
        }
        for warning in self.plan.iter().flat_map(|plan| &plan.warnings) {
            let (rule, line) = (warning.rule, warning.span.first);
            self.stream(format!("[Warning] {rule}: {} (line {line})\n", warning.message)).await;
        }
        if let Some(aux) = result(image, more) {
            self.sink.send(&json!({ "aux": aux })).await;
        }
        let Some(image) = image else { return };
        if self.quiet {
            self.sink.send(&json!({ "stream": format!("{image}\n") })).await;
            return;
        }
        self.stream(format!("Successfully built {}\n", image.short())).await;
        for tag in tags {
            self.stream(format!("Successfully tagged {}\n", tag.familiar())).await;
        }
    }
}
