//! URLs fit for people: where a password stands in one, it is not shown.

use std::borrow::Cow;

/// What stands in place of a password, as Go's and git's own messages have it.
const MASK: &str = "xxxxx";
/// A password that is none: the user before it is a token.
const TOKENS_PASSWORD: &str = "x-oauth-basic";

/// A text without the passwords of the URLs in it.
pub fn redacted(text: &str) -> Cow<'_, str> {
    let mut out = String::new();
    let mut done = 0;
    for (at, _) in text.match_indices("://") {
        let begin = at + "://".len();
        let Some(user) = userinfo(&text[begin..]) else { continue };
        let masked = mask(user, is_web(&text[..at]));
        if begin < done || masked == user {
            continue;
        }
        out.push_str(&text[done..begin]);
        out.push_str(&masked);
        done = begin + user.len();
    }
    if done == 0 {
        return Cow::Borrowed(text);
    }
    out.push_str(&text[done..]);
    Cow::Owned(out)
}

/// What stands before the host, without the `@`. A password in which `/` and the like were not escaped makes no URL, but it
/// is still one.
fn userinfo(rest: &str) -> Option<&str> {
    let word = &rest[..rest.find(|c: char| c.is_whitespace() || c == '"').unwrap_or(rest.len())];
    let authority = &word[..word.find(['/', '?', '#', '\\']).unwrap_or(word.len())];
    let port = authority.split_once(':').map_or("", |(_, port)| port);
    let host_alone = authority.starts_with('[') || port.bytes().all(|b| b.is_ascii_digit());
    let escaped = host_alone || authority.contains('@');
    let end = if escaped { authority.rfind('@') } else { word.rfind('@') };
    Some(&word[..end?])
}

fn is_web(before: &str) -> bool {
    before.ends_with("http") || before.ends_with("https")
}

/// A user alone is a token on the web, and a name elsewhere (`ssh://git@…`).
fn mask(user: &str, web: bool) -> Cow<'_, str> {
    match user.split_once(':') {
        Some(("", "")) => user.into(),
        Some((_, "" | TOKENS_PASSWORD)) => MASK.into(),
        Some((name, _)) => format!("{name}:{MASK}").into(),
        None if web && !user.is_empty() => MASK.into(),
        None => user.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        for (text, shown) in [
            ("https://u:p@x/r.git#v1", "https://u:xxxxx@x/r.git#v1"),
            ("ADD http://u:p%40@x:1/a http://h/ /d", "ADD http://u:xxxxx@x:1/a http://h/ /d"),
            ("[\"https://u:p@x\",\"ssh://git:p@y/z\"]", "[\"https://u:xxxxx@x\",\"ssh://git:xxxxx@y/z\"]"),
            (
                "fatal: 'https://a:b@x/': no https://c:d@y",
                "fatal: 'https://a:xxxxx@x/': no https://c:xxxxx@y",
            ),
            ("https://u:p@ss@x/", "https://u:xxxxx@x/"),
            ("https://u:p/a?s#s@x/r", "https://u:xxxxx@x/r"),
            ("https://token@x/r", "https://xxxxx@x/r"),
            ("https://token:@x/r", "https://xxxxx@x/r"),
            ("https://token:x-oauth-basic@x/r", "https://xxxxx@x/r"),
            ("https://:p@x/r", "https://:xxxxx@x/r"),
        ] {
            assert_eq!(redacted(text), shown);
        }
    }

    #[test]
    fn what_has_no_password_stays() {
        for text in [
            "",
            "://",
            "git@host:a/b",
            "ssh://git@host/r",
            "https://x/a@b",
            "https://x:80/a@b:c@d",
            "https://[::1]:80/u:p@x",
            "https://u:xxxxx@x/r.git",
            "ADD https://x/y /who@where",
        ] {
            assert!(matches!(redacted(text), Cow::Borrowed(same) if same == text), "{}", redacted(text));
        }
    }
}
