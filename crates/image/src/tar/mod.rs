//! The tar format: a streaming reader of ustar, pax and GNU archives and a deterministic writer.
//!
//! Neither touches a file system. What an entry says is data here; what may be done with it is decided by its user.

mod reader;
mod writer;

pub(crate) use reader::is_header;
pub use reader::{Reader, TarError};
pub use writer::Writer;

/// Size of a header, and what data is padded to.
pub(crate) const BLOCK: usize = 512;

/// What an entry makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    #[default]
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// Seconds since the epoch, and nanoseconds after that second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    pub seconds: i64,
    pub nanos: u32,
}

/// One entry of an archive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// As the archive has it, not checked in any way.
    pub path: Vec<u8>,
    /// Target of a link.
    pub link: Vec<u8>,
    pub kind: Kind,
    /// Permission bits, set-id and sticky bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    /// Bytes of data in the archive.
    pub stored: u64,
    /// Length of the file; more than `stored` when it is sparse.
    pub size: u64,
    /// Where stored data goes, as offset and length, when the file is sparse.
    pub sparse: Option<Vec<(u64, u64)>>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    fn clear(&mut self) {
        let (mut path, mut link, mut xattrs) = (
            std::mem::take(&mut self.path),
            std::mem::take(&mut self.link),
            std::mem::take(&mut self.xattrs),
        );
        path.clear();
        link.clear();
        xattrs.clear();
        *self = Self { path, link, xattrs, ..Self::default() };
    }
}
