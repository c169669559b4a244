//! Variables and quotes in an instruction's words, by the Dockerfile's own rules (a subset of the shell's).

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Fills variables in.
#[derive(Debug)]
pub struct Shell<'a> {
    escape: char,
    variables: &'a BTreeMap<String, String>,
    /// Quotes and escapes stay (heredocs of COPY).
    raw_quotes: bool,
    unset: Mutex<Vec<String>>,
    used: Mutex<Vec<String>>,
}

type Chars<'t> = std::iter::Peekable<std::str::Chars<'t>>;

impl<'a> Shell<'a> {
    pub fn new(escape: char, variables: &'a BTreeMap<String, String>) -> Self {
        Self { escape, variables, raw_quotes: false, unset: Mutex::default(), used: Mutex::default() }
    }

    /// Keeps quotes and escapes other than of `$`.
    pub fn raw(mut self) -> Self {
        self.raw_quotes = true;
        self
    }

    /// Names that were asked for and are not set.
    pub fn unset(&self) -> Vec<String> {
        self.unset.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Names whose values were used.
    pub fn used(&self) -> Vec<String> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One word: blanks in it stay.
    pub fn word(&self, text: &str) -> Result<String, String> {
        let mut words = Words { split: false, ..Words::default() };
        self.process(&mut text.chars().peekable(), None, &mut words)?;
        Ok(words.current.unwrap_or_default())
    }

    /// All words: separated by blanks outside quotes, those in unquoted values included.
    pub fn words(&self, text: &str) -> Result<Vec<String>, String> {
        let mut words = Words { split: true, ..Words::default() };
        self.process(&mut text.chars().peekable(), None, &mut words)?;
        words.end();
        Ok(words.done)
    }

    /// Up to `stop` (which is left) or the end.
    fn process(&self, chars: &mut Chars<'_>, stop: Option<char>, out: &mut Words) -> Result<(), String> {
        while let Some(&c) = chars.peek() {
            if Some(c) == stop {
                return Ok(());
            }
            chars.next();
            match c {
                '\'' => self.single(chars, out)?,
                '"' => self.double(chars, out)?,
                '$' => {
                    let value = self.dollar(chars)?;
                    out.value(&value);
                }
                c if c == self.escape => match chars.next() {
                    Some(next) => {
                        if self.raw_quotes && next != '$' {
                            out.push(c);
                        }
                        out.push(next);
                    }
                    None => {
                        // The escape at the very end stands for itself where it is no separator.
                        if self.raw_quotes {
                            out.push(c);
                        }
                    }
                },
                c if out.split && c.is_whitespace() => out.end(),
                c => out.push(c),
            }
        }
        match stop {
            None => Ok(()),
            Some(stop) => Err(format!("unexpected end of statement while looking for matching {stop}")),
        }
    }

    fn single(&self, chars: &mut Chars<'_>, out: &mut Words) -> Result<(), String> {
        out.touch();
        if self.raw_quotes {
            out.push('\'');
            return Ok(());
        }
        for c in chars.by_ref() {
            if c == '\'' {
                return Ok(());
            }
            out.push(c);
        }
        Err("unexpected end of statement while looking for matching single-quote".to_owned())
    }

    fn double(&self, chars: &mut Chars<'_>, out: &mut Words) -> Result<(), String> {
        out.touch();
        if self.raw_quotes {
            out.push('"');
            return Ok(());
        }
        while let Some(c) = chars.next() {
            match c {
                '"' => return Ok(()),
                '$' => {
                    let value = self.dollar(chars)?;
                    value.chars().for_each(|c| out.push(c));
                }
                c if c == self.escape => match chars.next() {
                    Some(next) if next == '"' || next == '$' || next == self.escape => out.push(next),
                    Some(next) => {
                        out.push(c);
                        out.push(next);
                    }
                    None => break,
                },
                c => out.push(c),
            }
        }
        Err("unexpected end of statement while looking for matching double-quote".to_owned())
    }

    fn lookup(&self, name: &str) -> Option<&'a str> {
        let found = self.variables.get(name).map(String::as_str);
        match found {
            Some(_) => self.used.lock().unwrap_or_else(PoisonError::into_inner).push(name.to_owned()),
            None => self.unset.lock().unwrap_or_else(PoisonError::into_inner).push(name.to_owned()),
        }
        found
    }

