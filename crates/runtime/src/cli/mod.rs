//! The runc-compatible command line.
//!
//! Everything a later invocation needs is in `<root>/<id>/state.json`, replaced atomically. A
//! created container listens on `<root>/<id>/start.sock`: the socket is there exactly as long as the
//! container has not started.
//!
//! `<root>/@filters` keeps compiled seccomp filters. Nothing depends on it: it may be removed at any time.

mod attend;
mod begun;
mod commands;
mod criu;
mod events;
mod exec;
mod lenient;
mod notify;
mod options;
mod record;
mod show;
mod swrk;
mod template;
mod terminal;
mod update;

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use brigantine_sys::{Replacement, SealedExe, VeiledExe, entry};

use crate::error::Error;
use lexopt::Parser;
use options::{on, text};

/// Options before the command.
#[derive(Debug, Default)]
pub(crate) struct Global {
    root: Option<PathBuf>,
    log: Option<PathBuf>,
    log_json: bool,
    debug: bool,
    systemd_cgroup: bool,
    /// Whether to do without what only root can; `None`: as it turns out.
    rootless: Option<bool>,
    /// The program for checkpoints, if not the one in PATH.
    criu: Option<PathBuf>,
    command: &'static str,
}

impl Global {
    /// Where containers' records are.
    fn root(&self) -> PathBuf {
        if let Some(root) = &self.root {
            return root.clone();
        }
        let own = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty() && self.is_rootless());
        own.map_or_else(|| PathBuf::from("/run/brig-runtime"), |dir| PathBuf::from(dir).join("brig-runtime"))
    }

    /// Takes an option that all commands have; whether there is one of that name.
    fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool, Error> {
        match name {
            "root" => self.root = Some(text(parser)?.into()),
            "log" => self.log = Some(text(parser)?.into()),
            "log-format" => {
                self.log_json = match text(parser)?.as_str() {
                    "json" => true,
                    "text" => false,
                    other => return Err(Error::invalid(format!("log format {other:?} is not text or json"))),
                };
            }
            "systemd-cgroup" => self.systemd_cgroup = on(parser, name)?,
            "debug" => self.debug = on(parser, name)?,
            "rootless" => {
                self.rootless = match text(parser)?.as_str() {
                    "auto" => None,
                    "true" => Some(true),
                    "false" => Some(false),
                    other => {
                        let what = format!("--rootless: {other:?} is not true, false or auto");
                        return Err(Error::invalid(what));
                    }
                };
            }
            "criu" => self.criu = Some(text(parser)?.into()),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn root_is_given(&self) -> bool {
        self.root.is_some()
    }

    /// A user other than root, or root of a user namespace that has not all ids.
    fn is_rootless(&self) -> bool {
        self.rootless.unwrap_or_else(|| {
            let all = || {
                let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
                map.split_whitespace().eq(["0", "0", "4294967295"])
            };
            !rustix::process::geteuid().is_root() || !all()
        })
    }

    /// A line for who looks into what the runtime does.
    fn debug(&self, text: &str) {
        if self.debug {
            self.write(text, "debug");
        }
    }

    /// In the log; without one, on stderr.
    fn write(&self, text: &str, level: &str) {
        let time = record::timestamp(std::time::SystemTime::now());
        let line = if self.log_json {
            serde_json::json!({"level": level, "msg": text, "time": time}).to_string()
        } else {
            format!("time={time:?} level={level} msg={text:?}")
        };
        let Some(path) = &self.log else {
            // With no stderr there is nobody to tell.
            writeln!(std::io::stderr(), "{line}").ok();
            return;
        };
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        if let Err(e) = file.and_then(|mut f| writeln!(f, "{line}")) {
            writeln!(std::io::stderr(), "brig-runtime: writing the log {}: {e}", path.display()).ok();
        }
    }
}

/// `args`: without the program's name; the result is the exit status.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let mut global = Global::default();
    match commands::run(&mut global, args) {
        Ok(status) => status,
        Err(error) => {
            // On stderr for people, and in the log for the program that called.
            writeln!(std::io::stderr(), "brig-runtime: error: {error}").ok();
            if global.log.is_some() {
                global.write(&error.to_string(), "error");
            }
            // A program's own status is not mistaken for it.
            if global.command == "exec" { 255 } else { 1 }
        }
    }
}

/// What keeps the container's process from reaching this executable on disk. That process is a copy of the one that makes
/// it, and reaches its executable as `/proc/self/exe`: a file on disk could be overwritten from there as soon as nobody runs
/// it (CVE-2019-5736).
#[derive(Debug)]
enum Cover {
    /// What runs cannot be written to.
    Covered,
    /// What the container's process takes for its own before anything else.
    Taken(Box<Replacement>),
    /// To be executed.
    Veiled(VeiledExe),
    /// There is nothing but a copy.
    None,
}

impl Cover {
    fn find() -> Result<Self, Error> {
        let current = File::open("/proc/self/exe").map_err(uncopied)?;
        if SealedExe::from_fd(current.into()).is_ok() || VeiledExe::is_current() {
            return Ok(Self::Covered);
        }
        // An overlay takes a tenth of a copy's time and no memory, but privileges.
        let Ok(veiled) = VeiledExe::from_current() else { return Ok(Self::None) };
        Ok(match veiled.into_replacement() {
            Ok(replacement) => Self::Taken(Box::new(replacement)),
            Err(veiled) => Self::Veiled(veiled),
        })
    }

    /// Goes on in an executable that cannot be written to, or tells what the container's process has to take for its own.
    /// Before anything is there to be undone.
    fn seal(self) -> Result<Option<Replacement>, Error> {
        let go_on = |path: PathBuf| {
            let mut words = entry::args().into_iter();
            let name = words.next().unwrap_or_default();
            Command::new(path).arg0(name).args(words).exec()
        };
        match self {
            Self::Covered => Ok(None),
            Self::Taken(replacement) => Ok(Some(*replacement)),
            Self::Veiled(veiled) => {
                Err(Error::os("executing the runtime through an overlay", go_on(veiled.path())))
            }
            Self::None => {
                let copy = SealedExe::from_current().map_err(uncopied)?;
                Err(Error::os("executing the runtime's copy in memory", go_on(copy.path())))
            }
        }
    }
}

fn uncopied(error: std::io::Error) -> Error {
    Error::os("copying the runtime's executable into memory", error)
}

fn print(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .map_err(|e| Error::os("writing to standard output", e))
}
