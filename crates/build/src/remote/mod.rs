//! Sources from elsewhere: files from the web and git repositories.
//!
//! Invariant: what has a checksum is used only when it is right.

mod git;
mod http;

pub(crate) use git::checkout;
pub(crate) use http::{Downloaded, Downloads};

use crate::graph::Op;

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
        return repository(url);
    }
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let name =
        path.splitn(4, '/').nth(3).and_then(|path| path.rsplit('/').next()).filter(|name| !name.is_empty());
    Op::Http { url: url.to_owned(), checksum: None, file_name: name.unwrap_or("download").to_owned() }
}

/// `url#ref:subdir`, or the same in a query.
fn repository(url: &str) -> Op {
    let (bare, fragment) = url.split_once('#').unwrap_or((url, ""));
    let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
    let (mut reference, mut subdir) = (reference.to_owned(), subdir.to_owned());
    let (bare, query) = bare.split_once('?').unwrap_or((bare, ""));
    let (mut keep_git_dir, mut checksum, mut submodules) = (false, None, true);
    for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
        match &*key {
            "ref" | "branch" | "tag" => reference = value.into_owned(),
            "commit" | "checksum" => checksum = Some(value.into_owned()),
            "subdir" => subdir = value.into_owned(),
            "keep-git-dir" => keep_git_dir = !matches!(&*value, "false" | "0"),
            "submodules" => submodules = !matches!(&*value, "false" | "0"),
            _ => {}
        }
    }
    Op::Git {
        url: bare.to_owned(),
        reference,
        subdir: crate::pattern::clean(&subdir),
        keep_git_dir,
        checksum,
        submodules,
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
