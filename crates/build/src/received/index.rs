//! What a kept context holds, as it was last received.

use std::path::Path;

use prost::Message;

use crate::error::{Context as _, Result};

/// One file of a kept context.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Known {
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    #[prost(enumeration = "What", tag = "2")]
    pub what: i32,
    #[prost(uint32, tag = "3")]
    pub mode: u32,
    /// Bytes, as the client said them; `u64::MAX` if it sent another number.
    #[prost(uint64, tag = "4")]
    pub size: u64,
    /// Nanoseconds since the epoch.
    #[prost(int64, tag = "5")]
    pub mtime: i64,
    /// Of a link.
    #[prost(bytes = "vec", tag = "6")]
    pub target: Vec<u8>,
    /// SHA-256 of a file.
    #[prost(bytes = "vec", tag = "7")]
    pub hash: Vec<u8>,
    /// What the client says besides size and time ([`brigantine_session::Entry::state`]).
    #[prost(fixed64, tag = "8")]
    pub state: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub(super) enum What {
    File = 0,
    Directory = 1,
    Symlink = 2,
    HardLink = 3,
}

impl Known {
    pub fn is(&self, what: What) -> bool {
        self.what == what as i32
    }

    pub fn hash(&self) -> Option<[u8; 32]> {
        self.hash.as_slice().try_into().ok()
    }
}

/// All of them, in the order of their paths.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Index {
    /// The machine's boot it was written in: files that were not synced may be lost with a power cut.
    #[prost(string, tag = "1")]
    pub boot: String,
    #[prost(message, repeated, tag = "2")]
    pub files: Vec<Known>,
}

impl Index {
    /// Reads the index at `path`; nothing is known if it is not whole or of another boot.
    pub fn read(path: &Path) -> Option<Self> {
        let raw = std::fs::read(path).ok()?;
        let index = Self::decode(&raw[..]).ok()?;
        (!index.boot.is_empty() && index.boot == boot()).then_some(index)
    }

    pub fn write(path: &Path, files: Vec<Known>) -> Result<()> {
        let what = || format!("write {}", path.display());
        let fresh = path.with_extension("new");
        std::fs::write(&fresh, Self { boot: boot(), files }.encode_to_vec()).doing(what)?;
        std::fs::rename(&fresh, path).doing(what)
    }
}

fn boot() -> String {
    let read = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    read.map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// Bytes that sort as paths do part by part: the separator below everything else (nothing in a path is 0).
pub(super) fn sort_key(path: &[u8]) -> Vec<u8> {
    path.iter().map(|b| if *b == b'/' { 0 } else { *b }).collect()
}
