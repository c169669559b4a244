//! One logical line to one typed instruction; variables are still in the words.

use super::flags::{self, Flag, Flags, nearest};
use super::lexer::{self, Heredoc, Line};
use super::{Fault, Span};

/// An instruction with its place and its text.
#[derive(Debug, Clone, PartialEq)]
pub struct Instruction {
    pub command: Command,
    pub span: Span,
    /// The keyword and what follows, continuation lines joined: what a step is called.
    pub original: String,
    /// The keyword as it is written.
    pub keyword: String,
    /// `# check=` right above.
    pub check: Option<String>,
}

/// A build stage: FROM and what follows.
#[derive(Debug, Clone)]
pub struct Stage {
    pub number: usize,
    pub from: Instruction,
    pub instructions: Vec<Instruction>,
}

impl Stage {
    pub(super) fn new(number: usize, from: Instruction) -> Self {
        Self { number, from, instructions: Vec::new() }
    }

    /// Its name, in lower case.
    pub fn name(&self) -> Option<&str> {
        match &self.from.command {
            Command::From { name, .. } => name.as_deref(),
            _ => None,
        }
    }
}

/// The exec form (a JSON array) or the shell form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    Exec(Vec<String>),
    Shell(String),
}

/// What an instruction says.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    From {
        image: String,
        platform: Option<String>,
        name: Option<String>,
    },
    Arg(Vec<(String, Option<String>)>),
    Run {
        form: Form,
        flags: Flags,
        heredocs: Vec<Heredoc>,
    },
    Copy {
        add: bool,
        sources: Vec<String>,
        destination: String,
        flags: Flags,
        heredocs: Vec<Heredoc>,
    },
    Cmd(Form),
    Entrypoint(Form),
    Shell(Vec<String>),
    /// Name and value, both as written; the value of the legacy form is the whole rest.
    Env(Vec<(String, String)>),
    Label(Vec<(String, String)>),
    Expose(String),
    User(String),
    Workdir(String),
    Volume(Vec<String>),
    StopSignal(String),
    Maintainer(String),
    Healthcheck(Healthcheck),
    OnBuild(String),
}

/// HEALTHCHECK; durations in nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Healthcheck {
    pub test: Vec<String>,
    pub interval: Option<i64>,
    pub timeout: Option<i64>,
    pub start_period: Option<i64>,
    pub start_interval: Option<i64>,
    pub retries: Option<i64>,
}

/// Reads one logical line.
pub fn parse_line(line: &Line, escape: char) -> Result<Instruction, Fault> {
    let command = command(line, escape).map_err(|message| Fault::new(line.span, message))?;
    Ok(Instruction {
        command,
        span: line.span,
        original: if line.rest.is_empty() {
            line.keyword_raw.clone()
        } else {
            format!("{} {}", line.keyword_raw, line.rest)
        },
        keyword: line.keyword_raw.clone(),
        check: line.check.clone(),
    })
}

