//! A build's context that comes with a request of its own: `buildid=upload-request:<id>` carries the archive for the
//! build `<id>` with `remote=upload-request`.
//!
//! Invariant: each waits for the other for a moment only, and an offer is taken once.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::{Notify, oneshot};

use crate::http::Error;
use crate::http::request::BodyReader;

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
