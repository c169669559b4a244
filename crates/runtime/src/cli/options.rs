//! Command-line words to flags and arguments, by a table of what each command takes.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::{Arg, Parser, ValueExt};

use crate::error::Error;

/// One flag of a command.
#[derive(Debug)]
pub(crate) struct Flag {
    pub long: &'static str,
    pub short: Option<char>,
    /// What its value is called; `None` for a switch.
    pub value: Option<&'static str>,
}

const fn switch(long: &'static str, short: Option<char>) -> Flag {
    Flag { long, short, value: None }
}

const fn value(long: &'static str, short: Option<char>, value: &'static str) -> Flag {
    Flag { long, short, value: Some(value) }
}

/// A command: its flags, and how many words it takes.
#[derive(Debug)]
pub(crate) struct Command {
    pub name: &'static str,
    pub about: &'static str,
    pub words: (usize, usize),
    /// Everything after the first word is somebody else's.
    pub passes_on: bool,
    pub flags: &'static [Flag],
}

macro_rules! create_flags {
    ($($more:expr),* $(,)?) => {
        &[
            value("bundle", Some('b'), "DIR"),
            value("console-socket", None, "SOCKET"),
            value("pidfd-socket", None, "SOCKET"),
            value("pid-file", None, "FILE"),
            switch("no-pivot", None),
            switch("no-new-keyring", None),
            value("preserve-fds", None, "N"),
            $($more),*
        ]
    };
}

macro_rules! criu_flags {
    ($($more:expr),* $(,)?) => {
        &[
            value("image-path", None, "DIR"),
            value("work-path", None, "DIR"),
            switch("tcp-established", None),
            switch("tcp-skip-in-flight", None),
            switch("ext-unix-sk", None),
            switch("shell-job", None),
            switch("lazy-pages", None),
            switch("link-remap", None),
            switch("file-locks", None),
            value("manage-cgroups-mode", None, "MODE"),
            value("empty-ns", None, "NAMESPACE"),
            $($more),*
        ]
    };
}

