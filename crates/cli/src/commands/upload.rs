//! Bodies that are read from files or standard input while they are sent.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd as _;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;

use crate::client::{Body, FileBody};
use crate::fault::{Fault, Outcome};
use crate::terminal;

/// So much is read and sent at once: fewer turns between the threads and the engine, and no more memory than
/// [`AHEAD`] times that.
const PIECE: usize = 512 << 10;
/// Pieces that are read while one is being sent.
const AHEAD: usize = 4;

/// Opens a file, or standard input for `-` and the empty path. A terminal is no archive.
pub fn open(path: &str) -> Outcome<File> {
    if path.is_empty() || path == "-" {
        if terminal::stdin_is_terminal() {
            return Err(Fault::said(
                "requested load from stdin, but stdin is empty: give a file, or pipe an archive in",
            ));
        }
        // What is redirected from a file is that file.
        let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(Fault::io("reading standard input"))?;
        return Ok(stdin.into());
    }
    let file = File::open(path)
        .map_err(|error| Fault::said(format!("open {path}: {}", crate::output::os_text(&error))))?;
    Ok(file)
}

/// The rest of a file as a request's body. One on a disk is sent by the kernel; a pipe or whatever else it is is read ahead
/// by a thread of its own, which nobody waits for at the end.
pub fn body_of(mut source: File) -> Body {
    match FileBody::of(&mut source) {
        Ok(Some(body)) => body.boxed(),
        // What cannot be read says so when it is.
        Ok(None) | Err(_) => read_ahead(source),
    }
}

fn read_ahead(mut source: File) -> Body {
    let (pieces, mut coming) = mpsc::channel(AHEAD);
    std::thread::spawn(move || {
        loop {
            let mut piece = vec![0; PIECE];
            let read = match source.read(&mut piece) {
                Ok(0) => return,
                Ok(length) => {
                    piece.truncate(length);
                    Ok(Frame::data(Bytes::from(piece)))
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let failed = read.is_err();
            if pieces.blocking_send(read).is_err() || failed {
                return;
            }
        }
    });
    StreamBody::new(futures_util::stream::poll_fn(move |context| coming.poll_recv(context))).boxed()
}

/// The rest of a stream as a request's body.
pub fn body(source: impl AsyncRead + Send + Sync + Unpin + 'static) -> Body {
    let pieces = futures_util::stream::unfold(source, |mut source| async move {
        let mut piece = BytesMut::with_capacity(64 * 1024);
        match source.read_buf(&mut piece).await {
            Ok(0) => None,
            Ok(_) => Some((Ok::<_, std::io::Error>(Frame::data(Bytes::from(piece))), source)),
            Err(error) => Some((Err(error), source)),
        }
    });
    StreamBody::new(pieces).boxed()
}
