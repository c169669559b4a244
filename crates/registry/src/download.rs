//! Fetching a file from any web server, as `import URL` does.
//!
//! Invariant: redirects stay within http and https and end; a body that breaks off is an error, not an end.

use std::io;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt as _};
use http::header::LOCATION;
use url::Url;

use crate::hosts::Trust;
use crate::{Client, Error, redacted};

/// As many as browsers follow.
const REDIRECTS: usize = 20;

/// A file on its way.
pub struct Download {
    /// What the server says it is.
    pub length: Option<u64>,
    /// Where it is from, fit for people.
    pub from: String,
    answer: reqwest::Response,
}

impl Download {
    /// Its bytes.
    pub fn into_stream(self) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        self.answer.bytes_stream().map_err(io::Error::other)
    }
}

impl Client {
    /// Starts fetching what is at `url`; without a scheme `http://` is meant.
    pub async fn download(&self, url: &str) -> Result<Download, Error> {
        let whole = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let from = redacted(&whole).into_owned();
        let bad = |why: String| Error::Invalid(format!("download {from}: {why}"));
        let mut at = Url::parse(&whole).map_err(|error| bad(error.to_string()))?;
        let client = self.transport().client(&Trust::default())?;
        for _ in 0..=REDIRECTS {
            if !matches!(at.scheme(), "http" | "https") {
                return Err(bad(format!("{:?} is neither http nor https", at.scheme())));
            }
            let answer = client.get(at.clone()).send().await.map_err(|error| Error::Unreachable {
                method: "Get",
                url: from.clone(),
                cause: chain(&error),
            })?;
            if answer.status().is_redirection()
                && let Some(location) = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok())
            {
                at = at.join(location).map_err(|error| bad(error.to_string()))?;
                continue;
            }
            if !answer.status().is_success() {
                return Err(bad(format!("the server answered {}", answer.status())));
            }
            return Ok(Download { length: answer.content_length(), from, answer });
        }
        Err(bad(format!("more than {REDIRECTS} redirects")))
    }
}

/// The error with its causes, without the address that each of them repeats.
fn chain(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    if text.is_empty() { error.to_string() } else { text }
}
