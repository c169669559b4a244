//! Where everything of an index stands, and writing it: super block, device slot, inodes with attributes and extents,
//! then the blocks of directories, of long link targets, and of sparse files whose holes do not fit whole blocks.
//!
//! All numbers are little-endian. Inodes have the extended form (64 bytes) and are numbered by their position in units
//! of 32 bytes from the start of the file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Seek as _, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;

use super::tree::{Attributes, Content, Data, Node, NodeId, Tree};
use super::{BLOCK, IndexError};

const MAGIC: u32 = 0xe0f5_e1e2;
const SUPER_OFFSET: u64 = 1024;
const BLOCK_BITS: u32 = 9;
/// Slots have 128 bytes; the first after the super block.
const DEVICE_SLOT: u64 = 9;
const FIRST_INODE: u64 = 1536;
const INODE: u64 = 64;
const NID_UNIT: u64 = 32;
const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
const INCOMPAT_DEVICE_TABLE: u32 = 0x8;

const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
const CHUNK_BASED: u16 = 4;
const CHUNK_INDEXES: u16 = 0x20;
/// Largest chunk, as a power of two.
const CHUNK_BITS_MAX: u32 = BLOCK_BITS + 31;
/// The block number of a chunk that is a hole.
const HOLE: u32 = u32::MAX;
/// Link targets up to this length stand beside their inode.
const INLINE_LINK: u64 = 256;
/// Most extents of one file.
const EXTENTS_MAX: u64 = 1 << 16;
/// Most bytes an index may span: blocks are numbered in 32 bits.
const INDEX_MAX: u64 = 1 << 40;

/// File types in directory entries.
mod file_type {
    pub const REGULAR: u8 = 1;
    pub const DIRECTORY: u8 = 2;
    pub const CHAR_DEVICE: u8 = 3;
    pub const BLOCK_DEVICE: u8 = 4;
    pub const FIFO: u8 = 5;
    pub const SYMLINK: u8 = 7;
}

/// Bytes of a directory entry without its name.
const DIRENT: usize = 12;

type Result<T> = std::result::Result<T, IndexError>;

/// Where one node's parts stand.
#[derive(Clone, Debug, Default)]
struct Place {
    /// Byte position of the inode; 0 of a node that has none.
    at: u64,
    /// First block of what is stored in the index itself.
    block: u32,
    /// Length of a directory's data.
    length: u64,
    extents: Extents,
}

/// How a file's data are found.
#[derive(Clone, Debug, Default)]
enum Extents {
    #[default]
    None,
    /// In the archive, in chunks of `1 << bits` bytes one after the other.
    Archive { bits: u32 },
    /// In the archive with holes: the block of each chunk.
    Sparse { bits: u32, blocks: Box<[u32]> },
    /// Copied into the index with holes: the block of each chunk.
    Copied { bits: u32, blocks: Box<[u32]> },
}

impl Extents {
    fn count(&self, size: u64) -> u64 {
        match self {
            Self::None => 0,
            Self::Archive { bits } => size.div_ceil(1 << bits),
            Self::Sparse { blocks, .. } | Self::Copied { blocks, .. } => blocks.len() as u64,
        }
    }
}

pub(super) struct Layout {
    places: Vec<Place>,
    /// Nodes in the order of their inodes.
    order: Vec<(NodeId, NodeId)>,
    end_of_inodes: u64,
    blocks: u64,
    archive_blocks: u32,
}

impl Layout {
    pub fn of(tree: &Tree, archive: u64) -> Result<Self> {
        let archive_blocks = u32::try_from(archive.div_ceil(BLOCK))
            .ok()
            .filter(|blocks| *blocks < HOLE)
            .ok_or(IndexError::Unfit("the archive is larger than block numbers reach"))?;
        let mut layout = Self {
            places: vec![Place::default(); tree.len()],
            order: Vec::with_capacity(tree.len()),
            end_of_inodes: FIRST_INODE,
            blocks: 0,
            archive_blocks,
        };
        // Each directory's children follow each other; parents come first, so that the root's number is small.
        let mut waiting = vec![(Tree::ROOT, Tree::ROOT)];
        while let Some((id, parent)) = waiting.pop() {
            if layout.places[id.index()].at != 0 {
                continue;
            }
            layout.place_inode(tree, id)?;
            layout.order.push((id, parent));
            if let Some(children) = tree.children(id) {
                waiting.extend(children.values().rev().map(|child| (*child, id)));
            }
        }
        layout.place_blocks(tree)?;
        Ok(layout)
    }

