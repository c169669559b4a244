//! Frames from the monitor to an attached client: docker's multiplexed stream, so that a daemon may copy them through
//! unchanged, with kinds from 16 up for what only a daemon should see.
//!
//! A frame is one byte of kind, three zero bytes, a 32-bit big-endian length, and the payload.

use serde::{Deserialize, Serialize};

use crate::record::ExecRecord;

/// Bytes before a payload.
pub const HEADER: usize = 8;

/// No frame's payload is longer.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Kind {
    /// Standard output; with a terminal, everything.
    Stdout = 1,
    /// Standard error.
    Stderr = 2,
    /// The last frame of an exec's stream: its [`ExecRecord`] as JSON.
    ExecExited = 16,
    /// The last frame for a client that took nothing for longer than its patience: output was skipped.
    Lagged = 17,
}

impl Kind {
    /// The kind of a frame's first byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Stdout),
            2 => Some(Self::Stderr),
            16 => Some(Self::ExecExited),
            17 => Some(Self::Lagged),
            _ => None,
        }
    }
}

/// The header of a frame whose payload has `length` bytes.
pub fn header(kind: Kind, length: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[0] = kind as u8;
    header[4..].copy_from_slice(&(length as u32).to_be_bytes());
    header
}

/// The kind and payload length that a header tells; `None` if it is not one of ours.
pub fn parse_header(header: [u8; HEADER]) -> Option<(Kind, usize)> {
    let kind = Kind::from_byte(header[0])?;
    let length = u32::from_be_bytes([header[4], header[5], header[6], header[7]]) as usize;
    (length <= MAX_PAYLOAD).then_some((kind, length))
}

/// The record in an [`Kind::ExecExited`] frame.
pub fn exec_record(payload: &[u8]) -> Option<ExecRecord> {
    serde_json::from_slice(payload).ok()
}
