//! The engine as a whole: ping, version, info, disk usage, and what is not built here.

use http::{HeaderName, HeaderValue, StatusCode, header};

use super::State;
use crate::http::{Error, Reply, Request, Router};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router.get("/_ping", ping).head("/_ping", ping);
}

async fn ping(_state: State, request: Request) -> Result<Reply, Error> {
    let reply = if request.method() == http::Method::HEAD {
        Reply::bytes(StatusCode::OK, "text/plain; charset=utf-8", "")
    } else {
        Reply::bytes(StatusCode::OK, "text/plain; charset=utf-8", "OK")
    };
    Ok(reply
        .header(HeaderName::from_static("builder-version"), HeaderValue::from_static("1"))
        .header(HeaderName::from_static("swarm"), HeaderValue::from_static("inactive"))
        .header(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, no-store, must-revalidate"))
        .header(header::PRAGMA, HeaderValue::from_static("no-cache")))
}
