//! What a handler answers when it cannot do what was asked: a class and a sentence.
//!
//! Invariant: [`status`] is the only place in the program where an error becomes an HTTP status.

pub use brigantine_engine::Class;
use http::StatusCode;
use serde::Serialize;

/// The one mapping from error class to HTTP status.
pub fn status(class: Class) -> StatusCode {
    match class {
        Class::NotModified => StatusCode::NOT_MODIFIED,
        Class::InvalidParameter => StatusCode::BAD_REQUEST,
        Class::Unauthorized => StatusCode::UNAUTHORIZED,
        Class::Forbidden => StatusCode::FORBIDDEN,
        Class::NotFound => StatusCode::NOT_FOUND,
        Class::Conflict => StatusCode::CONFLICT,
        Class::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        Class::NotImplemented => StatusCode::NOT_IMPLEMENTED,
        Class::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
    }
}

impl From<brigantine_engine::Error> for Error {
    fn from(error: brigantine_engine::Error) -> Self {
        Self::new(error.class(), error.report())
    }
}

/// A failed request: its class decides the status, its message is what the client shows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub class: Class,
    pub message: String,
}

/// The JSON body of every 4xx and 5xx.
#[derive(Serialize)]
pub(crate) struct ErrorBody<'a> {
    pub message: &'a str,
}

impl Error {
    pub fn new(class: Class, message: impl Into<String>) -> Self {
        Self { class, message: message.into() }
    }

    /// 304: the object is already in the state asked for.
    pub fn not_modified() -> Self {
        Self::new(Class::NotModified, "")
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Class::InvalidParameter, message)
    }

    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(Class::Unauthorized, message)
    }

    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(Class::Forbidden, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Class::NotFound, message)
    }

    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(Class::Conflict, message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Class::Internal, message)
    }

    pub fn not_implemented(message: impl Into<String>) -> Self {
        Self::new(Class::NotImplemented, message)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Class::Unavailable, message)
    }

    /// An error with all its causes as one line: `context: cause: cause`.
    pub fn from_chain(class: Class, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(class, chain(error))
    }
}

/// The error and its sources, joined by `: `.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
