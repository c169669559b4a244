//! The monitor process.

use std::process::ExitCode;

/// Run the monitor; what `brig-runtime shim` does.
pub fn main() -> ExitCode {
    ExitCode::FAILURE
}
