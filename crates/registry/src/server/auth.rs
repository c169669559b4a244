//! Who may do what: nobody asked, passwords (htpasswd), or tokens of a token server.
//!
//! Invariants: what cannot be checked is refused; secrets are neither logged nor answered; a wrong user costs as much
//! time as a wrong password.

mod htpasswd;
mod token;

use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderMap, StatusCode};

pub(super) use htpasswd::Htpasswd;
pub(super) use token::{Tokens, load_keys};

use super::refusal::Refusal;

/// What a request wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Need {
    /// To be known, nothing more.
    Login,
    Pull(String),
    Push(String),
    Delete(String),
    /// The names of all repositories.
    Catalog,
}

/// How requests are checked.
pub(super) enum Guard {
    Open,
    Htpasswd { users: Htpasswd, realm: String, anonymous_read: bool },
    Tokens(Tokens),
}

/// Who a request is from.
#[derive(Debug, Clone, Default)]
pub(super) struct Principal {
    /// Empty for anonymous ones.
    pub name: String,
    /// The repositories that may be read; `None` is all of them.
    readable: Option<Vec<String>>,
}

impl Principal {
    /// Whether blobs of the repository may be mounted into others.
    pub fn may_pull(&self, repository: &str) -> bool {
        self.readable.as_ref().is_none_or(|readable| readable.iter().any(|name| name == repository))
    }

    /// Whether everything may be read, so that a digest alone is enough to mount by.
    pub fn may_pull_all(&self) -> bool {
        self.readable.is_none()
    }
}

impl Guard {
    pub async fn check(&self, headers: &HeaderMap, need: &Need) -> Result<Principal, Refusal> {
        match self {
            Self::Open => Ok(Principal::default()),
            Self::Htpasswd { users, realm, anonymous_read } => {
                let given = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
                let Some(given) = given else {
                    if *anonymous_read && matches!(need, Need::Pull(_) | Need::Catalog) {
                        return Ok(Principal::default());
                    }
                    return Err(basic(realm, "authentication required"));
                };
                match users.check(given).await? {
                    Some(name) => Ok(Principal { name, readable: None }),
                    None => Err(basic(realm, "the user name or the password is wrong")),
                }
            }
            Self::Tokens(tokens) => {
                let (name, readable) = tokens.check(headers, need)?;
                Ok(Principal { name, readable: Some(readable) })
            }
        }
    }
}

fn basic(realm: &str, message: &str) -> Refusal {
    Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message)
        .with(WWW_AUTHENTICATE, &format!("Basic realm=\"{}\"", realm.replace(['"', '\\'], "")))
}
