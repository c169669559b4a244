//! From method and path to a handler.
//!
//! Invariant: the first route registered that matches wins, and a path that matches only with another method is
//! answered like an unknown one (`page not found`), as docker does.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use http::Method;

use super::{Error, Reply, Request};

pub(crate) type HandlerFuture = Pin<Box<dyn Future<Output = Result<Reply, Error>> + Send>>;
pub(crate) type Handler<S> = Arc<dyn Fn(S, Request) -> HandlerFuture + Send + Sync>;

/// The table of routes; `S` is what every handler gets beside its request.
pub struct Router<S> {
    routes: Vec<Route<S>>,
}

struct Route<S> {
    method: Method,
    pattern: Pattern,
    handler: Handler<S>,
}

/// A path pattern: literal segments, `{name}` for one segment, `{name:.*}` for any number of them.
struct Pattern {
    segments: Vec<Segment>,
}

enum Segment {
    Literal(&'static str),
    One(&'static str),
    Many(&'static str),
}

pub(crate) type Params = Vec<(&'static str, String)>;

impl<S: 'static> Router<S> {
    #[expect(clippy::new_without_default, reason = "an empty router is not a useful default")]
    pub fn new() -> Self {
        Self { routes: Vec::new() }
    }

    /// Binds a handler. `pattern` is as in docker's routers: `/containers/{name}/json`, `/images/{name:.*}/json`.
    pub fn route<H, F>(&mut self, method: Method, pattern: &'static str, handler: H) -> &mut Self
    where
        H: Fn(S, Request) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Reply, Error>> + Send + 'static,
    {
        let handler: Handler<S> = Arc::new(move |state, request| Box::pin(handler(state, request)));
        self.routes.push(Route { method, pattern: Pattern::parse(pattern), handler });
        self
    }

    pub fn get<H, F>(&mut self, pattern: &'static str, handler: H) -> &mut Self
    where
        H: Fn(S, Request) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Reply, Error>> + Send + 'static,
    {
        self.route(Method::GET, pattern, handler)
    }

    pub fn head<H, F>(&mut self, pattern: &'static str, handler: H) -> &mut Self
    where
        H: Fn(S, Request) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Reply, Error>> + Send + 'static,
    {
        self.route(Method::HEAD, pattern, handler)
    }

    pub fn post<H, F>(&mut self, pattern: &'static str, handler: H) -> &mut Self
    where
        H: Fn(S, Request) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Reply, Error>> + Send + 'static,
    {
        self.route(Method::POST, pattern, handler)
    }

    pub fn put<H, F>(&mut self, pattern: &'static str, handler: H) -> &mut Self
    where
        H: Fn(S, Request) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Reply, Error>> + Send + 'static,
    {
        self.route(Method::PUT, pattern, handler)
    }

    pub fn delete<H, F>(&mut self, pattern: &'static str, handler: H) -> &mut Self
    where
        H: Fn(S, Request) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Reply, Error>> + Send + 'static,
    {
        self.route(Method::DELETE, pattern, handler)
    }

    /// The handler for a decoded path, with its parameters.
    pub(crate) fn find(&self, method: &Method, path: &str) -> Option<(Handler<S>, Params)> {
        self.routes
            .iter()
            .filter(|route| route.method == *method)
            .find_map(|route| route.pattern.matches(path).map(|params| (Arc::clone(&route.handler), params)))
    }
}

impl Pattern {
    fn parse(pattern: &'static str) -> Self {
        let segments = pattern
            .trim_start_matches('/')
            .split('/')
            .map(|segment| match segment.strip_prefix('{').and_then(|s| s.strip_suffix('}')) {
                None => Segment::Literal(segment),
                Some(name) => match name.strip_suffix(":.*") {
                    Some(name) => Segment::Many(name),
                    None => Segment::One(name),
                },
            })
            .collect();
        Self { segments }
    }

    fn matches(&self, path: &str) -> Option<Params> {
        let parts: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
        let mut params = Params::new();
        matches_from(&self.segments, &parts, &mut params).then_some(params)
    }
}

fn matches_from(segments: &[Segment], parts: &[&str], params: &mut Params) -> bool {
    let Some((segment, rest)) = segments.split_first() else {
        return parts.is_empty();
    };
    match segment {
        Segment::Literal(text) => parts.first() == Some(text) && matches_from(rest, &parts[1..], params),
        Segment::One(name) => match parts.split_first() {
            Some((part, tail)) if !part.is_empty() => {
                params.push((name, (*part).to_owned()));
                matches_from(rest, tail, params) || {
                    params.pop();
                    false
                }
            }
            _ => false,
        },
        // As much as possible: an image may itself be called `json`.
        Segment::Many(name) => (1..=parts.len()).rev().any(|count| {
            params.push((name, parts[..count].join("/")));
            matches_from(rest, &parts[count..], params) || {
                params.pop();
                false
            }
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(pattern: &'static str, path: &str) -> Option<Vec<String>> {
        Pattern::parse(pattern)
            .matches(path)
            .map(|params| params.into_iter().map(|(_, value)| value).collect())
    }

    #[test]
    fn names_may_hold_slashes_and_ports() {
        let inspect = "/images/{name:.*}/json";
        assert_eq!(params(inspect, "/images/a/json"), Some(vec!["a".into()]));
        assert_eq!(params(inspect, "/images/h:5000/a/b:t/json"), Some(vec!["h:5000/a/b:t".into()]));
        assert_eq!(params(inspect, "/images//a//b/json"), Some(vec!["/a//b".into()]));
        assert_eq!(params(inspect, "/images/json/json"), Some(vec!["json".into()]));
        assert_eq!(params(inspect, "/images/json"), None);
        assert_eq!(params("/images/{name:.*}", "/images/a/b"), Some(vec!["a/b".into()]));
    }

    #[test]
    fn one_segment_is_one_segment() {
        assert_eq!(params("/containers/{name}/json", "/containers/a/json"), Some(vec!["a".into()]));
        assert_eq!(params("/containers/{name}/json", "/containers/a/b/json"), None);
        assert_eq!(params("/containers/{name}/json", "/containers//json"), None);
        assert_eq!(params("/info", "/info"), Some(vec![]));
        assert_eq!(params("/info", "/info/"), None);
        assert_eq!(params("/containers/{a}/{b}", "/containers/x/y"), Some(vec!["x".into(), "y".into()]));
    }
}
