//! Bodies of answers: from memory, and from files piece by piece.
//!
//! Invariant: no answer holds more than one piece of a file in memory.

use std::fs::File;
use std::io::{self, SeekFrom};

use bytes::Bytes;
use futures_util::TryStreamExt;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use super::refusal::Refusal;

/// What an answer carries.
pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;
/// A granted request's answer, or why it is not granted.
pub(super) type Outcome = Result<Response<Body>, Refusal>;

/// Bytes of a file that are read at once.
const PIECE: usize = 256 << 10;

pub(super) const DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

pub(super) fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

pub(super) fn empty(status: StatusCode) -> Response<Body> {
    let mut answer = Response::new(full(Bytes::new()));
    *answer.status_mut() = status;
    answer
}

/// A JSON document.
pub(super) fn json(document: &impl Serialize) -> Outcome {
    json_as(document, "application/json")
}

pub(super) fn json_as(document: &impl Serialize, media_type: &'static str) -> Outcome {
    let text = serde_json::to_vec(document).map_err(io::Error::other)?;
    let mut answer = Response::new(full(text.into()));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    Ok(answer)
}

/// `length` bytes of a file from `start` on.
pub(super) async fn file(file: File, start: u64, length: u64) -> io::Result<Body> {
    let mut file = tokio::fs::File::from_std(file);
    if start > 0 {
        file.seek(SeekFrom::Start(start)).await?;
    }
    let pieces = ReaderStream::with_capacity(file.take(length), PIECE);
    Ok(StreamBody::new(pieces.map_ok(Frame::data)).boxed_unsync())
}

/// Sets a header whose value is known to be one, or leaves it out.
pub(super) fn set(answer: &mut Response<Body>, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        answer.headers_mut().append(name, value);
    }
}

/// The length of what a HEAD request would get, or of a body that hyper cannot know.
pub(super) fn set_length(answer: &mut Response<Body>, length: u64) {
    answer.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
}

/// Runs what touches files on a thread that may wait.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(io::Error::other(error).into()),
    }
}
