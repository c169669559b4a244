//! Platforms and the choice of the best one a multi-platform image offers.
//!
//! Normalised here once: `x86_64` → `amd64`, `aarch64`/`arm64/v8` → `arm64`, `arm` without a variant → `arm/v7`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Operating system, architecture and its variant, as manifests name them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(rename = "os.version", default, skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    #[serde(rename = "os.features", default, skip_serializing_if = "Option::is_none")]
    pub os_features: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// Why a text is not a platform.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
#[error("{text:?} is not a platform: expected os[/arch[/variant]], such as linux/amd64 or linux/arm/v7")]
pub struct PlatformError {
    text: String,
}

impl Platform {
    /// `os` and `architecture` with no variant.
    pub fn new(os: &str, architecture: &str) -> Self {
        Self { os: os.to_owned(), architecture: architecture.to_owned(), ..Self::default() }.normalised()
    }

    /// What this machine runs.
    pub fn host() -> Self {
        Self::new("linux", std::env::consts::ARCH)
    }

    /// The same platform under its usual names.
    pub fn normalised(mut self) -> Self {
        self.os = match self.os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let architecture = self.architecture.to_ascii_lowercase();
        let variant = self.variant.take().map(|v| v.to_ascii_lowercase()).filter(|v| !v.is_empty());
        let (architecture, variant) = match (architecture.as_str(), variant.as_deref()) {
            ("x86_64" | "x86-64" | "amd64", variant) => ("amd64".to_owned(), variant.filter(|v| *v != "v1")),
            ("i386" | "i686" | "x86", _) => ("386".to_owned(), None),
            ("aarch64" | "arm64", variant) => {
                ("arm64".to_owned(), variant.filter(|v| !matches!(*v, "8" | "v8" | "v8.0")))
            }
            ("armhf", _) => ("arm".to_owned(), Some("v7")),
            ("armel", _) => ("arm".to_owned(), Some("v6")),
            ("arm", None | Some("7")) => ("arm".to_owned(), Some("v7")),
            ("arm", Some("5")) => ("arm".to_owned(), Some("v5")),
            ("arm", Some("6")) => ("arm".to_owned(), Some("v6")),
            ("arm", Some("8")) => ("arm".to_owned(), Some("v8")),
            (_, variant) => (architecture.clone(), variant),
        };
        self.variant = variant.map(str::to_owned);
        self.architecture = architecture;
        self
    }

    /// How well an image for `offered` runs where `self` is wanted: higher is better, `None` is not at all.
    /// A machine runs lower variants of its own architecture (arm v7 runs v6 and v5, amd64 v3 runs v2 and v1).
    pub fn rank(&self, offered: &Self) -> Option<u32> {
        let want = self.clone().normalised();
        let have = offered.clone().normalised();
        if have.os != want.os {
            return None;
        }
        if want.architecture == "arm64" && have.architecture == "arm" && want.variant.is_none() {
            // An arm64 machine usually runs 32-bit arm too, but only when nothing better is offered.
            return Some(level(have.variant.as_deref()));
        }
        if have.architecture != want.architecture {
            return None;
        }
        let (want_level, have_level) = (level(want.variant.as_deref()), level(have.variant.as_deref()));
        match (&want.variant, &have.variant) {
            (a, b) if a == b => Some(1000),
            _ if have_level <= want_level => Some(100 + have_level),
            _ => None,
        }
    }

    /// Whether an image for `offered` runs where `self` is wanted.
    pub fn accepts(&self, offered: &Self) -> bool {
        self.rank(offered).is_some()
    }

    /// The position of the best match among `offered`; the first wins among equals.
    pub fn choose<'a>(&self, offered: impl IntoIterator<Item = &'a Self>) -> Option<usize> {
        let mut best: Option<(u32, usize)> = None;
        for (position, platform) in offered.into_iter().enumerate() {
            if let Some(rank) = self.rank(platform)
                && best.is_none_or(|(top, _)| rank > top)
            {
                best = Some((rank, position));
            }
        }
        best.map(|(_, position)| position)
    }
}

/// Several platforms, for a message.
pub(crate) fn listed(platforms: &[Platform]) -> String {
    platforms.iter().map(Platform::to_string).collect::<Vec<_>>().join(", ")
}

/// `v7` → 7; a baseline without a variant is 0.
fn level(variant: Option<&str>) -> u32 {
    let Some(variant) = variant else { return 0 };
    let digits = variant.trim_start_matches('v');
    let (major, minor) = digits.split_once('.').unwrap_or((digits, "0"));
    let number = |text: &str| text.parse::<u32>().unwrap_or(0).min(100);
    number(major) * 8 + number(minor).min(7)
}

impl FromStr for Platform {
    type Err = PlatformError;

    /// `linux`, `amd64`, `linux/amd64`, `linux/arm/v7`.
    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let error = || PlatformError { text: text.to_owned() };
        let parts: Vec<&str> = text.split('/').collect();
        let valid = |part: &&str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
        };
        if !parts.iter().all(valid) {
            return Err(error());
        }
        let host = Self::host();
        let platform = match parts[..] {
            [one]
                if matches!(
                    one.to_ascii_lowercase().as_str(),
                    "linux" | "windows" | "darwin" | "freebsd"
                ) =>
            {
                Self { os: one.to_owned(), ..host }
            }
            [one] => Self { os: host.os, architecture: one.to_owned(), ..Self::default() },
            [os, architecture] => Self::new(os, architecture),
            [os, architecture, variant] => Self {
                os: os.to_owned(),
                architecture: architecture.to_owned(),
                variant: Some(variant.to_owned()),
                ..Self::default()
            },
            _ => return Err(error()),
        };
        Ok(platform.normalised())
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn normalises_usual_names() {
        assert_eq!(platform("linux/x86_64").to_string(), "linux/amd64");
        assert_eq!(platform("linux/aarch64").to_string(), "linux/arm64");
        assert_eq!(platform("linux/arm64/v8").to_string(), "linux/arm64");
        assert_eq!(platform("linux/arm").to_string(), "linux/arm/v7");
        assert_eq!(platform("arm64").to_string(), "linux/arm64");
        for bad in ["", "/", "linux/", "a/b/c/d", "linux/amd 64"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }

    #[test]
    fn chooses_the_best_variant() {
        let offered =
            ["linux/arm/v5", "linux/arm/v7", "linux/arm/v6", "linux/amd64", "windows/amd64"].map(platform);
        let choose = |want: &str| platform(want).choose(&offered);
        assert_eq!(choose("linux/arm/v7"), Some(1));
        assert_eq!(choose("linux/arm/v6"), Some(2));
        assert_eq!(choose("linux/arm/v8"), Some(1));
        assert_eq!(choose("linux/amd64"), Some(3));
        assert_eq!(choose("linux/amd64/v3"), Some(3));
        assert_eq!(choose("linux/s390x"), None);
        assert_eq!(platform("linux/amd64").choose(&[platform("linux/amd64/v3")]), None);
        assert_eq!(platform("linux/arm64").choose(&offered), Some(1));
    }
}
