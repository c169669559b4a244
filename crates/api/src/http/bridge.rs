//! Between async bodies and code that reads or writes blockingly (archives).
//!
//! Invariant: memory in flight is bounded, and either side going away ends the other with an error or EOF.

use std::io::{self, BufRead, Read, Write};

use bytes::{Buf, Bytes};
use futures_util::{Stream, StreamExt};
use tokio::io::AsyncRead;
use tokio::sync::mpsc;

/// Chunks in flight between the two sides.
const DEPTH: usize = 16;
/// Bytes gathered before a written chunk is handed over.
const CHUNK: usize = 64 << 10;

/// A blocking reader over an async one; read it on a blocking thread.
pub struct BlockingReader {
    chunks: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
}

/// Pumps `source` into a blocking reader.
pub fn reader(source: impl AsyncRead + Send + 'static) -> BlockingReader {
    of_chunks(tokio_util::io::ReaderStream::with_capacity(source, CHUNK))
}

/// The same of what comes in chunks, which are handed on as they are.
pub fn of_chunks(source: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> BlockingReader {
    let (sender, chunks) = mpsc::channel(DEPTH);
    tokio::spawn(async move {
        let mut source = std::pin::pin!(source);
        while let Some(chunk) = source.next().await {
            let failed = chunk.is_err();
            if sender.send(chunk).await.is_err() || failed {
                break;
            }
        }
    });
    BlockingReader { chunks, current: Bytes::new() }
}

impl BufRead for BlockingReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                None => return Ok(&[]),
                Some(chunk) => self.current = chunk?,
            }
        }
        Ok(&self.current)
    }

    fn consume(&mut self, count: usize) {
        self.current.advance(count);
    }
}

impl Read for BlockingReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buf.len());
        buf[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

/// A blocking writer whose bytes come out of a stream; write to it on a blocking thread.
pub struct BlockingWriter {
    chunks: mpsc::Sender<io::Result<Bytes>>,
    pending: Vec<u8>,
}

/// A writer and the stream of what is written to it. The stream ends when the writer is dropped; what was written
/// but not flushed by then is lost, so finish with `flush`, or with [`BlockingWriter::fail`].
pub fn writer() -> (BlockingWriter, impl Stream<Item = io::Result<Bytes>> + Send + 'static) {
    let (sender, mut chunks) = mpsc::channel(DEPTH);
    let writer = BlockingWriter { chunks: sender, pending: Vec::with_capacity(CHUNK) };
    (writer, futures_util::stream::poll_fn(move |cx| chunks.poll_recv(cx)))
}

impl BlockingWriter {
    /// Breaks the stream off, so that the client sees a truncated answer and no complete one.
    pub fn fail(self, error: io::Error) {
        if self.chunks.blocking_send(Err(error)).is_err() {
            tracing::trace!("a stream failed after its reader left");
        }
    }

    fn hand_over(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let chunk = Bytes::from(std::mem::replace(&mut self.pending, Vec::with_capacity(CHUNK)));
        self.chunks.blocking_send(Ok(chunk)).map_err(|_gone| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

impl Write for BlockingWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(buf);
        if self.pending.len() >= CHUNK {
            self.hand_over()?;
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.hand_over()
    }
}
