//! The members of an archive being loaded: small ones in memory, large ones in a directory of the store's `tmp/`.
//!
//! Memory is bounded whatever the archive holds. A member that names its digest is checked as it is read. What looks like
//! a layer is hashed, written and unpacked in one go; see [`super::unpacking`] for who decides what it was.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, Read as _, Write as _};
use std::path::PathBuf;

use super::foresight::Foresight;
use super::unpacking::Unpacking;
use crate::compress::Compression;
use crate::content::DOCUMENT_MAX;
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, IoContext as _, Result};
use crate::lease::Lease;
use crate::snapshot::Storage;
use crate::store::Store;
use crate::tar::{self, Entry, Kind, Reader, TarError};
use crate::temp::{TempDir, Writeback};

/// Members up to this size stay in memory…
const SMALL: u64 = 256 << 10;
/// … until they take this much together.
const MEMORY: u64 = 32 << 20;
const MEMBERS_MAX: usize = 100_000;
const LINKS_MAX: usize = 16;
/// Bytes between two words of how far it is.
const REPORT_STEP: usize = 1 << 20;

/// Where a member's bytes are.
#[derive(Debug)]
enum Place {
    Memory(Vec<u8>),
    File(PathBuf),
    /// The store has the same content.
    Store,
}

/// A regular file of the archive.
#[derive(Debug)]
pub(super) struct Member {
    /// By the algorithm of the name, sha256 when the name tells none.
    pub digest: Digest,
    pub size: u64,
    pub compression: Compression,
    place: Place,
}

#[derive(Debug)]
enum Node {
    File(Member),
    /// Another member, by its plain path.
    Link(String),
}

/// All members of an archive.
pub(super) struct Spool<'a> {
    nodes: HashMap<String, Node>,
    dir: TempDir,
    store: Store,
    unpacking: &'a Unpacking<'a>,
    foresight: Foresight,
}

impl<'a> Spool<'a> {
    /// Reads the whole archive. `seen` is told how far it is, in bytes.
    pub fn read(
        store: &Store,
        lease: &Lease,
        unpacking: &'a Unpacking<'a>,
        foresight: Foresight,
        input: impl BufRead,
        seen: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        let mut spool = Self {
            nodes: HashMap::new(),
            dir: TempDir::create(store.content().tmp(), "load")?,
            store: store.clone(),
            unpacking,
            foresight,
        };
        let mut reader = Reader::new(input);
        let mut entry = Entry::default();
        let mut memory = 0;
        while reader.next(&mut entry).map_err(broken)? {
            let name = plain(&entry.path)?;
            let node = match entry.kind {
                Kind::File if entry.sparse.is_some() => {
                    return Err(Error::Archive(format!("member {name} is sparse")));
                }
                Kind::File => {
                    Node::File(spool.member(lease, &name, entry.stored, &mut reader, &mut memory, seen)?)
                }
                Kind::Symlink => Node::Link(relative(&name, &plain_link(&entry.link)?)),
                Kind::HardLink => Node::Link(plain(&entry.link)?),
                Kind::Directory => continue,
                _ => return Err(Error::Archive(format!("member {name} is neither a file nor a link"))),
            };
            if spool.nodes.len() >= MEMBERS_MAX {
                return Err(Error::Archive(format!("more than {MEMBERS_MAX} members")));
            }
            if let Node::File(Member { place: Place::Memory(raw), digest, .. }) = &node {
                spool.foresight.note(digest, raw);
            }
            spool.nodes.insert(name, node);
            seen(reader.position());
        }
        reader.drain().map_err(broken)?;
        Ok(spool)
    }

    fn member(
        &self,
        lease: &Lease,
        name: &str,
        size: u64,
        reader: &mut Reader<impl BufRead>,
        memory: &mut u64,
        seen: &mut dyn FnMut(u64),
    ) -> Result<Member> {
        let expected = named_digest(name);
        let algorithm = expected.as_ref().map_or(Algorithm::Sha256, Digest::algorithm);
        let mut source = Source::new(reader, seen);
        let read = if size <= SMALL && *memory + size <= MEMORY {
            *memory += size;
            in_memory(&mut source, size, algorithm)
        } else {
            self.in_file(lease, expected.as_ref(), algorithm, &mut source)
        };
        match source.failure {
            Some(TarError::Truncated { .. }) => {
                return Err(Error::Archive(format!("the archive ends early, within member {name}")));
            }
            Some(error) => return Err(broken(error)),
            None => {}
        }
        let (digest, place) = read?;
        if let Some(expected) = expected
            && expected != digest
        {
            return Err(Error::Archive(format!("member {name} is corrupt: its data has digest {digest}")));
        }
        Ok(Member { digest, size, compression: Compression::of(&source.head), place })
    }