const KEYWORDS: &[&str] = &[
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

fn command(line: &Line, escape: char) -> Result<Command, String> {
    let keyword = line.keyword.as_str();
    if !KEYWORDS.contains(&keyword) {
        return Err(format!(
            "unknown instruction: {}{}",
            line.keyword_raw,
            nearest(&line.keyword, KEYWORDS)
                .map(|near| format!(" (did you mean {near}?)"))
                .unwrap_or_default()
        ));
    }
    let (flags, rest) = flags::split(&line.rest, escape)?;
    if rest.is_empty() && line.heredocs.is_empty() && !matches!(keyword, "CMD" | "ENTRYPOINT") {
        return Err(match keyword {
            "FROM" | "MAINTAINER" | "USER" | "WORKDIR" | "STOPSIGNAL" => {
                format!("{keyword} requires exactly one argument")
            }
            "COPY" | "ADD" => format!(
                "{keyword} requires at least two arguments, but only 0 were provided. Destination could not be determined"
            ),
            _ => format!("{keyword} requires at least one argument"),
        });
    }
    let allowed: &[&str] = match keyword {
        "FROM" => &["platform"],
        "RUN" => &["mount", "network", "security", "device"],
        "COPY" => &["from", "chown", "chmod", "link", "parents", "exclude"],
        "ADD" => &["chown", "chmod", "link", "keep-git-dir", "checksum", "unpack", "exclude"],
        "HEALTHCHECK" => &["interval", "timeout", "start-period", "start-interval", "retries"],
        _ => &[],
    };
    flags::check(keyword, &flags, allowed)?;
    match keyword {
        "FROM" => from(rest, &flags),
        "ARG" => arg(rest, escape),
        "RUN" => {
            Ok(Command::Run { form: form(rest)?, flags: Flags::of(&flags)?, heredocs: line.heredocs.clone() })
        }
        "COPY" | "ADD" => copy(keyword, rest, &flags, line, escape),
        "CMD" => Ok(Command::Cmd(form(rest)?)),
        "ENTRYPOINT" => Ok(Command::Entrypoint(form(rest)?)),
        "SHELL" => match json(rest)? {
            Some(words) if !words.is_empty() => Ok(Command::Shell(words)),
            Some(_) => Err("SHELL requires at least one argument".to_owned()),
            None => Err(format!("SHELL requires the arguments to be in JSON form: not {rest}")),
        },
        "ENV" => Ok(Command::Env(pairs("ENV", rest, escape)?)),
        "LABEL" => Ok(Command::Label(pairs("LABEL", rest, escape)?)),
        "EXPOSE" => Ok(Command::Expose(rest.to_owned())),
        "USER" => Ok(Command::User(rest.to_owned())),
        "WORKDIR" => Ok(Command::Workdir(rest.to_owned())),
        "VOLUME" => {
            let paths = match json(rest)? {
                Some(paths) => paths,
                None => rest.split_whitespace().map(str::to_owned).collect(),
            };
            if paths.is_empty() || paths.iter().any(|path| path.trim().is_empty()) {
                return Err("VOLUME specified can not be an empty string".to_owned());
            }
            Ok(Command::Volume(paths))
        }
        "STOPSIGNAL" => {
            if rest.split_whitespace().count() != 1 {
                return Err("STOPSIGNAL requires exactly one argument".to_owned());
            }
            Ok(Command::StopSignal(rest.to_owned()))
        }
        "MAINTAINER" => Ok(Command::Maintainer(rest.to_owned())),
        "HEALTHCHECK" => healthcheck(rest, &flags),
        "ONBUILD" => on_build(rest, &line.heredocs),
        _ => Err(format!("unknown instruction: {keyword}")),
    }
}

/// A JSON array of strings; `None` for what is no JSON array, an error for one of something else.
fn json(text: &str) -> Result<Option<Vec<String>>, String> {
    if !text.starts_with('[') {
        return Ok(None);
    }
    match serde_json::from_str::<Vec<serde_json::Value>>(text) {
        Err(_) => Ok(None),
        Ok(values) => values
            .into_iter()
            .map(|value| match value {
                serde_json::Value::String(text) => Ok(text),
                other => Err(format!("only string type is allowed in JSON format arrays, not {other}")),
            })
            .collect::<Result<_, _>>()
            .map(Some),
    }
}

fn form(text: &str) -> Result<Form, String> {
    Ok(match json(text)? {
        Some(words) => Form::Exec(words),
        None => Form::Shell(text.to_owned()),
    })
}

fn from(rest: &str, flags: &[Flag]) -> Result<Command, String> {
    let words: Vec<&str> = rest.split_whitespace().collect();
    let (image, name) = match words[..] {
        [image] => (image, None),
        [image, r#as, name] if r#as.eq_ignore_ascii_case("as") => (image, Some(name)),
        _ => return Err("FROM requires either one or three arguments".to_owned()),
    };
    if let Some(name) = name {
        let lower = name.to_lowercase();
        let mut letters = lower.chars();
        let valid = letters.next().is_some_and(|c| c.is_ascii_lowercase())
            && letters.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_' | '.'));
        if !valid {
            return Err(format!(
                "invalid name for build stage: {name:?}, name can't start with a number or contain symbols"
            ));
        }
    }
    Ok(Command::From {
        image: image.to_owned(),
        platform: flags.first().and_then(|(_, value)| value.clone()),
        name: name.map(str::to_lowercase),
    })
}

fn arg(rest: &str, escape: char) -> Result<Command, String> {
    let mut names = Vec::new();
    for word in lexer::words_raw(rest, escape) {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (word, None),
        };
        if name.is_empty() {
            return Err("ARG names can not be blank".to_owned());
        }
        names.push((name, value));
    }
    Ok(Command::Arg(names))
}

/// `a=b c=d`, or the legacy `a the whole rest`.
fn pairs(keyword: &str, rest: &str, escape: char) -> Result<Vec<(String, String)>, String> {
    let words = lexer::words_raw(rest, escape);
    let Some(first) = words.first() else { return Err(format!("{keyword} requires at least one argument")) };
    if !first.contains('=') {
        let Some((name, value)) = rest.split_once(char::is_whitespace) else {
            return Err(format!("{keyword} must have two arguments"));
        };
        return Ok(vec![(name.to_owned(), value.trim_start().to_owned())]);
    }
    words
        .into_iter()
        .map(|word| match word.split_once('=') {
            Some(("", _)) => Err(format!("{keyword} names can not be blank")),
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
            None => Err(format!("Syntax error - can't find = in {word:?}. Must be of the form: name=value")),
        })
        .collect()
}

fn copy(keyword: &str, rest: &str, flags: &[Flag], line: &Line, escape: char) -> Result<Command, String> {
    let words = match json(rest)? {
        Some(words) => words,
        None => lexer::words_raw(rest, escape),
    };
    let Some((destination, sources)) = words.split_last().filter(|(_, sources)| !sources.is_empty()) else {
        return Err(format!(
            "{keyword} requires at least two arguments, but only {} were provided. Destination could not be determined",
            words.len()
        ));
    };
    let is_heredoc = |word: &String| lexer::opener(word, escape).is_some();
    if !line.heredocs.is_empty() && is_heredoc(destination) {
        return Err(format!("{keyword} cannot accept a heredoc as a destination"));
    }
    let sources =
        sources.iter().filter(|source| line.heredocs.is_empty() || !is_heredoc(source)).cloned().collect();
    let flags = Flags::of(flags)?;
    if let Some(from) = &flags.from
        && from.contains('$')
    {
        return Err(format!(
            "'{from}': variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround"
        ));
    }
    Ok(Command::Copy {
        add: keyword == "ADD",
        sources,
        destination: destination.clone(),
        flags,
        heredocs: line.heredocs.clone(),
    })
}

fn healthcheck(rest: &str, flags: &[Flag]) -> Result<Command, String> {
    let mut check = Healthcheck::default();
    for (name, value) in flags {
        let value = value.as_deref().unwrap_or_default();
        if name == "retries" {
            let retries: i64 = value.parse().map_err(|_bad| format!("--retries={value} is not a number"))?;
            if retries < 0 {
                return Err(format!("--retries cannot be negative ({retries})"));
            }
            check.retries = Some(retries);
            continue;
        }
        let nanos = duration(value).ok_or_else(|| format!("--{name}={value} is not a duration"))?;
        if nanos != 0 && nanos < 1_000_000 {
            return Err(format!("interval {name:?} cannot be less than 1ms"));
        }
        let field = match name.as_str() {
            "interval" => &mut check.interval,
            "timeout" => &mut check.timeout,
            "start-period" => &mut check.start_period,
            _ => &mut check.start_interval,
        };
        *field = Some(nanos);
    }
    let (kind, command) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let command = command.trim();
    check.test = match kind.to_ascii_uppercase().as_str() {
        "NONE" if command.is_empty() => vec!["NONE".to_owned()],
        "NONE" => return Err("HEALTHCHECK NONE takes no arguments".to_owned()),
        "CMD" if command.is_empty() => return Err("Missing command after HEALTHCHECK CMD".to_owned()),
        "CMD" => match form(command)? {
            Form::Exec(words) => std::iter::once("CMD".to_owned()).chain(words).collect(),
            Form::Shell(text) => vec!["CMD-SHELL".to_owned(), text],
        },
        other => return Err(format!("Unknown type {other:?} in HEALTHCHECK (try CMD)")),
    };
    Ok(Command::Healthcheck(check))
}

fn on_build(rest: &str, heredocs: &[Heredoc]) -> Result<Command, String> {
    let trigger = rest.split_whitespace().next().unwrap_or_default().to_ascii_uppercase();
    match trigger.as_str() {
        "ONBUILD" => return Err("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed".to_owned()),
        "FROM" | "MAINTAINER" => return Err(format!("{trigger} isn't allowed as an ONBUILD trigger")),
        _ if !KEYWORDS.contains(&trigger.as_str()) => {
            return Err(format!("unknown instruction: {trigger} (after ONBUILD)"));
        }
        _ => {}
    }
    let mut text = rest.to_owned();
    for heredoc in heredocs {
        text.push('\n');
        text.push_str(&heredoc.content);
        text.push_str(&heredoc.name);
    }
    Ok(Command::OnBuild(text))
}

/// Go's durations (`1m30s`, `500ms`) in nanoseconds.
pub fn duration(text: &str) -> Option<i64> {
    const UNITS: [(&str, f64); 7] =
        [("ns", 1.0), ("us", 1e3), ("µs", 1e3), ("ms", 1e6), ("s", 1e9), ("m", 60e9), ("h", 3600e9)];
    if text == "0" {
        return Some(0);
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').filter(|at| *at > 0)?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        total += number * UNITS.iter().find(|(name, _)| *name == &rest[..unit])?.1;
        rest = &rest[unit..];
    }
    (!text.is_empty() && total < 9e18).then_some(total as i64)
}
