//! `brig daemon`: the engine itself, in this process.

use std::ffi::OsString;

use crate::args::{Command, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;

/// Stands in the tree for help and completion; `main` runs before the client's runtime is made.
pub static COMMAND: Command = Command {
    name: "daemon",
    usage: "[OPTIONS]",
    about: "Run the engine in the foreground",
    operands: Operands::AtLeast(0),
    interspersed: false,
    run: runs!(misplaced),
    ..Command::EMPTY
};

async fn misplaced(_context: &Context, _matches: Matches) -> Outcome {
    Err(Fault::said("brig daemon takes its options behind its name: brig daemon [OPTIONS]"))
}

/// Runs the engine until it is told to stop; returns its exit status.
pub fn main(arguments: &[String]) -> i32 {
    if std::env::var_os(crate::client::DETACH_MARK).is_some() {
        // Started by a client: leave its session, so that neither its terminal nor its signals reach us.
        if let Err(error) = rustix::process::setsid() {
            output::error_line(&format!("brig daemon: setsid: {error}"));
        }
    }
    let code = brigantine_api::daemon::main(arguments.iter().map(OsString::from));
    i32::from(code != std::process::ExitCode::SUCCESS)
}