    /// What stands for a `$…`, after the dollar.
    fn dollar(&self, chars: &mut Chars<'_>) -> Result<String, String> {
        if chars.next_if_eq(&'{').is_none() {
            let name = name(chars);
            if name.is_empty() {
                return Ok("$".to_owned());
            }
            return Ok(self.lookup(&name).unwrap_or_default().to_owned());
        }
        let name = name(chars);
        if name.is_empty() {
            return Err(match chars.peek() {
                None => "unexpected end of statement while looking for matching }".to_owned(),
                _ => "bad substitution: ${ names no variable".to_owned(),
            });
        }
        let unclosed = || "syntax error: missing '}'".to_owned();
        match chars.next().ok_or_else(unclosed)? {
            '}' => Ok(self.lookup(&name).unwrap_or_default().to_owned()),
            ':' => {
                let modifier = chars.next().ok_or_else(unclosed)?;
                self.modifier(chars, &name, modifier, true)
            }
            modifier @ ('+' | '-' | '?') => self.modifier(chars, &name, modifier, false),
            trim @ ('#' | '%') => {
                let greedy = chars.next_if_eq(&trim).is_some();
                let pattern = self.inner(chars, '}')?;
                chars.next().ok_or_else(unclosed)?;
                let value = self.lookup(&name).unwrap_or_default();
                Ok(if trim == '#' {
                    trim_start(value, &pattern, greedy)
                } else {
                    trim_end(value, &pattern, greedy)
                })
            }
            '/' => {
                let all = chars.next_if_eq(&'/').is_some();
                let pattern = self.pattern_until_slash(chars)?;
                let replacement =
                    if chars.next_if_eq(&'/').is_some() { self.inner(chars, '}')? } else { String::new() };
                chars.next().ok_or_else(unclosed)?;
                Ok(replace(self.lookup(&name).unwrap_or_default(), &pattern, &replacement, all))
            }
            other => Err(format!("unsupported modifier ({other}) in substitution of {name}")),
        }
    }

    fn modifier(
        &self,
        chars: &mut Chars<'_>,
        name: &str,
        modifier: char,
        colon: bool,
    ) -> Result<String, String> {
        let word = self.inner(chars, '}')?;
        chars.next();
        let value = self.variables.get(name).map(String::as_str);
        if value.is_some() {
            self.used.lock().unwrap_or_else(PoisonError::into_inner).push(name.to_owned());
        }
        let set = value.filter(|value| !colon || !value.is_empty());
        match modifier {
            '-' => Ok(set.map_or(word, str::to_owned)),
            '+' => Ok(if set.is_some() { word } else { String::new() }),
            '?' => match set {
                Some(value) => Ok(value.to_owned()),
                None if word.is_empty() => Err(format!(
                    "{name}: not allowed to be {}",
                    if colon { "unset or empty" } else { "unset" }
                )),
                None => Err(format!("{name}: {word}")),
            },
            other => Err(format!("unsupported modifier (:{other}) in substitution of {name}")),
        }
    }

    /// A word inside braces, up to `stop`, which is left.
    fn inner(&self, chars: &mut Chars<'_>, stop: char) -> Result<String, String> {
        let mut words = Words::default();
        self.process(chars, Some(stop), &mut words)?;
        Ok(words.current.unwrap_or_default())
    }

