//! Why a step ran again: what its key was made of, beside what it was made of the last time.

use std::collections::BTreeMap;

use super::{Job, Keys, digest_of};
use crate::error::Result;

/// How many files a reason names.
const NAMED: usize = 3;

/// The part of a key that lists the files taken: a line each, a digest and the path.
pub(super) const FILES: &str = "files";

impl Job {
    /// Says why a step runs again, and remembers what its key is made of now. Blocks.
    pub(super) fn why(&self, name: &str, no_cache: bool, keys: &Keys) -> Result<String> {
        let step = digest_of(&[&self.cache_namespace, name]);
        let before: Option<BTreeMap<String, String>> =
            self.solver.records.parts(&step)?.and_then(|text| serde_json::from_str(&text).ok());
        let why = match before {
            _ if no_cache => "the cache was not to be used".to_owned(),
            None => "this step was not run here before".to_owned(),
            Some(before) => difference(&before, &keys.parts),
        };
        let text = serde_json::to_string(&keys.parts).unwrap_or_default();
        self.solver.records.set_parts(&step, &text)?;
        Ok(why)
    }
}

fn difference(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> String {
    let mut changed: Vec<String> = Vec::new();
    for name in now.keys().chain(before.keys().filter(|name| !now.contains_key(*name))) {
        if name == FILES || now.get(name) == before.get(name) {
            continue;
        }
        changed.push(match name.as_str() {
            "operation" => "the instruction or its variables".to_owned(),
            "below" => "the step below it".to_owned(),
            "content" => match files(before.get(FILES), now.get(FILES)) {
                Some(named) => format!("the files taken ({named})"),
                None => "the files taken".to_owned(),
            },
            mount => mount.to_owned(),
        });
    }
    if changed.is_empty() {
        "its result is not in the cache any more".to_owned()
    } else {
        format!("changed: {}", changed.join(", "))
    }
}

/// The files in which two listings differ: `a changed, b added and 7 more`.
fn files(before: Option<&String>, now: Option<&String>) -> Option<String> {
    let (before, now) = (listing(before?), listing(now?));
    let mut found: Vec<(&str, &str)> = Vec::new();
    for (path, digest) in &now {
        match before.get(path) {
            None => found.push((path, "added")),
            Some(known) if known != digest => found.push((path, "changed")),
            Some(_) => {}
        }
    }
    found.extend(before.keys().filter(|path| !now.contains_key(*path)).map(|path| (*path, "removed")));
    found.sort_unstable();
    let more = found.len().saturating_sub(NAMED);
    let named: Vec<String> = found.iter().take(NAMED).map(|(path, what)| format!("{path} {what}")).collect();
    match (named.is_empty(), more) {
        (true, _) => None,
        (false, 0) => Some(named.join(", ")),
        (false, more) => Some(format!("{} and {more} more", named.join(", "))),
    }
}

fn listing(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once(' ')).map(|(digest, path)| (path, digest)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn reasons_go_down_to_the_file() {
        let before = parts(&[("operation", "o"), ("content", "1"), ("files", "a /x\nb /y\nc /z\nd /w")]);
        let says = |now: &[(&str, &str)]| difference(&before, &parts(now));
        assert_eq!(
            says(&[("operation", "o"), ("content", "2"), ("files", "a /x\nB /y\nc /z\nd /w")]),
            "changed: the files taken (/y changed)"
        );
        assert_eq!(
            says(&[("operation", "o"), ("content", "2"), ("files", "A /x\nB /y\nn /new")]),
            "changed: the files taken (/new added, /w removed, /x changed and 2 more)"
        );
        // Too many to be listed, then or now.
        assert_eq!(says(&[("operation", "o"), ("content", "2")]), "changed: the files taken");
        assert_eq!(
            says(&[("operation", "p"), ("content", "1"), ("files", "a /x"), ("mount /m", "m")]),
            "changed: mount /m, the instruction or its variables"
        );
        assert_eq!(says(&[("operation", "o"), ("content", "1")]), "its result is not in the cache any more");
    }
}
