//! A network's configuration: a list of plugins, each with what it is told.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::Error;

/// Versions of the specification that differ in what is asked of plugins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(u8, u8, u8);

impl Version {
    pub const V0_4_0: Self = Self(0, 4, 0);
    pub const V1_1_0: Self = Self(1, 1, 0);
}

const KNOWN: [(&str, Version); 5] = [
    ("0.3.0", Version(0, 3, 0)),
    ("0.3.1", Version(0, 3, 1)),
    ("0.4.0", Version::V0_4_0),
    ("1.0.0", Version(1, 0, 0)),
    ("1.1.0", Version::V1_1_0),
];

/// A checked configuration. Kept with a network's record, so that the network stays what it was made as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct NetworkList(Map<String, Value>);

impl TryFrom<Value> for NetworkList {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let Value::Object(mut fields) = value else { return Err("it is no JSON object".to_owned()) };
        if !fields.contains_key("plugins") && fields.contains_key("type") {
            // A lone plugin, as before version 1.0.
            let (name, version) =
                (fields.get("name").cloned(), fields.get("cniVersion").cloned().unwrap_or("0.3.1".into()));
            let plugin = Value::Object(fields);
            fields =
                Map::from_iter([("cniVersion".to_owned(), version), ("plugins".to_owned(), json!([plugin]))]);
            fields.extend(name.map(|name| ("name".to_owned(), name)));
        }
        let list = Self(fields);
        if !is_identifier(list.name()) {
            return Err(format!(
                "its name {:?} is none: letters, digits, '_', '.' and '-', beginning with a letter or digit",
                list.name()
            ));
        }
        if list.best_version().is_none() {
            let given =
                list.0.get("cniVersions").or_else(|| list.0.get("cniVersion")).unwrap_or(&Value::Null);
            return Err(format!("its version {given} is not known: 0.3.0, 0.3.1, 0.4.0, 1.0.0 or 1.1.0"));
        }
        let plugins = list.0.get("plugins").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        if plugins.is_empty() {
            return Err("it has no plugins".to_owned());
        }
        for plugin in plugins {
            match plugin["type"].as_str() {
                Some(kind) if is_identifier(kind) => {}
                _ => return Err(format!("{} is not the name of a plugin", plugin["type"])),
            }
        }
        Ok(list)
    }
}

impl From<NetworkList> for Value {
    fn from(list: NetworkList) -> Self {
        Self::Object(list.0)
    }
}

impl NetworkList {
    /// Reads a configuration; `place` is where it is from, for messages.
    pub fn parse(text: &str, place: &str) -> Result<Self, Error> {
        let wrong = |reason: String| Error::InvalidCni { place: place.to_owned(), reason };
        let value: Value = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        value.try_into().map_err(wrong)
    }

    /// The network's name among plugins.
    pub fn name(&self) -> &str {
        self.0.get("name").and_then(Value::as_str).unwrap_or_default()
    }

    /// Whether one of the plugins declares a capability.
    pub fn can(&self, capability: &str) -> bool {
        self.plugins().any(|(_, plugin)| plugin["capabilities"][capability] == true)
    }

    /// Those that the configuration offers and we know, the newest first.
    pub(crate) fn versions(&self) -> Vec<&'static str> {
        let several = self.0.get("cniVersions").and_then(Value::as_array).into_iter().flatten();
        let given: Vec<&str> = several.chain(self.0.get("cniVersion")).filter_map(Value::as_str).collect();
        KNOWN.into_iter().rev().map(|(name, _)| name).filter(|name| given.contains(name)).collect()
    }

    /// The same list, for this version alone.
    pub(crate) fn speaking(mut self, version: &str) -> Self {
        self.0.remove("cniVersions");
        self.0.insert("cniVersion".to_owned(), version.into());
        self
    }

    fn best_version(&self) -> Option<(&'static str, Version)> {
        let best = *self.versions().first()?;
        KNOWN.into_iter().find(|(name, _)| *name == best)
    }

    pub(crate) fn version(&self) -> Version {
        self.best_version().map_or(Version::V0_4_0, |(_, version)| version)
    }

    pub(crate) fn flag(&self, name: &str) -> bool {
        // As a text, too: plugins' documentation had it so.
        self.0.get(name).is_some_and(|flag| *flag == Value::Bool(true) || *flag == "true")
    }

    /// Each plugin's type and configuration.
    pub(crate) fn plugins(&self) -> impl DoubleEndedIterator<Item = (&str, &Value)> {
        let plugins = self.0.get("plugins").and_then(Value::as_array).into_iter().flatten();
        plugins.map(|plugin| (plugin["type"].as_str().unwrap_or_default(), plugin))
    }

    /// What a plugin reads: its own configuration, and what the specification adds to it.
    pub(crate) fn input(
        &self,
        plugin: &Value,
        capabilities: &Map<String, Value>,
        previous: Option<&Value>,
    ) -> Value {
        let mut input = plugin.clone();
        let declared = input.as_object_mut().and_then(|fields| fields.remove("capabilities"));
        let wanted: Map<String, Value> = capabilities
            .iter()
            .filter(|(name, _)| declared.as_ref().is_some_and(|declared| declared[name.as_str()] == true))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !wanted.is_empty() {
            input["runtimeConfig"] = Value::Object(wanted);
        }
        input["name"] = self.name().into();
        input["cniVersion"] = self.best_version().map_or("1.0.0", |(name, _)| name).into();
        if let Some(previous) = previous {
            input["prevResult"] = previous.clone();
        }
        input
    }
}

