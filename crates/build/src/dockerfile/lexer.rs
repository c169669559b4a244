//! Text to logical lines: directives, comments, continuation lines, heredocs.

use super::{Fault, Rule, Span, Warning};

/// What the comments at the very top say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directives {
    pub syntax: Option<String>,
    pub escape: char,
    pub check: Option<String>,
}

impl Default for Directives {
    fn default() -> Self {
        Self { syntax: None, escape: '\\', check: None }
    }
}

/// A logical line: one instruction with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Upper case.
    pub keyword: String,
    /// As it is written.
    pub keyword_raw: String,
    /// What follows the keyword, continuation lines joined.
    pub rest: String,
    pub heredocs: Vec<Heredoc>,
    pub span: Span,
    /// `# check=` right above.
    pub check: Option<String>,
}

/// A here-document.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Heredoc {
    pub name: String,
    /// Variables in it are filled in.
    pub expand: bool,
    /// Leading tabs are removed.
    pub chomp: bool,
    /// The file descriptor before `<<`; 0 when there is none.
    pub fd: u32,
    pub content: String,
}

pub(super) struct Lexed {
    pub directives: Directives,
    pub lines: Vec<Line>,
    pub warnings: Vec<Warning>,
}

pub(super) fn lex(text: &str) -> Result<Lexed, Fault> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let raw: Vec<&str> = text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line)).collect();
    // What follows the last newline is no line.
    let count = if raw.last().is_some_and(|last| last.is_empty()) { raw.len() - 1 } else { raw.len() };
    let raw = &raw[..count];
    let directives = directives(raw)?;
    let mut lines = Vec::new();
    let mut warnings = Vec::new();
    let mut at = 0;
    let mut check = None;
    while at < raw.len() {
        let trimmed = raw[at].trim_start();
        if trimmed.is_empty() {
            at += 1;
            check = None;
            continue;
        }
        if let Some(comment) = trimmed.strip_prefix('#') {
            if let Some(("check", value)) = directive(comment).as_ref().map(|(k, v)| (k.as_str(), v.as_str()))
            {
                check = Some(value.to_owned());
            }
            at += 1;
            continue;
        }
        let first = at + 1;
        let column = raw[at].len() - trimmed.len() + 1;
        let (joined, next) = join(raw, at, directives.escape, &mut warnings);
        at = next;
        let mut span = Span { first, last: at, column };
        let (keyword_raw, rest) = split_keyword(&joined);
        let keyword = keyword_raw.to_ascii_uppercase();
        let mut heredocs =
            openers(&keyword, rest, directives.escape).map_err(|message| Fault::new(span, message))?;
        for heredoc in &mut heredocs {
            at = body(raw, at, heredoc).ok_or_else(|| {
                Fault::new(span, format!("unterminated heredoc: no line {:?} follows", heredoc.name))
            })?;
        }
        span.last = at;
        lines.push(Line {
            keyword,
            keyword_raw: keyword_raw.to_owned(),
            rest: rest.to_owned(),
            heredocs,
            span,
            check: check.take(),
        });
    }
    Ok(Lexed { directives, lines, warnings })
}

fn split_keyword(line: &str) -> (&str, &str) {
    let line = line.trim();
    match line.find(char::is_whitespace) {
        Some(end) => (&line[..end], line[end..].trim()),
        None => (line, ""),
    }
}

/// `key = value` of a comment's text.
fn directive(comment: &str) -> Option<(String, String)> {
    let (key, value) = comment.split_once('=')?;
    let (key, value) = (key.trim(), value.trim());
    let mut letters = key.chars();
    let named =
        letters.next().is_some_and(|c| c.is_ascii_alphabetic()) && letters.all(|c| c.is_ascii_alphanumeric());
    (named && !value.is_empty()).then(|| (key.to_ascii_lowercase(), value.to_owned()))
}

