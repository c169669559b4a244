//! The content store: blobs by digest, as in an OCI image layout's `blobs/`.
//!
//! Invariant: what stands under `blobs/` is complete, durable, and has the digest its name says.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::digest::{Algorithm, Digest, Hasher};
use crate::error::{Error, IoContext as _, Result};
use crate::lease::Lease;
use crate::temp::{PARTIAL, TempFile};

/// Largest document (manifest, index, configuration) that is read into memory.
pub const DOCUMENT_MAX: u64 = 16 << 20;

/// Blobs by digest.
#[derive(Clone, Debug)]
pub struct Content {
    blobs: PathBuf,
    tmp: PathBuf,
}

impl Content {
    pub(crate) fn new(root: &Path) -> Self {
        Self { blobs: root.join("blobs"), tmp: root.join("tmp") }
    }

    /// Where the blob is, or would be.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.algorithm().as_str()).join(digest.hex())
    }

    pub fn has(&self, digest: &Digest) -> bool {
        self.path(digest).exists()
    }

    pub fn size(&self, digest: &Digest) -> Result<u64> {
        let path = self.path(digest);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::NoSuchContent(digest.clone()))
            }
            Err(error) => Err(error).at("stat", path),
        }
    }

    pub fn open(&self, digest: &Digest) -> Result<File> {
        let path = self.path(digest);
        match File::open(&path) {
            Ok(file) => Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::NoSuchContent(digest.clone()))
            }
            Err(error) => Err(error).at("open", path),
        }
    }

    /// The whole of a document, checked against its digest.
    pub fn read(&self, digest: &Digest) -> Result<Vec<u8>> {
        let size = self.size(digest)?;
        if size > DOCUMENT_MAX {
            return Err(Error::Invalid(format!(
                "content {digest} is {size} bytes long: a document may have {DOCUMENT_MAX}"
            )));
        }
        let mut raw = Vec::with_capacity(size as usize);
        self.open(digest)?.read_to_end(&mut raw).at("read", self.path(digest))?;
        let actual = Digest::of(digest.algorithm(), &raw);
        if actual != *digest {
            return Err(Error::DigestMismatch { expected: digest.clone(), actual });
        }
        Ok(raw)
    }

    /// Starts writing content whose digest is known. Dropped before [`Ingest::commit`], it leaves nothing.
    pub fn ingest(&self, lease: &Lease, digest: &Digest, size: Option<u64>) -> Result<Ingest> {
        lease.hold(digest)?;
        let temp = TempFile::create(&self.tmp, "ingest")?;
        Ok(Ingest::new(self, temp, digest.algorithm(), Some(digest.clone()), size))
    }

    /// Starts writing content whose digest is known only at the end.
    pub fn ingest_unnamed(&self, lease: &Lease) -> Result<Ingest> {
        let temp = TempFile::create(&self.tmp, "ingest")?;
        let mut ingest = Ingest::new(self, temp, Algorithm::Sha256, None, None);
        ingest.lease = Some(lease.clone());
        Ok(ingest)
    }

    /// Like [`Self::ingest`], but dropped before the commit (or killed) it leaves what it has for the next attempt.
    /// [`Ingest::offset`] tells how many bytes an earlier attempt left. When another writer is at the same content,
    /// this one starts from nothing.
    pub fn resume(&self, lease: &Lease, digest: &Digest, size: Option<u64>) -> Result<Ingest> {
        let name = format!("{PARTIAL}{}-{}", digest.algorithm().as_str(), digest.hex());
        let Some(mut temp) = TempFile::claim(&self.tmp, &name)? else {
            return self.ingest(lease, digest, size);
        };
        lease.hold(digest)?;
        temp.keep(true);
        let path = temp.path().to_owned();
        let mut ingest = Ingest::new(self, temp, digest.algorithm(), Some(digest.clone()), size);
        let mut buffer = vec![0; 1 << 17];
        ingest.temp.file_mut().seek(SeekFrom::Start(0)).at("seek", &path)?;
        loop {
            let n = ingest.temp.file_mut().read(&mut buffer).at("read", &path)?;
            if n == 0 {
                break;
            }
            ingest.hasher.update(&buffer[..n]);
            ingest.bytes += n as u64;
        }
        if size.is_some_and(|size| ingest.bytes > size) {
            ingest.restart()?;
        }
        Ok(ingest)
    }

    /// Stores a small document; returns its digest.
    pub fn put(&self, lease: &Lease, raw: &[u8]) -> Result<Digest> {
        let digest = Digest::sha256(raw);
        self.put_as(lease, &digest, raw)?;
        Ok(digest)
    }

    /// Stores a small document that is expected to have this digest.
    pub fn put_as(&self, lease: &Lease, digest: &Digest, raw: &[u8]) -> Result<()> {
        lease.hold(digest)?;
        let actual = Digest::of(digest.algorithm(), raw);
        if actual != *digest {
            return Err(Error::DigestMismatch { expected: digest.clone(), actual });
        }
        if self.has(digest) {
            return Ok(());
        }
        let mut temp = TempFile::create(&self.tmp, "ingest")?;
        let path = temp.path().to_owned();
        temp.file_mut().write_all(raw).at("write", path)?;
        self.publish(temp, digest)
    }

    pub(crate) fn publish(&self, temp: TempFile, digest: &Digest) -> Result<()> {
        if self.has(digest) {
            return Ok(());
        }
        let path = self.path(digest);
        if let Some(parent) = path.parent()
            && !parent.exists()
        {
            fs::create_dir_all(parent).at("create", parent)?;
        }
        temp.publish(&path)
    }

    pub(crate) fn tmp(&self) -> &Path {
        &self.tmp
    }

    /// Gives a finished file, whose digest is known, its name as content: durable before it is visible. It is linked
    /// rather than moved. Returns its size.
    pub(crate) fn take(&self, lease: &Lease, digest: &Digest, path: &Path) -> Result<u64> {
        lease.hold(digest)?;
        let file = File::open(path).at("open", path)?;
        let size = file.metadata().at("stat", path)?.len();
        if self.has(digest) {
            return Ok(size);
        }
        file.sync_all().at("sync", path)?;
        let target = self.path(digest);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).at("create", parent)?;
        }
        match fs::hard_link(path, &target) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).at("link", target);
            }
            _ => {}
        }
        crate::temp::sync_parent(&target)?;
        Ok(size)
    }

    /// Takes a file that is the content for good, durable before it is visible. `None` where a file cannot have two
    /// names.
    pub(crate) fn link(&self, lease: &Lease, digest: &Digest, file: &Path) -> Result<Option<u64>> {
        lease.hold(digest)?;
        let mut source = File::open(file).at("open", file)?;
        let mut hasher = digest.algorithm().hasher();
        let mut buffer = vec![0; 1 << 17];
        let mut size = 0;
        loop {
            let n = source.read(&mut buffer).at("read", file)?;
            if n == 0 {
                break;
            }
            hasher.update(&buffer[..n]);
            size += n as u64;
        }
        let actual = hasher.finish();
        if actual != *digest {
            return Err(Error::DigestMismatch { expected: digest.clone(), actual });
        }
        source.sync_all().at("sync", file)?;
        let path = self.path(digest);
        match fs::hard_link(file, &path) {
            Ok(()) => crate::temp::sync_parent(&path).map(|()| Some(size)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Some(size)),
            Err(_) => Ok(None),
        }
    }

    /// Returns the bytes that are given back: none while a layer has the same file.
    pub(crate) fn remove(&self, digest: &Digest) -> Result<u64> {
        let path = self.path(digest);
        let size = match fs::metadata(&path) {
            Ok(metadata) if metadata.nlink() > 1 => 0,
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(error).at("stat", path),
        };
        match fs::remove_file(&path) {
            Ok(()) => Ok(size),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error).at("remove", path),
        }
    }

    /// Bytes of downloads that were broken off and wait to be taken up again.
    pub(crate) fn partial_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for path in self.partials()? {
            // Finished or taken up meanwhile.
            bytes += fs::metadata(&path).map_or(0, |metadata| metadata.len().next_multiple_of(4096));
        }
        Ok(bytes)
    }

    /// Gives up downloads that were broken off and that nobody is at; returns the bytes given back.
    pub(crate) fn drop_partials(&self) -> Result<u64> {
        let mut bytes = 0;
        for path in self.partials()? {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if let Some(partial) = TempFile::claim(&self.tmp, name)? {
                bytes +=
                    partial.file().metadata().map_or(0, |metadata| metadata.len().next_multiple_of(4096));
            }
        }
        Ok(bytes)
    }

    fn partials(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.tmp).at("read", &self.tmp)? {
            let entry = entry.at("read", &self.tmp)?;
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(PARTIAL)) {
                found.push(entry.path());
            }
        }
        Ok(found)
    }

    /// Every blob there is.
    pub fn walk(&self) -> Result<Vec<Digest>> {
        let mut found = Vec::new();
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let dir = self.blobs.join(algorithm.as_str());
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).at("read", dir),
            };
            for entry in entries {
                let entry = entry.at("read", &dir)?;
                if let Some(Ok(digest)) =
                    entry.file_name().to_str().map(|hex| Digest::from_hex(algorithm, hex))
                {
                    found.push(digest);
                }
            }
        }
        Ok(found)
    }
}

