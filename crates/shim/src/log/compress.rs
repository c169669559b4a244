//! Compressing a rotated file: whole or not at all, under a name of its own, by a thread.
//!
//! The compressed file's comment says which inode it was made of, so that a reader who has read that one knows it again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use flate2::bufread::GzDecoder;
use flate2::{Compression, GzBuilder};

/// The inode of the file that a compressed one was made of, if it says so.
pub fn original_inode<R: io::BufRead>(decoder: &GzDecoder<R>) -> Option<u64> {
    std::str::from_utf8(decoder.header()?.comment()?).ok()?.parse().ok()
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
        let inode = source.metadata()?.ino().to_string();
        let mut encoder = GzBuilder::new().comment(inode).write(file, Compression::fast());
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
    fn a_compressed_file_replaces_the_plain_one_and_knows_its_inode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.1");
        fs::write(&path, "line\n".repeat(1000)).unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        compress(&path).unwrap();
        assert!(!path.exists());
        let mut decoder = GzDecoder::new(io::BufReader::new(File::open(compressed(&path)).unwrap()));
        let mut text = String::new();
        decoder.read_to_string(&mut text).unwrap();
        assert_eq!(text, "line\n".repeat(1000));
        assert_eq!(original_inode(&decoder), Some(inode));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
