//! The log's files: batched appending, and rotation by size with atomic renames.
//!
//! Invariant: a file holds whole lines only. If writing fails half-way (a full disk), the torn tail is cut off again,
//! the loss is counted, and the container goes on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use super::compress::{compress, compressed};
use super::line::{Source, Splitter, encode};
use super::sink::Sink;
use crate::config::{JsonFileLog, LogConfig};
use crate::time;

/// Encoded bytes that are gathered before they are written.
const BATCH: usize = 128 << 10;

/// The log of one container, open for appending: its file, its collector, or both.
#[derive(Debug)]
pub(crate) struct LogFile {
    writer: Option<Writer>,
    sink: Option<Sink>,
    splitters: [Splitter; 2],
}

#[derive(Debug)]
struct Writer {
    path: PathBuf,
    file: File,
    /// Bytes in the file.
    size: u64,
    max_size: u64,
    max_files: u32,
    /// What stands between the text and the time, for each stream.
    middles: [Vec<u8>; 2],
    batch: Vec<u8>,
    lost: u64,
    error: Option<String>,
    compress: bool,
    /// Compresses the file rotated last.
    compressing: Option<JoinHandle<io::Result<()>>>,
}

impl LogFile {
    /// The log a container is to have, if any.
    pub(crate) fn of(config: &LogConfig) -> io::Result<Option<Self>> {
        match config {
            LogConfig::None => Ok(None),
            LogConfig::JsonFile(file) => Self::open(file).map(Some),
            LogConfig::Collected(log) => Ok(Some(Self {
                writer: log.file.as_ref().map(Writer::open).transpose()?,
                sink: Some(Sink::start(&log.sink)?),
                splitters: <[Splitter; 2]>::default(),
            })),
        }
    }

    /// Open a log that is a file alone.
    pub(crate) fn open(config: &JsonFileLog) -> io::Result<Self> {
        let writer = Some(Writer::open(config)?);
        Ok(Self { writer, sink: None, splitters: <[Splitter; 2]>::default() })
    }

    /// Record a chunk of output; it is in the file when this returns.
    pub(crate) fn append(&mut self, source: Source, chunk: &[u8]) {
        let Self { writer, sink, splitters } = self;
        let time = now();
        splitters[source as usize].push(chunk, |piece| record(writer, sink.as_ref(), source, piece, &time));
        if let Some(writer) = writer {
            writer.flush();
        }
    }

    /// The end of a stream: record what is left of its last line.
    pub(crate) fn finish(&mut self, source: Source) {
        let Self { writer, sink, splitters } = self;
        let time = now();
        splitters[source as usize].finish(|piece| record(writer, sink.as_ref(), source, piece, &time));
        if let Some(writer) = writer {
            writer.flush();
        }
    }

    /// Bytes of output lost, and the last failure.
    pub(crate) fn losses(&self) -> (u64, Option<String>) {
        let (mut lost, mut error) =
            self.writer.as_ref().map_or((0, None), |writer| (writer.lost, writer.error.clone()));
        if let Some(sink) = &self.sink {
            let (dropped, failure) = sink.losses();
            lost += dropped;
            error = error.or(failure);
        }
        (lost, error)
    }

    /// The collector.
    pub(crate) fn sink(&self) -> Option<&Sink> {
        self.sink.as_ref()
    }

    /// Give back memory that is not needed now.
    pub(crate) fn shrink(&mut self) {
        if let Some(writer) = &mut self.writer {
            writer.batch = Vec::new();
        }
        self.splitters.iter_mut().for_each(Splitter::shrink);
    }

    /// Nothing more will come: what is on its way arrives, if that takes no longer than a moment.
    pub(crate) fn close(self) {
        if let Some(mut writer) = self.writer {
            writer.settle();
        }
        if let Some(sink) = self.sink {
            sink.close();
        }
    }
}

fn record(
    writer: &mut Option<Writer>,
    sink: Option<&Sink>,
    source: Source,
    piece: &[u8],
    time: &[u8; time::LENGTH],
) {
    if let Some(writer) = writer {
        writer.add(source, piece, time);
    }
    if let Some(sink) = sink {
        sink.push(source, piece);
    }
}

