//! Bytes waiting to be written to a socket.

use std::io;
use std::os::fd::AsFd;

use rustix::net::{SendFlags, send};

use super::unless_blocked;

/// Capacity that an empty queue may keep.
const KEEP: usize = 4 << 10;

/// A queue of bytes. Its owner bounds it.
#[derive(Debug, Default)]
pub(super) struct Queue {
    bytes: Vec<u8>,
    sent: usize,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        // Move the rest to the front when that is cheaper than growing for ever.
        if self.sent > self.len() {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Send what the socket takes; how many bytes those were.
    pub(super) fn send(&mut self, socket: impl AsFd) -> io::Result<usize> {
        let mut total = 0;
        while !self.is_empty() {
            let rest = &self.bytes[self.sent..];
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match unless_blocked(|| send(&socket, rest, flags))? {
                Some(n) => {
                    self.sent += n;
                    total += n;
                }
                None => return Ok(total),
            }
        }
        self.clear();
        Ok(total)
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(KEEP);
        self.sent = 0;
    }
}