/// All commands, in the order that help lists them.
pub(crate) const COMMANDS: &[Command] = &[
    Command {
        name: "create",
        about: "make a container from a bundle, up to its program's start",
        words: (1, 1),
        passes_on: false,
        flags: create_flags!(),
    },
    Command {
        name: "start",
        about: "start the program of a created container",
        words: (1, 1),
        passes_on: false,
        flags: &[],
    },
    Command {
        name: "run",
        about: "create and start",
        words: (1, 1),
        passes_on: false,
        flags: create_flags!(switch("detach", Some('d')), switch("keep", None), switch("no-subreaper", None),),
    },
    Command {
        name: "state",
        about: "print a container's state",
        words: (1, 1),
        passes_on: false,
        flags: &[],
    },
    Command {
        name: "kill",
        about: "send a signal",
        words: (1, 2),
        passes_on: false,
        flags: &[switch("all", Some('a'))],
    },
    Command {
        name: "delete",
        about: "remove a stopped container (--force: kill it first)",
        words: (1, 1),
        passes_on: false,
        flags: &[switch("force", Some('f'))],
    },
    Command {
        name: "exec",
        about: "run another program in a container",
        words: (1, usize::MAX),
        passes_on: true,
        flags: &[
            value("console-socket", None, "SOCKET"),
            value("pidfd-socket", None, "SOCKET"),
            value("cwd", None, "DIR"),
            value("env", Some('e'), "NAME=VALUE"),
            switch("tty", Some('t')),
            value("user", Some('u'), "UID[:GID]"),
            value("additional-gids", Some('g'), "GID"),
            value("process", Some('p'), "FILE"),
            switch("detach", Some('d')),
            value("pid-file", None, "FILE"),
            value("process-label", None, "LABEL"),
            value("apparmor", None, "PROFILE"),
            switch("no-new-privs", None),
            value("cap", Some('c'), "CAPABILITY"),
            value("preserve-fds", None, "N"),
            value("cgroup", None, "[CONTROLLER:]PATH"),
            switch("ignore-paused", None),
            switch("no-subreaper", None),
        ],
    },
    Command {
        name: "list",
        about: "list containers",
        words: (0, 0),
        passes_on: false,
        flags: &[value("format", Some('f'), "table|json"), switch("quiet", Some('q'))],
    },
    Command {
        name: "ps",
        about: "list a container's processes (with ps' own options)",
        words: (1, usize::MAX),
        passes_on: true,
        flags: &[value("format", Some('f'), "table|json")],
    },
    Command {
        name: "pause",
        about: "stop all of a container's processes",
        words: (1, 1),
        passes_on: false,
        flags: &[],
    },
    Command { name: "resume", about: "let them go on", words: (1, 1), passes_on: false, flags: &[] },
    Command {
        name: "update",
        about: "change limits",
        words: (1, 1),
        passes_on: false,
        flags: &[
            value("resources", Some('r'), "FILE|-"),
            value("blkio-weight", None, "N"),
            value("cpu-period", None, "MICROSECONDS"),
            value("cpu-quota", None, "MICROSECONDS"),
            value("cpu-burst", None, "MICROSECONDS"),
            value("cpu-share", None, "N"),
            value("cpu-rt-period", None, "MICROSECONDS"),
            value("cpu-rt-runtime", None, "MICROSECONDS"),
            value("cpuset-cpus", None, "LIST"),
            value("cpuset-mems", None, "LIST"),
            value("cpu-idle", None, "0|1"),
            value("kernel-memory", None, "BYTES"),
            value("kernel-memory-tcp", None, "BYTES"),
            value("memory", None, "BYTES"),
            value("memory-reservation", None, "BYTES"),
            value("memory-swap", None, "BYTES"),
            value("pids-limit", None, "N"),
            value("l3-cache-schema", None, "SCHEMA"),
            value("mem-bw-schema", None, "SCHEMA"),
        ],
    },
    Command {
        name: "events",
        about: "print statistics and notices of a lack of memory",
        words: (1, 1),
        passes_on: false,
        flags: &[value("interval", None, "DURATION"), switch("stats", None)],
    },
    Command {
        name: "spec",
        about: "write a config.json to start from",
        words: (0, 0),
        passes_on: false,
        flags: &[value("bundle", Some('b'), "DIR"), switch("rootless", None)],
    },
    Command {
        name: "features",
        about: "print what this runtime can do",
        words: (0, 0),
        passes_on: false,
        flags: &[],
    },
    Command {
        name: "checkpoint",
        about: "write a container's processes to files (by criu)",
        words: (1, 1),
        passes_on: false,
        flags: criu_flags!(
            value("parent-path", None, "DIR"),
            switch("leave-running", None),
            value("page-server", None, "ADDRESS:PORT"),
            value("status-fd", None, "N"),
            switch("pre-dump", None),
            switch("auto-dedup", None),
        ),
    },
    Command {
        name: "restore",
        about: "make a container from such files",
        words: (1, 1),
        passes_on: false,
        flags: criu_flags!(
            value("bundle", Some('b'), "DIR"),
            switch("detach", Some('d')),
            value("console-socket", None, "SOCKET"),
            value("pid-file", None, "FILE"),
            switch("no-subreaper", None),
            switch("no-pivot", None),
            switch("auto-dedup", None),
            value("lsm-profile", None, "TYPE:PROFILE"),
            value("lsm-mount-context", None, "CONTEXT"),
        ),
    },
];

