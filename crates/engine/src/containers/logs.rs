//! Reading a container's log: docker's `json-file` format over rotated files, once or following.
//!
//! A follower is woken by the kernel (inotify), never by a clock, and ends when the container has ended and everything is
//! read. Files are told apart by [`FileId`], so that a rotation in between neither loses nor repeats a line.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use brigantine_shim::frame;
use brigantine_shim::log::FileId;
use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::sync::mpsc;

use super::wait::register;
use super::{Condition, Container, Containers};
use crate::{Error, Result};

/// What of a log is wanted.
#[derive(Debug, Clone, Default)]
pub struct LogRequest {
    pub follow: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub since: Option<Timestamp>,
    pub until: Option<Timestamp>,
    pub timestamps: bool,
    /// The extra attributes of each line.
    pub details: bool,
    /// The last so many lines; everything when `None`.
    pub tail: Option<usize>,
}

/// A log as chunks ready for the client: framed without a terminal, raw with one.
#[derive(Debug)]
pub struct Logs {
    pub tty: bool,
    chunks: mpsc::Receiver<Bytes>,
}

impl Logs {
    /// The next chunk; `None` at the end.
    pub async fn next(&mut self) -> Option<Bytes> {
        self.chunks.recv().await
    }
}

pub(super) fn log_path(dir: &Path, id: &str) -> PathBuf {
    dir.join(format!("{id}-json.log"))
}

/// A program that has just been started has not said anything yet. Who asks for its log at once (as tests do that were
/// made for docker, whose start takes longer than this) gets what it says, or its whole log, within this time.
const FIRST_WORDS: Duration = Duration::from_millis(200);

impl Containers {
    /// A container's log.
    pub fn logs(&self, reference: &str, request: LogRequest) -> Result<Logs> {
        let container = self.find(reference)?;
        if !request.stdout && !request.stderr {
            return Err(Error::invalid("Bad parameters: you must choose at least one stream"));
        }
        self.logs_of(&container, request, false)
    }

    pub(super) fn logs_of(
        &self,
        container: &Arc<Container>,
        request: LogRequest,
        unframed: bool,
    ) -> Result<Logs> {
        let tty = container.with(|inner| inner.record.tty());
        let unreadable = container.with(|inner| super::logging::is_unreadable(&inner.record));
        if unreadable {
            return Err(Error::not_implemented("configured logging driver does not support reading"));
        }
        let path = log_path(&self.dir(&container.id), &container.id);
        // Registered first: an end that comes now ends the following, after what was written before it.
        let ended = register(container, Condition::NotRunning);
        let (sender, chunks) = mpsc::channel(16);
        let stop = Stop::new()?;
        let told = stop.clone();
        let mut ended = Some(ended);
        if let Some(ended) = ended.take_if(|_| request.follow) {
            let left = sender.clone();
            tokio::spawn(async move {
                tokio::select! {
                    _ = ended.done() => {}
                    () = left.closed() => {}
                }
                told.set();
            });
        }
        let just_started = container.live().and_then(|live| {
            let since = Timestamp::now().duration_since(live.started_at).unsigned_abs();
            FIRST_WORDS.checked_sub(since).filter(|_| !request.follow)
        });
        tokio::spawn(async move {
            if let (Some(patience), Some(ended)) = (just_started, ended) {
                // Its end within that time is as good as its words.
                tokio::time::timeout(patience, ended.done()).await.ok();
            }
            let reading = move || {
                if let Err(error) = (Reader { request, tty, raw: tty || unframed, sender, stop }).run(&path) {
                    tracing::warn!(path = %path.display(), %error, "read a container's log");
                }
            };
            if let Err(error) = tokio::task::spawn_blocking(reading).await {
                tracing::error!(%error, "read a container's log");
            }
        });
        Ok(Logs { tty, chunks })
    }
}

/// Tells a blocking reader that nothing more will be written.
#[derive(Debug, Clone)]
struct Stop(Arc<std::os::fd::OwnedFd>);

impl Stop {
    fn new() -> Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(|fd| Self(Arc::new(fd)))
            .map_err(|error| Error::internal("make an event descriptor").because(error))
    }

    fn set(&self) {
        if let Err(error) = rustix::io::write(&self.0, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "tell a log reader about the end");
        }
    }

    fn is_set(&self) -> bool {
        let mut fds = [rustix::event::PollFd::new(&*self.0, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }))
            .is_ok_and(|n| n > 0)
    }
}

/// One line of the log as it is stored.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow, default)]
    log: std::borrow::Cow<'a, str>,
    #[serde(borrow, default)]
    stream: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    time: std::borrow::Cow<'a, str>,
    #[serde(default)]
    attrs: Option<BTreeMap<String, String>>,
}

