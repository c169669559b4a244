//! One client's session: calls to it, each with an end to the waiting.

use std::collections::HashSet;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use http::Uri;
use http::uri::PathAndQuery;
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use tokio::sync::watch;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Request, Streaming};
use tonic_prost::ProstCodec;

use crate::error::{Error, Result};
use crate::messages::{
    CheckAgentRequest, CredentialsRequest, CredentialsResponse, Empty, SecretRequest, SecretResponse,
    TokenRequest, TokenResponse,
};

const CREDENTIALS: &str = "/moby.filesync.v1.Auth/Credentials";
const TOKEN: &str = "/moby.filesync.v1.Auth/FetchToken";

/// How long one answer may take: a client may ask a person, or a helper program, or be stopped for a while.
pub(crate) const ANSWER: Duration = Duration::from_mins(2);
/// How long a connection that breaks may take from the first sign of it, a stream's error, to its end.
const BREAKING: Duration = Duration::from_millis(500);
/// The largest message taken, in bytes; clients send files in pieces of 32 KiB.
pub(crate) const MOST_MESSAGE: usize = 4 << 20;
/// The largest secret, in bytes, as in BuildKit.
const MOST_SECRET: usize = 500 << 10;

/// A registry's user and password, or an identity token with no user.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub username: String,
    pub secret: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// A client that answers.
pub struct Session {
    id: String,
    shared_key: String,
    /// Paths of the methods it offers, in lower case.
    methods: HashSet<String>,
    channel: Channel,
    ended: watch::Receiver<bool>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Session {
    pub(crate) fn new(
        id: String,
        shared_key: String,
        methods: impl IntoIterator<Item = String>,
        sender: SendRequest<Body>,
        ended: watch::Receiver<bool>,
    ) -> Self {
        let methods = methods.into_iter().map(|method| method.to_lowercase()).collect();
        Self { id, shared_key, methods, channel: Channel(sender), ended }
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// The same for all sessions of one folder on one client; empty if the client does not say.
    pub fn shared_key(&self) -> &str {
        &self.shared_key
    }

    /// Returns when the client has left.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        if ended.wait_for(|ended| *ended).await.is_err() {
            tracing::trace!(session = self.id, "the session's connection is gone");
        }
    }

    fn is_over(&self) -> bool {
        *self.ended.borrow() || self.ended.has_changed().is_err()
    }

    pub(crate) fn offers(&self, method: &'static str) -> bool {
        self.methods.contains(&method.to_lowercase())
    }

