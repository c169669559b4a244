//! The Engine API server: HTTP and streams to and from engine calls.
//!
//! `http` is the protocol (server, router, requests, replies, hijacked streams), `routes` binds the Engine API's
//! endpoints to the engine, `daemon` is the `brig daemon` command. Invariant: an error's class becomes an HTTP
//! status in exactly one place, [`http::error::status`].

pub mod daemon;
pub mod http;
pub mod routes;
