//! Content hashes of files, remembered by identity (device, inode, size and both times) or, of large files in layers,
//! which do not change, by these layers and the path.
//!
//! Invariant: by identity a hash is remembered only for a file that had not been touched for a while when it was read,
//! so that a change within one tick of the clock cannot go unnoticed.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use rustix::fs::Stat;

/// How long a file must have been left alone, in nanoseconds.
const QUIET: i128 = 2_000_000_000;
/// Hashes kept in memory; each takes about 100 bytes.
const MOST: usize = 500_000;
/// The same by layers and path, which takes some more.
const MOST_IN_LAYERS: usize = 50_000;
/// Smaller files of layers are as quickly read again.
const LARGE: i64 = 64 << 10;

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

type InLayers = HashMap<(Stack, Vec<u8>), [u8; 32]>;

/// The hashes known in this process.
#[derive(Debug, Default)]
pub(crate) struct Hashes {
    known: Mutex<Known>,
    in_layers: Mutex<InLayers>,
}

/// What tells one stack of layers from another.
pub(crate) type Stack = [u8; 32];

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

    /// Of the file at `path` in these layers.
    pub fn get_in_layers(&self, stack: Stack, path: &[u8], stat: &Stat) -> Option<[u8; 32]> {
        if stat.st_size < LARGE {
            return None;
        }
        self.in_layers.lock().unwrap_or_else(PoisonError::into_inner).get(&(stack, path.to_vec())).copied()
    }

    pub fn put_in_layers(&self, stack: Stack, path: &[u8], stat: &Stat, hash: [u8; 32]) {
        if stat.st_size < LARGE {
            return;
        }
        let mut known = self.in_layers.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST_IN_LAYERS {
            known.clear();
        }
        known.insert((stack, path.to_vec()), hash);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_files_of_layers_are_known_by_layers_and_path() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(LARGE as u64).expect("room");
        let large = rustix::fs::fstat(&file).expect("a status");
        file.set_len(LARGE as u64 - 1).expect("room");
        let small = rustix::fs::fstat(&file).expect("a status");
        let hashes = Hashes::default();
        hashes.put_in_layers([1; 32], b"a", &large, [7; 32]);
        hashes.put_in_layers([1; 32], b"small", &small, [8; 32]);
        let known = |stack, path, stat| hashes.get_in_layers([stack; 32], path, stat);
        assert_eq!(known(1, b"a", &large), Some([7; 32]));
        assert_eq!(known(2, b"a", &large), None, "in other layers it is another file");
        assert_eq!(known(1, b"b", &large), None);
        assert_eq!(known(1, b"small", &small), None);
        // Nothing is known any more when there is no room; nothing wrong is.
        for number in 0..=MOST_IN_LAYERS {
            hashes.put_in_layers([3; 32], number.to_string().as_bytes(), &large, [9; 32]);
        }
        assert_eq!(known(1, b"a", &large), None);
    }
}
