//! Git repositories as sources.
//!
//! Invariants: a repository's hooks, filters and helpers never run; neither it nor its submodules can name a path of
//! this machine; credentials are in no argument, no file and no message: also those that stand in the URL.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use brigantine_registry::redacted;
use percent_encoding::percent_decode;

use crate::access::Secrets;
use crate::error::{Context as _, Error, Result, invalid};
use crate::graph::Op;

/// Ways of transport that a source or a submodule may use: not `file`, not `ext`.
const TRANSPORTS: &str = "http:https:git:ssh";

/// How git is run for one source.
struct Git<'g> {
    dir: &'g Path,
    /// `Authorization` for the repository's host.
    header: Option<(String, String)>,
}

/// What was checked out.
#[derive(Debug)]
pub(crate) struct Commit {
    pub id: String,
    /// When it was made, in seconds since the epoch.
    pub time: i64,
}

/// Checks a repository out, with its submodules.
pub(crate) async fn checkout(op: &Op, secrets: &Secrets, target: &Path) -> Result<Commit> {
    let Op::Git { url, reference, keep_git_dir, checksum, submodules, .. } = op else {
        return Err(invalid("not a git source"));
    };
    if url.starts_with('-') || reference.starts_with('-') {
        let shown = redacted(url);
        return Err(invalid(format!("git source {shown}#{reference}: neither may begin with a dash")));
    }
    let (bare, own) = without_credentials(url)?;
    let url = bare.as_str();
    tokio::fs::create_dir_all(target).await.doing(|| format!("create {}", target.display()))?;
    let git = Git { dir: target, header: authorization(url, secrets).await?.or(own) };
    git.run(&["init", "-q", "."]).await?;
    let wanted = match (checksum.as_deref(), reference.as_str()) {
        (Some(commit), _) if commit.len() >= 40 => commit.to_owned(),
        (_, "") => "HEAD".to_owned(),
        (_, reference) => reference.to_owned(),
    };
    git.run(&["fetch", "-q", "--depth=1", "--no-tags", "--", url, &wanted])
        .await
        .map_err(|error| invalid(format!("failed to fetch {wanted} of {}: {error}", redacted(url))))?;
    git.run(&["checkout", "-q", "--detach", "FETCH_HEAD"]).await?;
    let shown = git.run(&["show", "-s", "--no-show-signature", "--format=%H %ct", "HEAD"]).await?;
    let (commit, time) = shown.trim().split_once(' ').unwrap_or_default();
    let time = time.parse().map_err(|_bad| invalid(format!("git says of {wanted}: {shown:?}")))?;
    if let Some(wanted) = checksum
        && !commit.starts_with(wanted.as_str())
    {
        return Err(invalid(format!("expected checksum to match {wanted}, got {commit}")));
    }
    if *submodules && target.join(".gitmodules").is_file() {
        // Relative URLs of submodules start from here.
        git.run(&["remote", "add", "origin", url]).await?;
        git.run(&["submodule", "update", "-q", "--init", "--recursive", "--depth=1"])
            .await
            .map_err(|error| invalid(format!("fetch the submodules of {}: {error}", redacted(url))))?;
    }
    if !keep_git_dir {
        let dir = target.to_owned();
        crate::solver::blocking(move || {
            std::fs::remove_dir_all(dir.join(".git")).doing(|| "remove the repository's .git".to_owned())?;
            remove_git_files(&dir)
        })
        .await?;
    }
    Ok(Commit { id: commit.to_owned(), time })
}

/// Submodules' `.git` files, which lead to what is no longer there.
fn remove_git_files(dir: &Path) -> Result<()> {
    let what = || format!("look through {}", dir.display());
    for entry in std::fs::read_dir(dir).doing(what)? {
        let entry = entry.doing(what)?;
        let kind = entry.file_type().doing(what)?;
        if kind.is_dir() {
            remove_git_files(&entry.path())?;
        } else if kind.is_file() && entry.file_name() == ".git" {
            std::fs::remove_file(entry.path()).doing(what)?;
        }
    }
    Ok(())
}

impl Git<'_> {
    async fn run(&self, args: &[&str]) -> Result<String> {
        let mut command = tokio::process::Command::new("git");
        command
            .current_dir(self.dir)
            .args(["-c", "core.hooksPath=/dev/null", "-c", "core.symlinks=true"])
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()))
            .env("HOME", "/nonexistent")
            .env("GIT_ALLOW_PROTOCOL", TRANSPORTS)
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_SSH_COMMAND", "ssh -oBatchMode=yes")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        if let Some((origin, value)) = &self.header {
            command
                .env("GIT_CONFIG_COUNT", "1")
                .env("GIT_CONFIG_KEY_0", format!("http.{origin}.extraheader"))
                .env("GIT_CONFIG_VALUE_0", format!("Authorization: {value}"));
        }
        let output = command.output().await.map_err(|error| Error::Io {
            what: "run git (git sources need the git program on the engine's machine)".to_owned(),
            source: Arc::new(error),
        })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(invalid(format!("git {}: {}", args[0], redacted(said.trim()))));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// A URL of the web as git gets it, and what stood in it as a header for its origin.
