//! Compressing what goes out: layers that are pushed, archives that are saved. All processors work at it.
//!
//! Invariant: the bytes depend on the data, the form and the level alone, never on how many threads there were or how
//! the data came in, so that a layer has the same digest whenever and wherever it is compressed.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use libdeflater::{CompressionLvl, Compressor};

use crate::error::Error;

/// Data of one gzip member. Members stand alone (RFC 1952, 2.2), so that each can be made by another thread.
const GZIP_BLOCK: usize = 1 << 20;
/// Data of one zstd frame; frames stand alone as well (RFC 8878, 3).
const ZSTD_BLOCK: usize = 4 << 20;
/// More than that many at once cost memory and no longer help.
const THREADS_MAX: usize = 16;

/// How a stream is to be compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Plain,
    /// Level 1 to 12.
    Gzip(i32),
    /// Level 1 to 19.
    Zstd(i32),
}

impl Encoding {
    /// As small as `gzip -6` makes it, in half the time.
    pub const GZIP: Self = Self::Gzip(3);
    pub const ZSTD: Self = Self::Zstd(3);
}

impl FromStr for Encoding {
    type Err = Error;

    /// `gzip`, `zstd` or `none`, the first two with a level if one is wanted: `zstd:19`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let (name, level) = text.split_once(':').map_or((text, None), |(name, level)| (name, Some(level)));
        let wrong = || {
            Error::Invalid(format!(
                "compression {text:?} is not known: there are none, gzip (gzip:1 to gzip:12) and zstd (zstd:1 to zstd:19)"
            ))
        };
        let level = level.map(str::parse::<i32>).transpose().map_err(|_not_a_number| wrong())?;
        match (name, level) {
            ("none" | "uncompressed", None) => Ok(Self::Plain),
            ("gzip", None) => Ok(Self::GZIP),
            ("zstd", None) => Ok(Self::ZSTD),
            ("gzip", Some(level @ 1..=12)) => Ok(Self::Gzip(level)),
            ("zstd", Some(level @ 1..=19)) => Ok(Self::Zstd(level)),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => f.write_str("none"),
            Self::Gzip(level) => write!(f, "gzip:{level}"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// Writes compressed what is written to it. Only [`Self::finish`] makes the stream whole.
pub struct Encoder<W: Write> {
    output: W,
    /// None of a stream that is not compressed.
    blocks: Option<Blocks>,
}

impl<W: Write> Encoder<W> {
    pub fn new(encoding: Encoding, output: W) -> io::Result<Self> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        Self::with_threads(encoding, output, threads)
    }

    fn with_threads(encoding: Encoding, output: W, threads: usize) -> io::Result<Self> {
        Ok(Self { output, blocks: Blocks::new(encoding, threads)? })
    }

    /// Writes what is left and the end of the stream.
    pub fn finish(mut self) -> io::Result<W> {
        if let Some(mut blocks) = self.blocks.take() {
            blocks.hand_out()?;
            while let Some(done) = blocks.take()? {
                self.output.write_all(&done)?;
            }
        }
        self.output.flush()?;
        Ok(self.output)
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let Some(blocks) = &mut self.blocks else { return self.output.write(data) };
        // A full block is handed out when more comes, so that there is no empty one at the end.
        if !data.is_empty() && blocks.current.len() == blocks.size {
            blocks.hand_out()?;
            while blocks.is_full() {
                if let Some(done) = blocks.take()? {
                    self.output.write_all(&done)?;
                }
            }
        }
        let n = data.len().min(blocks.size - blocks.current.len());
        blocks.current.extend_from_slice(&data[..n]);
        Ok(n)
    }

    /// A block is written when it is full: what is flushed earlier would show in the bytes.
    fn flush(&mut self) -> io::Result<()> {
        if self.blocks.is_none() { self.output.flush() } else { Ok(()) }
    }
}

/// One block on its way to a thread.
struct Job {
    data: Vec<u8>,
    done: std::sync::mpsc::SyncSender<io::Result<Vec<u8>>>,
}

/// The blocks under way, and the threads that compress them. They end with this.
struct Blocks {
    size: usize,
    current: Vec<u8>,
    jobs: Sender<Job>,
    /// In the order of the data.
    waiting: VecDeque<Receiver<io::Result<Vec<u8>>>>,
    most: usize,
}

impl Blocks {
    fn new(encoding: Encoding, threads: usize) -> io::Result<Option<Self>> {
        let size = match encoding {
            Encoding::Plain => return Ok(None),
            Encoding::Gzip(_) => GZIP_BLOCK,
            Encoding::Zstd(_) => ZSTD_BLOCK,
        };
        let (jobs, queue) = channel();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..threads {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new().name("compress".to_owned()).spawn(move || work(encoding, &queue))?;
        }
        Ok(Some(Self {
            size,
            current: Vec::with_capacity(size),
            jobs,
            waiting: VecDeque::new(),
            most: 2 * threads,
        }))
    }

    fn is_full(&self) -> bool {
        self.waiting.len() >= self.most
    }

    fn hand_out(&mut self) -> io::Result<()> {
        let data = std::mem::replace(&mut self.current, Vec::with_capacity(self.size));
        let (done, receiver) = sync_channel(1);
        self.waiting.push_back(receiver);
        self.jobs.send(Job { data, done }).map_err(|_gone| broken())
    }

    /// The oldest block, compressed; none when none is under way.
    fn take(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(oldest) = self.waiting.pop_front() else { return Ok(None) };
        oldest.recv().map_err(|_gone| broken())?.map(Some)
    }
}

fn broken() -> io::Error {
    io::Error::other("a thread that compresses ended early")
}

/// Compresses block after block until there will be no more.
fn work(encoding: Encoding, queue: &Mutex<Receiver<Job>>) {
    let mut deflater = None;
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { data, done }) = next else { return };
        let result = match encoding {
            Encoding::Gzip(level) => gzip_member(level, &mut deflater, &data),
            Encoding::Zstd(level) => zstd_frame(level, &data),
            Encoding::Plain => Ok(data),
        };
        // Nobody waits for a stream that was given up.
        done.send(result).unwrap_or_default();
    }
}

