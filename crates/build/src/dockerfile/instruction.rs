//! One logical line to one typed instruction; variables are still in the words.

use std::collections::BTreeMap;

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

/// The flags of RUN, COPY and ADD, as written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Flags {
    pub from: Option<String>,
    pub chown: Option<String>,
    pub chmod: Option<String>,
    pub checksum: Option<String>,
    pub network: Option<String>,
    pub security: Option<String>,
    pub link: bool,
    pub parents: bool,
    pub keep_git_dir: bool,
    pub unpack: Option<bool>,
    pub exclude: Vec<String>,
    pub mounts: Vec<String>,
    pub devices: Vec<String>,
}

/// What a `--mount` is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    Bind,
    Cache,
    Tmpfs,
    Secret,
    Ssh,
}

/// A decoded `--mount`; variables are filled in already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub kind: MountKind,
    pub from: Option<String>,
    pub source: Option<String>,
    pub target: Option<String>,
    pub id: Option<String>,
    pub env: Option<String>,
    pub read_only: Option<bool>,
    pub required: bool,
    /// `shared`, `private` or `locked`.
    pub sharing: String,
    pub size: Option<i64>,
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
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
    let (flags, rest) = split_flags(&line.rest, escape)?;
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
    check_flags(keyword, &flags, allowed)?;
    match keyword {
        "FROM" => from(rest, &flags),
        "ARG" => arg(rest, escape),
        "RUN" => Ok(Command::Run {
            form: form(rest)?,
            flags: run_and_copy_flags(&flags)?,
            heredocs: line.heredocs.clone(),
        }),
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

/// A flag's name and value, as written.
type Flag = (String, Option<String>);

/// The flags at the beginning (`--name[=value]`, quotes resolved) and what follows.
fn split_flags(text: &str, escape: char) -> Result<(Vec<Flag>, &str), String> {
    let mut flags = Vec::new();
    let mut rest = text.trim_start();
    while rest.starts_with("--") {
        let mut word = String::new();
        let mut quote = None;
        let mut end = rest.len();
        let mut chars = rest.char_indices();
        while let Some((at, c)) = chars.next() {
            match (quote, c) {
                (None, c) if c.is_whitespace() => {
                    end = at;
                    break;
                }
                (Some(open), c) if c == open => quote = None,
                (None, '"' | '\'') => quote = Some(c),
                (quote, c) if c == escape && quote != Some('\'') => {
                    if let Some((_, next)) = chars.next() {
                        word.push(next);
                    }
                }
                (_, c) => word.push(c),
            }
        }
        if quote.is_some() {
            return Err(format!("a quote in the flag {word} is not closed"));
        }
        rest = rest[end..].trim_start();
        if word == "--" {
            break;
        }
        let word = &word[2..];
        flags.push(match word.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (word.to_owned(), None),
        });
    }
    Ok((flags, rest))
}

fn check_flags(keyword: &str, flags: &[(String, Option<String>)], allowed: &[&str]) -> Result<(), String> {
    const REPEATABLE: &[&str] = &["mount", "exclude", "device"];
    const BOOLEAN: &[&str] = &["link", "parents", "keep-git-dir", "unpack"];
    for (at, (name, value)) in flags.iter().enumerate() {
        if !allowed.contains(&name.as_str()) {
            let near =
                nearest(name, allowed).map(|near| format!(" (did you mean {near}?)")).unwrap_or_default();
            return Err(format!("unknown flag: --{name} of {keyword}{near}"));
        }
        if !REPEATABLE.contains(&name.as_str()) && flags[..at].iter().any(|(earlier, _)| earlier == name) {
            return Err(format!("duplicate flag specified: --{name}"));
        }
        if value.is_none() && !BOOLEAN.contains(&name.as_str()) {
            return Err(format!("missing a value on flag: --{name}"));
        }
    }
    Ok(())
}

/// The word of `known` that a misspelt one may have meant.
pub(super) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|known| (distance(word, known), *known))
        .filter(|(d, _)| *d <= 2)
        .min()
        .map(|(_, known)| known)
}

fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    // Words far too long are nobody's misspelling.
    for (i, c) in a.chars().take(40).enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, d) in b.iter().enumerate() {
            let cost = corner + usize::from(c != *d);
            corner = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

fn boolean(name: &str, value: Option<&str>) -> Result<bool, String> {
    match value {
        None | Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(other) => Err(format!("expecting boolean value for flag --{name}, not: {other}")),
    }
}

fn run_and_copy_flags(given: &[(String, Option<String>)]) -> Result<Flags, String> {
    let mut flags = Flags::default();
    for (name, value) in given {
        let text = value.clone();
        match name.as_str() {
            "from" => flags.from = text,
            "chown" => flags.chown = text,
            "chmod" => flags.chmod = text,
            "checksum" => flags.checksum = text,
            "network" => flags.network = text,
            "security" => flags.security = text,
            "link" => flags.link = boolean(name, value.as_deref())?,
            "parents" => flags.parents = boolean(name, value.as_deref())?,
            "keep-git-dir" => flags.keep_git_dir = boolean(name, value.as_deref())?,
            "unpack" => flags.unpack = Some(boolean(name, value.as_deref())?),
            "exclude" => flags.exclude.extend(text),
            "mount" => flags.mounts.extend(text),
            _ => flags.devices.extend(text),
        }
    }
    Ok(flags)
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

fn from(rest: &str, flags: &[(String, Option<String>)]) -> Result<Command, String> {
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

fn copy(
    keyword: &str,
    rest: &str,
    flags: &[(String, Option<String>)],
    line: &Line,
    escape: char,
) -> Result<Command, String> {
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
    let flags = run_and_copy_flags(flags)?;
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

fn healthcheck(rest: &str, flags: &[(String, Option<String>)]) -> Result<Command, String> {
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

impl Mount {
    /// Decodes `type=cache,target=/x`; values go through `expand`, but that of `from`.
    pub fn parse(text: &str, expand: &dyn Fn(&str) -> Result<String, String>) -> Result<Self, String> {
        let mut fields: BTreeMap<String, String> = BTreeMap::new();
        for field in csv(text)? {
            let (key, value) = match field.split_once('=') {
                Some((key, value)) => {
                    let key = key.trim().to_ascii_lowercase();
                    let value = if key == "from" { value.to_owned() } else { expand(value)? };
                    (key, Some(value))
                }
                None => (field.trim().to_ascii_lowercase(), None),
            };
            let key = match key.as_str() {
                "src" => "source".to_owned(),
                "dst" | "destination" => "target".to_owned(),
                "ro" => "readonly".to_owned(),
                "rw" => "readwrite".to_owned(),
                _ => key,
            };
            let value = match (value, key.as_str()) {
                (Some(value), _) => value,
                (None, "readonly" | "readwrite" | "required") => "true".to_owned(),
                (None, _) => return Err(format!("invalid field '{field}' must be a key=value pair")),
            };
            fields.insert(key, value);
        }
        let kind =
            match fields.remove("type").unwrap_or_else(|| "bind".to_owned()).to_ascii_lowercase().as_str() {
                "bind" => MountKind::Bind,
                "cache" => MountKind::Cache,
                "tmpfs" => MountKind::Tmpfs,
                "secret" => MountKind::Secret,
                "ssh" => MountKind::Ssh,
                other => return Err(format!("unsupported mount type {other:?}")),
            };
        let allowed: &[&str] = match kind {
            MountKind::Bind => &["target", "source", "from", "readonly", "readwrite"],
            MountKind::Cache => {
                &["id", "target", "readonly", "readwrite", "sharing", "from", "source", "mode", "uid", "gid"]
            }
            MountKind::Tmpfs => &["target", "size"],
            MountKind::Secret => &["id", "source", "target", "env", "required", "mode", "uid", "gid"],
            MountKind::Ssh => &["id", "target", "required", "mode", "uid", "gid"],
        };
        if let Some(key) = fields.keys().find(|key| !allowed.contains(&key.as_str())) {
            return Err(format!("unexpected key '{key}' for mount type '{}'", kind.as_str()));
        }
        let flag = |name: &str| -> Result<Option<bool>, String> {
            fields.get(name).map(|value| boolean(name, Some(value.as_str()))).transpose()
        };
        let number = |name: &str, radix: u32| -> Result<Option<u32>, String> {
            fields
                .get(name)
                .map(|value| {
                    u32::from_str_radix(value, radix)
                        .map_err(|_bad| format!("invalid value {value} for {name}"))
                })
                .transpose()
        };
        let sharing =
            fields.get("sharing").cloned().unwrap_or_else(|| "shared".to_owned()).to_ascii_lowercase();
        if !matches!(sharing.as_str(), "shared" | "private" | "locked") {
            return Err(format!("unsupported sharing value {sharing:?}"));
        }
        let read_only = match (flag("readonly")?, flag("readwrite")?) {
            (Some(read_only), None) => Some(read_only),
            (None, Some(writable)) => Some(!writable),
            (None, None) => None,
            _ => return Err("readonly and readwrite exclude each other".to_owned()),
        };
        let mount = Self {
            kind,
            from: fields.get("from").cloned(),
            source: fields.get("source").cloned(),
            target: fields.get("target").cloned(),
            id: fields.get("id").cloned(),
            env: fields.get("env").cloned(),
            read_only,
            required: flag("required")?.unwrap_or_default(),
            sharing,
            size: fields
                .get("size")
                .map(|size| bytes(size).ok_or_else(|| format!("invalid value {size} for size")))
                .transpose()?,
            mode: number("mode", 8)?,
            uid: number("uid", 10)?,
            gid: number("gid", 10)?,
        };
        if matches!(kind, MountKind::Bind | MountKind::Cache | MountKind::Tmpfs) && mount.target.is_none() {
            return Err(format!("mount type '{}' needs target=", kind.as_str()));
        }
        Ok(mount)
    }
}

impl MountKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Cache => "cache",
            Self::Tmpfs => "tmpfs",
            Self::Secret => "secret",
            Self::Ssh => "ssh",
        }
    }
}

/// One record of comma-separated values; a field in double quotes may hold commas, `""` is a quote.
pub fn csv(text: &str) -> Result<Vec<String>, String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let Some(last) = fields.last_mut() else { break };
        match c {
            '"' if quoted && chars.next_if_eq(&'"').is_some() => last.push('"'),
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            c => last.push(c),
        }
    }
    if quoted { Err(format!("a quote in {text:?} is not closed")) } else { Ok(fields) }
}

/// `64m` in bytes.
pub fn bytes(text: &str) -> Option<i64> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit()).unwrap_or(lower.len());
    let number: i64 = lower[..digits].parse().ok()?;
    let shift = match lower[digits..].trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}