/// What was given to a command.
#[derive(Debug, Default)]
pub(crate) struct Options {
    given: Vec<(&'static str, String)>,
    pub words: Vec<OsString>,
    pub help: bool,
}

pub(crate) fn wrong(e: lexopt::Error) -> Error {
    Error::invalid(e.to_string())
}

pub(crate) fn text(parser: &mut Parser) -> Result<String, Error> {
    parser.value().and_then(ValueExt::string).map_err(wrong)
}

/// A switch, which may be said to be off (`--detach=false`).
pub(crate) fn on(parser: &mut Parser, name: &str) -> Result<bool, Error> {
    match parser.optional_value().map(ValueExt::string).transpose().map_err(wrong)?.as_deref() {
        None | Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(other) => Err(Error::invalid(format!("--{name}: {other:?} is not true or false"))),
    }
}

/// Parses what follows the command's name. What the command does not know is offered to `global`, which says whether it
/// is one of its own: options of all commands may come behind the command's name too.
pub(crate) fn parse(
    command: &Command,
    parser: &mut Parser,
    mut global: impl FnMut(&str, &mut Parser) -> Result<bool, Error>,
) -> Result<Options, Error> {
    let mut o = Options::default();
    while let Some(arg) = parser.next().map_err(wrong)? {
        let long = matches!(arg, Arg::Long(_));
        let flag = match arg {
            Arg::Value(word) => {
                o.words.push(word);
                if command.passes_on {
                    let rest = parser.raw_args().map_err(wrong)?;
                    o.words.extend(rest.skip_while(|w| w == "--"));
                    break;
                }
                continue;
            }
            Arg::Short('h') | Arg::Long("help") => {
                o.help = true;
                return Ok(o);
            }
            Arg::Short(letter) => {
                let unknown = || Error::invalid(format!("{}: invalid option '-{letter}'", command.name));
                command.flags.iter().find(|f| f.short == Some(letter)).ok_or_else(unknown)?
            }
            Arg::Long(name) => {
                let name = name.to_owned();
                let known = command.flags.iter().find(|f| f.long == name);
                if known.is_none() && global(&name, parser)? {
                    continue;
                }
                let unknown = || Error::invalid(format!("{}: invalid option '--{name}'", command.name));
                known.ok_or_else(unknown)?
            }
        };
        if flag.value.is_some() {
            o.given.push((flag.long, text(parser)?));
        } else if !long || on(parser, flag.long)? {
            // (What follows a letter is the next letter.)
            o.given.push((flag.long, String::new()));
        } else {
            o.given.retain(|(name, _)| *name != flag.long);
        }
    }
    let (least, most) = command.words;
    if o.words.len() < least {
        return Err(Error::invalid(format!("{}: a container id is needed", command.name)));
    }
    if o.words.len() > most {
        let word = o.words[most].display();
        return Err(Error::invalid(format!("{}: \"{word}\" is one argument too many", command.name)));
    }
    Ok(o)
}

impl Options {
    pub fn has(&self, name: &str) -> bool {
        self.given.iter().any(|(given, _)| *given == name)
    }

    /// The last value wins.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.given.iter().rev().find(|(given, _)| *given == name).map(|(_, value)| value.as_str())
    }

    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.text(name).map(PathBuf::from)
    }

    pub fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.given.iter().filter(move |(given, _)| *given == name).map(|(_, value)| value.as_str())
    }

    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, Error> {
        let wrong = |text: &str| Error::invalid(format!("--{name}: {text:?} is not a number it takes"));
        self.text(name).map(|text| text.trim().parse().map_err(|_unused| wrong(text))).transpose()
    }

    /// Bytes: a number, perhaps with `b`, `k`, `m`, `g` or `t`; -1 is no limit.
    pub fn bytes(&self, name: &str) -> Result<Option<i64>, Error> {
        let Some(given) = self.text(name) else { return Ok(None) };
        let wrong = || Error::invalid(format!("--{name}: {given:?} is not a size like 64m"));
        let lower = given.trim().to_ascii_lowercase();
        let lower = lower.strip_suffix("ib").or_else(|| lower.strip_suffix('b')).unwrap_or(&lower);
        let shift = match lower.chars().next_back() {
            Some('k') => 10,
            Some('m') => 20,
            Some('g') => 30,
            Some('t') => 40,
            _ => 0,
        };
        let digits = if shift == 0 { lower } else { &lower[..lower.len() - 1] };
        let number: i64 = digits.trim().parse().map_err(|_unused| wrong())?;
        if number < -1 {
            return Err(wrong());
        }
        number.checked_mul(1 << shift).map(Some).ok_or_else(wrong)
    }

    /// The container's id, which every command that needs one has first.
    pub fn id(&self) -> Result<&str, Error> {
        let id = self.words.first().and_then(|w| w.to_str());
        let id = id.ok_or_else(|| Error::invalid("a container id is needed"))?;
        crate::launch::check_id(id)?;
        Ok(id)
    }
}