/// Content being written. Nothing of it is visible before [`Self::commit`].
#[derive(Debug)]
pub struct Ingest {
    content: Content,
    temp: TempFile,
    hasher: Hasher,
    algorithm: Algorithm,
    bytes: u64,
    expected: Option<Digest>,
    size: Option<u64>,
    lease: Option<Lease>,
}

impl Ingest {
    fn new(
        content: &Content,
        temp: TempFile,
        algorithm: Algorithm,
        expected: Option<Digest>,
        size: Option<u64>,
    ) -> Self {
        let content = content.clone();
        Self { content, temp, hasher: algorithm.hasher(), algorithm, bytes: 0, expected, size, lease: None }
    }

    /// Bytes written so far, those of an earlier attempt included.
    pub fn offset(&self) -> u64 {
        self.bytes
    }

    /// Forgets what was written.
    pub fn restart(&mut self) -> Result<()> {
        let path = self.temp.path().to_owned();
        self.temp.file().set_len(0).at("truncate", &path)?;
        self.temp.file_mut().seek(SeekFrom::Start(0)).at("seek", &path)?;
        self.hasher = self.algorithm.hasher();
        self.bytes = 0;
        Ok(())
    }

    /// Leaves nothing, not even for a later attempt.
    pub fn discard(mut self) {
        self.temp.keep(false);
    }

