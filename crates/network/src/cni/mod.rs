//! Networks that CNI plugins make: executables of others, called as the specification says (CNI 1.1, and 0.3 to 1.0).
//!
//! An attachment is one interface of one container on one network. Each successful ADD is kept as libcni keeps it, in a
//! file with the configuration and the result, until its DEL: so a DEL is made with what the ADD was made with, whatever
//! has become of the configuration meanwhile, and what a former daemon has left is found and taken back.
//!
//! Invariant: an ADD that fails is followed by a DEL of all plugins of the list; a plugin has a minute, then its process
//! group is killed.

mod cache;
mod list;
mod plugin;
mod result;

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::error::Error;
use cache::{Cached, KIND};
pub use list::NetworkList;
use list::Version;
use plugin::Call;
pub(crate) use result::Made;

/// Where plugins are, and where what has to outlive a daemon is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// Searched in their order (`CNI_PATH`).
    pub plugins: Vec<PathBuf>,
    /// Results, below `results`; survives a reboot.
    pub cache: PathBuf,
    /// A file for each container on such a network, at which its network namespace is mounted.
    pub namespaces: PathBuf,
}

/// What a container brings for one attachment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attaching {
    pub container: String,
    /// Path of the network namespace; empty if it is gone.
    pub netns: String,
    pub interface: String,
    /// `CNI_ARGS`.
    pub args: Vec<(String, String)>,
    /// For `runtimeConfig`, by capability; a plugin gets those that it declares.
    pub capabilities: Map<String, Value>,
}

/// Calls the plugins of networks.
#[derive(Debug)]
pub(crate) struct Plugins {
    places: Places,
}

impl Plugins {
    pub fn new(places: Places) -> Self {
        Self { places }
    }

    /// The list for the newest version that its configuration, all its plugins (`VERSION`) and we know. Each of them has to
    /// be there; one that does not say what it knows is not asked again.
    pub fn negotiate(&self, list: NetworkList) -> Result<NetworkList, Error> {
        let mut versions = list.versions();
        for (kind, _) in list.plugins() {
            plugin::find(&self.places.plugins, kind)?;
            let Some(known) = self.known_versions(&list, kind) else { continue };
            let offered = versions.join(", ");
            versions.retain(|version| known.iter().any(|known| known == version));
            if versions.is_empty() {
                return Err(Error::InvalidCni {
                    place: list.name().to_owned(),
                    reason: format!(
                        "plugin {kind} does not know version {offered} of the specification; it knows {}",
                        known.join(", ")
                    ),
                });
            }
        }
        let best = versions.first().copied();
        Ok(match best {
            Some(version) => list.speaking(version),
            None => list,
        })
    }