fn without_credentials(url: &str) -> Result<(String, Option<(String, String)>)> {
    let Ok(mut parsed) = url::Url::parse(url) else { return Ok((url.to_owned(), None)) };
    if !matches!(parsed.scheme(), "http" | "https")
        || (parsed.username().is_empty() && parsed.password().is_none())
    {
        return Ok((url.to_owned(), None));
    }
    let both =
        [parsed.username().as_bytes(), b":", parsed.password().unwrap_or_default().as_bytes()].concat();
    let value = format!("basic {}", STANDARD.encode(percent_decode(&both).collect::<Vec<u8>>()));
    let origin = parsed.origin().ascii_serialization() + "/";
    if parsed.set_username("").is_err() || parsed.set_password(None).is_err() {
        return Err(invalid(format!("{} cannot be the URL of a repository", redacted(url))));
    }
    Ok((parsed.to_string(), Some((origin, value))))
}

/// The secrets `GIT_AUTH_HEADER[.host]` and `GIT_AUTH_TOKEN[.host]`, as BuildKit's frontend names them, with the origin they
/// are for.
async fn authorization(url: &str, secrets: &Secrets) -> Result<Option<(String, String)>> {
    let Ok(parsed) = url::Url::parse(url) else { return Ok(None) };
    let (Some(host), "http" | "https") = (parsed.host_str(), parsed.scheme()) else { return Ok(None) };
    let origin = parsed.origin().ascii_serialization() + "/";
    for (name, token) in [("GIT_AUTH_HEADER", false), ("GIT_AUTH_TOKEN", true)] {
        let names = [format!("{name}.{host}"), name.to_owned()];
        let Some((name, secret)) = secrets.first(&names).await? else { continue };
        let text = std::str::from_utf8(secret.trim_ascii())
            .ok()
            .filter(|text| !text.chars().any(char::is_control))
            .ok_or_else(|| invalid(format!("the secret {name} cannot stand in a header")))?;
        let value = if token {
            format!("basic {}", STANDARD.encode(format!("x-access-token:{text}")))
        } else {
            text.to_owned()
        };
        return Ok(Some((origin, value)));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(all: &[(&str, &str)]) -> Secrets {
        let all = all.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec()));
        Secrets::new(Arc::new(all.collect()), None)
    }

    #[test]
    fn a_urls_own_credentials_become_a_header() {
        let (url, header) = without_credentials("https://u:p%40s@one.example/x.git").unwrap();
        assert_eq!(url, "https://one.example/x.git");
        let wanted = ("https://one.example/".to_owned(), format!("basic {}", STANDARD.encode("u:p@s")));
        assert_eq!(header, Some(wanted));
        for plain in ["https://one.example/x.git", "ssh://git@one.example/x", "git@one.example:x"] {
            assert_eq!(without_credentials(plain).unwrap(), (plain.to_owned(), None));
        }
    }

    #[tokio::test]
    async fn credentials_are_for_the_repositorys_host() {
        let both = secrets(&[("GIT_AUTH_TOKEN.one.example", "t0k\n"), ("GIT_AUTH_HEADER", "Bearer any")]);
        let of = async |url: &str| authorization(url, &both).await.unwrap();
        assert_eq!(of("ssh://one.example/x.git").await, None);
        assert_eq!(
            of("https://two.example:8443/x.git").await,
            Some(("https://two.example:8443/".to_owned(), "Bearer any".to_owned()))
        );
        let only = secrets(&[("GIT_AUTH_TOKEN.one.example", "t0k\n")]);
        let (origin, value) = authorization("https://one.example/x.git", &only).await.unwrap().unwrap();
        assert_eq!(
            (origin.as_str(), value.as_str()),
            ("https://one.example/", "basic eC1hY2Nlc3MtdG9rZW46dDBr")
        );
        assert_eq!(authorization("https://other.example/x.git", &only).await.unwrap(), None);
        let bad = secrets(&[("GIT_AUTH_TOKEN", "a\nHost: x")]);
        assert!(authorization("https://one.example/x.git", &bad).await.is_err());
    }
}
