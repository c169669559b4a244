//! A build as BuildKit's clients are told it: what happens to each vertex, and at the end the image.
//!
//! Invariant: a vertex begins when its own work does, not when what it needs does; of a failure only the vertex at
//! fault is told; no output is dropped.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use brigantine_build::graph::{Op, VertexId};
use brigantine_build::{Error as BuildError, Event, Plan, Side};
use brigantine_image::Digest;
use brigantine_session::{
    Message as _, Status, StatusLog, StatusVertex, StatusVertexProgress, StatusWarning, Timestamp,
};
use serde_json::{Value, json};

use crate::http::{Error, ProgressSink};

/// Bytes of output that are gathered for one message.
const GATHERED: usize = 128 << 10;

/// Writes a build's trace.
pub struct Trace {
    sink: ProgressSink,
    quiet: bool,
    /// For our own client: what waits is told from the start, and the status of a step that failed.
    brig: bool,
    plan: Option<Arc<Plan>>,
    /// What is not written yet.
    status: Status,
    gathered: usize,
    started: HashMap<VertexId, Timestamp>,
    failed: HashSet<VertexId>,
    /// The vertex at fault.
    fault: Option<VertexId>,
    sides: HashMap<String, Timestamp>,
    /// When parts of work beside the graph began, by work and part.
    parts: HashMap<(String, String), Timestamp>,
    /// The work that a pull belongs to.
    pulling: String,
}

fn now() -> Timestamp {
    let now = jiff::Timestamp::now();
    let nanos = now.as_nanosecond();
    Timestamp {
        seconds: i64::try_from(nanos.div_euclid(1_000_000_000)).unwrap_or_default(),
        nanos: i32::try_from(nanos.rem_euclid(1_000_000_000)).unwrap_or_default(),
    }
}

fn digest(kind: &str, name: &str) -> String {
    Digest::sha256(format!("{kind}:{name}").as_bytes()).to_string()
}

fn vertex_digest(vertex: VertexId) -> String {
    digest("vertex", &vertex.0.to_string())
}

impl Trace {
    pub fn new(sink: ProgressSink, quiet: bool) -> Self {
        Self {
            sink,
            quiet,
            brig: false,
            plan: None,
            status: Status::default(),
            gathered: 0,
            started: HashMap::new(),
            failed: HashSet::new(),
            fault: None,
            sides: HashMap::new(),
            parts: HashMap::new(),
            pulling: String::new(),
        }
    }

    pub fn for_brig(self) -> Self {
        Self { brig: true, ..self }
    }

    pub async fn event(&mut self, event: Event) {
        match event {
            Event::Planned(plan) => self.planned(plan),
            Event::Started { vertex } => {
                // Others begin when they are missed in the cache.
                let fetched =
                    self.op(vertex).is_some_and(|op| matches!(op, Op::Http { .. } | Op::Git { .. }));
                if fetched {
                    self.start(vertex);
                }
            }
            Event::Missed { vertex, .. } => self.start(vertex),
            Event::Log { vertex, stderr, data } => {
                self.gathered += data.len();
                self.status.logs.push(StatusLog {
                    vertex: vertex_digest(vertex),
                    timestamp: Some(now()),
                    stream: if stderr { 2 } else { 1 },
                    msg: data,
                });
            }
            Event::Finished { vertex, cached, error, .. } => self.finish(vertex, cached, error),
            Event::Side { name, news } => self.side(name, news),
            Event::Pull(progress) => {
                let (current, total) = progress.amount.unwrap_or((0, None));
                let part = match &progress.id {
                    Some(id) => format!("{} {id}", progress.status.to_lowercase()),
                    None => progress.status,
                };
                let done = total.is_none_or(|total| current >= total);
                let name = self.pulling.clone();
                if self.sides.contains_key(&name) {
                    self.count(name, part, current, total, done);
                }
            }
            Event::Note(text) => {
                self.side(format!("[note] {text}"), Side::Began);
                self.side(format!("[note] {text}"), Side::Ended(None));
            }
            Event::CacheWritten { .. } | Event::Exporting => {}
        }
        if self.gathered >= GATHERED {
            self.flush().await;
        }
    }

    fn planned(&mut self, plan: Arc<Plan>) {
        let definition = format!("[internal] load build definition from {}", plan.name);
        for warning in &plan.warnings {
            self.status.warnings.push(StatusWarning {
                vertex: digest("side", &definition),
                level: 1,
                short: format!("{}: {} (line {})", warning.rule, warning.message, warning.span.first).into(),
            });
        }
        let count = plan.graph.vertices.len();
        self.plan = Some(plan);
        if self.brig {
            let needed = (0..count).map(VertexId).filter(|vertex| self.is_needed(*vertex));
            let waiting: Vec<_> = needed.map(|vertex| self.vertex(vertex)).collect();
            self.status.vertexes.extend(waiting);
        }
    }

    /// Whether people are shown the vertex, and something uses it.
    fn is_needed(&self, vertex: VertexId) -> bool {
        let Some(plan) = &self.plan else { return false };
        let target = plan.target == vertex || plan.others.iter().any(|other| other.target == vertex);
        self.is_shown(vertex)
            && (target || plan.graph.vertices.iter().any(|other| other.inputs.contains(&vertex)))
    }