    /// What a plugin says that it knows.
    fn known_versions(&self, list: &NetworkList, kind: &str) -> Option<Vec<String>> {
        let input = json!({ "cniVersion": list.versions().first()? });
        let answer = match self.call(list, kind, "VERSION", &Attaching::default(), &input) {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(%error, "a CNI plugin does not say which versions it knows");
                return None;
            }
        };
        let known = answer["supportedVersions"].as_array()?.iter().filter_map(Value::as_str);
        Some(known.map(str::to_owned).collect())
    }

    /// Asks the plugins whether they are ready to connect containers; those of versions without that question are taken to
    /// be.
    pub fn status(&self, list: &NetworkList) -> Result<(), Error> {
        if list.version() < Version::V1_1_0 {
            return Ok(());
        }
        list.plugins().try_for_each(|(kind, configuration)| {
            let input = list.input(configuration, &Map::new(), None);
            self.call(list, kind, "STATUS", &Attaching::default(), &input).map(|_nothing| ())
        })
    }

    /// Connects a container. After an error nothing of it is left that the plugins can take back.
    pub fn add(&self, list: &NetworkList, at: &Attaching) -> Result<Made, Error> {
        let added = self.add_all(list, at).and_then(|result| {
            let made = result::read(list.name(), &at.interface, &result)?;
            cache::write(&self.places.cache, &Cached::new(list, at, result))?;
            Ok(made)
        });
        if added.is_err()
            && let Err(error) = self.del_all(list, at, None)
        {
            tracing::warn!(container = at.container, %error, "take back a failed connection to a CNI network");
        }
        added
    }

    fn add_all(&self, list: &NetworkList, at: &Attaching) -> Result<Value, Error> {
        let mut result = None;
        for (kind, configuration) in list.plugins() {
            let input = list.input(configuration, &at.capabilities, result.as_ref());
            let answer = self.call(list, kind, "ADD", at, &input)?;
            result = Some(answer);
        }
        Ok(result.unwrap_or_default())
    }

    /// Disconnects a container, with what it was connected with if that is known. Plugins do not mind doing it again.
    pub fn del(
        &self,
        list: Option<&NetworkList>,
        network: &str,
        container: &str,
        interface: &str,
        netns: &str,
    ) -> Result<(), Error> {
        let known = cache::read(&self.places.cache, network, container, interface)?;
        let of_then = known.as_ref().map(Cached::list).transpose()?;
        let Some(list) = of_then.as_ref().or(list) else { return Ok(()) };
        let mut at = Attaching {
            container: container.to_owned(),
            interface: interface.to_owned(),
            ..Attaching::default()
        };
        if let Some(known) = &known {
            (at.args, at.capabilities) = (known.args(), known.capability_args.clone());
        }
        netns.clone_into(&mut at.netns);
        self.del_all(list, &at, known.as_ref().map(|known| &known.result))?;
        cache::remove(&self.places.cache, network, container, interface)
    }

    /// All plugins are asked, also after one that fails; its error is what is told.
    fn del_all(&self, list: &NetworkList, at: &Attaching, result: Option<&Value>) -> Result<(), Error> {
        let result = result.filter(|_| list.version() >= Version::V0_4_0);
        let mut outcome = Ok(());
        for (kind, configuration) in list.plugins().rev() {
            let input = list.input(configuration, &at.capabilities, result);
            let done = self.call(list, kind, "DEL", at, &input).map(|_nothing| ());
            outcome = outcome.and(done);
        }
        outcome
    }

    /// Asks whether a connection is as it was made; networks of versions without that question, or that do not want to
    /// be asked, are taken to be.
    pub fn check(&self, network: &str, container: &str, interface: &str, netns: &str) -> Result<(), Error> {
        let Some(known) = cache::read(&self.places.cache, network, container, interface)? else {
            return Ok(());
        };
        let list = known.list()?;
        if list.version() < Version::V0_4_0 || list.flag("disableCheck") {
            return Ok(());
        }
        let at = Attaching {
            container: container.to_owned(),
            netns: netns.to_owned(),
            interface: interface.to_owned(),
            args: known.args(),
            capabilities: known.capability_args.clone(),
        };
        for (kind, configuration) in list.plugins() {
            let input = list.input(configuration, &at.capabilities, Some(&known.result));
            self.call(&list, kind, "CHECK", &at, &input)?;
        }
        Ok(())
    }

    /// Takes back connections that are kept, but not among `valid` (container and interface), and lets plugins of a
    /// version that can do the same with what only they know. Returns how many connections were taken back.
    pub fn collect(&self, list: &NetworkList, valid: &[(String, String)]) -> Result<usize, Error> {
        let mut taken_back = 0;
        for known in cache::all(&self.places.cache)? {
            let is_valid = valid.iter().any(|(container, interface)| {
                (container, interface) == (&known.container_id, &known.if_name)
            });
            if known.network_name != list.name() || is_valid {
                continue;
            }
            let netns = self.namespace_of(&known.container_id);
            self.del(Some(list), list.name(), &known.container_id, &known.if_name, &netns)?;
            taken_back += 1;
        }
        if list.version() < Version::V1_1_0 || list.flag("disableGC") {
            return Ok(taken_back);
        }
        let valid: Vec<Value> = valid
            .iter()
            .map(|(container, interface)| json!({ "containerID": container, "ifname": interface }))
            .collect();
        for (kind, configuration) in list.plugins() {
            let mut input = list.input(configuration, &Map::new(), None);
            input["cni.dev/valid-attachments"] = json!(valid);
            self.call(list, kind, "GC", &Attaching::default(), &input)?;
        }
        Ok(taken_back)
    }

    fn call(
        &self,
        list: &NetworkList,
        kind: &str,
        command: &'static str,
        at: &Attaching,
        input: &Value,
    ) -> Result<Value, Error> {
        let call = Call { network: list.name(), kind, command, at, input, path: &self.places.plugins };
        call.make()
    }

    /// Where a container's network namespace is mounted.
    pub fn namespace_file(&self, container: &str) -> PathBuf {
        self.places.namespaces.join(container)
    }

    /// The same for plugins: empty if it is not there any more.
    pub fn namespace_of(&self, container: &str) -> String {
        let file = self.namespace_file(container);
        if file.exists() { file.display().to_string() } else { String::new() }
    }

    /// The containers whose namespaces are mounted.
    pub fn namespaces(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.places.namespaces).into_iter().flatten().filter_map(Result::ok);
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }
}

impl Cached {
    fn new(list: &NetworkList, at: &Attaching, result: Value) -> Self {
        Self {
            kind: KIND.to_owned(),
            container_id: at.container.clone(),
            config: cache::encode(list),
            if_name: at.interface.clone(),
            network_name: list.name().to_owned(),
            netns: at.netns.clone(),
            cni_args: at.args.iter().map(|(name, value)| [name.clone(), value.clone()]).collect(),
            capability_args: at.capabilities.clone(),
            result,
        }
    }

    fn args(&self) -> Vec<(String, String)> {
        self.cni_args.iter().map(|[name, value]| (name.clone(), value.clone())).collect()
    }
}
