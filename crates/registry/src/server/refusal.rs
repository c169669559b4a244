//! Answers that refuse: a status, one of the specification's codes and a sentence.
//!
//! Invariant: every refusal is the JSON document of the distribution specification, and none tells a secret or a path
//! of this machine.

use std::io;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName};
use http::{HeaderValue, Response, StatusCode};
use serde::Serialize;

use super::reply::{Body, full};

/// Why a request is not granted.
#[derive(Debug)]
pub(super) struct Refusal {
    pub status: StatusCode,
    pub code: &'static str,
    pub message: String,
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

impl Refusal {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), headers: Vec::new() }
    }

    pub fn with(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.push((name, value));
        }
        self
    }

    pub fn name_invalid(name: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "NAME_INVALID", format!("{name:?} is not a repository's name"))
    }

    pub fn name_unknown(name: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", format!("there is no repository {name}"))
    }

    pub fn blob_unknown(digest: impl std::fmt::Display, name: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", format!("repository {name} has no blob {digest}"))
    }

    pub fn manifest_unknown(reference: impl std::fmt::Display, name: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "MANIFEST_UNKNOWN",
            format!("repository {name} has no manifest {reference}"),
        )
    }

    pub fn manifest_invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message)
    }

    pub fn upload_unknown(id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", format!("there is no upload {id}"))
    }

    pub fn digest_invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", message)
    }

    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", message)
    }

    pub fn denied(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "DENIED", message)
    }

    /// The document, as an answer.
    pub fn answer(self) -> Response<Body> {
        #[derive(Serialize)]
        struct Document<'a> {
            errors: [Item<'a>; 1],
        }
        #[derive(Serialize)]
        struct Item<'a> {
            code: &'a str,
            message: &'a str,
            detail: Option<()>,
        }
        let item = Item { code: self.code, message: &self.message, detail: None };
        let text = serde_json::to_vec(&Document { errors: [item] }).unwrap_or_default();
        let mut answer = Response::new(full(Bytes::from(text)));
        *answer.status_mut() = self.status;
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        for (name, value) in self.headers {
            headers.append(name, value);
        }
        answer
    }
}

impl From<io::Error> for Refusal {
    /// The cause goes to the log, not to the client: it may name files.
    fn from(error: io::Error) -> Self {
        tracing::error!(error = %error, "the registry's storage failed");
        let (status, message) = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                (StatusCode::INSUFFICIENT_STORAGE, "the registry's storage is full")
            }
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "the registry's storage failed: its log says how"),
        };
        Self::new(status, "UNKNOWN", message)
    }
}
