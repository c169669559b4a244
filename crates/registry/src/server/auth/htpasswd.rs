//! Users of an htpasswd file, with bcrypt hashes (`htpasswd -B`); the file is read again when it changes.
//!
//! Invariant: a password that was verified once is remembered only as a keyed hash, until the file changes.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use brigantine_image::Digest;

use crate::Error;
use crate::server::refusal::Refusal;
use crate::server::reply::blocking;

/// Remembered verifications.
const MOST_REMEMBERED: usize = 4096;
/// A hash no password has, of the usual cost: what an unknown user is checked against.
const NOBODY: &str = "$2b$10$abcdefghijklmnopqrstuuAbMDBZlrh4SJJDIqVzPWFdTfLmWSZ9y";

pub(in crate::server) struct Htpasswd {
    path: PathBuf,
    loaded: Mutex<Arc<Loaded>>,
}

struct Loaded {
    version: Option<(SystemTime, u64)>,
    users: HashMap<String, String>,
    verified: Mutex<HashSet<Digest>>,
    salt: [u8; 16],
}

impl Htpasswd {
    pub fn open(path: &Path) -> Result<Self, Error> {
        let loaded = load(path)?;
        Ok(Self { path: path.to_owned(), loaded: Mutex::new(Arc::new(loaded)) })
    }

    /// The user's name if the value of `Authorization` is right.
    pub async fn check(&self, authorization: &str) -> Result<Option<String>, Refusal> {
        let Some((scheme, packed)) = authorization.split_once(' ') else { return Ok(None) };
        if !scheme.eq_ignore_ascii_case("basic") {
            return Ok(None);
        }
        let plain = STANDARD.decode(packed.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let Some((name, password)) = plain.as_deref().and_then(|plain| plain.split_once(':')) else {
            return Ok(None);
        };
        let loaded = self.current();
        let mark = {
            let mut text = loaded.salt.to_vec();
            text.extend_from_slice(name.as_bytes());
            text.push(0);
            text.extend_from_slice(password.as_bytes());
            Digest::sha256(&text)
        };
        if loaded.verified.lock().unwrap_or_else(PoisonError::into_inner).contains(&mark) {
            return Ok(Some(name.to_owned()));
        }
        let (name, password) = (name.to_owned(), password.to_owned());
        blocking(move || {
            let known = loaded.users.get(&name);
            // An unknown user costs what a known one does.
            let hash = known.or_else(|| loaded.users.values().next()).map_or(NOBODY, String::as_str);
            let right = bcrypt::verify(password.as_bytes(), hash).unwrap_or(false) && known.is_some();
            if !right {
                return Ok(None);
            }
            let mut verified = loaded.verified.lock().unwrap_or_else(PoisonError::into_inner);
            if verified.len() >= MOST_REMEMBERED {
                verified.clear();
            }
            verified.insert(mark);
            Ok(Some(name))
        })
        .await
    }

    /// The file's users, read again if it changed. A file that became unreadable leaves the users that were.
    fn current(&self) -> Arc<Loaded> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if version(&self.path).ok() != loaded.version {
            match load(&self.path) {
                Ok(new) => *loaded = Arc::new(new),
                Err(error) => tracing::error!(error = %error.report(), "the users stay as they were"),
            }
        }
        Arc::clone(&loaded)
    }
}

fn version(path: &Path) -> io::Result<(SystemTime, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.modified()?, metadata.len()))
}

fn load(path: &Path) -> Result<Loaded, Error> {
    let failed = |source| Error::Io { what: format!("read {}", path.display()), source };
    let version = version(path).map_err(failed)?;
    let text = fs::read_to_string(path).map_err(failed)?;
    let mut users = HashMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let hash = line.split_once(':').filter(|(_, hash)| {
            ["$2a$", "$2b$", "$2x$", "$2y$"].iter().any(|prefix| hash.starts_with(prefix))
        });
        let Some((name, hash)) = hash else {
            return Err(Error::Invalid(format!(
                "{}, line {}: is not user:bcrypt hash (as htpasswd -B writes them)",
                path.display(),
                number + 1
            )));
        };
        users.insert(name.to_owned(), hash.to_owned());
    }
    let mut salt = [0; 16];
    rustls::crypto::ring::default_provider()
        .secure_random
        .fill(&mut salt)
        .map_err(|_error| failed(io::Error::other("no random numbers")))?;
    Ok(Loaded { version: Some(version), users, verified: Mutex::default(), salt })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(name: &str, password: &str) -> String {
        format!("Basic {}", STANDARD.encode(format!("{name}:{password}")))
    }

    #[tokio::test]
    async fn passwords_are_checked_and_the_file_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users");
        let hash = |password: &str| bcrypt::hash(password, 4).unwrap();
        fs::write(&path, format!("# users\n\nann:{}\n", hash("secret"))).unwrap();
        let users = Htpasswd::open(&path).unwrap();
        for _ in 0..2 {
            assert_eq!(users.check(&basic("ann", "secret")).await.unwrap().as_deref(), Some("ann"));
            assert_eq!(users.check(&basic("ann", "wrong")).await.unwrap(), None);
            assert_eq!(users.check(&basic("bob", "secret")).await.unwrap(), None);
        }
        assert_eq!(users.check("Basic ???").await.unwrap(), None);
        assert_eq!(users.check("Bearer x").await.unwrap(), None);
        fs::write(&path, format!("robert:{}\n", hash("other"))).unwrap();
        assert_eq!(users.check(&basic("ann", "secret")).await.unwrap(), None);
        assert_eq!(users.check(&basic("robert", "other")).await.unwrap().as_deref(), Some("robert"));
    }

    #[test]
    fn weaker_hashes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users");
        fs::write(&path, "ann:$apr1$x$y\n").unwrap();
        let error = Htpasswd::open(&path).err().unwrap().to_string();
        assert!(error.contains("line 1"), "{error}");
    }

    #[test]
    fn the_hash_of_nobody_is_one() {
        assert!(!bcrypt::verify("x", NOBODY).unwrap());
    }
}
