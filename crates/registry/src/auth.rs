//! Credentials, challenges and tokens.
//!
//! Invariant: no secret appears in `Debug` output or in an error.

use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;

/// What a user gave to prove who they are.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    Password {
        username: String,
        password: String,
    },
    /// An OAuth2 refresh token.
    Identity {
        username: String,
        token: String,
    },
    /// A bearer token for the registry itself.
    Registry {
        token: String,
    },
    /// Somebody else's, who gets tokens for them.
    Kept(Keeper),
}

/// Who has credentials and does not give them away.
#[derive(Clone)]
pub struct Keeper(pub Arc<dyn GetToken>);

impl PartialEq for Keeper {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Keeper {}

/// Gets tokens from token servers.
pub trait GetToken: Send + Sync {
    /// A token for these scopes; `None` when there is none, or why it cannot be had.
    fn token<'t>(&'t self, wanted: &'t WantedToken) -> BoxFuture<'t, Result<Option<String>, String>>;
}

/// A token that a registry asks for (distribution's token authentication specification).
#[derive(Debug, Clone)]
pub struct WantedToken {
    pub realm: String,
    pub service: String,
    pub scopes: Vec<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Credentials::Password(…)",
            Self::Identity { .. } => "Credentials::Identity(…)",
            Self::Registry { .. } => "Credentials::Registry(…)",
            Self::Kept(_) => "Credentials::Kept(…)",
        })
    }
}

/// What a registry asks for in `WWW-Authenticate`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The best of the header's challenges: Bearer before Basic.
    pub fn choose<'h>(headers: impl IntoIterator<Item = &'h str>) -> Option<Self> {
        let all: Vec<Self> = headers.into_iter().filter_map(Self::parse).collect();
        all.iter().find(|challenge| matches!(challenge, Self::Bearer { .. })).or(all.first()).cloned()
    }

    fn parse(header: &str) -> Option<Self> {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service, mut scope) = (None, None, None);
        for (name, value) in parameters(rest) {
            match name.to_ascii_lowercase().as_str() {
                "realm" => realm = Some(value),
                "service" => service = Some(value),
                "scope" => scope = Some(value),
                _ => {}
            }
        }
        Some(Self::Bearer { realm: realm?, service, scope })
    }
}

/// `name="value", name=value` with quoted commas.
fn parameters(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while let Some((name, tail)) = rest.split_once('=') {
        let name = name.trim().trim_start_matches(',').trim().to_owned();
        let tail = tail.trim_start();
        let (value, after) = if let Some(quoted) = tail.strip_prefix('"') {
            let mut value = String::new();
            let mut chars = quoted.char_indices();
            let mut end = quoted.len();
            while let Some((at, c)) = chars.next() {
                match c {
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    '\\' => value.extend(chars.next().map(|(_, c)| c)),
                    c => value.push(c),
                }
            }
            (value, &quoted[end..])
        } else {
            let end = tail.find(',').unwrap_or(tail.len());
            (tail[..end].trim().to_owned(), &tail[end..])
        };
        found.push((name, value));
        rest = after.trim_start().trim_start_matches(',').trim_start();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_parsed() {
        let bearer = Challenge::choose([
            "Basic realm=\"x\"",
            r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull,push""#,
        ]);
        assert_eq!(
            bearer,
            Some(Challenge::Bearer {
                realm: "https://auth.example/token".into(),
                service: Some("registry.example".into()),
                scope: Some("repository:a/b:pull,push".into()),
            })
        );
        assert_eq!(Challenge::choose(["basic realm=x"]), Some(Challenge::Basic));
        assert_eq!(Challenge::choose(["Bearer service=x"]), None);
        assert_eq!(Challenge::choose(["Digest realm=x", "garbage \" = ,,="]), None);
    }

    #[test]
    fn secrets_do_not_show() {
        let shown =
            format!("{:?}", Credentials::Password { username: "u".into(), password: "hunter2".into() });
        assert!(!shown.contains("hunter2"));
    }
}
