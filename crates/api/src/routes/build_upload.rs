//! A build's context that comes with a request of its own: `buildid=upload-request:<id>` carries the archive for the
//! build `<id>` with `remote=upload-request`. And (ours) a Dockerfile that comes with the build's request while its
//! context comes from elsewhere: `dockerfile=-` with `remote=<URL>`.
//!
//! Invariant: each waits for the other for a moment only, and an offer is taken once.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use brigantine_build::dockerfile::MOST;
use tokio::io::{AsyncRead, AsyncReadExt as _, ReadBuf};
use tokio::sync::{Notify, oneshot};

use crate::http::request::BodyReader;
use crate::http::{Error, Request};

/// How long one waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);

static OFFERS: LazyLock<Mutex<HashMap<String, Upload>>> = LazyLock::new(Mutex::default);
static ARRIVED: Notify = Notify::const_new();

fn offers() -> MutexGuard<'static, HashMap<String, Upload>> {
    OFFERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The archive, as the build reads it; its sender is answered when the build is done with it.
pub struct Upload {
    reader: BodyReader,
    _taken: oneshot::Sender<()>,
}

impl AsyncRead for Upload {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        self.reader.as_mut().poll_read(cx, buf)
    }
}

/// The build that a request uploads for.
pub fn offered(build: &str) -> Option<&str> {
    build.strip_prefix("upload-request:")
}

/// Offers an archive; returns when the build has read it.
pub async fn offer(build: &str, reader: BodyReader) -> Result<(), Error> {
    let (taken, done) = oneshot::channel();
    {
        let mut offers = offers();
        if offers.contains_key(build) {
            return Err(Error::conflict(format!("the context of the build {build:?} is being sent already")));
        }
        offers.insert(build.to_owned(), Upload { reader, _taken: taken });
    }
    ARRIVED.notify_waiters();
    let withdraw = Withdraw(build);
    let mut done = std::pin::pin!(done);
    if tokio::time::timeout(PATIENCE, &mut done).await.is_ok() {
        return Ok(());
    }
    if offers().contains_key(build) {
        return Err(Error::not_found(format!("no build {build:?} asks for a context")));
    }
    drop(withdraw);
    // It ends when the sender is dropped, too.
    done.await.unwrap_or_default();
    Ok(())
}

struct Withdraw<'b>(&'b str);

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        let withdrawn = offers().remove(self.0);
        drop(withdrawn);
    }
}

/// Takes the archive that is offered for a build.
pub async fn take(build: &str) -> Result<Upload, Error> {
    let find = async {
        loop {
            let mut arrived = std::pin::pin!(ARRIVED.notified());
            arrived.as_mut().enable();
            let found = offers().remove(build);
            if let Some(found) = found {
                return found;
            }
            arrived.await;
        }
    };
    tokio::time::timeout(PATIENCE, find)
        .await
        .map_err(|_elapsed| Error::invalid(format!("the context of the build {build:?} was not sent")))
}

/// The Dockerfile that is a request's body.
pub async fn dockerfile(request: &mut Request) -> Result<String, Error> {
    if !request.has_body() {
        return Err(Error::invalid(
            "the Dockerfile was to come from standard input, but the client sent none (docker's BuildKit client up to 20.10 \
             sends none with a context by URL): name one in the context with -f, or use DOCKER_BUILDKIT=0",
        ));
    }
    let mut raw = Vec::new();
    let mut body = request.reader().take(MOST as u64 + 1);
    body.read_to_end(&mut raw)
        .await
        .map_err(|error| Error::invalid(format!("read the Dockerfile: {error}")))?;
    String::from_utf8(raw).map_err(|_bad| Error::invalid("the Dockerfile is not valid UTF-8"))
}