    fn op(&self, vertex: VertexId) -> Option<&Op> {
        self.plan.as_ref().map(|plan| &plan.graph.get(vertex).op)
    }

    /// Whether people are shown the vertex: nothing at all and the context, which is told as it comes, are not.
    fn is_shown(&self, vertex: VertexId) -> bool {
        self.op(vertex).is_some_and(|op| match op {
            Op::Scratch => false,
            Op::Context { name } => !name.is_empty(),
            _ => true,
        })
    }

    fn vertex(&self, vertex: VertexId) -> StatusVertex {
        let Some(plan) = &self.plan else { return StatusVertex::default() };
        let known = plan.graph.get(vertex);
        StatusVertex {
            digest: vertex_digest(vertex),
            inputs: known
                .inputs
                .iter()
                .filter(|id| self.is_shown(**id))
                .map(|id| vertex_digest(*id))
                .collect(),
            name: known.name.clone(),
            started: self.started.get(&vertex).copied(),
            ..StatusVertex::default()
        }
    }

    fn start(&mut self, vertex: VertexId) {
        if self.is_shown(vertex) {
            self.started.insert(vertex, now());
            let vertex = self.vertex(vertex);
            self.status.vertexes.push(vertex);
        }
    }

    fn finish(&mut self, vertex: VertexId, cached: bool, error: Option<String>) {
        if let Some(plan) = &self.plan
            && error.is_some()
        {
            self.failed.insert(vertex);
            // What it needs has failed: that was told.
            if plan.graph.get(vertex).inputs.iter().any(|input| self.failed.contains(input)) {
                return;
            }
            self.fault.get_or_insert(vertex);
        }
        if !self.is_shown(vertex) {
            return;
        }
        let now = now();
        self.started.entry(vertex).or_insert(now);
        let mut told = self.vertex(vertex);
        told.cached = cached && error.is_none();
        told.completed = Some(now);
        told.error = error.unwrap_or_default();
        self.status.vertexes.push(told);
    }

    fn side(&mut self, name: String, news: Side) {
        let now = now();
        match news {
            Side::Began => {
                if name.starts_with("[internal] load metadata") {
                    self.pulling.clone_from(&name);
                }
                self.sides.insert(name.clone(), now);
                self.status.vertexes.push(StatusVertex {
                    digest: digest("side", &name),
                    name,
                    started: Some(now),
                    ..StatusVertex::default()
                });
            }
            Side::Count { what, current, total, done } => self.count(name, what, current, total, done),
            Side::Ended(error) => self.status.vertexes.push(StatusVertex {
                digest: digest("side", &name),
                started: self.sides.get(&name).copied(),
                name,
                completed: Some(now),
                error: error.unwrap_or_default(),
                ..StatusVertex::default()
            }),
        }
    }

    fn count(&mut self, name: String, part: String, current: u64, total: Option<u64>, done: bool) {
        let now = now();
        let vertex = digest("side", &name);
        let started = *self.parts.entry((name, part.clone())).or_insert(now);
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.status.statuses.push(StatusVertexProgress {
            id: part,
            vertex,
            name: String::new(),
            current: number(current),
            total: number(total.unwrap_or_default()),
            timestamp: Some(now),
            started: Some(started),
            completed: done.then_some(now),
        });
    }

    /// Writes what was gathered.
    pub async fn flush(&mut self) {
        self.gathered = 0;
        let status = std::mem::take(&mut self.status);
        if status == Status::default() {
            return;
        }
        let aux = STANDARD.encode(status.encode_to_vec());
        self.sink.send(&json!({ "id": "moby.buildkit.trace", "aux": aux })).await;
    }

    /// The last words of a build that failed.
    pub async fn failed(&mut self, error: BuildError) -> Result<(), Error> {
        self.flush().await;
        let said = match &error {
            BuildError::Exit { command, code, oom } => {
                let why = if *oom { " (out of memory: the kernel killed a process of it)" } else { "" };
                format!("process {command:?} did not complete successfully: exit code: {code}{why}")
            }
            error => error.report(),
        };
        let message = match (&error, &self.plan, self.fault) {
            (BuildError::Dockerfile { .. } | BuildError::Place { .. }, _, _) => said,
            (_, Some(plan), Some(vertex)) => {
                format!("{}failed to solve: {said}", plan.excerpt(vertex, &said))
            }
            _ => format!("failed to solve: {said}"),
        };
        if let (true, BuildError::Exit { code, .. }) = (self.brig, &error) {
            let detail = json!({ "code": code, "message": message });
            self.sink.send(&json!({ "errorDetail": detail, "error": message })).await;
            return Ok(());
        }
        let class = brigantine_engine::Error::from(error).class();
        Err(Error::new(class, message))
    }

    pub async fn succeeded(&mut self, image: Option<&Digest>, more: Option<Value>) {
        self.flush().await;
        if let Some(aux) = super::build_text::result(image, more) {
            self.sink.send(&json!({ "id": "moby.image.id", "aux": aux })).await;
        }
        let Some(image) = image else { return };
        if self.quiet {
            self.sink.send(&json!({ "stream": format!("{image}\n") })).await;
        }
    }
}
