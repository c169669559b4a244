//! The graph of a build: operations whose definitions are their identity, in the shape of BuildKit's LLB (source,
//! exec, file), so that a graph may come from elsewhere than a Dockerfile.
//!
//! Invariant: inputs come before what uses them; what is outside an operation's definition (names, hosts, limits)
//! does not change its result.

use std::collections::BTreeMap;

use brigantine_registry::redacted;
use serde::{Deserialize, Serialize};

use crate::dockerfile::{MountKind, Span};

/// A vertex of its graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VertexId(pub usize);

/// One operation with what it works on.
#[derive(Debug, Clone)]
pub struct Vertex {
    pub op: Op,
    /// The first is the file system it changes, where it changes one.
    pub inputs: Vec<VertexId>,
    /// What people are shown: `[build 2/5] RUN make`.
    pub name: String,
    /// Run again whatever is known.
    pub no_cache: bool,
    pub span: Span,
}

/// A whole graph.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    pub vertices: Vec<Vertex>,
}

impl Graph {
    pub fn add(&mut self, mut vertex: Vertex) -> VertexId {
        vertex.name = redacted(&vertex.name).into_owned();
        self.vertices.push(vertex);
        VertexId(self.vertices.len() - 1)
    }

    pub fn get(&self, id: VertexId) -> &Vertex {
        &self.vertices[id.0]
    }
}

/// What is done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// Nothing at all: `FROM scratch`.
    Scratch,
    /// An image's file system. Its identity is that of its layers.
    Image {
        diff_ids: Vec<String>,
    },
    /// A context of the request, by name; its identity is the content that is used.
    Context {
        name: String,
    },
    /// A file from the web.
    Http {
        url: String,
        checksum: Option<String>,
        file_name: String,
    },
    /// A repository's checkout.
    Git {
        url: String,
        reference: String,
        subdir: String,
        keep_git_dir: bool,
        checksum: Option<String>,
        submodules: bool,
    },
    Run(Box<Run>),
    Files(Vec<Action>),
}

/// A program to run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Run {
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    pub user: String,
    /// `default`, `none` or `host`.
    pub network: String,
    /// Without confinement.
    pub insecure: bool,
    pub mounts: Vec<RunMount>,
    /// Heredocs that are scripts of their own: name and text, at `/dev/pipes/<name>`.
    pub scripts: Vec<(String, String)>,
    /// The platform of its programs where that is not the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreign: Option<String>,
    /// Changes nothing about the result: not part of the identity.
    #[serde(skip)]
    pub around: Around,
}

impl Run {
    /// Whether the step asks for what the client may lend: secrets and agents.
    pub fn borrows(&self) -> bool {
        self.mounts.iter().any(|mount| matches!(mount.kind, MountKind::Secret | MountKind::Ssh))
    }
}

/// What a program runs in that must not change its result.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Around {
    /// Proxy variables that were given, not declared.
    pub proxy: Vec<String>,
    /// `name:address`.
    pub hosts: Vec<String>,
    pub hostname: String,
    /// Bytes.
    pub shm_size: Option<i64>,
    pub limits: Limits,
    /// The command as people wrote it.
    pub shown: String,
}

/// Limits for the steps of a build.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<i64>,
    /// Memory and swap together, in bytes; -1 is no limit.
    pub memory_swap: Option<i64>,
    pub cpu_shares: Option<u64>,
    pub cpu_period: Option<u64>,
    pub cpu_quota: Option<i64>,
    pub cpuset_cpus: Option<String>,
    pub cpuset_mems: Option<String>,
    pub cgroup_parent: Option<String>,
    /// Name, soft, hard.
    pub ulimits: Vec<(String, i64, i64)>,
}

/// A mount of one RUN.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunMount {
    pub kind: MountKind,
    /// Absolute.
    pub target: String,
    /// Which of the vertex's inputs it shows.
    pub input: Option<usize>,
    /// The path within the input.
    pub source: String,
    pub read_only: bool,
    /// Of a cache, secret or agent.
    pub id: String,
    pub sharing: String,
    pub size: Option<i64>,
    pub mode: Option<u32>,
    pub uid: u32,
    pub gid: u32,
    pub required: bool,
    pub env: Option<String>,
}

/// A change of files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    Copy {
        input: usize,
        sources: Vec<String>,
        destination: String,
        many: bool,
        how: How,
    },
    Text {
        name: String,
        data: String,
        destination: String,
        how: How,
    },
    /// The file an `Http` input has brought.
    Download {
        input: usize,
        destination: String,
        how: How,
    },
    /// A WORKDIR.
    Directory {
        path: String,
        owner: String,
    },
}

/// How files are put.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct How {
    pub owner: Option<String>,
    pub chmod: Option<String>,
    pub parents: bool,
    pub exclude: Vec<String>,
    pub unpack: bool,
    /// On its own, whatever is below (`--link`).
    pub link: bool,
}

/// Where a name in a FROM, `--from` or `from=` leads: a context of the request, by kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamedContext {
    /// `docker-image://`.
    Image(String),
    /// A folder that the client's session lends, by its name there.
    Local(String),
    /// A git repository or an archive's URL.
    Remote(String),
}

/// Named contexts of a request.
pub type NamedContexts = BTreeMap<String, NamedContext>;