fn now() -> [u8; time::LENGTH] {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    time::format(since.as_secs(), since.subsec_nanos())
}

impl Writer {
    /// Open the file for appending. A torn line at its end, left by a crash, is cut off.
    fn open(config: &JsonFileLog) -> io::Result<Self> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", config.path.display()));
        let file = open(&config.path).map_err(named)?;
        let size = trim_torn_line(&file).map_err(named)?;
        let attrs = if config.attrs.is_empty() {
            String::new()
        } else {
            format!(",\"attrs\":{}", serde_json::to_string(&config.attrs)?)
        };
        let middle =
            |source: Source| format!("\",\"stream\":\"{}\"{attrs},\"time\":\"", source.as_str()).into_bytes();
        Ok(Self {
            path: config.path.clone(),
            file,
            size,
            max_size: config.max_size,
            max_files: config.max_files.max(1),
            middles: [middle(Source::Stdout), middle(Source::Stderr)],
            batch: Vec::new(),
            lost: 0,
            error: None,
            compress: config.compress,
            compressing: None,
        })
    }

    fn add(&mut self, source: Source, piece: &[u8], time: &[u8]) {
        if self.max_size > 0 && self.size + self.batch.len() as u64 >= self.max_size {
            self.flush();
            if self.size >= self.max_size
                && let Err(e) = self.rotate()
            {
                self.error = Some(format!("rotate {}: {e}", self.path.display()));
            }
        }
        self.batch.extend_from_slice(b"{\"log\":\"");
        encode(&mut self.batch, piece);
        self.batch.extend_from_slice(&self.middles[source as usize]);
        self.batch.extend_from_slice(time);
        self.batch.extend_from_slice(b"\"}\n");
        if self.batch.len() >= BATCH {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        match self.file.write_all(&self.batch) {
            Ok(()) => self.size += self.batch.len() as u64,
            Err(e) => {
                self.lost += self.batch.len() as u64;
                self.error = Some(format!("write {}: {e}", self.path.display()));
                if let Err(e) = self.file.set_len(self.size) {
                    self.error = Some(format!("cut {}: {e}", self.path.display()));
                }
            }
        }
        self.batch.clear();
    }

    /// Wait for the file rotated last to be compressed.
    fn settle(&mut self) {
        match self.compressing.take().map(JoinHandle::join) {
            Some(Ok(Err(e))) => self.error = Some(format!("compress a rotated log: {e}")),
            Some(Err(_panic)) => self.error = Some("compress a rotated log: the thread broke".to_owned()),
            Some(Ok(Ok(()))) | None => {}
        }
    }

    /// Make room: the oldest file goes, each other moves up by one, and a new one is begun. A reader that has the file
    /// open keeps it, and finds its successor under the name it opened.
    fn rotate(&mut self) -> io::Result<()> {
        if self.max_files == 1 {
            // A reader must be able to tell a new file from a longer one, so it is replaced and not truncated.
            fs::remove_file(&self.path)?;
        } else {
            self.settle();
            for number in (1..self.max_files - 1).rev() {
                let (from, to) = (numbered(&self.path, number), numbered(&self.path, number + 1));
                if rename_if_there(&compressed(&from), &compressed(&to))? {
                    // What the compressed one was made of, left by a crash in between.
                    remove_if_there(&from)?;
                    remove_if_there(&to)?;
                } else if rename_if_there(&from, &to)? {
                    remove_if_there(&compressed(&to))?;
                }
            }
            let first = numbered(&self.path, 1);
            remove_if_there(&compressed(&first))?;
            fs::rename(&self.path, &first)?;
            if self.compress {
                let work = move || compress(&first);
                let thread = std::thread::Builder::new().name("brig-gzip".to_owned()).spawn(work);
                match thread {
                    Ok(thread) => self.compressing = Some(thread),
                    Err(e) => self.error = Some(format!("compress a rotated log: {e}")),
                }
            }
        }
        self.file = open(&self.path)?;
        self.size = 0;
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o640).open(path)
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

fn rename_if_there(from: &Path, to: &Path) -> io::Result<bool> {
    match fs::rename(from, to) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Cut off what follows the last newline; returns the size that is left. No line is longer than a piece with every byte
/// escaped, and attributes are short, so only the file's end is looked at.
fn trim_torn_line(file: &File) -> io::Result<u64> {
    const WINDOW: u64 = 256 << 10;
    let size = file.metadata()?.len();
    let mut last = [0];
    if size == 0 || (file.read_at(&mut last, size - 1)? == 1 && last == *b"\n") {
        return Ok(size);
    }
    let from = size.saturating_sub(WINDOW);
    let mut tail = vec![0; (size - from) as usize];
    file.read_exact_at(&mut tail, from)?;
    let keep = tail.iter().rposition(|&b| b == b'\n').map_or(from, |at| from + at as u64 + 1);
    file.set_len(keep)?;
    Ok(keep)
}

#[cfg(test)]
mod tests {
    use super::super::Line;
    use super::*;

    fn read(path: &Path) -> Vec<u8> {
        fs::read(path)
            .unwrap()
            .split_inclusive(|&b| b == b'\n')
            .flat_map(|line| Line::parse(line).unwrap().bytes)
            .collect()
    }

    #[test]
    fn output_is_recorded_with_stream_and_attributes() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = JsonFileLog::new(dir.path().join("log"));
        config.attrs.insert("tag".into(), "x".into());
        let mut log = LogFile::open(&config).unwrap();
        log.append(Source::Stdout, b"one\ntw");
        log.append(Source::Stderr, b"err\n");
        log.append(Source::Stdout, b"o");
        log.finish(Source::Stdout);
        let text = fs::read_to_string(&config.path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with(r#"{"log":"one\n","stream":"stdout","attrs":{"tag":"x"},"time":"20"#),
            "{text}"
        );
        assert!(lines[1].starts_with(r#"{"log":"err\n","stream":"stderr","#), "{text}");
        assert!(lines[2].starts_with(r#"{"log":"two","stream":"stdout","#), "{text}");
    }

    #[test]
    fn rotation_keeps_the_newest_files_and_no_line_is_torn() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = JsonFileLog::new(dir.path().join("log"));
        (config.max_size, config.max_files) = (1000, 3);
        let mut log = LogFile::open(&config).unwrap();
        let mut all = Vec::new();
        for n in 0..200 {
            let line = format!("line {n}\n");
            log.append(Source::Stdout, line.as_bytes());
            all.extend_from_slice(line.as_bytes());
        }
        let mut kept = read(&numbered(&config.path, 2));
        kept.extend(read(&numbered(&config.path, 1)));
        kept.extend(read(&config.path));
        assert!(all.ends_with(&kept) && kept.len() > 200, "{}", String::from_utf8_lossy(&kept));
        assert!(!numbered(&config.path, 3).exists());
        for path in [numbered(&config.path, 1), config.path] {
            assert!(fs::metadata(path).unwrap().len() < 1100);
        }
    }

    #[test]
    fn one_file_is_bounded_too() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = JsonFileLog::new(dir.path().join("log"));
        (config.max_size, config.max_files) = (1000, 1);
        let mut log = LogFile::open(&config).unwrap();
        for _ in 0..200 {
            log.append(Source::Stdout, b"x\n");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(fs::metadata(&config.path).unwrap().len() < 1100);
    }

    #[test]
    fn a_torn_line_is_cut_off_when_the_log_is_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let config = JsonFileLog::new(dir.path().join("log"));
        LogFile::open(&config).unwrap().append(Source::Stdout, b"whole\n");
        let mut file = OpenOptions::new().append(true).open(&config.path).unwrap();
        file.write_all(br#"{"log":"to"#).unwrap();
        LogFile::open(&config).unwrap().append(Source::Stdout, b"next\n");
        assert_eq!(read(&config.path), b"whole\nnext\n");
    }
}