    /// Returns when the client has answered anything at all.
    pub async fn answers(&self) -> Result<()> {
        const METHOD: &str = "/grpc.health.v1.Health/Check";
        let what = || "begin the session".to_owned();
        let answered: Result<Empty> = self.unary(&what, METHOD, Empty {}).await;
        match answered {
            // Some do not know the question.
            Ok(_) | Err(Error::Refused { .. } | Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The user's credentials for a registry; `None` when it has none.
    pub async fn credentials(&self, host: &str) -> Result<Option<Credentials>> {
        if !self.offers(CREDENTIALS) {
            return Ok(None);
        }
        let what = || format!("ask for credentials for {host}");
        let asked: Result<CredentialsResponse> =
            self.unary(&what, CREDENTIALS, CredentialsRequest { host: host.to_owned() }).await;
        match asked {
            Ok(found) if found.secret.is_empty() => Ok(None),
            Ok(found) => Ok(Some(Credentials { username: found.username, secret: found.secret })),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the client keeps its secrets to itself and gets tokens for the engine. One that tells its secrets as well
    /// is asked for those: it may be where the token server cannot be reached from.
    pub fn gives_tokens(&self) -> bool {
        self.offers(TOKEN) && !self.offers(CREDENTIALS)
    }

    /// A token for a registry, which the client gets from the token server `realm`; `None` when it gets none.
    pub async fn token(
        &self,
        host: &str,
        realm: &str,
        service: &str,
        scopes: &[String],
    ) -> Result<Option<String>> {
        let what = || format!("ask for a token for {host}");
        let message = TokenRequest {
            client: "brigantine".to_owned(),
            host: host.to_owned(),
            realm: realm.to_owned(),
            service: service.to_owned(),
            scopes: scopes.to_vec(),
        };
        let asked: Result<TokenResponse> = self.unary(&what, TOKEN, message).await;
        match asked {
            Ok(found) => Ok(Some(found.token).filter(|token| !token.is_empty())),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A secret by its id; `None` when the client has none of that name.
    pub async fn secret(&self, id: &str) -> Result<Option<Vec<u8>>> {
        const METHOD: &str = "/moby.buildkit.secrets.v1.Secrets/GetSecret";
        if !self.offers(METHOD) {
            return Ok(None);
        }
        let what = || format!("ask for the secret {id}");
        let asked: Result<SecretResponse> =
            self.unary(&what, METHOD, SecretRequest { id: id.to_owned() }).await;
        match asked {
            Ok(found) if found.data.len() > MOST_SECRET => Err(Error::Protocol(format!(
                "the secret {id} is {} bytes long: at most {MOST_SECRET} are taken",
                found.data.len()
            ))),
            Ok(found) => Ok(Some(found.data.into())),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the client forwards the ssh agent of that id.
    pub async fn has_agent(&self, id: &str) -> Result<bool> {
        const METHOD: &str = "/moby.sshforward.v1.SSH/CheckAgent";
        if !self.offers(METHOD) {
            return Ok(false);
        }
        let what = || format!("ask for the ssh agent {id}");
        let asked: Result<Empty> = self.unary(&what, METHOD, CheckAgentRequest { id: id.to_owned() }).await;
        match asked {
            Ok(_) => Ok(true),
            // Go's provider says it in words only.
            Err(Error::NotFound { .. } | Error::Refused { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn unary<M, R>(
        &self,
        what: &(dyn Fn() -> String + Sync),
        method: &'static str,
        message: M,
    ) -> Result<R>
    where
        M: prost::Message + Default + 'static,
        R: prost::Message + Default + 'static,
    {
        self.unary_with(what, method, MetadataMap::new(), message).await
    }

    pub(crate) async fn unary_with<M, R>(
        &self,
        what: &(dyn Fn() -> String + Sync),
        method: &'static str,
        metadata: MetadataMap,
        message: M,
    ) -> Result<R>
    where
        M: prost::Message + Default + 'static,
        R: prost::Message + Default + 'static,
    {
        let mut grpc = self.grpc();
        let call = async {
            grpc.ready().await.map_err(|_closed| Error::Ended)?;
            let codec = ProstCodec::<M, R>::default();
            let mut request = Request::new(message);
            *request.metadata_mut() = metadata;
            let answered = grpc.unary(request, PathAndQuery::from_static(method), codec).await;
            self.answer(what, answered.map(tonic::Response::into_inner)).await
        };
        self.within(ANSWER, what, call).await
    }

    /// Opens a stream in both directions. Its answer begins when the client has something to say, which may be at
    /// the very end: there is no limit to that here.
    pub(crate) async fn stream<M, R>(
        &self,
        what: &(dyn Fn() -> String + Sync),
        method: &'static str,
        metadata: MetadataMap,
        outgoing: impl Stream<Item = M> + Send + 'static,
    ) -> Result<Streaming<R>>
    where
        M: prost::Message + Default + 'static,
        R: prost::Message + Default + 'static,
    {
        let mut grpc = self.grpc();
        grpc.ready().await.map_err(|_closed| Error::Ended)?;
        let mut request = Request::new(outgoing);
        *request.metadata_mut() = metadata;
        let codec = ProstCodec::<M, R>::default();
        let answered = grpc.streaming(request, PathAndQuery::from_static(method), codec).await;
        self.answer(what, answered.map(tonic::Response::into_inner)).await
    }

    /// A call that ends when the client leaves or takes too long.
    pub(crate) async fn within<T>(
        &self,
        time: Duration,
        what: &(dyn Fn() -> String + Sync),
        call: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        tokio::select! {
            answered = call => answered,
            () = self.ended() => Err(Error::Ended),
            () = tokio::time::sleep(time) => Err(Error::Silent { what: what(), seconds: time.as_secs() }),
        }
    }

    fn grpc(&self) -> Grpc<Channel> {
        // HTTP/2 wants an authority, and Go's server a plain one.
        Grpc::with_origin(self.channel.clone(), Uri::from_static("http://localhost"))
            .max_decoding_message_size(MOST_MESSAGE)
            .max_encoding_message_size(MOST_MESSAGE)
    }

    /// What the client answered, or that it has left. A connection that breaks ends its streams first, each with a
    /// status that may look like the client's own, and only then is seen to have ended: that is waited for.
    pub(crate) async fn answer<T>(
        &self,
        what: &(dyn Fn() -> String + Sync),
        answered: std::result::Result<T, tonic::Status>,
    ) -> Result<T> {
        let status = match answered {
            Ok(answer) => return Ok(answer),
            Err(status) => status,
        };
        // Nothing but a client says these.
        let told = matches!(status.code(), Code::NotFound | Code::Unimplemented);
        if !told && tokio::time::timeout(BREAKING, self.ended()).await.is_err() {
            tracing::trace!(session = self.id, %status, "the client refuses");
        }
        if self.is_over() {
            return Err(Error::Ended);
        }
        let (what, message) = (what(), status.message().to_owned());
        Err(match status.code() {
            Code::NotFound => Error::NotFound { what, message },
            Code::Unimplemented => Error::Refused { what, message: "it does not know how".to_owned() },
            _ => Error::Refused { what, message },
        })
    }
}

/// One value of metadata, if it can be one: printable ASCII.
pub(crate) fn add(metadata: &mut MetadataMap, key: &'static str, value: &str) -> bool {
    match MetadataValue::try_from(value) {
        Ok(value) if value.to_str().is_ok() => {
            metadata.append(key, value);
            true
        }
        _ => false,
    }
}

/// The connection, as tonic wants to see it.
#[derive(Clone)]
struct Channel(SendRequest<Body>);

impl tower_service::Service<http::Request<Body>> for Channel {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = hyper::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
