//! What a pull or push reports while it goes on, in docker's vocabulary.
//!
//! Invariant: a report never blocks the transfer.

use std::sync::Arc;

/// One step: `id` names the layer (12 digits) or the tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub id: Option<String>,
    pub status: String,
    /// Bytes done and, where known, in all.
    pub amount: Option<(u64, Option<u64>)>,
}

impl Progress {
    pub(crate) fn step(id: &str, status: &str) -> Self {
        Self { id: Some(id.to_owned()), status: status.to_owned(), amount: None }
    }

    pub(crate) fn amount(id: &str, status: &str, current: u64, total: Option<u64>) -> Self {
        Self { id: Some(id.to_owned()), status: status.to_owned(), amount: Some((current, total)) }
    }

    pub(crate) fn message(status: String) -> Self {
        Self { id: None, status, amount: None }
    }

    /// Whether a later report makes this one obsolete, so that it may be dropped.
    pub fn is_intermediate(&self) -> bool {
        self.amount.is_some()
    }
}

/// Where reports go.
pub type Report = Arc<dyn Fn(Progress) + Send + Sync>;
