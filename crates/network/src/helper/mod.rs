//! The network helper: one small process of an engine that answers containers' questions for names and relays the few
//! packets that the kernel cannot route. It is not the daemon, so it goes on while the daemon is down or exchanged.
//!
//! The daemon starts it, gives it sockets and tells it who lives where; the next daemon finds it by its socket. It
//! leaves by itself when it has neither a daemon nor a container.
//!
//! Invariant: what it holds of a container (sockets, its network namespace) goes with [`Client::forget`], or with the
//! next daemon's first comparison.

mod client;
mod control;
mod forward;
mod protocol;
mod relay;
mod resolver;
mod share;
mod table;

pub use client::{Client, HelperError};
pub use protocol::{Relayed, Residence, Resident, Sockets};
pub use share::SharedNetwork;

use std::os::fd::OwnedFd;
use std::process::ExitCode;

/// The helper's whole life. Its standard input is the listening control socket.
pub fn main() -> ExitCode {
    // Whatever ends the daemon's terminal or process group does not end this.
    if let Err(error) = rustix::process::setsid() {
        tracing::debug!(%error, "setsid");
    }
    let listener: OwnedFd = match rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the network helper is started by the daemon, with a socket");
            return ExitCode::FAILURE;
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "start the network helper");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(control::serve(listener));
    ExitCode::SUCCESS
}
