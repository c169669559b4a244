//! The form of a cache on the wire: BuildKit's (`cache/remotecache/v1` of moby/buildkit), so that its tools can read
//! what we write, and we what it writes.
//!
//! What leads to a result is not the same for two builders: a record of ours says in a field of its own under which of
//! our keys it is found. Records without it are another builder's, and of no use here.
//!
//! Invariant: what is read is bounded in number and size before it is kept; `inputs` and `parent`, which could lead in
//! circles, are written but never followed.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// Media type of the document that lists layers and records.
pub(crate) const CONFIG: &str = "application/vnd.buildkit.cacheconfig.v0";
/// A layer's digest before it was compressed, as containerd notes it.
pub(crate) const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// When a layer was made, as BuildKit notes it.
pub(crate) const CREATED_AT: &str = "buildkit/createdat";
/// The version of our keys: those of another are not found here anyway.
pub(crate) const VERSION: u32 = 1;

/// The most records or layers of one cache.
const MOST: usize = 100_000;
/// The most keys, and results, of one record.
const MOST_KEYS: usize = 32;

/// What a cache holds.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Config {
    #[serde(default, deserialize_with = "bounded::<_, _, MOST>")]
    pub layers: Vec<Layer>,
    #[serde(default, deserialize_with = "bounded::<_, _, MOST>")]
    pub records: Vec<Record>,
}

/// A layer with the one below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layer {
    pub blob: String,
    /// Its place in the list; -1 is none.
    pub parent: i64,
}

/// A result, and what leads to it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub digest: String,
    /// The result's top layer.
    #[serde(
        rename = "layers",
        default,
        deserialize_with = "bounded::<_, _, MOST_KEYS>",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub results: Vec<Top>,
    /// Ours.
    #[serde(rename = "brigantine", default, skip_serializing_if = "Option::is_none")]
    pub own: Option<Own>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Top {
    pub layer: i64,
    /// RFC 3339.
    #[serde(rename = "createdAt", default)]
    pub created: String,
}

/// What only we understand of a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Own {
    pub version: u32,
    /// Of the machine that ran the step.
    pub architecture: String,
    #[serde(deserialize_with = "bounded::<_, _, MOST_KEYS>")]
    pub keys: Vec<String>,
    /// The step changed no file: the layer is that of the one below it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub empty: bool,
}

impl Config {
    /// Reads a cache of a registry or folder.
    pub fn parse(raw: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(raw)
    }

    /// Reads the records of an image's configuration.
    pub fn parse_inline(raw: &[u8]) -> Result<Vec<Record>, serde_json::Error> {
        #[derive(Deserialize)]
        #[serde(transparent)]
        struct Inline(#[serde(deserialize_with = "bounded::<_, _, MOST>")] Vec<Record>);
        serde_json::from_slice::<Inline>(raw).map(|inline| inline.0)
    }
}

/// A list of at most so many; `null` is none.
fn bounded<'de, D: Deserializer<'de>, T: Deserialize<'de>, const N: usize>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    struct Bounded<T, const N: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Bounded<T, N> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {N}")
        }

        fn visit_unit<E: de::Error>(self) -> Result<Vec<T>, E> {
            Ok(Vec::new())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut all = Vec::new();
            while let Some(one) = seq.next_element()? {
                if all.len() == N {
                    return Err(de::Error::invalid_length(N + 1, &self));
                }
                all.push(one);
            }
            Ok(all)
        }
    }

    deserializer.deserialize_any(Bounded::<T, N>(PhantomData))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_buildkit_writes_is_read_and_what_would_not_end_is_refused() {
        // As its own exporter writes it; the records even lead in a circle.
        let raw = br#"{"layers":[{"blob":"sha256:aa","parent":-1},{"blob":"sha256:bb","parent":0}],"records":[
            {"digest":"sha256:cc","layers":[{"layer":1,"createdAt":"2024-01-02T03:04:05Z"}],"inputs":[[{"link":1}]]},
            {"digest":"sha256:dd","chains":[{"layers":[0,1]}],"inputs":[[{"link":0,"selector":"x"}]]},
            {"layers":null}]}"#;
        let config = Config::parse(raw).unwrap();
        assert_eq!((config.layers.len(), config.records.len()), (2, 3));
        assert_eq!(config.records[0].results[0].layer, 1);
        assert!(config.records.iter().all(|record| record.own.is_none()));
        assert_eq!(Config::parse(b"{}").unwrap(), Config::default());
        assert_eq!(Config::parse_inline(b"null").unwrap(), []);

        let many = |what: &str, count: usize| format!("[{}]", vec![what; count].join(","));
        let records = format!("{{\"records\":{}}}", many("{}", MOST + 1));
        let refused = Config::parse(records.as_bytes()).unwrap_err().to_string();
        assert!(refused.contains("a list of at most 100000"), "{refused}");
        assert!(Config::parse_inline(many("{}", MOST + 1).as_bytes()).is_err());
        assert!(Config::parse_inline(many("{}", 9).as_bytes()).is_ok());
        let own = format!(
            r#"[{{"brigantine":{{"version":1,"architecture":"x","keys":{}}}}}]"#,
            many("\"k\"", MOST_KEYS + 1)
        );
        assert!(Config::parse_inline(own.as_bytes()).is_err());
        let deep = format!("{{\"records\":[{{\"inputs\":{}{}}}]}}", "[".repeat(100_000), "]".repeat(100_000));
        // What is not needed is passed over, however deep it is.
        assert_eq!(Config::parse(deep.as_bytes()).unwrap().records.len(), 1);
        for bad in ["[1]", "{\"layers\":{}}", "{\"layers\":[1]}", "x", ""] {
            assert!(Config::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
