//! Content hashes of files, remembered by identity: device, inode, size and both times.
//!
//! Invariant: a hash is remembered only for a file that had not been touched for a while when it was read, so that
//! a change within one tick of the clock cannot go unnoticed.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use rustix::fs::Stat;

/// How long a file must have been left alone, in nanoseconds.
const QUIET: i128 = 2_000_000_000;
/// Hashes kept in memory; each takes about 100 bytes.
const MOST: usize = 500_000;

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    size: i64,
    mtime: i128,
    ctime: i128,
}

impl State {
    fn of(stat: &Stat) -> Self {
        let nanos = |seconds: i64, nanos: u64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        Self {
            size: stat.st_size,
            mtime: nanos(stat.st_mtime, stat.st_mtime_nsec),
            ctime: nanos(stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

type Known = HashMap<(u64, u64), (State, [u8; 32])>;

/// The hashes known in this process.
#[derive(Debug, Default)]
pub(crate) struct Hashes {
    known: Mutex<Known>,
}

impl Hashes {
    pub fn get(&self, stat: &Stat) -> Option<[u8; 32]> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (state, hash) = known.get(&(stat.st_dev, stat.st_ino))?;
        (*state == State::of(stat)).then_some(*hash)
    }

    pub fn put(&self, stat: &Stat, hash: [u8; 32]) {
        let now = jiff::Timestamp::now().as_nanosecond();
        let state = State::of(stat);
        if now - state.mtime.max(state.ctime) < QUIET {
            return;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST {
            known.clear();
        }
        known.insert((stat.st_dev, stat.st_ino), (state, hash));
    }
}