fn is_identifier(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.chars().all(|one| one.is_ascii_alphanumeric() || matches!(one, '_' | '.' | '-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(value: Value) -> Result<NetworkList, String> {
        value.try_into()
    }

    #[test]
    fn a_lone_plugin_is_a_list_of_one() {
        let lone =
            list(json!({ "cniVersion": "0.4.0", "name": "net", "type": "bridge", "mtu": 1400 })).unwrap();
        assert_eq!((lone.name(), lone.version()), ("net", Version::V0_4_0));
        let (kind, plugin) = lone.plugins().next().unwrap();
        assert_eq!((kind, &plugin["mtu"]), ("bridge", &json!(1400)));
    }

    #[test]
    fn what_is_no_configuration_is_refused_with_its_reason() {
        let plugins = json!([{ "type": "bridge" }]);
        for (bad, reason) in [
            (json!([]), "no JSON object"),
            (json!({ "cniVersion": "1.0.0", "plugins": plugins }), "name"),
            (json!({ "cniVersion": "1.0.0", "name": "../up", "plugins": plugins }), "../up"),
            (json!({ "cniVersion": "9.0.0", "name": "net", "plugins": plugins }), "9.0.0"),
            (json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [] }), "no plugins"),
            (json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [{ "type": "../sh" }] }), "../sh"),
            (json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [7] }), "null"),
        ] {
            let text = list(bad.clone()).unwrap_err();
            assert!(text.contains(reason), "{bad}: {text}");
        }
        let error = NetworkList::parse("{", "/etc/cni/net.d/x.conflist").unwrap_err().to_string();
        assert!(error.contains("/etc/cni/net.d/x.conflist") && error.contains("line 1"), "{error}");
    }

    #[test]
    fn the_newest_version_that_both_know_is_spoken() {
        let several = json!({ "cniVersion": "0.4.0", "cniVersions": ["0.4.0", "1.1.0", "7.0.0"], "name": "net",
            "plugins": [{ "type": "bridge" }] });
        let several = list(several).unwrap();
        assert_eq!(several.version(), Version::V1_1_0);
        assert_eq!(several.input(&json!({}), &Map::new(), None)["cniVersion"], "1.1.0");
        assert_eq!(several.versions(), ["1.1.0", "0.4.0"]);
        assert_eq!(several.speaking("0.4.0").version(), Version::V0_4_0, "and nothing newer afterwards");
    }

    #[test]
    fn a_plugin_is_told_what_it_declares_and_nothing_else() {
        let both = list(json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [
            { "type": "bridge", "ipMasq": true },
            { "type": "portmap", "snat": true, "capabilities": { "portMappings": true, "mac": false } },
        ] }))
        .unwrap();
        assert!(both.can("portMappings") && !both.can("mac"));
        let given: Map<String, Value> =
            [("portMappings", json!([{ "hostPort": 1 }])), ("mac", json!("00:11:22:33:44:55"))]
                .map(|(name, value)| (name.to_owned(), value))
                .into_iter()
                .collect();
        let inputs: Vec<Value> = both
            .plugins()
            .map(|(_, plugin)| both.input(plugin, &given, Some(&json!({ "ips": [] }))))
            .collect();
        assert_eq!(
            inputs[0],
            json!({ "type": "bridge", "ipMasq": true, "name": "net", "cniVersion": "1.0.0", "prevResult": { "ips": [] } })
        );
        assert_eq!(
            inputs[1],
            json!({ "type": "portmap", "snat": true, "name": "net", "cniVersion": "1.0.0",
                "runtimeConfig": { "portMappings": [{ "hostPort": 1 }] }, "prevResult": { "ips": [] } })
        );
    }

    #[test]
    fn a_stored_configuration_is_checked_again() {
        let one =
            list(json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [{ "type": "ptp" }] })).unwrap();
        let text = serde_json::to_string(&one).unwrap();
        assert_eq!(serde_json::from_str::<NetworkList>(&text).unwrap(), one);
        assert!(serde_json::from_str::<NetworkList>("{}").is_err());
    }
}
