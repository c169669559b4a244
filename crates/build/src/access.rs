//! What a build may show to registries: credentials that came with the request, or that the client's session has.

use std::collections::BTreeMap;
use std::sync::Arc;

use brigantine_image::Reference;
use brigantine_registry::{Client, Credentials};
use brigantine_session::Session;

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
