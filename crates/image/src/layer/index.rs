//! Keeping a layer's archive as one file with an EROFS index over it: the same entries, rules and refusals as
//! applying it, with no file made for any of them.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::apply::{Applied, refuse, shortened, wanted};
use super::place::{normalise, split};
use super::stream::{self, Chunks};
use super::{DiffId, LayerError, MARK, OPAQUE, WHITEOUT, lossy};
use crate::compress;
use crate::digest::{Algorithm, Digest};
use crate::erofs::{self, Attributes, Content, Data, IndexError, NodeId, Tree};
use crate::tar::{Entry, Kind, Reader};
use crate::temp::Writeback;

/// The archive, uncompressed, within a layer's directory.
pub const ARCHIVE: &str = "data.tar";
/// Its index.
pub const INDEX: &str = "index.erofs";

/// More entries or text than that are extracted instead of being kept in memory until the index is written.
const NODES_MAX: usize = 4 << 20;
const TEXT_MAX: usize = 256 << 20;
/// Longest target of a symbolic link.
const LINK_MAX: usize = 4095;

type Result<T> = std::result::Result<T, LayerError>;

/// What came of indexing.
#[derive(Debug)]
pub enum Indexed {
    Whole(Applied),
    /// The archive is kept and nothing is wrong with it, but the format has no room for it: extract it.
    Unfit {
        diff_id: Digest,
        reason: &'static str,
    },
}

/// Keeps the archive that `reader` yields (compressed or not) in the directory `dir`, and writes its index beside it.
/// As after [`super::apply`], the caller compares the digest before anybody uses it.
pub fn index(reader: impl Read, dir: &Path, algorithm: Algorithm) -> Result<Indexed> {
    index_named(reader, dir, DiffId::Hashed(algorithm))
}

/// The same, with the digest from where the caller says.
pub(crate) fn index_named(reader: impl Read, dir: &Path, diff_id: DiffId<'_>) -> Result<Indexed> {
    let file = create_archive(dir)?;
    let decoded = compress::decode(reader).map_err(LayerError::Read)?;
    let keep = Keep { file: &file, dir, whatever: false };
    let Found { model, length, diff_id } = read(decoded, Some(keep), diff_id)?;
    file.set_len(length).map_err(|source| os("extend", dir, ARCHIVE, source))?;
    Unindexed { model: model?, length, diff_id: diff_id?, archive: file }.write(dir)
}

/// What was kept of an archive.
pub(crate) struct Kept {
    pub digest: Digest,
    /// What it is as a layer.
    pub model: Result<Unindexed>,
}

/// An archive that is kept and read, and has no index yet.
pub(crate) struct Unindexed {
    model: Model,
    length: u64,
    diff_id: Digest,
    archive: File,
}

impl Unindexed {
    pub fn diff_id(&self) -> &Digest {
        &self.diff_id
    }

    /// Writes the index, into the directory where the archive is.
    pub fn write(self, dir: &Path) -> Result<Indexed> {
        write_index(self.model, self.length, self.diff_id, &self.archive, dir)
    }
}

/// Keeps all that `reader` yields, uncompressed, whatever it is, and reads on the way what to index if it is a layer's
/// archive. An error of the reader's ends it as the end of the archive does: the caller knows of it.
pub(crate) fn keep(reader: impl Read, dir: &Path, algorithm: Algorithm) -> Result<Kept> {
    let file = create_archive(dir)?;
    let keep = Keep { file: &file, dir, whatever: true };
    let Found { model, length, diff_id } = read(reader, Some(keep), DiffId::Hashed(algorithm))?;
    file.set_len(length).map_err(|source| os("extend", dir, ARCHIVE, source))?;
    let digest = diff_id?;
    let model = model.map(|model| Unindexed { model, length, diff_id: digest.clone(), archive: file });
    Ok(Kept { digest, model })
}

