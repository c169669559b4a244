//! Lists: tags, repositories, referrers. All come in pages.

use std::sync::Arc;

use brigantine_image::model::{Descriptor, Index};
use brigantine_image::{Digest, media};
use http::header::{HeaderName, LINK};
use http::{Request, StatusCode};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::Serialize;

use super::refusal::Refusal;
use super::reply::{Outcome, blocking, json, json_as, set};
use super::service::{Shared, query};

const FILTERS: HeaderName = HeaderName::from_static("oci-filters-applied");
/// What a value in a Link's query must not hold as it is.
const QUERY: &AsciiSet =
    &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'<').add(b'>').add(b'&').add(b'+').add(b'%');

/// `GET /v2/<name>/tags/list`.
pub(super) async fn tags<B>(shared: &Arc<Shared>, name: String, request: &Request<B>) -> Outcome {
    #[derive(Serialize)]
    struct Tags {
        name: String,
        tags: Vec<String>,
    }
    let wanted = Page::of(request)?;
    let upstream = match &shared.cache {
        Some(cache) => cache.tags(&name).await,
        None => None,
    };
    let all = match upstream {
        Some(tags) => Some(tags),
        None => {
            blocking({
                let (shared, name) = (Arc::clone(shared), name.clone());
                move || Ok(shared.library.tags(&name)?)
            })
            .await?
        }
    };
    let all = all.ok_or_else(|| Refusal::name_unknown(&name))?;
    let (tags, next) = wanted.cut(all, shared.limits.page);
    let link = next.map(|last| wanted.link(&format!("/v2/{name}/tags/list"), &last, tags.len()));
    let mut answer = json(&Tags { name, tags })?;
    if let Some(link) = link {
        set(&mut answer, LINK, &link);
    }
    Ok(answer)
}

/// `GET /v2/_catalog`.
pub(super) async fn catalog<B>(shared: &Arc<Shared>, request: &Request<B>) -> Outcome {
    #[derive(Serialize)]
    struct Catalog {
        repositories: Vec<String>,
    }
    let wanted = Page::of(request)?;
    let all = blocking({
        let shared = Arc::clone(shared);
        move || Ok(shared.library.repositories()?)
    })
    .await?;
    let (repositories, next) = wanted.cut(all, shared.limits.page);
    let link = next.map(|last| wanted.link("/v2/_catalog", &last, repositories.len()));
    let mut answer = json(&Catalog { repositories })?;
    if let Some(link) = link {
        set(&mut answer, LINK, &link);
    }
    Ok(answer)
}

/// `GET /v2/<name>/referrers/<digest>`.
pub(super) async fn referrers<B>(
    shared: &Arc<Shared>,
    name: String,
    subject: Digest,
    request: &Request<B>,
) -> Outcome {
    let wanted = Page::of(request)?;
    let kind = query(request, "artifactType").into_iter().next().filter(|kind| !kind.is_empty());
    let upstream = match &shared.cache {
        Some(cache) => cache.referrers(&name, &subject).await,
        None => None,
    };
    let mut all = match upstream {
        Some(referrers) => referrers,
        None => {
            blocking({
                let (shared, name, subject) = (Arc::clone(shared), name.clone(), subject.clone());
                move || Ok(shared.library.referrers(&name, &subject)?)
            })
            .await?
        }
    };
    if let Some(kind) = &kind {
        all.retain(|referrer| referrer.artifact_type.as_ref() == Some(kind));
    }
    // Pages go by digest; each index stays below what clients take as a manifest.
    if let Some(last) = &wanted.last {
        all.retain(|referrer| referrer.digest.as_str() > last.as_str());
    }
    let limit = wanted.n.unwrap_or(usize::MAX).min(shared.limits.page);
    let mut bytes = 0;
    let fitting = all
        .iter()
        .take(limit)
        .take_while(|referrer| {
            bytes += size_of(referrer);
            bytes <= shared.limits.manifest.min(4 << 20)
        })
        .count()
        .max(usize::from(!all.is_empty()).min(limit));
    let more = fitting < all.len() && limit > 0;
    all.truncate(fitting);
    let link = all.last().filter(|_| more).map(|last| {
        let mut link = wanted.link(
            &format!("/v2/{name}/referrers/{subject}"),
            last.digest.as_str(),
            wanted.n.unwrap_or(shared.limits.page),
        );
        if let Some(kind) = &kind {
            let kind = utf8_percent_encode(kind, QUERY).to_string();
            link = link.replacen('>', &format!("&artifactType={kind}>"), 1);
        }
        link
    });
    let index = Index {
        schema_version: 2,
        media_type: Some(media::OCI_INDEX.to_owned()),
        artifact_type: None,
        manifests: all,
        subject: None,
        annotations: std::collections::BTreeMap::new(),
    };
    let mut answer = json_as(&index, media::OCI_INDEX)?;
    if let Some(link) = link {
        set(&mut answer, LINK, &link);
    }
    if kind.is_some() {
        set(&mut answer, FILTERS, "artifactType");
    }
    Ok(answer)
}

fn size_of(descriptor: &Descriptor) -> usize {
    serde_json::to_vec(descriptor).map_or(0, |text| text.len() + 1)
}

/// The part of a list that was asked for.
struct Page {
    n: Option<usize>,
    last: Option<String>,
}

impl Page {
    fn of<B>(request: &Request<B>) -> Result<Self, Refusal> {
        let n = query(request, "n").into_iter().next().filter(|n| !n.is_empty());
        let n = n.map(|n| {
            n.parse::<usize>().map_err(|_error| {
                Refusal::new(
                    StatusCode::BAD_REQUEST,
                    "PAGINATION_NUMBER_INVALID",
                    format!("n={n:?} is not a number of entries"),
                )
            })
        });
        let last = query(request, "last").into_iter().next().filter(|last| !last.is_empty());
        Ok(Self { n: n.transpose()?, last })
    }

    /// The page of a sorted list, and its last entry if others follow.
    fn cut(&self, mut all: Vec<String>, most: usize) -> (Vec<String>, Option<String>) {
        if let Some(last) = &self.last {
            let start = all.partition_point(|entry| entry <= last);
            all.drain(..start);
        }
        // Who asks for no number gets all that one answer may hold.
        let limit = self.n.map_or(most.max(10_000), |n| n.min(most));
        let more = limit > 0 && all.len() > limit;
        all.truncate(limit);
        let next = all.last().filter(|_| more).cloned();
        (all, next)
    }

    fn link(&self, path: &str, last: &str, n: usize) -> String {
        let n = self.n.unwrap_or(n);
        format!("<{path}?n={n}&last={}>; rel=\"next\"", utf8_percent_encode(last, QUERY))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other() {
        let all: Vec<String> = ["a", "b", "c", "d"].map(str::to_owned).to_vec();
        let page = |n, last: Option<&str>| Page { n, last: last.map(str::to_owned) }.cut(all.clone(), 1000);
        assert_eq!(page(Some(2), None), (vec!["a".into(), "b".into()], Some("b".into())));
        assert_eq!(page(Some(2), Some("b")), (vec!["c".into(), "d".into()], None));
        assert_eq!(page(Some(0), None), (vec![], None));
        assert_eq!(page(None, Some("bb")), (vec!["c".into(), "d".into()], None));
        assert_eq!(page(Some(9), Some("z")), (vec![], None));
    }
}