    fn place_inode(&mut self, tree: &Tree, id: NodeId) -> Result<()> {
        let node = tree.node(id);
        let attributes = attributes_length(node)?;
        let mut at = self.end_of_inodes.next_multiple_of(NID_UNIT);
        let within = |at: u64, length: u64| at % BLOCK + length <= BLOCK;
        while !within(at, INODE) {
            at += NID_UNIT;
        }
        let mut after = INODE + attributes;
        let place = &mut self.places[id.index()];
        match &node.content {
            Content::Symlink(target) if (target.len() as u64) <= INLINE_LINK => {
                while !within(at, INODE) || !within(at + after, target.len() as u64) {
                    at += NID_UNIT;
                }
                after += target.len() as u64;
            }
            Content::File(data) if data.size > 0 => {
                place.extents = extents(data)?;
                after = after.next_multiple_of(8) + 8 * place.extents.count(data.size);
            }
            _ => {}
        }
        place.at = at;
        self.end_of_inodes = at + after;
        Ok(())
    }

    fn place_blocks(&mut self, tree: &Tree) -> Result<()> {
        let mut next = self.end_of_inodes.div_ceil(BLOCK);
        for (id, _) in &self.order {
            let node = tree.node(*id);
            let place = &mut self.places[id.index()];
            place.block = number(next)?;
            match &node.content {
                Content::Directory { children, .. } => {
                    place.length = directory_length(children);
                    next += place.length.div_ceil(BLOCK);
                }
                Content::Symlink(target) if (target.len() as u64) > INLINE_LINK => {
                    next += (target.len() as u64).div_ceil(BLOCK);
                }
                Content::File(_) => {
                    if let Extents::Copied { bits, blocks } = &mut place.extents {
                        for block in blocks.iter_mut().filter(|block| **block != HOLE) {
                            *block = number(next)?;
                            next += (1 << *bits) / BLOCK;
                            if next * BLOCK > INDEX_MAX {
                                return Err(IndexError::Unfit("a sparse file spans too much"));
                            }
                        }
                    }
                }
                _ => {}
            }
        }
        self.blocks = next;
        number(next).map(drop)
    }

    pub fn write(&self, tree: &Tree, archive: &File, uuid: [u8; 16], index: &File) -> Result<u64> {
        let mut out = Counting { inner: BufWriter::with_capacity(1 << 18, index), at: 0 };
        out.write_all(&self.head(uuid))?;
        for (id, _) in &self.order {
            out.zeros_to(self.places[id.index()].at)?;
            self.write_inode(tree, *id, &mut out)?;
        }
        for (id, parent) in &self.order {
            let place = &self.places[id.index()];
            let start = u64::from(place.block) * BLOCK;
            match &tree.node(*id).content {
                Content::Directory { .. } => {
                    out.zeros_to(start)?;
                    self.write_directory(tree, *id, *parent, &mut out)?;
                }
                Content::Symlink(target) if target.len() as u64 > INLINE_LINK => {
                    out.zeros_to(start)?;
                    out.write_all(target)?;
                }
                Content::File(data) => {
                    if let Extents::Copied { bits, blocks } = &place.extents {
                        out.copy(archive, data, *bits, blocks)?;
                    }
                }
                _ => {}
            }
        }
        out.inner.flush()?;
        index.set_len(self.blocks * BLOCK)?;
        Ok(self.blocks * BLOCK)
    }

    fn head(&self, uuid: [u8; 16]) -> Vec<u8> {
        let mut head = vec![0; FIRST_INODE as usize];
        let mut put = |at: u64, bytes: &[u8]| head[at as usize..][..bytes.len()].copy_from_slice(bytes);
        let field = |offset: u64| SUPER_OFFSET + offset;
        put(field(0), &MAGIC.to_le_bytes());
        put(field(12), &[BLOCK_BITS as u8]);
        let root = (self.places[Tree::ROOT.index()].at / NID_UNIT) as u16;
        put(field(14), &root.to_le_bytes());
        put(field(16), &(self.order.len() as u64).to_le_bytes());
        put(field(36), &(self.blocks as u32).to_le_bytes());
        put(field(48), &uuid);
        put(field(80), &(INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE).to_le_bytes());
        put(field(86), &1u16.to_le_bytes());
        put(field(88), &(DEVICE_SLOT as u16).to_le_bytes());
        let slot = DEVICE_SLOT * 128;
        put(slot, b"archive");
        put(slot + 64, &self.archive_blocks.to_le_bytes());
        head
    }