/// The same as [`index`] of an uncompressed archive that is in `dir` already: nothing is written but its index.
pub fn index_in_place(dir: &Path, algorithm: Algorithm) -> Result<Indexed> {
    let archive = File::open(dir.join(ARCHIVE)).map_err(|source| os("open", dir, ARCHIVE, source))?;
    let Found { model, length, diff_id } = read(&archive, None, DiffId::Hashed(algorithm))?;
    write_index(model?, length, diff_id?, &archive, dir)
}

/// Only looks: what there is in the archive, with the refusals of applying it. It takes no space (`disk` is 0).
pub fn inspect(reader: impl Read, algorithm: Algorithm) -> Result<Applied> {
    inspect_named(reader, DiffId::Hashed(algorithm))
}

/// The same, with the digest from where the caller says.
pub(crate) fn inspect_named(reader: impl Read, diff_id: DiffId<'_>) -> Result<Applied> {
    let decoded = compress::decode(reader).map_err(LayerError::Read)?;
    let Found { model, diff_id, .. } = read(decoded, None, diff_id)?;
    let model = model?;
    Ok(Applied { diff_id: diff_id?, size: model.size, disk: 0, entries: model.entries })
}

fn create_archive(dir: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.join(ARCHIVE))
        .map_err(|source| os("create", dir, ARCHIVE, source))
}

/// Where an archive is kept while it is read.
#[derive(Clone, Copy)]
struct Keep<'a> {
    file: &'a File,
    dir: &'a Path,
    /// Also when it is no layer's archive; and it is to be durable soon.
    whatever: bool,
}

/// What reading an archive to its end gave.
struct Found {
    model: Result<Model>,
    length: u64,
    diff_id: Result<Digest>,
}

/// Reads an uncompressed archive, and keeps it if it is told where.
fn read(mut archive: impl Read, keep: Option<Keep<'_>>, diff_id: DiffId<'_>) -> Result<Found> {
    let (feed, chunks) = stream::pipe();
    let mut hasher = diff_id.hasher();
    let (model, length) = std::thread::scope(|scope| {
        let keeper = scope.spawn(move || {
            let writeback = keep.is_some_and(|keep| keep.whatever).then(Writeback::default);
            let mut keeping =
                Keeping { chunks, keep, writeback, kept: 0, length: 0, ended: false, failure: None };
            let model = model(&mut keeping);
            match (keeping.failure, keep) {
                (Some(source), Some(keep)) => Err(os("write", keep.dir, ARCHIVE, source)),
                _ => Ok((model, keeping.length)),
            }
        });
        feed.run(&mut archive, |chunk| {
            if let Some(hasher) = &mut hasher {
                hasher.update(chunk);
            }
        });
        match keeper.join() {
            Ok(found) => found,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })?;
    Ok(Found { model, length, diff_id: diff_id.finish(hasher) })
}

fn write_index(model: Model, length: u64, diff_id: Digest, archive: &File, dir: &Path) -> Result<Indexed> {
    let Model { tree, size, entries, unfit, .. } = model;
    if let Some(reason) = unfit {
        return Ok(Indexed::Unfit { diff_id, reason });
    }
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(diff_id.hex().as_bytes().chunks_exact(2)) {
        *byte =
            std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok()).unwrap_or(0);
    }
    let index = File::options()
        .write(true)
        .create_new(true)
        .open(dir.join(INDEX))
        .map_err(|source| os("create", dir, INDEX, source))?;
    match erofs::write(&tree, archive, length, uuid, &index) {
        Ok(index) => {
            let disk = length.next_multiple_of(4096) + index.next_multiple_of(4096);
            Ok(Indexed::Whole(Applied { diff_id, size, disk, entries }))
        }
        Err(IndexError::Unfit(reason)) => Ok(Indexed::Unfit { diff_id, reason }),
        Err(IndexError::Io(source)) => Err(os("write", dir, INDEX, source)),
    }
}

fn os(operation: &'static str, dir: &Path, name: &str, source: io::Error) -> LayerError {
    LayerError::Os { operation, entry: dir.join(name).display().to_string(), source }
}