/// `deflater` is made at the first block and used again.
fn gzip_member(level: i32, deflater: &mut Option<Compressor>, data: &[u8]) -> io::Result<Vec<u8>> {
    let fault = |error: &dyn fmt::Debug| io::Error::other(format!("compressing with gzip: {error:?}"));
    let deflater = if let Some(known) = deflater {
        known
    } else {
        let level = CompressionLvl::new(level).map_err(|error| fault(&error))?;
        deflater.insert(Compressor::new(level))
    };
    let mut output = vec![0; deflater.gzip_compress_bound(data.len())];
    let length = deflater.gzip_compress(data, &mut output).map_err(|error| fault(&error))?;
    output.truncate(length);
    Ok(output)
}

fn zstd_frame(level: i32, data: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::with_capacity(data.len() / 2), level)?;
    encoder.include_checksum(true)?;
    encoder.set_pledged_src_size(Some(data.len() as u64))?;
    encoder.write_all(data)?;
    encoder.finish()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;
    use crate::compress::decode;

    fn sample(length: usize) -> Vec<u8> {
        let noise = |n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8;
        (0..length as u32).map(|n| if n % 7 < 3 { noise(n) } else { (n / 64) as u8 }).collect()
    }

    fn encoded(encoding: Encoding, data: &[u8], threads: usize, piece: usize) -> Vec<u8> {
        let mut encoder = Encoder::with_threads(encoding, Vec::new(), threads).unwrap();
        for piece in data.chunks(piece) {
            encoder.write_all(piece).unwrap();
            encoder.flush().unwrap();
        }
        encoder.finish().unwrap()
    }

    #[test]
    fn the_bytes_do_not_depend_on_threads_or_pieces() {
        for (encoding, block) in [
            (Encoding::Gzip(1), GZIP_BLOCK),
            (Encoding::GZIP, GZIP_BLOCK),
            (Encoding::ZSTD, ZSTD_BLOCK),
            (Encoding::Plain, 1000),
        ] {
            for length in [0, 1, block - 1, block, 2 * block + 5] {
                let data = sample(length);
                let one = encoded(encoding, &data, 1, usize::MAX);
                let many = encoded(encoding, &data, 5, 70_001);
                assert!(one == many, "{encoding} of {length} bytes");
                let mut back = Vec::new();
                decode(&one[..]).unwrap().read_to_end(&mut back).unwrap();
                assert!(back == data, "{encoding} of {length} bytes comes back as it was");
            }
        }
    }

    #[test]
    fn gzip_and_zstd_themselves_read_it() {
        let data = sample(3 * GZIP_BLOCK + 5);
        for (encoding, program) in [(Encoding::GZIP, "gzip"), (Encoding::ZSTD, "zstd")] {
            let mut child = std::process::Command::new(program)
                .arg("-dc")
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut input = child.stdin.take().unwrap();
            let compressed = encoded(encoding, &data, 3, 1 << 16);
            let writer = std::thread::spawn(move || input.write_all(&compressed).unwrap());
            let output = child.wait_with_output().unwrap();
            writer.join().unwrap();
            assert!(output.status.success() && output.stdout == data, "{program}");
        }
    }

    #[test]
    fn names_are_read_and_written() {
        for (text, encoding) in [
            ("gzip", Encoding::GZIP),
            ("gzip:12", Encoding::Gzip(12)),
            ("zstd:19", Encoding::Zstd(19)),
            ("none", Encoding::Plain),
        ] {
            assert_eq!(text.parse::<Encoding>().unwrap(), encoding);
            assert_eq!(encoding.to_string().parse::<Encoding>().unwrap(), encoding);
        }
        for bad in ["", "lz4", "gzip:0", "gzip:13", "zstd:x", "zstd:-1", "none:1"] {
            assert!(bad.parse::<Encoding>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_cannot_be_written_is_an_error() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut encoder = Encoder::with_threads(Encoding::ZSTD, Full, 1).unwrap();
        encoder.write_all(&sample(1000)).unwrap();
        assert_eq!(encoder.finish().err().unwrap().kind(), io::ErrorKind::StorageFull);
    }
}
