//! Image references as the client sends them, and pulling.

use brigantine_image::Reference;
use hyper::header::HeaderName;

use crate::config::{Credentials, HUB};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::progress::{self, Progress};

pub const AUTH_HEADER: HeaderName = HeaderName::from_static("x-registry-auth");

pub fn parse(text: &str) -> Outcome<Reference> {
    Reference::parse(text).map_err(|error| Fault::said(error.to_string()))
}

/// The key under which a registry's credentials are kept.
pub fn server_of(reference: &Reference) -> &str {
    if reference.domain() == "docker.io" { HUB } else { reference.domain() }
}

pub fn credentials(context: &Context, reference: &Reference) -> Outcome<Credentials> {
    context.config()?.credentials(server_of(reference))
}

/// What `tag=` says: the digest, else the tag.
fn tag_or_digest(reference: &Reference) -> Option<String> {
    reference.digest().map(ToString::to_string).or_else(|| reference.tag().map(str::to_owned))
}

/// Pulls one image (or all tags of a name without tag), showing progress.
pub async fn pull(
    context: &Context,
    reference: &Reference,
    platform: Option<&str>,
    sink: progress::Sink,
) -> Outcome {
    let credentials = credentials(context, reference)?;
    let mut ask = context
        .client
        .post("/images/create")
        .query("fromImage", &reference.repository())
        .maybe("tag", tag_or_digest(reference).as_deref())
        .maybe("platform", platform);
    if !credentials.is_empty() {
        ask = ask.header(AUTH_HEADER, &credentials.header());
    }
    let lines = ask.send().await?.into_lines();
    Progress::new(sink).follow(lines, |_| {}).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_credentials_have_their_own_key() {
        assert_eq!(server_of(&parse("busybox").unwrap()), HUB);
        assert_eq!(server_of(&parse("127.0.0.1:5000/x").unwrap()), "127.0.0.1:5000");
        assert_eq!(
            parse("BUSYBOX").unwrap_err().to_string(),
            "invalid reference format: repository name (library/BUSYBOX) must be lowercase"
        );
    }
}
