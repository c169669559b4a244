//! The open sessions of an engine.
//!
//! Invariant: a session is in the table for exactly as long as its connection lives; there are never more than
//! [`MOST`]; one that no build uses, and a client that does not even answer pings, are let go.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, watch};

use crate::error::{Error, Result};
use crate::session::{ANSWER, Session};

/// The most sessions at once.
const MOST: usize = 1000;
/// How long a build waits for its client's session.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a session may be open without a build.
const IDLE: Duration = Duration::from_mins(10);
/// How often a client is pinged, and how long it may take to answer: one that is stopped (Ctrl-Z) and goes on within that
/// time loses nothing. BuildKit gives a client up after two failed checks of its health, some 80 seconds; here it is as
/// long as for anything else that is asked of it. One whose end the kernel tells, a process of this machine, is not
/// waited for.
const PING: Duration = Duration::from_secs(10);
const PONG: Duration = ANSWER;
/// How long a connection may take to begin.
const BEGINNING: Duration = Duration::from_secs(20);
/// Bytes in flight of one stream, and of all.
const WINDOW: u32 = 4 << 20;

/// What a client says of the session it opens.
#[derive(Debug, Clone, Default)]
pub struct Introduction {
    /// `X-Docker-Expose-Session-Uuid`.
    pub id: String,
    /// `X-Docker-Expose-Session-Sharedkey`.
    pub shared_key: String,
    /// `X-Docker-Expose-Session-Grpc-Method`, one for each method.
    pub methods: Vec<String>,
}

/// The open sessions. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Sessions(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// `None` for one whose connection is being made.
    open: Mutex<HashMap<String, Option<Arc<Session>>>>,
    arrived: Notify,
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Session>>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sessions {
    /// Takes a client in; the session is open once [`Seat::run`] has its connection.
    pub fn admit(&self, introduction: Introduction) -> Result<Seat> {
        let id = &introduction.id;
        if id.is_empty() || id.len() > 256 || introduction.shared_key.len() > 1024 {
            return Err(Error::Introduction(
                "a session needs an id in X-Docker-Expose-Session-Uuid, of at most 256 characters".to_owned(),
            ));
        }
        let mut open = self.0.open();
        if open.contains_key(id) {
            return Err(Error::Taken(id.clone()));
        }
        if open.len() >= MOST {
            return Err(Error::TooMany(MOST));
        }
        open.insert(id.clone(), None);
        Ok(Seat { shared: Arc::clone(&self.0), introduction })
    }

    /// The session of a build. Its connection may come a moment later than the build's.
    pub async fn get(&self, id: &str) -> Result<Arc<Session>> {
        let find = async {
            loop {
                // Registered before looking, so that no arrival is missed.
                let mut arrived = std::pin::pin!(self.0.arrived.notified());
                arrived.as_mut().enable();
                if let Some(Some(session)) = self.0.open().get(id) {
                    return Arc::clone(session);
                }
                arrived.await;
            }
        };
        tokio::time::timeout(PATIENCE, find).await.map_err(|_elapsed| Error::Unknown(id.to_owned()))
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.0.open().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A client's place in the table, given back when dropped.
#[derive(Debug)]
pub struct Seat {
    shared: Arc<Shared>,
    introduction: Introduction,
}

impl Seat {
    /// Speaks with the client until it leaves, or is left.
    pub async fn run(mut self, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let id = self.introduction.id.clone();
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(PING)
            .keep_alive_timeout(PONG)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW);
        let made = tokio::time::timeout(BEGINNING, builder.handshake(TokioIo::new(io))).await;
        let (sender, connection) = match made {
            Ok(Ok(made)) => made,
            Ok(Err(error)) => return tracing::debug!(session = id, %error, "a session did not begin"),
            Err(_elapsed) => return tracing::debug!(session = id, "a session did not begin in time"),
        };
        let (over, ended) = watch::channel(false);
        let methods = std::mem::take(&mut self.introduction.methods);
        let shared_key = std::mem::take(&mut self.introduction.shared_key);
        let session = Arc::new(Session::new(id.clone(), shared_key, methods, sender, ended));
        self.shared.open().insert(id.clone(), Some(Arc::clone(&session)));
        self.shared.arrived.notify_waiters();
        tracing::debug!(session = id, "a session began");
        tokio::select! {
            ended = connection => match ended {
                Ok(()) => tracing::debug!(session = id, "a session ended"),
                Err(error) => tracing::debug!(session = id, %error, "a session broke off"),
            },
            () = unused(&session) => tracing::info!(session = id, "a session that no build used was closed"),
        }
        over.send_replace(true);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.open().remove(&self.introduction.id);
    }
}

/// Returns when nobody but the table and its connection has held the session for [`IDLE`].
async fn unused(session: &Arc<Session>) {
    const OWN: usize = 2;
    const LOOKS: u32 = 10;
    let mut idle = 0;
    while idle < LOOKS {
        tokio::time::sleep(IDLE / LOOKS).await;
        idle = if Arc::strong_count(session) > OWN { 0 } else { idle + 1 };
    }
}
