//! What the registry counts, in OpenMetrics' text form.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// The media type of the text form.
pub(super) const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Request {
    pub method: String,
    pub route: &'static str,
    pub code: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct On {
    pub route: &'static str,
}

pub(super) struct Metrics {
    registry: Mutex<Registry>,
    pub requests: Family<Request, Counter>,
    pub duration: Family<On, Histogram>,
    pub in_flight: Gauge,
    pub sent: Counter,
    pub received: Counter,
    pub uploads: Gauge,
    pub cache_hits: Counter,
    pub cache_misses: Counter,
    pub cache_stale: Counter,
    pub collections: Counter,
    pub freed: Counter,
    pub collection_seconds: Gauge<f64, AtomicU64>,
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("brigantine_registry");
        let requests = Family::default();
        registry.register("requests", "Requests answered", requests.clone());
        let duration: Family<On, Histogram> =
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.0005, 4.0, 10)));
        registry.register_with_unit(
            "request_duration",
            "Time until an answer's head was ready",
            Unit::Seconds,
            duration.clone(),
        );
        let in_flight = Gauge::default();
        registry.register("requests_in_flight", "Requests being answered", in_flight.clone());
        let sent = Counter::default();
        registry.register_with_unit("sent", "Content announced in answers", Unit::Bytes, sent.clone());
        let received = Counter::default();
        registry.register_with_unit("received", "Content taken in uploads", Unit::Bytes, received.clone());
        let uploads = Gauge::default();
        registry.register("uploads_open", "Uploads that are not finished", uploads.clone());
        let cache_hits = Counter::default();
        registry.register("cache_hits", "Requests served from the cache", cache_hits.clone());
        let cache_misses = Counter::default();
        registry.register("cache_misses", "Requests that went upstream", cache_misses.clone());
        let cache_stale = Counter::default();
        registry.register(
            "cache_stale",
            "Requests served from the cache because upstream failed",
            cache_stale.clone(),
        );
        let collections = Counter::default();
        registry.register("collections", "Garbage collections finished", collections.clone());
        let freed = Counter::default();
        registry.register_with_unit("collected", "Content freed by collections", Unit::Bytes, freed.clone());
        let collection_seconds = Gauge::<f64, AtomicU64>::default();
        registry.register_with_unit(
            "collection_duration",
            "Length of the last garbage collection",
            Unit::Seconds,
            collection_seconds.clone(),
        );
        Self {
            registry: Mutex::new(registry),
            requests,
            duration,
            in_flight,
            sent,
            received,
            uploads,
            cache_hits,
            cache_misses,
            cache_stale,
            collections,
            freed,
            collection_seconds,
        }
    }

    pub fn answered(&self, method: &http::Method, route: &'static str, code: u16, took: Duration) {
        let known = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"];
        let method = if known.contains(&method.as_str()) { method.as_str() } else { "other" };
        self.requests.get_or_create(&Request { method: method.to_owned(), route, code }).inc();
        self.duration.get_or_create(&On { route }).observe(took.as_secs_f64());
    }

    pub fn text(&self) -> String {
        let mut out = String::new();
        let registry = self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Writing to a string cannot fail.
        if text::encode(&mut out, &registry).is_err() {
            out.clear();
        }
        out
    }
}