/// Writes to a file, if there is one, what is read of the archive.
struct Keeping<'a> {
    chunks: Chunks,
    keep: Option<Keep<'a>>,
    writeback: Option<Writeback>,
    /// Bytes of the current chunk that are written and not consumed.
    kept: usize,
    length: u64,
    /// Whether all that the archive describes has been read.
    ended: bool,
    failure: Option<io::Error>,
}

impl BufRead for Keeping<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let data = self.chunks.fill_buf()?;
        if self.kept == 0 && !data.is_empty() {
            self.kept = data.len();
            // Zeros after the end of the archive become a hole: they belong to its digest, and take no space.
            let hole = self.ended && data.iter().all(|&byte| byte == 0);
            if !hole
                && let Some(keep) = self.keep
                && let Err(error) = keep.file.write_all_at(data, self.length)
            {
                let kind = error.kind();
                self.failure = Some(error);
                return Err(kind.into());
            }
            self.length += data.len() as u64;
            if let (Some(keep), Some(writeback)) = (self.keep, &mut self.writeback) {
                writeback.reached(keep.file, self.length);
            }
        }
        Ok(data)
    }

    fn consume(&mut self, n: usize) {
        self.chunks.consume(n);
        self.kept -= n;
    }
}

impl Read for Keeping<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let n = available.len().min(buf.len());
        buf[..n].copy_from_slice(&available[..n]);
        self.consume(n);
        Ok(n)
    }
}

/// A layer's tree under construction.
struct Model {
    tree: Tree,
    /// The directory of the last entry.
    last: (Vec<u8>, NodeId),
    size: u64,
    entries: u64,
    unfit: Option<&'static str>,
}

fn model(keeping: &mut Keeping<'_>) -> Result<Model> {
    let mut reader = Reader::new(&mut *keeping);
    let model = Model::read(&mut reader);
    let whatever = keeping.keep.is_some_and(|keep| keep.whatever);
    if model.is_err() && !whatever {
        return model;
    }
    keeping.ended = model.as_ref().is_ok_and(|model| model.unfit.is_none());
    // What is left is read for its digest.
    io::copy(keeping, &mut io::sink()).map_err(LayerError::Read)?;
    model
}

/// The tree a layer's archive (compressed or not) describes; `None` of one too large to be held in memory.
pub(crate) fn tree_of(reader: impl Read) -> Result<Option<Tree>> {
    let decoded = compress::decode(reader).map_err(LayerError::Read)?;
    let model = Model::read(&mut Reader::new(io::BufReader::with_capacity(1 << 17, decoded)))?;
    Ok(model.unfit.is_none().then_some(model.tree))
}

impl Model {
    /// Reads entries up to the end of the archive, or until there are too many.
    fn read<R: BufRead>(reader: &mut Reader<R>) -> Result<Self> {
        let mut model =
            Self { tree: Tree::new(), last: (Vec::new(), Tree::ROOT), size: 0, entries: 0, unfit: None };
        let mut entry = Entry::default();
        let mut path = Vec::new();
        while reader.next(&mut entry)? {
            model.entries += 1;
            normalise(&entry.path, &mut path)
                .map_err(|problem| LayerError::Entry { entry: shortened(&entry.path), problem })?;
            model.entry(&entry, &path, reader.position())?;
            if model.tree.len() > NODES_MAX || model.tree.text() > TEXT_MAX {
                model.unfit = Some("it has more entries than an index is made for");
                model.tree = Tree::new();
                break;
            }
        }
        Ok(model)
    }

