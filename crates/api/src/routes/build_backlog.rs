//! A step's output that waits to be told: in memory as long as it is little, on disk when it is much.
//!
//! Invariant: what comes out is what went in, in that order; a file has no name, so that it goes with its owner.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of one step's output that are kept in memory.
const IN_MEMORY: usize = 256 << 10;
/// Stream and length before each piece.
const HEADER: usize = 5;

/// Pieces of output that wait.
#[derive(Debug, Default)]
pub struct Backlog {
    /// Pieces as they are on disk; behind those there.
    tail: Vec<u8>,
    spool: Option<Spool>,
    /// The disk did not take it: it stays in memory.
    stuck: bool,
}

#[derive(Debug)]
struct Spool {
    file: File,
    length: u64,
}

impl Backlog {
    pub fn is_empty(&self) -> bool {
        self.tail.is_empty() && self.spool.is_none()
    }

    /// Adds a piece; `dir` is where a file may be.
    pub async fn push(&mut self, dir: &Path, stderr: bool, data: &[u8]) {
        self.tail.push(u8::from(stderr));
        self.tail.extend_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_le_bytes());
        self.tail.extend_from_slice(&data[..data.len().min(u32::MAX as usize)]);
        if self.tail.len() < IN_MEMORY || self.stuck {
            return;
        }
        let (tail, spool, dir) = (std::mem::take(&mut self.tail), self.spool.take(), dir.to_owned());
        let spilled = tokio::task::spawn_blocking(move || {
            let mut spool = match spool {
                Some(spool) => spool,
                None => match nameless(&dir) {
                    Ok(file) => Spool { file, length: 0 },
                    Err(error) => return (None, Some((tail, error))),
                },
            };
            match spool.file.write_all_at(&tail, spool.length) {
                Ok(()) => {
                    spool.length += tail.len() as u64;
                    (Some(spool), None)
                }
                Err(error) => (Some(spool), Some((tail, error))),
            }
        });
        let Ok((spool, failed)) = spilled.await else { return };
        self.spool = spool;
        if let Some((tail, error)) = failed {
            tracing::warn!(%error, "a step's output cannot wait on disk");
            self.tail = tail;
            self.stuck = true;
        }
    }

    /// Everything, in order.
    pub fn into_reader(self) -> Reader {
        Reader { spool: self.spool, at: 0, buffer: Vec::new(), begin: 0, tail: Some(self.tail) }
    }
}

fn nameless(dir: &Path) -> io::Result<File> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let path: PathBuf = dir.join(format!("output-{}-{number}", std::process::id()));
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    file.flush()?;
    Ok(file)
}

/// Takes pieces out.
#[derive(Debug)]
pub struct Reader {
    spool: Option<Spool>,
    at: u64,
    buffer: Vec<u8>,
    begin: usize,
    tail: Option<Vec<u8>>,
}

impl Reader {
    /// The next piece, and whether it is of standard error.
    pub async fn next(&mut self) -> Option<(bool, Vec<u8>)> {
        loop {
            let rest = &self.buffer[self.begin..];
            if let Some((header, rest)) = rest.split_first_chunk::<HEADER>() {
                let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
                if let Some(data) = rest.get(..length) {
                    let piece = (header[0] == 1, data.to_vec());
                    self.begin += HEADER + length;
                    return Some(piece);
                }
            }
            self.fill().await?;
        }
    }

    /// Reads on; `None` at the end.
    async fn fill(&mut self) -> Option<()> {
        self.buffer.drain(..self.begin);
        self.begin = 0;
        if let Some(spool) = self.spool.take_if(|spool| self.at < spool.length) {
            let (at, mut buffer) = (self.at, std::mem::take(&mut self.buffer));
            let read = tokio::task::spawn_blocking(move || {
                let wanted = usize::try_from(spool.length - at).unwrap_or(IN_MEMORY).min(IN_MEMORY);
                let before = buffer.len();
                buffer.resize(before + wanted, 0);
                let read = spool.file.read_exact_at(&mut buffer[before..], at);
                (spool, buffer, wanted, read)
            });
            let (spool, buffer, wanted, read) = read.await.ok()?;
            if let Err(error) = read {
                tracing::error!(%error, "a step's output cannot be read back");
                return None;
            }
            (self.spool, self.buffer) = (Some(spool), buffer);
            self.at += wanted as u64;
            return Some(());
        }
        let tail = self.tail.take().filter(|tail| !tail.is_empty())?;
        self.buffer.extend_from_slice(&tail);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn much_output_waits_on_disk_and_comes_back_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut backlog = Backlog::default();
        assert!(backlog.is_empty());
        let piece = |n: usize| vec![n as u8; (n * 7919) % 40_000];
        for n in 0..200 {
            backlog.push(dir.path(), n % 3 == 0, &piece(n)).await;
            assert!(backlog.tail.len() < IN_MEMORY + 50_000);
        }
        assert!(backlog.spool.as_ref().is_some_and(|spool| spool.length > 3 << 20));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the file has no name");
        let mut reader = backlog.into_reader();
        for n in 0..200 {
            assert_eq!(reader.next().await, Some((n % 3 == 0, piece(n))), "{n}");
        }
        assert_eq!(reader.next().await, None);
    }

    #[tokio::test]
    async fn without_a_disk_it_stays_in_memory() {
        let mut backlog = Backlog::default();
        for n in 0..40_u8 {
            backlog.push(Path::new("/nonexistent"), false, &vec![n; 20_000]).await;
        }
        let mut reader = backlog.into_reader();
        for n in 0..40_u8 {
            assert_eq!(reader.next().await, Some((false, vec![n; 20_000])));
        }
        assert_eq!(reader.next().await, None);
    }
}
