//! Why a build failed. Cloneable: several builds may wait for one step.

use std::fmt::Display;
use std::io;
use std::sync::Arc;

use crate::convert::Plan;
use crate::dockerfile::{Fault, Span};
use crate::graph::VertexId;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed build or request to the builder.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The Dockerfile is at fault; `excerpt` shows the place.
    #[error("{}", .excerpt.trim_end())]
    Dockerfile { excerpt: String, span: Span },
    /// Something that a place in the Dockerfile asks for cannot be had; `excerpt` says what, and shows the place.
    #[error("{}", .excerpt.trim_end())]
    Place { excerpt: String, cause: Box<Error> },
    /// What was asked for makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Something that was named is not there.
    #[error("{0}")]
    NotFound(String),
    /// A build uses it now.
    #[error("{0}")]
    Busy(String),
    /// Understood, but not built.
    #[error("{0}")]
    NotImplemented(String),
    /// A RUN step ended with another status than 0.
    #[error("The command '{command}' returned a non-zero code: {code}{}", if *.oom { " (out of memory: the kernel killed a process of it)" } else { "" })]
    Exit { command: String, code: i32, oom: bool },
    #[error("the build was cancelled")]
    Cancelled,
    #[error("{what}")]
    Io { what: String, source: Arc<io::Error> },
    #[error("{what}")]
    Store { what: String, source: Arc<brigantine_image::Error> },
    #[error("{what}")]
    Registry { what: String, source: Arc<brigantine_registry::Error> },
    #[error("{what}")]
    Records { what: String, source: Arc<rusqlite::Error> },
    /// The client's session did not give what it was asked for.
    #[error(transparent)]
    Session(#[from] brigantine_session::Error),
    /// Starting or watching a step's processes.
    #[error("{0}")]
    Executor(String),
}

impl Error {
    /// The error and its causes in one line.
    pub fn report(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }

    /// What went wrong, unless it was the build that was given up, with the lines of the Dockerfile that it is about.
    pub fn at(self, plan: &Plan, vertex: VertexId) -> Self {
        match self {
            Self::Dockerfile { .. } | Self::Place { .. } | Self::Exit { .. } | Self::Cancelled => self,
            cause => Self::Place { excerpt: plan.excerpt(vertex, &cause.report()), cause: Box::new(cause) },
        }
    }

    /// A fault with the lines around it.
    pub(crate) fn fault(fault: Fault, file: &str, text: &str) -> Self {
        Self::Dockerfile { excerpt: fault.excerpt(file, text), span: fault.span }
    }
}

/// Says what was being done.
pub(crate) trait Context<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: what(), source: Arc::new(source) })
    }
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: what(), source: Arc::new(source.into()) })
    }
}

impl<T> Context<T> for brigantine_image::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Store { what: what(), source: Arc::new(source) })
    }
}

impl<T> Context<T> for rusqlite::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Records { what: what(), source: Arc::new(source) })
    }
}

/// Something that is not valid.
pub(crate) fn invalid(message: impl Display) -> Error {
    Error::Invalid(message.to_string())
}

/// An error with its causes, as one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
