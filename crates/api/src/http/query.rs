//! A request's query parameters, read by docker's rules.
//!
//! Invariant: an absent parameter and an empty one mean the same, except where [`Query::has`] is asked.

use super::Error;

/// Decoded query parameters in the order they were sent.
#[derive(Debug, Clone, Default)]
pub struct Query {
    pairs: Vec<(String, String)>,
}

impl Query {
    pub fn parse(raw: &str) -> Self {
        let pairs = url::form_urlencoded::parse(raw.as_bytes())
            .map(|(key, value)| (key.into_owned(), value.into_owned()))
            .collect();
        Self { pairs }
    }

    /// Whether the parameter was sent at all.
    pub fn has(&self, key: &str) -> bool {
        self.pairs.iter().any(|(k, _)| k == key)
    }

    /// The first value, empty or not.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    /// The first value unless it is empty.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key).filter(|value| !value.is_empty())
    }

    /// Every value of a repeated parameter.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        self.pairs.iter().filter(move |(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    /// docker's booleans: empty, `0`, `no`, `false` and `none` are false, everything else is true.
    pub fn flag(&self, key: &str) -> bool {
        self.get(key).is_some_and(truth)
    }

    /// As [`Query::flag`], with another value for a parameter that was not sent.
    pub fn flag_or(&self, key: &str, default: bool) -> bool {
        self.get(key).map_or(default, truth)
    }

    /// A whole number; `None` when absent or empty, an error naming the parameter when it is not one.
    pub fn int(&self, key: &str) -> Result<Option<i64>, Error> {
        match self.text(key) {
            None => Ok(None),
            Some(value) => value.trim().parse().map(Some).map_err(|_error: std::num::ParseIntError| {
                Error::invalid(format!("invalid value for {key}: {value:?} is not a whole number"))
            }),
        }
    }

    /// As [`Query::int`], refusing negative numbers.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, Error> {
        match self.int(key)? {
            None => Ok(None),
            Some(value) => u64::try_from(value).map(Some).map_err(|_negative| {
                Error::invalid(format!("invalid value for {key}: {value} must not be negative"))
            }),
        }
    }
}

fn truth(value: &str) -> bool {
    !matches!(value.trim().to_ascii_lowercase().as_str(), "" | "0" | "no" | "false" | "none")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn booleans_follow_docker() {
        let query = Query::parse("a=1&b=0&c=False&d=%20none%20&e=&f=yes&g");
        assert!(query.flag("a") && query.flag("f"));
        for key in ["b", "c", "d", "e", "g", "absent"] {
            assert!(!query.flag(key), "{key}");
        }
        assert!(query.flag_or("absent", true));
        assert!(!query.flag_or("e", true));
    }

    #[test]
    fn numbers_name_their_parameter() {
        let query = Query::parse("h=24&w=abc&t=-1&names=a&names=b%2Fc");
        assert_eq!(query.int("h"), Ok(Some(24)));
        assert!(query.int("w").unwrap_err().message.contains("invalid value for w"));
        assert_eq!(query.int("t"), Ok(Some(-1)));
        assert!(query.unsigned("t").is_err());
        assert_eq!(query.all("names").collect::<Vec<_>>(), ["a", "b/c"]);
    }
}
