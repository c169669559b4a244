//! docker's config.json: credentials, detach keys, formats. What this client does not know in it is kept as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::credential_helper::Helper;
use crate::fault::{Fault, Outcome};

/// The key docker files Docker Hub's credentials under.
pub const HUB: &str = "https://index.docker.io/v1/";

#[derive(Debug, Default)]
pub struct Config {
    path: PathBuf,
    document: Map<String, Json>,
}

/// What goes to a registry through the engine, base64url in `X-Registry-Auth`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub username: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub password: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub identitytoken: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub registrytoken: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub serveraddress: String,
}

impl Credentials {
    pub fn is_empty(&self) -> bool {
        self.username.is_empty() && self.identitytoken.is_empty() && self.registrytoken.is_empty()
    }

    pub fn header(&self) -> String {
        URL_SAFE.encode(serde_json::to_vec(self).unwrap_or_default())
    }
}

impl Config {
    pub fn load(dir: &Path) -> Outcome<Self> {
        let path = dir.join("config.json");
        let document = match fs::read(&path) {
            Ok(bytes) if bytes.trim_ascii().is_empty() => Map::new(),
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| Fault::said(format!("parsing config file ({}): {error}", path.display())))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Map::new(),
            Err(error) => {
                return Err(Fault::said(format!(
                    "reading config file ({}): {}",
                    path.display(),
                    crate::output::os_text(&error)
                )));
            }
        };
        Ok(Self { path, document })
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.document.get(key).and_then(Json::as_str).filter(|text| !text.is_empty())
    }

    /// Headers the user wants on every request.
    pub fn proxies(&self) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        let Some(Json::Object(proxies)) = self.document.get("proxies").and_then(|p| p.get("default")) else {
            return found;
        };
        for (key, name) in [
            ("httpProxy", "HTTP_PROXY"),
            ("httpsProxy", "HTTPS_PROXY"),
            ("noProxy", "NO_PROXY"),
            ("ftpProxy", "FTP_PROXY"),
            ("allProxy", "ALL_PROXY"),
        ] {
            if let Some(value) = proxies.get(key).and_then(Json::as_str).filter(|value| !value.is_empty()) {
                found.insert(name.to_owned(), value.to_owned());
                found.insert(name.to_lowercase(), value.to_owned());
            }
        }
        found
    }

    /// The program that keeps this server's credentials, if one is configured.
    fn helper(&self, server: &str) -> Outcome<Option<Helper>> {
        let own = self.document.get("credHelpers").and_then(|h| h.get(server)).and_then(Json::as_str);
        own.filter(|name| !name.is_empty()).or_else(|| self.text("credsStore")).map(Helper::named).transpose()
    }

    /// Credentials for a registry; empty ones when the user has none.
    pub fn credentials(&self, server: &str) -> Outcome<Credentials> {
        if let Some(helper) = self.helper(server)? {
            return helper.get(server);
        }
        let Some(Json::Object(auths)) = self.document.get("auths") else { return Ok(Credentials::default()) };
        let entry = auths.get(server).or_else(|| {
            auths.iter().find(|(key, _)| host_of(key) == host_of(server)).map(|(_, entry)| entry)
        });
        let Some(entry) = entry else { return Ok(Credentials::default()) };
        let field = |name: &str| entry.get(name).and_then(Json::as_str).unwrap_or_default().to_owned();
        let mut found = Credentials {
            username: field("username"),
            password: field("password"),
            identitytoken: field("identitytoken"),
            registrytoken: field("registrytoken"),
            serveraddress: server.to_owned(),
        };
        let packed = field("auth");
        if !packed.is_empty() {
            let plain =
                STANDARD.decode(packed.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok()).and_then(
                    |text| {
                        text.split_once(':').map(|(u, p)| (u.to_owned(), p.trim_end_matches('\0').to_owned()))
                    },
                );
            match plain {
                Some((username, password)) => {
                    found.username = username;
                    found.password = password;
                }
                None => {
                    return Err(Fault::said(format!(
                        "{}: the entry \"auth\" of {server} is not base64 of user:password",
                        self.path.display()
                    )));
                }
            }
        }
        Ok(found)
    }

    /// Keeps credentials: in the helper if one is configured, else in the file.
    pub fn store(&mut self, server: &str, credentials: &Credentials) -> Outcome {
        if let Some(helper) = self.helper(server)? {
            helper.store(server, credentials)?;
            // Who is logged in where stands in the file too, for tools that look there; the secret does not.
            self.set_entry(server, Map::new());
            return self.save();
        }
        let mut entry = Map::new();
        if credentials.identitytoken.is_empty() {
            let packed = STANDARD.encode(format!("{}:{}", credentials.username, credentials.password));
            entry.insert("auth".into(), packed.into());
        } else {
            let packed = STANDARD.encode(format!("{}:", credentials.username));
            entry.insert("auth".into(), packed.into());
            entry.insert("identitytoken".into(), credentials.identitytoken.clone().into());
        }
        self.set_entry(server, entry);
        self.save()
    }

    fn set_entry(&mut self, server: &str, entry: Map<String, Json>) {
        let auths = self.document.entry("auths").or_insert_with(|| Json::Object(Map::new()));
        if let Json::Object(auths) = auths {
            auths.insert(server.to_owned(), Json::Object(entry));
        }
    }

    /// Forgets credentials; false when there were none.
    pub fn erase(&mut self, server: &str) -> Outcome<bool> {
        let kept = match self.helper(server)? {
            Some(helper) => helper.erase(server)?,
            None => false,
        };
        let removed = match self.document.get_mut("auths") {
            Some(Json::Object(auths)) => auths.remove(server).is_some(),
            _ => false,
        };
        if removed {
            self.save()?;
        }
        Ok(kept || removed)
    }

    /// Credentials for every registry the user has some for: where they stand in the file, and what the helpers keep.
    pub fn all_credentials(&self) -> Outcome<BTreeMap<String, Credentials>> {
        let mut servers: BTreeSet<String> = BTreeSet::new();
        for key in ["auths", "credHelpers"] {
            if let Some(Json::Object(known)) = self.document.get(key) {
                servers.extend(known.keys().cloned());
            }
        }
        if let Some(store) = self.text("credsStore") {
            servers.extend(Helper::named(store)?.list()?);
        }
        let mut all = BTreeMap::new();
        for server in servers {
            let found = self.credentials(&server)?;
            if !found.is_empty() {
                all.insert(server, found);
            }
        }
        Ok(all)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn keeps_in_file(&self, server: &str) -> Outcome<bool> {
        Ok(self.helper(server)?.is_none())
    }

    /// Replaces the file as a whole, readable by its owner alone.
    fn save(&self) -> Outcome {
        let target = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let dir = target.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir).map_err(Fault::io(format_args!("creating {}", dir.display())))?;
        let mut text = Vec::new();
        let tabs = serde_json::ser::PrettyFormatter::with_indent(b"\t");
        self.document
            .serialize(&mut serde_json::Serializer::with_formatter(&mut text, tabs))
            .map_err(|error| Fault::said(error.to_string()))?;
        let temporary = dir.join(format!(".config.json.{}", std::process::id()));
        let write = || -> std::io::Result<()> {
            let mut file =
                fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(&text)?;
            file.sync_all()?;
            if let Ok(old) = fs::metadata(&target) {
                file.set_permissions(fs::Permissions::from_mode(old.permissions().mode() & 0o777))?;
            }
            fs::rename(&temporary, &target)
        };
        write().map_err(|error| {
            if let Err(cleanup) = fs::remove_file(&temporary)
                && cleanup.kind() != std::io::ErrorKind::NotFound
            {
                crate::output::error_line(&format!("brig: {}: {cleanup}", temporary.display()));
            }
            Fault::said(format!("writing {}: {}", target.display(), crate::output::os_text(&error)))
        })
    }
}

fn host_of(server: &str) -> &str {
    let bare = server.split_once("://").map_or(server, |(_, rest)| rest);
    bare.split('/').next().unwrap_or(bare)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_survive_a_round_trip_and_the_rest_of_the_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        fs::write(&path, r#"{"detachKeys":"ctrl-q","plugins":{"x":{"y":"z"}}}"#).unwrap();
        let mut config = Config::load(dir.path()).unwrap();
        assert_eq!(config.text("detachKeys"), Some("ctrl-q"));
        let given = Credentials { username: "ann".into(), password: "p:w".into(), ..Credentials::default() };
        config.store("127.0.0.1:5000", &given).unwrap();
        let again = Config::load(dir.path()).unwrap();
        let found = again.credentials("http://127.0.0.1:5000").unwrap();
        assert_eq!((found.username.as_str(), found.password.as_str()), ("ann", "p:w"));
        assert!(fs::read_to_string(&path).unwrap().contains("\"plugins\""));
        assert!(config.erase("127.0.0.1:5000").unwrap());
        assert!(!config.erase("127.0.0.1:5000").unwrap());
    }

    #[test]
    fn a_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(Config::load(dir.path()).unwrap_err().to_string().contains("config.json"));
    }
}
