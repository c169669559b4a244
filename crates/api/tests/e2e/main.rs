//! The engine as its users meet it: each test has an engine of its own and drives it with an unmodified client.
//!
//! Most tests exist twice, once with the docker command and once with `brig`. They are first proven on Debian's
//! dockerd (`BRIG_TEST_ENGINE=dockerd cargo nextest run --test e2e docker::`), then held against ours.
#![expect(clippy::unwrap_used, reason = "a test says so by a panic; those in plain functions are tests, too")]

/// One test per client for each of these functions.
macro_rules! both {
    ($($name:ident),* $(,)?) => {
        mod docker {
            $(#[test]
            fn $name() {
                super::$name(brigantine_testkit::Client::Docker);
            })*
        }
        mod brig {
            $(#[test]
            fn $name() {
                super::$name(brigantine_testkit::Client::Brig);
            })*
        }
    };
}

mod append;
mod authorization;
mod bad_input;
mod build;
mod build_caches;
mod build_context;
mod build_load;
mod build_mounts;
mod build_real;
mod build_results;
mod build_solver;
mod build_user;
mod buildkit;
mod buildkit_peer;
mod clients;
mod cni;
mod compose;
mod crash;
mod credentials;
mod dockerfile;
mod drivers;
mod endpoints;
mod files;
mod firewall;
mod flags;
mod image_archives;
mod images;
mod isolation;
mod leftovers;
mod lifecycle;
mod links;
mod logging;
mod mounts;
mod names;
mod neighbours;
mod network;
mod networks;
mod peers;
mod plugins;
mod ports;
mod power_cut;
mod reload;
mod resolver;
mod run;
mod runtimes;
mod shim;
mod sockets;
mod storage;
mod streams;
mod tls;
mod unkillable;
mod userns;
mod verbs;
mod volumes;

use brigantine_testkit::{Client, Engine, Invocation, Terminal};

/// An engine with the client that drives it.
struct Host {
    engine: Engine,
    client: Client,
}

impl Host {
    /// An engine that has `busybox`.
    #[track_caller]
    fn new(client: Client) -> Self {
        Self { engine: Engine::with_busybox(), client }
    }

    /// A command of the client.
    #[track_caller]
    fn cli<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Invocation {
        self.engine.client(self.client, args)
    }

    /// `run --rm busybox ARGS…`, its standard output.
    #[track_caller]
    fn busybox(&self, args: &[&str]) -> String {
        self.cli(["run", "--rm", "busybox"].iter().chain(args)).ok()
    }

    /// `run --rm FLAGS… busybox sh -c SCRIPT`, its standard output.
    #[track_caller]
    fn script(&self, flags: &[&str], script: &str) -> String {
        self.cli(["run", "--rm"].iter().chain(flags).chain(&["busybox", "sh", "-c", script])).ok()
    }

    /// `run -d FLAGS… busybox sh -c SCRIPT`, the container's id.
    #[track_caller]
    fn background(&self, flags: &[&str], script: &str) -> String {
        self.cli(["run", "-d"].iter().chain(flags).chain(&["busybox", "sh", "-c", script])).ok()
    }

    /// The client on a terminal.
    #[track_caller]
    fn terminal<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Terminal {
        self.engine.terminal(self.client, args)
    }
}

impl std::ops::Deref for Host {
    type Target = Engine;
    fn deref(&self) -> &Engine {
        &self.engine
    }
}