    fn entry(&mut self, entry: &Entry, path: &[u8], position: u64) -> Result<()> {
        let mut attributes = Attributes {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: Vec::new(),
        };
        for (name, value) in wanted(&entry.xattrs) {
            if std::str::from_utf8(name).is_err() {
                return Err(refuse(path, "the name of an extended attribute is not UTF-8"));
            }
            if name == b"system.posix_acl_access"
                && let Some(permissions) = permissions_of(value)
            {
                // As the kernel does when a file is given the list.
                attributes.mode = attributes.mode & !0o777 | permissions;
            }
            attributes.xattrs.push((name.to_vec(), value.to_vec()));
        }
        if path.is_empty() {
            if entry.kind != Kind::Directory {
                return Err(refuse(&entry.path, "the layer's root can only be a directory"));
            }
            self.describe(Tree::ROOT, attributes);
            return Ok(());
        }
        let (parent_path, name) = split(path);
        if name.starts_with(WHITEOUT) || parent_path.split(|&b| b == b'/').any(|c| c.starts_with(MARK)) {
            return self.whiteout(entry, path);
        }
        let parent = self.directory(parent_path, entry)?;
        let content = match entry.kind {
            Kind::Directory => {
                match self.tree.child(parent, name) {
                    Some(there) if self.tree.is_directory(there) => self.describe(there, attributes),
                    there => {
                        let hides = there.is_some_and(|there| self.tree.is_whiteout(there));
                        let made = self.insert(parent, name, Content::directory(), attributes);
                        if hides {
                            self.tree.set_opaque(made);
                        }
                    }
                }
                return Ok(());
            }
            Kind::File => {
                self.size += entry.size;
                let sparse = entry.sparse.clone().map(Vec::into_boxed_slice);
                Content::File(Data { start: position, size: entry.size, sparse })
            }
            Kind::HardLink => return self.hard_link(entry, path, parent, name),
            Kind::Symlink => {
                if entry.link.is_empty() {
                    return Err(refuse(path, "a symbolic link to nothing"));
                }
                if entry.link.len() > LINK_MAX {
                    return Err(refuse(path, "a symbolic link to a path longer than the kernel takes"));
                }
                attributes.mode = 0o777;
                Content::Symlink(entry.link.clone().into_boxed_slice())
            }
            Kind::CharDevice => Content::CharDevice(entry.device.0, entry.device.1),
            Kind::BlockDevice => Content::BlockDevice(entry.device.0, entry.device.1),
            Kind::Fifo => Content::Fifo,
        };
        self.insert(parent, name, content, attributes);
        Ok(())
    }

    /// A directory's attributes: those of its last entry, with extended attributes of all.
    fn describe(&mut self, id: NodeId, attributes: Attributes) {
        let node = self.tree.node_mut(id);
        let mut xattrs = std::mem::take(&mut node.attributes.xattrs);
        for (name, value) in attributes.xattrs {
            xattrs.retain(|(known, _)| *known != name);
            xattrs.push((name, value));
        }
        node.attributes = Attributes { xattrs, ..attributes };
    }

    /// The later of two entries of one name wins.
    fn insert(&mut self, parent: NodeId, name: &[u8], content: Content, attributes: Attributes) -> NodeId {
        match self.tree.insert(parent, name, content, attributes) {
            erofs::Inserted::New(id) => id,
            erofs::Inserted::Replaced(id) => {
                self.forget();
                id
            }
        }
    }

    /// The directory remembered may be about to go.
    fn forget(&mut self) {
        self.last = (Vec::new(), Tree::ROOT);
    }

