//! The runc-compatible command line.
//!
//! Everything a later invocation needs is in `<root>/<id>/state.json`, replaced atomically. A
//! created container listens on `<root>/<id>/start.sock`: the socket is there exactly as long as the
//! container has not started.

mod commands;
mod options;
mod record;
mod terminal;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::error::Error;

/// Options before the command.
#[derive(Debug)]
pub(crate) struct Global {
    pub root: PathBuf,
    pub log: Option<PathBuf>,
    pub log_json: bool,
    pub systemd_cgroup: bool,
}

/// `args`: without the program's name.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut global = Global {
        root: PathBuf::from("/run/brig-runtime"),
        log: None,
        log_json: false,
        systemd_cgroup: false,
    };
    match commands::run(&mut global, args) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            report(&global, &error);
            ExitCode::from(1)
        }
    }
}

/// On stderr for people, and in the log for the program that called.
fn report(global: &Global, error: &Error) {
    // Without a stderr the log has it; without both there is nobody to tell.
    writeln!(std::io::stderr(), "brig-runtime: {error}").ok();
    let Some(path) = &global.log else { return };
    let time = record::timestamp(std::time::SystemTime::now());
    let line = if global.log_json {
        serde_json::json!({"level": "error", "msg": error.to_string(), "time": time}).to_string()
    } else {
        format!("time={time:?} level=error msg={:?}", error.to_string())
    };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    if let Err(e) = file.and_then(|mut f| writeln!(f, "{line}"))
        && writeln!(std::io::stderr(), "brig-runtime: writing the log {}: {e}", path.display()).is_err()
    {}
}

fn print(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .map_err(|e| Error::os("writing to standard output", e))
}
