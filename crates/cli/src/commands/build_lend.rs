//! What `brig build` lends to the engine for as long as the build runs: the build's files, the user's ssh agents, a place
//! for results, and folders for caches.
//!
//! Invariant: keys stay with the agent; the engine gets its answers, over a connection that ends with the command.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::os::unix::fs::FileTypeExt as _;
use std::path::PathBuf;

use brigantine_session::{Lending, serve};
use http::HeaderName;
use tokio::io::AsyncReadExt as _;

use crate::commands::build_context;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;

const ID: HeaderName = HeaderName::from_static("x-docker-expose-session-uuid");
const SHARED_KEY: HeaderName = HeaderName::from_static("x-docker-expose-session-sharedkey");
const METHOD: HeaderName = HeaderName::from_static("x-docker-expose-session-grpc-method");

/// What is lent until this is dropped.
pub struct Lent {
    /// The session's id, for the build to name.
    pub session: String,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// Opens a session for what is lent, if there is anything. Sessions with the same key lend the same folder.
pub async fn lend(context: &Context, lending: Lending, shared_key: Option<&str>) -> Outcome<Option<Lent>> {
    if lending.is_empty() {
        return Ok(None);
    }
    let session = build_context::new_id()?;
    let mut ask = context.client.post("/session").header(ID, &session);
    if let Some(key) = shared_key {
        ask = ask.header(SHARED_KEY, key);
    }
    for method in lending.methods() {
        ask = ask.header(METHOD, method);
    }
    let (wire, early) = ask.hijack_to("h2c").await?;
    let (read, write) = tokio::io::split(wire);
    let io = tokio::io::join(Cursor::new(early).chain(read), write);
    let serving = tokio::spawn(async move {
        // The engine closes it when the build is over.
        if let Err(error) = serve(io, lending).await {
            tracing::debug!(%error, "the session ended");
        }
    });
    Ok(Some(Lent { session, serving }))
}

/// `ID`, or `ID=SOCKET`; by default the user's own agent.
pub fn agents(given: &[&str]) -> Outcome<BTreeMap<String, PathBuf>> {
    let mut agents = BTreeMap::new();
    for text in given {
        let (id, socket) = if let Some((id, socket)) = text.split_once('=') {
            (id, PathBuf::from(socket))
        } else {
            let own = std::env::var_os("SSH_AUTH_SOCK").filter(|path| !path.is_empty());
            let own = own.ok_or_else(|| {
                Fault::said(format!("--ssh {text}: no ssh agent is running (SSH_AUTH_SOCK is not set)"))
            })?;
            (*text, own.into())
        };
        if id.is_empty() {
            return Err(Fault::said(format!("--ssh {text}: ID or ID=SOCKET is expected")));
        }
        let metadata = std::fs::metadata(&socket).map_err(|error| {
            Fault::said(format!("--ssh {text}: {}: {}", socket.display(), output::os_text(&error)))
        })?;
        if !metadata.file_type().is_socket() {
            return Err(Fault::said(format!(
                "--ssh {text}: {} is not an agent's socket: give a key to an agent with ssh-add, and name that",
                socket.display()
            )));
        }
        if agents.insert(id.to_owned(), socket).is_some() {
            return Err(Fault::said(format!("--ssh {text}: the id {id} is given twice")));
        }
    }
    Ok(agents)
}
