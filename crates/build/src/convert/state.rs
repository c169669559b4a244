//! A stage as far as it has come: its file system, configuration, variables and history.

use std::collections::BTreeMap;

use brigantine_image::ImageConfig;

use super::HistoryItem;
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
    /// Names of arguments that were declared, with or without a value.
    pub declared: Vec<String>,
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
        map.extend(self.env.iter().cloned());
        map
    }

    pub fn shell(&self) -> Vec<String> {
        self.config.config.shell.clone().unwrap_or_else(|| vec!["/bin/sh".to_owned(), "-c".to_owned()])
    }

    pub fn set_env(&mut self, name: &str, value: &str) {
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
