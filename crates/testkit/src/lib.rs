//! Private engine per test, images from real distributions, peers as clients.
//!
//! Everything a test starts lives in one [`Sandbox`]: a network, mount and PID namespace of its own whose init goes
//! away with the test process, however that ends. So a test can neither disturb the host nor another test, and
//! whatever it leaks dies with it; what it *would* leave behind is checked by [`Engine::assert_nothing_left`].
//!
//! Functions here panic with the whole story (command, status, both outputs, the daemon's log) instead of returning
//! errors: their only caller is a test. What `xtask` uses as well returns `anyhow::Result`.

pub mod client;
pub mod disk;
pub mod engine;
pub mod fixtures;
pub mod http;
pub mod leftovers;
pub mod link;
pub mod outside;
pub mod peers;
pub mod pty;
pub mod sandbox;
pub mod wait;

pub use client::{Client, Invocation, Output, docker_command, must};
pub use engine::{Builder, Engine, Flavor, executable};
pub use http::Response;
pub use link::Link;
pub use outside::Outside;
pub use pty::Terminal;
pub use sandbox::Sandbox;
pub use wait::{eventually, until};