struct Reader {
    request: LogRequest,
    tty: bool,
    /// No frames.
    raw: bool,
    sender: mpsc::Sender<Bytes>,
    stop: Stop,
}

/// Why reading goes no further.
enum Done {
    /// `until` has passed, or the client has left.
    Enough,
    EndOfFile,
}

impl Reader {
    fn run(self, path: &Path) -> std::io::Result<()> {
        let watch = if self.request.follow { Some(Watch::new(path)?) } else { None };
        let mut files = files(path);
        if let Some(lines) = self.request.tail {
            files = tail(files, lines)?;
        }
        let mut last = None;
        for (file, id) in files {
            let mut reader = BufReader::with_capacity(64 << 10, file);
            let mut partial = Vec::new();
            if let Done::Enough = self.drain(&mut reader, &mut partial)? {
                return Ok(());
            }
            last = Some((reader, partial, id));
        }
        let Some(watch) = watch else { return Ok(()) };
        loop {
            // Asked before reading: whatever was written before the end is read after it is known.
            let ended = self.stop.is_set();
            if self.sender.is_closed() {
                return Ok(());
            }
            if let Some((reader, partial, id)) = &mut last {
                if let Done::Enough = self.drain(reader, partial)? {
                    return Ok(());
                }
                let Some(next) = after(path, *id) else {
                    if ended {
                        return Ok(());
                    }
                    watch.wait(&self.stop)?;
                    continue;
                };
                // Rotated: nothing is written to the old file any more once it has its new name.
                if let Done::Enough = self.drain(reader, partial)? {
                    return Ok(());
                }
                last = Some((BufReader::with_capacity(64 << 10, next.0), Vec::new(), next.1));
            } else if let Some((file, id)) = open(path) {
                last = Some((BufReader::with_capacity(64 << 10, file), Vec::new(), id));
            } else {
                if ended {
                    return Ok(());
                }
                watch.wait(&self.stop)?;
            }
        }
    }

    /// Sends every complete line there is; an incomplete one waits in `partial`.
    fn drain(&self, reader: &mut BufReader<File>, partial: &mut Vec<u8>) -> std::io::Result<Done> {
        let mut out = Vec::new();
        loop {
            let before = partial.len();
            let count = reader.read_until(b'\n', partial)?;
            if count == 0 || partial.last() != Some(&b'\n') {
                debug_assert!(partial.len() >= before, "reading only adds");
                return if self.flush(&mut out) { Ok(Done::EndOfFile) } else { Ok(Done::Enough) };
            }
            let line = serde_json::from_slice::<Line<'_>>(partial);
            match line {
                Ok(line) => {
                    if !self.render(&line, &mut out) {
                        self.flush(&mut out);
                        return Ok(Done::Enough);
                    }
                }
                Err(error) => tracing::debug!(%error, "a line of a log is damaged"),
            }
            partial.clear();
            if out.len() >= 32 << 10 && !self.flush(&mut out) {
                return Ok(Done::Enough);
            }
        }
    }

    fn flush(&self, out: &mut Vec<u8>) -> bool {
        out.is_empty() || self.sender.blocking_send(Bytes::from(std::mem::take(out))).is_ok()
    }

    /// Appends a line as the client wants it; false when `until` has passed.
    fn render(&self, line: &Line<'_>, out: &mut Vec<u8>) -> bool {
        let request = &self.request;
        if request.since.is_some() || request.until.is_some() {
            let Ok(time) = line.time.parse::<Timestamp>() else { return true };
            if request.since.is_some_and(|since| time < since) {
                return true;
            }
            if request.until.is_some_and(|until| time > until) {
                return false;
            }
        }
        let kind = if line.stream == "stderr" { frame::Kind::Stderr } else { frame::Kind::Stdout };
        let wanted = if kind == frame::Kind::Stderr { request.stderr } else { request.stdout };
        // On a terminal there is one stream only.
        if !wanted && !self.tty {
            return true;
        }
        let mut text = String::new();
        if request.timestamps {
            text.push_str(&padded(&line.time));
            text.push(' ');
        }
        if request.details {
            let attrs: Vec<String> = line
                .attrs
                .iter()
                .flatten()
                .map(|(name, value)| format!("{}={}", escaped(name), escaped(value)))
                .collect();
            text.push_str(&attrs.join(","));
            text.push(' ');
        }
        text.push_str(&line.log);
        if !self.raw {
            out.extend_from_slice(&frame::header(kind, text.len()));
        }
        out.extend_from_slice(text.as_bytes());
        true
    }
}

