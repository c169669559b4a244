//! Sources from elsewhere: files from the web and git repositories.
//!
//! Invariant: what has a checksum is used only when it is right; a repository's hooks, filters and helpers never run.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;

use crate::error::{Context, Error, Result, invalid};
use crate::graph::Op;

/// How long a server may be silent.
const STALL: Duration = Duration::from_mins(1);
/// The most that is downloaded, in bytes.
const MOST: u64 = 64 << 30;

/// Whether a source of ADD, or a context, is elsewhere.
pub(crate) fn is_remote(source: &str) -> bool {
    is_http(source) || is_git(source)
}

fn is_http(source: &str) -> bool {
    source.starts_with("http://") || source.starts_with("https://")
}

fn is_git(source: &str) -> bool {
    source.starts_with("git://")
        || source.starts_with("git@")
        || source.starts_with("ssh://")
        || (is_http(source) && looks_like_git(source))
}

/// `https://host/repo.git`, with or without a fragment.
fn looks_like_git(source: &str) -> bool {
    let bare = source.split(['#', '?']).next().unwrap_or_default();
    bare.strip_suffix(".git").is_some()
}

/// A remote source as an operation.
pub(crate) fn source(url: &str) -> Op {
    if is_git(url) || !is_http(url) {
        return git(url);
    }
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let name =
        path.splitn(4, '/').nth(3).and_then(|path| path.rsplit('/').next()).filter(|name| !name.is_empty());
    Op::Http { url: url.to_owned(), checksum: None, file_name: name.unwrap_or("download").to_owned() }
}

/// `url#ref:subdir`, or the same in a query.
fn git(url: &str) -> Op {
    let (bare, fragment) = url.split_once('#').unwrap_or((url, ""));
    let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
    let (mut reference, mut subdir) = (reference.to_owned(), subdir.to_owned());
    let (bare, query) = bare.split_once('?').unwrap_or((bare, ""));
    let (mut keep_git_dir, mut checksum) = (false, None);
    for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
        match &*key {
            "ref" | "branch" | "tag" => reference = value.into_owned(),
            "commit" | "checksum" => checksum = Some(value.into_owned()),
            "subdir" => subdir = value.into_owned(),
            "keep-git-dir" => keep_git_dir = value != "false",
            _ => {}
        }
    }
    Op::Git {
        url: bare.to_owned(),
        reference,
        subdir: crate::pattern::clean(&subdir),
        keep_git_dir,
        checksum,
    }
}

/// ADD's flags for a remote source.
pub(crate) fn with_flags(op: &mut Op, wanted: Option<String>, keep: bool) -> Result<(), String> {
    match op {
        Op::Http { checksum, .. } => {
            if let Some(wanted) = &wanted
                && !wanted
                    .strip_prefix("sha256:")
                    .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
            {
                return Err(format!("invalid checksum {wanted}: sha256:<64 hexadecimal digits> is expected"));
            }
            *checksum = wanted;
        }
        Op::Git { keep_git_dir, checksum, .. } => {
            *keep_git_dir |= keep;
            *checksum = wanted.or(checksum.take());
        }
        _ => {}
    }
    Ok(())
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

/// What a download has brought.
#[derive(Debug, Clone)]
pub(crate) struct Downloaded {
    pub sha256: String,
    /// Seconds since the epoch.
    pub modified: Option<i64>,
}

/// Fetches a file; a wrong checksum leaves nothing.
pub(crate) async fn download(url: &str, checksum: Option<&str>, target: &Path) -> Result<Downloaded> {
    let failed = |error: reqwest::Error| invalid(format!("download {url}: {}", chain(&error)));
    let mut response = client()?.get(url).send().await.map_err(failed)?;
    if !response.status().is_success() {
        return Err(invalid(format!("download {url}: the server answered {}", response.status())));
    }
    let modified = response
        .headers()
        .get("last-modified")
        .and_then(|value| value.to_str().ok())
        .and_then(|text| jiff::fmt::rfc2822::parse(text).ok())
        .map(|time| time.timestamp().as_second());
    let what = || format!("write {}", target.display());
    let mut file = tokio::fs::File::create(target).await.doing(what)?;
    let mut hasher = Sha256::new();
    let mut total = 0_u64;
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        total += chunk.len() as u64;
        if total > MOST {
            return Err(invalid(format!("download {url}: more than {MOST} bytes")));
        }
        hasher.update(&chunk);
        file.write_all(&chunk).await.doing(what)?;
    }
    file.flush().await.doing(what)?;
    let sha256 = hex::encode(hasher.finalize());
    if let Some(wanted) = checksum
        && wanted.strip_prefix("sha256:").is_none_or(|hex| !hex.eq_ignore_ascii_case(&sha256))
    {
        return Err(invalid(format!("digest mismatch for {url}: sha256:{sha256} instead of {wanted}")));
    }
    Ok(Downloaded { sha256, modified })
}

