//! Looking for repositories: docker's search where a registry has it, else its catalog.
//!
//! Sources: docker's registry API 1 (`/v1/search`); distribution's `/v2/_catalog`.

use brigantine_image::Reference;
use http::{Method, StatusCode};
use serde::Deserialize;

use crate::client::Transport;
use crate::endpoint::{Endpoint, Purpose, endpoints};
use crate::session::{Action, Ask, Session, read};
use crate::{Client, Credentials, Error};

/// Docker Hub's search is not at its registry.
const HUB: &str = "https://index.docker.io";
/// Bytes of one answer.
const LIMIT: usize = 8 << 20;
/// Pages of a catalog that are looked through.
const MOST_PAGES: usize = 200;

/// A repository that was found.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Found {
    pub name: String,
    #[serde(default)]
    pub description: String,
    #[serde(default)]
    pub star_count: u64,
    #[serde(default)]
    pub is_official: bool,
    #[serde(default)]
    pub is_automated: bool,
}

impl Client {
    /// Repositories of `domain` that have to do with `term`, at most `limit`.
    pub async fn search(
        &self,
        domain: &str,
        term: &str,
        limit: usize,
        credentials: Option<Credentials>,
    ) -> Result<Vec<Found>, Error> {
        let named = Reference::parse(&format!("{domain}/search"))
            .map_err(|error| Error::Invalid(format!("{domain:?} is not a registry: {error}")))?;
        let transport = self.transport();
        let endpoint = if domain == "docker.io" {
            let base = url::Url::parse(HUB).map_err(|error| Error::Invalid(error.to_string()))?;
            Endpoint::at(&transport.config, base)?
        } else {
            let all = endpoints(&transport.config, &named, Purpose::Pull)?;
            let own = all.into_iter().find(|endpoint| !endpoint.mirror);
            own.ok_or_else(|| Error::Invalid(format!("{domain} may not be asked")))?
        };
        let session = Session::open(&transport, &endpoint, "", Action::Catalog, credentials.clone()).await?;
        if let Some(found) = ask_search(&session, term, limit).await? {
            return Ok(found);
        }
        catalog(&transport, &session, term, limit).await
    }
}

/// `None` where the registry has no search.
async fn ask_search(session: &Session, term: &str, limit: usize) -> Result<Option<Vec<Found>>, Error> {
    #[derive(Deserialize)]
    struct Answer {
        results: Vec<Found>,
    }
    let mut url = session.url("")?;
    let path = url.path().trim_end_matches('/').trim_end_matches("/v2").to_owned();
    url.set_path(&format!("{path}/v1/search"));
    url.query_pairs_mut().append_pair("q", term).append_pair("n", &limit.to_string());
    let answer = session.send(&Ask::new(Method::GET, url.clone())).await?;
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::BAD_REQUEST => return Ok(None),
        _ => return Err(session.failure("Get", &url, answer).await),
    }
    let raw = read(answer, LIMIT, "the answer to a search").await?;
    let Ok(answer) = serde_json::from_slice::<Answer>(&raw) else { return Ok(None) };
    let mut found = answer.results;
    found.truncate(limit);
    Ok(Some(found))
}

async fn catalog(
    transport: &Transport,
    session: &Session,
    term: &str,
    limit: usize,
) -> Result<Vec<Found>, Error> {
    #[derive(Deserialize)]
    struct Answer {
        repositories: Option<Vec<String>>,
    }
    let mut url = session.url("_catalog")?;
    url.query_pairs_mut().append_pair("n", "1000");
    let mut found = Vec::new();
    for _ in 0..MOST_PAGES {
        let answer = session.send(&Ask::new(Method::GET, url.clone())).await?;
        if !answer.status().is_success() {
            return Err(session.failure("Get", &url, answer).await);
        }
        let next = next_page(answer.headers(), &url);
        let raw = read(answer, LIMIT, "a registry's catalog").await?;
        let page: Answer = serde_json::from_slice(&raw).map_err(|error| {
            Error::protocol(format!("the catalog of {}", session.registry()), error.to_string())
        })?;
        for name in page.repositories.unwrap_or_default() {
            if name.contains(term) && found.len() < limit {
                let name = format!("{}/{name}", session.registry());
                found.push(Found {
                    name,
                    description: String::new(),
                    star_count: 0,
                    is_official: false,
                    is_automated: false,
                });
            }
        }
        match next {
            Some(next) if found.len() < limit => url = next,
            _ => return Ok(found),
        }
    }
    tracing::warn!(
        registry = session.registry(),
        attempts = transport.config.attempts,
        "a catalog has no end"
    );
    Ok(found)
}

/// The page a `Link: <…>; rel="next"` leads to, within the same registry.
pub(crate) fn next_page(headers: &http::HeaderMap, url: &url::Url) -> Option<url::Url> {
    let link = headers.get(http::header::LINK)?.to_str().ok()?;
    let target = link.trim().strip_prefix('<')?.split('>').next()?;
    url.join(target).ok().filter(|next| next.origin() == url.origin() && next != url)
}

impl Client {
    /// All tags of a repository, in the registry's order.
    pub async fn tags(
        &self,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<Vec<String>, Error> {
        #[derive(Deserialize)]
        struct Answer {
            tags: Option<Vec<String>>,
        }
        let transport = self.transport();
        let mut failure = None;
        for endpoint in endpoints(&transport.config, reference, Purpose::Resolve)? {
            let listed = async {
                let credentials = credentials.clone();
                let session =
                    Session::open(&transport, &endpoint, reference.path(), Action::Pull, credentials).await?;
                let mut url = session.repository_url("tags/list")?;
                let mut tags = Vec::new();
                for _ in 0..MOST_PAGES {
                    let answer = session.send(&Ask::new(Method::GET, url.clone())).await?;
                    if !answer.status().is_success() {
                        return Err(session.failure("Get", &url, answer).await);
                    }
                    let next = next_page(answer.headers(), &url);
                    let raw = read(answer, LIMIT, "a list of tags").await?;
                    let page: Answer = serde_json::from_slice(&raw).map_err(|error| {
                        Error::protocol(
                            format!("the tags of {}", reference.familiar_name()),
                            error.to_string(),
                        )
                    })?;
                    tags.extend(page.tags.unwrap_or_default());
                    match next {
                        Some(next) => url = next,
                        None => break,
                    }
                }
                Ok(tags)
            };
            match listed.await {
                Ok(tags) => return Ok(tags),
                Err(error) => failure = Some(error),
            }
        }
        let error = failure.unwrap_or_else(|| Error::Invalid("there is no registry to ask".to_owned()));
        Err(crate::client::name_failure(reference, error))
    }
}
