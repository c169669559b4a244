//! docker's JSON progress streams: pull, push, load, build.
//!
//! Invariant: an error before the first message is a status code; a later one is a last message with both
//! `errorDetail` and `error`.

use std::future::Future;
use std::io;

use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;
use tokio::sync::mpsc;

use super::{Error, Reply};

/// Where a long operation reports to; each message is one JSON object followed by `\r\n`.
#[derive(Clone)]
pub struct ProgressSink {
    messages: mpsc::Sender<Bytes>,
}

/// Messages a slow client may lag behind before the operation waits for it.
const BACKLOG: usize = 64;

impl ProgressSink {
    /// Sends one message; waits while the client is slow. Messages to a client that left are dropped.
    pub async fn send<T: Serialize>(&self, message: &T) {
        if let Some(line) = line(message)
            && self.messages.send(line).await.is_err()
        {
            tracing::trace!("a progress message had no reader");
        }
    }

    /// As [`ProgressSink::send`], for code that runs on a blocking thread.
    pub fn send_blocking<T: Serialize>(&self, message: &T) {
        if let Some(line) = line(message)
            && self.messages.blocking_send(line).is_err()
        {
            tracing::trace!("a progress message had no reader");
        }
    }

    /// Sends unless the client is slow: for intermediate counts that the next one makes obsolete.
    pub fn try_send<T: Serialize>(&self, message: &T) {
        if let Some(line) = line(message)
            && self.messages.try_send(line).is_err()
        {
            tracing::trace!("an intermediate progress message was skipped");
        }
    }

    /// Whether nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.messages.is_closed()
    }
}

fn line<T: Serialize>(message: &T) -> Option<Bytes> {
    match serde_json::to_vec(message) {
        Ok(mut text) => {
            text.extend_from_slice(b"\r\n");
            Some(Bytes::from(text))
        }
        Err(error) => {
            tracing::warn!(%error, "a progress message could not be written");
            None
        }
    }
}

#[derive(Serialize)]
struct Failure<'a> {
    #[serde(rename = "errorDetail")]
    detail: Detail<'a>,
    error: &'a str,
}

#[derive(Serialize)]
struct Detail<'a> {
    message: &'a str,
}

impl Reply {
    /// Runs `operation` while streaming what it reports. The status waits for the first message: an operation
    /// that fails before it answers with its error's status. When the client leaves, the operation is dropped.
    pub async fn progress<F, Fut>(operation: F) -> Result<Self, Error>
    where
        F: FnOnce(ProgressSink) -> Fut,
        Fut: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let (messages, mut lines) = mpsc::channel(BACKLOG);
        let mut task = Task(tokio::spawn(operation(ProgressSink { messages })));
        let Some(first) = lines.recv().await else {
            // Every sender is gone without a word: the operation ended.
            task.finish().await?;
            return Ok(Self::bytes(http::StatusCode::OK, "application/json", Bytes::new()));
        };
        let state = (Some(first), Some((lines, task)));
        Ok(Self::stream(
            "application/json",
            stream::unfold(state, |(first, rest)| async move {
                if let Some(line) = first {
                    return Some((Ok::<_, io::Error>(line), (None, rest)));
                }
                let (mut lines, mut task) = rest?;
                match lines.recv().await {
                    Some(line) => Some((Ok(line), (None, Some((lines, task))))),
                    None => match task.finish().await {
                        Ok(()) => None,
                        Err(error) => {
                            let message = error.message.as_str();
                            line(&Failure { detail: Detail { message }, error: message })
                                .map(|line| (Ok(line), (None, None)))
                        }
                    },
                }
            }),
        ))
    }
}

/// The running operation; dropped with the stream when the client leaves.
struct Task(tokio::task::JoinHandle<Result<(), Error>>);

impl Task {
    async fn finish(&mut self) -> Result<(), Error> {
        match (&mut self.0).await {
            Ok(result) => result,
            Err(failure) => {
                tracing::error!(error = %failure, "an operation with progress broke");
                Err(Error::internal("the operation broke inside the engine; its log says more"))
            }
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
