//! The `filters` parameter of lists, prunes and events.
//!
//! Invariant: keys are checked against what the endpoint knows before any is used, so that a misspelt filter never
//! silently matches everything.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::Error;

/// Parsed filters: values of one key are alternatives (labels: all must match), keys must all match.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filters {
    map: BTreeMap<String, BTreeSet<String>>,
}

impl Filters {
    /// Parses both wire forms, `{"label":{"a=b":true}}` and `{"label":["a=b"]}`; absent or empty is no filter.
    pub fn parse(text: Option<&str>) -> Result<Self, Error> {
        let Some(text) = text.map(str::trim).filter(|text| !text.is_empty()) else {
            return Ok(Self::default());
        };
        let malformed = |why: String| Error::invalid(format!("invalid filter: {why}"));
        let value: Value = serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?;
        let object = match value {
            Value::Null => return Ok(Self::default()),
            Value::Object(object) => object,
            _ => return Err(malformed("the filters are not a JSON object".to_owned())),
        };
        let mut map = BTreeMap::new();
        for (key, values) in object {
            let mut set = BTreeSet::new();
            match values {
                Value::Null => {}
                Value::Array(items) => {
                    for item in items {
                        set.insert(
                            scalar(&item)
                                .ok_or_else(|| malformed(format!("{key}: {item} is not a string")))?,
                        );
                    }
                }
                Value::Object(items) => {
                    for (item, on) in items {
                        match on {
                            // What is switched off still counts as named: docker's clients look at the names only.
                            Value::Bool(_) | Value::Null => {
                                set.insert(item);
                            }
                            _ => return Err(malformed(format!("{key}: {item} is not true or false"))),
                        }
                    }
                }
                other => match scalar(&other) {
                    Some(item) => {
                        set.insert(item);
                    }
                    None => return Err(malformed(format!("{key} has no list of values"))),
                },
            }
            if !set.is_empty() {
                map.insert(key, set);
            }
        }
        Ok(Self { map })
    }

    /// Refuses keys the endpoint does not know.
    pub fn allow(self, keys: &[&str]) -> Result<Self, Error> {
        match self.map.keys().find(|key| !keys.contains(&key.as_str())) {
            Some(key) => Err(Error::invalid(format!("invalid filter '{key}'"))),
            None => Ok(self),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The values given for a key.
    pub fn get<'a>(&'a self, key: &str) -> impl Iterator<Item = &'a str> + 'a {
        self.map.get(key).into_iter().flatten().map(String::as_str)
    }

    /// Keys and their values, as the engine's own filter types want them.
    pub fn into_map(self) -> BTreeMap<String, Vec<String>> {
        self.map.into_iter().map(|(key, values)| (key, values.into_iter().collect())).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &BTreeSet<String>)> {
        self.map.iter().map(|(key, values)| (key.as_str(), values))
    }

    /// Whether `value` is among the key's values, or the key was not given.
    pub fn matches(&self, key: &str, value: &str) -> bool {
        self.map.get(key).is_none_or(|values| values.contains(value))
    }

    /// A boolean filter such as `dangling`: `true`/`1` or `false`/`0`; both at once or anything else is refused.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        let Some(values) = self.map.get(key) else { return Ok(None) };
        let bad = || {
            let shown = values.iter().map(String::as_str).collect::<Vec<_>>().join(" ");
            Error::invalid(format!("invalid filter '{key}=[{shown}]'"))
        };
        let truth = |value: &String| match value.as_str() {
            "true" | "1" | "True" | "TRUE" | "t" | "T" => Some(true),
            "false" | "0" | "False" | "FALSE" | "f" | "F" => Some(false),
            _ => None,
        };
        let mut decided = None;
        for value in values {
            let value = truth(value).ok_or_else(bad)?;
            if decided.is_some_and(|before| before != value) {
                return Err(bad());
            }
            decided = Some(value);
        }
        Ok(decided)
    }

    /// Whether every `label` filter (`key` or `key=value`) holds and no `label!` filter does.
    pub fn match_labels<'l>(&self, label: impl Fn(&str) -> Option<&'l str>) -> bool {
        let holds = |filter: &str| match filter.split_once('=') {
            Some((key, value)) => label(key) == Some(value),
            None => label(filter).is_some(),
        };
        self.get("label").all(holds) && (!self.has("label!") || !self.get("label!").any(holds))
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(on) => Some(on.to_string()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_mean_the_same() {
        let map =
            Filters::parse(Some(r#"{"label":{"a=b":true,"c":true},"status":{"exited":true}}"#)).unwrap();
        let list = Filters::parse(Some(r#"{"label":["a=b","c"],"status":["exited"]}"#)).unwrap();
        assert_eq!(map, list);
        assert_eq!(map.get("label").collect::<Vec<_>>(), ["a=b", "c"]);
        assert!(Filters::parse(Some("")).unwrap().is_empty());
        assert!(Filters::parse(None).unwrap().is_empty());
        assert!(Filters::parse(Some("null")).unwrap().is_empty());
        assert!(Filters::parse(Some("{}")).unwrap().is_empty());
    }

    #[test]
    fn a_wrong_key_or_form_is_refused() {
        let filters = Filters::parse(Some(r#"{"colour":["red"]}"#)).unwrap();
        assert_eq!(filters.allow(&["label"]).unwrap_err().message, "invalid filter 'colour'");
        for bad in ["{", "[]", "3", r#"{"a":{"b":3}}"#, r#"{"a":[[]]}"#] {
            let error = Filters::parse(Some(bad)).unwrap_err();
            assert!(error.message.starts_with("invalid filter"), "{bad}: {}", error.message);
        }
    }

    #[test]
    fn booleans_take_both_forms() {
        let on = |text: &str| Filters::parse(Some(text)).unwrap().flag("dangling");
        assert_eq!(on(r#"{"dangling":{"false":true}}"#), Ok(Some(false)));
        assert_eq!(on(r#"{"dangling":["1"]}"#), Ok(Some(true)));
        assert_eq!(on(r#"{"dangling":[true]}"#), Ok(Some(true)));
        assert_eq!(on("{}"), Ok(None));
        assert_eq!(on(r#"{"dangling":["foo"]}"#).unwrap_err().message, "invalid filter 'dangling=[foo]'");
        assert!(on(r#"{"dangling":["true","false"]}"#).is_err());
    }

    #[test]
    fn labels_must_all_hold() {
        let filters = Filters::parse(Some(r#"{"label":["a=b","c"],"label!":["d"]}"#)).unwrap();
        let with = |labels: &'static [(&str, &str)]| {
            filters.match_labels(|key| labels.iter().find(|(k, _)| *k == key).map(|(_, v)| *v))
        };
        assert!(with(&[("a", "b"), ("c", "")]));
        assert!(!with(&[("a", "b")]));
        assert!(!with(&[("a", "x"), ("c", "")]));
        assert!(!with(&[("a", "b"), ("c", ""), ("d", "1")]));
    }
}
