//! Files by name, in a directory or in a tar archive: read, and written.
//!
//! Invariants: an archive that was not finished is not there under its name; content is checked against its digest while
//! it is written; a name from inside an archive never becomes a path.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use brigantine_image::model::Descriptor;
use brigantine_image::{Digest, Hasher};
use tokio::io::AsyncReadExt as _;
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::Error;
use crate::blob::blocking;
use crate::client::MANIFEST_LIMIT;
use crate::upload::{Opener, pieces};

/// The most entries an archive may have.
const MOST_ENTRIES: usize = 200_000;

/// Files that can be read.
#[derive(Clone)]
pub(super) enum Files {
    Directory(PathBuf),
    Archive { path: PathBuf, file: Arc<File>, entries: Arc<HashMap<String, Entry>> },
}

pub(super) enum Entry {
    File { start: u64, size: u64 },
    Link(String),
}

fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let what = format!("{what} {}", path.display());
    move |source| Error::Io { what, source }
}

/// A name within an archive without `./` and `..`; `None` if it leads out of it.
fn normalised(path: &Path) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::ParentDir => {
                parts.pop()?;
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(parts.join("/"))
}

impl Files {
    pub async fn archive(path: &Path) -> Result<Self, Error> {
        let path = path.to_owned();
        blocking(move || {
            let file = File::open(&path).map_err(failed("open", &path))?;
            let mut file = unpacked(file).map_err(failed("read", &path))?;
            let entries = index(&mut file).map_err(failed("read the archive", &path))?;
            Ok(Self::Archive { path, file: Arc::new(file), entries: Arc::new(entries) })
        })
        .await?
    }

    /// Where the files are, for messages.
    pub fn shown(&self) -> String {
        match self {
            Self::Directory(path) | Self::Archive { path, .. } => path.display().to_string(),
        }
    }

    fn find(entries: &HashMap<String, Entry>, name: &str) -> Option<(u64, u64)> {
        let mut name = name.to_owned();
        for _ in 0..8 {
            match entries.get(&name)? {
                Entry::File { start, size } => return Some((*start, *size)),
                Entry::Link(target) => name = target.clone(),
            }
        }
        None
    }

    /// The file's size in bytes; `None` where there is no such file.
    pub fn size(&self, name: &str) -> Option<u64> {
        match self {
            Self::Directory(path) => fs::metadata(path.join(name)).ok().map(|metadata| metadata.len()),
            Self::Archive { entries, .. } => Self::find(entries, name).map(|(_, size)| size),
        }
    }

    /// A reader from byte `offset` on.
    pub fn open(&self, name: &str, offset: u64) -> io::Result<io::Take<Positioned>> {
        match self {
            Self::Directory(path) => {
                let file = File::open(path.join(name))?;
                let size = file.metadata()?.len();
                Ok(Positioned { file: Arc::new(file), position: offset }.take(size.saturating_sub(offset)))
            }
            Self::Archive { file, entries, .. } => {
                let (start, size) = Self::find(entries, name)
                    .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{name} is not in it")))?;
                let reader = Positioned { file: Arc::clone(file), position: start + offset };
                Ok(reader.take(size.saturating_sub(offset)))
            }
        }
    }

    /// The whole of a document.
    pub async fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let (files, name) = (self.clone(), name.to_owned());
        blocking(move || {
            let what = || format!("read {name} in {}", files.shown());
            if files.size(&name).is_some_and(|size| size > MANIFEST_LIMIT as u64) {
                return Err(Error::Invalid(format!(
                    "{name} in {} is larger than {MANIFEST_LIMIT} bytes",
                    files.shown()
                )));
            }
            let mut raw = Vec::new();
            let mut reader = files.open(&name, 0).map_err(|source| Error::Io { what: what(), source })?;
            reader.read_to_end(&mut raw).map_err(|source| Error::Io { what: what(), source })?;
            Ok(raw)
        })
        .await?
    }

    /// Opens a file that has to have `size` bytes.
    pub fn opener(&self, name: &str, size: u64) -> Opener {
        let (files, name) = (self.clone(), name.to_owned());
        Opener::new(move |offset| {
            let (files, name) = (files.clone(), name.clone());
            async move {
                let what = format!("read {name} in {}", files.shown());
                match files.size(&name) {
                    Some(actual) if actual != size => {
                        let said = format!("has {actual} bytes, not {size} as is said of it");
                        return Err(Error::protocol(format!("{name} in {}", files.shown()), said));
                    }
                    _ => {}
                }
                let file = match &files {
                    Files::Directory(path) => {
                        File::open(path.join(&name)).map(|file| (file, offset, u64::MAX))
                    }
                    Files::Archive { file, entries, .. } => {
                        let (start, size) = Files::find(entries, &name).unwrap_or((0, 0));
                        file.try_clone().map(|file| (file, start + offset, size.saturating_sub(offset)))
                    }
                };
                let opened = file.and_then(|(file, start, length)| {
                    // A description of its own: clones share their position.
                    let file = reopen(&file)?;
                    Ok((file, start, length))
                });
                let (mut file, start, length) = opened.map_err(|source| Error::Io { what, source })?;
                file.seek(SeekFrom::Start(start))
                    .map_err(|source| Error::Io { what: format!("read {name}"), source })?;
                Ok(pieces(tokio::fs::File::from_std(file).take(length)))
            }
        })
    }
}

