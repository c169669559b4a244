//! The command line's grammar: docker's, as data.
//!
//! Commands and flags are `const` tables, so that starting the client costs nothing for the hundred commands that are
//! not run, and the grammar is pflag's where it shows: `--flag=false`, `-it`, `-p8080:80`, repeated flags, and a command
//! such as `run` whose own flags end at its first operand.

mod help;
mod matches;

use std::future::Future;
use std::pin::Pin;

pub use help::{command_help, flags_help, group_help, list_entries};
pub use matches::Matches;

use crate::context::Context;
use crate::fault::{Fault, Outcome};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Switch,
    /// One value; the last one given counts. Holds the type's name for the help text.
    One(&'static str),
    /// Each occurrence adds a value.
    List(&'static str),
}

#[derive(Debug, Clone, Copy)]
pub struct Flag {
    pub long: &'static str,
    pub short: Option<char>,
    pub kind: Kind,
    pub default: &'static str,
    pub help: &'static str,
    pub hidden: bool,
    /// Another name of the flag that means this one (docker's --net for --network).
    pub alias: Option<&'static str>,
}

impl Flag {
    const fn new(long: &'static str, kind: Kind, help: &'static str) -> Self {
        Self { long, short: None, kind, default: "", help, hidden: false, alias: None }
    }
    pub const fn switch(long: &'static str, help: &'static str) -> Self {
        Self::new(long, Kind::Switch, help)
    }
    pub const fn text(long: &'static str, help: &'static str) -> Self {
        Self::new(long, Kind::One("string"), help)
    }
    pub const fn one(long: &'static str, kind: &'static str, help: &'static str) -> Self {
        Self::new(long, Kind::One(kind), help)
    }
    pub const fn list(long: &'static str, help: &'static str) -> Self {
        Self::new(long, Kind::List("list"), help)
    }
    /// Takes several values, shown under its own type name.
    pub const fn as_list(mut self) -> Self {
        if let Kind::One(name) = self.kind {
            self.kind = Kind::List(name);
        }
        self
    }
    pub const fn short(mut self, short: char) -> Self {
        self.short = Some(short);
        self
    }
    pub const fn default(mut self, default: &'static str) -> Self {
        self.default = default;
        self
    }
    pub const fn hidden(mut self) -> Self {
        self.hidden = true;
        self
    }
    pub const fn alias(mut self, alias: &'static str) -> Self {
        self.alias = Some(alias);
        self
    }
}

/// How many operands a command takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operands {
    None,
    Exactly(usize),
    AtLeast(usize),
    AtMost(usize),
    Between(usize, usize),
}

pub type Running<'a> = Pin<Box<dyn Future<Output = Outcome> + 'a>>;

#[derive(Clone, Copy)]
pub struct Command {
    /// Its name at the top level, or in its group when it is only there.
    pub name: &'static str,
    pub usage: &'static str,
    pub about: &'static str,
    pub flags: &'static [Flag],
    pub operands: Operands,
    /// Flags may follow operands (`rm web -f`). Not so for commands that carry another command's line.
    pub interspersed: bool,
    pub run: for<'a> fn(&'a Context, Matches) -> Running<'a>,
}

/// A verb of the tree: a command, or a noun that holds commands.
#[derive(Clone, Copy)]
pub enum Entry {
    Command(Verb),
    Group(&'static Group),
    /// Docker has it, this engine does not yet: its name, and what it would do.
    Absent(&'static str, &'static str),
}

/// A command under one of its names: `ps` is `container ls` too.
#[derive(Clone, Copy)]
pub struct Verb {
    pub name: &'static str,
    pub aliases: &'static [&'static str],
    pub command: &'static Command,
}

pub const fn verb(command: &'static Command) -> Entry {
    Entry::Command(Verb { name: command.name, aliases: &[], command })
}

pub const fn named(name: &'static str, aliases: &'static [&'static str], command: &'static Command) -> Entry {
    Entry::Command(Verb { name, aliases, command })
}

#[derive(Clone, Copy)]
pub struct Group {
    pub name: &'static str,
    pub about: &'static str,
    pub entries: &'static [Entry],
}

impl Entry {
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Command(c) => c.name,
            Self::Group(g) => g.name,
            Self::Absent(name, _) => name,
        }
    }
    pub const fn about(&self) -> &'static str {
        match self {
            Self::Command(c) => c.command.about,
            Self::Group(g) => g.about,
            Self::Absent(_, about) => about,
        }
    }
    pub fn answers_to(&self, word: &str) -> bool {
        self.name() == word || matches!(self, Self::Command(verb) if verb.aliases.contains(&word))
    }
}

/// What the words after a command mean.
#[derive(Debug)]
pub enum Parsed {
    Run(Matches),
    Help,
}

/// Reads `words` by `flags`. `path` is the command as typed (`brig container ls`), for messages.
pub fn parse(command: &'static Command, path: &str, words: &[String]) -> Outcome<Parsed> {
    let mut given = Vec::new();
    let mut operands = Vec::new();
    let usage = |text: String| Fault::Usage {
        text: format!(
            "{text}\n\nUsage:  {}\n\nRun '{path} --help' for more information",
            help::usage_line(command, path)
        ),
        code: 125,
    };
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        if word == "--" {
            operands.extend(rest.by_ref().cloned());
        } else if let Some(long) = word.strip_prefix("--") {
            match read_long(command.flags, long, &mut rest) {
                Ok(Some(found)) => given.push(found),
                Ok(None) => return Ok(Parsed::Help),
                Err(text) => return Err(usage(text)),
            }
        } else if word.len() > 1 && word.starts_with('-') {
            match read_shorts(command.flags, word, &mut rest, &mut given) {
                Ok(true) => {}
                Ok(false) => return Ok(Parsed::Help),
                Err(text) => return Err(usage(text)),
            }
        } else {
            operands.push(word.clone());
            if !command.interspersed {
                operands.extend(rest.by_ref().cloned());
            }
        }
    }
    if let Some(text) = wrong_count(command.operands, operands.len()) {
        return Err(Fault::Usage {
            text: format!(
                "brig: '{path}' {text}\n\nUsage:  {}\n\nRun '{path} --help' for more information",
                help::usage_line(command, path)
            ),
            code: 1,
        });
    }
    Ok(Parsed::Run(Matches::new(command, path, given, operands)))
}

