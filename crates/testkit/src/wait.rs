//! Waiting on a condition with a deadline: tests never sleep for a guessed time.

use std::time::{Duration, Instant};

/// How long a test waits for something that should happen soon. Generous: it is only ever used up by a failure.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Calls `probe` until it returns a value; `None` once `limit` has passed.
pub fn until<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Like [`until`] with [`PATIENCE`], but panics with `what` when the time is up.
#[track_caller]
pub fn eventually<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    match until(PATIENCE, probe) {
        Some(found) => found,
        None => panic!("waited {PATIENCE:?} in vain for: {what}"),
    }
}