fn directives(raw: &[&str]) -> Result<Directives, Fault> {
    let mut found = Directives::default();
    let mut seen = Vec::new();
    let start = usize::from(raw.first().is_some_and(|line| line.starts_with("#!")));
    for (number, line) in raw.iter().enumerate().skip(start) {
        let Some((key, value)) = line.trim_start().strip_prefix('#').and_then(directive) else { break };
        let span = Span { first: number + 1, last: number + 1, column: 1 };
        if !matches!(key.as_str(), "syntax" | "escape" | "check") {
            break;
        }
        if seen.contains(&key) {
            return Err(Fault::new(span, format!("only one {key} parser directive can be used")));
        }
        match key.as_str() {
            "syntax" => found.syntax = Some(value),
            "escape" => {
                found.escape = match value.as_str() {
                    "\\" => '\\',
                    "`" => '`',
                    other => {
                        return Err(Fault::new(
                            span,
                            format!("invalid escape token {other:?}: it must be ` or \\"),
                        ));
                    }
                }
            }
            _ => found.check = Some(value),
        }
        seen.push(key);
    }
    Ok(found)
}

/// Joins the continuation lines that begin at `at`; the second value is the index after the last.
fn join(raw: &[&str], mut at: usize, escape: char, warnings: &mut Vec<Warning>) -> (String, usize) {
    let mut joined = String::new();
    let mut first = true;
    while at < raw.len() {
        let line = raw[at];
        let number = at + 1;
        at += 1;
        if !first {
            let trimmed = line.trim_start();
            if trimmed.starts_with('#') {
                continue;
            }
            if trimmed.is_empty() {
                warnings.push(Warning::new(
                    Rule::NoEmptyContinuation,
                    Span { first: number, last: number, column: 1 },
                    "an empty line inside an instruction: the next versions of the language may end it here",
                ));
                continue;
            }
        }
        let text = if first { line.trim_start() } else { line };
        first = false;
        if let Some(body) = text.trim_end_matches([' ', '\t']).strip_suffix(escape) {
            joined.push_str(body);
        } else {
            joined.push_str(text);
            return (joined, at);
        }
    }
    (joined, at)
}

/// The heredocs that a line opens, still empty.
fn openers(keyword: &str, rest: &str, escape: char) -> Result<Vec<Heredoc>, String> {
    let (keyword, rest) = if keyword == "ONBUILD" {
        let (inner, rest) = split_keyword(rest);
        (inner.to_ascii_uppercase(), rest)
    } else {
        (keyword.to_owned(), rest)
    };
    if !matches!(keyword.as_str(), "RUN" | "COPY" | "ADD") || !rest.contains("<<") {
        return Ok(Vec::new());
    }
    if rest.starts_with('[') && serde_json::from_str::<Vec<String>>(rest).is_ok() {
        return Ok(Vec::new());
    }
    Ok(words_raw(rest, escape).iter().filter_map(|word| opener(word, escape)).collect())
}

/// Words with their quotes, as the shell would separate them.
pub(super) fn words_raw(text: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if quote.is_none() && c.is_whitespace() {
            if !word.is_empty() {
                words.push(std::mem::take(&mut word));
            }
            continue;
        }
        word.push(c);
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (quote, c) if c == escape && quote != Some('\'') => word.extend(chars.next()),
            _ => {}
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// `3<<-"EOF"`.
pub(super) fn opener(word: &str, escape: char) -> Option<Heredoc> {
    let digits = word.find(|c: char| !c.is_ascii_digit())?;
    let (fd, rest) = word.split_at(digits);
    let rest = rest.strip_prefix("<<")?;
    let (chomp, quoted) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    if quoted.is_empty() || quoted.contains('<') {
        return None;
    }
    let mut name = String::new();
    let mut chars = quoted.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' | '\'' => {}
            c if c == escape => name.extend(chars.next()),
            c => name.push(c),
        }
    }
    if name.is_empty() {
        return None;
    }
    Some(Heredoc {
        expand: name == quoted,
        name,
        chomp,
        fd: fd.parse().unwrap_or_default(),
        content: String::new(),
    })
}

/// Reads a heredoc's lines; the result is the index after its end.
fn body(raw: &[&str], mut at: usize, heredoc: &mut Heredoc) -> Option<usize> {
    loop {
        let line = raw.get(at)?;
        at += 1;
        let line = if heredoc.chomp { line.trim_start_matches('\t') } else { line };
        if line == heredoc.name {
            return Some(at);
        }
        heredoc.content.push_str(line);
        heredoc.content.push('\n');
    }
}
