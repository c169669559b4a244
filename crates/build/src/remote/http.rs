//! Files from the web, kept: what the server says is still the same is not fetched again.
//!
//! Invariants: a kept file is named by its digest, complete, and never changes; what a URL gave last is noted beside it
//! in one step. What took credentials is used again only when the server agrees.

use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use brigantine_registry::redacted;
use reqwest::StatusCode;
use reqwest::header::{
    AUTHORIZATION, ETAG, HeaderMap, HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;

use crate::access::Secrets;
use crate::error::{Context as _, Error, Result, chain, invalid};

/// How long a server may be silent.
const STALL: Duration = Duration::from_mins(1);
/// The most that is downloaded, in bytes.
const MOST: u64 = 64 << 30;
/// The most that is kept, in bytes; the longest unused goes first.
const KEPT: u64 = 2 << 30;

/// What a download has brought.
#[derive(Debug, Clone)]
pub(crate) struct Downloaded {
    pub sha256: String,
    /// Seconds since the epoch.
    pub modified: Option<i64>,
}

/// What a URL gave last.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Note {
    url: String,
    sha256: String,
    etag: Option<String>,
    last_modified: Option<String>,
    /// It took credentials.
    private: bool,
}

impl Note {
    fn downloaded(&self) -> Downloaded {
        let modified = self.last_modified.as_deref().and_then(|text| jiff::fmt::rfc2822::parse(text).ok());
        Downloaded {
            sha256: self.sha256.clone(),
            modified: modified.map(|time| time.timestamp().as_second()),
        }
    }
}

/// Downloaded files of all builds.
#[derive(Debug)]
pub(crate) struct Downloads {
    dir: PathBuf,
}

impl Downloads {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Brings a file to `target`; a wrong checksum (`sha256:…`) leaves nothing there.
    pub async fn fetch(
        &self,
        url: &str,
        checksum: Option<&str>,
        secrets: &Secrets,
        target: &Path,
    ) -> Result<Downloaded> {
        let shown = redacted(url);
        let what = || format!("keep what {shown} gives");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).doing(what)?;
        let known = self.known(url);
        if let (Some(wanted), Some(note)) = (checksum, &known)
            && !note.private
            && is(wanted, &note.sha256)
        {
            self.hand_out(note, target)?;
            return Ok(note.downloaded());
        }
        let mut headers = authorization(url, secrets).await?;
        let private = !headers.is_empty();
        if let Some(note) = &known {
            let ask =
                |text: &Option<String>| text.as_deref().and_then(|text| HeaderValue::from_str(text).ok());
            if let Some(etag) = ask(&note.etag) {
                headers.insert(IF_NONE_MATCH, etag);
            } else if let Some(time) = ask(&note.last_modified) {
                headers.insert(IF_MODIFIED_SINCE, time);
            }
        }
        let failed =
            |error: reqwest::Error| invalid(format!("download {shown}: {}", redacted(&chain(&error))));
        let response = client()?.get(url).headers(headers).send().await.map_err(failed)?;
        let note = match (response.status(), known) {
            (StatusCode::NOT_MODIFIED, Some(note)) => note,
            (status, _) if !status.is_success() => {
                return Err(invalid(format!("download {shown}: the server answered {status}")));
            }
            _ => self.receive(url, response, private).await?,
        };
        if let Some(wanted) = checksum
            && !is(wanted, &note.sha256)
        {
            return Err(invalid(format!(
                "digest mismatch for {shown}: sha256:{} instead of {wanted}",
                note.sha256
            )));
        }
        self.hand_out(&note, target)?;
        self.trim(KEPT);
        Ok(note.downloaded())
    }

    async fn receive(&self, url: &str, mut response: reqwest::Response, private: bool) -> Result<Note> {
        let shown = redacted(url);
        let failed =
            |error: reqwest::Error| invalid(format!("download {shown}: {}", redacted(&chain(&error))));
        let header =
            |name| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let (etag, last_modified) = (header(ETAG), header(LAST_MODIFIED));
        let new = New(self.dir.join(format!("new-{}", crate::ids::new())));
        let what = || format!("write {}", new.0.display());
        let mut file = tokio::fs::File::create(&new.0).await.doing(what)?;
        let mut hasher = Sha256::new();
        let mut total = 0_u64;
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            total += chunk.len() as u64;
            if total > MOST {
                return Err(invalid(format!("download {shown}: more than {MOST} bytes")));
            }
            hasher.update(&chunk);
            file.write_all(&chunk).await.doing(what)?;
        }
        file.flush().await.doing(what)?;
        // Its name says that it is complete.
        file.sync_all().await.doing(what)?;
        let note = Note {
            url: url.to_owned(),
            sha256: hex::encode(hasher.finalize()),
            etag,
            last_modified,
            private,
        };
        fs::rename(&new.0, self.content(&note.sha256)).doing(what)?;
        let text = serde_json::to_vec(&note)
            .map_err(|error| Error::Executor(format!("note what {shown} gave: {error}")))?;
        let beside = New(self.dir.join(format!("new-{}", crate::ids::new())));
        fs::write(&beside.0, text).doing(what)?;
        fs::rename(&beside.0, self.note(url)).doing(what)?;
        Ok(note)
    }

    fn content(&self, sha256: &str) -> PathBuf {
        self.dir.join(format!("sha256-{sha256}"))
    }

    fn note(&self, url: &str) -> PathBuf {
        self.dir.join(format!("url-{}", hex::encode(Sha256::digest(url))))
    }

    /// What the URL gave last, if that is still there.
    fn known(&self, url: &str) -> Option<Note> {
        let note: Note = serde_json::from_slice(&fs::read(self.note(url)).ok()?).ok()?;
        (note.url == url && self.content(&note.sha256).is_file()).then_some(note)
    }

    /// A second name for the file, which stays when the first goes.
    fn hand_out(&self, note: &Note, target: &Path) -> Result<()> {
        let what = || format!("take {} out of what is kept", redacted(&note.url));
        let content = self.content(&note.sha256);
        let used = fs::File::options()
            .append(true)
            .open(&content)
            .and_then(|file| file.set_modified(SystemTime::now()));
        used.doing(what)?;
        match fs::hard_link(&content, target) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                fs::remove_file(target).doing(what)?;
                fs::hard_link(&content, target).doing(what)
            }
            other => other.doing(what),
        }
    }

    /// What is kept: its SHA-256, bytes on disk, and the nanoseconds since the epoch of its last use.
    pub fn list(&self) -> Vec<(String, u64, i64)> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Vec::new() };
        let of = |entry: &fs::DirEntry| {
            let id = entry.file_name().to_string_lossy().strip_prefix("sha256-")?.to_owned();
            let metadata = entry.metadata().ok()?;
            let used = metadata.modified().ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
            Some((id, metadata.blocks() * 512, i64::try_from(used.as_nanos()).unwrap_or(i64::MAX)))
        };
        entries.flatten().filter_map(|entry| of(&entry)).collect()
    }

    /// Gives a kept file up: the bytes given back.
    pub fn remove(&self, sha256: &str) -> u64 {
        let path = self.content(sha256);
        let size = fs::metadata(&path).map_or(0, |metadata| metadata.blocks() * 512);
        match fs::remove_file(&path) {
            Ok(()) => size,
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "remove a kept download");
                0
            }
        }
    }

    /// Removes the longest unused until no more than `most` bytes are kept.
    fn trim(&self, most: u64) {
        let mut files = self.list();
        files.sort_by_key(|(_, _, used)| *used);
        let mut total: u64 = files.iter().map(|(_, size, _)| size).sum();
        for (id, size, _) in files {
            if total <= most {
                break;
            }
            self.remove(&id);
            total -= size;
        }
    }

    /// Files of downloads that an engine that is gone did not finish.
    pub fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with("new-") {
                drop(New(entry.path()));
            }
        }
    }
}