    /// What was written so far, to be read from another place while more is being written.
    pub fn reopen(&self) -> Result<File> {
        File::open(self.temp.path()).at("open", self.temp.path())
    }

    /// Checks size and digest, makes the content durable, then visible. Wrong content is discarded.
    pub fn commit(mut self) -> Result<Digest> {
        let actual = self.hasher.finish();
        if let Some(expected) = &self.expected {
            if let Some(size) = self.size
                && size != self.bytes
            {
                // Fewer bytes than expected are still good for a later attempt.
                if self.bytes > size {
                    self.temp.keep(false);
                }
                return Err(Error::SizeMismatch {
                    digest: expected.clone(),
                    expected: size,
                    actual: self.bytes,
                });
            }
            if *expected != actual {
                self.temp.keep(false);
                return Err(Error::DigestMismatch { expected: expected.clone(), actual });
            }
        }
        if let Some(lease) = &self.lease {
            lease.hold(&actual)?;
        }
        self.temp.keep(false);
        self.content.publish(self.temp, &actual)?;
        Ok(actual)
    }
}

impl Write for Ingest {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if let Some(size) = self.size
            && self.bytes + buf.len() as u64 > size
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("more data than the {size} bytes expected"),
            ));
        }
        let n = self.temp.file_mut().write(buf)?;
        self.hasher.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
