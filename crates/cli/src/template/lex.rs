//! Splits a template into text and actions, and an action into tokens.

use super::Error;

#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    /// `.Name`; `spaced` tells `f .Name` (an argument) from `(f).Name` (a member).
    Field(String, bool),
    Dot,
    Variable(String),
    Word(String),
    Text(String),
    Int(i64),
    Float(f64),
    Pipe,
    Declare,
    Assign,
    Comma,
    Open,
    Close,
}

#[derive(Debug, Clone)]
pub struct Placed {
    pub token: Token,
    /// Offset in the whole source, for messages.
    pub at: usize,
}

#[derive(Debug)]
pub enum Piece {
    Literal(String),
    Action { tokens: Vec<Placed>, line: usize },
}

fn error(source: &str, at: usize, text: impl Into<String>) -> Error {
    let line = 1 + source[..at.min(source.len())].matches('\n').count();
    Error::Parse { line, text: text.into() }
}

pub fn split(source: &str) -> Result<Vec<Piece>, Error> {
    let mut pieces = Vec::new();
    let mut at = 0;
    let mut trim_next = false;
    while let Some(open) = source[at..].find("{{").map(|i| at + i) {
        let mut literal = &source[at..open];
        if trim_next {
            literal = literal.trim_start();
        }
        let mut inside = open + 2;
        if source[inside..].starts_with("- ") {
            literal = literal.trim_end();
            inside += 2;
        }
        if !literal.is_empty() {
            pieces.push(Piece::Literal(literal.to_owned()));
        }
        let line = 1 + source[..open].matches('\n').count();
        let (tokens, after, trims) = action(source, inside)?;
        trim_next = trims;
        at = after;
        if let Some(tokens) = tokens {
            pieces.push(Piece::Action { tokens, line });
        }
    }
    let mut literal = &source[at..];
    if trim_next {
        literal = literal.trim_start();
    }
    if !literal.is_empty() {
        pieces.push(Piece::Literal(literal.to_owned()));
    }
    Ok(pieces)
}

type Action = (Option<Vec<Placed>>, usize, bool);

/// The tokens up to `}}`, where the text goes on, and whether it is trimmed there. No tokens for a comment.
fn action(source: &str, start: usize) -> Result<Action, Error> {
    let trimmed = source[start..].trim_start();
    if trimmed.starts_with("/*") {
        let begin = source.len() - trimmed.len();
        let end = source[begin..]
            .find("*/")
            .map(|i| begin + i + 2)
            .ok_or_else(|| error(source, begin, "unclosed comment"))?;
        let rest = source[end..].trim_start();
        let trims = rest.starts_with("-}}");
        let rest = rest.strip_prefix('-').unwrap_or(rest);
        if !rest.starts_with("}}") {
            return Err(error(source, end, "comment ends before closing delimiter"));
        }
        return Ok((None, source.len() - rest.len() + 2, trims));
    }
    let bytes = source.as_bytes();
    let mut tokens = Vec::new();
    let mut at = start;
    let mut spaced = true;
    loop {
        let Some(c) = source[at..].chars().next() else {
            return Err(error(source, at, "unclosed action"));
        };
        if c.is_whitespace() {
            if source[at + 1..].starts_with("-}}") {
                return Ok((Some(tokens), at + 4, true));
            }
            at += c.len_utf8();
            spaced = true;
            continue;
        }
        if source[at..].starts_with("}}") {
            return Ok((Some(tokens), at + 2, false));
        }
        let from = at;
        let word_end = |from: usize| {
            source[from..]
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .map_or(source.len(), |length| from + length)
        };
        let token = match c {
            '|' => {
                at += 1;
                Token::Pipe
            }
            '(' => {
                at += 1;
                Token::Open
            }
            ')' => {
                at += 1;
                Token::Close
            }
            ',' => {
                at += 1;
                Token::Comma
            }
            '=' => {
                at += 1;
                Token::Assign
            }
            ':' if bytes.get(at + 1) == Some(&b'=') => {
                at += 2;
                Token::Declare
            }
            '"' => {
                let end = quoted_end(source, at)?;
                let text = unquote(&source[at + 1..end - 1])
                    .ok_or_else(|| error(source, at, format!("invalid syntax in {}", &source[from..end])))?;
                at = end;
                Token::Text(text)
            }
            '`' => {
                let end = source[at + 1..]
                    .find('`')
                    .map(|i| at + 1 + i)
                    .ok_or_else(|| error(source, at, "unterminated raw quoted string"))?;
                let text = source[at + 1..end].to_owned();
                at = end + 1;
                Token::Text(text)
            }
            '$' => {
                at = word_end(at + 1);
                Token::Variable(source[from..at].to_owned())
            }
            '.' if bytes.get(at + 1).is_some_and(|b| b.is_ascii_alphabetic() || *b == b'_') => {
                at = word_end(at + 1);
                Token::Field(source[from + 1..at].to_owned(), spaced)
            }
            '.' => {
                at += 1;
                Token::Dot
            }
            c if c.is_ascii_digit() || (c == '-' && bytes.get(at + 1).is_some_and(u8::is_ascii_digit)) => {
                at += 1;
                while bytes.get(at).is_some_and(|b| b.is_ascii_digit() || *b == b'.') {
                    at += 1;
                }
                number(&source[from..at]).ok_or_else(|| {
                    error(source, from, format!("bad number syntax: \"{}\"", &source[from..at]))
                })?
            }
            c if c.is_alphabetic() || c == '_' => {
                at = word_end(at);
                Token::Word(source[from..at].to_owned())
            }
            c => {
                return Err(error(source, at, format!("unexpected \"{c}\" in command")));
            }
        };
        tokens.push(Placed { token, at: from });
        spaced = false;
    }
}

fn number(text: &str) -> Option<Token> {
    if text.contains('.') { text.parse().ok().map(Token::Float) } else { text.parse().ok().map(Token::Int) }
}

fn quoted_end(source: &str, start: usize) -> Result<usize, Error> {
    let mut escaped = false;
    for (offset, c) in source[start + 1..].char_indices() {
        match c {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return Ok(start + 1 + offset + 1),
            '\n' => break,
            _ => escaped = false,
        }
    }
    Err(error(source, start, "unterminated quoted string"))
}

fn unquote(text: &str) -> Option<String> {
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        out.push(match chars.next()? {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            '\\' => '\\',
            '"' => '"',
            '\'' => '\'',
            'x' => {
                let hex: String = chars.by_ref().take(2).collect();
                char::from(u8::from_str_radix(&hex, 16).ok()?)
            }
            'u' => {
                let hex: String = chars.by_ref().take(4).collect();
                char::from_u32(u32::from_str_radix(&hex, 16).ok()?)?
            }
            _ => return None,
        });
    }
    Some(out)
}
