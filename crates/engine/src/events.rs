//! Events: a ring of the last 256 and any number of live listeners.
//!
//! Publishing never waits: a listener that falls behind the live buffer is told how many it missed and goes on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::broadcast;

use crate::{Error, Filters, Result};

/// Events kept for replay.
const RING: usize = 256;
/// Live events a slow listener may lag behind before it loses some.
const LIVE: usize = 4096;

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Container,
    Image,
    Volume,
    Network,
    Builder,
    Daemon,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Image => "image",
            Self::Volume => "volume",
            Self::Network => "network",
            Self::Builder => "builder",
            Self::Daemon => "daemon",
        }
    }
}

/// Something that happened to an object.
#[derive(Debug, Clone)]
pub struct Event {
    pub kind: Kind,
    pub action: String,
    /// The object's id (container, network) or name (image, volume).
    pub id: String,
    /// `image`, `name` and every label for containers; what Docker gives for the other kinds.
    pub attributes: BTreeMap<String, String>,
    pub time: Timestamp,
    /// The project whose object it was.
    pub project: Option<String>,
}

impl Event {
    /// The wire form, with the fields older clients read (`status`, `id`, `from`) beside today's.
    pub fn to_json(&self) -> Value {
        let mut document = json!({
            "Type": self.kind.as_str(),
            "Action": self.action,
            "Actor": { "ID": self.id, "Attributes": self.attributes },
            "scope": "local",
            "time": self.time.as_second(),
            "timeNano": i64::try_from(self.time.as_nanosecond()).unwrap_or(i64::MAX),
        });
        match self.kind {
            Kind::Container => {
                document["status"] = self.action.clone().into();
                document["id"] = self.id.clone().into();
                if let Some(image) = self.attributes.get("image") {
                    document["from"] = image.clone().into();
                }
            }
            Kind::Image => {
                document["status"] = self.action.clone().into();
                document["id"] = self.id.clone().into();
            }
            Kind::Volume | Kind::Network | Kind::Builder | Kind::Daemon => {}
        }
        document
    }

    fn wanted(&self, filters: &Filters) -> bool {
        let attribute = |name: &str| self.attributes.get(name).map(String::as_str);
        let is = |kind: Kind| self.kind == kind;
        let named = |key: &str, kind: Kind| {
            !filters.contains(key)
                || (is(kind)
                    && filters.values(key).iter().any(|wanted| {
                        *wanted == self.id
                            || attribute("name") == Some(wanted.as_str())
                            || (kind == Kind::Container
                                && wanted.len() >= 3
                                && self.id.starts_with(wanted.as_str()))
                    }))
        };
        let action = filters.values("event");
        let image = !filters.contains("image")
            || filters.values("image").iter().any(|wanted| {
                let of = if is(Kind::Image) { Some(self.id.as_str()) } else { attribute("image") };
                let also = if is(Kind::Image) { attribute("name") } else { None };
                [of, also].into_iter().flatten().any(|name| name == wanted || untagged(name) == wanted)
            });
        filters.exact("type", self.kind.as_str())
            && filters.exact("scope", "local")
            && (action.is_empty()
                || action.iter().any(|wanted| {
                    *wanted == self.action
                        || self.action.strip_prefix(wanted.as_str()).is_some_and(|rest| rest.starts_with(':'))
                }))
            && named("container", Kind::Container)
            && named("volume", Kind::Volume)
            && named("network", Kind::Network)
            && named("daemon", Kind::Daemon)
            && image
            && filters.labels("label", attribute)
    }
}

/// `repository:tag` without its tag.
fn untagged(name: &str) -> &str {
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => name,
    }
}

/// Keys that `GET /events` knows.
const KNOWN: &[&str] = &[
    "config",
    "container",
    "daemon",
    "event",
    "image",
    "label",
    "network",
    "node",
    "plugin",
    "scope",
    "secret",
    "service",
    "type",
    "volume",
];

/// The engine's event bus.
#[derive(Debug)]
pub struct Events {
    ring: Mutex<VecDeque<Event>>,
    live: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self { ring: Mutex::new(VecDeque::with_capacity(RING)), live: broadcast::channel(LIVE).0 }
    }
}

impl Events {
    /// Records an event and tells every listener.
    pub fn publish(
        &self,
        kind: Kind,
        action: impl Into<String>,
        id: impl Into<String>,
        attributes: BTreeMap<String, String>,
    ) {
        self.publish_of(None, kind, action, id, attributes);
    }

    /// The same of a project's object.
    pub fn publish_of(
        &self,
        project: Option<String>,
        kind: Kind,
        action: impl Into<String>,
        id: impl Into<String>,
        attributes: BTreeMap<String, String>,
    ) {
        let mut ring = lock(&self.ring);
        let event =
            Event { kind, action: action.into(), id: id.into(), attributes, time: Timestamp::now(), project };
        if ring.len() == RING {
            ring.pop_front();
        }
        ring.push_back(event.clone());
        // Sent under the lock so that replay followed by live neither repeats nor skips. No listener is no failure.
        drop(self.live.send(event));
    }

