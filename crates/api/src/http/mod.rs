//! The protocol: everything about HTTP that no single endpoint owns.

pub mod bridge;
pub mod error;
pub mod filters;
pub mod gate;
pub mod hijack;
pub mod json;
pub mod progress;
pub mod query;
pub mod reply;
pub mod request;
pub mod router;
pub mod server;
pub mod version;

pub use error::{Class, Error};
pub use filters::Filters;
pub use hijack::{Hijacked, StreamType};
pub use progress::ProgressSink;
pub use query::Query;
pub use reply::Reply;
pub use request::Request;
pub use router::Router;
pub use version::ApiVersion;
