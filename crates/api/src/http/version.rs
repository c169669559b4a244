//! API versions: which ones this engine speaks and how a request chooses one.
//!
//! Invariant: a handler only ever sees a version between [`ApiVersion::MIN`] and [`ApiVersion::MAX`].

use std::fmt;

use super::Error;

/// A version of the Engine API such as `1.44`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ApiVersion {
    pub major: u16,
    pub minor: u16,
}

impl ApiVersion {
    pub const MIN: Self = Self::v1(24);
    pub const MAX: Self = Self::v1(53);

    /// The version `1.minor`.
    pub const fn v1(minor: u16) -> Self {
        Self { major: 1, minor }
    }

    /// Parses `1.44`; `None` when it is not two (or, as docker tolerates, more) dotted numbers.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let major = number(parts.next()?)?;
        let minor = match parts.next() {
            Some(part) => number(part)?,
            None => 0,
        };
        for rest in parts {
            number(rest)?;
        }
        Some(Self { major, minor })
    }

    /// Refuses a version outside what this engine speaks, in docker's words.
    pub fn check(self) -> Result<Self, Error> {
        if self > Self::MAX {
            return Err(Error::invalid(format!(
                "client version {self} is too new. Maximum supported API version is {}",
                Self::MAX
            )));
        }
        if self < Self::MIN {
            return Err(Error::invalid(format!(
                "client version {self} is too old. Minimum supported API version is {}, please upgrade your client to a newer version",
                Self::MIN
            )));
        }
        Ok(self)
    }
}

fn number(text: &str) -> Option<u16> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

impl fmt::Display for ApiVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Splits `/v1.44/containers/json` into the version and `/containers/json`; a path without version is left whole.
///
/// Anything after `/v` that is not digits and dots is an ordinary path (`/volumes`).
pub(crate) fn split_path(path: &str) -> (Option<&str>, &str) {
    let Some(rest) = path.strip_prefix("/v") else {
        return (None, path);
    };
    let end = rest.find('/').unwrap_or(rest.len());
    let (version, tail) = rest.split_at(end);
    if version.is_empty() || tail.is_empty() || !version.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return (None, path);
    }
    (Some(version), tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_split_from_the_path() {
        assert_eq!(split_path("/v1.44/info"), (Some("1.44"), "/info"));
        assert_eq!(split_path("/volumes"), (None, "/volumes"));
        assert_eq!(split_path("/v1.44"), (None, "/v1.44"));
        assert_eq!(split_path("/_ping"), (None, "/_ping"));
    }

    #[test]
    fn versions_out_of_range_are_refused_in_dockers_words() {
        let new = ApiVersion::parse("1.99").unwrap().check().unwrap_err();
        assert_eq!(new.message, "client version 1.99 is too new. Maximum supported API version is 1.53");
        let old = ApiVersion::parse("1.10").unwrap().check().unwrap_err();
        assert!(
            old.message.starts_with("client version 1.10 is too old. Minimum supported API version is 1.24")
        );
        assert!(ApiVersion::parse("1.x").is_none());
        assert!(ApiVersion::parse("99999999.1").is_none());
    }
}
