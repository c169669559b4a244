//! Waiting for a container to end or to be gone. Waiters are registered before anybody is answered and woken in the
//! promised order; nothing polls.

use tokio::sync::oneshot;

use super::{Container, Containers, Inner};
use crate::{Error, Result};

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// At once unless it runs.
    NotRunning,
    /// The end of the run that goes on, or of the next one.
    NextExit,
    /// The container is gone.
    Removed,
}

impl Condition {
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "" | "not-running" => Ok(Self::NotRunning),
            "next-exit" => Ok(Self::NextExit),
            "removed" => Ok(Self::Removed),
            other => Err(Error::invalid(format!("invalid condition: \"{other}\""))),
        }
    }
}

/// How it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Waited {
    pub exit_code: i32,
    /// Why it could not be removed.
    pub error: Option<String>,
}

/// A registered waiter.
#[derive(Debug)]
pub struct Waiting(oneshot::Receiver<Waited>);

impl Waiting {
    /// The end. An engine that shuts down ends the wait with an error.
    pub async fn done(self) -> Result<Waited> {
        self.0.await.map_err(|_dropped| Error::unavailable("the engine is shutting down"))
    }
}

impl Containers {
    /// Registers a waiter; from now on no exit is missed.
    pub fn wait(&self, reference: &str, condition: Condition) -> Result<Waiting> {
        let container = self.find(reference)?;
        Ok(register(&container, condition))
    }
}

/// Registers a waiter on a container that has been found.
pub(super) fn register(container: &Container, condition: Condition) -> Waiting {
    let (done, waiting) = oneshot::channel();
    container.with(|inner| {
        let state = &inner.record.state;
        let over = match condition {
            Condition::NotRunning => inner.live.is_none() && !state.status.is_up(),
            Condition::NextExit => false,
            Condition::Removed => inner.removed,
        };
        if over {
            answer(done, outcome(inner));
        } else {
            inner.waiters.push((condition, done));
        }
    });
    Waiting(waiting)
}

fn outcome(inner: &Inner) -> Waited {
    Waited { exit_code: inner.record.state.exit_code, error: None }
}

fn answer(done: oneshot::Sender<Waited>, outcome: Waited) {
    // A waiter that has left needs no answer.
    drop(done.send(outcome));
}

impl Inner {
    /// Wakes those who wait for one of `conditions`.
    pub(super) fn wake(&mut self, conditions: &[Condition]) {
        let outcome = outcome(self);
        for (condition, done) in std::mem::take(&mut self.waiters) {
            if done.is_closed() {
                continue;
            }
            if conditions.contains(&condition) {
                answer(done, outcome.clone());
            } else {
                self.waiters.push((condition, done));
            }
        }
    }
}