    /// Past events since `since` (none when it is `None`), then live ones up to `until`.
    pub fn subscribe(
        &self,
        since: Option<Timestamp>,
        until: Option<Timestamp>,
        filters: Filters,
    ) -> Result<Subscription> {
        filters.only(KNOWN)?;
        if let (Some(since), Some(until)) = (since, until)
            && since > until
        {
            return Err(Error::invalid("`since` time cannot be after `until` time"));
        }
        let ring = lock(&self.ring);
        let live = self.live.subscribe();
        let replay = match since {
            Some(since) => ring
                .iter()
                .filter(|e| e.time >= since && until.is_none_or(|until| e.time <= until))
                .cloned()
                .collect(),
            // Only `until`: Docker replays nothing, but a past `until` ends at once.
            None => VecDeque::new(),
        };
        Ok(Subscription { replay, live, until, filters, project: None })
    }
}

/// One listener's view of the bus.
#[derive(Debug)]
pub struct Subscription {
    replay: VecDeque<Event>,
    live: broadcast::Receiver<Event>,
    until: Option<Timestamp>,
    filters: Filters,
    project: Option<String>,
}

impl Subscription {
    /// Only events of one project's objects.
    #[must_use]
    pub fn within(mut self, project: String) -> Self {
        self.project = Some(project);
        self
    }

    fn wants(&self, event: &Event) -> bool {
        (self.project.is_none() || event.project == self.project) && event.wanted(&self.filters)
    }

    /// The next wanted event; `None` when `until` has passed or the engine is gone.
    pub async fn next(&mut self) -> Option<Event> {
        while let Some(event) = self.replay.pop_front() {
            if self.wants(&event) {
                return Some(event);
            }
        }
        loop {
            let received = match self.until {
                None => self.live.recv().await,
                Some(until) => {
                    let left = std::time::Duration::try_from(until.duration_since(Timestamp::now()))
                        .unwrap_or_default();
                    match tokio::time::timeout(left, self.live.recv()).await {
                        Ok(received) => received,
                        Err(_elapsed) => return None,
                    }
                }
            };
            match received {
                Ok(event) if self.wants(&event) => return Some(event),
                Ok(_unwanted) => {}
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    tracing::warn!(missed, "an event listener was too slow and missed events");
                }
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn filters(pairs: &[(&str, &str)]) -> Filters {
        let mut out = Filters::none();
        for (k, v) in pairs {
            out.0.entry((*k).to_owned()).or_default().push((*v).to_owned());
        }
        out
    }

    #[tokio::test]
    async fn replays_the_ring_then_goes_live() {
        let events = Events::default();
        for n in 0..300 {
            events.publish(Kind::Container, format!("a{n}"), "c1", BTreeMap::new());
        }
        let mut all = events.subscribe(Some(Timestamp::UNIX_EPOCH), None, Filters::none()).unwrap();
        assert_eq!(all.next().await.unwrap().action, "a44");
        for _ in 45..300 {
            all.next().await.unwrap();
        }
        events.publish(Kind::Container, "live", "c1", BTreeMap::new());
        assert_eq!(all.next().await.unwrap().action, "live");
    }

    #[tokio::test]
    async fn ends_when_until_has_passed() {
        let events = Events::default();
        let mut past = events.subscribe(None, Some(Timestamp::UNIX_EPOCH), Filters::none()).unwrap();
        assert!(past.next().await.is_none());
    }

    #[test]
    fn filters_know_dockers_rules() {
        let event = Event {
            kind: Kind::Container,
            action: "health_status: healthy".into(),
            id: "abcdef0123".into(),
            attributes: attributes(&[("image", "debian:bookworm"), ("name", "web"), ("tier", "front")]),
            time: Timestamp::now(),
            project: None,
        };
        for wanted in [
            ("event", "health_status"),
            ("container", "web"),
            ("container", "abcdef"),
            ("image", "debian"),
            ("image", "debian:bookworm"),
            ("label", "tier=front"),
            ("type", "container"),
        ] {
            assert!(event.wanted(&filters(&[wanted])), "{wanted:?}");
        }
        for unwanted in [
            ("event", "health"),
            ("container", "we"),
            ("volume", "web"),
            ("label", "tier=back"),
            ("type", "image"),
        ] {
            assert!(!event.wanted(&filters(&[unwanted])), "{unwanted:?}");
        }
        let json = event.to_json();
        assert_eq!(json["status"], "health_status: healthy");
        assert_eq!(json["from"], "debian:bookworm");
    }
}