    /// Brings a member to the disk. What looks like a layer is made one meanwhile.
    fn in_file(
        &self,
        lease: &Lease,
        expected: Option<&Digest>,
        algorithm: Algorithm,
        source: &mut Source<'_, impl BufRead>,
    ) -> Result<(Digest, Place)> {
        let mut hasher = algorithm.hasher();
        // Or not wanted, as it seems.
        let mut is_layer_known = false;
        if let Some(digest) = expected {
            lease.hold(digest)?;
            if self.store.content().has(digest) {
                source.each(|data| {
                    hasher.update(data);
                    Ok(())
                })?;
                return Ok((hasher.finish(), Place::Store));
            }
            is_layer_known = self.store.layer(digest)?.is_some() || self.foresight.is_foreign(digest);
        }
        let path = self.dir.path().join(self.nodes.len().to_string());
        let compressed = Compression::of(&source.head) != Compression::None;
        let is_layer = !is_layer_known && (compressed || tar::is_header(&source.head));
        if is_layer && !compressed && self.store.storage() == Storage::Erofs {
            let kept = self.unpacking.layers().keep(source, algorithm, &path)?;
            if let Some(unindexed) = kept.unindexed {
                self.unpacking.index(unindexed);
            }
            return Ok((kept.digest, Place::File(path)));
        }
        let mut file = File::create_new(&path).at("create", &path)?;
        let coming = is_layer.then(|| self.unpacking.follow(&path, compressed));
        let (mut writeback, mut length) = (Writeback::default(), 0);
        source.each(|data| {
            hasher.update(data);
            file.write_all(data).at("write", &path)?;
            length += data.len() as u64;
            writeback.reached(&file, length);
            if let Some(coming) = &coming {
                coming.reached(length);
            }
            Ok(())
        })?;
        let digest = hasher.finish();
        if let Some(coming) = coming {
            coming.end(&digest);
        }
        Ok((digest, Place::File(path)))
    }

    /// A member by its path, links followed.
    pub fn get(&self, path: &str) -> Result<Option<&Member>> {
        let mut at = plain(path.as_bytes())?;
        for _ in 0..LINKS_MAX {
            match self.nodes.get(&at) {
                None => return Ok(None),
                Some(Node::File(member)) => return Ok(Some(member)),
                Some(Node::Link(target)) => at.clone_from(target),
            }
        }
        Err(Error::Archive(format!("member {path} is a link that leads in circles")))
    }

    /// A member that has to be there.
    pub fn require(&self, path: &str) -> Result<&Member> {
        self.get(path)?.ok_or_else(|| Error::Archive(format!("member {path} is missing")))
    }

    /// A document's bytes.
    pub fn document(&self, path: &str, member: &Member) -> Result<Vec<u8>> {
        if member.size > DOCUMENT_MAX {
            return Err(Error::Archive(format!(
                "member {path} is too large for a document: {} bytes",
                member.size
            )));
        }
        match &member.place {
            Place::Memory(bytes) => Ok(bytes.clone()),
            Place::Store => self.store.content().read(&member.digest),
            Place::File(path) => {
                let mut bytes = Vec::new();
                File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).at("read", path)?;
                Ok(bytes)
            }
        }
    }

    /// Puts the member into the content store under its own digest.
    pub fn publish(&self, lease: &Lease, member: &Member) -> Result<()> {
        let content = self.store.content();
        lease.hold(&member.digest)?;
        if content.has(&member.digest) {
            return Ok(());
        }
        match &member.place {
            Place::Memory(bytes) => content.put_as(lease, &member.digest, bytes),
            Place::Store => Err(Error::NoSuchContent(member.digest.clone())),
            // Several images of one archive may refer to the member.
            Place::File(path) => content.take(lease, &member.digest, path).map(drop),
        }
    }

    /// The member's bytes as a stream.
    pub fn open<'m>(&self, member: &'m Member) -> Result<Box<dyn io::Read + Send + 'm>> {
        Ok(match &member.place {
            Place::Memory(bytes) => Box::new(&bytes[..]),
            Place::File(path) => Box::new(File::open(path).at("open", path)?),
            Place::Store => Box::new(self.store.content().open(&member.digest)?),
        })
    }
}