/// `5s`, `100ms`, `1m30s`, as Go programs take them.
pub(crate) fn duration(text: &str) -> Result<std::time::Duration, Error> {
    let wrong = || Error::invalid(format!("{text:?} is not a duration like 5s or 100ms"));
    let mut total = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let number: f64 = rest[..digits].parse().map_err(|_unused| wrong())?;
        let unit = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |n| digits + n);
        total += number
            * match &rest[digits..unit] {
                "ns" => 1e-9,
                "us" | "µs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return Err(wrong()),
            };
        rest = &rest[unit..];
    }
    if total > 0.0 && total < 1e9 { Ok(std::time::Duration::from_secs_f64(total)) } else { Err(wrong()) }
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
    // Signal 0 only asks whether somebody is there.
    if (0..=64).contains(&number) { Ok(number) } else { Err(unknown()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(words: &[&str]) -> Result<Options, Error> {
        let mut parser = Parser::from_args(words.iter().copied());
        let Some(Arg::Value(name)) = parser.next().unwrap() else { panic!("no command") };
        let command = COMMANDS.iter().find(|c| name == c.name).unwrap();
        parse(command, &mut parser, |option, parser| Ok(option == "root" && text(parser)? == "DIR"))
    }

    #[test]
    fn flags_are_sorted() {
        let o = parsed(&["exec", "-tu", "5:6", "-e", "A=1", "--env=B=2", "--detach=false", "id", "sh", "-c"])
            .unwrap();
        assert!(o.has("tty") && !o.has("detach"));
        assert_eq!(o.text("user"), Some("5:6"));
        assert_eq!(o.all("env").collect::<Vec<_>>(), ["A=1", "B=2"]);
        assert_eq!(o.words, ["id", "sh", "-c"]);
        assert!(parsed(&["state"]).is_err() && parsed(&["state", "a", "b"]).is_err());
        assert!(parsed(&["run", "--force", "a"]).is_err());
        assert_eq!(parsed(&["state", "--root", "DIR", "a"]).unwrap().words, ["a"]);
        assert_eq!(parsed(&["exec", "a", "sh", "--root", "DIR"]).unwrap().words.len(), 4);
    }

    #[test]
    fn sizes_and_durations() {
        let size = |t: &str| parsed(&["update", "--memory", t, "x"]).unwrap().bytes("memory");
        assert_eq!(size("64m").unwrap(), Some(64 << 20));
        assert_eq!(size("1GiB").unwrap(), Some(1 << 30));
        assert_eq!(size("4096").unwrap(), Some(4096));
        assert_eq!(parsed(&["update", "--memory=-1", "x"]).unwrap().bytes("memory").unwrap(), Some(-1));
        for bad in ["", "m", "x", "1x", "99999999999t"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert_eq!(duration("1m1.5s").unwrap().as_millis(), 61_500);
        assert_eq!(duration("100ms").unwrap().as_millis(), 100);
        for bad in ["", "5", "s", "0s", "1y"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [("15", 15), ("TERM", 15), ("sigkill", 9), ("RTMIN+2", 36), ("SIGRTMAX-1", 63)]
        {
            assert_eq!(signal(text).unwrap(), number);
        }
        for bad in ["65", "-1", "", "NOPE", "RTMIN+99"] {
            assert!(signal(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_signal_or_an_error(text in ".*") {
            if let Ok(number) = signal(&text) {
                prop_assert!((0..=64).contains(&number));
            }
        }

        #[test]
        fn any_text_is_a_duration_or_an_error(text in "[0-9a-zµ.]*") {
            if let Ok(time) = duration(&text) {
                prop_assert!(!time.is_zero() || text.contains("0."));
            }
        }
    }
}
