//! Authorization plugins (docker's protocol, <https://docs.docker.com/engine/extend/plugins_authorization/>): each is
//! asked about every request before it is carried out, and about its answer before it is sent.
//!
//! Invariant: a request passes if all of them let it pass. One that is not there, does not answer in time or answers
//! nonsense lets nothing pass.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use brigantine_engine::plugins::{ASKING, Plugins};
use http::HeaderMap;
use serde::{Deserialize, Serialize};

use super::Daemon;
use crate::http::Error;
use crate::http::gate::{Answered, Asked, Gate, Verdict};

/// What such a plugin says that it implements.
const KIND: &str = "authz";
const BEFORE: &str = "AuthZPlugin.AuthZReq";
const AFTER: &str = "AuthZPlugin.AuthZRes";

/// Headers with what somebody logs in with; plugins do not see them.
const SECRET: [&str; 2] = ["x-registry-auth", "x-registry-config"];

/// The plugins of a daemon, which a reload may change.
pub struct Authorization {
    daemon: Arc<Daemon>,
    plugins: Plugins,
}

/// What a plugin is asked; fields that are empty are left out.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Question<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    user: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    user_auth_n_method: &'a str,
    request_method: &'a str,
    request_uri: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_body: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    request_headers: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    request_peer_certificates: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_status_code: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_body: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    response_headers: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    allow: bool,
    #[serde(default)]
    msg: String,
}

impl Authorization {
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon, plugins: Plugins::default() }
    }

    /// Whether all plugins are there; the first that is not.
    pub async fn check(&self) -> Result<(), brigantine_engine::Error> {
        for name in self.daemon.authorization().iter() {
            self.plugins.check(name, KIND).await?;
        }
        Ok(())
    }

    async fn ask(&self, method: &str, question: &Question<'_>) -> Result<(), Error> {
        let question = serde_json::to_value(question).map_err(|error| {
            Error::internal(format!("describe a request to authorization plugins: {error}"))
        })?;
        for name in self.daemon.authorization().iter() {
            let Answer { allow, msg } = self.plugins.call(name, KIND, method, &question, ASKING).await?;
            if !allow {
                return Err(Error::forbidden(format!("authorization denied by plugin {name}: {msg}")));
            }
        }
        Ok(())
    }
}

impl Gate for Authorization {
    fn is_manned(&self) -> bool {
        !self.daemon.authorization().is_empty()
    }

    fn before<'a>(&'a self, asked: &'a Asked) -> Verdict<'a> {
        Box::pin(async move { self.ask(BEFORE, &question(asked)).await })
    }

    fn after<'a>(&'a self, asked: &'a Asked, answered: &'a Answered) -> Verdict<'a> {
        Box::pin(async move {
            let question = Question {
                response_status_code: Some(answered.status.as_u16()),
                response_body: answered.body.as_ref().map(|body| STANDARD.encode(body)),
                response_headers: shown(&answered.headers),
                ..question(asked)
            };
            self.ask(AFTER, &question).await
        })
    }
}

fn question(asked: &Asked) -> Question<'_> {
    let peer = &*asked.peer;
    Question {
        user: &peer.name,
        user_auth_n_method: if peer.certificates.is_empty() { "" } else { "TLS" },
        request_method: asked.method.as_str(),
        request_uri: &asked.uri,
        request_body: asked.body.as_ref().map(|body| STANDARD.encode(body)),
        request_headers: shown(&asked.headers),
        request_peer_certificates: peer.certificates.iter().map(|der| STANDARD.encode(pem(der))).collect(),
        response_status_code: None,
        response_body: None,
        response_headers: BTreeMap::new(),
    }
}

/// Names as Go writes them, `Content-Type`; of several values of one the last, as docker does.
fn shown(headers: &HeaderMap) -> BTreeMap<String, String> {
    let visible = headers.iter().filter(|(name, _)| !SECRET.contains(&name.as_str()));
    let text = visible.filter_map(|(name, value)| Some((name, value.to_str().ok()?.to_owned())));
    text.map(|(name, value)| (canonical(name.as_str()), value)).collect()
}

fn canonical(name: &str) -> String {
    let capital = |part: &str| {
        let (first, rest) = part.split_at_checked(1).unwrap_or((part, ""));
        first.to_ascii_uppercase() + rest
    };
    name.split('-').map(capital).collect::<Vec<_>>().join("-")
}

fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for line in text.as_bytes().chunks(64) {
        pem.extend(line.iter().map(|byte| char::from(*byte)));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn headers_are_named_as_go_names_them_and_credentials_are_not_shown() {
        let mut headers = HeaderMap::new();
        headers.insert("content-type", HeaderValue::from_static("application/json"));
        headers.insert("x-registry-auth", HeaderValue::from_static("secret"));
        assert_eq!(
            shown(&headers),
            BTreeMap::from([("Content-Type".to_owned(), "application/json".to_owned())])
        );
    }

    #[test]
    fn certificates_are_told_in_pem() {
        let text = pem(&[0; 60]);
        assert_eq!(text.lines().map(str::len).collect::<Vec<_>>(), [27, 64, 16, 25]);
    }
}
