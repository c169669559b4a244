//! BuildKit sessions: what a client lends its build while it runs.
//!
//! A client opens `POST /session`, which becomes HTTP/2 with the roles reversed: the engine calls, the client answers
//! (files, credentials, secrets, ssh agents, a place for results). Start at [`Sessions`]; [`serve`] is the
//! client's end of some of these services. The services and messages are those of moby/buildkit's `session` and
//! tonistiigi/fsutil's `types`.
//!
//! Invariant: a client is not trusted. What it sends is bounded in size and number and checked for order before
//! anybody sees it, every wait for it ends, and what it lent ends with its connection.

mod agent;
mod content;
mod entry;
mod error;
mod layout;
mod lend;
mod messages;
mod receive;
mod send;
mod serve;
mod session;
mod sessions;

#[cfg(test)]
mod tests;

pub use content::ContentReader;
pub use entry::{Entry, Kind};
pub use error::{Error, Result};
pub use lend::{Asked, Folder};
pub use messages::{Status, StatusLog, StatusVertex, StatusVertexProgress, StatusWarning, Timestamp};
pub use prost::Message;
pub use receive::{News, Receiver, Wanted};
pub use send::ArchiveWriter;
pub use serve::{Lending, serve};
pub use session::{Credentials, Session};
pub use sessions::{Introduction, Seat, Sessions};
