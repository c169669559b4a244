//! A stage as far as it has come: its file system, configuration, variables and history.

use std::collections::{BTreeMap, BTreeSet};

use brigantine_image::ImageConfig;

use super::HistoryItem;
use crate::dockerfile::Span;
use crate::graph::VertexId;
use crate::pattern::clean;

/// What history says made a step.
const COMMENT: &str = "buildkit.dockerfile.v0";

/// A stage as far as it has come.
#[derive(Debug, Clone)]
pub(super) struct State {
    pub root: VertexId,
    pub config: ImageConfig,
    pub env: Vec<(String, String)>,
    /// Declared arguments with a value, in order.
    pub args: Vec<(String, String)>,
    /// Names of arguments that were given a value after the variable of that name: the later of the two holds.
    pub later_args: BTreeSet<String>,
    /// Names of arguments that were declared, with or without a value.
    pub declared: Vec<String>,
    /// What arguments say of SBOMs, and where.
    pub scans: BTreeMap<String, (String, Span)>,
    pub history: Vec<HistoryItem>,
    pub cmd_set: bool,
    /// An absolute WORKDIR was given.
    pub workdir_set: bool,
    pub no_cache: bool,
    pub label: String,
    /// What the label's counter counts to.
    pub total: usize,
    pub done: usize,
}

impl State {
    pub fn env_map(&self) -> BTreeMap<String, String> {
        let mut map: BTreeMap<String, String> = self.args.iter().cloned().collect();
        map.extend(self.env.iter().filter(|(name, _)| !self.later_args.contains(name)).cloned());
        map
    }

    /// Gives an argument its value.
    pub fn set_arg(&mut self, name: String, value: String) {
        self.args.retain(|(known, _)| *known != name);
        self.later_args.insert(name.clone());
        self.args.push((name, value));
    }

    /// What programs find in their environment: `NAME=VALUE`.
    pub fn program_env(&self) -> Vec<String> {
        let env = self.env.iter().filter(|(name, _)| !self.later_args.contains(name));
        let env_names: BTreeSet<&String> = env.clone().map(|(name, _)| name).collect();
        let args = self.args.iter().filter(|(name, _)| !env_names.contains(name));
        env.chain(args).map(|(name, value)| format!("{name}={value}")).collect()
    }

    /// The declared arguments with their values, as BuildKit has them in the history of a RUN.
    pub fn declared_args(&self) -> Vec<String> {
        let values = self.env_map();
        let mut seen = BTreeSet::new();
        let value = |name: &String| values.get(name).map(String::as_str).unwrap_or_default().to_owned();
        let first = self.declared.iter().filter(|name| seen.insert(*name));
        first.map(|name| format!("{name}={}", value(name))).collect()
    }

    pub fn shell(&self) -> Vec<String> {
        self.config.config.shell.clone().unwrap_or_else(|| vec!["/bin/sh".to_owned(), "-c".to_owned()])
    }

    pub fn set_env(&mut self, name: &str, value: &str) {
        self.later_args.remove(name);
        match self.env.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => value.clone_into(known),
            None => self.env.push((name.to_owned(), value.to_owned())),
        }
        self.config.config.env =
            Some(self.env.iter().map(|(name, value)| format!("{name}={value}")).collect());
    }

    pub fn record(&mut self, created_by: String, vertex: Option<VertexId>) {
        self.history.push(HistoryItem { created_by, vertex, comment: COMMENT.to_owned(), author: None });
    }

    /// `cwd` joined with a path that may be relative.
    pub fn absolute(&self, path: &str) -> String {
        let cwd = &self.config.config.working_dir;
        let absolute = if path.starts_with('/') {
            format!("/{}", clean(path))
        } else {
            format!("/{}", clean(&format!("{cwd}/{path}")))
        };
        if (path.ends_with('/') || path.ends_with("/.") || path == ".") && absolute != "/" {
            format!("{absolute}/")
        } else {
            absolute
        }
    }
}
