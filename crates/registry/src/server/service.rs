//! One request: who asks, what for, and the answer.
//!
//! Invariant: nothing is read or written before the guard has let the request through.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE, HeaderName};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;

use super::auth::{Guard, Need, Principal};
use super::cache::Cache;
use super::library::Library;
use super::metrics::{MEDIA_TYPE, Metrics};
use super::options::{Limits, Quotas};
use super::refusal::Refusal;
use super::reply::{Body, Outcome, empty, full, set};
use super::route::Route;
use super::storage::Storage;
use super::uploads::Uploads;
use super::{blobs, lists, manifests, pushes};

/// What all requests share.
pub(super) struct Shared {
    pub library: Arc<dyn Library>,
    /// Where pushes go; none where nothing can be pushed.
    pub writable: Option<Writable>,
    pub cache: Option<Arc<Cache>>,
    pub guard: Guard,
    pub read_only: bool,
    pub sparse: bool,
    pub quotas: Quotas,
    pub limits: Limits,
    pub metrics: Metrics,
    /// Metrics are served here, not on a listener of their own.
    pub metrics_here: bool,
}

/// Storage that can be pushed to.
#[derive(Clone)]
pub(super) struct Writable {
    pub storage: Arc<Storage>,
    pub uploads: Arc<Uploads>,
}

impl Shared {
    /// The storage, if pushing to it is allowed.
    pub fn writable(&self) -> Result<&Writable, Refusal> {
        let reason = if self.cache.is_some() {
            "this registry is a cache of another one: push there"
        } else if self.read_only || self.writable.is_none() {
            "this registry is read-only"
        } else {
            ""
        };
        match &self.writable {
            Some(writable) if reason.is_empty() => Ok(writable),
            _ => Err(Refusal::unsupported(reason)),
        }
    }
}

/// Answers one request.
pub(super) async fn serve(
    shared: Arc<Shared>,
    peer: Option<SocketAddr>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let began = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    shared.metrics.in_flight.inc();
    let mut user = String::new();
    let mut kind = "unknown";
    let outcome = route(&shared, request, &mut user, &mut kind).await;
    let mut answer = match outcome {
        Ok(answer) => answer,
        Err(refusal) => {
            tracing::debug!(code = refusal.code, message = %refusal.message, "refused");
            refusal.answer()
        }
    };
    answer.headers_mut().insert(
        HeaderName::from_static("docker-distribution-api-version"),
        HeaderValue::from_static("registry/2.0"),
    );
    answer.headers_mut().insert(http::header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let status = answer.status();
    let length = answer
        .headers()
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.parse::<u64>().ok())
        .or(http_body::Body::size_hint(answer.body()).exact())
        .unwrap_or(0);
    if method == Method::HEAD {
        if !answer.headers().contains_key(CONTENT_LENGTH) {
            super::reply::set_length(&mut answer, length);
        }
        *answer.body_mut() = full(Bytes::new());
    } else {
        shared.metrics.sent.inc_by(length);
    }
    shared.metrics.in_flight.dec();
    let took = began.elapsed();
    shared.metrics.answered(&method, kind, status.as_u16(), took);
    tracing::info!(
        %method,
        path,
        status = status.as_u16(),
        bytes = length,
        milliseconds = took.as_secs_f64() * 1000.0,
        user,
        peer = peer.map(tracing::field::display),
        "request"
    );
    Ok(answer)
}

async fn route(
    shared: &Arc<Shared>,
    request: Request<Incoming>,
    user: &mut String,
    kind: &mut &'static str,
) -> Outcome {
    let Some(route) = Route::parse(request.uri().path())? else {
        return Err(Refusal::new(StatusCode::NOT_FOUND, "UNSUPPORTED", "there is nothing at this path"));
    };
    *kind = route.kind();
    let method = request.method().clone();
    let need = need(&route, &method);
    let principal = shared.guard.check(request.headers(), &need).await?;
    user.clone_from(&principal.name);
    dispatch(shared, route, &method, request, &principal).await
}

