//! Patterns over paths: `.dockerignore`, `--exclude`, and the wildcards of COPY's sources.

/// One element of a compiled pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Char(char),
    /// `?`: one character, no slash.
    One,
    /// `*`: any number of them, no slash.
    Many,
    /// `**`: any number, slashes too.
    Deep,
    /// `**/`: nothing, or anything that ends with a slash.
    DeepDir,
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
}

/// A pattern for a whole path.
#[derive(Debug, Clone)]
pub struct Glob {
    tokens: Vec<Token>,
}

impl Glob {
    /// Compiles a pattern; `**` reaches over directories.
    pub fn new(pattern: &str) -> Result<Self, String> {
        let wrong = || format!("syntax error in pattern {pattern:?}");
        let chars: Vec<char> = pattern.chars().collect();
        let mut tokens = Vec::new();
        let mut at = 0;
        while let Some(&c) = chars.get(at) {
            at += 1;
            tokens.push(match c {
                '*' if chars.get(at) == Some(&'*') => {
                    at += 1;
                    if chars.get(at) == Some(&'/') {
                        at += 1;
                        Token::DeepDir
                    } else {
                        Token::Deep
                    }
                }
                '*' => Token::Many,
                '?' => Token::One,
                '\\' => {
                    at += 1;
                    Token::Char(*chars.get(at - 1).ok_or_else(wrong)?)
                }
                '[' => {
                    let negated = chars.get(at) == Some(&'^');
                    at += usize::from(negated);
                    let mut ranges = Vec::new();
                    loop {
                        let mut next = || {
                            let mut c = *chars.get(at).ok_or_else(wrong)?;
                            at += 1;
                            if c == '\\' {
                                c = *chars.get(at).ok_or_else(wrong)?;
                                at += 1;
                            }
                            Ok::<char, String>(c)
                        };
                        let first = next()?;
                        if first == ']' && !ranges.is_empty() {
                            break;
                        }
                        if chars.get(at) == Some(&'-') {
                            at += 1;
                            let mut last = *chars.get(at).ok_or_else(wrong)?;
                            at += 1;
                            if last == '\\' {
                                last = *chars.get(at).ok_or_else(wrong)?;
                                at += 1;
                            }
                            ranges.push((first, last));
                        } else {
                            ranges.push((first, first));
                        }
                    }
                    Token::Class { negated, ranges }
                }
                c => Token::Char(c),
            });
        }
        Ok(Self { tokens })
    }

    /// Whether the whole of `text` matches.
    pub fn matches(&self, text: &str) -> bool {
        let text: Vec<char> = text.chars().collect();
        let mut reach = vec![false; text.len() + 1];
        reach[0] = true;
        for token in &self.tokens {
            let mut next = vec![false; text.len() + 1];
            let mut spreading = false;
            let mut deep = false;
            for at in 0..=text.len() {
                match token {
                    Token::Many => {
                        spreading |= reach[at];
                        next[at] = spreading;
                        if text.get(at) == Some(&'/') {
                            spreading = false;
                        }
                    }
                    Token::Deep => {
                        spreading |= reach[at];
                        next[at] = spreading;
                    }
                    Token::DeepDir => {
                        next[at] |= reach[at];
                        deep |= reach[at];
                        if deep && text.get(at) == Some(&'/') {
                            next[at + 1] = true;
                        }
                    }
                    _ if !reach[at] => {}
                    Token::Char(c) if text.get(at) == Some(c) => next[at + 1] = true,
                    Token::One if text.get(at).is_some_and(|c| *c != '/') => next[at + 1] = true,
                    Token::Class { negated, ranges }
                        if text.get(at).is_some_and(|c| {
                            *c != '/' && ranges.iter().any(|(a, z)| a <= c && c <= z) != *negated
                        }) =>
                    {
                        next[at + 1] = true;
                    }
                    _ => {}
                }
            }
            reach = next;
        }
        reach[text.len()]
    }
}

/// Whether a path has wildcards.
pub fn has_wildcard(path: &str) -> bool {
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => {
                chars.next();
            }
            '*' | '?' | '[' => return true,
            _ => {}
        }
    }
    false
}

/// A path made plain, relative, never above its root.
pub fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[derive(Debug, Clone)]
struct Rule {
    glob: Glob,
    text: String,
    again: bool,
    /// Without wildcards, escapes or classes: compared as text.
    plain: bool,
}

/// What is left out: patterns in order, the last that matches decides.
#[derive(Debug, Clone, Default)]
pub struct Ignore {
    rules: Vec<Rule>,
    again: bool,
}

