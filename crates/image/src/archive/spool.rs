//! The members of an archive being loaded: small ones in memory, large ones in a directory of the store's `tmp/`.
//!
//! Memory is bounded whatever the archive holds. A member that names its digest is checked as it is read.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, Read as _, Write as _};
use std::path::PathBuf;

use crate::compress::Compression;
use crate::content::DOCUMENT_MAX;
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, IoContext as _, Result};
use crate::lease::Lease;
use crate::store::Store;
use crate::tar::{Entry, Kind, Reader, TarError};
use crate::temp::TempDir;

/// Members up to this size stay in memory…
const SMALL: u64 = 256 << 10;
/// … until they take this much together.
const MEMORY: u64 = 32 << 20;
const MEMBERS_MAX: usize = 100_000;
const LINKS_MAX: usize = 16;

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
pub(super) struct Spool {
    nodes: HashMap<String, Node>,
    dir: TempDir,
    store: Store,
}

impl Spool {
    /// Reads the whole archive. `seen` is told how far it is, in bytes.
    pub fn read(
        store: &Store,
        lease: &Lease,
        input: impl BufRead,
        seen: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        let mut spool = Self {
            nodes: HashMap::new(),
            dir: TempDir::create(store.content().tmp(), "load")?,
            store: store.clone(),
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
        let mut hasher = expected.as_ref().map_or(Algorithm::Sha256, Digest::algorithm).hasher();
        let mut head = Vec::with_capacity(8);
        let mut place = if size <= SMALL && *memory + size <= MEMORY {
            *memory += size;
            Place::Memory(Vec::with_capacity(size as usize))
        } else {
            let known = match &expected {
                Some(digest) => {
                    lease.hold(digest)?;
                    self.store.content().has(digest)
                }
                None => false,
            };
            if known { Place::Store } else { Place::File(self.dir.path().join(self.nodes.len().to_string())) }
        };
        let mut file = match &place {
            Place::File(path) => Some(File::create_new(path).at("create", path)?),
            _ => None,
        };
        let mut reported = 0;
        loop {
            let data = reader.data().map_err(|error| match error {
                TarError::Truncated { .. } => {
                    Error::Archive(format!("the archive ends early, within member {name}"))
                }
                error => broken(error),
            })?;
            if data.is_empty() {
                break;
            }
            hasher.update(data);
            if head.len() < 8 {
                head.extend_from_slice(&data[..data.len().min(8 - head.len())]);
            }
            match (&mut place, &mut file) {
                (Place::Memory(bytes), _) => bytes.extend_from_slice(data),
                (Place::File(path), Some(file)) => file.write_all(data).at("write", &*path)?,
                _ => {}
            }
            let n = data.len();
            reader.consume(n);
            reported += n;
            if reported >= 1 << 20 {
                reported = 0;
                seen(reader.position());
            }
        }
        let digest = hasher.finish();
        if let Some(expected) = expected
            && expected != digest
        {
            return Err(Error::Archive(format!("member {name} is corrupt: its data has digest {digest}")));
        }
        Ok(Member { digest, size, compression: Compression::of(&head), place })
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
            Place::File(path) => {
                let file = File::open(path).at("open", path)?;
                file.sync_all().at("sync", path)?;
                let target = content.path(&member.digest);
                let parent = target.parent().unwrap_or(self.store.root());
                fs::create_dir_all(parent).at("create", parent)?;
                // Linked rather than moved: several images of one archive may refer to the member.
                match fs::hard_link(path, &target) {
                    Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                        return Err(error).at("link", target);
                    }
                    _ => {}
                }
                crate::temp::sync_parent(&target)
            }
        }
    }

    /// The member's bytes as a stream.
    pub fn open<'a>(&self, member: &'a Member) -> Result<Box<dyn std::io::Read + Send + 'a>> {
        Ok(match &member.place {
            Place::Memory(bytes) => Box::new(&bytes[..]),
            Place::File(path) => Box::new(File::open(path).at("open", path)?),
            Place::Store => Box::new(self.store.content().open(&member.digest)?),
        })
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
