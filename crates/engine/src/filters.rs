//! The `filters` argument of the list, prune and event calls: keys AND together, the values of one key OR.

use std::collections::BTreeMap;

use regex::Regex;

use crate::{Error, Result};

/// Decoded filters: key to values, as the API parsed them from either of the two JSON forms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filters(pub BTreeMap<String, Vec<String>>);

impl Filters {
    /// No filter at all.
    pub fn none() -> Self {
        Self::default()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The values given for `key`; empty when it was not given.
    pub fn values(&self, key: &str) -> &[String] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }

    pub fn contains(&self, key: &str) -> bool {
        self.0.get(key).is_some_and(|values| !values.is_empty())
    }

    /// Refuses any key that is not one of `known`.
    pub fn only(&self, known: &[&str]) -> Result<()> {
        match self.0.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => Err(Error::invalid(format!("invalid filter '{key}'"))),
            None => Ok(()),
        }
    }

    /// True when `key` was not given or one of its values equals `value`.
    pub fn exact(&self, key: &str, value: &str) -> bool {
        !self.contains(key) || self.values(key).iter().any(|wanted| wanted == value)
    }

    /// True when `key` was not given, or a value of it equals `value`, is found in it as a regular expression, or is a
    /// substring.
    pub fn matches(&self, key: &str, value: &str) -> bool {
        !self.contains(key)
            || self.values(key).iter().any(|wanted| {
                wanted == value
                    || Regex::new(wanted)
                        .map_or_else(|_| value.contains(wanted.as_str()), |re| re.is_match(value))
            })
    }

    /// All given labels (`name` or `name=value`) must be present under `key`.
    pub fn labels<'a>(&self, key: &str, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.values(key).iter().all(|wanted| match wanted.split_once('=') {
            Some((name, value)) => label(name) == Some(value),
            None => label(wanted).is_some(),
        })
    }

    /// A boolean filter such as `dangling`; `None` when it was not given.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        let mut answer = None;
        for value in self.values(key) {
            let value = match value.to_ascii_lowercase().as_str() {
                "1" | "true" | "t" => true,
                "0" | "false" | "f" => false,
                other => return Err(Error::invalid(format!("invalid filter '{key}={other}'"))),
            };
            if answer.is_some_and(|earlier| earlier != value) {
                return Err(Error::invalid(format!("invalid filter '{key}': both true and false given")));
            }
            answer = Some(value);
        }
        Ok(answer)
    }

    /// One value or none; several are an error.
    pub fn single(&self, key: &str) -> Result<Option<&str>> {
        match self.values(key) {
            [] => Ok(None),
            [one] => Ok(Some(one)),
            _ => Err(Error::invalid(format!("more than one {key} filter specified"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(pairs: &[(&str, &[&str])]) -> Filters {
        Filters(
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), v.iter().map(|v| (*v).to_owned()).collect()))
                .collect(),
        )
    }

    #[test]
    fn unknown_keys_are_refused_by_name() {
        let error = filters(&[("colour", &["red"])]).only(&["label"]).unwrap_err();
        assert_eq!(error.to_string(), "invalid filter 'colour'");
    }

    #[test]
    fn labels_and_together_and_values_of_other_keys_or() {
        let f = filters(&[("label", &["a=1", "b"]), ("name", &["^web", "db$"])]);
        let labels = |name: &str| match name {
            "a" => Some("1"),
            "b" => Some(""),
            _ => None,
        };
        assert!(f.labels("label", labels));
        assert!(!f.labels("label", |name| (name == "a").then_some("1")));
        assert!(f.matches("name", "web-1"));
        assert!(f.matches("name", "my-db"));
        assert!(!f.matches("name", "cache"));
    }

    #[test]
    fn booleans_take_dockers_spellings() {
        assert_eq!(filters(&[("dangling", &["1"])]).boolean("dangling").unwrap(), Some(true));
        assert_eq!(filters(&[("dangling", &["false"])]).boolean("dangling").unwrap(), Some(false));
        assert!(filters(&[("dangling", &["maybe"])]).boolean("dangling").is_err());
    }
}
