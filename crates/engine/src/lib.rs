//! The engine: containers, execs, volumes, networks, images and events behind one handle.
//!
//! [`Engine`] only joins the services together; each of them owns one kind of record. Everything a running container
//! needs lives in its shim, so an `Engine` may be dropped or killed at any moment and opened again.

mod clock;
mod error;
mod filters;
mod ids;

pub mod config;
mod db;
pub mod events;

pub use clock::{ZERO_TIME, rfc3339_nano};
pub use config::Config;
pub use error::{Class, Error};
pub use filters::Filters;

/// What every fallible engine call returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;
