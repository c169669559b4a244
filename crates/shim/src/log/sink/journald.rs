//! The journal's native protocol (systemd's Native Journal Protocol): one datagram of fields per message.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use super::{Collector, Piece, WRITE};
use crate::config::JournaldConfig;
use crate::log::Source;

pub(super) struct Journald {
    socket: UnixDatagram,
    path: PathBuf,
    /// The fields that are the same in every message, encoded.
    fields: Vec<u8>,
}

impl Journald {
    pub(super) fn new(config: &JournaldConfig) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(WRITE))?;
        let mut fields = Vec::new();
        for (name, value) in &config.fields {
            field(&mut fields, name, value.as_bytes());
        }
        Ok(Self { socket, path: config.socket.clone(), fields })
    }
}

/// `NAME=value`, or for a value with newlines its length and itself.
fn field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    if value.contains(&b'\n') {
        out.push(b'\n');
        out.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        out.push(b'=');
    }
    out.extend_from_slice(value);
    out.push(b'\n');
}

impl Journald {
    fn message(&self, piece: &Piece) -> Vec<u8> {
        let mut message = self.fields.clone();
        field(&mut message, "MESSAGE", &piece.text);
        field(&mut message, "PRIORITY", if piece.source == Source::Stderr { b"3" } else { b"6" });
        let micros = piece.time.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        field(&mut message, "SYSLOG_TIMESTAMP", micros.to_string().as_bytes());
        if piece.partial {
            field(&mut message, "CONTAINER_PARTIAL_MESSAGE", b"true");
        }
        message
    }
}

impl Collector for Journald {
    fn send(&mut self, piece: &Piece) -> io::Result<()> {
        self.socket.send_to(&self.message(piece), &self.path).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_with_newlines_carry_their_length() {
        let mut out = Vec::new();
        field(&mut out, "A", b"one");
        field(&mut out, "B", b"two\nlines");
        assert_eq!(out, b"A=one\nB\n\x09\0\0\0\0\0\0\0two\nlines\n");
    }
}
