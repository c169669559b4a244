//! Projects: which objects belong together, and what a request that came through a project's socket may reach.
//!
//! Invariant: an object belongs to a project because the request that made it said so, never because a label of an
//! image does: whoever makes an image must not choose who may touch the containers that others make of it.

use std::collections::BTreeSet;

use brigantine_image::Image;
use serde::{Deserialize, Serialize};

/// The label of a project's objects: compose's, so that its projects are ours.
pub const LABEL: &str = "com.docker.compose.project";

/// Where a request came from that may not do everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confinement {
    pub project: String,
    pub images: ImageGrant,
}

/// Which images a project may see and use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageGrant {
    /// Names as they are shown, `debian:bookworm`, with `*` for anything.
    #[serde(default)]
    pub names: Vec<String>,
    /// Ids of images that were pulled through its socket.
    #[serde(default)]
    pub pulled: BTreeSet<String>,
}

impl ImageGrant {
    pub fn admit(&self, image: &Image) -> bool {
        self.pulled.contains(image.id.as_str())
            || image.tags.iter().any(|tag| self.names.iter().any(|pattern| like(pattern, &tag.familiar())))
    }
}

/// Whether `text` is like `pattern`, in which `*` stands for anything.
fn like(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        match text.find(part) {
            Some(at) => text = &text[at + part.len()..],
            None => return false,
        }
    }
    text.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_names() {
        for (pattern, text, fits) in [
            ("debian:bookworm", "debian:bookworm", true),
            ("debian:bookworm", "debian:bookworm-slim", false),
            ("debian:*", "debian:bookworm", true),
            ("debian:*", "notdebian:bookworm", false),
            ("*", "anything/at:all", true),
            ("reg:5000/team/*:v*", "reg:5000/team/app:v1", true),
            ("reg:5000/team/*:v*", "reg:5000/other/app:v1", false),
            ("a*a", "a", false),
            ("a*b*c", "abc", true),
            ("a*b*c", "acb", false),
        ] {
            assert_eq!(like(pattern, text), fits, "{pattern} {text}");
        }
    }
}
