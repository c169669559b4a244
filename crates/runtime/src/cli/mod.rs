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
use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use brigantine_sys::SealedExe;

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

/// Goes on in a sealed copy of this executable, unless it is one already. A container's process is a
/// copy of the one that makes it, and reaches its executable as `/proc/self/exe`: a file on disk could
/// be overwritten from there as soon as nobody runs it (CVE-2019-5736).
fn seal() -> Result<(), Error> {
    let failed = |e| Error::os("copying the runtime's executable into memory", e);
    let current = File::open("/proc/self/exe").map_err(failed)?;
    if SealedExe::from_fd(current.into()).is_ok() {
        return Ok(());
    }
    let copy = SealedExe::from_current().map_err(failed)?;
    let mut words = std::env::args_os();
    let name = words.next().unwrap_or_default();
    let error = Command::new(copy.path()).arg0(name).args(words).exec();
    Err(Error::os("executing the runtime's copy in memory", error))
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
