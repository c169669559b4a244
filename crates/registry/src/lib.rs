//! The distribution specification, both sides: pull, push and look up images in registries, and serve one.
//!
//! Start at [`Client`] and [`server::Server`]. Everything that goes into the image store is verified against its digest before it becomes
//! visible; secrets only ever travel to the registry that asked for them, or to the token server it named.

mod auth;
mod blob;
mod client;
mod config;
pub mod copy;
mod download;
mod endpoint;
mod error;
mod hosts;
mod manifests;
mod progress;
mod pull;
mod push;
mod redact;
mod repository;
mod search;
pub mod server;
mod session;
mod upload;

pub use auth::{Credentials, GetToken, Keeper, WantedToken};
pub use client::{Client, Resolved};
pub use config::Config;
pub use download::Download;
pub use error::{Class, Error};
pub use progress::{Progress, Report};
pub use pull::{PullOptions, Pulled};
pub use push::{PushOptions, Pushed};
pub use redact::redacted;
pub use repository::Repository;
pub use search::Found;