/// A file that is to get another name, or is to go.
struct New(PathBuf);

impl Drop for New {
    fn drop(&mut self) {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::debug!(path = %self.0.display(), %error, "remove a partial download");
            }
            _ => {}
        }
    }
}

fn is(checksum: &str, sha256: &str) -> bool {
    checksum.strip_prefix("sha256:").is_some_and(|hex| hex.eq_ignore_ascii_case(sha256))
}

/// The secrets `HTTP_AUTH_HEADER_<host>` and `HTTP_AUTH_TOKEN_<host>`, as BuildKit's frontend names them. They go to that
/// host alone, not where it redirects to.
async fn authorization(url: &str, secrets: &Secrets) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    let Some(host) = url::Url::parse(url).ok().and_then(|url| url.host_str().map(str::to_owned)) else {
        return Ok(headers);
    };
    for (name, before) in [("HTTP_AUTH_HEADER_", ""), ("HTTP_AUTH_TOKEN_", "Bearer ")] {
        let names = [format!("{name}{host}")];
        let Some((name, secret)) = secrets.first(&names).await? else { continue };
        let text = [before.as_bytes(), secret.trim_ascii()].concat();
        let mut value = HeaderValue::from_bytes(&text)
            .map_err(|_bad| invalid(format!("the secret {name} cannot stand in a header")))?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
        break;
    }
    Ok(headers)
}

fn client() -> Result<reqwest::Client> {
    // Fails when the process has chosen one already, which is as good.
    rustls::crypto::ring::default_provider().install_default().ok();
    reqwest::Client::builder()
        .user_agent(concat!("brigantine/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(15))
        .read_timeout(STALL)
        .build()
        .map_err(|error| Error::Executor(format!("set up connections: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unused_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let downloads = Downloads::new(dir.path().to_owned());
        for (name, age) in [("a", 30), ("b", 10), ("c", 20)] {
            let path = downloads.content(name);
            fs::write(&path, [0; 4096]).unwrap();
            let file = fs::File::options().append(true).open(&path).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        }
        downloads.trim(2 * 4096);
        assert!(!downloads.content("a").exists() && downloads.content("c").exists());
        downloads.trim(0);
        assert_eq!(downloads.list(), []);
    }

    #[tokio::test]
    async fn credentials_are_the_hosts_own() {
        let secrets = std::collections::BTreeMap::from([
            ("HTTP_AUTH_TOKEN_one.example".to_owned(), b"t0k\n".to_vec()),
            ("HTTP_AUTH_HEADER_two.example".to_owned(), b"Basic eDp5".to_vec()),
        ]);
        let secrets = Secrets::new(std::sync::Arc::new(secrets), None);
        let of = async |url: &str| {
            let headers = authorization(url, &secrets).await.unwrap();
            headers.get(AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(of("https://one.example/x").await.as_deref(), Some("Bearer t0k"));
        assert_eq!(of("https://two.example:8443/x").await.as_deref(), Some("Basic eDp5"));
        assert_eq!(of("https://three.example/x").await, None);
    }
}
