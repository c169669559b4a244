//! Reading a file while it is being written: extraction goes on behind a download, or behind the archive that brings the
//! layer, and neither waits for the other.

use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// How far a file that is still being written may be read.
#[derive(Debug, Default)]
pub struct Follow {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    written: u64,
    /// Whether it came to its end.
    ended: Option<bool>,
}

impl Follow {
    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// So many bytes are there.
    pub fn advance(&self, written: u64) {
        self.update(|state| state.written = written);
    }

    /// There will be no more.
    pub fn finish(&self) {
        self.update(|state| state.ended = state.ended.or(Some(true)));
    }

    /// It broke off, or nobody wants it any more: the reader's next read fails.
    pub fn fail(&self) {
        self.update(|state| state.ended = Some(false));
    }
}

/// Reads a file behind its writer.
#[derive(Debug)]
pub struct Follower {
    file: File,
    position: u64,
    follow: Arc<Follow>,
}

impl Follower {
    /// From the file's beginning on; `file` is this reader's alone.
    pub fn new(file: File, follow: Arc<Follow>) -> Self {
        Self { file, position: 0, follow }
    }
}

impl Read for Follower {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let available = {
            let mut state = self.follow.state.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                if state.ended == Some(false) {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the transfer broke off"));
                }
                if state.written > self.position {
                    break state.written - self.position;
                }
                if state.ended == Some(true) {
                    return Ok(0);
                }
                state = self.follow.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let count = buf.len().min(usize::try_from(available).unwrap_or(usize::MAX));
        let count = self.file.read(&mut buf[..count])?;
        if count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file is shorter than what was written to it",
            ));
        }
        self.position += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_reader_waits_for_the_writer_and_hears_of_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut file = File::create(&path).unwrap();
        let follow = Arc::new(Follow::default());
        let mut follower = Follower::new(File::open(&path).unwrap(), Arc::clone(&follow));
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            follower.read_to_end(&mut all).map(|_| all)
        });
        for piece in [&b"one"[..], b"two"] {
            file.write_all(piece).unwrap();
            follow.advance(file.metadata().unwrap().len());
        }
        follow.finish();
        assert_eq!(reader.join().unwrap().unwrap(), b"onetwo");

        let follow = Arc::new(Follow::default());
        follow.advance(6);
        follow.fail();
        let mut follower = Follower::new(File::open(&path).unwrap(), follow);
        assert_eq!(follower.read(&mut [0; 6]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