fn in_memory(
    source: &mut Source<'_, impl BufRead>,
    size: u64,
    algorithm: Algorithm,
) -> Result<(Digest, Place)> {
    let mut bytes = Vec::with_capacity(size as usize);
    source.read_to_end(&mut bytes).map_err(Error::ArchiveRead)?;
    Ok((Digest::of(algorithm, &bytes), Place::Memory(bytes)))
}

/// The data of the archive's current member, from its first byte on.
struct Source<'a, R> {
    reader: &'a mut Reader<R>,
    seen: &'a mut dyn FnMut(u64),
    /// The first bytes, as many as tell what it is.
    head: Vec<u8>,
    /// How many of them have been read.
    at: usize,
    unreported: usize,
    failure: Option<TarError>,
}

impl<'a, R: BufRead> Source<'a, R> {
    fn new(reader: &'a mut Reader<R>, seen: &'a mut dyn FnMut(u64)) -> Self {
        let mut head = Vec::with_capacity(tar::BLOCK);
        let failure = loop {
            let data = match reader.data() {
                Ok(data) => data,
                Err(error) => break Some(error),
            };
            let n = data.len().min(tar::BLOCK - head.len());
            if n == 0 {
                break None;
            }
            head.extend_from_slice(&data[..n]);
            reader.consume(n);
        };
        Self { reader, seen, head, at: 0, unreported: 0, failure }
    }

    /// Shows all there is to `take`.
    fn each(&mut self, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        loop {
            let data = self.fill_buf().map_err(Error::ArchiveRead)?;
            if data.is_empty() {
                return Ok(());
            }
            let n = data.len();
            take(data)?;
            self.consume(n);
        }
    }
}

impl<R: BufRead> BufRead for Source<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.failure.is_some() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if self.at < self.head.len() {
            return Ok(&self.head[self.at..]);
        }
        match self.reader.data() {
            Ok(data) => Ok(data),
            Err(error) => {
                self.failure = Some(error);
                Err(io::ErrorKind::UnexpectedEof.into())
            }
        }
    }

    fn consume(&mut self, n: usize) {
        if self.at < self.head.len() {
            self.at += n;
            return;
        }
        self.reader.consume(n);
        self.unreported += n;
        if self.unreported >= REPORT_STEP {
            self.unreported = 0;
            (self.seen)(self.reader.position());
        }
    }
}

impl<R: BufRead> io::Read for Source<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let n = available.len().min(buf.len());
        buf[..n].copy_from_slice(&available[..n]);
        self.consume(n);
        Ok(n)
    }
}

fn broken(error: TarError) -> Error {
    match error {
        TarError::Read(error) => Error::ArchiveRead(error),
        error => Error::Archive(error.to_string()),
    }
}

/// The digest that `blobs/<algorithm>/<hex>` states.
fn named_digest(name: &str) -> Option<Digest> {
    let (algorithm, hex) = name.strip_prefix("blobs/")?.split_once('/')?;
    format!("{algorithm}:{hex}").parse().ok()
}

/// A member's path without `./` and doubled slashes; one that climbs is refused.
fn plain(path: &[u8]) -> Result<String> {
    let bad = |problem: &str| {
        let shown: String = String::from_utf8_lossy(path).chars().take(200).collect();
        Error::Archive(format!("member {shown:?} {problem}"))
    };
    let text = std::str::from_utf8(path).map_err(|_not_text| bad("has a name that is not UTF-8"))?;
    let parts: Vec<&str> = text.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    if parts.contains(&"..") {
        return Err(bad("climbs out of the archive"));
    }
    Ok(parts.join("/"))
}

fn plain_link(link: &[u8]) -> Result<String> {
    match std::str::from_utf8(link) {
        Ok(link) if !link.starts_with('/') => Ok(link.to_owned()),
        _ => Err(Error::Archive(format!("a link to {:?}", String::from_utf8_lossy(link)))),
    }
}

/// What a symbolic link of `member` leads to. What climbs too far leads to the top, where nothing of that name is.
fn relative(member: &str, link: &str) -> String {
    let mut parts: Vec<&str> = member.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_within_the_archive() {
        assert_eq!(relative("abc/layer.tar", "../def/layer.tar"), "def/layer.tar");
        assert_eq!(relative("layer.tar", "../../etc/passwd"), "etc/passwd");
        assert!(plain(b"../x").is_err());
        assert!(plain_link(b"/etc/passwd").is_err());
        assert_eq!(plain(b"./a//b").unwrap(), "a/b");
    }
}