impl Ignore {
    /// Reads a `.dockerignore`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self::new(lines)
    }

    pub fn new<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let mut ignore = Self::default();
        for pattern in patterns {
            let (again, pattern) = match pattern.strip_prefix('!') {
                Some(rest) => (true, rest.trim()),
                None => (false, pattern.trim()),
            };
            if pattern.is_empty() {
                return Err("illegal exclusion pattern: \"!\"".to_owned());
            }
            let text = clean(pattern);
            if text.is_empty() {
                // The root itself is always there.
                continue;
            }
            let plain = !text.contains(['*', '?', '[', '\\']);
            ignore.again |= again;
            ignore.rules.push(Rule { glob: Glob::new(&text)?, text, again, plain });
        }
        Ok(ignore)
    }

    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The patterns, one a rule, as a client is told them.
    pub fn patterns(&self) -> Vec<String> {
        let sign = |again| if again { "!" } else { "" };
        self.rules.iter().map(|rule| format!("{}{}", sign(rule.again), rule.text)).collect()
    }

    /// Whether the path (relative, plain) is left out, by itself or with a directory above it.
    pub fn excludes(&self, path: &str) -> bool {
        let mut out = false;
        for rule in &self.rules {
            // What changes nothing need not be matched.
            if rule.again == out && rule.matches_path_or_parent(path) {
                out = !rule.again;
            }
        }
        out
    }

    /// Whether a directory that is left out may still hold something that is taken again.
    pub fn may_take_again_below(&self, dir: &str) -> bool {
        self.again
            && self.rules.iter().filter(|rule| rule.again).any(|rule| {
                let depth = dir.split('/').count();
                let prefix: Vec<&str> = rule.text.split('/').take(depth).collect();
                if prefix.iter().any(|part| part.contains("**")) {
                    return true;
                }
                prefix.len() == depth && Glob::new(&prefix.join("/")).is_ok_and(|glob| glob.matches(dir))
            })
    }
}

impl Rule {
    fn matches_path_or_parent(&self, path: &str) -> bool {
        if self.plain {
            return path == self.text
                || (path.len() > self.text.len()
                    && path.starts_with(&self.text)
                    && path.as_bytes()[self.text.len()] == b'/');
        }
        if self.glob.matches(path) {
            return true;
        }
        path.match_indices('/').any(|(at, _)| self.glob.matches(&path[..at]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_stop_at_slashes_unless_they_are_double() {
        for (pattern, path, expected) in [
            ("*", "a", true),
            ("*", "a/b", false),
            ("a/*", "a/b", true),
            ("**", "a/b/c", true),
            ("**/b", "b", true),
            ("**/b", "a/x/b", true),
            ("**/b", "a/xb", false),
            ("a/**", "a/b/c", true),
            ("a/**/c", "a/c", true),
            ("a/**/c", "a/b/b/c", true),
            ("a**c", "a/b/c", true),
            ("?.go", "a.go", true),
            ("?", "/", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[]a]", "]", true),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("*.txt", ".txt", true),
            ("a*b*c", "axxbyyc", true),
        ] {
            assert_eq!(Glob::new(pattern).unwrap().matches(path), expected, "{pattern} {path}");
        }
        for bad in ["[", "[a", "a\\", "[a-"] {
            assert!(Glob::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_last_matching_rule_decides() {
        let ignore =
            Ignore::parse("# note\n\n/target\n**/*.o\n!keep.o\n docs/* \n!docs/README.md\nnode_modules\n")
                .unwrap();
        for (path, out) in [
            ("target", true),
            ("target/x/y", true),
            ("a/target", false),
            ("a/b.o", true),
            ("keep.o", false),
            ("a/keep.o", true),
            ("docs", false),
            ("docs/x", true),
            ("docs/x/y", true),
            ("docs/README.md", false),
            ("node_modules/x", true),
            ("src", false),
        ] {
            assert_eq!(ignore.excludes(path), out, "{path}");
        }
        let all = Ignore::parse("*\n!src\n!a/b/*.c").unwrap();
        assert!(all.excludes("x") && !all.excludes("src/x"));
        assert!(
            all.may_take_again_below("a")
                && all.may_take_again_below("a/b")
                && !all.may_take_again_below("x")
        );
        assert!(Ignore::parse("!").is_err() && Ignore::parse("[").is_err());
    }

    #[test]
    fn paths_never_climb_out() {
        for (path, expected) in [("../../x", "x"), ("/a/./b/", "a/b"), ("a/../..", ""), ("", "")] {
            assert_eq!(clean(path), expected);
        }
    }
}
