//! Which images a list or a prune is about: filters, names as patterns, points in time.

use brigantine_image::{Image, Reference, Store};

use super::timestamp;
use crate::http::{Error, Filters};

/// Which images a list or prune is about.
pub(super) struct Selection {
    filters: Filters,
    references: Vec<String>,
    dangling: Option<bool>,
    before: Vec<jiff::Timestamp>,
    since: Vec<jiff::Timestamp>,
}

impl Selection {
    pub fn new(
        store: &Store,
        filters: &Filters,
        name: Option<&str>,
    ) -> Result<Self, brigantine_image::Error> {
        let invalid = |error: Error| brigantine_image::Error::Invalid(error.message);
        let created = |name: &str| {
            store
                .resolve(name)
                .map(|image| timestamp(image.created.as_deref()).unwrap_or(jiff::Timestamp::UNIX_EPOCH))
        };
        let mut before = filters.get("before").map(created).collect::<Result<Vec<_>, _>>()?;
        for until in filters.get("until") {
            before.push(moment(until).map_err(invalid)?);
        }
        Ok(Self {
            references: filters.get("reference").chain(name).map(str::to_owned).collect(),
            dangling: filters.flag("dangling").map_err(invalid)?,
            before,
            since: filters.get("since").map(created).collect::<Result<Vec<_>, _>>()?,
            filters: filters.clone(),
        })
    }

    /// Whether the image is wanted; names that no `reference` pattern matches are taken from it.
    pub fn takes(&self, image: &mut Image) -> bool {
        if self.dangling.is_some_and(|dangling| dangling != image.tags.is_empty()) {
            return false;
        }
        let created = timestamp(image.created.as_deref()).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        if self.before.iter().any(|before| created >= *before)
            || self.since.iter().any(|since| created <= *since)
        {
            return false;
        }
        let labels = &image.config.config.labels;
        if !self.filters.match_labels(|key| labels.get(key).map(String::as_str)) {
            return false;
        }
        if !self.references.is_empty() {
            let matches =
                |name: &Reference| self.references.iter().any(|pattern| reference_matches(pattern, name));
            image.tags.retain(|name| matches(name));
            image.digests.retain(|name| matches(name));
            return !image.tags.is_empty() || !image.digests.is_empty();
        }
        true
    }
}

/// Whether a `reference` filter (a glob over the familiar name, with or without tag) matches.
fn reference_matches(pattern: &str, name: &Reference) -> bool {
    let names = [name.familiar(), name.familiar_name(), name.to_string(), name.repository()];
    // A name with dots is shown with its `library/`, and may be asked for without it.
    let short = names.iter().filter_map(|text| text.strip_prefix("library/"));
    names.iter().map(String::as_str).chain(short).any(|text| glob(pattern.as_bytes(), text.as_bytes()))
}

/// Shell patterns as Go's path.Match: `*` and `?` stop at a slash, `[a-z]` is a class, `\` quotes.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => {
            let reach = text.iter().position(|c| *c == b'/').unwrap_or(text.len());
            (0..=reach).any(|skip| glob(rest, &text[skip..]))
        }
        Some((b'?', rest)) => text.first().is_some_and(|c| *c != b'/') && glob(rest, &text[1..]),
        Some((b'[', class)) => {
            let (Some(end), Some(c)) = (class.iter().skip(1).position(|c| *c == b']'), text.first()) else {
                return false;
            };
            let (class, rest) = (&class[..=end], &class[end + 2..]);
            let (negated, class) = class.strip_prefix(b"^").map_or((false, class), |class| (true, class));
            let mut found = false;
            let mut at = 0;
            while at < class.len() {
                if at + 2 < class.len() && class[at + 1] == b'-' {
                    found |= (class[at]..=class[at + 2]).contains(c);
                    at += 3;
                } else {
                    found |= class[at] == *c;
                    at += 1;
                }
            }
            found != negated && glob(rest, &text[1..])
        }
        Some((b'\\', rest)) if !rest.is_empty() => {
            text.first() == rest.first() && glob(&rest[1..], &text[1..])
        }
        Some((c, rest)) => text.first() == Some(c) && glob(rest, &text[1..]),
    }
}

/// A point in time as filters give it: RFC 3339, a date, Unix seconds, or a duration before now (`10m`, `1h30m`).
pub(super) fn moment(text: &str) -> Result<jiff::Timestamp, Error> {
    let wrong = || Error::invalid(format!("invalid value for until: {text:?} is not a time or a duration"));
    if let Ok(seconds) = text.parse::<f64>() {
        return jiff::Timestamp::from_nanosecond((seconds * 1e9) as i128).map_err(|_error| wrong());
    }
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(time);
    }
    if let Some(ago) = brigantine_engine::go_duration(text) {
        let ago = jiff::SignedDuration::try_from(ago).map_err(|_error| wrong())?;
        return jiff::Timestamp::now().checked_sub(ago).map_err(|_error| wrong());
    }
    if let Ok(time) = text.parse::<jiff::civil::DateTime>() {
        return time
            .to_zoned(jiff::tz::TimeZone::system())
            .map(|zoned| zoned.timestamp())
            .map_err(|_error| wrong());
    }
    let date: jiff::civil::Date = text.parse().map_err(|_error| wrong())?;
    date.to_zoned(jiff::tz::TimeZone::system()).map(|zoned| zoned.timestamp()).map_err(|_error| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_names_with_and_without_tag() {
        let name = Reference::parse("debian:bookworm").unwrap();
        for pattern in
            ["debian", "deb*", "debian:*", "debian:book*", "d?bian", "[a-e]ebian", "[^x]ebian:bookworm"]
        {
            assert!(reference_matches(pattern, &name), "{pattern}");
        }
        for pattern in ["ubuntu", "deb", "debian:bull*", "[x-z]ebian", "*:sid", "[", "debian\\"] {
            assert!(!reference_matches(pattern, &name), "{pattern}");
        }
        let deep = Reference::parse("localhost:5000/a/b:t").unwrap();
        assert!(reference_matches("localhost:5000/*/b", &deep));
        assert!(!reference_matches("localhost:5000/*", &deep));
    }

    #[test]
    fn moments_take_every_form() {
        assert_eq!(moment("1700000000").unwrap().as_second(), 1_700_000_000);
        assert_eq!(moment("2024-01-01T00:00:00Z").unwrap().as_second(), 1_704_067_200);
        let ago = moment("1h30m").unwrap();
        let age = jiff::Timestamp::now().as_second() - ago.as_second();
        assert!((5399..=5401).contains(&age), "{age}");
        moment("2024-01-01").unwrap();
        moment("2024-01-01T10:00:00").unwrap();
        for bad in ["", "yesterday", "1x", "h"] {
            assert!(moment(bad).is_err(), "{bad}");
        }
    }
}
