//! Somebody outside who is asked about each request before it is carried out, and about its answer before it is sent.
//!
//! Invariant: nothing is read, made or sent that was not let through; whoever cannot be asked lets nothing through.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};

use super::Error;

/// The most of a JSON body that can be shown; a request with a longer one is refused.
pub const BODY_LIMIT: usize = 1 << 20;

/// Who sent a request, as the connection tells.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// The common name of a client's certificate.
    pub name: String,
    /// That certificate and those that vouch for it, in DER.
    pub certificates: Vec<Vec<u8>>,
}

/// A request as it came.
#[derive(Debug)]
pub struct Asked {
    pub method: Method,
    /// With version and query.
    pub uri: String,
    pub headers: HeaderMap,
    /// A JSON body; none of other bodies.
    pub body: Option<Bytes>,
    pub peer: Arc<Peer>,
}

/// An answer that is about to be sent.
#[derive(Debug)]
pub struct Answered {
    pub status: StatusCode,
    pub headers: HeaderMap,
    /// A JSON document that is whole; nothing of a stream.
    pub body: Option<Bytes>,
}

/// What a gate will have said.
pub type Verdict<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + Send + 'a>>;

/// See the module.
pub trait Gate: Send + Sync {
    /// Whether there is anybody to ask.
    fn is_manned(&self) -> bool;

    /// Asks about a request.
    fn before<'a>(&'a self, asked: &'a Asked) -> Verdict<'a>;

    /// Asks about its answer.
    fn after<'a>(&'a self, asked: &'a Asked, answered: &'a Answered) -> Verdict<'a>;
}

/// Whether a body of these headers and path is shown: JSON is, and never what somebody logs in with.
pub(crate) fn shows(headers: &HeaderMap, path: &str) -> bool {
    let given = headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = given.split(';').next().unwrap_or("").trim();
    essence.eq_ignore_ascii_case("application/json") && path != "/auth"
}
