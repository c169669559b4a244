//! Why a registry operation failed, in the words docker's clients know.
//!
//! Invariant: a message names the registry, repository or reference it is about, and never holds a secret.

use std::io;

use http::StatusCode;

/// A failed registry operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("manifest for {reference} not found: manifest unknown: {detail}")]
    ManifestUnknown { reference: String, detail: String },
    #[error(
        "pull access denied for {repository}, repository does not exist or may require 'docker login': {detail}"
    )]
    PullDenied { repository: String, detail: String },
    #[error("repository {repository} not found: {detail}")]
    NameUnknown { repository: String, detail: String },
    #[error("push access to {repository} denied: {detail}")]
    PushDenied { repository: String, detail: String },
    #[error("unauthorized: {detail}")]
    Unauthorized { registry: String, detail: String },
    #[error("no matching manifest for {platform} in the manifest list entries of {reference}")]
    NoPlatform { reference: String, platform: String },
    #[error(
        "image with reference {reference} was found but does not match the specified platform: wanted {wanted}, actual: {actual}"
    )]
    PlatformMismatch { reference: String, wanted: String, actual: String },
    /// No answer: refused, unresolved, reset, timed out.
    #[error("{method} \"{url}\": {cause}")]
    Unreachable { method: &'static str, url: String, cause: String },
    #[error("toomanyrequests: {url} answered 429: {detail}")]
    TooManyRequests { url: String, detail: String },
    #[error("{method} \"{url}\": the registry answered {status}: {detail}")]
    Status { method: &'static str, url: String, status: StatusCode, detail: String },
    /// The registry said something it must not.
    #[error("{subject}: {what}")]
    Protocol { subject: String, what: String },
    #[error("{0}")]
    Invalid(String),
    #[error("{what}")]
    Store { what: String, source: Box<brigantine_image::Error> },
    #[error("{what}")]
    Io { what: String, source: io::Error },
}

/// What a caller does about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    NotFound,
    Unauthorized,
    InvalidParameter,
    Internal,
}

impl Error {
    pub fn class(&self) -> Class {
        match self {
            Self::ManifestUnknown { .. }
            | Self::PullDenied { .. }
            | Self::NameUnknown { .. }
            | Self::NoPlatform { .. }
            | Self::PlatformMismatch { .. } => Class::NotFound,
            Self::Unauthorized { .. } | Self::PushDenied { .. } => Class::Unauthorized,
            Self::Invalid(_) => Class::InvalidParameter,
            Self::Store { source, .. } => match source.class() {
                brigantine_image::ErrorClass::NotFound => Class::NotFound,
                _ => Class::Internal,
            },
            Self::Unreachable { .. }
            | Self::TooManyRequests { .. }
            | Self::Status { .. }
            | Self::Protocol { .. }
            | Self::Io { .. } => Class::Internal,
        }
    }

    /// Whether trying the same again may help.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::TooManyRequests { .. } => true,
            Self::Status { status, .. } => status.is_server_error() || *status == StatusCode::REQUEST_TIMEOUT,
            _ => false,
        }
    }

    /// Whether content came whole and was not what its digest says.
    pub(crate) fn is_wrong_content(&self) -> bool {
        matches!(self, Self::Store { source, .. } if matches!(**source, brigantine_image::Error::DigestMismatch { .. }))
    }

    pub(crate) fn protocol(subject: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Protocol { subject: subject.into(), what: what.into() }
    }

    pub(crate) fn store(what: impl Into<String>) -> impl FnOnce(brigantine_image::Error) -> Self {
        let what = what.into();
        move |source| Self::Store { what, source: Box::new(source) }
    }

    /// The error with its causes on one line.
    pub fn report(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }

    /// From a request that got no answer. The URL is shown without its query: it may hold a signature.
    pub(crate) fn unreachable(method: &'static str, url: &url::Url, error: &reqwest::Error) -> Self {
        Self::Unreachable { method, url: shown(url), cause: cause(url, error) }
    }
}

/// A URL fit for messages: no user, password, query or fragment.
pub(crate) fn shown(url: &url::Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // Fails only for URLs that cannot have them.
    if url.set_password(None).is_err() || url.set_username("").is_err() {
        return url.to_string();
    }
    url.to_string()
}

/// The innermost cause, in the words people search for.
fn cause(url: &url::Url, error: &reqwest::Error) -> String {
    let host = url.host_str().unwrap_or_default();
    let address = format!("{host}:{}", url.port_or_known_default().unwrap_or(0));
    let mut innermost = error.to_string();
    let mut source = std::error::Error::source(error);
    let mut kind = None;
    let mut resolving = false;
    while let Some(cause) = source {
        innermost = cause.to_string();
        resolving |= innermost.starts_with("dns error");
        if let Some(error) = cause.downcast_ref::<io::Error>() {
            kind = Some(error.kind());
        }
        source = cause.source();
    }
    if resolving {
        return format!("dial tcp: lookup {host}: no such host ({innermost})");
    }
    match kind {
        Some(io::ErrorKind::ConnectionRefused) => format!("dial tcp {address}: connect: connection refused"),
        _ if error.is_timeout() => format!("{address}: timed out"),
        _ => innermost,
    }
}
