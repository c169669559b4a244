//! Compressing a rotated file: whole or not at all, under a name of its own, by a thread.
//!
//! The compressed file's comment says which file it was made of, so that a reader who has read that one knows it again.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use flate2::bufread::GzDecoder;
use flate2::{Compression, GzBuilder};

/// Which of a log's files one is, whatever it is called now. An inode's number alone would not do: it is given out again
/// as soon as a file has been compressed and removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId {
    inode: u64,
    /// Nanoseconds since the epoch at its making (statx(2), `stx_btime`); 0 where the file system does not say.
    born: u128,
}

impl FileId {
    pub fn of(metadata: &fs::Metadata) -> Self {
        let born = metadata.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Self { inode: metadata.ino(), born: born.map_or(0, |since| since.as_nanos()) }
    }

    /// What a compressed file says of the file it was made of.
    pub fn original<R: io::BufRead>(decoder: &GzDecoder<R>) -> Option<Self> {
        let (inode, born) = std::str::from_utf8(decoder.header()?.comment()?).ok()?.split_once('.')?;
        Some(Self { inode: inode.parse().ok()?, born: born.parse().ok()? })
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.inode, self.born)
    }
}

/// `path` with `.gz` behind it.
pub(super) fn compressed(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".gz");
    name.into()
}

/// Replaces `path` by a compressed file. After a failure `path` is there as before.
pub(super) fn compress(path: &Path) -> io::Result<()> {
    let mut source = File::open(path)?;
    let target = compressed(path);
    let mut partial = target.clone().into_os_string();
    partial.push(".part");
    let partial = PathBuf::from(partial);
    let made = (|| {
        let file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(&partial)?;
        let id = FileId::of(&source.metadata()?).to_string();
        let mut encoder = GzBuilder::new().comment(id).write(file, Compression::fast());
        io::copy(&mut source, &mut encoder)?;
        encoder.finish()?;
        fs::rename(&partial, &target)
    })();
    match made {
        Ok(()) => fs::remove_file(path),
        Err(error) => {
            // The next attempt overwrites it.
            drop(fs::remove_file(&partial));
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_compressed_file_replaces_the_plain_one_and_knows_which_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.1");
        fs::write(&path, "line\n".repeat(1000)).unwrap();
        let id = FileId::of(&fs::metadata(&path).unwrap());
        compress(&path).unwrap();
        assert!(!path.exists());
        let mut decoder = GzDecoder::new(io::BufReader::new(File::open(compressed(&path)).unwrap()));
        let mut text = String::new();
        decoder.read_to_string(&mut text).unwrap();
        assert_eq!(text, "line\n".repeat(1000));
        assert_eq!(FileId::original(&decoder), Some(id));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
