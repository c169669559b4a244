//! Bodies that are read from files or standard input while they are sent.

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::client::Body;
use crate::fault::{Fault, Outcome};
use crate::terminal;

pub type Source = Box<dyn AsyncRead + Send + Sync + Unpin>;

/// Opens a file, or standard input for `-` and the empty path. A terminal is no archive.
pub async fn open(path: &str) -> Outcome<Source> {
    if path.is_empty() || path == "-" {
        if terminal::stdin_is_terminal() {
            return Err(Fault::said(
                "requested load from stdin, but stdin is empty: give a file, or pipe an archive in",
            ));
        }
        return Ok(Box::new(tokio::io::stdin()));
    }
    let file = tokio::fs::File::open(path)
        .await
        .map_err(|error| Fault::said(format!("open {path}: {}", crate::output::os_text(&error))))?;
    Ok(Box::new(file))
}

/// The rest of a reader as a request's body.
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