/// Opens what a descriptor is of once more, whatever became of its name.
fn reopen(file: &File) -> io::Result<File> {
    use std::os::fd::AsRawFd as _;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Reads a shared file at a position of its own.
pub(super) struct Positioned {
    file: Arc<File>,
    position: u64,
}

impl Read for Positioned {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = std::os::unix::fs::FileExt::read_at(&*self.file, buf, self.position)?;
        self.position += n as u64;
        Ok(n)
    }
}

/// The archive itself, or its content where it is compressed as a whole.
fn unpacked(mut file: File) -> io::Result<File> {
    let mut magic = [0; 4];
    let n = file.read(&mut magic)?;
    file.seek(SeekFrom::Start(0))?;
    let mut reader: Box<dyn Read> = match decompressed(&magic[..n], file) {
        Ok(reader) => reader,
        Err(plain) => return Ok(plain),
    };
    let mut temp = tempfile::tempfile()?;
    io::copy(&mut reader, &mut temp)?;
    temp.seek(SeekFrom::Start(0))?;
    Ok(temp)
}

/// A decompressing reader, by the first bytes; the reader itself where it is not compressed.
pub(super) fn decompressed<R: Read + Send + 'static>(
    magic: &[u8],
    reader: R,
) -> Result<Box<dyn Read + Send>, R> {
    if magic.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(flate2::read::MultiGzDecoder::new(reader)));
    }
    if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        // Fails only for want of memory.
        if let Ok(decoder) = zstd::Decoder::new(reader) {
            return Ok(Box::new(decoder));
        }
        return Ok(Box::new(io::empty()));
    }
    Err(reader)
}

fn index(file: &mut File) -> io::Result<HashMap<String, Entry>> {
    let mut entries = HashMap::new();
    let mut archive = tar::Archive::new(file);
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        if entries.len() >= MOST_ENTRIES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it has too many entries"));
        }
        let path = entry.path()?.into_owned();
        let Some(name) = normalised(&path) else { continue };
        let kind = entry.header().entry_type();
        let entry = if kind.is_file() {
            Entry::File { start: entry.raw_file_position(), size: entry.size() }
        } else if kind.is_symlink() || kind.is_hard_link() {
            let Some(target) = entry.link_name()? else { continue };
            let base = if kind.is_symlink() { path.parent().unwrap_or(Path::new("")) } else { Path::new("") };
            let Some(target) = normalised(&base.join(target)) else { continue };
            Entry::Link(target)
        } else {
            continue;
        };
        entries.insert(name, entry);
    }
    Ok(entries)
}

/// Files that are written.
#[derive(Clone)]
pub(super) enum Out {
    Directory(PathBuf),
    Archive { path: PathBuf, builder: Arc<Mutex<Option<tar::Builder<tempfile::NamedTempFile>>>> },
}

impl Out {
    pub fn directory(path: &Path) -> Result<Self, Error> {
        fs::create_dir_all(path).map_err(failed("create", path))?;
        Ok(Self::Directory(path.to_owned()))
    }

    pub fn archive(path: &Path) -> Result<Self, Error> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temp = tempfile::Builder::new()
            .prefix(".brig-copy-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(parent)
            .map_err(failed("write into", parent))?;
        let builder = Arc::new(Mutex::new(Some(tar::Builder::new(temp))));
        Ok(Self::Archive { path: path.to_owned(), builder })
    }

