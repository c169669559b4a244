//! The network of containers as it behaves in a real kernel: every test builds its own topology of network
//! namespaces, so they run in parallel and leave the machine's own network alone. They need root.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

mod beside;
mod drivers;
mod lab;
mod lifecycle;
mod matrix;
mod packets;
