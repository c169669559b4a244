//! Tokens of a token server: JSON Web Tokens as docker's token specification has them.
//!
//! Invariant: a token counts only if its signature is by a configured key (RSA or ECDSA; never "none" or a shared
//! secret), its issuer and audience are the configured ones, and the present lies within its time.

use std::fs;
use std::path::Path;

use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderMap, StatusCode};
use jsonwebtoken::jwk::{AlgorithmParameters, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;

use super::Need;
use crate::Error;
use crate::server::refusal::Refusal;

const RSA: [Algorithm; 6] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
];
const EC: [Algorithm; 2] = [Algorithm::ES256, Algorithm::ES384];

/// A key that signs tokens.
pub(in crate::server) struct Key {
    id: Option<String>,
    key: DecodingKey,
    algorithms: &'static [Algorithm],
}

pub(in crate::server) struct Tokens {
    /// Where clients get tokens: the URL of the token server.
    pub realm: String,
    /// The audience of tokens for this registry.
    pub service: String,
    pub issuer: String,
    pub keys: Vec<Key>,
}

#[derive(Deserialize)]
struct Claims {
    #[serde(default)]
    sub: String,
    #[serde(default)]
    access: Option<Vec<Grant>>,
}

#[derive(Deserialize)]
struct Grant {
    #[serde(rename = "type")]
    kind: String,
    name: String,
    #[serde(default)]
    actions: Vec<String>,
}

impl Tokens {
    /// The token's subject and the repositories it may read.
    pub fn check(&self, headers: &HeaderMap, need: &Need) -> Result<(String, Vec<String>), Refusal> {
        let given = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = given.and_then(|given| {
            let (scheme, token) = given.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
        });
        let Some(token) = token else {
            return Err(self.refuse(need, None, "authentication required"));
        };
        let Some(claims) = self.verify(token) else {
            return Err(self.refuse(need, Some("invalid_token"), "the token is not valid here"));
        };
        let grants = claims.access.unwrap_or_default();
        let may = |kind: &str, name: &str, action: &str| {
            grants.iter().any(|grant| {
                grant.kind == kind
                    && grant.name == name
                    && grant.actions.iter().any(|given| given == action || given == "*")
            })
        };
        let granted = match need {
            Need::Login => true,
            Need::Pull(name) => may("repository", name, "pull"),
            Need::Push(name) => may("repository", name, "push"),
            Need::Delete(name) => may("repository", name, "delete"),
            Need::Catalog => may("registry", "catalog", "*"),
        };
        if !granted {
            return Err(self.refuse(need, Some("insufficient_scope"), "the token does not grant this"));
        }
        let readable = grants
            .iter()
            .filter(|grant| {
                grant.kind == "repository"
                    && grant.actions.iter().any(|given| given == "pull" || given == "*")
            })
            .map(|grant| grant.name.clone())
            .collect();
        Ok((claims.sub, readable))
    }

    fn verify(&self, token: &str) -> Option<Claims> {
        let header = jsonwebtoken::decode_header(token).ok()?;
        // The key the token names first; a token server may name it in a way of its own.
        let named = |key: &&Key| key.id.is_some() && key.id == header.kid;
        let (first, rest): (Vec<&Key>, Vec<&Key>) = self.keys.iter().partition(named);
        first.into_iter().chain(rest).filter(|key| key.algorithms.contains(&header.alg)).find_map(|key| {
            let mut validation = Validation::new(header.alg);
            validation.set_audience(&[&self.service]);
            validation.set_issuer(&[&self.issuer]);
            validation.set_required_spec_claims(&["exp", "iss", "aud"]);
            validation.validate_nbf = true;
            jsonwebtoken::decode::<Claims>(token, &key.key, &validation).ok().map(|data| data.claims)
        })
    }

    fn refuse(&self, need: &Need, error: Option<&str>, message: &str) -> Refusal {
        let mut challenge =
            format!("Bearer realm=\"{}\",service=\"{}\"", quotable(&self.realm), quotable(&self.service));
        let scope = match need {
            Need::Login => None,
            Need::Pull(name) => Some(format!("repository:{name}:pull")),
            Need::Push(name) => Some(format!("repository:{name}:pull,push")),
            Need::Delete(name) => Some(format!("repository:{name}:delete")),
            Need::Catalog => Some("registry:catalog:*".to_owned()),
        };
        if let Some(scope) = scope {
            challenge.push_str(",scope=\"");
            challenge.push_str(&scope);
            challenge.push('"');
        }
        if let Some(error) = error {
            challenge.push_str(",error=\"");
            challenge.push_str(error);
            challenge.push('"');
        }
        Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message).with(WWW_AUTHENTICATE, &challenge)
    }
}

fn quotable(text: &str) -> String {
    text.replace(['"', '\\'], "")
}

/// Public keys and certificates in PEM, or a JSON Web Key Set.
pub(in crate::server) fn load_keys(path: &Path) -> Result<Vec<Key>, Error> {
    let text = fs::read_to_string(path)
        .map_err(|source| Error::Io { what: format!("read {}", path.display()), source })?;
    let invalid = |what: String| Error::Invalid(format!("{}: {what}", path.display()));
    let mut keys = Vec::new();
    if text.trim_start().starts_with('{') {
        let set: JwkSet = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        for jwk in &set.keys {
            let algorithms: &'static [Algorithm] = match &jwk.algorithm {
                AlgorithmParameters::RSA(_) => &RSA,
                AlgorithmParameters::EllipticCurve(_) => &EC,
                _ => continue,
            };
            let key = DecodingKey::from_jwk(jwk).map_err(|error| invalid(error.to_string()))?;
            keys.push(Key { id: jwk.common.key_id.clone(), key, algorithms });
        }
    } else {
        const END: &str = "-----END ";
        let mut rest = text.as_str();
        while let Some(start) = rest.find("-----BEGIN ") {
            let Some(end) = rest[start..].find(END).map(|at| start + at) else {
                return Err(invalid("a PEM block has no end".to_owned()));
            };
            let line =
                rest[end + END.len()..].find("-----").map_or(rest.len(), |at| end + END.len() + at + 5);
            let block = &rest.as_bytes()[start..line];
            let key = DecodingKey::from_ec_pem(block).map(|key| (key, &EC[..]));
            let key = key.or_else(|_not_ec| DecodingKey::from_rsa_pem(block).map(|key| (key, &RSA[..])));
            let (key, algorithms) = key.map_err(|error| {
                invalid(format!("a PEM block is no RSA or ECDSA public key or certificate: {error}"))
            })?;
            keys.push(Key { id: None, key, algorithms });
            rest = &rest[line..];
        }
    }
    if keys.is_empty() {
        return Err(invalid("holds no RSA or ECDSA public key".to_owned()));
    }
    Ok(keys)
}
