//! Command-line words to typed requests.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::{Arg, Parser, ValueExt};

use crate::error::Error;

/// What the commands that make a container or a process take.
#[derive(Debug, Default)]
pub(crate) struct Options {
    pub bundle: Option<PathBuf>,
    pub console_socket: Option<PathBuf>,
    pub pid_file: Option<PathBuf>,
    pub detach: bool,
    pub preserve_fds: u32,
    pub keep: bool,
    pub force: bool,
    pub all: bool,
    pub quiet: bool,
    pub format: Option<String>,
    pub stats: bool,
    pub resources: Option<PathBuf>,
    pub process: Option<PathBuf>,
    pub tty: bool,
    pub cwd: Option<PathBuf>,
    pub env: Vec<String>,
    pub user: Option<String>,
    pub caps: Vec<String>,
    pub additional_gids: Vec<u32>,
    pub no_new_privs: bool,
    pub apparmor: Option<String>,
    pub ignore_paused: bool,
    pub words: Vec<OsString>,
}

pub(crate) fn wrong(e: lexopt::Error) -> Error {
    Error::invalid(e.to_string())
}

/// Parses what follows `command`. For exec, everything after the container's id is the program's.
pub(crate) fn parse(command: &str, parser: &mut Parser) -> Result<Options, Error> {
    let mut o = Options::default();
    let text = |p: &mut Parser| p.value().and_then(ValueExt::string).map_err(wrong);
    while let Some(arg) = parser.next().map_err(wrong)? {
        match arg {
            Arg::Value(word) => {
                o.words.push(word);
                if command == "exec" || command == "ps" {
                    let rest = parser.raw_args().map_err(wrong)?;
                    o.words.extend(rest.skip_while(|w| w == "--"));
                    break;
                }
            }
            Arg::Short('b') | Arg::Long("bundle") => o.bundle = Some(text(parser)?.into()),
            Arg::Long("console-socket") => o.console_socket = Some(text(parser)?.into()),
            Arg::Long("pid-file") => o.pid_file = Some(text(parser)?.into()),
            Arg::Short('d') | Arg::Long("detach") => o.detach = true,
            Arg::Long("preserve-fds") => {
                o.preserve_fds = parser.value().and_then(|v| v.parse()).map_err(wrong)?;
            }
            Arg::Long("keep") => o.keep = true,
            // Accepted because callers pass them; a pivot is always possible here, and the keyring is new.
            Arg::Long("no-pivot" | "no-new-keyring" | "no-subreaper") => {}
            Arg::Short('f') | Arg::Long("force") if command == "delete" => o.force = true,
            Arg::Short('a') | Arg::Long("all") => o.all = true,
            Arg::Short('q') | Arg::Long("quiet") => o.quiet = true,
            Arg::Short('f') | Arg::Long("format") => o.format = Some(text(parser)?),
            Arg::Long("stats") => o.stats = true,
            Arg::Short('r') | Arg::Long("resources") if command == "update" => {
                o.resources = Some(text(parser)?.into());
            }
            Arg::Short('p') | Arg::Long("process") => o.process = Some(text(parser)?.into()),
            Arg::Short('t') | Arg::Long("tty") => o.tty = true,
            Arg::Long("cwd") => o.cwd = Some(text(parser)?.into()),
            Arg::Short('e') | Arg::Long("env") => o.env.push(text(parser)?),
            Arg::Short('u') | Arg::Long("user") => o.user = Some(text(parser)?),
            Arg::Short('c') | Arg::Long("cap") => o.caps.push(text(parser)?),
            Arg::Short('g') | Arg::Long("additional-gids") => {
                o.additional_gids.push(parser.value().and_then(|v| v.parse()).map_err(wrong)?);
            }
            Arg::Long("no-new-privs") => o.no_new_privs = true,
            Arg::Long("apparmor") => o.apparmor = Some(text(parser)?),
            Arg::Long("ignore-paused") => o.ignore_paused = true,
            other => return Err(Error::invalid(format!("{command}: {}", other.unexpected()))),
        }
    }
    Ok(o)
}

impl Options {
    /// The container's id, which every command that needs one has first.
    pub fn id(&self) -> Result<&str, Error> {
        let id = self.words.first().and_then(|w| w.to_str());
        let id = id.ok_or_else(|| Error::invalid("a container id is needed"))?;
        crate::launch::check_id(id)?;
        Ok(id)
    }
}

/// `15`, `TERM`, `sigterm`, `RTMIN+3`.
pub(crate) fn signal(text: &str) -> Result<i32, Error> {
    const NAMES: &[&str] = &[
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    let unknown = || Error::invalid(format!("signal {text:?} is not known"));
    let number = if let Ok(number) = text.parse::<i32>() {
        number
    } else {
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        if let Some(place) = NAMES.iter().position(|n| *n == name) {
            place as i32 + 1
        } else if let Some(offset) = name.strip_prefix("RTMIN") {
            34 + if offset.is_empty() { 0 } else { offset.parse::<i32>().map_err(|_unused| unknown())? }
        } else if let Some(offset) = name.strip_prefix("RTMAX") {
            64 + if offset.is_empty() { 0 } else { offset.parse::<i32>().map_err(|_unused| unknown())? }
        } else {
            return Err(unknown());
        }
    };
    if (1..=64).contains(&number) { Ok(number) } else { Err(unknown()) }
}

#[cfg(test)]
mod tests {
    use super::signal;
    use proptest::prelude::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [("15", 15), ("TERM", 15), ("sigkill", 9), ("RTMIN+2", 36), ("SIGRTMAX-1", 63)]
        {
            assert_eq!(signal(text).unwrap(), number);
        }
        for bad in ["0", "65", "-1", "", "NOPE", "RTMIN+99"] {
            assert!(signal(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_signal_or_an_error(text in ".*") {
            if let Ok(number) = signal(&text) {
                prop_assert!((1..=64).contains(&number));
            }
        }
    }
}
