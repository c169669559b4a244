//! Which OCI runtime makes a container: the engine's own, or another program by the name it was configured under.
//!
//! The own one has names that clients use for docker's default; a configured runtime of such a name goes before it. A
//! container keeps the name it was created with, and what the name means is looked up at every start.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use brigantine_shim::OtherRuntime;

use crate::{Error, Result};

/// The own runtime's name.
pub const OWN: &str = "brig-runtime";

/// Other names of it: docker's default is called `runc`, and clients ask for it by that name.
const ALIASES: [&str; 3] = ["brig", "runc", "io.containerd.runc.v2"];

/// What is configured; may change while the engine is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeTable {
    /// Used when a request names none.
    pub default: String,
    /// Other runtimes by name.
    pub others: BTreeMap<String, Runtime>,
}

/// Another runtime: a program with runc's command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runtime {
    pub path: PathBuf,
    /// Arguments that come before all others.
    pub args: Vec<String>,
}

impl Default for RuntimeTable {
    fn default() -> Self {
        Self { default: OWN.to_owned(), others: BTreeMap::new() }
    }
}

impl RuntimeTable {
    /// What a name, or an absolute path, means; `None` is the own runtime.
    fn find(&self, name: &str) -> Result<Option<OtherRuntime>> {
        if let Some(Runtime { path, args }) = self.others.get(name) {
            return Ok(Some(OtherRuntime { path: path.clone(), args: args.clone() }));
        }
        if name == OWN || ALIASES.contains(&name) {
            return Ok(None);
        }
        if name.starts_with('/') {
            return Ok(Some(OtherRuntime { path: name.into(), args: Vec::new() }));
        }
        let known: Vec<&str> = [OWN].into_iter().chain(self.others.keys().map(String::as_str)).collect();
        Err(Error::invalid(format!(
            "unknown or invalid runtime name: {name} (there are {}; others are named by an absolute path, or made known with --add-runtime {name}=PATH)",
            known.join(", ")
        )))
    }

    /// Whether the default is a runtime that there is.
    pub fn check(&self) -> Result<()> {
        self.find(&self.default).map(drop)
    }
}

/// The runtimes as they are configured now.
#[derive(Debug)]
pub struct Runtimes(RwLock<RuntimeTable>);

impl Runtimes {
    pub(crate) fn new(table: RuntimeTable) -> Self {
        Self(RwLock::new(table))
    }

    /// What is configured.
    pub fn table(&self) -> RuntimeTable {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over another configuration; containers that run stay what they are.
    pub fn replace(&self, table: RuntimeTable) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = table;
    }

    pub(crate) fn default_name(&self) -> String {
        self.0.read().unwrap_or_else(PoisonError::into_inner).default.clone()
    }

    /// The runtime of this name, or the default one; `None` is the own one. Its program must be there.
    pub(crate) fn choose(&self, name: Option<&str>) -> Result<Option<OtherRuntime>> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let name = name.filter(|name| !name.is_empty()).unwrap_or(&table.default);
        let found = table.find(name)?;
        if let Some(other) = &found
            && !is_program(&other.path)
        {
            return Err(Error::invalid(format!(
                "the runtime {name} cannot be used: {} is not an executable file",
                other.path.display()
            )));
        }
        Ok(found)
    }
}

fn is_program(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtimes(others: &[(&str, &str)]) -> Runtimes {
        let others = others.iter().map(|(name, path)| {
            ((*name).to_owned(), Runtime { path: (*path).into(), args: vec!["--debug".to_owned()] })
        });
        Runtimes::new(RuntimeTable { others: others.collect(), ..RuntimeTable::default() })
    }

    #[test]
    fn runc_is_the_own_runtime_unless_one_of_that_name_is_configured() {
        assert_eq!(runtimes(&[]).choose(Some("runc")).unwrap(), None);
        assert_eq!(runtimes(&[]).choose(None).unwrap(), None);
        let chosen = runtimes(&[("runc", "/bin/true")]).choose(Some("runc")).unwrap().unwrap();
        assert_eq!(
            (chosen.path.to_str(), &chosen.args[..]),
            (Some("/bin/true"), &["--debug".to_owned()][..])
        );
    }

    #[test]
    fn others_are_known_by_name_or_path() {
        let error = runtimes(&[("crun", "/bin/true")]).choose(Some("kata")).unwrap_err().to_string();
        assert!(error.starts_with("unknown or invalid runtime name: kata"), "{error}");
        assert!(error.contains("brig-runtime, crun"), "{error}");
        assert!(runtimes(&[]).choose(Some("/bin/true")).unwrap().is_some());
        let error = runtimes(&[]).choose(Some("/etc/passwd")).unwrap_err().to_string();
        assert!(error.contains("/etc/passwd is not an executable file"), "{error}");
    }
}
