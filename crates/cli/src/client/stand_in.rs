//! A file as a request's body that this process never reads: the kernel hands the file's pages to the connection (sendfile(2)).
//!
//! Between a body and its connection there is an HTTP library that knows bytes only. So the body yields bytes that stand for
//! the file's, and the connection, which is ours again, sends the file where it is asked to write one of these.
//!
//! Invariant: bytes that stand for others are never sent themselves. They are known by their place in memory, which nobody
//! else has while one of them is there; a library that copied them would send zeros, which the test below would see.

use std::fs::File;
use std::io::{self, Seek as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use rustix::io::Errno;

/// So much is asked of the kernel at once. The memory is never touched, so that it takes none.
const PIECE: usize = 1 << 20;

static ALL: Mutex<Vec<Weak<Standing>>> = Mutex::new(Vec::new());

struct Standing {
    region: Vec<u8>,
    file: File,
    /// How far the file has been sent.
    position: AtomicU64,
}

struct Owner(Arc<Standing>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0.region
    }
}

/// The rest of a file, as long as it was when this was made.
pub struct FileBody {
    piece: Bytes,
    left: u64,
}

impl FileBody {
    /// What is left of `file` from where it stands; nothing of what is no regular file, or has no length.
    pub fn of(file: &mut File) -> io::Result<Option<Self>> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Ok(None);
        }
        let position = file.stream_position()?;
        let left = metadata.len().saturating_sub(position);
        if left == 0 {
            return Ok(None);
        }
        // The file may be read once more from its beginning: nobody waits for what is not needed yet.
        rustix::fs::fadvise(&*file, position, None, rustix::fs::Advice::Sequential)?;
        let standing = Arc::new(Standing {
            region: vec![0; PIECE],
            file: file.try_clone()?,
            position: AtomicU64::new(position),
        });
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|known| known.strong_count() > 0);
        all.push(Arc::downgrade(&standing));
        Ok(Some(Self { piece: Bytes::from_owner(Owner(standing)), left }))
    }
}

impl Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let length = usize::try_from(self.left).unwrap_or(usize::MAX).min(PIECE);
        self.left -= length as u64;
        Poll::Ready(Some(Ok(Frame::data(self.piece.slice(..length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// The file that bytes stand for.
pub struct Sent(Arc<Standing>);

impl Sent {
    /// If these stand for a file's.
    pub fn find(bytes: &[u8]) -> Option<Self> {
        let all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter()
            .filter_map(Weak::upgrade)
            .find(|standing| standing.region.as_ptr_range().contains(&bytes.as_ptr()))
            .map(Self)
    }

    /// Sends so many of the file's bytes, or fewer.
    pub fn send(&self, to: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
        let mut position = self.0.position.load(Ordering::Relaxed);
        let sent = loop {
            match rustix::fs::sendfile(to, self.0.file.as_fd(), Some(&mut position), length) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the file became shorter while it was sent",
                    ));
                }
                Ok(sent) => break sent,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        self.0.position.store(position, Ordering::Relaxed);
        Ok(sent)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _, SeekFrom, Write as _};

    use http_body_util::BodyExt as _;
    use hyper::Request;
    use hyper::client::conn::http1::handshake;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixStream;

    use super::super::Wire;
    use super::*;

    fn file(length: usize) -> (File, Vec<u8>) {
        let data: Vec<u8> = (0..length).map(|at| ((at / 7) ^ at) as u8 | 1).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&data).unwrap();
        (file, data)
    }

    /// What an engine receives when the file is sent through the HTTP library.
    async fn received(body: FileBody) -> (String, Vec<u8>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let engine = tokio::spawn(async move {
            let mut all = Vec::new();
            let mut buffer = vec![0; 100_000];
            loop {
                let count = theirs.read(&mut buffer).await.unwrap();
                all.extend_from_slice(&buffer[..count]);
                let text = String::from_utf8_lossy(&all[..all.len().min(2000)]).into_owned();
                let Some(head) = text.find("\r\n\r\n") else { continue };
                let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
                if count == 0 || all.len() == head + 4 + length.parse::<usize>().unwrap() {
                    theirs.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
                    return (text[..head].to_owned(), all.split_off(head + 4));
                }
            }
        });
        let (mut sender, connection) = handshake(TokioIo::new(Wire::Unix(ours))).await.unwrap();
        let connection = tokio::spawn(connection);
        let request = Request::post("/load").header("host", "engine").body(body.boxed()).unwrap();
        assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
        drop(sender);
        connection.await.unwrap().unwrap();
        engine.await.unwrap()
    }

    #[tokio::test]
    async fn a_file_arrives_as_it_is_from_where_it_stands() {
        for (length, from) in
            [(1, 0), (5000, 4999), (PIECE, 0), (3 * PIECE + 17, 0), (3 * PIECE + 17, PIECE + 1)]
        {
            let (mut file, data) = file(length);
            file.seek(SeekFrom::Start(from as u64)).unwrap();
            let body = FileBody::of(&mut file).unwrap().unwrap();
            let (head, arrived) = received(body).await;
            assert!(arrived == data[from..], "{length} bytes from {from}: {head}");
        }
    }

    #[test]
    fn what_is_no_file_or_has_no_length_is_read_instead() {
        let (mut whole, data) = file(100);
        assert!(FileBody::of(&mut whole).unwrap().is_none(), "it stands at its end");
        whole.rewind().unwrap();
        assert!(FileBody::of(&mut whole).unwrap().is_some());
        let mut read = Vec::new();
        whole.read_to_end(&mut read).unwrap();
        assert_eq!(read, data, "the file was left where it stood");
        assert!(FileBody::of(&mut File::open("/proc/self/status").unwrap()).unwrap().is_none());
        let (reader, _writer) = std::io::pipe().unwrap();
        let mut pipe = File::from(std::os::fd::OwnedFd::from(reader));
        assert!(FileBody::of(&mut pipe).unwrap().is_none());
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let (mut file, _) = file(100);
        file.rewind().unwrap();
        let body = FileBody::of(&mut file).unwrap().unwrap();
        file.set_len(0).unwrap();
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let sent = Sent::find(&body.piece).unwrap();
        assert_eq!(sent.send(ours.as_fd(), 100).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        drop((body, sent));
        assert!(Sent::find(&[0; 10]).is_none());
    }
}
