//! What a command line gave: typed reading of flags, with docker's words for a value that does not parse.

use super::{Command, Flag, Given, Kind, help};
use crate::fault::{Fault, Outcome};
use crate::units;

#[derive(Debug)]
pub struct Matches {
    command: &'static Command,
    path: String,
    given: Vec<Given>,
    operands: Vec<String>,
}

impl Matches {
    pub fn new(command: &'static Command, path: &str, given: Vec<Given>, operands: Vec<String>) -> Self {
        Self { command, path: path.to_owned(), given, operands }
    }

    /// The command as typed, such as `brig container ls`.
    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn operands(&self) -> &[String] {
        &self.operands
    }

    pub fn operand(&self, index: usize) -> &str {
        self.operands.get(index).map_or("", String::as_str)
    }

    fn flag(&self, name: &str) -> &'static Flag {
        let found = self.command.flags.iter().find(|f| f.long == name);
        debug_assert!(found.is_some(), "{} has no flag --{name}", self.command.name);
        found.unwrap_or(&UNKNOWN)
    }

    /// Whether the command has such a flag at all: for code that several commands share.
    pub fn has_flag(&self, name: &str) -> bool {
        self.command.flags.iter().any(|f| f.long == name)
    }

    pub fn given(&self, name: &str) -> bool {
        self.flag(name);
        self.given.iter().any(|(long, _)| *long == name)
    }

    pub fn is(&self, name: &str) -> bool {
        self.text(name) == "true"
    }

    pub fn text(&self, name: &str) -> &str {
        let flag = self.flag(name);
        self.given.iter().rev().find(|(long, _)| *long == name).map_or(flag.default, |(_, value)| value)
    }

    pub fn optional(&self, name: &str) -> Option<&str> {
        Some(self.text(name)).filter(|t| !t.is_empty())
    }

    pub fn list(&self, name: &str) -> Vec<&str> {
        debug_assert!(matches!(self.flag(name).kind, Kind::List(_)));
        self.given.iter().filter(|(long, _)| *long == name).map(|(_, value)| value.as_str()).collect()
    }

    pub fn owned_list(&self, name: &str) -> Vec<String> {
        self.list(name).into_iter().map(str::to_owned).collect()
    }

    /// The values of a list flag, or None when it was not given: what an API field with `omitempty` wants.
    pub fn some_list(&self, name: &str) -> Option<Vec<String>> {
        Some(self.owned_list(name)).filter(|l| !l.is_empty())
    }

    pub fn int(&self, name: &str) -> Outcome<Option<i64>> {
        let text = self.text(name);
        if text.is_empty() && !self.given(name) {
            return Ok(None);
        }
        match text.parse::<i64>() {
            Ok(number) => Ok(Some(number)),
            Err(error) => {
                let why = match error.kind() {
                    std::num::IntErrorKind::PosOverflow | std::num::IntErrorKind::NegOverflow => {
                        "value out of range"
                    }
                    _ => "invalid syntax",
                };
                Err(self.invalid(name, text, &format!("strconv.ParseInt: parsing \"{text}\": {why}")))
            }
        }
    }

    /// A size such as `64m`, in bytes. -1 passes through where docker lets it (swap).
    pub fn bytes(&self, name: &str) -> Outcome<Option<i64>> {
        let text = self.text(name);
        if text.is_empty() {
            return Ok(None);
        }
        if name == "memory-swap" && text == "-1" {
            return Ok(Some(-1));
        }
        units::parse_bytes(text).map(Some).map_err(|why| self.invalid(name, text, &why))
    }

    /// A Go duration such as `1m30s`, in nanoseconds.
    pub fn duration(&self, name: &str) -> Outcome<Option<i64>> {
        let text = self.text(name);
        if text.is_empty() {
            return Ok(None);
        }
        units::parse_duration(text).map(Some).map_err(|why| self.invalid(name, text, &why))
    }

    /// The usage error of a flag whose value is wrong.
    pub fn invalid(&self, name: &str, value: &str, why: &str) -> Fault {
        self.usage(
            &format!(
                "invalid argument \"{value}\" for \"{}\" flag: {why}",
                help::flag_names(self.flag(name))
            ),
            125,
        )
    }

    /// A usage error: the message, the usage line, and where to read more.
    pub fn usage(&self, text: &str, code: i32) -> Fault {
        Fault::Usage {
            text: format!(
                "{text}\n\nUsage:  {}\n\nRun '{} --help' for more information",
                help::usage_line(self.command, &self.path),
                self.path
            ),
            code,
        }
    }
}

static UNKNOWN: Flag = Flag::text("", "");
