//! Registry credentials as clients send them.
//!
//! Invariant: what cannot be read counts as no credentials, as it does for docker; it is never echoed.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::{alphabet, engine};
use brigantine_registry::Credentials;
use serde::Deserialize;

use crate::http::{Request, json};

/// docker's AuthConfig.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct AuthConfig {
    pub username: String,
    pub password: String,
    /// base64 of `username:password`.
    pub auth: String,
    pub serveraddress: String,
    pub identitytoken: String,
    pub registrytoken: String,
}

impl AuthConfig {
    pub fn credentials(self) -> Option<Credentials> {
        if !self.registrytoken.is_empty() {
            return Some(Credentials::Registry { token: self.registrytoken });
        }
        if !self.identitytoken.is_empty() {
            return Some(Credentials::Identity { username: self.username, token: self.identitytoken });
        }
        if self.username.is_empty() && !self.auth.is_empty() {
            let decoded = String::from_utf8(decode(&self.auth)?).ok()?;
            let (username, password) = decoded.split_once(':')?;
            return Some(Credentials::Password {
                username: username.to_owned(),
                password: password.to_owned(),
            });
        }
        (!self.username.is_empty())
            .then_some(Credentials::Password { username: self.username, password: self.password })
    }

    /// The registry's domain: `https://index.docker.io/v1/` is docker.io.
    pub fn registry(&self) -> String {
        let address = self.serveraddress.trim();
        let address = address.strip_prefix("https://").or(address.strip_prefix("http://")).unwrap_or(address);
        match address.split('/').next().unwrap_or_default() {
            "" | "index.docker.io" | "registry-1.docker.io" | "docker.io" => "docker.io".to_owned(),
            domain => domain.to_owned(),
        }
    }
}

/// The credentials of `X-Registry-Auth`.
pub fn from_header(request: &Request) -> Option<Credentials> {
    parse(request.header("x-registry-auth")?)
}

/// The credentials of `X-Registry-Config`: one for each registry that a build may pull from.
pub fn all(request: &Request) -> BTreeMap<String, Credentials> {
    let configs: Option<BTreeMap<String, AuthConfig>> =
        request.header("x-registry-config").and_then(decode).and_then(|raw| json::from_slice(&raw).ok());
    configs
        .unwrap_or_default()
        .into_iter()
        .filter_map(|(registry, config)| Some((registry, config.credentials()?)))
        .collect()
}

fn parse(header: &str) -> Option<Credentials> {
    let config: AuthConfig = json::from_slice(&decode(header)?).ok()?;
    config.credentials()
}

/// Either alphabet, padded or not: clients send all four.
fn decode(text: &str) -> Option<Vec<u8>> {
    const LENIENT: GeneralPurposeConfig =
        engine::general_purpose::NO_PAD.with_decode_padding_mode(DecodePaddingMode::Indifferent);
    const URL: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);
    const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
    let text = text.trim();
    URL.decode(text).or_else(|_| STANDARD.decode(text)).ok()
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose;

    use super::*;

    #[test]
    fn every_alphabet_and_padding_is_taken() {
        let config = r#"{"username":"u?>","password":"p~~?","serveraddress":"x"}"#;
        let expected = Some(Credentials::Password { username: "u?>".into(), password: "p~~?".into() });
        for encoded in [
            general_purpose::STANDARD.encode(config),
            general_purpose::STANDARD_NO_PAD.encode(config),
            general_purpose::URL_SAFE.encode(config),
            general_purpose::URL_SAFE_NO_PAD.encode(config),
        ] {
            assert_eq!(parse(&encoded), expected, "{encoded}");
        }
        for bad in ["", "e30=", "!!!", "bm90IGpzb24="] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_other_forms_are_taken() {
        let credentials = |text: &str| json::from_slice::<AuthConfig>(text.as_bytes()).unwrap().credentials();
        assert_eq!(
            credentials(r#"{"registrytoken":"t"}"#),
            Some(Credentials::Registry { token: "t".into() })
        );
        assert_eq!(
            credentials(r#"{"auth":"dTpw"}"#),
            Some(Credentials::Password { username: "u".into(), password: "p".into() })
        );
        let hub: AuthConfig =
            json::from_slice(br#"{"serveraddress":"https://index.docker.io/v1/"}"#).unwrap();
        assert_eq!(hub.registry(), "docker.io");
        let own: AuthConfig = json::from_slice(br#"{"ServerAddress":"http://localhost:5000/"}"#).unwrap();
        assert_eq!(own.registry(), "localhost:5000");
    }
}
