//! The distribution-spec client: pull, push and look up images in registries.
//!
//! Start at [`Client`]. Everything that goes into the image store is verified against its digest before it becomes
//! visible; secrets only ever travel to the registry that asked for them, or to the token server it named.

mod auth;
mod blob;
mod client;
mod config;
mod endpoint;
mod error;
mod progress;
mod pull;
mod push;
mod session;

pub use auth::Credentials;
pub use client::{Client, Resolved};
pub use config::Config;
pub use error::{Class, Error};
pub use progress::{Progress, Report};
pub use pull::{PullOptions, Pulled};
pub use push::Pushed;
