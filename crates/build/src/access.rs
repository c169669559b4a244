//! What a build may show to others: credentials for registries and secrets for servers, which came with the request or
//! which the client's session has.

use std::collections::BTreeMap;
use std::sync::Arc;

use brigantine_image::Reference;
use brigantine_registry::{Client, Credentials, GetToken, Keeper, WantedToken};
use brigantine_session::Session;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use crate::error::Result;

/// A build's way to registries. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Access {
    pub registry: Client,
    pub session: Option<Arc<Session>>,
    credentials: Arc<BTreeMap<String, Credentials>>,
}

impl Access {
    pub fn new(
        registry: Client,
        credentials: BTreeMap<String, Credentials>,
        session: Option<Arc<Session>>,
    ) -> Self {
        Self { registry, session, credentials: Arc::new(credentials) }
    }

    /// What there is for the registry of a reference.
    pub async fn credentials(&self, reference: &Reference) -> Result<Option<Credentials>> {
        match self.given(reference) {
            None => self.lent(reference).await,
            known => Ok(known),
        }
    }

    /// What the client's session has for the registry.
    async fn lent(&self, reference: &Reference) -> Result<Option<Credentials>> {
        let Some(session) = &self.session else { return Ok(None) };
        let host = match reference.domain() {
            "docker.io" => "registry-1.docker.io",
            domain => domain,
        };
        if session.gives_tokens() {
            let keeper = Lender { session: Arc::clone(session), host: host.to_owned() };
            return Ok(Some(Credentials::Kept(Keeper(Arc::new(keeper)))));
        }
        Ok(session.credentials(host).await?.map(|lent| match lent.username {
            username if username.is_empty() => Credentials::Identity { username, token: lent.secret },
            username => Credentials::Password { username, password: lent.secret },
        }))
    }

    fn given(&self, reference: &Reference) -> Option<Credentials> {
        let domain = reference.domain();
        let hub = ["https://index.docker.io/v1/", "index.docker.io", "docker.io"];
        let keys = [domain].into_iter().chain(hub.into_iter().filter(|_| domain == "docker.io"));
        for key in keys {
            for form in [key.to_owned(), format!("https://{key}"), format!("https://{key}/")] {
                if let Some(found) = self.credentials.get(&form) {
                    return Some(found.clone());
                }
            }
        }
        None
    }
}

/// A client that keeps its credentials for a registry.
struct Lender {
    session: Arc<Session>,
    host: String,
}

impl GetToken for Lender {
    fn token<'t>(&'t self, wanted: &'t WantedToken) -> BoxFuture<'t, Result<Option<String>, String>> {
        async move {
            let WantedToken { realm, service, scopes } = wanted;
            let got = self.session.token(&self.host, realm, service, scopes).await;
            got.map_err(|error| error.to_string())
        }
        .boxed()
    }
}

/// The secrets of a build: those that came with its request, and those that its client's session has. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Secrets {
    given: Arc<BTreeMap<String, Vec<u8>>>,
    session: Option<Arc<Session>>,
}

impl Secrets {
    pub fn new(given: Arc<BTreeMap<String, Vec<u8>>>, session: Option<Arc<Session>>) -> Self {
        Self { given, session }
    }

    /// The first of these that there is, with its name.
    pub async fn first<'n>(&self, names: &'n [String]) -> Result<Option<(&'n str, Vec<u8>)>> {
        for name in names {
            if let Some(value) = self.find(name).await? {
                return Ok(Some((name, value)));
            }
        }
        Ok(None)
    }

    async fn find(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match (self.given.get(name), &self.session) {
            (Some(value), _) => Ok(Some(value.clone())),
            (None, Some(session)) => Ok(session.secret(name).await?),
            (None, None) => Ok(None),
        }
    }
}