    /// How many files it takes at once.
    pub fn at_once(&self) -> usize {
        match self {
            Self::Directory(_) => 4,
            Self::Archive { .. } => 1,
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Directory(path) | Self::Archive { path, .. } => path,
        }
    }

    /// Writes content that is named by its digest.
    pub async fn content(&self, name: &str, blob: &Descriptor, opener: &Opener) -> Result<(), Error> {
        if let Self::Directory(path) = self
            && fs::metadata(path.join(name)).is_ok_and(|metadata| metadata.len() == blob.size)
        {
            return Ok(());
        }
        let reader = SyncIoBridge::new(StreamReader::new(opener.open(0).await?));
        let (out, name, blob) = (self.clone(), name.to_owned(), blob.clone());
        blocking(move || {
            let mut checked = Checked::new(reader, &blob);
            out.write(&name, blob.size, &mut checked).map_err(failed(&format!("write {name} to"), out.path()))
        })
        .await?
    }

    /// Writes a document.
    pub async fn document(&self, name: &str, raw: &[u8]) -> Result<(), Error> {
        let (out, name, raw) = (self.clone(), name.to_owned(), raw.to_vec());
        blocking(move || {
            out.write(&name, raw.len() as u64, &mut raw.as_slice())
                .map_err(failed(&format!("write {name} to"), out.path()))
        })
        .await?
    }

    pub fn write(&self, name: &str, size: u64, reader: &mut dyn Read) -> io::Result<()> {
        match self {
            Self::Directory(root) => {
                let target = root.join(name);
                let parent = target.parent().unwrap_or(root);
                fs::create_dir_all(parent)?;
                let mut temp = tempfile::Builder::new()
                    .prefix(".brig-copy-")
                    .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
                    .tempfile_in(parent)?;
                io::copy(reader, temp.as_file_mut())?;
                temp.as_file().sync_all()?;
                temp.persist(&target).map_err(|failed| failed.error)?;
                File::open(parent)?.sync_all()
            }
            Self::Archive { builder, .. } => {
                let mut builder = builder.lock().unwrap_or_else(PoisonError::into_inner);
                let builder = builder.as_mut().ok_or_else(|| io::Error::other("the archive is closed"))?;
                let mut header = tar::Header::new_gnu();
                header.set_size(size);
                header.set_mode(0o644);
                header.set_mtime(0);
                builder.append_data(&mut header, name, reader)
            }
        }
    }

    /// Gives an archive its name.
    pub async fn finish(self) -> Result<(), Error> {
        let Self::Archive { path, builder } = self else { return Ok(()) };
        blocking(move || {
            let finished = || -> io::Result<()> {
                let builder = builder.lock().unwrap_or_else(PoisonError::into_inner).take();
                let Some(builder) = builder else { return Ok(()) };
                let mut temp = builder.into_inner()?;
                temp.flush()?;
                temp.as_file().sync_all()?;
                temp.persist(&path).map_err(|failed| failed.error)?;
                Ok(())
            };
            finished().map_err(failed("finish", &path))
        })
        .await?
    }
}

/// Passes on what it reads, and fails at the end of wrong content.
pub(super) struct Checked<R> {
    reader: R,
    hasher: Option<Hasher>,
    expected: Digest,
    left: u64,
}

impl<R> Checked<R> {
    pub fn new(reader: R, blob: &Descriptor) -> Self {
        let hasher = Some(blob.digest.algorithm().hasher());
        Self { reader, hasher, expected: blob.digest.clone(), left: blob.size }
    }
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let n = self.reader.read(buf)?;
        if n as u64 > self.left {
            return Err(wrong(format!("blob {} is longer than is said of it", self.expected)));
        }
        self.left -= n as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buf[..n]);
        }
        if n == 0 && !buf.is_empty() {
            if self.left > 0 {
                return Err(wrong(format!("blob {} ends {} bytes early", self.expected, self.left)));
            }
            if let Some(hasher) = self.hasher.take() {
                let actual = hasher.finish();
                if actual != self.expected {
                    return Err(wrong(format!("blob {} has digest {actual}", self.expected)));
                }
            }
        }
        Ok(n)
    }
}