/// What the request has to be allowed.
fn need(route: &Route, method: &Method) -> Need {
    match route {
        Route::Base | Route::Metrics => Need::Login,
        Route::Catalog => Need::Catalog,
        Route::Tags(name) | Route::Referrers(name, _) => Need::Pull(name.clone()),
        Route::Uploads(name) | Route::Upload(name, _) => Need::Push(name.clone()),
        Route::Manifest(name, _) | Route::Blob(name, _) => match *method {
            Method::GET | Method::HEAD => Need::Pull(name.clone()),
            Method::DELETE => Need::Delete(name.clone()),
            _ => Need::Push(name.clone()),
        },
    }
}

async fn dispatch(
    shared: &Arc<Shared>,
    route: Route,
    method: &Method,
    request: Request<Incoming>,
    principal: &Principal,
) -> Outcome {
    let reading = *method == Method::GET || *method == Method::HEAD;
    match route {
        Route::Base if reading => {
            let mut answer = Response::new(full(Bytes::from_static(b"{}")));
            answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            Ok(answer)
        }
        Route::Metrics if reading && shared.metrics_here => Ok(metrics(shared)),
        Route::Metrics => Err(Refusal::new(StatusCode::NOT_FOUND, "UNSUPPORTED", "metrics are not here")),
        Route::Catalog if reading => lists::catalog(shared, &request).await,
        Route::Tags(name) if reading => lists::tags(shared, name, &request).await,
        Route::Referrers(name, digest) if reading => lists::referrers(shared, name, digest, &request).await,
        Route::Manifest(name, pointer) => match *method {
            Method::GET | Method::HEAD => manifests::get(shared, name, pointer, &request).await,
            Method::PUT => manifests::put(shared, name, pointer, request).await,
            Method::DELETE => manifests::delete(shared, name, pointer).await,
            _ => Err(not_allowed("GET, HEAD, PUT, DELETE")),
        },
        Route::Blob(name, digest) => match *method {
            Method::GET | Method::HEAD => blobs::get(shared, name, digest, &request).await,
            Method::DELETE => blobs::delete(shared, name, digest).await,
            _ => Err(not_allowed("GET, HEAD, DELETE")),
        },
        Route::Uploads(name) => match *method {
            Method::POST => pushes::begin(shared, name, request, principal).await,
            _ => Err(not_allowed("POST")),
        },
        Route::Upload(name, id) => match *method {
            Method::GET | Method::HEAD => pushes::status(shared, &name, &id).await,
            Method::PATCH => pushes::patch(shared, &name, &id, request).await,
            Method::PUT => pushes::put(shared, &name, &id, request).await,
            Method::DELETE => pushes::cancel(shared, &name, &id).await,
            _ => Err(not_allowed("GET, PATCH, PUT, DELETE")),
        },
        Route::Base | Route::Catalog | Route::Tags(_) | Route::Referrers(..) => Err(not_allowed("GET, HEAD")),
    }
}

fn not_allowed(methods: &str) -> Refusal {
    Refusal::unsupported(format!("only {methods} can be asked for here")).with(ALLOW, methods)
}

/// The metrics' text.
pub(super) fn metrics(shared: &Shared) -> Response<Body> {
    if let Some(writable) = &shared.writable {
        shared.metrics.uploads.set(i64::try_from(writable.uploads.count()).unwrap_or(i64::MAX));
    }
    let mut answer = empty(StatusCode::OK);
    *answer.body_mut() = full(shared.metrics.text().into());
    set(&mut answer, CONTENT_TYPE, MEDIA_TYPE);
    answer
}

/// The values of a query's parameter.
pub(super) fn query<B>(request: &Request<B>, name: &str) -> Vec<String> {
    let text = request.uri().query().unwrap_or_default();
    url::form_urlencoded::parse(text.as_bytes())
        .filter(|(key, _)| key == name)
        .map(|(_, value)| value.into_owned())
        .collect()
}

/// A header's value as text.
pub(super) fn header<B>(request: &Request<B>, name: impl http::header::AsHeaderName) -> Option<&str> {
    request.headers().get(name).and_then(|value| value.to_str().ok())
}
