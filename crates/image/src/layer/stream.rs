//! Hands decoded chunks from the thread that decompresses and hashes to the one that writes.

use std::io::{self, BufRead, Read, Write};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

const CHUNK: usize = 256 << 10;
/// Chunks under way at once: what bounds the memory of one layer's extraction.
const CHUNKS: usize = 8;

/// The side that decodes.
pub(super) struct Feed {
    full: SyncSender<io::Result<Vec<u8>>>,
    empty: Receiver<Vec<u8>>,
    made: usize,
}

/// The side that consumes.
pub(super) struct Chunks {
    full: Receiver<io::Result<Vec<u8>>>,
    empty: Sender<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
    ended: bool,
}

/// The side that writes what the other one reads.
pub(crate) struct Filling {
    full: SyncSender<io::Result<Vec<u8>>>,
    empty: Receiver<Vec<u8>>,
    made: usize,
    chunk: Vec<u8>,
}

/// What one thread writes another one reads; dropped, the writer ends it.
pub(crate) fn written() -> (Filling, impl Read + Send) {
    let (Feed { full, empty, made }, chunks) = pipe();
    (Filling { full, empty, made, chunk: Vec::new() }, chunks)
}

impl Write for Filling {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.chunk.capacity() == 0 {
            self.chunk = if self.made < CHUNKS {
                self.made += 1;
                Vec::with_capacity(CHUNK)
            } else {
                self.empty.recv().map_err(|_closed| io::Error::from(io::ErrorKind::BrokenPipe))?
            };
            self.chunk.clear();
        }
        let n = data.len().min(CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(&data[..n]);
        if self.chunk.len() == CHUNK {
            self.flush()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::take(&mut self.chunk);
        self.full.send(Ok(chunk)).map_err(|_closed| io::ErrorKind::BrokenPipe.into())
    }
}

pub(super) fn pipe() -> (Feed, Chunks) {
    let (full, full_receiver) = sync_channel(CHUNKS);
    let (empty, empty_receiver) = channel();
    (
        Feed { full, empty: empty_receiver, made: 0 },
        Chunks { full: full_receiver, empty, current: Vec::new(), at: 0, ended: false },
    )
}

impl Feed {
    /// Sends all that `reader` yields, showing each chunk to `seen`. Stops early when nobody takes more.
    pub fn run(mut self, reader: &mut dyn Read, mut seen: impl FnMut(&[u8])) {
        loop {
            let Some(mut chunk) = self.buffer() else { return };
            chunk.resize(CHUNK, 0);
            let mut filled = 0;
            let outcome = loop {
                match reader.read(&mut chunk[filled..]) {
                    Ok(0) => break Ok(false),
                    Ok(n) => {
                        filled += n;
                        if filled == CHUNK {
                            break Ok(true);
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => break Err(error),
                }
            };
            chunk.truncate(filled);
            seen(&chunk);
            if filled > 0 && self.full.send(Ok(chunk)).is_err() {
                return;
            }
            match outcome {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    // Nobody left to tell means somebody already failed.
                    self.full.send(Err(error)).unwrap_or_default();
                    return;
                }
            }
        }
    }

    fn buffer(&mut self) -> Option<Vec<u8>> {
        if self.made < CHUNKS {
            self.made += 1;
            return Some(Vec::with_capacity(CHUNK));
        }
        self.empty.recv().ok()
    }
}

impl BufRead for Chunks {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.current.len() && !self.ended {
            let used = std::mem::take(&mut self.current);
            if used.capacity() > 0 {
                // The other side is gone when it has sent all it had.
                self.empty.send(used).unwrap_or_default();
            }
            self.at = 0;
            match self.full.recv() {
                Ok(Ok(chunk)) => self.current = chunk,
                Ok(Err(error)) => {
                    self.ended = true;
                    return Err(error);
                }
                Err(_) => self.ended = true,
            }
        }
        Ok(&self.current[self.at..])
    }

    fn consume(&mut self, n: usize) {
        self.at += n;
    }
}

impl Read for Chunks {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let n = available.len().min(buf.len());
        buf[..n].copy_from_slice(&available[..n]);
        self.consume(n);
        Ok(n)
    }
}