/// Options before the command's name (`brig -H … ps`): returns what was found and the words that are left.
pub fn parse_leading<'a>(flags: &'static [Flag], words: &'a [String]) -> Result<Leading<'a>, String> {
    let mut given = Vec::new();
    let mut rest = words.iter();
    loop {
        let left = rest.as_slice();
        let Some(word) = rest.next() else { return Ok(Leading::Words(given, left)) };
        if !word.starts_with('-') || word == "-" {
            return Ok(Leading::Words(given, left));
        }
        if word == "--" {
            return Ok(Leading::Words(given, rest.as_slice()));
        }
        if let Some(long) = word.strip_prefix("--") {
            match read_long(flags, long, &mut rest)? {
                Some(found) => given.push(found),
                None => return Ok(Leading::Help),
            }
        } else if !read_shorts(flags, word, &mut rest, &mut given)? {
            return Ok(Leading::Help);
        }
    }
}

pub type Given = (&'static str, String);

pub enum Leading<'a> {
    Help,
    Words(Vec<Given>, &'a [String]),
}

fn find_long(flags: &'static [Flag], name: &str) -> Option<&'static Flag> {
    flags.iter().find(|f| f.long == name || f.alias == Some(name))
}

fn read_long(
    flags: &'static [Flag],
    word: &str,
    rest: &mut std::slice::Iter<'_, String>,
) -> Result<Option<Given>, String> {
    let (name, inline) = match word.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (word, None),
    };
    let Some(flag) = find_long(flags, name) else {
        if name == "help" {
            return Ok(None);
        }
        return Err(format!("unknown flag: --{name}"));
    };
    let value = match (flag.kind, inline) {
        (Kind::Switch, None) => "true".to_owned(),
        (Kind::Switch, Some(value)) => switch_value(flag, value)?,
        (_, Some(value)) => value.to_owned(),
        (_, None) => rest.next().cloned().ok_or_else(|| format!("flag needs an argument: --{name}"))?,
    };
    Ok(Some((flag.long, value)))
}

/// `-it`, `-p8080:80`, `-e=A=B`; false when help is asked for.
fn read_shorts(
    flags: &'static [Flag],
    word: &str,
    rest: &mut std::slice::Iter<'_, String>,
    given: &mut Vec<Given>,
) -> Result<bool, String> {
    let mut left = &word[1..];
    while let Some(letter) = left.chars().next() {
        left = &left[letter.len_utf8()..];
        let Some(flag) = flags.iter().find(|f| f.short == Some(letter)) else {
            if letter == 'h' {
                return Ok(false);
            }
            return Err(format!("unknown shorthand flag: '{letter}' in {word}"));
        };
        if flag.kind == Kind::Switch {
            if let Some(value) = left.strip_prefix('=') {
                given.push((flag.long, switch_value(flag, value)?));
                return Ok(true);
            }
            given.push((flag.long, "true".to_owned()));
            continue;
        }
        let value = if left.is_empty() {
            rest.next().cloned().ok_or_else(|| format!("flag needs an argument: '{letter}' in {word}"))?
        } else {
            left.strip_prefix('=').unwrap_or(left).to_owned()
        };
        given.push((flag.long, value));
        return Ok(true);
    }
    Ok(true)
}

fn switch_value(flag: &Flag, value: &str) -> Result<String, String> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok("true".to_owned()),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok("false".to_owned()),
        _ => Err(format!(
            "invalid argument \"{value}\" for \"{}\" flag: strconv.ParseBool: parsing \"{value}\": invalid syntax",
            help::flag_names(flag)
        )),
    }
}

fn wrong_count(operands: Operands, count: usize) -> Option<String> {
    let plural = |n: usize| if n == 1 { "argument" } else { "arguments" };
    match operands {
        Operands::None if count > 0 => Some("accepts no arguments".to_owned()),
        Operands::Exactly(n) if count != n => Some(format!("requires {n} {}", plural(n))),
        Operands::AtLeast(n) if count < n => Some(format!("requires at least {n} {}", plural(n))),
        Operands::AtMost(n) if count > n => Some(format!("requires at most {n} {}", plural(n))),
        Operands::Between(low, high) if count < low || count > high => {
            Some(format!("requires at least {low} and at most {high} {}", plural(high)))
        }
        _ => None,
    }
}

/// A command's function as the table wants it.
macro_rules! runs {
    ($function:path) => {
        |context, matches| Box::pin($function(context, matches))
    };
}
pub(crate) use runs;

impl Command {
    /// A command with no flags or operands, to be filled by struct update.
    pub const EMPTY: Self = Self {
        name: "",
        usage: "",
        about: "",
        flags: &[],
        operands: Operands::None,
        interspersed: true,
        run: |_, _| Box::pin(async { Ok(()) }),
    };
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Command").field("name", &self.name).finish_non_exhaustive()
    }
}
