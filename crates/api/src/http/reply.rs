//! What a handler answers: JSON, nothing, a stream, or the connection itself.
//!
//! Invariant: JSON ends with a newline, and 204 and 304 carry no body.

use std::future::Future;
use std::io;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Frame;
use serde::Serialize;
use tokio::io::AsyncRead;

use super::error::{Class, ErrorBody};
use super::hijack::{Hijack, Hijacked, StreamType};
use super::{Error, Request};

pub(crate) type ReplyBody = UnsyncBoxBody<Bytes, io::Error>;

/// An answer under construction.
pub struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: ReplyBody,
    pub(crate) hijack: Option<Hijack>,
    /// The body once more, when all of it is there.
    pub(crate) whole: Option<Bytes>,
}

impl Reply {
    fn with_body(status: StatusCode, body: ReplyBody) -> Self {
        Self { status, headers: HeaderMap::new(), body, hijack: None, whole: None }
    }

    /// A status without a body: `Reply::empty(StatusCode::NO_CONTENT)`.
    pub fn empty(status: StatusCode) -> Self {
        Self::with_body(status, Empty::new().map_err(|never| match never {}).boxed_unsync())
    }

    /// 204.
    pub fn no_content() -> Self {
        Self::empty(StatusCode::NO_CONTENT)
    }

    /// 200 and a JSON document.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<Self, Error> {
        Self::json_with(StatusCode::OK, value)
    }

    /// 201 and a JSON document.
    pub fn created<T: Serialize + ?Sized>(value: &T) -> Result<Self, Error> {
        Self::json_with(StatusCode::CREATED, value)
    }

    pub fn json_with<T: Serialize + ?Sized>(status: StatusCode, value: &T) -> Result<Self, Error> {
        let mut text = serde_json::to_vec(value)
            .map_err(|error| Error::internal(format!("writing the answer: {error}")))?;
        text.push(b'\n');
        Ok(Self::bytes(status, "application/json", text))
    }

    /// A body that is all there.
    pub fn bytes(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        let whole = body.into();
        let body = Full::new(whole.clone()).map_err(|never| match never {}).boxed_unsync();
        let reply = Self { whole: Some(whole), ..Self::with_body(status, body) };
        reply.header(header::CONTENT_TYPE, HeaderValue::from_static(content_type))
    }

    /// 200 and a stream. The header goes out at once, before the first chunk exists.
    pub fn stream<S>(content_type: &'static str, chunks: S) -> Self
    where
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        let body = StreamBody::new(chunks.map(|chunk| chunk.map(Frame::data)));
        Self::with_body(StatusCode::OK, BodyExt::boxed_unsync(body))
            .header(header::CONTENT_TYPE, HeaderValue::from_static(content_type))
    }

    /// 200 and the bytes of a reader.
    pub fn reader(content_type: &'static str, reader: impl AsyncRead + Send + 'static) -> Self {
        Self::stream(content_type, tokio_util::io::ReaderStream::with_capacity(reader, 64 << 10))
    }

    /// 200 whose JSON body becomes known later; the header goes out at once (`wait`).
    /// A failure after the header cannot change the status any more: it is sent as docker's error document.
    pub fn json_later<T, F>(document: F) -> Self
    where
        T: Serialize,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let chunk = async move {
            let text = match document.await {
                Ok(value) => serde_json::to_vec(&value),
                Err(error) => serde_json::to_vec(&ErrorBody { message: &error.message }),
            };
            let mut text = text.map_err(io::Error::other)?;
            text.push(b'\n');
            Ok(Bytes::from(text))
        };
        Self::stream("application/json", futures_util::stream::once(chunk))
    }

    /// Takes over the connection: `run` gets a duplex byte stream with every byte that followed the header.
    ///
    /// The header (101 when the client asked to upgrade, 200 otherwise) is written on its own before `run` starts.
    /// The connection closes when `run` is done with the stream.
    pub fn hijack<F, Fut>(request: &Request, stream_type: StreamType, run: F) -> Self
    where
        F: FnOnce(Hijacked) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let mut reply = Self::empty(StatusCode::OK);
        reply.hijack = Some(Hijack {
            upgrade: request.upgrade().map(str::to_owned),
            content_type: stream_type.content_type(),
            websocket: None,
            run: Box::new(move |stream| Box::pin(run(stream)) as Pin<Box<dyn Future<Output = ()> + Send>>),
        });
        reply
    }

    /// The same for a websocket: `accept` answers the client's key, `protocol` is the first it offered.
    pub fn websocket<F, Fut>(accept: &str, protocol: Option<&str>, run: F) -> Self
    where
        F: FnOnce(Hijacked) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let protocol = protocol.and_then(|all| all.split(',').next()).map(|first| first.trim().to_owned());
        let mut reply = Self::empty(StatusCode::OK);
        reply.hijack = Some(Hijack {
            upgrade: None,
            content_type: StreamType::Raw.content_type(),
            websocket: Some((accept.to_owned(), protocol)),
            run: Box::new(move |stream| Box::pin(run(stream)) as Pin<Box<dyn Future<Output = ()> + Send>>),
        });
        reply
    }

    /// Adds or replaces a header.
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// The document for a failed request; below API 1.24 docker sends plain text.
    pub(crate) fn error(error: &Error, plain: bool) -> Self {
        let status = super::error::status(error.class);
        if error.class == Class::NotModified {
            return Self::empty(status);
        }
        if plain {
            return Self::bytes(status, "text/plain; charset=utf-8", format!("{}\n", error.message));
        }
        Self::json_with(status, &ErrorBody { message: &error.message })
            .unwrap_or_else(|_unwritable| Self::empty(status))
    }
}