    /// The directory `path` if it is there.
    fn existing(&self, path: &[u8]) -> std::result::Result<Option<NodeId>, &'static str> {
        let mut at = Tree::ROOT;
        let mut components = path.split(|&b| b == b'/').filter(|component| !component.is_empty()).peekable();
        while let Some(component) = components.next() {
            let Some(child) = self.tree.child(at, component) else { return Ok(None) };
            match &self.tree.node(child).content {
                Content::Directory { .. } => at = child,
                Content::Symlink(_) if components.peek().is_some() => {
                    return Err("which leads through a symbolic link");
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// The directory `path`, made with what is above it if need be.
    fn directory(&mut self, path: &[u8], entry: &Entry) -> Result<NodeId> {
        if self.last.0 == path {
            return Ok(self.last.1);
        }
        let mut at = Tree::ROOT;
        for component in path.split(|&b| b == b'/').filter(|component| !component.is_empty()) {
            let there = self.tree.child(at, component);
            let hides = match there {
                Some(child) => match &self.tree.node(child).content {
                    Content::Directory { .. } => {
                        at = child;
                        continue;
                    }
                    Content::CharDevice(0, 0) => true,
                    Content::Symlink(_) => {
                        return Err(refuse(path, "the path leads through a symbolic link"));
                    }
                    _ => {
                        return Err(refuse(path, "the path leads through something that is not a directory"));
                    }
                },
                None => false,
            };
            let attributes = Attributes { mode: 0o755, mtime: entry.mtime, ..Attributes::default() };
            let made = self.insert(at, component, Content::directory(), attributes);
            if hides {
                self.tree.set_opaque(made);
            }
            at = made;
        }
        self.last = (path.to_vec(), at);
        Ok(at)
    }

    fn hard_link(&mut self, entry: &Entry, path: &[u8], parent: NodeId, name: &[u8]) -> Result<()> {
        let mut source = Vec::new();
        let target = || lossy(&entry.link);
        normalise(&entry.link, &mut source)
            .map_err(|problem| refuse(path, &format!("hard link to {:?}: {problem}", target())))?;
        if source == path {
            return Ok(());
        }
        let missing = || refuse(path, &format!("hard link to {:?}, which is not in this layer", target()));
        if source.is_empty() {
            return Err(missing());
        }
        let (source_parent, source_name) = split(&source);
        let node = match self.existing(source_parent) {
            Ok(found) => found.and_then(|parent| self.tree.child(parent, source_name)),
            Err(problem) => return Err(refuse(path, &format!("hard link to {:?}, {problem}", target()))),
        };
        let node = node.ok_or_else(missing)?;
        if self.tree.is_directory(node) {
            return Err(refuse(path, &format!("hard link to {:?}, which is a directory", target())));
        }
        // What goes must not contain what is to be linked.
        if source.starts_with(path) && source.get(path.len()) == Some(&b'/') {
            return Err(refuse(path, &format!("hard link to {:?}, which is below itself", target())));
        }
        if let erofs::Inserted::Replaced(_) = self.tree.link(parent, name, node) {
            self.forget();
        }
        Ok(())
    }

    /// An entry whose name says that something of lower layers is hidden.
    fn whiteout(&mut self, entry: &Entry, path: &[u8]) -> Result<()> {
        let (parent_path, name) = split(path);
        let in_mark = parent_path.split(|&b| b == b'/').any(|c| c.starts_with(MARK));
        if name == OPAQUE && !in_mark {
            let parent = self.directory(parent_path, entry)?;
            self.tree.set_opaque(parent);
            return Ok(());
        }
        if name.starts_with(MARK) || in_mark {
            // Marks of storage drivers long gone.
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(refuse(path, "a whiteout of nothing that can be hidden"));
        }
        let parent = self.directory(parent_path, entry)?;
        match self.tree.child(parent, hidden) {
            // The layer has the name itself; a whiteout speaks of lower layers only.
            Some(there) => self.tree.set_opaque(there),
            None => drop(self.insert(parent, hidden, Content::WHITEOUT, Attributes::default())),
        }
        Ok(())
    }
}

/// The mode's nine bits that an access list stands for, where there is a mask that instead of the group's: version and
/// entries of tag, permissions and id, little endian (`linux/posix_acl_xattr.h`).
fn permissions_of(list: &[u8]) -> Option<u32> {
    let entries = list.strip_prefix(&2u32.to_le_bytes())?;
    let find = |wanted: u16| {
        entries
            .chunks_exact(8)
            .find(|entry| entry[..2] == wanted.to_le_bytes())
            .map(|entry| u32::from(entry[2] & 7))
    };
    let (owner, group, mask, others) = (find(0x01)?, find(0x04)?, find(0x10), find(0x20)?);
    Some(owner << 6 | mask.unwrap_or(group) << 3 | others)
}