/// Nine digits of fraction, as docker prints log times.
fn padded(time: &str) -> String {
    let Some(body) = time.strip_suffix('Z') else { return time.to_owned() };
    let (seconds, fraction) = body.split_once('.').unwrap_or((body, ""));
    format!("{seconds}.{fraction:0<9}Z")
}

fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push_str(&hex::encode_upper([byte]));
        }
    }
    out
}

fn open(path: &Path) -> Option<(File, FileId)> {
    let file = File::open(path).ok()?;
    let id = FileId::of(&file.metadata().ok()?);
    Some((file, id))
}

fn rotated(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// A rotated file, compressed or not; told apart by what it was written as.
fn open_rotated(path: &Path, number: u32) -> Option<(File, FileId)> {
    let plain = rotated(path, number);
    let mut packed = plain.clone().into_os_string();
    packed.push(".gz");
    match open_packed(Path::new(&packed)) {
        Ok(found) => Some(found),
        Err(error) => {
            if error.kind() != std::io::ErrorKind::NotFound {
                tracing::warn!(path = %packed.display(), %error, "read a compressed log");
            }
            open(&plain)
        }
    }
}

/// A compressed file's contents in a file without a name, to move about in.
fn open_packed(path: &Path) -> std::io::Result<(File, FileId)> {
    let file = File::open(path)?;
    let own = FileId::of(&file.metadata()?);
    let mut decoder = flate2::bufread::GzDecoder::new(BufReader::with_capacity(64 << 10, file));
    let dir = path.parent().unwrap_or(Path::new("/"));
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::CLOEXEC;
    let mut plain = File::from(rustix::fs::open(dir, flags, rustix::fs::Mode::RUSR)?);
    std::io::copy(&mut decoder, &mut plain)?;
    plain.seek(SeekFrom::Start(0))?;
    let id = FileId::original(&decoder).unwrap_or(own);
    Ok((plain, id))
}

/// All files of a log, oldest first.
fn files(path: &Path) -> Vec<(File, FileId)> {
    let mut all: Vec<(File, FileId)> = Vec::new();
    // Newest first, so that a rotation meanwhile shows as the same file twice and not as a gap.
    if let Some(current) = open(path) {
        all.push(current);
    }
    for number in 1.. {
        let Some(found) = open_rotated(path, number) else { break };
        if all.iter().all(|(_, id)| *id != found.1) {
            all.push(found);
        }
    }
    all.reverse();
    all
}

/// The file that followed this one; `None` while it is the current one.
fn after(path: &Path, id: FileId) -> Option<(File, FileId)> {
    if std::fs::metadata(path).is_ok_and(|current| FileId::of(&current) == id) {
        return None;
    }
    let all = files(path);
    match all.iter().position(|(_, other)| *other == id) {
        Some(at) => all.into_iter().nth(at + 1),
        // Our file has been rotated away altogether: go on with the oldest.
        None => all.into_iter().next(),
    }
}

/// The files that hold the last `lines` lines, the first of them positioned at its first wanted line.
fn tail(files: Vec<(File, FileId)>, lines: usize) -> std::io::Result<Vec<(File, FileId)>> {
    let mut kept = Vec::new();
    let mut wanted = lines;
    for (mut file, id) in files.into_iter().rev() {
        if wanted == 0 && !kept.is_empty() {
            break;
        }
        let (at, found) = last_lines(&mut file, wanted)?;
        file.seek(SeekFrom::Start(at))?;
        wanted -= found.min(wanted);
        kept.push((file, id));
    }
    kept.reverse();
    Ok(kept)
}

/// Where the last `wanted` complete lines of a file begin, and how many there are.
fn last_lines(file: &mut File, wanted: usize) -> std::io::Result<(u64, usize)> {
    const BLOCK: u64 = 64 << 10;
    let length = file.metadata()?.len();
    let mut end = length;
    let mut newlines = 0;
    let mut buffer = vec![0_u8; BLOCK as usize];
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        let block = &mut buffer[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(block)?;
        for (offset, byte) in block.iter().enumerate().rev() {
            if *byte == b'\n' {
                if newlines == wanted {
                    return Ok((start + offset as u64 + 1, wanted));
                }
                newlines += 1;
            }
        }
        end = start;
    }
    Ok((0, newlines))
}

/// The kernel's word that the log has changed.
struct Watch(std::os::fd::OwnedFd);

impl Watch {
    fn new(path: &Path) -> std::io::Result<Self> {
        use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
        let fd = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let dir = path.parent().unwrap_or(Path::new("/"));
        add_watch(
            &fd,
            dir,
            WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE_SELF,
        )?;
        Ok(Self(fd))
    }

    /// Until something happens in the log's directory, or `stop` is set.
    fn wait(&self, stop: &Stop) -> std::io::Result<()> {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut fds = [PollFd::new(&self.0, PollFlags::IN), PollFd::new(&*stop.0, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut buffer = [0_u8; 4096];
        while rustix::io::read(&self.0, &mut buffer).is_ok_and(|count| count > 0) {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn line(text: &str, second: u32) -> String {
        format!(
            "{{\"log\":\"{text}\\n\",\"stream\":\"stdout\",\"time\":\"2026-01-01T00:00:{second:02}.5Z\"}}\n"
        )
    }

    fn read(path: &Path, request: LogRequest) -> String {
        let (sender, mut chunks) = mpsc::channel(16);
        let stop = Stop::new().unwrap();
        let path = path.to_owned();
        let reader = std::thread::spawn(move || {
            Reader { request: LogRequest { stdout: true, ..request }, tty: true, raw: true, sender, stop }
                .run(&path)
                .unwrap();
        });
        let mut out = Vec::new();
        while let Some(chunk) = chunks.blocking_recv() {
            out.extend_from_slice(&chunk);
        }
        reader.join().unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn tail_reaches_into_rotated_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c-json.log");
        std::fs::write(rotated(&path, 1), line("one", 1) + &line("two", 2)).unwrap();
        std::fs::write(&path, line("three", 3)).unwrap();
        assert_eq!(read(&path, LogRequest::default()), "one\ntwo\nthree\n");
        assert_eq!(read(&path, LogRequest { tail: Some(2), ..Default::default() }), "two\nthree\n");
        assert_eq!(read(&path, LogRequest { tail: Some(0), ..Default::default() }), "");
        assert_eq!(read(&path, LogRequest { tail: Some(99), ..Default::default() }), "one\ntwo\nthree\n");
    }

    #[test]
    fn compressed_files_are_read_and_known_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c-json.log");
        std::fs::write(&path, line("one", 1)).unwrap();
        let id = FileId::of(&std::fs::metadata(&path).unwrap());
        let mut packed = rotated(&path, 1).into_os_string();
        packed.push(".gz");
        let file = File::create(packed).unwrap();
        let mut encoder =
            flate2::GzBuilder::new().comment(id.to_string()).write(file, flate2::Compression::fast());
        encoder.write_all(line("one", 1).as_bytes()).unwrap();
        encoder.finish().unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, line("two", 2)).unwrap();
        assert_eq!(read(&path, LogRequest::default()), "one\ntwo\n");
        assert_eq!(read(&path, LogRequest { tail: Some(1), ..Default::default() }), "two\n");
        // A follower that has read the plain file goes on with the next, not from the beginning.
        let next = after(&path, id).unwrap();
        assert_eq!(next.1, FileId::of(&std::fs::metadata(&path).unwrap()));
    }

    #[test]
    fn since_until_and_timestamps() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c-json.log");
        std::fs::write(&path, line("one", 1) + &line("two", 2) + "damaged\n" + &line("three", 3)).unwrap();
        let at = |second: u32| Some(format!("2026-01-01T00:00:{second:02}Z").parse().unwrap());
        let request = LogRequest { since: at(2), until: at(3), timestamps: true, ..Default::default() };
        assert_eq!(read(&path, request), "2026-01-01T00:00:02.500000000Z two\n");
    }

    #[test]
    fn following_sees_rotations_and_ends_with_the_container() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c-json.log");
        std::fs::write(&path, line("one", 1)).unwrap();
        let (sender, mut chunks) = mpsc::channel(16);
        let stop = Stop::new().unwrap();
        let (told, of) = (stop.clone(), path.clone());
        let reader = std::thread::spawn(move || {
            let request = LogRequest { follow: true, stdout: true, ..Default::default() };
            Reader { request, tty: true, raw: true, sender, stop }.run(&of).unwrap();
        });
        let mut seen = String::new();
        let mut expect = |text: &str| {
            while !seen.ends_with(text) {
                seen.push_str(std::str::from_utf8(&chunks.blocking_recv().unwrap()).unwrap());
            }
        };
        expect("one\n");
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(line("two", 2).as_bytes()).unwrap();
        expect("two\n");
        std::fs::rename(&path, rotated(&path, 1)).unwrap();
        std::fs::write(&path, line("three", 3)).unwrap();
        expect("three\n");
        told.set();
        assert!(chunks.blocking_recv().is_none());
        assert_eq!(seen, "one\ntwo\nthree\n");
        reader.join().unwrap();
    }
}