/// Checks a repository out; the result is the commit.
pub(crate) async fn checkout(op: &Op, target: &Path) -> Result<String> {
    let Op::Git { url, reference, keep_git_dir, checksum, .. } = op else {
        return Err(invalid("not a git source"));
    };
    if url.starts_with('-') || reference.starts_with('-') {
        return Err(invalid(format!("git source {url}#{reference}: neither may begin with a dash")));
    }
    tokio::fs::create_dir_all(target).await.doing(|| format!("create {}", target.display()))?;
    git_command(target, &["init", "-q", "."]).await?;
    let wanted = match (checksum.as_deref(), reference.as_str()) {
        (Some(commit), _) if commit.len() >= 40 => commit.to_owned(),
        (_, "") => "HEAD".to_owned(),
        (_, reference) => reference.to_owned(),
    };
    git_command(target, &["fetch", "-q", "--depth=1", "--no-tags", "--", url, &wanted])
        .await
        .map_err(|error| invalid(format!("failed to fetch {wanted} of {url}: {error}")))?;
    git_command(target, &["checkout", "-q", "--detach", "FETCH_HEAD"]).await?;
    let commit = git_command(target, &["rev-parse", "HEAD"]).await?.trim().to_owned();
    if let Some(wanted) = checksum
        && !commit.starts_with(wanted.as_str())
    {
        return Err(invalid(format!("expected checksum to match {wanted}, got {commit}")));
    }
    if !keep_git_dir {
        tokio::fs::remove_dir_all(target.join(".git"))
            .await
            .doing(|| "remove the repository's .git".to_owned())?;
    }
    Ok(commit)
}

async fn git_command(dir: &Path, args: &[&str]) -> Result<String> {
    let mut command = tokio::process::Command::new("git");
    command
        .current_dir(dir)
        .args([
            "-c",
            "core.hooksPath=/dev/null",
            "-c",
            "protocol.ext.allow=never",
            "-c",
            "core.symlinks=true",
        ])
        .args(args)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()))
        .env("HOME", "/nonexistent")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_SSH_COMMAND", "ssh -oBatchMode=yes")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = command.output().await.map_err(|error| Error::Io {
        what: "run git (git sources need the git program on the engine's machine)".to_owned(),
        source: Arc::new(error),
    })?;
    if !output.status.success() {
        return Err(invalid(format!("git {}: {}", args[0], String::from_utf8_lossy(&output.stderr).trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart() {
        assert!(
            matches!(source("https://x/y/z.tar.gz?a=b"), Op::Http { file_name, .. } if file_name == "z.tar.gz")
        );
        assert!(matches!(source("https://x"), Op::Http { file_name, .. } if file_name == "download"));
        let Op::Git { url, reference, subdir, .. } = source("https://x/r.git#v1:sub/../dir") else {
            panic!()
        };
        assert_eq!((url.as_str(), reference.as_str(), subdir.as_str()), ("https://x/r.git", "v1", "dir"));
        let Op::Git { reference, checksum, keep_git_dir, .. } =
            source("https://x/r.git?tag=v2&commit=abc&keep-git-dir=true")
        else {
            panic!()
        };
        assert_eq!((reference.as_str(), checksum.as_deref(), keep_git_dir), ("v2", Some("abc"), true));
        assert!(is_remote("git@host:a/b") && !is_remote("src/http") && !is_remote("./x"));
        let mut op = source("https://x/y");
        assert!(with_flags(&mut op, Some("md5:1".into()), false).is_err());
    }
}
