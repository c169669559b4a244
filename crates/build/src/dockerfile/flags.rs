//! The flags of instructions: `--name[=value]` before everything else.

/// A flag's name and value, as written.
pub(super) type Flag = (String, Option<String>);

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

impl Flags {
    /// Those of one instruction.
    pub(super) fn of(given: &[Flag]) -> Result<Self, String> {
        let mut flags = Self::default();
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
}

/// The flags at the beginning (`--name[=value]`, quotes resolved) and what follows.
pub(super) fn split(text: &str, escape: char) -> Result<(Vec<Flag>, &str), String> {
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

/// Whether an instruction has these flags, each once and with a value.
pub(super) fn check(keyword: &str, flags: &[Flag], allowed: &[&str]) -> Result<(), String> {
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

pub(super) fn boolean(name: &str, value: Option<&str>) -> Result<bool, String> {
    match value {
        None | Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(other) => Err(format!("expecting boolean value for flag --{name}, not: {other}")),
    }
}