    fn write_inode<W: Write>(&self, tree: &Tree, id: NodeId, out: &mut Counting<W>) -> io::Result<()> {
        let node = tree.node(id);
        let place = &self.places[id.index()];
        let (kind, layout, size, info) = match &node.content {
            Content::Directory { .. } => (mode::DIR, FLAT_PLAIN, place.length, place.block),
            Content::File(data) => match &place.extents {
                Extents::None => (mode::REG, FLAT_PLAIN, 0, HOLE),
                Extents::Archive { bits } | Extents::Sparse { bits, .. } | Extents::Copied { bits, .. } => {
                    let format = CHUNK_INDEXES | (bits - BLOCK_BITS) as u16;
                    (mode::REG, CHUNK_BASED, data.size, u32::from(format))
                }
            },
            Content::Symlink(target) if target.len() as u64 <= INLINE_LINK => {
                (mode::LNK, FLAT_INLINE, target.len() as u64, HOLE)
            }
            Content::Symlink(target) => (mode::LNK, FLAT_PLAIN, target.len() as u64, place.block),
            Content::CharDevice(major, minor) => (mode::CHR, FLAT_PLAIN, 0, encode_device(*major, *minor)),
            Content::BlockDevice(major, minor) => (mode::BLK, FLAT_PLAIN, 0, encode_device(*major, *minor)),
            Content::Fifo => (mode::FIFO, FLAT_PLAIN, 0, 0),
        };
        let xattrs = attributes(node);
        let links = match tree.children(id) {
            Some(children) => 2 + children.values().filter(|child| tree.is_directory(**child)).count() as u32,
            None => node.links,
        };
        let Attributes { mode: permissions, uid, gid, mtime, .. } = &node.attributes;
        let mut inode = Vec::with_capacity(INODE as usize);
        // Bit 0: the extended form.
        inode.extend((layout << 1 | 1).to_le_bytes());
        let count = if xattrs.is_empty() { 0 } else { (xattrs.len() - 12) / 4 + 1 };
        inode.extend((count as u16).to_le_bytes());
        inode.extend(((permissions & 0o7777) as u16 | kind).to_le_bytes());
        inode.extend([0; 2]);
        inode.extend(size.to_le_bytes());
        inode.extend(info.to_le_bytes());
        inode.extend(((place.at / NID_UNIT) as u32).to_le_bytes());
        inode.extend(uid.to_le_bytes());
        inode.extend(gid.to_le_bytes());
        inode.extend(mtime.seconds.to_le_bytes());
        inode.extend(mtime.nanos.to_le_bytes());
        inode.extend(links.to_le_bytes());
        inode.resize(INODE as usize, 0);
        inode.extend(xattrs);
        out.write_all(&inode)?;
        match &node.content {
            Content::Symlink(target) if target.len() as u64 <= INLINE_LINK => out.write_all(target)?,
            Content::File(data) if data.size > 0 => {
                out.zeros_to(out.at.next_multiple_of(8))?;
                write_extents(data, &place.extents, out)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn write_directory<W: Write>(
        &self,
        tree: &Tree,
        id: NodeId,
        parent: NodeId,
        out: &mut Counting<W>,
    ) -> io::Result<()> {
        let Some(children) = tree.children(id) else { return Ok(()) };
        let start = out.at;
        let entries = with_dots(children.iter().map(|(name, child)| (&name[..], *child)), id, parent);
        let mut block: Vec<(&[u8], NodeId)> = Vec::new();
        let mut used = 0;
        let flush = |block: &mut Vec<(&[u8], NodeId)>, out: &mut Counting<W>| -> io::Result<()> {
            let mut name_at = block.len() * DIRENT;
            let mut names = Vec::new();
            for (name, child) in block.iter() {
                let nid = self.places[child.index()].at / NID_UNIT;
                out.write_all(&nid.to_le_bytes())?;
                out.write_all(&(name_at as u16).to_le_bytes())?;
                out.write_all(&[entry_type(tree.node(*child)), 0])?;
                name_at += name.len();
                names.extend_from_slice(name);
            }
            block.clear();
            out.write_all(&names)
        };
        for (name, child) in entries {
            if used + DIRENT + name.len() > BLOCK as usize {
                flush(&mut block, out)?;
                out.zeros_to(start + (out.at - start).next_multiple_of(BLOCK))?;
                used = 0;
            }
            used += DIRENT + name.len();
            block.push((name, child));
        }
        flush(&mut block, out)
    }
}

/// Types in an inode's mode.
mod mode {
    pub const FIFO: u16 = 0o010_000;
    pub const CHR: u16 = 0o020_000;
    pub const DIR: u16 = 0o040_000;
    pub const BLK: u16 = 0o060_000;
    pub const REG: u16 = 0o100_000;
    pub const LNK: u16 = 0o120_000;
}

fn number(block: u64) -> Result<u32> {
    u32::try_from(block)
        .ok()
        .filter(|block| *block != HOLE)
        .ok_or(IndexError::Unfit("the index is larger than block numbers reach"))
}

/// The kernel's 32-bit form of a device number.
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn entry_type(node: &Node) -> u8 {
    match node.content {
        Content::Directory { .. } => file_type::DIRECTORY,
        Content::File(_) => file_type::REGULAR,
        Content::Symlink(_) => file_type::SYMLINK,
        Content::CharDevice(..) => file_type::CHAR_DEVICE,
        Content::BlockDevice(..) => file_type::BLOCK_DEVICE,
        Content::Fifo => file_type::FIFO,
    }
}

/// A directory's entries with `.` and `..` in their place: all are sorted by bytes.
fn with_dots<'a>(
    children: impl Iterator<Item = (&'a [u8], NodeId)>,
    id: NodeId,
    parent: NodeId,
) -> impl Iterator<Item = (&'a [u8], NodeId)> {
    let mut dots = [(&b"."[..], id), (&b".."[..], parent)].into_iter().peekable();
    let mut children = children.peekable();
    std::iter::from_fn(move || match (dots.peek(), children.peek()) {
        (Some(dot), Some(child)) if dot.0 > child.0 => children.next(),
        (Some(_), _) => dots.next(),
        (None, _) => children.next(),
    })
}

fn directory_length(children: &BTreeMap<Box<[u8]>, NodeId>) -> u64 {
    let (mut full, mut used) = (0, 0);
    let names = children.iter().map(|(name, child)| (&name[..], *child));
    for (name, _) in with_dots(names, Tree::ROOT, Tree::ROOT) {
        let length = DIRENT + name.len();
        if used + length > BLOCK as usize {
            full += BLOCK;
            used = 0;
        }
        used += length;
    }
    full + used as u64
}

/// How to find a file's data: in the archive where whole blocks allow it.
fn extents(data: &Data) -> Result<Extents> {
    let bits_for = |size: u64| u64::BITS - size.saturating_sub(1).leading_zeros();
    if !data.start.is_multiple_of(BLOCK) {
        return Err(IndexError::Unfit("data of the archive are not at a whole block"));
    }
    let Some(map) = &data.sparse else {
        let bits = bits_for(data.size).clamp(BLOCK_BITS, CHUNK_BITS_MAX);
        if data.size.div_ceil(1 << bits) > EXTENTS_MAX {
            return Err(IndexError::Unfit("a file is too large"));
        }
        return Ok(Extents::Archive { bits });
    };
    if let Some(blocks) = aligned_chunks(data, map) {
        return Ok(Extents::Sparse { bits: BLOCK_BITS, blocks });
    }
    let bits = (bits_for(data.size).saturating_sub(16)).max(12);
    if bits > CHUNK_BITS_MAX {
        return Err(IndexError::Unfit("a sparse file is too large"));
    }
    let mut blocks = vec![HOLE; data.size.div_ceil(1 << bits) as usize].into_boxed_slice();
    for (offset, length) in map.iter().filter(|(_, length)| *length > 0) {
        // The real numbers come when blocks are given out.
        blocks[(offset >> bits) as usize..=((offset + length - 1) >> bits) as usize].fill(0);
    }
    Ok(Extents::Copied { bits, blocks })
}

/// The block of each 512 bytes of a sparse file, if its data begin and end at whole blocks.
fn aligned_chunks(data: &Data, map: &[(u64, u64)]) -> Option<Box<[u32]>> {
    let count = data.size.div_ceil(BLOCK);
    if count > EXTENTS_MAX {
        return None;
    }
    let mut blocks = vec![HOLE; count as usize];
    let mut source = data.start;
    for &(offset, length) in map.iter().filter(|(_, length)| *length > 0) {
        let end = offset + length;
        if !offset.is_multiple_of(BLOCK)
            || !source.is_multiple_of(BLOCK)
            || (!length.is_multiple_of(BLOCK) && end != data.size)
        {
            return None;
        }
        for n in 0..length.div_ceil(BLOCK) {
            blocks[(offset / BLOCK + n) as usize] = u32::try_from(source / BLOCK + n).ok()?;
        }
        source += length;
    }
    Some(blocks.into())
}

fn write_extents<W: Write>(data: &Data, extents: &Extents, out: &mut Counting<W>) -> io::Result<()> {
    let mut one = |device: u16, block: u32| {
        let mut entry = [0; 8];
        entry[2..4].copy_from_slice(&device.to_le_bytes());
        entry[4..].copy_from_slice(&block.to_le_bytes());
        out.write_all(&entry)
    };
    match extents {
        Extents::None => Ok(()),
        Extents::Archive { bits } => {
            let chunk = 1u64 << bits;
            (0..data.size.div_ceil(chunk)).try_for_each(|n| one(1, ((data.start + n * chunk) / BLOCK) as u32))
        }
        Extents::Sparse { blocks, .. } => blocks.iter().try_for_each(|block| one(1, *block)),
        Extents::Copied { blocks, .. } => blocks.iter().try_for_each(|block| one(0, *block)),
    }
}

/// Prefixes of attribute names and their numbers, longest first.
const PREFIXES: &[(&[u8], u8)] = &[
    (b"system.posix_acl_default", 3),
    (b"system.posix_acl_access", 2),
    (b"security.", 6),
    (b"trusted.", 4),
    (b"user.", 1),
];

/// An attribute's name as number and rest; `None` of one that file systems do not know.
fn attribute_name(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(prefix, number)| {
        let rest = name.strip_prefix(*prefix)?;
        // The first two are whole names, the others must be followed by something.
        (rest.is_empty() == (*number < 4 && *number > 1)).then_some((*number, rest))
    })
}

fn each_attribute(node: &Node) -> impl Iterator<Item = (u8, &[u8], &[u8])> {
    let opaque = matches!(node.content, Content::Directory { opaque: true, .. });
    let opaque = opaque.then_some((4, &b"overlay.opaque"[..], &b"y"[..]));
    let own = node.attributes.xattrs.iter().filter_map(|(name, value)| {
        let (number, rest) = attribute_name(name)?;
        Some((number, rest, &value[..]))
    });
    opaque.into_iter().chain(own)
}

/// Bytes of the attributes beside an inode, with their header.
fn attributes_length(node: &Node) -> Result<u64> {
    let mut total = 0;
    for (_, name, value) in each_attribute(node) {
        if name.len() > 255 || value.len() > usize::from(u16::MAX) {
            return Err(IndexError::Unfit("an extended attribute is too large"));
        }
        total += (4 + name.len() + value.len()).next_multiple_of(4) as u64;
    }
    if total / 4 >= u64::from(u16::MAX) {
        return Err(IndexError::Unfit("a file has too many extended attributes"));
    }
    Ok(if total == 0 { 0 } else { 12 + total })
}

fn attributes(node: &Node) -> Vec<u8> {
    let mut raw = Vec::new();
    for (number, name, value) in each_attribute(node) {
        if raw.is_empty() {
            raw.resize(12, 0);
        }
        raw.extend([name.len() as u8, number]);
        raw.extend((value.len() as u16).to_le_bytes());
        raw.extend_from_slice(name);
        raw.extend_from_slice(value);
        raw.resize(raw.len().next_multiple_of(4), 0);
    }
    raw
}

/// A writer that knows where it is.
struct Counting<W> {
    inner: W,
    at: u64,
}

impl<W: Write> Counting<W> {
    fn zeros_to(&mut self, position: u64) -> io::Result<()> {
        const ZEROS: [u8; 512] = [0; 512];
        while self.at < position {
            let n = (position - self.at).min(512) as usize;
            self.write_all(&ZEROS[..n])?;
        }
        Ok(())
    }
}

impl Counting<BufWriter<&File>> {
    /// Copies a sparse file's data to their chunks; what lies between stays a hole.
    fn copy(&mut self, archive: &File, data: &Data, bits: u32, blocks: &[u32]) -> io::Result<()> {
        let mut source = data.start;
        let mut buffer = vec![0; 1 << 16];
        for &(offset, length) in data.sparse.as_deref().unwrap_or_default() {
            let mut done = 0;
            while done < length {
                let at = offset + done;
                let within = at % (1 << bits);
                let n = (length - done).min((1 << bits) - within).min(buffer.len() as u64);
                archive.read_exact_at(&mut buffer[..n as usize], source)?;
                let block = blocks[(at >> bits) as usize];
                self.inner.flush()?;
                self.inner
                    .get_ref()
                    .write_all_at(&buffer[..n as usize], u64::from(block) * BLOCK + within)?;
                source += n;
                done += n;
            }
        }
        let end = blocks.iter().filter(|block| **block != HOLE).max();
        if let Some(end) = end {
            self.at = u64::from(*end) * BLOCK + (1 << bits);
            self.inner.seek(SeekFrom::Start(self.at))?;
        }
        Ok(())
    }
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.at += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
