//! A request as handlers see it: path parameters, query, headers, API version and a bounded or streamed body.
//!
//! Invariant: nothing of a body is read before a handler asks, and JSON is never read beyond [`JSON_LIMIT`] bytes
//! nor waited for longer than [`BODY_STALL`].

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, Method, header};
use http_body_util::{BodyExt, BodyStream, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use serde::de::DeserializeOwned;
use tokio::io::AsyncRead;

use super::{ApiVersion, Error, Filters, Query, json};

/// The most a JSON body may hold. Docker's largest (a create with many options) are a few hundred KiB.
pub const JSON_LIMIT: usize = 8 << 20;

/// How long a JSON body may make no progress.
pub const BODY_STALL: Duration = Duration::from_secs(30);

/// One request, after routing.
pub struct Request {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) params: Vec<(&'static str, String)>,
    pub(crate) query: Query,
    pub(crate) headers: HeaderMap,
    pub(crate) version: ApiVersion,
    pub(crate) body: Option<RequestBody>,
}

/// A body that comes, or one that was read before.
pub(crate) enum RequestBody {
    Coming(Incoming),
    Whole(Full<Bytes>),
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Coming(body) => Pin::new(body).poll_frame(cx),
            Self::Whole(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Coming(body) => body.is_end_stream(),
            Self::Whole(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Coming(body) => body.size_hint(),
            Self::Whole(body) => body.size_hint(),
        }
    }
}

/// A body as a byte stream, for archives.
pub type BodyReader = Pin<Box<dyn AsyncRead + Send>>;

/// A body in the pieces it comes in.
pub type BodyChunks = Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>;

impl Request {
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// The decoded path without its version.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The API version to answer by: the path's, else the newest.
    pub fn version(&self) -> ApiVersion {
        self.version
    }

    /// A path parameter of the route, decoded; empty when the route has none of that name.
    pub fn param(&self, name: &str) -> &str {
        self.params.iter().find(|(key, _)| *key == name).map_or("", |(_, value)| value.as_str())
    }

    /// Puts another value in a path parameter's place.
    pub(crate) fn set_param(&mut self, name: &str, value: String) {
        if let Some((_, held)) = self.params.iter_mut().find(|(key, _)| *key == name) {
            *held = value;
        }
    }

    pub fn query(&self) -> &Query {
        &self.query
    }

    /// The `filters` parameter, with only the given keys allowed.
    pub fn filters(&self, allowed: &[&str]) -> Result<Filters, Error> {
        Filters::parse(self.query.get("filters"))?.allow(allowed)
    }

    /// A header's value when it is present and text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// Every value of a header that may be repeated.
    pub fn headers(&self, name: &str) -> impl Iterator<Item = &str> {
        self.headers.get_all(name).iter().filter_map(|value| value.to_str().ok())
    }

    /// Whether the client asked to switch protocols, and to what.
    pub fn upgrade(&self) -> Option<&str> {
        self.headers.get(header::UPGRADE).map(|value| value.to_str().unwrap_or("tcp"))
    }

    /// Whether a body was announced.
    pub fn has_body(&self) -> bool {
        self.body.as_ref().is_some_and(|body| !body.is_end_stream())
    }

    /// The JSON body as `T`, by Go's rules (see [`json`]); a missing body is an error.
    pub async fn json_body<T: DeserializeOwned>(&mut self) -> Result<T, Error> {
        self.json_body_opt()
            .await?
            .ok_or_else(|| Error::invalid("invalid JSON: got EOF while reading request body"))
    }

    /// The JSON body, or `None` when there is none (kill, start and wait are sent without).
    pub async fn json_body_opt<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        if !self.has_body() {
            return Ok(None);
        }
        self.check_json_type()?;
        let body = self.bytes(JSON_LIMIT).await?;
        if body.is_empty() {
            return Ok(None);
        }
        json::from_slice(&body).map(Some)
    }

    /// The whole body, refused when longer than `limit`.
    pub async fn bytes(&mut self, limit: usize) -> Result<Bytes, Error> {
        let Some(mut body) = self.body.take() else { return Ok(Bytes::new()) };
        let too_large = || Error::invalid(format!("the request body is larger than {limit} bytes"));
        if body.size_hint().lower() > limit as u64 {
            return Err(too_large());
        }
        let mut collected = BytesMut::new();
        loop {
            let frame = tokio::time::timeout(BODY_STALL, body.frame()).await.map_err(|_elapsed| {
                Error::invalid(format!(
                    "the request body made no progress for {} seconds",
                    BODY_STALL.as_secs()
                ))
            })?;
            match frame {
                None => return Ok(collected.freeze()),
                Some(Err(error)) => {
                    return Err(Error::invalid(format!(
                        "reading the request body: {}",
                        super::error::chain(&error)
                    )));
                }
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        if collected.len() + data.len() > limit {
                            return Err(too_large());
                        }
                        collected.extend_from_slice(&data);
                    }
                }
            }
        }
    }

    /// The body as a stream of bytes without bound: an archive.
    pub fn reader(&mut self) -> BodyReader {
        Box::pin(tokio_util::io::StreamReader::new(self.chunks()))
    }

    /// The same in the pieces it comes in.
    pub fn chunks(&mut self) -> BodyChunks {
        let Some(body) = self.body.take() else { return Box::pin(futures_util::stream::empty()) };
        Box::pin(BodyStream::new(body).filter_map(|frame| async move {
            match frame {
                Ok(frame) => frame.into_data().ok().map(Ok),
                Err(error) => Some(Err(std::io::Error::other(error))),
            }
        }))
    }

    fn check_json_type(&self) -> Result<(), Error> {
        let given = self.header("content-type").unwrap_or("").trim();
        let essence = given.split(';').next().unwrap_or("").trim();
        if essence.eq_ignore_ascii_case("application/json") {
            return Ok(());
        }
        let known_form = essence.is_empty() || essence.split('/').count() == 2;
        Err(Error::invalid(if known_form {
            format!("unsupported Content-Type header ({given}): must be 'application/json'")
        } else {
            format!("malformed Content-Type header ({given}): must be 'application/json'")
        }))
    }
}