    /// The pattern of a replacement: up to an unescaped `/` or `}`.
    fn pattern_until_slash(&self, chars: &mut Chars<'_>) -> Result<String, String> {
        let mut pattern = String::new();
        loop {
            match chars.peek() {
                None => return Err("syntax error: missing '}'".to_owned()),
                Some('/' | '}') => return Ok(pattern),
                Some('$') => {
                    chars.next();
                    pattern.push_str(&self.dollar(chars)?);
                }
                Some(&c) if c == self.escape => {
                    chars.next();
                    match chars.next() {
                        Some('/') => pattern.push('/'),
                        Some(next) => pattern.extend(['\\', next]),
                        None => return Err("syntax error: missing '}'".to_owned()),
                    }
                }
                Some(&c) => {
                    pattern.push(c);
                    chars.next();
                }
            }
        }
    }
}

#[derive(Default)]
struct Words {
    split: bool,
    done: Vec<String>,
    current: Option<String>,
}

impl Words {
    fn push(&mut self, c: char) {
        self.current.get_or_insert_default().push(c);
    }

    fn touch(&mut self) {
        self.current.get_or_insert_default();
    }

    fn end(&mut self) {
        self.done.extend(self.current.take());
    }

    /// The value of an unquoted variable.
    fn value(&mut self, value: &str) {
        for c in value.chars() {
            if self.split && c.is_whitespace() {
                self.end();
            } else {
                self.push(c);
            }
        }
    }
}

fn name(chars: &mut Chars<'_>) -> String {
    let mut name = String::new();
    if let Some(&c) = chars.peek()
        && (c.is_ascii_digit() || matches!(c, '@' | '*' | '#' | '?' | '!'))
    {
        // The shell's own parameters: one character, never set here.
        chars.next();
        name.push(c);
        return name;
    }
    while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
        name.push(c);
    }
    name
}

/// A token of a pattern.
#[derive(Clone, Copy, PartialEq)]
enum Token {
    Any,
    One,
    Char(char),
}

fn tokens(pattern: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        tokens.push(match c {
            '*' => Token::Any,
            '?' => Token::One,
            '\\' => Token::Char(chars.next().unwrap_or('\\')),
            c => Token::Char(c),
        });
    }
    tokens
}

/// Lengths (in characters) of the beginnings of `text` that the pattern matches, shortest first.
fn prefixes(tokens: &[Token], text: &[char]) -> Vec<usize> {
    let mut reach = vec![false; text.len() + 1];
    reach[0] = true;
    for token in tokens {
        let mut next = vec![false; text.len() + 1];
        for at in 0..=text.len() {
            if !reach[at] {
                continue;
            }
            match token {
                Token::Any => next[at..].fill(true),
                Token::One if at < text.len() => next[at + 1] = true,
                Token::Char(c) if text.get(at) == Some(c) => next[at + 1] = true,
                Token::One | Token::Char(_) => {}
            }
        }
        reach = next;
    }
    reach.iter().enumerate().filter(|(_, reached)| **reached).map(|(length, _)| length).collect()
}

fn trim_start(value: &str, pattern: &str, greedy: bool) -> String {
    let text: Vec<char> = value.chars().collect();
    let found = prefixes(&tokens(pattern), &text);
    let length = if greedy { found.last() } else { found.first() };
    length.map_or_else(|| value.to_owned(), |&length| text[length..].iter().collect())
}

fn trim_end(value: &str, pattern: &str, greedy: bool) -> String {
    let text: Vec<char> = value.chars().rev().collect();
    let mut tokens = tokens(pattern);
    tokens.reverse();
    let found = prefixes(&tokens, &text);
    let length = if greedy { found.last() } else { found.first() };
    length.map_or_else(|| value.to_owned(), |&length| text[length..].iter().rev().collect())
}

fn replace(value: &str, pattern: &str, replacement: &str, all: bool) -> String {
    let text: Vec<char> = value.chars().collect();
    let tokens = tokens(pattern);
    let mut out = String::new();
    let mut at = 0;
    let mut done = tokens.is_empty();
    while at < text.len() {
        let longest =
            if done { None } else { prefixes(&tokens, &text[at..]).last().copied().filter(|n| *n > 0) };
        if let Some(length) = longest {
            out.push_str(replacement);
            at += length;
            done = !all;
        } else {
            out.push(text[at]);
            at += 1;
        }
    }
    out
}
